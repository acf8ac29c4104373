"""`quantkit.load`: whose checkpoints it runs packed, that it is an ordinary model, and what it refuses."""

import json
import shutil

import pytest
import torch
from families import VOCABULARY, edit_tensors, save_tiny, save_tokenizer
from packed import exact, random_weight, scheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.errors import ModelError, UsageError
from quantkit.evaluation.loading import load_model
from quantkit.exporters.awq import AWQFormat
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.exporters.gptq import GPTQFormat
from quantkit.runtime.linear import HalfEmbedding, HalfLinear, PackedLinear

TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
GROUPS = scheme(4, 32)


def unique_bytes(model):
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_bytes(directory):
    return sum(
        tensor.numel() * tensor.element_size()
        for shard in directory.glob("*.safetensors")
        for tensor in load_file(shard).values()
    )


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def assert_close(found, expected, tolerance=1e-3):
    assert (found - expected).abs().max() < tolerance * expected.std()


def packed_checkpoint(directory, encode, quantization, *, order=None, kind=GROUPS):
    """Write a tiny Llama whose linears are random and packed by `encode`; return the dense model that it stands for."""
    model = save_tiny("llama", directory)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}

    def pack(tensors):
        for seed, (name, module) in enumerate(linears.items()):
            weight = random_weight(*module.weight.shape, kind, seed=seed)
            dense = exact(weight).float() * 0.1
            weight.scale.mul_(0.1)
            dense = exact(weight).float()
            columns = torch.arange(dense.shape[1]) if order is None else order(dense.shape[1])
            module.weight.data = torch.empty_like(dense).index_copy_(1, columns, dense)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{end}": value for end, value in encode(weight, columns).items()}
        return tensors

    edit_tensors(directory, pack)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return model


def test_it_is_an_ordinary_model(tiny_rtn_w4):
    model = quantkit.load(tiny_rtn_w4, device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    dense, tokenizer = load_model(tiny_rtn_w4, device="cpu")
    prompts = tokenizer(["The cat", "A dog and a"], return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompts, **options), dense.generate(**prompts, **options))
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id
    assert (model.config.use_cache, model.name_or_path) == (dense.config.use_cache, str(tiny_rtn_w4))


def test_resident_memory(tiny_rtn_w4):
    model = quantkit.load(tiny_rtn_w4, device="cpu")
    assert unique_bytes(model) <= 1.1 * file_bytes(tiny_rtn_w4)
    assert isinstance(model.get_input_embeddings(), HalfEmbedding)
    assert isinstance(model.get_output_embeddings(), HalfLinear)


