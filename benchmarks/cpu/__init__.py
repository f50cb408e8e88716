"""One linear, and one encoder, on a CPU."""
