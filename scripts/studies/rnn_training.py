"""The networks of the study, and their training: strings as tensors, epochs, accuracy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from reber import Example
from torch import Tensor, nn

KINDS = {"tanh": "RNN-Tanh", "relu": "RNN-ReLU", "lstm": "LSTM", "gru": "GRU"}
LARGEST_GRADIENT = 5.0
SORTED = 16  # batches that are sorted by length together, so that a batch has strings of about one length


@dataclass(frozen=True)
class Strings:
    """Strings as tensors: ASCII codes (strings, longest), padded with zeros; lengths; labels, 1 for valid."""

    codes: Tensor
    lengths: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Strings":
        """Return `examples` as tensors."""
        lengths = torch.tensor([len(example.text) for example in examples])
        rows = [example.text.encode("ascii").ljust(int(lengths.max()), b"\0") for example in examples]
        labels = torch.tensor([example.valid for example in examples], dtype=torch.long)
        return cls(torch.tensor([list(row) for row in rows]), lengths, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator["Strings"]:
        """Yield all strings in batches, each as wide as its longest; with a generator in random order."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        batches = [
            batch for some in order.split(size * SORTED) for batch in some[self.lengths[some].argsort()].split(size)
        ]
        turns = range(len(batches)) if generator is None else torch.randperm(len(batches), generator=generator).tolist()
        for turn in turns:
            rows = batches[turn]
            width = int(self.lengths[rows].max())
            yield Strings(self.codes[rows, :width], self.lengths[rows], self.labels[rows])


def recurrent(kind: str, inputs: int, hidden: int, layers: int = 1) -> nn.RNNBase:
    """Return recurrent layers of a kind of `KINDS`, batch first."""
    if kind in {"tanh", "relu"}:
        return nn.RNN(inputs, hidden, layers, nonlinearity=kind, batch_first=True)
    return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](inputs, hidden, layers, batch_first=True)


class Classifier(nn.Module):
    """Letters are embedded, `body` turns them into states (batch, letters, width), the last one says valid or not."""

    def __init__(self, body: nn.Module, inputs: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, inputs)
        self.body = body
        self.head = nn.Linear(width, 2)

    def forward(self, strings: Strings) -> Tensor:
        """Return logits (batch, 2): invalid, valid."""
        states = self.body(self.embedding(strings.codes))
        states = states[0] if isinstance(states, tuple) else states
        return self.head(states[torch.arange(len(strings)), strings.lengths - 1])


def classifier(kind: str, *, hidden: int, layers: int, seed: int) -> Classifier:
    """Return an untrained network of `layers` recurrent layers of `hidden` units."""
    torch.manual_seed(seed)
    return Classifier(recurrent(kind, hidden, hidden, layers), hidden, hidden)


def train_epoch(
    network: Classifier, strings: Strings, optimizer: torch.optim.Optimizer, generator: torch.Generator, batch: int
) -> float:
    """Train on all strings once and return the accuracy on them while it was trained."""
    network.train()
    right = 0
    for some in strings.batches(batch, generator):
        logits = network(some)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, some.labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        right += int((logits.argmax(dim=1) == some.labels).sum())
    return right / len(strings)


@torch.no_grad()
def accuracy(network: Classifier, strings: Strings) -> float:
    """Return the share of strings that the network judges rightly."""
    network.eval()
    return sum(int((network(some).argmax(dim=1) == some.labels).sum()) for some in strings.batches(500)) / len(strings)
