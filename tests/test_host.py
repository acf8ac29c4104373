"""How much memory a process may still take: the machine's own word, and that of control groups of both versions."""

import pytest
import torch

from quantkit import host

GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Pretend that the process is in the control groups of a file, whose directories hold these numbers."""

    def make(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(host, "CGROUPS", tmp_path / "fs")
        return host.free_memory()

    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: type("", (), {"available": 100 * GB}))
    return make


V2 = {"box/memory.max": 8 * GB, "box/memory.current": 3 * GB, "box/memory.stat": f"anon 1\ninactive_file {GB}"}
V1 = {
    "memory/memory.limit_in_bytes": 8 * GB,
    "memory/memory.usage_in_bytes": 3 * GB,
    "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}",
}


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("0::/\n", {}, 100 * GB),
        ("0::/box\n", V2, 6 * GB),
        ("0::/box/inner\n", V2, 6 * GB),  # the limit of a group above counts
        ("0::/box\n", V2 | {"box/memory.max": "max"}, 100 * GB),
        ("0::/box\n", {"box/memory.max": GB, "box/memory.current": 2 * GB}, 0),
        ("4:cpu:/x\n3:memory:/docker/abc\n", V1, 6 * GB),  # inside a container the own group is the root
        ("3:cpu,memory:/\n", V1 | {"memory/memory.limit_in_bytes": 2**63 - 4096}, 100 * GB),
        ("4:cpu:/x\n", V1, 100 * GB),
    ],
    ids=["none", "v2", "v2-above", "v2-no-limit", "v2-over", "v1", "v1-no-limit", "v1-other"],
)
def test_the_smallest_of_what_is_left_counts(groups, own, files, free):
    assert groups(own, files) == free


def test_a_system_without_control_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "nowhere")
    assert host.free_memory() > 0


def test_the_peak_is_what_was_taken_at_most():
    before = host.peak_memory()
    assert before >= host.resident_memory() - 2**20  # the kernel counts pages in lots
    size = 2 * (before - host.resident_memory()) + 50_000_000
    block = torch.ones(size, dtype=torch.uint8)
    assert host.peak_memory() >= before + 20_000_000
    del block
