"""Protections of scales: what each puts right, what it costs, and its file beside a checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import ModelError, QuantkitWarning, UsageError
from quantkit.model.checkpoint import Checkpoint
from quantkit.resilience import scale_file
from quantkit.resilience.flips import Fault, draw, generator, strike
from quantkit.resilience.scales import (
    SCALE_KINDS,
    Bits,
    guard_bits,
    guard_bytes,
    protect_scales,
    repair_scales,
)

CORRECTING = ("secded", "secded64", "copy")


def some_scales(rows=24, groups=20, dtype=torch.float16):
    return (torch.rand(rows, groups, generator=generator("scales")) * 0.02 + 0.005).to(dtype)


def same(left, right):
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


def flipped(scale, *numbers):
    damaged = scale.clone()
    strike(Bits(tensor=damaged, width=16), torch.tensor(numbers), Fault())
    return damaged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SCALE_KINDS)
def test_what_is_whole_stays_as_it_is(kind, dtype):
    scale = some_scales(7, 3, dtype)
    repaired = repair_scales(scale, protect_scales(scale, kind), kind)
    assert same(repaired.scale, scale)
    assert (repaired.corrected, repaired.replaced) == (0, 0)


@pytest.mark.parametrize("bit", range(16))
@pytest.mark.parametrize("kind", CORRECTING)
def test_any_single_flip_is_put_right(kind, bit):
    scale = some_scales()
    repaired = repair_scales(flipped(scale, 16 * 37 + bit), protect_scales(scale, kind), kind)
    assert same(repaired.scale, scale)
    assert (repaired.corrected, repaired.replaced) == (1, 0)


@pytest.mark.parametrize("bit", range(16))
def test_parity_replaces_a_scale_that_lost_a_bit_by_the_mean_of_its_neighbours(bit):
    scale = some_scales()
    repaired = repair_scales(flipped(scale, 16 * 37 + bit), protect_scales(scale, "parity"), "parity")
    expected = scale.clone()
    expected[1, 17] = (scale[1, 16].float() + scale[1, 18].float()) / 2
    assert same(repaired.scale, expected)
    assert (repaired.corrected, repaired.replaced) == (0, 1)


def test_a_clamped_scale_is_no_larger_than_any_was():
    scale = some_scales()
    guard = protect_scales(scale, "clamp")
    top, sign = flipped(scale, 14), flipped(scale, 15)
    assert float(repair_scales(top, guard, "clamp").scale[0, 0]) == float(scale.max())
    assert same(repair_scales(sign, guard, "clamp").scale, scale)
    assert (repair_scales(top, guard, "clamp").corrected, repair_scales(top, guard, "clamp").replaced) == (0, 1)


@pytest.mark.parametrize("kind", ["secded", "secded64"])
def test_two_flips_of_a_word_are_seen_and_replaced(kind):
    scale = some_scales()
    repaired = repair_scales(flipped(scale, 16 * 40 + 14, 16 * 40 + 3), protect_scales(scale, kind), kind)
    assert repaired.replaced == {"secded": 1, "secded64": 4}[kind]
    assert float(repaired.scale.max()) <= float(scale.max())


@pytest.mark.parametrize("kind", SCALE_KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_what_is_no_scale_never_comes_out(kind, value):
    scale = some_scales()
    guard, damaged = protect_scales(scale, kind), scale.clone()
    damaged[3, 5] = damaged[3, 6] = value
    repaired = repair_scales(damaged, guard, kind).scale
    assert (repaired.isfinite() & (repaired > 0)).all()
    assert float(repaired.max()) <= float(scale.max())


@pytest.mark.parametrize("kind", CORRECTING)
def test_flips_of_the_guard_itself_change_no_scale(kind):
    scale = some_scales()
    guard = protect_scales(scale, kind)
    for part in guard.values():
        bits = guard_bits(part, kind, scale.numel())
        for number in range(0, bits.total, 7):
            damage = strike(bits, torch.tensor([number]), Fault())
            assert same(repair_scales(scale, guard, kind).scale, scale), number
            damage.apply(bits.tensor)


@pytest.mark.parametrize("kind", SCALE_KINDS)
def test_many_flips_leave_scales_of_the_size_that_scales_have(kind):
    scale = some_scales(64, 64)
    damaged = scale.clone()
    bits = Bits(tensor=damaged, width=16)
    strike(bits, draw(bits.total, 1e-3, generator(1)), Fault())
    assert damaged.float().abs().max() > 10  # unprotected
    repaired = repair_scales(damaged, protect_scales(scale, kind), kind).scale
    assert (repaired.isfinite() & (repaired > 0)).all()
    assert (repaired.float() - scale.float()).abs().max() < 0.05


@pytest.mark.parametrize(
    ("kind", "bits"), [("clamp", 0.09), ("parity", 1), ("secded64", 2), ("secded", 6), ("copy", 16.5)]
)
def test_what_a_protection_takes_per_scale(kind, bits):
    scale = some_scales(32, 32)
    assert 8 * guard_bytes(protect_scales(scale, kind)) / scale.numel() == pytest.approx(bits, rel=0.1)


def test_scales_of_one_group_are_repaired_from_the_whole_tensor():
    scale = some_scales(12, 1)
    repaired = repair_scales(flipped(scale, 14), protect_scales(scale, "parity"), "parity").scale
    assert float(repaired[0, 0]) == pytest.approx(float(scale[1:].float().mean()), rel=1e-2)


@pytest.mark.parametrize(
    ("scale", "kind", "message"),
    [
        (some_scales(), "secdet", "did you mean secded"),
        (some_scales().float(), "secded", "of float32"),
        (-some_scales(), "secded", "not positive"),
    ],
)
def test_what_cannot_be_protected_is_refused(scale, kind, message):
    with pytest.raises(UsageError, match=message):
        protect_scales(scale, kind)


@pytest.fixture
def output(tiny_rtn_w4, tmp_path):
    return shutil.copytree(tiny_rtn_w4, tmp_path / "output")


def damage_file(directory, number=14):
    """Flip one bit of a scale tensor in the checkpoint's file; return the tensor's name and what it was."""
    checkpoint = Checkpoint(directory)
    name = next(name for name in checkpoint if name.endswith("down_proj.weight_scale"))
    shard = checkpoint.tensors[name].shard
    tensors = load_file(shard)
    before = tensors[name].clone()
    tensors[name] = flipped(before, number)
    save_file(tensors, shard, metadata={"format": "pt"})
    return name, before


@pytest.mark.parametrize("kind", CORRECTING)
def test_loading_repairs_scales_of_a_damaged_file_and_says_so(output, kind):
    whole = quantkit.load(output, device="cpu").state_dict()
    scale_file.write(output, kind)
    damage_file(output)
    with pytest.warns(QuantkitWarning, match="1 scales were damaged, 1 of them put right"):
        repaired = quantkit.load(output, device="cpu").state_dict()
    assert all(torch.equal(repaired[name], value) for name, value in whole.items())


def test_an_undamaged_checkpoint_loads_without_a_word(output, recwarn):
    scale_file.write(output, "secded")
    quantkit.load(output, device="cpu")
    assert not [each for each in recwarn if issubclass(each.category, QuantkitWarning)]


def test_the_protection_of_another_checkpoint_is_refused(output, tmp_path):
    other = tmp_path / "other"
    quantkit.quantize("tiny", output=other, method="rtn", wbits=3, group_size=32)
    scale_file.write(other, "secded")
    shutil.copytree(other / "resilience", output / "resilience")
    with pytest.raises(ModelError, match="protects another checkpoint"):
        quantkit.load(output, device="cpu")


def test_a_damaged_or_unknown_side_file_is_refused(output):
    path = scale_file.write(output, "parity")
    tensors = load_file(path)
    save_file(tensors, path, metadata={scale_file.KEY: "magic"})
    with pytest.raises(ModelError, match="'magic', which is not known"):
        quantkit.load(output, device="cpu")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged"):
        quantkit.load(output, device="cpu")


def test_the_file_lies_where_no_loader_of_others_looks(output):
    path = scale_file.write(output, "secded")
    assert path.parent == output / "resilience"
    assert path not in set(output.glob("*.safetensors"))


def test_nothing_is_written_for_what_is_not_packed(tmp_path):
    model = shutil.copytree(quantkit.resources.data_dir("model_zoo") / "tiny", tmp_path / "model")
    with pytest.raises(UsageError, match="no scales"):
        scale_file.write(model, "secded")
    assert not (model / "resilience").exists()


def test_the_command_protects_scales_alone_and_replaces_only_when_asked(output):
    command = ["protect", str(output), "--resilience", "none", "--scales"]
    made = CliRunner().invoke(app, [*command, "secded64", "--json"])
    assert json.loads(made.stdout)["kind"] == "secded64"
    before = scale_file.path_of(output).read_bytes()
    assert not (output / "resilience" / "bounds.safetensors").exists()
    for arguments, code, message in (
        (["secded"], 6, "replace the protection with --overwrite"),
        (["secd", "--overwrite"], 2, "did you mean secded"),
    ):
        refused = CliRunner().invoke(app, [*command, *arguments])
        assert refused.exit_code == code
        assert message in refused.stderr
        assert scale_file.path_of(output).read_bytes() == before
    replaced = CliRunner().invoke(app, [*command, "secded", "--overwrite"])
    assert replaced.exit_code == 0
    assert scale_file.read(output)[0] == "secded"
