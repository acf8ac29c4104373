"""Faults of values that pass through a model: what its linears give, and the keys and values of attention.

Both are memory of 16 bits, whatever the arithmetic: a value that is hit is rounded to that dtype, changed, and goes on;
all others go on as they are. Every forward is hit anew.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.model.activations import attentions, changed_heads
from quantkit.resilience.flips import Fault, generator, pass_faults

PASSING = ("kv", "activations")  # the targets that are nowhere stored


@dataclass(frozen=True, kw_only=True)
class Passing:
    """What passes, and in which 16 bits.

    Attributes:
        model: the model.
        linears: name → linear, whose outputs are the activations.
        dtype: float16 or bfloat16.
    """

    model: nn.Module
    linears: Mapping[str, nn.Module]
    dtype: torch.dtype

    def has(self, target: str) -> bool:
        """Return whether the model has values of this target that can be reached."""
        return bool(self.linears if target == "activations" else attentions(self.model))

    @contextmanager
    def faulty(self, targets: tuple[str, ...], rate: float, fault: Fault, *key: object) -> Iterator[None]:
        """Let faults happen until the end of the context, drawn from `key`, names and the number of the call."""
        calls: Counter[str] = Counter()

        def hit(name: str, values: Tensor) -> Tensor:
            calls[name] += 1
            return pass_faults(values, rate, fault, self.dtype, generator(*key, name, calls[name]))

        with ExitStack() as stack:
            if "activations" in targets:
                for name, linear in self.linears.items():
                    stack.callback(linear.register_forward_hook(partial(_hit_output, hit, name)).remove)
            if "kv" in targets:
                names = {id(module): name for name, module in self.model.named_modules()}

                def change(asking: nn.Module, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
                    name = names[id(asking)]
                    return query, hit(f"{name}.key", keys), hit(f"{name}.value", values)

                stack.enter_context(changed_heads(attentions(self.model), change))
            yield


def _hit_output(hit: Any, name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:  # noqa: ANN401
    changed: Tensor = hit(name, output)
    return changed
