"""Reward models and their trainer against the papers' loss written out here."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apt_kernels import bradley_terry_loss
from apt_model.rl import GRPOTrainer, RewardModel, RewardModelTrainer, create_reward_model
from apt_model.rl.reward_model import RewardEnsemble
from apt_model.rl.reward_source import TextReward
from support.tiny_models import VOCABULARY, parameters_of, random_pairs, tiny_llama
from support.trainer_checks import assert_same_parameters, halving, shifted_left

METRICS = ["loss", "accuracy", "chosen_reward_mean", "rejected_reward_mean", "reward_margin"]
WIDTH = 16


class TinyEncoder(nn.Module):
    """Mixes real tokens by their mean; returns `answer(hidden)`."""

    def __init__(self, answer=lambda hidden: hidden, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.answer = answer

    def forward(self, input_ids, attention_mask=None):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.to(self.embedding.weight.dtype).unsqueeze(-1)
        x = self.embedding(input_ids)
        mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        return self.answer(torch.tanh(self.mix(self.dropout(torch.cat([x, mean + 0 * x], -1)))))


class AskedEncoder(TinyEncoder):
    """Returns hidden states only where it is asked for them."""

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        hidden = super().forward(input_ids, attention_mask)
        layers = (0 * hidden, hidden) if output_hidden_states else None
        return SimpleNamespace(logits=hidden, hidden_states=layers)


def encoder(kind=TinyEncoder, seed=0, **options):
    torch.manual_seed(seed)
    return kind(**options).double()


def tiny_bert(family="Bert", **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, initializer_range=0.5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return getattr(transformers, f"{family}Model")(config).double()


BASES = {
    "bare": encoder,
    "last_hidden_state": lambda: encoder(answer=lambda h: SimpleNamespace(last_hidden_state=h)),
    "dict": lambda: encoder(answer=lambda h: {"last_hidden_state": h}),
    "dict of layers": lambda: encoder(answer=lambda h: {"hidden_states": [0 * h, h]}),
    "tuple": lambda: encoder(answer=lambda h: (h, 0 * h)),
    "asked": lambda: encoder(AskedEncoder),
    "llama": lambda: tiny_llama().model,
    "llama with head": tiny_llama,
    "bert": tiny_bert,
    "roberta": lambda: tiny_bert("Roberta", pad_token_id=1),
}


def reward_model(base=None, seed=0, **options):
    base = encoder() if base is None else base
    torch.manual_seed(seed + 1)
    return create_reward_model(base, WIDTH, **{"dropout": 0.0, **options})


def pairs(**options):
    batch = random_pairs(**options)
    del batch["prompt_lengths"]
    return batch


def hidden_of(base, row):
    """The definition: the last hidden states of one sequence without padding."""
    if hasattr(base, "lm_head"):
        base = base.model
    output = base(row, output_hidden_states=True) if type(base) is AskedEncoder else base(row)
    if isinstance(output, SimpleNamespace) and hasattr(output, "hidden_states"):
        return output.hidden_states[-1][0]
    if isinstance(output, dict) and "hidden_states" in output and "last_hidden_state" not in output:
        return output["hidden_states"][-1][0]
    if isinstance(output, dict):
        return output["last_hidden_state"][0]
    if isinstance(output, tuple):
        return output[0][0]
    return (output if isinstance(output, torch.Tensor) else output.last_hidden_state)[0]


POOL = {"last": lambda h: h[-1], "mean": lambda h: h.mean(0), "max": lambda h: h.amax(0)}


def paper_rewards(model, ids, mask):
    rewards = []
    for row, real in zip(ids, mask, strict=True):
        hidden = hidden_of(model.base_model, row[real.bool()][None])
        rewards.append(model.value_head(POOL[model.use_pooling](hidden)))
    return torch.stack(rewards)


def paper_loss(model, batch, margin=0.0, center=0.0):
    chosen, rejected = (
        paper_rewards(model, batch[f"{s}_ids"], batch[f"{s}_mask"])[:, 0]
        for s in ("chosen", "rejected")
    )
    loss = -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2
    return loss.mean(), chosen, rejected


# The model


@pytest.mark.parametrize("pooling", POOL)
@pytest.mark.parametrize("name", BASES)
def test_rewards_on_both_paddings(name, pooling):
    model = reward_model(BASES[name](), use_pooling=pooling, num_layers=2)
    batch = pairs()
    ids, mask = batch["chosen_ids"], batch["chosen_mask"]
    expected = paper_rewards(model, ids, mask)
    torch.testing.assert_close(model.get_rewards(ids, mask), expected, rtol=0, atol=1e-9)
    left = model.get_rewards(*shifted_left(ids, mask, extra=3))
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-9)
    longest = ids[mask.sum(-1) == mask.sum(-1).max()][:, : mask.sum(-1).max()]
    torch.testing.assert_close(
        model.get_rewards(longest), paper_rewards(model, longest, longest >= 0), rtol=0, atol=1e-9
    )
    output = model(ids, mask, return_hidden_states=True)
    assert list(output) == ["rewards", "hidden_states"] and list(model(ids)) == ["rewards"]
    assert output["rewards"].shape == (4, 1) and output["hidden_states"].shape == (4, 9, WIDTH)


def test_the_head():
    head = RewardModel(encoder(), WIDTH, num_layers=3, dropout=0.3).value_head
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.ReLU, nn.Dropout] * 2 + [nn.Linear]
    assert head[2].p == 0.3 and head[-1].out_features == 1 and head[0].out_features == WIDTH
    model = create_reward_model(encoder(), WIDTH, use_pooling="max")
    assert (model.hidden_size, model.use_pooling, len(model.value_head)) == (WIDTH, "max", 1)
    assert RewardModel(nn.Linear(1, 1)).hidden_size == 768
    assert model.value_head[0].weight.dtype is torch.float64


def test_padding_that_is_not_a_number_does_not_reach_a_reward():
    def poisoned(hidden):
        return hidden.index_fill(1, torch.tensor([7, 8]), torch.nan)

    batch = pairs()
    ids, mask = batch["chosen_ids"], batch["chosen_mask"].clone()
    mask[:, 7:] = 0
    for pooling in POOL:
        clean = reward_model(use_pooling=pooling)
        model = reward_model(encoder(answer=poisoned), use_pooling=pooling)
        model.load_state_dict(clean.state_dict())
        rewards = model.get_rewards(ids, mask)
        torch.testing.assert_close(rewards, clean.get_rewards(ids, mask), rtol=0, atol=0)
        rewards.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.value_head.parameters())


def test_pairs_are_compared_in_one_pass():
    model, batch, calls = reward_model(), pairs(), []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    chosen, rejected = model.compare_responses(**batch)
    assert len(calls) == 1 and chosen.shape == rejected.shape == (4, 1)
    expected = model.get_rewards(batch["rejected_ids"], batch["rejected_mask"])
    torch.testing.assert_close(rejected, expected, rtol=0, atol=1e-12)


class Words:
    """A tokenizer whose texts are a letter a token."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["x" * len(row) for row in rows]


