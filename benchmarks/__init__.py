"""Benchmarks of anode_fast: `python -m benchmarks` lists them."""
