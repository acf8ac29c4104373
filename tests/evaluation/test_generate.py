import pytest
import torch
from families import save_tiny, save_tokenizer

from quantkit.errors import UsageError
from quantkit.evaluation.generate import generate
from quantkit.evaluation.loading import load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


@torch.no_grad()
def greedily(model, tokenizer, prompt, count):
    """The plain way: no cache, the whole sequence again for every token."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_continues_greedily_without_repeating_the_prompt(tiny):
    prompt = "The capital of"
    text = generate(*tiny, prompt, max_new_tokens=8)
    assert prompt + text == greedily(*tiny, prompt, 8)
    assert text.startswith(" ")


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "falcon", "gemma2", "mistral"])
def test_the_cache_changes_nothing_in_any_family(tmp_path, family):
    model = save_tiny(family, tmp_path).eval()
    model.generation_config.eos_token_id = -1
    save_tokenizer(tmp_path)
    tokenizer = load_model(tmp_path, device="cpu")[1]
    prompt = tokenizer.decode(tokenizer("abc")["input_ids"])
    text = generate(model, tokenizer, "abc", max_new_tokens=16)
    assert prompt + text == greedily(model, tokenizer, "abc", 16)


def test_sampling_repeats_with_the_seed_and_leaves_the_global_state(tiny):
    state = torch.get_rng_state()
    texts = [generate(*tiny, "The", temperature=1.0, seed=seed, max_new_tokens=24) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_low_temperature_is_greedy(tiny):
    assert generate(*tiny, "The", temperature=1e-6, max_new_tokens=8) == generate(*tiny, "The", max_new_tokens=8)


def test_an_empty_prompt_begins_with_bos(tiny):
    assert generate(*tiny, "", max_new_tokens=8)


def test_an_empty_prompt_needs_a_bos(tmp_path):
    save_tiny("llama", tmp_path)
    save_tokenizer(tmp_path)
    model, tokenizer = load_model(tmp_path, device="cpu")
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="no BOS"):
        generate(model, tokenizer, "")


def test_ends_with_the_text(tiny):
    first = generate(*tiny, "The", max_new_tokens=1)
    model, tokenizer = tiny
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer("The" + first)["input_ids"][-1]]
    try:
        assert generate(*tiny, "The") == first
    finally:
        model.generation_config.eos_token_id = before


def test_ends_with_the_context(tiny):
    model, tokenizer = tiny
    prompt = "the river " * 200
    ids = tokenizer(prompt)["input_ids"][1:255]
    nearly_full = tokenizer.decode(ids)
    left = 257 - len(tokenizer(nearly_full)["input_ids"])
    text = generate(model, tokenizer, nearly_full, max_new_tokens=64)
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= left
    with pytest.raises(UsageError, match="fills the model's context of 256"):
        generate(model, tokenizer, prompt)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_refuses_values_out_of_range(tiny, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        generate(*tiny, "The", **options)
