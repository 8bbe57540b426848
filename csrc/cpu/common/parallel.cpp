#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace apt {

void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, size, grain, body);
}

int max_threads() { return int(torch::stable::get_num_threads()); }

}  // namespace apt
