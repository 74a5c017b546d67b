"""A device's latency model from a few measurements: of designed networks, or of files that someone has measured."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr, t

from ..compression.quantization import Quantize
from ..core.errors import CandidateError, InputError, MissingDependencyError, unknown
from ..core.types import Backend, Measurement, Method
from .boards import Board, decode_board, encode_board, read_boards, read_json, write_json
from .costs import CostPrior, LatencyModel, Seen, call_features, cost_prior, fit_costs, held_out, is_int8, seen_in
from .design import sequential_design
from .latency_tables import read_latencies, read_table
from .operators import OperatorCall, read_operators
from .pool import CALIBRATION_IMAGES, PoolNetwork, pool_networks
from .statistics import Z95

FEWEST = 5
# How far latencies are from the model's, as a share. Chosen from a dozen networks by cross-validation it comes out too
# large, since each of them tells something that no other does, and then costs stay near what is expected of any device.
NOISE = 0.06
WIDE = 0.1  # width of an interval, as a share of the latency, from which a measurement is taken again
BLOCKS = (1, 4, 8, 16)  # output channels that kernels may compute at once
DESIGNED_NOISE = 0.25
SPARE = 5  # networks that stand in for those that can't be built or measured
FOLDS = 20  # at most, of the cross-validation

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class MeasuredNetwork:
    """One measured network.

    Attributes:
        name: of a designed one, `PoolNetwork.name`; of another, its file.
        seconds: its latency.
        calls: its operators as they were exported.
        flags: of the measurement, see `Provenance`. A busy machine alone hardly moves a median; a wide interval tells
            where it did.
    """

    name: str
    seconds: float
    ci95: tuple[float, float] | None
    calls: tuple[OperatorCall, ...]
    flags: tuple[str, ...] = ()

    @property
    def width(self) -> float:
        """Of the interval, as a share of the latency; 0 where unknown."""
        return (self.ci95[1] - self.ci95[0]) / self.seconds if self.ci95 else 0.0


@dataclass(frozen=True)
class Calibration:
    """What was measured on a device, and the latency model that follows; its file is a target, `arm/board:FILE`.

    Attributes:
        target: what was measured with, such as "arm/agent:pi@kitchen"; "" for a table.
        seed: of the designed networks.
        samples: how many measurements are planned.
        board: None until all are there.
    """

    target: str
    device: str
    runtime: str
    seed: int
    samples: int
    measured: tuple[MeasuredNetwork, ...] = ()
    board: Board | None = None


def calibrate(
    backend: Backend,
    path: Path | None = None,
    samples: int = 12,
    seed: int = 0,
    sources: Sequence[str] | None = None,
    int8: bool | None = None,
    on_progress: Progress | None = None,
) -> Calibration:
    """Measure a few networks on a device and fit its latency model.

    Which networks is decided before the first measurement: those of a pool of small random ones whose latencies
    tell most about all others' (`sequential_design`), given how costs vary between devices. A network that the device
    can't run gives way to the next.

    Args:
        path: JSON file that every measurement is written to at once; measurements that it has already are not
            taken again, so that a calibration that broke off goes on. Only those with wide intervals are, once at the
            end of each run.
        samples: measurements; more of them begin like fewer.
        seed: of the pool.
        sources: known devices whose costs are what is expected: names of shipped boards, or files of calibrations;
            all shipped boards by default, round figures where empty.
        int8: whether 8-bit networks are measured too; by default where the backend says that 8 bits are fast.
        on_progress: called with the number of measurements taken, of all, and the network's name.

    Raises:
        InputError: fewer than 5 samples, the file belongs to another calibration, or the backend times nothing.
        MissingDependencyError: the backend can't be used here.
        CandidateError: too many networks failed; what was measured stays in the file.
    """
    if "latency" not in backend.capabilities.metrics:
        raise InputError(f"{backend.name} measures no latency; expected a target that does, see `hardware list`")
    if missing := backend.missing():
        raise MissingDependencyError(missing)
    prior = _prior(sources)
    pool = pool_networks(seed=seed, int8=8 in backend.capabilities.fast if int8 is None else int8)
    if not FEWEST <= samples <= len(pool) - SPARE:
        raise InputError(f"samples: expected {FEWEST} to {len(pool) - SPARE} measurements, got {samples}")
    state = _begun(Calibration(backend.name, "", "", seed, samples), path)
    failures: list[str] = []
    for network in _designed(pool, prior, samples + SPARE):
        if len(state.measured) >= samples:
            break
        if any(entry.name == network.name for entry in state.measured):
            continue
        if on_progress is not None:
            on_progress(len(state.measured), samples, network.name)
        try:
            entry, figure = _measure(backend, network)
        except CandidateError as error:
            failures.append(f"{network.name}: {error}")
            if len(failures) == SPARE:
                kept = f"{len(state.measured)} of {samples} measurements were taken"
                raise CandidateError(f"{backend.name}: {SPARE} networks failed ({kept}); {failures[-1]}") from error
            continue
        state = _joined(state, entry, figure)
        _save(state, path)
    state = _retaken(state, backend, pool, path, on_progress)
    state = dataclasses.replace(state, board=_fit(state, prior))
    _save(state, path)
    return state


def calibrate_from_table(
    table: Path, path: Path | None = None, device: str = "", sources: Sequence[str] | None = None
) -> Calibration:
    """Fit a device's latency model to measurements that someone has.

    Args:
        table: CSV or Parquet with columns `file`, ONNX files beside it or with a whole path, and `seconds`,
            `latency_s` or `latency_ms`.
        path: JSON file to write the calibration to.
        device: its name; that of the table by default.
        sources: as for `calibrate`.

    Raises:
        InputError: the table lacks something, or a file in it can't be read.
    """
    _check_place(path)
    rows = read_table(table, "--table")
    if "file" not in rows:
        raise InputError(f"{table}: expected a column file with ONNX files, got {', '.join(map(str, rows.columns))}")
    seconds = read_latencies(rows.rename(columns={"seconds": "latency_s"}), str(table))
    if len(rows) < FEWEST:
        raise InputError(
            f"{table}: expected at least {FEWEST} measurements, got {len(rows)}; 10 to 20 are a good number"
        )
    measured = []
    for name, latency in zip(map(str, rows["file"]), seconds.tolist(), strict=True):
        file = table.parent / name
        if not file.is_file():
            raise InputError(f"{table}: there is no file '{file}'")
        try:
            measured.append(MeasuredNetwork(name, latency, None, read_operators(file)))
        except CandidateError as error:
            raise InputError(f"{table}: {error}") from error
    state = Calibration("", device or table.stem, f"as in {table.name}", 0, len(measured), tuple(measured))
    state = dataclasses.replace(state, board=_fit(state, _prior(sources)))
    _save(state, path)
    return state


def load_calibration(path: Path) -> Calibration:
    """The calibration in a file, whether finished or not.

    Raises:
        InputError: no such file, or no calibration.
    """
    entry = read_json(path)
    try:
        board = entry["latency_model"]
        return Calibration(
            target=str(entry["target"]),
            device=str(entry["device"]),
            runtime=str(entry["runtime"]),
            seed=int(entry["seed"]),
            samples=int(entry["samples"]),
            measured=tuple(_decode(one) for one in entry["measured"]),
            board=decode_board(board, str(path)) if board else None,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: expected a calibration ({type(error).__name__}: {error})") from error


def _check_place(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"'{path}' can't be written; expected a file in a folder that is there")


def _begun(state: Calibration, path: Path | None) -> Calibration:
    """The calibration, with what the file already has of it."""
    _check_place(path)
    if path is None or not path.exists():
        return state
    found = load_calibration(path)
    for name in ("target", "seed"):
        if getattr(found, name) != getattr(state, name):
            raise InputError(
                f"{path} is a calibration with {name} {getattr(found, name)!r}, not {getattr(state, name)!r}; "
                "choose another file"
            )
    return dataclasses.replace(found, samples=state.samples, measured=found.measured[: state.samples], board=None)


def _joined(state: Calibration, entry: MeasuredNetwork, figure: Measurement) -> Calibration:
    """The calibration with one more measurement, which must be of the same device."""
    source = figure.provenance
    if source.method is not Method.MEASURED:
        raise InputError(f"{state.target}: its latency is {source.method}; expected a target that measures it")
    if state.measured and source.device != state.device:
        raise InputError(_other_device(state, figure))
    return dataclasses.replace(state, device=source.device, runtime=source.runtime, measured=(*state.measured, entry))


def _retaken(
    state: Calibration, backend: Backend, pool: Sequence[PoolNetwork], path: Path | None, on_progress: Progress | None
) -> Calibration:
    """The calibration with measurements of wide intervals taken once more; narrow ones count before fast ones."""
    by_name = {network.name: network for network in pool}
    for row, old in enumerate(state.measured):
        if old.width <= WIDE or old.name not in by_name:
            continue
        if on_progress is not None:
            on_progress(len(state.measured), state.samples, f"again: {old.name}")
        new, figure = _measure(backend, by_name[old.name])
        if figure.provenance.device != state.device:
            raise InputError(_other_device(state, figure))
        # Other work only ever makes a network slower.
        better = min(old, new, key=lambda one: (one.width > WIDE, one.seconds))
        state = dataclasses.replace(state, measured=(*state.measured[:row], better, *state.measured[row + 1 :]))
        _save(state, path)
    return state


def _other_device(state: Calibration, figure: Measurement) -> str:
    found = figure.provenance.device
    return f"what is measured so far is of '{state.device}', not '{found}'; choose another file"


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(OperatorCall)}


def _save(state: Calibration, path: Path | None) -> None:
    if path is None:
        return
    entry: dict[str, Any] = {name: getattr(state, name) for name in ("target", "device", "runtime", "seed", "samples")}
    entry["latency_model"] = encode_board(state.board) if state.board else None
    entry["measured"] = [
        {"name": one.name, "seconds": one.seconds, "ci95": one.ci95, "flags": list(one.flags), "calls": _encoded(one)}
        for one in state.measured
    ]
    write_json(entry, path)


def _encoded(one: MeasuredNetwork) -> list[dict[str, Any]]:
    """Operators without the settings that they do not have."""
    return [{key: value for key, value in vars(call).items() if value != _DEFAULTS[key]} for call in one.calls]


def _decode(entry: Mapping[str, Any]) -> MeasuredNetwork:
    ends = entry["ci95"]
    return MeasuredNetwork(
        str(entry["name"]),
        float(entry["seconds"]),
        (float(ends[0]), float(ends[1])) if ends else None,
        tuple(OperatorCall(**{key: _tuples(value) for key, value in call.items()}) for call in entry["calls"]),
        tuple(map(str, entry["flags"])),
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _prior(sources: Sequence[str] | None) -> CostPrior:
    shipped = read_boards()
    models = []
    for name in shipped if sources is None else sources:
        if name.endswith(".json"):
            board = load_calibration(Path(name)).board
            if board is None:
                raise InputError(f"sources: {name} is not finished")
            models.append(board.model)
        elif name in shipped:
            models.append(shipped[name].model)
        else:
            raise unknown("source", name, shipped)
    return cost_prior(models)


def _designed(pool: Sequence[PoolNetwork], prior: CostPrior, count: int) -> list[PoolNetwork]:
    """Networks in the order of measuring."""
    expected = LatencyModel(prior.mean, prior.covariance, 0.0, 0, Seen(), int8=True)
    shares = expected.shares([network.calls() for network in pool])
    noise = np.full(len(pool), DESIGNED_NOISE**2)
    return [pool[row] for row in sequential_design(shares, prior.covariance, noise, count)]


def _measure(backend: Backend, network: PoolNetwork) -> tuple[MeasuredNetwork, Measurement]:
    task, model = network.task(), network.module()
    if network.bits == 8:
        model = Quantize(8, outputs=backend.capabilities.outputs, samples=CALIBRATION_IMAGES)(model, task)
    with tempfile.TemporaryDirectory() as folder:
        artifact = backend.build(model, task, Path(folder))
        figures = {figure.name: figure for figure in backend.measure(artifact, task, None)}
        calls = read_operators(artifact.path)
    if "latency" not in figures:
        raise CandidateError(f"{backend.name} gave no latency, only {', '.join(figures) or 'nothing'}")
    figure = figures["latency"]
    return MeasuredNetwork(network.name, figure.value, figure.ci95, calls, figure.provenance.flags), figure


@dataclass(frozen=True)
class _Fit:
    """One way to fit, and what it makes of networks that it has not seen.

    Attributes:
        predicted: seconds of each network, from the others.
        scaled: how far off the logarithms are, in standard deviations.
    """

    block: int
    features: np.ndarray
    predicted: np.ndarray
    scaled: np.ndarray
    likelihood: float


def _fit(state: Calibration, prior: CostPrior) -> Board:
    """The latency model, with errors of each network predicted from the others."""
    networks = [entry.calls for entry in state.measured]
    latencies = np.array([entry.seconds for entry in state.measured])
    noise = np.array([math.hypot(NOISE, entry.width / 2) for entry in state.measured])
    ways = [_held_out(networks, latencies, prior, block, noise) for block in BLOCKS]
    best = max(ways, key=lambda way: way.likelihood)
    count = len(latencies)
    # Held-out networks say how much wider than the model's own the intervals must be; few of them say so vaguely.
    squares = best.scaled**2
    factor = _factor(squares)
    # Each network's interval as the others would have made it.
    inside = [abs(miss) <= _factor(np.delete(squares, row)) for row, miss in enumerate(best.scaled)]
    log_costs, covariance = fit_costs(best.features, latencies, prior, noise)
    int8 = any(is_int8(call) for calls in networks for call in calls)
    seen = seen_in(networks, latencies.tolist(), int8=True)
    widened = covariance * (factor / Z95) ** 2
    model = LatencyModel(log_costs, widened, factor * NOISE, count, seen, int8, best.block)
    errors = {
        "mape": float(np.mean(np.abs(best.predicted / latencies - 1))),
        "spearman": float(spearmanr(best.predicted, latencies).statistic),
        "coverage": float(np.mean(inside)),
        "networks": count,
    }
    return Board(state.device, model, errors, f"{count} networks, {state.target or 'measured'} {state.runtime}")


def _held_out(
    networks: Sequence[Sequence[OperatorCall]], latencies: np.ndarray, prior: CostPrior, block: int, noise: np.ndarray
) -> _Fit:
    features = call_features(networks, int8=True, block=block)
    groups = np.arange(len(latencies)) % FOLDS
    predicted, deviations = held_out(features, latencies, groups, prior, noise)
    spread = np.hypot(deviations, noise)
    scaled = np.log(latencies / predicted) / spread
    likelihood = float(-(0.5 * scaled**2 + np.log(spread)).sum())
    return _Fit(block, features, predicted, scaled, likelihood)


def _factor(squares: np.ndarray) -> float:
    """Half width of a 95 % interval in standard deviations, from squares of what held-out networks miss by."""
    return float(t.ppf(0.975, len(squares)) * np.sqrt(squares.mean()))
