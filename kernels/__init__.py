"""Native solves, installed as `anode_fast.kernels`: `gpu` in Triton, `cpu` in C++.

Kernels get tensors, pointers and constants. They import nothing of anode_fast and no torch.nn, so
the folder could be lifted into another project as it is.
"""
