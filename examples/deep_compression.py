"""Deep Compression (Han et al. 2016, arXiv:1510.00149) of a VGG-style net: prune, share weights, Huffman-code.

    python examples/deep_compression.py                       (digits, about a minute for each of three seeds)
    python examples/deep_compression.py --data cifar10:PATH --epochs 20 --seeds 0

Each stage's file is really written and its size read from the disk; the accuracy is that of the model loaded back
from the file, on the test split, which nothing else is chosen on. The table goes to docs/deep_compression.md.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress import Task
from autocompress.compression.coding import load_into, save_compressed
from autocompress.compression.finetune import Finetune
from autocompress.compression.masks import drop_masks
from autocompress.compression.sharing import Cluster, TuneCodebook
from autocompress.compression.sparsity import Sparsify
from autocompress.compression.training import Schedule, accuracy, fit
from autocompress.core.types import Data
from autocompress.tasks.data import load_data

# Pruned in rounds, as the paper does: a net that recovers in between bears more. The clusters are 5 bits.
SPARSITIES, CLUSTERS, BATCH = (0.9, 0.95, 0.98), 32, 64
PAGE = Path(__file__).parent.parent / "docs" / "deep_compression.md"


@dataclass(frozen=True)
class Stage:
    """A model on the way, as it is in its file.

    Attributes:
        accuracy: on the test split, as a share of 1, of the model loaded back from the file.
        bytes: size of the file on the disk.
    """

    name: str
    path: Path
    accuracy: float
    bytes: int


def vgg(data: Data, seed: int) -> nn.Module:
    """Pairs of 3x3 convolutions with max-pooling down to 2x2 pixels, then three wide linear layers, as VGG has them."""
    torch.manual_seed(seed)
    channels, size, _ = data.input_shape
    layers: list[nn.Module] = []
    width = 64
    while size > 2:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
        size, width = size // 2, min(2 * width, 256)
    head = [nn.Flatten(), nn.Linear(channels * size * size, 1024), nn.ReLU(), nn.Dropout(0.5)]
    head += [nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, len(data.classes))]
    return nn.Sequential(*layers, *head)


def compress(data_name: str, seed: int, folder: Path, epochs: int = 30) -> list[Stage]:
    """Train the net for `epochs` epochs and compress it; return the stages, the dense net first."""
    data = load_data(data_name)
    schedule = Schedule(epochs * (len(data.train) // BATCH), lr=0.05, batch_size=BATCH)
    trained = fit(vgg(data, seed), data, schedule, seed=seed)
    task = Task(f"vgg on {data.name}", lambda: copy.deepcopy(trained), data)

    dense = folder / f"dense-{seed}.safetensors"
    save_file(trained.state_dict(), dense)
    again = vgg(data, seed)
    again.load_state_dict(load_file(dense))
    stages = [Stage("dense, float32 (safetensors file)", dense, accuracy(again, data, data.test), dense.stat().st_size)]

    def stored(name: str, model: nn.Module, huffman: bool = False) -> Stage:
        """Write the model without its masks, which its zeros say again, and look at what is in the file."""
        path = folder / f"stage{len(stages)}-{seed}.acmp"
        plain = copy.deepcopy(model)
        drop_masks(plain)
        save_compressed(plain, path, huffman=huffman)
        loaded = load_into(vgg(data, seed), path)
        return Stage(name, path, accuracy(loaded, data, data.test), path.stat().st_size)

    model = task.build()
    for sparsity in SPARSITIES:
        model = Sparsify(sparsity=sparsity, scope="global", criterion="magnitude")(model, task)
        model = Finetune(epochs=max(1, epochs // 4), lr=0.02, batch_size=BATCH, seed=seed)(model, task)
    stages.append(stored(f"{SPARSITIES[-1] * 100:g} % pruned and fine-tuned", model))
    model = Cluster(CLUSTERS, init="linear", seed=seed)(model, task)
    stages.append(stored(f"{CLUSTERS} values in each layer", model))
    model = TuneCodebook(epochs=max(1, epochs // 8), batch_size=BATCH, seed=seed)(model, task)
    stages.append(stored("values fine-tuned", model))
    stages.append(stored("Huffman-coded", model, huffman=True))
    return stages


def as_markdown(runs: list[list[Stage]]) -> str:
    """A table of the stages: mean over the runs, with the range in brackets where it is one."""
    lines = ["| stage | test accuracy | file, bytes | smaller by |", "|---|---|---|---|"]
    for number, stage in enumerate(runs[0]):
        same = [run[number] for run in runs]
        accuracies = _mean_and_range([100 * found.accuracy for found in same], "{:.2f}", " %")
        sizes = _mean_and_range([found.bytes for found in same], "{:,.0f}")
        ratios = _mean_and_range([run[0].bytes / found.bytes for run, found in zip(runs, same, strict=True)], "{:.1f}")
        lines.append(f"| {stage.name} | {accuracies} | {sizes} | {ratios} |")
    return "\n".join(lines) + "\n"


def _mean_and_range(numbers: list[float], form: str, unit: str = "") -> str:
    mean, low, high = (form.format(value) for value in (sum(numbers) / len(numbers), min(numbers), max(numbers)))
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"


def replace(page: Path, mark: str, text: str) -> None:
    """Put `text` between the marks of a Markdown page."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    page.write_text(pattern.sub(lambda found: found[1] + text + found[2], page.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, cifar10[:PATH], or another data set of images")
    parser.add_argument("--epochs", type=int, default=30, help="of the dense net; the later stages take a share of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--page", type=Path, default=PAGE, help="whose table is replaced")
    arguments = parser.parse_args()
    runs = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            runs.append(compress(arguments.data, seed, Path(folder), arguments.epochs))
            print(f"seed {seed}, {time.perf_counter() - started:.0f} s", flush=True)
            print(as_markdown(runs[-1:]), flush=True)
    data = load_data(arguments.data)
    parameters = sum(parameter.numel() for parameter in vgg(data, 0).parameters())
    seeds = ", ".join(map(str, arguments.seeds))
    source = (
        f"\n{data.name}, {len(data.test)} test images; a net of {parameters:,} parameters, {arguments.epochs} epochs; "
        f"mean of seeds {seeds}, range in brackets. One image is {100 / len(data.test):.2f} points.\n"
    )
    table = as_markdown(runs) + source
    print(table)
    replace(arguments.page, "table", table)


if __name__ == "__main__":
    main()
