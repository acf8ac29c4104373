"""OmniQuant: what training gains, its paper's settings and loss, and what happens when it gains nothing."""

import dataclasses
import math

import pytest
import torch

import quantkit
from quantkit.calibrate.passes import Window
from quantkit.calibrate.record import record
from quantkit.calibrate.walk import rounded_to_nearest
from quantkit.core.affine import fake_quantize, group_bounds, round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.block import Block, Site
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.quantizers import omniquant
from quantkit.quantizers.omniquant import OmniQuant
from quantkit.resources import data_dir
from quantkit.train.fit import FitResult

CPU = torch.device("cpu")
TINY = data_dir("model_zoo") / "tiny"
SHARE = torch.tensor(4.0).sigmoid()  # 0.982014, what no updates leave of every range
FEW = {"calibration": "embedded", "samples": 4, "seqlen": 64, "group_size": 32, "device": "cpu"}
SCHEME = QuantScheme(bits=2, group_size=32)


def run(output, wbits, updates, *, samples=4, batch_size=1, **options):
    options = {"updates": updates, "aug_loss": False, "lwc_lr": 0.03} | options
    sizes = {"samples": samples, "batch_size": batch_size}
    return quantkit.quantize("tiny", method="omniquant", output=output, wbits=wbits, options=options, **FEW | sizes)


@pytest.fixture(scope="module", params=[2, 3], ids=["w2", "w3"])
def runs(request, tmp_path_factory):
    """The embedded model after 0 and after 48 updates."""
    directory = tmp_path_factory.mktemp("omniquant")
    return {updates: run(directory / str(updates), request.param, updates) for updates in (0, 48)}


@pytest.fixture(scope="module")
def opened():
    """Blocks of the embedded model, and hidden states and arguments that reach the first."""
    skeleton, checkpoint = Skeleton(TINY), Checkpoint(TINY)
    tokens = torch.randint(3, 1024, (1, 48), generator=torch.Generator().manual_seed(0))
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):
        recording = record(skeleton, [tokens], CPU)
    modules = [skeleton.load_block(index, checkpoint, torch.float32, CPU) for index in range(2)]
    return skeleton, modules, recording.hidden[0], recording.arguments[0]


@pytest.fixture
def window(opened):
    return make_window(opened, 1)


def make_window(opened, count):
    """Return a window of the first blocks, the actual stream a little off the reference."""
    skeleton, modules, hidden, arguments = opened
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    references, reference = [], hidden
    for index, module in enumerate(modules[:count]):
        reference = module(reference, **arguments[index].kwargs).detach()
        references.append([reference])
    window = Window(
        blocks=[make_block(skeleton, index, module) for index, module in enumerate(modules[:count])],
        inputs=[hidden + 0.05 * hidden.std() * noise],
        references=references,
        arguments=[arguments[:count]],
        device=CPU,
        fresh=count,
    )
    window.error_rtn = window.error(rounded_to_nearest(window.sites))
    return window


def make_block(skeleton, index, module):
    sites = [
        Site(
            name=f"block{index}.{name}",
            local_name=name,
            linear=module.get_submodule(name),
            group=skeleton.architecture.group_of(name),
            scheme=SCHEME,
            scale_dtype=torch.bfloat16,
        )
        for name in skeleton.block_linears(index)
    ]
    return Block(
        index=index,
        name=f"block{index}",
        module=module,
        sites=sites,
        architecture=skeleton.architecture,
        config=skeleton.config,
    )


def rounded(site):
    return round_to_nearest(site.weight, site.scheme, site.scale_dtype)


def is_plain_rounding(window):
    return all(torch.equal(site.quantized.codes, rounded(site).codes) for site in window.sites)


def learned(window):
    return {site.parameter: site.quantized.dequantize().float() for site in window.sites}


def errors(run, key="error"):
    return torch.tensor([block[key] for block in run.report["blocks"]])


def written(run, site):
    checkpoint = Checkpoint(run.output)
    ends = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    tensors = checkpoint.load([f"{site}.{end}" for end in ends])
    scheme = QuantScheme.parse(run.report["scheme"])
    return CompressedTensors().decode({end: tensors[f"{site}.{end}"] for end in ends}, scheme)


def test_training_gains_on_every_block(runs):
    assert (errors(runs[48]) < errors(runs[0])).all()


