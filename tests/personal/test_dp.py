"""Private gradients: their noise, empty batches, what the estimator keeps."""

import math

import pytest
import torch
from slotted import batch, losses_of, slotted, tiny

from quantkit.errors import UsageError
from quantkit.personal import chance
from quantkit.personal.gradients.dp import METHOD, Dp

BIG = {"a.bias": torch.nn.Parameter(torch.zeros(200, 500))}


def noise_of(estimator, step=0):
    estimator.estimate([], BIG, step=step)
    return BIG["a.bias"].grad.double()


def test_an_empty_batch_is_noise_of_the_right_size_and_has_no_loss():
    estimator = Dp(noise=1.5, bound=0.4, expected=8)
    assert math.isnan(estimator.estimate([], BIG, step=0))
    drawn = BIG["a.bias"].grad.double() * 8
    assert float(drawn.std()) == pytest.approx(1.5 * 0.4, rel=0.02)
    assert abs(float(drawn.mean())) < 4 * 0.6 / math.sqrt(drawn.numel())
    assert float((drawn.abs() < 0.6).double().mean()) == pytest.approx(0.6827, abs=0.01)  # normal, not just so wide


def test_noise_is_added_once_however_many_micro_batches_there_are():
    model, parameters = slotted(tiny("llama"))
    given, seeded = batch(6), {"expected": 6, "key": chance.fixed_key(3)}
    for sizes in ([6], [1, 2, 3], [1] * 6):
        found = []
        for noise in (0.0, 2.0):
            Dp(noise=noise, **seeded).estimate(losses_of(model, given, sizes), parameters, step=4)
            found.append(torch.cat([parameter.grad.flatten() for parameter in parameters.values()]))
        names = [chance.normal(chance.fixed_key(3), f"noise 4 {n}", p.shape).flatten() for n, p in parameters.items()]
        torch.testing.assert_close(found[1] - found[0], 2.0 * torch.cat(names) / 6, rtol=1e-9, atol=1e-12)


def test_steps_and_tensors_have_noise_of_their_own():
    seeded = Dp(noise=1, expected=1, key=chance.fixed_key(0))
    first, second = noise_of(seeded, 0), noise_of(seeded, 1)
    together = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(float(together)) < 4 / math.sqrt(first.numel())
    assert torch.equal(noise_of(seeded, 0), first)


def test_noise_cannot_be_had_again_unless_a_seed_is_asked_for():
    assert not torch.equal(noise_of(Dp(noise=1, expected=1)), noise_of(Dp(noise=1, expected=1)))
    assert Dp(noise=1, expected=1).state() == {}
    assert "key" not in repr(Dp(noise=1, expected=1))


def test_a_batch_is_divided_by_its_expected_size():
    model, parameters = slotted(tiny("llama"))
    gradients = []
    for expected in (5, 10):
        Dp(noise=0, expected=expected).estimate(losses_of(model, batch(3)), parameters, step=0)
        gradients.append(next(iter(parameters.values())).grad)
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


def test_the_mean_loss_is_that_of_all_micro_batches():
    model, parameters = slotted(tiny("llama"))
    together = losses_of(model, batch(5))[0]().mean().item()
    found = Dp(noise=0, expected=5).estimate(losses_of(model, batch(5), [4, 1]), parameters, step=0)
    assert found == pytest.approx(together)
    assert all(slot.copies is None for slot in model.modules() if hasattr(slot, "copies"))


@pytest.mark.parametrize("settings", [{"noise": -1, "expected": 1}, {"noise": math.nan, "expected": 1}])
def test_impossible_noise_is_refused(settings):
    with pytest.raises(UsageError, match="use a finite number, 0 for none"):
        Dp(**settings)


def test_an_impossible_batch_is_refused():
    with pytest.raises(UsageError, match="the expected batch is 0; use a number above 0"):
        Dp(noise=1, expected=0)


def test_it_is_the_method_of_its_file():
    assert METHOD is Dp
