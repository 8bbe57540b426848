"""Parameters of 16 bits: float32 copies in the optimizer; which parameters weight decay moves."""

import copy
import functools

import pytest
import torch
from torch import nn

from apt_model.pretraining import create_contrastive_pretrainer, create_mlm_pretrainer
from apt_model.rl import RewardModel, RewardModelTrainer, create_dpo_trainer
from apt_model.training.master_weights import MasterWeights
from apt_model.training.precision import PrecisionOptions
from support.tiny_encoders import VOCABULARY, WIDTH, TinyEncoder, random_texts
from support.tiny_models import random_pairs, tiny_llama

HALF = [torch.bfloat16, torch.float16]
MLM = dict(vocab_size=VOCABULARY, warmup_steps=0, mask_prob=0.5)


def encoder(dtype=torch.float32):
    torch.manual_seed(0)
    return TinyEncoder().to(dtype)


def dpo(dtype, **options):
    model = tiny_llama()
    with torch.no_grad():  # alike in all dtypes
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().half())
    return create_dpo_trainer(model.to(dtype), learning_rate=1e-5, **options)


def unrounded(trainer):
    """The trained parameters in order: the copies, where there are any."""
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return [p.detach().float().clone() for p in held]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("steps", [1, 2])
def test_small_steps_move_weights_of_16_bits_as_those_of_32(dtype, steps):
    batch = random_pairs()
    wide, narrow = dpo(torch.float32), dpo(dtype)
    starts = unrounded(wide), unrounded(narrow)
    for a, b in zip(*starts, strict=True):
        assert torch.equal(a, b) and b.dtype == torch.float32
    for _ in range(20):
        for trainer in (wide, narrow):
            trainer.train_micro_batches([batch] * steps)
    # AdamW moves each weight by about its rate: 16-bit weights alone would stay where they are
    differences = [
        torch.cat([(a - b).flatten() for a, b in zip(unrounded(t), start, strict=True)])
        for t, start in zip((wide, narrow), starts, strict=True)
    ]
    assert differences[0].abs().mean() > 1e-4
    cosine = torch.nn.functional.cosine_similarity(*differences, dim=0)
    assert cosine > 0.95
    for parameter, master in narrow._masters._pairs:
        assert parameter.dtype == dtype and torch.equal(parameter, master.to(dtype))
    for state in narrow.optimizer.state.values():
        assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast", [None, "own"])
def test_a_run_of_16_bits_continues_bit_for_bit(dtype, autocast):
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    options = {"autocast_dtype": name if autocast else None}
    whole, first, second = (dpo(dtype, **options) for _ in range(3))
    batch = random_pairs()
    for _ in range(4):
        expected = whole.train_step(**batch)
    for _ in range(2):
        first.train_step(**batch)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        assert second.train_step(**batch)["loss"] >= 0
    assert second.get_statistics() == whole.get_statistics() and expected["loss"] < 0.6931
    for a, b in zip(unrounded(whole), unrounded(second), strict=True):
        assert torch.equal(a, b)


