"""Which error texts mean that memory ran out. All were seen in the wild."""

import pytest
import torch
import torch.distributed as dist

from clipft.core.errors import MemoryShortage, ProcessError
from clipft.core.out_of_memory import memory_ran_out, no_second_attempt
from clipft.distributed.collectives import lost_process_errors

_NOTE = (
    "CUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
_NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled cuda "
    "error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
ACCELERATOR: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)

REFUSALS = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    (torch.OutOfMemoryError, "HIP out of memory. Tried to allocate 432.00 MiB."),
    (MemoryError, ""),
    (ACCELERATOR, f"CUDA error: out of memory\n{_NOTE}"),
    (ACCELERATOR, "HIP error: out of memory\nFor debugging consider AMD_SERIALIZE_KERNEL=3"),
    (RuntimeError, f"CUDA error: out of memory\n{_NOTE}"),
    (RuntimeError, "CUDA driver error: out of memory"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (RuntimeError, "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    (RuntimeError, "MPS backend out of memory (MPS allocated: 5.05 GB, max allowed: 18.13 GB)."),
    (RuntimeError, "miopenStatusAllocFailed"),
    (dist.DistBackendError, f"{_NCCL}Failed to CUDA calloc 6291456 bytes"),
    (dist.DistBackendError, f"{_NCCL}Failed to CUDA calloc async 1920 bytes"),
    (dist.DistBackendError, f"{_NCCL}Cuda failure 2 'out of memory'"),
    (dist.DistBackendError, f"{_NCCL}Cuda failure 'out of memory'"),
    (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1152921504606846976 bytes. Error code 12 (Cannot allocate memory)",
    ),
    (RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    (RuntimeError, "could not create a primitive descriptor for a matmul primitive"),
]
OTHER_FAULTS = [
    (ACCELERATOR, f"CUDA error: an illegal memory access was encountered\n{_NOTE}"),
    (ACCELERATOR, f"CUDA error: device-side assert triggered\n{_NOTE}"),
    (ACCELERATOR, "CUDA error: misaligned address"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    (
        RuntimeError,
        "DataLoader worker (pid 46794) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory "
        "limit.",
    ),
    (RuntimeError, "unable to write to file </torch_10293>: No space left on device (28)"),
    (dist.DistBackendError, f"{_NCCL}Cuda failure 1 'invalid argument'"),
    (dist.DistBackendError, "[Rank 1] Work WorkNCCL(SeqNum=7) timed out in blocking wait."),
    (ValueError, "out of memory"),
]


@pytest.mark.parametrize(("kind", "text"), REFUSALS, ids=lambda value: str(value)[:40])
def test_a_refusal_of_memory_is_recognized_wherever_it_comes_from(kind, text):
    assert memory_ran_out(kind(text))
    with pytest.raises(kind), lost_process_errors():  # this process, and not another one
        raise kind(text)
    message = "memory ran out here"
    with pytest.raises(MemoryShortage, match=message) as raised, no_second_attempt(" here", "hint"):
        raise kind(text)
    assert raised.value.alone and raised.value.exit_code == 9


@pytest.mark.parametrize(("kind", "text"), OTHER_FAULTS, ids=lambda value: str(value)[:40])
def test_other_faults_are_not_taken_for_it(kind, text):
    assert not memory_ran_out(kind(text))
    with pytest.raises(kind), no_second_attempt(" here", "buy more"):
        raise kind(text)


def test_the_error_of_torchs_cpu_allocator_is_recognized():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory_ran_out(raised.value)


def test_the_loss_of_another_process_is_still_told():
    with pytest.raises(ProcessError, match="did not answer"), lost_process_errors():
        raise dist.DistBackendError("[Rank 1] Work WorkNCCL(SeqNum=7) timed out in blocking wait.")
