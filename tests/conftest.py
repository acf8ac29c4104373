"""What all tests share; its place puts `families` and the other helpers beside it on the import path."""

import torch

torch.set_num_threads(1)
