"""What OmniQuant does here past its paper: sliding windows, learned rounding and weights, other starts, bfloat16."""

import dataclasses
import itertools

import pytest
import torch
from families import VOCABULARY, WITHOUT_FILE, save_tiny
from windows import kept_error, learned_by, make_engine, make_window

from quantkit.core.affine import group_bounds, quantize
from quantkit.core.scheme import QuantScheme
from quantkit.core.search import searched_bounds
from quantkit.pipeline import Silent
from quantkit.quantizers import omniquant
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.omniquant import OmniQuant
from quantkit.resources import data_dir
from quantkit.train.fit import FitResult
from quantkit.train.trainables import INITIAL_LOGIT

TINY = data_dir("model_zoo") / "tiny"
SCHEME = QuantScheme(bits=2, group_size=32)
BATCHES = torch.randint(3, 1024, (2, 4, 24), generator=torch.Generator().manual_seed(0)).unbind()
QUICK = {"updates": 12, "lwc_lr": 0.05, "schedule": "linear"}
ROUNDING = {"rounding": True, "rounding_lr": 0.6}


@pytest.fixture
def window():
    return make_window(TINY, SCHEME, BATCHES, noise=0.02)


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory):
    """Make the directory of a tiny model of a family, once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save_tiny(family, made[family])
        return made[family]

    return make


def learned_error(window, **options):
    """Return the window's error after one method that begins anew; it did not fall back."""
    for site in window.sites:
        site.learned = None
    OmniQuant(**(QUICK | options)).apply(window)
    assert window.notes == {}
    return kept_error(window)


def decisions(sites):
    return {
        (site.name, part): getattr(site.quantized, part) for site in sites for part in ("codes", "scale", "zero_point")
    }


def walk(model, method, batches, scheme=SCHEME):
    """Return the reports and the finished sites of a walk, and what was seen of every window.

    Seen are the blocks' numbers, how many are fresh, and what the sites of each block held before and after.
    """
    seen, sites = [], []

    class Watched:
        phase = method.phase
        blocks_at_once = method.blocks_at_once

        def apply(self, window):
            held = [[site.learned for site in block.sites] for block in window.blocks]
            method.apply(window)
            kept = [[site.learned for site in block.sites] for block in window.blocks]
            seen.append(([block.index for block in window.blocks], window.fresh, held, kept))

    engine = make_engine(model, scheme, [Watched()])
    reports, _ = engine.run(list(batches), lambda block: sites.extend(block.sites), Silent())
    return reports, sites, seen


def test_windows_slide_by_one_block_and_go_on_with_what_was_learned():
    _, _, seen = walk(TINY, OmniQuant(window=2, updates=1), BATCHES)
    assert [blocks for blocks, *_ in seen] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert [fresh for _, fresh, *_ in seen] == [2, 1, 1, 1]
    for (*_, kept), (*_, held, _) in itertools.pairwise(seen):
        assert all(old is new for old, new in zip(kept[1], held[0], strict=True))
        assert held[1] == [None] * len(held[1])


@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
def test_every_block_is_optimised_whatever_the_window(blocks):
    reports, sites, seen = walk(TINY, OmniQuant(window=blocks, updates=4, lwc_lr=0.05), BATCHES)
    assert {index for numbers, *_ in seen for index in numbers} == set(range(5))
    assert len(seen) == 5 - min(blocks, 5) + 1
    assert all(learned_by(site).gamma.detach().ne(INITIAL_LOGIT).any() for site in sites)
    assert len(reports) == 5


def test_a_window_of_two_blocks_brings_the_last_one_closer_to_the_original():
    methods = [OmniQuant(updates=12, lwc_lr=0.1, schedule="linear", window=blocks) for blocks in (1, 2)]
    alone, together = (walk(TINY, method, BATCHES)[0][-1].error for method in methods)
    assert together < 0.9 * alone


