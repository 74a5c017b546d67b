"""The `autocompress hardware` commands: what runs where, and how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .core.errors import CandidateError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from .hardware.compare import Compared

app = typer.Typer(
    no_args_is_help=True, help="Targets: what runs here, what a model costs there, tables and predictions."
)

_THREADS = typer.Option(help="Cores that measurements on this machine are pinned to; 0: all.")
_JSON = typer.Option("--json", help="Print JSON, in SI units, instead of a table.")


@app.command("list")
def list_targets() -> None:
    """Print every target: whether it is here, what it computes in, and how to get what is missing."""
    from rich.console import Console

    from .studies.hardware_report import missing_lines, target_table

    console = Console(highlight=False)
    console.print(target_table())
    for line in dict.fromkeys(missing_lines()):
        console.print(line, soft_wrap=True, markup=False)


@app.command()
def doctor() -> None:
    """Say what runs here, what is missing and how to get it."""
    from .hardware.doctor import report

    report()


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="ONNX file with one input.")],
    target: Annotated[str, typer.Option(help="Such as x86/openvino; see `hardware list`.")],
    threads: Annotated[int, _THREADS] = 0,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Measure one file on one target."""
    from .hardware.compare import compare_file

    (row,) = compare_file(file, [target], threads)
    if row.reason:
        raise (CandidateError if row.here else MissingDependencyError)(row.reason)
    _show([row], f"{file} on {target}", as_json)


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="A name as for `search --model`, or an ONNX file.")],
    target: Annotated[list[str] | None, typer.Option(help="One or more; default: one of each kind.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every target.")] = False,
    bits: Annotated[list[int] | None, typer.Option(help="Uniform widths to round to, such as 32 8.")] = None,
    data: Annotated[str | None, typer.Option(help="As for `search --data`; default: noise of the right shape.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels; 0: the model's own size.")] = 0,
    threads: Annotated[int, _THREADS] = 0,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Measure one model on many targets, each figure with its interval and its kind."""
    from rich.console import Console

    from .search.console import prepare

    prepare()
    from .core.registry import BACKENDS
    from .hardware.compare import USUAL, check_targets, compare_file, compare_model
    from .tasks.models import load_task
    from .tasks.noise import noise_task

    targets = list(target or (name for name in BACKENDS if _is_whole(name)) if every or target else USUAL)
    check_targets(targets)
    wrong = next((width for width in bits or [] if not 1 <= width <= 32), None)
    if wrong is not None:
        raise InputError(f"--bits must lie in 1..32, not {wrong}")
    status = Console(stderr=True).status("")

    def on_target(name: str) -> None:
        status.update(f"{name} ({targets.index(name) + 1} of {len(targets)})")

    with status:
        if model.endswith(".onnx"):
            if bits or data or image_size:
                raise InputError(
                    "--bits, --data and --image-size are for models by name; an ONNX file is measured as it is"
                )
            rows = list(compare_file(Path(model), targets, threads, on_target))
        else:
            task = load_task(model, data, image_size=image_size) if data else noise_task(model, image_size)
            rows = list(compare_model(task, targets, bits or [32], threads, on_target))
    _show(rows, f"{model}, one input at a time", as_json)


def _is_whole(target: str) -> bool:
    """Whether the name says which device is meant; others need one behind a colon."""
    from .hardware.targets import NEED_A_DEVICE

    return target not in NEED_A_DEVICE


def _show(rows: list[Compared], title: str, as_json: bool) -> None:
    from rich.console import Console

    from .studies.hardware_report import compare_as_json, compare_table

    if as_json:
        typer.echo(json.dumps(compare_as_json(rows), indent=2))
    else:
        Console(highlight=False).print(compare_table(rows, title))
