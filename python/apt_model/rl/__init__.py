"""Reinforcement learning from preferences and rewards."""

from .dpo_trainer import DPOConfig, DPOTrainer, create_dpo_trainer

__all__ = ["DPOConfig", "DPOTrainer", "create_dpo_trainer"]
