"""What a run notes about itself for report.json: versions, machine, what it was made from, how long each stage took."""

import hashlib
import platform
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.walk import BlockReport, Listener

_PACKAGES = ("quantkit", "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change what a run makes."""
    return {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what else can: system, vector instructions and threads of the CPU, and the GPU if the run uses one."""
    facts = {
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def tokens_sha256(tokens: Tensor) -> str:
    """Return the SHA-256 of token sequences, (sequences, tokens) int64: of their numbers, little-endian, row by row."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


class Timed:
    """Passes on what it is told, and keeps how many seconds each stage took; what comes twice is added up."""

    def __init__(self, listener: Listener) -> None:
        """Begin with no stage."""
        self._listener, self._begun, self._name = listener, time.monotonic(), ""
        self._start, self._stages = self._begun, dict[str, float]()

    @property
    def seconds(self) -> float:
        """Seconds from the beginning until now."""
        return time.monotonic() - self._start

    @property
    def stages(self) -> dict[str, float]:
        """Stage → seconds, in order, the present one until now."""
        running = {self._name: self._stages.get(self._name, 0.0) + time.monotonic() - self._begun}
        return self._stages | (running if self._name else {})

    def stage(self, name: str) -> None:
        """Begin a stage; the one before it ends."""
        self._stages, self._name, self._begun = self.stages, name, time.monotonic()
        self._listener.stage(name)

    def planned(self, plan: object) -> None:
        """Ignore: the plan was told before the first stage."""

    def progress(self, done: float, total: int) -> None:
        """Pass it on."""
        self._listener.progress(done, total)

    def block(self, report: BlockReport) -> None:
        """Pass it on."""
        self._listener.block(report)