def test_ensembles():
    models = [reward_model(encoder(seed=seed), seed) for seed in range(3)]
    batch = pairs()
    ids, mask = batch["chosen_ids"], batch["chosen_mask"]
    each = torch.stack([model.get_rewards(ids, mask) for model in models])
    assert torch.equal(RewardEnsemble(models)(ids, mask)["rewards"], each.mean(0))
    assert torch.equal(RewardEnsemble(models, reduce="min")(ids, mask)["rewards"], each.amin(0))
    length = mask.sum(1).double()
    mixed = RewardEnsemble([models[0], lambda ids, mask: mask.sum(1).double(),
                            lambda ids, mask: mask.sum(1).tolist()])  # fmt: skip
    expected = (each[0].squeeze(1) + 2 * length) / 3
    torch.testing.assert_close(mixed(ids, mask)["rewards"].squeeze(1), expected)
    trainer = GRPOTrainer(tiny_llama(), mixed)  # usable wherever a reward model is
    torch.testing.assert_close(trainer.compute_rewards(ids, mask), expected.detach())
    by_text = TextReward(lambda prompts, responses: [len(r) for r in responses], Words())
    mixed = RewardEnsemble([lambda ids, mask: [1.0] * len(ids), by_text])
    tokens = mask.clone()
    tokens[:, :3] = 0
    given = GRPOTrainer(tiny_llama(), mixed).compute_rewards(ids, mask, tokens)
    assert given.tolist() == ((1 + tokens.sum(1)) / 2).tolist()
    with pytest.raises(ValueError, match="mean or min"):
        RewardEnsemble(models, reduce="max")
    with pytest.raises(ValueError, match="at least one"):
        RewardEnsemble([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_pooling": "avg"}, "use_pooling"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": 2, "dropout": 1.5}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_impossible_models(options, message):
    with pytest.raises(ValueError, match=message):
        RewardModel(encoder(), **{"hidden_size": WIDTH, **options})


def test_a_wrong_width_is_an_error():
    with pytest.raises(ValueError, match=r"hidden_size: expected 16, .* got 768"):
        create_reward_model(tiny_llama().model)
    with pytest.raises(ValueError, match=r"hidden_size is 8, but .* 16 wide"):
        reward = create_reward_model(encoder(), 8)
        reward(torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="must return its hidden states"):
        reward_model(encoder(answer=lambda h: {"logits": h}))(torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"hidden states \(B, S, H\)"):
        reward_model(encoder(answer=lambda h: h[:, 0]))(torch.ones(1, 2, dtype=torch.long))


def test_hidden_states_narrower_than_the_layers():
    import transformers

    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    base = transformers.OPTModel(config)
    with pytest.raises(ValueError, match=r"hidden_size: expected 16, .* got 32"):
        create_reward_model(base, 32)
    reward = create_reward_model(base, 16)
    assert reward.get_rewards(torch.ones(2, 3, dtype=torch.long)).shape == (2, 1)


def test_a_row_without_tokens_is_named():
    batch = pairs()
    batch["chosen_mask"][2] = 0
    with pytest.raises(ValueError, match="row 2 of attention_mask"):
        reward_model()(batch["chosen_ids"], batch["chosen_mask"])
    with pytest.raises(ValueError, match="row 2 of chosen_mask"):
        RewardModelTrainer(reward_model()).train_step(**batch)


# The trainer


@pytest.mark.parametrize("name", ["bare", "llama with head", "bert"])
@pytest.mark.parametrize("margin", [None, 0.0, [0.1, 0.0, 0.7, 0.3]])
def test_steps_equal_the_paper_in_plain_pytorch(name, margin):
    model = reward_model(BASES[name](), num_layers=2)
    plain = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, plain))
    trainer = RewardModelTrainer(model, ours, None, 0.4, center_coef=0.1, max_grad_norm=1.0)
    for step in range(2):
        batch = pairs(seed=step)
        margins = torch.tensor(0.4 if margin is None else margin, dtype=torch.float64)
        loss, chosen, rejected = paper_loss(plain, batch, margins, 0.1)
        theirs.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step()
        given = {} if margin is None else {"margin": margin}
        metrics = trainer.train_step(**batch, **given)
        assert list(metrics) == METRICS and all(type(v) is float for v in metrics.values())
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["chosen_reward_mean"] == pytest.approx(chosen.mean().item(), abs=1e-9)
        assert metrics["rejected_reward_mean"] == pytest.approx(rejected.mean().item(), abs=1e-9)
        difference = (chosen - rejected).mean().item()
        assert metrics["reward_margin"] == pytest.approx(difference, abs=1e-9)
        assert metrics["accuracy"] == (chosen > rejected).double().mean().item()
    assert_same_parameters(model, dict(plain.named_parameters()), 1e-9)
    assert trainer.get_statistics() == {"total_steps": 2, **metrics}


