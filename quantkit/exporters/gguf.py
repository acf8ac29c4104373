"""GGUF: one file that llama.cpp runs, with weights of 4, 5 or 8 bits in groups of 32 or a multiple.

llama.cpp stores weights in blocks of 32 along a row. Of its types, five are affine as quantkit's schemes are; with the
step d and the offset m of a block in float16 and its unsigned codes q (`ggml-common.h`, and `quants.py` of `gguf`):

    4 bits   Q4_0 symmetric: w = d (q - 8)     Q4_1 asymmetric: w = d q + m
    5 bits   Q5_0 symmetric: w = d (q - 16)    Q5_1 asymmetric: w = d q + m
    8 bits   Q8_0 symmetric: w = d q, q signed

So codes and scales stay what they are, with d repeated where groups are larger. Two roundings remain. m, minus the
unsigned zero point times d, has up to five bits more than d and becomes the nearest float16; with d kept, nothing is
closer. It moves the weights of a group by at most 2^-11 |m|: d / 137 with 4 bits, d / 66 with 5. And float16 ends
earlier than bfloat16: a bfloat16 scale below 2^-17 becomes a multiple of 2^-24.

Everything else is stored in the dtype that it has, vectors in float32 as llama.cpp asks. Where its architecture rotates
neighbouring features, rows of q and k change places; a row is stored as a whole, so that is exact. Names of tensors and
keys are those of the `gguf` package.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, OutputError, UsageError
from quantkit.exporters._gguf_model import INSTEAD, Model, neighbouring, read_config, read_model, rope_factors
from quantkit.exporters._gguf_tokenizer import UNUSED, Tokenizer, read_tokenizer
from quantkit.exporters.compressed_tensors import CompressedTensors, schemes_of
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.workspace import clear_disk_errors
from quantkit.model.writer import refuse_full_disk

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
BLOCK = 32  # weights that share d and m
TYPES = {(4, False): "Q4_1", (4, True): "Q4_0", (5, False): "Q5_1", (5, True): "Q5_0", (8, True): "Q8_0"}
BYTES = {"Q4_1": 20, "Q4_0": 18, "Q5_1": 24, "Q5_0": 22, "Q8_0": 34}  # of a block
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ENDS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class Gguf:
    """Writes a packed checkpoint of quantkit as one file."""

    requires = "gguf>=0.19"
    whole = True  # made from a finished checkpoint, not linear by linear

    def check(self, schemes: Mapping[str, QuantScheme]) -> None:
        """Refuse what no type of llama.cpp holds.

        Raises:
            UsageError: such a scheme, with the nearest that works; or the package `gguf` is missing.
        """
        for scheme in schemes.values():
            if reason := _obstacle(scheme):
                raise UsageError(f"GGUF cannot hold {scheme} as it is: {reason}; the nearest it can is {near(scheme)}")
        if find_spec("gguf") is None:
            raise UsageError("the format gguf needs the package gguf; pip install 'quantkit[gguf]'")

    def check_model(self, source: Path) -> None:
        """Refuse a model, packed or not yet, whose computation or tokenizer cannot be described to llama.cpp.

        Raises:
            ModelError: such a model, or a directory that holds none.
        """
        read_model(read_config(source))
        read_tokenizer(source)

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse weights, module name → (out, in), whose rows the blocks cannot fill.

        Raises:
            UsageError: the first of them.
        """
        for module, (_, width) in shapes.items():
            _refuse_partial_blocks(module, width)

    def notices(self, schemes: Mapping[str, QuantScheme], classes: Sequence[str]) -> Iterator[str]:  # noqa: ARG002
        """Yield what llama.cpp will do otherwise than calibrated."""
        if any(scheme.quantizes_activations for scheme in schemes.values()):
            yield "GGUF says nothing of activations: llama.cpp quantizes inputs of linears to 8 bits in its own way"

    def export(self, source: Path, output: Path) -> None:
        """Write the packed checkpoint `source` to `output`/model.gguf, which appears whole or not at all.

        Raises:
            UsageError: see `check`; or a scale or a width that the blocks cannot hold.
            ModelError: see `check_model`; or `source` is not packed, or holds what llama.cpp has no place for.
            OutputError: the file exists or cannot be written.
        """
        target = output / FILE
        if target.exists():
            raise OutputError(f"{target} exists; remove it or choose another -o")
        writer, entries = self._describe(source)
        refuse_full_disk(target, sum(math.prod(entry.shape) for entry in entries))
        unfinished = output / f".{FILE}.partial"
        with clear_disk_errors(target):
            output.mkdir(parents=True, exist_ok=True)
            try:
                _write(writer, entries, unfinished)
                unfinished.replace(target)
            finally:
                unfinished.unlink(missing_ok=True)

    def _describe(self, source: Path) -> tuple["GGUFWriter", list["_Entry"]]:
        """Return a writer that knows everything but the tensors' bytes, and where those come from."""
        config = read_config(source)
        try:
            schemes = schemes_of(config["quantization_config"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{source} is no packed checkpoint of quantkit; quantize the model first") from error
        self.check(schemes)
        model, tokenizer = read_model(config), read_tokenizer(source)
        entries = list(_entries(Checkpoint(source), schemes, model))
        return _writer(model, tokenizer, entries, source), entries


METHOD = Gguf


def near(scheme: QuantScheme) -> QuantScheme:
    """Return the scheme nearest to `scheme` that has a type."""
    bits = max(scheme.bits, 4) if scheme.bits <= 5 else 8
    size = scheme.group_size and max(BLOCK, scheme.group_size // BLOCK * BLOCK)
    return QuantScheme(bits=bits, symmetric=scheme.symmetric or bits == 8, group_size=size)


def blocks(weight: QuantizedTensor) -> Tensor:
    """Return a weight as the bytes of llama.cpp's blocks, uint8 (out, bytes of a row), of the type in `TYPES`.

    Raises:
        UsageError: a scale is too large for float16.
    """
    bits, lowest = weight.scheme.bits, weight.scheme.smallest_code
    step = _half(weight.scale)
    halves = [step]
    if weight.zero_point is not None:
        halves.append(_half((lowest - weight.zero_point.float()) * step.float()))
    codes = weight.codes.unflatten(1, (-1, BLOCK))  # (out, blocks, 32)
    repeats = codes.shape[1] // step.shape[1]
    heads = [half.repeat_interleave(repeats, 1).unsqueeze(-1).view(torch.uint8) for half in halves]
    tail = [codes.view(torch.uint8)] if bits == 8 else _nibbles((codes - lowest).view(torch.uint8), bits)
    return torch.cat([*heads, *tail], dim=-1).flatten(1)


def _half(values: Tensor) -> Tensor:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise UsageError(f"GGUF keeps scales in float16, and {values.abs().max():.3g} is too large for it")
    return half


def _nibbles(codes: Tensor, bits: int) -> list[Tensor]:
    """Return unsigned codes of 4 or 5 bits, uint8 (out, blocks, 32), as bytes: fifth bits if any, then nibbles."""
    low, high = (codes & 15).chunk(2, dim=-1)
    nibbles = low | (high << 4)
    if bits == 4:
        return [nibbles]
    fifth = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
    return [fifth.sum(-1, dtype=torch.uint8), nibbles]


def _obstacle(scheme: QuantScheme) -> str | None:
    if (scheme.bits, scheme.symmetric) not in TYPES:
        return "llama.cpp has 4 and 5 bits, and 8 without zero points"
    if (scheme.group_size or BLOCK) % BLOCK:
        return f"its blocks of {BLOCK} weights do not fill groups of {scheme.group_size}"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A tensor of the file: its name, its GGUF type, its shape in bytes, and what gives those bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: Callable[[], Tensor]


def _entries(checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme], model: Model) -> Iterator[_Entry]:
    """Yield the tensors of the file, block after block.

    Raises:
        ModelError: llama.cpp has no place for one of them.
        UsageError: blocks do not fill a row.
    """
    from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSOR_SKIP, get_tensor_name_map

    architecture = MODEL_ARCH[model.architecture]
    places = get_tensor_name_map(architecture, model.blocks)
    heads = {MODEL_TENSOR.ATTN_Q: model.heads, MODEL_TENSOR.ATTN_K: model.kv_heads} if model.neighbours else {}
    for stored in sorted(checkpoint, key=lambda name: [part.zfill(9) for part in name.split(".")]):
        module, _, end = stored.rpartition(".")
        if end in ENDS[1:]:
            continue
        packed = end == ENDS[0] or f"{stored}_scale" in checkpoint  # `int-quantized` keeps the name of the weight
        place = places.get_type_and_name(f"{module}.weight" if packed else stored, (".weight", ".bias"))
        if place is None:
            raise ModelError(f"llama.cpp's {model.kind} has no place for {stored}; {INSTEAD}")
        kind, name = place
        if kind in MODEL_TENSOR_SKIP.get(architecture, ()):
            continue
        order = heads.get(kind)
        if packed:
            scheme = schemes[module] if module in schemes else next(iter(schemes.values()))
            yield _packed_entry(checkpoint, module, scheme, name, order)
        else:
            yield _dense_entry(checkpoint, stored, name, order)
    if model.rope["rope_type"] == "llama3":
        factors = rope_factors(model).view(torch.uint8)
        yield _Entry(name="rope_freqs.weight", kind="F32", shape=tuple(factors.shape), bytes=lambda: factors)


def _packed_entry(checkpoint: Checkpoint, module: str, scheme: QuantScheme, name: str, heads: int | None) -> _Entry:
    """Return the entry of a quantized linear whose rows change places if `heads` are given."""
    out, width = _packed_shape(checkpoint, module)
    _refuse_partial_blocks(module, width // scheme.groups(width))

    def load() -> Tensor:
        tensors = checkpoint.load(f"{module}.{end}" for end in (*ENDS, "weight") if f"{module}.{end}" in checkpoint)
        parts = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}
        return _in_order(blocks(CompressedTensors().decode(parts, scheme)), heads)

    kind = TYPES[scheme.bits, scheme.symmetric]
    return _Entry(name=name, kind=kind, shape=(out, width // BLOCK * BYTES[kind]), bytes=load)


def _refuse_partial_blocks(module: str, width: int) -> None:
    if width % BLOCK:
        raise UsageError(
            f"rows of {width} weights in {module} are no whole blocks of {BLOCK}; GGUF cannot hold it quantized, "
            "leave it dense with --ignore"
        )


def _packed_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    if whole := checkpoint.tensors.get(f"{module}.weight"):
        out, width = whole.shape
    else:
        shape = f"{module}.weight_shape"
        out, width = (int(size) for size in checkpoint.load([shape])[shape])
    return out, width


def _dense_entry(checkpoint: Checkpoint, stored: str, name: str, heads: int | None) -> _Entry:
    """Return the entry of a tensor that is not quantized: vectors in float32, matrices as they are."""
    info = checkpoint.tensors[stored]
    kind = "F32" if len(info.shape) == 1 else info.dtype
    if kind not in DTYPES:
        raise ModelError(f"{stored} is of the dtype {info.dtype}, for which GGUF files have no type here")

    def load() -> Tensor:
        rows = checkpoint.load([stored], DTYPES[kind])[stored]
        return _in_order(rows, heads).contiguous().view(torch.uint8)

    shape = (*info.shape[:-1], info.shape[-1] * DTYPES[kind].itemsize)
    return _Entry(name=name, kind=kind, shape=shape, bytes=load)


def _in_order(rows: Tensor, heads: int | None) -> Tensor:
    return rows if heads is None else rows[neighbouring(heads, len(rows))]


def _writer(model: Model, tokenizer: Tokenizer, entries: Sequence[_Entry], source: Path) -> "GGUFWriter":
    """Return a writer that knows the keys of the file and the places of its tensors."""
    import numpy as np
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, MODEL_ARCH_NAMES[MODEL_ARCH[model.architecture]])
    _add_file(writer, model, {entry.kind for entry in entries})
    _add_model(writer, model)
    rows = next((entry.shape[0] for entry in entries if entry.name == "token_embd.weight"), 0)
    _add_tokenizer(writer, tokenizer, source, rows)
    for entry in entries:
        kind, size = GGMLQuantizationType[entry.kind], math.prod(entry.shape)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.uint8), size, raw_dtype=kind)
    return writer


def _add_file(writer: "GGUFWriter", model: Model, kinds: set[str]) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    quantized = sorted(kinds & set(BYTES))
    writer.add_type(GGUFType.MODEL)
    writer.add_name(model.kind.capitalize())  # transformers 5.23 fails on a file that is named `mistral`
    writer.add_quantized_by("quantkit")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{quantized[0]}"] if len(quantized) == 1 else LlamaFileType.GUESSED)


def _add_model(writer: "GGUFWriter", model: Model) -> None:
    from gguf import RopeScalingType

    writer.add_context_length(model.context)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.inner)
    writer.add_block_count(model.blocks)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(float(model.rope["rope_theta"]))
    if model.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(model.rope["factor"]))


