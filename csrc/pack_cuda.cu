// pack_gather on a GPU: every array of a packed batch in one launch, so that packing costs no launch per array. Built
// with NRT_FAST_EXT=cuda.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "pack_gather_torch.h"

namespace {

using nrt_fast::GatherInput;
using nrt_fast::GatherOutput;

constexpr int THREADS = 256;

__global__ void pack_gather_kernel(GatherInput input, GatherOutput output) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (element < gather_size(input) && !gather_element(input, output, element)) {
    __trap();  // as torch's own indexing: an index out of range is a programmer's error and ends the context
  }
}

void launch_pack_gather(const GatherInput& input, const GatherOutput& output, const nrt_fast::Tensor& on_device) {
  const int64_t num_blocks = (gather_size(input) + THREADS - 1) / THREADS;
  if (num_blocks == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(on_device.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on_device.get_device_index(), &stream));
  pack_gather_kernel<<<num_blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(input, output);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("pack_gather: ") + cudaGetErrorString(error));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CUDA, library) {
  library.impl("pack_gather", TORCH_BOX(&nrt_fast::pack_gather_on<launch_pack_gather>));
}
