"""What reaches the blocks: one run of the skeleton with blocks that only look.

Every block's `forward` is replaced by one that notes its arguments and hands its input on. Nothing is
computed in the blocks, no exception stops the model, and blocks that are called with different arguments
(Gemma's sliding and full attention masks) each keep their own.
"""

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import ModelError
from quantkit.model.block import Arguments
from quantkit.model.skeleton import Skeleton

Observer = Callable[[int, Tensor, Arguments], Tensor]


@dataclass(frozen=True)
class Recording:
    """The inputs of the blocks.

    Attributes:
        hidden: per batch the hidden states before block 0, (batch, tokens, width).
        arguments: per batch, per block, the other arguments; what is equal is stored once.
    """

    hidden: MutableSequence[Tensor]
    arguments: list[list[Arguments]]


@torch.no_grad()
def record(
    skeleton: Skeleton,
    batches: Sequence[Tensor],
    device: torch.device,
    hidden: MutableSequence[Tensor] | None = None,
) -> Recording:
    """Run the skeleton, whose outer weights are loaded, on token batches (batch, tokens) int64.

    Hidden states are appended to `hidden`, which keeps them; None: to a list.

    Raises:
        ModelError: the model does more between its blocks than to hand one's output to the next.
    """
    returns_tuple = _blocks_return_tuple(skeleton, device)
    recording = Recording([] if hidden is None else hidden, [])
    known = _Known()
    for tokens in batches:
        chain = _Chain(known)
        with _observed(skeleton.blocks, chain.note, returns_tuple=returns_tuple):
            skeleton.model.base_model(input_ids=tokens.to(device), use_cache=False)
        if chain.broken or chain.hidden is None or len(chain.arguments) != len(skeleton.blocks):
            raise _not_one_at_a_time(skeleton)
        recording.hidden.append(chain.hidden)
        recording.arguments.append(chain.arguments)
    return recording


class _Chain:
    """What reaches the blocks in one run, and whether they follow each other without anything in between."""

    def __init__(self, known: "_Known") -> None:
        self.known = known
        self.hidden: Tensor | None = None
        self.arguments: list[Arguments] = []
        self.broken = False

    def note(self, index: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        if self.hidden is None:
            self.hidden = hidden.clone()
        self.broken |= index != len(self.arguments) or not torch.equal(hidden, self.hidden)
        self.arguments.append(self.known.share(arguments))
        return hidden


def make_head(skeleton: Skeleton, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the part of the model after its blocks, for as long as the outer weights are loaded.

    It takes tokens (batch, tokens) and what the last block made of them, (batch, tokens, width), and returns the logits
    (batch, tokens, vocabulary) in float32. Gradients flow.
    """
    returns_tuple = _blocks_return_tuple(skeleton, device)

    def head(tokens: Tensor, hidden: Tensor) -> Tensor:
        with _observed(skeleton.blocks, lambda *_: hidden, returns_tuple=returns_tuple):
            logits: Tensor = skeleton.model(input_ids=tokens.to(hidden.device), use_cache=False).logits
        return logits.float()

    return head


@torch.no_grad()
def finish(skeleton: Skeleton, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits (batch, tokens, vocabulary) in float32.

    `hidden`, (batch, tokens, width), is what the last block returned for `tokens`.
    """
    return make_head(skeleton, hidden.device)(tokens, hidden)


@contextmanager
def _observed(blocks: nn.ModuleList, observe: Observer, *, returns_tuple: bool) -> Iterator[None]:
    """Replace the blocks' forward by `observe` for the duration of the context."""

    def replacement(index: int) -> Callable[..., Tensor | tuple[Tensor, None]]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:  # noqa: ANN401
            output = observe(index, hidden_states, Arguments(args, kwargs))
            return (output, None) if returns_tuple else output  # None stands for the attention weights

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = replacement(index)
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own forward is underneath


def _blocks_return_tuple(skeleton: Skeleton, device: torch.device) -> bool:
    """Return whether the model wants its blocks to return a tuple (Falcon, Bloom), by trying both ways."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for returns_tuple in (False, True):
        with _observed(skeleton.blocks, lambda _, hidden, __: hidden, returns_tuple=returns_tuple):
            try:
                output = skeleton.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
                continue
        if output.ndim == 3 and output.shape[:2] == tokens.shape:
            return returns_tuple
    raise _not_one_at_a_time(skeleton)


def _not_one_at_a_time(skeleton: Skeleton) -> ModelError:
    return ModelError(
        f"{skeleton.blocks_name} of a {skeleton.config.model_type} model cannot be run one block at a time; "
        "the family is not supported"
    )


class _Known:
    """The arguments that were seen before.

    Masks and rotary tables are the same for every batch and most blocks; stored once they cost nothing.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.arguments: dict[object, Arguments] = {}

    def share(self, arguments: Arguments) -> Arguments:
        """Return arguments of the same values in which every tensor that equals an earlier one is that one."""
        args, kwargs = self._share(arguments.args), self._share(arguments.kwargs)
        return self.arguments.setdefault((_identity(args), _identity(kwargs)), Arguments(args, kwargs))

    def _share(self, value: Any) -> Any:  # noqa: ANN401  a tree of whatever the model passes
        if isinstance(value, Tensor):
            return self._known(value)
        if isinstance(value, dict):
            return {key: self._share(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self._share(item) for item in value)
        return value

    def _known(self, tensor: Tensor) -> Tensor:
        for known in self.tensors:
            same_kind = known.shape == tensor.shape and known.dtype == tensor.dtype
            if known is tensor or (same_kind and known.equal(tensor)):
                return known
        self.tensors.append(tensor)
        return tensor


def _identity(value: Any) -> object:  # noqa: ANN401  a tree of whatever the model passes
    """Return what is equal for trees of the same values; tensors and other objects are equal to themselves alone."""
    if isinstance(value, dict):
        return tuple((key, _identity(item)) for key, item in value.items())
    if isinstance(value, tuple):
        return tuple(_identity(item) for item in value)
    return (type(value), value) if isinstance(value, bool | int | float | str | None) else id(value)
