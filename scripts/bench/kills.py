"""Kill `quantkit quantize` again and again, start it again, and compare what comes out with an uninterrupted run.

    python scripts/bench/kills.py --kills 120

Each round kills one run up to three times, at one of

    moment      a random moment, from outside
    boundary    behind a finished block, before or after it is kept
    writer      a random one of all operations by which anything gets onto the disk, before it or with half of it done

always by SIGKILL, so that nothing can be tidied up. Then the run is started until it ends, and every file of the output
but report.json must have the bytes of the uninterrupted one; report.json must be equal but for times, memory, and the
count of processes. The processes are forked from one that has imported everything: a kill costs little more than the
work it destroys. Needs nothing but quantkit; the model is the embedded one.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quantkit import api
from quantkit.calibrate import journal
from quantkit.keeping import Keeper
from quantkit.model import workspace, writer
from quantkit.pipeline import Silent

TEXT = {"calibration": "embedded", "samples": 8, "seqlen": 64, "group_size": 32}
RUNS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "wbits": 4, **TEXT},
    "gptq": {"method": "gptq", "wbits": 3, **TEXT},
    "awq, also as gptq": {"method": "awq", "wbits": 4, "formats": ["gptq"], **TEXT},
    "window of 2, rounding, from gptq": {
        "method": "omniquant",
        "wbits": 2,
        "options": {"updates": 4, "window": 2, "rounding": True, "init": "gptq", "schedule": "linear"},
        **TEXT,
    },
    "window of 3, transforms, W4A8": {
        "method": "omniquant",
        "wbits": 4,
        "abits": 8,
        "options": {"updates": 3, "window": 3, "let": True},
        **TEXT,
    },
    "rotated, bits by loss": {
        "method": "omniquant",
        "target_bpw": 3.6,
        "rotate": True,
        "options": {"updates": 2},
        **TEXT,
    },
    "distilled, own text": {
        "preset": "best",
        "wbits": 3,
        "options": {"omniquant.updates": 3, "distill.updates": 2},
        **TEXT,
        "calibration": "self",
        "samples": 4,
        "seqlen": 32,
        "batch_size": 2,
    },
}
KINDS = ("moment", "boundary", "writer")


class Kill:
    """Kills this process at the `count`-th of the places that a kind of kill knows; 0: never, but counts them."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.left, self.seen = kind, count, 0

    def here(self) -> bool:
        """Count a place; return whether the process shall die there."""
        self.seen += 1
        self.left -= 1
        return self.left == 0

    def set(self) -> None:
        """Put the places into the code."""
        if self.kind == "boundary":
            _wrap(Keeper, "keep", self, after=True)
        if self.kind == "writer":
            for owner in (writer, journal):
                _wrap(owner, "save_file", self, torn=True)
                _wrap(owner, "to_disk", self)
            for name in ("rename", "replace", "unlink", "mkdir", "write_text"):
                _wrap(Path, name, self)
            _wrap(os, "replace", self)
            _wrap(shutil, "rmtree", self, torn=True)
            _wrap(workspace.fcntl, "flock", self)


def _wrap(owner: object, name: str, kill: Kill, *, after: bool = False, torn: bool = False) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if kill.here():
            if torn:
                _half(name, args)
            _die()
        result = original(*args, **kwargs)
        if after and kill.here():
            _die()
        return result

    setattr(owner, name, wrapped)


