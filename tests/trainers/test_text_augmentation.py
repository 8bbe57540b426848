"""TextAugmentation against its definition, token by token."""

import pytest
import torch

from apt_model.pretraining.contrastive_pretrain import TextAugmentation

IDS = torch.randint(5, 30, (7, 11), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([11, 9, 7, 5, 3, 2, 1])
MASK = (torch.arange(11) < LENGTHS[:, None]).long()
PADDED = IDS * MASK


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def draws(shape, seed=1):
    return torch.rand(shape, generator=generator(seed))


def swapped_by_hand(row, chosen):
    row = row.tolist()
    for i in range(1, len(row) - 1):
        if chosen[i]:
            row[i], row[i + 1] = row[i + 1], row[i]
    return row


def test_swaps_go_from_left_to_right():
    for seed, probability in ((1, 0.1), (2, 0.5), (3, 0.9), (4, 1.0), (5, 0.0)):
        before = IDS.clone()
        ours = TextAugmentation.random_swap(IDS, probability, generator=generator(seed))
        assert torch.equal(IDS, before) and ours.dtype == IDS.dtype
        chosen = draws(IDS.shape, seed) < probability
        assert ours.tolist() == [
            swapped_by_hand(row, c) for row, c in zip(IDS, chosen, strict=True)
        ]
        assert torch.equal(ours[:, 0], IDS[:, 0])


def test_swaps_leave_padding_and_specials():
    ids = PADDED.clone()
    ids[0, 4] = 3
    for options in ({"attention_mask": MASK}, {"pad_token_id": 0}):
        ours = TextAugmentation.random_swap(ids, 1.0, special_ids=(3,), **options)
        assert torch.equal(ours * (1 - MASK), torch.zeros_like(ours)) and ours[0, 4] == 3
        expected = ids[0].tolist()
        expected[1:4] = [*expected[2:4], expected[1]]
        expected[5:11] = [*expected[6:11], expected[5]]
        assert ours[0].tolist() == expected
        assert torch.equal(ours.sort(1).values, ids.sort(1).values)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.9, 1.0])
def test_deletion_packs_the_survivors(probability):
    ours, mask = TextAugmentation.random_delete(IDS, probability, generator=generator())
    chosen = draws(IDS.shape) < probability
    rows = []
    for row, deleted in zip(IDS.tolist(), chosen.tolist(), strict=True):
        rows.append([row[0]] + [t for t, d in zip(row[1:], deleted[1:], strict=True) if not d])
    longest = max(map(len, rows))
    assert ours.shape == mask.shape == (7, longest)
    for row, real, expected in zip(ours.tolist(), mask.tolist(), rows, strict=True):
        assert row == expected + [0] * (longest - len(expected))
        assert real == [1] * len(expected) + [0] * (longest - len(expected))


def test_deletion_respects_padding_and_specials():
    ids = PADDED.clone()
    ids[0, 4] = 3
    for options in ({"attention_mask": MASK}, {"pad_token_id": 0}):
        ours, mask = TextAugmentation.random_delete(ids, 1.0, special_ids=(3,), **options)
        assert ours[0].tolist() == [int(ids[0, 0]), 3] and mask.sum(1).tolist() == [2] + [1] * 6
        ours, mask = TextAugmentation.random_delete(ids, 0.0, **options)
        assert torch.equal(ours, ids) and torch.equal(mask, MASK)
    left = ids.flip(1), MASK.flip(1)
    ours, mask = TextAugmentation.random_delete(
        left[0], 1.0, attention_mask=left[1], pad_token_id=1
    )
    assert mask.sum(1).tolist() == [1] * 7  # the first real token, not the padding before it
    assert ours[:, 0].tolist() == [int(ids[row, length - 1]) for row, length in enumerate(LENGTHS)]


def test_masking():
    ours = TextAugmentation.random_mask(IDS, 99, 0.4, generator=generator())
    chosen = draws(IDS.shape) < 0.4
    assert torch.equal(ours, torch.where(chosen, 99, IDS)) and chosen.any()
    ids = PADDED.clone()
    ids[0, 4] = 3
    ours = TextAugmentation.random_mask(ids, 99, 1.0, attention_mask=MASK, special_ids=(3,))
    expected = torch.where(MASK == 1, 99, 0)
    expected[0, 4] = 3
    assert torch.equal(ours, expected)


def test_rates():
    ids = torch.randint(5, 30, (200, 101))
    torch.manual_seed(0)
    assert (TextAugmentation.random_mask(ids, 99) == 99).float().mean() == pytest.approx(
        0.15, abs=0.01
    )
    _, mask = TextAugmentation.random_delete(ids)
    assert 1 - mask.sum() / ids.numel() == pytest.approx(0.1, abs=0.01)


def test_reproducible_and_without_rows():
    for function, arguments in (
        (TextAugmentation.random_mask, (99,)),
        (TextAugmentation.random_delete, ()),
        (TextAugmentation.random_swap, ()),
    ):
        first, second, other = (
            function(IDS, *arguments, 0.5, generator=generator(seed)) for seed in (1, 1, 2)
        )
        as_list = [x[0] if isinstance(x, tuple) else x for x in (first, second, other)]
        assert torch.equal(as_list[0], as_list[1])
        assert as_list[0].shape != as_list[2].shape or not torch.equal(as_list[0], as_list[2])
        for shape in ((0, 5), (3, 0), (2, 1)):
            result = function(torch.zeros(shape, dtype=torch.long), *arguments)
            assert len(result[0] if isinstance(result, tuple) else result) == shape[0]
        with pytest.raises(ValueError, match="must be in"):
            function(IDS, *arguments, 1.5)
        with pytest.raises(ValueError, match="integers"):
            function(IDS.float(), *arguments)
        with pytest.raises(ValueError, match="attention_mask"):
            function(IDS, *arguments, attention_mask=MASK[:2])
