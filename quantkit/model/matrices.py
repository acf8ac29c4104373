"""The weight matrices of any module: of linears, convolutions, recurrent layers and attention.

A matrix is a parameter that multiplies: biases, norms and embeddings are none. A parameter that several modules share
is one matrix, under the first of its names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quantkit.errors import UsageError, nearest

Target = Literal["ih", "hh", "both"]
TARGETS: tuple[Target, ...] = ("ih", "hh", "both")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_STACKED = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight matrix of a module.

    Attributes:
        name: the parameter's name inside the whole model, such as `rnn.weight_hh_l0`.
        owner: the name of the module that it belongs to, such as `rnn`.
        module: that module.
        weight: the parameter; `rows` has it as a matrix.
        stacked: how many matrices lie on top of each other in it, as the gates of an LSTM do.
        target: `ih` (from the input) or `hh` (from the hidden state) in a recurrent layer, otherwise None.
        transposed: whether the parameter is (in, out), as in GPT-2's Conv1D.
    """

    name: str
    owner: str
    module: nn.Module
    weight: Tensor
    stacked: int = 1
    target: Literal["ih", "hh"] | None = None
    transposed: bool = False

    def rows(self, values: Tensor) -> Tensor:
        """Return `values`, which are shaped like the parameter, as (out, in): a row is what one output is made of."""
        return (values.T if self.transposed else values).flatten(1)

    def unrows(self, rows: Tensor) -> Tensor:
        """Return what `rows` would make `rows`."""
        return rows.T if self.transposed else rows.view_as(self.weight)

    def called(self, glob: str) -> bool:
        """Return whether `glob` matches the name of the parameter or of its module."""
        return fnmatchcase(self.name, glob) or fnmatchcase(self.owner, glob)


def find_matrices(
    model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), target: Target | None = None
) -> list[Matrix]:
    """Return the matrices of `model` that a glob of `include` names and none of `exclude`.

    With a `target` these are the matrices of recurrent layers alone, those from the input (`ih`), from the hidden state
    (`hh`, with an LSTM's projection of it) or both.

    Raises:
        UsageError: there is none, a glob names none, the target is unknown, or one that was asked for has no values yet
            or is computed from other parameters.
    """
    if target is not None and target not in TARGETS:
        raise UsageError(f"there is no target {target!r}{nearest(target, TARGETS)}")
    found = list(_all(model))
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no weight matrix; give a module with linears, convolutions or RNNs"
        )
    for glob in (*include, *exclude):
        if not any(matrix.called(glob) for matrix in found):
            raise UsageError(f"{glob!r} names no weight matrix{nearest(glob, (matrix.name for matrix in found))}")
    wanted = (None, "ih", "hh") if target is None else ("ih", "hh") if target == "both" else (target,)
    chosen = [
        matrix
        for matrix in found
        if matrix.target in wanted
        and any(matrix.called(glob) for glob in include)
        and not any(matrix.called(glob) for glob in exclude)
    ]
    if not chosen:
        raise UsageError(
            f"no weight matrix is left of {len(found)} with include {[*include]}, exclude {[*exclude]}"
            f" and target {target}; name fewer things"
        )
    for matrix in chosen:
        _refuse_unusable(matrix)
    return chosen


def _all(model: nn.Module) -> Iterator[Matrix]:
    """Yield every matrix of the model, one that modules share once."""
    seen: set[int] = set()
    for owner, module in model.named_modules():
        for matrix in _own(owner, module):
            if id(matrix.weight) not in seen:
                seen.add(id(matrix.weight))
                yield matrix


def _own(owner: str, module: nn.Module) -> Iterator[Matrix]:
    """Yield the matrices of one module, without those of the modules inside it."""
    stacked, transposed = 1, type(module).__name__ == "Conv1D"  # transformers' linear of GPT-2
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or transposed:
        names = ["weight"]
    elif isinstance(module, _RECURRENT):
        names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")]
        stacked = next((count for kind, count in _STACKED.items() if isinstance(module, kind)), 1)
    elif isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight"] if module.in_proj_weight is not None else [f"{role}_proj_weight" for role in "qkv"]
        stacked = 3 if module.in_proj_weight is not None else 1
    else:
        names = []
    for name in names:
        yield Matrix(
            name=f"{owner}.{name}" if owner else name,
            owner=owner,
            module=module,
            weight=getattr(module, name),
            stacked=1 if "weight_hr" in name else stacked,
            target=_target(name),
            transposed=transposed,
        )


def _target(name: str) -> Literal["ih", "hh"] | None:
    if name.startswith("weight_ih"):
        return "ih"
    return "hh" if name.startswith(("weight_hh", "weight_hr")) else None


def _refuse_unusable(matrix: Matrix) -> None:
    weight = matrix.weight
    if is_lazy(weight) or weight.is_meta:
        raise UsageError(f"{matrix.name} has no values yet; give the module its weights first")
    if not isinstance(weight, nn.Parameter):
        raise UsageError(f"{matrix.name} is computed from other parameters; remove the parametrization, or exclude it")
    if not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.")
        raise UsageError(f"{matrix.name} holds {kind}; only floating-point weights can be pruned")
