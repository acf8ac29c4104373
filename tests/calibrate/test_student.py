"""Who sees quantized activations: the student, and neither the reference stream nor the check sample."""

import pytest
import torch
from families import VOCABULARY, save_tiny

from quantkit.calibrate.engine import Engine, dense
from quantkit.core.scheme import QuantScheme
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.pipeline import Silent
from quantkit.quantizers.omniquant import OmniQuant
from quantkit.quantizers.rtn import RoundToNearest

CPU = torch.device("cpu")
BATCHES = torch.randint(3, VOCABULARY, (4, 1, 40), generator=torch.Generator().manual_seed(2)).unbind()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_tiny("llama", directory)
    return directory


class Watched:
    """A pass that notes, after another, the window's target and what student and teacher make of its first batch."""

    def __init__(self, step):
        self.step, self.phase, self.blocks_at_once, self.seen = step, step.phase, step.blocks_at_once, []

    def apply(self, window):
        self.step.apply(window)
        weights = dense(window.sites)
        outputs = [window.forward(0, weights, student=student).detach() for student in (True, False)]
        self.seen.append((window.targets[0].clone(), *outputs))


def walk(model, text, step):
    """Return block reports, check logits and each window's target and outputs of both kinds."""
    skeleton, scheme, watched = Skeleton(model), QuantScheme.parse(text), Watched(step)
    names = [skeleton.module_name(index, name) for index in range(2) for name in skeleton.block_linears(index)]
    engine = Engine(
        skeleton=skeleton,
        checkpoint=Checkpoint(model),
        passes=[watched],
        schemes=dict.fromkeys(names, scheme),
        scale_dtype=torch.float16,
        device=CPU,
    )
    reports, sample = engine.run(list(BATCHES), lambda block: None, Silent())
    return reports, sample.logits, watched.seen


def test_the_reference_and_the_check_sample_are_those_without_quantized_activations(model):
    plain, quantized = (walk(model, text, RoundToNearest()) for text in ("w4", "w4a4"))
    for (target, *_), (other, *_) in zip(plain[2], quantized[2], strict=True):
        assert torch.equal(target, other)
    assert torch.equal(plain[1], quantized[1])
    assert quantized[0][1].error > 1.5 * plain[0][1].error
    (_, student, teacher), (_, same, unquantized) = quantized[2][0], plain[2][0]
    assert not torch.equal(student, teacher)
    assert torch.equal(same, unquantized)


@pytest.mark.parametrize("aug_loss", [False, True])
def test_clipping_learns_through_quantized_activations(model, aug_loss):
    reports, _, _ = walk(model, "w3a4", OmniQuant(updates=24, lwc_lr=0.03, aug_loss=aug_loss))
    assert all(report.error < report.error_rtn for report in reports)
