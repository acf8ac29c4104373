"""Compile what `linear` would start, for a GPU that is not there; prints what the assembler made of it as JSON.

python compile_kernels.py CAPABILITY,BITS,TOKENS …
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.runtime.kernel import Layout
from quantkit.runtime.kernels import _triton_code, triton_gpu

OUT = WIDTH = 4096
FLOATS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS = {torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"} | FLOATS
OPTIONS = ("num_warps", "maxnreg")


class Compiled:
    """Stands for a kernel: to start it is to compile it."""

    def __init__(self, kernel, capability, found):
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid):
        return self._start

    def _start(self, *args, **constants):
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        signature, attributes = {}, {}
        for number, name in enumerate(self.kernel.arg_names):
            value = values[name]
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[number,] = [["tt.divisibility", 16]]
        numbers = {(self.kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=numbers, attrs=attributes)
        made = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        self.found[self.kernel.fn.__name__] = figures(made) | {"weights": weights_of_a_thread(constants, options)}


def weights_of_a_thread(constants, options):
    """Return how many weights a thread multiplies in one turn of the loop of `multiply_add`."""
    words = constants.get("block_rows", 0) * constants.get("block_spans", 0) * constants.get("lanes", 0)
    return words * len(constants.get("exponents", ())) // (32 * options.get("num_warps", 4))


def figures(made):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", code)),
        "conversions": made.asm["ttgir"].count("ttg.convert_layout"),
        "tensor cores": sorted(set(re.findall(r"HG?MMA", code))),
    }


def compiled(capability, bits, tokens):
    found = {}
    names = ("multiply_add", "tensor_cores", "add_parts", "dequantize")
    kernels = {name: Compiled(getattr(_triton_code, name), capability, found) for name in names}
    triton_gpu._kernels = lambda: SimpleNamespace(**kernels)
    scheme = QuantScheme(bits=bits, group_size=128)
    groups = torch.ones(OUT, WIDTH // 128)
    weight = QuantizedTensor(
        codes=torch.zeros(OUT, WIDTH, dtype=torch.int8),
        scale=groups.to(torch.bfloat16),
        zero_point=groups.to(torch.int8),
        scheme=scheme,
    )
    packed = {name: tensor.to("meta") for name, tensor in triton_gpu.KERNEL.pack(weight).items()}
    x = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device="meta")
    triton_gpu.KERNEL.linear(x, packed, Layout(out=OUT, width=WIDTH, scheme=scheme))
    return found


if __name__ == "__main__":
    json.dump({case: compiled(*map(int, case.split(","))) for case in sys.argv[1:]}, sys.stdout)
