"""The `autocompress` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from .cli_hardware import app as hardware_app
from .core.errors import AutocompressError, InputError

if TYPE_CHECKING:
    from .search.config import SearchConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find the Pareto front of compressed variants of a model, measured on the device it must fit.",
)

app.add_typer(hardware_app, name="hardware")

# Options that take several values in one go: `--objectives accuracy latency size`.
_MANY = ("--objectives", "--constraints", "--bits", "--target", "--columns", "--warm-start")


class Format(StrEnum):
    """Output formats of `front`."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    MARKDOWN = "markdown"


@app.command()
def search(
    model: Annotated[
        str | None,
        typer.Option(
            help="digits-cnn, resnet20, resnet56, text-transformer, torchvision:NAME, timm:NAME or module.path:callable."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10[:PATH], imagefolder:PATH or module.path:callable.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Trained weights: safetensors or a state dict.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, for image folders; 0: the model's own size.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Device and runtime, such as x86/openvino; several make a front for each. See `hardware list`."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Cores that measurements are pinned to; 0: all.")] = None,
    objectives: Annotated[
        list[str] | None,
        typer.Option(
            help="One or more of accuracy latency size memory throughput parameters macs loss calibration_error."
        ),
    ] = None,
    constraints: Annotated[
        list[str] | None, typer.Option(help="Such as 'latency<=50%' 'accuracy>=-1pt' 'size<=200kB'.")
    ] = None,
    scalarize: Annotated[
        str | None,
        typer.Option(
            help="One number to maximise instead: 'accuracy - 0.3 latency' or 'accuracy * (latency/5ms)^-0.07'."
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="auto, prune, depth, quantize, ptq, qat, lowrank, sparse, share, adaptive, joint or module.path:callable."
        ),
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="stage or layer: what shares one choice in a stock space.")
    ] = None,
    sensitivity: Annotated[
        bool | None,
        typer.Option(help="Try each layer first; narrow the ranges by what it minds, and start from what is harmless."),
    ] = None,
    bits: Annotated[
        list[str] | None, typer.Option(help="Formats on offer, such as 8, 4, 1.58, bf16, fp8; below 8 is simulated.")
    ] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(help="Training steps after a cut; default: an epoch, less for big models.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="auto, tpe, nsga2, nsga3, gp, evolution, local, rl (needs one number), grid or random."),
    ] = None,
    warm_start: Annotated[
        list[str] | None,
        typer.Option(help="Run folders of earlier searches to start from, also for another target or other data."),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Candidates to evaluate, baselines included.")] = None,
    rungs: Annotated[
        int | None,
        typer.Option(help="Train all candidates a little and only the best on, in so many rungs; 1: all in full."),
    ] = None,
    reduction: Annotated[
        int | None, typer.Option(help="With --rungs: from one to the next, so many times the training; default: 9.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Wall-clock budget, such as 30m.")] = None,
    verify_time: Annotated[
        str | None, typer.Option(help="For measuring doubtful points of the front again, such as 2m; default: 60s.")
    ] = None,
    trial_timeout: Annotated[
        str | None, typer.Option(help="When one candidate counts as hanging, such as 10m.")
    ] = None,
    workers: Annotated[str | None, typer.Option(help="Candidates evaluated side by side, or auto.")] = None,
    resources: Annotated[
        str | None, typer.Option(help="What each worker needs, such as cpu=2,gpu=0.5,mem=2GB; default: one core.")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="ray or inline (this process, for debugging).")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join.")] = None,
    shared: Annotated[
        str | None, typer.Option(help="Folder or s3://... that all nodes reach, for trained weights and files.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For sampling and training.")] = None,
    storage: Annotated[str | None, typer.Option(help="Database URL; default: study.db in the run folder.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study in the database.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; default: runs/DATE-TIME.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to go on with, its settings included; flags win.")
    ] = None,
) -> None:
    """Search, and leave table, plot, database and files in a run folder."""
    given = {
        "model": model, "data": data, "weights": weights, "image_size": image_size, "target": target,
        "threads": threads, "objectives": objectives, "constraints": constraints, "scalarize": scalarize, "space": space,
        "granularity": granularity, "sensitivity": sensitivity, "bits": bits, "finetune_steps": finetune_steps, "sampler": sampler, "warm_start": warm_start,
        "trials": trials, "rungs": rungs, "reduction": reduction, "time": time, "verify_time": verify_time, "trial_timeout": trial_timeout, "workers": workers, "resources": resources, "executor": executor,
        "address": address, "shared": shared, "seed": seed, "storage": storage, "study": study, "out": out,
    }  # fmt: skip
    flags = {name: value for name, value in given.items() if value not in (None, [])}
    settings = _settings(config, resume, flags)
    # Settings are checked before anything heavy is imported: a wrong one answers at once.
    from .search.console import Console, prepare

    prepare()
    import signal

    from .search.run import resume_search, start_search

    # Ctrl-C and `kill` end a search cleanly, also where a shell started it in the background (and ignores Ctrl-C).
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    watcher = Console()
    if resume is not None:
        found = resume_search(resume, settings, watcher=watcher)
    else:
        found = start_search(settings, watcher=watcher)
    if watcher.interrupted:
        typer.echo(
            f"Interrupted; nothing finished is lost. Go on with: autocompress search --resume {found.folder}", err=True
        )
        raise typer.Exit(130)


@app.command()
def front(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    format: Annotated[Format, typer.Option(help="How to print it.")] = Format.TABLE,
    verified: Annotated[
        bool, typer.Option("--verified", help="Only what holds on the test split, and what changed there.")
    ] = False,
) -> None:
    """Print the Pareto front of a run, with the baselines beside it; after a search for several targets, that of each."""
    from .studies import report
    from .studies.cross import cross_table, crossings
    from .studies.study import Study

    study = Study.open(folder)
    if verified:
        report.check_verified(study)
    if format is Format.TABLE:
        from rich.console import Console

        console = Console()
        for target, part in study.parts.items():
            console.print(report.front_table(part, target, verified))
        console.print(cross_table(crossings(study)) if study.parts else report.front_table(study, verified=verified))
    else:
        made: dict[Format, Callable[..., str]] = {
            Format.CSV: report.front_as_csv,
            Format.JSON: report.front_as_json,
            Format.MARKDOWN: report.front_as_markdown,
        }
        typer.echo(made[format](study, verified=verified).rstrip("\n"))


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="A name as for `search --model`.")],
    data: Annotated[str, typer.Option(help="As for `search --data`.")] = "digits",
    weights: Annotated[str | None, typer.Option(help="Trained weights: safetensors or a state dict.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels, for image folders; 0: the model's own size.")] = 0,
    images: Annotated[int, typer.Option(help="Inputs of the search split that each change is tried on.")] = 512,
    rounding: Annotated[int, typer.Option(help="Bit-width of the error histograms.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for analysis.html and analysis.json.")] = None,
) -> None:
    """Show each layer's costs, and how much it minds being pruned or rounded."""
    from rich.console import Console
    from rich.progress import Progress

    from .search.console import prepare

    prepare()
    from .compression.analysis import profile_layers, rounding_errors, sensitivity
    from .studies.analysis_report import profile_table, write_analysis
    from .tasks.models import load_task

    if images < 1:
        raise InputError(f"--images must be at least 1, not {images}")
    if not 2 <= rounding <= 8:
        raise InputError(f"--rounding must lie in 2..8, not {rounding}")
    task = load_task(model, data, weights, image_size)
    profile = profile_layers(task)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Changing one layer at a time", total=len(profile))
        table = sensitivity(task, images=images, on_layer=lambda done, total: progress.update(bar, completed=done))
    Console().print(profile_table(profile, table))
    if out is not None:
        for path in write_analysis(out, task.name, profile, table, rounding_errors(task, rounding)):
            typer.echo(path)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    trial: Annotated[int, typer.Option(help="Number of a front point or baseline.")],
    out: Annotated[Path, typer.Option(help="New folder for the file and its bundle.json.")],
) -> None:
    """Copy one front point's deployable file, with what it is and what was measured."""
    from .studies.study import Study

    study = Study.open(folder)
    if study.parts:
        folders = ", ".join(str(part.folder) for part in study.parts.values())
        raise InputError(f"{folder} was searched for several targets: export from the folder of one of them: {folders}")
    points = {point.trial: point for point in study.front()}
    if trial not in points:
        numbers = ", ".join(str(number) for number in sorted(points))
        raise InputError(f"trial {trial} is not on the front of {folder}; trials there: {numbers}")
    typer.echo(points[trial].export(out))