def test_other_dtypes(tiny_rtn_w4):
    tokens = torch.arange(3, 30).unsqueeze(0)
    expected = logits(quantkit.load(tiny_rtn_w4, device="cpu"), tokens)
    half = quantkit.load(tiny_rtn_w4, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_close(logits(half, tokens).float(), expected, 0.1)
    assert_close(logits(half.float(), tokens), expected, 0.02)  # norms and embeddings were stored in bfloat16


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(tiny_rtn_w4, device_map):
    tokens = torch.arange(3, 30).unsqueeze(0)
    model = quantkit.load(tiny_rtn_w4, device_map=device_map)
    assert torch.equal(logits(model, tokens), logits(quantkit.load(tiny_rtn_w4, device="cpu"), tokens))


def test_checkpoints_of_gptq(tmp_path):
    form = GPTQFormat()
    config = form.config({"x": GROUPS}, ["Linear"], ["lm_head"])
    dense = packed_checkpoint(tmp_path / "gptq", lambda weight, _: form.encode(weight), config)
    assert_close(logits(quantkit.load(tmp_path / "gptq", device="cpu")), logits(dense))


def test_checkpoints_of_gptq_in_the_order_of_activations(tmp_path):
    form, generator = GPTQFormat(), torch.Generator().manual_seed(5)

    def encode(weight, columns):
        tensors = form.encode(weight)
        # what is stored is by input feature: feature columns[i] belongs where column i does
        back = torch.argsort(columns)
        from quantkit.core.packing import pack

        return tensors | {
            "qweight": pack(weight.codes[:, back], weight.scheme.bits).T.contiguous(),
            "g_idx": tensors["g_idx"][back],
        }

    def order(width):
        # within a group the order of features is theirs, as `column_order` has it
        group = torch.randperm(width, generator=generator) % (width // 32)
        return torch.argsort(group, stable=True)

    config = form.config({"x": GROUPS}, ["Linear"], ["lm_head"]) | {"desc_act": True}
    dense = packed_checkpoint(tmp_path / "gptq", encode, config, order=order)
    model = quantkit.load(tmp_path / "gptq", device="cpu")
    assert model.model.layers[0].mlp.up_proj.order is not None
    assert_close(logits(model), logits(dense))


def test_checkpoints_of_awq(tmp_path):
    form = AWQFormat()
    config = form.config({"x": GROUPS}, ["Linear"], ["lm_head"])
    dense = packed_checkpoint(tmp_path / "awq", lambda weight, _: form.encode(weight), config)
    assert_close(logits(quantkit.load(tmp_path / "awq", device="cpu")), logits(dense))


def llm_compressor_config(*, targets, **weights):
    """What llm-compressor 0.14 writes: expressions or names for targets, more keys, and no key of quantkit's."""
    arguments = {
        "actorder": "static",
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
    }
    group = {"format": "pack-quantized", "weights": arguments | weights, "targets": targets}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group | {"input_activations": None, "output_activations": None}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "kv_cache_scheme": None,
    }


def encode_ct(weight, _):
    return CompressedTensors().encode(weight)


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*_proj$"], [r"re:model\.layers.*"]])
def test_checkpoints_of_llm_compressor(tmp_path, targets):
    dense = packed_checkpoint(tmp_path / "ct", encode_ct, llm_compressor_config(targets=targets))
    assert_close(logits(quantkit.load(tmp_path / "ct", device="cpu")), logits(dense))


def test_inputs_of_linears_as_transformers_quantizes_them(tmp_path):
    kind = scheme(8, symmetric=True)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = llm_compressor_config(targets=["Linear"], num_bits=8, symmetric=True, strategy="channel", group_size=None)
    config["config_groups"]["group_0"]["input_activations"] = inputs
    dense = packed_checkpoint(tmp_path / "w8a8", encode_ct, config, kind=kind)
    packed = logits(quantkit.load(tmp_path / "w8a8", device="cpu"))
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "w8a8", dtype=torch.float32))
    # compressed-tensors divides by 127.5 where quantkit divides by 127, so the errors differ, and are as large
    assert 0.5 < (packed - logits(dense)).norm() / (theirs - logits(dense)).norm() < 2


@torch.no_grad()
def test_it_quantizes_activations_as_evaluate_does(tmp_path):
    few = {"samples": 2, "seqlen": 64, "calibration": "embedded", "device": "cpu"}
    quantkit.quantize("tiny", output=tmp_path / "w8a4", method="rtn", wbits=8, abits=4, **few)
    model = quantkit.load(tmp_path / "w8a4", device="cpu")
    judged, plain = (load_model(tmp_path / "w8a4", device="cpu", activations=on)[0] for on in (True, False))

    def share_that_differs(other):
        """Return the share of the first block's outputs that are not the same."""
        for name, part in model.named_modules():
            if isinstance(part, PackedLinear):  # which are not rounded to 16 bits
                other.get_submodule(name).weight.copy_(exact(part.unpack()))
        first, second = (
            m(torch.arange(3, 60).unsqueeze(0), output_hidden_states=True).hidden_states[1] for m in (model, other)
        )
        return float(((first - second).abs() > 1e-3 * second.std()).float().mean())

    # a difference of 1e-5 is enough for another code here and there, and those spread
    assert share_that_differs(judged) < 0.1
    assert share_that_differs(plain) > 0.9


@pytest.fixture
def copy_of_tiny(tiny_rtn_w4, tmp_path):
    return shutil.copytree(tiny_rtn_w4, tmp_path / "copy")


