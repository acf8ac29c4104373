"""llm-compressor for `peers.py` and `pruning.py`, in its environment: --algorithm rtn, gptq, awq, wanda or sparsegpt.

GPTQ runs with its defaults, which are act-order `static` and damping 0.01. AWQ pins its cached activations in memory
to copy them to a GPU, which raises on a machine without one; that call, and nothing else, is left out.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.quantization import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer_common import Task, decoder_linears, run
from torch import Tensor, nn

PRUNING = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def quantize(task: Task, model: nn.Module) -> Mapping[str, Tensor]:
    """Run one recipe over the decoder's linears; AWQ changes the decoder's norms too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", choices=["rtn", "gptq", "awq", *PRUNING], required=True)
    parser.add_argument("--sparsity", default="0.5")
    args = parser.parse_args(task.extra)
    algorithm = args.algorithm
    calibration = {} if algorithm == "rtn" else _calibration(task.tokens)
    if algorithm in PRUNING:
        oneshot(model=model, recipe=[_pruning(algorithm, args.sparsity)], **calibration)
        return {f"{name}.weight": linear.weight for name, linear in decoder_linears(model).items()}
    oneshot(model=model, recipe=_recipe(algorithm, task), **calibration)
    changed = {f"{name}.weight": _dense(linear) for name, linear in decoder_linears(model).items()}
    if algorithm == "awq":
        changed |= {name: value for name, value in model.named_parameters() if ".layers." in name and "norm" in name}
    return changed


def _pruning(algorithm: str, sparsity: str) -> Modifier:
    """Return a pruner with its defaults; N:M is N of every M."""
    structure = {"sparsity": 0.5, "mask_structure": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}
    return PRUNING[algorithm](targets=["Linear"], ignore=["re:.*lm_head"], **structure)


def _recipe(algorithm: str, task: Task) -> list[Modifier]:
    weights: dict[str, Any] = {"num_bits": task.bits, "type": "int", "symmetric": False, "strategy": "channel"}
    if task.group_size > 0:
        weights |= {"strategy": "group", "group_size": task.group_size}
    common = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if algorithm == "gptq":
        return [GPTQModifier(dampening_frac=0.01, actorder="static", **common)]
    if algorithm == "awq":
        IntermediatesCache.pin_memory = lambda *_, **__: None
        return [AWQModifier(), QuantizationModifier(**common)]
    return [QuantizationModifier(**common)]


def _calibration(tokens: Tensor) -> dict[str, Any]:
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    return {
        "dataset": rows,
        "num_calibration_samples": len(tokens),
        "max_seq_length": tokens.shape[1],
        "shuffle_calibration_samples": False,
    }


@torch.no_grad()
def _dense(linear: nn.Linear) -> Tensor:
    scheme = linear.quantization_scheme.weights
    return fake_quantize(linear.weight, linear.weight_scale, linear.weight_zero_point, scheme)


if __name__ == "__main__":
    run(quantize)
