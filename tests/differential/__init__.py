"""Random modules, quantized and called at other sizes than traced: what they give is the model's, or they refuse."""
