"""compressed-tensors `pack-quantized`: loads in transformers and vLLM for 2-8 bits, in SGLang for 4 and 8.

Per quantized linear N with weight (out, in) and b bits:

    N.weight_packed      int32 (out, ceil(in b / 32))     codes + 2^(b-1), a dense bit stream along `in`
    N.weight_scale       float16 or bfloat16 (out, groups)
    N.weight_shape       int64 (2,)
    N.weight_zero_point  int32 (ceil(out b / 32), groups) zero points + 2^(b-1), packed along `out`; asymmetric only

The configuration asks transformers to dequantize while it loads: its other path fails on asymmetric checkpoints
(llm-compressor issues 1618 and 1190), and unpacks to dense weights at the first forward anyway. vLLM does not read
that key. Dequantizing while loading takes one scheme for all linears, so a checkpoint with several schemes goes
without the key and must be symmetric; there each scheme names its linears one by one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.core.packing import pack, packed_words, unpack
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError

NAME = "pack-quantized"


class CompressedTensors:
    """Encodes quantized tensors for compressed-tensors 0.17 and later."""

    requires = "compressed-tensors>=0.17"

    def check(self, schemes: Mapping[str, QuantScheme]) -> None:
        """Refuse what the format, as transformers loads it, cannot hold.

        Raises:
            UsageError: several schemes, one of them with zero points (transformers 5.23 fails on them with and without
                `dequantize`).
        """
        asymmetric = next((scheme for scheme in schemes.values() if not scheme.symmetric), None)
        if asymmetric and len(set(schemes.values())) > 1:
            raise UsageError(
                f"several schemes in one checkpoint load only without zero points, but {asymmetric} has them; "
                "make every scheme symmetric, or use one for all linears"
            )

    def encode(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors of one linear by the end of their name."""
        bits = quantized.scheme.bits
        tensors = {
            "weight_packed": pack(quantized.codes, bits),
            "weight_scale": quantized.scale,
            "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
        }
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = pack(quantized.zero_point.T.contiguous(), bits).T.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Return what `encode` was given; the inverse, for reading a checkpoint back."""
        out, width = (int(size) for size in tensors["weight_shape"])
        zero = tensors.get("weight_zero_point")
        return QuantizedTensor(
            codes=unpack(tensors["weight_packed"], scheme.bits, width),
            scale=tensors["weight_scale"],
            zero_point=None if zero is None else unpack(zero.T.contiguous(), scheme.bits, out).T.contiguous(),
            scheme=scheme,
        )

    def layout(self, shape: tuple[int, int], scheme: QuantScheme, scale: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return what `encode` will give for a weight of `shape`: safetensors dtype name and shape of each tensor."""
        out, width = shape
        groups = scheme.groups(width)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (out, packed_words(width, scheme.bits))),
            "weight_scale": (scale, (out, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = ("I32", (packed_words(out, scheme.bits), groups))
        return tensors

    def config(
        self, schemes: Mapping[str, QuantScheme], classes: Sequence[str], dense: Sequence[str]
    ) -> dict[str, Any]:
        """Return the `quantization_config` of config.json.

        Args:
            schemes: module name → scheme.
            classes: names of the module classes that are quantized.
            dense: module names of the linears that stay dense.
        """
        distinct = sorted(set(schemes.values()), key=str)
        mixed = len(distinct) > 1
        groups = {
            f"group_{number}": _group(
                scheme, [name for name in schemes if schemes[name] == scheme] if mixed else list(classes)
            )
            for number, scheme in enumerate(distinct)
        }
        return {
            "quant_method": "compressed-tensors",
            "format": NAME,
            "quantization_status": "compressed",
            **({} if mixed else {"dequantize": True}),
            "ignore": list(dense),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "config_groups": groups,
        }


def _group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    """Return the entry of `config_groups` that gives `scheme` to the modules or classes `targets`."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": NAME,  # compressed-tensors 0.18 and later read it here, not at the top
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


METHOD = CompressedTensors


def schemes_of(config: Mapping[str, Any]) -> dict[str, QuantScheme]:
    """Return what a `quantization_config` written by `CompressedTensors.config` describes: target → scheme.

    A target is the name of a module, or that of a class where there is one scheme alone.

    Raises:
        KeyError, TypeError, AttributeError: it is not such a configuration.
    """
    return {
        target: QuantScheme(bits=weights["num_bits"], group_size=weights["group_size"], symmetric=weights["symmetric"])
        for group in config["config_groups"].values()
        for weights in [group["weights"]]
        for target in group["targets"]
    }
