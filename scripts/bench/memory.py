"""Peak resident memory of `quantkit quantize` against the number of layers, at the same width, as a Markdown table.

    python scripts/bench/memory.py --layers 6 12 24

Models are Llama-shaped with random weights, so only memory is measured, not quality. Each run is a process of its own.
The baseline is the peak of a process that imports the same packages and builds the same model without weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = """
import json, sys
from quantkit.pipeline import peak_memory, prepare
from quantkit.recipe import Recipe, with_changes
prepare(with_changes(Recipe.for_method(sys.argv[1], "rtn"), {"group_size": 32, "samples": 2, "seqlen": 8}))
print(json.dumps(peak_memory()))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--updates", type=int, default=8)
    args = parser.parse_args()
    print(f"Width {args.width}, {args.samples} × {args.seqlen} tokens, W4 in groups of 32, MB of resident memory.\n")
    print("| layers | weights on disk | imports and empty model | peak RTN | predicted | peak LWC | predicted |")
    print("|---|---|---|---|---|---|---|")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as work:
            print(_row(Path(work), layers, args), flush=True)


def _row(work: Path, layers: int, args: argparse.Namespace) -> str:
    model = work / "model"
    subprocess.run(
        [
            sys.executable,
            __file__.replace("memory.py", "random_llama.py"),
            str(model),
            str(layers),
            str(args.width),
        ],
        check=True,
    )
    disk = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    baseline = json.loads(_capture([sys.executable, "-c", IMPORTS, str(model)]))
    cells = []
    for method in ("rtn", "omniquant"):
        command = [
            *(sys.executable, "-m", "quantkit", "quantize", str(model), "--json", "--device", "cpu"),
            *("--method", method, "--wbits", "4", "--group-size", "32", "--calibration", "embedded"),
            *("--samples", str(args.samples), "--seqlen", str(args.seqlen), "-o", str(work / method)),
            *(("--updates", str(args.updates)) if method == "omniquant" else ()),
        ]
        report = json.loads(_capture(command))
        cells += [report["measured"]["memory_bytes"], report["predicted"]["memory_bytes"]]
    return f"| {layers} | " + " | ".join(f"{size / 1e6:.0f}" for size in (disk, baseline, *cells)) + " |"


def _capture(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
