// What the .cu files ask of CUDA's runtime: checked calls, a device guard, a checked launch.
#pragma once
#ifndef SLICEFINE_ON_HOST  // tests/ops/cuda_on_host.h comes first there and runs the kernels on the host
#include <cuda_runtime.h>
// Storage of one block; a macro because the test's stand-in fills it with NaN before every block.
#define SLICEFINE_SHARED(type, name) __shared__ type name
static_assert(CUDART_VERSION >= 12010, "slice_adamw passes 32 KB of kernel parameters, which needs CUDA 12.1 or newer");
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace slicefine::cuda {

inline void check(cudaError_t code, const char* op, const char* call) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + call + " failed: " + cudaGetErrorString(code));
}

// Makes a device current and puts the former one back.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&before_), op, "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), op, "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);  // a destructor cannot raise; the next call would report it
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename... Parameters>
void launch_kernel(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                   const std::decay_t<Parameters>&... arguments) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": " + std::to_string(blocks) + " blocks; one launch holds 2^31 - 1");
#ifdef SLICEFINE_ON_HOST
  (void)stream;
  run_on_host(int(blocks), threads, [&] { kernel(arguments...); });
#else
  kernel<<<unsigned(blocks), unsigned(threads), 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
  check(cudaGetLastError(), op, "kernel launch");
}

}  // namespace slicefine::cuda
