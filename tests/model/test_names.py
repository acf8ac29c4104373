"""Directories and aliases; what happens with the names of the Hub is in test_hub."""

from pathlib import Path

import pytest

from quantkit.errors import ModelError, UsageError
from quantkit.model.names import Alias, aliases, resolve

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "model_zoo" / "tiny"


def test_a_directory_passes_through():
    source = resolve(str(TINY))
    assert (source.path, source.id, source.revision) == (TINY, None, None)


def test_tiny_is_the_embedded_model():
    source = resolve("tiny", weights=False)
    assert source.path == TINY
    assert source.id is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "the directory nowhere does not exist"),
        ("/no/where", "the directory /no/where does not exist"),
        ("no/where/at/all", "does not exist"),
        (str(ROOT / "quantkit"), "holds no config.json"),
        (str(TINY / "config.json"), "is a file; give the directory"),
        ("lama-7b", "did you mean .*llama-7b.*is named org/name"),
        ("https://huggingface.co/org/name", "is named org/name"),
        ("", "is named org/name"),
    ],
)
def test_names_that_lead_nowhere(model, message):
    with pytest.raises(ModelError, match=message) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_a_directory_has_no_revision():
    with pytest.raises(UsageError, match="leave out --revision v1"):
        resolve(str(TINY), revision="v1")


def test_the_shipped_aliases_are_well_formed():
    known = aliases()
    assert known["llama-7b"].id == "huggyllama/llama-7b"
    assert known["tiny"] == Alias(path="tiny")
    ids = [alias.id for alias in known.values()]
    assert len(ids) == len(set(ids))
    pinned = [alias.revision for alias in known.values() if alias.revision]
    assert len(pinned) == len(set(pinned))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = {", "cannot be read"),
        ("a = 1", "'a' must be a table of strings"),
        ("A = { id = 'x/y' }", "'A' must be lower case"),
        ("a = { name = 'x/y' }", "'a' is malformed.*name"),
        ("a = { id = 'x' }", "org/name, not 'x'"),
        ("a = { id = 3 }", "'a' must be a table of strings"),
        ("a = { id = 'x/y', path = 'z' }", "exactly one of id and path"),
        ("a = {}", "exactly one of id and path"),
        ("a = { path = '../z' }", "path must be the name of a directory"),
        ("a = { id = 'x/y', revision = 'main' }", "40 hexadecimal digits.*'main'"),
    ],
)
def test_a_malformed_table_of_aliases_is_refused(tmp_path, text, message):
    file = tmp_path / "aliases.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        aliases(file)
