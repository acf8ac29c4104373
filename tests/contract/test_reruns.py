"""One recipe and one seed give the same bytes: every method, every preset, every file of the output."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

import quantkit
from quantkit import methods, presets
from quantkit.calibrate.passes import Phase
from quantkit.core.scheme import QuantScheme
from quantkit.recipe import Calibration, Recipe, with_changes

TEXT = Calibration(text="embedded", samples=2, seqlen=16, batch_size=2)
START = """
import sys
import quantkit
from quantkit.recipe import Recipe
from pathlib import Path
quantkit.quantize(Recipe.from_toml(Path(sys.argv[1])), output=sys.argv[2], device="cpu")
"""


def shortened(recipe):
    """Return the recipe with few updates wherever there are some."""
    passes = {
        name: {**own, **({"updates": 2} if hasattr(methods.find("quantizers", name), "updates") else {})}
        for name, own in recipe.passes.items()
    }
    return replace(recipe, passes=passes)


def method(name):
    rounds = methods.find("quantizers", name).phase == Phase.ROUND
    return shortened(Recipe(model="tiny", passes={name: {}} if rounds else {"rtn": {}, name: {}}))


def preset(name):
    return shortened(with_changes(Recipe(model="tiny"), {}, preset=name))


RECIPES = {f"method {name}": method(name) for name in methods.names("quantizers")}
RECIPES |= {f"preset {name}": preset(name) for name in presets.NAMES}
RECIPES["rotated"] = replace(method("rtn"), rotate=True)
RECIPES["target"] = with_changes(method("rtn"), {"target_bpw": 3.5})
RECIPES["activations"] = replace(preset("balanced"), scheme=QuantScheme.parse("w4a8g32"))
RECIPES["further formats"] = replace(method("rtn"), formats=("gptq", "awq"))


def small(recipe):
    own = recipe.calibration
    text = replace(TEXT, batch_size=min(own.batch_size, TEXT.batch_size))
    return replace(recipe, calibration=text, scheme=replace(recipe.scheme, group_size=32))


def contents(output):
    """Return the digest of every file of an output, of the report without what depends on the clock and on memory."""
    found = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == "report.json":
            report = json.loads(data)
            report["measured"] = report["measured"]["output_bytes"]
            report["predicted"] = report["predicted"]["output_bytes"]
            data = json.dumps(report).encode()
        found[str(path.relative_to(output))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_rerun_writes_the_same_files(name, tmp_path):
    recipe = small(RECIPES[name])
    for run in ("one", "two"):
        quantkit.quantize(recipe, output=tmp_path / run, device="cpu")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {"config.json", "recipe.toml", "report.json", "check.json"} <= contents(tmp_path / "one").keys()


def test_another_seed_writes_other_files(tmp_path):
    recipe = small(RECIPES["method gptq"])
    for seed in (0, 1):
        quantkit.quantize(replace(recipe, seed=seed), output=tmp_path / str(seed), device="cpu")
    assert contents(tmp_path / "0")["check.json"] != contents(tmp_path / "1")["check.json"]


@pytest.mark.slow
def test_the_seed_of_hashes_does_not_matter(tmp_path):
    (tmp_path / "recipe.toml").write_text(small(RECIPES["preset balanced"]).to_toml())
    for seed in ("1", "2"):
        command = [sys.executable, "-c", START, tmp_path / "recipe.toml", tmp_path / seed]
        environment = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment | {"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)})
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
