"""The exported model in ONNX Runtime."""
