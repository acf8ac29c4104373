"""Perplexity of the same quantized model in llama.cpp and in quantkit, on the same tokens, as a Markdown table.

    python scripts/bench/gguf_proof.py MODEL TEST --llama VENV/bin/python --schemes w4g32 w4g32s w8g32s --seqlen 256

Each scheme is rounded to nearest, exported by `Gguf` and run by llama.cpp in the environment of --llama, which needs
nothing but `pip install llama-cpp-python`. Perplexities differ by what llama.cpp does to activations: it rounds the
inputs of linears to 8 bits in blocks of 32, and keys and values to float16. Text is tokenized by both, too. The script
ends with 1 if a ratio is off by more than --tolerance or tokens differ. --keep FOLDER keeps the files.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, markdown, parser, scheme

from quantkit import api
from quantkit.calibrate.data import evaluation_windows
from quantkit.calibrate.text import read_text
from quantkit.core.scheme import QuantScheme
from quantkit.evaluation.loading import load_model
from quantkit.evaluation.perplexity import perplexity
from quantkit.exporters.gguf import FILE, TYPES, Gguf

PEER = Path(__file__).resolve().parent / "peer_llamacpp.py"
SCHEMES = ("w4g32", "w4g32s", "w8g32s")
HEADER = ("model", "scheme", "GGUF", "MB", "quantkit", "llama.cpp", "ratio", "same tokens")


@dataclass(frozen=True)
class Row:
    """What was measured of one scheme."""

    scheme: QuantScheme
    size: int
    ours: float
    theirs: float
    same: float  # share of the texts that both tokenize alike

    @property
    def ratio(self) -> float:
        """llama.cpp's perplexity over quantkit's."""
        return self.theirs / self.ours


def main() -> None:
    """Measure and print."""
    args = _arguments()
    print(f"{machine(args)}\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(args, setting, args.keep or Path(folder)) for setting in args.settings]
    print(markdown(HEADER, (_cells(Path(args.model).name, row) for row in rows)))
    if any(abs(row.ratio - 1) > args.tolerance or row.same < 1 for row in rows):
        sys.exit(1)


def measure(args: argparse.Namespace, setting: QuantScheme, folder: Path) -> Row:
    """Quantize, export, and ask both."""
    packed = folder / f"{Path(args.model).name}-{setting}"
    if not packed.exists():
        kind = {"wbits": setting.bits, "group_size": setting.group_size, "symmetric": setting.symmetric}
        api.quantize(args.model, output=packed, method="rtn", samples=1, seqlen=16, device=args.device, **kind)
    file = packed / "gguf" / FILE
    if not file.exists():
        Gguf().export(packed, file.parent)
    corpora = read_text(args.test)
    model, tokenizer = load_model(packed, device=args.device)
    windows = evaluation_windows(corpora, tokenizer, seqlen=args.seqlen, windows=args.windows)
    texts = [document[:2000] for corpus in corpora for document in corpus.documents[: args.texts]]
    ours = perplexity(model, windows).perplexity
    tokens = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    theirs = _llama(args, file, {"windows": windows.tolist(), "texts": texts})
    same = sum(a == b for a, b in zip(tokens, theirs["tokens"], strict=True)) / len(texts)
    return Row(setting, file.stat().st_size, ours, math.exp(theirs["loss"]), same)


def _llama(args: argparse.Namespace, file: Path, questions: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as asked:
        json.dump(questions, asked)
        asked.flush()
        command = [args.llama, PEER, file, asked.name, "--threads", str(args.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={})
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _cells(model: str, row: Row) -> list[str]:
    kind = TYPES[row.scheme.bits, row.scheme.symmetric]
    figures = [f"{row.size / 1e6:.1f}", f"{row.ours:.4f}", f"{row.theirs:.4f}", f"{row.ratio:.4f}", f"{row.same:.0%}"]
    return [model, str(row.scheme), kind, *figures]


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, text=False)
    made.add_argument("model")
    made.add_argument("test", help="text to judge on")
    made.add_argument("--llama", required=True, help="the Python of an environment with llama-cpp-python")
    made.add_argument("--settings", "--schemes", type=scheme, nargs="+", default=[scheme(text) for text in SCHEMES])
    made.add_argument("--seqlen", type=int, default=256)
    made.add_argument("--windows", type=int, default=40)
    made.add_argument("--texts", type=int, default=100, help="documents that both tokenize")
    made.add_argument("--tolerance", type=float, default=0.005, help="of the ratio of perplexities")
    made.add_argument("--keep", type=Path, help="keep packed checkpoints and GGUF files there, and use those that are")
    return made.parse_args()


if __name__ == "__main__":
    main()
