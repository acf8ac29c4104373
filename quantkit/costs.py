"""Predicted memory and time of a run, from sizes alone and from three operations timed on this machine.

Memory counts what lives at the same time. First everything outside the blocks, while the blocks' inputs are recorded;
then the streams and one window of blocks in float32: their rounded copies, what is trained of them, and what one update
saves. A pass over the whole model holds the codes of all blocks, what is trained of their scales, the hidden states
between the blocks, one block's weights, everything outside the blocks, and the logits of one sequence.

Time counts matrix products, elementwise operations and calls. An update of a window is three forward passes over one
batch, and one of the whole model is four, since every block is computed twice; besides, its logits are made once for
the original and made and differentiated for the quantized model.

The factors below were measured with `scripts/bench/bounded_memory.py` and with the presets on a small model;
report.json puts every prediction beside what happened.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit import host
from quantkit.calibrate import sensitivity
from quantkit.calibrate.engine import CHECK_SEQUENCES, CHECK_TOKENS
from quantkit.model.writer import SHARD_BYTES
from quantkit.workload import Workload

LIBRARIES = 75e6  # what torch, tokenizers and safetensors allocate when they are first used
COPIES_BLOCK = 3.4  # of a block in float32: itself, what it is read from, its rounded weights, codes and temporaries
COPIES_TRAINED = 1.0  # what fake-quantized weights and their gradients take more during an update
COPIES_ACTIVATIONS = 1.7  # of inputs and outputs of the linears: these, and what is between them
COPIES_DISTILLED = 4.0  # float32 weights of one block that are made of codes, what is saved of that, and gradients
COPIES_COPIED = 3  # of a tensor that is copied: as it is read, as it waits, and the bytes that safetensors makes of it
COPIES_LOGITS = 8  # logits of a sequence, their logarithms and probabilities, of both models, and gradients
BYTES_TRAINED = 20  # per number that is trained: value, gradient, two averages, and the best value so far
BYTES_CODE, BYTES_SCALE = 1, 7  # codes; scale and zero point as they are stored, and the scale in float32
SWEEPS_PER_UPDATE = 14  # elementwise operations on a block's weights in one update, forward and backward
SWEEPS_PER_TRAINED = 10  # the same on what is trained
SWEEPS_PER_LOGIT = 14  # the same on the logits of both models
CALLS_PER_UPDATE = 130  # operations of any size that an update makes for each linear; they decide for small models
CALLS_PER_COLUMN = 12  # the same for each column that is rounded after others
SWEEPS_PER_DRAW = 10  # elementwise operations on the logits when a token is drawn, some of them in float64
CALLS_PER_STEP = 20  # operations for each linear while the model writes one token of a text
SWEEPS_PER_ROUNDING = 10  # the same for one clipping of a block that is rounded to measure its loss
HESSIAN_BYTES = 25  # per entry of a Hessian: its sum, its mean, and two matrices in float64 while it is factored
OVERHEAD = 1.3  # everything else


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a machine does now.

    Attributes:
        rate: floating-point operations per second of a matrix product.
        sweep: seconds per element of an elementwise operation.
        call: seconds of the smallest operation.
    """

    rate: float
    sweep: float
    call: float


def host_memory(work: Workload, held: int) -> int:
    """Return the predicted peak of resident memory in bytes, from what this process has now.

    At most `held` bytes of the streams stay in memory.
    """
    base = host.resident_memory() + LIBRARIES
    written = 2 * work.block_parameters * work.stored_bytes  # a shard, and the bytes that safetensors makes of it
    logits = 2 * 4 * CHECK_SEQUENCES * CHECK_TOKENS * work.vocabulary
    blocks = 0 if work.on_gpu else _blocks(work)
    walk = min(held, stream_bytes(work)) + max(_outer(work) + logits, blocks, written)
    loaded = work.parameters * work.stored_bytes if work.on_gpu else writing_memory(work)
    return int(base + max(walk, COPIES_COPIED * _copied(work), loaded if work.at_once else 0))


def device_memory(work: Workload) -> int:
    """Return the predicted peak of GPU memory in bytes, 0 for a run on the CPU."""
    if not work.on_gpu:
        return 0
    return int(max(batch_bytes(work) + max(_outer(work), _blocks(work)), writing_memory(work)))


