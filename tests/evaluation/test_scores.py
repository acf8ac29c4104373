"""Scores of two models held against each other, without any model."""

import pytest

from quantkit.evaluation.scores import Score, TaskScores, flips


def score(right, *, task="pick", metric="acc"):
    value = sum(right) / len(right) if right else 0.0
    return Score(
        task=task,
        metric=metric,
        filter="none",
        value=value,
        stderr=None,
        higher_is_better=True,
        samples=len(right or ()),
        num_fewshot=0,
        right=right,
    )


def test_flips_are_counted_in_both_directions():
    found = flips(score((True, True, False, False, True)), score((True, False, True, False, False)))
    assert (found.to_wrong, found.to_right, found.samples) == (1, 2, 5)
    assert found.share == 3 / 5


def test_accuracies_may_be_equal_where_answers_are_not():
    one, other = score((True, False)), score((False, True))
    assert one.value == other.value
    assert flips(one, other).share == 1.0


def test_only_right_and_wrong_answers_flip():
    scores = (score((True, False)), score(None, metric="perplexity"), score((True,), task="alone"))
    result = TaskScores(scores=scores, reference=TaskScores(scores=scores[:2]))
    assert [(each.task, each.metric) for each in result.flips] == [("pick", "acc")]
    assert [other is not None for _, other in result.pairs()] == [True, True, False]


def test_without_a_reference_nothing_flips():
    assert TaskScores(scores=(score((True,)),)).flips == ()


def test_other_documents_are_no_pair():
    with pytest.raises(ValueError, match="shorter"):
        flips(score((True, True)), score((True,)))
