"""One candidate's way: cheap figures first, then training, the file, its accuracy, and the target."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.codec import check_order
from ..core.disk import storage_trouble
from ..core.errors import AutocompressError, CandidateError, DeviceLostError
from ..core.lane import LANE
from ..core.notes import collect_notes, note
from ..core.types import (
    Artifact,
    Backend,
    Candidate,
    Capabilities,
    Evaluation,
    Measurement,
    Method,
    Plan,
    Provenance,
    State,
    Task,
)
from .adaptive import adapts, expected_again, expected_measurements, is_exit_rate
from .fidelity import UNTRAINED, Figures, Training, prepared, structure_of
from .objectives import Built, Constraint, Objective, alongside
from .reuse import EarlierFile, copy_file, drop_file, known_accuracy, same_graph
from .widths import is_rounded, widths
from .widths import lacks_kernels as lacks_kernels
from .widths import lowest_bits as lowest_bits

if TYPE_CHECKING:
    from torch import nn


# Relative deviation of the runtime's logits from PyTorch's beyond which a file counts as broken.
FLOAT_PARITY, ROUNDED_PARITY = 0.01, 0.5
PARITY_IMAGES = 64


@dataclass(frozen=True)
class Evaluator:
    """Turns candidates into evaluations, for one task and target; sent to every worker once.

    Attributes:
        folder: run folder; files go to `artifacts/KEY/`, trained weights to `cache/`.
        baseline: measurements and file of the untouched model, for relative limits and interleaving.
        cache: folder of trained weights; None for `cache/` in the run folder.
        earlier: files that earlier runs on the same model and data made, by the key of the plan.
    """

    task: Task
    backend: Backend
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    folder: Path
    baseline: Evaluation | None = None
    cache: Path | None = None
    earlier: Mapping[str, EarlierFile] = field(default_factory=dict)

    def __call__(self, candidate: Candidate) -> Evaluation:
        """Evaluate; failures of the candidate come back as a result with a reason.

        Raises:
            DeviceLostError: the device went away, or the disk is full, which says nothing about the candidate.
        """
        started = time.perf_counter()
        found: dict[str, Measurement] = {}
        notes: list[str] = []
        cache = self.cache or self.folder / "cache"
        training = Training(self.task, cache, candidate.fidelity)
        figures = Figures.of(cache, self.backend.name, candidate.key)
        try:
            with LANE.shared(), collect_notes() as notes:
                evaluation = self._evaluate(candidate, found, training, figures)
        except DeviceLostError:
            raise
        except Exception as error:
            trouble = storage_trouble(error, self.folder)
            if trouble is not None:
                raise trouble from error
            # RuntimeError is what torch and the runtimes raise for shapes, memory and kernels.
            if not isinstance(error, (AutocompressError, MemoryError, RuntimeError, TimeoutError)):
                raise
            evaluation = Evaluation(candidate, State.FAILED, found, reason=describe_error(error))
        if evaluation.state is not State.STOPPED:
            figures.drop()
        return dataclasses.replace(
            evaluation,
            candidate=dataclasses.replace(candidate, fidelity=1.0) if training.whole else candidate,
            seconds=time.perf_counter() - started,
            notes=tuple(notes),
            steps=training.steps,
        )

    def _evaluate(
        self, candidate: Candidate, found: dict[str, Measurement], training: Training, figures: Figures
    ) -> Evaluation:
        check_order(candidate.plan)
        model = self.task.build()
        first = next((i for i, step in enumerate(candidate.plan) if step.retrains), len(candidate.plan))
        for step in candidate.plan[:first]:
            model = step(model, self.task)
        found.update(cheap_figures(model, self.task))
        bound = self._size_bound(model, candidate.plan)
        reason = self._violated(found) or self._violated({"size": bound}, early="at least ")
        if reason:
            return Evaluation(candidate, State.INFEASIBLE, found, reason, self._violations(found))
        artifact = self._taken_over(model, candidate, first, found)
        if artifact is None:
            if first < len(candidate.plan) and self._limits_hardware() and not figures.known():
                reason, trial = self._too_slow(model, candidate, first)
                if reason:
                    both = {**found, **trial}
                    return Evaluation(candidate, State.INFEASIBLE, both, reason, self._violations(both))
            for position, step in enumerate(candidate.plan[first:], first):
                model = training(model, candidate.plan[: position + 1]) if step.retrains else step(model, self.task)
            artifact = self.backend.build(model, self.task, self.folder / "artifacts" / candidate.key)
            self._size(artifact, found)
            found["parity"] = self._check_parity(model, artifact, candidate.plan)
            found.update(self.accuracy(artifact, candidate.plan, "search"))
            if self._asks_for("compressed_size"):
                found["compressed_size"] = compressed_size(model)
        stays = not training.whole or figures.known()
        structure = structure_of(model, self.task, artifact) if stays else ""
        device = figures.read(structure)
        if device is None:
            device = self._device_figures(artifact, candidate.plan)
            if not training.whole:
                figures.write(structure, device)
        found.update(device)
        self._add_own(artifact, found)
        if adapts(model) or self._asks_for("expected_latency") or self._asks_for("expected_macs"):
            reference = self._reference(candidate.plan)
            found.update(expected_measurements(model, self.task, self.backend, artifact, found, reference))
        if not training.whole:
            shutil.rmtree(self.folder / "artifacts" / candidate.key)  # nobody may deploy it
            # What learns on may come to keep the limits that depend on what it has learnt.
            reason = self._violated({name: m for name, m in found.items() if name in (*device, *UNTRAINED)})
            state = State.INFEASIBLE if reason else State.STOPPED
            reason = reason or f"stopped after {candidate.fidelity:.0%} of its training"
            return Evaluation(candidate, state, found, reason, self._violations(found))
        reason = self._violated(found)
        state = State.INFEASIBLE if reason else State.COMPLETE
        return Evaluation(candidate, state, found, reason, self._violations(found), artifact)

    def again(
        self, artifact: Artifact, plan: Plan, known: Mapping[str, Measurement], split: str
    ) -> dict[str, Measurement]:
        """Measure a finished candidate's file once more: accuracy on `split`, and the target's figures.

        Args:
            known: its figures so far; those that can't change are taken from there.
            split: "" keeps the accuracy that is known.

        Raises:
            CandidateError: the file is gone, or does not run any more.
        """
        if not artifact.path.is_file():
            raise CandidateError(f"{artifact.path} is gone")
        with LANE.shared():
            found = {
                name: m
                for name, m in known.items()
                if name in ("parameters", "macs", "size", "compressed_size", "parity", "expected_macs")
                or is_exit_rate(name)
                or (not split and name in ("accuracy", "loss", "calibration_error"))
            }
            if split:
                found |= self.accuracy(artifact, plan, split)
            found |= self._device_figures(artifact, plan)
            self._add_own(artifact, found)
            if "expected_latency" in known:
                found |= expected_again(self.task, self.backend, artifact, found, self._reference(plan))
        return found

    def _device_figures(self, artifact: Artifact, plan: Plan) -> dict[str, Measurement]:
        return {m.name: m for m in self.backend.measure(artifact, self.task, self._reference(plan))}

    def _add_own(self, artifact: Artifact, found: dict[str, Measurement]) -> None:
        """Add the figures of the objectives that people brought along."""
        for objective in self.objectives:
            if objective.function is not None:
                found[objective.name] = objective.function(Built(self.task, artifact, self.backend, found))

    def _reference(self, plan: Plan) -> Artifact | None:
        """The untouched model's file, to be measured in turns with any other."""
        return self.baseline.artifact if self.baseline and plan else None

    def accuracy(self, artifact: Artifact, plan: Plan, split: str) -> dict[str, Measurement]:
        """Accuracy, loss and calibration error of the file on `split`, as the target's runtime computes them."""
        import numpy as np

        from ..tasks.data import normalise
        from .metrics import score

        part = self.task.data.split(split)
        # Normalised in pieces: float32 takes four times the memory of the stored pixels.
        pieces = [
            self.backend.predict(artifact, normalise(self.task.data, part.inputs[start : start + 1024]))
            for start in range(0, len(part), 1024)
        ]
        return score(np.concatenate(pieces), part.labels, self._source(plan))

    def _source(self, plan: Plan) -> Provenance:
        """Of a plan's accuracy."""
        lacking = lacks_kernels(plan, self.backend.capabilities)
        return self._predicted(Method.SIMULATED if lacking else Method.MEASURED)

    def _predicted(self, method: Method) -> Provenance:
        """Where the backend's logits come from: the device that it names, or else this machine."""
        from ..hardware.device import provenance

        source = provenance(self.backend.name, method=method)
        device = getattr(self.backend, "predicts_on", "")
        return dataclasses.replace(source, device=device) if device else source

    def _size(self, artifact: Artifact, found: dict[str, Measurement]) -> None:
        from ..hardware.device import provenance

        source = provenance(self.backend.name)
        found["size"] = Measurement("size", float(artifact.size_bytes), "B", None, 1, source)

    def _size_bound(self, model: nn.Module, plan: Plan) -> Measurement:
        """Bytes of the weights alone, at the plan's bit-widths: less than any file of this candidate."""
        from ..hardware.device import provenance

        # Files hold 4, 8, 16 or 32 bits for each weight; a target may round what a plan leaves in floating point.
        lowest = min(*widths(plan, "bits"), max(self.backend.capabilities.bits))
        stored = next(size for size in (4, 8, 16, 32) if lowest <= size)
        weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        return Measurement("size", weights * stored / 8, "B", None, 1, provenance("computed", method=Method.PREDICTED))

    def _asks_for(self, name: str) -> bool:
        return name in {objective.name for objective in self.objectives} | {c.name for c in self.constraints}

    def _limits_hardware(self) -> bool:
        return self.baseline is not None and any(c.name in self.backend.capabilities.metrics for c in self.constraints)

    def _too_slow(self, model: nn.Module, candidate: Candidate, training: int) -> tuple[str, Mapping[str, Measurement]]:
        """Build and time the candidate before it is trained: its speed does not depend on what it learns."""
        _, artifact = self._draft(model, candidate, training)
        try:
            reference = self.baseline.artifact if self.baseline else None
            found = {m.name: m for m in self.backend.measure(artifact, self.task, reference)}
        finally:
            drop_file(artifact.path)
        return self._violated(found, early="before training "), found

    def _draft(self, model: nn.Module, candidate: Candidate, training: int) -> tuple[nn.Module, Artifact]:
        """The candidate without what it would learn from step `training` on, and its file."""
        import copy

        draft = copy.deepcopy(model)
        for step in candidate.plan[training:]:
            draft = prepared(step, draft, self.task) if step.retrains else step(draft, self.task)
        return draft, self.backend.build(draft, self.task, self.folder / "artifacts" / f"{candidate.key}.draft")

    def _taken_over(
        self, model: nn.Module, candidate: Candidate, first: int, found: dict[str, Measurement]
    ) -> Artifact | None:
        """A copy of the file that an earlier run made of the candidate, and what does not depend on the device."""
        earlier = self.earlier.get(candidate.key)
        asked = [name for name in ("compressed_size", "expected_latency", "expected_macs") if self._asks_for(name)]
        if earlier is None or earlier.adaptive or not all(name in earlier.metrics for name in asked):
            return None
        artifact = copy_file(earlier, self.backend.name, self.folder / "artifacts" / candidate.key)
        if artifact is None:
            return None
        if earlier.artifact.runtime != self.backend.name and not self._would_write(artifact, model, candidate, first):
            drop_file(artifact.path)
            return None
        untouched = self.baseline.measurements if self.baseline else {}
        accuracy = known_accuracy(earlier, self._source(candidate.plan), untouched)
        note(f"{earlier.name}; accuracy {'of that run' if accuracy else 'computed anew'}")
        self._size(artifact, found)
        found.update(accuracy or self.accuracy(artifact, candidate.plan, "search"))
        found.update({name: earlier.metrics[name] for name in asked})
        return artifact

    def _would_write(self, artifact: Artifact, model: nn.Module, candidate: Candidate, first: int) -> bool:
        """Whether this target's own file would differ in its weights alone, and the target computes it right."""
        draft, own = self._draft(model, candidate, first)
        try:
            self._check_parity(draft, own, candidate.plan)
            return same_graph(own.path, artifact.path)
        except CandidateError:
            return False
        finally:
            drop_file(own.path)

    def _check_parity(self, model: nn.Module, artifact: Artifact, plan: Plan) -> Measurement:
        """Compare the runtime's logits with PyTorch's; a file that computes something else is a failure."""
        import torch

        from ..tasks.data import normalise
        from .metrics import parity_error

        images = normalise(self.task.data, self.task.data.search.inputs[:PARITY_IMAGES])
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(images)).numpy()
        error = parity_error(expected, self.backend.predict(artifact, images))
        method = Method.SIMULATED if self.backend.capabilities.emulated else Method.MEASURED
        limit = FLOAT_PARITY if lowest_bits(plan) == 32 and not is_rounded(artifact) else ROUNDED_PARITY
        if not error <= limit:
            raise CandidateError(
                f"{self.backend.name} computes something else than PyTorch: the logits deviate by {error:.1%} "
                f"(allowed: {limit:.0%})"
            )
        return Measurement("parity", error, "", None, len(images), self._predicted(method))

    def _violations(self, found: Mapping[str, Measurement]) -> tuple[float | None, ...]:
        base = self.baseline.measurements if self.baseline else found
        return tuple(c.violation(found, base) if c.name in found else None for c in self.constraints)

    def _violated(self, found: Mapping[str, Measurement], early: str = "") -> str:
        if self.baseline is None:
            return ""
        base = self.baseline.measurements
        for constraint in self.constraints:
            measured = found.get(constraint.name)
            if measured is not None and constraint.violation(found, base) > 0:
                from .units import show

                unit = measured.unit
                return (
                    f"{constraint.text}: {constraint.name} is {early}{show(constraint.name, measured.value, unit)}, "
                    f"the limit is {show(constraint.name, constraint.limit(alongside(found, base)), unit)}"
                )
        return ""


