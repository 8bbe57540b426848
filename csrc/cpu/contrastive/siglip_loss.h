#pragma once
#include "common/isa.h"
#include "contrastive/similarity.h"

namespace apt {

// The sigmoid loss of all pairs, a sum for each row. Scalars of a row are float, or double where
// the similarity is wide; all arrays are contiguous.
struct SigLIP {
  Similarity similarity;
  double logit_bias;
  bool need_slopes;

  // fwd. slopes, bias_slopes: d loss / d scale and / d logit_bias.
  void *losses, *right;          // [rows]
  double *slopes, *bias_slopes;  // [rows]
  // Null, or what earlier calls found of other keys and what is found with them: (the largest d
  // but the positive's, the positive's; loss, slope and bias slope without the positive's) of rows.
  const double* before;
  double* after;

  // bwd: pair (i, j) counts grad_losses[i] + grad_column_losses[j] times; each may be null.
  const void *grad_losses, *grad_column_losses;
  void *grad_rows, *grad_columns;  // contiguous, of their rows' dtype; null: not wanted
};

}  // namespace apt

APT_DECLARE_KERNEL(void, siglip_loss_fwd, const apt::SigLIP&)
APT_DECLARE_KERNEL(void, siglip_loss_bwd, const apt::SigLIP&)
