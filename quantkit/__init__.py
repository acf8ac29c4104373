"""quantkit: make a trained language model small, without retraining.

>>> import quantkit
>>> quantkit.quantize("tiny", wbits=4, group_size=32, calibration="embedded", output="tiny-w4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.api import (
        CheckResult,
        Comparison,
        Exported,
        Pruned,
        Quantized,
        check,
        compare,
        evaluate,
        evaluate_tasks,
        export,
        generate,
        load,
        make_recipe,
        plan,
        prune,
        quantize,
    )
    from quantkit.campaign import faults
    from quantkit.merging import Merged, merge
    from quantkit.modules import apply_masks, prune_module
    from quantkit.personalization import Personalized, personalize, replay
    from quantkit.protection import Protected, protect, protect_scales
    from quantkit.resilience.choice import Resilience
    from quantkit.resilience.modules import bound_module
    from quantkit.train.masked import Masks

# none of these may be the name of a submodule too, which would take its place when it is imported
__all__ = [
    "CheckResult",
    "Comparison",
    "Exported",
    "Masks",
    "Merged",
    "Personalized",
    "Protected",
    "Pruned",
    "Quantized",
    "Resilience",
    "apply_masks",
    "bound_module",
    "check",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export",
    "faults",
    "generate",
    "load",
    "make_recipe",
    "merge",
    "personalize",
    "plan",
    "protect",
    "protect_scales",
    "prune",
    "prune_module",
    "quantize",
    "replay",
]
_ELSEWHERE = {
    "Masks": "quantkit.train.masked",
    "Merged": "quantkit.merging",
    "Personalized": "quantkit.personalization",
    "Protected": "quantkit.protection",
    "Resilience": "quantkit.resilience.choice",
    "apply_masks": "quantkit.modules",
    "bound_module": "quantkit.resilience.modules",
    "faults": "quantkit.campaign",
    "merge": "quantkit.merging",
    "protect": "quantkit.protection",
    "protect_scales": "quantkit.protection",
    "personalize": "quantkit.personalization",
    "prune_module": "quantkit.modules",
    "replay": "quantkit.personalization",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import the public functions on first use, so that neither `import quantkit` nor `--help` waits for torch."""
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "quantkit.api")), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
