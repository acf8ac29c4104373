"""Fetching models from a hub on the loopback interface, always from a subprocess.

Subprocesses, because huggingface_hub reads HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer

from quantkit.errors import OutputError
from quantkit.model import hub
from quantkit.model.names import aliases

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "model_zoo" / "tiny"
LLAMA = aliases()["llama-7b"]
ASK = """
import json, sys
from quantkit.errors import QuantkitError
from quantkit.model.names import resolve
answers = []
for call in json.loads(sys.argv[1]):
    try:
        source = resolve(**call)
        answers.append({"path": str(source.path), "id": source.id, "revision": source.revision})
    except QuantkitError as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps({"answers": answers, "heavy": sorted({"torch", "transformers"} & set(sys.modules))}))
"""


@dataclass
class Reply:
    answers: list
    heavy: list
    stderr: str
    seconds: float


def ask(home, url, *calls, **extra):
    """Resolve `calls` in a fresh interpreter whose Hub is `url` and whose cache is `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and "proxy" not in name.lower()
    }
    env = kept | {"HF_HOME": str(home), "HF_ENDPOINT": url} | extra
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(calls)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return Reply(**json.loads(done.stdout.splitlines()[-1]), stderr=done.stderr, seconds=time.monotonic() - start)


def repository(directory, *names):
    """Make a repository of empty files with the names given."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The embedded model, with the clutter of a real repository around it."""
    directory = tmp_path_factory.mktemp("llama")
    shutil.copytree(TINY, directory, dirs_exist_ok=True)
    clutter = (
        "README.md",
        "pytorch_model.bin",
        "modeling.py",
        "consolidated.safetensors",
        "original/params.json",
    )
    return repository(directory, "LICENSE.txt", *clutter)


@dataclass
class Fetched:
    home: Path
    first: Reply
    asked_first: list
    second: Reply
    asked_second: list


@pytest.fixture(scope="module")
def fetched(tmp_path_factory, llama):
    """`llama-7b` fetched without weights, then with; the server is gone afterwards."""
    home = tmp_path_factory.mktemp("home")
    with HubServer({LLAMA.id: llama}, commits={LLAMA.id: LLAMA.revision}) as server:
        first = ask(home, server.url, {"model": "llama-7b", "weights": False})
        asked_first = [request.path for request in server.requests]
        second = ask(home, server.url, {"model": "LLaMA-7B"})
        asked_second = [request.path for request in server.requests][len(asked_first) :]
    return Fetched(home, first, asked_first, second, asked_second)


def test_the_resolved_commit_is_recorded(fetched):
    for reply in (fetched.first, fetched.second):
        assert reply.answers[0]["id"] == "huggyllama/llama-7b"
        assert reply.answers[0]["revision"] == LLAMA.revision


def test_the_small_files_come_first_and_without_weights(fetched):
    assert any(path.endswith("/config.json") for path in fetched.asked_first)
    assert any(path.endswith("/LICENSE.txt") for path in fetched.asked_first)
    assert not any("safetensors" in path for path in fetched.asked_first)


def test_the_weights_complete_the_same_snapshot(fetched):
    assert any(path.endswith("/model.safetensors") for path in fetched.asked_second)
    assert not any(path.endswith("/config.json") for path in fetched.asked_second)
    path = Path(fetched.second.answers[0]["path"])
    assert fetched.first.answers[0]["path"] == str(path)
    assert (path / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_code_pickles_and_duplicates_are_never_asked_for(fetched):
    asked = fetched.asked_first + fetched.asked_second
    assert not [path for path in asked if path.endswith((".bin", ".py", ".md", "params.json"))]
    assert not [path for path in asked if "consolidated" in path]


def test_nothing_is_printed_and_nothing_heavy_is_imported(fetched):
    assert fetched.first.stderr == fetched.second.stderr == ""
    assert fetched.first.heavy == []


def test_offline_the_cache_answers(fetched):
    reply = ask(fetched.home, "http://127.0.0.1:9", {"model": "llama-7b"}, HF_HUB_OFFLINE="1")
    assert reply.answers == fetched.second.answers


def test_a_pinned_commit_in_the_cache_needs_no_hub(fetched):
    reply = ask(fetched.home, "http://127.0.0.1:9", {"model": "llama-7b"})
    assert reply.answers == fetched.second.answers
    assert reply.stderr == ""


def test_offline_a_cache_without_weights_is_not_enough(tmp_path, llama):
    with HubServer({"org/model": llama}) as server:
        ask(tmp_path, server.url, {"model": "org/model", "weights": False})
        commit = server.commit("org/model")
    small, full = ask(
        tmp_path,
        server.url,
        {"model": "org/model", "weights": False},
        {"model": "org/model"},
        HF_HUB_OFFLINE="1",
    ).answers
    assert small["revision"] == commit
    assert full["error"] == "NetworkError"
    assert "HF_HUB_OFFLINE" in full["message"]


def test_a_cached_branch_serves_when_the_hub_is_gone(tmp_path, llama):
    with HubServer({"org/model": llama}) as server:
        before = ask(tmp_path, server.url, {"model": "org/model"}).answers
    after = ask(tmp_path, server.url, {"model": "org/model"})
    assert after.answers == before
    assert f"using the cached commit {before[0]['revision']}" in after.stderr
    assert after.stderr.count("\n") == 1


REFUSED = {
    "unknown": (
        {"model": "facebok/opt-125"},
        "ModelError",
        ["facebok/opt-125", "did you mean opt-125m", "HF_TOKEN"],
    ),
    "revision": ({"model": "org/good", "revision": "v9"}, "ModelError", ["org/good has no revision v9"]),
    "gated": (
        {"model": "org/gated"},
        "ModelError",
        ["accept its licence on http", "/org/gated", "hf auth login"],
    ),
    "pickle": ({"model": "org/pickle"}, "ModelError", ["pytorch_model.bin", "--revision refs/pr/N"]),
    "gguf": ({"model": "org/gguf"}, "ModelError", ["no model.safetensors, only q4.gguf"]),
    "adapter": ({"model": "org/adapter"}, "ModelError", ["no config.json"]),
    "torn": ({"model": "org/torn"}, "ModelError", ["lacks b.safetensors"]),
    "outside": ({"model": "org/outside"}, "ModelError", ["names files that are not safetensors"]),
    "invalid": ({"model": "org/a--b"}, "ModelError", ["org/a--b cannot be the name"]),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory, llama):
    root = tmp_path_factory.mktemp("repositories")
    repositories = {
        "org/good": llama,
        "org/gated": llama,
        "org/pickle": repository(root / "pickle", "config.json", "pytorch_model.bin", "consolidated.safetensors"),
        "org/gguf": repository(root / "gguf", "config.json", "q4.gguf"),
        "org/adapter": repository(root / "adapter", "adapter_config.json", "adapter_model.safetensors"),
        "org/torn": repository(root / "torn", "config.json", "a.safetensors"),
        "org/outside": repository(root / "outside", "config.json", "a.bin"),
    }
    for name, shards in {"torn": ["a.safetensors", "b.safetensors"], "outside": ["../a.safetensors"]}.items():
        index = {"weight_map": {str(position): shard for position, shard in enumerate(shards)}}
        (root / name / "model.safetensors.index.json").write_text(json.dumps(index))
    with HubServer(repositories, gated=["org/gated"]) as server:
        reply = ask(tmp_path_factory.mktemp("home"), server.url, *(call for call, _, _ in REFUSED.values()))
        assert not server.asked_for(".bin")
    return dict(zip(REFUSED, reply.answers, strict=True)) | {"stderr": reply.stderr}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_that_says_what_to_do(refused, case):
    _, kind, parts = REFUSED[case]
    answer = refused[case]
    assert answer["error"] == kind
    assert "\n" not in answer["message"]
    for part in parts:
        assert part in answer["message"]


def test_refusals_print_nothing_by_themselves(refused):
    assert refused["stderr"] == ""


def test_the_token_opens_a_gated_model(tmp_path, llama):
    with HubServer({"org/gated": llama}, gated=["org/gated"]) as server:
        wrong = ask(tmp_path, server.url, {"model": "org/gated"}, HF_TOKEN="hf_wrong")
        right = ask(tmp_path, server.url, {"model": "org/gated"}, HF_TOKEN=server.token)
        sent = {request.authorization for request in server.asked_for("model.safetensors")}
    assert "is gated" in wrong.answers[0]["message"]
    assert right.answers[0]["revision"] == server.commit("org/gated")
    assert sent == {f"Bearer {server.token}"}


def test_only_the_shards_of_the_index_from_a_branch(tmp_path):
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    directory = repository(
        tmp_path / "sharded", "config.json", "model.safetensors", "consolidated.safetensors", *shards
    )
    index = {"weight_map": {"first": shards[0], "second": shards[1], "third": shards[1]}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with HubServer({"org/sharded": directory}, branches=["refs/pr/1"]) as server:
        (answer,) = ask(tmp_path, server.url, {"model": "org/sharded", "revision": "refs/pr/1"}).answers
    assert answer["revision"] == server.commit("org/sharded")
    assert sorted(path.name for path in Path(answer["path"]).glob("*.safetensors")) == sorted(shards)


def test_without_a_hub_the_failure_is_quick_and_names_the_ways_out(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reply = ask(tmp_path, f"http://127.0.0.1:{port}", {"model": "llama-7b"}, {"model": "gpt2", "revision": "main"})
    for answer in reply.answers:
        assert answer["error"] == "NetworkError"
        assert "check the connection, set HF_ENDPOINT to a mirror, or pass a local directory" in answer["message"]
        assert "\n" not in answer["message"]
    assert reply.stderr == ""
    assert reply.seconds < 15


def test_a_hub_that_never_answers_is_given_up_on(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        reply = ask(tmp_path, url, {"model": "llama-7b"}, HF_HUB_ETAG_TIMEOUT="1")
    assert reply.answers[0]["error"] == "NetworkError"
    assert "no answer within" in reply.answers[0]["message"]
    assert reply.seconds < 15


@pytest.mark.parametrize(("status", "kind"), [(403, "ModelError"), (503, "NetworkError")])
def test_a_hub_that_refuses_everything(tmp_path, llama, status, kind):
    with HubServer({LLAMA.id: llama}) as server:
        server.status = status
        reply = ask(tmp_path, server.url, {"model": "llama-7b"})
    assert reply.answers[0]["error"] == kind
    assert str(status) in reply.answers[0]["message"]
    assert reply.seconds < 15


def test_offline_and_not_cached(tmp_path):
    reply = ask(tmp_path, "http://127.0.0.1:9", {"model": "llama-7b"}, HF_HUB_OFFLINE="1")
    assert reply.answers[0]["error"] == "NetworkError"
    assert "unset HF_HUB_OFFLINE, or pass a local directory" in reply.answers[0]["message"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "read-only"),
        RuntimeError("No space left on device"),
    ],
)
def test_a_cache_that_cannot_be_written_is_an_output_error(error):
    with pytest.raises(OutputError, match="set HF_HOME to a"), hub._one_line_errors("org/model", "main"):
        raise error
