"""Tasks of lm-eval, and quantkit's models as models of lm-eval. Nothing else imports the library, which takes seconds.

`find_tasks` refuses everything that can be refused before a model is loaded; `run` asks the model. Prompts, scoring and
defaults are lm-eval's own, so that the figures are those that others publish; two things differ. Batches are cut by
tokens on a CPU. And standard errors that need a bootstrap (those of metrics that are no mean) are of `RESAMPLES`
resamples instead of lm-eval's 100 000, which takes minutes.
"""

import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from quantkit.calibrate.team import Team, together
from quantkit.errors import DataError, NetworkError, UsageError, nearest
from quantkit.evaluation.loading import Model, Tokenizer, quiet
from quantkit.evaluation.perplexity import BATCH_TOKENS
from quantkit.evaluation.runtimes import load_with
from quantkit.evaluation.scores import Score, TaskScores
from quantkit.evaluation.shares import in_order, refuse_few, same_prompts
from quantkit.runtime import DEFAULT_RUNTIME

RESAMPLES = 1000
GENERATED_AT_ONCE = 8  # texts on a CPU, where a step reads all weights however many texts it extends
_PASSED_ON = (
    *("add_bos_token", "chat_template_args", "enable_thinking", "logits_cache", "max_batch_size", "max_length"),
    *("prefix_token_id", "softmax_dtype", "think_end_token", "truncation"),
)
_SHELL_DEVICE = "cuda:0"  # what lm-eval's command line says where --device is left out, also without a GPU
_NO_ANSWER = "Label index was not in"  # lm-eval's words for an answer that nobody can give
Progress = Callable[[int, int], None]
Tasks = dict[str, Any]  # lm-eval's TaskDict: tasks and groups by name


@register_model("quantkit")
class QuantkitLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A model that quantkit loads, as lm-eval knows it: `--model quantkit --model_args pretrained=OUT`."""

    def __init__(  # noqa: PLR0913
        self,
        pretrained: str | Model,
        *,
        tokenizer: Tokenizer | None = None,
        runtime: str = DEFAULT_RUNTIME,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        progress: Progress | None = None,
        team: Team | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Load `pretrained` unless it is a model already; `progress` is told (requests answered, requests in all).

        Of the processes of a `team` each answers its own share; None: those that this one has joined.

        Raises:
            UsageError: an option that would have no effect, or an unknown runtime.
            QuantkitError: see `load_with`.
        """
        for name in options:
            if name not in _PASSED_ON:
                known = (*_PASSED_ON, "runtime", "revision", "pretrained")
                raise UsageError(f"the model quantkit has no argument {name!r}{nearest(name, known)}")
        self.team = team or Team.current()
        if isinstance(pretrained, str):
            place = self.team.device(None if device == _SHELL_DEVICE else device)
            pretrained, tokenizer = load_with(runtime, pretrained, revision=revision, device=place)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size, **options)
        self._rank, self._world_size = self.team.rank, self.team.size
        self._progress = progress
        self._at_once = 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return how many requests each process has: as many as this one, so that none is asked more than its share."""
        return tensor.expand(self.team.size)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:  # noqa: ANN401
        """Return what the processes found, in their order; None but for process `dst`."""
        with together():
            found: list[Any] | None = super().gather_object(obj, dst)
        return found

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.team.wait()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:  # noqa: ANN401
        """Answer requests for the likelihood of a continuation."""
        self._count(len(requests))
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:  # noqa: ANN401
        """Answer requests for the likelihood of a whole text."""
        self._count(len(requests))
        self._at_once = max(1, BATCH_TOKENS // self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:  # noqa: ANN401
        """Answer requests to continue a text."""
        self._count(len(requests))
        self._at_once = GENERATED_AT_ONCE
        return super().generate_until(requests, disable_tqdm)

    def _count(self, total: int) -> None:
        """Let every answer move the progress: lm-eval hands each to its cache."""
        if self._progress is not None:
            self.cache_hook = _Counter(total, self._progress)

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """Return how many requests from `pos` on are answered at once; they are ordered, the longest first."""
        if self.device.type != "cpu":
            return int(super()._batch_scheduler(pos, n_reordered_requests))
        _, context, continuation = n_reordered_requests[pos]
        return max(1, BATCH_TOKENS // min(len(context) + len(continuation), int(self.max_length)))

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        return self._at_once if self.device.type == "cpu" else int(super()._detect_batch_size(requests, pos))


class _Counter(CacheHook):  # type: ignore[misc]
    def __init__(self, total: int, progress: Progress) -> None:
        super().__init__(None)
        self.done, self.total, self.progress = 0, total, progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:  # noqa: ANN401, ARG002
        """Count; lm-eval would store the answer `res` here."""
        self.done += 1
        self.progress(self.done, self.total)


def _aloud(progress: Progress | None) -> Progress | None:
    """Return `progress` with the standard output of now: what it prints is not lm-eval's."""
    if progress is None:
        return None
    stdout = sys.stdout

    def told(done: int, total: int) -> None:
        with redirect_stdout(stdout):
            progress(done, total)

    return told


