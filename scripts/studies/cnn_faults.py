"""Flipped bits in the stored words of a small network: weights, biases and the thresholds of its bounds.

Words are fixed point Q15.16 (a sign, 15 bits before the point, 16 behind it) or int8 with one scale for each tensor.
The number of flips is binomial in the number of bits, their places are uniform; thresholds are Q15.16 either way, once,
or three times and voted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.resilience.bounds import Bound
from quantkit.resilience.side_file import COPIES, vote

POINT = 16
Words = tuple[np.ndarray, float, int]  # integers, what one of them is worth, and their bits


def fixed_point(values: Tensor) -> Words:
    """Return values as Q15.16 words."""
    whole = np.clip(np.round(values.double().numpy() * 2**POINT), -(2**31), 2**31 - 1)
    return whole.astype(np.int32), 2.0**-POINT, 32


def int8(values: Tensor) -> Words:
    """Return values as int8 words with one scale."""
    step = float(values.abs().max()) / 127 or 1.0
    return np.round(values.double().numpy() / step).astype(np.int8), step, 8


FORMATS = {"q15.16": fixed_point, "int8": int8}


def back(words: Words) -> Tensor:
    """Return the values of words, float32."""
    integers, step, _ = words
    return torch.tensor(integers.astype(np.float64) * step, dtype=torch.float32)


def flipped(words: Words, rate: float, random: np.random.Generator) -> Words:
    """Return words in which each bit was flipped with probability `rate`."""
    integers, step, bits = words
    count = random.binomial(integers.size * bits, rate)
    places = random.choice(integers.size * bits, count, replace=False) if count else np.zeros(0, np.int64)
    kind = np.dtype(f"u{integers.dtype.itemsize}")
    result = integers.copy().reshape(-1).view(kind)
    np.bitwise_xor.at(result, places // bits, (np.uint64(1) << (places % bits).astype(np.uint64)).astype(kind))
    return result.view(integers.dtype).reshape(integers.shape), step, bits


class Faults:
    """A model whose stored words can be disturbed, and are as before afterwards."""

    def __init__(self, model: nn.Module, kind: str = "q15.16", *, copies: int = 1) -> None:
        """Round the parameters of `model` to words of a kind; thresholds are kept in `copies`, one or three."""
        self.model, self.copies = model, copies
        self.words = {name: FORMATS[kind](value.data) for name, value in model.named_parameters()}
        self.bounds = {n: m for n, m in model.named_modules() if isinstance(m, Bound)}
        self.thresholds = {name: fixed_point(bound.threshold) for name, bound in self.bounds.items()}
        self._set(self.words)

    @contextmanager
    def at(self, rate: float, seed: int, *, weights: bool = True) -> Iterator[None]:
        """Disturb the model inside the context; weights are hit alike whatever bounds there are."""
        kept = {name: bound.threshold for name, bound in self.bounds.items()}
        random, other = (np.random.default_rng([seed, part]) for part in (0, 1))
        if weights:
            self._set({name: flipped(words, rate, random) for name, words in self.words.items()})
        for name, bound in self.bounds.items():
            bound.threshold = self._threshold(name, rate, other)
        try:
            yield
        finally:
            self._set(self.words)
            for name, bound in self.bounds.items():
                bound.threshold = kept[name]

    def _threshold(self, name: str, rate: float, random: np.random.Generator) -> Tensor:
        words = self.thresholds[name]
        if self.copies == 1:
            return back(flipped(words, rate, random))
        several = [torch.tensor(flipped(words, rate, random)[0]) for _ in range(COPIES)]
        return back((vote(several).numpy(), words[1], words[2]))

    def _set(self, words: Mapping[str, Words]) -> None:
        for name, value in self.model.named_parameters():
            value.data = back(words[name]).reshape(value.shape)
