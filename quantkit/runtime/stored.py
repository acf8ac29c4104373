"""The bits that a packed model was loaded from, kept beside it: what changes in them changes in the model.

The tensors are those of the checkpoint, in compressed-tensors' own layout, so that a bit is a bit of what is stored and
padding is none of them. A kernel's own layout of the same bits is made again from what changed.

What protects scales and bounds is memory too, can be hit like the rest, and is used as at loading: scales are repaired
from their guards, and a bound is the vote of its three copies, before the model is run.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.skeleton import Skeleton, read_config
from quantkit.resilience import scale_file
from quantkit.resilience.flips import Bits, Damage, Fault, strike
from quantkit.resilience.passing import Passing
from quantkit.resilience.places import attached
from quantkit.resilience.scales import guard_bits, repair_scales
from quantkit.resilience.side_file import COPIES, vote
from quantkit.runtime import packed_model
from quantkit.runtime.linear import PackedLinear
from quantkit.runtime.products import HALVES
from quantkit.runtime.reading import reader

STORED = ("codes", "scales", "zeros", "norms", "embeddings", "dense", "bounds")
_TARGETS = {
    "weight_packed": "codes",
    "weight": "codes",
    "weight_scale": "scales",
    "weight_zero_point": "zeros",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stored tensor that can be hit.

    Attributes:
        target: what it is, one of `STORED`.
        bits: its bits.
        owner: what has to be made again when it changed.
        guards: the name of the scales that it protects, None if it protects none.
    """

    target: str
    bits: Bits
    owner: str
    guards: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of faults: bits changed in each tensor, and scales that the protection put right or replaced.

    `harmless`: after that everything is as it was.
    """

    flips: Mapping[str, int]
    corrected: int
    replaced: int
    harmless: bool


@dataclass(kw_only=True)
class _Linear:
    """A packed linear and what is stored of it, by the end of its name."""

    module: PackedLinear
    stored: str
    scheme: QuantScheme
    tensors: dict[str, Tensor]

    def places(self) -> Iterable[Tensor]:
        return self.module.packed.values()

    def install(self, repaired: Mapping[str, Tensor]) -> None:
        name = f"{self.stored}.weight_scale"
        scale = repaired.get(name, self.tensors["weight_scale"])
        weight = CompressedTensors().decode({**self.tensors, "weight_scale": scale}, self.scheme)
        for end, tensor in self.module.kernel.pack(packed_model.on(weight, self.module.packed["scale"].device)).items():
            self.module.packed[end].copy_(tensor)


@dataclass(kw_only=True)
class _Dense:
    """A tensor of the model and what is stored of it."""

    place: Tensor
    stored: Tensor

    def places(self) -> Iterable[Tensor]:
        return (self.place,)

    def install(self, _: Mapping[str, Tensor]) -> None:
        self.place.copy_(self.stored)


@dataclass(kw_only=True)
class _Bound:
    """A threshold of the model and its three copies."""

    place: Tensor
    copies: Tensor

    def places(self) -> Iterable[Tensor]:
        return (self.place,)

    def install(self, _: Mapping[str, Tensor]) -> None:
        self.place.copy_(vote(list(self.copies.view(torch.int32))).view(torch.float32).view_as(self.place))


@dataclass(kw_only=True)
class StoredModel:
    """A model, the stored bits that it was made of, and how they are protected; see `open_stored`."""

    model: Any
    passing: Passing
    parts: dict[str, Part] = field(default_factory=dict)
    protection: str | None = None
    _owners: dict[str, _Linear | _Dense | _Bound] = field(default_factory=dict)
    _guards: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _damage: dict[str, Damage] = field(default_factory=dict)
    _before: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def targets(self) -> list[str]:
        """Return the targets that there are."""
        found = {part.target for part in self.parts.values()}
        return [name for name in STORED if name in found] + [n for n in ("kv", "activations") if self.passing.has(n)]

    @torch.no_grad()
    def hit(self, numbers: Mapping[str, Tensor], fault: Fault) -> Outcome:
        """Let `fault` happen to the numbered bits of the named parts, repair, and change the model accordingly."""
        before = self._guarded_scales(numbers)
        self._damage = {name: strike(self.parts[name].bits, hit, fault) for name, hit in numbers.items()}
        flips = {name: damage.flips for name, damage in self._damage.items() if len(damage.masks)}
        repaired, corrected, replaced = {}, 0, 0
        harmful = {self.parts[name].owner for name in flips if self._scales_of(name) not in before}
        for name, clean in before.items():
            repair = repair_scales(self.parts[name].bits.tensor, self._guards[name], str(self.protection))
            repaired[name] = repair.scale
            corrected, replaced = corrected + repair.corrected, replaced + repair.replaced
            if not torch.equal(repair.scale.view(torch.int16), clean.view(torch.int16)):
                harmful.add(self.parts[name].owner)
        self._before = [(place, place.clone()) for owner in harmful for place in self._owners[owner].places()]
        for owner in harmful:
            self._owners[owner].install(repaired)
        return Outcome(flips=flips, corrected=corrected, replaced=replaced, harmless=not harmful)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back every bit that `hit` changed."""
        for name, damage in self._damage.items():
            damage.apply(self.parts[name].bits.tensor)
        for place, value in self._before:
            place.copy_(value)
        self._damage, self._before = {}, []

    def digest(self) -> str:
        """Return a SHA-256 of all that is stored and of all that the model computes from."""
        digest = hashlib.sha256()
        tensors = [part.bits.tensor for part in self.parts.values()]
        tensors += [value for _, value in sorted(self.model.state_dict().items())]
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _scales_of(self, name: str) -> str:
        """Return the scales that the part `name` protects, or itself."""
        return self.parts[name].guards or name

    def _guarded_scales(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return, before they are hit, the protected scales among those or behind those guards that will be."""
        hit = {self._scales_of(name) for name in names}
        return {name: self.parts[name].bits.tensor.clone() for name in sorted(hit & self._guards.keys())}


def open_stored(directory: Path, *, device: str | None = None) -> StoredModel:
    """Load the model in `directory` with everything that protects it, and keep what it was made of.

    Raises:
        UsageError: it is not compressed-tensors.
        ModelError: see `packed_model.load`.
    """
    config = getattr(read_config(directory), "quantization_config", None)
    if not isinstance(config, dict) or config.get("quant_method") != "compressed-tensors":
        raise UsageError(f"{directory} is not packed by compressed-tensors; give what quantkit quantize wrote")
    model = packed_model.load(directory, device=device)
    linears = {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}
    dtype = next(iter(linears.values())).packed["scale"].dtype
    if dtype not in HALVES:
        raise UsageError(f"{directory} has scales of 32 bits; faults are made in scales of 16 bits")
    stored = StoredModel(model=model, passing=Passing(model=model, linears=linears, dtype=dtype))
    skeleton, checkpoint, how = Skeleton(directory, packed=True), scale_file.guarded(directory), reader(config)
    for name, module in linears.items():
        prefix = packed_model.stored_packed(name, skeleton, checkpoint, how)
        assert prefix is not None, f"{name} was loaded packed"
        ends = {end: f"{prefix}.{end}" for end in how.ends if f"{prefix}.{end}" in checkpoint}
        loaded = checkpoint.load(ends.values())
        _add_linear(stored, prefix, module, {end: loaded[full] for end, full in ends.items()})
    for name, place in model.state_dict().items():
        source = skeleton.stored_name(name, checkpoint) if name.rpartition(".")[0] not in linears else None
        if source is not None and place.is_floating_point():
            _add_dense(stored, source, name, place, checkpoint.load([source])[source])
    _add_guards(stored, directory)
    for name, bound in attached(model).items():
        copies = bound.threshold.detach().cpu().reshape(1, -1).repeat(COPIES, 1)
        stored._owners[f"{name}.bound"] = _Bound(place=bound.threshold, copies=copies)
        stored.parts[f"{name}.bound"] = Part(target="bounds", bits=Bits(tensor=copies, width=32), owner=f"{name}.bound")
    return stored


def _add_linear(stored: StoredModel, name: str, module: PackedLinear, tensors: dict[str, Tensor]) -> None:
    scheme = module.layout.scheme
    stored._owners[name] = _Linear(module=module, stored=name, scheme=scheme, tensors=tensors)
    for end, tensor in tensors.items():
        if end not in _TARGETS:
            continue
        bits = Bits(tensor=tensor, width=8 * tensor.element_size())
        if end == "weight_packed":
            bits = Bits(tensor=tensor, width=scheme.bits, valid=module.layout.width * scheme.bits)
        elif end == "weight_zero_point" and tensor.dtype == torch.int32:
            bits = Bits(tensor=tensor, width=scheme.bits, valid=module.layout.out * scheme.bits, axis=0)
        stored.parts[f"{name}.{end}"] = Part(target=_TARGETS[end], bits=bits, owner=name)


def _add_dense(stored: StoredModel, source: str, name: str, place: Tensor, tensor: Tensor) -> None:
    if source in stored.parts:  # tied, and met under its other name
        return
    kind = type(stored.model.get_submodule(name.rpartition(".")[0])).__name__.lower()
    output = stored.model.get_output_embeddings()
    head = output is not None and output.weight.data_ptr() == place.data_ptr()
    target = "norms" if "norm" in kind else "embeddings" if "embedding" in kind or head else "dense"
    stored._owners[source] = _Dense(place=place, stored=tensor)
    bits = Bits(tensor=tensor, width=8 * tensor.element_size())
    stored.parts[source] = Part(target=target, bits=bits, owner=source)


def _add_guards(stored: StoredModel, directory: Path) -> None:
    found = scale_file.read(directory)
    if found is None:
        return
    stored.protection, stored._guards = found
    for name, guard in stored._guards.items():
        scales = stored.parts[name]
        for end, tensor in guard.items():
            bits = guard_bits(tensor, stored.protection, scales.bits.tensor.numel())
            stored.parts[f"{name}.{end}"] = Part(target="scales", bits=bits, owner=scales.owner, guards=name)
