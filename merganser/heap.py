"""Memory that malloc keeps for later: when it goes back to the system. Told to glibc; with any other library, nothing."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def freed_goes_back(size: int, heap: int) -> None:
    """Have freed memory go back to the system in pieces of ``size`` bytes, smaller ones where ``heap`` bytes are free.

    Large matrices had better go at once, not into the heaps of the threads: half the memory. Cuts of tensors had not, nor
    the small matrices of adapters or of a small model, since fetching them again page by page costs a tenth of a merge.
    Nor does an align step do much with any of them beside its decompositions: there all but the smallest go.
    """
    with contextlib.suppress(OSError, AttributeError):
        tell = ctypes.CDLL(None).mallopt
        tell(M_MMAP_THRESHOLD, size)
        tell(M_TRIM_THRESHOLD, heap)


def give_back() -> None:
    """Give what lies free between what is used back to the system, in the heaps of all threads.

    Of matrices too small to go back one by one, holes stay in every thread's heap: a quarter of a merge's memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
