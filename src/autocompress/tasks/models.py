"""Models by name: built in, from torchvision, from timm, or the user's own callable."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InputError, MissingDependencyError, unknown
from ..core.types import Data, Task
from .attention import open_attention
from .data import example_input, load_data
from .specs import call_object

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR residual network of depth 6n+2 (He et al. 2016), with 1x1 projection shortcuts.

    Input (N, 3, 32, 32), output (N, classes).
    """

    def __init__(self, depth: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.fc = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DigitsCNN(nn.Module):
    """Three convolutions and a linear layer for 8x8 images; input (N, 1, 8, 8), output (N, classes)."""

    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class TextTransformer(nn.Module):
    """A small BERT-like classifier (Devlin et al. 2019, arXiv:1810.04805): embeddings, encoder layers, mean, linear.

    Input: tokens (N, length) int64, padding being a token like any other; output (N, classes).
    """

    def __init__(self, classes: int, vocabulary: int, length: int, width: int = 64, heads: int = 4, depth: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embedding(tokens) + self.position).mean(1))


# From classes, input shape and vocabulary to a model.
BUILT_IN: dict[str, Callable[[int, tuple[int, ...], int], nn.Module]] = {
    "digits-cnn": lambda classes, shape, _: DigitsCNN(classes, shape[0]),
    "resnet20": lambda classes, shape, _: CifarResNet(20, classes, shape[0]),
    "resnet56": lambda classes, shape, _: CifarResNet(56, classes, shape[0]),
    "text-transformer": lambda classes, shape, vocabulary: TextTransformer(classes, vocabulary, shape[0]),
}


@dataclass(frozen=True)
class ModelSource:
    """How to make the model again; picklable, so that workers build their own copy.

    Attributes:
        spec: "resnet20", "torchvision:NAME", "timm:NAME" or "module.path:callable".
        input_shape: of one input, see `Data.input_shape`.
        vocabulary: see `Data.vocabulary`.
        weights: a safetensors file or a state dict; None for random weights (or the callable's own).
        seed: for random weights.
    """

    spec: str
    classes: int
    input_shape: tuple[int, ...]
    weights: Path | None = None
    seed: int = 0
    vocabulary: int = 0

    def __call__(self) -> nn.Module:
        """Return a fresh copy in eval mode."""
        state = torch.random.get_rng_state()
        torch.manual_seed(self.seed)
        try:
            model = self._make()
        finally:
            torch.random.set_rng_state(state)
        if self.weights is not None:
            load_weights(model, self.weights, self.spec)
        return open_attention(model).eval()

    def _make(self) -> nn.Module:
        name, _, rest = self.spec.partition(":")
        if name in BUILT_IN and not rest:
            return BUILT_IN[name](self.classes, self.input_shape, self.vocabulary)
        if name == "torchvision" and rest:
            return _torchvision(rest, self.classes)
        if name == "timm" and rest:
            return _timm(rest, self.classes, self.input_shape)
        if rest:
            return call_object(self.spec, "model", nn.Module)
        raise unknown("model", self.spec, BUILT_IN, "Others: torchvision:NAME, timm:NAME, module.path:callable.")


def load_task(
    model: str, data: str | Data, weights: str | Path | None = None, image_size: int = 0, seed: int = 0
) -> Task:
    """Make the task of compressing `model` on `data`.

    Args:
        model: see `ModelSource.spec`.
        data: see `load_data`.
        weights: a safetensors file or a torch state dict (loaded with weights_only). Without one, a
            built-in model uses the weights shipped for this data set, where there are any.
        image_size: for image folders; 0 for the size that the model was designed for.
        seed: for random weights, where no trained ones are to be had.

    Raises:
        InputError: wrong name, missing or unfitting file, model that can't take the data's images.
    """
    path = Path(weights) if weights else None
    if path is not None and not path.is_file():
        raise InputError(f"weights: no such file: {path}")
    check_model_name(model)
    loaded = load_data(data, image_size or native_image_size(model))
    if path is None:
        shipped = WEIGHTS_FOLDER / f"{model}-{loaded.name}.safetensors"
        path = shipped if shipped.is_file() else None
    if (model == "text-transformer") != bool(loaded.vocabulary) and model in BUILT_IN:
        takes = "token sequences" if model == "text-transformer" else "images"
        raise InputError(f"model {model} takes {takes}, which {loaded.name} are not; choose another model or data")
    source = ModelSource(model, len(loaded.classes), loaded.input_shape, path, seed, loaded.vocabulary)
    own_callable = ":" in model and not model.startswith(("timm:", "torchvision:"))
    task = Task(f"{model} on {loaded.name}", source, loaded, trained=path is not None or own_callable)
    check_model(task.build(), task)
    return task


