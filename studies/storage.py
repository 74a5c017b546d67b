"""The study's database: whole finished trials, written by one process a search, in Optuna's own schema.

Optuna's relational storage commits once per parameter and attribute. Here a trial goes in as one
transaction when it is finished, so that a killed search leaves neither half a trial nor a running one,
and anything that reads Optuna studies (its dashboard, its visualisations) can read it. Journal files and
gRPC servers take a whole trial at once, too.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from ..core.errors import InputError, MissingDependencyError

STUDY_NAME = "autocompress"
FRONT_PREFIX = "front:"
PIECE = "piece"  # user attribute of trials in shared studies: what was evaluated, and how thoroughly


class Database:
    """One Optuna study in a relational database, a journal file or behind a gRPC server.

    Args:
        url: as for `open_storage`, such as "sqlite:///run/study.db".
        directions: of the objectives, for a new study; None opens an existing one.
        names: of the objectives, as the dashboard shows them.
        shared: whether other searches may write into the study meanwhile.

    Raises:
        InputError: the database can't be opened, or holds no such study.
    """

    def __init__(
        self,
        url: str,
        directions: Sequence[str] | None = None,
        names: Sequence[str] = (),
        study: str = STUDY_NAME,
        shared: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.shared = shared
        storage = open_storage(url)
        try:
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
            raise InputError(f"{show_url(url)} holds no study called '{study}'") from error
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, ValueError) as error:
            raise InputError(f"can't open the study at {show_url(url)}: {str(error).splitlines()[0]}") from error
        self._engine = storage.engine if isinstance(storage, optuna.storages.RDBStorage) else None
        if self._engine is not None:
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
        piece: str = "",
    ) -> int | None:
        """Write one finished trial in one transaction; return its number.

        Args:
            values: of complete trials alone; None for the others.
            piece: names the piece of work; in a shared study, None is returned where another search has written it.
        """
        end = datetime.datetime.now()
        trial = FrozenTrial(
            number=-1,
            trial_id=-1,
            state=state,
            value=None,
            values=values,
            datetime_start=end - datetime.timedelta(seconds=seconds),
            datetime_complete=end,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={**user_attrs, **({PIECE: piece} if self.shared and piece else {})},
            system_attrs=dict(system_attrs),
            intermediate_values={},
        )
        if self._engine is not None:
            with self._engine.begin() as connection:
                return self._add_rows(connection, trial)
        if PIECE in trial.user_attrs and any(other.user_attrs.get(PIECE) == piece for other in self.trials()):
            return None
        storage = self.study._storage
        return storage.get_trial_number_from_id(storage.create_new_trial(self.study._study_id, template_trial=trial))

    def _add_rows(self, connection: sqlalchemy.Connection, trial: FrozenTrial) -> int | None:
        """The rows that Optuna's relational storage would write, without its commit for each of them."""
        trials, studies = self._tables.tables["trials"], self._tables.tables["studies"]
        mine = self.study._study_id
        # Numbers are given one by one: a write to the study's row makes other writers wait, in every database.
        connection.execute(studies.update().where(studies.c.study_id == mine).values(study_name=studies.c.study_name))
        if PIECE in trial.user_attrs and self._has(connection, trial.user_attrs[PIECE]):
            return None
        last = connection.execute(
            sqlalchemy.select(sqlalchemy.func.max(trials.c.number)).where(trials.c.study_id == mine)
        ).scalar()
        number = 0 if last is None else last + 1
        row = {
            "number": number,
            "study_id": mine,
            "state": trial.state.name,
            "datetime_start": trial.datetime_start,
            "datetime_complete": trial.datetime_complete,
        }
        inserted = connection.execute(trials.insert(), row).inserted_primary_key
        assert inserted is not None
        trial_id = inserted[0]
        self._insert(
            connection,
            "trial_values",
            [
                {"trial_id": trial_id, "objective": i, "value": value, "value_type": "FINITE"}
                for i, value in enumerate(trial.values or ())
            ],
        )
        self._insert(
            connection,
            "trial_params",
            [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": trial.distributions[name].to_internal_repr(value),
                    "distribution_json": distribution_to_json(trial.distributions[name]),
                }
                for name, value in trial.params.items()
            ],
        )
        for table, attributes in (
            ("trial_user_attributes", trial.user_attrs),
            ("trial_system_attributes", trial.system_attrs),
        ):
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

    def _has(self, connection: sqlalchemy.Connection, piece: str) -> bool:
        trials, attributes = self._tables.tables["trials"], self._tables.tables["trial_user_attributes"]
        found = (
            sqlalchemy.select(trials.c.trial_id)
            .join(attributes, attributes.c.trial_id == trials.c.trial_id)
            .where(trials.c.study_id == self.study._study_id)
            .where(attributes.c.key == PIECE, attributes.c.value_json == json.dumps(piece))
        )
        return connection.execute(found).first() is not None

    def _insert(self, connection: sqlalchemy.Connection, table: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            connection.execute(self._tables.tables[table].insert(), rows)


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage behind a URL.

    Args:
        url: SQLAlchemy's, "journal:PATH" for Optuna's journal file, or "grpc://HOST:PORT" for its gRPC server.

    Raises:
        InputError: it can't be opened.
        MissingDependencyError: the package that it needs is not here.
    """
    try:
        if url.startswith("journal:"):
            path = Path(url.removeprefix("journal://").removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path), _MendingLock(path)))  # type: ignore[arg-type]
        if url.startswith("grpc:"):
            return _open_proxy(url)
        storage = optuna.storages.RDBStorage(url, engine_kwargs=_engine_settings(url))
        if url.startswith("sqlite"):
            sqlalchemy.event.listen(storage.engine, "connect", _tune_sqlite)
            storage.engine.dispose()  # connections opened before the settings above
        return storage
    except ImportError as error:
        driver = next((hint for name, hint in _DRIVERS.items() if name in url), "the package that it names")
        raise MissingDependencyError(f"{show_url(url)}: {str(error).splitlines()[0]} (install {driver})") from error
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"can't open the study at {show_url(url)}: {str(error).splitlines()[0]}; expected such as "
            "postgresql+psycopg://USER@HOST/NAME, sqlite:///FILE, journal:PATH or grpc://HOST:PORT"
        ) from error


_DRIVERS = {"psycopg": "'autocompress[postgresql]'", "grpc": "'autocompress[grpc]'"}


class _MendingLock:
    """Optuna's lock of a journal file, which cuts off what a write has left that found the disk full, or was killed.

    Optuna's next write would go on in the middle of that line, and nobody could read the file any more.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, JournalFileSymlinkLock(str(path))

    def acquire(self) -> bool:
        """Wait for the lock, and leave whole lines."""
        acquired = self._lock.acquire()
        with open(self._path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return acquired

    def release(self) -> None:
        """Let others write."""
        self._lock.release()


def _open_proxy(url: str) -> optuna.storages.BaseStorage:
    import grpc

    match = re.fullmatch(r"grpc://([\w.-]+):(\d+)", url)
    if match is None:
        raise ValueError("expected grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=match[1], port=int(match[2]))
    try:
        storage.wait_server_ready(timeout=10)
    except grpc.FutureTimeoutError as error:
        raise ValueError("no server answers there") from error
    return storage


def show_url(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"(://[^:/@]+):[^@/]*@", r"\1:***@", url)


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
