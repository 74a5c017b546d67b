"""The settings of a search, as flags, YAML and Python arguments spell them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ..core.errors import InputError
from .resources import parse_resources

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(value: Any) -> Any:
    """Read "90", "90s", "30m" or "2h" as seconds."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value)
        if match is None:
            raise ValueError(f"expected a duration such as 90s, 30m or 2h, got '{value}'")
        return float(match[1]) * _UNITS[match[2] or "s"]
    return value


def number(value: Any) -> Any:
    """Read "8" and "1.58" as numbers; other text stays, such as "bf16"."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value) if "." in value else int(value)
    return value


Format = Annotated[int | float | str, BeforeValidator(number)]
Duration = Annotated[float, BeforeValidator(seconds), Field(gt=0)]


class SearchConfig(BaseModel):
    """Everything that defines a search; written to `config.yaml` in the run folder.

    Attributes:
        model: "digits-cnn", "resnet20", "resnet56", "torchvision:NAME", "timm:NAME" or "module.path:callable".
        data: "digits", "cifar10[:PATH]", "imagefolder:PATH" or "module.path:callable".
        weights: safetensors file or state dict; none takes those shipped for a built-in model.
        image_size: pixels, for image folders; 0 for the model's own size.
        constraints: such as "latency<=50%", "accuracy>=-1pt", "size<=200kB".
        scalarize: one number to maximise instead of the whole front, made of the objectives, such as
            "accuracy - 0.3 latency" or "accuracy * (latency/5ms)^-0.07" (see `evaluators.scalar.parse_scalar`).
        space: a stock space by name (see `spaces.stock.STOCK`) or "module.path:callable" (a function of the trial).
        target: such as "x86/openvino"; several make one search with a front for each.
        bits: formats on offer in stock spaces (8, 4, 1.58, "bf16", "fp8", ...); [] for the widths that the target runs.
        sensitivity: whether stock spaces are narrowed by what each layer minds (see `analysis.sensitivity`).
        finetune_steps: training steps after a cut, in stock spaces and in the pruning baseline; none for an
            epoch, or less for big models (about a minute on one CPU core, a few where convolutions are depthwise).
        warm_start: run folders of earlier searches, for another device, other data or a similar space, to start from
            (docs/transfer.md).
        trials: candidates to evaluate, baselines included.
        rungs: at how many lengths of training candidates are compared: the best go on from one to the next, only the
            last is full training (docs/fidelity.md); 1 trains every candidate in full.
        reduction: how much longer training is from one rung to the next, to which a third of the candidates go on.
        time: wall-clock budget in seconds ("30m" in YAML); none for no limit.
        verify_time: seconds at the end of a search in which points whose place on the front is in doubt are measured
            again (docs/fronts.md).
        trial_timeout: seconds after which one candidate counts as hanging.
        threads: cores that a measurement is pinned to; 0 for all.
        storage: SQLAlchemy URL of the study; none for study.db in the run folder.
        workers: candidates evaluated side by side, at most; "auto" for as many as this machine has cores for, or as a
            cluster gives (one that grows on demand is asked for more as long as it gives more).
        resources: of each worker, such as "cpu=2,gpu=0.5,mem=2GB"; "" for one core.
        address: of a Ray cluster to join.
        shared: folder or URL ("s3://...", through fsspec) that all nodes reach: for trained weights, and for the files
            of the front where several searches share a study.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str = "digits-cnn"
    data: str = "digits"
    weights: str | None = None
    image_size: int = Field(0, ge=0)
    target: str | list[str] = "x86/openvino"
    threads: int = Field(0, ge=0)
    objectives: list[str] = ["accuracy", "latency", "size"]
    constraints: list[str] = []
    scalarize: str = ""
    space: str = "auto"
    granularity: Literal["stage", "layer"] = "stage"
    sensitivity: bool = False
    bits: list[Format] = []
    finetune_steps: int | None = Field(None, ge=0)
    sampler: str = "auto"
    warm_start: list[str] = []
    trials: int = Field(40, ge=1)
    rungs: int = Field(1, ge=1, le=9)
    reduction: int = Field(9, ge=2)
    time: Duration | None = None
    verify_time: Annotated[float, BeforeValidator(seconds), Field(ge=0)] = 60.0
    trial_timeout: Duration = 1800.0
    workers: int | Literal["auto"] = 1
    resources: str = ""
    executor: Literal["ray", "inline"] = "ray"
    address: str | None = None
    shared: str | None = None
    seed: int = 0
    out: str = ""
    storage: str | None = None
    study: str = "autocompress"

    @property
    def targets(self) -> list[str]:
        """The target or targets, as a list."""
        return [self.target] if isinstance(self.target, str) else self.target

    @field_validator("workers", mode="before")
    @classmethod
    def _a_number_or_auto(cls, workers: Any) -> Any:
        if workers == "auto":
            return workers
        if isinstance(workers, bool) or not re.fullmatch(r"-?\d+", str(workers).strip()):
            raise ValueError("expected a number, or auto")
        if int(workers) < 1:
            raise ValueError("Input should be greater than or equal to 1, or auto")
        return int(workers)

    @field_validator("resources")
    @classmethod
    def _readable(cls, resources: str) -> str:
        if resources:
            parse_resources(resources)
        return resources

    @field_validator("target")
    @classmethod
    def _one_or_several(cls, target: str | list[str]) -> str | list[str]:
        if isinstance(target, str):
            return target
        if not target or len(set(target)) < len(target):
            raise ValueError("expected one target, or several different ones")
        return target[0] if len(target) == 1 else target


def load_config(path: Path) -> dict[str, Any]:
    """Settings from a YAML file; raises InputError for a missing, unreadable or wrong one."""
    if not path.is_file():
        raise InputError(f"config: no such file: {path}")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise InputError(f"config {path}: expected keys and values, got {type(settings).__name__}")
    strange = [key for key in settings if not isinstance(key, str)]
    if strange:
        raise InputError(f"config {path}: unknown key '{strange[0]}'. Keys: {', '.join(SearchConfig.model_fields)}")
    return settings


def make_config(settings: dict[str, Any], source: str = "settings") -> SearchConfig:
    """Validated settings; raises InputError with the first thing that is wrong."""
    try:
        return SearchConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            import difflib

            close = difflib.get_close_matches(name, SearchConfig.model_fields, n=1)
            guess = f" Did you mean '{close[0]}'?" if close else ""
            raise InputError(
                f"{source}: unknown key '{name}'.{guess} Keys: {', '.join(SearchConfig.model_fields)}"
            ) from error
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{source}: {name}: {message} (got {first['input']!r})") from error


def save_config(config: SearchConfig, folder: Path) -> None:
    """Write the full settings to `config.yaml`."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder / "config.yaml").write_text(
        "# Full settings of this run; `autocompress search --resume FOLDER` goes on with it.\n" + text
    )
