"""Clipping functions and styles, against the formulas and against a loop that clips one example after the other."""

import math

import pytest
import torch
from slotted import batch, losses_of, one_by_one, slotted, tiny

from quantkit.errors import UsageError
from quantkit.personal.clipping import check, clipped_sum, factors, norms, partition
from quantkit.personal.gradients.dp import Dp

FUNCTIONS = ("abadi", "global", "auto-v", "auto-s")
STYLES = ("flat", "layer-wise", "group-wise")
BOUND = 3.5  # between the norms of examples, which are 2.5 to 4.5


def by_hand(function, norm, bound):
    """Return the factor of one example, as the papers write it."""
    if function == "abadi":
        return min(1.0, bound / (norm + 1e-6))
    if function == "global":
        return 1.0 if norm <= bound else 0.0
    return bound / norm if function == "auto-v" else bound / (norm + 0.01)


def by_loop(rows, blocks, function, bound):
    """Return the sum over examples of gradients that are clipped in these blocks of names."""
    total = {name: torch.zeros_like(value[0]) for name, value in rows.items()}
    for place in range(len(next(iter(rows.values())))):
        for names in blocks:
            norm = math.sqrt(sum(float((rows[name][place] ** 2).sum()) for name in names))
            for name in names:
                total[name] += by_hand(function, norm, bound / math.sqrt(len(blocks))) * rows[name][place]
    return total


def blocks_of(style, names):
    if style == "flat":
        return [list(names)]
    if style == "layer-wise":
        return [[name] for name in names]  # every module has its bias alone
    return [[name for name in names if f"layers.{number}." in name] for number in (0, 1)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 1, 1, 1, 1]])
def test_without_noise_the_gradient_is_that_of_a_loop(function, style, sizes):
    model, parameters = slotted(tiny("llama"))
    given = batch(5)
    theirs = by_loop(one_by_one(model, parameters, given), blocks_of(style, parameters), function, BOUND)
    ours = Dp(noise=0, expected=4, clipping=function, style=style, bound=BOUND)
    ours.estimate(losses_of(model, given, sizes), parameters, step=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, theirs[name] / 4, rtol=1e-11, atol=1e-13)


def test_the_bounds_of_the_loop_clip_some_and_not_others():
    model, parameters = slotted(tiny("llama"))
    rows = one_by_one(model, parameters, batch(5))
    for style in STYLES:
        blocks = blocks_of(style, parameters)
        inside = torch.cat([norms(rows, names) <= BOUND / math.sqrt(len(blocks)) for names in blocks])
        assert inside.any()
        assert not inside.all()


def test_auto_s_lifts_small_gradients_as_the_paper_says():
    norm = torch.tensor([3.7e-3, 0.39, 3.0, 33.0])
    torch.testing.assert_close(
        norm * factors(norm, 1.0, "auto-s"), torch.tensor([0.27, 0.975, 0.997, 0.9997]), atol=5e-4, rtol=0
    )
    torch.testing.assert_close(
        norm * factors(norm, 1.0, "abadi"), torch.tensor([0.0037, 0.39, 1, 1]), atol=5e-4, rtol=0
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("style", STYLES)
def test_no_example_adds_more_than_the_bound(function, style):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 6, 50)
    names = ["layers.0.a.bias", "layers.0.b.bias", "layers.1.a.bias", "head.bias"]
    rows = {name: torch.randn(50, 7, generator=generator) * sizes[:, None] for name in names}
    for place in range(50):
        alone = {name: value[place : place + 1] for name, value in rows.items()}
        total = clipped_sum(alone, partition(names, style), bound=0.7, function=function, gamma=0.01)
        assert math.sqrt(sum(float(value.square().sum()) for value in total.values())) <= 0.7 * (1 + 1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_example_that_is_not_finite_counts_as_zero(function, bad):
    rows = {"a": torch.tensor([[1.0, 2.0], [bad, 1.0], [0.0, 0.0]])}
    total = clipped_sum(rows, [["a"]], bound=1.0, function=function, gamma=0.01)
    alone = clipped_sum({"a": rows["a"][:1]}, [["a"]], bound=1.0, function=function, gamma=0.01)
    assert torch.equal(total["a"], alone["a"])


def test_groups_are_modules_or_decoder_blocks():
    names = ["model.layers.0.a.bias", "model.layers.0.a.scale", "model.layers.10.a.bias", "lm_head.bias", "norm"]
    assert partition(names, "flat") == [names]
    assert partition(names, "layer-wise") == [names[:2], [names[2]], [names[3]], [names[4]]]
    assert partition(names, "group-wise") == [names[:2], [names[2]], names[3:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("auto-z", "flat", 1.0, 0.01), "unknown clipping 'auto-z' (did you mean auto-"),
        (("auto-s", "flatt", 1.0, 0.01), "unknown clipping style 'flatt' (did you mean flat?)"),
        (("auto-s", "flat", 0.0, 0.01), "clipping bound is 0; use a finite number above 0"),
        (("auto-s", "flat", 1.0, math.nan), "gamma is nan; use a finite number above 0"),
    ],
)
def test_what_cannot_be_clipped_with_is_refused(arguments, message):
    function, style, bound, gamma = arguments
    with pytest.raises(UsageError) as refused:
        check(function, style, bound=bound, gamma=gamma)
    assert message in str(refused.value)
