"""The sizes of a run, from which `costs` predicts its memory and time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.calibrate.passes import Pass
from quantkit.calibrate.self_text import cache_elements, sequences_at_once
from quantkit.calibrate.text import SELF
from quantkit.errors import UsageError
from quantkit.model.skeleton import Skeleton
from quantkit.recipe import Recipe

DEFAULT_SEQLEN = 2048
SEQLEN_TO_CHECK = 512  # for methods that do not learn: enough to measure block errors


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a run.

    Attributes:
        blocks: number of blocks.
        block_parameters: parameters of the largest block.
        block_linears: number of linears in a block.
        block_features: input and output features of its linears, summed.
        block_columns: input features of its linears, summed.
        block_scales: scales of its linears.
        outer_parameters: parameters outside the blocks.
        width: size of a hidden state.
        vocabulary: number of tokens that the model knows.
        stored_bytes: bytes of one stored parameter of the source.
        samples: calibration sequences.
        seqlen: tokens in one.
        batch_size: sequences in a batch.
        window: blocks that are optimised together.
        streams: copies of the hidden states that are kept.
        updates: training updates, over one batch each, that a block takes part in; 0: nothing is trained.
        trained: numbers that are trained in a block.
        forwards: forward passes of a block over all samples that the methods make besides.
        roundings: times that they round the weights of a block to try something.
        hessian: inputs of the widest linear of which second moments are held; 0: of none.
        whole: updates of the whole model after the walk; None: no pass needs the whole model.
        rotates: whether the residual stream is rotated.
        ties: groups of linears in a block whose loss is measured first; 0: none is.
        widths: how many widths each of them is measured at.
        device: where blocks are computed.
        at_once: sequences that the model writes side by side to be calibrated on; 0: it writes none.
        cache: numbers in the keys and values of one such sequence.
    """

    blocks: int
    block_parameters: int
    block_linears: int
    block_features: int
    block_columns: int
    block_scales: int
    outer_parameters: int
    width: int
    vocabulary: int
    stored_bytes: int
    samples: int
    seqlen: int
    batch_size: int
    device: torch.device
    window: int = 1
    streams: int = 2
    updates: float = 0
    trained: int = 0
    forwards: float = 0
    roundings: float = 0
    hessian: int = 0
    whole: int | None = None
    rotates: bool = False
    ties: int = 0
    widths: int = 0
    at_once: int = 0
    cache: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether the blocks are computed on a GPU."""
        return self.device.type == "cuda"

    @property
    def parameters(self) -> int:
        """All parameters of the model, as if every block were as large as the largest."""
        return self.blocks * self.block_parameters + self.outer_parameters


def workload(skeleton: Skeleton, recipe: Recipe, device: torch.device, *, ties: int = 0, widths: int = 0) -> Workload:
    """Return the sizes of a run; `ties` groups of linears in all are measured at `widths` widths first.

    Raises:
        UsageError: a sequence longer than the model's context.
    """
    passes = [*recipe.build_passes().values()]
    walk = [step for step in passes if step.blocks_at_once]
    blocks = len(skeleton.blocks)
    window = min(blocks, max((step.blocks_at_once for step in walk), default=1))
    text_config, dtype = skeleton.config.get_text_config(), skeleton.config.dtype
    seqlen, writes = sequence_length(skeleton, recipe), recipe.calibration.text == SELF
    whole = [step.updates_per_window for step in passes if not step.blocks_at_once]
    linears = skeleton.block_linears(0).values()
    shapes = [shape(module) for module in linears]
    inputs = [shape(module)[isinstance(module, nn.Linear)] for module in linears]
    scales = sum(rows * columns // (recipe.scheme.group_size or columns) for rows, columns in shapes)
    augmented = any(getattr(step, "aug_loss", False) for step in passes)
    return Workload(
        blocks=blocks,
        block_parameters=max(count(block.parameters()) for block in skeleton.blocks),
        block_linears=len(shapes),
        block_features=sum(map(sum, shapes)),
        block_columns=sum(inputs),
        block_scales=scales,
        outer_parameters=count(skeleton.outer_parameters().values()),
        width=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        stored_bytes=dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize,
        samples=recipe.calibration.samples,
        seqlen=seqlen,
        batch_size=recipe.calibration.batch_size,
        device=device,
        window=window,
        streams=1 + window + augmented + bool(whole),  # the actual one, references, and the start of the whole model
        updates=_per_block(walk, "updates_per_window", blocks),
        trained=_trained(walk, sum(rows * columns for rows, columns in shapes), scales),
        forwards=_per_block(walk, "forwards_per_window", blocks),
        roundings=_per_block(walk, "roundings_per_window", blocks),
        hessian=max(inputs) if any(getattr(step, "second_order", False) for step in passes) else 0,
        whole=sum(whole) if whole else None,
        rotates=recipe.rotate,
        ties=ties // blocks,
        widths=widths,
        at_once=min(recipe.calibration.samples, writing_batch(skeleton, seqlen)) if writes else 0,
        cache=cache_elements(skeleton.config, seqlen) if writes else 0,
    )


def sequence_length(skeleton: Skeleton, recipe: Recipe) -> int:
    """Return the tokens of a calibration sequence.

    Raises:
        UsageError: more were asked for than the model's context has.
    """
    text_config = skeleton.config.get_text_config()
    context = int(getattr(text_config, "max_position_embeddings", None) or DEFAULT_SEQLEN)
    wanted = recipe.calibration.seqlen
    if wanted is not None and wanted > context:
        raise UsageError(f"--seqlen {wanted} is longer than the model's context of {context}")
    learns = any(step.learns for step in recipe.build_passes().values())
    return wanted or min(DEFAULT_SEQLEN if learns else SEQLEN_TO_CHECK, context)


def writing_batch(skeleton: Skeleton, seqlen: int) -> int:
    """Return how many sequences the model writes side by side where it writes its own calibration text."""
    return sequences_at_once(count(skeleton.model.parameters()), skeleton.config, seqlen)


def _per_block(walk: Sequence[Pass], what: str, blocks: int) -> float:
    """Return what each block takes part in, on average: windows of several blocks overlap."""
    total = 0
    for step in walk:
        span = min(blocks, step.blocks_at_once)
        total += getattr(step, what, 0) * span * (blocks - span + 1)
    return total / blocks


def _trained(walk: Sequence[Pass], weights: int, scales: int) -> int:
    """Return how many numbers are trained in a block: two logits for each scale, and an offset for each weight."""
    offsets = any(getattr(step, "rounding", False) or getattr(step, "weights", False) for step in walk)
    clips = any(getattr(step, "lwc", False) for step in walk)
    return offsets * weights + 2 * clips * scales


def count(parameters: Iterable[Tensor]) -> int:
    """Return the number of numbers."""
    return sum(parameter.numel() for parameter in parameters)


def shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of a linear's weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return rows, columns
