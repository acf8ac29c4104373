"""Presets: how much calibration a model is worth. Each is a list of passes, spelled out in the recipe that is saved.

With quantized activations all but `fast` learn equivalent transforms too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.errors import UsageError, nearest

DESCRIPTIONS = {
    "fast": "GPTQ: second moments of the inputs, no training",
    "balanced": "OmniQuant with learned rounding, then the scales distilled from end to end; the default",
    "best": "the same, twice as long; windows of two blocks where activations are quantized",
    "paper": "OmniQuant as its authors ran it",
}
NAMES = (*DESCRIPTIONS,)
DEFAULT = "balanced"

Passes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """The passes of a recipe, and how many sequences a batch has."""

    passes: Passes
    batch_size: int = 1


def find(name: str, scheme: QuantScheme) -> Preset:
    """Return what the preset `name` means for `scheme`.

    Raises:
        UsageError: no such preset.
    """
    if name not in NAMES:
        raise UsageError(f"unknown preset {name!r}{nearest(name, NAMES)}")
    if name == "fast":
        return Preset(passes={"gptq": {}}, batch_size=8)
    if name == "paper":
        return Preset(passes={"omniquant": {}})
    return _learned(scheme, long=name == "best")


def _learned(scheme: QuantScheme, *, long: bool) -> Preset:
    """Return rounding, clipping and scales learned in turn, measured on small models (docs/benchmarks.md).

    Where only weights are quantized, windows of two blocks lowered the last error and not the perplexity, and so did
    more than about 30 updates of the whole model; with quantized activations windows gain as much as transforms do.
    """
    activations = scheme.activation_bits != UNQUANTIZED
    block = {
        "updates": 200 if long else 100,
        "rounding": True,
        "rounding_lr": 2.0 if long else 1.0,
        "lwc_lr": 0.03,
        "let": activations,
        "aug_loss": False,
        "window": 2 if long and activations else 1,
        "init": "search",
        "schedule": "linear",
        "amp": not activations,
    }
    whole = {"updates": 32 if long else 24, "amp": not activations}
    return Preset(passes={"omniquant": block, "distill": whole}, batch_size=8)
