"""Faults in the stored bits of a packed model: what they change, that they are repaired, that all of it comes back."""

import shutil

import pytest
import torch
from packed import exact

import quantkit
from quantkit.core.qtensor import QuantizedTensor
from quantkit.errors import UsageError
from quantkit.model.checkpoint import Checkpoint
from quantkit.resilience import scale_file, side_file
from quantkit.resilience.bounds import clamp
from quantkit.resilience.flips import Fault
from quantkit.resilience.places import Bounds, attached, find_places
from quantkit.runtime.linear import PackedLinear
from quantkit.runtime.stored import open_stored

LINEAR = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(3, 40).reshape(1, -1)


@pytest.fixture
def output(tiny_rtn_w4, tmp_path):
    return shutil.copytree(tiny_rtn_w4, tmp_path / "output")


@torch.no_grad()
def logits(stored):
    return stored.model(TOKENS, use_cache=False).logits


def weight(stored, name=LINEAR) -> QuantizedTensor:
    module = stored.model.get_submodule(name)
    assert isinstance(module, PackedLinear)
    return module.unpack()


def test_every_target_of_the_checkpoint_is_there_and_has_its_bits(output):
    stored, checkpoint = open_stored(output, device="cpu"), Checkpoint(output)
    assert stored.targets() == ["codes", "scales", "zeros", "norms", "embeddings", "kv", "activations"]
    scales = [name for name, part in stored.parts.items() if part.target == "scales"]
    assert sorted(scales) == sorted(name for name in checkpoint if name.endswith("weight_scale"))
    assert all(stored.parts[n].bits.total == 16 * checkpoint.tensors[n].elements for n in scales)
    codes = sum(part.bits.total for part in stored.parts.values() if part.target == "codes")
    linears = [module for module in stored.model.modules() if isinstance(module, PackedLinear)]
    assert codes == 4 * sum(linear.in_features * linear.out_features for linear in linears)


def test_a_flipped_bit_of_a_code_changes_that_code_alone(output):
    stored = open_stored(output, device="cpu")
    before = weight(stored)
    stored.hit({f"{LINEAR}.weight_packed": torch.tensor([4 * 5 + 3])}, Fault())
    after = weight(stored)
    assert (after.codes != before.codes).nonzero().tolist() == [[0, 5]]
    assert abs(int(after.codes[0, 5]) - int(before.codes[0, 5])) == 8  # the highest of four bits
    assert torch.equal(after.scale, before.scale)


def test_a_flipped_bit_of_a_zero_point_moves_that_group_by_its_power(output):
    stored = open_stored(output, device="cpu")
    before = weight(stored)
    stored.hit({f"{LINEAR}.weight_zero_point": torch.tensor([4 * 2 + 1])}, Fault())
    changed = weight(stored).zero_point.int() - before.zero_point.int()
    assert changed.nonzero().tolist() == [[2, 0]]
    assert abs(int(changed[2, 0])) == 2


def test_the_top_bit_of_a_scale_multiplies_one_output_by_its_power_and_a_bound_holds_it(output):
    """The closed form of a single flip, of a bfloat16 scale: one row of one group, and nothing else."""
    stored = open_stored(output, device="cpu")
    before = weight(stored)
    linear = stored.model.get_submodule(LINEAR)
    inputs = torch.zeros(1, linear.in_features)
    inputs[0, 3] = 2.0
    clean = linear(inputs)
    stored.hit({f"{LINEAR}.weight_scale": torch.tensor([14])}, Fault())
    assert float(weight(stored).scale[0, 0]) == float(before.scale[0, 0]) * 2.0**128
    expected = exact(before)[:, 3] * 2.0
    expected[0] *= 2.0**128
    output = linear(inputs)[0]
    found = output.double()
    assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2 * float(clean.abs().max()))
    assert found[0].abs() > 1e30
    assert clamp(output, torch.tensor(3.0)).abs().max() == 3.0


