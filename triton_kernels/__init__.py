"""Triton kernels of nrt-fast, one file per op; they import torch and triton only."""

# Triton's own package has this name too, and vLLM imports it: never let a repository root on sys.path stand in for it.
if __name__ != "nrt_fast.triton_kernels":
    raise ImportError("these kernels are imported as nrt_fast.triton_kernels")
