"""Trainers of transformers and TRL, and processes, with the loss made from hidden states."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from apt_kernels.integrations import trl as of_trl
from apt_kernels.integrations.transformers import apply_to_transformers
from integrations.test_transformers_loss import batch, model_of, step
from support import processes

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def trainer_of(family, folder, steps=10, compute_metrics=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, logging_steps=1,
        report_to=[], use_cpu=True, learning_rate=1e-2, seed=3, save_strategy="no",
        disable_tqdm=True, optim="sgd", **options,
    )  # fmt: skip
    given = batch(rows=16)
    rows = [{name: value[i] for name, value in given.items()} for i in range(16)]
    return transformers.Trainer(
        model_of(family), arguments, train_dataset=rows, eval_dataset=rows[:6],
        compute_metrics=compute_metrics,
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


CASES = {
    "causal": ("Llama", {}),
    "bf16": ("Llama", {"bf16": True}),
    "accumulated": ("Gemma2", {"gradient_accumulation_steps": 2}),
    "checkpointed": ("Cohere", {"gradient_checkpointing": True}),
    "masked": ("Bert", {}),
    "masked, bf16": ("ModernBert", {"bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_the_same(case, tmp_path):
    family, options = CASES[case]
    plain = trainer_of(family, tmp_path / "plain", **options)
    wanted = losses(plain)
    trainer = trainer_of(family, tmp_path / "fused", **options)
    applied = apply_to_transformers(trainer.model)
    got = losses(trainer)
    assert len(got) == 10 and applied.report()["refused"] == {}
    assert applied.report()["taken"] == 10 * options.get("gradient_accumulation_steps", 1)
    # bfloat16 rounds the plain logits, not ours, and later steps carry that on
    assert got == pytest.approx(wanted, rel=3e-2 if options.get("bf16") else 1e-4)
    if not options.get("bf16"):
        for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_label_smoothing_of_the_trainer(family, tmp_path):
    options = {"label_smoothing_factor": 0.2, "eval_strategy": "steps", "eval_steps": 3}
    plain = trainer_of(family, tmp_path / "plain", steps=3, **options)
    wanted = losses(plain)
    trainer = trainer_of(family, tmp_path / "fused", steps=3, **options)
    smoother = trainer.label_smoother
    applied = apply_to_transformers(trainer)
    assert losses(trainer) == pytest.approx(wanted, rel=1e-4)
    assert applied.report()["taken"] == 3 and applied.report()["refused"] == {}
    evaluated = [
        [log["eval_loss"] for log in t.state.log_history if "eval_loss" in log]
        for t in (trainer, plain)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4) and len(evaluated[0]) == 1
    applied.undo()
    assert trainer.label_smoother is smoother and smoother is not None


def test_evaluation_with_metrics_gets_logits(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"right": float((prediction.predictions.argmax(-1) == 3).mean())}

    plain = trainer_of("Llama", tmp_path, compute_metrics=compute_metrics).evaluate()
    trainer = trainer_of("Llama", tmp_path, compute_metrics=compute_metrics)
    applied = apply_to_transformers(trainer)
    figures = trainer.evaluate()
    assert seen[0].shape == seen[1].shape == (6, 9, 61)
    assert figures["eval_right"] == plain["eval_right"]
    assert figures["eval_loss"] == pytest.approx(plain["eval_loss"])
    assert applied.report()["with_logits"] > 0


def test_trainers_that_cannot_be_served(tmp_path):
    trainer = trainer_of("Llama", tmp_path)
    trainer.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel"):
        apply_to_transformers(trainer)
    trainer.args.use_liger_kernel = False
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 0
    with pytest.raises(ValueError, match="compute_loss_func"):
        apply_to_transformers(trainer)
    with pytest.raises(ValueError, match="label_smoothing"):
        apply_to_transformers(trainer, label_smoothing=0.1)


def test_sft_trainer_of_trl(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from integrations.test_trl_trainers import model, rows, tokenizer

    def trained(folder, apply):
        arguments = SFTConfig(
            output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, seed=3, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model(folder / "model", "SFT"), arguments, processing_class=tokenizer(),
            train_dataset=Dataset.from_list(list(rows("SFT"))),
        )  # fmt: skip
        applied = apply_to_transformers(trainer) if apply else None
        return losses(trainer), applied

    wanted, _ = trained(tmp_path / "plain", False)
    got, applied = trained(tmp_path / "fused", True)
    assert applied.report()["taken"] == 4 and applied.report()["refused"] == {}
    applied.undo()
    assert got == pytest.approx(wanted, rel=1e-4)
    assert not of_trl._originals, "undone"


def _shard(rank):
    given = batch(rows=4)
    return {name: value[2 * rank : 2 * rank + 2] for name, value in given.items()}


def _wrapped(model, kind):
    if kind == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "fsdp, layer by layer":
        for layer in (*model.model.layers, model.lm_head):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _full(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def _of_processes(rank, kind):
    torch.manual_seed(0)
    results = []
    for fused in (False, True):
        model = model_of("Gemma2" if kind == "ddp" else "Llama")
        applied = apply_to_transformers(model) if fused else None
        wrapped = _wrapped(model, kind)
        outputs, grads = step(wrapped, _shard(rank) | {"num_items_in_batch": 9})
        results.append((outputs.loss.detach(), [_full(grad) for grad in grads]))
        if fused:
            assert applied.report() == {"taken": 1, "with_logits": 0, "refused": {}}, rank
            assert outputs.logits is None
    (plain, wanted), (loss, grads) = results
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert math.isfinite(float(loss)) and any(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, layer by layer"])
def test_processes(kind, tmp_path):
    processes.run(_of_processes, tmp_path, arguments=(kind,))
