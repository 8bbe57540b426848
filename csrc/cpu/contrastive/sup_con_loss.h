#pragma once
#include "common/isa.h"
#include "contrastive/similarity.h"

namespace apt {

// Softmax over the similarities of each row with several positives, those of its label. Scalars of
// a row are float, or double where the similarity is wide; all arrays are contiguous.
struct SupCon {
  Similarity similarity;
  bool need_slopes;
  const int64_t *labels, *column_labels;  // the same of a triangle

  // fwd. slopes: d loss / d scale. stats: (lse / scale, 1 / positives or 0).
  void *losses, *right;  // [rows]
  double* slopes;        // [rows]
  double* stats;         // [rows, 2]
  // Null, or what earlier calls found of other classes and what is found with them: (max d, sum,
  // weighted sum, best positive, best negative, sum of the positives, their number) of rows.
  const double* before;
  double* after;

  // bwd: upstream gradients of the losses of rows and, but for a triangle, of columns with stats.
  const void *grad_losses, *grad_column_losses;
  const double* column_stats;
  void* grad_rows;  // contiguous, of the rows' dtype
};

}  // namespace apt

APT_DECLARE_KERNEL(void, sup_con_loss_fwd, const apt::SupCon&)
APT_DECLARE_KERNEL(void, sup_con_loss_bwd, const apt::SupCon&)
