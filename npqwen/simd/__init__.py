"""Vector instructions for Numba kernels."""
