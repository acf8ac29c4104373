"""Distillation from end to end: its loss and gradients, what it gains, and what it leaves alone."""

import copy
import math

import pytest
import torch
from families import VOCABULARY, save_tiny
from torch.func import functional_call
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM
from windows import make_engine

import quantkit
from quantkit.calibrate.data import evaluation_windows
from quantkit.calibrate.text import read_text
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.evaluation.check import check
from quantkit.evaluation.divergence import divergence
from quantkit.evaluation.loading import load_model
from quantkit.model.checkpoint import Checkpoint
from quantkit.pipeline import Silent
from quantkit.quantizers import distill
from quantkit.quantizers.distill import Distill
from quantkit.quantizers.omniquant import OmniQuant
from quantkit.quantizers.rtn import RoundToNearest
from quantkit.recipe import Calibration, Recipe
from quantkit.resources import data_dir
from quantkit.train.fit import FitResult

TINY = data_dir("model_zoo") / "tiny"
SCHEME = QuantScheme(bits=3, group_size=16)
BATCHES = torch.randint(3, VOCABULARY, (2, 2, 12), generator=torch.Generator().manual_seed(0)).unbind()
FAMILIES = ["llama", "gemma2", "gpt2", "opt-350m"]  # plain; capped logits and offset norms; Conv1D; projected, tied
TOKENS = torch.randint(3, 1024, (2, 24), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Make the directory and the model of a family, once."""
    made = {}

    def make(family):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            made[family] = directory, save_tiny(family, directory)
        return made[family]

    return make


def run(directory, step, scheme=SCHEME, batches=BATCHES, rounding=None):
    """Return the sites, the blocks' changed parameters by full name and the notes of a walk that ends with `step`."""
    engine = make_engine(directory, scheme, [rounding or RoundToNearest(), step], scale_dtype=torch.float16)
    blocks, notes = [], {}
    engine.run(list(batches), blocks.append, Silent(), notes)
    sites = [site for block in blocks for site in block.sites]
    changed = {f"{b.name}.{n}": p.detach() for b in blocks for n, p in b.module.named_parameters() if n in b.changed}
    return sites, changed, notes


def training(directory, monkeypatch, **options):
    """Return sites, names of norms, the factors, and per batch the loss and its gradients; nothing is learned."""
    seen, norms, factors = [], [], []

    def look(groups, loss, *, batches, **_):
        parameters = [parameter for group in groups for parameter in group.parameters]
        norms.append(len(groups[1].parameters) if len(groups) > 1 else 0)
        for place, parameter in enumerate(parameters):  # away from the start, where every factor is one
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
            factors.append(parameter.data.clone())
        for batch in range(batches):
            value = loss(batch)
            seen.append((value.item(), torch.autograd.grad(value, parameters)))
        for parameter in parameters:
            parameter.data.zero_()
        return FitResult()

    with monkeypatch.context() as patch:
        patch.setattr(distill, "fit", look)
        sites, changed, _ = run(directory, Distill(**options), batches=BATCHES)
    assert norms == [len(changed)]
    return sites, [*changed], factors, seen


def twin(model, sites, norms, factors, tokens):
    """Return KL(original || quantized) per token of the whole model and its gradients, by plain autograd in float64."""
    model = copy.deepcopy(model).double()
    own = dict(model.named_parameters())
    values, replaced = [factor.double().requires_grad_() for factor in factors], {}
    for site, factor in zip(sites, values[: len(sites)], strict=True):
        found = site.quantized
        steps = found.codes.double().unflatten(1, (found.scale.shape[1], -1)) - found.zero_point.double()[..., None]
        scale = found.scale.double() * (1 + factor)
        scale = scale + (scale.half().double() - scale).detach()  # as it is stored
        replaced[site.parameter] = (steps * scale[..., None]).flatten(1)
    for name, factor in zip(norms, values[len(sites) :], strict=True):
        replaced[name] = own[name].detach() * (1 + factor)
    with torch.no_grad():
        original = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    guess = functional_call(model, replaced, kwargs={"input_ids": tokens, "use_cache": False}).logits.log_softmax(-1)
    loss = kl_div(guess, original, reduction="none", log_target=True).sum(-1).mean()
    return loss.item(), torch.autograd.grad(loss, values)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_model(saved, monkeypatch, family):
    directory, model = saved(family)
    sites, norms, factors, seen = training(directory, monkeypatch)
    assert norms
    for tokens, (found, gradients) in zip(BATCHES, seen, strict=True):
        loss, expected = twin(model, sites, norms, factors, tokens)
        assert found == pytest.approx(loss, rel=1e-4)
        for one, other in zip(gradients, expected, strict=True):
            size = other.abs().max().item()
            assert size > 1e-7
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-3 * size)


