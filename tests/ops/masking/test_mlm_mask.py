"""What the table of operations cannot say of mlm_mask: random numbers, statistics, NumPy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from apt_kernels import backends, mlm_mask
from apt_kernels.calls import fresh
from apt_kernels.reference.masking import philox4x32
from apt_kernels.registry import OPS

BACKENDS = backends()["operations"]["mlm_mask"]["cpu"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
BERT = {"mask_token_id": 103, "vocab_size": 30522, "special_token_ids": (0, 100, 101, 102)}
SPECIAL = torch.tensor([0, 100, 101, 102, 103])


def _ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1000, 30522, shape, generator=torch.Generator().manual_seed(seed))


@each_backend
@pytest.mark.parametrize("key, step, sample, slot", [
    (0, 0, 0, 0),  # Random123's first known answer: 6627e8d5 e169c58d bc57ac4c
    (0x299F31D0A4093822, 0x85A308D3, 0x0370734413198A2E, 5),
    (2**64 - 1, 2**32 - 1, -1, 129),
])  # fmt: skip
def test_every_bit_of_the_random_words(backend, key, step, sample, slot):
    """w0 and w1 lie exactly where their thresholds say; w2 shows in a vocabulary of 2^31 - 1."""
    counter = (slot, step, sample % 2**32, sample >> 32 & 0xFFFFFFFF)
    words = philox4x32([torch.tensor(c) for c in counter], (key % 2**32, key >> 32))
    w0, w1, w2, _ = (int(word) for word in words)
    if key == 0:
        assert (w0, w1, w2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C)
    V = 2**31 - 1

    def call(chosen, masked, random):
        results = mlm_mask(
            torch.full((1, slot + 1), 7),
            mask_token_id=V,  # none of the ids: all V words can be drawn
            vocab_size=V,
            mask_prob=chosen / 2**32,
            mask_token_prob=masked / 2**32,
            random_token_prob=random / 2**32,
            seed=key,
            step=step,
            sample_ids=torch.tensor([sample]),
            backend=backend,
        )
        return tuple(int(r[0, slot]) for r in results)

    assert call(w0, 2**32, 0) == (7, -100, 0)
    assert call(w0 + 1, 2**32, 0) == (V, 7, 1)
    assert call(w0 + 1, w1 + 1, 0) == (V, 7, 1)
    assert call(w0 + 1, w1, 0) == (7, 7, 1)
    assert call(w0 + 1, w1, 1) == (w2 * V >> 32, 7, 1)
    assert call(w0 + 1, 0, w1) == (7, 7, 1)


def test_special_ids_that_can_be_gone_through_once_and_numbers_of_numpy():
    ids = torch.randint(0, 50, (4, 64), generator=torch.Generator().manual_seed(0))
    options = dict(mask_token_id=4, vocab_size=50, mask_prob=0.9, seed=3, step=2)
    expected = mlm_mask(ids, special_token_ids=[0, 1, 2, 49], **options)
    numbers = np.array([0, 1, 2, 49])
    for special in (iter([0, 1, 2, 49]), map(int, numbers), numbers, set(numbers.tolist())):
        for got, wanted in zip(
            mlm_mask(ids, special_token_ids=special, **options), expected, strict=True
        ):
            assert torch.equal(got, wanted)
    options = {k: np.int64(v) if isinstance(v, int) else v for k, v in options.items()}
    got = mlm_mask(ids.numpy(), special_token_ids=numbers, **options)
    assert all((a == b.numpy()).all() for a, b in zip(got, expected, strict=True))


@each_backend
def test_a_sample_is_masked_alike_in_every_batch(backend):
    """Whatever the batch's size, its order and its padding."""
    ids, samples = _ids(12, 70), torch.arange(100, 112) * 10**12
    options = BERT | {"seed": 5, "step": 3, "at_least_one": True, "backend": backend}
    together = mlm_mask(ids, sample_ids=samples, **options)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = mlm_mask(ids[order], sample_ids=samples[order], **options)
    for i in range(12):
        alone = mlm_mask(ids[i : i + 1], sample_ids=samples[i : i + 1], **options)
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one[0], many[i])
    for some, many in zip(shuffled, together, strict=True):
        assert torch.equal(some, many[order])
    padded = torch.nn.functional.pad(ids, (0, 30))
    live = torch.arange(100).expand(12, -1) < 70
    longer = mlm_mask(padded, attention_mask=live, sample_ids=samples, **options)
    for long, short in zip(longer, together, strict=True):
        assert torch.equal(long[:, :70], short)
    assert not longer[2][:, 70:].any() and (longer[0][:, 70:] == 0).all()


