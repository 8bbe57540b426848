"""What all trainers share, on the smallest trainer there is."""

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from apt_model.commands.run import run_steps
from apt_model.training.checkpoint import Checkpoint
from apt_model.training.curves import Curves
from apt_model.training.loop import TrainingLoop
from support.tiny_models import tiny_llama

ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Regression(TrainingLoop):
    """Learns to answer 1 to every row."""

    statistics: ClassVar = {"mean_size": "size"}
    monitored = ("loss", "size")

    def __init__(self, model, optimizer=None, **options):
        super().__init__({"model": model}, optimizer, learning_rate=0.1, **options)
        self.model = model

    def train_step(self, rows):
        def share(part):
            answers = self.model(part.to(self.device))
            loss = (answers - 1).square().sum() / len(rows)
            return loss, {"size": answers.detach().abs().sum() / len(rows)}

        return self.update(rows.tensor_split(self.gradient_accumulation_steps), share)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def test_the_update_is_the_optimizer_s():
    model, plain = linear(), linear()
    trainer = Regression(model, max_grad_norm=0.5)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        loss = (plain(ROWS) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        metrics = trainer.train_step(ROWS)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert list(metrics) == ["loss", "size"]
        assert trainer.curves.columns["grad_norm"][-1] == pytest.approx(norm.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert trainer.get_statistics() == {"total_steps": 3, "mean_size": metrics["size"]}


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_micro_batches_add_up(steps):
    whole, cut = Regression(linear()), Regression(linear(), gradient_accumulation_steps=steps)
    for _ in range(2):
        assert cut.train_step(ROWS) == pytest.approx(whole.train_step(ROWS), rel=1e-5)
    torch.testing.assert_close(cut.model.weight, whole.model.weight, rtol=1e-5, atol=1e-6)


def test_one_read_of_the_device_a_step(monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, original=original, name=name):
            reads.append(name)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, counted)
    model = linear()
    trainer = Regression(
        model, torch.optim.SGD(model.parameters(), 0.1), gradient_accumulation_steps=3
    )
    trainer.train_step(ROWS)
    assert reads == ["tolist"]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_raises_before_the_update(where):
    class Wild(nn.Linear):
        def forward(self, rows):
            answers = super().forward(rows)
            if where == "loss":
                return answers * torch.inf
            answers.register_hook(lambda grad: grad * torch.nan)
            return answers

    model = Wild(3, 1)
    trainer = Regression(model)
    before = model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.train_step(ROWS)
    assert torch.equal(model.weight, before) and model.weight.grad is None
    assert trainer.total_steps == 0 and not trainer.optimizer.state and not trainer.curves.columns


def test_float16_scales_the_loss_and_skips_what_overflows():
    model = linear()
    scaled = []
    trainer = Regression(model, autocast_dtype="fp16")
    model.weight.register_hook(lambda grad: scaled.append(grad.abs().max().item()))
    before = model.weight.detach().clone()
    while torch.equal(model.weight, before):  # the first scale is too large for float16
        scale = trainer._scaler.get_scale()
        trainer.train_step(ROWS)
    assert trainer._scaler.get_scale() == scale > 1
    assert scaled[-1] / scale == pytest.approx(model.weight.grad.abs().max().item(), rel=1e-3)
    before = model.weight.detach().clone()
    hook = model.weight.register_hook(lambda grad: grad * torch.inf)
    trainer.train_step(ROWS)
    assert torch.equal(model.weight, before) and trainer._scaler.get_scale() == scale / 2
    hook.remove()
    with pytest.raises(FloatingPointError):
        trainer.train_step(ROWS * torch.nan)
    assert math.isfinite(trainer.train_step(ROWS)["loss"])  # usable after the error
    state = trainer.state_dict()
    other = Regression(linear(1), autocast_dtype=torch.float16)
    other.load_state_dict(state)
    assert other._scaler.get_scale() == trainer._scaler.get_scale()


def test_autocast_reaches_the_model():
    class Spy(nn.Linear):
        def forward(self, rows):
            self.seen = super().forward(rows)
            return self.seen.float()

    for dtype in ("bf16", "bfloat16", torch.bfloat16):
        trainer = Regression(Spy(3, 1), autocast_dtype=dtype)
        trainer.train_step(ROWS)
        assert trainer.model.seen.dtype is torch.bfloat16
        assert trainer.model.weight.dtype is torch.float32


def test_schedulers():
    def rates(trainer):
        for _ in range(3):
            trainer.train_step(ROWS)
        return trainer.curves.columns["learning_rate"].tolist()

    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ready = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert rates(Regression(model, optimizer, scheduler=ready)) == [1.0, 0.5, 0.25]
    made = Regression(
        linear(), scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.1)
    )
    assert rates(made) == pytest.approx([0.1, 0.01, 0.001])
    plateau = Regression(
        model,
        torch.optim.SGD(model.parameters(), 1e-9),
        scheduler=lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, eps=0),
    )
    assert rates(plateau) == pytest.approx([1e-9, 1e-9, 1e-10])
    with pytest.raises(ValueError, match="own optimizer"):
        Regression(linear(), scheduler=ready)
    with pytest.raises(TypeError, match="scheduler"):
        Regression(linear(), scheduler="cosine")
    with pytest.raises(ValueError, match="own optimizer"):
        Regression(linear(), scheduler=lambda opt: "cosine")


