"""The head whose output contrastive losses compare (Chen et al. 2020)."""

from __future__ import annotations

from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Linear, BatchNorm1d, ReLU, Linear, as `.net`.

    Args:
        input_dim: width of the encoder's output.
        hidden_dim: None: one linear layer, as MoCo v1 has it.
        output_dim: width of the embeddings.
        batch_norm: False: without BatchNorm1d, as MoCo v2 has it.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | None = 2048,
        output_dim: int = 128,
        *,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if hidden_dim is None:
            self.net = nn.Sequential(nn.Linear(input_dim, output_dim))
        else:
            norm = [nn.BatchNorm1d(hidden_dim)] if batch_norm else []
            self.net = nn.Sequential(
                nn.Linear(input_dim, hidden_dim),
                *norm,
                nn.ReLU(),
                nn.Linear(hidden_dim, output_dim),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(B, output_dim)` of `(B, input_dim)`."""
        return self.net(x)


def has_batch_norm(module: nn.Module) -> bool:
    """Returns whether a row's output depends on the other rows of the batch in training."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
