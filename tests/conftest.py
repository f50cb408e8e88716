"""Settings for every test."""

import os

# Before anything imports triton, which reads it when kernels are defined. "0" runs their tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

# Test tensors are tiny: a second thread costs more than it brings, above all where cores are shared.
torch.set_num_threads(1)
