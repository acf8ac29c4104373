"""What the benches share: cells that are computed once, recipes from settings such as w3g32, tables, the machine."""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit import api
from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.errors import UsageError
from quantkit.recipe import Recipe, parse_setting, with_changes

Figures = dict[str, Any]


def parser(description: str | None, *, text: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every bench; `text`: of those that quantize a model and judge it."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--device", default="cpu")
    if not text:
        return made
    made.add_argument("model")
    made.add_argument("train", help="text to calibrate on")
    made.add_argument("test", help="text to judge on")
    made.add_argument("--samples", type=int, default=64)
    made.add_argument("--seqlen", type=int, default=256)
    made.add_argument("--windows", type=int, default=80, help="windows of --seqlen tokens that are judged")
    made.add_argument("--batch-size", type=int, help="default: the preset's, or 8")
    made.add_argument("--work", type=Path, default=Path(".bench"), help="where finished cells are kept, one file each")
    made.add_argument("--table", action="store_true", help="run nothing, print what is there")
    return made


def scheme(text: str) -> QuantScheme:
    """Return the scheme that `text` names, w3g32 or w4a4: without `a` activations stay, without `g` one scale per row.

    Raises:
        argparse.ArgumentTypeError: it names none.
    """
    try:
        return QuantScheme.parse(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{text} is no setting: {error}") from error


def hyper_parameter(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE, as the command line's --set reads it.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return parse_setting(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def title(setting: QuantScheme) -> str:
    """Return how tables call a setting."""
    activations = "" if setting.activation_bits == UNQUANTIZED else f"A{setting.activation_bits}"
    symmetric = " symmetric" if setting.symmetric else ""
    groups = f"g{setting.group_size}" if setting.group_size else "per channel"
    return f"W{setting.bits}{activations} {groups}{symmetric}"


def recipe(
    args: argparse.Namespace,
    setting: QuantScheme,
    *,
    preset: str | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    **changes: Any,  # noqa: ANN401
) -> Recipe:
    """Return the recipe of one cell: a preset or a method with options, on the text and with the sizes of `args`."""
    sizes = {"text": args.train, "samples": args.samples, "seqlen": args.seqlen}
    batch = args.batch_size or (None if preset else min(8, args.samples))
    chosen = {**sizes, **({"batch_size": batch} if batch else {}), **changes}
    base = replace(Recipe(model=args.model), scheme=setting)
    return with_changes(base, chosen, preset=preset, method=method, options=options)


def measure(args: argparse.Namespace, name: str, wanted: Recipe | None) -> Figures | None:
    """Return perplexity, bits per weight and seconds of a recipe; of the model itself without one.

    What --work holds counts if everything that decides it is the same: the whole recipe, and the text that judges.
    """
    judged = {"test": args.test, "seqlen": args.seqlen, "windows": args.windows, "model": args.model}
    key = {**judged, "recipe": wanted.to_toml() if wanted else None}
    return cell(args, name, key, lambda: _figures(args, wanted))


def cell(args: argparse.Namespace, name: str, key: Mapping[str, Any], compute: Callable[[], Figures]) -> Figures | None:
    """Return the figures of the file called after `name` in --work if it was made with `key`, otherwise make it.

    None with --table where there are none.
    """
    path = args.work / f"{''.join(c for c in name if c.isalnum() or c in '+−-_.')}.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == dict(key):
            figures: Figures = found["figures"]
            return figures
    if args.table:
        return None
    figures = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": dict(key), "figures": figures}, indent=2) + "\n", encoding="utf-8")
    shown = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float | int))
    print(f"{name}: {shown}", file=sys.stderr, flush=True)
    return figures


def _figures(args: argparse.Namespace, wanted: Recipe | None) -> Figures:
    if wanted is None:
        return {"perplexity": _perplexity(args, args.model)}
    work = Path(tempfile.mkdtemp(prefix="quantkit-bench-"))
    try:
        start = time.monotonic(), time.process_time()
        result = api.quantize(wanted, output=work / "model", device=args.device)
        seconds, processor = time.monotonic() - start[0], time.process_time() - start[1]
        fallbacks = sum("fallback" in block["notes"] for block in result.report["blocks"])
        return {
            "perplexity": _perplexity(args, str(work / "model")),
            "bits_per_weight": result.report["bits_per_weight"],
            "seconds": seconds,
            "cpu_seconds": processor,
            "fallbacks": fallbacks,
        }
    finally:
        shutil.rmtree(work)


def _perplexity(args: argparse.Namespace, model: str) -> float:
    return api.evaluate(model, text=args.test, seqlen=args.seqlen, windows=args.windows, device=args.device).perplexity


def perplexity(value: float | None) -> str:
    """Return a perplexity as tables show it, a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value < 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation of some seeds' perplexities."""
    if len(values) < 2:
        return perplexity(values[0] if values else None)
    return f"{perplexity(statistics.mean(values))} ± {statistics.stdev(values):.4f}"


def difference(values: Sequence[float], base: Sequence[float]) -> str:
    """Return how far the mean of `values` is from that of `base`, in percent; a dash where one of them is missing."""
    if not values or not base:
        return "–"
    return f"{statistics.mean(values) / statistics.mean(base) - 1:+.2%}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine(args: argparse.Namespace) -> str:
    """Return what the figures were measured on, and set the number of threads."""
    torch.set_num_threads(args.threads)
    if torch.device(args.device).type == "cuda":
        return f"{torch.cuda.get_device_name(args.device)}, torch {torch.__version__}"
    return f"{_processor()}, threads: {args.threads}, torch {torch.__version__}"


def _processor() -> str:
    """Return the name of the processor, as Linux tells it where it is Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
