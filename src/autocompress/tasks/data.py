"""Data sets by name, as three disjoint splits of uint8 images.

`digits` (embedded), `cifar10[:PATH]`, `imagefolder:PATH` and `module.path:callable`. The search split
is cut from the training images by a fixed permutation, so that two runs agree on it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import InputError, unknown
from ..core.types import Data, Split
from .specs import call_object

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}


def load_data(spec: str | Data, image_size: int = 224) -> Data:
    """Load the data set that `spec` names.

    Args:
        spec: "digits", "cifar10", "cifar10:PATH", "imagefolder:PATH", "module.path:callable"
            (called without arguments, returns a `Data`), or a `Data`, returned as it is.
        image_size: height and width in pixels to which an image folder's images are brought.

    Raises:
        InputError: unknown name, missing path, unreadable image, splits that can't be used.
    """
    if isinstance(spec, Data):
        return check_data(spec)
    name, _, rest = spec.partition(":")
    if name == "digits" and not rest:
        return check_data(_digits())
    if name == "cifar10":
        return check_data(_cifar10(Path(rest) if rest else None))
    if name == "imagefolder":
        if not rest:
            raise InputError("imagefolder needs a path: imagefolder:PATH, with one sub-folder per class")
        return check_data(_image_folder(Path(rest), image_size))
    if rest:
        return check_data(call_object(spec, "data", Data))
    raise unknown("data", spec, ["digits", "cifar10", "imagefolder:PATH"], "Own data: module.path:callable.")


def check_data(data: Data) -> Data:
    """Return `data` if its splits are usable; raise InputError with the first thing that is wrong."""
    for name in ("train", "search", "test"):
        split = data.split(name)
        inputs, labels = split.inputs, split.labels
        if data.vocabulary:
            if inputs.ndim != 2 or inputs.dtype != np.int64 or inputs.min() < 0 or inputs.max() >= data.vocabulary:
                raise InputError(
                    f"{data.name}: {name} tokens must be int64 with shape (N, L) and lie in 0..{data.vocabulary - 1}; "
                    f"they are {inputs.dtype} with shape {inputs.shape}, from {inputs.min()} to {inputs.max()}"
                )
        elif inputs.ndim != 4 or inputs.dtype != np.uint8:
            raise InputError(
                f"{data.name}: {name} images must be uint8 with shape (N, C, H, W); "
                f"they are {inputs.dtype} with shape {inputs.shape}"
            )
        if len(inputs) != len(labels) or len(labels) == 0:
            raise InputError(f"{data.name}: {name} split has {len(inputs)} inputs and {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= len(data.classes):
            raise InputError(
                f"{data.name}: {name} labels must lie in 0..{len(data.classes) - 1} "
                f"({len(data.classes)} classes); they lie in {labels.min()}..{labels.max()}"
            )
    if not data.vocabulary and (len(data.mean) != data.input_shape[0] or len(data.std) != data.input_shape[0]):
        raise InputError(f"{data.name}: mean and std need one value per channel ({data.input_shape[0]})")
    return data


def normalise(data: Data, inputs: np.ndarray) -> np.ndarray:
    """Turn uint8 images (N, C, H, W) into a model's float32 input of the same shape; tokens stay as they are."""
    if data.vocabulary:
        return np.asarray(inputs, np.int64)
    mean = np.asarray(data.mean, np.float32)[:, None, None]
    std = np.asarray(data.std, np.float32)[:, None, None]
    return (inputs.astype(np.float32) / np.float32(255) - mean) / std


def example_input(data: Data, count: int = 1) -> torch.Tensor:
    """`count` inputs of zeros, in the type and shape that the data's models take: what tracing and export run."""
    import torch

    return torch.zeros(count, *data.input_shape, dtype=torch.int64 if data.vocabulary else torch.float32)


def cache_folder() -> Path:
    """Folder for what can be made again: `$AUTOCOMPRESS_CACHE`, or `autocompress` in the user's cache."""
    base = os.environ.get("AUTOCOMPRESS_CACHE")
    folder = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "autocompress"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digits() -> Data:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = np.clip(source.images * 16, 0, 255).astype(np.uint8)[:, None]
    labels = source.target.astype(np.int64)
    train, search, test = _stratified(labels, (0.5, 0.25, 0.25))
    return Data(
        name="digits",
        train=Split(images[train], labels[train]),
        search=Split(images[search], labels[search]),
        test=Split(images[test], labels[test]),
        classes=tuple(str(digit) for digit in range(10)),
        mean=(0.3,),
        std=(0.37,),
        shift=1,
    )


def _cifar10(path: Path | None) -> Data:
    source = path or _find_cifar10()
    if not source.exists():
        raise InputError(f"cifar10: no such file or folder: {source}")
    train_images, train_labels, test_images, test_labels = _cached_arrays(source, _decode_cifar10)
    keep, search, _ = _stratified(train_labels, (0.9, 0.1, 0.0))
    return Data(
        name="cifar10",
        train=Split(train_images[keep], train_labels[keep]),
        search=Split(train_images[search], train_labels[search]),
        test=Split(test_images, test_labels),
        classes=CIFAR_CLASSES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.2435, 0.2616),
        shift=4,
        flip=True,
    )


