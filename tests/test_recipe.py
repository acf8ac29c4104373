import dataclasses
import re

import pytest

from quantkit import methods, presets
from quantkit.api import make_recipe
from quantkit.calibrate.passes import Phase
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.recipe import Calibration, Recipe, parse_setting, with_changes

RECIPES = {
    "defaults": Recipe(model="tiny"),
    "rows": Recipe(model="tiny", scheme=QuantScheme(bits=3, symmetric=True)),
    "rtn": Recipe(model="tiny", passes={"rtn": {}}, ignore=("*.q_proj", "model.layers.0.*")),
    "everything": Recipe(
        model="org/model",
        revision="main",
        scheme=QuantScheme(bits=2, group_size=64),
        passes={"omniquant": {"updates": 3, "lwc_lr": 0.5, "aug_loss": False}},
        calibration=Calibration(text="a.txt", samples=5, seqlen=77, batch_size=3, allow_short=True),
        seed=9,
    ),
}  # fmt: skip


def saved(directory, text):
    path = directory / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(directory, text):
    with pytest.raises(UsageError) as caught:
        Recipe.from_toml(saved(directory, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def phases(monkeypatch):
    """Methods named by their phase instead of those of the package."""

    def find(family, name):
        phase = Phase[name.upper()]
        made = dataclasses.make_dataclass("Method", [], frozen=True)
        made.phase, made.for_scheme = phase, classmethod(lambda cls, scheme: cls())
        return made

    monkeypatch.setattr(methods, "find", find)
    return lambda *names: Recipe(model="tiny", passes={name: {} for name in names}).build_passes()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_toml_gives_an_equal_recipe(tmp_path, recipe):
    again = Recipe.from_toml(saved(tmp_path, recipe.to_toml()))
    assert again.build_passes() == recipe.build_passes()
    assert dataclasses.replace(again, passes=recipe.passes) == recipe
    assert again.to_toml() == recipe.to_toml()


def test_toml_spells_out_what_the_defaults_may_become(tmp_path):
    again = Recipe.from_toml(saved(tmp_path, Recipe(model="tiny", scheme=QuantScheme(bits=2)).to_toml()))
    spelled = again.passes["omniquant"]
    assert (spelled["updates"], spelled["lwc_lr"], spelled["aug_loss"]) == (5120, 0.01, True)
    assert set(spelled) == {field.name for field in dataclasses.fields(methods.find("quantizers", "omniquant"))}


def test_a_recipe_may_be_for_any_model(tmp_path):
    path = saved(tmp_path, "seed = 3\n")
    assert Recipe.from_toml(path, model="tiny").model == "tiny"
    assert refusal(tmp_path, "seed = 3\n").endswith("names no model; give one on the command line")


def test_the_command_lines_model_wins(tmp_path):
    assert Recipe.from_toml(saved(tmp_path, 'model = "gpt2"\n'), model="tiny").model == "tiny"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("seeed = 3", "'seeed' (did you mean seed"),
        ("[scheme]\nbit = 4", "'bit' (did you mean bits"),
        ("[calibration]\nsample = 4", "'sample' (did you mean samples"),
        ('[[passes]]\nmethod = "omniquant"\nupdate = 1', "'update' (did you mean updates"),
        ('[[passes]]\nmethod = "omniquent"', "'omniquent' (did you mean omniquant?)"),
    ],
    ids=["recipe", "scheme", "calibration", "hyper-parameter", "method"],
)
def test_an_unknown_name_is_answered_with_the_nearest(tmp_path, text, hint):
    assert hint in refusal(tmp_path, f'model = "tiny"\n{text}')


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "scheme = 4",
        "passes = 4",
        "passes = [4]",
        "[[passes]]\nupdates = 1",
        "calibration = []",
        "ignore = 3",
    ],
)
def test_toml_that_is_no_recipe(tmp_path, text):
    message = refusal(tmp_path, f'model = "tiny"\n{text}')
    assert message.startswith(f"{tmp_path / 'recipe.toml'} is no recipe: ")


