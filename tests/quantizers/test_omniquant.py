"""OmniQuant as published: what training gains, what its loss is, and what happens when it gains nothing."""

import copy
import math

import pytest
import torch
from windows import kept_error, learned_by, make_window

import quantkit
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.checkpoint import Checkpoint
from quantkit.quantizers import omniquant
from quantkit.quantizers.omniquant import OmniQuant
from quantkit.resources import data_dir
from quantkit.train.fit import FitResult
from quantkit.train.trainables import WeightQuantizer

TINY = data_dir("model_zoo") / "tiny"
SHARE = torch.tensor(4.0).sigmoid()  # 0.982014, what no updates leave of every range
FEW = {"calibration": "embedded", "samples": 4, "seqlen": 64, "batch_size": 4, "group_size": 32, "device": "cpu"}
SCHEME = QuantScheme(bits=2, group_size=32)
BATCHES = torch.randint(3, 1024, (2, 2, 24), generator=torch.Generator().manual_seed(0)).unbind()
UPDATES = 12


def run(output, wbits, updates, **options):
    options = {"updates": updates, "aug_loss": False, "lwc_lr": 0.03, **options}
    return quantkit.quantize("tiny", output=output, method="omniquant", wbits=wbits, options=options, **FEW)


@pytest.fixture(scope="module", params=[2, 3], ids=["w2", "w3"])
def runs(request, tmp_path_factory):
    """The embedded model without an update and after some."""
    directory = tmp_path_factory.mktemp("omniquant")
    return {updates: run(directory / str(updates), request.param, updates) for updates in (0, UPDATES)}


@pytest.fixture
def window():
    return make_window(TINY, SCHEME, BATCHES, noise=0.05)


def rounded(site):
    return round_to_nearest(site.weight, site.scheme, site.scale_dtype)


def is_plain_rounding(window):
    return all(torch.equal(site.quantized.codes, rounded(site).codes) for site in window.sites)


def decisions(window):
    return [part for site in window.sites for part in (site.quantized.codes, site.quantized.scale)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def errors(run, key="error"):
    return torch.tensor([block[key] for block in run.report["blocks"]])


def written(run, site):
    checkpoint = Checkpoint(run.output)
    ends = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    tensors = checkpoint.load([f"{site}.{end}" for end in ends])
    scheme = QuantScheme.parse(run.report["scheme"])
    return CompressedTensors().decode({end: tensors[f"{site}.{end}"] for end in ends}, scheme)


def test_training_gains_on_every_block(runs):
    assert (errors(runs[UPDATES]) < errors(runs[0])).all()


def test_training_beats_rounding_on_every_block(runs):
    assert (errors(runs[UPDATES]) < errors(runs[UPDATES], "error_rtn")).all()
    assert not any(block["notes"] for block in runs[UPDATES].report["blocks"])


def test_the_start_beats_rounding_already(runs):
    assert errors(runs[0]).mean() < errors(runs[0], "error_rtn").mean()


def test_no_updates_are_rounding_between_shrunken_bounds_bit_for_bit(runs):
    source, levels = Checkpoint(TINY), 2 ** QuantScheme.parse(runs[0].report["scheme"]).bits - 1
    for site in runs[0].report["sites"]:
        groups = source.load([f"{site}.weight"], torch.float32)[f"{site}.weight"].unflatten(1, (-1, 32))
        low, high = SHARE * groups.amin(-1).clamp(max=0), SHARE * groups.amax(-1).clamp(min=0)
        scale = ((high - low) / levels).clamp(min=1e-5).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, levels)
        codes = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, levels)
        found, shift = written(runs[0], site), (levels + 1) // 2
        assert torch.equal(found.scale, scale)
        assert torch.equal(found.zero_point + shift, zero.to(torch.int8))
        assert torch.equal(found.codes + shift, codes.flatten(1).to(torch.int8))


def not_a_number_after(calls, monkeypatch):
    """Let every quantizer return nan after so many calls of all of them together."""
    forward, made = WeightQuantizer.forward, []

    def broken(self, weight=None):
        made.append(self)
        return forward(self, weight) * (math.nan if len(made) > calls else 1.0)

    monkeypatch.setattr(WeightQuantizer, "forward", broken)


def test_a_loss_that_is_not_a_number_falls_back_to_rounding(window, monkeypatch):
    not_a_number_after(0, monkeypatch)
    OmniQuant(updates=4).apply(window)
    assert window.notes == {"fallback": "rtn, because training diverged"}
    assert is_plain_rounding(window)


