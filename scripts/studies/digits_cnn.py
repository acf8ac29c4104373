"""A small CNN for the handwritten digits of scikit-learn: 1,797 images of 8 × 8, in three parts."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT, TEST = 300, 600


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,): to train on, to accept thresholds by, to judge on."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int = 0) -> Digits:
    """Return the images, shuffled by `seed`."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order.split([len(order) - HELD_OUT - TEST, HELD_OUT, TEST])
    return Digits(*((images[part], labels[part]) for part in parts))


def network(seed: int = 0) -> nn.Sequential:
    """Return two convolutions and two linears with ReLU between them, 38,282 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(512, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int = 20, seed: int = 0) -> None:
    """Train with Adam and cross-entropy, in batches of 32."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(32):
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images that are classified rightly; NaN logits are wrong."""
    images, labels = data
    logits = model(images)
    right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
    return float(right.float().mean())
