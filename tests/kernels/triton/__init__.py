"""The Triton kernels, in the interpreter where no GPU is asked for."""
