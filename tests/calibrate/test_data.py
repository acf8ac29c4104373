"""Token sequences: drawn by weight and seed without overlap; cut in order for evaluation."""

import copy

import pytest
import torch
from families import save_tokenizer

from quantkit.calibrate.data import calibration_tokens, evaluation_windows, load_tokenizer
from quantkit.calibrate.text import Corpus
from quantkit.errors import DataError, ModelError
from quantkit.resources import data_dir

BOS = 0  # of the embedded model
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tiny():
    """A tokenizer that puts BOS before every document."""
    return load_tokenizer(data_dir("model_zoo") / "tiny")


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A tokenizer with one token for every character and nothing else."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(directory)


def stream(text, weight=1.0):
    return Corpus(documents=(text,), stream=True, weight=weight)


def documents(*texts, weight=1.0):
    return Corpus(documents=texts, weight=weight)


def draw(corpora, tokenizer, samples=4, seqlen=8, seed=0):
    return calibration_tokens(corpora, tokenizer, samples=samples, seqlen=seqlen, seed=seed)


def written(tokens, tokenizer):
    return ["".join(tokenizer.convert_ids_to_tokens(row)) for row in tokens.tolist()]


def test_windows_of_a_stream_do_not_overlap(characters):
    tokens = draw([stream(LETTERS)], characters, samples=3)
    assert sorted(written(tokens, characters)) == ["abcdefgh", "ijklmnop", "qrstuvwx"]


def test_windows_of_documents_do_not_overlap(characters):
    tokens = draw([documents(LETTERS[:13], LETTERS[13:])], characters, samples=3)
    text = "".join(written(tokens, characters))
    assert len(set(text)) == len(text) == 24


def test_shapes_and_dtype(tiny):
    tokens = draw([documents(*["Mira has two red pears."] * 40)], tiny, samples=5, seqlen=7)
    assert (tokens.shape, tokens.dtype) == ((5, 7), torch.int64)


def test_documents_begin_with_bos(tiny):
    texts = ["Mira has two red pears.", "Now, she rests.", "He goes north."]
    tokens = draw([documents(*texts * 20)], tiny, samples=8, seqlen=32).flatten()
    beginnings = {tuple(tiny(text)["input_ids"][:3]) for text in texts}
    starts = [i for i in range(len(tokens) - 3) if tokens[i] == BOS]
    assert len(starts) > 10
    assert {tuple(tokens[i : i + 3].tolist()) for i in starts} <= beginnings | {
        tuple(tokens[i : i + 3].tolist()) for i in starts if i % 32 > 29
    }


def test_a_stream_has_no_bos(tiny):
    assert not (draw([stream("Mira has two red pears. " * 40)], tiny) == BOS).any()


@pytest.mark.parametrize(
    ("weights", "samples", "shares"),
    [
        ((1, 1), 4, (2, 2)),
        ((0.5, 0.5), 5, (3, 2)),
        ((3, 1), 8, (6, 2)),
        ((0.9, 0.1), 3, (3, 0)),
        ((1, 1, 1), 8, (3, 3, 2)),
    ],
    ids=str,
)
def test_samples_are_shared_by_weight(characters, weights, samples, shares):
    corpora = [stream(letter * 200, weight) for letter, weight in zip("xyz", weights, strict=False)]
    text = "".join(written(draw(corpora, characters, samples=samples), characters))
    assert tuple(text.count(letter) // 8 for letter, _ in zip("xyz", weights, strict=False)) == shares


def test_the_seed_decides(characters):
    corpora = [stream(LETTERS * 40), documents(*[LETTERS[i:] for i in range(20)])]
    first, again, other = (draw(corpora, characters, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_has_no_say(characters):
    state = torch.random.get_rng_state()
    draw([stream(LETTERS * 40)], characters)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("make", [stream, documents])
@pytest.mark.parametrize(("seqlen", "rows"), [(8, 3), (26, 1), (27, 0)])
def test_too_little_text_gives_fewer_rows(characters, make, seqlen, rows):
    assert draw([make(LETTERS)], characters, samples=4, seqlen=seqlen).shape == (rows, seqlen)


def windows(corpora, tokenizer, **options):
    return evaluation_windows(corpora, tokenizer, **options)


def test_evaluation_cuts_one_stream_in_order_and_drops_the_last_part(characters):
    rows = windows([stream(LETTERS[:13]), stream(LETTERS[13:])], characters, seqlen=8)
    assert written(rows, characters) == ["abcdefgh", "ijklmnop", "qrstuvwx"]


def test_evaluation_uses_only_as_many_windows_as_asked_for(characters):
    rows = windows([stream(LETTERS)], characters, seqlen=8, windows=2)
    assert written(rows, characters) == ["abcdefgh", "ijklmnop"]


def test_bos_counts_towards_the_length(characters):
    rows = windows([stream(LETTERS)], characters, seqlen=6, bos=True)
    assert written(rows, characters) == ["<s>abcde", "<s>fghij", "<s>klmno", "<s>pqrst", "<s>uvwxy"]


def test_a_text_of_exactly_one_window(characters):
    assert windows([stream(LETTERS)], characters, seqlen=26).shape == (1, 26)
    assert windows([stream(LETTERS)], characters, seqlen=27, bos=True).shape == (1, 27)


def test_a_text_shorter_than_one_window(characters):
    with pytest.raises(DataError, match=r"the text has 26 tokens, fewer than one window of 27; lower --seqlen"):
        windows([stream(LETTERS)], characters, seqlen=27)


def test_bos_of_a_tokenizer_that_has_none(characters):
    without = copy.deepcopy(characters)
    without.bos_token = None
    with pytest.raises(DataError, match="has no BOS token"):
        windows([stream(LETTERS)], without, seqlen=8, bos=True)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "not json"], ids=["missing", "empty", "{}", "[]", "text"])
def test_a_tokenizer_that_cannot_be_loaded(tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"{tmp_path} has no tokenizer that can be loaded: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
