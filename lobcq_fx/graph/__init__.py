"""Read and edit FX graphs: attributes, aliasing, matmuls, norms, and views of the ops that this package emits."""