def test_blocks_that_are_computed_again_give_the_same_gradients(saved, monkeypatch):
    directory, _ = saved("llama")
    *_, again = training(directory, monkeypatch)
    calls = []

    def at_once(function, *args, use_reentrant):
        calls.append(use_reentrant)
        return function(*args)

    monkeypatch.setattr(distill, "checkpoint", at_once)
    *_, kept = training(directory, monkeypatch)
    assert len(calls) == 2 * len(BATCHES)  # every block of every batch
    for (loss, gradients), (other, expected) in zip(again, kept, strict=True):
        assert loss == other
        assert all(torch.equal(one, two) for one, two in zip(gradients, expected, strict=True))


def test_the_divergence_of_two_known_distributions_is_the_closed_form():
    """With a head that is the identity, logits are the hidden states."""
    hidden, target = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(4))
    window = distill.Window(
        blocks=[],
        inputs=[hidden],
        references=[[target]],
        arguments=[[]],
        device=torch.device("cpu"),
        head=lambda batch, row, values: values,
    )
    leaf = hidden.clone().requires_grad_()
    loss = distill.divergence(window, 0, leaf)
    p, q = target.double().softmax(-1), hidden.double().softmax(-1)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(3 * loss, leaf)
    torch.testing.assert_close(gradient.double(), 3 * (q - p) / 6, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["w2g16", "w3g16s", "w4a8g16"])
def test_the_divergence_falls(saved, text):
    _, _, notes = run(saved("llama")[0], Distill(updates=16, lr=0.01, norms_lr=0.01), QuantScheme.parse(text))
    assert notes["divergence_after"] < 0.95 * notes["divergence_before"]
    assert len(notes["divergence"]) == 16 // len(BATCHES)


@pytest.fixture(scope="module", params=["rtn", "omniquant"])
def outputs(request, tmp_path_factory):
    """The embedded model at 2 bits, by one method alone and with distillation after it."""
    directory, made = tmp_path_factory.mktemp("distilled"), {}
    settings = {"omniquant": {"updates": 12, "aug_loss": False, "lwc_lr": 0.05, "rounding": True, "rounding_lr": 0.6}}
    text = Calibration(text="embedded", samples=32, seqlen=32, batch_size=8)
    scheme = QuantScheme(bits=2, group_size=32)
    for name, whole in (("alone", {}), ("distilled", {"distill": {"updates": 24, "lr": 3e-3, "norms_lr": 3e-3}})):
        passes = {request.param: settings.get(request.param, {}), **whole}
        recipe = Recipe(model="tiny", scheme=scheme, passes=passes, calibration=text)
        made[name] = quantkit.quantize(recipe, output=directory / name, device="cpu")
    return made


def test_the_model_is_closer_to_the_original_on_text_that_it_has_not_seen(outputs):
    original, tokenizer = load_model(TINY, device="cpu")
    rows = evaluation_windows(read_text("embedded-test"), tokenizer, seqlen=64, windows=12)
    alone, distilled = (
        divergence(load_model(outputs[name].output, device="cpu")[0], original, rows) for name in ("alone", "distilled")
    )
    assert distilled.kl < 0.95 * alone.kl
    assert distilled.perplexity < alone.perplexity


def test_only_scales_and_norms_change(outputs):
    alone, distilled = (Checkpoint(outputs[name].output) for name in ("alone", "distilled"))
    assert set(alone) == set(distilled)
    changed = set()
    for name in alone:
        before, after = alone.load([name])[name], distilled.load([name])[name]
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        if not torch.equal(before, after):
            changed.add(name.removesuffix(".weight").split(".")[-1])
    assert changed == {"weight_scale", "input_layernorm", "post_attention_layernorm"}


