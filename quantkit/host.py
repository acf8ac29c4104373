"""The memory of this machine: how much of it this process has taken, and how much more it may."""

import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory() -> int:
    """Return the bytes that this process can still take: what the machine has, and what its control groups allow."""
    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups()]))


def resident_memory() -> int:
    """Return the resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    try:  # what `getrusage` says begins with what the parent had when it started this process
        return 1024 * _field(Path("/proc/self/status"), "VmHWM:")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _left_in_groups() -> Iterator[int]:
    """Yield what each control group that this process is in leaves of its limit, those above it too.

    Pages of files that nobody has used lately count as taken, but the kernel gives them up before it refuses anything.
    Kernel documentation: admin-guide/cgroup-v2, and admin-guide/cgroup-v1/memory.
    """
    for group, limit, taken, cache in _groups():
        most, now = _number(group / limit), _number(group / taken)
        if most is not None and now is not None:
            unused = 0
            with suppress(OSError):
                unused = _field(group / "memory.stat", cache)
            yield most - now + unused


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Yield the groups' directories, and the names of their limit, of what is taken, and of what can be given up."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        inner = root / own.lstrip("/")  # inside a container it may not exist: its own group is then the root
        for group in (inner, *inner.parents):
            yield group, *names
            if group == root:
                break


def _number(path: Path) -> int | None:
    """Return the number in a file, None if there is none or it says `max`."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int:
    """Return the number behind `name` in a file of one name per line; 0 if the name is not there."""
    lines = map(str.split, path.read_text(encoding="utf-8").splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)
