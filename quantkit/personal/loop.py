"""The one loop of personalization: a logical batch, an estimate of its gradient, an update, now and then a validation.

What is best on the validation examples is kept; without them, the last. A loss or a tensor that is not finite ends the
loop with the last good values. Every so often all that is needed to go on is written beside the delta, so that the same
command, started again after it was killed, comes to the same bytes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantkit.errors import DataError, OutputError
from quantkit.host import peak_memory
from quantkit.personal.data import Example, batch
from quantkit.personal.delta import save_whole
from quantkit.personal.protocols import KnowsRate, Losses, Objective, Parameters
from quantkit.personal.start import Start
from quantkit.personal.updates import Updates

SAVE_SECONDS = 20.0  # at least, between two states that are written
Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How a run is divided.

    Attributes:
        micro_batch: examples that are in the model at once.
        every: steps between validations.
        patience: validations without a better one after which the run ends; None: it never does.
        keep: best, by the validation, or last.
        save_seconds: between states that are written.
    """

    micro_batch: int = 8
    every: int = 50
    patience: int | None = None
    keep: str = "best"
    save_seconds: float = SAVE_SECONDS


@dataclass
class Progress:
    """How far a run is: what the state holds besides tensors."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    waited: int = 0
    seconds: float = 0.0
    forwards: int = 0
    rate: float | None = None  # where it was found from the loss
    stopped: str = ""


class Loop:
    """A run over one model; `run` does it."""

    def __init__(  # noqa: PLR0913  the parts of a run
        self,
        model: nn.Module,
        parameters: Parameters,
        objective: Objective,
        start: Start,
        *,
        train: Sequence[Example],
        validation: Sequence[Example],
        updates: Updates,
        pace: Pace,
        device: torch.device,
    ) -> None:
        """Take what a run is made of; `model` has the parameters attached."""
        self.model, self.parameters, self.objective = model, parameters, objective
        self.start, self.estimator, self.sampler = start, start.estimator, start.sampler
        self.train, self.validation, self.updates, self.pace = train, validation, updates, pace
        self.device, self.progress = device, Progress()
        self.optimizer = updates.begin(parameters)
        self.best = self._copies()

    def run(self, state: "State", tell: Tell) -> dict[str, Tensor]:
        """Train; return the tensors that were best, or the last where those are to be kept.

        Raises:
            DataError: the loss is not finite before anything was learned.
        """
        state.restore(self)
        for _ in range(self.progress.step):
            self.start.allows()  # takes down again what an earlier process released
        began, progress = time.monotonic() - self.progress.seconds, self.progress
        with self._counted():
            self._settle_rate()
            if not progress.validations:
                self._validate()
            while progress.step < self.updates.steps and not progress.stopped:
                self._advance()
                progress.seconds = time.monotonic() - began
                tell(self.told())
                state.offer(self)
        progress.seconds = time.monotonic() - began
        return self.best if self.keeps_best or progress.stopped.startswith("the loss") else self._copies()

    def told(self) -> dict[str, Any]:
        """Return what a person wants to know of a run that goes on."""
        progress = self.progress
        return {
            "step": progress.step,
            "steps": self.updates.steps,
            "loss": progress.losses[-1] if progress.losses else math.nan,
            "validation": progress.validations[-1][1] if progress.validations else None,
            "memory_bytes": peak(self.device),
        }

    def _advance(self) -> None:
        """Make one step, and validate if it is time."""
        progress, here = self.progress, self._copies()
        if not self.start.allows():
            progress.stopped = f"the privacy budget is spent after {progress.step} steps"
            return None
        losses, count = self._losses()
        with torch.set_grad_enabled(self.estimator.needs_gradients):
            loss = self.estimator.estimate(losses, self.parameters, step=progress.step)
        finite = self.start.private or not count or math.isfinite(loss)  # to stop for one example would tell of it
        if finite:
            self.updates.take(self.optimizer, progress.step)
        if not finite or not all(bool(value.isfinite().all()) for value in self.parameters.values()):
            return self._diverged(here)
        if not self.keeps_best:
            self.best = self._copies()
        progress.step += 1
        progress.losses.append(loss if count else math.nan)
        if progress.step % self.pace.every == 0 or progress.step == self.updates.steps:
            self._validate()
        return None

    def _losses(self) -> tuple[list[Losses], int]:
        """Return the losses of the micro-batches of the next step, and how many examples they have."""
        chosen = [self.train[i] for i in self.sampler.batch(self.progress.step).tolist()]
        parts = [chosen[i : i + self.pace.micro_batch] for i in range(0, len(chosen), self.pace.micro_batch)]
        return [Losses(self.objective, self.model, batch(part, self.device)) for part in parts], len(chosen)

    def _settle_rate(self) -> None:
        """Find the learning rate from the loss, where none is given."""
        if self.updates.rate is None:
            estimator = cast("KnowsRate", self.estimator)
            self.progress.rate = self.progress.rate or estimator.rate(self._losses()[0], self.parameters)
            self.updates = replace(self.updates, rate=self.progress.rate)

    def _diverged(self, before: Mapping[str, Tensor]) -> None:
        """End the run with the last good values.

        Raises:
            DataError: there are none but those of the start.
        """
        progress = self.progress
        learned = progress.best_step if self.keeps_best else progress.step
        if not learned:
            raise DataError(
                f"the loss is not finite at step {progress.step} and nothing was learned before; lower --lr, or look "
                "for odd examples"
            )
        self._put(before)
        progress.stopped = f"the loss is not finite at step {progress.step}; what was good before it is kept"

    @property
    def keeps_best(self) -> bool:
        """Whether the best values are the result, and not the last."""
        return bool(self.validation) and self.pace.keep == "best"

    @torch.no_grad()
    def _validate(self) -> None:
        if not self.validation:
            return
        progress, size = self.progress, self.pace.micro_batch
        total = 0.0
        for first in range(0, len(self.validation), size):
            part = batch(self.validation[first : first + size], self.device)
            total += float(self.objective(self.model, part).double().sum())
        loss = total / len(self.validation)
        if not math.isfinite(loss) and not progress.step:
            raise DataError("the loss of the validation examples is not finite to begin with; look for odd examples")
        progress.validations.append((progress.step, loss))
        if loss < progress.best:
            progress.best, progress.best_step, progress.waited = loss, progress.step, 0
            if self.keeps_best:
                self.best = self._copies()
        else:
            progress.waited += 1
        if self.pace.patience is not None and progress.waited >= self.pace.patience:
            progress.stopped = f"no validation was better for {progress.waited} in a row"

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the model's forward passes."""

        def count(*_: object) -> None:
            self.progress.forwards += 1

        handle = self.model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()


