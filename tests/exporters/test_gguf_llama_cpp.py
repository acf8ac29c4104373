"""llama.cpp itself computes what quantkit's checkpoint does, where the package llama-cpp-python is installed.

It rounds inputs of linears to 8 bits, keys and values to float16, so logits of these random models differ by 1.5 to
2.6 percent; rows of q and k in the wrong order, or another rotation, give 50 to 100.
"""

import numpy as np
import pytest
import torch
from gguf_models import SPLITTINGS, exported_family, pack_tiny, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.exporters.gguf import FILE, Gguf

llama_cpp = pytest.importorskip("llama_cpp")
ROPE = {"rope_theta": 500.0, "factor": 8.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
TOKENS = torch.randint(3, 1024, (48,), generator=torch.Generator().manual_seed(5))
TEXTS = [
    "Once upon a time, there wasn't 1 rabbit:\n\n  it HAD 2345 ears?!  ",
    "CamelCase and ALLCAPS words, I'LL say we've 3.14159\tand more/\n... über 12 Größen!!",
]
CASES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {"head_dim": 32},
    "llama, Llama 3.1": {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", **ROPE}},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "qwen3": {},
}


@pytest.fixture(params=CASES)
def both(request, tmp_path):
    """Logits of llama.cpp and of transformers, float32 (tokens, vocabulary)."""
    output = exported_family(request.param.partition(",")[0], tmp_path, **CASES[request.param])
    file, count = str(output / "gguf" / FILE), len(TOKENS)
    model = llama_cpp.Llama(file, n_ctx=count, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
    model.eval(TOKENS.tolist())
    theirs = torch.tensor(np.array(model.scores[:count]))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(TOKENS[None]).logits[0]
    return theirs, ours


def test_llama_cpp_computes_the_same(both):
    theirs, ours = both
    assert (theirs - ours).norm() < 0.05 * ours.norm()
    assert (theirs[-8:] - ours[-8:]).norm() < 0.05 * ours[-8:].norm()  # far positions, where rotation shows


@pytest.mark.parametrize("name", SPLITTINGS)
def test_llama_cpp_splits_text_alike(name, tmp_path):
    pre_tokenizer, whole = SPLITTINGS[name]
    packed = pack_tiny(tmp_path / "packed", lambda _: "w4g32")
    write_tokenizer(packed, {"ignore_merges": whole}, pre_tokenizer=pre_tokenizer)
    Gguf().export(packed, packed / "gguf")
    ours = AutoTokenizer.from_pretrained(packed)
    theirs = llama_cpp.Llama(str(packed / "gguf" / FILE), vocab_only=True, verbose=False)
    found = [theirs.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
    assert found == [ours(text, add_special_tokens=False).input_ids for text in TEXTS]
