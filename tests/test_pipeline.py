"""A whole run: what is copied, what is refused, and what is left as it was."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from families import edit_tensors, save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.errors import DataError, ModelError, OutputError
from quantkit.model import writer
from quantkit.model.checkpoint import Checkpoint
from quantkit.pipeline import Silent
from quantkit.recipe import Recipe

FEW = {
    "method": "rtn",
    "group_size": 32,
    "calibration": "embedded",
    "samples": 2,
    "seqlen": 16,
    "device": "cpu",
}
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "notes.md",
    "extra/params.json",
)
NOT_COPIED = (".gitattributes", "pytorch_model.bin", "old/consolidated.00.pth", "model.safetensors")
MASK = torch.tensor([[3, -1], [2**40, 0]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with everything that may lie beside the weights, and a tensor that no module has."""
    directory = tmp_path_factory.mktemp("model") / "source"
    save_tiny("llama", directory)
    save_tokenizer(directory)
    edit_tensors(directory, lambda tensors: tensors | {"extra.mask": MASK})
    for name in (
        "notes.md",
        "extra/params.json",
        ".gitattributes",
        "pytorch_model.bin",
        "old/consolidated.00.pth",
    ):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"content of {name}")
    return directory


@pytest.fixture(scope="module")
def result(source, tmp_path_factory):
    return quantkit.quantize(source, output=tmp_path_factory.mktemp("pipeline") / "out", **FEW)


