"""What all tests share; its place puts `families` and the other helpers beside it on the import path."""

import os

import pytest
import torch

import quantkit

torch.set_num_threads(1)
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run on the CPU; must be set before Triton is imported


@pytest.fixture(scope="session")
def tiny_rtn_w4(tmp_path_factory):
    """The embedded model, rounded to 4 bits in groups of 32: a finished output, not to be changed."""
    output = tmp_path_factory.mktemp("shared") / "tiny-w4"
    quantkit.quantize("tiny", output=output, method="rtn", wbits=4, group_size=32)
    return output
