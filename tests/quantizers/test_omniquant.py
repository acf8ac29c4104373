"""Learnable weight clipping: what training gains, and what happens when it gains nothing."""

import math

import pytest
import torch

import quantkit
from quantkit.calibrate.passes import Window
from quantkit.calibrate.record import record
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
SHARE = torch.tensor(4.0).sigmoid()  # 0.982014, what epochs=0 leaves of every range
FEW = {"calibration": "embedded", "samples": 4, "seqlen": 64, "group_size": 32, "device": "cpu"}
SCHEME = QuantScheme(bits=2, group_size=32)


def run(output, wbits, epochs, **fields):
    options = {"epochs": epochs, "aug_loss": False, "lwc_lr": 0.03}
    return quantkit.quantize("tiny", output=output, wbits=wbits, options=options, **(FEW | fields))


@pytest.fixture(scope="module", params=[2, 3], ids=["w2", "w3"])
def runs(request, tmp_path_factory):
    """The embedded model after 0 and after 12 epochs."""
    directory = tmp_path_factory.mktemp("omniquant")
    return {epochs: run(directory / str(epochs), request.param, epochs) for epochs in (0, 12)}


@pytest.fixture(scope="module")
def block():
    """The first block of the embedded model, and hidden states and arguments that reach it."""
    skeleton, checkpoint = Skeleton(TINY), Checkpoint(TINY)
    tokens = torch.randint(3, 1024, (1, 48), generator=torch.Generator().manual_seed(0))
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):
        recording = record(skeleton, [tokens], CPU)
    module = skeleton.load_block(0, checkpoint, torch.float32, CPU)
    return module, list(skeleton.block_linears(0)), recording.hidden[0], recording.arguments[0][0]


@pytest.fixture
def window(block):
    module, names, hidden, arguments = block
    sites = [
        Site(
            name=f"block.{name}",
            local_name=name,
            linear=module.get_submodule(name),
            group=name,
            scheme=SCHEME,
            scale_dtype=torch.bfloat16,
        )
        for name in names
    ]
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    window = Window(
        blocks=[Block(index=0, name="block", module=module, sites=sites)],
        inputs=[hidden + 0.05 * hidden.std() * noise],
        targets=[module(hidden, **arguments.kwargs)],
        arguments=[[arguments]],
        device=CPU,
    )
    window.error_rtn = window.error({site.name: rounded(site).dequantize().float() for site in sites})
    return window


def rounded(site):
    return round_to_nearest(site.weight, site.scheme, site.scale_dtype)


def is_plain_rounding(window):
    return all(torch.equal(site.quantized.codes, rounded(site).codes) for site in window.sites)


def errors(run, key="error"):
    return torch.tensor([block[key] for block in run.report["blocks"]])


def written(run, site):
    checkpoint = Checkpoint(run.output)
    ends = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    tensors = checkpoint.load([f"{site}.{end}" for end in ends])
    scheme = QuantScheme.parse(run.report["scheme"])
    return CompressedTensors().decode({end: tensors[f"{site}.{end}"] for end in ends}, scheme)


def test_training_gains_on_every_block(runs):
    assert (errors(runs[12]) < errors(runs[0])).all()


def test_training_beats_rounding_on_every_block(runs):
    assert (errors(runs[12]) < errors(runs[12], "error_rtn")).all()
    assert not any("fallback" in block["notes"] for block in runs[12].report["blocks"])


def test_no_epochs_are_rounding_between_shrunken_bounds_bit_for_bit(runs):
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
    first = runs[12]
    wbits = QuantScheme.parse(first.report["scheme"]).bits
    again = run(tmp_path / "again", wbits, 12)
    assert again.report["sha256"] == first.report["sha256"]
    assert errors(again).equal(errors(first))


def test_a_loss_that_is_not_a_number_falls_back_to_rounding(window, monkeypatch):
    monkeypatch.setattr(omniquant, "fake_quantize", lambda weight, *_: weight * math.nan)
    OmniQuant(epochs=2).apply(window)
    assert window.notes["fallback"] == "rtn, because training diverged"
    assert is_plain_rounding(window)


def test_what_is_worse_than_rounding_falls_back_to_it(window):
    OmniQuant(epochs=2, lwc_lr=1e6).apply(window)
    assert "below the learned" in window.notes["fallback"]
    assert is_plain_rounding(window)


def test_a_divergence_is_in_the_report(tmp_path):
    options = {"epochs": 1, "aug_loss": False, "lwc_lr": 1e6}
    report = quantkit.quantize("tiny", output=tmp_path / "out", wbits=3, options=options, **FEW).report
    assert all(block["notes"]["fallback"].startswith("rtn, because") for block in report["blocks"])
    assert errors(quantkit.Quantized(output=tmp_path, report=report)).equal(
        torch.tensor([block["error_rtn"] for block in report["blocks"]])
    )


def test_training_keeps_what_it_learned(window):
    OmniQuant(epochs=20, lwc_lr=0.03).apply(window)
    assert "fallback" not in window.notes
    assert not is_plain_rounding(window)
    learned = {site.name: site.quantized.dequantize().float() for site in window.sites}
    assert window.error(learned) < window.error_rtn


def test_training_leaves_the_weights_alone(window):
    before = {site.name: site.weight.clone() for site in window.sites}
    OmniQuant(epochs=2).apply(window)
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
        monkeypatch.setattr(site.linear.weight, "data", fake_quantize(site.weight, low * SHARE, high * SHARE, SCHEME))
    output = module(stream, **arguments.kwargs)
    expected = (target - output).square().mean() + augmented * (original - output).square().mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_aug_loss_changes_what_is_learned(window):
    scales = []
    for aug_loss in (False, True):
        OmniQuant(epochs=10, aug_loss=aug_loss, lwc_lr=0.03).apply(window)
        scales.append(torch.cat([site.quantized.scale.flatten() for site in window.sites]))
    assert not torch.equal(*scales)


def test_ticks_reach_the_end(window):
    shares = []
    window.tick = shares.append
    OmniQuant(epochs=4).apply(window)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_window_without_sites_is_left_alone(window):
    window.blocks[0].sites = []
    OmniQuant().apply(window)
    assert window.notes == {}


@pytest.mark.parametrize("bits", range(2, 9))
def test_settings_are_the_papers(bits):
    method = OmniQuant.for_scheme(QuantScheme(bits=bits))
    assert (method.epochs, method.aug_loss) == ((40, True) if bits == 2 else (20, False))
    assert method.lwc_lr == 1e-2
    assert method.updates_per_batch == method.epochs


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", -1), ("lwc_lr", 0.0), ("lwc_lr", -0.01), ("lwc_lr", math.nan)], ids=str
)
def test_a_hyper_parameter_out_of_range_is_named(name, value):
    with pytest.raises(UsageError, match=f"^{name} must .* not {value}$"):
        OmniQuant(**{name: value})
