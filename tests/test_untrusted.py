"""Input from elsewhere: what is wrong with it is said in one printable line, and it reaches no file of the user's."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.calibrate.text import Mix
from quantkit.errors import DataError, ModelError, QuantkitError, UsageError
from quantkit.model import architecture, names
from quantkit.model.architecture import Architecture
from quantkit.recipe import Recipe
from quantkit.resources import data_dir
from quantkit.untrusted import MOST_BYTES, parse_json, parse_toml, read_document

FEW = {"method": "rtn", "wbits": 4, "group_size": 32, "samples": 2, "seqlen": 16, "calibration": "embedded"}
DEEP = "[" * 100_000
ZOO = data_dir("model_zoo")


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model."""
    shutil.copytree(ZOO / "tiny", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def written(tmp_path, tiny_rtn_w4):
    """A copy of a finished output."""
    shutil.copytree(tiny_rtn_w4, tmp_path / "written")
    return tmp_path / "written"


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries))


def refusal(kind, call, *args, **fields):
    with pytest.raises(kind) as caught:
        call(*args, **fields)
    message = str(caught.value)
    assert message.isprintable()
    return message


# --- documents and messages


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("two\nlines", "two\\nlines", id="lines"),
        pytest.param("\x1b[2Jcleared", "\\x1b[2Jcleared", id="terminal"),
        pytest.param("half \ud800", "half \\ud800", id="surrogate"),
        pytest.param("\u202egnp.exe", "\\u202egnp.exe", id="direction"),
        pytest.param("Größe 寸法", "Größe 寸法", id="languages"),
    ],
)
def test_a_message_is_one_printable_line(text, told):
    assert str(QuantkitError(text)) == told


def test_a_message_that_quotes_a_book_is_short():
    assert len(str(QuantkitError("begin " + "x" * 10**6 + " end"))) < 1100
    assert str(QuantkitError("begin " + "x" * 10**6 + " end")).endswith("xxx end")


@pytest.mark.parametrize("parse", [parse_json, parse_toml])
def test_brackets_without_end(parse):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(f"a = {DEEP}" if parse is parse_toml else DEEP)


