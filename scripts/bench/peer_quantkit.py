"""quantkit for `peers.py`: the calibration tokens of all tools, its own runs, and the one evaluation of all tools.

peer_quantkit.py tokens   MODEL TEXT SAMPLES SEQLEN SEED OUT.safetensors
peer_quantkit.py evaluate DIRECTORY TEXT SEQLEN WINDOWS            (prints the perplexity)
peer_quantkit.py quantize MODEL TEXT SAMPLES SEQLEN SEED BITS GROUP OUTPUT FIGURES --method M | --preset P
"""

import argparse
import os
import sys
from pathlib import Path

from peer_common import report
from safetensors.torch import save_file

from quantkit import api
from quantkit.calibrate.data import calibration_tokens, load_tokenizer
from quantkit.calibrate.text import read_text


def tokens(argv: list[str]) -> None:
    """Write the tokens that `quantize` with the same text, samples, seqlen and seed calibrates on."""
    model, text, samples, seqlen, seed, out = argv
    drawn = calibration_tokens(
        read_text(text), load_tokenizer(Path(model)), samples=int(samples), seqlen=int(seqlen), seed=int(seed)
    )
    if len(drawn) < int(samples):
        sys.exit(f"{text} gives {len(drawn)} sequences of {seqlen} tokens, not {samples}; lower --samples")
    save_file({"tokens": drawn}, out)


def evaluate(argv: list[str]) -> None:
    """Print the perplexity of a directory."""
    directory, text, seqlen, windows = argv
    result = api.evaluate(directory, text=text, seqlen=int(seqlen), windows=int(windows), device="cpu")
    print(f"{result.perplexity:.6f}")


def quantize(argv: list[str]) -> None:
    """Write the packed checkpoint and the run's figures; a method that learns nothing reads no calibration text."""
    parser = argparse.ArgumentParser()
    for name in ("model", "text", "samples", "seqlen", "seed", "bits", "group", "output", "figures"):
        parser.add_argument(name)
    parser.add_argument("--method")
    parser.add_argument("--preset")
    args = parser.parse_args(argv)
    what = {"method": args.method} if args.method else {"preset": args.preset}
    text = {"calibration": args.text, "samples": int(args.samples), "seqlen": int(args.seqlen)}
    start = os.times()
    api.quantize(
        args.model,
        output=args.output,
        wbits=int(args.bits),
        group_size=None if args.group == "-1" else int(args.group),
        seed=int(args.seed),
        device="cpu",
        **what,
        **({} if args.method == "rtn" else text),
    )
    report(Path(args.figures), start)


if __name__ == "__main__":
    {"tokens": tokens, "evaluate": evaluate, "quantize": quantize}[sys.argv[1]](sys.argv[2:])
