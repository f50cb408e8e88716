"""Pages that show the results in benchmarks/results."""
