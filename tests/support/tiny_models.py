"""Small causal models for the tests of the trainers, of every shape a user's model may have."""

from types import SimpleNamespace

import torch
from torch import nn

VOCABULARY = 61


class TinyCausalModel(nn.Module):
    """Mixes all earlier real tokens by their mean; returns `answer(logits)`."""

    def __init__(self, vocabulary=VOCABULARY, width=16, dropout=0.0, answer=lambda logits: logits):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(width, vocabulary)
        self.answer = answer

    def forward(self, input_ids, attention_mask=None):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.to(self.embedding.weight.dtype).unsqueeze(-1)
        x = self.embedding(input_ids) * real
        mean = x.cumsum(1) / real.cumsum(1).clamp(min=1)
        hidden = torch.tanh(self.mix(torch.cat([x, mean], dim=-1)))
        return self.answer(self.lm_head(self.dropout(hidden)))


class TinyModelWithHead(TinyCausalModel):
    """The same model, with its output embedding exposed as Hugging Face models do."""

    def get_output_embeddings(self):
        return self.lm_head

    def get_input_embeddings(self):
        return self.embedding


def as_output(logits):
    return SimpleNamespace(logits=logits)


def tiny_llama(seed=0, layers=2, **options):
    """A randomly initialised Llama in float64, of weights large enough for logits that differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model


def random_pairs(pairs=4, chosen=9, rejected=7, seed=0, prompt=3):
    """Keyword arguments of a DPO step: right-padded answers of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def side(width):
        ids = torch.randint(0, VOCABULARY, (pairs, width), generator=generator)
        lengths = torch.randint(prompt + 2, width + 1, (pairs, 1), generator=generator)
        return ids, (torch.arange(width) < lengths).long()

    (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = side(chosen), side(rejected)
    return {
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "chosen_mask": chosen_mask,
        "rejected_mask": rejected_mask,
        "prompt_lengths": torch.full((pairs,), prompt),
    }


def parameters_of(module):
    """A copy of all parameters, to compare with later."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
