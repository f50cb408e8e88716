"""Triton kernels for CUDA GPUs. Modules here import triton when they are imported; nothing else in the package does."""
