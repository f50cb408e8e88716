"""llama.cpp's side of benchmarks/model/generation.py: a process of another environment, which has turns as others do.

    python -m venv PEERS
    CMAKE_ARGS="-DGGML_NATIVE=ON" PEERS/bin/pip install llama-cpp-python gguf safetensors
    python -m benchmarks.model.generation --llama-cpp PEERS/bin/python

gguf_file.py and server.py run there: they import neither torch nor this package. client.py speaks with them.
"""
