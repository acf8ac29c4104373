import pytest
import torch
from families import VOCABULARY, WINDOW, save_tiny

from quantkit.calibrate.record import finish, record
from quantkit.errors import ModelError
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton

CPU = torch.device("cpu")


@pytest.fixture
def open_tiny(tmp_path):
    def build(family):
        model = save_tiny(family, tmp_path)
        return model, Skeleton(tmp_path), Checkpoint(tmp_path)

    return build


def tokens(batches, length=2 * WINDOW, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (2, length), generator=generator) for _ in range(batches)]


def attended(arguments):
    """Return how many tokens the last one of the first sequence sees."""
    mask = arguments.kwargs["attention_mask"]
    if mask is None:  # a causal mask needs no tensor
        return 2 * WINDOW
    row = mask[0, 0, -1]
    return int((row if row.dtype == torch.bool else row == 0).sum())


def recorded(skeleton, checkpoint, batches):
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):
        return record(skeleton, batches, CPU)


def test_hidden_states_are_the_embedded_tokens(open_tiny):
    model, skeleton, checkpoint = open_tiny("llama")
    batches = tokens(2)
    recording = recorded(skeleton, checkpoint, batches)
    for batch, hidden in zip(batches, recording.hidden, strict=True):
        assert torch.equal(hidden, model.model.embed_tokens(batch))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "olmo3"])
def test_blocks_with_sliding_and_full_attention_get_different_masks(open_tiny, family):
    _, skeleton, checkpoint = open_tiny(family)
    sliding, full = recorded(skeleton, checkpoint, tokens(1)).arguments[0]
    assert [attended(block) for block in (sliding, full)] == [WINDOW, 2 * WINDOW]


def test_equal_arguments_are_stored_once(open_tiny):
    _, skeleton, checkpoint = open_tiny("bloom")
    recording = recorded(skeleton, checkpoint, tokens(3))
    masks = [block.kwargs["attention_mask"] for batch in recording.arguments for block in batch]
    assert len(masks) == 6
    assert len({id(mask) for mask in masks}) == 1
    assert len({id(block) for batch in recording.arguments for block in batch}) == 1


def test_arguments_do_not_grow_with_the_samples(open_tiny):
    _, skeleton, checkpoint = open_tiny("gemma3_text")
    recording = recorded(skeleton, checkpoint, tokens(5))
    assert len({id(block) for batch in recording.arguments for block in batch}) == 2  # sliding and full


def test_the_blocks_have_their_own_forward_again(open_tiny):
    _, skeleton, checkpoint = open_tiny("llama")
    recorded(skeleton, checkpoint, tokens(1))
    assert not [block for block in skeleton.blocks if "forward" in vars(block)]


def test_the_blocks_have_their_own_forward_again_after_an_error(open_tiny):
    _, skeleton, checkpoint = open_tiny("llama")
    with pytest.raises(IndexError):
        recorded(skeleton, checkpoint, [torch.full((1, 4), VOCABULARY)])
    assert not [block for block in skeleton.blocks if "forward" in vars(block)]


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_finish_gives_the_logits_of_the_last_hidden_states_in_float32(open_tiny, family):
    model, skeleton, checkpoint = open_tiny(family)
    (batch,) = tokens(1)
    seen = []
    hook = model.get_submodule(skeleton.blocks_name)[-1].register_forward_hook(
        lambda _, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad(), skeleton.outer_weights(checkpoint, torch.float32, CPU):
        expected = model(input_ids=batch, use_cache=False).logits
        hook.remove()
        logits = finish(skeleton, batch, seen[0])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


REFUSAL = "model.layers of a llama model cannot be run one block at a time"


def test_a_model_that_does_not_return_hidden_states_is_refused(open_tiny, monkeypatch):
    _, skeleton, checkpoint = open_tiny("llama")
    monkeypatch.setattr(type(skeleton.model.model.norm), "forward", lambda self, hidden: hidden.flatten())
    with pytest.raises(ModelError, match=REFUSAL):
        recorded(skeleton, checkpoint, tokens(1))


class Doubling(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, **kwargs):
        return self.block(2 * hidden, **kwargs)


def test_a_model_that_computes_between_its_blocks_is_refused(open_tiny):
    _, skeleton, checkpoint = open_tiny("llama")
    skeleton.model.model.layers = torch.nn.ModuleList(
        [skeleton.blocks[0], Doubling(skeleton.blocks[1])]
    )  # the skeleton's own list still holds the blocks inside
    with pytest.raises(ModelError, match=REFUSAL):
        recorded(skeleton, checkpoint, tokens(1))


@pytest.mark.parametrize("order", [(1, 0), (0, 1, 0), (0,)], ids=["reversed", "twice", "left out"])
def test_a_model_that_does_not_call_each_block_once_in_order_is_refused(open_tiny, order):
    _, skeleton, checkpoint = open_tiny("llama")
    skeleton.model.model.layers = torch.nn.ModuleList([skeleton.blocks[index] for index in order])
    skeleton.model.config.num_hidden_layers = len(order)
    with pytest.raises(ModelError, match=REFUSAL):
        recorded(skeleton, checkpoint, tokens(1))
