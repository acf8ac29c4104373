"""One process of `inference.py`: loads a model, times it and prints its figures as JSON.

    python scripts/bench/inference_process.py ours|bfloat16|float32|llama.cpp PATH --threads 2

The environment of llama-cpp-python needs neither torch nor quantkit, so each runtime is imported where it is used. The
loop is the same for all: a prompt, then token after token, the likeliest each time.
"""

import argparse
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTEXT, VOCABULARY = 512, 1000  # positions of the cache; prompts are random tokens among the first so many


class Model(ABC):
    """A loaded model with a cache."""

    weight_bytes: int

    @abstractmethod
    def restart(self) -> None:
        """Empty the cache."""

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> int:
        """Append `tokens` to the cache; return the likeliest next one."""

    @abstractmethod
    def generate(self, tokens: Sequence[int], count: int) -> int:
        """Let the runtime's own greedy generation continue `tokens` by `count`; return how many it made."""


class Transformers(Model):
    """Ours and dense: what transformers runs."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.model = model
        held = {}
        for tensor in (*model.parameters(), *model.buffers()):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self.weight_bytes = sum(held.values())

    def restart(self) -> None:
        """See `Model`."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def step(self, tokens: Sequence[int]) -> int:
        """See `Model`."""
        import torch

        with torch.no_grad():
            ids = torch.tensor([tokens])
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    def generate(self, tokens: Sequence[int], count: int) -> int:
        """See `Model`."""
        import torch

        ids = torch.tensor([tokens])
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return made.shape[1] - len(tokens)


class LlamaCpp(Model):
    """llama.cpp through llama-cpp-python."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        options = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama_cpp.Llama(str(path), verbose=False, **options)
        self.weight_bytes = llama_cpp.llama_model_size(self.model.model)

    def restart(self) -> None:
        """See `Model`."""
        self.model.reset()

    def step(self, tokens: Sequence[int]) -> int:
        """See `Model`."""
        import llama_cpp
        import numpy

        self.model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax())

    def generate(self, tokens: Sequence[int], count: int) -> int:
        """See `Model`."""
        made = self.model.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0)
        return sum(1 for _, _ in zip(made, range(count), strict=False))


def load(kind: str, path: Path, threads: int) -> tuple[Model, int]:
    """Return the model, and by how much the resident memory grew until it had computed one token."""
    opener = (lambda: LlamaCpp(path, threads)) if kind == "llama.cpp" else _transformers(kind, path, threads)
    before = _resident()
    model = opener()
    model.restart()
    model.step([1])
    return model, _resident() - before


def _transformers(kind: str, path: Path, threads: int) -> Callable[[], Model]:
    """Return what loads the model, everything that it needs imported already."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    if kind == "ours":
        import quantkit
        import quantkit.runtime.packed_model

        return lambda: Transformers(quantkit.load(path, device="cpu"))
    return lambda: Transformers(AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, kind)))


def _resident() -> int:
    """Return the resident bytes of this process, those of mapped files included."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("there is no /proc/self/status with VmRSS; this bench measures memory on Linux")


def rates(model: Model, args: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second, the best of the repeats: of prompts, of decoding, of the runtime's generation."""
    draw = random.Random(0)
    start, long = ([draw.randrange(VOCABULARY) for _ in range(size)] for size in (args.start, args.prompt))
    best = {"prompt": 0.0, "decode": 0.0, "generate": 0.0}
    for _ in range(args.repeats):
        model.restart()
        begin = time.perf_counter()
        model.step(long)
        best["prompt"] = max(best["prompt"], len(long) / (time.perf_counter() - begin))
        model.restart()
        token = model.step(start)
        begin = time.perf_counter()
        for _ in range(args.tokens):
            token = model.step([token])
        best["decode"] = max(best["decode"], args.tokens / (time.perf_counter() - begin))
        model.restart()
        begin = time.perf_counter()
        made = model.generate(start, args.tokens)
        best["generate"] = max(best["generate"], made / (time.perf_counter() - begin))
    return best


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("ours", "bfloat16", "float32", "llama.cpp"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=int, default=16, help="tokens before those that are decoded")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt whose speed is measured")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(given)


def main() -> None:
    """Measure and print."""
    args = arguments()
    model, resident = load(args.kind, args.path, args.threads)
    print(json.dumps({**rates(model, args), "weights": model.weight_bytes, "resident": resident}))


if __name__ == "__main__":
    main()
