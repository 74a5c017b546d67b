"""One training loop, for the original model, for fine-tuning after a cut, and for distillation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import CandidateError
from ..core.lane import pause_point
from ..core.types import Data, Split
from ..tasks.data import normalise


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate of the one-cycle schedule (linear up, linear down to 0).
        warmup: share of the steps in which the rate rises.
        ema: decay of the averaged weights that are returned; 0 for none.
    """

    steps: int
    lr: float = 0.1
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup: float = 0.2
    ema: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate of step 0..steps-1."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * (self.steps - step) / max(1, self.steps - rise)


@dataclass(frozen=True)
class Distillation:
    """Response distillation (Hinton et al. 2015, arXiv:1503.02531).

    Attributes:
        alpha: weight of the teacher's part of the loss; 0 learns from labels alone.
        temperature: softens both distributions; the loss is scaled by its square.
    """

    alpha: float = 0.5
    temperature: float = 2.0

    def loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL divergence of softened distributions, times the squared temperature; logits (N, classes)."""
        student = F.log_softmax(logits / self.temperature, dim=1)
        teacher = F.log_softmax(teacher_logits / self.temperature, dim=1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * self.temperature**2


def bf16_is_native() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def batches(data: Data, split: Split, size: int, seed: int, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless shuffled, augmented batches: float32 (size, C, H, W), or int64 tokens (size, L), and int64 (size,).

    One random shift and one coin for mirroring per image; each epoch sees every image once.
    """
    rng = np.random.default_rng(seed)
    mean = torch.tensor(data.mean, device=device).view(-1, 1, 1)
    std = torch.tensor(data.std, device=device).view(-1, 1, 1)
    size = min(size, len(split))
    while True:
        order = rng.permutation(len(split))
        for start in range(0, len(split) - size + 1, size):
            chosen = order[start : start + size]
            labels = torch.from_numpy(split.labels[chosen]).to(device)
            if data.vocabulary:
                yield torch.from_numpy(np.asarray(split.inputs[chosen], np.int64)).to(device), labels
                continue
            images = augment(split.inputs[chosen], data.shift, data.flip, rng)
            x = torch.from_numpy(images).to(device).float().div_(255).sub_(mean).div_(std)
            yield x.contiguous(memory_format=torch.channels_last), labels


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
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    device: str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train `model` on the train split and return it in eval mode on the CPU.

    Args:
        teacher: the model to learn from; its logits count only where `distillation` is given.
        on_step: called after each step with its number and its loss.

    Raises:
        CandidateError: the loss is not finite.
    """
    torch.manual_seed(seed)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if teacher is not None:
        teacher = teacher.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(_groups(model, schedule.weight_decay), schedule.lr, schedule.momentum, nesterov=True)
    average = (
        torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(schedule.ema), use_buffers=True
        )
        if schedule.ema
        else None
    )
    low_precision = device != "cpu" or bf16_is_native()
    source = batches(data, data.train, schedule.batch_size, seed, device)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        pause_point()
        images, labels = next(source)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=low_precision):
            logits = model(images)
            taught = teacher_logits(teacher, images) if distillation and teacher is not None else None
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=schedule.label_smoothing)
        if distillation and taught is not None:
            loss = (1 - distillation.alpha) * loss + distillation.alpha * distillation.loss(logits.float(), taught)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CandidateError(f"training diverged: the loss is {value} at step {step} of {schedule.steps}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        if on_step:
            on_step(step, value)
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def teacher_logits(teacher: nn.Module, images: Tensor) -> Tensor:
    """The teacher's float32 logits (N, classes), without gradient."""
    with torch.no_grad():
        return teacher(images).float()


def accuracy(model: nn.Module, data: Data, split: Split, batch_size: int = 500) -> float:
    """Share of `split` that the PyTorch model gets right, in float32."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(split), batch_size):
            piece = slice(start, start + batch_size)
            logits = model.eval()(torch.from_numpy(normalise(data, split.inputs[piece])))
            right += int((logits.argmax(1).numpy() == split.labels[piece]).sum())
    return right / len(split)


def _groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels only; biases and norm scales stay free."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]


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
