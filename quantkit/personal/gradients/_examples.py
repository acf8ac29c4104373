"""The gradient of every single example, from one backward pass over a micro-batch.

Each example reads a copy of its own of the tensors that may change (`protocols.per_example`). The gradient of a copy of
a bias is the sum over tokens of the gradient behind its linear, so no linear keeps its input for it.
"""

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.personal.protocols import Losses, Parameters, per_example


def example_gradients(losses: Losses, parameters: Parameters) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients by name, (examples, ...), and the losses (examples,).

    Raises:
        UsageError: a parameter that not every example reads a copy of.
    """
    length = losses.batch.tokens.shape[1]
    with per_example(losses.model, losses.examples, length) as copies, torch.enable_grad():
        missing = [name for name, parameter in parameters.items() if id(parameter) not in copies]
        if missing:
            raise UsageError(f"{missing[0]} has no gradient of single examples; train biases, or without privacy")
        values = losses()
        read = [copies[id(parameter)] for parameter in parameters.values()]
        found = torch.autograd.grad(values.sum(), read, allow_unused=True)
    pairs = zip(parameters, read, found, strict=True)
    return {n: torch.zeros_like(copy) if g is None else g for n, copy, g in pairs}, values.detach()
