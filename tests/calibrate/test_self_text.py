"""Text that a model writes: drawn from its own distribution, the same on every run."""

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import costs
from quantkit.calibrate.data import load_tokenizer
from quantkit.calibrate.self_text import cache_elements, draw, sample_tokens, sequences_at_once
from quantkit.errors import ModelError, UsageError
from quantkit.pipeline import Silent
from quantkit.recipe import Recipe
from quantkit.resources import data_dir

TINY = data_dir("model_zoo") / "tiny"
BOS, EOS = 1, 2
PROBABILITIES = torch.tensor([0.0, 0.0, 0.1, 0.3, 0.0, 0.2, 0.35, 0.05], dtype=torch.float64)
WITH_BOS = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS)


class WithoutBos:
    bos_token_id, eos_token_id, all_special_ids = None, EOS, [EOS, 4]

    def __len__(self):
        return 7


class Fixed:
    """A model of one distribution, whatever it is shown; it keeps no cache and notes what it is shown."""

    def __init__(self, probabilities=PROBABILITIES):
        self.logits, self.shown = probabilities.log(), []
        self.device = torch.device("cpu")
        text = SimpleNamespace(vocab_size=len(probabilities))
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def __call__(self, *, input_ids, past_key_values, use_cache):
        self.shown.append(input_ids)
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def uncached(model):
    """Return a model that computes everything anew for every token."""

    def call(*, input_ids, past_key_values, use_cache):
        return SimpleNamespace(logits=model(input_ids=input_ids, use_cache=False).logits)

    return type("Uncached", (), {"device": model.device, "config": model.config, "__call__": staticmethod(call)})()


def sample(model, tokenizer=WITH_BOS, samples=4, seqlen=8, seed=0, **options):
    return sample_tokens(model, tokenizer, samples=samples, seqlen=seqlen, seed=seed, **options)


def chi_square(counts, probabilities):
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = counts.sum() * probabilities[possible]
    return float(((counts[possible] - expected) ** 2 / expected).sum())


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), load_tokenizer(TINY)


def test_tokens_are_drawn_with_their_probabilities():
    tokens = sample(Fixed(), WithoutBos(), samples=100, seqlen=101)[:, 1:]
    counts = torch.bincount(tokens.flatten(), minlength=len(PROBABILITIES)).double()
    assert chi_square(counts, PROBABILITIES) < 18.5  # 4 degrees of freedom: one in a thousand seeds is above
    pairs = torch.zeros(8, 8, dtype=torch.float64)
    pairs.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.tensor(1.0).double(), accumulate=True)
    assert chi_square(pairs.flatten(), torch.outer(PROBABILITIES, PROBABILITIES).flatten()) < 51.2  # 24 degrees


def test_the_first_token_is_bos_and_the_next_text_begins_with_it():
    tokens = sample(Fixed(), samples=50, seqlen=100)
    assert bool((tokens[:, 0] == BOS).all())
    assert EOS not in tokens
    assert int((tokens[:, 1:] == BOS).sum()) == pytest.approx(495, abs=100)  # where a text ended: probability 0.1


def test_without_bos_the_first_token_is_any_word_and_eos_stays():
    tokens = sample(Fixed(), WithoutBos(), samples=400, seqlen=2)
    counts = torch.bincount(tokens[:, 0], minlength=8).double()
    assert chi_square(counts, torch.tensor([1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.float64) / 5) < 18.5
    assert EOS in tokens[:, 1]


def test_draws_come_from_the_cumulative_distribution():
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution(value):
    damaged = Fixed()
    damaged.logits = damaged.logits.clone()
    damaged.logits[3] = value
    with pytest.raises(ModelError, match="the model's logits are not finite, so it can write no text"):
        sample(damaged)


def test_a_model_without_a_cache_is_shown_everything():
    model = Fixed()
    tokens = sample(model, samples=2, seqlen=4)
    assert [part.tolist() for part in model.shown] == [tokens[:, :place].tolist() for place in (1, 2, 3)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "bloom", "falcon-rw", "phi3"])