@each_backend
def test_seeds_steps_samples_and_slots_draw_independently(backend):
    """Two draws agree where chance says: neighbours share nothing."""
    ids = _ids(8, 512)
    options = BERT | {"mask_prob": 0.5, "backend": backend}
    base = mlm_mask(ids, seed=1, step=0, **options)[2]
    others = {
        "seed": mlm_mask(ids, seed=2, step=0, **options)[2],
        "high half of the seed": mlm_mask(ids, seed=1 + 2**32, step=0, **options)[2],
        "step": mlm_mask(ids, seed=1, step=1, **options)[2],
        "sample": base.roll(1, 0),
        "slot": base.roll(1, 1),
    }
    for name, other in others.items():
        agree = int((base == other).sum())
        assert abs(agree - 2048) < 5 * 32, name  # 5 standard deviations of 4096 fair coins


def _chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


@each_backend
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_statistics(backend, seed):
    """15 % chosen and of these 80/10/10; critical values are those of p = 1e-4."""
    rows, length = (256, 512) if backend != "triton" else (16, 512)
    ids = _ids(rows, length)
    masked, labels, chosen = mlm_mask(ids, **BERT, seed=seed, backend=backend)
    total, count = ids.numel(), float(chosen.sum())
    share = torch.tensor([count, total - count], dtype=torch.float64)
    assert _chi_square(share, total * torch.tensor([0.15, 0.85]).double()) < 15.14  # 1 degree
    assert torch.equal(labels, torch.where(chosen, ids, -100))
    assert torch.equal(masked[~chosen], ids[~chosen])
    outcome = masked[chosen]
    kinds = [outcome == 103, outcome == ids[chosen]]
    kinds = torch.stack([kinds[0], ~kinds[0] & ~kinds[1], kinds[1]]).sum(1).double()
    assert _chi_square(kinds, count * torch.tensor([0.8, 0.1, 0.1]).double()) < 18.42  # 2 degrees


@each_backend
def test_random_words_are_uniform_over_ordinary_ids(backend):
    rows = 64 if backend != "triton" else 8
    special = (0, 3, 4, 5, 19, 39)
    ids = torch.full((rows, 1024), 20)
    masked, _, chosen = mlm_mask(
        ids,
        mask_token_id=7,
        vocab_size=40,
        special_token_ids=special,
        mask_prob=1.0,
        mask_token_prob=0.0,
        random_token_prob=1.0,
        seed=3,
        backend=backend,
    )
    assert chosen.all()
    counts = masked.flatten().bincount(minlength=40).double()
    ordinary = torch.ones(40, dtype=torch.bool)
    ordinary[list(special) + [7]] = False
    assert (counts[~ordinary] == 0).all() and len(counts) == 40
    expected = torch.full((33,), ids.numel() / 33, dtype=torch.float64)
    assert _chi_square(counts[ordinary], expected) < 73.0  # p = 1e-4 at 32 degrees: 72.2


@each_backend
def test_special_ids_are_neither_chosen_nor_drawn(backend):
    ids = torch.randint(0, 200, (16, 256), generator=torch.Generator().manual_seed(2))
    options = BERT | {"vocab_size": 200, "mask_prob": 0.9, "mask_token_prob": 0.0}
    masked, labels, chosen = mlm_mask(
        ids, random_token_prob=1.0, seed=1, backend=backend, **options
    )
    special = torch.isin(ids, SPECIAL)
    assert special.any() and not chosen[special].any()
    assert not torch.isin(masked[chosen], SPECIAL).any()
    assert not torch.isin(labels, SPECIAL).any()


