"""Workers on other machines: what they make comes to the run folder, and what they learn reaches the others.

A worker that sees the run folder writes there. Any other works in a scratch folder of its machine, and its files
travel with the result. With a store (`--shared`), trained weights are fetched from it before a candidate is evaluated,
and kept in it afterwards; so are the files of the front, for other searches in the same study.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.codec import plan_key
from ..core.types import Candidate, Evaluation, Task
from ..evaluators.pipeline import Evaluator
from ..studies.study import Record, Study, part_folder
from .several import Part, SeveralTargets
from .store import Store, StoreError

MARK = ".run-id"
LEARNT = (".safetensors", ".training")  # what is shared of the cache; figures belong to the machine
STALE = 86400.0  # seconds after which a scratch folder counts as left behind


@dataclass(frozen=True)
class Parcel:
    """A result with its files.

    Attributes:
        evaluation: its paths are those of the worker's machine.
        root: the folder that they lie in there, in place of the run folder.
        files: content by path below `root`; none where the worker wrote into the run folder itself.
    """

    evaluation: Evaluation
    root: Path
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Travelling:
    """Evaluates candidates on any machine; sent to every worker once.

    Attributes:
        evaluate: with the paths of the run folder.
        folder: the run folder, absolute.
        run: what its mark says, so that a folder of the same name elsewhere is not taken for it.
        files: of the untouched model, by path below the run folder.
        store: for trained weights; None to share none between machines.
    """

    evaluate: Evaluator | SeveralTargets
    folder: Path
    run: str
    files: Mapping[str, bytes]
    store: Store | None

    @property
    def task(self) -> Task:
        """What is compressed."""
        return self.evaluate.task

    def __call__(self, candidate: Candidate) -> Parcel:
        """Evaluate; the result comes with its files where the run folder is not here."""
        home = _reads(self.folder / MARK) == self.run
        root = self.folder if home else self._scratch()
        evaluate = _moved(self.evaluate, self.folder, root, keep_earlier=home)
        keys = {plan_key(candidate.plan[: end + 1]) for end in range(len(candidate.plan))} | {candidate.key}
        before, trouble = self._fetch(keys, root / "cache")
        evaluation = evaluate(candidate)
        trouble = trouble or self._keep(keys, root / "cache", before)
        if trouble:  # the candidate is none the worse for it
            told = f"trained weights could not be shared: {trouble}"
            evaluation = dataclasses.replace(evaluation, notes=(*evaluation.notes, told))
        if home:
            return Parcel(evaluation, root, {})
        files = _pack(evaluation, root)
        for name in files.keys() - self.files.keys():
            (root / name).unlink()
        return Parcel(evaluation, root, files)

    def _scratch(self) -> Path:
        """The folder that stands in for the run folder on this machine."""
        base = Path(tempfile.gettempdir()) / f"autocompress-{os.getuid()}-runs"
        root = base / self.run
        if not root.exists():
            for other in base.glob("*/"):
                if time.time() - other.stat().st_mtime > STALE:
                    shutil.rmtree(other, ignore_errors=True)
        for name, content in self.files.items():
            if not (root / name).is_file():
                _write(root / name, content)
        root.mkdir(parents=True, exist_ok=True)
        os.utime(root)
        return root

    def _fetch(self, keys: set[str], cache: Path) -> tuple[dict[str, tuple[int, int]], str]:
        """Get what others learnt; returns the state of all such files here, and what went wrong."""
        if self.store is None:
            return {}, ""
        try:
            for key in keys:
                for name in self.store.names(f"cache/{key}"):
                    here = cache / name.removeprefix("cache/")
                    if here.suffix in LEARNT and not here.exists():
                        self.store.get(name, here)
        except StoreError as error:
            return _states(keys, cache), str(error)
        return _states(keys, cache), ""

    def _keep(self, keys: set[str], cache: Path, before: Mapping[str, tuple[int, int]]) -> str:
        """Store what was learnt, and delete what is of no use any more; returns what went wrong."""
        if self.store is None:
            return ""
        after = _states(keys, cache)
        try:
            for name, state in after.items():
                if before.get(name) != state:
                    self.store.put(cache / name, f"cache/{name}")
            for name in before.keys() - after.keys():
                self.store.drop(f"cache/{name}")
        except StoreError as error:
            return str(error)
        return ""


def travelling(
    evaluate: Evaluator | SeveralTargets, folder: Path, parts: list[Part], store: Store | None
) -> tuple[Travelling, Callable[[Parcel], Evaluation]]:
    """The evaluator for workers on other machines, and what takes their results in here."""
    mark = _reads(folder / MARK)
    if not mark:
        mark = uuid.uuid4().hex
        (folder / MARK).write_text(mark)
    files: dict[str, bytes] = {}
    for part in parts:
        if part.evaluator.baseline is not None:
            files |= _pack(part.evaluator.baseline, folder)
    absolute = folder.resolve()
    there = Travelling(_moved(evaluate, folder, absolute), absolute, mark, files, store)

    def receive(parcel: Parcel) -> Evaluation:
        for name, content in parcel.files.items():
            _write(folder / name, content)
        return _relocated(parcel.evaluation, parcel.root, folder)

    return there, receive


class Exchange:
    """The files of the front, for the other searches in the same study."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def give(self, study: Study, target: str, evaluation: Evaluation) -> None:
        """Store a new result's files, where they are still here: those of beaten trials are not."""
        artifact = evaluation.artifact
        if artifact is None or not artifact.path.is_file():
            return
        with suppress(StoreError):  # the others do without, and say so
            for path in _tree(artifact.path.parent):
                self._store.put(path, f"{_place(target)}/{path.relative_to(study.folder / 'artifacts').as_posix()}")

    def take(self, study: Study, target: str) -> None:
        """Fetch the files of the front that others made; drop those of trials that are not on it any more."""
        records = study.records()
        best = study.front_trials(records)
        with suppress(StoreError):
            for record in records:
                if record.artifact is None:
                    continue
                stored = self._store.names(f"{_place(target)}/{_folder_of(record, study)}/")
                if record.trial in best or record.baseline:
                    for name in stored if not record.artifact.path.is_file() else ():
                        self._store.get(name, study.folder / "artifacts" / name.removeprefix(f"{_place(target)}/"))
                else:
                    for name in stored:
                        self._store.drop(name)