def find_tasks(names: Sequence[str], *, include_path: Path | None = None, num_fewshot: int | None = None) -> Tasks:
    """Return the tasks, groups and tags of these names, with their data, ready to be run; globs are allowed.

    Files of `include_path` come before lm-eval's own. The Python functions that those files name are imported.

    Raises:
        UsageError: an unknown name, a task given twice or one that cannot be run here, no task files in `include_path`.
        NetworkError: data that is neither on this machine nor within reach.
        DataError: data that is not there or not as the task file says.
    """
    with _tidy() as warnings:
        manager, found = _look_up(names, include_path)
        items = [item for name in found for item in _load(manager, name)]
        try:
            tasks: Tasks = manager.load(items)
        except ValueError as error:  # its only complaint about objects
            raise UsageError(f"{error}; leave one out") from error
        for name, task in tasks["tasks"].items():
            _prepare(name, task, num_fewshot)
            if any(_NO_ANSWER in warning for warning in warnings):
                raise DataError(f"the task {name} has a target that is none of the choices; see doc_to_target there")
    return tasks


def run(  # noqa: PLR0913
    model: Model,
    tokenizer: Tokenizer,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int | str = "auto",
    bos: bool = False,
    progress: Progress | None = None,
    team: Team | None = None,
) -> TaskScores:
    """Return what `model` scores in `tasks`, the first `limit` documents of each; the tasks can be run again.

    `batch_size` auto means `BATCH_TOKENS` tokens on a CPU; on a GPU lm-eval tries what fits. With `bos` the tokenizer's
    BOS stands before every prompt, whether or not the tokenizer puts it there itself. The processes of a `team` share
    the documents; the first gets the scores, the others get none.

    Raises:
        UsageError: prompts that do not fit into the model's context, or fewer documents than processes.
    """
    told, team = _aloud(progress), team or Team()
    with _tidy() as warnings:
        for name, task in tasks["tasks"].items():
            refuse_few(name, min(len(task.eval_docs), limit or sys.maxsize), team)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # every model is shown the same examples
        judged = QuantkitLM(
            model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=bos or None,
            progress=told,
            team=team,
        )
        try:
            with same_prompts(tasks["tasks"].values()):
                found = evaluate(judged, tasks, limit=limit, bootstrap_iters=RESAMPLES)
        except AssertionError as error:
            reason = str(error) or f"an answer is longer than the model's context of {judged.max_length} tokens"
            raise UsageError(f"the tasks do not fit the model: {reason}") from error
    if found is None:  # another process has them all
        return TaskScores(scores=())
    return TaskScores(scores=tuple(_scores(found)), notes=tuple(_notes(warnings, judged.max_length)))


def shell(arguments: Sequence[str]) -> None:
    """Run lm-eval's own command line, in which `--model quantkit` is known, with all that it prints."""
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


