"""Self-supervised pretraining: masked-language modelling and contrastive learning."""

from .mlm_pretrain import MLMConfig, MLMPretrainer, create_mlm_pretrainer

__all__ = ["MLMConfig", "MLMPretrainer", "create_mlm_pretrainer"]
