#include "common/parallel.h"

#include <ATen/Parallel.h>

namespace apt {

void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, size, grain, body);
}

int max_threads() { return at::get_num_threads(); }

}  // namespace apt
