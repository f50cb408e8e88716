"""Settings for every test."""

import torch

# Test tensors are tiny: a second thread costs more than it brings, above all where cores are shared.
torch.set_num_threads(1)
