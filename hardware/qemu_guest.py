"""Runs a file inside qemu, with a call of getppid() before and after each inference, between which instructions count.

Run with the paths of the file, of its inputs (.npy, one inference each) and of the outputs to write (.npy). Imports
Python, NumPy and ONNX Runtime alone: the Python that runs this is not the one that runs autocompress.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from .runtimes import open_onnxruntime


def main() -> None:
    """Run every input once."""
    path, given, wanted = sys.argv[1:]
    inputs = np.load(given, allow_pickle=False)
    run = open_onnxruntime(path, 1, 1, False)
    run(inputs[:1])  # lazy set-up is over then
    np.save(wanted, np.concatenate([_counted(run, inputs[n : n + 1]) for n in range(len(inputs))]), allow_pickle=False)


def _counted(run: Any, one: np.ndarray) -> np.ndarray:
    os.getppid()
    outputs = run(one)
    os.getppid()
    return outputs
