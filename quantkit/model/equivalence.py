"""Equivalent transforms of a decoder block: scales and shifts that move between what makes a tensor and what reads it.

OmniQuant's learnable equivalent transformation (Shao et al., arXiv 2308.13137, section 3.3, eq. 3 to 5). A linear's
input x can be divided by a scale s, after a shift d was taken off, if the linear makes up for both:

    W x + b  =  (W diag(s)) ((x - d) / s)  +  (b + W d)

and whatever makes x then makes (x - d) / s. Four places of a block allow that exactly:

    norm        a norm's weight and bias           → the columns of all linears that read it
    value       the rows of v_proj                 → the columns of o_proj; attention's weights sum to one, so d passes
    query-key   the rows of q_proj, divided        → the rows of k_proj, multiplied; their products stay
    up          the rows of up_proj                → the columns of down_proj; without d, because a gate stands between

Past the paper's code: rotary positions mix pairs of channels, so each pair shares one scale of `query-key`; and where
several query heads read one key-value head, the scales are those of the key-value head. Both make the transform exact.

The functions here are pure and differentiable in scale and shift; `fold` writes into a block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.model.architecture import Architecture, Attention, HasTextConfig
from quantkit.model.block import Block
from quantkit.model.skeleton import LINEARS

Kind = Literal["norm", "value", "query-key", "up"]
_ORDER: tuple[Kind, ...] = ("norm", "value", "query-key", "up")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A place of a block where a scale, and perhaps a shift, can move from one module into others.

    Attributes:
        name: unique in the block: the groups that it scales, or "query-key".
        kind: which of the four places.
        source: local name of the module whose output channels are divided: a norm, v_proj, q_proj or up_proj.
        targets: local names of the linears that make up for it.
        size: number of free scales, and of free shifts.
        shift: whether source and targets have the biases that absorb a shift.
        norm_offset: what a norm adds to its weight before it multiplies by it.
        transposed: whether the linears hold their weight as (in, out), as GPT-2's Conv1D does.
        of_source: (source channels,) int64, the free scale of every channel of the source; None: each its own, as
            wherever a shift can be absorbed.
        of_target: (target channels,) int64, the same for the channels of the targets: inputs, for query-key outputs.
    """

    name: str
    kind: Kind
    source: str
    targets: tuple[str, ...]
    size: int
    shift: bool = False
    norm_offset: float = 0.0
    transposed: bool = False
    of_source: Tensor | None = field(default=None, repr=False)
    of_target: Tensor | None = field(default=None, repr=False)


def find_pairs(
    module: nn.Module, architecture: Architecture | None, config: HasTextConfig, *, let_down: bool = False
) -> tuple[list[Pair], list[str]]:
    """Return the pairs of a block in the order in which they are applied, and why others were skipped.

    Args:
        module: a decoder block; its parameters may be on `meta`.
        architecture: facts of the family.
        config: the model's configuration; the head size and the share of it that is rotated are read.
        let_down: with the pairs of the kind "up", which the paper does not have.

    Raises:
        UsageError: the architecture file names modules that the block does not have.
    """
    if architecture is None:
        return [], ["all: no architecture file describes this family, so what absorbs a scale is not known"]
    try:
        found = [*_after_pairs(module, architecture, config), _query_key(module, architecture.attention, config)]
    except AttributeError as error:  # a module that is not there
        raise UsageError(f"the architecture file {architecture.name}.toml does not fit the model: {error}") from error
    pairs = [pair for pair in found if isinstance(pair, Pair) and (let_down or pair.kind != "up")]
    return sorted(pairs, key=lambda pair: _ORDER.index(pair.kind)), [text for text in found if isinstance(text, str)]


def pairs_of(block: Block, *, let_down: bool = False) -> tuple[list[Pair], list[str]]:
    """Return what `find_pairs` finds in a block that knows its model's configuration."""
    if block.config is None:
        return [], ["all: the block does not know its model's configuration"]
    return find_pairs(block.module, block.architecture, block.config, let_down=let_down)


