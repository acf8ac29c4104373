"""The documents of lm-eval's tasks, shared by several processes so that the scores are those of one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from quantkit.calibrate.team import Team
from quantkit.errors import UsageError


def refuse_few(name: str, documents: int, team: Team) -> None:
    """Raise UsageError for a task with fewer documents than processes: lm-eval would leave some without one."""
    if documents < team.size:
        raise UsageError(
            f"the task {name} has {documents} documents for {team.size} processes; start at most {documents}"
        )


@contextmanager
def same_prompts(tasks: Iterable[Any]) -> Iterator[None]:
    """Let every process make the prompts of all documents and keep its share.

    The examples in prompts are drawn one document after the other; drawn for a share of the documents they would be
    others than those of a single process, and so would the scores.
    """

    def build(make: Callable[..., None], task: Any, *, rank: int, world_size: int, **options: Any) -> None:  # noqa: ANN401
        make(rank=0, world_size=1, **options)
        task._instances = [each for each in task.instances if each.doc_id % world_size == rank]

    changed = list(tasks)
    for task in changed:
        task.build_all_requests = partial(build, task.build_all_requests, task)
    try:
        yield
    finally:
        for task in changed:
            del task.build_all_requests  # the class's own is underneath


def in_order(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return samples in the order of the documents: they come process by process."""
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))