def _find_cifar10() -> Path:
    folders = [Path(os.environ["AUTOCOMPRESS_DATA"])] if "AUTOCOMPRESS_DATA" in os.environ else []
    folders += [Path("../shared/data"), Path("data")]
    for folder in folders:
        for name in ("cifar10", "cifar10.tar.xz"):
            if (folder / name).exists():
                return folder / name
    looked = ", ".join(str(folder) for folder in folders)
    raise InputError(
        f"cifar10 not found (looked in {looked}): give cifar10:PATH, a folder or tar archive with "
        "train/<class>/*.jpg and test/<class>/*.jpg, or set AUTOCOMPRESS_DATA to its folder"
    )


def _cached_arrays(source: Path, decode: Callable[[Path], list[np.ndarray]]) -> list[np.ndarray]:
    """Decode `source` once; later calls map the same arrays from the cache folder."""
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    stats = [(str(path), path.stat()) for path in paths]
    mark = f"{source.resolve()}|2|{[(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]}"
    folder = cache_folder() / f"{source.stem.split('.')[0]}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(decode(source)):
            # Written beside and moved into place, so that two processes can do it at once.
            part = folder / f"{number}.{os.getpid()}.part"
            with part.open("wb") as out:
                np.save(out, array)
            part.replace(folder / f"{number}.npy")
        (folder / "done").touch()
    count = len(list(folder.glob("*.npy")))
    return [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(count)]


def _decode_cifar10(source: Path) -> list[np.ndarray]:
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for name, content in _files(source):
        parts = name.strip("./").split("/")
        if len(parts) < 3 or Path(name).suffix.lower() not in _IMAGE_ENDINGS:
            continue
        split, klass = parts[-3], parts[-2]
        if split not in images or klass not in CIFAR_CLASSES:
            raise InputError(f"cifar10: unexpected file {name}: expected train/<class>/… and test/<class>/…")
        images[split].append(_decode(content, f"{source}: {name}", size=None))
        labels[split].append(CIFAR_CLASSES.index(klass))
    if not images["train"] or not images["test"]:
        raise InputError(f"cifar10: {source} holds no train/<class>/*.jpg and test/<class>/*.jpg")
    return [
        np.stack(images["train"]),
        np.asarray(labels["train"], np.int64),
        np.stack(images["test"]),
        np.asarray(labels["test"], np.int64),
    ]


def _files(source: Path) -> Iterable[tuple[str, bytes]]:
    """Yield (name, content) of the files of a folder or tar archive, in name order for folders."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield str(path.relative_to(source)), path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{source} is no readable tar archive: {error}") from error


def _decode(content: bytes, name: str, size: int | None) -> np.ndarray:
    """Decode one image to RGB uint8 (3, H, W); with `size`, resized on the shorter side and centre-cropped."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"unreadable image {name}: {error}; remove or replace the file") from error
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).transpose(2, 0, 1)


def _image_folder(root: Path, size: int) -> Data:
    if not root.is_dir():
        raise InputError(f"imagefolder: no such folder: {root}")
    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    has_train = (root / "train").is_dir() and held_out is not None
    base = root / "train" if has_train else root
    classes = tuple(sorted(entry.name for entry in base.iterdir() if entry.is_dir()))
    if len(classes) < 2:
        raise InputError(f"imagefolder: {base} needs a sub-folder per class, at least two; it has {len(classes)}")
    images, labels = _decode_classes(base, classes, size)
    if has_train:
        train, search, _ = _stratified(labels, (0.85, 0.15, 0.0))
        test = Split(*_decode_classes(root / str(held_out), classes, size))
    else:
        train, search, rest = _stratified(labels, (0.7, 0.15, 0.15))
        test = Split(images[rest], labels[rest])
    return Data(
        name=f"imagefolder:{root.name}",
        train=Split(images[train], labels[train]),
        search=Split(images[search], labels[search]),
        test=test,
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        shift=max(1, size // 16),
        flip=True,
    )


def _decode_classes(base: Path, classes: Sequence[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for label, name in enumerate(classes):
        paths = [path for path in sorted((base / name).rglob("*")) if path.suffix.lower() in _IMAGE_ENDINGS]
        if not paths:
            raise InputError(f"imagefolder: no image in {base / name} ({', '.join(sorted(_IMAGE_ENDINGS))})")
        for path in paths:
            images.append(_decode(path.read_bytes(), str(path), size))
            labels.append(label)
    return np.stack(images), np.asarray(labels, np.int64)


def _stratified(labels: np.ndarray, shares: tuple[float, float, float]) -> list[np.ndarray]:
    """Cut positions 0..N-1 into three sorted, disjoint parts with equal class shares; always the same cut."""
    parts: list[list[Any]] = [[], [], []]
    for label in np.unique(labels):
        members = np.random.default_rng(20260101).permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(shares) * len(members)).astype(int)
        if min(np.diff([0, *ends])[np.asarray(shares) > 0]) == 0:
            raise InputError(f"class {label} has {len(members)} images, too few for train, search and test splits")
        for part, piece in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]
