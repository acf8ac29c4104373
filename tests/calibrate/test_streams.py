"""Streams: what is put in comes out, wherever it lies, and where it lies changes no result."""

import dataclasses
import gc
import resource

import pytest
import torch
from windows import make_engine, make_window

from quantkit.calibrate.streams import Streams, _Held
from quantkit.core.scheme import QuantScheme
from quantkit.errors import OutputError
from quantkit.host import resident_memory
from quantkit.pipeline import Silent
from quantkit.quantizers.awq import AWQ
from quantkit.quantizers.distill import Distill
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.omniquant import OmniQuant
from quantkit.quantizers.rtn import RoundToNearest
from quantkit.resources import data_dir

TINY = data_dir("model_zoo") / "tiny"
TOKENS = torch.randint(3, 1024, (5, 24), generator=torch.Generator().manual_seed(9)).split(2)
SHAPE, BYTES = (2, 24, 128), 2 * 24 * 128 * 4
LEARNING = OmniQuant(updates=3, window=2, aug_loss=True, rounding=True)
PASSES = {
    "rtn": [RoundToNearest()],
    "gptq": [GPTQ()],
    "awq": [AWQ(trials=2)],
    "omniquant": [LEARNING],
    "transforms": [OmniQuant(updates=2, let=True)],
    "distill": [OmniQuant(updates=2), Distill(updates=3)],
}
EVERYTHING, HALF, NOTHING = None, 4 * BYTES, 0


def tensors(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(number)]


