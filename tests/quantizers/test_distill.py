"""What distillation gives up is said, and undone."""

import quantkit

FEW = {"wbits": 3, "group_size": 32, "calibration": "embedded", "samples": 4, "seqlen": 32, "device": "cpu"}
QUICK = {"updates": 0, "init": "nearest", "distill.updates": 4}


def distilled(output, **options):
    return quantkit.quantize("tiny", output=output, batch_size=2, options=QUICK | options, **FEW).report


def test_what_is_worse_than_before_is_undone_and_said(tmp_path):
    untouched = distilled(tmp_path / "untouched", **{"distill.updates": 0})
    worse = distilled(tmp_path / "worse", **{"distill.lr": 0.5, "norms_lr": 0.5})
    assert worse["sha256"] == untouched["sha256"]
    assert worse["whole"]["fallback"].startswith("scales and norms stay, because their divergence ")
    assert worse["whole"]["divergence_after"] == worse["whole"]["divergence_before"]


def test_what_is_better_is_kept(tmp_path):
    whole = distilled(tmp_path / "better", **{"distill.lr": 1e-3, "norms_lr": 1e-3})["whole"]
    assert whole["divergence_after"] < whole["divergence_before"]
    assert "fallback" not in whole


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    whole = distilled(tmp_path / "broken", **{"distill.lr": 1e30, "norms_lr": 1e30})["whole"]
    assert whole["diverged"] == "in the first pass over the batches, so nothing was learned"
    assert whole["divergence_after"] == whole["divergence_before"]
