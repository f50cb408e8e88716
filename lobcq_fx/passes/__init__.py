"""Graph transformations, one a file: trace, normalize matmuls, insert observers, rewrite, share, eliminate."""
