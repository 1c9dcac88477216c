"""One file per claim in the README. Each prints its result as a ratio in one run and keeps it in benchmarks/results."""
