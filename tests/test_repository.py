"""The repository as a whole: what lies where, pinned versions, sizes, docstrings."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOP = [
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "constraints.txt"),
    *("calibration/README.md", "model_zoo/README.md", "model_zoo/tiny/model.safetensors", ".gitignore"),
    *("scripts/quickstart.sh", "scripts/test.sh", "scripts/check.sh", "scripts/build.sh", ".ci/run"),
    *("quantkit/__init__.py", "tests/conftest.py"),
]
SOURCES = sorted((ROOT / "quantkit").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [*map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])]
SHELL = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
FUNCTION_LINES, FILE_LINES = 60, 400


def relative(path):
    return str(path.relative_to(ROOT))


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split("#")[0].strip() for line in lines]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", entry) for entry in entries if entry)
    return dict(entry.split("==") for entry in entries if entry)


@pytest.mark.parametrize("name", TOP)
def test_the_tree_is_complete(name):
    assert (ROOT / name).stat().st_size


@pytest.mark.parametrize("path", SHELL, ids=relative)
def test_scripts_are_bash_that_can_be_started(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) == (path.name != "env.sh")  # that one is sourced


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_range(requirement):
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_a_package_is_pinned_once():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if "==" in line]) == len(pins())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = body_lines(node)
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


def body_lines(function):
    """Count a function's lines; its signature, which may be a page of command line flags, counts as one."""
    return function.end_lineno - function.body[0].lineno + 2


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_what_is_public_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
    assert [name for name in (tree, *public) if not ast.get_docstring(name)] == []


def test_contributing_describes_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE))
    files = {str(path.relative_to(ROOT / "quantkit")) for path in SOURCES}
    assert described == {name for name in files if not name.endswith(("__init__.py", "__main__.py"))}


def test_importing_quantkit_does_not_import_torch():
    code = "import sys, quantkit, quantkit.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