def transform(
    pair: Pair, parameters: Mapping[str, Tensor], scale: Tensor, shift: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the parameters that the pair changes, as differentiable functions of scale and shift.

    Pairs are applied one after the other: `parameters` holds what the pairs before made of them.

    Args:
        pair: the place.
        parameters: local name → parameter of the block.
        scale: (size,) non-zero.
        shift: (size,), None: no shift; only where `pair.shift`.
    """
    assert shift is None or pair.shift, f"{pair.name} cannot absorb a shift"
    changed = _divide(pair, parameters, _expand(scale, pair.of_source), shift)
    by_target = _expand(scale, pair.of_target)
    for target in pair.targets:
        weight, bias = parameters[f"{target}.weight"], parameters.get(f"{target}.bias")
        if pair.kind == "query-key":
            changed[f"{target}.weight"] = weight * _along_rows(by_target, pair)
            if bias is not None:
                changed[f"{target}.bias"] = bias * by_target
            continue
        changed[f"{target}.weight"] = weight * _along_columns(by_target, pair)
        if shift is not None:
            assert bias is not None, f"{target} has no bias"
            off = _expand(shift, pair.of_target)
            changed[f"{target}.bias"] = bias + (off @ weight if pair.transposed else weight @ off)
    return changed


def transform_all(
    pairs: Sequence[Pair],
    parameters: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what all pairs together change; scales and shifts by the pairs' names, pairs without a scale stay."""
    changed: dict[str, Tensor] = {}
    for pair in pairs:
        if pair.name in scales:
            shift = (shifts or {}).get(pair.name)
            changed |= transform(pair, {**parameters, **changed}, scales[pair.name], shift)
    return changed


@torch.no_grad()
def fold(
    pairs: Sequence[Pair],
    block: Block,
    scales: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the transforms into the block, computed in float64.

    Norms and biases are rounded to the dtype in which they are stored, and the linears make up for the scale and shift
    that were really taken out, so what rounding a norm changes is not an error. The names of everything dense that
    changed are added to `block.changed`.
    """
    quantized = {f"{site.local_name}.weight" for site in block.sites}
    own = dict(block.module.named_parameters())
    for pair in pairs:
        if pair.name not in scales:
            continue
        wanted = (shifts or {}).get(pair.name)
        exact = {name: value.double() for name, value in own.items() if _belongs(name, pair)}
        scale, shift = _as_stored(pair, block, exact, scales[pair.name], wanted)
        for name, value in transform(pair, exact, scale, shift).items():
            dense = name not in quantized
            own[name].data = (_stored(value, block, name) if dense else value).to(own[name].dtype)
            block.changed |= {name} if dense else set()


def _as_stored(
    pair: Pair, block: Block, exact: Mapping[str, Tensor], wanted: Tensor, wanted_shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the scale and shift that the source's stored weight and bias will have taken out.

    A channel of a norm whose weight would become zero or infinite keeps its weight.
    """
    scale = wanted.double()
    shift = wanted_shift.double() if wanted_shift is not None else torch.zeros_like(scale) if pair.shift else None
    if pair.kind == "norm":
        before = exact[f"{pair.source}.weight"]
        after = _stored((before + pair.norm_offset) / scale - pair.norm_offset, block, f"{pair.source}.weight")
        before, after = before + pair.norm_offset, after + pair.norm_offset
        usable = after.isfinite() & (after != 0)
        scale = torch.where(before == 0, scale, torch.where(usable, before / after, 1.0))
    if shift is not None:
        bias = exact[f"{pair.source}.bias"]
        shift = bias - _stored((bias - shift) / scale, block, f"{pair.source}.bias") * scale
    return scale, shift


def _stored(value: Tensor, block: Block, name: str) -> Tensor:
    return value.to(block.dtypes.get(name, value.dtype)).to(value.dtype)


def _belongs(name: str, pair: Pair) -> bool:
    return name.rpartition(".")[0] in (pair.source, *pair.targets)


def _divide(pair: Pair, parameters: Mapping[str, Tensor], scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """Return weight and bias of the source, its output channels divided by `scale` after `shift` was taken off."""
    weight, bias = parameters[f"{pair.source}.weight"], parameters.get(f"{pair.source}.bias")
    if pair.kind == "norm":
        changed = {f"{pair.source}.weight": (weight + pair.norm_offset) / scale - pair.norm_offset}
    else:
        changed = {f"{pair.source}.weight": weight / _along_rows(scale, pair)}
    if bias is not None:
        changed[f"{pair.source}.bias"] = (bias if shift is None else bias - shift) / scale
    return changed


def _expand(free: Tensor, index: Tensor | None) -> Tensor:
    return free if index is None else free[index]


def _along_rows(scale: Tensor, pair: Pair) -> Tensor:
    return scale if pair.transposed else scale[:, None]


def _along_columns(scale: Tensor, pair: Pair) -> Tensor:
    return scale[:, None] if pair.transposed else scale


def _after_pairs(module: nn.Module, architecture: Architecture, config: HasTextConfig) -> Iterator[Pair | str]:
    """Yield the pair of every module that groups are `after`, or why there is none."""
    readers: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for group in architecture.groups:
        if group.after is None:
            yield f"{group.name}: nothing before {', '.join(group.linears)} can absorb a scale"
        else:
            readers.setdefault(group.after, []).extend(group.linears)
            names.setdefault(group.after, []).append(group.name)
    for source, targets in readers.items():
        made = module.get_submodule(source)
        if getattr(made, "weight", None) is None:
            yield f"{'+'.join(names[source])}: {source} has no weight that could absorb a scale"
            continue
        linears = [module.get_submodule(name) for name in targets]
        value = architecture.attention is not None and source == architecture.attention.value
        kind: Kind = "value" if value else "up" if isinstance(made, LINEARS) else "norm"
        transposed = not isinstance(linears[0], nn.Linear)
        size, width = _outputs(made), _inputs(linears[0])
        yield Pair(
            name="+".join(names[source]),
            kind=kind,
            source=source,
            targets=tuple(targets),
            size=size,
            shift=kind != "up" and all(getattr(m, "bias", None) is not None for m in (made, *linears)),
            norm_offset=architecture.norm_offset if kind == "norm" else 0.0,
            transposed=transposed,
            of_target=None
            if size == width
            else _repeat_heads(torch.arange(size), width, _head_dim(config)).to(_device(made)),
        )


def _query_key(module: nn.Module, attention: Attention | None, config: HasTextConfig) -> Pair | str:
    """Return the pair of queries and keys, or why there is none."""
    if attention is None:
        return "query-key: no linears are known to make queries or keys alone, with only linear steps after them"
    owner = attention.query.rpartition(".")[0]
    norms = [n for n, m in module.get_submodule(owner).named_children() if _is_norm(m)]
    if norms:
        return f"query-key: {' and '.join(norms)} in {owner} would undo a scale of queries and keys"
    query, key = module.get_submodule(attention.query), module.get_submodule(attention.key)
    head_dim, heads = _head_dim(config), _outputs(key) // _head_dim(config)
    tied = _tied_channels(attention.rotary, head_dim, _rotated(config, head_dim))
    free = int(tied.max()) + 1
    of_key = (tied + free * torch.arange(heads)[:, None]).flatten()
    return Pair(
        name="query-key",
        kind="query-key",
        source=attention.query,
        targets=(attention.key,),
        size=free * heads,
        transposed=not isinstance(query, nn.Linear),
        of_source=_repeat_heads(of_key, _outputs(query), head_dim).to(_device(query)),
        of_target=of_key.to(_device(key)),
    )


def _tied_channels(rotary: str, head_dim: int, rotated: int) -> Tensor:
    """Return (head_dim,) int64: the free scale of each channel of a head; channels that are rotated together share it.

    Only the first `rotated` channels take part (`partial_rotary_factor`).
    """
    if rotary == "none":
        return torch.arange(head_dim)
    pairs, channels = rotated // 2, torch.arange(rotated)
    turned = channels % pairs if rotary == "half" else channels // 2
    return torch.cat([turned, torch.arange(pairs, pairs + head_dim - rotated)])


def _repeat_heads(index: Tensor, width: int, head_dim: int) -> Tensor:
    """Return `index`, by channels of key-value heads, by the `width` channels of the query heads that read them."""
    return index.view(-1, head_dim).repeat_interleave(width // len(index), dim=0).flatten()


def _head_dim(config: HasTextConfig) -> int:
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _rotated(config: HasTextConfig, head_dim: int) -> int:
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def _is_norm(module: nn.Module) -> bool:
    return not isinstance(module, LINEARS) and any(True for _ in module.parameters())


def _device(module: nn.Module) -> torch.device:
    """Return where the weight is, the CPU for one on `meta`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return torch.device("cpu") if weight.is_meta else weight.device


def _outputs(module: nn.Module) -> int:
    """Return the number of output channels of a norm or linear."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0] if weight.ndim == 1 or isinstance(module, nn.Linear) else weight.shape[1]


def _inputs(linear: nn.Module) -> int:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1 if isinstance(linear, nn.Linear) else 0]
