"""`quantkit quantize llama-7b`, against a server of our own that speaks the Hub's API."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import HubServer
from transformers import AutoModelForCausalLM

from quantkit.model.names import aliases
from quantkit.resources import data_dir


@pytest.mark.slow
def test_a_model_of_the_hub_is_quantized_by_its_alias(tmp_path):
    alias = aliases()["llama-7b"]
    tiny = data_dir("model_zoo") / "tiny"
    command = ["quantize", "llama-7b", "--method", "rtn", "--group-size", "32", "-o", str(tmp_path / "out"), "--json"]
    with HubServer({alias.id: tiny}, commits={alias.id: alias.revision}) as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "quantkit", *command], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    source = json.loads(done.stdout)["source"]
    assert source == {"model": "llama-7b", "id": alias.id, "revision": alias.revision}
    assert f'revision = "{alias.revision}"' in (tmp_path / "out" / "recipe.toml").read_text()
    # the cache's symbolic links became files of their own
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
