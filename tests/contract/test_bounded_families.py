"""Bounds in every family: all places are found, or the family is refused in one line."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, WITHOUT_FILE, save_tiny
from transformers import AutoModelForCausalLM

from quantkit.errors import ModelError
from quantkit.resilience.places import Bounds, attach, attached, detach, find_places, width_of

DESCRIBED = [family for family in FAMILIES if family != WITHOUT_FILE]
TOKENS = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def build(family):
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return build


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def bounds_of(model, value, *, vectors):
    places = find_places(model)
    shape = {place.name: (width_of(model, place),) if vectors else () for place in places}
    return Bounds(thresholds={name: torch.full(size, value) for name, size in shape.items()})


@pytest.mark.parametrize("vectors", [False, True], ids=["scalars", "vectors"])
@pytest.mark.parametrize("family", DESCRIBED)
def test_loose_bounds_change_nothing_and_tight_ones_bind(tiny, family, vectors):
    model = tiny(family)
    before = logits(model)
    seen = attach(model, bounds_of(model, 1e4, vectors=vectors))
    assert len(seen) == 3 * 2
    assert torch.equal(logits(model), before)
    attach(model, bounds_of(model, 1e-3, vectors=vectors))
    assert (logits(model) - before).abs().max() > 1e-3
    detach(model)
    assert not attached(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", DESCRIBED)
def test_a_weight_that_is_not_a_number_does_not_reach_the_logits(tiny, family, tmp_path):
    model = tiny(family)
    attach(model, bounds_of(model, 1e3, vectors=False))
    try:
        for place in find_places(model):
            if place.group == "block":
                continue
            weight = model.get_submodule(place.name).weight
            kept = weight.detach().clone()
            weight.data.view(-1)[3] = torch.nan
            assert logits(model).isfinite().all(), place
            weight.data.copy_(kept)
    finally:
        detach(model)


def test_a_family_without_a_file_is_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES[WITHOUT_FILE])
    with pytest.raises(ModelError, match=r"no architecture file describes 'stablelm'.* add one"):
        find_places(model)


def test_bounds_of_another_width_or_depth_are_refused(tiny):
    model = tiny("llama")
    right = bounds_of(model, 1.0, vectors=True)
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.down_proj has 128 neurons, not \(64,\)"):
        attach(model, Bounds(thresholds={**right.thresholds, name: torch.ones(64)}))
    fewer = {place: value for place, value in right.thresholds.items() if place != name}
    with pytest.raises(ModelError, match=f"only one of both has {name}"):
        attach(model, Bounds(thresholds=fewer))
    assert not attached(model)
