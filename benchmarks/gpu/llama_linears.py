"""The linears of Llama-3-8B and 70B."""

LINEARS = {
    "8B q, k, v": (6144, 4096),
    "8B output": (4096, 4096),
    "8B gate, up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B q, k, v": (10240, 8192),
    "70B output": (8192, 8192),
    "70B gate, up": (57344, 8192),
    "70B down": (8192, 28672),
}
"""N x K, siblings merged."""