def test_it_passes_the_check_and_loads_in_transformers(outputs):
    output = outputs["distilled"].output
    assert check(output, device="cpu").faults == ()
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ours, _ = load_model(output, device="cpu")
    with torch.no_grad():
        found, expected = (model(input_ids=TOKENS, use_cache=False).logits for model in (loaded, ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_report_has_the_divergence_before_and_after(outputs):
    notes = outputs["distilled"].report["whole"]
    assert notes["divergence_after"] < notes["divergence_before"]
    assert all(math.isfinite(value) for value in notes["divergence"])


def decisions(sites):
    return [part for s in sites for part in (s.quantized.codes, s.quantized.scale, s.quantized.zero_point)]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_without_a_learning_rate_norms_stay(saved):
    directory, _ = saved("llama")
    plain, _, _ = run(directory, Distill(updates=0))
    sites, changed, notes = run(directory, Distill(updates=4, lr=0.01, norms_lr=0.0))
    assert changed == {}
    assert not same([site.quantized.scale for site in sites], [site.quantized.scale for site in plain])
    assert same([site.quantized.codes for site in sites], [site.quantized.codes for site in plain])
    assert notes["divergence_after"] < notes["divergence_before"]


def test_without_updates_everything_stays(saved):
    class Nothing:
        blocks_at_once = 0

        def apply(self, window):
            pass

    directory, _ = saved("llama")
    plain, _, _ = run(directory, Nothing())
    sites, changed, notes = run(directory, Distill(updates=0))
    assert (changed, notes) == ({}, {})
    assert same(decisions(sites), decisions(plain))


def test_two_runs_learn_the_same_and_the_order_of_batches_is_the_seeds(saved, monkeypatch):
    directory, _ = saved("llama")
    first, second = (run(directory, Distill(updates=4, lr=0.01)) for _ in range(2))
    assert same(decisions(first[0]), decisions(second[0]))
    assert same(first[1].values(), second[1].values())
    assert first[2] == second[2]


def test_a_loss_that_is_not_a_number_leaves_scales_and_norms(saved, monkeypatch):
    directory, _ = saved("llama")
    plain, _, _ = run(directory, Distill(updates=0))
    with monkeypatch.context() as patch:
        patch.setattr(distill, "divergence", lambda window, batch, hidden: hidden.sum() * math.nan)
        sites, changed, notes = run(directory, Distill(updates=4, lr=0.01))
    assert same(decisions(sites), decisions(plain))
    assert changed == {}
    assert notes["diverged"] == "in the first pass over the batches, so nothing was learned"


def test_norms_and_biases_that_a_transform_changed_are_learned_from_there(saved):
    """What another pass folded into the blocks stays folded: distillation starts there and ends nearby."""
    directory, _ = saved("llama")
    folding = OmniQuant(updates=8, let=True, lwc_lr=0.05)
    _, folded, _ = run(directory, Distill(updates=0), rounding=folding)
    _, changed, _ = run(directory, Distill(updates=4, lr=1e-3, norms_lr=1e-3), rounding=folding)
    original = Checkpoint(directory)
    assert changed.keys() == folded.keys() != set()
    for name, value in changed.items():
        before = original.load([name])[name]
        assert 0 < (value - folded[name]).norm() < 0.1 * (folded[name] - before).norm()


def test_fewer_bits_move_farther():
    rates = [Distill.for_scheme(QuantScheme(bits=bits)).lr for bits in range(2, 9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"updates": -1}, "updates must not be negative, not -1"),
        ({"lr": 0.0}, "lr must be positive and norms_lr at least 0, not 0.0 and 0.001"),
        ({"lr": math.nan}, "lr must be positive and norms_lr at least 0, not nan and 0.001"),
        ({"norms_lr": -0.1}, "lr must be positive and norms_lr at least 0, not 0.001 and -0.1"),
    ],
    ids=str,
)
def test_a_hyper_parameter_out_of_range_is_named(options, problem):
    with pytest.raises(UsageError) as caught:
        Distill(**options)
    assert str(caught.value).startswith(problem)


def test_it_needs_a_method_that_rounds(tmp_path):
    recipe = Recipe(model="tiny", passes={"distill": {}})
    with pytest.raises(UsageError, match=r"^nothing rounds: distill only improves what another method rounded; "):
        quantkit.quantize(recipe, output=tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_it_comes_after_rounding(tmp_path):
    with pytest.raises(UsageError, match=r"out of order: distill \(compensate\) → rtn \(round\)"):
        quantkit.quantize(Recipe(model="tiny", passes={"distill": {}, "rtn": {}}), output=tmp_path / "o", device="cpu")


FEW = {"wbits": 3, "group_size": 32, "calibration": "embedded", "samples": 4, "seqlen": 32, "device": "cpu"}
QUICK = {"updates": 0, "init": "nearest", "distill.updates": 4}


def distilled(output, **options):
    return quantkit.quantize("tiny", output=output, batch_size=2, options=QUICK | options, **FEW).report


def test_what_is_worse_than_before_is_undone_and_said(tmp_path):
    untouched = distilled(tmp_path / "untouched", **{"distill.updates": 0})
    worse = distilled(tmp_path / "worse", **{"distill.lr": 0.5, "norms_lr": 0.5})
    assert worse["sha256"] == untouched["sha256"]
    assert worse["whole"]["fallback"].startswith("scales and norms stay, because their divergence ")
    assert worse["whole"]["divergence_after"] == worse["whole"]["divergence_before"]


def test_what_is_better_is_kept(tmp_path):
    whole = distilled(tmp_path / "better", **{"distill.lr": 1e-3, "norms_lr": 1e-3})["whole"]
    assert whole["divergence_after"] < whole["divergence_before"]
    assert "fallback" not in whole


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    whole = distilled(tmp_path / "broken", **{"distill.lr": 1e30, "norms_lr": 1e30})["whole"]
    assert whole["diverged"] == "in the first pass over the batches, so nothing was learned"
    assert whole["divergence_after"] == whole["divergence_before"]
