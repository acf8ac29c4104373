"""Logical batches: Poisson and shuffled."""

import math

import pytest
import torch

from quantkit.errors import DataError, UsageError
from quantkit.personal.chance import fixed_key, secret_key
from quantkit.personal.sampling import Poisson, Shuffled

KEY = fixed_key(0)


def test_poisson_draws_every_example_with_the_rate_and_independently():
    sampler = Poisson(examples=50, batch_size=5, key=KEY)
    steps = 4000
    taken = torch.zeros(steps, 50, dtype=torch.float64)
    for step in range(steps):
        taken[step, sampler.batch(step)] = 1
    assert sampler.rate == 0.1
    assert float((taken.mean(0) - 0.1).abs().max()) < 5 * math.sqrt(0.09 / steps)
    sizes = taken.sum(1)
    assert float(sizes.mean()) == pytest.approx(5, abs=5 * math.sqrt(4.5 / steps))
    assert float(sizes.var()) == pytest.approx(50 * 0.09, rel=0.15)  # a fixed size would have none
    together = torch.corrcoef(taken.T) - torch.eye(50, dtype=torch.float64)
    assert float(together.abs().max()) < 5 / math.sqrt(steps)


def test_poisson_batches_may_be_empty_and_may_be_everything():
    sizes = [len(Poisson(examples=3, batch_size=1, key=KEY).batch(step)) for step in range(60)]
    assert 0 in sizes
    assert Poisson(examples=3, batch_size=3, key=KEY).batch(7).tolist() == [0, 1, 2]


def test_shuffled_has_every_example_once_per_epoch_in_an_order_of_its_own():
    sampler = Shuffled(examples=10, batch_size=4, key=KEY)
    assert sampler.steps_per_epoch == 3
    epochs = [[sampler.batch(step).tolist() for step in range(3 * e, 3 * e + 3)] for e in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 2]] * 2
    flat = [[number for batch in epoch for number in batch] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(10))
    assert flat[0] != flat[1]


@pytest.mark.parametrize("kind", [Poisson, Shuffled])
def test_a_later_process_goes_on_with_the_same_batches(kind):
    made = kind(examples=20, batch_size=6, key=KEY)
    again = kind(examples=20, batch_size=6, key=KEY)
    assert all(torch.equal(made.batch(step), again.batch(step)) for step in (5, 3, 11))
    assert [made.batch(s).tolist() for s in range(4)] != [
        kind(examples=20, batch_size=6, key=secret_key()).batch(s).tolist() for s in range(4)
    ]


@pytest.mark.parametrize("kind", [Poisson, Shuffled])
def test_impossible_batches_are_refused(kind):
    with pytest.raises(DataError, match="there are no examples to train on"):
        kind(examples=0, batch_size=1, key=KEY)
    for size in (0, 9):
        with pytest.raises(UsageError, match=f"a batch of {size} cannot be drawn from 8 examples; use 1 to 8"):
            kind(examples=8, batch_size=size, key=KEY)
