"""What the papers of the pruners claim, and what becomes of odd input."""

import networkx
import pytest
import torch
from transformers import AutoModelForCausalLM
from windows import make_window

import quantkit
from quantkit import methods
from quantkit.calibrate.gradients import gradient_samples, model_samples
from quantkit.core import masks
from quantkit.core.masks import Sparsity
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.pruners.magnitude import Magnitude
from quantkit.pruners.mfac import MFAC
from quantkit.pruners.random_graph import KINDS, RandomGraph, mask_of, random_graph
from quantkit.pruners.sparsegpt import SparseGPT
from quantkit.pruners.wanda import InputNorms, Wanda, scores
from quantkit.resources import data_dir

TINY = data_dir("model_zoo") / "tiny"
SCHEME = QuantScheme(bits=4, group_size=32)
BATCHES = list(torch.randint(0, 250, (4, 4, 24), generator=torch.Generator().manual_seed(0)))


def window(sparsity="0.5", *, only="", blocks=1):
    made = make_window(TINY, SCHEME, BATCHES, blocks=blocks)
    for site in made.sites:
        site.sparsity = Sparsity.parse(sparsity) if only in site.name else None
    return made


def test_wandas_scores_and_masks_are_the_sheets():
    weight = torch.tensor([[1, -0.2, 0.5, 0.05], [0.1, 0.4, -0.3, 0.2]])
    found = scores(weight, torch.tensor([0.1, 3, 1, 10]))
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.6, 0.5, 0.5], [0.01, 1.2, 0.3, 2]]))
    assert masks.choose(found, Sparsity.parse("2:4")).tolist() == [
        [False, True, False, True],
        [False, True, False, True],
    ]


def test_norms_are_those_of_all_tokens_however_they_come():
    inputs = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = InputNorms(), InputNorms()
    whole.add(inputs)
    for part in inputs.split(7):
        parts.add(part)
    torch.testing.assert_close(whole.value, inputs.norm(dim=0) / 30**0.5)
    torch.testing.assert_close(parts.value, whole.value)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_the_block_is_nearest_with_sparsegpt_then_wanda_then_magnitude(sparsity):
    errors = {}
    for method in (Magnitude(), Wanda(), SparseGPT()):
        made = window(sparsity)
        method.apply(made)
        errors[type(method).__name__] = made.error()
    assert errors["SparseGPT"] < errors["Wanda"] < errors["Magnitude"]


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_mfac_is_nearer_than_magnitude(sparsity):
    errors = {}
    for method in (Magnitude(), MFAC(gradients=48)):
        made = window(sparsity)
        method.apply(made)
        errors[type(method).__name__] = made.error()
    assert errors["MFAC"] < errors["Magnitude"]


def test_its_gradients_are_those_of_autograd():
    made = window()
    site = next(site for site in made.sites if "down_proj" in site.name)
    tokens = BATCHES[0].numel()
    samples = gradient_samples(made, [site], gradients=1, tokens=tokens)[site.name]
    weight = site.weight.detach().clone().requires_grad_()
    output = made.forward(0, {site.parameter: weight})
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad((output * noise).sum(), weight)
    found = samples.gradients(0, len(weight)).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert samples.mean_square() == pytest.approx(float(expected.square().mean()), rel=1e-3)


def test_the_mean_of_their_products_is_the_gauss_newton_matrix():
    """For the last linear of a block the output is linear in its weight, so that the matrix is known."""
    made = window()
    site = next(site for site in made.sites if "down_proj" in site.name)
    samples = gradient_samples(made, [site], gradients=384, tokens=1 << 20)[site.name]
    assert len(samples.inputs) == 384  # one token each
    rows = samples.gradients(0, 1)[:, :16]
    found = rows.T @ rows / len(rows)
    inputs = samples.inputs.flatten(0, 1)[:, :16]
    expected = inputs.T @ inputs / len(inputs)
    assert (found - expected).norm() < 0.5 * expected.norm()  # a sample of 384


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "mfac"])
def test_where_nothing_is_known_of_the_inputs_the_smallest_weights_go(name):
    made = window(only="gate_proj")
    made.inputs = [torch.full_like(hidden, torch.nan) for hidden in made.inputs]
    before = {site.name: site.weight.detach().clone() for site in made.sites}
    methods.find("pruners", name)().apply(made)
    (site,) = [site for site in made.sites if site.mask is not None]
    assert any(note.startswith("magnitude for") for note in made.notes)
    by_row = "row" if name == "wanda" else "matrix"
    assert site.mask.equal(masks.choose(before[site.name].abs(), site.sparsity, by_row))


def test_gradients_that_are_zero_leave_magnitudes():
    made = window(only="gate_proj")
    with torch.no_grad():
        for site in made.sites:
            if "down_proj" in site.name:
                site.weight.zero_()
    MFAC(gradients=8).apply(made)
    assert made.notes == {"magnitude for mlp.gate_proj": "the mean square of its gradients is 0"}


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_dead_inputs_are_reported_and_lose_their_weights_first(name):
    made = window(only="q_proj")
    norm = made.blocks[0].module.input_layernorm.weight
    with torch.no_grad():
        norm[:5] = 0
    methods.find("pruners", name)().apply(made)
    (site,) = [site for site in made.sites if site.mask is not None]
    assert not site.mask[:, :5].any()
    assert [value for note, value in made.notes.items() if note.startswith("dead inputs")] == [5]


def test_a_hessian_of_too_few_tokens_is_damped_and_reported():
    made = make_window(TINY, SCHEME, [BATCHES[0][:1, :4]])
    for site in made.sites:
        site.sparsity = Sparsity.parse("0.5")
    SparseGPT(damp=0.0).apply(made)
    assert any(note.startswith("damp of") for note in made.notes)
    assert all(site.weight.isfinite().all() for site in made.sites)


