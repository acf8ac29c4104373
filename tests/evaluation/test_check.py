"""An honest output passes, and a planted fault of each kind is told by a line that names it."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import ModelError, UsageError
from quantkit.evaluation import check as module
from quantkit.evaluation.check import check

INDEX = "model.safetensors.index.json"
LINEAR = "model.layers.2.mlp.up_proj"
NORM = "model.layers.2.input_layernorm.weight"


class Output:
    """A copy of a finished output that a test damages."""

    def __init__(self, path):
        self.path = path

    def read(self, name):
        return json.loads((self.path / name).read_text())

    def edit(self, name, change):
        document = self.read(name)
        change(document)
        (self.path / name).write_text(json.dumps(document))

    def shard_of(self, tensor):
        return self.path / self.read(INDEX)["weight_map"][tensor]

    def edit_shard(self, tensor, change, *, forge=False):
        """Change the tensors of the shard that holds `tensor`; with `forge` the report's hash follows."""
        shard = self.shard_of(tensor)
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
        if forge:
            self.forge(shard)

    def forge(self, shard):
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        self.edit("report.json", lambda report: report["sha256"].update({shard.name: digest}))

    def faults(self):
        return check(self.path, device="cpu").faults


@pytest.fixture
def output(tiny_rtn_w4, tmp_path):
    return Output(shutil.copytree(tiny_rtn_w4, tmp_path / "output"))


def assert_told(faults, *words):
    """One line holds all the words, and every fault is one line."""
    assert any(all(word in fault for word in words) for fault in faults), faults
    assert not any("\n" in fault for fault in faults)


def test_an_honest_output_passes(tiny_rtn_w4):
    said = []
    result = check(tiny_rtn_w4, device="cpu", progress=said.append)
    assert result.faults == ()
    facts = json.loads(json.dumps(result.facts, allow_nan=False))
    assert facts["quantized_share"] == 983040 / 1115520
    assert facts["bits_per_weight"] == 4.625
    assert facts["logit_difference"] < 0.2 * facts["logit_tolerance"]
    assert facts["bytes"] == 833840
    assert "reloading with transformers" in said


def test_against_the_original(tiny_rtn_w4):
    facts = check(tiny_rtn_w4, against="tiny", windows=4, seqlen=64, device="cpu").facts
    assert (facts["text"], facts["windows"], facts["seqlen"], facts["tokens"]) == (
        "embedded-test",
        4,
        64,
        252,
    )
    assert 0 < facts["kl"] < 0.1
    assert facts["top1_agreement"] > 0.9
    assert facts["perplexity"] == pytest.approx(facts["reference_perplexity"], rel=0.05)


def test_a_model_that_is_ruined_is_told_against_the_original(output):
    output.edit_shard(NORM, lambda tensors: tensors[NORM].mul_(-40))
    faults = check(output.path, against="tiny", windows=2, seqlen=64, device="cpu").faults
    assert_told(faults, "perplexity", "times the original's", "use more bits")


def test_a_missing_shard(output):
    shard = output.shard_of(NORM)
    shard.unlink()
    assert_told(output.faults(), f"the shard {shard.name} is missing")


def test_a_truncated_shard(output):
    shard = output.shard_of(NORM)
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert_told(output.faults(), shard.name, "truncated")


def test_a_flipped_bit(output):
    shard = output.shard_of(NORM)
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    assert_told(output.faults(), shard.name, "altered", "SHA-256")


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (0.0, "not positive"), (-1.0, "not positive")])
def test_a_bad_scale(output, value, words):
    name = f"{LINEAR}.weight_scale"
    output.edit_shard(name, lambda tensors: tensors[name][3].fill_(value), forge=True)
    assert_told(output.faults(), name, words)


def test_a_weight_that_is_infinite(output):
    output.edit_shard(NORM, lambda tensors: tensors[NORM][:2].fill_(torch.inf), forge=True)
    assert_told(output.faults(), NORM, "2 values", "infinite")


def test_a_tensor_in_two_shards(output):
    other = f"{LINEAR}.weight_packed"
    assert output.shard_of(other) != output.shard_of(NORM)
    output.edit_shard(other, lambda tensors: tensors.update({NORM: torch.ones(128)}), forge=True)
    assert_told(output.faults(), NORM, "in 2 shards")


def test_a_shard_that_is_not_in_the_index(output):
    save_file({NORM: torch.ones(128)}, output.path / "old.safetensors")
    faults = output.faults()
    assert_told(faults, "old.safetensors", "report does not know it")
    assert_told(faults, NORM, "in 2 shards")


def test_a_missing_tensor(output):
    output.edit_shard(NORM, lambda tensors: tensors.pop(NORM), forge=True)
    assert_told(output.faults(), f"the tensor {NORM} is missing")
    output.edit(INDEX, lambda index: index["weight_map"].pop(NORM))
    assert_told(output.faults(), f"the tensor {NORM} is missing")


def test_an_extra_tensor(output):
    output.edit_shard(NORM, lambda tensors: tensors.update(stowaway=torch.ones(2)), forge=True)
    faults = output.faults()
    assert_told(faults, "stowaway", "extra")
    assert_told(faults, "stowaway", "not in model.safetensors.index.json")


def test_another_dtype(output):
    output.edit_shard(NORM, lambda tensors: tensors.update({NORM: tensors[NORM].float()}), forge=True)
    assert_told(output.faults(), NORM, "dtype F32, not BF16")


def test_another_shape(output):
    output.edit_shard(NORM, lambda tensors: tensors.update({NORM: tensors[NORM][:64].clone()}), forge=True)
    faults = output.faults()
    assert_told(faults, NORM, "shape (64,), not (128,)")
    assert_told(faults, "cannot be loaded", NORM)


