"""Speed comparisons: `pytest benchmarks --benchmark-only`."""
