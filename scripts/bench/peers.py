"""quantkit beside auto-round, llm-compressor and hqq: same model, tokens, bits and groups, one evaluation, one table.

    python scripts/bench/peers.py MODEL TRAIN.jsonl TEST.jsonl --samples 64 --seqlen 256 --windows 80 \
        --cells w4g32 w3g32 w2g32 w4 w3

Every peer is installed once, into an environment of its own under --work. All calibrate on the tokens that quantkit
draws, quantize the decoder's linears only, asymmetric, and write a checkpoint; its perplexity is quantkit's `evaluate`,
confirmed by --referee SCRIPT (called as SCRIPT DIRECTORY TEXT SEQLEN WINDOWS). Peers' checkpoints are dense (the
quantized weights, dequantized to float32), quantkit's are what it exports.

Seconds go from the model's directory to the written checkpoint (loading included, imports and evaluation not), in wall
time and in processor time, which other work on the machine hardly changes; peak memory is ru_maxrss of the process.
Every run is a process of its own and ends in a file in --work: called again, only what is missing runs. `--table` runs
nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3  # between quantkit's perplexity and the referee's
TORCH = "torch==2.13.0"
# name of an environment → what is installed there beside torch
ENVIRONMENTS = {
    "auto-round": "auto-round==0.16.1",
    "llm-compressor": "llmcompressor==0.14.0.1",
    "hqq": "hqq==0.2.8.post1",
}


@dataclass(frozen=True)
class Tool:
    """A row of the table: the environment (None: quantkit's own), the driver, its arguments."""

    environment: str | None
    driver: str
    extra: tuple[str, ...] = ()


def _quantkit(*extra: str) -> Tool:
    return Tool(None, "peer_quantkit.py", extra)


TOOLS = {
    "rtn": Tool("llm-compressor", "peer_llmcompressor.py", ("--algorithm", "rtn")),
    "hqq": Tool("hqq", "peer_hqq.py"),
    "awq": Tool("llm-compressor", "peer_llmcompressor.py", ("--algorithm", "awq")),
    "gptq": Tool("llm-compressor", "peer_llmcompressor.py", ("--algorithm", "gptq")),
    # auto-round's own recipes "light", default and "best", but for the number of samples, which is everybody's
    "autoround-light": Tool("auto-round", "peer_autoround.py", ("--iters", "50", "--lr", "5e-3")),
    "autoround": Tool("auto-round", "peer_autoround.py", ("--iters", "200")),
    "autoround-best": Tool("auto-round", "peer_autoround.py", ("--iters", "1000")),
    "quantkit-rtn": _quantkit("--method", "rtn"),
    "quantkit-awq": _quantkit("--method", "awq"),
    "quantkit-gptq": _quantkit("--method", "gptq"),
    "quantkit-omniquant": _quantkit("--method", "omniquant"),
    "quantkit-fast": _quantkit("--preset", "fast"),
    "quantkit-balanced": _quantkit("--preset", "balanced"),
    "quantkit-best": _quantkit("--preset", "best"),
}


@dataclass(frozen=True)
class Cell:
    """Bits and group size, -1 for one scale per row; written `w3g32`, `w3`."""

    bits: int
    group_size: int

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Return the cell that `text` names."""
        match = re.fullmatch(r"w([2-8])(?:g(\d+))?", text.lower())
        if not match:
            raise argparse.ArgumentTypeError(f"{text} is no cell; write w3g32, or w3 for one scale per row")
        return cls(int(match[1]), int(match[2] or -1))

    def __str__(self) -> str:
        return f"w{self.bits}" + (f"g{self.group_size}" if self.group_size > 0 else "")

    @property
    def title(self) -> str:
        """How the table calls it."""
        return f"W{self.bits} " + (f"g{self.group_size}" if self.group_size > 0 else "per channel")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all tools have in common; a result that was made with another setting does not count."""

    model: str
    calibration: str
    samples: int
    seqlen: int
    seed: int
    test: str
    eval_seqlen: int
    windows: int

    @property
    def drawn(self) -> tuple[str, ...]:
        """How the calibration is passed to `peer_quantkit.py`."""
        return (self.model, self.calibration, str(self.samples), str(self.seqlen), str(self.seed))


class Bench:
    """The runs of one model in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = args.work.resolve() / args.model.resolve().name
        for part in ("results", "logs", "texts"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.setting = Setting(
            model=str(args.model.resolve()),
            calibration=str(self._text(args.calibration)),
            samples=args.samples,
            seqlen=args.seqlen,
            seed=args.seed,
            test=str(self._text(args.test)),
            eval_seqlen=args.eval_seqlen or args.seqlen,
            windows=args.windows,
        )
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self.environ = {
            **os.environ,
            **dict.fromkeys(threads, str(args.threads)),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def result(self, tool: str, cell: Cell | None) -> dict[str, Any] | None:
        """Return what a run gave, None if it has to be run."""
        path = self._result_path(tool, cell)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found if found["setting"] == asdict(self.setting) else None

    def full(self) -> None:
        """Evaluate the model itself."""
        self._save("full", None, {"perplexity": self._judge(Path(self.setting.model), "full")})

    def run(self, tool: str, cell: Cell) -> None:
        """Run one tool in one cell, evaluate what it wrote, save the figures."""
        name = f"{tool}-{cell}"
        output, figures = self.folder / "outputs" / name, self.folder / "outputs" / f"{name}.json"
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(exist_ok=True)
        self._call(self._command(TOOLS[tool], cell, output, figures), name, isolated=bool(TOOLS[tool].environment))
        measured = json.loads(figures.read_text(encoding="utf-8"))
        self._save(tool, cell, {**measured, "perplexity": self._judge(output, name), "threads": self.args.threads})
        figures.unlink()
        if not self.args.keep:
            shutil.rmtree(output)

    def _command(self, tool: Tool, cell: Cell, output: Path, figures: Path) -> list[str]:
        driver, bits, group = str(HERE / tool.driver), str(cell.bits), str(cell.group_size)
        if tool.environment is None:
            rest = [bits, group, str(output), str(figures), *tool.extra]
            return [sys.executable, driver, "quantize", *self.setting.drawn, *rest]
        python = install(self.args.work.resolve() / "environments", tool.environment)
        command = [str(python), driver, "--model", self.setting.model, "--tokens", str(self._tokens())]
        command += ["--bits", bits, "--group-size", group, "--output", str(output), "--figures", str(figures)]
        return command + list(tool.extra)

    def _tokens(self) -> Path:
        setting = self.setting
        source = Path(setting.calibration).stem
        path = self.folder / f"tokens-{source}-{setting.samples}x{setting.seqlen}-{setting.seed}.safetensors"
        if not path.exists():
            command = [sys.executable, str(HERE / "peer_quantkit.py"), "tokens", *setting.drawn, str(path)]
            self._call(command, "tokens")
        return path

    def _judge(self, directory: Path, name: str) -> float:
        setting = self.setting
        what = [str(directory), setting.test, str(setting.eval_seqlen), str(setting.windows)]
        value = float(self._call([sys.executable, str(HERE / "peer_quantkit.py"), "evaluate", *what], f"{name}-judge"))
        if self.args.referee:
            judged = float(self._call([sys.executable, self.args.referee, *what], f"{name}-referee"))
            if not abs(judged - value) <= TOLERANCE * value:
                raise RuntimeError(f"quantkit says {value:.4f} for {name}, the referee {judged:.4f}")
        return value

    def _call(self, command: list[str], name: str, *, isolated: bool = False) -> str:
        """Run a command, keep what it says in a log, return the last line of its output."""
        environ = {key: value for key, value in self.environ.items() if key != "PYTHONPATH" or not isolated}
        log = self.folder / "logs" / f"{name}.log"
        with log.open("w", encoding="utf-8") as errors:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ, check=False)
        log.write_text(log.read_text(encoding="utf-8", errors="replace") + done.stdout, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}; see {log}")
        return done.stdout.strip().rsplit("\n", 1)[-1]

    def _text(self, path: Path) -> Path:
        """Return `path`, or a copy whose name ends in .txt: that is how quantkit tells a stream of text."""
        if path.suffix in (".txt", ".jsonl", ".parquet"):
            return path.resolve()
        copy = self.folder / "texts" / f"{path.name}.txt"
        if not copy.exists():
            shutil.copyfile(path, copy)
        return copy

    def _result_path(self, tool: str, cell: Cell | None) -> Path:
        return self.folder / "results" / (f"{tool}-{cell}.json" if cell else f"{tool}.json")

    def _save(self, tool: str, cell: Cell | None, figures: dict[str, Any]) -> None:
        document = {"tool": tool, "cell": cell and str(cell), **figures, "setting": asdict(self.setting)}
        self._result_path(tool, cell).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def install(folder: Path, name: str) -> Path:
    """Return the interpreter of a peer's environment, which is made the first time."""
    python = folder / name / "bin" / "python"
    marker = folder / name / "installed.txt"
    wanted = f"{ENVIRONMENTS[name]} {TORCH}"
    if not marker.exists() or marker.read_text(encoding="utf-8") != wanted:
        venv.create(folder / name, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted.split()], check=True)
        marker.write_text(wanted, encoding="utf-8")
    return python


