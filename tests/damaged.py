"""Runs on damaged input, and the verdict: refused in one line, or a right result, and nothing else touched.

`Arena` holds whole inputs, made once. A case is a seed: `Arena.run` copies what the case needs, damages one file of
it, runs, and returns a `Verdict` whose `fault` is None if all is well.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import mutations
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.calibrate.text import read_text
from quantkit.errors import QuantkitError
from quantkit.model import architecture, names
from quantkit.recipe import Recipe
from quantkit.resources import data_dir

SECRET = "the user's own secret 5f2c"
LONGEST = 2000  # characters of an error; more is no clear line
SECONDS = 20  # for one case; the slowest honest one takes 2
SMALL = {"wbits": 4, "group_size": 32, "method": "rtn", "samples": 2, "seqlen": 32}
INDEX = "model.safetensors.index.json"


class Hang(BaseException):
    """A case takes too long. Not an Exception, so that nothing catches it by accident."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a case: its target, what was done to it, what was said, and the fault if there is one."""

    seed: int
    target: str
    damage: str
    outcome: str
    said: str = ""
    fault: str | None = None


@dataclass(frozen=True)
class Target:
    """A file that can be damaged: its place in the arena, its form, and what is run with it."""

    place: str
    form: str
    run: Callable[["Case"], None]


@dataclass(frozen=True)
class Case:
    """One case while it runs: its own directory, and its generator."""

    work: Path
    rng: random.Random

    @property
    def out(self) -> Path:
        return self.work / "out"


def quantize(case: Case, *, check: bool = True, **changes: object) -> None:
    """Quantize; what was written must pass its own check."""
    model = changes.pop("model", case.work / "model")
    quantkit.quantize(model, output=case.out, **{"calibration": "embedded", **SMALL, **changes})
    if check:
        _expect_no_faults(case.out)


def quantize_from_recipe(case: Case) -> None:
    recipe = Recipe.from_toml(case.work / "recipe.toml")
    if recipe.calibration.samples * (recipe.calibration.seqlen or 2048) > 4096:
        return  # it may ask for honest work that takes too long
    if any(step.learns and name != "gptq" for name, step in recipe.build_passes().items()):
        return
    quantkit.quantize(recipe, output=case.out)
    _expect_no_faults(case.out)


def quantize_with_text(name: str) -> Callable[[Case], None]:
    return lambda case: quantize(case, model="tiny", check=False, calibration=str(case.work / "texts" / name))


def quantize_with_architecture(case: Case) -> None:
    read = architecture.Architecture.read(case.work / "llama.toml")
    method = case.rng.choice(("rtn", "awq"))
    with mock.patch.object(architecture, "architectures", return_value=(read,)):
        quantize(case, model="tiny", check=False, method=method, rotate=case.rng.random() < 0.3)


def read_aliases(case: Case) -> None:
    for alias in names.aliases(case.work / "aliases.toml").values():
        assert alias.path is None or (data_dir("model_zoo") / alias.path).parent == data_dir("model_zoo")


def read_a_text(case: Case) -> None:
    for corpus in read_text(str(case.work / "texts" / "texts.jsonl")):
        assert corpus.documents


def check(case: Case) -> None:
    result = quantkit.check(case.work / "written")
    assert all("\n" not in line for line in result.faults)
    json.dumps(result.facts, allow_nan=False)


def load(case: Case) -> None:
    model = quantkit.load(case.work / "written")
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])


def generate(case: Case) -> None:
    quantkit.generate(case.work / "written", "Once", max_new_tokens=3, runtime=case.rng.choice(("dense", "packed")))


def evaluate(case: Case) -> None:
    quantkit.evaluate(case.work / "model", text="embedded-test", seqlen=32, windows=1)


def export(case: Case) -> None:
    quantkit.export(case.work / "written", format=case.rng.choice(("gptq", "awq", "gguf")), to=case.out)


TARGETS = (
    *(Target("model/config.json", "json", run) for run in (quantize, quantize, quantize, evaluate)),
    *(Target(f"model/{INDEX}", "json", run) for run in (quantize, quantize)),
    *(Target("model/a.safetensors", "safetensors", run) for run in (quantize, quantize, quantize)),
    *(Target("model/tokenizer.json", "json", run) for run in (quantize, evaluate)),
    *(Target("model/tokenizer_config.json", "json", run) for run in (quantize, evaluate)),
    Target("model/generation_config.json", "json", quantize),
    *(Target("recipe.toml", "toml", run) for run in (quantize_from_recipe, quantize_from_recipe)),
    *(Target("texts/mix.toml", "toml", run) for run in (quantize_with_text("mix.toml"),) * 2),
    *(
        Target(f"texts/texts.{end}", form, quantize_with_text(f"texts.{end}"))
        for end, form in (("jsonl", "jsonl"), ("txt", "text"), ("parquet", "parquet"))
    ),
    *(Target("llama.toml", "toml", run) for run in (quantize_with_architecture,) * 2),
    Target("aliases.toml", "toml", read_aliases),
    *(Target(f"written/{name}", "json", check) for name in ("check.json", "report.json", "config.json", INDEX)),
    Target("written/recipe.toml", "toml", check),
    Target("written/model-00002-of-00006.safetensors", "safetensors", check),
    *(Target("written/config.json", "json", run) for run in (load, load, export, generate)),
    Target("written/model-00002-of-00006.safetensors", "safetensors", load),
    Target("written/generation_config.json", "json", generate),
    Target("written/tokenizer.json", "json", export),
    Target("written/report.json", "json", export),
)


