"""One training loop, for the original model, for fine-tuning after a cut, and for distillation."""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import CandidateError
from ..core.lane import pause_point
from ..core.types import Data, Split
from ..tasks.data import normalise
from .masks import apply_masks, copy_masks
from .stretches import Run, state_of


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate of the one-cycle schedule (linear up, linear down to 0).
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        warmup: share of the steps in which the rate rises.
        ema: decay of the averaged weights that are returned; 0 for none.
        restarts: shares of the steps, rising, at which the rate has come down to 0 and rises to `lr` once more (warm
            restarts, Loshchilov and Hutter 2017, arXiv:1608.03983): a model that stops there is settled.
        patience: checks on the search split (20 in a whole run) without a lower loss after which training ends with
            the best weights seen; 0 trains to the end.
    """

    steps: int
    lr: float = 0.1
    batch_size: int = 128
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup: float = 0.2
    ema: float = 0.0
    patience: int = 0
    restarts: tuple[float, ...] = ()

    def rate(self, step: int) -> float:
        """Learning rate of step 0..steps-1."""
        bounds = [0, *(round(share * self.steps) for share in self.restarts), self.steps]
        place = bisect_right(bounds, step)
        first, length = bounds[place - 1], bounds[place] - bounds[place - 1]
        rise = max(1, round(self.warmup * length))
        if step - first < rise:
            return self.lr * (step - first + 1) / rise
        return self.lr * (first + length - step) / max(1, length - rise)


class Teaching(Protocol):
    """What a student learns besides the labels; see `distillation`."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Weights that are trained along and thrown away afterwards (adapters)."""
        ...

    def observe(self, images: Tensor) -> None:
        """Run the teachers on the batch that the student sees next."""
        ...

    def mix(self, loss: Tensor, logits: Tensor) -> Tensor:
        """The loss of logits (N, classes), given that from the labels alone."""
        ...

    def hints(self) -> Tensor | float:
        """What is added once a step for the student's inner values."""
        ...


