"""The study of a bounded CNN: what is flipped, that it comes back, and what bounds are worth."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit import Resilience, bound_module

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "studies"))
import cnn_report
import cnn_resilience
from cnn_faults import FORMATS, Faults, back, flipped
from digits_cnn import accuracy, digits, network, train


@pytest.fixture(scope="module")
def trained():
    data, model = digits(), network()
    train(model, data.train, epochs=6)
    return model, data


def test_no_image_is_in_two_parts():
    data = digits()
    seen = [image.numpy().tobytes() for part in (data.train, data.held_out, data.test) for image in part[0]]
    assert [len(part[0]) for part in (data.train, data.held_out, data.test)] == [897, 300, 600]
    assert len(seen) == 1797


@pytest.mark.parametrize(("kind", "bits", "error"), [("q15.16", 32, 2**-17), ("int8", 8, 3 / 254)])
def test_words_hold_values_to_half_a_step(kind, bits, error):
    values = torch.linspace(-3, 3, 101)
    words = FORMATS[kind](values)
    assert words[2] == bits
    assert (back(words) - values).abs().max() <= error * 1.001


@pytest.mark.parametrize("kind", FORMATS)
def test_as_many_bits_are_flipped_as_the_binomial_says(kind):
    words, random = FORMATS[kind](torch.zeros(5000)), np.random.default_rng(0)
    counts = [
        int(np.unpackbits(flipped(words, 1e-3, random)[0].view(np.uint8)).sum()) for _ in range(200)
    ]  # of zeros, every bit that is set was flipped
    expected = 5000 * words[2] * 1e-3
    assert abs(np.mean(counts) - expected) < 4 * np.sqrt(expected / 200)
    assert 0.7 < np.var(counts) / expected < 1.4


def test_everything_is_as_before_after_an_injection(trained):
    model, data = copy.deepcopy(trained[0]), trained[1]
    bound_module(model, data.train[0], resilience=Resilience(kind="ranger"))
    faults = Faults(model, copies=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with faults.at(1e-3, seed=1):
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bounds_save_accuracy_under_the_same_faults(trained):
    model, data = trained
    bounded = copy.deepcopy(model)
    bound_module(bounded, data.train[0], resilience=Resilience(kind="ranger"))
    assert accuracy(bounded, data.test) > 0.9
    bare, kept = (
        cnn_resilience.campaign(Faults(copy.deepcopy(each)), data.test, 1e-5, trials=12) for each in (model, bounded)
    )
    assert np.mean(kept) > np.mean(bare) + 0.2


def test_the_table_of_claims_says_which_bands_are_disjoint():
    rows = [
        {"name": name, "points": {1e-5: (value, 0.01)}}
        for name, value in (("none", 0.3), ("ranger", 0.5), ("layer", 0.505), ("hybrid", 0.4))
    ]
    cells = [[cell.strip() for cell in line.split("|")] for line in cnn_report.claims(rows).splitlines()]
    found = {line[1]: line[2] for line in cells if " < " in line[1]}
    assert found == {"none < ranger": "yes", "ranger < layer": "bands overlap", "layer < hybrid": "reversed"}