class Arena:
    """Whole inputs in `home`, from which every case takes copies."""

    def __init__(self, home: Path) -> None:
        self.home = home
        tiny = data_dir("model_zoo") / "tiny"
        shutil.copytree(tiny, home / "model")
        _shard(home / "model")
        quantkit.quantize("tiny", output=home / "written", calibration="embedded", **SMALL)
        shutil.copyfile(home / "written" / "recipe.toml", home / "recipe.toml")
        (home / "texts").mkdir()
        documents = (data_dir("calibration") / "embedded.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        texts = [json.loads(line)["text"] for line in documents]
        (home / "texts" / "texts.jsonl").write_text("\n".join(documents), encoding="utf-8")
        (home / "texts" / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), home / "texts" / "texts.parquet")
        (home / "texts" / "mix.toml").write_text(
            'description = "a mix"\n[[sources]]\nfile = "texts.jsonl"\nweight = 1.0\n[[sources]]\nfile = "texts.txt"\n'
        )
        for name in ("aliases.toml", "architectures/llama.toml"):
            shutil.copyfile(data_dir("model_zoo") / name, home / Path(name).name)

    def run(self, seed: int, *, seconds: int = SECONDS) -> Verdict:
        """Return what became of the case `seed`."""
        rng = random.Random(seed)
        number = rng.randrange(len(TARGETS))
        target = TARGETS[number]
        called = f"{target.place} ({getattr(target.run, '__name__', 'run').replace('<lambda>', 'quantize')})"
        with tempfile.TemporaryDirectory(prefix="case-") as name:
            room = Path(name)
            (room / "secret").write_text(SECRET)
            work = room / "work"
            work.mkdir()
            top = target.place.split("/")[0]
            copied = self.home / top
            (shutil.copytree if copied.is_dir() else shutil.copyfile)(copied, work / top)
            if target.place == "recipe.toml":
                (work / "recipe.toml").write_text(copied.read_text())
            done = _harm(work / target.place, target.form, rng)
            before = _snapshot(room)
            verdict = {"seed": seed, "target": called, "damage": done}
            with within(seconds), _quietly():
                outcome, said, fault = _judged(target, Case(work, rng))
            fault = fault or _touched(room, before, allowed=work / "out" if outcome == "right" else None)
            return Verdict(**verdict, outcome=outcome, said=said, fault=fault)


def _judged(target: Target, case: Case) -> tuple[str, str, str | None]:
    try:
        target.run(case)
    except QuantkitError as error:
        message = str(error)
        clear = message.isprintable() and 10 < len(message) < LONGEST
        return "refused", message[:300], None if clear else f"no clear line: {message[:300]!r}"
    except Hang:
        return "fault", "", "hang"
    except BaseException as error:  # noqa: BLE001  whatever comes is a finding
        where = traceback.extract_tb(error.__traceback__)
        lines = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(where[-12:]))
        return "fault", "", f"{type(error).__name__}: {str(error)[:300]} at {lines}"
    return "right", "", None


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise Hang inside the context when it takes longer."""

    def stop(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _shard(model: Path) -> None:
    """Write the model again in two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    order = sorted(tensors)
    parts = {"a.safetensors": order[::2], "b.safetensors": order[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / file)
    placement = {name: file for file, part in parts.items() for name in part}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placement}))


def _harm(path: Path, form: str, rng: random.Random) -> str:
    """Damage the file: its content, or one time in ten what it is."""
    if rng.random() < 0.9:
        done, data = mutations.damage(form, path.read_bytes(), rng)
        path.write_bytes(data)
        return done
    ways: dict[str, Callable[[], object]] = {
        "gone": lambda: None,
        "directory": path.mkdir,
        "link to a secret": lambda: path.symlink_to(path.parent / "../../secret"),
        "link to nowhere": lambda: path.symlink_to("nowhere"),
        "link to itself": lambda: path.symlink_to(path.name),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(path),
        "sparse": lambda: (path.touch(), os.truncate(path, 2**40)),
    }
    done = rng.choice(list(ways))
    path.unlink()
    ways[done]()
    return done


def _snapshot(room: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(room.rglob("*")):
        told = path.lstat()
        found[str(path.relative_to(room))] = (told.st_size, told.st_mtime_ns if not path.is_dir() else 0)
    return found


def _touched(room: Path, before: dict[str, tuple[int, int]], allowed: Path | None) -> str | None:
    """Return what changed in the room but `allowed`, or what of the secret is in there."""
    after = _snapshot(room)
    own = str(allowed.relative_to(room)) if allowed else None
    after = {name: entry for name, entry in after.items() if own is None or not (name + "/").startswith(own + "/")}
    if changed := sorted(after.items() ^ before.items()):
        return f"touched {changed[0][0]}"
    for path in allowed.rglob("*") if allowed else ():
        if path.is_symlink() or (path.is_file() and SECRET.encode() in path.read_bytes()):
            return f"the secret is in {path.name}"
    return None


def _expect_no_faults(output: Path) -> None:
    result = quantkit.check(output)
    assert not result.faults, f"the output has faults: {result.faults[0]}"
