"""Peak memory against depth and against calibration samples, with and without a budget, and what was predicted.

    OMP_NUM_THREADS=1 python scripts/bench/bounded_memory.py --rows rows.jsonl --plot docs/memory.svg

Models are Llama-shaped with random weights, the deepest of them above 1 B parameters, so only memory is measured. Each
run is a process of its own; its row is added to the file, and a run whose row is there is not repeated. At the end a
Markdown table is printed and the plot is drawn.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plot import plot
from random_llama import write

# what a run is: method, layers, width, samples, and what --memory allows; of 128 tokens, one to a batch, unless it says
DEPTH = [{"method": "rtn", "layers": layers, "width": 2048, "samples": 2, "memory": None} for layers in (4, 12, 24)]
SAMPLES = [
    {"method": "rtn", "layers": 2, "width": 256, "samples": samples, "memory": memory}
    for memory in (None, "700MB")
    for samples in (128, 512, 2048)
]
METHODS = [
    {"method": method, "layers": layers, "width": width, "samples": samples, "memory": memory}
    for layers, width, samples, memory in ((4, 1024, 8, None), (2, 256, 256, None), (2, 256, 256, "640MB"))
    for method in ("gptq", "awq", "balanced")
] + [{"method": method, "layers": 4, "width": 2048, "samples": 2, "memory": None} for method in ("gptq", "balanced")]
LONG = [
    {"method": method, "layers": 2, "width": 256, "samples": 16, "memory": None, "seqlen": 2048, "batch_size": 8}
    for method in ("rtn", "gptq", "balanced")
]
FLAGS = {"balanced": ["--preset", "balanced", "--updates", "8", "--set", "distill.updates=2"]}  # others: --method


def main() -> None:
    """Measure what is missing, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    for run in (*DEPTH, *SAMPLES, *METHODS, *LONG):
        if not any(run.items() <= row.items() for row in rows):
            rows.append(run | _measured(run))
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print("| method | parameters | layers | sequences | --memory | streams | on disk | peak | predicted | off by |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(_line(row))
    if args.plot:
        args.plot.write_text(_plot(rows), encoding="utf-8")


def _measured(run: dict[str, Any]) -> dict[str, Any]:
    seqlen = run.get("seqlen", 128)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write(work / "model", run["layers"], run["width"])
        (work / "text.jsonl").write_text(_text(), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "quantkit", "quantize", str(work / "model"), "--json", "--device", "cpu"),
            *FLAGS.get(run["method"], ["--method", run["method"]]),
            *("--group-size", "32", "--calibration", str(work / "text.jsonl"), "-o", str(work / "out")),
            *("--samples", str(run["samples"]), "--seqlen", str(seqlen), "--batch-size", str(run.get("batch_size", 1))),
            *(("--memory", run["memory"]) if run["memory"] else ()),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        report = json.loads(done.stdout)
        streams = (2 + (run["method"] == "balanced")) * 4 * run["samples"] * seqlen * run["width"]
        figures = {name: {key: report[name][key] for key in ("memory_bytes", "spilled_bytes")} for name in KINDS}
        return {"parameters": report["parameters"], "streams": streams, **figures}


KINDS = ("measured", "predicted")


def _text() -> str:
    """Return documents of words without meaning, enough for all sequences, one to a line of JSON."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(2000)]
    return "".join(json.dumps({"text": " ".join(chance.choices(words, k=300))}) + "\n" for _ in range(500))


def _line(row: dict[str, Any]) -> str:
    measured, predicted = (row[kind]["memory_bytes"] for kind in KINDS)
    cells = [
        row["method"],
        f"{row['parameters'] / 1e6:,.0f} M",
        str(row["layers"]),
        f"{row['samples']:,} × {row.get('seqlen', 128)}",
        row["memory"] or "",
        f"{row['streams'] / 1e6:,.0f}",
        f"{row['measured']['spilled_bytes'] / 1e6:,.0f}",
        f"{measured / 1e6:,.0f}",
        f"{predicted / 1e6:,.0f}",
        f"{predicted / measured - 1:+.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _plot(rows: list[dict[str, Any]]) -> str:
    """Return the plot as SVG: peak memory against parameters, and against the size of the streams."""
    return plot(
        [
            ("depth: parameters of the model, in millions", list(_lines(rows, DEPTH, "parameters"))),
            ("samples: streams between the blocks, in MB", list(_lines(rows, SAMPLES, "streams"))),
        ],
        "peak memory, MB",
    )


def _lines(
    rows: list[dict[str, Any]], runs: list[dict[str, Any]], across: str
) -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """Yield label, style and points of every line: what was measured and what was predicted, by budget."""
    for memory in dict.fromkeys(run["memory"] for run in runs):
        mine = [row for row in rows if row["memory"] == memory and any(run.items() <= row.items() for run in runs)]
        for kind in KINDS:
            label = f"{kind}{f' with --memory {memory}' if memory else ''}"
            yield label, kind, [(row[across] / 1e6, row[kind]["memory_bytes"] / 1e6) for row in mine]


if __name__ == "__main__":
    main()