def writing_memory(work: Workload) -> int:
    """Return the memory in bytes that the whole model takes while it writes its text, 0 if it writes none."""
    if not work.at_once:
        return 0
    size = work.stored_bytes if work.on_gpu else 4
    return work.parameters * size + work.at_once * (size * work.cache + 2 * 8 * work.vocabulary)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free where blocks are computed."""
    return free_device_memory(device) if device.type == "cuda" else host.free_memory()


def free_device_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, 0 for a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def duration(work: Workload, speed: Speed) -> float:
    """Return the predicted seconds of a run but for reading and writing files."""
    parts = (_walking(work, speed), _distilling(work, speed), _measuring(work, speed), _writing_text(work, speed))
    return sum(parts) * OVERHEAD


def _walking(work: Workload, speed: Speed) -> float:
    """Return the seconds of the walk over the blocks."""
    forward = _forward(work, work.samples) / speed.rate
    learns = work.updates > 0
    # reference, rounded to nearest, kept, and of the window: what was learned, and rounded to nearest again
    forwards = work.forwards + 3 + work.window * (learns + (work.window > 1))
    sweeps = SWEEPS_PER_UPDATE * work.block_parameters + SWEEPS_PER_TRAINED * work.trained
    update = 3 * forward * work.batch_size / work.samples + sweeps * speed.sweep
    training = work.updates * (update + CALLS_PER_UPDATE * work.block_linears * speed.call)
    rounding = work.roundings * SWEEPS_PER_ROUNDING * work.block_parameters * speed.sweep
    columns = CALLS_PER_COLUMN * work.block_columns * speed.call if work.hessian else 0.0
    rotation = 2 * 2 * work.width * work.block_parameters / speed.rate if work.rotates else 0.0  # in float64
    return work.blocks * (forwards * forward + training + rounding + columns + rotation)


def _distilling(work: Workload, speed: Speed) -> float:
    """Return the seconds of the updates of the whole model."""
    if not work.whole:
        return 0.0
    tokens = work.batch_size * work.seqlen
    products = 4 * work.blocks * _forward(work, work.batch_size) + 3 * 2 * tokens * work.width * work.vocabulary
    sweeps = SWEEPS_PER_UPDATE * work.blocks * work.block_parameters + SWEEPS_PER_LOGIT * tokens * work.vocabulary
    calls = CALLS_PER_UPDATE * work.blocks * work.block_linears
    return work.whole * (products / speed.rate + sweeps * speed.sweep + calls * speed.call)


def _measuring(work: Workload, speed: Speed) -> float:
    """Return the seconds in which the loss of every group of linears at every width is measured."""
    tokens = min(work.samples, sensitivity.SEQUENCES) * min(work.seqlen, sensitivity.TOKENS)
    trials = 2 * work.block_parameters * tokens / speed.rate * (work.ties * work.widths + (work.ties > 0))
    roundings = work.widths * len(sensitivity.SHRINK) * SWEEPS_PER_ROUNDING * work.block_parameters * speed.sweep
    return work.blocks * (trials + roundings)


def _writing_text(work: Workload, speed: Speed) -> float:
    """Return the seconds in which the model writes its own calibration text."""
    if not work.at_once:
        return 0.0
    touched = work.parameters + SWEEPS_PER_DRAW * work.at_once * work.vocabulary
    step = touched * speed.sweep + CALLS_PER_STEP * work.blocks * work.block_linears * speed.call
    steps = math.ceil(work.samples / work.at_once) * work.seqlen
    return 2 * work.parameters * work.samples * work.seqlen / speed.rate + steps * step


def machine_speed(device: torch.device) -> Speed:
    """Return what this machine does now, by timing it."""
    gpu = device.type == "cuda"
    size = 4096 if gpu else 768
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    small = matrix[:1, :1].clone()
    return Speed(
        rate=2 * size**3 / _fastest(lambda: matrix @ matrix, device),
        sweep=_fastest(lambda: matrix * 2.0, device) / size**2,
        call=_fastest(lambda: [small * 2.0 for _ in range(100)], device) / 100,
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


def stream_bytes(work: Workload) -> int:
    """Return the size of all streams, and of the check sample's, which lags behind."""
    check = -(-CHECK_SEQUENCES // work.batch_size) * batch_bytes(work)
    return work.streams * work.samples * work.seqlen * work.width * (2 if work.on_gpu else 4) + check


def kept_bytes(work: Workload, packed: int) -> int:
    """Return what is kept on the disk to go on from, beside the weights, of which the linears take `packed` bytes.

    Blocks wait there for a pass over the whole model; of a window that slides the blocks that stay in it are kept.
    """
    staged = packed if work.whole is not None else 0
    return staged + 8 * work.samples * work.seqlen + (work.window - 1) * 4 * (work.block_parameters + work.trained)


def batch_bytes(work: Workload) -> int:
    """Return the size of one batch of a stream."""
    return work.batch_size * work.seqlen * work.width * (2 if work.on_gpu else 4)


def _outer(work: Workload) -> int:
    """Everything outside the blocks in float32, beside the stored tensors while they are converted."""
    return work.outer_parameters * (4 + work.stored_bytes)


def _forward(work: Workload, sequences: int) -> float:
    """Return the floating-point operations of one forward pass of a block."""
    return 2.0 * work.block_parameters * sequences * work.seqlen


def _activations(work: Workload) -> int:
    """Return what one block saves in an update."""
    return int(COPIES_ACTIVATIONS * 4 * work.batch_size * work.seqlen * work.block_features)


def _copied(work: Workload) -> int:
    """Return what of the parameters outside the blocks is in memory at once when they are copied: at most a shard."""
    return min(work.outer_parameters * work.stored_bytes, SHARD_BYTES)


def _blocks(work: Workload) -> float:
    """Everything that the blocks take; the codes of all wait for a pass over the whole model."""
    if work.whole is None:
        return _window(work)
    codes = work.blocks * (BYTES_CODE * work.block_parameters + BYTES_SCALE * work.block_scales)
    return codes + max(_window(work), _whole(work))


def _window(work: Workload) -> float:
    """Everything that a window of blocks takes while passes are applied to it."""
    learns = work.updates > 0
    weights = 4 * work.block_parameters * (COPIES_BLOCK + COPIES_TRAINED * learns)
    trained = BYTES_TRAINED * work.trained * learns
    # without an update one block after the other is computed, and half is kept of each
    activations = _activations(work) * (work.window if learns else 0.5)
    return work.window * (weights + trained) + activations + HESSIAN_BYTES * work.hessian**2


def _whole(work: Workload) -> float:
    """Everything that a pass over the whole model takes besides the codes."""
    trained = work.blocks * BYTES_TRAINED * work.block_scales
    between = 4 * work.blocks * work.batch_size * work.seqlen * work.width
    logits = 4 * COPIES_LOGITS * work.seqlen * work.vocabulary
    weights = 4 * COPIES_DISTILLED * work.block_parameters
    return trained + between + max(logits, weights + _activations(work)) + _outer(work)