def test_another_layout_even_if_the_report_agrees(output):
    name = f"{LINEAR}.weight_scale"
    output.edit_shard(name, lambda tensors: tensors.update({name: tensors[name][:, :2].clone()}), forge=True)
    output.edit("report.json", lambda report: report["tensors"][name].__setitem__(1, [384, 2]))
    assert_told(output.faults(), name, "BF16 (384, 2)", "needs BF16 (384, 4)")


def test_a_recorded_shape_that_is_wrong(output):
    name = f"{LINEAR}.weight_shape"
    output.edit_shard(name, lambda tensors: tensors[name].copy_(torch.tensor([128, 384])), forge=True)
    assert_told(output.faults(), name, "(384, 128)")


def test_a_linear_that_was_left_dense(output):
    ends = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def unpack(tensors):
        for end in ends:
            del tensors[f"{LINEAR}.{end}"]
        tensors[f"{LINEAR}.weight"] = torch.zeros(384, 128, dtype=torch.bfloat16)

    shard = output.shard_of(f"{LINEAR}.weight_packed").name
    output.edit_shard(f"{LINEAR}.weight_packed", unpack, forge=True)
    output.edit(INDEX, lambda index: [index["weight_map"].pop(f"{LINEAR}.{end}") for end in ends])
    output.edit(INDEX, lambda index: index["weight_map"].update({f"{LINEAR}.weight": shard}))
    faults = output.faults()
    assert_told(faults, f"{LINEAR} should be quantized but is stored dense")
    assert_told(faults, "933888 parameters are quantized, but the report says 983040")


def test_codes_in_another_order(output):
    name = f"{LINEAR}.weight_packed"
    output.edit_shard(name, lambda tensors: tensors[name].copy_(tensors[name].flip(0)), forge=True)
    faults = output.faults()
    assert len(faults) == 1
    assert_told(faults, "logits differ from the calibrated ones")


def test_the_least_change_of_one_linears_scales(output):
    name = f"{LINEAR}.weight_scale"
    output.edit_shard(name, lambda tensors: tensors[name].view(torch.int16).add_(1), forge=True)
    assert_told(output.faults(), "logits differ from the calibrated ones")


@pytest.mark.parametrize("name", ["report.json", "check.json", "config.json", "recipe.toml", INDEX])
def test_a_broken_document(output, name, monkeypatch):
    monkeypatch.setattr(module, "_reload", lambda *_: (None, None))  # reading alone must tell
    for content in ("{ broken", "{}", "[]", "\0", "\udcff"):
        (output.path / name).write_text(content, errors="surrogateescape")
        assert_told(output.faults(), f"{name} is damaged")


@pytest.mark.parametrize("name", ["check.json", "config.json", "recipe.toml", INDEX])
def test_a_missing_document(output, name):
    (output.path / name).unlink()
    assert_told(output.faults(), f"{name} is missing")


def test_recorded_logits_that_do_not_fit(output):
    output.edit("check.json", lambda document: document["tokens"][0].__setitem__(0, 10**6))
    assert_told(output.faults(), "the recorded tokens cannot be run")
    output.edit("check.json", lambda document: document["tokens"].pop())
    assert_told(output.faults(), "check.json is damaged", "do not belong together")
    output.edit("check.json", lambda document: document["tokens"][0].__setitem__(0, 2**64))
    assert_told(output.faults(), "check.json is damaged")


def test_another_scheme(output):
    recipe = output.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("bits = 4", "bits = 3"))
    assert_told(output.faults(), "config.json", "w4a16g32", "recipe.toml", "w3a16g32")


def test_a_config_of_another_model(output):
    output.edit("config.json", lambda config: config.update(model_type="nonsense"))
    assert_told(output.faults(), "config.json describes no model")


def test_a_missing_tokenizer(output):
    (output.path / "tokenizer.json").unlink()
    assert_told(output.faults(), "no tokenizer")


@pytest.mark.parametrize("part", ["measured", "predicted"])
def test_a_wrong_total(output, part):
    output.edit("report.json", lambda report: report[part].update(output_bytes=833841))
    assert_told(output.faults(), part, "bytes", "833840", "833841")


def test_wrong_parameters_and_sites(output):
    output.edit("report.json", lambda report: report.update(parameters=1, sites=report["sites"][1:]))
    faults = output.faults()
    assert_told(faults, "1115520 parameters, but the report says 1")
    assert_told(faults, "layers.0.self_attn.q_proj is stored packed, but the report does not say")


def test_many_faults_of_one_kind_are_summed_up(output):
    output.edit("report.json", lambda report: report["tensors"].clear())
    faults = output.faults()
    assert_told(faults, "and 149 more faults like this", "extra")
    assert len(faults) == 4


def test_a_directory_that_quantkit_did_not_write(tmp_path):
    with pytest.raises(ModelError, match=r"no report\.json.*give one of these"):
        check(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        check(tmp_path / "none")


def test_refuses_what_cannot_be_asked(tiny_rtn_w4):
    with pytest.raises(UsageError, match="windows must be at least 1"):
        check(tiny_rtn_w4, windows=0)
    with pytest.raises(UsageError, match="longer than the model's context of 256"):
        check(tiny_rtn_w4, against="tiny", seqlen=257, device="cpu")
    with pytest.raises(ModelError, match="neither a directory nor an alias"):
        check(tiny_rtn_w4, against="nonsense", device="cpu")
    with pytest.raises(UsageError, match="unknown text"):
        check(tiny_rtn_w4, against="tiny", text="nonsense")
