"""quantkit: make a trained language model small, without retraining.

>>> import quantkit
>>> quantkit.quantize("tiny", wbits=4, group_size=32, calibration="embedded", output="tiny-w4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.api import Quantized, make_recipe, plan, quantize

__all__ = ["Quantized", "make_recipe", "plan", "quantize"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import the public functions on first use, so that `import quantkit` and `quantkit --help` do not wait for torch."""
    if name in __all__:
        return getattr(import_module("quantkit.api"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
