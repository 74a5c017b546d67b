"""Whatever a user gets wrong is answered by one clear line and exit code 2, and leaves no trials behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

QUICK = ("--executor", "inline", "--trials", "2")
UNTIMED = ("--target", "arm/pixel3")  # predicts its figures


@dataclass
class Cli:
    """The command line in this process, with `tmp_path` as the working folder."""

    folder: Path
    call: Callable[..., tuple[int, str]]

    def refuses(self, *arguments: object) -> str:
        """Run a command that must end in code 2 with one line on standard error; return that line."""
        code, err = self.call(*arguments)
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, err
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in err
        return lines[0]

    def refuses_search(self, *arguments: object) -> str:
        """Like `refuses`, for a search; it must record no trial."""
        line = self.refuses("search", *QUICK, "--out", "run", *arguments)
        assert not (self.folder / "run" / "study.db").exists() or trials_in(self.folder / "run") == 0
        return line

    def module(self, name: str, text: str) -> None:
        """Write a module of the user's into the working folder."""
        (self.folder / f"{name}.py").write_text(text)


def trials_in(folder: Path) -> int:
    """How many trials a run folder holds."""
    import optuna

    return len(optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}").trials)


@pytest.fixture
def cli(tmp_path: Path, call_cli: Callable[..., tuple[int, str, str]]) -> Cli:
    def call(*arguments: object) -> tuple[int, str]:
        code, _, err = call_cli(*arguments)
        return code, err

    return Cli(tmp_path, call)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--model", "digits-cn"], ["model 'digits-cn'", "Did you mean 'digits-cnn'?"], id="model"),
        pytest.param(["--model", "timm:resnet81"], ["timm model 'resnet81'", "Did you mean 'resnet"], id="timm model"),
        pytest.param(
            ["--model", "torchvision:mobilenet_v3_smal"],
            ["torchvision model 'mobilenet_v3_smal'", "Did you mean 'mobilenet_v3_small'?"],
            id="torchvision model",
        ),
        pytest.param(["--model", "timm:"], ["expected timm:NAME"], id="timm without a name"),
        pytest.param(["--data", "digit"], ["data 'digit'", "Did you mean 'digits'?"], id="data"),
        pytest.param(["--data", "imagefolder"], ["imagefolder:PATH"], id="imagefolder without a path"),
        pytest.param(["--data", "imagefolder:nowhere"], ["no such folder", "nowhere"], id="missing imagefolder"),
        pytest.param(["--data", "cifar10:nowhere"], ["cifar10", "nowhere"], id="missing cifar10"),
        pytest.param(["--weights", "nowhere.pt"], ["no such file", "nowhere.pt"], id="missing weights"),
        pytest.param(["--target", "x86/openvin"], ["'x86/openvin'", "Did you mean 'x86/openvino'?"], id="target"),
        pytest.param(["--threads", "999"], ["threads: 999", "cores"], id="more threads than cores"),
        pytest.param(["--threads", "-1"], ["threads", "-1"], id="negative threads"),
        pytest.param(["--objectives", "accuracy", "laten"], ["'laten'", "Did you mean 'latency'?"], id="objective"),
        pytest.param(["--objectives", "size", "size"], ["size", "more than once"], id="repeated objective"),
        pytest.param(["--sampler", "nsga4"], ["sampler 'nsga4'", "nsga2"], id="sampler"),
        pytest.param(["--executor", "dask"], ["executor", "'ray'", "'inline'", "dask"], id="executor"),
        pytest.param(["--space", "prun"], ["space 'prun'", "Did you mean 'prune'?"], id="space"),
        pytest.param(["--granularity", "channel"], ["granularity", "'stage'", "'layer'", "channel"], id="granularity"),
        pytest.param(["--bits", "9"], ["bits", "9"], id="bits"),
        pytest.param(["--bits", "8", "9"], ["bits", "9"], id="bits among good ones"),
        pytest.param(["--bits", "8", "int4"], ["bits", "1.58", "int4"], id="a format by another name"),
        pytest.param(["--bits", *"876543210"], ["bits", "not 0"], id="no bits among many"),
        pytest.param(["--time", "soon"], ["time", "90s, 30m or 2h", "soon"], id="duration"),
        pytest.param(["--trial-timeout", "0"], ["trial_timeout", "greater than 0"], id="no time at all"),
        pytest.param(["--trials", "0"], ["trials", "greater than or equal to 1"], id="no trials"),
        pytest.param(["--workers", "0"], ["workers", "greater than or equal to 1"], id="no workers"),
        pytest.param(["--storage", "nonsense"], ["can't open the study", "nonsense"], id="storage"),
        pytest.param(["--constraints", "size<200kB"], ["'size<200kB'", "NAME<=VALUE"], id="constraint syntax"),
        pytest.param(["--constraints", "speed>=2"], ["objective 'speed'"], id="constraint on an unknown figure"),
        pytest.param(["--constraints", "latency<=5kB"], ["unit", "'kB'", "ms"], id="constraint unit"),
        pytest.param(["--constraints", "size<=0kB"], ["'size<=0kB' is impossible"], id="size of zero"),
        pytest.param(["--constraints", "latency<=0%"], ["'latency<=0%' is impossible"], id="latency of zero percent"),
        pytest.param(["--constraints", "accuracy>=95"], ["is impossible", "accuracy>=0.95"], id="accuracy above one"),
        pytest.param(["--config", "nowhere.yaml"], ["config", "no such file", "nowhere.yaml"], id="missing config"),
        pytest.param(["--config", "a.yaml", "--resume", "b"], ["exclude each other"], id="config and resume"),
        pytest.param(["--space", "nowhere_9:space"], ["no module named 'nowhere_9'"], id="space's module"),
    ],
)
def test_a_wrong_flag_is_one_clear_line_and_exit_code_2(cli: Cli, arguments: list[str], words: list[str]) -> None:
    line = cli.refuses_search(*arguments)
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    "constraints",
    [
        pytest.param(["accuracy>=+20pt"], id="more accuracy than there can be"),
        pytest.param(["size<=10kB", "size>=20kB"], id="contradicting sizes"),
        pytest.param(["latency<=50%", "latency>=80%"], id="contradicting latencies"),
    ],
)
def test_constraints_that_no_model_can_keep_are_refused(cli: Cli, constraints: list[str]) -> None:
    line = cli.refuses_search(*UNTIMED, "--constraints", *constraints)
    assert "impossible" in line or "contradict" in line
    assert all(text in line for text in constraints)