@contextmanager
def _tidy() -> Iterator[list[str]]:
    """Keep lm-eval off the terminal and its seeds to itself; yields the list to which its warnings go."""
    warnings: list[str] = []
    collector = _Collector(warnings)
    log = logging.getLogger("lm_eval")
    hub = logging.getLogger("huggingface_hub")  # tells of every retry
    levels, propagate, pools = (log.level, hub.level), log.propagate, os.environ.get("DISABLE_MULTIPROC")
    states = random.getstate(), np.random.get_state()
    log.addHandler(collector)
    log.setLevel(logging.WARNING)
    hub.setLevel(logging.ERROR)
    log.propagate = False
    os.environ["DISABLE_MULTIPROC"] = "1"  # for the bootstrap: a fork of this process may deadlock
    try:
        with quiet(), redirect_stdout(io.StringIO()), torch.random.fork_rng():
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield warnings
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        log.removeHandler(collector)
        log.setLevel(levels[0])
        hub.setLevel(levels[1])
        log.propagate = propagate
        del os.environ["DISABLE_MULTIPROC"]
        if pools is not None:
            os.environ["DISABLE_MULTIPROC"] = pools


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _look_up(names: Sequence[str], include_path: Path | None) -> tuple[TaskManager, list[str]]:
    """Return an index of tasks and the names in it; lm-eval's own takes seconds to index and is left out if it can."""
    broken = _broken_files(include_path) if include_path else {}
    if include_path:
        local = TaskManager(include_path=include_path, include_defaults=False, metadata={})
        if all(name in local.all_subtasks for name in names):
            return local, list(dict.fromkeys(names))
    manager = TaskManager(include_path=include_path, metadata={})
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if name.endswith(".yaml"):
            raise UsageError(f"{name} is a file; name its folder with --include-path, and the task as the file does")
        if not matches:
            known = nearest(name, manager.all_tasks, otherwise="; `quantkit lm-eval ls tasks` lists all")
            where = f"; {next(iter(broken))} cannot be read: {next(iter(broken.values()))}" if broken else ""
            raise UsageError(f"unknown task {name!r}{known}{where}")
        found += matches
    return manager, list(dict.fromkeys(found))


def _broken_files(include_path: Path) -> dict[Path, str]:
    """Return the task files that cannot be read, with the reason; lm-eval passes over them.

    Raises:
        UsageError: no such directory, or no task file in it.
    """
    if not include_path.is_dir():
        raise UsageError(f"--include-path {include_path} is no directory; give one that holds task files (.yaml)")
    files = sorted(include_path.rglob("*.yaml"))
    if not files:
        raise UsageError(f"--include-path {include_path} holds no task files (.yaml)")
    broken = {}
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # noqa: BLE001  whatever a YAML parser raises
            broken[file] = _reason(error)
    return broken


def _load(manager: TaskManager, name: str) -> list[Any]:
    """Return the tasks of a name, or its group, with their data."""
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        raise NetworkError(
            f"the data of the task {name} cannot be fetched ({_reason(error)}); connect to the Hub once,"
            " or describe data on this machine in a task file and name its folder with --include-path"
        ) from error
    except Exception as error:  # a task file, its functions and its data may raise anything
        raise DataError(f"the task {name} cannot be set up: {_reason(error)}") from error
    groups: Mapping[str, Any] = loaded["groups"]
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _prepare(name: str, task: Any, num_fewshot: int | None) -> None:  # noqa: ANN401
    """Set the examples of a task as lm-eval does, and go through one document, so that its faults show now.

    Raises:
        UsageError: code or images would be needed.
        DataError: the data is not as the task file says.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"the task {name} executes code that the model writes; run it with quantkit lm-eval instead")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"the task {name} has images or sound; quantkit judges text")
    own = task.get_config("num_fewshot")
    if num_fewshot is None or own == 0:  # a task that says 0 means it
        num_fewshot = own or 0
    task.set_config(key="num_fewshot", value=num_fewshot)
    try:
        task.build_all_requests(limit=1, rank=0, world_size=1)
        if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
            task.process_results(task.instances[0].doc, [(0.0, False)] * len(task.instances))
    except Exception as error:  # templates and functions of a task file may raise anything
        raise DataError(f"the data of the task {name} is not as its task file says: {_reason(error)}") from error


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the scores of lm-eval's results: groups, then tasks."""
    for name, metrics in {**found.get("groups", {}), **found["results"]}.items():
        for key, value in metrics.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_}")
            yield Score(
                task=name,
                metric=metric,
                filter=filter_,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                samples=int(metrics["sample_len"]),
                num_fewshot=found["n-shot"].get(name),
                right=_right(in_order(found["samples"].get(name, [])), metric, filter_),
            )


def _right(samples: Sequence[Mapping[str, Any]], metric: str, filter_: str) -> tuple[bool, ...] | None:
    """Return per document whether the answer was right, None where that is not what the metric says."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == filter_]
    if not values or any(isinstance(value, tuple | list | str) or value not in (0, 1) for value in values):
        return None
    return tuple(bool(value) for value in values)


def _notes(warnings: Sequence[str], context: int) -> Iterator[str]:
    cut = sum("runcat" in warning for warning in warnings)
    if cut:
        yield f"{cut} prompts were longer than the model's context of {context} tokens and lost their beginning"
    if lost := sum(_NO_ANSWER in warning for warning in warnings):
        yield f"{lost} documents have a target that is none of their choices, and count as wrong"


def _reason(error: BaseException) -> str:
    """Return what `error` says, in one line of readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"
