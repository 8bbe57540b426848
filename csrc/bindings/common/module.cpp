// The module apt_kernels._C. Importing it registers the operators of csrc/bindings/ with PyTorch.
#include <pybind11/pybind11.h>

#include "bindings/common/large_memory.h"
#include "cpu/common/isa.h"

namespace apt {
namespace {

const char* bfloat16_products() {
  switch (pair_products()) {
    case PairProducts::tiles:
      return "by tiles of pairs (AMX)";
    case PairProducts::vectors:
      return "by vectors of pairs (AVX512-BF16)";
    default:
      return "as floats";
  }
}

}  // namespace
void define_mlm_mask_arrays(pybind11::module_& m);
}  // namespace apt

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of apt_kernels; the operators are in torch.ops.apt";
  m.def("instruction_set", &apt::isa_name, "The instruction set the CPU kernels run with.");
  m.def("bfloat16_products", &apt::bfloat16_products, "How matrices of bfloat16 are multiplied.");
  m.def("empty_cache", &apt::empty_cache, "Gives kept memory back to the system; its bytes.");
  apt::define_mlm_mask_arrays(m);
}
