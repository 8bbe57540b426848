"""The parts of the demo of the RL trainers: their data, their rewards, their verdicts."""

import json
import re
from argparse import Namespace

import pytest
import torch

import demo_rl
from support.tiny_models import tiny_llama

CHARACTERS = " \n0123456789+?:abcdefghijklmnopqrstuvwxyz"


class Characters:
    """A token a character, small or large."""

    eos_token_id = 60

    def __call__(self, text):
        return {"input_ids": [CHARACTERS.index(c) + 3 for c in text.lower()]}

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(CHARACTERS[i - 3] for i in row if 0 <= i - 3 < 41) for row in rows]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The demo with a tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_rl, "load_model", lambda device: (tiny_llama().float(), Characters()))
    monkeypatch.setitem(demo_rl.GRPO, "trained_layers", 1)
    monkeypatch.setitem(demo_rl.RLHF, "trained_layers", 1)
    (tmp_path / "reviews.csv").touch()
    monkeypatch.setattr(demo_rl, "package_folder", lambda name: tmp_path)
    monkeypatch.setattr(demo_rl, "REVIEWS", "reviews.csv")


def test_pairs_and_prompts_are_of_different_snippets(monkeypatch):
    reviews = {label: [f"{label} {i}" for i in range(20)] for label in "01"}
    monkeypatch.setattr(demo_rl, "read_reviews", lambda path: reviews)
    pairs, others = demo_rl.snippets({"pairs": 5, "held_out_pairs": 3}, None)
    assert pairs[7] == ("1 7", "0 7") and len(pairs) == 8 and len(others) == 24
    assert not {text for pair in pairs for text in pair} & set(others)


def test_sums_that_are_held_out_are_not_trained(tiny):
    job = demo_rl.grpo_job(
        Namespace(**demo_rl.SHARED, **demo_rl.GRPO), {"sums": 12, "held_out_sums": 6}, None
    )
    assert job.batches.count == 12
    trainer = job.trainer
    reward = trainer.reward_model
    trained, positions = [], []
    for step in range(job.batches.per_epoch):
        ids, masks, rows = job.batches[step].values()
        trained += [tuple(row[m != 0].tolist()) for row, m in zip(ids, masks, strict=True)]
        positions += rows.tolist()
    assert len(set(trained)) == 12 and sorted(positions) == list(range(6, 18))
    prompt = demo_rl.Prompt(trained[0], reward._rows[positions[0]])
    assert len(reward._rows) == 18
    a, b = map(int, re.findall(r"What is (\d+) \+ (\d+)\?", prompt.row["prompt"])[-1])
    assert prompt.row["answer"] == str(a + b)
    assert prompt.row["prompt"].startswith("Question: What is 13 + 25?\nAnswer: 38\n")
    tokenize = Characters()
    for answer, expected in ((f" {a + b}\n", 1.0), (f" {a + b}0", 0.0), (f"{a + b}\n1", 1.0)):
        ids = torch.tensor([[*prompt.ids, *tokenize(answer)["input_ids"]]])
        tokens = (torch.arange(ids.shape[1]) >= len(prompt.ids)).long()[None]
        found = reward(ids, torch.ones_like(ids), tokens, torch.tensor(positions[:1]))
        assert found == {"rewards": [expected]}
    assert job.measure()["mean_reward"] == 0.0


def test_a_trial_runs_and_stays_out_of_the_results(tiny, tmp_path, capsys):
    assert demo_rl.main(["--trial", "grpo"]) == 0
    assert "grpo: held-out mean_reward" in capsys.readouterr().out
    assert (tmp_path / "out/rl_demo_trial/grpo/summary.json").exists()
    assert not (tmp_path / "benchmarks").exists()
    with pytest.raises(SystemExit):
        demo_rl.main(["--trial", "dpo"])


def test_verdicts_and_what_is_kept(tiny, tmp_path, capsys):
    folder = tmp_path / "out/rl_demo/rlhf"
    folder.mkdir(parents=True)
    (folder / "curves.png").write_bytes(b"png")

    def report(reward, kl):
        summary = {
            "before": {"mean_reward": 0.1, "sequence_kl": 0.0},
            "held_out": [{"step": 3, "mean_reward": reward, "sequence_kl": kl}],
            "total_steps": 3, "curves": {"loss": [1.0]},
            "settings": {"seed": 0, "sizes": demo_rl.SIZES},
        }  # fmt: skip
        return demo_rl._report("rlhf", summary, 9.7, False)

    assert report(0.41, 9.9) and not report(0.39, 1.0) and not report(2.0, 10.0)
    kept = json.loads((tmp_path / "benchmarks/results/rl-demo-rlhf.json").read_text())
    assert kept["settings"]["seed"] == 0
    assert set(kept["settings"]["sizes"]) == {
        "pairs", "held_out_pairs", "prompts", "held_out_prompts",
    }  # fmt: skip
    assert kept["seconds"] == 10 and kept["total_steps"] == 3
    assert (tmp_path / "benchmarks/results/rl-demo-rlhf.png").exists()
    reached = {name: part[3] for name, part in demo_rl.PARTS.items()}
    assert reached["reward"]({}, {"accuracy": 0.75}) and not reached["reward"](
        {}, {"accuracy": 0.7}
    )
    assert reached["grpo"]({"mean_reward": 0.5}, {"mean_reward": 0.66})
    assert not reached["grpo"]({"mean_reward": 0.5}, {"mean_reward": 0.64})
