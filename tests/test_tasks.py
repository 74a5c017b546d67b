"""Data sets and models by name."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from autocompress import Data, InputError, Split, Task, load_data, load_task
from autocompress.compression.training import accuracy
from autocompress.tasks.data import CIFAR_CLASSES, normalise
from autocompress.tasks.models import WEIGHTS_FOLDER

SHARED_CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10.tar.xz"
SPLITS = ("train", "search", "test")


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR-10's layout: twelve noise images per class and part."""
    root = tmp_path_factory.mktemp("cifar") / "tiny"
    rng = np.random.default_rng(1)
    for part in ("train", "test"):
        for name in CIFAR_CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number:02}.png")
    return root


def images_of(data: Data, split: str) -> list[bytes]:
    return [image.tobytes() for image in data.split(split).inputs]


def assert_same(one: Data, other: Data) -> None:
    for name in SPLITS:
        assert np.array_equal(one.split(name).inputs, other.split(name).inputs)
        assert np.array_equal(one.split(name).labels, other.split(name).labels)


def test_digits_splits_are_disjoint_and_together_the_whole_set() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits")
    whole = Counter(image.tobytes() for image in np.clip(load_digits().images * 16, 0, 255).astype(np.uint8))
    assert sum((Counter(images_of(data, name)) for name in SPLITS), Counter()) == whole
    assert sum(len(data.split(name)) for name in SPLITS) == 1797


def test_image_folder_splits_are_disjoint_and_together_the_whole_folder(image_folder: Path) -> None:
    data = load_data(f"imagefolder:{image_folder}", image_size=40)
    found = [image for name in SPLITS for image in images_of(data, name)]
    assert len(found) == len(set(found)) == 72
    stored = {np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in image_folder.rglob("*.png")}
    assert set(found) == stored


@pytest.mark.parametrize("spec", ["digits", "imagefolder"])
def test_every_split_has_its_share_of_every_class(spec: str, image_folder: Path) -> None:
    data = load_data(spec if spec == "digits" else f"imagefolder:{image_folder}", image_size=16)
    totals = Counter(int(label) for name in SPLITS for label in data.split(name).labels)
    whole = sum(totals.values())
    for name in SPLITS:
        split = data.split(name)
        counts = Counter(int(label) for label in split.labels)
        for label, total in totals.items():
            assert abs(counts[label] - total * len(split) / whole) <= 1.5


@pytest.mark.parametrize("spec", ["digits", "imagefolder"])
def test_loading_twice_gives_the_same_splits(spec: str, image_folder: Path) -> None:
    name = spec if spec == "digits" else f"imagefolder:{image_folder}"
    assert_same(load_data(name, image_size=16), load_data(name, image_size=16))


def test_images_are_kept_as_uint8_channels_first(image_folder: Path) -> None:
    data = load_data(f"imagefolder:{image_folder}", image_size=24)
    assert data.input_shape == (3, 24, 24)
    assert data.train.inputs.dtype == np.uint8
    assert data.train.labels.dtype == np.int64
    assert data.classes == ("blue", "green", "red")
    brightest = [data.train.inputs[data.train.labels == label].mean((0, 2, 3)).argmax() for label in range(3)]
    assert brightest == [2, 1, 0], "labels follow the class names, channels are RGB"


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_an_image_folder_may_bring_its_own_held_out_part(image_folder: Path, tmp_path: Path, held_out: str) -> None:
    for path in sorted(image_folder.rglob("*.png")):
        part = held_out if int(path.stem) >= 16 else "train"
        (tmp_path / part / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / part / path.parent.name)
    data = load_data(f"imagefolder:{tmp_path}", image_size=40)
    assert data.classes == ("blue", "green", "red")
    assert len(data.test) == 3 * 8
    assert len(data.train) + len(data.search) == 3 * 16
    held = {np.asarray(Image.open(p)).transpose(2, 0, 1).tobytes() for p in (tmp_path / held_out).rglob("*.png")}
    assert set(images_of(data, "test")) == held
    assert not held & {*images_of(data, "train"), *images_of(data, "search")}