def test_a_pass_that_is_named_twice_is_refused(tmp_path):
    text = '[[passes]]\nmethod = "rtn"\n[[passes]]\nmethod = "rtn"'
    assert refusal(tmp_path, f'model = "tiny"\n{text}').endswith("is no recipe: it names the pass rtn twice")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"^cannot read the recipe .*none\.toml: No such file"):
        Recipe.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[scheme]\nbits = 1", "bits must be 2 to 8, not 1"),
        ('[scheme]\nbits = "4"', "bits in the table of quantscheme must be an integer, not '4'"),
        ("[scheme]\nbits = true", "bits in the table of quantscheme must be an integer, not True"),
        ("[scheme]\nsymmetric = 1", "symmetric in the table of quantscheme must be true or false, not 1"),
        ("[calibration]\nsamples = 0", "samples must be positive, not 0"),
        ("[calibration]\nbatch_size = -1", "batch_size must be positive, not -1"),
        ("[calibration]\nseqlen = 1", "seqlen must be at least 2, not 1"),
        ("[calibration]\ntext = 3", "text in the table of calibration must be a string, not 3"),
        ('seed = "x"', "seed in the table of recipe must be an integer, not 'x'"),
        (
            '[[passes]]\nmethod = "omniquant"\nupdates = "x"',
            "updates in the method omniquant must be an integer, not 'x'",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path, text, problem):
    assert problem in refusal(tmp_path, f'model = "tiny"\n{text}')


@pytest.mark.parametrize(
    "names", [("round",), ("fold", "round"), ("prune", "round", "guard"), ("fold", "prune", "round")]
)
def test_passes_in_the_order_of_their_phases(phases, names):
    assert tuple(phases(*names)) == names


@pytest.mark.parametrize("names", [("round", "fold"), ("prune", "fold", "round"), ("guard", "round")])
def test_passes_out_of_order_are_named(phases, names):
    written = re.escape(" → ".join(f"{name} ({name})" for name in names))
    with pytest.raises(UsageError, match=f"^the passes are out of order: {written}; folding comes first"):
        phases(*names)


@pytest.mark.parametrize("names", [("fold",), ("fold", "prune")])
def test_one_pass_must_round(phases, names):
    with pytest.raises(UsageError, match=rf"^nothing rounds: {', '.join(names)} only .*; use --preset balanced, or"):
        phases(*names)


def test_two_passes_must_not_round():
    with pytest.raises(UsageError, match=r"^exactly one pass must round, not 2 \(rtn, omniquant\); leave out"):
        Recipe(model="tiny", passes={"rtn": {}, "omniquant": {}}).build_passes()


def test_changes_reach_every_part():
    changes = {"bits": 3, "group_size": None, "samples": 2, "text": "embedded", "seed": 5, "model": "gpt2"}
    changed = with_changes(RECIPES["everything"], changes, options={"updates": 7})
    assert changed.scheme == QuantScheme(bits=3)
    assert changed.calibration == dataclasses.replace(RECIPES["everything"].calibration, samples=2, text="embedded")
    assert (changed.seed, changed.model, changed.revision) == (5, "gpt2", "main")
    assert changed.passes == {"omniquant": {"updates": 7, "lwc_lr": 0.5, "aug_loss": False}}


def test_another_method_replaces_the_passes():
    changed = with_changes(RECIPES["everything"], {}, method="rtn")
    assert changed.passes == {"rtn": {}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"wbit": 4}, r"no 'wbit' \(did you mean bits"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"bits": "4"}, "bits in the recipe must be an integer, not '4'"),
        ({"samples": 2.5}, "samples in the recipe must be an integer, not 2.5"),
    ],
    ids=["unknown", "out of range", "text", "fraction"],
)
def test_changes_that_cannot_be(changes, problem):
    with pytest.raises(UsageError, match=problem):
        with_changes(RECIPES["defaults"], changes)


