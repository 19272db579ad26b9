"""The C++ kernels that decode on a CPU."""