def test_too_few_images_for_three_splits_are_refused(image_folder: Path, tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        shutil.copy(image_folder / name / "00.png", tmp_path / name)
    with pytest.raises(InputError, match="too few"):
        load_data(f"imagefolder:{tmp_path}", image_size=16)


def test_own_data_comes_from_a_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_data.py").write_text(
        "import dataclasses\nfrom autocompress import load_data\n"
        "def halves():\n    return dataclasses.replace(load_data('digits'), name='halves', shift=0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = load_data("my_own_data:halves")
    assert (data.name, data.shift) == ("halves", 0)
    assert_same(data, load_data("digits"))


def test_own_data_with_labels_beyond_its_classes_is_refused() -> None:
    split = Split(np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 1, 2, 3]))
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.2"):
        load_data(Data("wrong", split, split, split, ("a", "b", "c"), (0.5,), (0.5,)))


def test_own_data_in_floating_point_is_refused() -> None:
    split = Split(np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 0, 1]))
    with pytest.raises(InputError, match="uint8"):
        load_data(Data("wrong", split, split, split, ("a", "b"), (0.5,), (0.5,)))


def test_normalised_images_follow_the_documented_formula(image_folder: Path) -> None:
    data = load_data(f"imagefolder:{image_folder}", image_size=16)
    images = data.search.inputs
    found = normalise(data, images)
    mean, std = np.array(data.mean).reshape(3, 1, 1), np.array(data.std).reshape(3, 1, 1)
    assert found.dtype == np.float32
    assert np.allclose(found, (images.astype(np.float64) / 255 - mean) / std, atol=1e-6)


def test_cifar10_from_archive_and_folder_are_the_same_and_cached(
    tiny_cifar: Path, tmp_path: Path, cache_folder: Path
) -> None:
    archive = tmp_path / "tiny.tar.xz"
    with tarfile.open(archive, "w:xz") as out:
        for path in sorted(tiny_cifar.rglob("*")):
            out.add(path, path.relative_to(tiny_cifar).as_posix(), recursive=False)
    before = {path.name for path in cache_folder.iterdir()}
    packed, unpacked = load_data(f"cifar10:{archive}"), load_data(f"cifar10:{tiny_cifar}")
    assert_same(packed, unpacked)
    assert packed.train.inputs.dtype == np.uint8
    assert packed.input_shape == (3, 32, 32)
    assert (len(packed.train), len(packed.search), len(packed.test)) == (110, 10, 120)
    made = [path for path in cache_folder.iterdir() if path.name not in before]
    assert len(made) == 2
    written = {path: path.stat().st_mtime_ns for folder in made for path in folder.glob("*.npy")}
    assert len(written) == 8
    assert_same(load_data(f"cifar10:{archive}"), packed)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_cifar10_labels_follow_the_class_folders(tiny_cifar: Path) -> None:
    data = load_data(f"cifar10:{tiny_cifar}")
    for label, name in enumerate(CIFAR_CLASSES):
        stored = {
            np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in (tiny_cifar / "test" / name).iterdir()
        }
        assert {image.tobytes() for image in data.test.inputs[data.test.labels == label]} == stored


@pytest.mark.parametrize("damage", ["cut short", "overwritten in the middle", "no archive at all"])
def test_a_damaged_archive_is_refused_and_not_cached(tiny_cifar: Path, tmp_path: Path, damage: str) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:xz") as out:
        out.add(tiny_cifar, "cifar10")
    content, half = whole.getvalue(), len(whole.getvalue()) // 2
    archive = tmp_path / "damaged.tar.xz"
    archive.write_bytes(
        {
            "cut short": content[:half],
            "overwritten in the middle": content[:half] + b"\xa5" * 500 + content[half + 500 :],
            "no archive at all": b"hello",
        }[damage]
    )
    for _ in range(2):
        with pytest.raises(InputError, match="damaged"):
            load_data(f"cifar10:{archive}")


