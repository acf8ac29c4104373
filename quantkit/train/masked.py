"""`Masks`: which weights of a module stay, and that the others stay zero while somebody trains it.

Nothing is added to the module: the weights themselves are zero, so its state dict has the names and shapes it had.
While an optimizer trains, two hooks keep them so. Gradients of dropped weights are zeroed as soon as they are there,
which keeps them out of a clipped norm and out of Adam's averages; and after every step dropped weights are set to zero,
which undoes what momentum from before does.
"""

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantkit.core.masks import sparsity_of
from quantkit.errors import UsageError, nearest


class Masks(Mapping[str, Tensor]):
    """The masks of some parameters of a module, by name: bool, of the parameter's shape, True where a weight stays.

        masks = quantkit.prune_module(model, sparsity=0.8)
        with masks.keep(optimizer):
            train(model, optimizer)

    `dict(masks)` can be saved, and `quantkit.apply_masks` takes it.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Set the dropped weights of `model` to zero.

        Raises:
            UsageError: there is no mask, no parameter of that name, or a mask is not bool or of another shape; then no
                weight was touched.
        """
        if not masks:
            raise UsageError("there is no mask to apply; give at least one")
        known = dict(model.named_parameters())
        for name, mask in masks.items():
            if name not in known:
                raise UsageError(f"{type(model).__name__} has no parameter {name!r}{nearest(name, known)}")
            if mask.shape != known[name].shape or mask.dtype != torch.bool:
                shape, kind = tuple(known[name].shape), str(mask.dtype).removeprefix("torch.")
                raise UsageError(
                    f"the mask of {name} must be bool and of shape {shape}, not {kind} {tuple(mask.shape)}"
                )
        self._model = model
        self._masks = {name: mask.detach().to(known[name].device, copy=True) for name, mask in masks.items()}
        self._removed = {name: known[name].detach()[~mask] for name, mask in self._masks.items()}
        self._hooks: list[RemovableHandle] = []
        self.apply()

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} weights, sparsity {self.sparsity:.4f})"

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters' weights that is zero."""
        return sparsity_of(self._masks)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the dropped weights to zero; needed by hand only where weights change without the kept optimizer."""
        for name in self:
            parameter, mask = self._pair(name)
            parameter.masked_fill_(~mask, 0)

    def keep(self, optimizer: torch.optim.Optimizer) -> Self:
        """Keep the dropped weights zero through every step of `optimizer`, until `finish` or the end of the context.

        Raises:
            UsageError: the optimizer has none of the parameters.
        """
        parameters = {id(self._pair(name)[0]): name for name in self}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not parameters.keys() & stepped:
            raise UsageError(
                "the optimizer has none of the masked parameters; make it from the parameters of this model"
            )
        self.finish()
        self._hooks = [optimizer.register_step_post_hook(lambda *_: self.apply())]
        for name in parameters.values():
            parameter = self._pair(name)[0]
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._masked_gradient(name)))
        return self

    def finish(self) -> None:
        """Stop keeping: the weights stay as they are, zeros among them, and nothing is left on model or optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def restore(self) -> None:
        """Finish, and give the dropped weights the values back that they had; the others stay as they are now."""
        self.finish()
        for name in self:
            parameter, mask = self._pair(name)
            parameter[~mask] = self._removed[name].to(parameter)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def _pair(self, name: str) -> tuple[nn.Parameter, Tensor]:
        """Return a parameter as the model has it now, and its mask on the parameter's device."""
        parameter = self._model.get_parameter(name)
        self._masks[name] = self._masks[name].to(parameter.device)
        return parameter, self._masks[name]

    def _masked_gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~self._masks[name], 0)

        return hook