class State:
    """What a killed run left beside the delta, and what this one will leave."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        """Keep the state in `path`, None: nowhere; `identity` is all that decides what a run comes to."""
        self.path = path
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.written = time.monotonic()

    def offer(self, loop: Loop) -> None:
        """Write where `loop` is, if the last time was long enough ago."""
        if self.path is None or time.monotonic() - self.written < loop.pace.save_seconds:
            return
        tensors = {f"now/{name}": value.detach() for name, value in loop.parameters.items()}
        tensors |= {f"best/{name}": value for name, value in loop.best.items()}
        tensors |= {f"estimator/{name}": value for name, value in loop.estimator.state().items()}
        for number, entries in loop.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": torch.as_tensor(value) for key, value in entries.items()
                        if value is not None}  # fmt: skip
        told = {"identity": self.identity, "progress": json.dumps(asdict(loop.progress))}
        save_whole({name: tensor.clone() for name, tensor in tensors.items()}, self.path, told, make=True)
        self.written = time.monotonic()

    def restore(self, loop: Loop) -> None:
        """Bring `loop` to where the killed run was, if there is a state of the same run.

        Raises:
            OutputError: there is one of another run, or a damaged one.
        """
        if self.path is None or not self.path.exists():
            return
        again = f"remove {self.path}, or pass --restart, to begin anew"
        try:
            with safe_open(self.path, framework="pt") as file:
                told = file.metadata() or {}
                if told.get("identity") != self.identity:
                    raise OutputError(f"{self.path} is of a run with other arguments; {again}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            progress = json.loads(told["progress"])
            progress["validations"] = [(step, loss) for step, loss in progress["validations"]]
            loop.progress = Progress(**progress)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise OutputError(f"{self.path} is damaged: {error}; {again}") from error
        loop._put(_part(tensors, "now"))
        loop.best = {name: value.to(loop.device) for name, value in _part(tensors, "best").items()}
        loop.estimator.restore(_part(tensors, "estimator"))
        _restore_optimizer(loop.optimizer, _part(tensors, "optimizer"))


def peak(device: torch.device) -> int:
    """Return the most memory that was taken: the device's, or this process's on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    for name, tensor in tensors.items():
        number, _, key = name.partition("/")
        whole["state"].setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(whole)
