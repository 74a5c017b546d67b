"""Training: the schedule, augmentation, the distillation loss, and what a run of it returns."""

from __future__ import annotations

import dataclasses
import math
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress import InputError, Prune, Task
from autocompress.compression.distillation import Distillation, Teachers
from autocompress.compression.finetune import Finetune
from autocompress.compression.training import Schedule, accuracy, augment, batches, fit
from autocompress.core.errors import CandidateError
from autocompress.core.types import Split
from autocompress.tasks.data import normalise
from autocompress.tasks.models import ModelSource

SHORT = Schedule(8, lr=0.05, batch_size=32)


def logit_pair(seed: int, rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's logits."""
    made = torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed)) * 3
    return made[0], made[1]


def softmax(x: np.ndarray) -> np.ndarray:
    """Row-wise, in double precision."""
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def gradient(temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    """Of the distillation loss with respect to the student's logits."""
    student = student.clone().requires_grad_(True)
    Distillation(temperature=temperature).loss(student, teacher).backward()
    assert student.grad is not None
    return student.grad


def fresh(seed: int = 0) -> nn.Module:
    """An untrained digits model."""
    return ModelSource("digits-cnn", 10, (1, 8, 8), seed=seed)()


def pixels(seed: int, count: int = 64) -> np.ndarray:
    """Noise images of 3x8x6 without a black pixel."""
    return np.random.default_rng(seed).integers(1, 256, (count, 3, 8, 6), dtype=np.uint8)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether all parameters and buffers are bit for bit the same."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_distillation_loss_is_the_softened_divergence_times_the_squared_temperature(temperature: float) -> None:
    student, teacher = logit_pair(1)
    p, q = (softmax(logits.double().numpy() / temperature) for logits in (teacher, student))
    expected = temperature**2 * np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1))
    assert float(Distillation(temperature=temperature).loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_distillation_loss_is_zero_for_the_teachers_own_logits() -> None:
    _, teacher = logit_pair(2)
    assert float(Distillation(temperature=3.0).loss(teacher + 5.0, teacher)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_gradient_is_the_difference_of_softened_shares_times_the_temperature(temperature: float) -> None:
    student, teacher = logit_pair(3)
    q, p = (softmax(logits.double().numpy() / temperature) for logits in (student, teacher))
    expected = temperature * (q - p) / len(student)
    assert np.allclose(gradient(temperature, student, teacher).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_distillation_gradient_keeps_its_size_when_a_high_temperature_doubles() -> None:
    student, teacher = logit_pair(4)
    low, high = gradient(100.0, student, teacher), gradient(200.0, student, teacher)
    assert torch.allclose(low, high, rtol=0.1, atol=1e-3)
    # Without the squared temperature in the loss, the second one would be a quarter of the first.
    assert float(high.norm() / low.norm()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_the_rate_peaks_at_lr_and_ends_near_zero(steps: int, warmup: float) -> None:
    schedule = Schedule(steps, lr=0.4, warmup=warmup)
    rates = [schedule.rate(step) for step in range(steps)]
    assert max(rates) == pytest.approx(0.4)
    assert all(0 < rate <= 0.4 + 1e-12 for rate in rates)
    if steps == 100 and warmup < 1:
        assert rates[-1] <= 0.4 / 50
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_restarts_are_schedules_one_after_the_other() -> None:
    schedule = Schedule(90, lr=0.4, restarts=(1 / 9, 1 / 3))
    expected = [part.rate(step) for part in (Schedule(n, lr=0.4) for n in (10, 20, 60)) for step in range(part.steps)]
    assert [schedule.rate(step) for step in range(90)] == pytest.approx(expected)
    few = Schedule(2, lr=0.4, restarts=(1 / 9, 1 / 3))  # less than a step for the first
    assert all(0 < few.rate(step) <= 0.4 for step in range(2))


@pytest.mark.parametrize("restarts", [(0.5, 0.5), (0.6, 0.3), (0.0,), (1.0,), (-0.1, 0.5)])
def test_restarts_that_do_not_rise_between_0_and_1_are_refused(restarts: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="restarts must be rising shares between 0 and 1"):
        Finetune(10, restarts=restarts)


def test_augmentation_without_shift_or_flip_changes_nothing() -> None:
    images = pixels(0)
    assert np.array_equal(augment(images, 0, False, np.random.default_rng(0)), images)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_augmentation_keeps_type_shape_and_the_images_given(shift: int, flip: bool) -> None:
    images = pixels(1)
    before = images.copy()
    out = augment(images, shift, flip, np.random.default_rng(1))
    assert (out.dtype, out.shape) == (np.uint8, images.shape)
    assert out.flags.c_contiguous
    assert np.array_equal(images, before)


def test_a_shifted_image_is_a_window_of_the_padded_one() -> None:
    images = pixels(2, count=200)
    out = augment(images, 2, False, np.random.default_rng(2))
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    found = set()
    for number in range(len(images)):
        places = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if np.array_equal(out[number], padded[number, :, row : row + 8, column : column + 6])
        ]
        assert len(places) == 1, "all channels of an image move together, by up to two pixels"
        found.add(places[0])
    assert len(found) == 25


def test_about_half_of_the_images_are_mirrored() -> None:
    images = pixels(3, count=400)
    out = augment(images, 0, True, np.random.default_rng(3))
    mirrored = [np.array_equal(new, old[..., ::-1]) for new, old in zip(out, images, strict=True)]
    kept = [np.array_equal(new, old) for new, old in zip(out, images, strict=True)]
    assert [a ^ b for a, b in zip(mirrored, kept, strict=True)] == [True] * 400
    assert 160 < sum(mirrored) < 240


def test_an_epoch_of_batches_holds_every_image_once_and_normalised(digits_task: Task) -> None:
    split = Split(digits_task.data.train.inputs[:60], np.arange(60))
    data = dataclasses.replace(digits_task.data, shift=0)
    drawn = list(islice(batches(data, split, 20, seed=5), 6))
    for epoch in (drawn[:3], drawn[3:]):
        labels = torch.cat([label for _, label in epoch])
        images = torch.cat([image for image, _ in epoch])
        assert sorted(labels.tolist()) == list(range(60))
        assert np.allclose(images.numpy(), normalise(data, split.inputs)[labels.numpy()], atol=1e-6)
    assert not torch.equal(drawn[0][1], drawn[3][1])


def test_batches_are_no_larger_than_the_split(digits_task: Task) -> None:
    split = Split(digits_task.data.train.inputs[:10], digits_task.data.train.labels[:10])
    images, labels = next(batches(digits_task.data, split, 128, seed=0))
    assert (len(images), len(labels)) == (10, 10)


def test_the_same_seed_trains_the_same_weights(digits_task: Task) -> None:
    first, second = (fit(fresh(), digits_task.data, SHORT, seed=7) for _ in range(2))
    assert same_weights(first, second)
    assert not same_weights(first, fresh())


def test_another_seed_trains_other_weights(digits_task: Task) -> None:
    assert not same_weights(
        fit(fresh(), digits_task.data, SHORT, seed=7), fit(fresh(), digits_task.data, SHORT, seed=8)
    )


def test_distillation_from_one_seed_trains_the_same_weights(digits_task: Task) -> None:
    step = Finetune(6, batch_size=32, seed=3)
    assert same_weights(step(fresh(), digits_task), step(fresh(), digits_task))
    other = dataclasses.replace(step, alpha=0.9)
    assert not same_weights(step(fresh(), digits_task), other(fresh(), digits_task))


def test_a_trained_model_is_in_eval_mode_and_reports_each_step(digits_task: Task) -> None:
    losses: dict[int, float] = {}
    model = fit(fresh(), digits_task.data, SHORT, seed=0, on_step=losses.__setitem__)
    assert not any(module.training for module in model.modules())
    assert list(losses) == list(range(8))
    assert all(math.isfinite(loss) for loss in losses.values())


def test_the_teacher_is_not_changed_by_teaching(digits_task: Task) -> None:
    teacher = digits_task.build()
    fit(fresh(), digits_task.data, SHORT, seed=0, teaching=Teachers(Distillation(1.0), [teacher]))
    assert same_weights(teacher, digits_task.build())


def test_a_student_learns_from_the_teacher_where_the_labels_are_wrong(digits_task: Task) -> None:
    data = digits_task.data
    wrong = dataclasses.replace(data, train=Split(data.train.inputs, (data.train.labels + 1) % 10))
    schedule = Schedule(60, lr=0.1, batch_size=64)
    distillation = Distillation(alpha=1.0, temperature=2.0)
    student = fit(fresh(), wrong, schedule, seed=0, teaching=Teachers(distillation, [digits_task.build()]))
    assert accuracy(student, data, data.search) > 0.8


def test_averaged_weights_lag_behind_the_last_ones(digits_task: Task) -> None:
    last = fit(fresh(), digits_task.data, SHORT, seed=1)
    averaged = fit(fresh(), digits_task.data, dataclasses.replace(SHORT, ema=0.9), seed=1)
    start = fresh().get_submodule("fc").weight
    moved, lagging = (float((m.get_submodule("fc").weight - start).detach().norm()) for m in (last, averaged))
    assert 0 < lagging < moved


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_loss_that_is_not_finite_fails_the_candidate(digits_task: Task, alpha: float) -> None:
    with pytest.raises(CandidateError, match=r"training diverged: the loss is (nan|inf) at step \d+ of 30"):
        Finetune(30, lr=1e9, alpha=alpha)(digits_task.build(), digits_task)


def test_no_steps_leave_the_model_as_it_is(digits_task: Task) -> None:
    assert same_weights(Finetune(0)(digits_task.build(), digits_task), digits_task.build())


def test_fine_tuning_recovers_what_pruning_lost(digits_task: Task) -> None:
    data = digits_task.data
    model = Prune(0.5)(digits_task.build(), digits_task)
    before = accuracy(model, data, data.search)
    after = accuracy(Finetune(60, seed=0)(model, digits_task), data, data.search)
    assert before < 0.7
    assert after > 0.93


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"lr": 0.0}, "lr and temperature must be above 0"),
        ({"temperature": -1.0}, "lr and temperature must be above 0"),
        ({"alpha": 1.1}, "alpha must lie in 0..1, not 1.1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Finetune(**settings)  # type: ignore[arg-type]
