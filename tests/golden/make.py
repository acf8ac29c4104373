"""Makes the golden files: a tiny model of every kind that is written, and the logits that it must have for good.

    PYTHONPATH=.:tests python tests/golden/make.py

`<kind>/` is a checkpoint; `<kind>.safetensors` holds `tokens`, `logits`, the float32 logits of its weights, and where
inputs of linears are quantized `quantized`, the logits with that, as compressed-tensors computes it. Both come from a
dense model. Made again only when what is written changes on purpose: that it can still be read is what they are for.
"""

import json
import shutil
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from families import VOCABULARY, save_tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import quantkit
from quantkit.model.checkpoint import Checkpoint
from quantkit.resources import data_dir
from quantkit.runtime.reading import reader

HERE = Path(__file__).parent
W8A8 = {"wbits": 8, "group_size": None, "symmetric": True, "abits": 8, "symmetric_activations": True}
W4A8 = W8A8 | {"wbits": 4, "group_size": 16}
# kind → what is asked of `quantize`
KINDS = {
    "ct-w4-asymmetric": {"wbits": 4, "group_size": 16},
    "ct-w3-channel": {"wbits": 3, "group_size": None, "symmetric": True},
    "ct-w2-asymmetric": {"wbits": 2, "group_size": 16},
    "ct-w8a8": W8A8,
    "ct-w4a8": W4A8,
    "ct-mixed": {"target_bpw": 4.5, "group_size": 32},
    "gptq-v1-symmetric": {"wbits": 4, "group_size": 16, "symmetric": True},
    "gptq-v2-asymmetric": {"wbits": 3, "group_size": 32},
    "awq": {"wbits": 4, "group_size": 16},
}
GGUF = {"gguf-q4-1": {"wbits": 4, "group_size": 32}, "gguf-q8-0": {"wbits": 8, "group_size": 32, "symmetric": True}}
ACTIVATION_BITS = {"ct-w8a8": 8, "ct-w4a8": 8}
FEW = {"method": "rtn", "samples": 2, "seqlen": 16, "device": "cpu", "calibration": "embedded"}
LEFT_OUT = ("report.json", "check.json", "recipe.toml", "generation_config.json")
CONFIG = AutoConfig.for_model(
    "llama",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_bias=True,
    tie_word_embeddings=True,
)


def make_source(directory: Path, config: PreTrainedConfig = CONFIG) -> None:
    """Write a model with random weights in bfloat16, biases and norms included."""
    generator = torch.Generator().manual_seed(4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.3 * noise if value.ndim == 1 else 2 * noise / value.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)


def dense_model(directory: Path) -> nn.Module:
    """Return a dense float32 model with the weights that quantkit reads from a checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    read, checkpoint = reader(config.pop("quantization_config")), Checkpoint(directory)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    state = {name: checkpoint.load([name])[name] for name in model.state_dict() if name in checkpoint}
    for name, part in model.named_modules():
        scheme = read.scheme_of(name, ("Linear",)) if isinstance(part, nn.Linear) else None
        if scheme and name != "lm_head":
            weight, order = read.read(checkpoint, name, scheme, tuple(part.weight.shape))
            assert order is None
            state[f"{name}.weight"] = weight.dequantize()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    return model


def quantize_inputs(model: nn.Module, bits: int) -> None:
    """Round what reaches the linears of the blocks per token, with the step of compressed-tensors."""
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name != "lm_head":
            part.register_forward_pre_hook(lambda _, args: (_rounded(args[0], bits),))


def _rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    step = values.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return (values / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


@torch.no_grad()
def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (sequences, tokens, vocabulary) of a causal language model."""
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def make(kind: str, source: Path, work: Path) -> None:
    """Write one kind anew."""
    name = kind.partition("-")[0]
    formats = [] if name == "ct" else [name]
    made = quantkit.quantize(source, output=work / kind, formats=formats, **KINDS[kind], **FEW)
    target = HERE / kind
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made.formats.get(name, made.output), target, ignore=shutil.ignore_patterns(*LEFT_OUT, "token*"))
    tokens = torch.randint(4, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(5))
    model = dense_model(target)
    expected = {"tokens": tokens, "logits": logits_of(model, tokens)}
    if bits := ACTIVATION_BITS.get(kind):
        quantize_inputs(model, bits)
        expected["quantized"] = logits_of(model, tokens)
    save_file(expected, HERE / f"{kind}.safetensors")


def make_gguf_source(directory: Path) -> None:
    """Write a model without biases, which transformers does not read from a GGUF file, whose tokens are bytes."""
    embedded = data_dir("model_zoo") / "tiny"
    tokenizer = json.loads((embedded / "tokenizer.json").read_text())
    model = tokenizer["model"]
    merged = set(map("".join, model["merges"]))
    model |= {"merges": [], "vocab": {text: index for text, index in model["vocab"].items() if text not in merged}}
    config = deepcopy(CONFIG)
    config.vocab_size, config.attention_bias = len(model["vocab"]), False
    make_source(directory, config)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(embedded / "tokenizer_config.json", directory)


def logits_of_gguf(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return what transformers, which reads such files too, computes."""
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
    return logits_of(model.eval(), tokens)


def make_gguf(kind: str, source: Path, work: Path) -> None:
    """Write one kind of GGUF file anew; its logits are those of the file, after a look at the checkpoint's."""
    made = quantkit.quantize(source, output=work / kind, formats=["gguf"], **GGUF[kind], **FEW)
    target = HERE / kind
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made.formats["gguf"], target)
    tokens = torch.randint(4, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(5))
    logits, packed = logits_of_gguf(target, tokens), logits_of(dense_model(made.output), tokens)
    assert (logits - packed).norm() < 0.01 * packed.norm()
    save_file({"tokens": tokens, "logits": logits}, HERE / f"{kind}.safetensors")


def main() -> None:
    """Write the kinds that are named, or all."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make_source(work / "source")
        make_gguf_source(work / "bytes")
        for kind in sys.argv[1:] or (*KINDS, *GGUF):
            if kind in GGUF:
                make_gguf(kind, work / "bytes", work)
            else:
                make(kind, work / "source", work)


if __name__ == "__main__":
    main()
