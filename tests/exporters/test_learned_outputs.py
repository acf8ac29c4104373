"""What was transformed, rotated or learned in windows loads in plain transformers and computes what the original does.

At 8 bits little is lost, so a norm, bias or head that was changed and not written, or written and not changed, shows.
Nothing is learned there: transforms are those that learning would start from, and rounding is to nearest or GPTQ's.
"""

import pytest
import torch
import transformers
from families import VOCABULARY, save_tiny, save_tokenizer
from packaging.version import Version
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.core.scheme import QuantScheme
from quantkit.model.checkpoint import Checkpoint
from quantkit.recipe import Calibration, Recipe

OLD = Version(transformers.__version__) < Version("5.23")
TOKENS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(6))
TEXT = Calibration(text="embedded", samples=4, seqlen=16, batch_size=2)
START = {"updates": 0, "lwc": False}
CASES = {
    "let": {"let": True},
    "let_down": {"let": True, "let_down": True},
    "window": {"window": 2, "let": True},
    "weights": {"weights": True, "init": "gptq"},
    "rounding": {"rounding": True, "lwc": True, "init": "search"},
    "rotate": {},
    "distill": {"distill": {"updates": 3}},
    "all": {
        "let": True,
        "let_down": True,
        "rounding": True,
        "lwc": True,
        "init": "search",
        "window": 2,
        "distill": {"updates": 3},
    },
}
NORMS = {"let", "let_down", "window", "rotate", "distill", "all"}  # what changes more than the linears
FAMILIES = {"llama": CASES, "qwen2": ("rotate", "all")} | dict.fromkeys(
    ("opt", "gemma2", "gpt2"), ("let_down", "distill")
)
LOST = 0.05  # of the norm of the logits, most of it by clipping; a norm that is missing costs several times as much


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Make the directory and the model of a family, once."""
    made = {}

    def make(family):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            made[family] = directory, save_tiny(family, directory)
            save_tokenizer(directory)
        return made[family]

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


def export(source, output, case, scheme):
    options = dict(CASES[case])
    whole = {"distill": options.pop("distill")} if "distill" in options else {}
    passes = {"omniquant": START | options, **whole}
    rotate = case in ("rotate", "all")
    recipe = Recipe(model=str(source), scheme=QuantScheme.parse(scheme), passes=passes, calibration=TEXT, rotate=rotate)
    result = quantkit.quantize(recipe, output=output, device="cpu")
    assert not any(
        "fallback" in notes for notes in [result.report["whole"], *(b["notes"] for b in result.report["blocks"])]
    )
    return result.output


@pytest.mark.parametrize(("family", "case"), [(family, case) for family, cases in FAMILIES.items() for case in cases])
def test_it_loads_in_transformers_and_computes_what_the_original_does(saved, tmp_path, family, case):
    if OLD and family == "gpt2":
        pytest.skip(f"transformers {transformers.__version__} cannot load this family packed")
    source, original = saved(family)
    output = export(source, tmp_path / "out", case, "w8g32")
    loaded, info = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    expected, found = logits(original), logits(loaded)
    assert 0 < (found - expected).norm() < LOST * expected.norm()
    assert quantkit.check(output, device="cpu").faults == ()
    assert bool(changed_tensors(source, output)) == (case in NORMS)


def changed_tensors(source, output):
    """Return the names of the output's dense tensors that the source has not, or with other values."""
    before, after = Checkpoint(source), Checkpoint(output)
    dense = {name for name in after if ".weight_" not in name}
    return {name for name in dense if name not in before or not same(before, after, name)}


def same(before, after, name):
    return torch.equal(before.load([name])[name], after.load([name])[name])


@pytest.mark.parametrize("case", ["all", "window"])
def test_transforms_with_quantized_activations_leave_a_model_that_transformers_loads(saved, tmp_path, case):
    """Shifts change biases too; the weights alone compute nearly what the original does."""
    family = "qwen2" if case == "all" else "opt"
    source, original = saved(family)
    output = export(source, tmp_path / "out", case, "w8a8g32")
    expected, found = logits(original), logits(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32))
    assert (found - expected).norm() < LOST * expected.norm()
    assert quantkit.check(output, device="cpu").faults == ()
    assert any(name.endswith(".bias") for name in changed_tensors(source, output))
