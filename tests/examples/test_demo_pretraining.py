"""The parts of the pretraining demo: what it measures, its report and its picture."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import demo_pretraining
from apt_model.commands.pretraining import evaluate
from demo_pictures import draw
from support.tiny_encoders import tiny_bert


class Reads(nn.Module):
    """Gives back the first two numbers of an image."""

    def forward(self, images):
        return images.flatten(1)[:, :2]


def test_the_probe_sees_what_is_there():
    pytest.importorskip("sklearn")
    labels = torch.arange(10).repeat(40)
    angle = labels * 2 * torch.pi / 10
    images = torch.stack([torch.cos(angle), torch.sin(angle)], 1).view(-1, 1, 1, 2)
    assert demo_pretraining.probe(Reads(), images, labels, draws=2) > 0.95
    assert demo_pretraining.probe(Reads(), torch.randn(400, 1, 1, 2), labels, draws=2) < 0.25


def test_the_pooled_output_compares_the_segments():
    model = demo_pretraining.ComparedSegments(tiny_bert()).double()
    ids = torch.tensor([[2, 7, 8, 3, 9, 10, 3, 0], [2, 6, 3, 12, 13, 14, 15, 3]])
    mask = (ids != 0).long()
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        output = model.eval()(ids, mask, types)
        hidden, width = output["last_hidden_state"], output["last_hidden_state"].shape[-1]
        for row, (end, last) in enumerate(((4, 7), (3, 8))):
            u, v = hidden[row, :end].mean(0), hidden[row, end:last].mean(0)
            expected = width * (u / u.norm()) * (v / v.norm()) / (1 + 1e-5) ** 0.5
            torch.testing.assert_close(output["pooler_output"][row], expected)
        ids[0, 4], ids[0, 7] = 20, 21  # a word of the second segment, and padding
        other = model(ids, mask, types)["last_hidden_state"]
        assert torch.equal(other[0, :4], hidden[0, :4]) and torch.equal(other[1], hidden[1])
        assert not torch.allclose(other[0, 4:7], hidden[0, 4:7])
        trained = model.train()(ids, mask, types)["pooler_output"]
    torch.testing.assert_close(trained.mean(0), torch.zeros(width).double(), rtol=0, atol=1e-12)


class Views:
    """Pairs of which the first `right` are alike."""

    def __init__(self, count, right):
        self.first = torch.eye(count)
        self.second = torch.cat([torch.eye(count)[:right], torch.eye(count)[right:].roll(1, 0)])

    def __len__(self):
        return len(self.first)

    def __call__(self, rows, step):
        masks = {f"attention_mask_{k}": None for k in (1, 2)}
        return {"input_ids_1": self.first[rows], "input_ids_2": self.second[rows], **masks}


class Trainer:
    """Encodes nothing; its metrics are those of the batch."""

    encoder = nn.Identity()
    config = SimpleNamespace(mlm_loss_weight=1.0, nsp_loss_weight=2.0)

    @staticmethod
    def encode(ids, mask):
        return ids

    @staticmethod
    def eval_step(counts, values):
        total = sum(counts)
        mean = sum(c * v for c, v in zip(counts, values, strict=True)) / total
        of_samples = sum(values) / len(values)
        return {
            "mlm_loss": 2 * mean,
            "mlm_accuracy": mean,
            "nsp_loss": of_samples,
            "num_masked": total,
        }


def test_recall_counts_the_partners_found():
    assert demo_pretraining.recall(Trainer, Views(60, 60)) == 1.0
    assert demo_pretraining.recall(Trainer, Views(60, 45)) == 0.75


def test_metrics_of_tokens_are_means_over_tokens():
    class Data:
        counts = [1, 2, 3] * 10
        values = [0.0, 0.5, 1.0] * 10

        def __len__(self):
            return 30

        def __call__(self, rows, step):
            return {
                "counts": [self.counts[r] for r in rows],
                "values": [self.values[r] for r in rows],
            }

    metrics = evaluate(Trainer, Data(), 7)
    assert metrics == {
        "mlm_loss": pytest.approx(8 / 6),
        "mlm_accuracy": pytest.approx(4 / 6),
        "nsp_loss": pytest.approx(0.5),
        "total_loss": pytest.approx(8 / 6 + 2 * 0.5),
    }


def test_the_report_and_the_picture(tmp_path, monkeypatch, capsys):
    text = {"before": 0.1, "after": 0.2, "curve": [3.0, 2.0, 1.0], "curve_of": "loss"}
    places = {"before": [[0, 1], [1, 0]], "after": [[0, 0], [1, 1]], "labels": [0, 1]}
    parts = {
        "SimCLR": lambda: {**text, "before": 0.8, "after": 0.95, "embedding": places},
        "contrastive text": lambda: dict(text),
        "mlm": lambda: dict(text),
    }
    monkeypatch.setattr(demo_pretraining, "PARTS", parts)
    assert demo_pretraining.main(["--results", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "pretraining-demo.json").read_text())
    reached = {name: result["reached"] for name, result in results.items()}
    assert reached == {"SimCLR": True, "contrastive text": True, "mlm": False}
    assert "mlm               masked accuracy: 0.100 -> 0.200" in capsys.readouterr().out
    assert (tmp_path / "pretraining-demo.png").read_bytes().startswith(b"\x89PNG")
    parts["mlm"] = lambda: {**text, "after": 0.3}
    assert demo_pretraining.main(["mlm", "--results", str(tmp_path)]) == 0
    assert set(json.loads((tmp_path / "pretraining-demo.json").read_text())) == set(results)
    with pytest.raises(SystemExit):
        demo_pretraining.main(["none", "--results", str(tmp_path)])
    draw({"mlm": results["mlm"]}, tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()
