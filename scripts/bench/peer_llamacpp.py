"""llama.cpp for `gguf_proof.py`, in an environment with llama-cpp-python alone: the loss of a GGUF file on windows.

    python peer_llamacpp.py MODEL.gguf QUESTIONS.json [--threads 1]

QUESTIONS holds `windows`, rows of token ids, and `texts`. Prints one JSON object: `loss`, the mean cross-entropy of
every token of a window but its first, and `tokens`, the ids of each text by llama.cpp's own tokenizer, without BOS.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    questions = json.loads(args.questions.read_text(encoding="utf-8"))
    windows = questions["windows"]
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    model = Llama(args.model, n_ctx=len(windows[0]), logits_all=True, verbose=False, **threads)
    losses = [loss(model, window) for window in windows]
    tokens = [model.tokenize(text.encode(), add_bos=False, special=False) for text in questions["texts"]]
    print(json.dumps({"loss": sum(losses) / len(losses), "tokens": tokens}))


def loss(model: Llama, window: Sequence[int]) -> float:
    """Return the mean cross-entropy of the tokens of a window but the first."""
    model.reset()
    model.eval(window)
    logits = model.scores[: len(window) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    predicted = logits[np.arange(len(logits)), window[1:]]
    return float((np.log(np.exp(logits).sum(axis=1)) - predicted).mean())


if __name__ == "__main__":
    main()
