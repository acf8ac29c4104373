import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import ModelError
from quantkit.model.checkpoint import INDEX, SINGLE, Checkpoint

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


def test_finite_tensors_are_named_in_order(sharded):
    checkpoint = Checkpoint(sharded)
    assert list(checkpoint.verify_finite()) == list(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_value_that_is_not_finite_is_found_and_its_tensor_named(tmp_path, value, dtype):
    bad = torch.zeros(4, 5, dtype=dtype)
    bad[2, 3] = bad[0, 0] = value
    save_file({"good": torch.ones(3), "layers.7.bad": bad}, tmp_path / SINGLE)
    names = Checkpoint(tmp_path).verify_finite()
    with pytest.raises(ModelError, match=r"layers\.7\.bad in \S+ has 2 values that are NaN or infinite"):
        list(names)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_are_verified_too(tmp_path, dtype):
    save_file({"scale": torch.tensor([1.0, 2.0]).to(dtype)}, tmp_path / SINGLE)
    assert list(Checkpoint(tmp_path).verify_finite()) == ["scale"]
    save_file({"scale": torch.tensor([1.0, float("nan")]).to(dtype)}, tmp_path / SINGLE)
    names = Checkpoint(tmp_path).verify_finite()
    with pytest.raises(ModelError, match=r"scale in \S+ has 1 values"):
        list(names)


def test_a_shard_that_vanishes_while_the_model_is_read(single):
    checkpoint = Checkpoint(single)
    (single / SINGLE).unlink()
    with pytest.raises(ModelError, match=rf"cannot read {single / SINGLE}.*download the model again"):
        checkpoint.load(["a"])