def _place(target: str) -> str:
    return f"artifacts/{part_folder(target)}"


def _folder_of(record: Record, study: Study) -> str:
    assert record.artifact is not None
    return record.artifact.path.parent.relative_to(study.folder / "artifacts").as_posix()


def _moved(
    evaluate: Evaluator | SeveralTargets, old: Path, new: Path, keep_earlier: bool = True
) -> Evaluator | SeveralTargets:
    """The evaluator with another run folder; files of earlier runs are left out where they can't be read."""
    if isinstance(evaluate, SeveralTargets):
        moved = {target: _moved_one(each, old, new, keep_earlier) for target, each in evaluate.evaluators.items()}
        return dataclasses.replace(evaluate, evaluators=moved)
    return _moved_one(evaluate, old, new, keep_earlier)


def _moved_one(evaluate: Evaluator, old: Path, new: Path, keep_earlier: bool) -> Evaluator:
    baseline = None if evaluate.baseline is None else _relocated(evaluate.baseline, old, new)
    cache = None if evaluate.cache is None else new / evaluate.cache.relative_to(old)
    folder = new / evaluate.folder.relative_to(old)
    changed = dataclasses.replace(evaluate, folder=folder, baseline=baseline, cache=cache)
    away: dict[str, Any] = {} if keep_earlier or not getattr(evaluate, "earlier", None) else {"earlier": {}}
    return dataclasses.replace(changed, **away)


def _relocated(evaluation: Evaluation, old: Path, new: Path) -> Evaluation:
    artifact = evaluation.artifact
    if artifact is not None:
        artifact = dataclasses.replace(artifact, path=new / artifact.path.relative_to(old))
    parts = {target: _relocated(part, old, new) for target, part in evaluation.parts.items()}
    return dataclasses.replace(evaluation, artifact=artifact, parts=parts)


def _pack(evaluation: Evaluation, root: Path) -> dict[str, bytes]:
    """The files of a result, those of its parts included, by path below `root`."""
    found: dict[str, bytes] = {}
    for each in (evaluation, *evaluation.parts.values()):
        if each.artifact is not None:
            for path in _tree(each.artifact.path.parent):
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def _tree(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")


def _states(keys: set[str], cache: Path) -> dict[str, tuple[int, int]]:
    """(time, size) of the trained weights of these keys, by file name."""
    found = {}
    for path in cache.glob("*") if cache.is_dir() else ():
        if path.suffix in LEARNT and path.name[:16] in keys:
            state = path.stat()
            found[path.name] = (state.st_mtime_ns, state.st_size)
    return found


def _reads(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    part.write_bytes(content)
    part.replace(path)
