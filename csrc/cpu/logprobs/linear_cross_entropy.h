#pragma once
#include "head/head.h"

namespace apt {

struct LinearCrossEntropy {
  LinearHead head;        // gradients are those of the loss as it is returned
  const int64_t* labels;  // [rows]
  int64_t ignore_index;
  double label_smoothing;
  bool mean;                 // else sum
  const double* normalizer;  // of the mean; null: the number of rows that count, at least 1
  double loss;               // results
  int64_t correct;
};

}  // namespace apt

// Returns the row of a label that is neither ignored nor in the vocabulary, or -1.
APT_DECLARE_KERNEL(int64_t, linear_cross_entropy_fwd, apt::LinearCrossEntropy&)