@pytest.mark.parametrize("budget", [EVERYTHING, HALF, NOTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_in_comes_out_in_the_dtype_of_the_stream(budget, dtype, tmp_path):
    values = tensors(9)
    stream = Streams(budget, tmp_path).new(dtype, values)
    assert len(stream) == 9
    assert all(torch.equal(kept, value.to(dtype)) for kept, value in zip(stream, values, strict=True))


@pytest.mark.parametrize("budget", [EVERYTHING, HALF, NOTHING])
def test_tensors_are_contiguous_detached_and_on_the_cpu(budget, tmp_path):
    value = torch.randn(24, 2, 128, requires_grad=True).transpose(0, 1)
    kept = Streams(budget, tmp_path).new(torch.float32, [value])[0]
    assert torch.equal(kept, value)
    assert kept.is_contiguous()
    assert not kept.requires_grad
    assert kept.device.type == "cpu"
    assert kept.data_ptr() % 64 == 0


def test_the_budget_is_kept_and_the_rest_is_on_the_disk(tmp_path):
    streams = Streams(HALF + 100, tmp_path)
    stream = streams.new(torch.float32, tensors(9))
    assert (streams.held, streams.spilled) == (HALF, 5 * BYTES)
    for seed in range(1, 4):
        for batch, value in enumerate(tensors(9, seed)):
            stream[batch] = value
    assert (streams.held, streams.spilled) == (HALF, 5 * BYTES)
    del stream
    assert streams.held == 0


def test_the_process_grows_by_what_is_held_whatever_is_allocated_between():
    streams = Streams()
    stream, before = streams.new(torch.float32), resident_memory()
    for _ in range(2000):
        stream.append(torch.ones(1, 96, 256) + 1)
    assert 0.9 * streams.held < resident_memory() - before < 1.15 * streams.held


def test_the_file_has_no_name(tmp_path):
    streams = Streams(NOTHING, tmp_path)
    stream = streams.new(torch.float32, tensors(2))
    assert streams.spilled
    assert not list(tmp_path.iterdir())
    assert len(stream) == 2


@pytest.mark.parametrize("budget", [EVERYTHING, NOTHING])
def test_copies_share_tensors_and_go_their_own_way(budget, tmp_path):
    streams = Streams(budget, tmp_path)
    values, others = tensors(4), tensors(4, seed=1)
    stream = streams.new(torch.float32, values)
    taken = streams.held, streams.spilled
    copy, head = stream.copy(), stream[:2]
    assert (streams.held, streams.spilled) == taken
    for batch, value in enumerate(others):
        stream[batch] = value
    assert all(torch.equal(*pair) for pair in zip(stream, others, strict=True))
    assert all(torch.equal(*pair) for pair in zip(copy, values, strict=True))
    assert all(torch.equal(*pair) for pair in zip(head, values[:2], strict=True))


def test_a_tensor_in_use_keeps_its_values_while_the_stream_goes_on(tmp_path):
    """Its chunk is not written again before it is dropped."""
    streams = Streams(NOTHING, tmp_path)
    (value,) = tensors(1)
    stream = streams.new(torch.float32, [value])
    used = stream[0]  # mapped, and nothing of it was read yet
    for seed in range(3):
        stream[0] = tensors(1, seed + 5)[0]
    assert torch.equal(used, value)
    assert streams.spilled == 2 * BYTES  # the one in use, and the one that all others took
    del used
    gc.collect()
    for seed in range(5):
        stream[0] = tensors(1, seed)[0]
    assert streams.spilled == 2 * BYTES


def test_a_full_disk_is_one_clear_error(tmp_path):
    """The system's limit of a file's size stands in for the size of a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    streams = Streams(NOTHING, tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BYTES + 100, hard))
        with pytest.raises(OutputError, match=rf"cannot spill activations to {tmp_path}: .*; make room .* --memory$"):
            streams.new(torch.float32, tensors(9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(passes, streams, *, bits=3, activations=16):
    """Return everything that a walk decides."""
    scheme = QuantScheme(bits=bits, group_size=32, activation_bits=activations)
    engine = dataclasses.replace(make_engine(TINY, scheme, passes), streams=streams)
    blocks = []
    reports, sample = engine.run(list(TOKENS), blocks.append, Silent())
    parts = {
        (site.name, part): getattr(site.quantized, part)
        for block in blocks
        for site in block.sites
        for part in ("codes", "scale", "zero_point")
    }
    return parts, [(report.error_rtn, report.error) for report in reports], sample.logits


@pytest.mark.parametrize("name", PASSES)
def test_spilling_changes_no_result(name, tmp_path):
    spilling, activations = Streams(BYTES, tmp_path), 8 if name == "transforms" else 16
    parts, errors, logits = run(PASSES[name], Streams(), activations=activations)
    other_parts, other_errors, other_logits = run(PASSES[name], spilling, activations=activations)
    assert spilling.spilled
    assert all(torch.equal(parts[key], other_parts[key]) for key in parts)
    assert errors == other_errors
    assert torch.equal(logits, other_logits)


class OnHost(torch.Tensor):
    """A tensor of a stream that lets nobody compute with it before it was brought to the blocks' device."""

    ALLOWED = frozenset({"copy_", "to", "__len__", "__get__", "__getitem__", "size", "numel", "cat", "float"})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__
        assert name in cls.ALLOWED, f"{name} of a tensor that may be on another device"
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor):
                return result
            return result.as_subclass(torch.Tensor if name == "to" else cls)


@pytest.mark.parametrize(
    "step",
    [RoundToNearest(), GPTQ(), AWQ(trials=2), LEARNING, OmniQuant(updates=2, let=True)],
    ids=["rtn", "gptq", "awq", "omniquant", "transforms"],
)
def test_methods_bring_batches_to_the_device_before_they_use_them(step):
    window = make_window(TINY, QuantScheme(bits=3, group_size=32), TOKENS, blocks=step.blocks_at_once)
    window.inputs = [hidden.as_subclass(OnHost) for hidden in window.inputs]
    window.references = [[hidden.detach().as_subclass(OnHost) for hidden in stream] for stream in window.references]
    step.apply(window)
    assert all(site.quantized is not None for site in window.sites)


def test_the_walk_and_passes_over_the_model_bring_batches_to_the_device(monkeypatch):
    held = _Held.tensor
    monkeypatch.setattr(_Held, "tensor", property(lambda chunk: held.fget(chunk).as_subclass(OnHost)))
    run(PASSES["distill"], Streams())
