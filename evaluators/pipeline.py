"""One candidate's way: cheap figures first, then training, the file, its accuracy, and the target."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.codec import check_order, plan_key
from ..core.errors import AutocompressError, CandidateError
from ..core.lane import LANE
from ..core.notes import collect_notes
from ..core.types import (
    Artifact,
    Backend,
    Candidate,
    Capabilities,
    Evaluation,
    Measurement,
    Method,
    Operator,
    Plan,
    Provenance,
    State,
    Task,
)
from .adaptive import adapts, expected_again, expected_measurements, is_exit_rate
from .objectives import Built, Constraint, Objective, alongside

if TYPE_CHECKING:
    from torch import nn

    from ..compression.finetune import Finetune

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
    """

    task: Task
    backend: Backend
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    folder: Path
    baseline: Evaluation | None = None
    cache: Path | None = None

    def __call__(self, candidate: Candidate) -> Evaluation:
        """Evaluate; failures of the candidate come back as a result with a reason."""
        started = time.perf_counter()
        found: dict[str, Measurement] = {}
        notes: list[str] = []
        try:
            with LANE.shared(), collect_notes() as notes:
                evaluation = self._evaluate(candidate, found)
        except (AutocompressError, MemoryError, RuntimeError, TimeoutError) as error:
            # RuntimeError is what torch and the runtimes raise for shapes, memory and kernels.
            evaluation = Evaluation(candidate, State.FAILED, found, reason=describe_error(error))
        return dataclasses.replace(evaluation, seconds=time.perf_counter() - started, notes=tuple(notes))

    def _evaluate(self, candidate: Candidate, found: dict[str, Measurement]) -> Evaluation:
        check_order(candidate.plan)
        model = self.task.build()
        training = next((i for i, step in enumerate(candidate.plan) if step.retrains), len(candidate.plan))
        for step in candidate.plan[:training]:
            model = step(model, self.task)
        found.update(cheap_figures(model, self.task))
        bound = self._size_bound(model, candidate.plan)
        reason = self._violated(found) or self._violated({"size": bound}, early="at least ")
        if reason:
            return Evaluation(candidate, State.INFEASIBLE, found, reason, self._violations(found))
        if training < len(candidate.plan) and self._limits_hardware():
            reason, trial = self._too_slow(model, candidate, training)
            if reason:
                return Evaluation(
                    candidate, State.INFEASIBLE, {**found, **trial}, reason, self._violations({**found, **trial})
                )
        for position, step in enumerate(candidate.plan[training:], training):
            model = self._cached(model, candidate.plan[: position + 1]) if step.retrains else step(model, self.task)
        artifact = self.backend.build(model, self.task, self.folder / "artifacts" / candidate.key)
        self._size(artifact, found)
        self._check_parity(model, artifact, candidate.plan, found)
        found.update(self.accuracy(artifact, candidate.plan, "search"))
        if self._asks_for("compressed_size"):
            found["compressed_size"] = compressed_size(model)
        self._measure(artifact, candidate.plan, found)
        if adapts(model) or self._asks_for("expected_latency") or self._asks_for("expected_macs"):
            reference = self._reference(candidate.plan)
            found.update(expected_measurements(model, self.task, self.backend, artifact, found, reference))
        reason = self._violated(found)
        state = State.INFEASIBLE if reason else State.COMPLETE
        return Evaluation(candidate, state, found, reason, self._violations(found), artifact)

    def again(
        self, artifact: Artifact, plan: Plan, known: Mapping[str, Measurement], split: str
    ) -> dict[str, Measurement]:
        """Measure a finished candidate's file once more: accuracy on `split`, and the target's figures.

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
            }
            found |= self.accuracy(artifact, plan, split)
            self._measure(artifact, plan, found)
            if "expected_latency" in known:
                found |= expected_again(self.task, self.backend, artifact, found, self._reference(plan))
        return found

    def _measure(self, artifact: Artifact, plan: Plan, found: dict[str, Measurement]) -> None:
        """Add the target's figures, then those of the objectives that people brought along."""
        found.update({m.name: m for m in self.backend.measure(artifact, self.task, self._reference(plan))})
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
        method = Method.SIMULATED if lacks_kernels(plan, self.backend.capabilities) else Method.MEASURED
        return score(np.concatenate(pieces), part.labels, self._predicted(method))

    def _predicted(self, method: Method) -> Provenance:
        """Where the backend's logits come from: the device that it names, or else this machine."""
        from ..hardware.device import provenance

        source = provenance(self.backend.name, method=method)
        device = getattr(self.backend, "predicts_on", "")
        return dataclasses.replace(source, device=device) if device else source

    def _cached(self, model: nn.Module, prefix: Plan) -> nn.Module:
        """Run the last, retraining step of `prefix`, or load what an earlier candidate with this prefix learnt."""
        from safetensors.torch import load_file, save_file

        from ..compression.distillation import remember

        path = (self.cache or self.folder / "cache") / f"{plan_key(prefix)}.safetensors"
        if path.is_file():
            model = prepared(prefix[-1], model, self.task)
            model.load_state_dict(load_file(path))
            return remember(model.eval())  # as training does: a later step may learn from this model
        model = prefix[-1](model, self.task)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, part)
        part.replace(path)
        return model

    def _size(self, artifact: Artifact, found: dict[str, Measurement]) -> None:
        from ..hardware.device import provenance

        source = provenance(self.backend.name)
        found["size"] = Measurement("size", float(artifact.size_bytes), "B", None, 1, source)

    def _size_bound(self, model: nn.Module, plan: Plan) -> Measurement:
        """Bytes of the weights alone, at the plan's bit-widths: less than any file of this candidate."""
        from ..hardware.device import provenance

        # Files hold 4, 8, 16 or 32 bits for each weight; a target may round what a plan leaves in floating point.
        lowest = min(*_widths(plan, "bits"), max(self.backend.capabilities.bits))
        stored = next(size for size in (4, 8, 16, 32) if lowest <= size)
        weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        return Measurement("size", weights * stored / 8, "B", None, 1, provenance("computed", method=Method.PREDICTED))

    def _asks_for(self, name: str) -> bool:
        return name in {objective.name for objective in self.objectives} | {c.name for c in self.constraints}

    def _limits_hardware(self) -> bool:
        return self.baseline is not None and any(c.name in self.backend.capabilities.metrics for c in self.constraints)

    def _too_slow(self, model: nn.Module, candidate: Candidate, training: int) -> tuple[str, Mapping[str, Measurement]]:
        """Build and time the candidate before it is trained: its speed does not depend on what it learns."""
        import copy

        draft = copy.deepcopy(model)
        for step in candidate.plan[training:]:
            draft = prepared(step, draft, self.task) if step.retrains else step(draft, self.task)
        artifact = self.backend.build(draft, self.task, self.folder / "artifacts" / f"{candidate.key}.draft")
        try:
            reference = self.baseline.artifact if self.baseline else None
            found = {m.name: m for m in self.backend.measure(artifact, self.task, reference)}
        finally:
            artifact.path.unlink(missing_ok=True)
            artifact.path.parent.rmdir()
        return self._violated(found, early="before training "), found

    def _check_parity(self, model: nn.Module, artifact: Artifact, plan: Plan, found: dict[str, Measurement]) -> None:
        """Compare the runtime's logits with PyTorch's; a file that computes something else is a failure."""
        import torch

        from ..tasks.data import normalise
        from .metrics import parity_error

        images = normalise(self.task.data, self.task.data.search.inputs[:PARITY_IMAGES])
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(images)).numpy()
        error = parity_error(expected, self.backend.predict(artifact, images))
        method = Method.SIMULATED if self.backend.capabilities.emulated else Method.MEASURED
        found["parity"] = Measurement("parity", error, "", None, len(images), self._predicted(method))
        limit = FLOAT_PARITY if lowest_bits(plan) == 32 and not _is_rounded(artifact) else ROUNDED_PARITY
        if not error <= limit:
            raise CandidateError(
                f"{self.backend.name} computes something else than PyTorch: the logits deviate by {error:.1%} "
                f"(allowed: {limit:.0%})"
            )

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