@pytest.mark.parametrize(
    ("method", "text", "samples"),
    [("omniquant", "default", 128), ("rtn", "embedded", 4)],
    ids=["learns", "does not"],
)
def test_a_method_that_learns_gets_more_text(method, text, samples):
    recipe = make_recipe("tiny", method=method)
    assert (recipe.calibration.text, recipe.calibration.samples) == (text, samples)


def test_flags_become_a_recipe(tmp_path):
    recipe = make_recipe(
        tmp_path,
        wbits=3,
        group_size=None,
        symmetric=True,
        calibration=tmp_path / "a.txt",
        ignore=["*.q_proj"],
        seed=4,
    )
    assert recipe.model == str(tmp_path)
    assert recipe.scheme == QuantScheme(bits=3, symmetric=True)
    assert recipe.calibration.text == str(tmp_path / "a.txt")
    assert (recipe.ignore, recipe.seed) == (("*.q_proj",), 4)


def test_flags_of_activations_become_a_recipe_that_toml_keeps(tmp_path):
    recipe = make_recipe("tiny", wbits=4, abits=8, kv_bits=4, symmetric_activations=True)
    assert str(recipe.scheme) == "w4as8kv4g128"
    assert Recipe.from_toml(saved(tmp_path, recipe.to_toml())).scheme == recipe.scheme
    assert str(with_changes(recipe, {"activation_bits": 4}).scheme) == "w4as4kv4g128"


def test_the_default_scheme_is_four_bits_in_groups_of_128():
    assert str(make_recipe("tiny").scheme) == "w4a16g128"


def test_a_target_is_symmetric_and_spells_out_no_bits(tmp_path):
    recipe = make_recipe("tiny", target_bpw=2.5)
    assert recipe.scheme == QuantScheme(bits=4, group_size=128, symmetric=True)
    assert str(recipe.nominal_scheme) == "w2a16g128s"
    assert recipe.build_passes() == make_recipe("tiny", wbits=2, symmetric=True).build_passes()
    paper = make_recipe("tiny", target_bpw=2.5, preset="paper").build_passes()["omniquant"]
    assert (paper.updates, paper.aug_loss) == (5120, True)  # what the paper has for 2 bits
    assert "\nbits = " not in recipe.to_toml()
    assert Recipe.from_toml(saved(tmp_path, recipe.to_toml())).to_toml() == recipe.to_toml()


@pytest.mark.parametrize("table", ["", "[scheme]\ngroup_size = 128"], ids=["no table", "a table"])
def test_a_target_in_a_file_needs_no_scheme(tmp_path, table):
    recipe = Recipe.from_toml(saved(tmp_path, f'model = "tiny"\ntarget_bpw = 3\n{table}'))
    assert recipe.scheme == QuantScheme(group_size=128, symmetric=True)


def test_a_target_and_bits_in_one_file_are_refused(tmp_path):
    message = refusal(tmp_path, 'model = "tiny"\ntarget_bpw = 3\n[scheme]\nbits = 3')
    assert message.endswith("it has both target_bpw and scheme.bits; leave one out")


def test_bits_replace_a_target_and_a_target_replaces_bits():
    target = make_recipe("tiny", target_bpw=3.25, group_size=32)
    assert with_changes(target, {"bits": 5}) == make_recipe("tiny", wbits=5, group_size=32, symmetric=True)
    plain = make_recipe("tiny", wbits=5, group_size=32)
    assert str(with_changes(plain, {"target_bpw": 3.25}).nominal_scheme) == "w3a16g32s"


def test_the_default_is_a_preset_and_a_method_is_as_published():
    assert make_recipe("tiny") == make_recipe("tiny", preset="balanced")
    assert make_recipe("tiny", method="omniquant").passes == {"omniquant": {}}
    assert make_recipe("tiny", preset="paper").build_passes() == make_recipe("tiny", method="omniquant").build_passes()