def test_impossible_options():
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="gradient_accumulation_steps"):
            Regression(linear(), gradient_accumulation_steps=steps)
    for dtype in ("int8", torch.float32, 16):
        with pytest.raises(ValueError, match="autocast_dtype"):
            Regression(linear(), autocast_dtype=dtype)
    with pytest.raises(TypeError, match="log"):
        Regression(linear(), log="stdout")
    with pytest.raises(ValueError, match="no parameter"):
        Regression(linear().requires_grad_(False))
    with pytest.raises(ValueError, match="holds no parameter"):
        Regression(linear(), torch.optim.SGD(linear().parameters(), 0.1))


def test_a_frozen_adapter_or_policy_does_not_leave_the_heads_to_train(tmp_path):
    """PEFT loads adapters frozen: a head that the trainer makes would be all that learns."""
    import peft

    from apt_model.rl import RewardModel, create_rlhf_trainer
    from apt_model.rl.reward_trainer import RewardModelTrainer

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    for trainable in (False, True):
        model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
        made = [
            lambda model=model: create_rlhf_trainer(model, lambda ids, mask: [0.0]),
            lambda model=model: RewardModelTrainer(RewardModel(model, 16)),
        ]
        for make in made:
            if trainable:
                make()
                continue
            with pytest.raises(ValueError, match="requires a gradient"):
                make()
    with pytest.raises(ValueError, match="policy_model: no parameter requires a gradient"):
        create_rlhf_trainer(tiny_llama().requires_grad_(False), lambda ids, mask: [0.0])


def test_the_device_is_where_the_model_is_unless_told():
    assert Regression(linear()).device == torch.device("cpu")
    assert Regression(linear(), device="cpu").device == torch.device("cpu")
    moved = Regression(linear().to("meta"), device=None)
    assert moved.device == torch.device("meta")


def test_a_snapshot_is_not_changed_by_later_steps():
    trainer = Regression(linear())
    trainer.train_step(ROWS)
    state = trainer.state_dict()
    weight = state["modules"]["model"]["weight"].clone()
    moments = {k: v["exp_avg"].clone() for k, v in state["optimizer"]["state"].items()}
    trainer.train_step(ROWS)
    assert torch.equal(state["modules"]["model"]["weight"], weight)
    for key, moment in moments.items():
        assert torch.equal(state["optimizer"]["state"][key]["exp_avg"], moment)
    assert len(state["curves"]["loss"]) == 1


def test_a_state_of_another_kind_is_refused_before_anything_is_loaded():
    trainer, other = Regression(linear()), Regression(linear(1))
    other.train_step(ROWS)
    state = other.state_dict()
    without_curves = {name: part for name, part in state.items() if name != "curves"}
    for wrong, message in (
        ({**state, "queue": ROWS}, r"another kind of trainer: .*\['queue'\]"),
        (without_curves, r"another kind of trainer: .*\['curves'\]"),
        ({**state, "modules": {"other": {}}}, r"the modules \['other'\]"),
        ({**state, "scheduler": {}}, "a scheduler, or neither"),
    ):
        before = trainer.model.weight.detach().clone()
        with pytest.raises(ValueError, match=message):
            trainer.load_state_dict(wrong)
        assert torch.equal(trainer.model.weight, before)
        assert trainer.total_steps == 0 and not trainer.curves.columns
    trainer.load_state_dict(state)
    assert trainer.total_steps == 1 and torch.equal(trainer.model.weight, other.model.weight)


def test_records_go_to_a_callable_or_a_writer():
    records = []
    trainer = Regression(linear(), log=records.append)
    metrics = [trainer.train_step(ROWS) for _ in range(2)]
    assert [record["step"] for record in records] == [1, 2]
    for record, values in zip(records, metrics, strict=True):
        assert record == {
            **values,
            "step": record["step"],
            "grad_norm": record["grad_norm"],
            "learning_rate": 0.1,
        }

    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, *args):
            self.scalars.append(args)

    writer = Writer()
    loss = Regression(linear(), log=writer).train_step(ROWS)["loss"]
    assert ("loss", loss, 1) in writer.scalars and len(writer.scalars) == 4


