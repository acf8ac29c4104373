"""The exact choice against trying everything, and what must hold of it at sizes where that is impossible."""

import itertools
import random
import time

import pytest

from quantkit.core.allocate import Option, allocate

LLAMA_7B = [3 * 4096 * 4096, 4096 * 4096, 2 * 4096 * 11008, 4096 * 11008]
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def bits(items, chosen):
    return sum(item[index].bits for item, index in zip(items, chosen, strict=True))


def loss(items, chosen):
    return sum(item[index].loss for item, index in zip(items, chosen, strict=True))


def small(seed):
    """A few items with a few options, some of them useless, and a budget that fits at least the smallest."""
    generator = random.Random(seed)
    items = [
        [
            Option(generator.randint(1, 30), generator.random() * generator.choice([1e-6, 1, 100]))
            for _ in range(generator.randint(1, 5))
        ]
        for _ in range(generator.randint(1, 5))
    ]
    least, most = (sum(end(option.bits for option in item) for item in items) for end in (min, max))
    return items, generator.randint(least, most + 3)


def model(blocks, *, seed=0, odd=False):
    """The linears of a Llama 2 with that many blocks; losses fall about as 4^-bits, in some items not even that."""
    generator = random.Random(seed)
    return [
        [
            Option(
                int((size + generator.randint(0, 1000) * odd) * (width + 0.125)),
                scale * generator.uniform(3, 4.5) ** -width,
            )
            for width in WIDTHS
        ]
        for _ in range(blocks)
        for size in LLAMA_7B
        for scale in [generator.lognormvariate(0, 1)]
    ]


def budget(items, bits_per_weight):
    return int(sum(item[0].bits for item in items) * bits_per_weight / 2.125)


@pytest.mark.parametrize("seed", range(150))
def test_it_is_the_best_of_all_choices(seed):
    items, limit = small(seed)
    choices = itertools.product(*(range(len(item)) for item in items))
    best = min((loss(items, choice), bits(items, choice)) for choice in choices if bits(items, choice) <= limit)
    chosen = allocate(items, limit)
    assert loss(items, chosen) == pytest.approx(best[0], rel=1e-12, abs=1e-15)
    assert bits(items, chosen) <= limit


@pytest.mark.parametrize("odd", [False, True], ids=["equal blocks", "every size its own"])
@pytest.mark.parametrize("bits_per_weight", [2.125, 2.3, 3.25, 6])
def test_the_budget_is_kept_and_used(odd, bits_per_weight):
    items = model(32, odd=odd)
    limit = budget(items, bits_per_weight)
    used = bits(items, allocate(items, limit))
    assert 0.995 * limit < used <= limit


def test_more_bits_never_lose_more():
    items = model(4, seed=3)
    losses = [loss(items, allocate(items, budget(items, 2.125 + step / 2))) for step in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 100 * losses[-1]


def test_a_uniform_choice_of_the_same_size_loses_more():
    items = model(8)
    for index, width in enumerate(WIDTHS[1:-1], 1):
        assert loss(items, allocate(items, budget(items, width + 0.125))) < loss(items, [index] * len(items))


def test_an_option_that_is_larger_and_worse_is_never_taken():
    items = [[Option(2, 1.0), Option(3, 5.0), Option(4, 0.5)], [Option(2, 1.0), Option(3, 1.0), Option(4, 1.0)]]
    assert allocate(items, 100) == [2, 0]
    assert allocate(items, 5) == [0, 0]


@pytest.mark.parametrize("odd", [False, True], ids=["equal blocks", "every size its own"])
def test_a_70b_model_takes_less_than_two_seconds(odd):
    items = model(80, seed=1, odd=odd)
    start = time.process_time()
    allocate(items, budget(items, 3.25))
    assert time.process_time() - start < 2  # 0.3 s on one idle core


def test_no_items_and_too_small_a_budget():
    assert not allocate([], 0)
    with pytest.raises(ValueError, match="the smallest options take more than 3 bits"):
        allocate([[Option(2, 0.0)], [Option(2, 0.0)]], 3)