def test_the_loss_is_the_kernel_s_with_a_graph():
    model, batch = reward_model(), pairs()
    trainer = RewardModelTrainer(model, margin=0.2)
    loss = trainer.compute_loss(**batch)
    rewards = model.compare_responses(**batch)
    assert loss.item() == pytest.approx(bradley_terry_loss(*rewards, margin=0.2).item(), abs=1e-12)
    assert loss.item() == pytest.approx(paper_loss(model, batch, 0.2)[0].item(), abs=1e-12)
    loss.backward()
    assert model.value_head[0].weight.grad.abs().sum() > 0
    without_masks = {k: v for k, v in batch.items() if not k.endswith("mask")}
    full = {k: torch.ones_like(v) if k.endswith("mask") else v for k, v in batch.items()}
    ours, theirs = trainer.compute_loss(**without_masks), trainer.compute_loss(**full)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_the_order_of_the_pairs_does_not_matter():
    trainer, batch = RewardModelTrainer(reward_model(), margin=0.2), pairs()
    mixed = {name: tensor[torch.tensor([2, 0, 3, 1])] for name, tensor in batch.items()}
    loss = trainer.compute_loss(**batch).item()
    assert trainer.compute_loss(**mixed).item() == pytest.approx(loss, abs=1e-12)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {f"{swap[k.split('_')[0]]}_{k.split('_')[1]}": v for k, v in batch.items()}
    other = trainer.compute_loss(**swapped).item()
    assert other == pytest.approx(paper_loss(trainer.model, swapped, 0.2)[0].item(), abs=1e-12)
    assert other != pytest.approx(loss, abs=1e-3)


