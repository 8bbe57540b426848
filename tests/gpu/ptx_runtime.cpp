// Stands in for the CUDA runtime in the host code of nvcc: a launch is handed to a function.
#include <cuda_runtime.h>

#include <map>
#include <string>

namespace {

using OnLaunch = int (*)(const char* kernel, const unsigned* grid_and_block, void** arguments,
                         size_t shared_bytes);
OnLaunch on_launch = nullptr;
cudaError_t error = cudaSuccess;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;

// Function-local: sources register their kernels before globals here are made.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> kernels;
  return kernels;
}

}  // namespace

extern "C" {

void set_on_launch(OnLaunch function) { on_launch = function; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  names()[host] = device;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const int status = on_launch(names()[kernel].c_str(), sizes, arguments, shared);
  if (status != 0) error = cudaErrorLaunchFailure;
  return error;
}

cudaError_t cudaGetLastError() {
  const cudaError_t last = error;
  error = cudaSuccess;
  return last;
}

}  // extern "C"
