"""nt_xent in Triton: each pair of views multiplied once forward; one coefficient for both back."""

import torch

from apt_kernels.triton.contrastive.info_nce import softmax_results, state_of
from apt_kernels.triton.contrastive.similarity import side
from apt_kernels.triton.contrastive.similarity_gradient import gradient
from apt_kernels.triton.contrastive.similarity_softmax import softmax_statistics


def nt_xent_fwd(z1, z2, temperature_tensor, temperature, normalize, need_slopes, before=None):
    """(losses (2N,), right (2N,), slopes (2N,)|(0,), stats (2N,4), after), as `info_nce_fwd`."""
    views = side(torch.cat([z1, z2]), normalize)
    running, positive, _, _ = softmax_statistics(
        views, views, temperature_tensor, temperature, label_offset=z1.shape[0], self_offset=0,
        triangle=True, slopes=need_slopes, before=before,
    )  # fmt: skip
    results = softmax_results(running, positive, temperature_tensor, temperature, need_slopes)
    return *results, state_of(before, running, positive)


def nt_xent_bwd(
    grad_losses, z1, z2, temperature_tensor, temperature, normalize, stats, unrounded=False
):
    """grad (2N,D), the rows of z1 first."""
    views = side(torch.cat([z1, z2]), normalize)
    return gradient(
        views, views, grad_losses, stats, grad_losses, stats, temperature_tensor, temperature,
        label_offset=z1.shape[0], self_offset=0, triangle=True, unrounded=unrounded,
    )  # fmt: skip
