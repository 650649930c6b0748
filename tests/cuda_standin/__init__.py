"""A CUDA device for tests on machines without one.

`standin.cpp` gives a CPU-only torch tensors that are on `cuda:0` and computed by the CPU's kernels. Every use is a
process of its own (`process.py`), since the device must be there before torch is imported.
"""
