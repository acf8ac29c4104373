"""Predicted memory and time of a run, from sizes alone and from three operations timed on this machine.

Memory counts what lives at the same time. First everything outside the blocks, while the blocks' inputs are recorded;
later the two streams, one block in float32, its rounded copies, and what one training update saves. The factors below
were measured with `scripts/bench/memory.py`; report.json puts every prediction beside what happened.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from quantkit.calibrate import sensitivity
from quantkit.calibrate.engine import CHECK_SEQUENCES, CHECK_TOKENS

LIBRARIES = 75e6  # what torch, tokenizers and safetensors allocate when they are first used
COPIES_ROUNDED = 2.0  # float32 copies, codes and temporaries of a block that is rounded for comparison
COPIES_TRAINED = 1.5  # fake-quantized weights and their gradients during an update
SWEEPS_PER_UPDATE = 14  # elementwise operations on a block's weights in one update, forward and backward
CALLS_PER_UPDATE = 130  # operations of any size that an update makes for each linear; they decide for small models
SWEEPS_PER_DRAW = 10  # elementwise operations on the logits when a token is drawn, some of them in float64
CALLS_PER_STEP = 20  # operations for each linear while the model writes one token of a text
SWEEPS_PER_ROUNDING = 10  # the same for one clipping of a block that is rounded to measure its loss
HESSIAN_BYTES = 32  # per entry of a Hessian, its factor and what is between them, mostly in float64
OVERHEAD = 1.3  # everything else


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a run.

    Attributes:
        blocks: number of blocks.
        block_parameters: parameters of the largest block.
        block_linears: number of linears in a block.
        block_features: input and output features of its linears, summed.
        outer_parameters: parameters outside the blocks.
        width: size of a hidden state.
        vocabulary: number of tokens that the model knows.
        stored_bytes: bytes of one stored parameter of the source.
        samples: calibration sequences.
        seqlen: tokens in one.
        batch_size: sequences in a batch.
        streams: copies of the hidden states that are kept.
        updates: training updates, over one batch each, that a block takes part in; 0: nothing is trained.
        forwards: forward passes of a block over all samples that the methods make besides.
        hessian: inputs of the widest linear of which second moments are held; 0: of none.
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
    outer_parameters: int
    width: int
    vocabulary: int
    stored_bytes: int
    samples: int
    seqlen: int
    batch_size: int
    streams: int
    updates: float
    forwards: float
    hessian: int
    device: torch.device
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


def host_memory(work: Workload) -> int:
    """Return the predicted peak of resident memory in bytes, from what this process has now."""
    base = psutil.Process().memory_info().rss + LIBRARIES
    written = 2 * work.block_parameters * work.stored_bytes  # a shard, and the bytes that safetensors makes of it
    logits = 2 * 4 * CHECK_SEQUENCES * CHECK_TOKENS * work.vocabulary
    outside = _outer(work) + logits
    walk = _streams(work) + written + (outside if work.on_gpu else max(outside, _block(work)))
    loaded = work.parameters * work.stored_bytes if work.on_gpu else writing_memory(work)
    return int(base + max(walk, loaded if work.at_once else 0))


def device_memory(work: Workload) -> int:
    """Return the predicted peak of GPU memory in bytes, 0 for a run on the CPU."""
    if not work.on_gpu:
        return 0
    return int(max(_streams(work) + max(_outer(work), _block(work)), writing_memory(work)))


def writing_memory(work: Workload) -> int:
    """Return the memory in bytes that the whole model takes while it writes its text, 0 if it writes none."""
    if not work.at_once:
        return 0
    size = work.stored_bytes if work.on_gpu else 4
    return work.parameters * size + work.at_once * (size * work.cache + 2 * 8 * work.vocabulary)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free where blocks are computed."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def duration(work: Workload) -> float:
    """Return the predicted seconds of the walk over the blocks, and of writing the text if the model does."""
    rate, sweep, call = machine_speed(work.device)
    forward = 2 * work.block_parameters * work.samples * work.seqlen / rate
    forwards = work.forwards + (4 if work.updates else 3)  # reference, rounded to nearest, (learned,) kept
    batches = work.samples / work.batch_size
    update = SWEEPS_PER_UPDATE * work.block_parameters * sweep + CALLS_PER_UPDATE * work.block_linears * call
    training = work.updates * (3 * forward / batches + update)
    tokens = min(work.samples, sensitivity.SEQUENCES) * min(work.seqlen, sensitivity.TOKENS)
    trials = 2 * work.block_parameters * tokens / rate * (work.ties * work.widths + (work.ties > 0))
    roundings = work.widths * len(sensitivity.SHRINK) * SWEEPS_PER_ROUNDING * work.block_parameters * sweep
    walk = work.blocks * (forwards * forward + training + trials + roundings)
    if not work.at_once:
        return walk * OVERHEAD
    touched = work.parameters + SWEEPS_PER_DRAW * work.at_once * work.vocabulary
    step = touched * sweep + CALLS_PER_STEP * work.blocks * work.block_linears * call
    steps = math.ceil(work.samples / work.at_once) * work.seqlen
    writing = 2 * work.parameters * work.samples * work.seqlen / rate + steps * step
    return (walk + writing) * OVERHEAD


def machine_speed(device: torch.device) -> tuple[float, float, float]:
    """Return what this machine does now.

    Returns:
        Floating-point operations per second of a matrix product, seconds per element of an elementwise operation, and
        seconds of the smallest operation.
    """
    gpu = device.type == "cuda"
    size = 4096 if gpu else 768
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    small = matrix[:1, :1].clone()
    return (
        2 * size**3 / _fastest(lambda: matrix @ matrix, device),
        _fastest(lambda: matrix * 2.0, device) / size**2,
        _fastest(lambda: [small * 2.0 for _ in range(100)], device) / 100,
    )


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _streams(work: Workload) -> int:
    return work.streams * (2 if work.on_gpu else 4) * work.samples * work.seqlen * work.width


def _outer(work: Workload) -> int:
    """Everything outside the blocks in float32, beside the stored tensors while they are converted."""
    return work.outer_parameters * (4 + work.stored_bytes)


def _block(work: Workload) -> float:
    learns = work.updates > 0
    weights = 4 * work.block_parameters * (1 + COPIES_ROUNDED + COPIES_TRAINED * learns)
    # an update saves the inputs and outputs of the linears and about as much again between them
    activations = 4 * work.batch_size * work.seqlen * work.block_features * (1 + learns)
    return weights + activations + HESSIAN_BYTES * work.hessian**2
