"""AWQ: what its scales and its clipping gain, and what is left behind where they gain nothing."""

import copy

import pytest
import torch

import quantkit
from quantkit import api
from quantkit.calibrate.passes import Window
from quantkit.calibrate.record import record
from quantkit.calibrate.walk import rounded_to_nearest
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.block import Block, Site
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.quantizers import awq
from quantkit.quantizers.awq import AWQ
from quantkit.resources import data_dir

CPU = torch.device("cpu")
TINY = data_dir("model_zoo") / "tiny"
SCHEME = QuantScheme(bits=3, group_size=32)
FEW = {"calibration": "embedded", "samples": 4, "seqlen": 64, "group_size": 32, "wbits": 3, "device": "cpu"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}


@pytest.fixture(scope="module")
def original():
    """The first block of the embedded model, and hidden states and arguments that reach it."""
    skeleton, checkpoint = Skeleton(TINY), Checkpoint(TINY)
    tokens = torch.randint(3, 1024, (2, 48), generator=torch.Generator().manual_seed(0))
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):
        recording = record(skeleton, [tokens], CPU)
    return skeleton, skeleton.load_block(0, checkpoint, torch.float32, CPU), recording


@pytest.fixture
def window(original):
    """A window of that block; three channels of the norms are large, so that a few inputs matter most."""
    skeleton, module, recording = original
    module = copy.deepcopy(module)
    for norm in (module.input_layernorm, module.post_attention_layernorm):
        norm.weight.data[[3, 30, 50]] *= 20
    sites = [
        Site(
            name=f"block.{name}",
            local_name=name,
            linear=module.get_submodule(name),
            group=skeleton.architecture.group_of(name),
            scheme=SCHEME,
            scale_dtype=torch.bfloat16,
        )
        for name in skeleton.block_linears(0)
    ]
    block = Block(index=0, name="block", module=module, sites=sites, architecture=skeleton.architecture)
    block.config = skeleton.config
    block.dtypes = {name: torch.bfloat16 for name, _ in module.named_parameters()}
    hidden, arguments = recording.hidden[0], recording.arguments[0][0]
    target = block.forward(hidden, arguments)
    window = Window(
        blocks=[block], inputs=[hidden], references=[[target]], arguments=[[arguments]], device=CPU, fresh=1
    )
    window.error_rtn = window.error(rounded_to_nearest(sites))
    return window


def rounded_error(window):
    return window.error({site.parameter: site.quantized.dequantize().float() for site in window.sites})


def test_salient_channels_are_saved(window):
    AWQ().apply(window)
    assert "fallback" not in window.notes
    assert rounded_error(window) < 0.6 * window.error_rtn
    assert all(0 < window.notes["alpha"][name] < 1 for name in ("attention", "mlp"))


def test_scales_and_clipping_gain_each_on_its_own(window):
    scaled, clipped = copy.deepcopy(window), copy.deepcopy(window)
    AWQ(clip=False).apply(scaled)
    AWQ(trials=0).apply(clipped)
    assert rounded_error(scaled) < 0.9 * window.error_rtn
    assert rounded_error(clipped) < window.error_rtn
    assert clipped.notes["alpha"] == {}
    assert clipped.blocks[0].changed == set()


def test_the_transform_is_exact_in_what_is_stored(window):
    original = window.targets[0].clone()
    AWQ().apply(window)
    assert window.blocks[0].changed == NORMS
    assert ((window.forward(0) - original).norm() / original.norm()) < 1e-5
    for name in NORMS:
        weight = window.blocks[0].module.get_parameter(name)
        assert torch.equal(weight, weight.bfloat16().float())


def test_queries_and_keys_are_not_clipped(window):
    AWQ(trials=0).apply(window)
    plain = {
        site.local_name.rpartition(".")[2]
        for site in window.sites
        if torch.equal(site.quantized.scale, round_to_nearest(site.weight, SCHEME, torch.bfloat16).scale)
    }
    assert plain == {"q_proj", "k_proj"}


def test_what_is_worse_than_rounding_is_undone(window, monkeypatch):
    before = {name: value.clone() for name, value in window.blocks[0].module.named_parameters()}
    poor = awq.salience_scale
    monkeypatch.setattr(awq, "salience_scale", lambda magnitude, alpha: 1e3 * poor(magnitude, -6.0))
    AWQ().apply(window)
    assert "below AWQ's" in window.notes["fallback"]
    assert "alpha" not in window.notes
    assert window.blocks[0].changed == set()
    assert all(torch.equal(value, before[name]) for name, value in window.blocks[0].module.named_parameters())
    assert rounded_error(window) == window.error_rtn


def test_a_linear_that_stays_dense_is_not_scaled(window):
    window.blocks[0].sites = [site for site in window.sites if not site.local_name.endswith("up_proj")]
    AWQ().apply(window)
    assert set(window.notes["alpha"]) == {"attention", "output"}


def test_a_family_without_a_file_is_clipped_alone(window):
    window.blocks[0].architecture = None
    AWQ().apply(window)
    assert window.notes["alpha"] == {}
    assert rounded_error(window) < window.error_rtn


def test_perplexity_is_below_that_of_rounding(tmp_path):
    found = {}
    for method in ("rtn", "awq"):
        output = tmp_path / method
        quantkit.quantize("tiny", output=output, method=method, **FEW)
        found[method] = api.evaluate(output, text="embedded-test", seqlen=64, windows=8, device="cpu").perplexity
    assert found["awq"] < found["rtn"]


def test_trials_must_not_be_negative():
    with pytest.raises(UsageError, match="trials must not be negative, not -1"):
        AWQ(trials=-1)
