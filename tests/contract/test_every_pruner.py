"""What every pruner promises, whoever wrote it; and what every quantizer promises of what was pruned."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import quantkit
from quantkit import methods
from quantkit.calibrate.passes import Phase
from quantkit.core.masks import Sparsity
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.evaluation.check import check
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.recipe import Calibration, Recipe

PRUNERS = methods.names("pruners")
EVERY_PRUNER = pytest.mark.parametrize("name", PRUNERS)
SETTINGS = {"mfac": {"gradients": 8, "block": 16, "recomputations": 2}}  # what keeps the tests short
ROUNDING = [n for n in methods.names("quantizers") if methods.find("quantizers", n).phase is Phase.ROUND]
QUANTIZERS = {
    **{name: {name: {}} for name in ROUNDING},
    "omniquant": {"omniquant": {"updates": 3, "let": True}},
    "rounding": {"omniquant": {"updates": 3, "rounding": True, "rounding_lr": 3.0, "init": "gptq"}},
    "weights": {"omniquant": {"updates": 3, "weights": True, "weights_lr": 0.3, "window": 2}},
    "distill": {"rtn": {}, "distill": {"updates": 2}},
}
TEXT = Calibration(text="embedded", samples=4, seqlen=16, batch_size=2)
BLOCKS, LINEARS = 5, 35  # of the embedded model


def pruned(name, sparsity, output, **options):
    passes = {name: {"sparsity": sparsity, **SETTINGS.get(name, {}), **options}}
    recipe = Recipe(model="tiny", passes=passes, calibration=TEXT, dense=True)
    return quantkit.quantize(recipe, output=output, device="cpu").report


def weights(directory):
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


@EVERY_PRUNER
def test_a_pruner_is_a_frozen_dataclass_with_keyword_fields(name):
    method = methods.find("pruners", name)
    assert method.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(method))
    assert method.phase is Phase.PRUNE
    assert isinstance(method.for_scheme(QuantScheme()), method)
    assert 20 < len(methods.summary("pruners", name)) < 130


@EVERY_PRUNER
@pytest.mark.parametrize("sparsity", ["0.3", "2:4"])
def test_it_drops_exactly_what_was_asked_for(name, sparsity, tmp_path):
    report = pruned(name, sparsity, tmp_path / "out")
    linears = report["sparsity"]["linears"]
    assert len(linears) == LINEARS
    wanted = Sparsity.parse(sparsity)
    stored = weights(tmp_path / "out")
    for site, facts in linears.items():
        weight = stored[f"{site}.weight"]
        assert facts["weights"] == weight.numel()
        rows = {"wanda": weight.shape[0], "mfac": weight.shape[0]}.get(name, 1)
        assert facts["zeros"] == rows * wanted.count(weight.numel() // rows)
        assert int((weight == 0).sum()) == facts["zeros"]
        assert weight.dtype == torch.bfloat16
        if wanted.group:
            assert (weight.view(len(weight), -1, 4) == 0).sum(-1).eq(2).all()
    found = check(tmp_path / "out")
    assert found.faults == ()
    assert found.facts["zeros"] == sum(facts["zeros"] for facts in linears.values())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@EVERY_PRUNER
def test_two_runs_give_the_same_bytes(name, tmp_path):
    first, second = (pruned(name, 0.5, tmp_path / str(i))["sha256"] for i in range(2))
    assert first == second


@pytest.mark.parametrize("scheme", ["w3g32", "w4g32s"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_was_pruned_is_exactly_zero_after_every_quantizer(quantizer, scheme, tmp_path, monkeypatch):
    seen = []
    encode = CompressedTensors.encode
    monkeypatch.setattr(CompressedTensors, "encode", lambda own, weight: seen.append(weight) or encode(own, weight))
    passes = {"wanda": {"sparsity": "2:4"}, **QUANTIZERS[quantizer]}
    recipe = Recipe(model="tiny", scheme=QuantScheme.parse(scheme), passes=passes, calibration=TEXT)
    report = quantkit.quantize(recipe, output=tmp_path / "out", device="cpu").report
    assert len(seen) >= LINEARS  # twice where blocks wait for passes over the whole model
    for weight in seen:
        zeros = (weight.dequantize().view(len(weight.codes), -1, 4) == 0).sum(-1)
        assert (zeros >= 2).all()
    assert report["sparsity"]["share"] == 0.5
    assert all(block["error"] <= block["error_rtn"] for block in report["blocks"] if quantizer != "distill")
    assert check(tmp_path / "out").faults == ()


@EVERY_PRUNER
def test_every_pruner_goes_before_quantization(name, tmp_path):
    passes = {name: {"sparsity": 0.5, **SETTINGS.get(name, {})}, "gptq": {}}
    recipe = Recipe(model="tiny", scheme=QuantScheme(group_size=32), passes=passes, calibration=TEXT)
    report = quantkit.quantize(recipe, output=tmp_path / "out", device="cpu").report
    assert report["sparsity"]["share"] == pytest.approx(0.5)
    assert report["method"] == f"{name} + gptq"


@pytest.mark.parametrize(
    ("sparsity", "says"),
    [("1.0", "from 0 to below 1"), ("4:2", "must be at least 1 and below M"), ("half", "is no sparsity")],
)
@EVERY_PRUNER
def test_sparsity_that_cannot_be_is_refused_before_anything_is_computed(name, sparsity, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        quantkit.prune("tiny", method=name, sparsity=sparsity, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
