"""Operators in Triton, for NVIDIA GPUs from compute capability 8.0 on; made for Hopper."""