def test_a_later_divergence_keeps_the_best_pass_and_says_so(window, monkeypatch):
    OmniQuant(updates=len(BATCHES), lwc_lr=0.03).apply(window)
    kept = decisions(window)
    for site in window.sites:
        site.learned = None
    not_a_number_after((len(BATCHES) + 1) * len(window.sites), monkeypatch)
    OmniQuant(updates=20, lwc_lr=0.03).apply(window)
    assert window.notes == {"diverged": "in pass 2 over the batches; the best before it is kept"}
    assert same(decisions(window), kept)
    assert not is_plain_rounding(window)


@pytest.mark.parametrize("let", [False, True], ids=["lwc", "let"])
def test_what_is_worse_than_rounding_falls_back_to_it(window, let):
    module = window.blocks[0].module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = [rounded(site).codes for site in window.sites]
    OmniQuant(updates=2, lwc_lr=1e6, let=let, let_lr=10.0).apply(window)
    assert window.notes["fallback"].startswith("rtn, because its error ")
    assert "below the learned" in window.notes["fallback"]
    assert same([site.quantized.codes for site in window.sites], expected)
    assert window.blocks[0].changed == set()
    assert same(module.state_dict().values(), before.values())
    assert not any(site.learned for site in window.sites)


def test_a_fallback_is_in_the_report_and_its_error_is_that_of_rounding(tmp_path):
    result = run(tmp_path / "out", 3, 1, lwc_lr=1e6)
    assert all(block["notes"]["fallback"].startswith("rtn, because") for block in result.report["blocks"])
    assert errors(result).equal(errors(result, "error_rtn"))


def test_training_keeps_what_it_learned(window):
    OmniQuant(updates=20, lwc_lr=0.03).apply(window)
    assert window.notes == {}
    assert not is_plain_rounding(window)
    assert kept_error(window) < window.error_rtn


def test_what_is_trained_is_what_is_stored(window):
    OmniQuant(updates=6, lwc_lr=0.03).apply(window)
    for site in window.sites:
        assert torch.equal(learned_by(site)().to(site.scale_dtype), site.quantized.dequantize())


def test_training_leaves_the_weights_alone(window):
    before = {site.name: site.weight.clone() for site in window.sites}
    OmniQuant(updates=2).apply(window)
    assert all(torch.equal(site.weight, before[site.name]) for site in window.sites)
    assert window.blocks[0].changed == set()


def training(method, window, monkeypatch):
    """Return the arguments with which the method calls `fit`, and the losses of all batches there."""
    seen = []

    def look(groups, loss, **options):
        seen.append((groups, [loss(batch).item() for batch in range(options["batches"])], options))
        return FitResult()

    monkeypatch.setattr(omniquant, "fit", look)
    method.apply(window)
    (call,) = seen
    return call


def clipped(weight):
    """Return the weight at 2 bits in groups of 32 between shrunken bounds, scales in bfloat16, in float64."""
    groups = weight.double().unflatten(1, (-1, 32))
    low, high = SHARE.double() * groups.amin(-1, keepdim=True), SHARE.double() * groups.amax(-1, keepdim=True)
    h = ((high - low) / 3).float().bfloat16().double()
    z = (-low / h).round().clamp(0, 3)
    return (((groups / h).round() + z).clamp(0, 3) - z).mul(h).flatten(1)


@pytest.mark.parametrize("blocks", [1, 2], ids="window={}".format)
@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "aug_loss"])
@torch.no_grad()
def test_the_loss_is_the_papers_formula(monkeypatch, augmented, blocks):
    """Mean over batch, tokens and channels of the squared distance to F(W, X), and to F(W, X') with `aug_loss`.

    In a window of several blocks the first distance is taken behind each of them.
    """
    window = make_window(TINY, SCHEME, BATCHES, blocks=blocks, noise=0.05)
    students = [copy.deepcopy(block.module).double() for block in window.blocks]
    teachers = copy.deepcopy(students)
    for student, block in zip(students, window.blocks, strict=True):
        for site in block.sites:
            student.get_submodule(site.local_name).weight.copy_(clipped(site.weight))

    def outputs(modules, batch):
        hidden, made = window.inputs[batch].double(), []
        for place, module in enumerate(modules):
            kwargs = dict(window.arguments[batch][place].kwargs)
            kwargs["position_embeddings"] = tuple(part.double() for part in kwargs["position_embeddings"])
            hidden = module(hidden, **kwargs)
            made.append(hidden)
        return made

    _, found, _ = training(OmniQuant(aug_loss=augmented, window=blocks), window, monkeypatch)
    for batch, value in enumerate(found):
        made = outputs(students, batch)
        distances = [own[batch] - after for own, after in zip(window.references, made, strict=True)]
        if augmented:
            distances.append(outputs(teachers, batch)[-1] - made[-1])
        assert value == pytest.approx(sum(d.square().mean().item() for d in distances), rel=1e-5)


