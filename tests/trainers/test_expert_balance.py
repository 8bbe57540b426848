"""Mixtures of experts train with the loss that keeps their experts evenly used."""

import copy

import pytest
import torch
import transformers

from apt_model.rl import RewardModelTrainer, create_dpo_trainer, create_reward_model
from support.tiny_models import VOCABULARY, random_pairs

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
KINDS = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
    "GraniteMoe": dict(num_local_experts=4, num_experts_per_tok=2),
}


def make(kind="Mixtral", head="ForCausalLM", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind], **options)
    return getattr(transformers, kind + head)(config)


def router_gradients(model):
    return torch.cat(
        [
            p.grad.flatten()
            for n, p in model.named_parameters()
            if "gate.weight" in n or "router" in n
        ]
    )


def batch_of(**more):
    return {**random_pairs(), **more}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [False, True])
def test_the_balancing_loss_is_in_the_loss(kind, asked):
    gradients, losses = [], []
    for coefficient in (0.0, 0.5, 100.0):
        options = dict(router_aux_loss_coef=coefficient, output_router_logits=asked)
        model = make(kind, **options)
        trainer = create_dpo_trainer(model)
        loss, metrics = trainer.compute_dpo_loss(**batch_of())
        loss.backward()
        gradients.append(router_gradients(model))
        losses.append(loss.item())
        assert model.config.output_router_logits == asked
        assert ("balance_loss" in metrics) == (coefficient > 0)
    batch = trainer._batch(**batch_of())
    ids, mask, _ = batch.sequences()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_router_logits=True).aux_loss.item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, rel=1e-5)
    assert losses[2] - losses[0] == pytest.approx(100 * expected, rel=1e-5)
    # its gradient is linear in the coefficient
    slope = (gradients[2] - gradients[0]) / 100
    torch.testing.assert_close(gradients[1] - gradients[0], 0.5 * slope, rtol=1e-3, atol=1e-6)
    assert slope.abs().max() > 1e-4


def test_steps_metrics_and_the_option():
    trainer = create_dpo_trainer(make(router_aux_loss_coef=0.1), gradient_accumulation_steps=2)
    metrics = trainer.train_step(**batch_of())
    assert metrics["balance_loss"] > 0
    assert metrics["loss"] == pytest.approx(metrics["balance_loss"] + 0.6931, abs=1e-3)
    assert "balance_loss" not in trainer.eval_step(**batch_of())
    off = create_dpo_trainer(make(router_aux_loss_coef=0.1), router_aux_loss_coef=0.0)
    assert "balance_loss" not in off.train_step(**batch_of())
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected a mixture"):
        from support.tiny_models import tiny_llama

        create_dpo_trainer(tiny_llama(), router_aux_loss_coef=0.1)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_reward_models_balance_their_experts_too(kind):
    pairs = {k: v for k, v in random_pairs().items() if k != "prompt_lengths"}
    found = []
    for coefficient in (0.0, 0.3):
        base = make(kind, "Model", router_aux_loss_coef=coefficient)
        classifier = make(
            kind, "ForSequenceClassification", router_aux_loss_coef=coefficient, num_labels=1
        )
        classifier.model.load_state_dict(base.state_dict())
        torch.manual_seed(1)
        head = create_reward_model(copy.deepcopy(base), 16)
        for model in (head, classifier):
            found.append(RewardModelTrainer(model).train_step(**pairs))
    for plain, balanced in (found[0::2], found[1::2]):
        assert balanced["loss"] == pytest.approx(plain["loss"] + balanced["balance_loss"], abs=1e-6)
    assert found[2]["balance_loss"] > 0
    assert found[2]["balance_loss"] == pytest.approx(found[3]["balance_loss"])
