"""Self-supervised pretraining: masked-language modelling and contrastive learning."""

from .contrastive_pretrain import (
    ContrastiveConfig,
    ContrastivePretrainer,
    create_contrastive_pretrainer,
)
from .mlm_pretrain import MLMConfig, MLMPretrainer, create_mlm_pretrainer

__all__ = [
    "ContrastiveConfig",
    "ContrastivePretrainer",
    "MLMConfig",
    "MLMPretrainer",
    "create_contrastive_pretrainer",
    "create_mlm_pretrainer",
]