def _add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer, source: Path, rows: int) -> None:
    """Add the tokenizer; every row of the embedding is a token, those beyond the tokenizer's are unused."""
    from gguf import SpecialVocab

    spare = rows - len(tokenizer.tokens)
    if spare < 0:
        raise ModelError(
            f"{source} embeds {rows} of its {len(tokenizer.tokens)} tokens, which llama.cpp refuses; {INSTEAD}"
        )
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.splitting)
    writer.add_token_list(tokenizer.tokens + [f"[PAD{number}]" for number in range(len(tokenizer.tokens), rows)])
    writer.add_token_types(tokenizer.types + [UNUSED] * spare)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores + [min(tokenizer.scores)] * spare)
    writer.add_add_space_prefix(tokenizer.space_first)
    with _quiet_gguf():
        try:
            special = SpecialVocab(source, load_merges=tokenizer.model == "gpt2", n_vocab=rows)
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ModelError(f"the special tokens of {source} cannot be read: {error}") from error
        special.add_special_token.setdefault("bos", False)  # llama.cpp would add it to some
        special.add_to_gguf(writer, quiet=True)


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Keep back the package's remarks on templates for pairs of texts, which llama.cpp does not use here."""
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _write(writer: "GGUFWriter", entries: Sequence[_Entry], path: Path) -> None:
    """Write the file, one tensor in memory at a time."""
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.bytes().numpy())
    finally:
        writer.close()