def test_curves_survive_columns_that_come_late(tmp_path):
    curves = Curves()
    curves.append({"step": 1, "loss": 2.0})
    curves.append({"step": 2, "loss": 1.0, "accuracy": 0.5})
    curves.append({"step": 3, "accuracy": 0.6})
    assert all(len(column) == 3 for column in curves.columns.values())
    assert math.isnan(curves.columns["accuracy"][0]) and math.isnan(curves.columns["loss"][2])
    restored = Curves()
    restored.load_state_dict(curves.state_dict())
    restored.append({"step": 4, "loss": 0.0, "accuracy": 1.0})
    assert restored.columns["step"].tolist() == [1, 2, 3, 4]
    assert restored.columns["loss"].tolist()[::3] == [2.0, 0.0]
    restored.save_png(tmp_path / "new" / "curves.png", ["accuracy", "loss"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.png"]
    with pytest.raises(ValueError, match="reward"):
        restored.save_png(tmp_path / "curves.png", ["reward"])
    with pytest.raises(ValueError, match="any step"):
        Curves().save_png(tmp_path / "curves.png")


def test_a_metric_that_is_not_finite_is_refused():
    trainer = Regression(linear())
    before = trainer.model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="size nan"):
        trainer.update(
            [ROWS], lambda part: (trainer.model(part).sum(), {"size": part.sum() * torch.nan})
        )
    assert torch.equal(trainer.model.weight, before) and trainer.total_steps == 0


def test_a_step_of_several_updates_is_counted_once():
    trainer = Regression(linear(), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    for _ in range(3):
        metrics = trainer.update(
            [ROWS],
            lambda part: (trainer.model(part).square().sum(), {"size": part.sum()}),
            finish=False,
        )
    assert trainer.total_steps == 0 and not trainer.curves.columns
    trainer.finish_step({**metrics, "more": 1.0})
    assert trainer.total_steps == 1 and trainer.curves.columns["more"].tolist() == [1.0]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.05


class Failing(Regression):
    """Two updates a step; the third step raises, after as many of them as it is told."""

    def __init__(self, updates, **options):
        super().__init__(linear(), **options)
        self.updates = updates

    def train_step(self, rows):
        noise = torch.rand(rows.shape[0], 1)
        for update in range(3):
            if self.total_steps == 2 and update == self.updates:
                raise ValueError("no reward")
            if update < 2:
                metrics = self.update(
                    [rows + noise], lambda part: (self.model(part).square().mean(), {}), False
                )
        self.finish_step(metrics)
        return metrics


def run(trainer, path):
    checkpoint = Checkpoint(path, {})
    checkpoint.load(trainer)
    return run_steps(trainer, [{"rows": ROWS}] * 4, 4, checkpoint, 0, {})


@pytest.mark.parametrize("fails", [True, False])
def test_steps_made_are_kept_where_a_later_one_raises(tmp_path, fails):
    """The one continued draws the same numbers."""
    torch.manual_seed(3)
    whole = Failing(None)
    assert run(whole, tmp_path / "whole.pt")
    torch.manual_seed(3)
    path = tmp_path / "checkpoint.pt"
    if fails:
        with pytest.raises(ValueError, match="no reward"):
            run(Failing(0), path)
        assert torch.load(path)["trainer"]["total_steps"] == 2
        torch.manual_seed(7)
    continued = Failing(None)
    assert run(continued, path)
    assert torch.equal(continued.model.weight, whole.model.weight)


@pytest.mark.parametrize("updates", [1, 2])
def test_no_steps_are_kept_where_the_one_that_raises_has_changed_parameters(tmp_path, updates):
    torch.manual_seed(3)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ValueError, match="no reward"):
        run(Failing(updates), path)
    assert not path.exists()


def test_a_state_that_cannot_be_kept_does_not_hide_the_error(tmp_path):
    trainer = Failing(0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no reward"):
        run_steps(trainer, [{"rows": ROWS}] * 4, 4, Checkpoint(tmp_path / "file/a", {}), 0, {})
    trainer.is_mid_step = True
    trainer.load_state_dict(trainer.state_dict())
    assert not trainer.is_mid_step


def test_what_is_measured_now_and_then_is_drawn_as_one_line():
    curves = Curves()
    for step in range(1, 6):
        curves.append({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            curves.annotate({"held_out": step / 10})
    panels = curves._figure(["loss", "held_out"]).axes
    assert list(panels[0].lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert list(panels[1].lines[0].get_xdata()) == [2, 4]
    assert list(panels[1].lines[0].get_ydata()) == [0.2, 0.4]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=6),  # a warm-up
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=1.0),
    ],
    ids=["warm-up", "cosine", "plateau"],
)
def test_a_schedule_goes_on_where_it_was(schedule):
    """Interrupted in its middle: afterwards its last rate would hide that it began anew."""

    def rate(trainer):
        trainer.train_step(ROWS)
        return trainer.optimizer.param_groups[0]["lr"]

    whole, first, second = (Regression(linear(), scheduler=schedule) for _ in range(3))
    wanted = [rate(whole) for _ in range(8)]
    got = [rate(first) for _ in range(3)]
    second.load_state_dict(first.state_dict())
    assert got + [rate(second) for _ in range(5)] == pytest.approx(wanted, rel=1e-9)
    assert len(set(wanted)) > 3
