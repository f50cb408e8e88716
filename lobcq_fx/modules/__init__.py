"""Modules that hold what is stored: packed weights."""
