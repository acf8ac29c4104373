"""compressed-tensors: loads in transformers and vLLM for 2-8 bits, in SGLang for 4 and 8.

Per quantized linear N with weight (out, in) and b bits, `pack-quantized`:

    N.weight_packed      int32 (out, ceil(in b / 32))     codes + 2^(b-1), a dense bit stream along `in`
    N.weight_scale       float16 or bfloat16 (out, groups)
    N.weight_shape       int64 (2,)
    N.weight_zero_point  int32 (ceil(out b / 32), groups) zero points + 2^(b-1), packed along `out`; asymmetric only

or `int-quantized` for symmetric weights, one scale per row, whose inputs have 8 symmetric bits too, because the kernels
for that pair multiply the codes themselves:

    N.weight        int8 (out, in)
    N.weight_scale  float16 or bfloat16 (out, 1)

The configuration asks transformers to dequantize while it loads: its other path fails on asymmetric checkpoints
(llm-compressor issues 1618 and 1190), and unpacks to dense weights at the first forward anyway. vLLM does not read
that key. Dequantizing while loading takes one scheme for all linears, so a checkpoint with several schemes goes
without the key and must be symmetric; there each scheme names its linears one by one.

Quantized inputs of linears are asked for with `input_activations`, dynamic and per token. Runtimes know them with 8 or
4 bits and symmetric, and transformers only where it does not dequantize while loading. Whatever else a scheme says of
activations is for quantkit's own evaluation, which reads the whole scheme under the private key `quantkit`; `notices`
tells the difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.core.packing import pack, packed_words, unpack
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters._parts import Layout, refuse_misshapen

PACKED, INTEGER, SEVERAL = "pack-quantized", "int-quantized", "mixed-precision"
ACTIVATION_BITS = (8, 4)  # those that vLLM has kernels for beside packed weights
OWN = "quantkit"  # compressed-tensors and vLLM ignore keys that they do not know at the top level, and only there


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

    def notices(self, schemes: Mapping[str, QuantScheme], classes: Sequence[str]) -> Iterator[str]:
        """Yield what runtimes will not do of the activations' quantization, or otherwise; arguments as of `config`."""
        scheme = next(iter(schemes.values()))
        bits = scheme.activation_bits
        if bits in ACTIVATION_BITS:
            if not _runs_activations(scheme, classes):
                remedy = "; with --symmetric both will" if set(classes) == {"Linear"} else ""
                yield f"transformers will not quantize activations of this output, vLLM will{remedy}"
            if not scheme.activation_symmetric:
                yield (
                    "the format holds symmetric activations only, so runtimes will not use the zero points that were "
                    "calibrated; --symmetric-activations calibrates without them"
                )
        elif bits != UNQUANTIZED:
            yield (
                f"no runtime quantizes activations to {bits} bits (vLLM: 8 or 4), so the output asks for none "
                "and runs with quantized weights alone"
            )
        if scheme.key_value_bits != UNQUANTIZED:
            what = "keys and values" if bits == UNQUANTIZED else "queries, keys and values"
            yield f"the format cannot say that {what} are quantized, so no runtime will quantize them"
        if scheme.quantizes_activations:
            yield "`quantkit evaluate` and `generate` apply all of it to the output, as calibrated"

    def encode(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors of one linear by the end of their name."""
        bits = quantized.scheme.bits
        if format_of(quantized.scheme) == INTEGER:
            return {"weight": quantized.codes, "weight_scale": quantized.scale}
        tensors = {
            "weight_packed": pack(quantized.codes, bits),
            "weight_scale": quantized.scale,
            "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
        }
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = pack(quantized.zero_point.T.contiguous(), bits).T.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Return what `encode` was given; the inverse, for reading a checkpoint back.

        Raises:
            ModelError: the tensors do not belong together.
        """
        if "weight_packed" not in tensors:
            return _decode_integer(tensors, scheme)
        shape = tensors.get("weight_shape")
        if shape is None or shape.shape != (2,):
            raise ModelError("weight_shape of a packed linear is missing or damaged; the checkpoint is incomplete")
        out, width = (int(size) for size in shape)
        if scheme.group_size and width % scheme.group_size:
            raise ModelError(f"a packed linear that is {width} wide cannot be {scheme}; the checkpoint is damaged")
        refuse_misshapen(tensors, _packed_layout((out, width), scheme, "F16"))
        zero = None if scheme.symmetric else tensors["weight_zero_point"]
        return QuantizedTensor(
            codes=unpack(tensors["weight_packed"], scheme.bits, width),
            scale=tensors["weight_scale"],
            zero_point=None if zero is None else unpack(zero.T.contiguous(), scheme.bits, out).T.contiguous(),
            scheme=scheme,
        )

    def layout(self, shape: tuple[int, int], scheme: QuantScheme, scale: str) -> Layout:
        """Return what `encode` will give for a weight of `shape`: safetensors dtype name and shape of each tensor."""
        if format_of(scheme) == INTEGER:
            return {"weight": ("I8", shape), "weight_scale": (scale, (shape[0], 1))}
        return _packed_layout(shape, scheme, scale)

    def config(
        self, schemes: Mapping[str, QuantScheme], classes: Sequence[str], dense: Sequence[str]
    ) -> dict[str, Any]:
        """Return the `quantization_config` of config.json.

        Args:
            schemes: module name → scheme.
            classes: names of the module classes that are quantized: `Linear`, subclasses of it, `Conv1D`.
            dense: module names of the linears that stay dense.
        """
        distinct = sorted(set(schemes.values()), key=str)
        mixed = len(distinct) > 1
        formats = {format_of(scheme) for scheme in distinct}
        # of subclasses: the base
        bases = sorted({"Conv1D" if name == "Conv1D" else "Linear" for name in classes})
        groups = {
            f"group_{number}": _group(scheme, [name for name in schemes if schemes[name] == scheme] if mixed else bases)
            for number, scheme in enumerate(distinct)
        }
        return {
            "quant_method": "compressed-tensors",
            "format": SEVERAL if len(formats) > 1 else formats.pop(),
            "quantization_status": "compressed",
            **({} if mixed or _runs_activations(distinct[0], classes) else {"dequantize": True}),
            "ignore": list(dense),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "config_groups": groups,
            OWN: {"scheme": str(distinct[0])},
        }


def _packed_layout(shape: tuple[int, int], scheme: QuantScheme, scale: str) -> Layout:
    out, width = shape
    groups = scheme.groups(width)
    tensors: Layout = {
        "weight_packed": ("I32", (out, packed_words(width, scheme.bits))),
        "weight_scale": (scale, (out, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = ("I32", (packed_words(out, scheme.bits), groups))
    return tensors


def _decode_integer(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Return what `int-quantized` tensors hold; checkpoints of others have zero points and groups in it too."""
    weight = tensors.get("weight")
    if scheme.bits != 8 or weight is None or weight.ndim != 2 or weight.shape[1] % (scheme.group_size or 1):
        raise ModelError(f"a packed linear has neither weight_packed nor a weight that is {scheme} in bytes")
    scales = (weight.shape[0], scheme.groups(weight.shape[1]))
    layout: Layout = {"weight": ("I8", tuple(weight.shape)), "weight_scale": ("F16", scales)}
    refuse_misshapen(tensors, layout | ({} if scheme.symmetric else {"weight_zero_point": ("I8", scales)}))
    zero = None if scheme.symmetric else tensors["weight_zero_point"]
    return QuantizedTensor(codes=weight, scale=tensors["weight_scale"], zero_point=zero, scheme=scheme)


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
        "format": format_of(scheme),  # compressed-tensors 0.18 and later read it here, not at the top
        "weights": weights,
        "input_activations": _input_activations(scheme),
        "output_activations": None,
    }


METHOD = CompressedTensors


def format_of(scheme: QuantScheme) -> str:
    """Return how a linear of this scheme is stored: `pack-quantized` or `int-quantized`."""
    weights, inputs = (scheme.bits, scheme.symmetric), (scheme.activation_bits, scheme.activation_symmetric)
    return INTEGER if weights == inputs == (8, True) and scheme.group_size is None else PACKED


def schemes_of(config: Mapping[str, Any]) -> dict[str, QuantScheme]:
    """Return what a `quantization_config` written by `CompressedTensors.config` describes: target → scheme.

    A target is the name of a module, or that of a class where there is one scheme alone.

    What it says of weights is read where runtimes read it, the rest under quantkit's own key.

    Raises:
        KeyError, TypeError, AttributeError, UsageError: it is not such a configuration.
    """
    own = QuantScheme.parse(str(config[OWN]["scheme"])) if OWN in config else QuantScheme()
    for group in config["config_groups"].values():
        if not isinstance(group["weights"]["symmetric"], bool):
            raise TypeError(f"symmetric is {group['weights']['symmetric']!r}, neither true nor false")
    return {
        target: replace(own, bits=weights["num_bits"], group_size=weights["group_size"], symmetric=weights["symmetric"])
        for group in config["config_groups"].values()
        for weights in [group["weights"]]
        for target in group["targets"]
    }


def weights_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `quantization_config` with which transformers loads the same weights and quantizes no activations."""
    groups = {name: {**group, "input_activations": None} for name, group in config["config_groups"].items()}
    whole = {"dequantize": True} if len(groups) == 1 else {}  # several schemes are unpacked at the first forward
    return {**config, **whole, "config_groups": groups}


def _input_activations(scheme: QuantScheme) -> dict[str, Any] | None:
    if scheme.activation_bits not in ACTIVATION_BITS:
        return None
    return {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


def _runs_activations(scheme: QuantScheme, classes: Sequence[str]) -> bool:
    """Return whether transformers quantizes activations: not while it dequantizes, which it must for zero points.

    Its other path fails on any class but `Linear` itself, so GPT-2's and Falcon's own have to be dequantized too.
    """
    return scheme.activation_bits in ACTIVATION_BITS and scheme.symmetric and set(classes) == {"Linear"}