def test_the_cache_changes_nothing(tmp_path, family):
    save_tiny(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    cached, anew = (sample(each, samples=3, seqlen=20) for each in (model, uncached(model)))
    assert torch.equal(cached, anew)
    assert len(set(cached.flatten().tolist())) > 10


@torch.no_grad()
def test_the_text_is_as_likely_as_the_models_entropy_says(tiny):
    model, tokenizer = tiny
    tokens = sample(model, tokenizer, samples=32, seqlen=64)
    logs = model(input_ids=tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    surprise = -logs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    surprise[tokens[:, 1:] == tokenizer.bos_token_id] = 0  # drawn as EOS
    probabilities = logs.exp()
    probabilities[..., [tokenizer.bos_token_id, tokenizer.eos_token_id]] = 0
    excess = surprise + (probabilities * logs).sum(-1)
    variance = (probabilities * logs.square()).sum(-1) - (probabilities * logs).sum(-1).square()
    assert abs(float(excess.sum())) < 4 * float(variance.sum().sqrt())
    assert float(surprise.mean()) < 2.5  # far from the 6.2 nats of tokens drawn at random


def test_a_seed_gives_the_same_tokens_and_leaves_the_global_state(tiny):
    state = torch.random.get_rng_state()
    one, same, other = (sample(*tiny, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (one.shape, one.dtype) == ((4, 8), torch.int64)


def test_how_many_are_written_side_by_side_does_not_matter(tiny):
    assert torch.equal(sample(*tiny, samples=5, at_once=2), sample(*tiny, samples=5, at_once=5))


def test_progress_is_told_to_the_end():
    told = []
    sample(Fixed(), samples=5, seqlen=4, at_once=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 15), (4, 15), (6, 15), (8, 15), (10, 15), (12, 15), (13, 15), (14, 15), (15, 15)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_the_cache_is_as_large_as_is_said(tmp_path, family):
    model = save_tiny(family, tmp_path)
    cache = model(input_ids=torch.full((1, 7), 5), use_cache=True).past_key_values
    found = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_elements(FAMILIES[family], 7) == found


def test_the_cache_of_all_is_no_larger_than_the_weights():
    config = SimpleNamespace(num_hidden_layers=32, num_attention_heads=32, hidden_size=4096)
    config.get_text_config = lambda: config
    at_once = sequences_at_once(6_738_415_616, config, 2048)
    assert at_once == 12
    assert at_once * cache_elements(config, 2048) <= 6_738_415_616
    assert sequences_at_once(100_000_000, config, 2048) == 1
    assert sequences_at_once(6_738_415_616, config, 16) == 64


FEW = {"calibration": "self", "method": "rtn", "group_size": 32, "samples": 3, "seqlen": 24, "device": "cpu"}


class Diary(Silent):
    def __init__(self):
        self.stages = []

    def stage(self, name):
        self.stages.append(name)


def test_a_run_calibrates_on_what_the_model_writes(tmp_path):
    diary, state = Diary(), torch.random.get_rng_state()
    result = quantkit.quantize("tiny", output=tmp_path / "out", progress=diary, **FEW)
    assert result.report["calibration"].items() >= {"text": "self", "samples": 3, "seqlen": 24}.items()
    assert diary.stages[:2] == ["writing text", "opening weights"]
    assert torch.equal(torch.random.get_rng_state(), state)
    again = quantkit.quantize(Recipe.from_toml(result.output / "recipe.toml"), output=tmp_path / "again", device="cpu")
    assert again.report["sha256"] == result.report["sha256"]
    for name in ("check.json", "recipe.toml"):
        assert (again.output / name).read_bytes() == (result.output / name).read_bytes()


def test_a_plan_counts_the_whole_model_and_writes_nothing(monkeypatch):
    monkeypatch.setattr("quantkit.material.load_model", None)  # calling it would fail
    monkeypatch.setattr(costs, "machine_speed", lambda device: costs.Speed(rate=1e10, sweep=1e-9, call=1e-6))
    own, read = (quantkit.plan("tiny", **(FEW | {"calibration": text})) for text in ("self", "embedded"))
    assert own.memory_bytes >= read.memory_bytes
    assert own.seconds > read.seconds


def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(costs, "free_memory", lambda device: 1_000_000)
    with pytest.raises(UsageError, match=r"^--calibration self needs the whole model in memory, .* GB on cpu where"):
        quantkit.plan("tiny", **FEW)
    quantkit.plan("tiny", **(FEW | {"calibration": "embedded"}))