def test_training_beats_rounding_on_every_block(runs):
    assert (errors(runs[48]) < errors(runs[48], "error_rtn")).all()
    assert not any("fallback" in block["notes"] for block in runs[48].report["blocks"])


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


def test_two_runs_write_the_same_bytes(runs, tmp_path):
    first = runs[48]
    wbits = QuantScheme.parse(first.report["scheme"]).bits
    again = run(tmp_path / "again", wbits, 48)
    assert again.report["sha256"] == first.report["sha256"]
    assert errors(again).equal(errors(first))


def test_a_loss_that_is_not_a_number_falls_back_to_rounding(window, monkeypatch):
    forward = omniquant.WeightQuantizer.forward
    monkeypatch.setattr(omniquant.WeightQuantizer, "forward", lambda *given: forward(*given) * math.nan)
    OmniQuant(updates=2).apply(window)
    assert window.notes["fallback"] == "rtn, because training diverged"
    assert is_plain_rounding(window)


def test_what_is_worse_than_rounding_falls_back_to_it(window):
    OmniQuant(updates=2, lwc_lr=1e6).apply(window)
    assert "below the learned" in window.notes["fallback"]
    assert is_plain_rounding(window)


def test_a_divergence_is_in_the_report(tmp_path):
    report = run(tmp_path / "out", 3, 4, lwc_lr=1e6).report
    assert all(block["notes"]["fallback"].startswith("rtn, because") for block in report["blocks"])
    assert errors(quantkit.Quantized(output=tmp_path, report=report)).equal(
        torch.tensor([block["error_rtn"] for block in report["blocks"]])
    )


def test_training_keeps_what_it_learned(window):
    OmniQuant(updates=20, lwc_lr=0.03).apply(window)
    assert "fallback" not in window.notes
    assert not is_plain_rounding(window)
    assert window.error(learned(window)) < window.error_rtn


def test_training_leaves_the_weights_alone(window):
    before = {site.name: site.weight.clone() for site in window.sites}
    OmniQuant(updates=2).apply(window)
    assert all(torch.equal(site.weight, before[site.name]) for site in window.sites)


def initial_loss(method, window, monkeypatch):
    """Return the loss that the method's training starts with."""
    seen = []

    def look(groups, loss, **_):
        seen.append(loss(0).item())
        return FitResult()

    monkeypatch.setattr(omniquant, "fit", look)
    method.apply(window)
    return seen[0]


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "aug_loss"])
@torch.no_grad()
def test_the_loss_is_the_papers_formula(window, monkeypatch, augmented):
    module, arguments = window.blocks[0].module, window.arguments[0][0]
    (stream,), (target,) = window.inputs, window.targets
    original = module(stream, **arguments.kwargs)
    found = initial_loss(OmniQuant(aug_loss=augmented), window, monkeypatch)
    for site in window.sites:
        low, high = group_bounds(site.weight, SCHEME)
        monkeypatch.setattr(
            site.linear.weight,
            "data",
            fake_quantize(site.weight, low * SHARE, high * SHARE, SCHEME, scale_dtype=torch.bfloat16),
        )
    output = module(stream, **arguments.kwargs)
    expected = (target - output).square().mean() + augmented * (original - output).square().mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_aug_loss_changes_what_is_learned(window):
    scales = []
    for aug_loss in (False, True):
        OmniQuant(updates=10, aug_loss=aug_loss, lwc_lr=0.03).apply(window)
        scales.append(torch.cat([site.quantized.scale.flatten() for site in window.sites]))
    assert not torch.equal(*scales)


def test_ticks_reach_the_end(window):
    shares = []
    window.tick = shares.append
    OmniQuant(updates=4).apply(window)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_window_without_sites_is_left_alone(window):
    window.blocks[0].sites = []
    OmniQuant().apply(window)
    assert window.notes == {}


