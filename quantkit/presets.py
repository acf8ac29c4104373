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
    "best": "the same for longer, over windows of two blocks",
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
    """Return rounding, clipping and scales learned in turn, measured on small models (docs/benchmarks.md)."""
    activations = scheme.activation_bits != UNQUANTIZED
    block = {
        "updates": 400 if long else 200,
        "rounding": True,
        "rounding_lr": 0.0025 if long else 0.005,
        "lwc_lr": 0.1,
        "let": activations,
        "aug_loss": False,
        "window": 2 if long else 1,
        "schedule": "linear",
        "amp": not activations,
    }
    whole = {"updates": 160 if long else 64, "lr": 3e-3, "norms_lr": 3e-3, "amp": not activations}
    return Preset(passes={"omniquant": block, "distill": whole}, batch_size=8)
