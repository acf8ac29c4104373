"""The kernels for GPUs, run by Triton's interpreter on the CPU, against the dequantized weight in float64."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.runtime.kernel import Layout
from quantkit.runtime.kernels import triton_gpu
from quantkit.runtime.kernels.triton_gpu import KERNEL

CUDA = torch.device("cuda")
# of the product of the norms; rounding the result takes up to half of it in 16 bits
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BITS = range(2, 9)


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    """Mend Triton's interpreter, which keeps bfloat16 as its bits and multiplies those."""
    language = pytest.importorskip("triton.language")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels can be run without a GPU only under TRITON_INTERPRET=1")
    dot = interpreter.InterpreterBuilder.create_dot

    def wide(operand):
        if operand.dtype.scalar != language.bfloat16:
            return operand
        values = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, language.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, left, right, *rest: dot(self, wide(left), wide(right), *rest),
        )
        yield


def make(out, width, scheme, seed=0):
    """Return random codes with scales such that the dequantized weight is exact in float16."""
    generator = torch.Generator().manual_seed(seed)
    shape = (out, scheme.groups(width))
    low, high = scheme.smallest_code, scheme.largest_code + 1
    zero_point = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return QuantizedTensor(
        codes=torch.randint(low, high, (out, width), generator=generator, dtype=torch.int8),
        scale=(torch.randint(1, 4, shape, generator=generator) / 256).to(torch.float16),
        zero_point=None if scheme.symmetric else zero_point,
        scheme=scheme,
    )


def layout_of(weight, *, transposed=False):
    out, width = weight.codes.shape
    return Layout(out=out, width=width, scheme=weight.scheme, transposed=transposed)


def error(weight, tokens, dtype=torch.float32, *, transposed=False):
    """Return the largest error of the product, as a multiple of the tolerance."""
    layout = layout_of(weight, transposed=transposed)
    dense = weight.dequantize().double()
    dense = dense.T if transposed else dense
    x = torch.randn(tokens, dense.shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
    y = KERNEL.linear(x, KERNEL.pack(weight), layout)
    assert y.dtype == dtype
    assert y.shape == (tokens, len(dense))
    exact = x.double() @ dense.T
    norms = x.double().norm(dim=1, keepdim=True) * dense.norm(dim=1)
    return ((y.double() - exact).abs() / norms).max().item() / TOLERANCE[dtype]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_multiply_add_computes_the_product(bits, symmetric):
    weight = make(2, 96, QuantScheme(bits=bits, group_size=32, symmetric=symmetric))
    assert error(weight, 1) < 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_tensor_cores_compute_the_product(bits, symmetric):
    weight = make(3, 96, QuantScheme(bits=bits, group_size=32, symmetric=symmetric))
    assert error(weight, 3, torch.float16) < 1


@pytest.mark.parametrize("bits", BITS)
def test_a_dense_part_gives_the_product(bits):
    weight = make(3, 96, QuantScheme(bits=bits, group_size=32, symmetric=bits % 2 == 0))
    assert error(weight, 65) < 1


@pytest.mark.parametrize("tokens", [*range(1, 18), 64])
def test_any_number_of_tokens(tokens):
    assert error(make(3, 64, QuantScheme(bits=4, group_size=64)), tokens, torch.bfloat16) < 1


@pytest.mark.parametrize("tokens", [1, 2, 4, 65])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_dtype(dtype, tokens):
    assert error(make(4, 128, QuantScheme(bits=3, group_size=64)), tokens, dtype) < 1


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("width", "group_size"),
    [(256, 128), (192, 96), (96, 48), (64, 16), (100, None), (33, None), (1, None), (120, 24), (66, 11), (21, 7)],
)
def test_any_group_size(width, group_size, tokens):
    scheme = QuantScheme(bits=3 if tokens == 1 else 5, group_size=group_size)
    assert error(make(3, width, scheme), tokens, torch.float16) < 1


@pytest.mark.parametrize(("bits", "width"), [(2, 4096), (4, 2048), (8, 1024)])
def test_rows_that_blocks_fill_without_a_rest(bits, width, monkeypatch):
    monkeypatch.setattr(triton_gpu, "PROGRAMS", 1)
    weight = make(9, width, QuantScheme(bits=bits, group_size=128))  # nine rows: a program of eight, and one more
    assert error(weight, 1) < 1


def test_the_width_is_divided_or_not(monkeypatch):
    weight = make(5, 1024, QuantScheme(bits=4, group_size=32))
    divided = error(weight, 4, torch.float16)
    monkeypatch.setattr(triton_gpu, "PROGRAMS", 1)
    assert max(divided, error(weight, 4, torch.float16)) < 1


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_parts_are_small(transposed, monkeypatch):
    monkeypatch.setattr(triton_gpu, "CHUNK", 3 * 64)
    weight = make(8, 64, QuantScheme(bits=4, group_size=32))
    assert error(weight, 70, transposed=transposed) < 1


@pytest.mark.parametrize("tokens", [1, 5])
def test_transposed_weights(tokens):
    assert error(make(12, 32, QuantScheme(bits=4, group_size=16)), tokens, transposed=True) < 1


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed):
    random = np.random.default_rng(seed)
    group_size = int(random.integers(1, 70))
    width = group_size * int(random.integers(1, 5))
    scheme = QuantScheme(bits=int(random.integers(2, 9)), group_size=group_size, symmetric=bool(random.integers(2)))
    weight = make(int(random.integers(1, 12)), width, scheme, seed)
    dtype = [*TOLERANCE][random.integers(3)]
    assert error(weight, int(random.integers(1, 12)), dtype) < 1


