import hashlib
import json
import os
import struct
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import ModelError
from quantkit.model import integrity
from quantkit.model.checkpoint import INDEX, SINGLE, Checkpoint, fingerprint, read_header, side_files
from quantkit.resources import data_dir

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "c": torch.arange(6, dtype=torch.int64).view(2, 3),
        "d": torch.tensor(7.0).half(),
    }


@pytest.fixture
def single(tmp_path, tensors):
    save_file(tensors, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path, tensors):
    for shard, names in zip(SHARDS, ("ab", "cd"), strict=True):
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
    write_index(tmp_path, a=SHARDS[0], b=SHARDS[0], c=SHARDS[1], d=SHARDS[1])
    return tmp_path


def write_index(directory, **placement):
    (directory / INDEX).write_text(json.dumps({"weight_map": placement}))


def refusal(directory):
    with pytest.raises(ModelError) as caught:
        Checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_are_what_was_saved(request, kind, tensors):
    checkpoint = Checkpoint(request.getfixturevalue(kind))
    assert set(checkpoint) == set(tensors)
    loaded = checkpoint.load(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert all(loaded[name].dtype == tensors[name].dtype for name in tensors)


def test_dtype_and_shape_are_known_without_loading(sharded):
    infos = Checkpoint(sharded).tensors
    assert {name: (info.dtype, info.shape, info.elements) for name, info in infos.items()} == {
        "a": ("F32", (3, 4), 12),
        "b": ("BF16", (5,), 5),
        "c": ("I64", (2, 3), 6),
        "d": ("F16", (), 1),
    }
    assert infos["c"].shard == sharded / SHARDS[1]


def test_only_floating_point_tensors_are_converted(single):
    loaded = Checkpoint(single).load(["b", "c"], torch.float32)
    assert (loaded["b"].dtype, loaded["c"].dtype) == (torch.float32, torch.int64)


def test_what_is_loaded_does_not_change_with_the_file(single, tensors):
    loaded = Checkpoint(single).load(["a"])["a"]
    (single / SINGLE).write_bytes(b"\0" * (single / SINGLE).stat().st_size)
    assert torch.equal(loaded, tensors["a"])


def test_the_index_wins_over_a_single_file(sharded):
    save_file({"other": torch.zeros(1)}, sharded / SINGLE)
    assert "other" not in Checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1], ids="{} bytes".format)
def test_a_truncated_shard(sharded, keep):
    shard = sharded / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refusal(sharded)
    assert message.startswith(f"{shard} is truncated or is no safetensors file")
    assert message.endswith("download it again")


@pytest.mark.parametrize(
    "content",
    [
        b"not a checkpoint at all",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        b"version https://git-lfs",
    ],
    ids=["text", "huge header", "list", "pointer"],
)
def test_a_garbage_header(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    assert "is truncated or is no safetensors file" in refusal(tmp_path)


def test_a_missing_shard(sharded):
    (sharded / SHARDS[0]).unlink()
    assert f"names the shard {SHARDS[0]}, which does not exist; download" in refusal(sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", ""])
def test_an_index_that_leads_out_of_the_directory(tmp_path, tensors, file):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path, directory / "sub"):
        save_file(tensors, place / "x.safetensors")
    write_index(directory, a=file)
    assert f"places a in {file!r}, outside the directory" in refusal(directory)


def test_an_index_that_names_a_tensor_its_shard_lacks(sharded):
    write_index(sharded, a=SHARDS[1])
    assert f"says that a is in {SHARDS[1]}, but it is not" in refusal(sharded)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\xff"], ids=repr
)
def test_an_index_that_is_none(sharded, content):
    (sharded / INDEX).write_bytes(content.encode("latin-1"))
    assert refusal(sharded) == f"{sharded / INDEX} is not a safetensors index; download the model again"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl", "last.ckpt"])
def test_pickles_alone_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert "pickled weights only" in refusal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_directory_without_weights(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path} holds neither {SINGLE} nor {INDEX}"


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_the_digests_are_those_of_the_files(request, kind):
    directory = request.getfixturevalue(kind)
    digests = Checkpoint(directory).verify()
    assert digests == {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in digests}
    assert sorted(digests) == sorted(path.name for path in directory.glob("*.safetensors"))


def test_a_digest_of_a_published_model_is_that_of_sha256sum(tmp_path):
    weights = data_dir("model_zoo") / "tiny" / SINGLE
    told = subprocess.run(["sha256sum", weights], capture_output=True, text=True, check=True).stdout.split()[0]
    assert Checkpoint(weights.parent).verify() == {SINGLE: told}


def test_a_digest_holds_for_tensors_of_many_parts(single, monkeypatch):
    whole = Checkpoint(single).verify()
    monkeypatch.setattr(integrity, "CHUNK", 16)
    assert Checkpoint(single).verify() == whole


def test_values_in_the_last_part_of_a_tensor_are_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "CHUNK", 16)
    save_file({"long": torch.tensor([float("inf"), *[0.0] * 20, float("nan")])}, tmp_path / SINGLE)
    with pytest.raises(ModelError, match=r"long in .* has 2 values that are NaN"):
        Checkpoint(tmp_path).verify()