def change_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def weights_of(config):
    return config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(quant_method="fp8"), "'fp8' cannot be run packed"),
        (lambda c: c["config_groups"]["group_0"].update(format="float-quantized"), "cannot be run packed"),
        (lambda c: weights_of(c).update(type="float"), "cannot be run packed"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme in config.json cannot be run packed"),
        (lambda c: c.update(sparsity_config={"format": "x"}), "sparsity_config"),
        (lambda c: c.update(config_groups={}), "config.json says that it is dense"),
        (lambda c: c["config_groups"]["group_0"].pop("weights"), "describe no packed weights"),
        (lambda c: weights_of(c).update(num_bits=3), "words cannot hold"),
        (lambda c: weights_of(c).update(num_bits=40), "describe no packed weights"),
        (lambda c: weights_of(c).update(symmetric=True), "says that it is symmetric"),
        (lambda c: weights_of(c).update(group_size=64), "cannot be unpacked as w4a16g64"),
    ],
)
def test_schemes_that_are_not_run_are_refused(copy_of_tiny, change, said):
    change_config(copy_of_tiny, change)
    with pytest.raises(ModelError, match=said) as caught:
        quantkit.load(copy_of_tiny, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("end", "damage", "said"),
    [
        ("weight_packed", lambda t: t[:-1], "cannot be unpacked|is packed with shape"),
        ("weight_packed", lambda t: t[:, :-1].contiguous(), "words cannot hold"),
        ("weight_scale", lambda t: t * torch.nan, "scales that are NaN"),
        ("weight_scale", lambda t: t[:, :-1].contiguous(), "cannot be unpacked"),
        ("weight_scale", None, "cannot be unpacked"),
        ("weight_shape", lambda t: t.flip(0), "cannot be unpacked|is packed with shape"),
        ("weight_zero_point", None, "cannot be unpacked"),
    ],
)
def test_damage_is_named(copy_of_tiny, end, damage, said):
    name = f"model.layers.1.mlp.up_proj.{end}"
    for shard in copy_of_tiny.glob("*.safetensors"):
        tensors = load_file(shard)
        if name not in tensors:
            continue
        value = tensors.pop(name)
        if damage is not None:
            tensors[name] = damage(value)
        from safetensors.torch import save_file

        save_file(tensors, shard, metadata={"format": "pt"})
    if damage is None:
        index = copy_of_tiny / "model.safetensors.index.json"
        if index.is_file():
            content = json.loads(index.read_text())
            del content["weight_map"][name]
            index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=said) as caught:
        quantkit.load(copy_of_tiny, device="cpu")
    assert "mlp.up_proj" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_packed_is_refused():
    with pytest.raises(ModelError, match="is not quantized"):
        quantkit.load("tiny")


def test_devices_that_do_not_exist(tiny_rtn_w4):
    with pytest.raises(UsageError, match="not both"):
        quantkit.load(tiny_rtn_w4, device="cpu", device_map="auto")
    with pytest.raises(UsageError, match="unknown device"):
        quantkit.load(tiny_rtn_w4, device="gpu")
    with pytest.raises(UsageError, match="device map"):
        quantkit.load(tiny_rtn_w4, device_map={"model": "cpu"})


def test_no_code_of_a_checkpoint_is_run(copy_of_tiny):
    config = json.loads((copy_of_tiny / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (copy_of_tiny / "config.json").write_text(json.dumps(config))
    mark = copy_of_tiny / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass Model: ...\nclass Config: ..."
    (copy_of_tiny / "evil.py").write_text(code)
    quantkit.load(copy_of_tiny, device="cpu")
    assert not mark.exists()


def test_a_family_with_a_tied_head(tmp_path):
    save_tiny("qwen2", tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    few = {"samples": 2, "seqlen": 16, "device": "cpu"}
    quantkit.quantize(tmp_path / "source", output=tmp_path / "w4", method="rtn", wbits=4, group_size=32, **few)
    model = quantkit.load(tmp_path / "w4", device="cpu")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(isinstance(part, PackedLinear) for part in model.modules()) == 14
