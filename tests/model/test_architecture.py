import pytest

from quantkit.errors import UsageError
from quantkit.model import architecture
from quantkit.model.architecture import Architecture, Attention

FILE = """
model_types = ["one", "two"]
blocks = "model.layers"
when = { parallel = true }
norm_offset = 1.0
writes = ["o"]

[attention]
query = "q"
key = "k"
value = "v"
rotary = "interleaved"

[[groups]]
name = "attention"
after = "norm"
linears = ["q", "k"]

[[groups]]
name = "output"
linears = ["o"]

[renames]
"old_head." = "head."
"text." = "model.text."
"""

ATTENTION = '[attention]\nquery = "q"\nkey = "k"\nvalue = "v"\n'


@pytest.fixture
def read(tmp_path):
    def write_and_read(text):
        path = tmp_path / "family.toml"
        path.write_text(text)
        return Architecture.read(path)

    return write_and_read


def test_a_file_becomes_an_architecture(read):
    facts = read(FILE)
    assert (facts.name, facts.model_types, facts.blocks) == ("family", ("one", "two"), "model.layers")
    assert [(group.name, group.after, group.linears) for group in facts.groups] == [
        ("attention", "norm", ("q", "k")),
        ("output", None, ("o",)),
    ]
    assert facts.norm_offset == 1.0
    assert facts.writes == ("o",)
    assert facts.attention == Attention(query="q", key="k", value="v", rotary="interleaved")


def test_what_a_file_may_leave_out(read):
    facts = read('model_types = ["one"]\nblocks = "layers"')
    assert (facts.groups, facts.renames, facts.when, facts.norm_offset, facts.writes) == ((), {}, {}, 0.0, ())
    assert facts.attention is None


def test_a_linear_without_a_group_is_its_own(read):
    facts = read(FILE)
    assert [facts.group_of(linear) for linear in ("q", "k", "o", "gate")] == [
        "attention",
        "attention",
        "output",
        "gate",
    ]


@pytest.mark.parametrize(
    ("config", "described"),
    [
        ({"model_type": "two", "parallel": True, "more": 1}, True),
        ({"model_type": "two", "parallel": False}, False),
        ({"model_type": "two"}, False),
        ({"model_type": "three", "parallel": True}, False),
    ],
)
def test_a_file_describes_its_types_where_its_conditions_hold(read, config, described):
    assert read(FILE).describes(config) is described


def test_renames_replace_the_start_of_a_name(read):
    facts = read(FILE)
    assert facts.stored_names("head.weight") == ("old_head.weight",)
    assert facts.stored_names("model.text.head.weight") == ("text.head.weight",)
    assert facts.stored_names("model.head.weight") == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model_types = [", "Invalid value"),
        ('blocks = "layers"', "model_types"),
        ('model_types = ["one"]', "blocks"),
        ('model_types = "one"\nblocks = "layers"', "'one' is no list of names"),
        ('model_types = ["one"]\nblocks = "layers"\nheads = 2', "heads"),
        ('model_types = ["one"]\nblocks = "layers"\ngroups = 2', "not iterable"),
        ('model_types = ["one"]\nblocks = "layers"\nwrites = "o"', "'o' is no list of names"),
        ('model_types = ["one"]\nblocks = "layers"\nattention = "q"', "must be a mapping"),
        ('model_types = ["one"]\nblocks = "layers"\n[attention]\nquery = "q"', "missing 3 required"),
        (
            f'model_types = ["one"]\nblocks = "layers"\n{ATTENTION}rotary = "full"',
            r"rotary is 'full', known: \['half', 'interleaved', 'none'\]",
        ),
        (
            'model_types = ["one"]\nblocks = "layers"\n[[groups]]\nname = "a"\nlinears = [1]',
            "is no list of names",
        ),
        ('model_types = ["one"]\nblocks = "layers"\n[[groups]]\nname = "a"', "linears"),
        (
            'model_types = ["one"]\nblocks = "layers"\n[[groups]]\nname = "a"\nlinears = []',
            "the group 'a' has no linears",
        ),
        ('model_types = ["one"]\nblocks = "layers"\n[[groups]]\nbefore = "a"', "unknown key 'before'"),
    ],
)
def test_a_faulty_file_is_refused_with_the_reason(read, text, reason):
    with pytest.raises(UsageError, match=rf"family.toml is not an architecture file: .*{reason}.*see model_zoo/README"):
        read(text)


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not an architecture file"):
        Architecture.read(tmp_path / "none.toml")


def test_every_file_of_the_zoo_can_be_read():
    assert {"llama", "gpt2", "gemma2"} <= {found.name for found in architecture.architectures()}


def test_find():
    assert architecture.find({"model_type": "mistral"}).name == "llama"
    assert architecture.find({"model_type": "opt", "do_layer_norm_before": False}).name == "opt-350m"
    assert architecture.find({"model_type": "no-such-model"}) is None