def test_a_refused_search_leaves_its_folder_free_for_the_right_one(cli: Cli) -> None:
    cli.refuses_search(*UNTIMED, "--constraints", "accuracy>=+20pt")
    assert "holds a run already" not in cli.refuses_search(*UNTIMED, "--constraints", "accuracy>=+30pt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("trails: 3\n", ["unknown key 'trails'", "Did you mean 'trials'?", "c.yaml"], id="unknown key"),
        pytest.param("3: trials\n", ["unknown key '3'", "c.yaml"], id="key that is no name"),
        pytest.param("trials: [3\n", ["not valid YAML", "c.yaml"], id="broken YAML"),
        pytest.param("trials: many\n", ["trials", "valid integer", "many", "c.yaml"], id="wrong type"),
        pytest.param("objectives: size\n", ["objectives", "valid list", "size"], id="text where a list is wanted"),
        pytest.param("- trials\n", ["expected keys and values", "list"], id="a list"),
        pytest.param("time: tomorrow\n", ["time", "30m", "tomorrow"], id="wrong duration"),
    ],
)
def test_a_wrong_config_file_is_one_clear_line_and_exit_code_2(cli: Cli, text: str, words: list[str]) -> None:
    (cli.folder / "c.yaml").write_text(text)
    line = cli.refuses_search("--config", "c.yaml")
    assert [word for word in words if word not in line] == [], line
    assert not (cli.folder / "run").exists()


def test_click_refuses_a_missing_value_with_exit_code_2(cli: Cli) -> None:
    for arguments in (["search", "--trials"], ["search", "--bits"], ["search", "--nonsense"], ["nonsense"]):
        code, err = cli.call(*arguments)
        assert code == 2
        assert "Traceback" not in err


def test_weights_that_do_not_fit_are_refused(cli: Cli) -> None:
    save_file({"conv1.weight": torch.zeros(3, 3)}, cli.folder / "other.safetensors")
    line = cli.refuses_search("--weights", "other.safetensors")
    assert "other.safetensors do not fit model 'digits-cnn'" in line


