"""One token through a Llama block in two native calls.

To decode a token, a block's own code calls seven linears and some forty operations of torch, which take longer than the
products of a small model. `kernels/block.cpp` does all of it but the cache's update.

Only blocks that compute what Llama's do are fused, which is tried on the first block, and only one sequence of one
token in float32 on a CPU takes this way; everything else takes the block's own code. Bounds inside the block are
applied here too; its output's bound is a hook of the block, which runs whichever way is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_void_p, cast
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.resilience.bounds import Bound
from quantkit.resilience.places import CHILD, holds
from quantkit.runtime.kernels import native
from quantkit.runtime.kernels.compiler import Block, Weight, library
from quantkit.runtime.linear import PackedLinear

BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
TOLERANCE = 1e-3  # of the spread of a block's output, for a fused block to count as the same; an error is of order 1


def fuse(blocks: Sequence[nn.Module]) -> int:
    """Let `blocks` decode single tokens in few operations where they can; return how many do."""
    steps = {block: _Step(block) for block in blocks if _is_fusible(block)}
    if not steps or not _agrees(next(iter(steps.values()))):
        return 0
    for block, step in steps.items():
        block.forward = _choose(block, step)
    return len(steps)


def fuse_again(model: nn.Module) -> int:
    """Do for `model` what `fuse` did, after tensors of it were replaced; return how many blocks are fused."""
    blocks = [module for module in model.modules() if getattr(vars(module).get("forward"), "fused", False)]
    for block in blocks:
        block.forward = block.forward.__wrapped__  # type: ignore[attr-defined]
    return fuse(blocks)


def _choose(block: nn.Module, step: "_Step") -> Callable[..., Tensor]:
    """Return a forward that takes the short way where it is one."""
    whole: Callable[..., Tensor] = block.forward

    @wraps(whole)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        alone = hidden_states.shape[:2] == (1, 1) and not args and kwargs.get("attention_mask") is None
        if alone and step.is_valid(hidden_states):
            return step(hidden_states, kwargs["position_embeddings"], kwargs.get("past_key_values"))
        return whole(hidden_states, *args, **kwargs)

    forward.fused = True  # type: ignore[attr-defined]
    return forward


class _Step:
    """What a block computes for one token.

    The addresses that it hands to the compiled functions are those of `held`.
    """

    def __init__(self, block: Any) -> None:  # noqa: ANN401  a decoder layer of one of BLOCKS
        attention, mlp = block.self_attn, block.mlp
        self.block, self.layer, self.size = block, attention.layer_idx, attention.head_dim
        self.heads = attention.q_proj.out_features // self.size
        self.key_heads = attention.k_proj.out_features // self.size
        self.library = library(attention.q_proj.layout.scheme.bits)
        self.held: list[tuple[Mapping[Any, Any], Any, Any]] = []
        self.arrays: list[Any] = []
        before, after = block.input_layernorm, block.post_attention_layernorm
        parts = {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "o": (attention.o_proj,),
            "gate_up": (mlp.gate_proj, mlp.up_proj),
            "down": (mlp.down_proj,),
        }
        self.facts = Block(
            **{name: self._weights(linears) for name, linears in parts.items()},
            **{f"{name}_bias": self._bias(linears) for name, linears in parts.items()},
            norm_before=self._address(before._parameters, "weight"),
            norm_after=self._address(after._parameters, "weight"),
            **self._bound("o", attention.o_proj),
            **self._bound("down", mlp.down_proj),
            width=mlp.gate_proj.in_features,
            heads=self.heads,
            key_heads=self.key_heads,
            size=self.size,
            inner=mlp.gate_proj.out_features,
            epsilon=before.variance_epsilon,
            scaling=attention.scaling,
        )
        modules = list(block.modules())[1:]  # hooks of the block itself run around its forward, whichever it is
        self.hooks = [hooks for part in modules for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.own_hooks = sum(isinstance(value, partial) for *_, value in self.held)

    def is_valid(self, hidden: Tensor) -> bool:
        """Return whether this is what the block would compute: nothing moved, and nobody listens to its parts."""
        plain = hidden.dtype == torch.float32 and hidden.device.type == "cpu" and not torch.is_grad_enabled()
        quiet = sum(map(len, self.hooks)) == self.own_hooks
        return plain and quiet and all(holder.get(name) is value for holder, name, value in self.held)

    def __call__(self, hidden: Tensor, position: tuple[Tensor, Tensor], cache: Any) -> Tensor:  # noqa: ANN401
        """Return what the block makes of `hidden` (1, 1, features), with the cosines and sines of its position."""
        hidden, (cosine, sine) = hidden.contiguous(), (part.float().contiguous() for part in position)
        heads = torch.empty(1, self.heads + 2 * self.key_heads, 1, self.size)
        result, threads = torch.empty_like(hidden), torch.get_num_threads()
        facts, token = byref(self.facts), hidden.data_ptr()
        self.library.quantkit_block_inputs(facts, token, cosine.data_ptr(), sine.data_ptr(), heads.data_ptr(), threads)
        key, value = heads[:, self.heads : -self.key_heads], heads[:, -self.key_heads :]
        if cache is not None:
            key, value = (part.contiguous() for part in cache.update(key, value, self.layer))
        pointers = heads.data_ptr(), key.data_ptr(), value.data_ptr(), key.shape[2]
        self.library.quantkit_block_outputs(facts, token, *pointers, result.data_ptr(), threads)
        return result

    def _weights(self, linears: Sequence[PackedLinear]) -> int | None:
        """Return the address of the packed weights of `linears`, one behind the other."""
        for linear in linears:
            self.held += [(linear._buffers, name, linear._buffers[name]) for name in linear.packed]
        weights = (Weight * len(linears))(*(native.weight_at(linear.packed, linear.layout) for linear in linears))
        self.arrays.append(weights)
        return cast(weights, c_void_p).value

    def _bias(self, linears: Sequence[PackedLinear]) -> int | None:
        """Return the address of the biases of `linears`, None if none has one."""
        self.held += [(linear._parameters, "bias", linear.bias) for linear in linears]
        if all(linear.bias is None for linear in linears):
            return None
        zeros = [torch.zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
        joined = torch.cat(zeros).float()
        self.arrays.append(joined)
        return joined.data_ptr()

    def _bound(self, name: str, linear: PackedLinear) -> dict[str, Any]:
        """Return the bound of what reaches `linear`, whose hook this step stands in for, if it has one that is hard."""
        found = linear._modules.get(CHILD)
        hooks = linear._forward_pre_hooks
        key = next((key for key, hook in hooks.items() if isinstance(found, Bound) and holds(hook, found)), None)
        if not isinstance(found, Bound) or key is None or found.form == "smooth":
            return {}
        own = found.__dict__
        self.held += [(hooks, key, hooks[key]), (own, "active", True), (own, "form", found.form)]
        return {
            f"{name}_bound": self._address(found._buffers, "threshold"),
            f"{name}_bound_step": int(found.threshold.ndim > 0),
            f"{name}_bound_drops": int(found.form == "zero"),
        }

    def _address(self, holder: Mapping[str, Any], name: str) -> int:
        self.held.append((holder, name, holder[name]))
        return int(holder[name].data_ptr())


def _is_fusible(block: Any) -> bool:  # noqa: ANN401
    """Return whether a block has Llama's parts, its linears packed alike for the native kernel."""
    if type(block).__name__ not in BLOCKS:
        return False
    attention, mlp = block.self_attn, block.mlp
    together = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    linears = [*together[0], attention.o_proj, *together[1], mlp.down_proj]
    norms = block.input_layernorm, block.post_attention_layernorm
    return (
        all(isinstance(linear, PackedLinear) and linear.kernel is native.KERNEL for linear in linears)
        and all(linear.order is None and linear.in_features % native.CHUNK == 0 for linear in linears)
        and all(linear.layout.group_size % native.CHUNK == 0 for linear in linears)
        and len({linear.layout.scheme.bits for linear in linears}) == 1
        and all(linear.layout.groups == part[0].layout.groups for part in together for linear in part)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(getattr(norm, "weight", None) is not None and norm.weight.dtype == torch.float32 for norm in norms)
        and len({getattr(norm, "variance_epsilon", None) for norm in norms} - {None}) == 1
        and mlp.gate_proj.out_features % native.LANES == attention.head_dim % native.LANES == 0
    )


@torch.no_grad()
def _agrees(step: _Step) -> bool:
    """Return whether a block's own code gives the same for a token, so that a family that changed is left alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, step.facts.width, generator=generator)
    angle = torch.randn(1, 1, step.size // 2, generator=generator).repeat(1, 1, 2)
    position = angle.cos(), angle.sin()
    # not the call of the module, whose hooks run around either way
    expected = step.block.forward(hidden, attention_mask=None, position_embeddings=position)
    expected = expected[0] if isinstance(expected, tuple) else expected
    return bool((step(hidden, position, None) - expected).abs().max() < TOLERANCE * expected.std())
