"""auto-round for `peers.py`, in auto-round's environment: --iters N [--lr LR]; everything else is its default."""

import argparse
from collections.abc import Mapping

from auto_round import AutoRound
from peer_common import Task, decoder_linears, on_grid, run
from torch import Tensor, nn
from transformers import AutoTokenizer


def quantize(task: Task, model: nn.Module) -> Mapping[str, Tensor]:
    """Tune the roundings and ranges of every block; batches of 8, integers, asymmetric."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--lr", type=float)
    options = parser.parse_args(task.extra)
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=task.group_size,
        sym=False,
        iters=options.iters,
        batch_size=8,
        nsamples=len(task.tokens),
        seqlen=task.tokens.shape[1],
        dataset=list(task.tokens.split(8)),
        device_map="cpu",
        **({"lr": options.lr} if options.lr else {}),
    )
    tuned, _ = tool.quantize()
    return {
        f"{name}.weight": on_grid(linear.weight, linear.scale, linear.zp, task.bits)
        for name, linear in decoder_linears(tuned).items()
    }


if __name__ == "__main__":
    run(quantize)
