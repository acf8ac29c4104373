"""What share of each linear goes, in all and one by one."""

import itertools

import pytest
import torch

import quantkit
from quantkit.errors import UsageError
from quantkit.model.checkpoint import Checkpoint
from quantkit.recipe import Calibration, Recipe
from quantkit.resources import data_dir
from quantkit.shares import cheapest
from quantkit.sparsities import CHUNK, compressed

TINY = data_dir("model_zoo") / "tiny"
TEXT = Calibration(text="embedded", samples=4, seqlen=16, batch_size=2)


def pruned(output, **options):
    passes = {"magnitude": {"sparsity": 0.4, **options}}
    return quantkit.quantize(Recipe(model="tiny", passes=passes, calibration=TEXT, dense=True), output=output).report


def test_the_cheapest_choice_is_the_cheapest_of_all():
    shares = (0.2, 0.4, 0.6)
    generator = torch.Generator().manual_seed(0)
    costs = {
        name: dict(zip(shares, torch.rand(3, generator=generator).cumsum(0).tolist(), strict=True)) for name in "abc"
    }
    found = cheapest(costs, dict.fromkeys("abc", 100), 120)
    assert sum(found.values()) == 120

    def total(choice):
        return sum(costs[name][share] for name, share in zip("abc", choice, strict=True))

    allowed = [c for c in itertools.product(shares, repeat=3) if sum(round(100 * s) for s in c) >= 120]
    best = min(allowed, key=total)
    assert all(found[name] <= round(100 * share) for name, share in zip("abc", best, strict=True))


def test_one_threshold_prunes_as_if_the_model_were_one_matrix(tmp_path):
    report = pruned(tmp_path / "out", allocation="magnitude")
    names = list(report["sparsity"]["linears"])
    before = Checkpoint(TINY).load([f"{name}.weight" for name in names])
    after = Checkpoint(tmp_path / "out").load([f"{name}.weight" for name in names])
    size = sum(weight.numel() for weight in before.values())
    assert sum(facts["zeros"] for facts in report["sparsity"]["linears"].values()) == round(0.4 * size)
    gone = torch.cat([before[n][after[n] == 0].abs().flatten() for n in before])
    kept = torch.cat([after[n][after[n] != 0].abs().flatten() for n in before])
    assert gone.max() <= kept.min()


@pytest.mark.parametrize("how", ["loss", "mfac"])
def test_shares_by_cost_differ_and_their_sum_is_exact(how, tmp_path):
    report = pruned(tmp_path / "out", allocation=how)
    linears = report["sparsity"]["linears"]
    assert sum(facts["zeros"] for facts in linears.values()) == round(0.4 * sum(f["weights"] for f in linears.values()))
    assert len({facts["asked"] for facts in linears.values()}) > 2


def test_globs_choose_what_is_pruned(tmp_path):
    report = pruned(tmp_path / "out", include=("*.mlp.*",), exclude=("*.0.*",))
    assert len(report["sparsity"]["linears"]) == 4 * 3
    weight = "model.layers.0.mlp.up_proj.weight"
    assert Checkpoint(tmp_path / "out").load([weight])[weight].equal(Checkpoint(TINY).load([weight])[weight])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"include": ("*.nothing",)},
            r"--include '\*.nothing' matches no linear that the run has; names look like model",
        ),
        ({"exclude": ("*.nothing",)}, r"--exclude '\*.nothing' matches no linear"),
        ({"exclude": ("*",)}, "--exclude leaves nothing to prune"),
        ({"sparsity": "3:7"}, "3:7 needs rows of a multiple of 7 inputs, not"),
    ],
)
def test_what_matches_nothing_is_refused(options, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        pruned(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_compressed_size_is_that_of_the_shards(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(bytes(3 * CHUNK))
    (tmp_path / "b.safetensors").write_bytes(torch.randint(0, 256, (CHUNK,), dtype=torch.uint8).numpy().tobytes())
    found = compressed(tmp_path)
    assert found.bytes == 4 * CHUNK
    assert CHUNK < found.compressed_bytes < 1.05 * CHUNK
    assert not found.estimated
    monkeypatch.setattr("quantkit.sparsities.MOST_COMPRESSED", 2 * CHUNK)
    assert compressed(tmp_path).estimated


def test_sparse_weights_compress(tmp_path):
    report = pruned(tmp_path / "out", sparsity=0.9)["sparsity"]
    assert report["compressed_bytes"] < 0.6 * report["bytes"]