def prepared(step: Operator, model: nn.Module, task: Task) -> nn.Module:
    """The structure that a retraining step's weights fit, without the training."""
    prepare = getattr(step, "prepare", None)
    return prepare(model, task) if prepare is not None else model


def lowest_bits(plan: Plan) -> float:
    """The smallest bit-width that a plan gives to any layer's weights or inputs; 32 for plans that do not quantize."""
    return min(_widths(plan, "bits") + _widths(plan, "activations"))


def _is_rounded(artifact: Artifact) -> bool:
    """Whether a file stores any layer in less than float32; some targets round on their own."""
    return any(formats["weight"] != 32 for formats in artifact.bits.values())


def lacks_kernels(plan: Plan, capabilities: Capabilities) -> bool:
    """Whether the file only imitates the plan's arithmetic: the target is not here, or has no kernels for it.

    No kernels are there below the target's smallest width, for 8-bit floats, and where rounded inputs meet weights that
    come in groups or from a codebook, or are rounded by each batch's own range: the runtimes compute these in floating
    point.
    """
    if capabilities.emulated or lowest_bits(plan) < min(capabilities.bits):
        return True
    for step in plan:
        formats = getattr(step, "bits", None)
        named = list(formats.values()) if isinstance(formats, Mapping) else [formats]
        inputs = getattr(step, "activations", None)
        if any(str(name).startswith("fp8") for name in named) or inputs == "dynamic":
            return True
        # Without a setting, inputs are rounded like the weights, but not where these come from a codebook.
        codebook, grouped = getattr(step, "scheme", "") == "codebook", getattr(step, "granularity", "") == "group"
        if inputs is None and grouped and not codebook and not getattr(step, "awq", False):
            return True
        if (codebook or grouped) and min(_widths((step,), "activations")) < 32:
            return True
    return False


def _widths(plan: Plan, field: str) -> list[float]:
    """Bit-widths in a field of the plan's steps, 32 included."""
    from ..compression.grids import bit_width

    found: list[float] = [32]
    for step in plan:
        value = getattr(step, field, None) if hasattr(step, "bits") else None
        formats = value.values() if isinstance(value, Mapping) else [value]
        found += [bit_width(format) for format in formats if format is not None]
    return found


def describe_error(error: BaseException) -> str:
    """One line: our own errors speak for themselves, others are named."""
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else ""
    if isinstance(error, AutocompressError):
        return first
    if isinstance(error, MemoryError) or "can't allocate memory" in first:
        return f"out of memory: {first}" if first else "out of memory"
    return f"{type(error).__name__}: {first}"


def baseline_plans(capabilities: Capabilities, finetune: Finetune) -> dict[str, Plan]:
    """The plans that any search must beat, by name; the untouched model comes first.

    Args:
        finetune: what follows the uniform pruning; no steps leave it out.
    """
    from ..compression import Prune, Quantize

    plans: dict[str, Plan] = {"untouched": ()}
    if 8 in capabilities.bits:
        plans["uniform int8"] = (Quantize(8, outputs=capabilities.outputs),)
    plans["uniform pruning"] = (Prune(0.5), finetune) if finetune.steps else (Prune(0.5),)
    return plans
