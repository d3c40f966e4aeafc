"""C++ kernels behind a plain C ABI, and the ctypes binding that loads them."""