def test_side_and_length_of_the_padding_do_not_matter():
    batch = pairs()
    for name in ("bert", "roberta", "llama with head"):
        trainer = RewardModelTrainer(reward_model(BASES[name]()))
        expected = trainer.compute_loss(**batch).item()
        left, right = dict(batch), dict(batch)
        for side, extra in (("chosen", 0), ("rejected", 4)):
            left[f"{side}_ids"], left[f"{side}_mask"] = shifted_left(
                batch[f"{side}_ids"], batch[f"{side}_mask"], extra
            )
        right["chosen_ids"] = F.pad(batch["chosen_ids"], (0, 5), value=-100)
        right["chosen_mask"] = F.pad(batch["chosen_mask"], (0, 5))
        for padded in (left, right):
            assert trainer.compute_loss(**padded).item() == pytest.approx(expected, abs=1e-9)


def test_micro_batches_equal_one_large_batch():
    batch = pairs(pairs=5)
    results = []
    for steps in (1, 3):
        model = reward_model()
        trainer = RewardModelTrainer(model, margin=0.1, gradient_accumulation_steps=steps)
        metrics = [trainer.train_step(**batch) for _ in range(2)][-1]
        results.append((metrics, parameters_of(model), model))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-10)
    assert_same_parameters(results[1][2], results[0][1], 1e-10)
    model = reward_model()
    trainer = RewardModelTrainer(model, margin=0.1)
    parts = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    metrics = [trainer.train_micro_batches(parts) for _ in range(2)][-1]
    assert metrics == pytest.approx(results[0][0], abs=1e-10)
    assert_same_parameters(model, results[0][1], 1e-10)


def make_resumable(seed):
    base = encoder(seed=seed, dropout=0.3)
    base.embedding.requires_grad_(False)
    model = reward_model(base, seed, num_layers=2, dropout=0.2)
    return RewardModelTrainer(model, learning_rate=0.01, scheduler=halving)


