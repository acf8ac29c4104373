"""What is written as GGUF is the same weights to the `gguf` package, and the same model to transformers."""

import dataclasses
import errno

import pytest
import torch
from families import edit_tensors
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf_models import LINEARS, TINY, edit, exported_family, pack_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, OutputError, UsageError
from quantkit.exporters import gguf
from quantkit.exporters._gguf_model import read_model, rope_factors
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.exporters.gguf import TYPES, Gguf
from quantkit.model.checkpoint import Checkpoint

SCHEMES = {text: QuantScheme.parse(text) for text in ("w4g32", "w4g32s", "w8g32s", "w5g64", "w5g32s", "w4g64s", "w8s")}
EVERY = pytest.mark.parametrize("text", SCHEMES)
SYMMETRIC = pytest.mark.parametrize("text", [text for text in SCHEMES if SCHEMES[text].symmetric])
ASYMMETRIC = pytest.mark.parametrize("text", [text for text in SCHEMES if not SCHEMES[text].symmetric])
TOKENS = torch.randint(3, 1024, (2, 24), generator=torch.Generator().manual_seed(5))
FLOAT32 = 2.0**-19  # of a step: what the reader's sum of two products loses
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
EMBEDDING = "model.embed_tokens.weight"
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The embedded model in every scheme, packed, with a GGUF file beside it."""
    directory = tmp_path_factory.mktemp("gguf")
    for text in SCHEMES:
        Gguf().export(pack_tiny(directory / text, lambda _, text=text: text), directory / text / "gguf")
    return directory


@pytest.fixture
def packed(tmp_path):
    """The embedded model in 4 bits, packed, that a test may damage."""
    return pack_tiny(tmp_path / "packed", lambda _: "w4g32")


def read(directory):
    """Return {name: (type, weight in float32)} as the `gguf` package reads it."""
    tensors = GGUFReader(directory / "gguf" / gguf.FILE).tensors
    return {t.name: (t.tensor_type.name, torch.tensor(dequantize(t.data, t.tensor_type))) for t in tensors}


def key(directory, name):
    return GGUFReader(directory / "gguf" / gguf.FILE).fields[name].contents()


def quantized(directory, site, scheme):
    checkpoint = Checkpoint(directory)
    names = [name for name in checkpoint if name.startswith(f"{site}.weight_")]
    parts = {name.removeprefix(f"{site}."): tensor for name, tensor in checkpoint.load(names).items()}
    return CompressedTensors().decode(parts, scheme)


def back_in_order(weight, place):
    """Return the rows of q and k as transformers has them: of each head first the even ones, then the odd ones."""
    heads = {"attn_q": 4, "attn_k": 2}.get(place.split(".")[2])
    if heads is None:
        return weight
    return torch.cat([torch.cat([head[0::2], head[1::2]]) for head in weight.chunk(heads)])


@torch.no_grad()
def logits(directory, dtype, **options):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()
    return model(input_ids=TOKENS, use_cache=False).logits


def logits_of_gguf(directory, dtype=torch.float32):
    return logits(directory / "gguf", dtype, gguf_file=gguf.FILE)


@EVERY
def test_every_weight_is_code_times_scale(outputs, text):
    """Exactly without zero points; with them the offset of a group is rounded to float16, by 2^-11 of it at most."""
    scheme, stored = SCHEMES[text], read(outputs / text)
    for site, place in LINEARS.items():
        tensor = quantized(outputs / text, site, scheme)
        scale = tensor.scale.float().unsqueeze(-1)
        codes = tensor.codes.float().unflatten(1, (tensor.scale.shape[1], -1))
        zero = 0 if scheme.symmetric else tensor.zero_point.float().unsqueeze(-1)
        bound = 0 if scheme.symmetric else 2.0**-11 * (zero - scheme.smallest_code) * scale
        kind, weight = stored[place]
        difference = (back_in_order(weight, place) - ((codes - zero) * scale).flatten(1)).unflatten(1, codes.shape[1:])
        assert kind == TYPES[scheme.bits, scheme.symmetric]
        assert (difference.abs() <= bound + FLOAT32 * scale * (not scheme.symmetric)).all()


@SYMMETRIC
def test_weights_are_those_of_quantkit_without_zero_points(outputs, text):
    stored = read(outputs / text)
    for site, place in LINEARS.items():
        ours = quantized(outputs / text, site, SCHEMES[text]).dequantize()
        assert torch.equal(back_in_order(stored[place][1], place).to(ours.dtype), ours)


def test_rounded_offsets_move_weights_by_a_small_part_of_a_step(outputs):
    for text, part in (("w4g32", 1 / 137), ("w5g64", 1 / 66)):
        tensor = quantized(outputs / text, "model.layers.0.mlp.up_proj", SCHEMES[text])
        exact = tensor.codes.float().unflatten(1, (tensor.scale.shape[1], -1)) - tensor.zero_point.float().unsqueeze(-1)
        weight = read(outputs / text)["blk.0.ffn_up.weight"][1].view_as(exact)
        steps = weight / tensor.scale.float().unsqueeze(-1) - exact
        assert 0 < steps.abs().max() < part + FLOAT32


def test_everything_else_is_what_it_was(outputs):
    original, stored = Checkpoint(TINY), read(outputs / "w4g32")
    dense = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    dense |= {f"model.layers.{b}.{norm}": f"blk.{b}.{place}" for b in range(5) for norm, place in NORMS.items()}
    assert set(stored) == {f"{place}.weight" for place in dense.values()} | set(LINEARS.values())
    for site, place in dense.items():
        kind, value = stored[f"{place}.weight"]
        assert torch.equal(value, original.load([f"{site}.weight"])[f"{site}.weight"].float())
        assert kind == ("BF16" if place == "token_embd" else "F32")


def test_the_keys_describe_the_model(outputs):
    expected = {
        "general.architecture": "llama",
        "general.quantization_version": 2,
        "general.file_type": 3,  # mostly Q4_1
        "llama.context_length": 256,
        "llama.embedding_length": 128,
        "llama.feed_forward_length": 384,
        "llama.block_count": 5,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 1024,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    found = GGUFReader(outputs / "w4g32" / "gguf" / gguf.FILE).fields
    assert {name: found[name].contents() for name in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(1e-6)
    assert len(found["tokenizer.ggml.tokens"].contents()) == 1024
    assert found["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]  # control, then normal


@SYMMETRIC
def test_transformers_computes_the_same_logits_as_from_the_packed_checkpoint(outputs, text):
    assert torch.equal(
        logits_of_gguf(outputs / text, torch.bfloat16).float(), logits(outputs / text, torch.bfloat16).float()
    )


@ASYMMETRIC
def test_what_is_rounded_is_small_beside_quantization(outputs, text):
    ours, original = logits(outputs / text, torch.float32), logits(TINY, torch.float32)
    assert (logits_of_gguf(outputs / text) - ours).norm() < 0.05 * (ours - original).norm()


def test_the_tokenizer_is_the_same(outputs):
    text = "Once upon a time, there wasn't 1 rabbit:\n  it had 23 ears?!"
    ours = AutoTokenizer.from_pretrained(TINY)
    theirs = AutoTokenizer.from_pretrained(outputs / "w4g32" / "gguf", gguf_file=gguf.FILE)
    assert theirs(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids


# transformers' reader takes the default of 128 for the heads of a Qwen3
@pytest.mark.parametrize(
    ("name", "changes"), [("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {"head_dim": 128})]
)
def test_every_family_computes_the_same(name, changes, tmp_path):
    output = exported_family(name, tmp_path, **changes)
    expected, found = logits(output, torch.float32)[:, :8], logits_of_gguf(output)[:, :8]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


def test_a_window_that_slides_ends_the_context(tmp_path):
    assert key(exported_family("mistral", tmp_path), "llama.context_length") == 8


def test_schemes_may_differ_between_linears(tmp_path):
    packed = pack_tiny(tmp_path / "packed", lambda site: "w8g32s" if "mlp" in site else "w4g64s")
    Gguf().export(packed, packed / "gguf")
    stored = read(packed)
    assert {stored[place][0] for site, place in LINEARS.items() if "mlp" in site} == {"Q8_0"}
    assert {stored[place][0] for site, place in LINEARS.items() if "attn" in site} == {"Q4_0"}
    assert key(packed, "general.file_type") == 1024  # guessed: not mostly one
    assert torch.equal(logits_of_gguf(packed, torch.bfloat16), logits(packed, torch.bfloat16))


def test_llama_3_divides_rotary_frequencies_as_transformers_does():
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA31}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    factors = rope_factors(read_model(config.to_dict()))
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)
    assert (factors[0], factors[-1]) == (1, 8)
    assert any(1 < factor < 8 for factor in factors)


def test_a_rotary_embedding_of_llama_3_is_in_the_file(packed):
    edit(packed, rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA31})
    Gguf().export(packed, packed / "gguf")
    assert read(packed)["rope_freqs.weight"][1].shape == (16,)


def test_a_rotary_embedding_that_older_versions_wrote_is_read(packed):
    edit(packed, rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    Gguf().export(packed, packed / "gguf")
    assert key(packed, "llama.rope.freq_base") == 5000
    assert (key(packed, "llama.rope.scaling.type"), key(packed, "llama.rope.scaling.factor")) == ("linear", 2)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("w2g32", "w4a16g32"),
        ("w3g64s", "w4a16g64s"),
        ("w6g32s", "w8a16g32s"),
        ("w8g128", "w8a16g128s"),
        ("w4g16", "w4a16g32"),
        ("w5g100", "w5a16g96"),
        ("w3", "w4a16"),
    ],
)
def test_schemes_without_a_type_are_refused_with_the_nearest(text, nearest):
    scheme = QuantScheme.parse(text)
    with pytest.raises(UsageError, match=rf"GGUF cannot hold {scheme} as it is: .*; the nearest it can is {nearest}$"):
        Gguf().check({"a": SCHEMES["w4g32"], "b": scheme})
    Gguf().check({"a": gguf.near(scheme)})


def test_a_row_that_blocks_do_not_fill_is_refused(tmp_path):
    packed = pack_tiny(tmp_path / "packed", lambda _: "w4")
    weight = round_to_nearest(torch.randn(256, 128 + 16), QuantScheme(), torch.bfloat16)
    site = "model.layers.0.self_attn.q_proj"
    parts = {f"{site}.{end}": part for end, part in CompressedTensors().encode(weight).items()}
    edit_tensors(packed, lambda tensors: tensors | parts)
    with pytest.raises(UsageError, match=f"rows of 144 weights in {site} are no whole blocks of 32"):
        Gguf().export(packed, packed / "gguf")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "gpt2"}, "GGUF files are written for llama, mistral, qwen2, qwen3, not for gpt2; use"),
        ({"model_type": None}, "not for None"),
        ({"hidden_act": "gelu"}, "llama.cpp computes silu in a llama, not gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "the 'yarn' rotary embedding of this llama"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "the 'default' rotary embedding"),
        ({"model_type": "qwen3", "attention_bias": True}, "qwen3 has no biases, but this one has"),
        (
            {"model_type": "qwen2", "rope_parameters": {"rope_type": "llama3"}},
            "the 'llama3' rotary embedding of this qwen2",
        ),
        ({"num_hidden_layers": 4}, "llama.cpp's llama has no place for model.layers.4"),
        ({"rms_norm_eps": None}, "lacks or misstates an entry of a llama"),
        ({"quantization_config": None}, "is no packed checkpoint of quantkit; quantize the model first"),
    ],
)
def test_models_that_cannot_be_described_are_refused(packed, entries, message):
    edit(packed, **entries)
    with pytest.raises(ModelError, match=message):
        Gguf().export(packed, packed / "gguf")
    assert not (packed / "gguf").exists()


def test_a_model_can_be_asked_about_before_it_is_quantized(packed):
    Gguf().check_model(TINY)
    edit(packed, model_type="bloom")
    with pytest.raises(ModelError, match="not for bloom"):
        Gguf().check_model(packed)
    with pytest.raises(ModelError, match=r"config.json is no configuration of a model"):
        Gguf().check_model(packed / "nowhere")


def test_a_checkpoint_that_embeds_too_few_tokens_is_refused(packed):
    edit_tensors(packed, lambda tensors: tensors | {EMBEDDING: tensors[EMBEDDING][:1000].clone()})
    with pytest.raises(ModelError, match="embeds 1000 of its 1024 tokens"):
        Gguf().export(packed, packed / "gguf")


def test_rows_beyond_the_tokenizer_are_unused_tokens(packed):
    edit_tensors(packed, lambda tensors: tensors | {EMBEDDING: torch.cat([tensors[EMBEDDING]] * 2)})
    Gguf().export(packed, packed / "gguf")
    assert key(packed, "tokenizer.ggml.tokens")[1024:1026] == ["[PAD1024]", "[PAD1025]"]
    assert key(packed, "tokenizer.ggml.token_type")[1024:] == [5] * 1024
    assert key(packed, "llama.vocab_size") == 2048


def test_scales_that_float16_does_not_hold():
    """bfloat16 reaches further: too large is refused, too small is rounded to a multiple of 2^-24."""
    scheme = SCHEMES["w8g32s"]
    weight = round_to_nearest(torch.randn(4, 32), scheme, torch.bfloat16)
    large = dataclasses.replace(weight, scale=torch.full_like(weight.scale, 1e5))
    with pytest.raises(UsageError, match=r"keeps scales in float16, and 9.98e\+04 is too large"):
        gguf.blocks(large)
    small = dataclasses.replace(weight, scale=torch.full_like(weight.scale, 2.0**-18 * 1.9921875))
    found = torch.tensor(dequantize(gguf.blocks(small).numpy(), GGMLQuantizationType.Q8_0))
    error = (found - small.codes.float() * small.scale.float()).abs().max()
    assert 0 < error <= 128 * 2.0**-25


def test_an_existing_file_is_kept(packed):
    (packed / gguf.FILE).write_text("mine")
    with pytest.raises(OutputError, match=r"model.gguf exists; remove it or choose another -o"):
        Gguf().export(packed, packed)
    assert (packed / gguf.FILE).read_text() == "mine"


def test_a_failure_leaves_no_file(packed, monkeypatch):
    monkeypatch.setattr(gguf, "blocks", full_disk)
    with pytest.raises(OutputError, match=r"cannot write .*model.gguf: the disk is full; nothing was changed"):
        Gguf().export(packed, packed / "gguf")
    assert list((packed / "gguf").iterdir()) == []


def full_disk(weight):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_same_weights_give_the_same_bytes_however_they_are_sharded(packed, tiny_rtn_w4, tmp_path):
    for source, name in ((packed, "one"), (tiny_rtn_w4, "two")):
        Gguf().export(source, tmp_path / name)
    assert (tmp_path / "one" / gguf.FILE).read_bytes() == (tmp_path / "two" / gguf.FILE).read_bytes()


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"needs the package gguf; pip install 'quantkit\[gguf\]'"):
        Gguf().check({"a": SCHEMES["w4g32"]})


def test_calibrated_activations_are_named():
    assert list(Gguf().notices({"a": SCHEMES["w4g32"]}, ["Linear"])) == []
    (notice,) = Gguf().notices({"a": QuantScheme.parse("w4a8g32")}, ["Linear"])
    assert "llama.cpp quantizes inputs of linears to 8 bits in its own way" in notice
