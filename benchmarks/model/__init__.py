"""A whole model that generates on a CPU."""
