import copy

import numpy as np
import pytest
import torch
from families import VOCABULARY, save_tiny

from quantkit.errors import ModelError
from quantkit.evaluation.divergence import EDGES, divergence
from quantkit.evaluation.perplexity import perplexity

ROWS = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tmp_path):
    return save_tiny("llama", tmp_path).eval()


def with_fixed_logits(model, logits):
    """Return a model that predicts softmax(`logits`) everywhere: the hidden states are constant."""
    fixed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fixed.parameters():
            parameter.zero_()
        fixed.model.embed_tokens.weight.fill_(1.0)
        fixed.model.norm.weight.fill_(1.0)
        fixed.lm_head.weight[:, 0] = logits
    return fixed


def test_of_a_model_with_itself_is_zero(model):
    result = divergence(model, model, ROWS)
    assert (result.kl, result.top1_agreement, result.tokens) == (0.0, 1.0, 45)
    assert result.perplexity == result.reference_perplexity


def test_is_the_closed_form_for_known_distributions(model):
    generator = torch.Generator().manual_seed(0)
    actual, reference = torch.randn(2, VOCABULARY, generator=generator)
    result = divergence(with_fixed_logits(model, actual), with_fixed_logits(model, reference), ROWS)
    p, q = reference.double().softmax(0), actual.double().softmax(0)
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert result.top1_agreement == float(actual.argmax() == reference.argmax())
    assert result.perplexity == pytest.approx(float((-q.log()[ROWS[:, 1:]].mean()).exp()), rel=1e-4)


def test_its_perplexities_are_those_of_each_model(model, tmp_path):
    other = save_tiny("llama", tmp_path / "other").eval()
    with torch.no_grad():
        other.lm_head.weight.mul_(3.0)
    result = divergence(other, model, ROWS)
    assert result.perplexity == pytest.approx(perplexity(other, ROWS).perplexity)
    assert result.reference_perplexity == pytest.approx(perplexity(model, ROWS).perplexity)
    assert result.kl > 0


def test_a_token_that_is_impossible_counts_nothing(model):
    logits = torch.zeros(VOCABULARY)
    logits[5:] = -torch.inf
    impossible = with_fixed_logits(model, torch.zeros(VOCABULARY))
    impossible.lm_head.register_forward_hook(lambda module, args, output: output + logits)
    result = divergence(impossible, impossible, torch.tensor([[1, 2, 3, 4]]))
    assert result.kl == 0.0
    assert result.reference_perplexity == pytest.approx(5.0)


def test_refuses_another_vocabulary(model, tmp_path):
    other = save_tiny("llama", tmp_path / "other")
    other.config = copy.deepcopy(other.config)
    other.config.vocab_size = 7
    with pytest.raises(ModelError, match="vocabularies differ, 128 and 7"):
        divergence(model, other, ROWS)


@torch.no_grad()
def test_its_spread_is_that_of_a_computation_in_float64(model, tmp_path):
    other = save_tiny("llama", tmp_path / "other").eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in other.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    rows = torch.randint(3, VOCABULARY, (14, 16), generator=generator)  # 210 positions
    kls = []
    for row in rows:
        p, q = (each(row[None]).logits[0, :-1].double().log_softmax(-1).numpy() for each in (model, other))
        kls += [float(np.sum(np.exp(p[i]) * (p[i] - q[i]))) for i in range(len(p))]
    result = divergence(other, model, rows)
    kls.sort()
    assert len(kls) == result.tokens == 210
    assert result.kl == pytest.approx(np.mean(kls), rel=1e-4)
    assert result.kl_median == pytest.approx(kls[104], rel=1e-4)
    assert result.kl_p99 == pytest.approx(kls[207], rel=1e-4)  # 208 of 210 positions are 99 %
    assert result.kl_max == pytest.approx(kls[-1], rel=1e-4)
    bars = [-np.inf, *EDGES, np.inf]
    assert result.kl_histogram == tuple(np.histogram(kls, bars)[0])
    assert sum(count > 0 for count in result.kl_histogram) > 1
