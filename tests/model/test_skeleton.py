import json

import pytest
import torch
from families import FAMILIES, edit_tensors, save_tiny
from transformers import AutoModelForCausalLM

from quantkit.errors import ModelError
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton

CPU = torch.device("cpu")


def without_prefix(prefix):
    return lambda tensors: {name.removeprefix(prefix): value for name, value in tensors.items()}


def with_prefix(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def set_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_loads(directory, model):
    """Every parameter that the skeleton loads from `directory` is that of `model`."""
    skeleton, checkpoint = Skeleton(directory), Checkpoint(directory)
    for index in range(len(skeleton.blocks)):
        module = skeleton.load_block(index, checkpoint, torch.float32, CPU)
        for name, value in module.named_parameters():
            assert torch.equal(value, model.get_parameter(skeleton.module_name(index, name)))
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):
        for name, value in skeleton.outer_parameters(every_name=True).items():
            assert torch.equal(value, model.get_parameter(name))


def refusal(run):
    with pytest.raises(ModelError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_names_without_the_base_models_prefix(tmp_path, family):
    model = save_tiny(family, tmp_path)
    edit_tensors(tmp_path, without_prefix("transformer."))
    assert not [name for name in Checkpoint(tmp_path) if name.startswith("transformer.")]
    assert_loads(tmp_path, model)


def test_names_without_prefix_in_a_model_with_a_nested_decoder(tmp_path):
    model = save_tiny("opt", tmp_path)
    edit_tensors(tmp_path, without_prefix("model."))
    assert_loads(tmp_path, model)


def test_a_prefix_too_much(tmp_path):
    model = save_tiny("llama", tmp_path)
    edit_tensors(tmp_path, with_prefix("model."))
    assert_loads(tmp_path, model)


def test_a_vision_tower_named_as_on_the_hub(tmp_path):
    model = save_tiny("gemma3", tmp_path)
    edit_tensors(
        tmp_path,
        lambda tensors: {n.replace("vision_tower.", "vision_tower.vision_model."): tensors[n] for n in tensors},
    )
    assert_loads(tmp_path, model)


def test_tensors_that_no_module_has_are_left_alone(tmp_path):
    model = save_tiny("gpt2", tmp_path)
    mask = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    edit_tensors(tmp_path, lambda tensors: tensors | mask)
    assert_loads(tmp_path, model)


def test_a_tied_head_that_is_stored_too(tmp_path):
    model = save_tiny("bloom", tmp_path)
    head = "transformer.word_embeddings.weight"
    edit_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors[head].clone()})
    assert_loads(tmp_path, model)


def test_a_tied_head_that_is_stored_alone(tmp_path):
    model = save_tiny("gpt2", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors.pop("transformer.wte.weight")})
    assert_loads(tmp_path, model)


def test_a_head_that_is_tied_by_the_config_but_stored_with_other_values(tmp_path):
    save_tiny("qwen2", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
    assert_loads(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_weights_are_converted_to_the_dtype_that_is_asked_for(tmp_path):
    save_tiny("llama", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    module = Skeleton(tmp_path).load_block(1, Checkpoint(tmp_path), torch.float32, CPU)
    assert {value.dtype for value in module.parameters()} == {torch.float32}


def test_buffers_are_real_and_parameters_are_not(tmp_path):
    save_tiny("llama", tmp_path)
    skeleton = Skeleton(tmp_path)
    assert all(value.is_meta for value in skeleton.model.parameters())
    assert not any(value.is_meta for value in skeleton.model.buffers())
    assert all(name.startswith("model.rotary_emb.") for name, _ in skeleton.model.named_buffers())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_outer_parameters_name_tied_ones_once(tmp_path, family):
    FAMILIES[family].save_pretrained(tmp_path)
    skeleton = Skeleton(tmp_path)
    head = set() if FAMILIES[family].tie_word_embeddings else {"lm_head.weight"}
    assert set(skeleton.outer_parameters()) == {"model.embed_tokens.weight", "model.norm.weight"} | head
    assert "lm_head.weight" in skeleton.outer_parameters(every_name=True)


def test_tied_parameters_stay_tied_when_the_skeleton_is_emptied(tmp_path):
    save_tiny("qwen2", tmp_path)
    skeleton = Skeleton(tmp_path)
    with skeleton.outer_weights(Checkpoint(tmp_path), torch.float32, CPU):
        pass
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight


def test_a_missing_tensor_of_a_block_is_named(tmp_path):
    save_tiny("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda tensors: {n: value for n, value in tensors.items() if n != name})
    message = refusal(lambda: Skeleton(tmp_path).load_block(1, Checkpoint(tmp_path), torch.float32, CPU))
    assert message == f"{tmp_path} has no tensor for {name}; the checkpoint is incomplete"


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_outside_the_blocks_is_named_and_the_skeleton_emptied(tmp_path, name):
    save_tiny("llama", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {n: value for n, value in tensors.items() if n != name})
    skeleton = Skeleton(tmp_path)
    message = refusal(lambda: skeleton.outer_weights(Checkpoint(tmp_path), torch.float32, CPU).__enter__())
    assert f"no tensor for {name};" in message
    assert all(value.is_meta for value in skeleton.model.parameters())


def test_a_wrong_shape_in_a_block_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    set_config(tmp_path, num_key_value_heads=4)
    message = refusal(lambda: Skeleton(tmp_path).load_block(0, Checkpoint(tmp_path), torch.float32, CPU))
    assert "self_attn.k_proj.weight" in message
    assert "has shape (32, 64) but config.json asks for (64, 64)" in message


def test_a_wrong_shape_outside_the_blocks_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    set_config(tmp_path, vocab_size=200)
    skeleton = Skeleton(tmp_path)
    message = refusal(lambda: skeleton.outer_weights(Checkpoint(tmp_path), torch.float32, CPU).__enter__())
    assert "has shape (128, 64) but config.json asks for (200, 64)" in message


def test_no_config(tmp_path):
    assert "has no config.json" in refusal(lambda: Skeleton(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff", "", "{}", '{"model_type": 3}'])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{tmp_path}" in refusal(lambda: Skeleton(tmp_path))


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "no-such-model"},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"hidden_act": "no-such-function"},
        {"rope_scaling": {"rope_type": "no-such-type"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_config_that_describes_no_model(tmp_path, values):
    FAMILIES["llama"].save_pretrained(tmp_path)
    set_config(tmp_path, **values)
    refusal(lambda: Skeleton(tmp_path))


def test_a_model_that_is_no_causal_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "no causal language model" in refusal(lambda: Skeleton(tmp_path))


def test_code_beside_the_model_is_not_run(tmp_path):
    FAMILIES["llama"].save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    set_config(tmp_path, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    refusal(lambda: Skeleton(tmp_path))


def test_a_quantized_model_is_refused(tmp_path):
    FAMILIES["llama"].save_pretrained(tmp_path)
    set_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantized already; give the original model" in refusal(lambda: Skeleton(tmp_path))


def test_a_model_without_decoder_layers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "ctrl", "n_layer": 0, "n_embd": 8, "vocab_size": 16}')
    assert "no list of decoder layers" in refusal(lambda: Skeleton(tmp_path))


def test_blocks_that_share_keys_and_values_are_refused(tmp_path):
    values = {"model_type": "gemma3n_text", "num_kv_shared_layers": 2, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "2 blocks of this gemma3n_text model" in refusal(lambda: Skeleton(tmp_path))
