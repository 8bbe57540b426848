"""Rewards in every form a reward model may return them, and classifiers of transformers."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from apt_model.rl import RewardModelTrainer
from apt_model.rl.reward_output import rewards_of
from support.tiny_models import VOCABULARY, random_pairs, tiny_llama
from support.trainer_checks import shifted_left

PAIRS = {k: v for k, v in random_pairs().items() if k != "prompt_lengths"}


class Scores(nn.Module):
    """One number a row, `answer`ed in a form."""

    def __init__(self, answer):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 1)
        self.answer = answer

    def forward(self, ids, mask):
        mask = torch.ones_like(ids) if mask is None else mask
        return self.answer((self.embedding(ids).squeeze(-1) * mask).sum(1))


FORMS = {
    "(B,)": lambda r: r,
    "(B, 1)": lambda r: r[:, None],
    "rewards": lambda r: {"rewards": r[:, None]},
    "logits": lambda r: {"logits": r[:, None]},
    "attributes": lambda r: SimpleNamespace(rewards=None, logits=r),
    "ModelOutput": lambda r: transformers.modeling_outputs.SequenceClassifierOutput(
        logits=r[:, None]
    ),
    "tuple": lambda r: (r[:, None], torch.zeros(3)),
    "tuple of one": lambda r: (r,),
    "list of tensors": lambda r: list(r),
    "list of tensors (1,)": lambda r: list(r[:, None]),
    "tuple of tensors": lambda r: tuple(r),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_train(form):
    expected = RewardModelTrainer(Scores(FORMS["(B,)"]), learning_rate=0.1)
    trainer = RewardModelTrainer(Scores(FORMS[form]), learning_rate=0.1)
    for _ in range(2):
        assert trainer.train_step(**PAIRS) == expected.train_step(**PAIRS)


@pytest.mark.parametrize(
    "form, message",
    [
        (lambda r: torch.stack([r, r], 1), r"one a row, 8, got \(8, 2\).*num_labels=1"),
        (lambda r: {"logits": torch.stack([r, r], 1)}, r"\(8, 2\) of dict with \['logits'\]"),
        (lambda r: r[:3], r"one a row, 8, got \(3,\)"),
        (lambda r: r.sum(), r"one a row, 8, got \(\)"),
        (lambda r: {"scores": r}, r"got dict with \['scores'\].*`rewards` or `logits`"),
        (lambda r: None, "got NoneType"),
        (lambda r: "high", "got str"),
        (lambda r: [], "got list"),
        (lambda r: r.tolist(), "have no gradient"),
        (lambda r: r.detach(), "have no gradient"),
    ],
)
def test_forms_that_say_what_to_return(form, message):
    model = Scores(form)
    before = model.embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=f"(?s)the reward model's rewards.*{message}"):
        RewardModelTrainer(model).train_step(**PAIRS)
    assert torch.equal(before, model.embedding.weight)


def test_one_row_and_numbers():
    assert rewards_of((torch.ones(1, 1), torch.zeros(1, 4, 8)), 1).tolist() == [1]
    assert rewards_of([2], 1).tolist() == [2] and rewards_of((1, 2.5), 2).tolist() == [1, 2.5]
    assert rewards_of(torch.tensor([1, 2]), 2).dtype == torch.float32
    assert rewards_of(torch.ones(2).double(), 2).dtype == torch.float64


def classifier(kind="Llama", **options):
    torch.manual_seed(0)
    config = tiny_llama().config.to_dict() if kind == "Llama" else dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, n_embd=16, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**config, "num_labels": 1, **options})
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert"])
@pytest.mark.parametrize("padding", [0, 60])
def test_classifiers_of_transformers_score_the_last_real_token(kind, padding):
    model = classifier(kind, pad_token_id=padding)
    trainer = RewardModelTrainer(model)
    pairs = {k: v.clone() for k, v in PAIRS.items()}
    for side in ("chosen", "rejected"):  # no real token is the padding
        ids = pairs[f"{side}_ids"]
        ids[ids == padding] = 7
    metrics = trainer.eval_step(**pairs)
    with torch.no_grad():
        alone = [
            torch.stack([
                model(row[mask.bool()][None]).logits.squeeze()
                for row, mask in zip(pairs[f"{side}_ids"], pairs[f"{side}_mask"], strict=True)
            ])
            for side in ("chosen", "rejected")
        ]  # fmt: skip
    assert metrics["chosen_reward_mean"] == pytest.approx(alone[0].mean().item(), abs=1e-9)
    assert metrics["rejected_reward_mean"] == pytest.approx(alone[1].mean().item(), abs=1e-9)
    loss = -nn.functional.logsigmoid(alone[0] - alone[1]).mean()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
    if kind == "Bert":  # it scores the first token, which on the left is padding
        return
    for side in ("chosen", "rejected"):
        ids, mask = shifted_left(pairs[f"{side}_ids"], pairs[f"{side}_mask"], extra=2)
        pairs[f"{side}_ids"], pairs[f"{side}_mask"] = ids, mask
    assert trainer.eval_step(**pairs)["loss"] == pytest.approx(loss.item(), abs=1e-9)


def test_classifiers_that_cannot_score():
    with pytest.raises(ValueError, match=r"\(8, 2\).*num_labels=1"):
        RewardModelTrainer(classifier(num_labels=2, pad_token_id=0)).train_step(**PAIRS)
    with pytest.raises(ValueError, match=r"config\.pad_token_id: expected an id"):
        RewardModelTrainer(classifier()).train_step(**PAIRS)