def test_a_resumed_run_is_bit_identical(tmp_path):
    trainer = make_resumable(0)
    for step in range(2):
        trainer.train_step(**pairs(seed=step))
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    never_stopped = [trainer.train_step(**pairs(seed=step)) for step in range(2, 5)]
    torch.manual_seed(99)
    resumed = make_resumable(1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.train_step(**pairs(seed=step)) for step in range(2, 5)] == never_stopped
    assert_same_parameters(resumed.model, parameters_of(trainer.model))
    assert resumed.get_statistics() == trainer.get_statistics()


def test_autocast_and_evaluation():
    model = reward_model(encoder(dropout=0.5).float())
    trainer = RewardModelTrainer(model, autocast_dtype="bf16")
    assert model.training
    start = parameters_of(model)
    first, second = (trainer.eval_step(**pairs()) for _ in range(2))
    assert first == second and trainer.total_steps == 0 and model.training
    assert_same_parameters(model, start)
    model.eval()
    plain = RewardModelTrainer(copy.deepcopy(model)).eval_step(**pairs())
    assert first["loss"] == pytest.approx(plain["loss"], rel=2e-2)
    assert first["loss"] != plain["loss"]
    trainer.train_step(**pairs())
    assert model.training


BATCH = pairs()
REFUSED = {
    "chosen_mask must be": {**BATCH, "chosen_mask": torch.ones(4, 3)},
    "must have 4 rows": {**BATCH, "rejected_ids": BATCH["rejected_ids"][:2]},
    "of integers": {**BATCH, "chosen_ids": BATCH["chosen_ids"].float()},
    r"margin must be a number or \(4,\)": {**BATCH, "margin": [0.1, 0.2]},
    rf"in \[0, {VOCABULARY}\)": {**BATCH, "chosen_ids": BATCH["chosen_ids"] + VOCABULARY},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_batch_that_does_not_fit_is_refused(message):
    model = reward_model(tiny_bert())
    trainer = RewardModelTrainer(model)
    start = parameters_of(model)
    with pytest.raises(ValueError, match=message):
        trainer.train_step(**REFUSED[message])
    assert_same_parameters(model, start)
    assert trainer.total_steps == 0 and not trainer.optimizer.state


def test_what_is_not_finite_or_impossible_is_refused():
    for options in (
        {"margin": float("nan")}, {"center_coef": -1.0}, {"learning_rate": -1.0},
        {"max_grad_norm": -1.0}, {"max_grad_norm": float("nan")},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            RewardModelTrainer(reward_model(), **options)
    model = reward_model()
    trainer = RewardModelTrainer(model)
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.train_step(**BATCH, margin=[0.0, 0.0, float("nan"), 0.0])
    assert all(p.grad is None for p in model.parameters())
    bare = RewardModelTrainer(encoder(answer=lambda hidden: hidden[:, -1, 0]))
    assert bare.train_step(**BATCH)["loss"] > 0  # any model that takes (ids, masks) will do
    with pytest.raises(TypeError, match="must return rewards"):
        RewardModelTrainer(encoder()).train_step(**BATCH)


def test_a_reward_model_learns():
    """The chosen answers hold other tokens than the rejected: to be told on held-out pairs."""
    model = reward_model(encoder().float(), use_pooling="mean")
    trainer = RewardModelTrainer(model, learning_rate=3e-3)
    generator = torch.Generator().manual_seed(0)

    def batch(count):
        sides = [torch.randint(low, low + 40, (count, 8), generator=generator) for low in (0, 20)]
        return {f"{s}_ids": ids for s, ids in zip(("chosen", "rejected"), sides, strict=True)}

    held_out = batch(256)
    before = trainer.eval_step(**held_out)
    for _ in range(120):
        trainer.train_step(**batch(16))
    after = trainer.eval_step(**held_out)
    assert 0.3 < before["accuracy"] < 0.7 and after["accuracy"] > 0.9
