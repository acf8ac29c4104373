"""Virtual tokens before the text, whose embeddings are trained (Lester et al., arXiv 2104.08691).

They begin as embeddings of real tokens. Unlike the other kinds they change what the model says before they are trained.
What comes back from the model has no logits for them, so nothing else knows of them; text that goes on from a cache
finds them there.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.personal.parameters._places import Place, put

Keywords = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """Virtual tokens.

    Attributes:
        tokens: how many.
        start: seed of the real tokens that they begin as.
    """

    per_example: ClassVar[bool] = True
    unmergeable: ClassVar[str] = "checkpoints have no place for virtual tokens"
    rate: ClassVar[float] = 3e-3
    tokens: int = 8
    start: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"a prompt of {self.tokens} virtual tokens changes nothing; use at least 1")

    def attach(self, model: Any) -> dict[str, nn.Parameter]:  # noqa: ANN401  a transformers model
        """See `Trainable`, but for what the model says at first."""
        embedding = model.get_input_embeddings()
        generator = torch.Generator().manual_seed(self.start)
        real = torch.randperm(len(embedding.weight), generator=generator)[: self.tokens]
        if len(real) < self.tokens:
            raise UsageError(f"a prompt of {self.tokens} virtual tokens is longer than the vocabulary; use fewer")
        place = Place(embedding(real.to(embedding.weight.device)))
        put(model, "prompt", place)
        places = "position_ids" in inspect.signature(model.forward).parameters
        before = model.register_forward_pre_hook(_putter(place, embedding, places), with_kwargs=True)
        after = model.register_forward_hook(_cutter(self.tokens), with_kwargs=True)
        place.undo += [before.remove, after.remove]
        return {"soft_prompt": place.value}


def _putter(place: Place, embedding: nn.Module, places: bool) -> Callable[..., tuple[tuple[()], Keywords]]:
    def put_before(_: nn.Module, args: tuple[Tensor, ...], given: Keywords) -> tuple[tuple[()], Keywords]:
        given = {**given, **({"input_ids": args[0]} if args else {})}
        count, cache = len(place.value), given.get("past_key_values")
        if (mask := given.get("attention_mask")) is not None:
            given["attention_mask"] = mask = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
        if cache is not None and cache.get_seq_length():  # they are in it
            for name in ("position_ids", "cache_position"):
                if given.get(name) is not None:
                    given[name] = given[name] + count
            return (), given
        text = given.pop("inputs_embeds", None)
        tokens = given.pop("input_ids", None)
        text = embedding(tokens) if text is None else text
        own = place.value.expand(len(text), *place.value.shape) if place.copies is None else place.copies
        given["inputs_embeds"] = torch.cat([own.to(text.dtype), text], dim=1)
        given.pop("cache_position", None)
        if given.pop("position_ids", None) is not None or places:
            ones = text.new_ones(len(text), count + text.shape[1], dtype=torch.int64) if mask is None else mask.long()
            given["position_ids"] = (ones.cumsum(1) - 1).clamp(min=0)
        kept = given.get("logits_to_keep", 0)
        if isinstance(kept, Tensor):
            given["logits_to_keep"] = kept + count
        given["input_ids"] = None
        return (), given

    return put_before


def _cutter(count: int) -> Callable[..., Any]:
    def cut(_: nn.Module, __: object, given: Keywords, output: Any) -> Any:  # noqa: ANN401
        put_there = given.get("inputs_embeds")
        if put_there is not None and output.logits.shape[1] == put_there.shape[1]:  # nobody asked for some alone
            output.logits = output.logits[:, count:]
        return output

    return cut


METHOD = SoftPrompt
