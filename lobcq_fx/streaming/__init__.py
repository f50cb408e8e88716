"""A folder of float weights quantized weight by weight: the model is never in memory as a whole."""
