"""Train the models that ship with the package and write their weights, recipe and measured accuracy.

    python examples/train_weights.py digits-cnn
    python examples/train_weights.py resnet20 --data cifar10:PATH       (about 45 minutes on two CPU cores)

Only the train split is learnt from; the search and test splits are measured once, at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from safetensors.torch import save_file

from autocompress.compression.training import Schedule, accuracy, fit, timed_steps
from autocompress.core.types import Task
from autocompress.tasks.models import ModelSource, load_task

RECIPES = {
    "digits-cnn": ("digits", 60, Schedule(0, lr=0.1, batch_size=64, ema=0.98)),
    "resnet20": ("cifar10", 60, Schedule(0, lr=0.2, batch_size=128, ema=0.999)),
    "resnet56": ("cifar10", 60, Schedule(0, lr=0.2, batch_size=128, ema=0.999)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(RECIPES))
    parser.add_argument("--data", help="default: the recipe's data set")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("src/autocompress/tasks/weights"))
    arguments = parser.parse_args()
    data_name, epochs, schedule = RECIPES[arguments.model]
    epochs = arguments.epochs or epochs

    loaded = load_task(arguments.model, arguments.data or data_name)
    fresh = ModelSource(arguments.model, len(loaded.data.classes), loaded.data.input_shape, seed=arguments.seed)
    task = Task(loaded.name, fresh, loaded.data)
    steps = epochs * (len(task.data.train) // schedule.batch_size)
    schedule = dataclasses.replace(schedule, steps=steps)

    started = time.perf_counter()
    show = timed_steps(steps, max(1, steps // epochs), lambda line: print(line, flush=True))
    model = fit(task.build(), task.data, schedule, seed=arguments.seed, device=arguments.device, on_step=show)
    seconds = time.perf_counter() - started

    card = {
        "model": arguments.model,
        "data": task.data.name,
        "epochs": epochs,
        "seed": arguments.seed,
        "schedule": dataclasses.asdict(schedule),
        "train_images": len(task.data.train),
        "search_accuracy": accuracy(model, task.data, task.data.search),
        "test_accuracy": accuracy(model, task.data, task.data.test),
        "seconds": round(seconds),
        "device": arguments.device,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.out / f"{arguments.model}-{task.data.name}"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, f"{name}.safetensors")
    Path(f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
