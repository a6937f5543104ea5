// As much of libcuda as launches need, without a GPU: it hands each on to the tests.
extern "C" {

int (*on_launch)(void* function, const unsigned* sizes, void* stream, void** parameters) = nullptr;
int (*on_order)(const char* what, void* stream, void* event) = nullptr;

struct Config {  // CUlaunchConfig
  unsigned sizes[7];
  void *stream, *attributes;
  unsigned count;
};

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void**) {
  const unsigned sizes[] = {x, y, z, bx, by, bz, shared, 0};
  return on_launch(function, sizes, stream, parameters);
}

int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void**) {
  const unsigned* s = config->sizes;
  const unsigned sizes[] = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], config->count};
  return on_launch(function, sizes, config->stream, parameters);
}

int cuEventRecord(void* event, void* stream) { return on_order("record", stream, event); }
int cuStreamWaitEvent(void* stream, void* event, unsigned) { return on_order("wait", stream, event); }

int cuPointerGetAttribute(unsigned long long* result, int, unsigned long long pointer) { return *result = pointer, 0; }
int cuCtxGetCurrent(void** context) { return *context = context, 0; }

// What triton's module needs to be loaded.
#define UNUSED(name) \
  int name() { return 999; }
UNUSED(cuCtxGetDevice) UNUSED(cuCtxGetLimit) UNUSED(cuCtxSetCurrent) UNUSED(cuCtxSetLimit) UNUSED(cuDeviceGet)
UNUSED(cuDeviceGetAttribute) UNUSED(cuDevicePrimaryCtxRetain) UNUSED(cuDriverGetVersion) UNUSED(cuFuncGetAttribute)
UNUSED(cuFuncSetAttribute) UNUSED(cuFuncSetCacheConfig) UNUSED(cuGetErrorString) UNUSED(cuModuleGetFunction) UNUSED(cuModuleLoadData)
UNUSED(cuModuleUnload) UNUSED(cuOccupancyMaxActiveClusters) UNUSED(cuStreamIsCapturing)
UNUSED(cuTensorMapEncodeIm2col) UNUSED(cuTensorMapEncodeTiled)
}
