"""Bounds beside a checkpoint: three copies, whose checkpoint they are, and that loading applies them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import ModelError
from quantkit.evaluation.loading import load_model
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.resilience import side_file
from quantkit.resilience.bounds import unbounded
from quantkit.resilience.places import Bounds, attach, attached, detach, find_places, width_of

TOKENS = torch.arange(3, 40).reshape(1, -1)


def some_bounds(model, value=4.0, *, vectors=()):
    made = {}
    for place in find_places(model):
        shape = (width_of(model, place),) if place.block in vectors else ()
        made[place.name] = torch.full(shape, value) + 0.25 * (place.group == "block")
    return Bounds(thresholds=made, kind="hybrid", facts={"method": "by hand"})


@pytest.fixture
def output(tiny_rtn_w4, tmp_path):
    return shutil.copytree(tiny_rtn_w4, tmp_path / "output")


@pytest.fixture
def written(output):
    bounds = some_bounds(Skeleton(output, packed=True).model, vectors=(1,))
    side_file.write(output, bounds, Checkpoint(output))
    return output, bounds


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def assert_close(found, expected):
    # packed products round what they multiply, and clipping makes the difference larger
    assert (found - expected).abs().max() < 0.05 * expected.std()


def flip(directory, copies, at=100):
    """Flip the same bit in the copies numbered."""
    path = side_file.path_of(directory)
    tensors = load_file(path)
    for number in copies:
        tensors[f"copy.{number}"][at] ^= 4
    save_file(tensors, path)


def assert_same(found, expected):
    assert found.thresholds.keys() == expected.thresholds.keys()
    assert all(torch.equal(found.thresholds[name], value) for name, value in expected.thresholds.items())
    assert (found.form, found.kind, found.facts) == (expected.form, expected.kind, expected.facts)


def test_what_is_written_is_read(written):
    directory, bounds = written
    assert_same(side_file.read(directory, Checkpoint(directory)), bounds)
    assert [path.name for path in side_file.path_of(directory).parent.iterdir()] == ["bounds.safetensors"]


def test_a_vote_takes_each_bit_from_two_of_three():
    copies = [torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))] * 3
    damaged = [copy ^ (1 << number) for number, copy in enumerate(copies)]  # in all three, each in another bit
    assert torch.equal(side_file.vote(damaged), copies[0])
    assert not torch.equal(side_file.vote([damaged[0], damaged[0], copies[0]]), copies[0])


@pytest.mark.parametrize("number", range(3))
def test_a_copy_that_is_nothing_but_noise_is_outvoted(written, number):
    directory, bounds = written
    path = side_file.path_of(directory)
    tensors = load_file(path)
    tensors[f"copy.{number}"].random_(0, 256, generator=torch.Generator().manual_seed(number))
    save_file(tensors, path)
    assert_same(side_file.read(directory, Checkpoint(directory)), bounds)


def test_every_copy_may_be_damaged_where_the_others_are_not(written):
    directory, bounds = written
    for number in range(3):
        flip(directory, [number], at=50 + number)
    assert_same(side_file.read(directory, Checkpoint(directory)), bounds)


@pytest.mark.parametrize("at", [5, 60, -3])
def test_what_two_copies_lost_is_refused(written, at):
    directory, _ = written
    flip(directory, [0, 2], at)
    with pytest.raises(ModelError, match=r"damaged beyond what its three copies can repair .* quantkit protect"):
        quantkit.load(directory)


@pytest.mark.parametrize("damage", [b"", b"no safetensors at all", None])
def test_a_file_that_cannot_be_opened_is_refused(written, damage):
    directory, _ = written
    path = side_file.path_of(directory)
    path.write_bytes(path.read_bytes()[:400] if damage is None else damage)
    with pytest.raises(ModelError, match="damaged beyond"):
        quantkit.load(directory)


def test_the_bounds_of_another_quantization_of_the_model_are_refused(written, tmp_path):
    directory, _ = written
    other = tmp_path / "other"
    quantkit.quantize("tiny", output=other, method="rtn", wbits=4, group_size=64)
    shutil.copytree(directory / "resilience", other / "resilience")
    with pytest.raises(ModelError, match="has the bounds of another checkpoint"):
        quantkit.load(other)


def test_the_identity_does_not_depend_on_shards(output, tmp_path):
    checkpoint = Checkpoint(output)
    tensors = checkpoint.load(checkpoint)
    save_file(tensors, tmp_path / "model.safetensors")
    assert side_file.identity(Checkpoint(tmp_path)) == side_file.identity(checkpoint)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0, 0] *= 2
    save_file(tensors, tmp_path / "model.safetensors")
    found, expected = side_file.identity(Checkpoint(tmp_path)), side_file.identity(checkpoint)
    assert found != expected
    assert side_file.is_same(expected, found)  # a fault in a scale does not take the bounds away


def test_the_same_shapes_with_other_codes_are_another_checkpoint(output, tmp_path):
    text = {"calibration": "embedded", "samples": 2, "seqlen": 32}
    quantkit.quantize("tiny", output=tmp_path / "other", method="gptq", wbits=4, group_size=32, **text)
    one, other = (side_file.identity(Checkpoint(directory)) for directory in (output, tmp_path / "other"))
    assert one[:64] == other[:64]
    assert not side_file.is_same(one, other)


def test_nothing_is_left_where_writing_fails(output, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(side_file, "save_file", full)
    bounds = some_bounds(Skeleton(output, packed=True).model)
    with pytest.raises(quantkit.errors.OutputError, match="the disk is full"):
        side_file.write(output, bounds, Checkpoint(output))
    assert not (output / "resilience").exists()


def test_load_applies_bounds_and_plain_transformers_does_not(written):
    directory, bounds = written
    bare, bounded = quantkit.load(directory, bounds=False), quantkit.load(directory)
    assert attached(bounded).keys() == bounds.thresholds.keys()
    assert not attached(bare)
    dense, _ = load_model(directory)
    assert_close(logits(dense), logits(bare))
    assert (logits(bounded) - logits(bare)).abs().max() > 0.1
    attach(dense, bounds)
    assert_close(logits(dense), logits(bounded))
    with unbounded(list(attached(bounded).values())):
        assert torch.equal(logits(bounded), logits(bare))
    detach(bounded)
    assert torch.equal(logits(bounded), logits(bare))


@torch.no_grad()
def test_one_token_at_a_time_is_bounded_too(written):
    # blocks of a packed Llama compute single tokens in compiled code, which calls none of their linears
    directory, _ = written
    model = quantkit.load(directory)
    whole, cache, steps = logits(model), None, []
    for token in TOKENS.split(1, dim=1):
        result = model(token, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        steps.append(result.logits)
    assert_close(torch.cat(steps, dim=1), whole)


def test_a_nan_in_a_block_ends_at_its_bounds(written):
    directory, _ = written
    model, bare = quantkit.load(directory), quantkit.load(directory, bounds=False)
    for each in (model, bare):
        scale = each.model.layers[0].mlp.down_proj.packed["scale"]
        scale.view(-1)[7] = torch.nan
    assert logits(bare).isnan().all()
    assert logits(model).isfinite().all()


def test_attaching_twice_keeps_one_bound_in_each_place(written):
    directory, bounds = written
    model = quantkit.load(directory)
    attach(model, bounds)
    block = model.model.layers[0]
    assert len(block.mlp.down_proj._forward_pre_hooks) == len(block._forward_hooks) == 1
