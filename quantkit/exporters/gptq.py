"""GPTQ checkpoints, 2, 3, 4 or 8 bits: for vLLM and SGLang (symmetric 4 and 8), and GPTQModel.

Per quantized linear N with weight (out, in), groups of g input features and b bits:

    N.qweight  int32 (in b / 32, out)      codes + 2^(b-1), a dense bit stream along `in`
    N.qzeros   int32 (groups, out b / 32)  zero points + 2^(b-1), the same along `out`; in version 1 one less
    N.scales   float16 or bfloat16 (groups, out)
    N.g_idx    int32 (in,)                 the group of each input feature

`checkpoint_format` in the configuration names the version. Version 1, "gptq", is what every runtime reads, and stores
each zero point minus one, so it has no word for the smallest; "gptq_v2" stores it as it is. Symmetric weights have the
zero point 2^(b-1), which both hold. Source: AutoGPTQ and GPTQModel (`utils/model.py`, conversion of the two).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quantkit.core.packing import pack, packed_words, unpack
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters._parts import Layout, refuse_misshapen

BITS = (2, 3, 4, 8)
SERVED = (4, 8)  # bits of symmetric weights that vLLM 0.33 and SGLang 0.5.23 load
VERSIONS = {1: "gptq", 2: "gptq_v2"}


@dataclass(frozen=True, kw_only=True)
class GPTQFormat:
    """Encodes quantized tensors for GPTQ runtimes.

    Attributes:
        version: 1 or 2; None: 1 where the weights are symmetric, else 2.
    """

    requires: ClassVar[str] = "gptqmodel"
    ends: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    version: int | None = None

    def __post_init__(self) -> None:
        if self.version not in (None, *VERSIONS):
            raise UsageError(f"the version of a GPTQ checkpoint is 1 or 2, not {self.version}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return what decodes a checkpoint with this `quantization_config`.

        Raises:
            ModelError: its `checkpoint_format` is neither version.
        """
        name = config.get("checkpoint_format") or config.get("format") or VERSIONS[1]
        version = {text: number for number, text in VERSIONS.items()}.get(name)
        if version is None:
            raise ModelError(f"the checkpoint_format {name!r} is not read; those that are: gptq, gptq_v2")
        return cls(version=version)

    def check(self, schemes: Mapping[str, QuantScheme]) -> None:
        """Refuse what the format cannot hold.

        Raises:
            UsageError: bits other than 2, 3, 4 and 8, or several schemes.
        """
        scheme, *others = dict.fromkeys(schemes.values())
        if others:
            raise UsageError(f"GPTQ holds one scheme, not {scheme} and {others[0]}; use compressed-tensors for several")
        if scheme.bits not in BITS:
            raise UsageError(f"GPTQ holds 2, 3, 4 or 8 bits, not {scheme.bits}; use compressed-tensors for {scheme}")

    def notices(self, schemes: Mapping[str, QuantScheme], classes: Sequence[str]) -> Iterator[str]:  # noqa: ARG002
        """Yield what runtimes will not do with the checkpoint."""
        scheme = next(iter(schemes.values()))
        if not scheme.symmetric or scheme.bits not in SERVED:
            kind = f"{'symmetric' if scheme.symmetric else 'asymmetric'} {scheme.bits}-bit"
            yield f"vLLM and SGLang load symmetric 4- and 8-bit GPTQ only, not these {kind} weights; GPTQModel does"
        yield "transformers loads GPTQ only where the packages optimum and gptqmodel are installed"
        if scheme.quantizes_activations:
            yield "GPTQ says nothing of activations, so no runtime will quantize them"

    def encode(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors of one linear by the end of their name.

        Raises:
            UsageError: a zero point that version 1 cannot hold, or a shape that does not fill whole words.
        """
        scheme, (rows, width) = quantized.scheme, quantized.codes.shape
        _refuse_partial_words(rows, width, scheme)
        zero = quantized.zero_point
        zero = torch.zeros_like(quantized.scale, dtype=torch.int8) if zero is None else zero
        if self._version(scheme) == 1:
            if bool((zero == scheme.smallest_code).any()):
                raise UsageError(
                    "version 1 of GPTQ stores zero points minus one, and one here is the smallest; write version 2"
                )
            zero = zero - 1
        groups = quantized.scale.shape[1]
        return {
            "qweight": pack(quantized.codes, scheme.bits).T.contiguous(),
            "qzeros": pack(zero.T.contiguous(), scheme.bits),
            "scales": quantized.scale.T.contiguous(),
            "g_idx": (torch.arange(width) // (width // groups)).to(torch.int32),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Return what `encode` was given, for checkpoints of others too.

        Columns that `g_idx` scatters over the groups come in `column_order`, and so must the inputs. A symmetric scheme
        becomes an asymmetric one where zero points are stored that are not in the middle.

        Raises:
            ModelError: the tensors do not belong together, or version 1 stores a zero point that has no meaning.
        """
        rows, width = _refuse_unreadable(tensors, scheme)
        expected = self.layout((rows, width), scheme, "F16")
        refuse_misshapen(tensors, {end: form for end, form in expected.items() if end != "g_idx" or end in tensors})
        codes = unpack(tensors["qweight"].T.contiguous(), scheme.bits, width)
        order = column_order(tensors.get("g_idx"), scheme.groups(width))
        zero = unpack(tensors["qzeros"], scheme.bits, rows).T.contiguous()
        if self._version(scheme) == 1:
            if bool((zero == scheme.largest_code).any()):
                raise ModelError(
                    "a zero point of version 1 is out of range, and runtimes disagree on what it means; "
                    "quantize the model again, or convert it to gptq_v2"
                )
            zero = zero + 1
        symmetric = scheme.symmetric and not bool(zero.any())
        return QuantizedTensor(
            codes=codes if order is None else codes[:, order],
            scale=tensors["scales"].T.contiguous(),
            zero_point=None if symmetric else zero,
            scheme=replace(scheme, symmetric=symmetric),
        )

    def layout(self, shape: tuple[int, int], scheme: QuantScheme, scale: str) -> Layout:
        """Return what `encode` will give for a weight of `shape`: safetensors dtype name and shape of each tensor.

        Raises:
            UsageError: the shape does not fill whole words.
        """
        rows, width = shape
        _refuse_partial_words(rows, width, scheme)
        groups = scheme.groups(width)
        return {
            "qweight": ("I32", (packed_words(width, scheme.bits), rows)),
            "qzeros": ("I32", (groups, packed_words(rows, scheme.bits))),
            "scales": (scale, (groups, rows)),
            "g_idx": ("I32", (width,)),
        }

    def config(
        self,
        schemes: Mapping[str, QuantScheme],
        classes: Sequence[str],  # noqa: ARG002
        dense: Sequence[str],
    ) -> dict[str, Any]:
        """Return the `quantization_config` of config.json; arguments as of `CompressedTensors.config`."""
        scheme = next(iter(schemes.values()))
        inner = [name for name in dense if name != "lm_head"]  # which runtimes leave out by themselves
        return {
            "quant_method": "gptq",
            "checkpoint_format": VERSIONS[self._version(scheme)],
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in inner}} if inner else {}),
        }

    def _version(self, scheme: QuantScheme) -> int:
        return self.version or (1 if scheme.symmetric else 2)


