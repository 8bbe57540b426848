// Memory of large results; see empty_large in operators.h.
#pragma once
#include <cstddef>

namespace apt {

// Gives the kept block back to the system; returns its bytes.
size_t empty_cache();

}  // namespace apt
