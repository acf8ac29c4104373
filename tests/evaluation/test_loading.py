import shutil

import pytest
import torch
from families import edit_tensors, save_tiny, save_tokenizer
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils import logging

from quantkit.errors import ModelError, UsageError
from quantkit.evaluation.loading import load_model, pick_device


@pytest.fixture
def source(tmp_path):
    save_tiny("llama", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def settings():
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()


def test_loads_in_float32_for_judging(tiny_rtn_w4):
    model, tokenizer = load_model(tiny_rtn_w4, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size


def test_says_nothing_and_leaves_transformers_as_it_was(tiny_rtn_w4, capfd):
    before = settings()
    load_model(tiny_rtn_w4, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert settings() == before


def test_a_missing_tensor_is_never_made_up(source):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    before = settings()
    with pytest.raises(ModelError, match=f"has no tensor for {name}; the checkpoint is incomplete"):
        load_model(source, device="cpu")
    assert settings() == before


def test_a_tensor_of_another_shape_is_never_made_up(source):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors | {name: tensors[name][:3].clone()})
    with pytest.raises(ModelError, match=rf"{name} .* has shape \(3, 64\) but config.json asks for \(128, 64\)"):
        load_model(source, device="cpu")


def test_a_truncated_shard_is_one_line(source):
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated") as caught:
        load_model(source, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_packed_tensor_is_an_error(tiny_rtn_w4, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_rtn_w4, copy)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 5', '"num_hidden_layers": 6'))
    with pytest.raises(ModelError, match=r"has no tensor for model\.layers\.5\."):
        load_model(copy, device="cpu")


def test_unknown_models_and_devices_are_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "none")
    with pytest.raises(UsageError, match="unknown device"):
        load_model("tiny", device="toaster")
    with pytest.raises(UsageError, match="not supported"):
        pick_device("meta")
