"""Sizes and durations as people write and read them."""

import re

from quantkit.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?)?b?", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int | None) -> int | None:
    """Return the bytes that `8GiB`, `8GB`, `8g`, `0.5 TiB`, `500MB` or `1000000` mean; letters of either case.

    None stays None.

    Raises:
        UsageError: it is no such size, or nothing.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(str(text).strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if not size:
        raise UsageError(f"--memory must be a size such as 8GiB, 500MB or 4000000000, not {str(text)!r}")
    return size


def human_size(count: float) -> str:
    """Return a number of bytes with three digits: `1.29 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_time(seconds: float) -> str:
    """Return a duration as `9.5 s`, `12 min`, `3 h 05 min` or `4 days`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{round(hours / 24):,} days"