def test_a_document_is_a_regular_file_of_a_reasonable_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", MOST_BYTES + 1)
    for name, error in (("pipe", OSError), ("nothing", FileNotFoundError), (".", OSError), ("huge", ValueError)):
        with pytest.raises(error):
            read_document(tmp_path / name)
    with pytest.raises(OSError, match="regular"):
        read_document(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("way", ["pipe", "endless", "huge"])
def test_a_side_file_that_would_never_end(model, name, way):
    (model / name).unlink()
    if way == "pipe":
        os.mkfifo(model / name)
    elif way == "endless":
        (model / name).symlink_to("/dev/zero")
    else:
        (model / name).touch()
        os.truncate(model / name, 2**40)
    assert "config.json" in (told := refusal(ModelError, names.resolve, str(model))) or name in told


# --- configurations


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_experts", "n_routed_experts"])
def test_a_model_of_more_layers_than_memory_holds(model, name):
    change(model / "config.json", **{name: 10**12})
    assert f"{name} is 1000000000000" in refusal(ModelError, quantkit.plan, model, **FEW)


def test_a_config_that_is_not_utf8(model):
    (model / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json cannot be used" in refusal(ModelError, quantkit.plan, model, **FEW)


@pytest.mark.parametrize("content", [DEEP, "[]", "{", '{"eos_token_id": "x"'])
def test_a_generation_config_that_transformers_cannot_use(model, content):
    (model / "generation_config.json").write_text(content)
    assert "generation_config.json cannot be used" in refusal(ModelError, quantkit.plan, model, **FEW)


def test_weights_that_give_nan_are_not_quantized(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] *= 1e38
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 1e38
    save_file(tensors, model / "model.safetensors")
    told = refusal(ModelError, quantkit.quantize, model, output=tmp_path / "out", **FEW)
    assert "NaN or infinite" in told
    assert not (tmp_path / "out").exists()


def test_a_half_character_in_a_config_reaches_the_output_as_json(model, tmp_path):
    (model / "config.json").write_text((model / "config.json").read_text().replace("{", '{"note": "\\ud800",', 1))
    quantkit.quantize(model, output=tmp_path / "out", **FEW)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"] == "\ud800"


def test_code_of_a_checkpoint_is_never_run(model, tmp_path):
    """Custom code is refused where it is needed and left alone where it is not; there is no flag that runs it."""
    trace = tmp_path / "trace"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (model / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Own: pass\n")
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    change(model / "config.json", auto_map=auto)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    quantkit.quantize(model, output=tmp_path / "out", **FEW)
    quantkit.evaluate(model, text="embedded-test", seqlen=16, windows=1)
    quantkit.load(tmp_path / "out")
    change(model / "config.json", model_type="own")
    for call in (quantkit.plan, quantkit.generate):
        refusal(ModelError, call, model, **({} if call is quantkit.plan else {"prompt": "Once"}))
    assert not trace.exists()


def test_a_dtype_that_is_none(model):
    change(model / "config.json", dtype=[])
    assert "config.json cannot be used" in refusal(ModelError, quantkit.plan, model, **FEW)


def test_a_token_number_that_is_no_int64(written):
    change(written / "generation_config.json", suppress_tokens=[2**70])
    assert "generation_config.json" in refusal(ModelError, quantkit.generate, written, "Once", max_new_tokens=1)


# --- tokenizers


def test_a_merge_that_is_none(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"][3] = 5
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = refusal(ModelError, quantkit.evaluate, model, text="embedded-test", seqlen=16, windows=1)
    assert "has no tokenizer that can be loaded" in told


@pytest.mark.parametrize("length", ["many", [256]])
def test_a_longest_text_that_is_no_number(model, length):
    change(model / "tokenizer_config.json", model_max_length=length)
    told = refusal(ModelError, quantkit.evaluate, model, text="embedded-test", seqlen=16, windows=1)
    assert "no number" in told


def test_a_tokenizer_of_another_model(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = {token: number + 5000 for token, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] += 5000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = refusal(DataError, quantkit.evaluate, model, text="embedded-test", seqlen=16, windows=1)
    assert "the model's vocabulary ends at 1023; the tokenizer files belong to another model" in told


def test_a_merge_of_a_gguf_file_that_is_none(written, tmp_path):
    tokenizer = json.loads((written / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"][3] = 5
    (written / "tokenizer.json").write_text(json.dumps(tokenizer))
    refusal(ModelError, quantkit.export, written, format="gguf", to=tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


# --- outputs that somebody else wrote


@pytest.mark.parametrize("groups", ["none", [], {"group_0": 5}, {"group_0": {}}])
def test_config_groups_that_are_no_table(written, groups):
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["config_groups"] = groups
    (written / "config.json").write_text(json.dumps(config))
    refusal(ModelError, quantkit.load, written)


def test_a_target_that_is_no_name(written):
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [{"a": 1}]
    (written / "config.json").write_text(json.dumps(config))
    assert "is no name" in refusal(ModelError, quantkit.load, written)


@pytest.mark.parametrize("name", ["report.json", "check.json", "config.json", "recipe.toml"])
def test_documents_of_an_output_that_do_not_end(written, name):
    (written / name).write_text(DEEP if name != "recipe.toml" else f"a = {DEEP}")
    assert any(name in fault for fault in quantkit.check(written).faults)


def test_a_copied_file_that_was_altered_is_told(written):
    assert quantkit.check(written).faults == ()
    (written / "README.md").write_text("mine now")
    assert quantkit.check(written).faults == ()
    change(written / "tokenizer_config.json", model_max_length=128)
    (fault,) = quantkit.check(written).faults
    assert fault.startswith("tokenizer_config.json was altered: its SHA-256 is not")


def test_a_report_cannot_make_a_check_read_other_files(written, tmp_path):
    (tmp_path / "secret").write_text("mine")
    change(written / "report.json", source_sha256={"../secret": "0" * 64, str(tmp_path / "secret"): "0" * 64})
    assert quantkit.check(written).faults == ()


def test_a_report_of_an_older_version_is_read(written):
    report = json.loads((written / "report.json").read_text(encoding="utf-8"))
    del report["source_sha256"], report["machine"]
    (written / "report.json").write_text(json.dumps(report))
    assert quantkit.check(written).faults == ()


def test_a_tensor_whose_name_has_lines_is_told_in_one(written):
    shard = written / "model-00002-of-00006.safetensors"
    tensors = load_file(shard)
    save_file({f"{name}\n" if name.endswith("up_proj.weight_scale") else name: t for name, t in tensors.items()}, shard)
    faults = quantkit.check(written).faults
    assert faults
    assert all(fault.isprintable() for fault in faults)


# --- mixes, recipes, architectures


@pytest.mark.parametrize(
    "entry",
    [
        *('file = "../secret.txt"', 'file = "/etc/passwd"', 'file = "link.txt"', 'file = "sub/../../secret.txt"'),
        *('dataset = "../data"', 'dataset = "/data"', 'dataset = "a/b/c"', 'dataset = "."'),
        *('dataset = "a/b"\ndata_files = "/etc/*"', 'dataset = "a/b"\ndata_files = "https://x.org/y"'),
        *('file = "own.txt"\nweight = inf', 'file = "own.txt"\nweight = 1e308', 'file = "own.txt"\nweight = nan'),
        *('dataset = "a/b"\nstream = "yes"', 'dataset = "a/b"\njoin = 5', "file = 5", 'file = "a\\u0000b"'),
    ],
)
def test_a_mix_that_leads_elsewhere_or_says_nothing_usable(tmp_path, entry):
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "mixes").mkdir()
    (tmp_path / "mixes" / "link.txt").symlink_to("../secret.txt")
    mix = tmp_path / "mixes" / "mix.toml"
    mix.write_text(f'description = "a"\n[[sources]]\n{entry}\n')
    assert "is not a calibration mix" in refusal(UsageError, Mix.load, mix)


def test_a_text_whose_name_no_file_can_have(tmp_path):
    (tmp_path / "mix.toml").write_text(f'description = "a"\n[[sources]]\nfile = "{"x" * 5000}"\n')
    assert "there is no text file" in refusal(DataError, quantkit.evaluate, "tiny", text=tmp_path / "mix.toml")
    assert "unknown text" in refusal(UsageError, quantkit.evaluate, "tiny", text="x" * 5000)


def test_a_glob_that_is_none(tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "tiny"\nignore = [["*.up_proj"]]\n')
    assert "ignore must be a list of globs" in refusal(UsageError, Recipe.from_toml, tmp_path / "recipe.toml")


def test_a_text_that_fills_no_memory(tmp_path):
    (tmp_path / "a.txt").touch()
    os.truncate(tmp_path / "a.txt", 2**42)
    told = refusal(DataError, quantkit.evaluate, "tiny", text=tmp_path / "a.txt")
    assert "more than fits into memory" in told


def test_a_name_that_no_recipe_can_write():
    assert "is not UTF-8" in refusal(UsageError, Recipe, model="model-\udcff")


@pytest.mark.parametrize("line", ["blocks = 5", 'blocks = "x"\nnorm_offset = nan', 'blocks = "x"\nrenames = {a = 1}'])
def test_an_architecture_of_other_types(tmp_path, line):
    (tmp_path / "own.toml").write_text(f'model_types = ["own"]\n{line}\n')
    assert "is not an architecture file" in refusal(UsageError, Architecture.read, tmp_path / "own.toml")


def test_an_architecture_that_names_modules_that_are_not_there(tmp_path, monkeypatch):
    text = (ZOO / "architectures" / "llama.toml").read_text().replace('after = "input_layernorm"', 'after = "nothing"')
    (tmp_path / "llama.toml").write_text(text)
    read = Architecture.read(tmp_path / "llama.toml")
    monkeypatch.setattr(architecture, "architectures", lambda: (read,))
    told = refusal(UsageError, quantkit.plan, "tiny", **{**FEW, "method": "omniquant"}, options={"let": True})
    assert "llama.toml does not fit the model" in told


def test_an_architecture_whose_groups_share_no_input(tmp_path, monkeypatch):
    text = (ZOO / "architectures" / "llama.toml").read_text().replace('"mlp.up_proj"]', '"mlp.down_proj"]')
    (tmp_path / "llama.toml").write_text(text)
    read = Architecture.read(tmp_path / "llama.toml")
    monkeypatch.setattr(architecture, "architectures", lambda: (read,))
    assert "different widths, [128, 384]" in refusal(UsageError, quantkit.plan, "tiny", **{**FEW, "method": "awq"})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pkl"])
def test_pickles_beside_the_weights_are_neither_opened_nor_copied(model, tmp_path, name):
    trace = tmp_path / "trace"
    (model / name).write_bytes(b"cposix\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    quantkit.quantize(model, output=tmp_path / "out", **FEW)
    quantkit.generate(model, "Once", max_new_tokens=1)
    assert not trace.exists()
    assert not (tmp_path / "out" / name).exists()
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        torch.load(model / name)
