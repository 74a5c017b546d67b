"""The vocabulary: the few records and protocols that every layer shares.

Nothing here imports torch at run time, so that `import autocompress` stays fast.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Split:
    """Labelled images or token sequences, decoded once.

    Attributes:
        inputs: images as uint8, shape (N, C, H, W), or tokens as int64, shape (N, L); may be memory-mapped.
        labels: int64, shape (N,), class numbers from 0.
    """

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Three disjoint splits and how their pixels become a model's input.

    A model sees `(image / 255 - mean) / std`, float32, shape (N, C, H, W); token sequences it sees as they are.

    Attributes:
        train: for training and for calibration.
        search: the only split that the search scores candidates on.
        test: held out; only a finished front is measured on it.
        classes: class names, in label order.
        mean, std: per channel, in units of the full pixel range.
        shift: random shift in pixels used as augmentation in training; 0 for none.
        flip: whether mirrored images are as likely as the originals.
        vocabulary: number of different tokens; 0 for images.
    """

    name: str
    train: Split
    search: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shift: int = 0
    flip: bool = False
    vocabulary: int = 0

    def split(self, name: str) -> Split:
        """Return the split called `name`: "train", "search" or "test"."""
        return {"train": self.train, "search": self.search, "test": self.test}[name]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image, or (L,) of one token sequence."""
        return tuple(int(size) for size in self.train.inputs.shape[1:])


@dataclass(frozen=True)
class Task:
    """What is compressed, and the data that says how good a result is.

    Attributes:
        name: shown in reports, e.g. "resnet20 on cifar10".
        build: returns a fresh copy of the trained model, in eval mode, on the CPU.
        data: the splits.
        trained: False where the weights are random, so that accuracy means nothing.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    data: Data
    trained: bool = True


@runtime_checkable
class Operator(Protocol):
    """One compression step: a frozen dataclass whose fields are its settings, seeds included.

    Attributes:
        rank: place in the fixed order of a plan: 10 low rank, 15 exits and gates, 20 prune, 30 train, 40 share,
            50 quantize. Pruning and training may alternate.
        retrains: True where it trains, so that the resulting weights are worth caching. Such a step may change the
            structure too, if it has a method `prepare(model, task)` that makes it without training: the stored
            weights are loaded into what that returns.
    """

    @property
    def rank(self) -> int: ...

    @property
    def retrains(self) -> bool: ...

    def __call__(self, model: torch.nn.Module, task: Task) -> torch.nn.Module:
        """Return the changed model; may change `model` in place."""


Plan = tuple[Operator, ...]


class Chooser(Protocol):
    """What a space asks for its values; an `optuna.Trial` is one."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Space(Protocol):
    """A function of the trial: asks `choose` for values and returns a plan."""

    def __call__(self, choose: Chooser) -> Plan: ...


@dataclass(frozen=True)
class Candidate:
    """A plan with the choices that led to it.

    Attributes:
        plan: ordered compression steps; () is the untouched model.
        params: what the sampler chose, by parameter name.
        fidelity: share of its training steps that are to be done; less than 1 on the lower rungs of a search.
    """

    plan: Plan
    params: Mapping[str, Any] = field(default_factory=dict)
    fidelity: float = 1.0

    @property
    def key(self) -> str:
        """Hash of the plan, seeds of its operators included; one key is one piece of work."""
        from .codec import plan_key

        return plan_key(self.plan)


class Method(enum.StrEnum):
    """How a number was obtained; only MEASURED ran on the device."""

    MEASURED = "measured"
    SIMULATED = "simulated"
    COMPILED = "compiled"
    LOOKED_UP = "looked-up"
    PREDICTED = "predicted"


@dataclass(frozen=True)
class Provenance:
    """Where a number comes from.

    Attributes:
        device: e.g. "AMD EPYC, 2 threads".
        runtime: e.g. "openvino 2026.4.1".
        taken_at: ISO 8601, UTC.
        flags: why to doubt the figure, a few words each: "busy machine", "extrapolated: depthwise layers"; reports
            show them beside it.
    """

    method: Method
    device: str
    runtime: str
    taken_at: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One figure in SI units (seconds, bytes; accuracies as fractions of 1).

    Attributes:
        ci95: low and high end of the 95 % confidence interval; None where unknown or exact.
        samples: how many observations stand behind the value.
        outcomes: of a share, which samples count for it: a bit for each, the first one leading, as hexadecimal digits,
            so that two shares of the same samples can be compared in pairs; "" where unknown.
    """

    name: str
    value: float
    unit: str
    ci95: tuple[float, float] | None
    samples: int
    provenance: Provenance
    outcomes: str = ""


