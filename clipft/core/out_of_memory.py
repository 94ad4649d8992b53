"""Recognizes the many ways in which a device or the system refuses memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clipft.core.errors import MemoryShortage

_REFUSALS = re.compile(
    "|".join(
        (
            # The allocators of CUDA, HIP and MPS, the drivers, and NCCL's "Cuda failure 2 'out of
            # memory'". "Out of shared memory" is another error, which a smaller batch does not fix
            "out of memory",
            # cuBLAS, cuDNN and hipBLAS, which allocate their handles and workspaces themselves
            "STATUS_ALLOC_FAILED",
            "rocblas_status_memory_error",
            "miopenStatusAllocFailed",
            # NCCL
            "failed to CUDA (host alloc|malloc|calloc)",
            # torch's CPU allocator and oneDNN
            "can't allocate memory",
            "not enough memory",
            "could not create a primitive",
        )
    ),
    re.IGNORECASE,
)


def memory_ran_out(error: BaseException) -> bool:
    """Return True if the device or the system refused memory.

    torch raises ``OutOfMemoryError`` for its own allocators only. If a library that torch calls
    cannot allocate, the error is a ``RuntimeError``, ``AcceleratorError`` or ``DistBackendError``,
    and only its text contains the reason.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_REFUSALS.search(str(error)))


@contextmanager
def no_second_attempt(where: str, hint: str) -> Iterator[None]:
    """End the run if memory runs out within the block, which cannot be repeated in smaller pieces.

    ``where`` completes the message "memory ran out"; ``hint`` says what to do.

    Raises:
        MemoryShortage: this process ran out of memory; other processes do not know of it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_out(error):
            raise
        shortage = MemoryShortage(f"memory ran out{where}", hint)
        shortage.alone = True
        raise shortage from error
