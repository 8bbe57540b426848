#pragma once
#include "common/isa.h"
#include "contrastive/similarity.h"

namespace apt {

// Softmax over the similarities of each row, and of each column where `symmetric`. A triangle
// (NT-Xent) has one softmax a row, of all its columns, and results only for its rows.
// Scalars of a row are float, or double where the similarity is wide; all arrays are contiguous.
struct InfoNCE {
  Similarity similarity;
  bool symmetric, need_slopes;
  Rows own;  // if count > 0: the positive of row i is row i of these, and no column

  // fwd. slope: d loss / d scale. stats: (lse / scale, share of the classes but the positive).
  void *losses, *right;              // [rows]
  double* slopes;                    // [rows]
  double *row_stats, *column_stats;  // [rows, 2]; [columns, 2] if symmetric
  // Null, or what earlier calls found of other classes and what is found with them: (max d, sum,
  // weighted sum, the positive's d) of rows and, where symmetric, of columns after them. Results
  // are of rows alone then.
  const double* before;
  double* after;

  // bwd: upstream gradients of the losses of rows and of columns, each null if there is none.
  const void *grad_losses, *grad_column_losses;
  void *grad_rows, *grad_columns, *grad_own;  // contiguous, of their rows' dtype; null: not wanted
};

}  // namespace apt

APT_DECLARE_KERNEL(void, info_nce_fwd, const apt::InfoNCE&)
APT_DECLARE_KERNEL(void, info_nce_bwd, const apt::InfoNCE&)