def test_a_recipe_without_passes_gets_the_default_preset(tmp_path):
    recipe = Recipe.from_toml(saved(tmp_path, 'model = "tiny"\n[scheme]\nbits = 3\ngroup_size = 32'))
    assert recipe == make_recipe("tiny", wbits=3, group_size=32)


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_preset_survives_toml(tmp_path, name):
    recipe = make_recipe("tiny", preset=name, abits=8, samples=3)
    assert recipe.calibration.batch_size <= 3
    again = Recipe.from_toml(saved(tmp_path, recipe.to_toml()))
    assert again.build_passes() == recipe.build_passes()
    assert again.calibration == recipe.calibration


def test_a_preset_keeps_the_batch_that_was_asked_for():
    assert make_recipe("tiny", preset="fast", batch_size=3).calibration.batch_size == 3


def test_a_preset_replaces_the_passes_of_a_recipe():
    changed = with_changes(RECIPES["everything"], {}, preset="fast")
    assert (changed.passes, changed.seed) == ({"gptq": {}}, 9)


def test_a_method_and_a_preset_are_refused():
    with pytest.raises(UsageError, match=r"^--method rtn and --preset best both say how to quantize; give one$"):
        make_recipe("tiny", method="rtn", preset="best")


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown preset 'balance' \(did you mean balanced"):
        make_recipe("tiny", preset="balance")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"method": "best"}, "'best' is no method but a preset; use --preset best"),
        ({"preset": "gptq"}, "'gptq' is no preset but a method; use --method gptq"),
        ({"preset": ""}, "unknown preset '' (known: balanced, best, fast, paper)"),
        ({"method": ""}, "unknown method '' (known: awq, distill, gptq, omniquant, rtn)"),
    ],
    ids=str,
)
def test_a_preset_is_no_method_and_a_method_no_preset(how, problem):
    with pytest.raises(UsageError) as caught:
        make_recipe("tiny", **how)
    assert str(caught.value) == problem


def test_an_option_of_methods_that_the_preset_does_not_use_names_them():
    with pytest.raises(UsageError) as caught:
        make_recipe("tiny", preset="fast", options={"updates": 5})
    of = "which is one of distill and omniquant; leave it out, or use those"
    assert str(caught.value) == f"the method gptq has no 'updates', {of}"


def test_an_option_goes_to_the_first_pass_that_has_it_or_to_the_one_it_names():
    options = {"updates": 3, "distill.updates": 0, "norms_lr": 0.5, "omniquant.window": 4}
    built = make_recipe("tiny", preset="balanced", options=options).build_passes()
    assert (built["omniquant"].updates, built["omniquant"].window) == (3, 4)
    assert (built["distill"].updates, built["distill"].norms_lr) == (0, 0.5)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("distil.updates", r"the list of passes has no 'distil' \(did you mean distill"),
        ("distill.update", r"the method distill has no 'update' \(did you mean updates"),
        ("update", r"the method omniquant \+ distill has no 'update' \(did you mean updates\?\)"),
    ],
)
def test_an_option_that_no_pass_has(option, problem):
    with pytest.raises(UsageError, match=problem):
        make_recipe("tiny", options={option: 1})


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("alpha=0.75", "alpha", 0.75),
        (" distill.updates = 0", "distill.updates", 0),
        ("rounding=true", "rounding", True),
        ("schedule=linear", "schedule", "linear"),
        ('schedule="cosine"', "schedule", "cosine"),
    ],
)
def test_a_setting_is_a_toml_value_or_a_word(text, name, value):
    assert parse_setting(text) == (name, value)


@pytest.mark.parametrize("text", ["alpha", "alpha=", "=3", "alpha=[1", "alpha=0,5", ""])
def test_a_setting_that_is_none(text):
    with pytest.raises(UsageError, match=r"^--set takes NAME=VALUE such as lr=0.001"):
        parse_setting(text)


def test_a_pass_whose_name_is_no_string(tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "tiny"\n[[passes]]\nmethod = 1.5\n')
    with pytest.raises(UsageError, match=r"is no recipe: it names the pass 1\.5, which is no string$"):
        Recipe.from_toml(tmp_path / "recipe.toml")
