"""End-to-end distillation: its loss and gradients against autograd through the whole model, and what it may change."""

import dataclasses
import math

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.calibrate.engine import Engine
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.pipeline import Silent
from quantkit.quantizers import distill
from quantkit.quantizers.distill import Distill
from quantkit.quantizers.rtn import RoundToNearest
from quantkit.recipe import Calibration, Recipe
from quantkit.resources import data_dir
from quantkit.train.fit import FitResult

CPU = torch.device("cpu")
TINY = data_dir("model_zoo") / "tiny"
BATCHES = torch.randint(3, 1024, (2, 2, 24), generator=torch.Generator().manual_seed(2)).unbind()
SCHEME = QuantScheme(bits=2, group_size=32)


@dataclasses.dataclass(frozen=True)
class Looking:
    """A pass over the whole model that calls `look` with its window."""

    look: object
    blocks_at_once: int = 0

    def apply(self, window):
        self.look(window)


def whole(look):
    """Let `look` see the window of the whole embedded model, rounded to nearest."""
    skeleton, checkpoint = Skeleton(TINY), Checkpoint(TINY)
    names = [skeleton.module_name(i, name) for i in range(len(skeleton.blocks)) for name in skeleton.block_linears(i)]
    engine = Engine(
        skeleton=skeleton,
        checkpoint=checkpoint,
        passes=[RoundToNearest(), Looking(look)],
        schemes=dict.fromkeys(names, SCHEME),
        scale_dtype=torch.float32,
        device=CPU,
    )
    engine.run(list(BATCHES), lambda block: None, Silent())


def twin(sites, factors):
    """Return the divergence of the first batch and its gradients, by autograd through the plain transformers model."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    weights = dict(model.named_parameters())
    values = [factor.detach().clone().requires_grad_() for factor in factors]
    changed = {}
    for site, factor in zip(sites, values, strict=False):
        q = site.quantized
        steps = q.codes.float().unflatten(1, (q.scale.shape[1], -1)) - q.zero_point.float().unsqueeze(-1)
        changed[site.parameter] = (steps * (q.scale * (1 + factor)).unsqueeze(-1)).flatten(1)
    norms = [name for name in weights if name.endswith("layernorm.weight")]
    for name, factor in zip(norms, values[len(sites) :], strict=True):
        value = weights[name] * (1 + factor)
        changed[name] = value + (value.bfloat16().float() - value).detach()  # norms are stored in 16 bits
    tokens = BATCHES[0]
    with torch.no_grad():
        target = model(tokens).logits.log_softmax(-1)
    guess = functional_call(model, changed, (tokens,)).logits.log_softmax(-1)
    value = torch.nn.functional.kl_div(guess, target, log_target=True, reduction="sum") / tokens.numel()
    return value.detach(), torch.autograd.grad(value, values)


def test_loss_and_gradients_are_those_of_autograd_through_the_whole_model(monkeypatch):
    seen = {}

    def look(groups, loss, **_):
        factors = [factor for group in groups for factor in group.parameters]
        for place, factor in enumerate(factors):
            noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(place))
            factor.data = 0.02 * noise
        value = loss(0)
        seen["loss"], seen["gradients"] = value.detach(), torch.autograd.grad(value, factors)
        seen["expected"] = twin(seen["window"].sites, factors)
        return FitResult()

    def apply(window):
        seen["window"] = window
        Distill().apply(window)

    monkeypatch.setattr(distill, "fit", look)
    whole(apply)
    expected, gradients = seen["expected"]
    torch.testing.assert_close(seen["loss"], expected, rtol=1e-4, atol=0)
    assert len(gradients) == len(seen["gradients"]) == 5 * 7 + 5 * 2
    for found, gradient in zip(seen["gradients"], gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found, gradient, rtol=1e-2, atol=1e-4 * gradient.abs().max().item())


def test_without_norms_they_stay_as_they_are():
    def look(window):
        before = {b.name: {n: p.clone() for n, p in b.module.named_parameters() if p.ndim == 1} for b in window.blocks}
        Distill(updates=2, norms_lr=0.0, lr=0.01).apply(window)
        for block in window.blocks:
            assert not block.changed
            assert all(torch.equal(block.module.get_parameter(n), p) for n, p in before[block.name].items())
        assert math.isfinite(window.notes["divergence_after"])

    whole(look)


def test_no_updates_leave_everything():
    def look(window):
        before = [site.quantized for site in window.sites]
        Distill(updates=0).apply(window)
        assert [site.quantized for site in window.sites] == before
        assert window.notes == {}

    whole(look)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The embedded model rounded to 2 bits, without and with distillation."""
    text = Calibration(text="embedded", samples=16, seqlen=64, batch_size=4)
    directory, made = tmp_path_factory.mktemp("distill"), {}
    for updates in (0, 24):
        passes = {"rtn": {}, "distill": {"updates": updates, "lr": 5e-3, "norms_lr": 5e-3}}
        recipe = Recipe(model="tiny", scheme=SCHEME, passes=passes, calibration=text)
        made[updates] = quantkit.quantize(recipe, output=directory / str(updates), device="cpu")
    return made


def test_the_divergence_falls(runs):
    notes = runs[24].report["whole"]
    assert notes["divergence_after"] < 0.7 * notes["divergence_before"]


def test_so_does_the_perplexity_of_text_that_was_not_seen(runs):
    judged = {n: quantkit.evaluate(run.output, text="embedded-test", seqlen=64, windows=12) for n, run in runs.items()}
    assert judged[24].perplexity < 0.95 * judged[0].perplexity


def test_codes_zero_points_and_sizes_stay_and_scales_and_norms_change(runs):
    plain, learned = (Checkpoint(run.output) for run in (runs[0], runs[24]))
    assert plain.tensors.keys() == learned.tensors.keys()
    changed = {name for name in plain if not torch.equal(plain.load([name])[name], learned.load([name])[name])}
    assert {name for name in plain if name.endswith("weight_scale")} <= changed
    assert {name for name in plain if name.endswith("layernorm.weight")} <= changed
    assert all(name.endswith(("weight_scale", "layernorm.weight")) for name in changed)


def test_the_output_is_the_ordinary_format(runs):
    assert quantkit.check(runs[24].output, device="cpu").faults == ()


def test_a_recipe_without_a_method_that_rounds_is_refused():
    with pytest.raises(UsageError, match="nothing rounds: distill only improves"):
        Recipe(model="tiny", passes={"distill": {}}).build_passes()


@pytest.mark.parametrize(("bits", "lr"), [(2, 3e-3), (3, 1e-3), (4, 3e-4), (8, 3e-4)])
def test_fewer_bits_move_farther(bits, lr):
    method = Distill.for_scheme(QuantScheme(bits=bits))
    assert (method.lr, method.norms_lr) == (lr, lr)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"updates": -1}, "updates must not be negative, not -1"),
        ({"lr": 0.0, "norms_lr": 0.1}, "lr must be positive and norms_lr at least 0, not 0.0 and 0.1"),
        ({"lr": 0.1, "norms_lr": -0.1}, "lr must be positive and norms_lr at least 0, not 0.1 and -0.1"),
        ({"lr": math.nan}, "lr must be positive"),
    ],
    ids=str,
)
def test_a_hyper_parameter_out_of_range_is_named(options, words):
    with pytest.raises(UsageError, match=words):
        Distill(**options)