def test_a_divergence_after_good_updates_keeps_the_best_of_them(window, monkeypatch):
    """The tenth loss is not finite: what the best pass before it reached is kept, and the report says so."""
    step, calls = Window.step, []

    def poisoned(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return step(self, *args, **kwargs) * (math.nan if calls[-1] and sum(calls) == 10 else 1.0)

    monkeypatch.setattr(Window, "step", poisoned)
    OmniQuant(updates=20, lwc_lr=0.03).apply(window)
    assert window.notes == {"diverged": "after 9 passes over the batches, the best of which is kept"}
    assert window.error(learned(window)) < window.error_rtn


def test_learned_rounding_beats_clipping_and_moves_no_weight_beyond_its_neighbours(opened):
    found = {}
    for rounding in (False, True):
        window = make_window(opened, 1)
        OmniQuant(updates=40, lwc_lr=0.03, rounding=rounding, rounding_lr=0.02, schedule="linear").apply(window)
        found[rounding] = window.error(learned(window))
    assert found[True] < 0.8 * found[False]
    for site in window.sites:
        quantizer, codes = site.learned, site.quantized.codes
        offset, quantizer.offset = quantizer.offset, None
        assert 0 < (codes != quantizer.quantize().codes).float().mean() < 0.5
        assert (codes - quantizer.quantize().codes).abs().max() == 1
        assert offset.abs().max() <= 0.5


def test_learned_weights_beat_clipping(opened):
    found = {}
    for weights in (False, True):
        window = make_window(opened, 1)
        OmniQuant(updates=40, lwc_lr=0.03, weights=weights, weights_lr=0.02).apply(window)
        found[weights] = window.error(learned(window))
    assert found[True] < 0.8 * found[False]


@pytest.mark.parametrize("init", ["search", "gptq"])
def test_a_start_from_elsewhere_is_better_before_training(opened, init):
    found = {}
    for start in ("nearest", init):
        window = make_window(opened, 1)
        OmniQuant(updates=0, rounding=True, init=start).apply(window)
        found[start] = window.error(learned(window))
    assert found[init] < 0.8 * found["nearest"]


def test_blocks_that_learn_together_end_nearer_to_the_original(tmp_path):
    """Clipping of one block alone leaves an error that the next can only pass on (arXiv 2312.07950, section 3.2)."""
    one, two = (
        run(tmp_path / str(count), 2, 24, window=count, schedule="linear", lwc_lr=0.05, samples=8, batch_size=4)
        for count in (1, 2)
    )
    assert errors(two)[-1] < 0.9 * errors(one)[-1]


def test_a_block_that_stays_in_the_window_keeps_what_it_learned(opened):
    window = make_window(opened, 2)
    OmniQuant(updates=8, window=2, rounding=True).apply(window)
    kept = [site.learned for site in window.blocks[0].sites]
    codes = [site.quantized.codes for site in window.blocks[0].sites]
    OmniQuant(updates=0, window=2, rounding=True, init="gptq").apply(dataclasses.replace(window, fresh=0))
    assert [site.learned for site in window.blocks[0].sites] == kept
    assert all(torch.equal(site.quantized.codes, old) for site, old in zip(window.blocks[0].sites, codes, strict=True))


@pytest.mark.parametrize("bits", range(2, 9))
def test_settings_for_weights_alone_are_the_papers(bits):
    method = OmniQuant.for_scheme(QuantScheme(bits=bits))
    assert (method.updates, method.aug_loss) == (
        (5120, True) if bits == 2 else (2560, False)
    )  # 40 and 20 epochs of 128
    assert (method.lwc, method.lwc_lr, method.let) == (True, 1e-2, False)
    assert (method.window, method.rounding, method.weights, method.init) == (1, False, False, "nearest")
    assert method.updates_per_window == method.updates


@pytest.mark.parametrize(("text", "aug_loss"), [("w4a4", True), ("w4a8", False), ("w6a6", False), ("w8a8", False)])
def test_settings_with_activations_are_the_papers(text, aug_loss):
    method = OmniQuant.for_scheme(QuantScheme.parse(text))
    assert (method.updates, method.aug_loss) == (2560, aug_loss)
    assert (method.let, method.let_lr, method.alpha, method.let_down) == (True, 5e-3, 0.5, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("updates", -1),
        ("window", 0),
        *((rate, value) for rate in ("lwc_lr", "let_lr", "rounding_lr", "weights_lr") for value in (0.0, math.nan)),
        ("alpha", 1.5),
    ],
    ids=str,
)
def test_a_hyper_parameter_out_of_range_is_named(name, value):
    with pytest.raises(UsageError, match=f"^{name} must .* not {value!r}$"):
        OmniQuant(**{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": True, "weights": True}, "choose one"),
        ({"init": "gptq"}, "init gptq is a start for rounding or weights"),
        ({"init": "gptq", "rounding": True, "let": True}, "without let"),
        ({"lwc": False}, "nothing to learn"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        OmniQuant(**options)
