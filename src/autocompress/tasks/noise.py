"""Random inputs, for figures that depend on shapes alone: latency, memory, size."""

from __future__ import annotations

import numpy as np

from ..core.types import Data, Split, Task
from .models import BUILT_IN, check_model_name, load_task, native_image_size

COUNT = 64  # inputs in each split; enough to calibrate a rounding on
TOKENS, VOCABULARY = 64, 1000


def noise_data(input_shape: tuple[int, ...], classes: int = 10, vocabulary: int = 0, seed: int = 0) -> Data:
    """Normally distributed images, or uniformly distributed tokens, with random labels.

    Args:
        input_shape: (C, H, W) of images, (L,) of token sequences.
        vocabulary: number of different tokens; 0 for images.
    """
    rng = np.random.default_rng(seed)

    def split() -> Split:
        shape = (COUNT, *input_shape)
        if vocabulary:
            return Split(rng.integers(0, vocabulary, shape), rng.integers(0, classes, COUNT))
        pixels = np.clip(rng.normal(128, 48, shape), 0, 255).astype(np.uint8)
        return Split(pixels, rng.integers(0, classes, COUNT))

    channels = 0 if vocabulary else input_shape[0]
    mean, std = (0.5,) * channels, (0.19,) * channels
    return Data("noise", split(), split(), split(), tuple(map(str, range(classes))), mean, std, vocabulary=vocabulary)


def noise_task(model: str, image_size: int = 0, seed: int = 0) -> Task:
    """The model with random weights and random inputs of the shape that it was designed for.

    Args:
        model: as for `load_task`.
        image_size: height and width in pixels; 0 for the model's own.

    Raises:
        InputError: unknown model, or one that can't take such inputs.
    """
    check_model_name(model)
    if model == "text-transformer":
        return load_task(model, noise_data((TOKENS,), vocabulary=VOCABULARY, seed=seed), seed=seed)
    size = image_size or native_image_size(model)
    channels = 1 if model == "digits-cnn" else 3
    classes = 10 if model in BUILT_IN else 1000
    return load_task(model, noise_data((channels, size, size), classes, seed=seed), seed=seed)
