"""The reference of mlm_mask against Python's integers, known answers and statistics."""

import math

import pytest
import torch

from apt_kernels import reference


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32-10."""
    from apt_kernels.reference.masking import philox4x32

    for counter, key, expected in (
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        words = philox4x32([torch.tensor([c]) for c in counter], key)
        assert " ".join(f"{int(word):08x}" for word in words) == expected


def _philox_in_python(counter, key):
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _mlm_mask_in_python(
    ids, *, mask_token_id, vocab_size, mask_prob, mask_token_prob, random_token_prob, special,
    special_mask, attention, seed, step, samples, words, at_least_one,
):  # fmt: skip
    """One pass over each row with Python's integers, as the rules are written."""
    special = sorted({*special, mask_token_id})
    rows = []
    for b, row in enumerate(ids):
        sample = samples[b] % 2**64
        draws, best, labels, start = [], None, [-100] * len(row), 0
        for t, token in enumerate(row):
            counter = (t, step, sample % 2**32, sample >> 32)
            w = _philox_in_python(counter, (seed % 2**32, seed % 2**64 >> 32))
            draws.append(w)
            group = t
            if words is not None:
                start = t if t == 0 or words[b][t] != words[b][t - 1] else start
                group = start
            eligible = token not in special and attention[b][t] and not special_mask[b][t]
            eligible = eligible and (words is None or words[b][t] >= 0)
            if not eligible:
                continue
            if draws[group][0] < round(mask_prob * 2**32):
                labels[t] = token
            if best is None or (draws[group][0], group) < best[0]:
                best = ((draws[group][0], group), [t])
            elif (draws[group][0], group) == best[0]:
                best[1].append(t)
        if at_least_one and best and all(label == -100 for label in labels):
            for t in best[1]:
                labels[t] = row[t]
        out = list(row)
        for t, label in enumerate(labels):
            if label == -100:
                continue
            _, w1, w2, _ = draws[t]
            if w1 < round(mask_token_prob * 2**32):
                out[t] = mask_token_id
            elif w1 < round((mask_token_prob + random_token_prob) * 2**32):
                word = w2 * (vocab_size - len(special)) // 2**32
                for e in special:
                    word += word >= e
                out[t] = word
        rows.append((out, labels, [label != -100 for label in labels]))
    return [list(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("mask_prob", [0.0, 0.03, 0.4, 1.0])
def test_mlm_mask_by_python_integers(mask_prob, at_least_one, words):
    torch.manual_seed(5)
    ids = torch.randint(0, 30, (9, 17))
    attention = torch.rand(9, 17) > 0.2
    attention[3] = False
    special_mask = torch.rand(9, 17) > 0.9
    word_ids = torch.randint(-1, 3, (9, 17)) if words else None
    samples = torch.tensor([0, 1, 2**31, 2**32 + 1, -1, 7, 8, 2**62, 3])
    probabilities = dict(mask_prob=mask_prob, mask_token_prob=0.5, random_token_prob=0.4)
    common = dict(mask_token_id=4, vocab_size=30, at_least_one=at_least_one, step=2**32 - 1)
    for seed in (0, -3, 2**63 + 5):
        before = ids.clone()
        got = reference.mlm_mask(
            ids, special_token_ids=[0, 29, 4, 7, 7, 100], special_tokens_mask=special_mask,
            attention_mask=attention, seed=seed, sample_ids=samples, word_ids=word_ids, **common,
            **probabilities,
        )  # fmt: skip
        expected = _mlm_mask_in_python(
            ids.tolist(), special=[0, 29, 4, 7], special_mask=special_mask.tolist(),
            attention=attention.tolist(), seed=seed, samples=samples.tolist(),
            words=word_ids.tolist() if words else None, **common, **probabilities,
        )  # fmt: skip
        assert [x.tolist() for x in got] == expected
        assert torch.equal(ids, before) and got[2].dtype == torch.bool
        assert got[0].data_ptr() != ids.data_ptr()
    small = reference.mlm_mask(ids.int(), seed=1, mask_token_id=4, vocab_size=30)
    large = reference.mlm_mask(ids, seed=1, mask_token_id=4, vocab_size=30)
    assert small[0].dtype == small[1].dtype == torch.int32
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a.long(), b.long())


def test_mlm_mask_depends_on_seed_step_sample_and_position_alone():
    ids = torch.randint(5, 1000, (64, 40))
    call = dict(mask_token_id=4, vocab_size=1000, seed=11)
    whole = reference.mlm_mask(ids, **call)
    order = torch.randperm(64)
    shuffled = reference.mlm_mask(ids[order], sample_ids=order, **call)
    part = reference.mlm_mask(ids[10:13, :25], sample_ids=torch.arange(10, 13), **call)
    for a, b, c in zip(whole, shuffled, part, strict=True):
        assert torch.equal(a[order], b)
        assert torch.equal(a[10:13, :25], c)
    for changed in (dict(seed=12), dict(step=1), dict(sample_ids=torch.arange(64) + 64)):
        other = reference.mlm_mask(ids, **{**call, **changed})
        # two independent masks of 15 % agree on 0.15^2 + 0.85^2 = 74.5 % of the slots
        agreement = (other[2] == whole[2]).double().mean().item()
        assert agreement == pytest.approx(0.745, abs=0.03)


def test_mlm_mask_statistics():
    """80/10/10 by chi-square, random words uniform over the allowed ones; fixed seed."""
    rows, length, vocab = 400, 500, 50
    special = [0, 1, 2, 3, 4, 25, 49]
    ids = torch.full((rows, length), 30)
    masked, labels, chosen = reference.mlm_mask(
        ids, mask_token_id=4, vocab_size=vocab, special_token_ids=special, seed=2024
    )
    count = rows * length
    assert abs(chosen.sum().item() - 0.15 * count) < 4 * math.sqrt(count * 0.15 * 0.85)
    assert torch.equal(labels, torch.where(chosen, ids, -100))
    assert torch.equal(masked[~chosen], ids[~chosen])
    kept = (masked[chosen] == 30).sum().item()
    to_mask = (masked[chosen] == 4).sum().item()
    drawn = masked[chosen & (masked != 4) & (masked != 30)]
    n = chosen.sum().item()
    allowed = vocab - len(special)
    expected = [0.8 * n, 0.1 * n * (1 + 1 / allowed), 0.1 * n * (1 - 1 / allowed)]
    observed = [to_mask, kept, len(drawn)]
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert chi_square < 13.8  # 0.999 quantile, 2 degrees of freedom
    histogram = torch.bincount(drawn, minlength=vocab).double()
    assert (histogram[special] == 0).all()
    bins = [v for v in range(vocab) if v not in special and v != 30]
    mean = len(drawn) / len(bins)
    chi_square = ((histogram[bins] - mean) ** 2 / mean).sum().item()
    assert chi_square < 79.5  # 0.999 quantile, 41 degrees of freedom


def test_mlm_mask_draws_the_ends_of_the_vocabulary():
    ids = torch.full((200, 500), 3)
    masked, _, chosen = reference.mlm_mask(
        ids, mask_token_id=1, vocab_size=6, special_token_ids=[0], mask_prob=1.0,
        mask_token_prob=0.0, random_token_prob=1.0, seed=5,
    )  # fmt: skip
    assert chosen.all() and masked.unique().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_mlm_mask_of_nothing(shape):
    outputs = reference.mlm_mask(
        torch.zeros(shape).long(), mask_token_id=1, vocab_size=6, seed=0, at_least_one=True,
        word_ids=torch.zeros(shape).long(),
    )  # fmt: skip
    assert all(x.shape == shape for x in outputs)
