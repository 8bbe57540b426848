#pragma once
#include <cstdint>

#include "common/isa.h"

namespace apt {

// A mask of integers of 1, 4 or 8 bytes, or none.
struct IntegerMask {
  const void* data;
  int bytes;
};

struct SpecialRun {
  int64_t first, count;
};

// Tensors are [rows, length], contiguous. Ids have 4 or 8 bytes, in and out.
struct MlmMask {
  int64_t rows, length;
  int id_bytes;
  const void* input_ids;
  IntegerMask attention_mask, special_tokens_mask;
  const int64_t* sample_ids;       // [rows] or null: the number of the row
  const int64_t* word_ids;         // [rows, length] or null
  const SpecialRun* special_runs;  // runs of consecutive ids, ascending and apart
  int64_t special_run_count;
  int64_t mask_token_id, word_count;  // word_count: ids that random words are drawn from
  int64_t chosen_below, mask_below, random_below;  // thresholds in [0, 2^32]
  uint64_t key;
  uint32_t step;
  bool at_least_one;
  void *masked_ids, *labels;
  bool* mask_positions;
};

}  // namespace apt

APT_DECLARE_KERNEL(void, mlm_mask_fwd, const apt::MlmMask&)
