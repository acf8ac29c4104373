import pytest
import torch

from quantkit.core import masks
from quantkit.core.masks import Sparsity
from quantkit.errors import UsageError


def scores(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("text", "share", "kept", "group"),
    [
        ("0.5", 0.5, None, None),
        ("0", 0.0, None, None),
        (0.25, 0.25, None, None),
        ("2:4", 0.5, 2, 4),
        ("1:8", 7 / 8, 1, 8),
    ],
)
def test_sparsity_is_read_and_written(text, share, kept, group):
    sparsity = Sparsity.parse(text)
    assert (sparsity.share, sparsity.kept, sparsity.group) == (share, kept, group)
    assert Sparsity.parse(str(sparsity)) == sparsity


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1", "from 0 to below 1, not 1"),
        ("-0.1", "not -0.1"),
        ("nan", "not nan"),
        ("50%", "'50%' is no sparsity; give a share such as 0.5, or N:M such as 2:4"),
        ("4:4", "4:4 keeps 4 of every 4 inputs; N of N:M must be at least 1 and below M"),
        ("0:4", "must be at least 1"),
        ("5:4", "below M"),
        ("2:4:8", "is no sparsity"),
    ],
)
def test_sparsity_that_cannot_be_is_refused(text, says):
    with pytest.raises(UsageError, match=says):
        Sparsity.parse(text)


def test_a_width_that_m_does_not_divide_is_refused():
    with pytest.raises(UsageError, match="2:4 needs rows of a multiple of 4 inputs, not 6"):
        masks.choose(scores(3, 6), Sparsity.parse("2:4"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_counts_are_exact_and_the_lowest_go(share, scope):
    values = scores(7, 12)
    mask = masks.choose(values, Sparsity(share=share), scope)
    if scope == "row":
        assert ((~mask).sum(dim=1) == round(share * 12)).all()
        pairs = zip(values, mask, strict=True)
    else:
        assert (~mask).sum() == round(share * 84)
        pairs = [(values, mask)]
    for value, kept in pairs:
        assert kept.all() or not kept.any() or value[~kept].max() <= value[kept].min()


@pytest.mark.parametrize("text", ["1:2", "2:4", "4:8", "1:4", "3:4"])
def test_of_every_m_inputs_n_stay(text):
    sparsity = Sparsity.parse(text)
    values = scores(5, 16)
    mask = masks.choose(values, sparsity)
    kept, group = map(int, text.split(":"))
    assert (mask.view(5, -1, group).sum(dim=-1) == kept).all()
    for value, part in zip(values.view(-1, group), mask.view(-1, group), strict=True):
        assert part[value.argsort(descending=True)[:kept]].all()


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_of_equal_scores_the_first_go(text):
    mask = masks.choose(torch.ones(1, 8), Sparsity.parse(text))
    expected = [0, 0, 0, 0, 1, 1, 1, 1] if text == "0.5" else [0, 0, 1, 1, 0, 0, 1, 1]
    assert mask.tolist() == [list(map(bool, expected))]


def test_weights_of_several_matrices_are_compared_with_each_other():
    parts = {"small": scores(4, 6) / 100, "large": scores(3, 2, 4)}
    found = masks.choose_globally(parts, Sparsity(share=0.5))
    assert not found["small"].any()  # 24 of 48 weights
    assert found["large"].all()
    assert masks.sparsity_of(found) == 0.5
    assert {name: mask.shape for name, mask in found.items()} == {name: part.shape for name, part in parts.items()}


def test_infinite_scores_are_ordered_and_nan_is_refused():
    assert masks.keep_highest(torch.tensor([torch.inf, 1.0, -torch.inf]), 1).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="must be numbers"):
        masks.keep_highest(torch.tensor([1.0, torch.nan]), 1)
    with pytest.raises(ValueError, match="3 of 2"):
        masks.keep_highest(torch.ones(2), 3)


def test_a_mask_keeps_values_and_gradients_of_what_stays():
    weight = scores(3, 4).requires_grad_()
    mask = masks.choose(weight.detach(), Sparsity(share=0.5))
    pruned = masks.apply(weight, mask)
    pruned.sum().backward()
    assert (pruned[~mask] == 0).all()
    assert pruned[mask].equal(weight[mask])
    assert weight.grad.equal(mask.float())


@pytest.mark.parametrize("mask", [torch.ones(4, 3, dtype=torch.bool), torch.ones(3, 4)], ids=["shape", "dtype"])
def test_a_mask_of_another_form_is_refused(mask):
    with pytest.raises(UsageError, match=r"bool and of its weight's shape \(3, 4\), not"):
        masks.apply(scores(3, 4), mask)
