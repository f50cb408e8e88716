"""Libraries that plug in: Hugging Face transformers."""