def cheap_figures(model: nn.Module, task: Task) -> dict[str, Measurement]:
    """Parameters and multiply-accumulates for one image; exact, and known before any training."""
    from ..compression.graph import find_layers
    from ..tasks.data import example_input

    parameters = sum(p.numel() for p in model.parameters())
    macs = sum(layer.macs for layer in find_layers(model, example_input(task.data)))
    source = Provenance(Method.MEASURED, "any", "counted", "")
    return {
        "parameters": Measurement("parameters", float(parameters), "", None, 1, source),
        "macs": Measurement("macs", float(macs), "", None, 1, source),
    }


def compressed_size(model: nn.Module) -> Measurement:
    """Bytes of the file with Huffman-coded weights that loads back bit for bit (see `compression.coding`)."""
    from ..compression.coding import compressed_size as count

    source = Provenance(Method.MEASURED, "any", "autocompress coding", "")
    return Measurement("compressed_size", float(count(model)), "B", None, 1, source)


def describe_error(error: BaseException) -> str:
    """One line: our own errors speak for themselves, others are named."""
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else ""
    if isinstance(error, AutocompressError):
        return first
    if isinstance(error, MemoryError) or "can't allocate memory" in first:
        return f"out of memory: {first}" if first else "out of memory"
    return f"{type(error).__name__}: {first}"


def baseline_plans(capabilities: Capabilities, cut: Plan) -> dict[str, Plan]:
    """The plans that any search must beat, by name; the untouched model comes first.

    Args:
        cut: the uniform pruning, with the training that follows.
    """
    from ..compression import Quantize

    plans: dict[str, Plan] = {"untouched": ()}
    if 8 in capabilities.bits:
        plans["uniform int8"] = (Quantize(8, outputs=capabilities.outputs),)
    return plans | {"uniform pruning": cut}
