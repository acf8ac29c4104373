import json
import shutil

import pytest

from quantkit.errors import ModelError
from quantkit.evaluation.vocabulary import refuse_other_tokens
from quantkit.resources import data_dir


@pytest.fixture
def copy(tmp_path):
    """The embedded model without its weights, which are not looked at."""
    directory = tmp_path / "copy"
    shutil.copytree(data_dir("model_zoo") / "tiny", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    return directory


def test_the_same_tokens(copy):
    refuse_other_tokens(copy, "tiny")


def test_another_number_of_tokens(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 1088}))
    with pytest.raises(ModelError, match=r"the vocabularies of .*copy and tiny differ, 1088 and 1024 tokens; "):
        refuse_other_tokens(copy, "tiny")


def test_as_many_but_other_tokens(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    first, second = names[300], names[301]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"the tokenizers of .*copy and tiny differ, for example in "):
        refuse_other_tokens(copy, "tiny")