def test_no_tokens():
    weight = make(3, 64, QuantScheme(bits=4, group_size=32))
    assert KERNEL.linear(torch.empty(0, 64), KERNEL.pack(weight), layout_of(weight)).shape == (0, 3)


def test_the_scale_is_not_rounded_to_the_activations_dtype():
    weight = make(3, 64, QuantScheme(bits=4, group_size=32))
    tiny = QuantizedTensor(
        codes=weight.codes,
        scale=weight.scale.to(torch.bfloat16) * 2**-30,
        zero_point=weight.zero_point,
        scheme=weight.scheme,
    )
    x = torch.full((1, 64), 2.0**15, dtype=torch.float16)
    expected = x.double() @ tiny.dequantize().double().T
    torch.testing.assert_close(
        KERNEL.linear(x, KERNEL.pack(tiny), layout_of(tiny)).double(), expected, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("width", "group_size"), [(128, 32), (100, None), (33, 11), (120, 24), (512, 256), (1, 1)])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_returns_what_was_packed(bits, width, group_size, symmetric, monkeypatch):
    monkeypatch.setattr(triton_gpu, "_rows_at_once", lambda width: 3)
    weight = make(7, width, QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric))
    found = KERNEL.unpack(KERNEL.pack(weight), layout_of(weight))
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scale, weight.scale)
    assert symmetric or torch.equal(found.zero_point, weight.zero_point)


@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_packed_takes_the_bits_that_the_scheme_states(bits, symmetric, group_size):
    scheme = QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    packed = KERNEL.pack(make(2, 1152, scheme))
    size = 8 * sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    assert size <= 1.1 * scheme.bits_per_weight(1152) * 2 * 1152


@pytest.mark.parametrize("bits", BITS)
def test_no_two_codes_share_a_bit(bits):
    codes = range(triton_gpu.codes_per_word(bits))
    for plane, own in enumerate(triton_gpu.planes(bits)):
        starts = [triton_gpu.position(bits, plane, code) for code in codes]
        assert sorted(bit for start in starts for bit in range(start, start + own)) == [*range(own * len(codes))]


def test_obstacles(monkeypatch):
    layout = Layout(out=8, width=64, scheme=QuantScheme(bits=4, group_size=32))
    assert KERNEL.obstacle(torch.device("cpu"), layout) == "cpu is no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert KERNEL.obstacle(CUDA, layout) == "this build of torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert KERNEL.obstacle(CUDA, layout) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_gpu, "_trouble", lambda device: None)
    assert KERNEL.obstacle(CUDA, layout) is None
    large = Layout(out=2**20, width=2**15, scheme=layout.scheme)
    assert "too many words" in KERNEL.obstacle(CUDA, large)
    monkeypatch.setattr(triton_gpu, "find_spec", lambda name: None)
    assert KERNEL.obstacle(CUDA, layout) == "triton is not installed"


def test_triton_is_tried_before_it_is_trusted(monkeypatch):
    assert triton_gpu._trouble.__wrapped__(torch.device("cpu")) is None

    def broken():
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(triton_gpu, "_kernels", broken)
    found = triton_gpu._trouble.__wrapped__(torch.device("cpu"))
    assert found == "Triton cannot compile a kernel: Failed to find C compiler."


def test_importing_the_kernel_does_not_import_triton():
    code = "import sys, quantkit.runtime.kernels.triton_gpu; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the assembler makes of the kernels for GPUs that are not there: by capability, bits and tokens."""
    script = Path(__file__).with_name("compile_kernels.py")
    cases = ["90,2,1", "90,3,1", "90,4,1", "90,8,1", "80,3,16", "90,3,16", "90,4,512"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, script, *cases], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [(2, 3.8), (3, 5.8), (4, 4.6), (8, 6.5)])
def test_a_weight_costs_few_instructions(compiled, bits, most):
    found = compiled[f"90,{bits},1"]["multiply_add"]
    assert found["instructions"] / found["weights"] < most
    assert (
        found["conversions"] <= 3
    )  # of scales, zero points and the result; words and activations stay with their thread


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "instruction"), [(80, "HMMA"), (90, "HGMMA")])
def test_some_tokens_are_multiplied_by_tensor_cores(compiled, capability, instruction):
    found = compiled[f"{capability},3,16"]
    assert found["tensor_cores"]["tensor cores"] == [instruction]
    assert "add_parts" in found


@pytest.mark.slow
def test_many_tokens_are_multiplied_with_a_dense_part(compiled):
    assert [*compiled["90,4,512"]] == ["dequantize"]


def test_the_bench_says_that_there_is_no_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts" / "bench")
    monkeypatch.setattr(sys, "argv", ["gpu_kernel.py"])
    with pytest.raises(SystemExit, match="torch finds no CUDA device; run it where there is one"):
        importlib.import_module("gpu_kernel").main()


@pytest.mark.parametrize("bits", BITS)
def test_dense_rows_are_the_weight_to_the_bit(bits, monkeypatch):
    monkeypatch.setattr(triton_gpu, "CHUNK", 96 * 2)
    weight = make(5, 96, QuantScheme(bits=bits, group_size=32, symmetric=bits % 2 == 0))
    rows = [part.clone() for part in KERNEL.dense_rows(KERNEL.pack(weight), layout_of(weight))]
    assert [len(part) for part in rows] == [2, 2, 1]
    assert torch.equal(torch.cat(rows), weight.dequantize().float())
