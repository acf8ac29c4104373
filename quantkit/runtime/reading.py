"""Packed linears of a checkpoint, whoever wrote it: compressed-tensors, GPTQ and AWQ.

What is packed is told by the tensors themselves: a linear whose `weight` is stored is dense, whatever config.json says.
What the packed bits mean is told by config.json alone, and held against the shapes of the tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters import awq, gptq
from quantkit.exporters.compressed_tensors import OWN, CompressedTensors
from quantkit.model.checkpoint import Checkpoint

CT_FORMATS = ("pack-quantized", "int-quantized")
CT_ENDS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How the packed linears of one checkpoint are read.

    Attributes:
        ends: ends of the names of a packed linear's tensors.
        scheme_of: names of a linear and of its classes → its scheme, None where config.json leaves it dense.
        decode: tensors by the end of their name, and the scheme → the weight.
    """

    ends: tuple[str, ...]
    scheme_of: Callable[[str, tuple[str, ...]], QuantScheme | None]
    decode: Callable[[Mapping[str, Tensor], QuantScheme], QuantizedTensor]

    def read(
        self, checkpoint: Checkpoint, stored: str, scheme: QuantScheme, shape: tuple[int, int]
    ) -> tuple[QuantizedTensor, Tensor | None]:
        """Return the weight of the linear that is stored as `stored`, and the order of its columns if it has one.

        Args:
            checkpoint: where it is stored.
            stored: its name there.
            scheme: what config.json says of it.
            shape: the shape that the model gives its weight.

        Raises:
            ModelError: tensors that are missing, misshapen or not finite, or that belong to another scheme.
        """
        tensors = {end: f"{stored}.{end}" for end in self.ends if f"{stored}.{end}" in checkpoint}
        loaded = checkpoint.load(tensors.values())
        try:
            weight = self.decode({end: loaded[name] for end, name in tensors.items()}, scheme)
            order = gptq.column_order(loaded.get(f"{stored}.g_idx"), weight.scale.shape[1])
        except (ModelError, UsageError, KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"{stored} in {checkpoint.directory} cannot be unpacked as {scheme}: {error}") from error
        if tuple(weight.codes.shape) != shape:
            raise ModelError(
                f"{stored} in {checkpoint.directory} is packed with shape {tuple(weight.codes.shape)} but config.json "
                f"asks for {shape}; the config and the weights belong to different models"
            )
        if not bool(torch.isfinite(weight.scale).all()):
            raise ModelError(
                f"{stored} in {checkpoint.directory} has scales that are NaN or infinite; the checkpoint is damaged"
            )
        return weight, order


def reader(config: Mapping[str, Any]) -> Reader:
    """Return the reader of checkpoints with this `quantization_config`.

    Raises:
        ModelError: a format, or a scheme in it, that cannot be computed from packed codes.
    """
    method = config.get("quant_method")
    if method == "compressed-tensors":
        _refuse_unknown_parts(config)
        groups = _groups(config)
        return Reader(ends=(*CT_ENDS, "weight"), scheme_of=lambda *names: _match(groups, *names), decode=_decode_ct)
    if method == "gptq":
        form = gptq.METHOD.of(config)
        return Reader(ends=form.ends, scheme_of=lambda name, _: gptq.scheme_of(config, name), decode=form.decode)
    if method == "awq":
        awq_form = awq.METHOD.of(config)
        return Reader(ends=awq_form.ends, scheme_of=lambda name, _: awq.scheme_of(config, name), decode=awq_form.decode)
    raise ModelError(
        f"checkpoints of the method {method!r} cannot be run packed (compressed-tensors, gptq and awq can); "
        "load it with transformers, or with --runtime dense"
    )


@dataclass(frozen=True, kw_only=True)
class _Group:
    targets: tuple[str, ...]
    scheme: QuantScheme

    def means(self, linear: str, classes: tuple[str, ...]) -> bool:
        """Return whether one of the targets is this linear: its name, its class, or an expression that matches it."""
        return any(
            re.match(target[3:], linear) if target.startswith("re:") else target == linear or target in classes
            for target in self.targets
        )


