// CUDA launcher of mlm_mask: BERT's 80/10/10 masking from Philox4x32-10.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace apt::cuda {

constexpr int kMaxSpecialRuns = 256;  // they travel as kernel arguments, of 4 KB in all

// Runs of consecutive special ids, ascending and apart: first[r], ..., first[r] + size[r] - 1.
struct SpecialRuns {
  int count;
  int first[kMaxSpecialRuns];
  int size[kMaxSpecialRuns];
};

// A mask of integers of 1, 4 or 8 bytes; null for none.
struct IntegerMask {
  const void* data;
  int bytes;
};

// Tensors are (rows, length), contiguous; length is below 2^31. Ids have 4 or 8 bytes, in and out.
struct MlmMask {
  int64_t rows, length;
  int id_bytes;
  const void* input_ids;
  IntegerMask attention_mask, special_tokens_mask;
  const int64_t* sample_ids;  // (rows) or null: the number of the row
  const int64_t* word_ids;    // (rows, length) or null
  SpecialRuns special_runs;
  int mask_token_id;
  uint32_t word_count;                             // ids that random words are drawn from
  int64_t chosen_below, mask_below, random_below;  // thresholds in [0, 2^32]
  uint32_t seed_low, seed_high, step;
  bool at_least_one;
  void *masked_ids, *labels;
  bool* mask_positions;
};

cudaError_t mlm_mask_fwd(const MlmMask& arguments, cudaStream_t stream);

}  // namespace apt::cuda