def test_two_walks_over_windows_decide_the_same():
    method = OmniQuant(updates=3, window=2, let=True, rounding=True, schedule="cosine")
    first, second = (decisions(walk(TINY, method, BATCHES)[1]) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_transforms_are_folded_once_and_start_at_one_when_the_block_is_seen_again(monkeypatch):
    started = []

    class Transform(omniquant.BlockTransform):
        def __init__(self, block, *args, **kwargs):
            super().__init__(block, *args, **kwargs)
            started.append((block.index, all(bool((scale == 1).all()) for scale in self.scales.values())))

    monkeypatch.setattr(omniquant, "BlockTransform", Transform)
    reports, _, _ = walk(TINY, OmniQuant(let=True, window=2, **QUICK), BATCHES[:1])
    assert started == [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True), (4, False)]
    assert all(report.error < report.error_rtn for report in reports)


def test_learned_rounding_takes_one_of_the_two_neighbouring_levels(window):
    OmniQuant(**QUICK, **ROUNDING).apply(window)
    moved = 0
    for site in window.sites:
        found, bounds = site.quantized, learned_by(site).bounds()
        nearest = quantize(site.weight, *bounds, SCHEME, site.scale_dtype)
        assert torch.equal(found.scale, nearest.scale)
        assert torch.equal(found.zero_point, nearest.zero_point)
        distance = (found.codes.int() - nearest.codes.int()).abs()
        assert distance.max() <= 1
        moved += int(distance.sum())
        scale, zero = found.scale.float()[..., None], found.zero_point.float()[..., None]
        steps = site.weight.unflatten(1, (-1, 32)) / scale + zero
        inside = (steps > SCHEME.smallest_code) & (steps < SCHEME.largest_code)
        apart = (found.codes.float() - steps.flatten(1)).abs()[inside.flatten(1)]
        assert apart.max() <= 1 + 1e-5
        assert learned_by(site).offset.detach().abs().max() <= 0.5
    assert moved > 100


def test_learned_rounding_and_learned_weights_gain_over_clipping_alone(window):
    clipping = learned_error(window)
    assert clipping < window.error_rtn
    assert learned_error(window, **ROUNDING) < 0.9 * clipping
    assert learned_error(window, weights=True, weights_lr=0.02) < 0.9 * clipping


def test_rounding_is_learned_without_clipping_too(window):
    assert learned_error(window, lwc=False, **ROUNDING) < 0.9 * window.error_rtn
    for site in window.sites:
        expected = quantize(site.weight, *group_bounds(site.weight, SCHEME), SCHEME, site.scale_dtype)
        assert torch.equal(site.quantized.scale, expected.scale)


