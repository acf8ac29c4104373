"""Which examples make up a logical batch: by Poisson sampling, which privacy is proved for, or from a shuffled deck.

Both are functions of a key and of the step, so a run that was cut off goes on where it was. The key of a private run is
a secret, like its noise: who knows which examples were drawn gets no benefit of their having been drawn at random.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.errors import DataError, UsageError
from quantkit.personal.chance import uniform


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """What both have.

    Attributes:
        examples: how many there are.
        batch_size: how many a batch has on average, at most `examples`.
        key: of `chance.secret_key`, or of `chance.fixed_key` where nothing need be private.
    """

    examples: int
    batch_size: int
    key: bytes

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise DataError("there are no examples to train on; give data with at least one")
        if not 1 <= self.batch_size <= self.examples:
            raise UsageError(
                f"a batch of {self.batch_size} cannot be drawn from {self.examples} examples; use 1 to {self.examples}"
            )


@dataclass(frozen=True, kw_only=True)
class Poisson(_Drawn):
    """Each example is in each batch with probability `rate`, whatever the others do; a batch may be empty."""

    kind: ClassVar[str] = "poisson"

    @property
    def rate(self) -> float:
        """The probability that an example is in a batch."""
        return self.batch_size / self.examples

    def batch(self, step: int) -> Tensor:
        """Return the numbers of the examples of one step, ascending, int64."""
        return torch.nonzero(uniform(self.key, f"poisson {step}", self.examples) < self.rate).flatten()


@dataclass(frozen=True, kw_only=True)
class Shuffled(_Drawn):
    """Every example once per epoch, `batch_size` at a time, the last batch of an epoch what is left.

    No amplification is claimed for it: known attacks get more out of shuffled batches than the accounting of Poisson
    batches would allow (Chua et al., "How Private are DP-SGD Implementations?", 2024).
    """

    kind: ClassVar[str] = "shuffled"

    @property
    def steps_per_epoch(self) -> int:
        """How many batches have every example once."""
        return -(-self.examples // self.batch_size)

    def batch(self, step: int) -> Tensor:
        """Return the numbers of the examples of one step, int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.argsort(uniform(self.key, f"shuffled {epoch}", self.examples), stable=True)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


Sampler = Poisson | Shuffled
