"""The C library's heap, where a CPU's tensors are."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in blocks of up to 1 GiB; returns whether the C library can (glibc).

    Left alone it gives large blocks back at once, and a pass that asks for them again waits for every page to be mapped
    and zeroed: a seventh of a training step's time at width 512. A run asks for the same blocks in every step, so its
    peak is what it was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, MOST_BYTES))