def test_the_digits_model_comes_trained(digits_task: Task) -> None:
    assert digits_task.trained
    assert accuracy(digits_task.build(), digits_task.data, digits_task.data.test) > 0.95


def test_the_digits_weights_do_what_their_card_says(digits_task: Task) -> None:
    card = json.loads((WEIGHTS_FOLDER / "digits-cnn-digits.json").read_text())
    assert accuracy(digits_task.build(), digits_task.data, digits_task.data.test) == pytest.approx(
        card["test_accuracy"], abs=0.003
    )
    assert accuracy(digits_task.build(), digits_task.data, digits_task.data.search) == pytest.approx(
        card["search_accuracy"], abs=0.003
    )


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_CIFAR.exists(), reason=f"needs CIFAR-10 at {SHARED_CIFAR}")
@pytest.mark.skipif(
    not (WEIGHTS_FOLDER / "resnet20-cifar10.safetensors").exists(), reason="needs the shipped resnet20 weights"
)
def test_the_resnet20_weights_do_what_their_card_says() -> None:
    task = load_task("resnet20", f"cifar10:{SHARED_CIFAR}")
    card = json.loads((WEIGHTS_FOLDER / "resnet20-cifar10.json").read_text())
    assert task.trained
    assert accuracy(task.build(), task.data, task.data.test) == pytest.approx(card["test_accuracy"], abs=0.002)


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "state dict in a checkpoint"])
def test_saved_weights_come_back(kind: str, digits_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = digits_task.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    state = model.state_dict()
    if kind == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "w.pt"
        torch.save(state if kind == "state dict" else {"state_dict": state, "epoch": 3}, path)
    task = load_task("digits-cnn", digits_task.data, weights=path)
    x = torch.randn(3, 1, 8, 8)
    assert task.trained
    assert torch.equal(task.build()(x), model(x))
    assert not torch.equal(task.build()(x), digits_task.build()(x))


def test_a_task_builds_fresh_copies(digits_task: Task) -> None:
    one, other = digits_task.build(), digits_task.build()
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(other.parameters()).abs().sum() > 0
    assert not one.training


def test_random_weights_follow_the_seed(image_folder: Path) -> None:
    data = load_data(f"imagefolder:{image_folder}", image_size=8)
    first = load_task("digits-cnn", data, seed=1)
    same = load_task("digits-cnn", data, seed=1)
    other = load_task("digits-cnn", data, seed=2)
    assert not first.trained
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(first.build()(x), same.build()(x))
    assert not torch.equal(first.build()(x), other.build()(x))


def test_building_a_model_leaves_the_callers_random_numbers_alone(digits_task: Task) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digits_task.build()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("model", ["torchvision:mobilenet_v3_small", "timm:resnet18"])
def test_zoo_models_take_the_datas_classes(model: str, image_folder: Path) -> None:
    task = load_task(model, f"imagefolder:{image_folder}", image_size=64)
    assert task.data.input_shape == (3, 64, 64)
    with torch.no_grad():
        assert task.build()(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_timm_models_take_greyscale_images() -> None:
    task = load_task("timm:resnet18", "digits")
    with torch.no_grad():
        assert task.build()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not task.trained


def test_built_in_models_take_rgb_images(image_folder: Path) -> None:
    task = load_task("resnet20", f"imagefolder:{image_folder}")
    assert task.data.input_shape == (3, 32, 32)
    with torch.no_grad():
        assert task.build()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_image_folders_come_in_the_size_that_the_model_was_made_for(image_folder: Path) -> None:
    task = load_task("timm:test_vit", f"imagefolder:{image_folder}")
    assert task.data.input_shape == (3, 160, 160)
