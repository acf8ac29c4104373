"""Predicted memory and time of a run, from sizes alone and from three operations timed on this machine.

Memory counts what lives at the same time. First everything outside the blocks, while the blocks' inputs are recorded;
later the two streams, one block in float32, its rounded copies, and what one training update saves. The factors below
were measured with `scripts/bench/memory.py`; report.json puts every prediction beside what happened.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from quantkit.calibrate.engine import CHECK_SEQUENCES, CHECK_TOKENS

LIBRARIES = 75e6  # what torch, tokenizers and safetensors allocate when they are first used
COPIES_ROUNDED = 2.0  # float32 copies, codes and temporaries of a block that is rounded for comparison
COPIES_TRAINED = 1.5  # fake-quantized weights and their gradients during an update
SWEEPS_PER_UPDATE = 14  # elementwise operations on a block's weights in one update, forward and backward
CALLS_PER_UPDATE = 130  # operations of any size that an update makes for each linear; they decide for small models
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
        device: where blocks are computed.
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

    @property
    def on_gpu(self) -> bool:
        """Whether the blocks are computed on a GPU."""
        return self.device.type == "cuda"


def host_memory(work: Workload) -> int:
    """Return the predicted peak of resident memory in bytes, from what this process has now."""
    base = psutil.Process().memory_info().rss + LIBRARIES
    written = 2 * work.block_parameters * work.stored_bytes  # a shard, and the bytes that safetensors makes of it
    logits = 2 * 4 * CHECK_SEQUENCES * CHECK_TOKENS * work.vocabulary
    outside = _outer(work) + logits
    return int(base + _streams(work) + written + (outside if work.on_gpu else max(outside, _block(work))))


def device_memory(work: Workload) -> int:
    """Return the predicted peak of GPU memory in bytes, 0 for a run on the CPU."""
    return int(_streams(work) + max(_outer(work), _block(work))) if work.on_gpu else 0


def duration(work: Workload) -> float:
    """Return the predicted seconds of the walk over the blocks."""
    rate, sweep, call = machine_speed(work.device)
    forward = 2 * work.block_parameters * work.samples * work.seqlen / rate
    forwards = work.forwards + (4 if work.updates else 3)  # reference, rounded to nearest, (learned,) kept
    batches = work.samples / work.batch_size
    update = SWEEPS_PER_UPDATE * work.block_parameters * sweep + CALLS_PER_UPDATE * work.block_linears * call
    training = work.updates * (3 * forward / batches + update)
    return work.blocks * (forwards * forward + training) * OVERHEAD


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
