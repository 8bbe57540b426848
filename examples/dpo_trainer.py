"""A trainer of apt_model: DPO of a Hugging Face model on pairs of token ids."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apt_model.rl import create_dpo_trainer

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
trainer = create_dpo_trainer(LlamaForCausalLM(config), beta=0.1, learning_rate=1e-3)

prompt = torch.randint(0, 100, (4, 6))
chosen = torch.cat([prompt, torch.randint(0, 50, (4, 5))], dim=1)
rejected = torch.cat([prompt, torch.randint(50, 100, (4, 5))], dim=1)
answer = (torch.arange(11) >= 6).expand(4, 11)  # True counts: the answer, not the prompt
metrics = [trainer.train_step(chosen, rejected, answer, answer) for _ in range(8)]
assert metrics[-1]["loss"] < metrics[0]["loss"]
assert metrics[-1]["reward_margin"] > 0