@pytest.mark.parametrize("name", ["noise.safetensors", "noise.pt"])
def test_a_file_that_holds_no_weights_is_refused(cli: Cli, name: str) -> None:
    (cli.folder / name).write_bytes(b"no weights in here" * 9)
    assert f"{name}: not a safetensors file or a plain state dict" in cli.refuses_search("--weights", name)


class Intruder:
    """Creates a file when it is unpickled without care."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("intruder_was_here", "w")


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(cli: Cli) -> None:
    torch.save({"conv1.weight": Intruder()}, cli.folder / "evil.pt")
    assert "evil.pt: not a safetensors file or a plain state dict" in cli.refuses_search("--weights", "evil.pt")
    assert not (cli.folder / "intruder_was_here").exists()


def test_weights_that_are_not_finite_are_refused(cli: Cli) -> None:
    from autocompress import load_task

    state = load_task("digits-cnn", "digits").build().state_dict()
    torch.save({**state, "fc.bias": torch.full((10,), float("nan"))}, cli.folder / "nan.pt")
    assert "not finite" in cli.refuses_search("--weights", "nan.pt")


def test_an_image_folder_with_one_class_is_refused(cli: Cli, image_folder: Path) -> None:
    shutil.copytree(image_folder / "red", cli.folder / "images" / "red")
    line = cli.refuses_search("--data", "imagefolder:images")
    assert "at least two" in line


def test_an_unreadable_image_is_refused_by_its_name(cli: Cli, image_folder: Path) -> None:
    shutil.copytree(image_folder, cli.folder / "images")
    (cli.folder / "images" / "red" / "07.png").write_bytes(b"garbage" * 20)
    line = cli.refuses_search("--data", "imagefolder:images")
    assert "unreadable image" in line
    assert "red/07.png" in line


def test_a_half_written_image_is_refused_by_its_name(cli: Cli, image_folder: Path) -> None:
    shutil.copytree(image_folder, cli.folder / "images")
    path = cli.folder / "images" / "blue" / "03.png"
    path.write_bytes(path.read_bytes()[:900])
    assert "blue/03.png" in cli.refuses_search("--data", "imagefolder:images")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param("    raise KeyError('width')\n", ["KeyError", "width"], id="raises"),
        pytest.param("    return [Quantize(8)]\n", ["must return a plan", "list"], id="returns a list"),
        pytest.param("    return None\n", ["must return a plan", "NoneType"], id="returns nothing"),
        pytest.param("    return (Quantize(8), Prune(0.5))\n", ["out of order", "Prune, Quantize"], id="wrong order"),
        pytest.param("    return ('int8',)\n", ["operators", "str"], id="returns a name"),
        pytest.param("    return (Quantize(9),)\n", ["bits must be one of", "9"], id="makes an impossible operator"),
    ],
)
def test_a_space_that_does_not_work_is_refused(
    cli: Cli, body: str, words: list[str], request: pytest.FixtureRequest
) -> None:
    name = "space_" + request.node.callspec.id.split("-")[-1].replace(" ", "_")
    cli.module(name, f"from autocompress import Prune, Quantize\ndef space(trial):\n{body}")
    line = cli.refuses_search("--space", f"{name}:space")
    assert [word for word in words if word not in line] == [], line
    assert not (cli.folder / "run").exists()


def test_a_module_of_the_users_that_fails_on_import_is_refused(cli: Cli) -> None:
    cli.module("broken_module", "def space(trial:\n")
    assert "importing it failed: SyntaxError" in cli.refuses_search("--space", "broken_module:space")
    cli.module("empty_module", "space = 3\n")
    assert "'space' is not callable" in cli.refuses_search("--space", "empty_module:space")
    assert "has no 'room'" in cli.refuses_search("--space", "empty_module:room")


def test_a_data_callable_that_returns_something_else_is_refused(cli: Cli) -> None:
    cli.module("listed_data", "def load():\n    return [1, 2, 3]\n")
    assert "must return an autocompress.Data, not list" in cli.refuses_search("--data", "listed_data:load")


def test_a_data_callable_that_raises_is_refused(cli: Cli) -> None:
    cli.module("raising_data", "def load():\n    raise OSError('disk is gone')\n")
    assert "disk is gone" in cli.refuses_search("--data", "raising_data:load")


def test_a_model_callable_with_another_number_of_classes_is_refused(cli: Cli) -> None:
    cli.module(
        "seven_classes", "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )
    line = cli.refuses_search("--model", "seven_classes:make")
    assert "(N, 10)" in line
    assert "(2, 7)" in line


def test_a_model_callable_that_returns_no_module_is_refused(cli: Cli) -> None:
    cli.module("no_model", "def make():\n    return {'fc.weight': 0}\n")
    assert "must return a torch.nn.Module, not dict" in cli.refuses_search("--model", "no_model:make")


def test_a_model_callable_that_raises_is_refused(cli: Cli) -> None:
    cli.module("raising_model", "def make():\n    raise FileNotFoundError('checkpoint.pt')\n")
    assert "checkpoint.pt" in cli.refuses_search("--model", "raising_model:make")


def test_a_model_that_can_not_take_the_images_is_refused(cli: Cli) -> None:
    assert "can't take inputs of 1x8x8" in cli.refuses_search("--model", "torchvision:mobilenet_v3_small")


def test_resume_needs_the_folder_of_a_run(cli: Cli) -> None:
    (cli.folder / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        line = cli.refuses("search", "--resume", folder)
        assert folder in line
        assert "no config.yaml" in line


def test_a_resumed_run_keeps_its_objectives(cli: Cli, small_run: Path) -> None:
    line = cli.refuses("search", "--resume", small_run, "--objectives", "size")
    assert "objectives can't change" in line


def test_out_must_not_hold_a_run_already(cli: Cli, small_run: Path) -> None:
    line = cli.refuses("search", *QUICK, "--out", small_run)
    assert "holds a run already" in line
    assert f"--resume {small_run}" in line
    assert trials_in(small_run) == 7


def test_out_must_not_be_a_file(cli: Cli) -> None:
    (cli.folder / "run").write_text("not a folder")
    assert "run" in cli.refuses("search", *QUICK, "--out", "run")


@pytest.mark.parametrize("command", ["front", "export", "dashboard"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(None, "no config.yaml", id="empty folder"),
        pytest.param("objectives: [size]\nstudy: s\n", "no study.db", id="run without a trial"),
        pytest.param("title: something else\n", "no study.db", id="another program's folder"),
        pytest.param("title: [broken\n", "config.yaml", id="broken config"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(cli: Cli, command: str, config: str | None, words: str) -> None:
    (cli.folder / "here").mkdir()
    if config is not None:
        (cli.folder / "here" / "config.yaml").write_text(config)
    rest = {"front": [], "export": ["--trial", "0", "--out", "bundle"], "dashboard": ["--port", "0"]}[command]
    line = cli.refuses(command, "here", *rest)
    assert "here" in line
    assert words in line


def test_export_names_the_trials_that_it_can_export(cli: Cli, small_run: Path) -> None:
    line = cli.refuses("export", small_run, "--trial", "99", "--out", "bundle")
    assert "trial 99" in line
    assert "trials there: 0, 1, 2" in line
    assert not (cli.folder / "bundle").exists()


def test_export_does_not_overwrite(cli: Cli, small_run: Path) -> None:
    (cli.folder / "bundle").mkdir()
    (cli.folder / "bundle" / "bundle.json").write_text("{}")
    assert "holds a bundle already" in cli.refuses("export", small_run, "--trial", "0", "--out", "bundle")
    (cli.folder / "file").write_text("a file")
    assert "file" in cli.refuses("export", small_run, "--trial", "0", "--out", "file")


def test_the_dashboard_refuses_a_port_that_can_not_be_used(cli: Cli, small_run: Path) -> None:
    assert "port 70000" in cli.refuses("dashboard", small_run, "--port", "70000")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serch"], "'search'"),
        (["search", "--constraint", "size<=50%"], "--constraints"),
        (["search", "--trials", "many"], "--trials"),
        (["front"], "folder"),
    ],
)
def test_a_wrong_command_or_flag_is_one_clear_line(cli: Cli, arguments: list[str], word: str) -> None:
    assert word in cli.refuses(*arguments)
