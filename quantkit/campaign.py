"""`quantkit.faults`: a campaign of trials, in several processes, that goes on where it was cut off.

What is finished stands in a journal of JSON lines beside the result. Its first line says what the trials are of; the
number of trials and the rates are not part of that, so a campaign can be made larger later.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from quantkit.ambient import usual_settings
from quantkit.errors import OutputError, QuantkitError, TeamError, UsageError
from quantkit.fault_report import FaultReport, summarize
from quantkit.model import names
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.writer import whole
from quantkit.resilience import scale_file, side_file
from quantkit.resilience.flips import Fault
from quantkit.trials import Campaign, Condition, Laboratory, Measure

Done = dict[tuple[str, int], Mapping[str, Any]]
_CHANGED = "bits did not come back after the trials, a fault of quantkit or of the machine; do not use the result"
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """What a campaign will cost.

    Attributes:
        bits: stored bits of each target.
        baseline: the metric without faults.
        conditions: how many rates, bits or tensors.
        trials: in all, and how many of them are finished.
        finished: of `trials`.
        seconds: predicted, from a few of them.
    """

    bits: Mapping[str, int]
    baseline: float
    conditions: int
    trials: int
    finished: int
    seconds: float


@usual_settings()
def faults(  # noqa: PLR0913
    model: str | Path,
    *,
    fault: str = "flip",
    burst: int = 2,
    measure: Measure | None = None,
    jobs: int = 1,
    output: str | Path | None = None,
    restart: bool = False,
    dry_run: bool = False,
    progress: Tell | None = None,
    **fields: Any,  # noqa: ANN401  of `Campaign`
) -> FaultReport | FaultPlan:
    """Flip bits of a packed model again and again, and return how much that harms it.

    >>> quantkit.faults("tiny-w4", rates=(1e-6, 1e-5), targets=("scales",), output="faults.json")

    The checkpoint is read only. Every trial puts back what it changed, which is verified at the end.

    Args:
        model: a checkpoint that `quantize` wrote; what `protect` left beside it is in use.
        fault: `flip`, `stuck0`, `stuck1` or `burst`.
        burst: bits of a burst.
        measure: (model, tokenizer) → metric, instead of the campaign's; for one process.
        jobs: processes, each with the model in its memory.
        output: the result as JSON, and beside it a journal with which an interrupted campaign goes on.
        restart: begin anew whatever the journal has.
        dry_run: return what it would cost.
        progress: told (what, trials done, trials in all).
        fields: those of `Campaign`.

    Raises:
        QuantkitError: see `quantkit.errors`; a journal of another campaign, a process that ended, bits that did not
            come back.
    """
    directory = names.resolve(str(model)).path
    campaign = Campaign(model=directory, fault=Fault(kind=fault, length=burst), **fields)  # type: ignore[arg-type]
    if jobs < 1 or (jobs > 1 and measure is not None):
        raise UsageError(f"jobs must be at least 1, and 1 for a measure of one's own, not {jobs}")
    tell, file = progress or (lambda *_: None), None if output is None else Path(output)
    tell("loading", 0, 0)
    laboratory = Laboratory(campaign, measure)
    about = _about(campaign, laboratory)
    done = {} if restart or file is None else _finished(journal_of(file), about)
    wanted = [(condition, n) for condition in laboratory.conditions() for n in range(campaign.trials)]
    missing = [(condition, n) for condition, n in wanted if (condition.label, n) not in done]
    if dry_run:
        return _plan(laboratory, wanted, missing, jobs)
    with _journal(file, about, done) as write:
        for line in _run(laboratory, missing, jobs):
            done[line["condition"], line["trial"]] = line
            write(line)
            tell("injecting", len(wanted) - len(missing) + _count(done, missing), len(wanted))
    if not laboratory.is_restored():
        raise QuantkitError(_CHANGED)
    report = summarize(about, [condition.label for condition in laboratory.conditions()], campaign.trials, done)
    if file is not None:
        _write(file, json.dumps(report.facts(), indent=2, ensure_ascii=False) + "\n")
    return report


def journal_of(output: Path) -> Path:
    """Return where the journal of a campaign with this result is."""
    return output.with_name(f"{output.name}l" if output.suffix == ".json" else f"{output.name}.jsonl")


def _count(done: Done, missing: Sequence[tuple[Condition, int]]) -> int:
    return sum((condition.label, number) in done for condition, number in missing)


def _about(campaign: Campaign, laboratory: Laboratory) -> dict[str, Any]:
    """Return what trials depend on, and what a reader of them wants to know."""
    settings = asdict(campaign)
    for name in ("rates", "trials", "device", "model"):
        del settings[name]
    bounds, scales = side_file.read(campaign.model, Checkpoint(campaign.model)), scale_file.read(campaign.model)
    return {
        "model": campaign.model.name,
        "sha256": laboratory.clean,
        **settings,
        "targets": list(campaign.targets),
        "protection": {"bounds": bounds and bounds.kind, "scales": None if scales is None else scales[0]},
        "bits": laboratory.bits(),
        "baseline": laboratory.baseline,
    }


def _plan(
    laboratory: Laboratory, wanted: Sequence[tuple[Condition, int]], missing: Sequence[tuple[Condition, int]], jobs: int
) -> FaultPlan:
    """Return the cost, from trials that are spread over the conditions."""
    sample = missing[:: max(1, len(missing) // 8)][:8]
    seconds = sum(laboratory.run(condition, number)["seconds"] for condition, number in sample)
    return FaultPlan(
        bits=laboratory.bits(),
        baseline=laboratory.baseline,
        conditions=len(laboratory.conditions()),
        trials=len(wanted),
        finished=len(wanted) - len(missing),
        seconds=seconds / max(1, len(sample)) * len(missing) / jobs,
    )


def _run(laboratory: Laboratory, missing: Sequence[tuple[Condition, int]], jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the trials as they are finished."""
    if jobs == 1 or len(missing) < 2:
        for condition, number in missing:
            yield laboratory.run(condition, number)
        return
    with _processes(jobs) as (pool, lines, stop):
        tasks = [pool.submit(_share, laboratory.campaign, missing[first::jobs], lines, stop) for first in range(jobs)]
        for task in tasks:
            task.add_done_callback(lambda _: lines.put(None))
        for _ in tasks:
            yield from iter(lines.get, None)
        try:
            if not all(task.result() for task in tasks):
                raise QuantkitError(_CHANGED)
        except BrokenProcessPool as error:
            raise TeamError(
                "a process of the campaign ended; start the same command again, with fewer --jobs"
            ) from error