@app.command()
def dashboard(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8080,
) -> None:
    """Serve the Optuna dashboard of a run on 127.0.0.1, also while it is running."""
    import signal
    import warnings

    from .studies.dashboard import serve

    # Ctrl-C ends it also where a shell started it in the background (and ignores Ctrl-C).
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")  # of libraries, about plots of few trials
    serve(folder, port, lambda url: typer.echo(f"Dashboard of {folder}: {url}  (Ctrl-C ends it)"))


@app.command()
def doctor() -> None:
    """Say what runs here, what is missing and how to get it."""
    from .hardware.doctor import report

    report()


def _settings(config: Path | None, resume: Path | None, flags: dict[str, Any]) -> SearchConfig:
    from .search.config import load_config, make_config

    if config is not None and resume is not None:
        raise InputError("--config and --resume exclude each other: a resumed run has its own config.yaml")
    if resume is not None:
        if not (resume / "config.yaml").is_file():
            raise InputError(f"--resume {resume}: no config.yaml there; expected the folder of an earlier run")
        fixed = {"model", "data", "weights", "target", "objectives", "constraints", "space", "storage", "study", "out"}
        changed = sorted(fixed & set(flags))
        if changed:
            raise InputError(f"--resume: {', '.join(changed)} can't change within a run; start another with --out")
        return make_config({**load_config(resume / "config.yaml"), **flags, "out": str(resume)}, "--resume")
    if config is not None:
        settings = make_config(load_config(config), f"config {config}")
        return make_config({**settings.model_dump(exclude_unset=True), **flags}, "flags")
    return make_config(flags, "flags")


def expand_many(arguments: Sequence[str]) -> list[str]:
    """Repeat an option before each of its values: "--bits 8 4" becomes "--bits 8 --bits 4"."""
    expanded: list[str] = []
    current = ""
    taken = 0
    for argument in arguments:
        if argument in _MANY:
            current, taken = argument, 0
            continue
        if current and (not argument.startswith("--")):
            expanded += [current, argument]
            taken += 1
            continue
        if current and not taken:
            expanded.append(current)  # the option came without a value: let the parser say so
        current = ""
        expanded.append(argument)
    if current and not taken:
        expanded.append(current)
    return expanded


def main() -> None:
    """Run the command line; every wrong input is one line on standard error and exit code 2."""
    try:
        sys.exit(app(args=expand_many(sys.argv[1:]), standalone_mode=False) or 0)
    except AutocompressError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except TyperException as error:
        if len(sys.argv) > 1:  # without any argument the help was printed, and says it all
            typer.echo(f"error: {' '.join(error.format_message().split())} (see --help)", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)  # the reader of our output has enough


if __name__ == "__main__":
    main()
