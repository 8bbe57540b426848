"""What a step of an RL trainer spends outside its models' forward, backward and optimizer."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from apt_model.rl import (
    RewardModelTrainer,
    create_dpo_trainer,
    create_grpo_trainer,
    create_reward_model,
    create_rlhf_trainer,
)
from apt_model.scoring import next_token

PARTS = ("forward_ms", "backward_ms", "optimizer_ms")
ROUNDS = 2


class Clock:
    """Sums the time of each part of a step.

    Forward is the models' own call, their output layer included; backward is what follows after
    the gradient has arrived at what the output layer made: the backward of the loss is outside.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._arrived = 0.0

    def timed(self, part: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            if isinstance(result, dict) and "rewards" in result:
                self.watch(result["rewards"])
            return result

        return run

    def watched(self, head: Callable) -> Callable:
        """The head, whose results tell when their gradient has arrived."""

        def run(*args, **kwargs):
            results = head(*args, **kwargs)
            for tensor in results if isinstance(results, tuple) else (results,):
                self.watch(tensor)
            return results

        return run

    def watch(self, tensor: Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: setattr(self, "_arrived", time.perf_counter()))

    def backward(self, of_tensor: Callable) -> Callable:
        def run(*args, **kwargs):
            of_tensor(*args, **kwargs)
            self.seconds["backward_ms"] += time.perf_counter() - self._arrived

        return run

    @contextmanager
    def running(self, models: list[nn.Module], optimizer) -> Iterator[None]:
        head, backward = next_token.linear_token_logprobs, Tensor.backward
        next_token.linear_token_logprobs = self.watched(head)
        Tensor.backward = self.backward(backward)
        for owner, part, name in (
            *((model, "forward_ms", "forward") for model in models),
            (optimizer, "optimizer_ms", "step"),
        ):
            setattr(owner, name, self.timed(part, getattr(owner, name)))
        try:
            yield
        finally:
            next_token.linear_token_logprobs, Tensor.backward = head, backward
            for model in models:
                del model.forward
            del optimizer.step


def measured(model: nn.Module, ids: Tensor, prompt: int) -> Iterator[dict[str, str]]:
    """A row of each trainer, of one model, on `ids` of which the first tokens are the prompt."""
    for name, make in TRAINERS.items():
        trainer, step, models = make(copied(model), ids, prompt)
        step()
        taken = [_once(trainer, step, models) for _ in range(ROUNDS)]
        row = {part: statistics.median(t[part] for t in taken) for part in taken[0]}
        yield {"step": name, **{part: f"{value:.4g}" for part, value in row.items()}}


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares the frozen parameters."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def _once(trainer, step: Callable, models: list[nn.Module]) -> dict[str, float]:
    clock = Clock()
    with clock.running(models, trainer.optimizer):
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    inside = sum(clock.seconds.values())
    milliseconds = {part: 1e3 * value for part, value in clock.seconds.items()}
    return {"ms": 1e3 * whole, **milliseconds, "outside_percent": 100 * (1 - inside / whole)}


def _dpo(model: nn.Module, ids: Tensor, prompt: int):
    trainer = create_dpo_trainer(model, learning_rate=1e-6)
    chosen, rejected = ids.chunk(2)
    run = lambda: trainer.train_step(chosen, rejected, prompt_lengths=prompt)  # noqa: E731
    return trainer, run, [model, trainer.ref_policy_model]


def _grpo(model: nn.Module, ids: Tensor, prompt: int):
    trainer = create_grpo_trainer(model, ref_policy_model="copy", learning_rate=1e-6)
    rewards = torch.linspace(0, 1, len(ids))
    run = lambda: trainer.train_step(ids, rewards=rewards, prompt_lengths=prompt)  # noqa: E731
    return trainer, run, [model, trainer.ref_policy_model]


def _ppo(model: nn.Module, ids: Tensor, prompt: int):
    """One epoch on given responses: sampling would be a model's forward passes too."""
    tokens = (torch.arange(ids.shape[1]) >= prompt).long().expand_as(ids)

    def rollout(prompts, masks, max_new_tokens, temperature):
        return ids, torch.ones_like(ids), tokens

    trainer = create_rlhf_trainer(
        model, lambda ids, masks: [0.1 * row for row in range(len(ids))], rollout=rollout,
        ppo_epochs=1, learning_rate=1e-6, max_new_tokens=ids.shape[1] - prompt,
    )  # fmt: skip
    run = lambda: trainer.train_step(ids[:, :prompt])  # noqa: E731
    return trainer, run, [model, trainer.ref_policy_model]


def _reward(model: nn.Module, ids: Tensor, prompt: int):
    base = model.model
    rewards = create_reward_model(base, base.config.hidden_size)
    trainer = RewardModelTrainer(rewards, learning_rate=1e-6, max_grad_norm=1.0)
    chosen, rejected = ids.chunk(2)
    return trainer, lambda: trainer.train_step(chosen, rejected), [rewards]


TRAINERS = {"dpo": _dpo, "grpo": _grpo, "ppo": _ppo, "reward model": _reward}
