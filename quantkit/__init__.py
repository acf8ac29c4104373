"""quantkit: make a trained language model small, without retraining.

>>> import quantkit
>>> quantkit.quantize("tiny", wbits=4, group_size=32, calibration="embedded", output="tiny-w4")
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.api import Quantized, evaluate, generate, make_recipe, plan, quantize

__all__ = ["Quantized", "evaluate", "generate", "make_recipe", "plan", "quantize"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import the public functions on first use, so that `import quantkit` and `quantkit --help` do not wait for torch."""
    if name in __all__:
        return getattr(import_module("quantkit.api"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")


class _Package(ModuleType):
    """This package, in which a public function keeps its name: `quantize`, `plan` and `evaluate` are also submodules."""

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Ignore that the import system puts a submodule in the place of a function."""
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
