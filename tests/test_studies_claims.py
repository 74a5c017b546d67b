"""Searches that want the same piece of work at once: one gets it, in whatever order they look and write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from autocompress.studies.claims import Claims
from autocompress.studies.storage import Database


class Paused:
    """A storage whose writes wait until they are let through."""

    def __init__(self, storage: optuna.storages.BaseStorage) -> None:
        self._storage = storage
        self.waiting, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def set_study_system_attr(self, *arguments: Any) -> None:
        self.waiting.set()
        assert self.go.wait(60)
        self._storage.set_study_system_attr(*arguments)


@pytest.fixture
def open_study(tmp_path: Path) -> Callable[[], optuna.Study]:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    return lambda: Database(url, ["minimize"], ["size"], shared=True).study


def test_a_search_that_looked_before_another_had_claimed_and_writes_after_gets_nothing(
    open_study: Callable[[], optuna.Study],
) -> None:
    study = open_study()
    for _ in range(8):  # names are drawn by chance, and the order of names must not matter
        paused = Paused(open_study()._storage)
        quick, slow = Claims(study._storage, study._study_id), Claims(paused, study._study_id)  # type: ignore[arg-type]
        got: list[bool] = []
        late = threading.Thread(target=lambda slow=slow, got=got: got.append(slow.take("a")))  # type: ignore[misc]
        late.start()
        assert paused.waiting.wait(60)
        assert quick.take("a")
        paused.go.set()
        late.join()
        assert got == [False]
        quick.close()


def test_of_searches_that_ask_at_once_one_gets_each_piece(open_study: Callable[[], optuna.Study]) -> None:
    pieces = [f"piece {number}" for number in range(12)]
    got: list[list[str]] = [[], [], [], []]
    barrier = threading.Barrier(len(got))

    def work(mine: list[str]) -> None:
        study = open_study()
        claims = Claims(study._storage, study._study_id)
        for piece in pieces:
            barrier.wait(60)
            if claims.take(piece):
                mine.append(piece)

    open_study()
    searches = [threading.Thread(target=work, args=(mine,)) for mine in got]
    for search in searches:
        search.start()
    for search in searches:
        search.join()
    assert sorted(piece for mine in got for piece in mine) == sorted(pieces)
