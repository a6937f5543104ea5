// Launches a list of compiled kernels in one call: by itself each launch takes longer in Python than in CUDA's driver.
// The driver's functions are handed over, so nothing of CUDA is needed to compile this file.
#include <cstdint>

extern "C" {

struct Driver {
  void* context;  // of the kernels
  int (*get_context)(void** context);
  int (*set_context)(void* context);
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra);
  int (*record)(void* event, void* stream);
  int (*wait)(void* stream, void* event, unsigned flags);
};

struct Kernel {
  void* function;
  uint64_t grid[3], threads, shared;
  uint64_t is_beside;   // whether it belongs on the other stream
  uint64_t waits;       // for what, ahead of it
  uint64_t parameters;  // how many follow
};

constexpr uint64_t JOIN = 1;  // the stream waits for the other one
constexpr uint64_t FORK = 2;  // the other stream waits for the stream

struct Parameter {
  uint64_t base, offset;  // it is the sum of an address and an offset, or of bases[0] = 0 and a number's bits
};

constexpr uint64_t MOST_PARAMETERS = 256;

// `list` holds `kernels` times a Kernel and its parameters. From a fork on some may go to another stream, which joins at
// the end, whatever happens. Without an event all go to `stream`. Returns the driver's first error, or 0.
int s2o_launch(const Driver* driver, const char* list, int kernels, const uint64_t* bases, void* stream, void* other,
               void* event) {
  uint64_t values[MOST_PARAMETERS];  // of this call alone: other threads may launch the same list
  void* pointers[MOST_PARAMETERS];
  for (uint64_t i = 0; i < MOST_PARAMETERS; i++) pointers[i] = &values[i];
  void* context = nullptr;
  int joined = 0, status = driver->get_context(&context);
  if (status == 0 && context == nullptr) status = driver->set_context(driver->context);  // a new thread has none
  bool forked = false;
  for (int number = 0; number < kernels && status == 0; number++) {
    auto* kernel = reinterpret_cast<const Kernel*>(list);
    if (forked && (kernel->waits & JOIN)) {
      status = driver->record(event, other);
      if (status == 0) status = driver->wait(stream, event, 0);
      if (status != 0) break;
      forked = false;
    }
    if (event != nullptr && (kernel->waits & FORK)) {
      status = driver->record(event, stream);
      if (status == 0) status = driver->wait(other, event, 0);
      if (status != 0) break;
      forked = true;
    }
    auto* parameters = reinterpret_cast<const Parameter*>(kernel + 1);
    for (uint64_t i = 0; i < kernel->parameters; i++) values[i] = bases[parameters[i].base] + parameters[i].offset;
    const uint64_t* grid = kernel->grid;
    status = driver->launch(kernel->function, grid[0], grid[1], grid[2], kernel->threads, 1, 1, kernel->shared,
                            forked && kernel->is_beside ? other : stream, pointers, nullptr);
    list = reinterpret_cast<const char*>(parameters + kernel->parameters);
  }
  if (forked) {
    joined = driver->record(event, other);
    if (joined == 0) joined = driver->wait(stream, event, 0);
  }
  return status != 0 ? status : joined;
}
}
