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
    """Print every target: whether it is here, how its figures are found, and how to get what is missing."""
    from rich.console import Console

    from .hardware.doctor import missing_lines, target_table

    console = Console(highlight=False)
    console.print(target_table())
    for line in missing_lines():
        console.print(line, soft_wrap=True, markup=False)


@app.command()
def doctor() -> None:
    """Say what runs here, what is missing and how to get it."""
    from .hardware.doctor import report

    report()


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="ONNX file with one input; .tflite for arm/ethos-u... and arm/agent.")],
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


@app.command()
def profile(
    target: Annotated[str, typer.Option(help="Such as x86/openvino.")],
    model: Annotated[str, typer.Option(help="A name as for `search --model`.")],
    out: Annotated[Path, typer.Option(help="Parquet file; one that is there is continued.")],
    data: Annotated[str | None, typer.Option(help="As for `search --data`; default: noise of the right shape.")] = None,
    space: Annotated[str, typer.Option(help="Candidates are drawn from it; as for `search --space`.")] = "auto",
    granularity: Annotated[
        str, typer.Option(help="stage or layer: what shares one choice in a stock space.")
    ] = "layer",
    samples: Annotated[int, typer.Option(help="Candidates whose operators are timed.")] = 60,
    held_out: Annotated[
        int, typer.Option(help="Further candidates that the table's error is measured on; 0: none.")
    ] = 0,
    image_size: Annotated[int, typer.Option(help="Pixels; 0: the model's own size.")] = 0,
    threads: Annotated[int, _THREADS] = 0,
    seed: Annotated[int, typer.Option(help="For drawing candidates.")] = 0,
) -> None:
    """Time the operators of a space on a target that measures or compiles, for searches on `lookup:TABLE`."""
    from rich.console import Console
    from rich.progress import Progress

    from .search.console import prepare

    prepare()
    from .hardware.profile import profile_model, table_error
    from .hardware.targets import make_backend
    from .search.config import make_config
    from .search.run import make_space
    from .tasks.models import load_task
    from .tasks.noise import noise_task

    if samples < 1 or held_out in (1, 2) or held_out < 0:
        raise InputError(
            f"expected --samples of 1 or more and --held-out 0, or 3 or more; got {samples} and {held_out}"
        )
    backend = make_backend(target, threads)
    task = load_task(model, data, image_size=image_size) if data else noise_task(model, image_size)
    config = make_config({"space": space, "granularity": granularity, "finetune_steps": 0, "seed": seed}, "profile")
    plans = make_space(config, task, backend.capabilities)
    console = Console(highlight=False)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("timing operators", total=samples)
        table = profile_model(
            task, backend, plans, out, samples=samples, seed=seed,
            on_progress=lambda done, total, text: progress.update(bar, completed=done, total=total, description=text),
        )  # fmt: skip
    console.print(f"{out}: {len(table.rows)} operators of {model} on {target}")
    if held_out:
        error = table_error(out, task, backend, plans, candidates=held_out, seed=seed + 1)
        console.print(
            f"error on {error['candidates']} candidates that it has not seen: MAPE {error['mape']:.1%}, "
            f"Spearman {error['spearman']:.3f}"
        )
    typer.echo(f"Use it with: autocompress search --target lookup:{out}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CSV or Parquet: operators, or architectures with latencies.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    columns: Annotated[
        list[str] | None, typer.Option(help="Where names differ: OURS=THEIRS, such as kind=op latency_ms=time.")
    ] = None,
    target: Annotated[str, typer.Option(help="What the latencies are of; default: the file's name.")] = "",
) -> None:
    """Bring in a table that others measured."""
    from .hardware.lookup import LookupTable
    from .hardware.table_import import import_table

    pairs = [pair.partition("=") for text in columns or [] for pair in text.split(",")]
    wrong = next((pair for pair in pairs if not (pair[0] and pair[2])), None)
    if wrong:
        raise InputError(f"--columns: expected OURS=THEIRS, got '{''.join(wrong)}'")
    table = import_table(file, {ours: theirs for ours, _, theirs in pairs}, out, target=target)
    if isinstance(table, LookupTable):
        typer.echo(f"{out}: {len(table.rows)} operators")
    else:
        typer.echo(f"{out}: {len(table)} architectures on {', '.join(table.columns)}")