METHOD = GPTQFormat


def scheme_of(config: Mapping[str, Any], linear: str) -> QuantScheme | None:
    """Return the scheme that a `quantization_config` gives to the linear of this name, None if it stays dense.

    `dynamic` overrides it for the first expression that matches: `-:…` leaves out, `+:…` or no sign changes.

    Raises:
        ModelError: it is no such configuration.
    """
    try:
        own = {key: config[key] for key in ("bits", "group_size")} | {"sym": config.get("sym", True)}
        for expression, changes in (config.get("dynamic") or {}).items():
            if re.match(expression.removeprefix("-:").removeprefix("+:"), linear):
                if expression.startswith("-:"):
                    return None
                own |= {key: value for key, value in changes.items() if key in own}
                break
        size = int(own["group_size"])
        return QuantScheme(bits=int(own["bits"]), group_size=size if size > 0 else None, symmetric=bool(own["sym"]))
    except (KeyError, TypeError, ValueError, AttributeError, re.error, UsageError) as error:
        raise ModelError(f"the quantization_config describes no GPTQ checkpoint that can be read: {error}") from error


def column_order(g_idx: Tensor | None, groups: int) -> Tensor | None:
    """Return the order of the input features in which groups are whole and in sequence, (in,) int64; None: theirs.

    A linear then computes W[:, order] x[order]; checkpoints that were quantized in the order of activations need it.

    Raises:
        ModelError: `g_idx`, (in,) integers or None, does not give every group the same number of features.
    """
    if g_idx is None:
        return None
    g_idx = g_idx.to(torch.int64)
    if bool((g_idx < 0).any()) or (torch.bincount(g_idx, minlength=groups) * groups != len(g_idx)).any():
        raise ModelError(f"g_idx of a packed linear does not divide {len(g_idx)} features into {groups} equal groups")
    sequential = bool((g_idx[1:] >= g_idx[:-1]).all())
    return None if sequential else torch.argsort(g_idx, stable=True)


def _refuse_partial_words(rows: int, width: int, scheme: QuantScheme) -> None:
    for count, what in ((width, "input"), (rows, "output")):
        if count * scheme.bits % 32:
            raise UsageError(
                f"GPTQ packs whole 32-bit words, which {count} {what} features of {scheme.bits} bits do not fill; "
                "use compressed-tensors, or --ignore the linears of that shape"
            )


def _refuse_unreadable(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> tuple[int, int]:
    """Return the shape (out, in) of the weight; raise ModelError for bits or a `qweight` that cannot be read."""
    if scheme.bits not in BITS:
        raise ModelError(f"GPTQ with {scheme.bits} bits is not read; those that are: 2, 3, 4, 8")
    qweight = tensors.get("qweight")
    if qweight is None or qweight.ndim != 2 or qweight.shape[0] * 32 % scheme.bits:
        raise ModelError(f"qweight of a packed linear is missing or holds no {scheme.bits}-bit codes")
    words, rows = qweight.shape
    width = words * 32 // scheme.bits
    if rows * scheme.bits % 32 or (scheme.group_size and width % scheme.group_size):
        raise ModelError(f"a packed linear of shape ({rows}, {width}) cannot be {scheme}; the checkpoint is damaged")
    return rows, width
