"""Equivalent transforms: exact in float64 for every family, in whatever dtype the norms are stored."""

import copy
import dataclasses

import pytest
import torch
from families import FAMILIES, VOCABULARY, WINDOW, WITHOUT_FILE, save_tiny
from torch import Tensor
from torch.utils._pytree import tree_map

from quantkit.calibrate.record import record
from quantkit.core.scheme import QuantScheme
from quantkit.model.block import Arguments, Block, Site
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.equivalence import Pair, find_pairs, fold, transform, transform_all
from quantkit.model.skeleton import Skeleton

CPU = torch.device("cpu")
MULTI_QUERY = "llama-mqa"
EVERY_FAMILY = [*FAMILIES, MULTI_QUERY]
DESCRIBED = [family for family in EVERY_FAMILY if family != WITHOUT_FILE]
ROTATED = ["llama", MULTI_QUERY, "qwen2", "gemma2", "cohere", "phi", "starcoder2"]
NOTHING_BEFORE = "nothing before {} can absorb a scale"
NO_QUERY_KEY = "query-key: no linears are known to make queries or keys alone, with only linear steps after them"
NORMED = "query-key: q_norm and k_norm in self_attn would undo a scale of queries and keys"


@dataclasses.dataclass
class Case:
    """The first block of a tiny model in float64, what reaches it, and its pairs."""

    block: Block
    hidden: Tensor
    arguments: Arguments
    pairs: list[Pair]
    skipped: list[str]

    @property
    def parameters(self):
        return dict(self.block.module.named_parameters())

    def output(self, changed=None):
        """Return what the block adds to its input, (sequences, tokens, width) float64.

        Norms and softmaxes that insist on float32 compute in float64 meanwhile.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return self.block.forward(self.hidden, self.arguments, changed) - self.hidden


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    built: dict[str, Case] = {}

    def build(family):
        if family not in built:
            directory = tmp_path_factory.mktemp(family)
            save_tiny(family, directory, config=multi_query_llama() if family == MULTI_QUERY else None)
            built[family] = open_block(directory)
        return built[family]

    return build


@pytest.fixture
def case(request, cases):
    return cases(request.param)


def multi_query_llama():
    config = copy.deepcopy(FAMILIES["llama"])
    config.num_key_value_heads = 1
    return config


def open_block(directory):
    skeleton, checkpoint = Skeleton(directory), Checkpoint(directory)
    tokens = torch.randint(3, VOCABULARY, (2, 2 * WINDOW + 3), generator=torch.Generator().manual_seed(1))
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):
        recording = record(skeleton, [tokens], CPU)
    module = skeleton.load_block(0, checkpoint, torch.float64, CPU)
    sites = [
        Site(
            name=skeleton.module_name(0, name),
            local_name=name,
            linear=module.get_submodule(name),
            group="",
            scheme=QuantScheme(),
            scale_dtype=torch.bfloat16,
        )
        for name in skeleton.block_linears(0)
    ]
    block = Block(index=0, name=skeleton.module_name(0, "").rstrip("."), module=module, sites=sites)
    arguments = recording.arguments[0][0]
    wide = Arguments(tree_map(to_double, arguments.args), tree_map(to_double, dict(arguments.kwargs)))
    pairs = find_pairs(module, skeleton.architecture, skeleton.config, let_down=True)
    return Case(block, recording.hidden[0].double(), wide, *pairs)


def to_double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def randoms(pairs, seed=0):
    """Return a random scale of each pair, lognormal with sigma 0.5, and a random shift where it can absorb one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    scales = {pair.name: (0.5 * normal(pair.size)).exp() for pair in pairs}
    return scales, {pair.name: normal(pair.size) for pair in pairs if pair.shift}


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_FAMILY, indirect=True)
def test_all_pairs_together_leave_the_output(case):
    changed = transform_all(case.pairs, case.parameters, *randoms(case.pairs))
    assert distance(case.output(changed), case.output()) < 1e-10
    assert {name.rpartition(".")[0] for name in changed} == {n for p in case.pairs for n in (p.source, *p.targets)}


