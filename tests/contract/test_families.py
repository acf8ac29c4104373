"""Every family: streaming changes nothing, and its architecture file tells the truth."""

import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, FUSED_EXPERTS, HEADS, VOCABULARY, WINDOW, WITHOUT_FILE, save_tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.calibrate.record import Recording, finish, record
from quantkit.errors import ModelError
from quantkit.model.architecture import LinearGroup, architectures
from quantkit.model.block import Block
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import LINEARS, Skeleton

CPU = torch.device("cpu")
DESCRIBED = [family for family in FAMILIES if family != WITHOUT_FILE]
WITH_HEAD_NAMED_OTHERWISE = "gpt_neox"


@dataclass
class Case:
    model: PreTrainedModel
    skeleton: Skeleton
    checkpoint: Checkpoint
    batches: list[Tensor]
    recording: Recording

    def block(self, index):
        module = self.skeleton.load_block(index, self.checkpoint, torch.float32, CPU)
        return Block(index=index, name="block", module=module, sites=[])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Return a function from a family to its tiny model, opened and recorded once."""
    cases: dict[str, Case] = {}

    def build(family: str) -> Case:
        if family not in cases:
            directory = tmp_path_factory.mktemp(family)
            model = save_tiny(family, directory)
            skeleton, checkpoint = Skeleton(directory), Checkpoint(directory)
            generator = torch.Generator().manual_seed(1)
            batches = [torch.randint(3, VOCABULARY, (2, 2 * WINDOW + 3), generator=generator) for _ in range(2)]
            with skeleton.outer_weights(checkpoint, torch.float32, CPU):
                recording = record(skeleton, batches, CPU)
            cases[family] = Case(model, skeleton, checkpoint, batches, recording)
        return cases[family]

    return build


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_gives_the_whole_models_logits(case, family):
    tiny = case(family)
    hidden = list(tiny.recording.hidden)
    for index in range(len(tiny.skeleton.blocks)):
        block = tiny.block(index)
        hidden = [block.forward(h, tiny.recording.arguments[b][index]) for b, h in enumerate(hidden)]
    with tiny.skeleton.outer_weights(tiny.checkpoint, torch.float32, CPU):
        for tokens, last in zip(tiny.batches, hidden, strict=True):
            expected = tiny.model(input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(finish(tiny.skeleton, tokens, last), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_stays_empty_and_a_block_copy_is_full(case, family):
    tiny = case(family)
    assert all(value.is_meta for value in tiny.skeleton.model.parameters())
    for index in range(len(tiny.skeleton.blocks)):
        module = tiny.block(index).module
        tensors = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
        assert not [name for name, value in tensors.items() if value.is_meta]
        own = tiny.model.get_submodule(f"{tiny.skeleton.blocks_name}.{index}").state_dict()
        assert all(torch.equal(tensors[name], value) for name, value in own.items())


def test_every_model_type_and_every_file_has_a_tiny_model(case):
    used = {case(family).skeleton.architecture.name for family in DESCRIBED}
    assert used == {architecture.name for architecture in architectures()}
    known = {model_type for architecture in architectures() for model_type in architecture.model_types}
    assert known == {FAMILIES[family].model_type for family in DESCRIBED}


@pytest.mark.parametrize("family", DESCRIBED)
def test_one_file_describes_a_model(case, family):
    config = case(family).skeleton.model.config.to_dict()
    assert len([a for a in architectures() if a.describes(config)]) == 1


@pytest.mark.parametrize("family", DESCRIBED)
def test_a_file_names_the_blocks_and_every_linear_once(case, family):
    skeleton = case(family).skeleton
    groups = skeleton.architecture.groups
    assert skeleton.blocks_name == skeleton.architecture.blocks
    for index, block in enumerate(skeleton.blocks):
        named = Counter(linear for group in groups for linear in group.linears)
        assert named == Counter(list(skeleton.block_linears(index)))
        assert {group.after for group in groups} - {None} <= set(dict(block.named_modules()))
        attention = skeleton.architecture.attention
        assert attention is None or {attention.query, attention.key, attention.value} <= set(named)
    assert len({group.name for group in groups}) == len(groups)


@torch.no_grad()
@pytest.mark.parametrize("family", DESCRIBED)
def test_a_group_is_exactly_the_linears_with_one_input(case, family):
    tiny = case(family)
    seen: dict[str, Tensor] = {}
    block = tiny.block(0)
    for name in tiny.skeleton.block_linears(0):
        block.module.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].clone())
        )
    block.forward(tiny.recording.hidden[0], tiny.recording.arguments[0][0])
    group_of = tiny.skeleton.architecture.group_of
    for one, other in itertools.combinations(seen, 2):
        assert torch.equal(seen[one], seen[other]) == (group_of(one) == group_of(other)), (one, other)


def scalable_groups():
    for family in DESCRIBED:
        config = FAMILIES[family].to_dict()
        # the layer fills this in when it is built
        config["num_ln_in_parallel_attn"] = config.get("num_ln_in_parallel_attn") or 2
        groups = next(a for a in architectures() if a.describes(config)).groups
        yield from (pytest.param(family, g, id=f"{family}-{g.name}") for g in groups if g.after)


def divide_output(after: nn.Module, scale: Tensor, norm_offset: float) -> None:
    """Divide what `after` returns by `scale`, channel by channel."""
    if isinstance(after, LINEARS):
        after.weight.div_(scale[:, None])
    else:
        after.weight.copy_((after.weight + norm_offset) / scale - norm_offset)
    if getattr(after, "bias", None) is not None:
        after.bias.div_(scale)


def multiply_input(linear: nn.Module, scale: Tensor) -> None:
    """Multiply the weights that read input channel c of `linear` by scale[c]."""
    linear.weight.mul_(scale if isinstance(linear, nn.Linear) else scale[:, None])  # Conv1D holds (in, out)


def random_scale(after: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Return a scale of what `after` returns and of the `width` channels that it becomes.

    They differ where several query heads read the values of one key-value head.
    """
    produced = after.weight.shape[0]
    scale = torch.rand(produced, generator=torch.Generator().manual_seed(2)) + 0.5
    head_dim = width // HEADS
    return scale, scale.view(-1, head_dim).repeat_interleave(width // produced, 0).flatten()


@torch.no_grad()
@pytest.mark.parametrize(("family", "group"), list(scalable_groups()))
def test_after_absorbs_a_scale_of_the_groups_input(case, family, group: LinearGroup):
    tiny = case(family)
    inputs = tiny.recording.hidden[0], tiny.recording.arguments[0][0]
    block = tiny.block(0)
    linears = [block.module.get_submodule(name) for name in group.linears]
    after = block.module.get_submodule(group.after)
    width = linears[0].weight.shape[1 if isinstance(linears[0], nn.Linear) else 0]
    scale, repeated = random_scale(after, width)
    original = block.forward(*inputs)
    for linear in linears:
        multiply_input(linear, repeated)
    scaled = block.forward(*inputs)
    divide_output(after, scale, tiny.skeleton.architecture.norm_offset)
    change = (original - inputs[0]).norm()
    assert (scaled - original).norm() > 0.01 * change  # the scale matters
    assert (block.forward(*inputs) - original).norm() < 1e-5 * change


def added(tiny: Case, factors: dict[str, float]) -> Tensor:
    """Return what block 0 adds to its input while the output of each named linear is multiplied by its factor."""
    block, hidden = tiny.block(0), tiny.recording.hidden[0]
    for name, factor in factors.items():
        block.module.get_submodule(name).register_forward_hook(lambda _, inputs, output, factor=factor: output * factor)
    return block.forward(hidden, tiny.recording.arguments[0][0]) - hidden


@torch.no_grad()
@pytest.mark.parametrize("family", DESCRIBED)
def test_writes_are_the_linears_whose_outputs_a_block_adds(case, family):
    tiny = case(family)
    architecture = tiny.skeleton.architecture
    last = [linear for group in architecture.groups if group.name in ("output", "down") for linear in group.linears]
    assert architecture.writes in ((), tuple(last))
    nothing = dict.fromkeys(last, 0.0)
    for name in last:
        once, twice = added(tiny, nothing | {name: 1.0}), added(tiny, nothing | {name: 2.0})
        proportional = (twice - 2 * once).norm() < 1e-5 * once.norm()
        assert proportional == bool(architecture.writes), name
    if architecture.writes:
        assert not added(tiny, nothing).any()


def test_a_family_without_a_file_is_found_by_itself(case):
    skeleton = case(WITHOUT_FILE).skeleton
    assert skeleton.architecture is None
    assert skeleton.blocks_name == "model.layers"
    assert "self_attn.q_proj" in skeleton.block_linears(0)


def test_blocks_of_every_family_are_found_even_without_its_file(case, monkeypatch):
    monkeypatch.setattr("quantkit.model.architecture.find", lambda config: None)
    for family in FAMILIES:
        tiny = case(family)
        assert Skeleton(tiny.checkpoint.directory).blocks_name == tiny.skeleton.blocks_name


@pytest.mark.parametrize("family", FUSED_EXPERTS)
def test_fused_experts_are_refused_by_name(tmp_path, family):
    FUSED_EXPERTS[family].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"^{family} keeps weights in the 3-D parameter mlp\S+, as mixtures"):
        Skeleton(tmp_path)


def test_a_head_that_the_file_names_otherwise_is_loaded(case):
    tiny = case(WITH_HEAD_NAMED_OTHERWISE)
    assert "embed_out.weight" in tiny.checkpoint
    assert "lm_head.weight" not in tiny.checkpoint
    with tiny.skeleton.outer_weights(tiny.checkpoint, torch.float32, CPU):
        assert torch.equal(tiny.skeleton.model.lm_head.weight, tiny.model.lm_head.weight)
        outer = tiny.skeleton.outer_parameters().values()
        assert not any(value.is_meta for value in outer)
