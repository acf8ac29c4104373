"""Rotates a model's residual stream and folds the rotation into its weights, so that the model computes what it did.

QuaRot (Ashkboos et al., arXiv 2404.00456, section 4, stage 1a) and the R1 of SpinQuant (arXiv 2405.16406). For an
orthogonal R and an RMS norm without its weight, norm(x R) = norm(x) R. With g the weight of the norm before a linear,

    W <- W diag(g) R    g <- 1           a linear that reads the stream behind a norm, and the head
    W <- R' W           b <- R' b        a linear that writes to it
    E <- E R                             the embedding

leaves every output unchanged while the stream is x R, in which a random Hadamard R spreads the channels with outliers
over all others. Everything is computed in float64 and stored in the dtype of the weight.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.core.hadamard import random_hadamard
from quantkit.errors import ModelError
from quantkit.model.architecture import Architecture
from quantkit.model.skeleton import Skeleton

_ROWS = 8192  # rows that are in float64 at the same time: an embedding has too many


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """A rotation of one model's residual stream.

    Attributes:
        matrix: R, (width, width), float64, orthogonal.
        norm_offset: what the norms add to their weight before they multiply by it.
        readers: name of a norm inside a block → names of the linears that read the stream behind it.
        writers: names inside a block of the linears that write to the stream.
        final_norm: full name of the norm before the head.
    """

    matrix: Tensor
    norm_offset: float
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    final_norm: str

    @classmethod
    def of(cls, skeleton: Skeleton, seed: int) -> Self:
        """Return a random Hadamard rotation of the model.

        Raises:
            ModelError: the model cannot be rotated exactly, see `refusal`.
            UsageError: no Hadamard matrix of the model's width can be built.
        """
        if reason := refusal(skeleton):
            raise ModelError(f"{skeleton.config.model_type} models cannot be rotated: {reason}; leave the rotation out")
        family, width = skeleton.architecture, skeleton.config.get_text_config().hidden_size
        assert family is not None
        return cls(
            matrix=random_hadamard(width, seed),
            norm_offset=family.norm_offset,
            readers=_readers(family),
            writers=family.writes,
            final_norm=_final_norm(skeleton) or "",
        )

    @torch.no_grad()
    def rotate_block(self, block: nn.Module) -> tuple[str, ...]:
        """Make `block` read and write the rotated stream; return the names of the parameters that changed."""
        changed = []
        for norm_name, linears in self.readers.items():
            gain = self._take_gain(block.get_submodule(norm_name))
            changed.append(f"{norm_name}.weight")
            for name in linears:
                weight = _weight(block.get_submodule(name))
                weight.copy_(_times(weight, self.matrix, gain))
                changed.append(f"{name}.weight")
        for name in self.writers:
            for end, value in block.get_submodule(name).named_parameters(recurse=False):
                value.copy_(_times(value.mT if value.ndim == 2 else value[None], self.matrix).mT.reshape(value.shape))
                changed.append(f"{name}.{end}")
        return tuple(changed)

    @torch.no_grad()
    def rotate_outer(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Rotate what lies outside the blocks; return the names of the parameters that changed.

        A head that shares the embedding's weight gets its own, and the configuration says so: only the head takes up
        the weight of the final norm.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        gain = self._take_gain(model.get_submodule(self.final_norm))
        head_weight = _times(_weight(head), self.matrix, gain)
        embedding.weight = nn.Parameter(_times(_weight(embedding), self.matrix), requires_grad=False)
        head.weight = nn.Parameter(head_weight, requires_grad=False)
        model.config.tie_word_embeddings = False
        names = {id(module): name for name, module in model.named_modules()}
        return tuple(f"{name}.weight" for name in (names[id(embedding)], self.final_norm, names[id(head)]))

    def _take_gain(self, norm: nn.Module) -> Tensor:
        """Return what `norm` multiplies by, in float64, and make it multiply by one."""
        weight = _weight(norm)
        gain = weight.double() + self.norm_offset
        weight.fill_(1.0 - self.norm_offset)
        return gain


def refusal(skeleton: Skeleton) -> str | None:
    """Return why no rotation of the model's residual stream can be folded into its weights, None if it can."""
    family = skeleton.architecture
    if family is None:
        return "no architecture file describes them"
    if not family.writes:
        return "a norm stands behind what their blocks add to the residual stream"
    readers = _readers(family)
    known = {*chain.from_iterable(readers.values()), *family.writes}
    for index, block in enumerate(skeleton.blocks):
        if strange := [name for name in skeleton.block_linears(index) if name not in known]:
            return f"their {strange[0]} reads the residual stream behind no norm that has a weight"
        for norm in readers:
            if not _is_rms_norm(block.get_submodule(norm), family.norm_offset):
                return f"their {norm} is no RMS norm, it subtracts the mean or has a bias"
    final_norm = _final_norm(skeleton)
    if final_norm is None or not _is_rms_norm(skeleton.model.get_submodule(final_norm), family.norm_offset):
        return "outside the blocks they have more than an embedding, an RMS norm and a head"
    return None


def _readers(family: Architecture) -> dict[str, tuple[str, ...]]:
    """Return the norms that linears of a block read behind, each with its linears."""
    linears = {name for group in family.groups for name in group.linears}
    return {group.after: group.linears for group in family.groups if group.after and group.after not in linears}


def _final_norm(skeleton: Skeleton) -> str | None:
    """Return the name of the only module with a weight outside the blocks besides the embedding and the head."""
    model = skeleton.model
    known = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    others = [name for name, value in skeleton.outer_parameters().items() if id(value) not in known]
    return others[0].removesuffix(".weight") if len(others) == 1 and others[0].endswith(".weight") else None


@torch.no_grad()
def _is_rms_norm(norm: nn.Module, offset: float) -> bool:
    """Return whether `norm`, with a weight that stands for one, does nothing but divide by the root mean square."""
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    weight = _weight(probe).fill_(1.0 - offset)
    hidden = torch.linspace(1.0, 3.0, len(weight)).view(1, 1, -1)
    return torch.allclose(probe(hidden), hidden / hidden.square().mean().sqrt(), rtol=1e-3)


def _times(weight: Tensor, matrix: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return weight diag(gain) matrix, computed in float64, in the dtype of `weight`."""
    right = matrix.to(weight.device) if gain is None else gain[:, None] * matrix.to(weight.device)
    return torch.cat([(rows.double() @ right).to(weight.dtype) for rows in weight.split(_ROWS)])


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