def test_a_float16_model_with_float16_autocast_has_its_loss_scaled():
    trainer = dpo(torch.float16, autocast_dtype="fp16")
    assert trainer.train_step(**random_pairs())["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert trainer._scaler.is_enabled() and dpo(torch.float16)._scaler.is_enabled()
    assert not dpo(torch.bfloat16)._scaler.is_enabled()


def test_an_overflow_of_float16_changes_nothing_and_is_not_the_end():
    trainer = dpo(torch.float16)
    trainer._scaler.scale(torch.ones(()))  # makes the scale
    trainer._scaler._scale.fill_(2.0**40)
    before = unrounded(trainer)
    trainer.train_step(**random_pairs())
    assert all(map(torch.equal, unrounded(trainer), before))
    for _ in range(40):
        trainer.train_step(**random_pairs())
    assert not all(map(torch.equal, unrounded(trainer), before))


@pytest.mark.parametrize("dtype", HALF)
def test_a_given_optimizer_keeps_its_groups_its_state_and_its_scheduler(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(dtype)
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9)
    model(torch.ones(2, 4, dtype=dtype)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    masters = MasterWeights(optimizer)
    held = optimizer.param_groups[0]["params"][0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert torch.equal(optimizer.state[held]["momentum_buffer"], momentum.float())
    assert model[0].weight not in optimizer.state
    start = held.detach().clone()
    masters.take_gradients()
    gradient = held.grad.clone()
    optimizer.step()
    masters.write_back()
    scheduler.step()
    expected = start - 1e-2 * (0.9 * momentum.float() + gradient)
    torch.testing.assert_close(held.detach(), expected)
    assert torch.equal(model[0].weight, held.to(dtype)) and model[0].weight.grad is None
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-5]


def test_gradients_are_added_in_float32():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    masters = MasterWeights(optimizer)
    for gradient in (256.0, *[1.0] * 8):  # 256 + 1 is 256 in bfloat16
        weight.grad = torch.full((1,), gradient, dtype=torch.bfloat16)
        masters.take_gradients()
    assert optimizer.param_groups[0]["params"][0].grad.item() == 264


def test_weights_that_something_else_sets_are_not_undone():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    masters = MasterWeights(optimizer)
    master = optimizer.param_groups[0]["params"][0]
    with torch.no_grad():
        master += 1e-4  # below what bfloat16 shows
        masters.write_back()
        weight[1] = 3.0
    masters.take_gradients()
    assert master[0].item() == pytest.approx(1.0001, abs=1e-7) and master[1].item() == 3
    with pytest.raises(ValueError, match="float32 copies"):
        masters.load_state_dict({})


@pytest.mark.parametrize("dtype", HALF)
def test_every_trainer_takes_models_of_16_bits(dtype):
    texts = random_texts()
    mlm = create_mlm_pretrainer(encoder(dtype), WIDTH, MLM)
    assert mlm.train_step(**texts)["mlm_loss"] > 0
    contrastive = create_contrastive_pretrainer(encoder(dtype), WIDTH, hidden_dim=8)
    assert contrastive.train_step(texts["input_ids"], texts["input_ids"])["loss"] > 0
    reward = RewardModelTrainer(RewardModel(encoder(dtype), WIDTH))
    pairs = {k: v for k, v in random_pairs().items() if k != "prompt_lengths"}
    pairs = {k: v % VOCABULARY for k, v in pairs.items()}
    assert reward.train_step(**pairs)["loss"] > 0
    for trainer in (mlm, contrastive, reward):
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert {p.dtype for p in held} == {torch.float32}
        assert {p.dtype for m in trainer._modules.values() for p in m.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_momentum_encoder_follows_in_float32(dtype):
    options = dict(hidden_dim=8, use_momentum_encoder=True, queue_size=32, learning_rate=1e-2)
    trainer = create_contrastive_pretrainer(encoder(dtype), WIDTH, **options)
    momentum = [*trainer.encoder_momentum.parameters(), *trainer.projection_momentum.parameters()]
    trained = [*trainer.encoder.parameters(), *trainer.projection.parameters()]
    expected = [p.detach().double() for p in trained]
    texts = random_texts()
    for _ in range(5):
        trainer.train_step(texts["input_ids"], texts["input_ids"])
        expected = [
            0.999 * e + 0.001 * p.detach().double() for e, p in zip(expected, trained, strict=True)
        ]
    for ours, theirs in zip(momentum, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)
    assert trainer.queue.dtype == torch.float32


def of_groups(trainer):
    names = {id(trainer._masters.held(p)): n for m in trainer._modules.values()
             for n, p in m.named_parameters()}  # fmt: skip
    return {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups
            for p in g["params"]}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_leaves_norms_and_biases_alone(dtype):
    make = functools.partial(create_mlm_pretrainer, hidden_size=WIDTH, config=MLM)
    decay = of_groups(make(encoder(dtype)))
    assert decay["embedding.weight"] == decay["dense.weight"] == 0.01
    assert decay["mix.bias"] == decay["layer_norm.weight"] == decay["decoder.bias"] == 0
    assert set(of_groups(make(encoder(), decay_norms_and_biases=True)).values()) == {0.01}
    layers = nn.Linear(4, 4), nn.LayerNorm([3, 4]), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    normed = nn.Sequential(*layers)
    trainer = RewardModelTrainer(normed, weight_decay=0.1)
    spared = {name for name, value in of_groups(trainer).items() if value == 0}
    assert spared == {"0.bias", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias"}
    assert len(RewardModelTrainer(copy.deepcopy(normed)).optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype, autocast", [("bfloat16", "fp16"), ("float16", "bf16")])
def test_options_that_cannot_work_are_named(dtype, autocast):
    with pytest.raises(ValueError, match=f"--dtype {dtype} and --autocast {autocast}"):
        PrecisionOptions(dtype=dtype, autocast=autocast).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_options_that_work(dtype):
    own = {"bfloat16": ["bf16"], "float16": ["fp16"]}.get(dtype, ["bf16", "fp16"])
    for autocast in ["none", *own]:
        PrecisionOptions(dtype=dtype, autocast=autocast).check()
