"""Measurements, one folder each; `python -m benchmarks.FOLDER.NAME` from the root runs one."""
