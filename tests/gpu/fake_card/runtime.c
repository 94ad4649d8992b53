/* A CUDA runtime that answers for one card of sm_90 with 80 GiB, and runs nothing.

   Preloaded, it stands before libcudart. Only what PyTorch asks while tensors are described, not
   computed, is here. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <driver_types.h>

#define GIB (1UL << 30)
#define CUDA_VERSION_TOLD 13020

static int handles; /* streams and events are told apart by their address, and never used */

static void *new_handle(void) { return (void *)(size_t)(4096 + 64 * ++handles); }

cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDA_VERSION_TOLD; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDA_VERSION_TOLD; return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = 78 * GIB;
  *total = 80 * GIB;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
  memset(card, 0, sizeof *card);
  strcpy(card->name, "a card that is not there");
  card->major = 9;
  card->minor = 0;
  card->multiProcessorCount = 132;
  card->totalGlobalMem = 80 * GIB;
  card->warpSize = 32;
  card->maxThreadsPerBlock = 1024;
  card->maxThreadsPerMultiProcessor = 2048;
  card->sharedMemPerBlock = 48 << 10;
  card->sharedMemPerBlockOptin = 227 << 10;
  card->sharedMemPerMultiprocessor = 228 << 10;
  card->regsPerBlock = card->regsPerMultiprocessor = 65536;
  card->maxGridSize[0] = 2147483647;
  card->maxGridSize[1] = card->maxGridSize[2] = 65535;
  card->maxThreadsDim[0] = card->maxThreadsDim[1] = 1024;
  card->maxThreadsDim[2] = 64;
  card->textureAlignment = 512;
  card->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
/* The name of the same call in CUDA 12 */
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *card, int device) {
  return cudaGetDeviceProperties(card, device);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = new_handle();
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = new_handle();
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

/* Pinned memory is memory: copies from it have their values. Only its address is remembered. */
static struct { char *start; size_t size; } pinned[4096];
static int pinned_count;

cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) {
  if (posix_memalign(memory, 4096, size) || pinned_count == 4096) return cudaErrorMemoryAllocation;
  pinned[pinned_count].start = *memory;
  pinned[pinned_count++].size = size;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *memory) { return cudaSuccess; }
cudaError_t cudaHostRegister(void *memory, size_t size, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *memory) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  for (int i = 0; i < pinned_count; i++)
    if ((char *)pointer >= pinned[i].start && (char *)pointer < pinned[i].start + pinned[i].size)
      found->type = cudaMemoryTypeHost;
  return cudaSuccess;
}
