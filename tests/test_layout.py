"""How the package is laid out: layers import only what is below them, and every folder is packaged."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("core", "tasks", "compression", "spaces", "hardware", "evaluators", "studies", "search")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FACADE = ROOT / "src" / "autocompress"


def folder_of(package: str) -> Path:
    """The folder that holds `package`, by pyproject's mapping."""
    mapped = SETUPTOOLS["package-dir"].get(package)
    return ROOT / mapped if mapped else FACADE.joinpath(*package.split(".")[1:])


def sources() -> Iterator[tuple[str, Path]]:
    """(package, file) of every module."""
    for package in SETUPTOOLS["packages"]:
        for path in sorted(folder_of(package).glob("*.py")):
            yield package, path


def imported(package: str, path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rank(name: str) -> int:
    """Height of a module's layer; the facade is above all."""
    layer = name.split(".")[1] if "." in name else ""
    return LAYERS.index(layer) if layer in LAYERS else len(LAYERS)


def test_a_layer_imports_only_itself_and_what_is_below_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, path in sources()
        for name in imported(package, path)
        if name.split(".")[0] == "autocompress" and rank(name) > rank(package)
    ]
    assert wrong == []


def test_the_check_of_imports_sees_relative_nested_and_type_checking_ones(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from ..search.run import a\nfrom . import b\nimport autocompress.studies.study\n"
        "if TYPE_CHECKING:\n    from ..studies import c\ndef f():\n    from .. import d\n"
    )
    assert set(imported("autocompress.core", path)) == {
        "autocompress.search.run.a",
        "autocompress.core.b",
        "autocompress.studies.study",
        "autocompress.studies.c",
        "autocompress.d",
    }


def test_layers_import_each_other_relatively() -> None:
    wrong = []
    for _, path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong += [f"{path.relative_to(ROOT)}: {n}" for n in names if n.split(".")[0] in ("autocompress", *LAYERS)]
    assert wrong == []


def test_every_package_folder_is_listed_in_pyproject() -> None:
    at_root = {f"autocompress.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    inside = {
        ".".join(("autocompress", *path.parent.relative_to(FACADE).parts)) for path in FACADE.rglob("__init__.py")
    }
    nested = {path for layer in LAYERS for path in folder_of(f"autocompress.{layer}").glob("*/__init__.py")}
    assert at_root | inside == set(SETUPTOOLS["packages"])
    assert nested == set(), "a folder inside a layer needs its own entry"


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_a_listed_package_exists(package: str) -> None:
    assert (folder_of(package) / "__init__.py").is_file()


def test_no_source_file_is_over_400_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for _, path in sources()
        if len(path.read_text().splitlines()) > 400
    }
    assert long == {}
