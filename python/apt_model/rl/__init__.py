"""Reinforcement learning from preferences and rewards."""

from .dpo_trainer import DPOConfig, DPOTrainer, create_dpo_trainer
from .reward_model import RewardModel, RewardModelTrainer, create_reward_model

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "RewardModel",
    "RewardModelTrainer",
    "create_dpo_trainer",
    "create_reward_model",
]
