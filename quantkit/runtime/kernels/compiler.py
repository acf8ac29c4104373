"""Compiles `native.cpp` on first use, for the machine at hand, and keeps the library for later runs."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
TIMEOUT = 300  # seconds; it takes about two
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_WEIGHT = (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT)
ARGUMENTS = {
    "quantkit_linear": (*_WEIGHT, _INT, _POINTER, _LONG, _POINTER, _INT),
    "quantkit_dequantize": (*_WEIGHT, _LONG, _LONG, _POINTER, _INT, _INT),
    "quantkit_dense": (_POINTER, _LONG, _LONG, _INT, _POINTER, _LONG, _POINTER, _INT),
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
    for name, arguments in ARGUMENTS.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, None
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
    parts = [SOURCE.read_text(encoding="utf-8"), *FLAGS, _target(), platform.machine(), _processor()]
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
    command = [compiler, *FLAGS, _target(), f"-DBITS={bits}", str(SOURCE), "-o", str(partial)]
    result = _run([*command, "-fopenmp"])
    if result.returncode:
        result = _run(command)
    if result.returncode:
        partial.unlink(missing_ok=True)
        said = (result.stderr.strip().splitlines() or ["no reason given"])[0]
        raise CompilerError(f"{compiler} cannot compile {SOURCE.name} ({said})")
    partial.replace(path)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} cannot be run ({error})") from error