@dataclass(frozen=True)
class Artifact:
    """A file that one runtime loads.

    Attributes:
        bits: what it really carries, read back from it: {layer: {"weight": 4, "activation": 8}}, formats as in
            `Quantize.bits`.
    """

    runtime: str
    path: Path
    sha256: str
    size_bytes: int
    bits: Mapping[str, Mapping[str, int | float | str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Capabilities:
    """What really runs on a target.

    Attributes:
        bits: bit-widths that its kernels compute in or store; lower ones are simulated.
        metrics: names of the measurements that the backend's `measure` returns.
        outputs: which layers' outputs its int8 kernels want rounded (see `Quantize.outputs`).
        notes: what a person should know, one line each.
        emulated: whether `predict` imitates the target's arithmetic on another machine, so that accuracy is simulated.
        fast: formats (as in `Quantize.bits`) that the target computes faster in than in float32.
        sparsity: patterns of zero weights that save time there, such as "2:4" or "unstructured"; () where zeros are
            multiplied like other values and only removed channels help.
        fixed_shapes: whether a file runs for the input shape that it was compiled for alone.
        method: how its latency is found, or what it gives in place of one; None where that is not said.
    """

    bits: tuple[int, ...]
    metrics: tuple[str, ...]
    outputs: str = "none"
    notes: tuple[str, ...] = ()
    emulated: bool = False
    fast: tuple[int | str, ...] = ()
    sparsity: tuple[str, ...] = ()
    fixed_shapes: bool = False
    method: Method | None = None


class Backend(Protocol):
    """A device with a runtime: builds files for it, runs them, and measures them.

    One whose `predict` runs elsewhere than on this machine's CPU names that device in an attribute `predicts_on`.
    """

    @property
    def name(self) -> str:
        """Such as "x86/openvino"."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    def missing(self) -> str | None:
        """What is not here and how to get it; None where everything is."""
        ...

    def build(self, model: torch.nn.Module, task: Task, folder: Path) -> Artifact:
        """Write the deployable file into `folder`."""
        ...

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of float32 images (N, C, H, W) or int64 tokens (N, L), computed by the runtime."""
        ...

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Time the file for single inputs, interleaved with `reference` where one is given."""
        ...


class State(enum.StrEnum):
    """What became of a candidate."""

    COMPLETE = "complete"
    INFEASIBLE = "infeasible"
    FAILED = "failed"
    STOPPED = "stopped"  # trained a part of the way; never on a front


@dataclass(frozen=True)
class Evaluation:
    """The recorded result of one candidate; a failure is a result too.

    Attributes:
        measurements: by metric name; partial where the candidate failed or was rejected early.
        reason: why it is infeasible or failed; "" for complete ones.
        violations: one number per constraint, in the order of the study; > 0 means violated, None unknown.
        artifact: the deployable file; None where none was built.
        seconds: wall-clock time spent on it.
        baseline: "untouched", "uniform int8", ... for the models that a search must beat; "" otherwise.
        notes: what operators left undone, and why, one line each.
        parts: in a search for several targets, the result on each, by target; this one then sums them up.
        steps: optimizer steps that it was trained for; those of others with the same beginning are theirs.
    """

    candidate: Candidate
    state: State
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    reason: str = ""
    violations: tuple[float | None, ...] = ()
    artifact: Artifact | None = None
    seconds: float = 0.0
    baseline: str = ""
    notes: tuple[str, ...] = ()
    parts: Mapping[str, Evaluation] = field(default_factory=dict)
    steps: int = 0
