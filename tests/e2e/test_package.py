"""What is published: the archives, and a wheel that works without its checkout."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USE = """
import json, sys, torch, quantkit
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(input_ids=torch.tensor([[3, 4, 5]])).logits
print(json.dumps([quantkit.__file__, bool(logits.isfinite().all()), list(logits.shape)]))
"""
pytestmark = pytest.mark.slow


def run(*command, cwd):
    """Run a command that does not see the checkout; return what it prints."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source distribution, and the wheel that was built from it."""
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, ROOT, cwd=output)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def elsewhere(archives, tmp_path_factory):
    """An interpreter whose quantkit is the wheel; the other libraries are this environment's."""
    directory = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=directory)
    python = directory / "env" / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "--quiet", archives[1])
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=directory)
    (packages,) = (directory / "env" / "lib").glob("python*/site-packages")
    # a directory that a .pth file names comes last on the path, and its own .pth files, such as that of an
    # editable quantkit, are not read
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_code_and_facts_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    facts = {name for name in names if name.startswith("quantkit/_data/")}
    for folder in ("calibration", "model_zoo"):
        files = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {f"quantkit/_data/{path}" for path in files} <= facts
    assert "quantkit/_data/model_zoo/tiny/model.safetensors" in facts
    assert {"quantkit/cli.py", "quantkit/runtime/kernels/native.cpp", "quantkit/runtime/kernels/block.cpp"} <= names
    about = {name for name in names if ".dist-info/" in name}
    assert any(name.endswith("/licenses/LICENSE") for name in about)
    assert [
        name for name in names - facts - about if not re.fullmatch(r"quantkit/.*(\.py|\.cpp|/py\.typed)", name)
    ] == []


def test_the_source_distribution_holds_what_the_wheel_is_built_from(archives):
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert {"calibration/default.toml", "model_zoo/tiny/model.safetensors", "quantkit/cli.py"} <= names
    assert {"tests/conftest.py", "scripts/test.sh"} <= names
    assert [name for name in names if "__pycache__" in name or name.startswith((".venv", "out/"))] == []


def test_the_wheel_works_on_its_own(elsewhere, tmp_path):
    options = ("--method", "rtn", "--wbits", "4", "--group-size", "32", "-o", "tiny-w4", "--json")
    report = json.loads(run(elsewhere, "-m", "quantkit", "quantize", "tiny", *options, cwd=tmp_path))
    assert report["scheme"] == "w4a16g32"
    package, finite, shape = json.loads(run(elsewhere, "-c", USE, tmp_path / "tiny-w4", cwd=tmp_path))
    assert Path(package).is_relative_to(elsewhere.parents[1])
    assert finite
    assert shape == [1, 3, 1024]


def test_the_command_is_installed(elsewhere, tmp_path):
    assert run(elsewhere.parent / "quantkit", "--version", cwd=tmp_path).startswith("quantkit ")
