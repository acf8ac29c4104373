"""What `import quantkit` offers."""

import pkgutil
import subprocess
import sys

import pytest

import quantkit


def test_every_public_name_is_there():
    assert all(getattr(quantkit, name).__module__.startswith("quantkit.") for name in quantkit.__all__)


def test_no_submodule_can_take_the_place_of_a_function():
    assert not {module.name for module in pkgutil.iter_modules(quantkit.__path__)} & set(quantkit.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'quantise'"):
        quantkit.quantise  # noqa: B018


def test_importing_quantkit_does_not_wait_for_torch():
    code = "import quantkit, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
