import pytest
import torch

from quantkit.errors import UsageError
from quantkit.evaluation.runtimes import load_with
from quantkit.runtime.linear import PackedLinear

ROW = torch.arange(3, 40)[None]


def packed_linears(model):
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@torch.no_grad()
def test_packed_and_dense_predict_the_same(tiny_rtn_w4):
    models = {runtime: load_with(runtime, tiny_rtn_w4, device="cpu")[0] for runtime in ("packed", "dense")}
    assert packed_linears(models["packed"]) == 35
    assert packed_linears(models["dense"]) == 0
    packed, dense = (models[runtime](ROW).logits for runtime in ("packed", "dense"))
    assert packed.dtype == dense.dtype == torch.float32
    # transformers rounds what it unpacks to the checkpoint's 16 bits
    assert (packed - dense).abs().max() < 0.02 * dense.std()


@torch.no_grad()
def test_a_model_that_is_not_quantized_runs_as_it_is():
    models = [load_with(runtime, "tiny", device="cpu")[0] for runtime in ("packed", "dense")]
    assert packed_linears(models[0]) == 0
    assert models[0](ROW).logits.equal(models[1](ROW).logits)


def test_an_unknown_runtime():
    with pytest.raises(UsageError, match=r"unknown runtime 'densely' \(did you mean dense\?\)"):
        load_with("densely", "tiny")
