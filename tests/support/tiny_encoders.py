"""Small encoders for the tests of the pretraining trainers."""

from types import SimpleNamespace

import torch
from torch import nn

VOCABULARY = 53
WIDTH = 16


class TinyEncoder(nn.Module):
    """Mixes every token with the mean of the real ones; returns `answer(hidden)`."""

    def __init__(self, answer=lambda hidden: hidden, dropout=0.0, width=WIDTH):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.answer = answer

    def forward(self, input_ids, attention_mask=None):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.to(self.embedding.weight.dtype).unsqueeze(-1)
        x = self.embedding(input_ids) * real
        mean = (x.sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(x)
        return self.answer(self.dropout(torch.tanh(self.mix(torch.cat([x, mean], dim=-1)))))


class ShowsEmbedding(TinyEncoder):
    """The same, with its embedding exposed as Hugging Face models do."""

    def get_input_embeddings(self):
        return self.embedding


class TakesHiddenStates(TinyEncoder):
    """Returns its hidden states only when it is asked for them."""

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        hidden = super().forward(input_ids, attention_mask)
        return SimpleNamespace(hidden_states=(None, hidden) if output_hidden_states else None)


ANSWERS = {
    "bare": lambda hidden: hidden,
    "last_hidden_state": lambda hidden: SimpleNamespace(last_hidden_state=hidden),
    "hidden_states": lambda hidden: SimpleNamespace(hidden_states=(None, hidden)),
    "dict": lambda hidden: {"last_hidden_state": hidden},
    "dict of hidden_states": lambda hidden: {"hidden_states": [hidden]},
    "tuple": lambda hidden: (hidden, None),
}


def tiny_encoder(seed=0, kind=TinyEncoder, **options):
    torch.manual_seed(seed)
    return kind(**options).double()


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}


def tiny_bert(seed=0, heads="base", **options):
    """A randomly initialised BERT in float64: its base model, or with its masked-LM head."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

    torch.manual_seed(seed)
    kinds = {"base": BertModel, "mlm": BertForMaskedLM, "pretraining": BertForPreTraining}
    config = BertConfig(**SIZES, **options)
    return kinds[heads](config).double()


def tiny_roberta(seed=0):
    """A RoBERTa in float64: it counts the tokens that are not its padding, whose id is 1."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(seed)
    return RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)).double()


def tiny_gpt2(seed=0):
    """A GPT-2 in float64: it counts all tokens unless it is told positions."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
    )
    return GPT2Model(config).double()


WITH_POSITIONS = {"BERT": tiny_bert, "RoBERTa": tiny_roberta, "GPT-2": tiny_gpt2}
READY_SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=9, cycle_momentum=False
    ),
}


def shifted_right(batch, columns, padding=0):
    """The batch of texts with `columns` of padding on their left."""
    value = {"input_ids": padding}
    return {k: nn.functional.pad(t, (columns, 0), value=value.get(k, 0)) for k, t in batch.items()}


def random_texts(rows=6, width=12, seed=0, first=5):
    """Keyword arguments of an MLM step: [CLS] a [SEP] b [SEP], padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first, VOCABULARY, (rows, width), generator=generator)
    lengths = torch.randint(width // 2 + 3, width + 1, (rows, 1), generator=generator)
    places = torch.arange(width)
    ids[:, 0] = 2
    ids[:, width // 2] = 3
    ids[places.expand_as(ids) == lengths - 1] = 3
    mask = (places < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