def table(bench: Bench, cells: list[Cell], tools: list[str]) -> str:
    """Return the results that exist as Markdown: perplexities beside each other, then every run with its cost."""
    results = {(tool, cell): bench.result(tool, cell) for tool in tools for cell in cells}
    full = bench.result("full", None)
    shown = [tool for tool in tools if any(results[tool, cell] for cell in cells)]
    best = {
        cell: min((found["perplexity"] for tool in tools if (found := results[tool, cell])), default=None)
        for cell in cells
    }
    lines = ["| tool | " + " | ".join(cell.title for cell in cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for tool in shown:
        row = [_perplexity(found, best[cell]) if (found := results[tool, cell]) else "–" for cell in cells]
        lines.append(f"| {tool} | " + " | ".join(row) + " |")
    if full:
        lines += ["", f"Not quantized: {full['perplexity']:.4f}. Lowest of a column in bold."]
    lines += [
        "",
        "| setting | tool | perplexity | against RTN | seconds | CPU s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        rtn = results.get(("rtn", cell)) or results.get(("quantkit-rtn", cell))
        for tool in shown:
            if found := results[tool, cell]:
                share = f"{found['perplexity'] / rtn['perplexity'] - 1:+.1%}" if rtn else "–"
                lines.append(
                    f"| {cell.title} | {tool} | {_perplexity(found, best[cell])} | {share} "
                    f"| {found['seconds']:.0f} | {found['cpu_seconds']:.0f} | {found['peak_bytes'] / 1e6:.0f} |"
                )
    return "\n".join(lines)


def _perplexity(found: dict[str, Any], best: float | None) -> str:
    value = found["perplexity"]
    text = f"{value:.4f}" if value < 1000 else f"{value:.3g}"
    return f"**{text}**" if value == best else text


def main() -> None:
    """Run what is missing, print the table; exit 1 if a run failed."""
    args = _arguments()
    bench = Bench(args)
    failed = []
    if not args.table:
        if args.force or not bench.result("full", None):
            bench.full()
        for tool in args.tools:
            for cell in args.cells:
                if bench.result(tool, cell) and not args.force:
                    continue
                try:
                    bench.run(tool, cell)
                    print(f"{tool} {cell}: {bench.result(tool, cell)['perplexity']:.4f}", file=sys.stderr, flush=True)
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    failed.append(f"{tool} {cell}")
                    print(error, file=sys.stderr, flush=True)
    print(table(bench, args.cells, list(TOOLS)))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("test", type=Path, help="text to judge on")
    parser.add_argument("--cells", type=Cell.parse, nargs="+", default=[Cell.parse("w4g32")])
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-seqlen", type=int, help="default: --seqlen")
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(".bench-peers"))
    parser.add_argument("--referee")
    parser.add_argument("--force", action="store_true", help="run again what has a result")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--table", action="store_true", help="only print the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
