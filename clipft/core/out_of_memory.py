"""Recognizes the many ways in which a device or the system refuses memory."""

import re

import torch

_REFUSALS = re.compile(
    "|".join(
        (
            # The allocators of CUDA, HIP and MPS, the drivers, and NCCL's "Cuda failure 2 'out of
            # memory'". "Out of shared memory" is another fault, which smaller pieces do not mend
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
    """True if the device or the system refused memory.

    torch has a class for its own allocators only. What the libraries below it refuse arrives as
    ``RuntimeError``, ``AcceleratorError`` or ``DistBackendError``, told apart by the text alone.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_REFUSALS.search(str(error)))
