"""Run quantkit on thousands of damaged inputs: each must end in one clear line or a right result.

    python scripts/fuzz.py --count 2000 --jobs 2
    python scripts/fuzz.py --only 1234          # one case again, as a finding names it

A case is a seed (`tests/damaged.py`): it picks a file (config.json, index, shards, tokenizer, recipe, calibration text
or mix, architecture, aliases, what an output consists of), damages it (`tests/mutations.py`), and runs what reads it.
Findings are: an exception that is no QuantkitError, a message of several lines, a hang, a process that died, files
touched outside the output, or a foreign file's content inside it. Workers may take 4 GB of address space beyond what
they begin with, so a file that claims to be huge is found out. Exits with 1 if there are findings.
"""

import argparse
import faulthandler
import multiprocessing
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import psutil
import torch
from damaged import Arena, Verdict
from rich.progress import track

ROOM = 4 * 2**30
STUCK = 60  # seconds after which a process ends itself
_ARENA: list[Arena] = []


def main() -> None:
    """Run the cases, print a table and the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this case alone")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.count) if args.only is None else [args.only]
    outcomes: Counter[tuple[str, str]] = Counter()
    findings = []
    with tempfile.TemporaryDirectory() as home:
        for verdict in track(_verdicts(seeds, args.jobs, Path(home)), total=len(seeds), description="cases"):
            outcomes[verdict.target, "finding" if verdict.fault else verdict.outcome] += 1
            if verdict.fault:
                findings.append(verdict)
            if args.only is not None:
                print(verdict)
    print("| file (what runs) | refused | right | findings |\n|---|---|---|---|")
    for target in sorted({target for target, _ in outcomes}):
        print(f"| {target} | " + " | ".join(str(outcomes[target, o]) for o in ("refused", "right", "finding")) + " |")
    print(f"\n{sum(outcomes.values())} cases, {len(findings)} findings.")
    for verdict in findings:
        print(f"--only {verdict.seed}: {verdict.target}, {verdict.damage}: {verdict.fault}")
    sys.exit(bool(findings))


def _verdicts(seeds: Iterable[int], jobs: int, home: Path) -> Iterator[Verdict]:
    """Yield a verdict for every seed; a worker that dies is a finding, and the rest goes on with new ones."""
    left, context = list(seeds), multiprocessing.get_context("spawn")
    while left:
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(home,)) as pool:
            for seed, future in [(seed, pool.submit(_run, seed)) for seed in left]:
                left.remove(seed)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    fault = "the process died, or its neighbour"
                    yield Verdict(seed=seed, target="?", damage="?", outcome="fault", fault=fault)
                    break


def _start(home: Path) -> None:
    torch.set_num_threads(1)
    own = Path(tempfile.mkdtemp(dir=home))
    _ARENA.append(Arena(own))
    most = psutil.Process().memory_info().vms + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _run(seed: int) -> Verdict:
    faulthandler.dump_traceback_later(STUCK, exit=True)  # an alarm does not reach what blocks outside of Python
    verdict = _ARENA[0].run(seed)
    faulthandler.cancel_dump_traceback_later()
    return verdict


if __name__ == "__main__":
    main()
