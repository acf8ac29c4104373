"""AWQ checkpoints, 4 bits, layout `gemm`: for vLLM and SGLang, and GPTQModel.

Per quantized linear N with weight (out, in), in groups of g input features:

    N.qweight  int32 (in, out / 8)      codes + 8, eight along `out` in a word
    N.qzeros   int32 (groups, out / 8)  zero points + 8, the same
    N.scales   float16 or bfloat16 (groups, out)

The eight columns of a word lie in the order 0, 2, 4, 6, 1, 3, 5, 7 from its low bits on. The format always has zero
points; symmetric weights have the zero point 8, which is the same weight. Source: AutoAWQ (`utils/packing_utils.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int8
from torch import Tensor

from quantkit.core.packing import pack, unpack
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters._parts import Layout, refuse_misshapen

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns lies in each nibble of a word


@dataclass(frozen=True, kw_only=True)
class AWQFormat:
    """Encodes quantized tensors for AWQ runtimes."""

    requires: ClassVar[str] = "gptqmodel"
    ends: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return what decodes a checkpoint with this `quantization_config`.

        Raises:
            ModelError: its layout is not `gemm`.
        """
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise ModelError(f"the AWQ layout {version!r} is not read; the one that is: gemm")
        return cls()

    def check(self, schemes: Mapping[str, QuantScheme]) -> None:
        """Refuse what the format cannot hold.

        Raises:
            UsageError: other than 4 bits, or several schemes.
        """
        scheme, *others = dict.fromkeys(schemes.values())
        if others:
            raise UsageError(f"AWQ holds one scheme, not {scheme} and {others[0]}; use compressed-tensors for several")
        if scheme.bits != BITS:
            raise UsageError(f"AWQ holds 4 bits, not {scheme.bits}; use compressed-tensors for {scheme}")

    def notices(self, schemes: Mapping[str, QuantScheme], classes: Sequence[str]) -> Iterator[str]:  # noqa: ARG002
        """Yield what runtimes will not do with the checkpoint."""
        yield "transformers loads AWQ only where the package gptqmodel is installed, and computes in float16"
        if next(iter(schemes.values())).quantizes_activations:
            yield "AWQ says nothing of activations, so no runtime will quantize them"

    def encode(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors of one linear by the end of their name.

        Raises:
            UsageError: output features that do not fill whole words.
        """
        _refuse_partial_words(quantized.codes.shape[0])
        zero = quantized.zero_point
        zero = torch.zeros_like(quantized.scale, dtype=torch.int8) if zero is None else zero
        return {
            "qweight": pack(_interleave(quantized.codes.T), BITS),
            "qzeros": pack(_interleave(zero.T), BITS),
            "scales": quantized.scale.T.contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Return what `encode` was given.

        A symmetric scheme becomes an asymmetric one where zero points are stored that are not in the middle.

        Raises:
            ModelError: the tensors do not belong together.
        """
        qweight = tensors.get("qweight")
        if scheme.bits != BITS or qweight is None or qweight.ndim != 2:
            raise ModelError(f"qweight of a packed linear is missing or no matrix of 4-bit codes, but of {scheme}")
        rows, width = qweight.shape[1] * 8, qweight.shape[0]
        if scheme.group_size and width % scheme.group_size:
            raise ModelError(
                f"a packed linear of shape ({rows}, {width}) cannot be {scheme}; the checkpoint is damaged"
            )
        refuse_misshapen(tensors, self.layout((rows, width), scheme, "F16"))
        zero = _straighten(unpack(tensors["qzeros"], BITS, rows)).T.contiguous()
        symmetric = scheme.symmetric and not bool(zero.any())
        return QuantizedTensor(
            codes=_straighten(unpack(qweight, BITS, rows)).T.contiguous(),
            scale=tensors["scales"].T.contiguous(),
            zero_point=None if symmetric else zero,
            scheme=replace(scheme, symmetric=symmetric),
        )

    def layout(self, shape: tuple[int, int], scheme: QuantScheme, scale: str) -> Layout:
        """Return what `encode` will give for a weight of `shape`: safetensors dtype name and shape of each tensor.

        Raises:
            UsageError: output features that do not fill whole words.
        """
        rows, width = shape
        _refuse_partial_words(rows)
        groups = scheme.groups(width)
        return {
            "qweight": ("I32", (width, rows // 8)),
            "qzeros": ("I32", (groups, rows // 8)),
            "scales": (scale, (groups, rows)),
        }

    def config(
        self,
        schemes: Mapping[str, QuantScheme],
        classes: Sequence[str],  # noqa: ARG002
        dense: Sequence[str],
    ) -> dict[str, Any]:
        """Return the `quantization_config` of config.json; arguments as of `CompressedTensors.config`."""
        scheme = next(iter(schemes.values()))
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": list(dense) or None,
        }


METHOD = AWQFormat


def scheme_of(config: Mapping[str, Any], linear: str) -> QuantScheme | None:
    """Return the scheme that a `quantization_config` gives to the linear of this name, None if it stays dense.

    Raises:
        ModelError: it is no such configuration.
    """
    try:
        if any(part in linear for part in config.get("modules_to_not_convert") or ()):
            return None
        size = int(config.get("group_size", config.get("q_group_size", 128)))
        bits = int(config.get("bits", config.get("w_bit", BITS)))
        return QuantScheme(
            bits=bits, group_size=size if size > 0 else None, symmetric=not config.get("zero_point", True)
        )
    except (TypeError, ValueError, AttributeError, UsageError) as error:
        raise ModelError(f"the quantization_config describes no AWQ checkpoint that can be read: {error}") from error


def _interleave(codes: Int8[Tensor, "rows columns"]) -> Int8[Tensor, "rows columns"]:
    """Return each eight columns in the order of the nibbles."""
    return codes[:, _columns(codes.shape[1], ORDER)]


def _straighten(codes: Int8[Tensor, "rows columns"]) -> Int8[Tensor, "rows columns"]:
    """Undo `_interleave`."""
    return codes[:, _columns(codes.shape[1], [ORDER.index(column) for column in range(8)])]


def _columns(count: int, order: Sequence[int]) -> Tensor:
    """Return the columns 0 … count - 1, each eight of them in `order`."""
    return (torch.arange(0, count, 8).unsqueeze(1) + torch.tensor(order)).flatten()


def _refuse_partial_words(rows: int) -> None:
    if rows % 8:
        raise UsageError(
            f"AWQ packs eight output features into a word, and {rows} is no multiple of eight; "
            "use compressed-tensors, or --ignore the linears of that shape"
        )