@pytest.mark.parametrize("let_down", [False, True], ids=["let", "let_down"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2"])
def test_transforms_and_rounding_learn_together_in_every_layout(directory_of, family, let_down):
    tokens = torch.randint(3, VOCABULARY, (2, 4, 16), generator=torch.Generator().manual_seed(3)).unbind()
    scheme = QuantScheme.parse("w3a8g16")
    method = OmniQuant(**QUICK, **ROUNDING, let=True, let_down=let_down)
    reports, _, _ = walk(directory_of(family), method, tokens, scheme)
    assert all(report.error < report.error_rtn for report in reports)
    assert not any(report.notes for report in reports)


def test_let_down_moves_scales_between_up_and_down(window):
    untouched = {name: value.clone() for name, value in window.blocks[0].module.state_dict().items()}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    OmniQuant(updates=2, let=True, let_down=True, lwc_lr=0.05).apply(window)
    assert window.notes == {}
    after = window.blocks[0].module.state_dict()
    up, down = (after[f"mlp.{name}_proj.weight"] / untouched[f"mlp.{name}_proj.weight"] for name in ("up", "down"))
    by_norm = untouched["post_attention_layernorm.weight"] / after["post_attention_layernorm.weight"]
    torch.testing.assert_close((up / by_norm)[:, 0] * down[0], torch.ones(len(up)), rtol=1e-4, atol=0)
    assert (down[0] - 1).abs().max() > 0.1
    assert window.blocks[0].changed == norms


def test_blocks_without_a_place_for_transforms_learn_the_rest_or_say_that_nothing_is_learned(directory_of):
    tokens = torch.randint(3, VOCABULARY, (1, 4, 16), generator=torch.Generator().manual_seed(3)).unbind()
    window = make_window(directory_of(WITHOUT_FILE), SCHEME, tokens)
    OmniQuant(lwc=False, let=True, updates=2).apply(window)
    assert window.notes == {"learned": "nothing, because no equivalent transform has a place in these blocks"}
    assert kept_error(window) == pytest.approx(window.error_rtn, rel=1e-2)
    window.notes.clear()
    assert learned_error(window, let=True) < window.error_rtn


def test_a_search_starts_the_clipping_at_the_searched_bounds(window):
    nearest, searched = (learned_error(window, updates=0, init=init) for init in ("nearest", "search"))
    assert searched < 0.9 * nearest
    for site in window.sites:
        expected = torch.stack(searched_bounds(site.weight, SCHEME, scale_dtype=site.scale_dtype))
        shrunken = torch.stack(group_bounds(site.weight, SCHEME)) * torch.tensor(INITIAL_LOGIT).sigmoid()
        limit = torch.minimum(expected.abs(), shrunken.abs())  # logits begin within what still has a gradient
        torch.testing.assert_close(torch.stack(learned_by(site).bounds()).abs(), limit, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["rounding", "weights"])
def test_gptq_gives_the_start_of_rounding_and_weights(window, kind):
    searched = learned_error(window, updates=0, init="search", **{kind: True})
    started = learned_error(window, updates=0, init="gptq", **{kind: True})
    assert started < searched
    solved = GPTQ().solve(window, {site.parameter: learned_by(site).bounds() for site in window.sites})
    for site in window.sites:
        assert torch.equal(site.quantized.codes, solved[site.name][0].codes)
    assert learned_error(window, init="gptq", lwc_lr=0.005, rounding_lr=0.06, **{kind: True}) < started


def amp_while_training(window, monkeypatch, *, native):
    seen = []
    monkeypatch.setattr(omniquant, "native_bfloat16", lambda device: native)
    with monkeypatch.context() as patch:
        patch.setattr(omniquant, "fit", lambda *args, **kwargs: seen.append(window.amp) or FitResult())
        OmniQuant(amp=True).apply(window)
    return seen


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_for_training_alone_and_only_where_the_cpu_has_it(window, monkeypatch, native):
    assert amp_while_training(window, monkeypatch, native=native) == [native]
    assert not window.amp


def test_without_instructions_for_bfloat16_it_changes_nothing(window, monkeypatch):
    monkeypatch.setattr(omniquant, "native_bfloat16", lambda device: False)
    errors = [learned_error(window, amp=amp, updates=4) for amp in (False, True)]
    assert errors[0] == errors[1]


def test_training_in_bfloat16_learns_nearly_as_much(window, monkeypatch):
    monkeypatch.setattr(omniquant, "native_bfloat16", lambda device: True)
    exact, rough = (learned_error(window, amp=amp, **ROUNDING) for amp in (False, True))
    assert exact != rough
    assert rough == pytest.approx(exact, rel=0.05)


def test_predictions_follow_the_settings():
    plain, started = OmniQuant(updates=5), OmniQuant(updates=7, window=3, init="gptq", rounding=True)
    assert (plain.updates_per_window, plain.blocks_at_once, plain.second_order) == (5, 1, False)
    assert (started.updates_per_window, started.blocks_at_once, started.second_order) == (7, 3, True)
    assert plain.forwards_per_window == plain.roundings_per_window == 0
    assert started.forwards_per_window == GPTQ().forwards_per_window
    assert started.roundings_per_window == GPTQ().roundings_per_window
    assert dataclasses.replace(plain, aug_loss=True, let=True).forwards_per_window == 2
