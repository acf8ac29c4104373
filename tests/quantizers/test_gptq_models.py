"""GPTQ on models: what it gains over rounding, in every layout of a block, and what it gives up."""

import dataclasses

import pytest
import torch
from families import FAMILIES, WITHOUT_FILE, save_tiny

import quantkit
from quantkit import api
from quantkit.calibrate.engine import Engine
from quantkit.calibrate.passes import Window
from quantkit.calibrate.record import record
from quantkit.calibrate.statistics import Hessian, groups_in_order, input_statistics
from quantkit.calibrate.walk import rounded_to_nearest
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.quantizers import gptq as module
from quantkit.quantizers.gptq import GPTQ

CPU = torch.device("cpu")
SCHEME = QuantScheme(bits=3, group_size=16)


@pytest.fixture(scope="module")
def window_of(tmp_path_factory):
    """Make a window of the first block of a tiny model, anew each time."""
    directories = {}

    def make(family):
        if family not in directories:
            directories[family] = tmp_path_factory.mktemp(family)
            save_tiny(family, directories[family])
        skeleton, checkpoint = Skeleton(directories[family]), Checkpoint(directories[family])
        tokens = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0)).split(4)
        with skeleton.outer_weights(checkpoint, torch.float32, CPU):
            recording = record(skeleton, tokens, CPU)
        names = skeleton.block_linears(0)
        engine = Engine(
            skeleton=skeleton,
            checkpoint=checkpoint,
            passes=[],
            schemes={skeleton.module_name(0, name): SCHEME for name in names},
            scale_dtype=torch.bfloat16,
            device=CPU,
        )
        window = Window(
            blocks=[engine.load(0)],
            inputs=recording.hidden,
            references=[[]],
            arguments=[arguments[:1] for arguments in recording.arguments],
            device=CPU,
        )
        with torch.no_grad():
            window.references = [[window.forward(batch) for batch in range(len(tokens))]]
        window.error_rtn = window.error(rounded_to_nearest(window.sites))
        return window

    return make


def kept_error(window):
    return window.error({site.parameter: site.quantized.dequantize().float() for site in window.sites})


def is_plain(site):
    return torch.equal(site.quantized.codes, round_to_nearest(site.weight, SCHEME, torch.bfloat16).codes)


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"search": False}, {"true_sequential": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", WITHOUT_FILE])
def test_a_blocks_error_is_far_below_that_of_rounding(window_of, family, options):
    window = window_of(family)
    GPTQ(**options).apply(window)
    assert kept_error(window) < 0.7 * window.error_rtn
    assert not any(is_plain(site) for site in window.sites)
    assert window.notes == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_share_an_input_and_stand_in_the_order_of_computation(window_of, family):
    window = window_of(family)
    seen = []

    def look(linear, inputs):
        seen.append((linear, inputs[0]))

    handles = [site.linear.register_forward_pre_hook(look) for site in window.sites]
    window.forward(0)
    for handle in handles:
        handle.remove()
    heard, turns = dict(seen), [linear for linear, _ in seen]
    groups = groups_in_order(window)
    assert sorted(site.name for group in groups for site in group) == sorted(site.name for site in window.sites)
    assert all(torch.equal(heard[site.linear], heard[group[0].linear]) for group in groups for site in group)
    first = [turns.index(group[0].linear) for group in groups]
    assert first == sorted(first)


def test_later_linears_are_measured_behind_the_quantized_ones(window_of, monkeypatch):
    """The Hessian of the last group is that of the inputs behind the linears that were rounded before."""
    window, heard = window_of("llama"), []
    monkeypatch.setattr(
        module, "input_statistics", lambda *args, **kwargs: heard.append(input_statistics(*args, **kwargs)) or heard[-1]
    )
    GPTQ().apply(window)
    down = next(site for site in window.sites if site.local_name == "mlp.down_proj")
    before = {s.parameter: s.quantized.dequantize().float() for s in window.sites if s is not down}
    expected = input_statistics(window, Hessian, sites=[down], parameters=before)[down.name].value
    untouched = input_statistics(window, Hessian, sites=[down])[down.name].value
    assert torch.equal(heard[-1][down.name].value, expected)
    assert not torch.equal(expected, untouched)
    assert len(heard) == 4


def test_a_result_that_is_worse_than_rounding_is_not_kept(window_of):
    window = window_of("llama")
    window.error_rtn = 0.0
    GPTQ().apply(window)
    assert all(is_plain(site) for site in window.sites)
    assert window.notes["fallback"].startswith("rtn, because its error 0 is below GPTQ's 0.")


@pytest.mark.parametrize(
    ("value", "reason"), [(torch.inf, "their inputs are not finite"), (None, "no input reached them")]
)
def test_linears_of_whose_inputs_nothing_is_known_are_rounded_to_nearest(window_of, monkeypatch, value, reason):
    window = window_of("llama")

    def without(window, make, **options):
        statistics = input_statistics(window, make, **options)
        for name, statistic in statistics.items():
            if name.endswith("down_proj"):
                statistic.total = statistic.total * value if value else torch.zeros(())
                statistic.tokens *= value is not None
        return statistics

    monkeypatch.setattr(module, "input_statistics", without)
    GPTQ().apply(window)
    assert {site.local_name for site in window.sites if is_plain(site)} == {"mlp.down_proj"}
    assert window.notes == {"rtn for down": f"mlp.down_proj: {reason}"}


def test_a_linear_that_no_input_reaches_is_in_the_last_group(window_of):
    window = window_of("llama")
    idle = dataclasses.replace(
        window.sites[0], name="idle", local_name="idle", group="idle", linear=torch.nn.Linear(64, 4)
    )
    window.blocks[0].sites = [idle, *window.sites]
    assert groups_in_order(window)[-1] == [idle]


def test_a_damping_that_had_to_be_raised_is_noted(window_of):
    window = window_of("llama")
    window.inputs = [hidden[:1, :8] for hidden in window.inputs]  # fewer tokens than features
    window.references = [[target[:1, :8] for target in window.targets]]
    window.arguments = [[dataclasses.replace(a, kwargs=short(a.kwargs, 8)) for a in row] for row in window.arguments]
    GPTQ(damp=0.0).apply(window)
    assert any(name.startswith("damp of") and value > 0 for name, value in window.notes.items())


def short(kwargs, tokens):
    """Return the arguments of a Llama block for the first tokens."""
    cos, sin = kwargs["position_embeddings"]
    return {**kwargs, "position_embeddings": (cos[:, :tokens], sin[:, :tokens]), "attention_mask": None}


def test_a_negative_damp_is_refused():
    with pytest.raises(UsageError, match="not -1"):
        GPTQ(damp=-1.0)


def test_the_embedded_model_reads_better_than_after_rounding(tmp_path):
    few = {"calibration": "embedded", "samples": 8, "seqlen": 128, "wbits": 2, "group_size": 32, "device": "cpu"}
    perplexity, errors = {}, {}
    for method in ("rtn", "gptq"):
        result = quantkit.quantize("tiny", output=tmp_path / method, method=method, batch_size=8, **few)
        errors[method] = [block["error"] for block in result.report["blocks"]]
        judged = api.evaluate(tmp_path / method, text="embedded-test", seqlen=128, windows=12, device="cpu")
        perplexity[method] = judged.perplexity
    assert all(ours < theirs for ours, theirs in zip(errors["gptq"], errors["rtn"], strict=True))
    assert perplexity["gptq"] < perplexity["rtn"]