def bf16_is_native() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def batches(data: Data, split: Split, size: int, seed: int, device: str = "cpu") -> Batches:
    """Endless shuffled, augmented batches: float32 (size, C, H, W), or int64 tokens (size, L), and int64 (size,).

    One random shift and one coin for mirroring per image; each epoch sees every image once.
    """
    return Batches(data, split, min(size, len(split)), seed, device)


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """See `batches`; can tell where it is and go there."""

    def __init__(self, data: Data, split: Split, size: int, seed: int, device: str) -> None:
        self._data, self._split, self._size, self._device = data, split, size, device
        self._rng = np.random.default_rng(seed)
        self._mean = torch.tensor(data.mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(data.std, device=device).view(-1, 1, 1)
        self._order, self._next = np.empty(0, np.int64), 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._next + self._size > len(self._order):
            self._order, self._next = self._rng.permutation(len(self._split)), 0
        chosen = self._order[self._next : self._next + self._size]
        self._next += self._size
        labels = torch.from_numpy(self._split.labels[chosen]).to(self._device)
        if self._data.vocabulary:
            return torch.from_numpy(np.asarray(self._split.inputs[chosen], np.int64)).to(self._device), labels
        images = augment(self._split.inputs[chosen], self._data.shift, self._data.flip, self._rng)
        x = torch.from_numpy(images).to(self._device).float().div_(255).sub_(self._mean).div_(self._std)
        return x.contiguous(memory_format=torch.channels_last), labels

    def state_dict(self) -> dict[str, Any]:
        """Where in which order it is; the generator's state as JSON, as its numbers have 128 bits."""
        generator = json.dumps(self._rng.bit_generator.state)
        return {"order": torch.from_numpy(self._order.copy()), "next": self._next, "generator": generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._order, self._next = state["order"].numpy(), state["next"]
        self._rng.bit_generator.state = json.loads(state["generator"])


def augment(images: np.ndarray, shift: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Shift each uint8 image (N, C, H, W) by up to `shift` pixels (zeros come in) and mirror half of them."""
    count, _, height, width = images.shape
    out = np.ascontiguousarray(images)
    if shift:
        padded = np.pad(out, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
        rows = rng.integers(0, 2 * shift + 1, (count, 1)) + np.arange(height)
        columns = rng.integers(0, 2 * shift + 1, (count, 1)) + np.arange(width)
        out = padded[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2)
    if flip:
        mirrored = rng.random((count, 1, 1, 1)) < 0.5
        out = np.where(mirrored, out[..., ::-1], out)
    return np.ascontiguousarray(out)


def fit(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    *,
    seed: int,
    teaching: Teaching | None = None,
    device: str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
    after_step: Callable[[int, torch.optim.Optimizer], None] | None = None,
) -> nn.Module:
    """Train `model` on the train split and return it in eval mode on the CPU.

    Masked weights (`masks`) stay zero. A model that returns a list of logits while it trains (early exits) learns
    from all of them alike; what its modules offer as `training_penalty` is added to the loss. Inside
    `stretches.partly` only a part of the steps is done, with the rates of the whole schedule.

    Args:
        on_step: called after each step with its number and its loss.
        after_step: called after each step with its number and the optimizer, gradients still in place, before masks
            are applied: for what changes masks on the way. One that remembers something between steps needs
            `state_dict` and `load_state_dict`, or its runs begin anew in each stretch.

    Raises:
        CandidateError: the loss is not finite.
    """
    torch.manual_seed(seed)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = _optimizer(model, schedule, teaching)
    average = (
        torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(schedule.ema), use_buffers=True
        )
        if schedule.ema
        else None
    )
    low_precision = device != "cpu" or bf16_is_native()
    plateau = Plateau(schedule, data) if schedule.patience else None
    source = batches(data, data.train, schedule.batch_size, seed, device)
    parts = state_of({
        "model": model, "optimizer": optimizer, "average": average, "plateau": plateau, "batches": source,
        "teaching": teaching, "after_step": after_step,
    })  # fmt: skip
    run = Run(model, schedule.steps, (schedule, seed), parts)
    done = run.first
    for step in range(run.first, run.last):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step) * group["share"]
        pause_point()
        images, labels = next(source)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=low_precision):
            if teaching is not None:
                teaching.observe(images)
            outputs = model(images)
        loss = _loss(model, outputs, labels, schedule, teaching)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CandidateError(f"training diverged: the loss is {value} at step {step} of {schedule.steps}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if after_step:
            after_step(step, optimizer)
        apply_masks(model)
        if average is not None:
            average.update_parameters(model)
            copy_masks(model, average.module)  # masks that change are not to be averaged
        run.count()
        done = step + 1
        if on_step:
            on_step(step, value)
        if plateau is not None and plateau.reached(step, average.module if average is not None else model):
            run.end()
            break
    run.close(done)
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    if plateau is not None and plateau.best:  # there is none yet where training stops before the first check
        model.load_state_dict(plateau.best)
    apply_masks(model)
    return model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


class Plateau:
    """Watches the loss on the search split; keeps the best weights."""

    def __init__(self, schedule: Schedule, data: Data, images: int = 1000) -> None:
        self.every, self.patience, self.data = max(1, schedule.steps // 20), schedule.patience, data
        self.part = Split(data.search.inputs[:images], data.search.labels[:images])
        self.last, self.lowest, self.worse = schedule.steps - 1, math.inf, 0
        self.best: dict[str, Tensor] = {}

    def reached(self, step: int, model: nn.Module) -> bool:
        """Look at the model after this step, where it is time to; whether it has stopped getting better."""
        if (step + 1) % self.every and step != self.last:
            return False
        loss = search_loss(model, self.data, self.part)
        model.train()
        if loss < self.lowest:
            self.lowest, self.worse = loss, 0
            self.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        else:
            self.worse += 1
        if not self.best:
            raise CandidateError(f"training diverged: the search split's loss is {loss} at step {step}")
        return self.worse >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"lowest": self.lowest, "worse": self.worse, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.lowest, self.worse, self.best = state["lowest"], state["worse"], dict(state["best"])


def search_loss(model: nn.Module, data: Data, split: Split, batch_size: int = 500) -> float:
    """Mean cross-entropy of the PyTorch model on `split`, in eval mode and float32."""
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(split), batch_size):
            piece = slice(start, start + batch_size)
            logits = model.eval()(torch.from_numpy(normalise(data, split.inputs[piece])).to(device))
            labels = torch.from_numpy(np.asarray(split.labels[piece])).to(device)
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
    return total / len(split)


def _loss(model: nn.Module, outputs: Any, labels: Tensor, schedule: Schedule, teaching: Teaching | None) -> Tensor:
    heads = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    losses = []
    for logits in heads:
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=schedule.label_smoothing)
        losses.append(teaching.mix(loss, logits.float()) if teaching is not None else loss)
    total = torch.stack(losses).mean()
    if teaching is not None:
        total = total + teaching.hints()
    for module in model.modules():
        penalty = getattr(module, "training_penalty", None)
        if penalty is not None:
            total = total + penalty()
    return total


def accuracy(model: nn.Module, data: Data, split: Split, batch_size: int = 500) -> float:
    """Share of `split` that the PyTorch model gets right, in float32."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(split), batch_size):
            piece = slice(start, start + batch_size)
            logits = model.eval()(torch.from_numpy(normalise(data, split.inputs[piece])))
            right += int((logits.argmax(1).numpy() == split.labels[piece]).sum())
    return right / len(split)


def _optimizer(model: nn.Module, schedule: Schedule, teaching: Teaching | None) -> torch.optim.Optimizer:
    """Weight decay for matrices and kernels only; biases, norm scales and quantization steps stay free.

    A parameter may carry `lr_share`, its rate as a share of the schedule's.
    """
    chosen = [p for p in model.parameters() if p.requires_grad]
    chosen += list(teaching.parameters()) if teaching is not None else []
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in chosen:
        groups.setdefault((parameter.ndim > 1, getattr(parameter, "lr_share", 1.0)), []).append(parameter)
    listed = [
        {"params": found, "weight_decay": schedule.weight_decay if decayed else 0.0, "share": share}
        for (decayed, share), found in groups.items()
    ]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(listed, schedule.lr)
    return torch.optim.SGD(listed, schedule.lr, schedule.momentum, nesterov=True)


def timed_steps(total: int, every: int, show: Callable[[str], None]) -> Callable[[int, float], None]:
    """Make an `on_step` that shows step, mean loss and images' pace every `every` steps."""
    started, losses = time.perf_counter(), []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        if (step + 1) % every == 0 or step + 1 == total:
            left = (time.perf_counter() - started) / (step + 1) * (total - step - 1)
            show(f"step {step + 1}/{total}  loss {sum(losses) / len(losses):.3f}  {left:.0f} s left")
            losses.clear()

    return on_step
