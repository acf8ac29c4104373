"""What every quantization method and every export format promises, whoever wrote it."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit import methods
from quantkit.calibrate.passes import Phase
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.evaluation.check import check
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.recipe import Calibration, Recipe
from quantkit.resources import data_dir

METHODS, FORMATS = methods.names("quantizers"), methods.names("exporters")
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
SCHEMES = [
    QuantScheme(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product(range(2, 9), (None, 11), (False, True))
] + [QuantScheme.parse("w8as8s")]
SHAPES = [(1, 11), (7, 22), (33, 44), (32, 352)]  # only the last fills whole words
PACKED = [name for name in FORMATS if not getattr(methods.find("exporters", name), "whole", False)]  # linear by linear
SAFETENSORS = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16"}
SETTINGS = {"omniquant": {"updates": 3}, "distill": {"updates": 3}}  # what keeps the tests short
TEXT = Calibration(text="embedded", samples=4, seqlen=16, batch_size=2)
BLOCKS = 5  # of the embedded model


def recipes():
    """Yield a list of methods for every method: alone if it rounds, and else with those that the presets round with."""
    for name in METHODS:
        if methods.find("quantizers", name).phase == Phase.ROUND:
            yield [name]
        else:
            yield from (sorted([name, other], key=phase) for other in ("rtn", "omniquant"))


def phase(name):
    return methods.find("quantizers", name).phase


def recipe(names, scheme="w3g32", **fields):
    """Return a short recipe of these methods on the embedded model."""
    passes = {name: SETTINGS.get(name, {}) for name in names}
    return Recipe(model="tiny", scheme=QuantScheme.parse(scheme), passes=passes, calibration=TEXT, **fields)


@dataclasses.dataclass
class Run:
    recipe: Recipe
    output: Path
    report: Mapping[str, Any]
    updates: int


@pytest.fixture(scope="module", params=recipes(), ids="+".join)
def result(request, tmp_path_factory):
    """The embedded model, quantized by one method."""
    return run(recipe(request.param), tmp_path_factory.mktemp("methods") / "out")


def run(recipe, output):
    """Quantize, and count the optimizers' steps."""
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
        report = quantkit.quantize(recipe, output=output, device="cpu").report
    return Run(recipe, output, report, len(steps))


def held():
    """Return every format with every scheme and shape that it does not refuse."""
    cases = itertools.product(PACKED, SCHEMES, SHAPES)
    return [pytest.param(*case, id="-".join(map(str, case))) for case in cases if holds(*case)]


def holds(name, scheme, shape):
    exporter = methods.find("exporters", name)()
    try:
        exporter.check({"a": scheme})
        exporter.layout(shape, scheme, "F16")
    except UsageError:
        return False
    return True


EVERY_HELD = pytest.mark.parametrize(("name", "scheme", "shape"), held())


def quantized(scheme, shape, dtype=torch.bfloat16):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(scheme.bits))
    return round_to_nearest(weight, scheme, dtype)


def test_the_methods_of_the_papers_are_there():
    assert {"awq", "distill", "gptq", "omniquant", "rtn"} <= set(METHODS)
    assert {"awq", "compressed-tensors", "gptq"} <= set(FORMATS)


@EVERY_METHOD
def test_a_method_is_a_frozen_dataclass_with_keyword_fields(name):
    method = methods.find("quantizers", name)
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(method))


@EVERY_METHOD
def test_a_method_can_be_asked_what_it_does(name):
    method = methods.find("quantizers", name)
    assert isinstance(method.phase, Phase)
    assert isinstance(method.learns, bool)
    made = method.for_scheme(QuantScheme(bits=2))
    assert isinstance(made, method)
    assert method.learns or not made.updates_per_window  # what makes updates learns; one may learn without them


@pytest.mark.parametrize(
    ("family", "name"), [*(("quantizers", n) for n in METHODS), *(("exporters", n) for n in FORMATS)]
)
def test_the_summary_is_one_sentence(family, name):
    summary = methods.summary(family, name)
    assert 20 < len(summary) < 130
    assert summary[0].isalnum()