@torch.no_grad()
@pytest.mark.parametrize("case", DESCRIBED, indirect=True)
def test_every_pair_alone_leaves_the_output_and_its_source_alone_does_not(case):
    scales, shifts = randoms(case.pairs)
    for pair in case.pairs:
        changed = transform(pair, case.parameters, scales[pair.name], shifts.get(pair.name))
        assert distance(case.output(changed), case.output()) < 1e-10, pair.name
        half = {name: value for name, value in changed.items() if name.startswith(f"{pair.source}.")}
        assert distance(case.output(half), case.output()) > 1e-3, pair.name


@torch.no_grad()
@pytest.mark.parametrize("case", ROTATED, indirect=True)
def test_rotated_channels_with_scales_of_their_own_break_the_block(case):
    pair = next(pair for pair in case.pairs if pair.kind == "query-key")
    channels, queries = len(pair.of_target), len(pair.of_source)
    head_dim = queries // 4
    untied = torch.arange(channels)
    repeated = untied.view(-1, head_dim).repeat_interleave(queries // channels, 0).flatten()
    broken = dataclasses.replace(pair, size=channels, of_source=repeated, of_target=untied)
    scales, _ = randoms([broken])
    assert distance(case.output(transform(broken, case.parameters, scales[pair.name])), case.output()) > 1e-3


@pytest.mark.parametrize("case", DESCRIBED, indirect=True)
def test_scales_and_shifts_get_gradients(case):
    scales, shifts = randoms(case.pairs)
    learned = [*scales.values(), *shifts.values()]
    for value in learned:
        value.requires_grad_()
    changed = transform_all(case.pairs, case.parameters, scales, shifts)
    torch.stack([value.square().sum() for value in changed.values()]).sum().backward()
    assert all((value.grad != 0).all() for value in learned)


def test_gradients_are_those_of_finite_differences():
    pair = Pair(name="p", kind="norm", source="n", targets=("a", "b"), size=4, shift=True, norm_offset=1.0)
    generator = torch.Generator().manual_seed(0)
    shapes = {"n.weight": 4, "n.bias": 4, "a.weight": (3, 4), "a.bias": 3, "b.weight": (2, 4), "b.bias": 2}
    parameters = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    free = [torch.rand(4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(lambda s, d: tuple(transform(pair, parameters, s + 0.5, d).values()), free)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "starcoder2", "phi", "gpt2"])
def test_what_rounding_a_norm_changes_is_made_up_for(cases, family, dtype):
    case = fresh(cases(family), dtype)
    norms = [pair for pair in case.pairs if pair.kind == "norm"]
    before = case.output()
    fold(norms, case.block, *randoms(norms))
    for pair in norms:
        weight = case.parameters[f"{pair.source}.weight"]
        assert torch.equal(weight, weight.to(dtype).double())
    # biases of linears are stored in 16 bits too, which nothing makes up for
    limit = 5e-3 if any(pair.shift for pair in norms) else 1e-10
    assert distance(case.output(), before) < limit


@torch.no_grad()
@pytest.mark.parametrize("case", DESCRIBED, indirect=True)
def test_folding_is_the_transform_where_nothing_is_rounded(case):
    case = fresh(case)
    before, drawn = case.output(), randoms(case.pairs)
    expected = transform_all(case.pairs, case.parameters, *drawn)
    expected = {name: value.clone() for name, value in expected.items()}
    fold(case.pairs, case.block, *drawn)
    assert all(distance(case.parameters[name], value) < 1e-10 for name, value in expected.items())
    assert distance(case.output(), before) < 1e-10
    assert case.block.changed == set(expected) - {f"{site.local_name}.weight" for site in case.block.sites}


@torch.no_grad()
def test_dense_linears_are_recorded_and_rounded_to_what_is_stored(cases):
    case = fresh(cases("llama"), torch.bfloat16)
    case.block.sites = [site for site in case.block.sites if not site.local_name.endswith("q_proj")]
    fold(case.pairs, case.block, *randoms(case.pairs))
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert case.block.changed == {"self_attn.q_proj.weight"} | norms
    dense = case.parameters["self_attn.q_proj.weight"]
    assert torch.equal(dense, dense.bfloat16().double())


@torch.no_grad()
def test_channels_that_no_stored_norm_could_hold_keep_their_weight(cases):
    case = fresh(cases("llama"), torch.float16)
    pair = case.pairs[0]
    weight = case.parameters[f"{pair.source}.weight"]
    weight[:2] = torch.tensor([0.0, 1.0])
    before, kept = case.output(), weight.clone()
    scale = torch.ones(pair.size, dtype=torch.float64)
    scale[:3] = torch.tensor([7.0, 1e9, 1e-9])
    fold([pair], case.block, {pair.name: scale})
    assert torch.equal(case.parameters[f"{pair.source}.weight"], kept)
    assert distance(case.output(), before) < 1e-10


def test_a_shift_without_biases_is_refused(cases):
    pair = cases("llama").pairs[0]
    with pytest.raises(AssertionError, match="attention cannot absorb a shift"):
        transform(pair, cases("llama").parameters, torch.ones(pair.size), torch.zeros(pair.size))


@pytest.mark.parametrize(
    ("family", "kinds", "skipped"),
    [
        ("llama", ["norm", "norm", "value", "query-key", "up"], []),
        ("qwen3", ["norm", "norm", "value", "up"], [NORMED]),
        ("gemma3", ["norm", "norm", "value", "up"], [NORMED]),
        (
            "olmo2",
            ["value", "up"],
            [
                f"attention: {NOTHING_BEFORE.format('self_attn.q_proj, self_attn.k_proj, self_attn.v_proj')}",
                f"mlp: {NOTHING_BEFORE.format('mlp.gate_proj, mlp.up_proj')}",
                NORMED,
            ],
        ),
        ("phi", ["norm", "value", "query-key"], [f"down: {NOTHING_BEFORE.format('mlp.fc2')}"]),
        (
            "falcon",
            ["norm"],
            [
                f"output: {NOTHING_BEFORE.format('self_attention.dense')}",
                f"down: {NOTHING_BEFORE.format('mlp.dense_4h_to_h')}",
                NO_QUERY_KEY,
            ],
        ),
        ("stablelm", [], ["all: no architecture file describes this family, so what absorbs a scale is not known"]),
    ],
)
def test_what_is_found_and_why_the_rest_is_not(cases, family, kinds, skipped):
    assert [pair.kind for pair in cases(family).pairs] == kinds
    assert cases(family).skipped == skipped


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"attention": 64, "mlp": 64, "output": 32, "query-key": 16, "down": 128}),
        (MULTI_QUERY, {"attention": 64, "mlp": 64, "output": 16, "query-key": 8, "down": 128}),
        ("cohere", {"input": 64, "output": 32, "query-key": 16, "down": 128}),
        ("phi", {"input": 64, "output": 64, "query-key": 48}),  # 4 heads: 4 rotated pairs and 8 others in each
        ("opt", {"attention": 64, "mlp": 64, "output": 64, "query-key": 64}),
    ],
)
def test_rotated_channels_and_heads_of_a_group_share_a_scale(cases, family, sizes):
    assert {pair.name: pair.size for pair in cases(family).pairs} == sizes


def test_up_is_asked_for(tmp_path):
    save_tiny("llama", tmp_path)
    skeleton = Skeleton(tmp_path)
    pairs, skipped = find_pairs(skeleton.blocks[0], skeleton.architecture, skeleton.config)
    assert [pair.kind for pair in pairs] == ["norm", "norm", "value", "query-key"]
    assert skipped == []


def fresh(case, dtype=torch.float64):
    """Return the case with a block of its own, whose parameters are values of `dtype` and stored in it."""
    block = copy.deepcopy(case.block)
    for value in block.module.parameters():
        value.data = value.to(dtype).double()
    block.dtypes = {name: dtype for name, _ in block.module.named_parameters()}
    return dataclasses.replace(case, block=block)
