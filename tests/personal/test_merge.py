"""`quantkit.merge`: the merged checkpoint computes what the delta did, in quantkit and in plain transformers."""

import hashlib
import json
import shutil

import pytest
import torch
from tinies import TEXTS, packed, write_rows

import quantkit
from quantkit.errors import DataError, ModelError, OutputError, UsageError
from quantkit.evaluation.loading import load_model
from quantkit.merging import merge
from quantkit.model.checkpoint import Checkpoint
from quantkit.personalization import personalize

QUICK = {"steps": 3, "validate_every": 1, "batch_size": 4, "device": "cpu", "lr": 0.02}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that gives a packed model of a family, and a delta of a kind for it."""
    found = {}

    def make(family, train, **options):
        where = tmp_path_factory.mktemp("made")
        if family not in found:
            found[family] = packed(family, where)
        texts = write_rows(where / "texts.jsonl", TEXTS)
        rate = {"lr": 1e-3} if train == "scales" else {}
        personalize(
            found[family], texts, output=where / "d.safetensors", train=train, options=options, **{**QUICK, **rate}
        )
        return found[family], where / "d.safetensors"

    return make


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 40).unsqueeze(0), use_cache=False).logits.float()


@pytest.mark.parametrize(
    ("family", "train", "options"),
    [
        ("llama", "bias", {}),
        ("llama", "bias", {"include": ("*.o_proj",)}),
        ("llama", "bias", {"include": ("*.down_proj", "*.up_proj")}),
        ("llama", "norm", {}),
        ("llama", "scales", {}),
        ("gpt2", "bias", {}),
        ("gpt2", "norm", {}),
        ("opt", "bias", {}),
        ("opt", "norm", {}),
        ("qwen2", "bias", {"include": ("*.q_proj",)}),
    ],
)
def test_the_merged_model_is_the_personalized_one(made, tmp_path, family, train, options):
    base, delta = made(family, train, **options)
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir() if path.is_file()}
    result = merge(base, delta, output=tmp_path / "merged")
    assert result.changed
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir() if path.is_file()}
    assert after == before
    own, merged = quantkit.load(base, device="cpu", delta=delta), quantkit.load(tmp_path / "merged", device="cpu")
    assert torch.equal(logits(merged), logits(own))
    plain, _ = load_model(tmp_path / "merged", device="cpu")
    unchanged, _ = load_model(base, device="cpu")
    difference = (logits(plain) - logits(own)).abs().max()
    assert difference < 0.05 * (logits(plain) - logits(unchanged)).abs().max()  # dense products round otherwise
    told = json.loads((tmp_path / "merged" / "personalization.json").read_text())
    assert told["train"] == train


def test_a_protection_does_not_come_along_and_that_is_said(made, tmp_path):
    base, delta = made("llama", "norm")
    protected = shutil.copytree(base, tmp_path / "protected")
    quantkit.protect_scales(protected, "parity")
    result = merge(protected, delta, output=tmp_path / "merged")
    assert result.notices == (f"the guards of scales of {protected} are not part of it; run quantkit protect on it",)
    assert not (tmp_path / "merged" / "resilience").exists()
    assert merge(base, delta, output=tmp_path / "other").notices == ()


def test_packed_codes_are_copied(made, tmp_path):
    base, delta = made("llama", "bias")
    merge(base, delta, output=tmp_path / "merged")
    old, new = Checkpoint(base), Checkpoint(tmp_path / "merged")
    for name in old:
        assert torch.equal(old.load([name])[name], new.load([name])[name])
    assert {name.rpartition(".")[2] for name in set(new) - set(old)} == {"bias"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["attention_bias"] is True


@pytest.mark.parametrize(
    ("family", "train", "message"),
    [
        ("llama", "soft-prompt", "soft-prompt cannot be merged: checkpoints have no place for virtual tokens"),
        ("llama", "lora", "lora cannot be merged: packed codes cannot hold"),
        ("qwen2", "bias", "models of the type qwen2 have no place for model.layers.0.mlp"),
    ],
)
def test_what_has_no_place_is_refused(made, tmp_path, family, train, message):
    base, delta = made(family, train)
    with pytest.raises(UsageError, match=message):
        merge(base, delta, output=tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_values_that_are_not_exact_are_refused_or_rounded(made, tmp_path, tiny_rtn_w4):
    texts = write_rows(tmp_path / "t.jsonl", TEXTS)
    personalize(tiny_rtn_w4, texts, output=tmp_path / "d.safetensors", **QUICK)
    with pytest.raises(UsageError, match=r"stored in bfloat16, in which .* of the learned values are not exact"):
        merge(tiny_rtn_w4, tmp_path / "d.safetensors", output=tmp_path / "merged")
    merge(tiny_rtn_w4, tmp_path / "d.safetensors", output=tmp_path / "merged", rounded=True)
    own = quantkit.load(tiny_rtn_w4, device="cpu", delta=tmp_path / "d.safetensors")
    merged = quantkit.load(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(logits(merged), logits(own), rtol=0, atol=0.05 * float(logits(own).std()))


def test_other_models_and_places_are_refused(made, tmp_path, tiny_rtn_w4):
    base, delta = made("llama", "norm")
    with pytest.raises(ModelError, match="made for another model"):
        merge(tiny_rtn_w4, delta, output=tmp_path / "merged")
    with pytest.raises(OutputError, match="holds the checkpoint"):
        merge(base, delta, output=base.parent, overwrite=True)
    with pytest.raises(OutputError, match="exists"):
        merge(base, delta, output=base.parent)


def test_a_damaged_delta_is_refused(made, tmp_path):
    base, delta = made("llama", "norm")
    (tmp_path / "short.safetensors").write_bytes(delta.read_bytes()[:-9])
    for name in ("short.safetensors", "absent.safetensors"):
        with pytest.raises(DataError):
            merge(base, tmp_path / name, output=tmp_path / "merged")
