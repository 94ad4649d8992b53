/* The few calls that PyTorch makes to the driver itself, libcuda.so.1. */
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "the card is not there"; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