def contents(directory):
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("name", COPIED)
def test_side_files_are_copied(source, result, name):
    assert (result.output / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", NOT_COPIED)
def test_other_weights_and_hidden_files_are_not(source, result, name):
    assert (source / name).is_file()
    assert not (result.output / name).exists()


def test_the_configuration_is_the_sources_with_one_entry_more(source, result):
    config = json.loads((result.output / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((source / "config.json").read_text())


def test_a_tensor_that_no_module_has_is_kept(result):
    assert torch.equal(Checkpoint(result.output).load(["extra.mask"])["extra.mask"], MASK)


def test_what_is_not_quantized_is_kept_byte_for_byte(source, result):
    before, after = Checkpoint(source), Checkpoint(result.output)
    names = [name for name in before if name.removesuffix(".weight") not in result.report["sites"]]
    assert len(names) == 2 * 2 + 3 + 1  # norms; embedding, last norm, head; mask
    loaded = before.load(names), after.load(names)
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in names)
    assert all(loaded[0][name].dtype == loaded[1][name].dtype for name in names)


def test_the_report_lists_the_tensors_that_were_written(result):
    tensors = Checkpoint(result.output).tensors
    assert result.report["tensors"] == {n: [tensors[n].dtype, list(tensors[n].shape)] for n in sorted(tensors)}
    assert json.loads((result.output / "report.json").read_text()) == result.report


def test_the_report_hashes_the_shards(result):
    hashes = result.report["sha256"]
    assert set(hashes) == {path.name for path in result.output.glob("*.safetensors")}
    for name, digest in hashes.items():
        assert hashlib.sha256((result.output / name).read_bytes()).hexdigest() == digest


def test_the_recipe_beside_the_model_makes_the_same_model(result, tmp_path):
    recipe = Recipe.from_toml(result.output / "recipe.toml")
    again = quantkit.quantize(recipe, output=tmp_path / "again", device="cpu")
    assert again.report["sha256"] == result.report["sha256"]


@torch.no_grad()
def test_the_recorded_logits_are_those_of_the_loaded_model(tiny_rtn_w4):
    check = json.loads((tiny_rtn_w4 / "check.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_rtn_w4, dtype=torch.float32)
    logits = model(input_ids=torch.tensor(check["tokens"]), use_cache=False).logits
    found = logits.gather(-1, torch.tensor(check["top_ids"]))
    torch.testing.assert_close(found, torch.tensor(check["top_logits"]), rtol=0, atol=1e-3)


def test_another_seed_calibrates_on_other_text(source, result, tmp_path):
    other = quantkit.quantize(source, output=tmp_path / "out", seed=1, **FEW)
    tokens = [json.loads((run / "check.json").read_text())["tokens"] for run in (result.output, other.output)]
    assert tokens[0] != tokens[1]


def test_a_head_that_repeats_tied_embeddings_is_dropped(tmp_path):
    model = save_tiny("qwen2", tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    head = model.lm_head.weight.detach().clone()
    edit_tensors(tmp_path / "source", lambda tensors: tensors | {"lm_head.weight": head})
    output = quantkit.quantize(tmp_path / "source", output=tmp_path / "out", **FEW).output
    assert "lm_head.weight" not in Checkpoint(output)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, head)


@pytest.mark.parametrize("place", [".", "..", "out", "extra/out"], ids=["the source", "above", "inside", "deep inside"])
def test_an_output_in_the_way_of_the_source_is_refused(source, place):
    before = contents(source.parent)
    with pytest.raises(OutputError, match="choose another -o"):
        quantkit.quantize(source, output=source / place, overwrite=True, **FEW)
    assert contents(source.parent) == before


def test_a_link_to_the_source_is_seen_through(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="choose another -o"):
        quantkit.quantize(source, output=tmp_path / "link", overwrite=True, **FEW)


def test_a_run_leaves_the_source_as_it_was(source, tmp_path):
    before = contents(source)
    quantkit.quantize(source, output=tmp_path / "out", **FEW)
    assert contents(source) == before


def test_a_source_that_cannot_be_written(source, tmp_path):
    paths = [source, *source.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    quantkit.quantize(source, output=tmp_path / "out", **FEW)
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode)
    (tmp_path / "out" / "extra" / "new.txt").write_text("the copies can be written")


def short_text(directory):
    text = directory / "short.txt"
    text.write_text("abcdefghijklmnop" * 3)
    return text


def test_too_little_text_is_refused_with_the_ways_out(source, tmp_path):
    short = FEW | {"samples": 4, "calibration": short_text(tmp_path)}
    with pytest.raises(DataError) as caught:
        quantkit.quantize(source, output=tmp_path / "out", **short)
    ways = "pass --samples 3 or --allow-short, or give more text"
    assert str(caught.value) == f"{tmp_path / 'short.txt'} gives 3 sequences of 16 tokens, not 4; {ways}"
    assert not (tmp_path / "out").exists()


def test_too_little_text_may_be_allowed(source, tmp_path):
    short = FEW | {"samples": 4, "calibration": short_text(tmp_path)}
    report = quantkit.quantize(source, output=tmp_path / "out", allow_short=True, **short).report
    assert report["calibration"]["samples"] == 3


def test_text_shorter_than_one_sequence_is_refused_whatever_is_allowed(source, tmp_path):
    short = FEW | {"seqlen": 64, "calibration": short_text(tmp_path)}
    with pytest.raises(DataError, match="gives 0 sequences of 64 tokens, not 2; lower --seqlen"):
        quantkit.quantize(source, output=tmp_path / "out", allow_short=True, **short)


def test_a_tokenizer_of_another_model_is_refused(source, tmp_path):
    save_tiny("llama", tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    tokenizer = tmp_path / "source" / "tokenizer.json"
    table = json.loads(tokenizer.read_text())
    table["model"]["vocab"]["e"] = 5000
    tokenizer.write_text(json.dumps(table))
    with pytest.raises(DataError, match="the tokenizer gives token 5000 but the model's vocabulary ends at 127"):
        quantkit.quantize(tmp_path / "source", output=tmp_path / "out", **FEW)


def test_a_damaged_weight_is_found_before_anything_is_written(tmp_path):
    save_tiny("llama", tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "source", lambda tensors: tensors | {name: tensors[name] / 0})
    with pytest.raises(ModelError, match=f"{name} in .* has 8192 values that are NaN or infinite"):
        quantkit.quantize(tmp_path / "source", output=tmp_path / "out", **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_too_small_is_refused_before_the_text_is_read(source, tmp_path, monkeypatch):
    usage = writer.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"needs .* GB but .* has 0\.00 GB free"):
        quantkit.quantize(source, output=tmp_path / "out", **(FEW | {"calibration": "missing.txt"}))


def ambient():
    return {
        "torch": torch.random.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "directory": Path.cwd(),
    }


@pytest.mark.parametrize(("method", "options"), [("rtn", {}), ("omniquant", {"updates": 1})])
def test_a_run_changes_nothing_around_it(source, tmp_path, method, options):
    before = ambient()
    quantkit.quantize(source, output=tmp_path / "out", **(FEW | {"method": method, "options": options}))
    assert ambient() == before


class Diary(Silent):
    """Notes what happens."""

    def __init__(self):
        self.stages, self.plans, self.blocks, self.shares = [], [], [], []

    def stage(self, name):
        self.stages.append(name)

    def planned(self, plan):
        self.plans.append((len(self.stages), plan.blocks))

    def block(self, report):
        self.blocks.append(report.index)

    def progress(self, done, total):
        self.shares.append(done / total)


def test_progress_is_told_in_order(source, tmp_path):
    diary = Diary()
    quantkit.quantize(source, output=tmp_path / "out", progress=diary, **FEW)
    assert diary.plans == [(0, 2)]
    assert diary.stages == ["reading text", "opening weights", "verifying weights", "calibrating", "writing"]
    assert diary.blocks == [0, 1]
    assert diary.shares == sorted(diary.shares)
    assert diary.shares[-1] == 1
