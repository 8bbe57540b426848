"""nt_xent in Triton: each pair of views multiplied once forward; one coefficient for both back."""

import torch

from apt_kernels.triton.info_nce import softmax_results
from apt_kernels.triton.similarity import side
from apt_kernels.triton.similarity_gradient import gradient
from apt_kernels.triton.similarity_softmax import softmax_statistics


def nt_xent_fwd(z1, z2, temperatures, temperature, normalize, need_slopes):
    """(losses (2N,), right (2N,), slopes (2N,)|(0,), stats (2N,4)), float32."""
    views = side(torch.cat([z1, z2]), normalize)
    running, positive, _, _ = softmax_statistics(
        views, views, temperatures, temperature, label_offset=z1.shape[0], self_offset=0,
        triangle=True, slopes=need_slopes,
    )  # fmt: skip
    return softmax_results(running, positive, temperatures, temperature, need_slopes)


def nt_xent_bwd(grad_losses, z1, z2, temperatures, temperature, normalize, stats):
    """grad (2N,D), the rows of z1 first."""
    views = side(torch.cat([z1, z2]), normalize)
    return gradient(
        views, views, grad_losses, stats, grad_losses, stats, temperatures, temperature,
        label_offset=z1.shape[0], self_offset=0, triangle=True,
    )  # fmt: skip
