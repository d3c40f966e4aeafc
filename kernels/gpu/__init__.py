"""Triton kernels and their launchers. The only place that imports Triton."""