def _half(name: str, args: tuple[Any, ...]) -> None:
    """Do half of what was to be done: half of a file, or half of a directory's files removed."""
    if name == "save_file":
        Path(args[1]).write_bytes(b"\0" * 1000)
        return
    files = sorted(path for path in Path(args[0]).rglob("*") if path.is_file())
    for path in files[: len(files) // 2]:
        path.unlink()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:  # noqa: BLE001  a child must not go on in the parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process; return the signal that killed it, 0 if it succeeded.

    Raises:
        RuntimeError: it failed by itself.
    """
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise RuntimeError("a run failed, see its message above")
    return 0


def run(name: str, output: Path, kill: Kill | None = None, told: Path | None = None) -> None:
    """Do the run `name`; `told` is written with how many places of the kill it came by."""
    if kill:
        kill.set()
    api.quantize("tiny", output=output, progress=Silent(), device="cpu", **RUNS[name])
    if told and kill:
        told.write_bytes(str(kill.seen).encode())


def content(output: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an output, of report.json without what differs between two runs."""
    found = {}
    for path in sorted(output.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(data)
                for changing in ("measured", "attempts", "predicted"):
                    report.pop(changing)
                data = json.dumps(report, sort_keys=True).encode()
            found[str(path.relative_to(output))] = hashlib.sha256(data).hexdigest()
    return found


class Trial:
    """One run: what it makes without a kill, how long it takes, and how many places each kind of kill has."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work = name, work
        self.places: dict[str, int] = {}
        for kind in ("boundary", "writer"):
            output, told = work / kind, work / f"{kind}.told"
            begun = time.monotonic()
            ended(forked(lambda kind=kind, output=output, told=told: run(name, output, Kill(kind, 0), told)))
            self.seconds = time.monotonic() - begun
            self.places[kind] = int(told.read_bytes())
        self.expected = content(work / "boundary")
        if self.expected != content(work / "writer"):
            raise RuntimeError(f"two uninterrupted runs of {name} differ")

    def attempt(self, kind: str, chance: random.Random) -> tuple[int, list[str]]:
        """Kill the run up to three times, then let it end; return how often it was killed and what differs."""
        output = self.work / "killed"
        kills = 0
        for _ in range(chance.randint(1, 3)):
            kills += self._killed(kind, output, chance)
        if not _whole(output):
            ended(forked(lambda: run(self.name, output)))
        found = content(output)
        differing = [file for file in sorted({*found, *self.expected}) if found.get(file) != self.expected.get(file)]
        differing += [str(path) for path in output.parent.glob(".killed*/*") if path.name != "lock"]
        shutil.rmtree(output)
        return kills, differing

    def _killed(self, kind: str, output: Path, chance: random.Random) -> bool:
        """Start the run and kill it; return whether it died before it was done."""
        if _whole(output):
            return False
        if kind == "moment":
            pid = forked(lambda: run(self.name, output))
            time.sleep(chance.uniform(0, self.seconds))
            os.kill(pid, signal.SIGKILL)
        else:
            place = chance.randint(1, self.places[kind])
            pid = forked(lambda: run(self.name, output, Kill(kind, place)))
        return bool(ended(pid))


def _whole(output: Path) -> bool:
    """Return whether a process got to its end; it may have died while it swept up behind itself, but for the lock."""
    return output.exists() and not (workspace.place_of(output) / "run").exists()


def rounds(trials: list[Trial], kills: int, seed: int) -> Iterator[tuple[str, str, int, list[str]]]:
    """Yield run, kind, kills and what differs, round after round, until so many kills were done."""
    chance, done, number = random.Random(seed), 0, 0
    while done < kills:
        trial, kind = trials[number % len(trials)], KINDS[number // len(trials) % len(KINDS)]
        count, differing = trial.attempt(kind, chance)
        done += count
        number += 1
        yield trial.name, kind, count, differing


def main() -> None:
    """Kill, compare, print a table; exit with 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process may not use the threads of its parent
    killed: Counter[tuple[str, str]] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as work:
        trials = []
        for number, name in enumerate(args.runs):
            (Path(work) / str(number)).mkdir()
            trials.append(Trial(name, Path(work) / str(number)))
        for name, kind, count, differing in rounds(trials, args.kills, args.seed):
            killed[name, kind] += count
            wrong += bool(differing)
            print(f"{name}, {kind}: {count} kills, {differing or 'identical'}", file=sys.stderr, flush=True)
    print("| run | " + " | ".join(KINDS) + " |\n|---|" + "---|" * len(KINDS))
    for name in args.runs:
        print(f"| {name} | " + " | ".join(str(killed[name, kind]) for kind in KINDS) + " |")
    print(f"\n{sum(killed.values())} kills, {wrong} outputs that differ.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