def test_aug_loss_changes_what_is_learned(window):
    scales = []
    for aug_loss in (False, True):
        for site in window.sites:
            site.learned = None
        OmniQuant(updates=10, aug_loss=aug_loss, lwc_lr=0.03).apply(window)
        scales.append(torch.cat([site.quantized.scale.flatten() for site in window.sites]))
    assert not torch.equal(*scales)


def test_ticks_reach_the_end(window):
    shares = []
    window.tick = shares.append
    OmniQuant(updates=4).apply(window)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_window_without_sites_is_left_alone(window):
    before = {name: value.clone() for name, value in window.blocks[0].module.state_dict().items()}
    window.blocks[0].sites = []
    OmniQuant(let=True).apply(window)
    assert window.notes == {}
    assert same(window.blocks[0].module.state_dict().values(), before.values())


def test_learning_rates_grow_with_the_root_of_the_batch(window, monkeypatch):
    method = OmniQuant(let=True, rounding=True, lwc_lr=0.1, let_lr=0.2, rounding_lr=0.3, updates=3)
    groups, _, _ = training(method, window, monkeypatch)
    assert [group.lr for group in groups] == pytest.approx([0.1 * 2**0.5, 0.2 * 2**0.5, 0.1])
    for site in window.sites:
        site.learned = None
    groups, _, _ = training(OmniQuant(lwc=False, weights=True, weights_lr=0.4), window, monkeypatch)
    assert [group.lr for group in groups] == pytest.approx([0.4 * 2**0.5])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_batches_are_shuffled_by_the_windows_seed_unless_the_schedule_is_constant(window, monkeypatch, schedule):
    window.seed = 7
    _, _, options = training(OmniQuant(schedule=schedule, updates=3), window, monkeypatch)
    generator = options["generator"]
    assert (options["schedule"], options["updates"], options["batches"]) == (schedule, 3, len(BATCHES))
    assert (generator and generator.initial_seed()) == (None if schedule == "constant" else 7)


@pytest.mark.parametrize(
    ("text", "updates", "let", "aug_loss"),
    [
        *((f"w{bits}", 2560, False, False) for bits in range(3, 9)),
        ("w2", 5120, False, True),
        ("w2g64", 5120, False, True),
        ("w4a4", 2560, True, True),
        ("w6a6", 2560, True, False),
        ("w4a8", 2560, True, False),
    ],
    ids=str,
)
def test_settings_are_the_papers(text, updates, let, aug_loss):
    expected = {"updates": updates, "let": let, "aug_loss": aug_loss, "lwc": True, "lwc_lr": 1e-2, "let_lr": 5e-3}
    expected |= {"alpha": 0.5, "window": 1, "let_down": False, "rounding": False, "weights": False, "init": "nearest"}
    expected |= {"schedule": "constant", "amp": False, "updates_per_window": updates, "blocks_at_once": 1}
    method = OmniQuant.for_scheme(QuantScheme.parse(text))
    assert {name: getattr(method, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("updates", -1), ("window", 0), ("alpha", -0.1), ("alpha", 1.1), ("alpha", math.nan)],
        *[(f"{part}_lr", value) for part in ("lwc", "let", "rounding", "weights") for value in (0.0, -0.01, math.nan)],
    ],
    ids=str,
)
def test_a_hyper_parameter_out_of_range_is_named(name, value):
    with pytest.raises(UsageError, match=f"^{name} must .* not {value!r}$"):
        OmniQuant(**{name: value})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rounding": True, "weights": True}, "rounding and weights both move the weights .*; choose one"),
        ({"init": "gptq"}, "init gptq is a start for rounding or weights, without let; leave it out otherwise"),
        ({"init": "gptq", "rounding": True, "let": True}, "init gptq is a start for .*, without let; .*"),
        ({"lwc": False}, "nothing to learn without lwc, let, rounding and weights; leave one on, or use method rtn"),
    ],
    ids=str,
)
def test_hyper_parameters_that_do_not_go_together_are_refused(options, problem):
    with pytest.raises(UsageError, match=f"^{problem}$"):
        OmniQuant(**options)


def test_without_an_update_nothing_need_be_learned(window):
    OmniQuant(lwc=False, updates=0).apply(window)
    assert is_plain_rounding(window)