def _match(groups: list[_Group], linear: str, classes: tuple[str, ...]) -> QuantScheme | None:
    """Return the scheme of a linear; targets that are names come before those that are classes."""
    for names in ((), classes):
        if found := next((group.scheme for group in groups if group.means(linear, names)), None):
            return found
    return None


def _groups(config: Mapping[str, Any]) -> list[_Group]:
    groups = config.get("config_groups", {})
    if not isinstance(groups, Mapping):
        raise ModelError(f"config_groups in config.json must be a table, not {groups!r}")
    return [_group(group, config) for group in groups.values()]


def _group(group: Mapping[str, Any], config: Mapping[str, Any]) -> _Group:
    """Return what an entry of `config_groups` says.

    Raises:
        ModelError: something that packed codes cannot be, or that is not computed here.
    """
    try:
        weights, inputs = group["weights"], group.get("input_activations")
        form = group.get("format") or config["format"]
        packed = form in CT_FORMATS and weights["type"] == "int" and weights["strategy"] in ("group", "channel")
        if not packed or weights.get("dynamic"):
            raise ModelError(
                f"the format {form!r} of {weights['num_bits']}-bit {weights['type']} weights cannot be run packed "
                f"({' and '.join(CT_FORMATS)} of integers can); load it with transformers, or with --runtime dense"
            )
        size = weights["group_size"] if weights["strategy"] == "group" else None
        scheme = QuantScheme(
            bits=weights["num_bits"], group_size=size, symmetric=weights["symmetric"], **_activations(inputs, config)
        )
        if odd := [target for target in group["targets"] if not isinstance(target, str)]:
            raise ModelError(f"the target {odd[0]!r} of config_groups in config.json is no name")
        return _Group(targets=tuple(group["targets"]), scheme=scheme)
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise ModelError(f"the config_groups in config.json describe no packed weights: {error}") from error


def _activations(inputs: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a scheme that are about activations: quantkit's own where it wrote the checkpoint."""
    if OWN in config:
        own = QuantScheme.parse(str(config[OWN]["scheme"]))
        names = ("activation_bits", "activation_symmetric", "kv_bits")
        return {name: getattr(own, name) for name in names}
    if inputs is None:
        return {}
    if inputs["type"] != "int" or inputs["strategy"] != "token" or not inputs["dynamic"]:
        raise ModelError(
            f"{inputs['strategy']} activations of the type {inputs['type']} cannot be run packed (dynamic integers per "
            "token can); load it with transformers, or with --runtime dense"
        )
    return {"activation_bits": inputs["num_bits"], "activation_symmetric": inputs["symmetric"]}


def _refuse_unknown_parts(config: Mapping[str, Any]) -> None:
    for part in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if config.get(part):
            raise ModelError(
                f"the {part} in config.json cannot be run packed; load it with transformers, or with --runtime dense"
            )


def _decode_ct(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Decode one linear of compressed-tensors after what only other writers do was looked at."""
    if "weight_g_idx" in tensors and bool((tensors["weight_g_idx"].diff() < 0).any()):
        raise ModelError("its groups are scattered (weight_g_idx), which compressed-tensors does not load any more")
    if scheme.symmetric and "weight_zero_point" in tensors:
        raise ModelError("it has zero points, and config.json says that it is symmetric")
    if "weight_packed" in tensors:
        words, (_, width) = tensors["weight_packed"].shape[1], (int(size) for size in tensors["weight_shape"])
        if words != -(-width * scheme.bits // 32) and words == -(-width // (32 // scheme.bits)):
            raise ModelError(
                f"it packs {32 // scheme.bits} codes a word, as compressed-tensors did before 0.17; "
                "quantize the model again with a newer version"
            )
        if words != -(-width * scheme.bits // 32):
            raise ModelError(f"{words} words cannot hold {width} codes of {scheme.bits} bits")
    return CompressedTensors().decode(tensors, scheme)
