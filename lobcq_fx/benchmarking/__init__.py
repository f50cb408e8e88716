"""Honest timings: contenders that take turns in one run, results checked before anything is timed."""