def test_a_tensor_that_the_index_leaves_out_counts_for_the_digest_alone(sharded, tensors):
    save_file({"a": tensors["a"], "b": tensors["b"], "other": torch.tensor(torch.nan)}, sharded / SHARDS[0])
    digest = hashlib.sha256((sharded / SHARDS[0]).read_bytes()).hexdigest()
    assert Checkpoint(sharded).verify()[SHARDS[0]] == digest


def test_an_empty_tensor_is_verified(tmp_path):
    save_file({"none": torch.zeros(0, 3), "one": torch.ones(1)}, tmp_path / SINGLE)
    assert list(Checkpoint(tmp_path).verify()) == [SINGLE]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_a_shard_that_changes_after_its_header_was_read(single, change):
    checkpoint = Checkpoint(single)
    shard = single / SINGLE
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(ModelError, match=f"cannot read {shard}: it is (truncated|longer).*; download the model again"):
        checkpoint.verify()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_value_that_is_not_finite_is_found_and_its_tensor_named(tmp_path, value, dtype):
    bad = torch.zeros(4, 5, dtype=dtype)
    bad[2, 3] = bad[0, 0] = value
    save_file({"good": torch.ones(3), "layers.7.bad": bad}, tmp_path / SINGLE)
    with pytest.raises(ModelError, match=r"layers\.7\.bad in \S+ has 2 values that are NaN or infinite"):
        Checkpoint(tmp_path).verify()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_are_verified_too(tmp_path, dtype):
    save_file({"scale": torch.tensor([1.0, 2.0]).to(dtype)}, tmp_path / SINGLE)
    assert list(Checkpoint(tmp_path).verify()) == [SINGLE]
    save_file({"scale": torch.tensor([1.0, float("nan")]).to(dtype)}, tmp_path / SINGLE)
    with pytest.raises(ModelError, match=r"scale in \S+ has 1 values"):
        Checkpoint(tmp_path).verify()


def test_a_shard_that_vanishes_while_the_model_is_read(single):
    checkpoint = Checkpoint(single)
    (single / SINGLE).unlink()
    with pytest.raises(ModelError, match=rf"cannot read {single / SINGLE}.*download the model again"):
        checkpoint.load(["a"])


# --- side files


@pytest.fixture
def model(tmp_path):
    """A model with side files; beside it a secret of the user's."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, directory / SINGLE)
    for name in ("config.json", "tokenizer.json", "sub/inner.txt", ".hidden", "pytorch_model.bin"):
        (directory / name).write_text(name)
    (tmp_path / "secret").write_text("mine")
    return directory


def names(directory):
    return [path.name for path in side_files(directory)]


def test_side_files_are_what_is_no_weight_and_not_hidden(model):
    assert names(model) == ["config.json", "sub", "tokenizer.json"]


def test_a_fingerprint_has_every_small_file(model):
    write_index(model)
    listed = {INDEX, "config.json", "tokenizer.json", "sub/inner.txt"}
    assert fingerprint(model) == {name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in listed}


@pytest.mark.parametrize("place", ["notes.txt", "sub/notes.txt"])
@pytest.mark.parametrize("target", ["../secret", "{}/secret", "../nowhere", "..", ".", "/dev/zero"])
def test_a_link_that_leads_out_of_the_model_is_refused(model, place, target):
    (model / place).symlink_to(target.format(model.parent))
    with pytest.raises(ModelError, match=rf"{model / place} is a link to .*; put a copy in the place of the link"):
        fingerprint(model)


def test_a_link_inside_the_model_is_followed(model):
    (model / "vocab.txt").symlink_to("sub/inner.txt")
    (model / "sub" / "vocab.txt").symlink_to(model / "tokenizer.json")
    assert fingerprint(model)["vocab.txt"] == fingerprint(model)["sub/inner.txt"]
    assert fingerprint(model)["sub/vocab.txt"] == fingerprint(model)["tokenizer.json"]


def test_links_of_a_hub_cache_are_followed_to_its_blobs_alone(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    (snapshot / "templates").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("content")
    (tmp_path / "models--a--b" / "secret").write_text("mine")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "templates" / "a.jinja").symlink_to("../../../blobs/abc")
    assert names(snapshot) == ["templates", "tokenizer.json"]
    (snapshot / "vocab.txt").symlink_to("../../secret")
    with pytest.raises(ModelError, match="is a link to"):
        names(snapshot)


def test_a_model_that_is_itself_behind_a_link_is_read(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    (model / "vocab.txt").symlink_to("tokenizer.json")
    assert fingerprint(tmp_path / "link") == fingerprint(model)


def test_a_pipe_among_the_side_files_is_refused(model):
    os.mkfifo(model / "pipe")
    with pytest.raises(ModelError, match="pipe is neither a file nor a directory; remove it"):
        fingerprint(model)


def test_a_shard_may_be_a_link_to_anywhere(model, tmp_path):
    (model / SINGLE).rename(tmp_path / "elsewhere.safetensors")
    (model / SINGLE).symlink_to(tmp_path / "elsewhere.safetensors")
    assert list(Checkpoint(model).verify()) == [SINGLE]
    assert SINGLE not in names(model)


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is no regular file"):
        read_header(tmp_path / "model.safetensors")