def check_model_name(spec: str) -> None:
    """Raise InputError for a name that no model answers to, before any data is read."""
    name, _, rest = spec.partition(":")
    if name in ("timm", "torchvision"):
        if not rest:
            raise InputError(f"model '{spec}': expected {name}:NAME, e.g. {name}:resnet18")
        _zoo_names(name, rest)
    elif not rest and name not in BUILT_IN:
        raise unknown("model", spec, BUILT_IN, "Others: torchvision:NAME, timm:NAME, module.path:callable.")


def check_model(model: nn.Module, task: Task) -> None:
    """Raise InputError unless `model` maps two of the data's inputs to finite logits of shape (2, classes)."""
    try:
        with torch.no_grad():
            logits = model.eval()(example_input(task.data, 2))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{task.name}: the model can't take inputs of {'x'.join(map(str, task.data.input_shape))}: {line} "
            "(another --image-size, or a model made for such images, may help)"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, len(task.data.classes)):
        raise InputError(
            f"{task.name}: expected logits of shape (N, {len(task.data.classes)}) for the data's classes, got {shape}"
        )
    if not torch.isfinite(logits).all():
        raise InputError(f"{task.name}: the untouched model's logits are not finite; check its weights")


def native_image_size(spec: str) -> int:
    """Height and width in pixels that the model was designed for."""
    name, _, rest = spec.partition(":")
    if name == "timm":
        import timm

        config = timm.get_pretrained_cfg(rest, allow_unregistered=True)
        return int(config.input_size[-1]) if config is not None else 224
    if name in BUILT_IN:
        return 8 if name == "digits-cnn" else 32
    return 224


def load_weights(model: nn.Module, path: Path, spec: str) -> None:
    """Load a safetensors file or a state dict into `model`, strictly; never runs code from the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for a broken or unsafe file
        raise InputError(
            f"weights {path}: not a safetensors file or a plain state dict: {_first_line(error)}"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights {path}: expected a state dict (names to tensors), got {type(state).__name__}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:300]
        raise InputError(f"weights {path} do not fit model '{spec}': {details}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def import_torchvision() -> Any:
    """Import torchvision also where its compiled operators do not load (a CUDA build beside a CPU torch)."""
    if importlib.util.find_spec("torchvision") is None:
        raise MissingDependencyError("torchvision is not installed: pip install torchvision")
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # Only box operators are missing; declaring them lets the models and transforms import.
        global _TORCHVISION_OPS
        _TORCHVISION_OPS = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _TORCHVISION_OPS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


_TORCHVISION_OPS: Any = None


def _zoo_names(zoo: str, name: str) -> None:
    import_torchvision()
    if zoo == "timm":
        import timm

        if not timm.is_model(name.partition(".")[0]):
            raise unknown("timm model", name, _nearest(name, timm.list_models()), "All: timm.list_models().")
    else:
        import torchvision.models as zoo_models

        if name not in zoo_models.list_models(module=zoo_models):
            known = zoo_models.list_models(module=zoo_models)
            raise unknown("torchvision model", name, _nearest(name, known), "All: torchvision.models.list_models().")


def _nearest(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]


def _torchvision(name: str, classes: int) -> nn.Module:
    import_torchvision()
    import torchvision.models as zoo_models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # googlenet and inception warn about a future default
        model = zoo_models.get_model(name, weights=None, num_classes=classes)
    if hasattr(model, "aux_logits"):
        model.aux_logits = False
    return model


def _timm(name: str, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    import_torchvision()
    import timm

    made: dict[str, Any] = {"num_classes": classes, "in_chans": input_shape[0]}
    with contextlib.suppress(TypeError):  # most take any size; those that don't know the setting are built for any
        return timm.create_model(name, pretrained=False, img_size=input_shape[1:], **made)
    return timm.create_model(name, pretrained=False, **made)
