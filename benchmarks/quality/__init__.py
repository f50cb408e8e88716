"""What quantization costs in quality: error, similarity, perplexity."""
