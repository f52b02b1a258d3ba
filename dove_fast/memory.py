"""How the process's memory is handled, for those who own the process."""

from __future__ import annotations

from dove_fast import native

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> bool:
    """Make the process keep the memory that it frees, so that large CPU tensors do not fault in new pages every time.

    glibc gives blocks of 32 MiB and more back to the kernel as soon as they are freed, which is after every layer of
    the VQGAN at 256x256 pixels, and gets them again page by page, cleared. This tells malloc (`mallopt`) not to:
    M_MMAP_MAX 0, no trimming of the heap, and M_TOP_PAD 64 MiB.

    It is for the whole process, other libraries included, from now until the process ends, and cannot be taken back:
    memory that was once used stays with the process, whose resident size then stays near its peak. What is freed is
    used again by whoever asks next; fragments can make that peak higher. Values in MALLOC_* environment variables are
    overridden, and another allocator, such as a preloaded jemalloc, is not affected. Memory on a GPU is torch's own
    matter. `dove-fast tokenize` and `reconstruct` call it when they run on a CPU; the library itself never does.

    Returns whether it took effect: False where the C library is not glibc. Calling it again changes nothing.
    Raises `BackendError` without the native module.
    """
    kept: bool = native.load().keep_freed_memory()
    return kept
