"""hqq for `peers.py`, in hqq's environment: its default configuration, one group along the input width (axis 1).

Its zero points are floating-point numbers (rounded at 4 bits only), which the integer formats of the others lack.
"""

from collections.abc import Mapping

import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from peer_common import Task, decoder_linears, run
from torch import Tensor, nn


def quantize(task: Task, model: nn.Module) -> Mapping[str, Tensor]:
    """Quantize without data."""
    names = list(decoder_linears(model))
    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group_size if task.group_size > 0 else None, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return {f"{name}.weight": model.get_submodule(name).dequantize() for name in names}


if __name__ == "__main__":
    run(quantize)
