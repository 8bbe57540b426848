// CUDA launcher of gae: generalised advantage estimation, optionally whitened.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "apt/dtype.h"

namespace apt::cuda {

// Element (row, t) of a tensor is data[row * row_stride + t * step_stride]; null: it is absent.
struct GaeInput {
  const void* data;
  int64_t row_stride, step_stride;
};

struct Gae {
  DType dtype;                // of rewards and values
  int64_t rows, length;       // of packed sequences their number and the sum of their lengths
  const int64_t* cu_seqlens;  // (rows + 1) sequences in one row, or null; offsets outside are cut
  GaeInput rewards, values;
  GaeInput mask, terminated, truncated;     // bool, true counts
  GaeInput bootstrap;                       // float
  bool bootstrap_per_step;                  // else one a row
  float gamma, decay;                       // decay: gamma lambda, of the trace
  int64_t out_row_stride, out_step_stride;  // of the results, which are contiguous
  float *advantages, *returns;
  const bool* flat_mask;  // for whitening: the mask, laid out as the results; null: all count
  double* workspace;      // kGaeWorkspace doubles to whiten, null not to
};

constexpr int kGaeWhitenBlocks = 256;
constexpr int kGaeWorkspace = 3 * kGaeWhitenBlocks;

cudaError_t gae_fwd(const Gae& arguments, cudaStream_t stream);

}  // namespace apt::cuda
