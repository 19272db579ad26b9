"""C++ kernels that speed up sampling on CPUs."""