def test_a_window_prunes_what_is_new_in_it():
    made = window(blocks=2)
    made.fresh = 1
    Wanda().apply(made)
    assert [any(site.mask is not None for site in block.sites) for block in made.blocks] == [False, True]


def test_magnitudes_of_a_block_are_compared_with_each_other():
    made = window("0.5")
    before = torch.cat([site.weight.detach().abs().flatten() for site in made.sites])
    Magnitude(scope="global").apply(made)
    kept = torch.cat([site.mask.flatten() for site in made.sites])
    assert int((~kept).sum()) == round(0.5 * kept.numel())
    assert before[~kept].max() <= before[kept].min()
    assert len({int((~site.mask).sum()) / site.mask.numel() for site in made.sites}) > 1


def test_joint_rounding_prunes_to_codes_and_makes_up_for_both():
    apart, joint = window("2:4"), window("2:4")
    SparseGPT().apply(apart)
    SparseGPT(joint=True).apply(joint)
    methods.find("quantizers", "rtn")().apply(apart)
    errors = []
    for made in (apart, joint):
        assert all((site.quantized.dequantize()[~site.mask] == 0).all() for site in made.sites)
        errors.append(made.error({site.parameter: site.quantized.dequantize().float() for site in made.sites}))
    assert errors[1] < errors[0]
    for site in joint.sites:
        torch.testing.assert_close(site.quantized.dequantize().float(), site.weight.data, rtol=0, atol=1e-7)


def test_recovery_trains_what_stays_and_nothing_else():
    plain, trained = window("0.7"), window("0.7")
    Magnitude(sparsity=0.7).apply(plain)
    Magnitude(sparsity=0.7, recover=16).apply(trained)
    assert trained.error() < 0.9 * plain.error()
    for before, after in zip(plain.sites, trained.sites, strict=True):
        assert before.mask.equal(after.mask)
        assert (after.weight[~after.mask] == 0).all()
    assert trained.notes["recovery"]["error_after"] < trained.notes["recovery"]["error_before"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_graphs_are_connected_seeded_and_as_dense_as_they_can_be(kind, kept):
    graph = random_graph(kind, 40, kept, seed=3)
    again, other = random_graph(kind, 40, kept, seed=3), random_graph(kind, 40, kept, seed=4)
    assert networkx.is_connected(graph)
    assert set(graph.edges) == set(again.edges)
    assert set(graph.edges) != set(other.edges)
    density = (2 * graph.number_of_edges() + 40) / 40**2
    most = 0.5 if kind == "barabasi-albert" else 1.0  # m (n - m) edges are at most n^2 / 4
    assert density == pytest.approx(min(kept, most), abs=0.06)


def test_a_mask_keeps_what_a_graph_joins():
    graph = random_graph("watts-strogatz", 8, 0.4, seed=0)
    mask = mask_of(graph, (16, 24), Sparsity(share=1 - (2 * graph.number_of_edges() + 8) / 64))
    for out_node in range(8):
        for in_node in range(8):
            part = mask[2 * out_node : 2 * out_node + 2, 3 * in_node : 3 * in_node + 3]
            assert part.all() if out_node == in_node or graph.has_edge(out_node, in_node) else not part.any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Magnitude(scope="global", allocation="loss"), "both say what each linear loses"),
        (lambda: Wanda(scope="global"), "scope must be row or matrix"),
        (lambda: Wanda(sparsity="2:4", allocation="mfac"), "gives each linear its own share, but 2:4"),
        (lambda: SparseGPT(damp=-1.0), "give 0 or more"),
        (lambda: SparseGPT(block=0), "at least 1 column"),
        (lambda: MFAC(damp=0.0), "damp must be positive"),
        (lambda: MFAC(gradients=0), "gradients must be at least 1, not 0"),
        (lambda: RandomGraph(nodes=2), "nodes must be at least 3"),
        (lambda: RandomGraph(rewired=1.5), "is a probability"),
        (lambda: RandomGraph(recover=-1), "recover is a number of updates, not -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_gradients_of_the_models_loss_are_those_of_autograd():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval().requires_grad_(False)
    name = "model.layers.1.self_attn.v_proj"
    found = model_samples(model, [name], BATCHES[:1], gradients=1, tokens=1 << 20)[name]
    weight = model.get_submodule(name).weight.requires_grad_()
    logits = model(BATCHES[0]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), BATCHES[0][:, 1:].flatten(), reduction="sum")
    loss.backward()
    largest = float(weight.grad.abs().max())
    torch.testing.assert_close(
        found.gradients(0, len(weight)).view_as(weight), weight.grad, rtol=1e-3, atol=1e-4 * largest
    )


def test_mfac_prunes_by_the_models_loss(tmp_path, monkeypatch):
    options = {"gradients": 16, "block": 16, "recomputations": 2, "loss": "model"}
    text = {"calibration": "embedded", "samples": 4, "seqlen": 16, "device": "cpu"}
    report = quantkit.prune("tiny", method="mfac", options=options, output=tmp_path / "out", **text).report
    assert report["sparsity"]["share"] == 0.5
    assert not any(note.startswith("magnitude") for block in report["blocks"] for note in block["notes"])
    monkeypatch.setattr("quantkit.shares.free_memory", lambda: 1000)
    with pytest.raises(UsageError, match="loss=model needs the whole model and what reaches its linears"):
        quantkit.prune("tiny", method="mfac", options=options, output=tmp_path / "b", **text)
