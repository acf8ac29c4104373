"""Pruning of any module, without a checkpoint: `prune_module` chooses masks, `apply_masks` takes those of somebody.

Scores come from the weights alone (`magnitude`) or from the weights and what reaches them (`wanda`: |W| · ‖x‖, Sun et
al., arXiv 2306.11695, here for every layer that is linear in its weight, convolutions too). A `random-graph` asks
neither; the gates of a recurrent layer share its structure, since a gate is part of a unit.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from quantkit.core.masks import SCOPES, Scope, Sparsity, choose, choose_globally
from quantkit.errors import UsageError, nearest
from quantkit.model.matrices import Matrix, Target, find_matrices
from quantkit.pruners.random_graph import KINDS, Kind, mask_of, random_graph
from quantkit.train.masked import Masks

Method = Literal["magnitude", "wanda", "random-graph"]
SMALLEST_GRAPH, LARGEST_GRAPH = 3, 64  # nodes
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def prune_module(  # noqa: PLR0913  each is a choice of its own
    model: nn.Module,
    *,
    sparsity: float | str = 0.5,
    method: Method = "magnitude",
    scope: Scope | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    target: Target | None = None,
    per_gate: bool = False,
    inputs: Inputs | None = None,
    graph: Kind = "watts-strogatz",
    seed: int = 0,
) -> Masks:
    """Set the least important weights of `model` to zero and return which stay.

    >>> masks = quantkit.prune_module(model, sparsity=0.8, target="hh")
    >>> with masks.keep(optimizer):
    ...     train(model, optimizer)

    The model is changed in place; nothing is added to it, and its state dict keeps its names.

    Args:
        model: any module; the weights of its linears (GPT-2's Conv1D too), convolutions, recurrent layers and cells and
            `MultiheadAttention` are pruned, not biases, norms, embeddings. A weight that modules share is pruned once.
        sparsity: the share of the weights that go, below 1, or N:M such as `2:4`, by which N of M consecutive inputs
            stay.
        method: `magnitude`; `wanda`, which needs `inputs`; or `random-graph`, a structure to train from.
        scope: within what weights are compared: `matrix`, `row`, or `global`, over all chosen matrices. None: a row for
            wanda, otherwise a matrix.
        include: globs of names of parameters or of modules.
        exclude: the same, of what stays dense.
        target: prune recurrent layers alone, their matrices from the input (`ih`), from the hidden state (`hh`), or
            `both`.
        per_gate: compare within each gate of an LSTM or GRU, and within Q, K and V of attention; otherwise over their
            stacked matrix.
        inputs: what the model is called with once, a tensor, a tuple of arguments, or a mapping of them by name.
        graph: `watts-strogatz` or `barabasi-albert`, of `random-graph`.
        seed: of random graphs, another one for each matrix.

    Raises:
        UsageError: something above is not as it says, or nothing fits it; then no weight was touched.
    """
    wanted = _checked(method, scope, graph, per_gate=per_gate, inputs=inputs)
    share = Sparsity.parse(str(sparsity))
    matrices = find_matrices(model, include=include, exclude=exclude, target=target)
    _refuse_widths(matrices, share)
    if method == "random-graph":
        return Masks(model, {matrix.name: _structure(matrix, share, graph, seed) for matrix in matrices})
    scores = {matrix.name: matrix.weight.detach().abs() for matrix in matrices}
    if method == "wanda":
        energies = input_energies(model, matrices, inputs)
        scores = {name: score * energies[name].sqrt() for name, score in scores.items()}
    for name, score in scores.items():
        if not score.isfinite().all():
            raise UsageError(f"{name} or what reaches it is not finite; give a model and inputs that are")
    return Masks(model, _chosen(matrices, scores, share, wanted, per_gate=per_gate))


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Masks:
    """Set the weights of `model` to zero that `masks` drops, whoever made them, and return the masks as a handle.

    Args:
        model: any module.
        masks: a bool tensor of a parameter's shape for each parameter's name, True where a weight stays.

    Raises:
        UsageError: there is no mask, no parameter of that name, or a mask is not bool or of another shape.
    """
    return Masks(model, masks)


def input_energies(model: nn.Module, matrices: Sequence[Matrix], inputs: Inputs | None) -> dict[str, Tensor]:
    """Return, by name and of each weight's shape, the sum of x² over every x that the weight is multiplied with.

    A layer y = W x is linear in W, so that sum is the gradient, with regard to W, of the sum of its outputs for x²:
    without a case for strides, padding, dilation or groups. The model is called once, in evaluation mode.

    Raises:
        UsageError: a matrix lies inside a recurrent layer or attention, or nothing reached it.
    """
    hidden = [matrix.name for matrix in matrices if matrix.name.rpartition(".")[2] != "weight"]
    if hidden:
        raise UsageError(
            f"what reaches {hidden[0]} cannot be seen from outside its layer; exclude it, or use magnitude"
        )
    energies: dict[str, Tensor] = {}
    handles = [
        matrix.module.register_forward_pre_hook(_adding(matrix, energies), with_kwargs=True) for matrix in matrices
    ]
    try:
        with _evaluating(model), torch.no_grad():
            _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for matrix in matrices:
        if matrix.name not in energies:
            raise UsageError(f"the inputs never reach {matrix.name}; exclude it, or give inputs that do")
    return energies


def _adding(matrix: Matrix, energies: dict[str, Tensor]) -> Callable[..., None]:
    """Return a hook that adds the energy of one call's inputs to those of `matrix`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        (inputs,) = (*args, *named.values())
        weight, trained = matrix.weight, matrix.weight.requires_grad
        weight.requires_grad_()
        with torch.enable_grad():
            outputs = module.forward(inputs.detach().square())  # calling the module would call this hook again
            energy = torch.autograd.grad(outputs.sum(), weight)[0]
        weight.requires_grad_(trained)
        energies[matrix.name] = energies[matrix.name] + energy if matrix.name in energies else energy

    return hook


def _call(model: nn.Module, inputs: Inputs | None) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*(inputs if isinstance(inputs, tuple) else (inputs,)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own at the end."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _checked(method: str, scope: str | None, graph: str, *, per_gate: bool, inputs: Inputs | None) -> Scope:
    """Return the scope that is meant.

    Raises:
        UsageError: a name is unknown, or two choices contradict each other.
    """
    if method not in get_args(Method):
        raise UsageError(f"prune_module knows no method {method!r}{nearest(method, get_args(Method))}")
    if scope is not None and scope not in SCOPES:
        raise UsageError(f"there is no scope {scope!r}{nearest(scope, SCOPES)}")
    if graph not in KINDS:
        raise UsageError(f"there is no graph {graph!r}{nearest(graph, KINDS)}")
    if (method == "wanda") != (inputs is not None):
        raise UsageError("wanda needs inputs, what the model is called with, and other methods take none")
    if method == "random-graph" and (per_gate or scope not in {None, "matrix"}):
        raise UsageError("a random graph compares no weights; leave out scope and per_gate")
    if method == "wanda" and scope == "global":
        raise UsageError("wanda has no scope='global', since norms of different inputs differ; give row or matrix")
    if per_gate and scope == "global":
        raise UsageError("per_gate compares within a gate, and scope='global' over all matrices; choose one of them")
    return scope or ("row" if method == "wanda" else "matrix")


def _refuse_widths(matrices: Sequence[Matrix], sparsity: Sparsity) -> None:
    for matrix in matrices:
        try:
            sparsity.check_width(matrix.rows(matrix.weight).shape[1])
        except UsageError as error:
            raise UsageError(f"{matrix.name}: {error}") from None


def _structure(matrix: Matrix, sparsity: Sparsity, kind: Kind, seed: int) -> Tensor:
    """Return the mask of a random graph, in the shape of the parameter, the same for each of its stacked matrices.

    Raises:
        UsageError: a side is shorter than the smallest graph.
    """
    rows, width = matrix.rows(matrix.weight).shape
    shape = (rows // matrix.stacked, width)
    if min(shape) < SMALLEST_GRAPH:
        raise UsageError(
            f"{matrix.name} has {shape[0]} outputs of {width} inputs; a graph needs 3 of both, so exclude it"
        )
    own = (seed << 32) + zlib.crc32(matrix.name.encode())
    graph = random_graph(kind, min(LARGEST_GRAPH, *shape), 1 - sparsity.share, seed=own)
    mask = mask_of(graph, shape, sparsity, seed=own).to(matrix.weight.device)
    return matrix.unrows(mask.repeat(matrix.stacked, 1))


def _chosen(
    matrices: Sequence[Matrix], scores: Mapping[str, Tensor], sparsity: Sparsity, scope: Scope, *, per_gate: bool
) -> dict[str, Tensor]:
    """Return the masks by name, in the shapes of the parameters."""
    rows = {matrix.name: matrix.rows(scores[matrix.name]) for matrix in matrices}
    if scope == "global":
        masks = choose_globally(rows, sparsity)
    else:
        pieces = {m.name: rows[m.name].chunk(m.stacked if per_gate else 1) for m in matrices}
        masks = {name: torch.cat([choose(piece, sparsity, scope) for piece in pieces[name]]) for name in pieces}
    return {matrix.name: matrix.unrows(masks[matrix.name]) for matrix in matrices}