@pytest.mark.parametrize("target", ["codes", "scales", "zeros", "norms", "embeddings"])
def test_all_of_it_comes_back_bit_for_bit(output, target):
    stored = open_stored(output, device="cpu")
    clean, before = stored.digest(), logits(stored)
    parts = {name: part.bits for name, part in stored.parts.items() if part.target == target}
    outcome = stored.hit({name: torch.arange(0, bits.total, 97) for name, bits in parts.items()}, Fault())
    assert sum(outcome.flips.values()) == sum(len(range(0, bits.total, 97)) for bits in parts.values())
    assert stored.digest() != clean
    assert not torch.equal(logits(stored), before)
    stored.restore()
    assert stored.digest() == clean
    assert torch.equal(logits(stored), before)


def test_unprotected_scales_break_the_model_and_secded_keeps_it_as_it_was(output):
    """One scale in each of many tensors loses its top exponent bit."""
    hits = {name: torch.tensor([14]) for name in Checkpoint(output) if name.endswith("weight_scale")}
    bare = open_stored(output, device="cpu")
    clean = logits(bare)
    assert not bare.hit(hits, Fault()).harmless
    worst = (logits(bare) - clean).abs().max()
    assert not worst.isfinite() or worst > 5 * clean.std()
    scale_file.write(output, "secded")
    guarded = open_stored(output, device="cpu")
    outcome = guarded.hit(hits, Fault())
    assert outcome.harmless
    assert (outcome.corrected, outcome.replaced) == (len(hits), 0)
    assert torch.equal(logits(guarded), clean)


def test_what_protects_is_hit_too(output):
    scale_file.write(output, "parity")
    stored = open_stored(output, device="cpu")
    clean, name = stored.digest(), f"{LINEAR}.weight_scale"
    before = weight(stored).scale.clone()
    outcome = stored.hit({f"{name}.parity": torch.tensor([1])}, Fault())
    assert outcome.replaced == 1  # a false alarm costs a scale
    changed = (weight(stored).scale != before).nonzero().tolist()
    assert changed == [[0, 1]]
    stored.restore()
    assert stored.digest() == clean


def test_a_bound_is_the_vote_of_its_copies(output):
    model = quantkit.load(output, device="cpu")
    bounds = Bounds(thresholds={place.name: torch.tensor(50.0) for place in find_places(model)})
    side_file.write(output, bounds, Checkpoint(output))
    stored = open_stored(output, device="cpu")
    name = next(iter(attached(stored.model)))
    part = stored.parts[f"{name}.bound"]
    assert part.bits.total == 3 * 32
    stored.hit({f"{name}.bound": torch.tensor([30])}, Fault())
    assert float(attached(stored.model)[name].threshold) == 50.0
    stored.restore()
    stored.hit({f"{name}.bound": torch.tensor([30, 32 + 30])}, Fault())
    assert float(attached(stored.model)[name].threshold) != 50.0
    stored.restore()
    assert float(attached(stored.model)[name].threshold) == 50.0


@pytest.mark.parametrize("target", ["kv", "activations"])
def test_values_that_pass_are_hit_in_every_forward_and_only_inside_the_context(output, target):
    stored = open_stored(output, device="cpu")
    clean = logits(stored)
    with stored.passing.faulty((target,), 0.0, Fault(), 0, 0):
        assert torch.equal(logits(stored), clean)
    lost = Fault(kind="stuck0")  # values become smaller, and none becomes NaN
    with stored.passing.faulty((target,), 1e-3, lost, 0, 0):
        first, second = logits(stored), logits(stored)
    with stored.passing.faulty((target,), 1e-3, lost, 0, 0):
        again = logits(stored)
    assert first.isfinite().all()
    assert len({tuple(found.flatten()[:5].tolist()) for found in (clean, first, second)}) == 3
    assert torch.equal(first, again)
    assert torch.equal(logits(stored), clean)


def test_what_is_not_packed_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not packed by compressed-tensors"):
        open_stored(quantkit.resources.data_dir("model_zoo") / "tiny")