@each_backend
def test_at_least_one(backend):
    """Short sequences: the one that is chosen is any of them equally often."""
    rows = 2000 if backend != "triton" else 150
    ids = _ids(rows, 4)
    options = BERT | {"seed": 1, "backend": backend}
    plain = mlm_mask(ids, **options)[2]
    chosen = mlm_mask(ids, at_least_one=True, **options)[2]
    empty = ~plain.any(1)
    assert 0.4 < empty.double().mean() < 0.65  # 0.85^4 = 52 %
    assert torch.equal(chosen[~empty], plain[~empty])
    assert (chosen[empty].sum(1) == 1).all()
    expected = torch.full((4,), float(empty.sum()) / 4, dtype=torch.float64)
    assert _chi_square(chosen[empty].sum(0).double(), expected) < 21.1  # 3 degrees
    nothing = mlm_mask(torch.full((3, 4), 101), at_least_one=True, **options)
    assert not nothing[2].any() and (nothing[0] == 101).all() and (nothing[1] == -100).all()


@each_backend
def test_whole_words(backend):
    """A word is chosen with the probability of a token; its tokens are treated each by itself."""
    rows = 200 if backend != "triton" else 20
    words = torch.arange(300).expand(rows, -1) // 3
    ids = _ids(rows, 300)
    masked, _, chosen = mlm_mask(ids, word_ids=words, **BERT, seed=9, backend=backend)
    by_word = chosen.view(rows, 100, 3)
    assert torch.equal(by_word.any(-1), by_word.all(-1))
    count = by_word.any(-1).sum().double()
    total = rows * 100
    share = torch.stack([count, total - count])
    assert _chi_square(share, total * torch.tensor([0.15, 0.85]).double()) < 15.14
    kept = (masked == ids).view(rows, 100, 3)[by_word.any(-1)]
    assert (kept.any(-1) & ~kept.all(-1)).any()


@each_backend
def test_words_with_special_slots_and_equal_numbers_apart(backend):
    ids = _ids(1, 8)
    ids[0, 2] = 101
    words = torch.tensor([[5, 5, 5, 1, 1, 5, -1, -1]])
    options = BERT | {"word_ids": words, "at_least_one": True, "mask_prob": 0.0}
    seen = set()
    for seed in range(60):
        chosen = mlm_mask(ids, seed=seed, backend=backend, **options)[2][0]
        seen.add(tuple(chosen.nonzero().flatten().tolist()))
    assert seen == {(0, 1), (3, 4), (5,)}


@each_backend
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_arrays_give_arrays_with_the_same_bits(backend, dtype):
    for sample in OPS["mlm_mask"].samples(torch.from_numpy(np.empty(0, dtype)).dtype):
        sample = fresh(sample)
        if backend == "triton" and sample.args[0].numel() > 500:
            continue
        tensors = mlm_mask(*sample.args, **sample.kwargs, backend="reference")
        given = [t.numpy() for t in sample.args]
        options = {
            k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()
        }
        for array in (*given, *options.values()):
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results = mlm_mask(*given, **options, backend=backend)
        for got, wanted in zip(results, tensors, strict=True):
            assert isinstance(got, np.ndarray) and got.dtype == wanted.numpy().dtype
            np.testing.assert_array_equal(got, wanted.numpy(), err_msg=sample.name)
            assert got.flags.writeable


def test_arrays_of_wrong_kinds_are_rejected():
    ids, options = np.zeros((2, 3), np.int64), BERT | {"seed": 0}
    with pytest.raises(TypeError, match=r"attention_mask: expected a NumPy array.*got Tensor"):
        mlm_mask(ids, attention_mask=torch.ones(2, 3), **options)
    with pytest.raises(TypeError, match="input_ids: expected an array of numbers, got dtype <U1"):
        mlm_mask(ids.astype("<U1"), **options)
    with pytest.raises(TypeError, match="input_ids: expected dtype int64, int32"):
        mlm_mask(ids.astype(np.float32), **options)
    with pytest.raises(ValueError, match=r"word_ids: .*\(2, 3\)"):
        mlm_mask(ids, word_ids=ids[:1], **options)


def test_the_result_does_not_depend_on_threads():
    ids, options = _ids(100, 333), BERT | {"seed": 3, "at_least_one": True, "mask_prob": 0.005}
    one = mlm_mask(ids, **options)
    torch.set_num_threads(4)
    try:
        several = mlm_mask(ids, **options)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, several))
