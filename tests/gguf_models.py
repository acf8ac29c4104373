"""Models and tokenizers that GGUF files are made of in tests."""

import copy
import json
import shutil

import torch
from families import FAMILIES, save_tiny
from safetensors.torch import save_file

import quantkit
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.exporters.gguf import Gguf
from quantkit.model.checkpoint import Checkpoint
from quantkit.resources import data_dir

TINY = data_dir("model_zoo") / "tiny"
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LINEARS = {
    f"model.layers.{block}.{site}": f"blk.{block}.{place}.weight"
    for block in range(5)
    for site, place in PLACES.items()
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NO_REGEX = BYTES | {"use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": [*parts]}


def split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


# llama.cpp's name → the pre-tokenizer in tokenizer.json, and whether words that are tokens are left whole
SPLITTINGS = {
    "gpt-2": (BYTES, False),
    "smollm": (sequence({"type": "Digits", "individual_digits": True}, BYTES), False),
    "llama-bpe": (sequence(split(LLAMA3), NO_REGEX), True),
    "smaug-bpe": (sequence(split(LLAMA3), NO_REGEX), False),
    "qwen2": (sequence(split(LLAMA3.replace("{1,3}", "")), NO_REGEX), False),
    "tekken": (sequence(split(TEKKEN), NO_REGEX), True),
}


def write_tokenizer(directory, model=None, **entries):
    """Write the embedded model's tokenizer with other entries, of its BPE and at the top."""
    content = json.loads((TINY / "tokenizer.json").read_text())
    content |= {**entries, "model": content["model"] | (model or {})}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def pack_tiny(directory, scheme_of):
    """Write the embedded model with `scheme_of(site)` for each linear."""
    shutil.copytree(TINY, directory)
    checkpoint = Checkpoint(directory)
    tensors, schemes = checkpoint.load(checkpoint), {}
    for site in LINEARS:
        schemes[site] = QuantScheme.parse(scheme_of(site))
        weight = round_to_nearest(tensors.pop(f"{site}.weight").float(), schemes[site], torch.bfloat16)
        tensors |= {f"{site}.{end}": part for end, part in CompressedTensors().encode(weight).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory, quantization_config=CompressedTensors().config(schemes, ["Linear"], ["lm_head"]))
    return directory


def edit(directory, name="config.json", **entries):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def exported_family(name, directory, **changes):
    """Return the packed checkpoint of a random model with the embedded model's tokenizer; `gguf/` is in it.

    `changes` are entries of the configuration.
    """
    config = copy.deepcopy(FAMILIES[name])
    for entry, value in {"vocab_size": 1024, **changes}.items():
        setattr(config, entry, value)
    save_tiny(name, directory / "dense", config=config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, directory / "dense")
    settings = {"method": "rtn", "wbits": 8, "group_size": 32, "symmetric": True, "samples": 1, "seqlen": 8}
    output = quantkit.quantize(directory / "dense", output=directory / "out", device="cpu", **settings).output
    Gguf().export(output, output / "gguf")
    return output
