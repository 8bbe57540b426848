"""The options of the contrastive trainer."""

from __future__ import annotations

from dataclasses import dataclass

from ..training.config import check_flag, check_number

POOLINGS = ("mean", "first")


@dataclass
class ContrastiveConfig:
    """The options of `ContrastivePretrainer`; impossible values raise ValueError.

    SimCLR is the default. MoCo v1 is `use_momentum_encoder=True, symmetric_loss=False,
    hidden_dim=None`; MoCo v2 has `hidden_dim` and `batch_norm=False`, a temperature of 0.2.

    Attributes:
        temperature: divides the similarities; recommended 0.05-0.5.
        projection_dim: width of the embeddings that are compared.
        hidden_dim: of the projection head; None: the head is one linear layer.
        use_projection: compare projections; False: the encoder's own output.
        learning_rate: of the AdamW that is made without an optimizer.
        weight_decay: of that AdamW.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        use_momentum_encoder: MoCo: keys of a slowly following encoder, negatives from a queue.
        momentum: how much of itself that encoder keeps at a step.
        queue_size: how many keys the queue holds.
        symmetric_loss: MoCo: the mean of both directions; False: the first view asks alone.
        pooling: "mean" of the real tokens, or the "first" one.
        batch_norm: whether the projection head has a BatchNorm1d.
    """

    temperature: float = 0.07
    projection_dim: int = 128
    hidden_dim: int | None = 2048
    use_projection: bool = True
    learning_rate: float = 1e-4
    weight_decay: float = 1e-6
    max_grad_norm: float | None = 1.0
    use_momentum_encoder: bool = False
    momentum: float = 0.999
    queue_size: int = 65536
    symmetric_loss: bool = True
    pooling: str = "mean"
    batch_norm: bool = True

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError where an option cannot be."""
        check_number(self, "temperature", above=0)
        check_number(self, "learning_rate", at_least=0)
        check_number(self, "weight_decay", at_least=0)
        check_number(self, "max_grad_norm", above=0, optional=True)
        check_number(self, "momentum", at_least=0, below=1 + 1e-9)
        for name in ("use_projection", "use_momentum_encoder", "symmetric_loss", "batch_norm"):
            check_flag(self, name)
        for name in ("projection_dim", "hidden_dim", "queue_size"):
            value = getattr(self, name)
            none = name == "hidden_dim"
            if not (none and value is None) and (type(value) is not int or value < 1):
                raise ValueError(
                    f"ContrastiveConfig.{name} must be an int >= 1{' or None' if none else ''}, "
                    f"got {value!r}"
                )
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"ContrastiveConfig.pooling must be one of {POOLINGS}, got {self.pooling!r}"
            )