@contextmanager
def _processes(jobs: int) -> Iterator[tuple[ProcessPoolExecutor, Any, Any]]:
    """Give processes that share the threads, a queue of theirs, and an event at which they end."""
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    how: dict[str, Any] = {"mp_context": context, "initializer": torch.set_num_threads, "initargs": (threads,)}
    with context.Manager() as manager, ProcessPoolExecutor(jobs, **how) as pool:
        stop = manager.Event()
        try:
            yield pool, manager.Queue(), stop
        finally:
            stop.set()


def _share(campaign: Campaign, trials: Sequence[tuple[Condition, int]], lines: Any, stop: Any) -> bool:  # noqa: ANN401
    """Run trials in a process of its own and put them into the queue; return whether all bits were put back."""
    with usual_settings():
        laboratory = Laboratory(campaign)
        for condition, number in trials:
            if stop.is_set():
                break
            lines.put(laboratory.run(condition, number))
        return laboratory.is_restored()


def _finished(journal: Path, about: Mapping[str, Any]) -> Done:
    """Return the finished trials of a journal, none if there is none; a line that was cut off is left out.

    Raises:
        UsageError: the journal is of another campaign, or no journal.
    """
    if not journal.is_file():
        return {}
    lines = journal.read_text(encoding="utf-8").splitlines()
    done: Done = {}
    for number, text in enumerate(lines):
        try:
            line = json.loads(text)
            if number:
                done[line["condition"], line["trial"]] = line
            elif json.loads(json.dumps(_same(about))) != _same(line):
                raise UsageError(
                    f"{journal} is the journal of another campaign; give another --output, or --restart to begin anew"
                )
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) - 1 or not number:
                raise UsageError(
                    f"{journal} is no journal of a campaign; give another --output, or --restart to begin anew"
                ) from error
    return done


def _same(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be the same; the baseline's last digits depend on the number of threads."""
    return {name: value for name, value in about.items() if name != "baseline"}


@contextmanager
def _journal(
    output: Path | None, about: Mapping[str, Any], done: Done
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that keeps a trial, whatever ends the campaign afterwards."""
    if output is None:
        yield lambda _: None
        return
    journal = journal_of(output)
    _write(journal, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (about, *done.values())))
    with journal.open("a", encoding="utf-8") as file:
        yield lambda line: _append(file, line)


def _append(file: IO[str], line: Mapping[str, Any]) -> None:
    try:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise OutputError(f"{file.name} cannot be written: {error.strerror}; start the same command again") from error


def _write(file: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")
