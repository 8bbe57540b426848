"""Reinforcement learning from preferences and rewards."""

from .dpo_trainer import DPOConfig, DPOTrainer, create_dpo_trainer
from .grpo_trainer import GRPOConfig, GRPOTrainer, create_grpo_trainer
from .reward_model import RewardModel, RewardModelTrainer, create_reward_model
from .rlhf_trainer import RLHFConfig, RLHFTrainer, create_rlhf_trainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "RLHFConfig",
    "RLHFTrainer",
    "RewardModel",
    "RewardModelTrainer",
    "create_dpo_trainer",
    "create_grpo_trainer",
    "create_reward_model",
    "create_rlhf_trainer",
]
