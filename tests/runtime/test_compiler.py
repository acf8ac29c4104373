"""The compiled library: made once, for this machine, and nothing else breaks where it cannot be made."""

import os
import platform
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from packed import layout_of, random_weight, scheme

import quantkit
from quantkit.errors import QuantkitWarning
from quantkit.runtime import linear, products
from quantkit.runtime.kernels import compiler, native, reference
from quantkit.runtime.kernels.compiler import CompilerError

X86 = platform.machine() in ("x86_64", "AMD64")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (compiler.library, products._compiled, linear._warn)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "quantkit"
    for cached in caches:
        cached.cache_clear()


def fake_compiler(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_library_is_compiled_once_and_kept(fresh, monkeypatch):
    compiler.library(4)
    (made,) = fresh.iterdir()
    changed = made.stat().st_mtime_ns
    compiler.library.cache_clear()
    monkeypatch.setattr(compiler, "_compile", lambda *args: pytest.fail("compiled again"))
    compiler.library(4)
    assert made.stat().st_mtime_ns == changed
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700


@needs_compiler
def test_another_source_or_processor_is_another_library(monkeypatch):
    here = compiler._fingerprint("c++")
    monkeypatch.setattr(compiler, "_processor", lambda: "another")
    assert compiler._fingerprint("c++") != here


@needs_compiler
@pytest.mark.skipif(not X86, reason="targets of x86")
@pytest.mark.parametrize(("target", "multiplies_bytes"), [("x86-64", False), ("haswell", True)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_other_processors_compute_the_same(fresh, monkeypatch, target, multiplies_bytes, bits):
    if target == "haswell" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(compiler, "_target", lambda: f"-march={target}")
    weight = random_weight(40, 96, scheme(bits, 32))
    for tokens in (1, 5, 20):
        inputs = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
        result = native.KERNEL.linear(inputs, native.KERNEL.pack(weight), layout_of(weight))
        expected = reference.KERNEL.linear(inputs, reference.KERNEL.pack(weight), layout_of(weight))
        assert (result - expected).abs().max() < 2e-4 * expected.std()
    assert bool(compiler.library(bits).quantkit_multiplies_bytes()) == (multiplies_bytes and bits < 8)


@needs_compiler
def test_without_openmp_one_thread_computes(fresh, tmp_path, monkeypatch):
    real = next(filter(None, map(shutil.which, compiler.COMPILERS)))
    script = f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real} "$@"'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", script))
    weight = random_weight(40, 64, scheme(4, 32))
    inputs = torch.ones(1, 64)
    result = native.KERNEL.linear(inputs, native.KERNEL.pack(weight), layout_of(weight))
    expected = reference.KERNEL.linear(inputs, reference.KERNEL.pack(weight), layout_of(weight))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "no-such-compiler"), ("echo cannot >&2; exit 1", "cannot compile block.cpp \\(cannot\\)")],
)
def test_without_a_compiler_torch_computes_and_says_why(fresh, tmp_path, monkeypatch, script, reason):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "broken", script) if script else "no-such-compiler")
    weight = random_weight(40, 64, scheme(4, 32))
    with pytest.warns(QuantkitWarning, match=reason):
        module = linear.PackedLinear(weight)
    assert module.kernel is reference.KERNEL
    inputs = torch.randn(2, 64)
    torch.testing.assert_close(
        module(inputs), reference.KERNEL.linear(inputs, reference.KERNEL.pack(weight), layout_of(weight))
    )


def test_a_model_without_a_compiler(fresh, monkeypatch, tiny_rtn_w4):
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        expected = quantkit.load(tiny_rtn_w4, device="cpu")(tokens).logits
        products._compiled.cache_clear()
        compiler.library.cache_clear()
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.warns(QuantkitWarning, match="torch alone"):
            model = quantkit.load(tiny_rtn_w4, device="cpu")
        assert (model(tokens).logits - expected).abs().max() < 1e-3 * expected.std()


@needs_compiler
def test_a_cache_that_others_can_write_is_not_used(fresh):
    fresh.mkdir()
    fresh.chmod(0o777)
    with pytest.raises(CompilerError, match="can be written by others"):
        compiler.library(4)


@needs_compiler
def test_a_damaged_library_is_named(fresh):
    compiler.library(4)
    (made,) = fresh.iterdir()
    made.unlink()  # it is mapped into this process, which would not survive another content
    made.write_bytes(b"no library")
    command = (
        "from quantkit.runtime.kernels import compiler\n"
        "try: compiler.library(4)\n"
        "except compiler.CompilerError as error: print(error)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(fresh.parent)}
    result = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert f"{made} cannot be loaded" in result.stdout
    assert "delete it" in result.stdout
