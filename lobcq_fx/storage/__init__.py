"""Saved models: a folder of safetensors and JSON, written atomically and checked on load; nothing is unpickled."""