@app.command()
def predict(
    table: Annotated[Path, typer.Option(help="Architectures, with columns lat_ms_DEVICE of known devices.")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write the predictions to.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="The new device: some of the architectures, with latency_ms or latency_s.")
    ] = None,
    sources: Annotated[list[str] | None, typer.Option(help="Known devices to build on; default: all.")] = None,
    samples: Annotated[int, typer.Option(help="Without --measured: how many architectures to propose.")] = 10,
    seed: Annotated[int, typer.Option(help="For proposing them.")] = 0,
) -> None:
    """Predict a new device's latencies from 10 to 20 measurements; without any, say what to measure."""
    from .hardware.latency_tables import design_table, predict_table, read_table

    names = [name for text in sources or [] for name in text.split(",") if name]
    if measured is None:
        for arch in design_table(read_table(table, "--table"), names, samples, seed):
            typer.echo(arch)
        return
    if out is None:
        raise InputError("--out: expected a CSV file to write the predictions to")
    found = predict_table(read_table(table, "--table"), names, read_table(measured, "--measured"))
    try:
        found.to_csv(out, index=False)
    except OSError as error:
        raise InputError(f"--out: '{out}' can't be written: {error.strerror or error}") from error
    typer.echo(f"{out}: {len(found)} architectures, from {int(found['measured'].sum())} measurements")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="JSON file; measurements that it has already are not taken again.")],
    target: Annotated[str, typer.Option(help="What measures, such as arm/agent:pi@kitchen or x86/onnxruntime.")] = "",
    table: Annotated[
        Path | None,
        typer.Option(help="Instead: measurements that are there, CSV of ONNX files: file, seconds or latency_ms."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Designed networks to measure; 12 to 20 are a good number.")] = 12,
    sources: Annotated[
        list[str] | None, typer.Option(help="Known devices to start from: pixel3 ..., or files; default: the phones.")
    ] = None,
    int8: Annotated[
        bool | None, typer.Option(help="Whether to measure 8-bit networks, too; default: where they are fast.")
    ] = None,
    threads: Annotated[int, _THREADS] = 0,
    seed: Annotated[int, typer.Option(help="For the pool of networks.")] = 0,
) -> None:
    """Measure a few designed networks on a device, and predict all others' latency from then on."""
    from rich.console import Console
    from rich.progress import Progress

    from .search.console import prepare

    prepare()
    from .hardware.calibration import calibrate, calibrate_from_table
    from .hardware.targets import make_backend
    from .studies.hardware_report import calibration_lines

    if bool(target) == bool(table):
        raise InputError("expected either --target, to measure, or --table, with measurements")
    known = None if sources is None else [name for text in sources for name in text.split(",") if name]
    if table is not None:
        found = calibrate_from_table(table, out, sources=known)
    else:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("preparing", total=samples)
            found = calibrate(
                make_backend(target, threads), out, samples, seed, known, int8,
                lambda done, total, text: progress.update(bar, completed=done, total=total, description=text),
            )  # fmt: skip
    for line in calibration_lines(found, out):
        typer.echo(line)


@app.command()
def emit(
    file: Annotated[Path, typer.Argument(help="ONNX file whose layers are all rounded to 8 bits or fewer.")],
    out: Annotated[Path, typer.Option(help="New folder for the circuit.")],
    target: Annotated[str, typer.Option(help="FPGA that the network is folded for.")] = "fpga/ecp5-85",
    place_and_route: Annotated[
        bool, typer.Option("--place-and-route", help="Run Yosys and nextpnr: minutes, for the ECP5 alone.")
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write a network's circuit for an FPGA: SystemVerilog, memory files, a test bench and a report."""
    from .hardware.fpga_report import emit_file

    _show(emit_file(file, target, out, place_and_route), f"{file} as a circuit", as_json)
    if not as_json:
        typer.echo(f"{out}: accelerator.sv and what it needs, simulate.sh, report.md")


@app.command()
def agent(
    file: Annotated[Path, typer.Argument(help="Where to write the program, such as board.pyz.")],
) -> None:
    """Write the program that measures on a board; SSH sends it by itself, a TCP server is started from it."""
    from .hardware.board_connection import agent_archive

    try:
        file.write_bytes(agent_archive())
    except OSError as error:
        raise InputError(f"'{file}' can't be written: {error.strerror or error}") from error
    typer.echo(f"{file}: on the board, AUTOCOMPRESS_AGENT_TOKEN=... python3 {file.name} --serve --port 8765")


@app.command()
def setup(
    target: Annotated[str, typer.Argument(help="arm/qemu: an aarch64 system to emulate.")],
    sources: Annotated[
        Path | None, typer.Option(help="apt sources that have ARM64 packages; default: the system's own.")
    ] = None,
) -> None:
    """Fetch what a target needs from the package registries that this machine uses; nothing else ever does."""
    if target.partition("-")[0] != "arm/qemu":
        raise InputError(f"setup: expected arm/qemu, got '{target}'; `hardware list` says how to get what others need")
    from .hardware.qemu_setup import make_rootfs

    if sources is not None and not sources.is_file():
        raise InputError(f"--sources: there is no file '{sources}'")
    folder = make_rootfs(sources=sources, say=typer.echo)
    typer.echo(f"{folder}: ready")
