"""The study's database: whole finished trials, written by one process, in Optuna's own schema.

Optuna's relational storage commits once per parameter and attribute. Here a trial goes in as one
transaction when it is finished, so that a killed search leaves neither half a trial nor a running one,
and anything that reads Optuna studies (its dashboard, its visualisations) can read it.
"""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from ..core.errors import InputError

STUDY_NAME = "autocompress"
FRONT_PREFIX = "front:"


class Database:
    """One Optuna study in a relational database.

    Args:
        url: SQLAlchemy URL, such as "sqlite:///run/study.db".
        directions: of the objectives, for a new study; None opens an existing one.
        names: of the objectives, as the dashboard shows them.

    Raises:
        InputError: the database can't be opened, or holds no such study.
    """

    def __init__(
        self, url: str, directions: Sequence[str] | None = None, names: Sequence[str] = (), study: str = STUDY_NAME
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=_engine_settings(url))
            if url.startswith("sqlite"):
                sqlalchemy.event.listen(storage.engine, "connect", _tune_sqlite)
                storage.engine.dispose()  # connections opened before the settings above
            if directions is None:
                self.study = optuna.load_study(study_name=study, storage=storage)
            else:
                wanted: list[Any] = [*directions]
                self.study = optuna.create_study(
                    study_name=study, storage=storage, directions=wanted, load_if_exists=True
                )
                if [d.name.lower() for d in self.study.directions] != wanted:
                    raise ValueError(f"study '{study}' there has other objectives; choose another study name")
                if self.study.metric_names != list(names):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                        self.study.set_metric_names(list(names))
        except KeyError as error:
            raise InputError(f"{url} holds no study called '{study}'") from error
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, ImportError, ValueError) as error:
            raise InputError(f"can't open the study at {url}: {str(error).splitlines()[0]}") from error
        self._engine = storage.engine
        self._tables = sqlalchemy.MetaData()
        self._tables.reflect(self._engine)

    def add(
        self,
        *,
        state: TrialState,
        values: Sequence[float] | None,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
        seconds: float,
    ) -> int:
        """Write one finished trial in one transaction; return its number.

        Args:
            values: of complete trials alone; None for the others.
        """
        end = datetime.datetime.now()
        with self._engine.begin() as connection:
            trials = self._tables.tables["trials"]
            mine = trials.c.study_id == self.study._study_id
            last = connection.execute(sqlalchemy.select(sqlalchemy.func.max(trials.c.number)).where(mine)).scalar()
            number = 0 if last is None else last + 1
            row = {
                "number": number,
                "study_id": self.study._study_id,
                "state": state.name,
                "datetime_start": end - datetime.timedelta(seconds=seconds),
                "datetime_complete": end,
            }
            trial_id = connection.execute(trials.insert().returning(trials.c.trial_id), row).scalar_one()
            self._insert(
                connection,
                "trial_values",
                [
                    {"trial_id": trial_id, "objective": i, "value": value, "value_type": "FINITE"}
                    for i, value in enumerate(values or ())
                ],
            )
            self._insert(
                connection,
                "trial_params",
                [
                    {
                        "trial_id": trial_id,
                        "param_name": name,
                        "param_value": distributions[name].to_internal_repr(value),
                        "distribution_json": distribution_to_json(distributions[name]),
                    }
                    for name, value in params.items()
                ],
            )
            for table, attributes in (("trial_user_attributes", user_attrs), ("trial_system_attributes", system_attrs)):
                rows = [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in attributes.items()]
                self._insert(connection, table, rows)
        return number

    def trials(self) -> list[FrozenTrial]:
        """All finished trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def set_front(self, number: int, split: str, metrics: Mapping[str, Any], sessions: Sequence[Any] = ()) -> None:
        """Keep what a front point was measured at again, on `split`, and what each time gave."""
        found = {"split": split, "metrics": metrics, "sessions": [*sessions]}
        self.study.set_user_attr(f"{FRONT_PREFIX}{number}", found)

    def front(self) -> dict[int, dict[str, Any]]:
        """{trial number: {"split", "metrics", "sessions"}} of the points measured again."""
        attributes = self.study.user_attrs.items()
        return {int(key.removeprefix(FRONT_PREFIX)): value for key, value in attributes if key.startswith(FRONT_PREFIX)}

    def _insert(self, connection: sqlalchemy.Connection, table: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            connection.execute(self._tables.tables[table].insert(), rows)


def sqlite_url(folder: Path) -> str:
    """URL of a run folder's own database."""
    return f"sqlite:///{(folder / 'study.db').resolve()}"


def _engine_settings(url: str) -> dict[str, Any]:
    # Wait for another process's write (a dashboard's note, say) rather than fail.
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}


def _tune_sqlite(connection: Any, record: Any) -> None:
    """Readers never block the writer; a commit survives the death of the process (not a power cut)."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
