"""Libraries that plug in: Hugging Face transformers, its exporters and its quantization methods."""
