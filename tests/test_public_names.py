"""`quantkit.quantize` is a function whatever was imported before, although a subpackage has the same name."""

import subprocess
import sys
from importlib import import_module

import pytest

import quantkit


@pytest.mark.parametrize("name", ["quantize", "plan", "evaluate"])
def test_a_function_wins_over_the_submodule_of_its_name(name):
    module = import_module(f"quantkit.{name}")
    assert module.__name__ == f"quantkit.{name}"
    assert getattr(quantkit, name) is getattr(import_module("quantkit.api"), name)


def test_every_public_name_is_there():
    assert all(getattr(quantkit, name).__module__.startswith("quantkit.") for name in quantkit.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'quantise'"):
        quantkit.quantise  # noqa: B018


def test_importing_quantkit_does_not_wait_for_torch():
    code = "import quantkit, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