@pytest.mark.parametrize(
    ("family", "name", "hint"),
    [
        ("quantizers", "omniquent", "unknown method 'omniquent' (did you mean omniquant?)"),
        ("quantizers", "zzz", f"unknown method 'zzz' (known: {', '.join(METHODS)})"),
        (
            "exporters",
            "compressed-tensor",
            "unknown format 'compressed-tensor' (did you mean compressed-tensors?)",
        ),
    ],
)
def test_an_unknown_name_lists_the_nearest(family, name, hint):
    with pytest.raises(UsageError) as caught:
        methods.find(family, name)
    assert str(caught.value) == hint


@pytest.mark.parametrize("name", ["__init__", "../core/affine", "OMNIQUANT", ""])
def test_only_names_that_are_listed_can_be_found(name):
    with pytest.raises(UsageError, match="unknown method"):
        methods.find("quantizers", name)


def test_every_linear_of_every_block_is_quantized(result):
    skeleton = Skeleton(data_dir("model_zoo") / "tiny")
    linears = [skeleton.module_name(i, name) for i in range(len(skeleton.blocks)) for name in skeleton.block_linears(i)]
    assert result.report["sites"] == linears
    stored = set(Checkpoint(result.output))
    assert {f"{site}.weight_packed" for site in linears} <= stored
    assert not {f"{site}.weight" for site in linears} & stored


def test_errors_are_those_of_a_model_that_still_works(result):
    errors = [block["error"] for block in result.report["blocks"]]
    assert all(math.isfinite(error) and 0 < error < 0.5 for error in errors)


def test_no_block_is_worse_than_rounding(result):
    for block in result.report["blocks"]:
        assert block["error"] <= block["error_rtn"] * (1 + 1e-6)


def test_the_updates_made_are_those_predicted(result):
    steps = result.recipe.build_passes().values()
    windows = [BLOCKS - step.blocks_at_once + 1 if step.blocks_at_once else 1 for step in steps]
    assert result.updates == sum(step.updates_per_window * count for step, count in zip(steps, windows, strict=True))


def test_the_same_run_writes_the_same_bytes_and_draws_from_no_global_generator(result, tmp_path):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = run(result.recipe, tmp_path / "again")
    assert again.report["sha256"] == result.report["sha256"]
    assert again.report["blocks"] == result.report["blocks"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_output_passes_the_check(result):
    assert check(result.output, device="cpu").faults == ()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_holds_4_bits_in_groups_that_whole_models_have(name):
    exporter = methods.find("exporters", name)()
    scheme = QuantScheme.parse("w4g32s")
    exporter.check({"a": scheme})
    assert all("\n" not in line for line in exporter.notices({"a": scheme}, ["Linear"]))


@EVERY_HELD
def test_what_is_encoded_decodes_to_the_same_weights(name, scheme, shape):
    exporter, tensor = methods.find("exporters", name)(), quantized(scheme, shape)
    decoded = exporter.decode(exporter.encode(tensor), scheme)
    assert torch.equal(decoded.codes, tensor.codes)
    assert torch.equal(decoded.scale, tensor.scale)
    assert scheme.symmetric or torch.equal(decoded.zero_point, tensor.zero_point)
    assert torch.equal(decoded.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EVERY_HELD
def test_the_layout_is_that_of_the_encoded_tensors(name, scheme, shape, dtype):
    exporter = methods.find("exporters", name)()
    tensors = exporter.encode(quantized(scheme, shape, dtype))
    found = {end: (SAFETENSORS[tensor.dtype], tuple(tensor.shape)) for end, tensor in tensors.items()}
    assert exporter.layout(shape, scheme, SAFETENSORS[dtype]) == found


@EVERY_HELD
def test_encoded_tensors_can_be_written(name, scheme, shape):
    tensors = methods.find("exporters", name)().encode(quantized(scheme, shape))
    assert all(tensor.is_contiguous() for tensor in tensors.values())
