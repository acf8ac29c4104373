"""A rotated model computes what it did; what cannot be rotated exactly is refused."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, save_tiny
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from quantkit.calibrate.record import finish, record
from quantkit.errors import ModelError, UsageError
from quantkit.model.block import Block
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.rotation import Rotation, refusal
from quantkit.model.skeleton import Skeleton

CPU = torch.device("cpu")
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "phi3")
TIED = ("qwen2", "qwen3", "smollm3", "gemma")
POST_NORM = "a norm stands behind what their blocks add to the residual stream"
NO_RMS = "is no RMS norm, it subtracts the mean or has a bias"
REFUSED = {
    "gemma2": POST_NORM,
    "gemma3": POST_NORM,
    "gemma3_text": POST_NORM,
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "opt-350m": POST_NORM,
    "olmo": "their self_attn.q_proj reads the residual stream behind no norm that has a weight",
    "stablelm": "no architecture file describes them",
    "cohere": f"their input_layernorm {NO_RMS}",
    "phi": f"their input_layernorm {NO_RMS}",
    "starcoder2": f"their input_layernorm {NO_RMS}",
    "opt": f"their self_attn_layer_norm {NO_RMS}",
    "gpt2": f"their ln_1 {NO_RMS}",
    "bloom": f"their input_layernorm {NO_RMS}",
    "falcon": f"their input_layernorm {NO_RMS}",
    "falcon-rw": f"their input_layernorm {NO_RMS}",
    "falcon-40b": f"their ln_attn {NO_RMS}",
    "falcon-11b": f"their input_layernorm {NO_RMS}",
    "gpt_neox": f"their input_layernorm {NO_RMS}",
}


class Float64(TorchFunctionMode):
    """Lets a float64 model stay in float64 where its code asks for float32, as all norms do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if v is torch.float32 else v for name, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a function from a family to the directory of its tiny model, written once."""
    directories = {}

    def build(family):
        if family not in directories:
            directories[family] = tmp_path_factory.mktemp(family)
            save_tiny(family, directories[family])
        return directories[family]

    return build


def load(directory, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def rotate(model, skeleton, seed=0):
    """Rotate a whole model in place."""
    rotation = Rotation.of(skeleton, seed)
    for block in model.get_submodule(skeleton.blocks_name):
        rotation.rotate_block(block)
    rotation.rotate_outer(model)
    return model


def tokens():
    return torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    with Float64():
        return model(input_ids=tokens(), use_cache=False).logits


def test_every_family_is_rotated_or_refused():
    assert {*ROTATED, *REFUSED} == set(FAMILIES)


@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_model_computes_what_it_did(tiny, family):
    model = load(tiny(family))
    before, weights = logits(model), {name: value.clone() for name, value in model.named_parameters()}
    rotate(model, Skeleton(tiny(family)))
    assert (logits(model) - before).norm() < 1e-10 * before.norm()
    # and yet it is another model
    down = next(name for name in weights if name.endswith("down_proj.weight"))
    assert (model.get_parameter(down) - weights[down]).norm() > 0.5 * weights[down].norm()


@pytest.mark.parametrize("family", ROTATED)
def test_the_norms_of_a_rotated_model_multiply_by_one(tiny, family):
    skeleton = Skeleton(tiny(family))
    model = rotate(load(tiny(family)), skeleton)
    rotation = Rotation.of(skeleton, 0)
    norms = [model.get_submodule(rotation.final_norm)]
    norms += [block.get_submodule(name) for block in model.model.layers for name in rotation.readers]
    assert len(norms) == 5
    assert all(bool((norm.weight + rotation.norm_offset == 1).all()) for norm in norms)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_rotated_is_refused_with_the_reason(tiny, family):
    skeleton = Skeleton(tiny(family))
    assert refusal(skeleton) == REFUSED[family]
    with pytest.raises(ModelError) as caught:
        Rotation.of(skeleton, 0)
    kind = FAMILIES[family].model_type
    assert str(caught.value) == f"{kind} models cannot be rotated: {REFUSED[family]}; leave the rotation out"


def test_a_model_with_more_outside_its_blocks_is_refused(tiny):
    skeleton = Skeleton(tiny("llama"))
    skeleton.model.register_parameter("positions", torch.nn.Parameter(torch.empty(64, 64, device="meta")))
    assert refusal(skeleton) == "outside the blocks they have more than an embedding, an RMS norm and a head"


def test_a_width_without_a_hadamard_matrix_is_refused(tiny, tmp_path):
    config = FAMILIES["llama"].to_dict() | {"hidden_size": 92, "head_dim": 16}
    type(FAMILIES["llama"])(**config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no Hadamard matrix of order 92"):
        Rotation.of(Skeleton(tmp_path), 0)


@pytest.mark.parametrize("family", TIED)
def test_tied_embeddings_are_untied_and_load_again(tiny, tmp_path, family):
    model = load(tiny(family))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = logits(model)
    rotate(model, Skeleton(tiny(family))).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.tie_word_embeddings is False
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    assert (logits(again) - before).norm() < 1e-10 * before.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_is_rotated_block_by_block_too(tiny, family):
    skeleton, checkpoint = Skeleton(tiny(family)), Checkpoint(tiny(family))
    rotation = Rotation.of(skeleton, 0)
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):
        rotation.rotate_outer(skeleton.model)
        recording = record(skeleton, [tokens()], CPU)
    (hidden,) = recording.hidden
    for index in range(len(skeleton.blocks)):
        module = skeleton.load_block(index, checkpoint, torch.float32, CPU)
        rotation.rotate_block(module)
        hidden = Block(index=index, name="block", module=module, sites=[]).forward(
            hidden, recording.arguments[0][index]
        )
    with skeleton.outer_weights(checkpoint, torch.float32, CPU):  # filled anew: the skeleton was left as it was
        rotation.rotate_outer(skeleton.model)
        found = finish(skeleton, tokens(), hidden)
    expected = load(tiny(family), torch.float32)(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert all(value.is_meta for value in skeleton.model.parameters())


def test_the_changed_parameters_are_named_and_keep_their_dtype(tiny):
    skeleton = Skeleton(tiny("qwen2"))
    rotation, model = Rotation.of(skeleton, 0), load(tiny("qwen2"), torch.bfloat16)
    before = {name: value.clone() for name, value in model.named_parameters(remove_duplicate=False)}
    named = set(rotation.rotate_outer(model))
    for index, block in enumerate(model.model.layers):
        named |= {skeleton.module_name(index, name) for name in rotation.rotate_block(block)}
    after = dict(model.named_parameters(remove_duplicate=False))
    assert named == {name for name in after if not torch.equal(after[name], before[name])}
    assert {value.dtype for value in after.values()} == {torch.bfloat16}


def test_a_bias_that_is_written_to_the_stream_is_rotated(tmp_path):
    config = type(FAMILIES["llama"])(**(FAMILIES["llama"].to_dict() | {"attention_bias": True, "mlp_bias": True}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    before = logits(model)
    rotate(model, Skeleton(tmp_path))
    assert (logits(model) - before).norm() < 1e-10 * before.norm()


def peak(hidden):
    """Return the largest magnitude over the root mean square, the kurtosis, and the error of 4 bits per token."""
    rms = hidden.square().mean(-1, keepdim=True).sqrt()
    step = hidden.abs().amax(-1, keepdim=True) / 7
    error = ((hidden / step).round() * step - hidden).norm() / hidden.norm()
    return (hidden.abs().amax(-1, keepdim=True) / rms).mean(), (hidden / rms).pow(4).mean(), error


@torch.no_grad()
def test_a_rotation_spreads_outlier_channels(tiny):
    model, skeleton = load(tiny("llama")), Skeleton(tiny("llama"))
    model.model.embed_tokens.weight[:, [5, 40]] *= 30

    def stream():
        with Float64():
            return model(input_ids=tokens(), output_hidden_states=True, use_cache=False).hidden_states[1]

    before, (ratio, kurtosis, error) = stream(), peak(stream())
    rotate(model, skeleton)
    after, (rotated_ratio, rotated_kurtosis, rotated_error) = stream(), peak(stream())
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert rotated_ratio < 0.6 * ratio
    assert rotated_kurtosis < 0.4 * kurtosis
    assert rotated_error < 0.7 * error
