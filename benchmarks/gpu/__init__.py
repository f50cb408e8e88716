"""Kernels, linears, encoders and a model on a GPU; and kernels compiled for GPUs that are not here."""
