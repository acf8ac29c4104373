"""Compiles the C++ files beside it on first use, for the machine at hand, and keeps the library for later runs."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

SOURCES = (Path(__file__).with_name("block.cpp"), Path(__file__).with_name("native.cpp"))  # the first includes the rest
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
TIMEOUT = 300  # seconds; it takes about two
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class Weight(ctypes.Structure):
    """A packed weight as `native.cpp` has it: three addresses and three sizes, and whether scales are float16."""

    _fields_ = (
        *((name, _POINTER) for name in ("codes", "scale", "zero")),
        *((name, _LONG) for name in ("out", "width", "groups", "half")),
    )


class Block(ctypes.Structure):
    """What `block.cpp` needs to know of a block: addresses of weights, biases, norms, bounds; sizes; two numbers."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _POINTER) for name in ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")),
        *((name, _POINTER) for name in ("norm_before", "norm_after", "o_bound", "down_bound")),
        *((name, _LONG) for name in ("width", "heads", "key_heads", "size", "inner")),
        *((name, _LONG) for name in ("o_bound_step", "o_bound_drops", "down_bound_step", "down_bound_drops")),
        *((name, ctypes.c_double) for name in ("epsilon", "scaling")),
    )


_FUNCTIONS = {
    "quantkit_linear": (_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _LONG),
    "quantkit_dequantize": (_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG),
    "quantkit_dense": (_POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _LONG),
    "quantkit_multiplies_bytes": (),
    "quantkit_block_inputs": (*[_POINTER] * 5, _LONG),
    "quantkit_block_outputs": (*[_POINTER] * 5, _LONG, _POINTER, _LONG),
}


class CompilerError(Exception):
    """No library can be had; the text is a phrase that says why."""


@cache
def library(bits: int) -> ctypes.CDLL:
    """Return the compiled functions for codes of `bits` bits.

    Raises:
        CompilerError: no compiler, or one that cannot compile this.
    """
    compiler = _compiler()
    directory = _cache()
    path = directory / f"native-{bits}-{_fingerprint(compiler)}.so"
    if not path.is_file():
        _compile(compiler, bits, path)
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(f"{path} cannot be loaded ({error}); delete it") from error
    for name, arguments in _FUNCTIONS.items():
        function = getattr(functions, name)
        function.argtypes = arguments
    return functions


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    found = next((path for name in ([wanted] if wanted else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise CompilerError(f"there is no C++ compiler ({wanted or ', '.join(COMPILERS)})")
    return found


def _cache() -> Path:
    """Return the directory of compiled libraries, which belongs to this user alone: what lies in it is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "quantkit"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise CompilerError(f"{directory} cannot be made ({error})") from error
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise CompilerError(f"{directory} can be written by others; give it mode 700 and an owner that is you")
    return directory


def _target() -> str:
    """Return the flag that means: every instruction that this processor has."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _fingerprint(compiler: str) -> str:
    """Return a name for this source, compiler and processor: a home may be shared by different machines."""
    parts = [
        *(source.read_text(encoding="utf-8") for source in SOURCES),
        *FLAGS,
        _target(),
        platform.machine(),
        _processor(),
    ]
    parts.append(_run([compiler, "--version"]).stdout)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what says which instructions the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _compile(compiler: str, bits: int, path: Path) -> None:
    """Compile to `path`, which appears whole or not at all; without OpenMP where the compiler has none."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    command = [compiler, *FLAGS, _target(), f"-DBITS={bits}", str(SOURCES[0]), "-o", str(partial)]
    result = _run([*command, "-fopenmp"])
    if result.returncode:
        result = _run(command)
    if result.returncode:
        partial.unlink(missing_ok=True)
        said = (result.stderr.strip().splitlines() or ["no reason given"])[0]
        raise CompilerError(f"{compiler} cannot compile {SOURCES[0].name} ({said})")
    partial.replace(path)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} cannot be run ({error})") from error
