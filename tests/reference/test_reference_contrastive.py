"""The reference of the contrastive losses, and of MoCo's bookkeeping, in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import reference
from support import processes
from support.oracles import gradients, randn


def _unit(row):
    norm = math.sqrt(sum(x * x for x in row))
    return [x / norm if norm > 1e-12 else 0.0 for x in row]


def _class_loss(query, classes, positive, temperature):
    s = [sum(a * b for a, b in zip(query, k, strict=True)) / temperature for k in classes]
    loss = -math.log(1 / sum(math.exp(x - s[positive]) for x in s))
    return loss, all(x < s[positive] for j, x in enumerate(s) if j != positive)


def test_info_nce_by_hand():
    q, k, n = randn(4, 3), randn(6, 3), randn(5, 3)
    unit = [[_unit(r) for r in x.tolist()] for x in (q, k, n)]
    plain = [_class_loss(unit[0][i], unit[1], i + 2, 0.2) for i in range(4)]
    queue = [_class_loss(unit[0][i], [unit[1][i], *unit[2]], 0, 0.2) for i in range(4)]
    both = [
        (a[0] / 2 + b[0] / 2, (a[1] + b[1]) / 2)
        for a, b in (
            (_class_loss(unit[0][i], unit[1][:4], i, 0.2), _class_loss(unit[1][i], unit[0], i, 0.2))
            for i in range(4)
        )
    ]
    normed = {"negatives": F.normalize(n)}
    for expected, arguments, options in (
        (plain, (q, k), dict(label_offset=2)),
        (queue, (q, k[:4]), dict(negatives=n)),
        (both, (q, k[:4]), dict(symmetric=True)),
    ):
        losses, correct = reference.info_nce(
            *arguments, temperature=0.2, reduction="none", return_correct=True, **options
        )
        assert losses.tolist() == pytest.approx([e[0] for e in expected], rel=1e-10)
        directions = 2 if options.get("symmetric") else 1
        assert correct == directions * sum(e[1] for e in expected)
        mean = reference.info_nce(*arguments, temperature=0.2, **options)
        total = reference.info_nce(*arguments, temperature=0.2, reduction="sum", **options)
        torch.testing.assert_close(mean, losses.mean())
        torch.testing.assert_close(total, losses.sum())
        unit_rows = reference.info_nce(
            *(F.normalize(x) for x in arguments), temperature=0.2, normalize=False,
            reduction="none", **{o: normed.get(o, v) for o, v in options.items()},
        )  # fmt: skip
        torch.testing.assert_close(unit_rows, losses)


def test_nt_xent_and_sup_con_by_hand():
    z1, z2 = randn(4, 3), randn(4, 3)
    unit = [_unit(r) for r in [*z1.tolist(), *z2.tolist()]]
    expected = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        positive = others.index((i + 4) % 8)
        expected.append(_class_loss(unit[i], [unit[j] for j in others], positive, 0.3))
    options = {"temperature": 0.3, "return_correct": True}
    losses, correct = reference.nt_xent(z1, z2, reduction="none", **options)
    assert losses.tolist() == pytest.approx([e[0] for e in expected], rel=1e-10)
    assert correct == sum(e[1] for e in expected)
    torch.testing.assert_close(reference.nt_xent(z1, z2, temperature=0.3), losses.mean())

    features, labels = torch.cat([z1, z2]), torch.tensor([0, 1, 0, 2, 1, 0, 3, 3])
    expected, right = [], []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        positives = [n for n, j in enumerate(others) if labels[j] == labels[i]]
        classes = [unit[j] for j in others]
        terms = [_class_loss(unit[i], classes, p, 0.3)[0] for p in positives]
        expected.append(sum(terms) / len(terms) if terms else 0.0)
        s = [sum(a * b for a, b in zip(unit[i], c, strict=True)) for c in classes]
        best = max((s[p] for p in positives), default=None)
        if best is not None:
            right.append(all(x < best for n, x in enumerate(s) if n not in positives))
    losses, correct = reference.sup_con_loss(features, labels, reduction="none", **options)
    assert losses.tolist() == pytest.approx(expected, rel=1e-10) and expected[3] == 0
    assert correct == sum(right)
    mean = reference.sup_con_loss(features, labels, temperature=0.3)
    assert mean.item() == pytest.approx(sum(expected) / 7, rel=1e-10)
    pairs = torch.arange(4).repeat(2)
    same, same_correct = reference.sup_con_loss(features, pairs, **options)
    nt, nt_correct = reference.nt_xent(z1, z2, **options)
    torch.testing.assert_close(same, nt)
    assert same_correct == nt_correct


def test_siglip_by_hand():
    q, k = randn(3, 4), randn(5, 4)
    uq, uk = ([_unit(r) for r in x.tolist()] for x in (q, k))
    options = {"temperature": 0.25, "logit_bias": -0.7, "label_offset": 1}
    losses, correct = reference.siglip_loss(q, k, reduction="none", return_correct=True, **options)
    right = 0
    for i in range(3):
        s = [sum(a * b for a, b in zip(uq[i], r, strict=True)) / 0.25 - 0.7 for r in uk]
        expected = sum(math.log1p(math.exp(-x if j == i + 1 else x)) for j, x in enumerate(s))
        assert losses[i].item() == pytest.approx(expected, rel=1e-10)
        right += all(x < s[i + 1] for j, x in enumerate(s) if j != i + 1)
    assert correct == right
    mean = reference.siglip_loss(q, k, **options)
    torch.testing.assert_close(mean, losses.sum() / 3)


def test_contrastive_losses_at_temperature_001_and_with_zero_rows():
    torch.manual_seed(3)
    z1, z2 = torch.randn(6, 8), torch.randn(6, 8)
    z1[2] = 0
    z2[2] = z2[4] = 0
    labels = torch.tensor([0, 1, 2, 0, 1, 5])
    z1[3] = -z1[0]  # a positive that is the least similar row of all
    losses = {
        "info_nce": lambda a, b: reference.info_nce(a, b, temperature=0.01),
        "symmetric": lambda a, b: reference.info_nce(a, b, temperature=0.01, symmetric=True),
        "queue": lambda a, b: reference.info_nce(a, b, negatives=b.detach(), temperature=0.01),
        "nt_xent": lambda a, b: reference.nt_xent(a, b, temperature=0.01),
        "siglip": lambda a, b: reference.siglip_loss(a, b, temperature=0.01),
        "sup_con": lambda a, b: reference.sup_con_loss(a, labels, temperature=0.01),
    }
    for name, loss in losses.items():
        a, b = z1.clone().requires_grad_(), z2.clone().requires_grad_()
        value = loss(a, b)
        exact = loss(z1.double(), z2.double())
        assert value.item() == pytest.approx(exact.item(), rel=1e-5), name
        grads = [g for g in gradients(value, a, b) if g is not None]
        assert all(g.isfinite().all() for g in grads), name
        assert (grads[0][2] == 0).all(), name  # a zero row has no direction to change


def test_a_certain_answer_keeps_its_digits_at_temperature_001():
    """The loss of a found positive is e^-x, not the rounding error of two numbers near 100."""
    q = torch.eye(3)
    k = F.normalize(torch.eye(3) + 0.45)
    exact = reference.info_nce(q.double(), k.double(), temperature=0.05).item()
    assert exact < 1e-3
    assert reference.info_nce(q, k, temperature=0.05).item() == pytest.approx(exact, abs=2e-7)


def test_collapsed_embeddings_are_never_right():
    same = torch.ones(5, 3)
    labels = torch.tensor([0, 0, 1, 1, 2])
    counting = {"return_correct": True}
    for _, correct in (
        reference.info_nce(same, same, **counting),
        reference.info_nce(same, same, symmetric=True, **counting),
        reference.info_nce(same, same, negatives=same, **counting),
        reference.nt_xent(same, same, **counting),
        reference.siglip_loss(same, same, **counting),
        reference.sup_con_loss(same, labels, **counting),
    ):
        assert correct == 0
    assert reference.nt_xent(same[:1], same[:1], **counting)[1] == 2
    assert reference.info_nce(same[:1], same[:1], **counting)[1] == 1
    assert reference.sup_con_loss(same, torch.zeros(5).long(), **counting)[1] == 5


def _contrastive_calls():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    return {
        "info_nce": lambda a, b, part, g: reference.info_nce(
            a[part], b[part], temperature=0.3, process_group=g
        ),
        "symmetric": lambda a, b, part, g: reference.info_nce(
            a[part], b[part], temperature=0.3, symmetric=True, process_group=g
        ),
        "queue": lambda a, b, part, g: reference.info_nce(
            a[part], b[part], negatives=b.detach(), temperature=0.3, process_group=g
        ),
        "nt_xent": lambda a, b, part, g: reference.nt_xent(
            a[part], b[part], temperature=0.3, process_group=g
        ),
        "siglip": lambda a, b, part, g: reference.siglip_loss(
            a[part], b[part], temperature=0.3, logit_bias=-1.0, process_group=g
        ),
        "sup_con": lambda a, b, part, g: reference.sup_con_loss(
            a[part], labels[part], temperature=0.3, process_group=g
        ),
    }


def _one_rank(rank, ranks, whole, one_process):
    group = torch.distributed.group.WORLD
    bounds = [0, 5, 7]  # uneven on purpose
    part = slice(bounds[rank], bounds[rank + 1])
    for name, call in _contrastive_calls().items():
        a, b = (x.clone().requires_grad_() for x in whole)
        loss = call(a, b, part, group)
        # parameters shared by all rows see the mean of the ranks' gradients, as under DDP
        grads = [
            torch.zeros_like(x) if g is None else g
            for x, g in zip((a, b), gradients(loss, a, b), strict=True)
        ]
        results = [loss.detach().reshape(1), *grads]
        for result in results:
            torch.distributed.all_reduce(result)
        for result, expected in zip(results, one_process[name], strict=True):
            torch.testing.assert_close(result / ranks, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_process_group_gives_the_gradients_of_one_process(tmp_path):
    whole = tuple(torch.randn(7, 4, dtype=torch.float64) for _ in range(2))
    one_process = {}
    for name, call in _contrastive_calls().items():
        a, b = (x.clone().requires_grad_() for x in whole)
        loss = call(a, b, slice(0, 7), None)
        grads = [
            torch.zeros_like(x) if g is None else g
            for x, g in zip((a, b), gradients(loss, a, b), strict=True)
        ]
        one_process[name] = [loss.detach().reshape(1), *grads]
    processes.run(_one_rank, tmp_path, arguments=(2, whole, one_process))


def test_ema_update():
    targets = [torch.randn(3, 4), torch.randn(500).bfloat16(), torch.tensor(7), torch.randn(0)]
    sources = [torch.randn(3, 4), torch.randn(500), torch.tensor(9), torch.randn(0)]
    before = [t.clone() for t in targets]
    reference.ema_update_(targets, sources, 0.9)
    torch.testing.assert_close(targets[0], 0.9 * before[0] + 0.1 * sources[0])
    expected = (0.9 * before[1].double() + 0.1 * sources[1].double()).bfloat16()
    assert torch.equal(targets[1], expected)  # one rounding, at the end
    assert targets[2] == 9
    one = torch.randn(4)
    same = one.clone()
    reference.ema_update_(one, torch.randn(4), 1.0)
    assert torch.equal(one, same)
    reference.ema_update_(one, sources[0][0], 0.0)
    assert torch.equal(one, sources[0][0])


@pytest.mark.parametrize("size", [1, 4, 7])
def test_queue_push(size):
    queue, pointer = torch.full((3, size), -1.0), torch.zeros(1, dtype=torch.int64)
    expected, cursor, number = [-1.0] * size, 0, 0
    for count in (2, 0, 3, 1, 7, 5, 20):
        keys = torch.arange(number, number + count).float()[:, None] + torch.tensor([0, 0.25, 0.5])
        reference.queue_push_(queue, pointer, keys)
        for i in range(count):
            expected[(cursor + i) % size] = float(number + i)
        cursor, number = (cursor + count) % size, number + count
        assert queue[0].tolist() == expected
        assert queue[2].tolist() == [x + 0.5 if x >= 0 else x for x in expected]
        assert pointer.item() == cursor
