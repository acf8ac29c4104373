import dataclasses

import pytest
import torch
from families import WITHOUT_FILE, save_tiny, save_tokenizer

import quantkit
from quantkit import costs, host
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.checkpoint import BYTES, Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.resources import data_dir
from quantkit.workload import workload

ALL = 10**15  # of the streams stays in memory
FEW = {"method": "rtn", "calibration": "embedded", "samples": 1, "seqlen": 16, "device": "cpu"}
SCHEMES = ["w2g32", "w3", "w3g64s", "w4g128", "w5s", "w8g32"]
WEIGHTS_OF_A_BLOCK = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384


def fields(text):
    scheme = QuantScheme.parse(text)
    return {"wbits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}


def stored_bytes(directory):
    return sum(BYTES[info.dtype] * info.elements for info in Checkpoint(directory).tensors.values())


@pytest.fixture(scope="module")
def plan():
    return quantkit.plan("tiny", wbits=4, group_size=32, device="cpu")


@pytest.mark.parametrize("text", SCHEMES)
def test_the_predicted_size_is_exactly_what_is_written(tmp_path, text):
    predicted = quantkit.plan("tiny", **FEW, **fields(text)).output_bytes
    result = quantkit.quantize("tiny", output=tmp_path / "out", **FEW, **fields(text))
    assert stored_bytes(result.output) == predicted
    assert result.report["measured"]["output_bytes"] == predicted
    assert result.report["predicted"]["output_bytes"] == predicted


@pytest.mark.parametrize("family", ["opt", "qwen2", "falcon"])
def test_the_predicted_size_of_other_families_in_float32(tmp_path, family):
    save_tiny(family, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    result = quantkit.quantize(tmp_path / "source", output=tmp_path / "out", group_size=32, **FEW)
    assert stored_bytes(result.output) == result.report["predicted"]["output_bytes"]


def test_the_model_is_described(plan):
    assert (plan.model_type, plan.architecture, plan.blocks) == ("llama", "llama", 5)
    assert (plan.seqlen, plan.samples) == (256, 128)
    assert plan.scale_dtype == torch.bfloat16
    assert plan.dense == ("lm_head",)


def test_every_linear_of_the_blocks_is_a_site(plan):
    assert len(plan.schemes) == len(plan.shapes) == 5 * 7
    assert plan.shapes["model.layers.4.mlp.down_proj"] == (128, 384)
    assert plan.quantized_parameters == 5 * WEIGHTS_OF_A_BLOCK
    assert plan.parameters == sum(info.elements for info in Checkpoint(data_dir("model_zoo") / "tiny").tensors.values())


def test_bits_per_weight_count_scales_and_zero_points(plan):
    assert plan.bits_per_weight == pytest.approx(4 + (16 + 4) / 32)


def test_predictions_grow_with_the_work(monkeypatch):
    monkeypatch.setattr(costs, "machine_speed", lambda device: costs.Speed(rate=1e10, sweep=1e-9, call=1e-6))
    small, large = (quantkit.plan("tiny", samples=n, group_size=32, device="cpu") for n in (16, 1024))
    assert 0 < small.memory_bytes < large.memory_bytes
    assert 0 < small.seconds < large.seconds
    assert small.device_bytes == large.device_bytes == 0


@pytest.mark.parametrize(("family", "widest"), [("llama", 128), ("gpt2", 128), ("bloom", 256)])
def test_second_moments_count_by_the_widest_input(monkeypatch, tmp_path, family, widest):
    save_tiny(family, tmp_path)
    save_tokenizer(tmp_path)
    seen = []
    monkeypatch.setattr(costs, "duration", lambda work, speed: seen.append(work) or 0.0)
    memory = []
    for method, expected in (("rtn", (0, 0)), ("gptq", (widest, 6))):
        seen.clear()
        memory.append(quantkit.plan(tmp_path, **FEW | {"method": method}, wbits=3, group_size=32).memory_bytes)
        assert (seen[-1].hessian, seen[-1].forwards) == expected  # those before are the presets'
    assert memory[0] <= memory[1]


def test_a_plan_computes_nothing(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the default text is not fetched either
    assert quantkit.plan(tmp_path, group_size=32, device="cpu").blocks == 2


@pytest.mark.parametrize(
    ("globs", "count"),
    [
        (["*.q_proj"], 5),
        (["model.layers.0.*"], 7),
        (["*.mlp.*", "*.layers.1.*"], 19),
        (["*.layers.[34].*"], 14),
    ],
    ids=str,
)
def test_ignored_linears_stay_dense(globs, count):
    plan = quantkit.plan("tiny", ignore=globs, group_size=32, device="cpu")
    assert len(plan.schemes) == 35 - count
    assert len(plan.dense) == count + 1
    assert not set(plan.dense) & set(plan.schemes)


def test_a_glob_that_matches_nothing_is_refused_with_an_example():
    with pytest.raises(UsageError) as caught:
        quantkit.plan("tiny", ignore=["*.q_proj", "*.query"], group_size=32)
    example = "names look like model.layers.0.self_attn.q_proj"
    assert str(caught.value) == f"--ignore '*.query' matches no linear of a block; {example}"


def test_nothing_left_to_quantize():
    with pytest.raises(UsageError, match=r"^--ignore excludes every linear, so nothing is left to quantize$"):
        quantkit.plan("tiny", ignore=["*"], group_size=32)


def test_a_group_size_that_does_not_divide_names_the_linear_its_width_and_sizes():
    with pytest.raises(UsageError) as caught:
        quantkit.plan("tiny", group_size=256)
    problem = "group size 256 does not divide the width 128; sizes that do: 16, 32, 64, 128"
    assert str(caught.value) == f"model.layers.0.self_attn.q_proj: {problem}"


def test_a_linear_of_another_width_may_be_ignored_instead():
    plan = quantkit.plan("tiny", group_size=384, ignore=["*attn*", "*.gate_proj", "*.up_proj"], device="cpu")
    assert {name.rpartition(".")[2] for name in plan.schemes} == {"down_proj"}


def test_a_sequence_longer_than_the_context():
    with pytest.raises(UsageError, match=r"^--seqlen 257 is longer than the model's context of 256$"):
        quantkit.plan("tiny", seqlen=257, group_size=32)


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        ("gpu", "unknown device 'gpu'; use cpu"),
        ("mps", "'mps' is not supported"),
        ("cuda:99", "there is no cuda:99"),
    ],
)
def test_a_device_that_cannot_be_used(device, problem):
    with pytest.raises(UsageError, match=problem):
        quantkit.plan("tiny", group_size=32, device=device)


def test_a_plan_says_when_a_part_of_what_vllm_fuses_stays_dense():
    (note,) = quantkit.plan("tiny", **FEW, group_size=32, ignore=["*.q_proj"]).notes
    assert "model.layers.0.self_attn.q_proj stays dense" in note
    assert quantkit.plan("tiny", **FEW, group_size=32, ignore=["*.self_attn.*"]).notes == ()


def test_a_plan_says_what_of_the_activations_is_out_of_reach_or_not_carried(tmp_path):
    save_tiny("falcon", tmp_path)
    notes = quantkit.plan(tmp_path, **FEW, group_size=32, abits=6).notes
    assert "in 2 of 2 blocks of falcon the attention is out of reach" in notes[0]
    assert "no runtime quantizes activations to 6 bits" in notes[1]
    assert quantkit.plan("tiny", **FEW, group_size=32, abits=6).notes == notes[1:]
    assert quantkit.plan(tmp_path, **FEW, group_size=32).notes == ()


def test_a_plan_says_when_no_file_describes_the_family(tmp_path):
    save_tiny(WITHOUT_FILE, tmp_path)
    (note,) = quantkit.plan(tmp_path, **FEW, group_size=32).notes
    assert f"no architecture file describes {WITHOUT_FILE}" in note


LEARN = {"group_size": 32, "calibration": "embedded", "samples": 8, "seqlen": 64, "device": "cpu"}


def sizes(**fields):
    """The workload of a run on the embedded model."""
    recipe = quantkit.make_recipe("tiny", **{key: value for key, value in (LEARN | fields).items() if key != "device"})
    return workload(Skeleton(data_dir("model_zoo") / "tiny"), recipe, torch.device("cpu"))


def test_windows_are_counted():
    one, two, all_five, more = (sizes(options={"window": n, "updates": 10}) for n in (1, 2, 5, 9))
    assert [work.updates for work in (one, two, all_five)] == [10, 10 * 2 * 4 / 5, 10]
    assert [work.streams for work in (one, two, all_five)] == [3, 4, 7]  # the start is kept for the whole model
    assert one.trained == WEIGHTS_OF_A_BLOCK + 2 * WEIGHTS_OF_A_BLOCK // 32
    assert (more, all_five.window) == (all_five, 5)


@pytest.mark.parametrize(
    ("fields", "larger"),
    [
        ({"options": {"window": 1}}, {"options": {"window": 2}}),
        ({"options": {"rounding": False}}, {"options": {"rounding": True}}),
        ({"method": "omniquant"}, {"options": {"rounding": False, "aug_loss": False}}),
        ({"options": {"window": 5}}, {"options": {"window": 5}, "batch_size": 8, "seqlen": 256}),
    ],
    ids=["window", "rounding", "whole", "batch"],
)
def test_memory_grows_with_what_is_held(monkeypatch, fields, larger):
    monkeypatch.setattr(host, "resident_memory", lambda: 0)
    small, large = (dataclasses.replace(sizes(**each), outer_parameters=0) for each in (fields, larger))
    assert costs.host_memory(small, ALL) < costs.host_memory(large, ALL)


@pytest.mark.parametrize(
    ("fields", "longer"),
    [
        ({"options": {"distill.updates": 0}}, {"options": {"distill.updates": 10}}),
        ({"options": {"updates": 10}}, {"options": {"updates": 20}}),
        ({"options": {"window": 1}}, {"options": {"window": 2}}),
        ({}, {"rotate": True}),
        ({"method": "rtn"}, {"method": "awq"}),
        ({"method": "rtn"}, {"method": "gptq"}),
    ],
    ids=["distilling", "updates", "window", "rotation", "awq", "gptq"],
)
def test_time_grows_with_what_is_done(fields, longer):
    speed = costs.Speed(rate=1e10, sweep=1e-9, call=1e-6)
    assert costs.duration(sizes(**fields), speed) < costs.duration(sizes(**longer), speed)


def test_the_presets_are_priced_and_the_chosen_one_is_marked():
    plan = quantkit.plan("tiny", **LEARN, preset="best", wbits=3)
    assert [cost.name for cost in plan.presets] == ["fast", "balanced", "best"]
    assert [cost.chosen for cost in plan.presets] == [False, False, True]
    assert plan.presets[2].seconds == plan.seconds
    assert all(cost.fits for cost in plan.presets)
    assert plan.refusal is None
    assert [cost.seconds for cost in plan.presets] == sorted(cost.seconds for cost in plan.presets)
    changed = quantkit.plan("tiny", **LEARN, preset="best", options={"updates": 7})
    assert not any(cost.chosen for cost in changed.presets)


def test_beside_a_method_that_learns_nothing_the_presets_are_priced_with_the_text_they_learn_from(monkeypatch):
    monkeypatch.setattr(costs, "machine_speed", lambda device: costs.Speed(rate=1e10, sweep=1e-9, call=1e-6))
    alone, beside, few = (
        quantkit.plan("tiny", group_size=32, device="cpu", **how)
        for how in ({"preset": "best"}, {"method": "rtn"}, {"method": "rtn", "samples": 16})
    )
    assert [cost.seconds for cost in beside.presets] == [cost.seconds for cost in alone.presets]
    assert few.presets[2].seconds < beside.presets[2].seconds


def test_a_plan_says_which_equivalent_transforms_are_skipped(tmp_path):
    save_tiny("llama", tmp_path / "llama")
    few = FEW | {"group_size": 32, "method": "omniquant"}
    assert quantkit.plan(tmp_path / "llama", **few, options={"let": True}).notes == ()
    save_tiny(WITHOUT_FILE, tmp_path / "other")
    first, second = quantkit.plan(tmp_path / "other", **few, options={"let": True}).notes
    assert "no architecture file describes" in first
    assert second.startswith("equivalent transforms skip all: no architecture file")
    assert len(quantkit.plan(tmp_path / "other", **few, options={"let": False}).notes) == 1
    save_tiny("falcon", tmp_path / "falcon")
    partly = quantkit.plan(tmp_path / "falcon", **few, options={"let": True}).notes
    assert partly
    assert all(note.startswith("equivalent transforms skip ") for note in partly)
    assert quantkit.plan(tmp_path / "falcon", **few | {"method": "awq"}).notes == partly
    assert quantkit.plan(tmp_path / "falcon", **few | {"method": "awq"}, options={"trials": 0}).notes == ()


def test_a_plan_says_when_a_window_is_larger_than_the_model():
    (note,) = quantkit.plan("tiny", **LEARN, options={"window": 9}).notes
    assert note == "omniquant gets windows of 5 blocks, all that there are, not 9"
    assert quantkit.plan("tiny", **LEARN, options={"window": 5}).notes == ()
