"""The kernel for GPUs against dense bfloat16 and against the bandwidth of a copy, as a Markdown table.

    python scripts/bench/gpu_kernel.py
    python scripts/bench/gpu_kernel.py --sweep --tokens 1      # which rows and warps of a program are fastest

Calls are replayed from a CUDA graph, as decoding does them, and go through so many copies of the weight that none is
still in the second-level cache. Every product is compared with the dequantized weight's before it is measured.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from common import markdown
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.runtime.kernel import Layout
from quantkit.runtime.kernels import triton_gpu

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)]  # (out, in)
TOLERANCE = 2**-6  # of the product of the norms; bfloat16 has 8 bits
HEADER = ("out × in", "bits", "tokens", "packed µs", "dense µs", "speed", "GB/s", "of a copy")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="try rows and warps of the programs for one or two tokens")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernel.py: torch finds no CUDA device; run it where there is one")
    copy = _copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a copy moves {copy / 1e9:.0f} GB/s\n", flush=True
    )
    if args.sweep:
        print(markdown(("out × in", "bits", "tokens", "rows", "warps", "µs"), _sweep(args)))
    else:
        print(markdown(HEADER, _rows(args, copy)))


def _rows(args: argparse.Namespace, copy: float) -> Iterator[Sequence[str]]:
    for shape in SHAPES:
        dense = {tokens: _dense_seconds(shape, tokens) for tokens in args.tokens}
        for bits, tokens in product(args.bits, args.tokens):
            seconds, size = _packed_seconds(_weight(shape, bits, args), tokens)
            rate = size / seconds
            yield (
                *(f"{shape[0]} × {shape[1]}", str(bits), str(tokens), f"{seconds * 1e6:.1f}"),
                *(f"{dense[tokens] * 1e6:.1f}", f"{dense[tokens] / seconds:.2f}"),
                *(f"{rate / 1e9:.0f}", f"{rate / copy:.0%}"),
            )
            print(f"{shape} {bits} bits {tokens} tokens: {seconds * 1e6:.1f} µs", file=sys.stderr, flush=True)


def _sweep(args: argparse.Namespace) -> Iterator[Sequence[str]]:
    chosen = triton_gpu._rows_and_warps
    few = [tokens for tokens in args.tokens if tokens <= triton_gpu.SUM_TOKENS]
    for shape, bits, tokens in product(SHAPES, args.bits, few):
        weight = _weight(shape, bits, args)
        own = chosen(_layout(weight), tokens)
        for rows, warps in product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
            triton_gpu._rows_and_warps = partial(_given, (rows, warps))
            seconds, _ = _packed_seconds(weight, tokens)
            mark = " (chosen)" if (rows, warps) == own else ""
            yield (
                f"{shape[0]} × {shape[1]}",
                str(bits),
                str(tokens),
                str(rows),
                str(warps),
                f"{seconds * 1e6:.1f}{mark}",
            )
    triton_gpu._rows_and_warps = chosen


def _given(tile: tuple[int, int], *_: object) -> tuple[int, int]:
    return tile


def _weight(shape: tuple[int, int], bits: int, args: argparse.Namespace) -> QuantizedTensor:
    scheme = QuantScheme(bits=bits, group_size=args.group_size, symmetric=args.symmetric)
    groups = (shape[0], scheme.groups(shape[1]))
    low, high = scheme.smallest_code, scheme.largest_code + 1
    zero_point = torch.randint(low, high, groups, dtype=torch.int8, device="cuda")
    return QuantizedTensor(
        codes=torch.randint(low, high, shape, dtype=torch.int8, device="cuda"),
        scale=(torch.rand(groups, device="cuda") / 100 + 0.001).to(torch.bfloat16),
        zero_point=None if args.symmetric else zero_point,
        scheme=scheme,
    )


def _layout(weight: QuantizedTensor) -> Layout:
    return Layout(out=weight.codes.shape[0], width=weight.codes.shape[1], scheme=weight.scheme)


def _packed_seconds(weight: QuantizedTensor, tokens: int) -> tuple[float, int]:
    """Return the time of a product and the bytes that it has to move."""
    layout, packed = _layout(weight), triton_gpu.KERNEL.pack(weight)
    obstacle = triton_gpu.KERNEL.obstacle(torch.device("cuda"), layout)
    if obstacle is not None:
        sys.exit(f"gpu_kernel.py: the kernel cannot be measured here: {obstacle}")
    x = torch.randn(tokens, layout.width, dtype=torch.bfloat16, device="cuda")
    y = triton_gpu.KERNEL.linear(x, packed, layout)
    _compare(y, x, weight.dequantize())
    size = sum(tensor.nbytes for tensor in packed.values())
    copies = [{name: tensor.clone() for name, tensor in packed.items()} for _ in range(_copies(size))]
    seconds = _seconds(lambda: [triton_gpu.KERNEL.linear(x, copy, layout) for copy in copies]) / len(copies)
    return seconds, size + x.nbytes + y.nbytes


def _compare(y: Tensor, x: Tensor, dense: Tensor) -> None:
    exact = x.double() @ dense.double().T
    norms = x.double().norm(dim=1, keepdim=True) * dense.double().norm(dim=1)
    error = ((y.double() - exact).abs() / norms).max().item()
    if not error < TOLERANCE:
        sys.exit(
            f"gpu_kernel.py: the product is wrong by {error:.2g} of the norms for {tuple(dense.shape)}, {len(x)} tokens"
        )


def _dense_seconds(shape: tuple[int, int], tokens: int) -> float:
    weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(_copies(2 * shape[0] * shape[1]))]
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device="cuda")
    return _seconds(lambda: [torch.nn.functional.linear(x, weight) for weight in weights]) / len(weights)


def _copy_bandwidth() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _copies(size: int) -> int:
    """Return how many weights of so many bytes are four times the second-level cache."""
    return max(2, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // size))


def _seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of `call`, replayed from a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
