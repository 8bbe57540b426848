"""Texts for encoders: lengths, windows, whole words, contrastive rows."""

import json
from collections import Counter

import pytest
import torch

from apt_kernels.ops.masking.tokenizer_ids import never_words
from apt_model.data.duplicates import batches_apart, count_batches, groups_of
from apt_model.data.lengths import (
    LengthLimit,
    check_max_length,
    positions_of,
    resolved_max_length,
    windows,
)  # fmt: skip
from apt_model.data.order import ShuffledBatches
from apt_model.data.sentences import segments, split_sentences
from apt_model.data.texts import MaskedTexts, SentencePairs, Text, TextViews
from apt_model.data.words import check_tells_words, token_words
from support import tiny_tokenizers as tiny

# T11, T12: positions


def config_of(name, **options):
    import transformers

    return getattr(transformers, name)(**options)


@pytest.mark.parametrize(
    ("name", "options", "count", "is_table"),
    [
        ("GPT2Config", {"n_positions": 4}, 4, True),
        ("BertConfig", {"max_position_embeddings": 32}, 32, True),
        ("RobertaConfig", {"max_position_embeddings": 34, "pad_token_id": 1}, 32, True),
        ("LlamaConfig", {"max_position_embeddings": 64}, 64, False),
        ("EsmConfig", {"position_embedding_type": "rotary", "pad_token_id": 1}, 1026, False),
        ("T5Config", {}, None, None),
    ],
)
def test_positions_of_models(name, options, count, is_table):
    config = config_of(name, **options)
    assert positions_of(config) == (None if count is None else (count, is_table))
    tokenizer = tiny.byte_level()
    if count is not None:
        check_max_length(config, tokenizer, count)
        with pytest.raises(ValueError, match=rf"--max-length {count + 1} .* the {count} positions"):
            check_max_length(config, tokenizer, count + 1)
        with pytest.raises(ValueError, match=r"with 3 new tokens .* --max-length \d"):
            check_max_length(config, tokenizer, count - 2, new_tokens=3)


def test_roberta_takes_as_many_tokens_as_are_told():
    config = config_of(
        "RobertaConfig", max_position_embeddings=12, pad_token_id=1, vocab_size=20, hidden_size=8,
        num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip
    from transformers import RobertaModel

    model, most = RobertaModel(config), positions_of(config).count
    assert model(torch.full((1, most), 5)).last_hidden_state.shape[1] == most == 10
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))


def test_the_default_is_no_more_than_a_table_has():
    tokenizer = tiny.word_piece()
    small = config_of("BertConfig", max_position_embeddings=32)
    assert resolved_max_length(small, tokenizer, None, 128) == 32
    assert LengthLimit.of(small, tokenizer, None, 128) == (32, False)
    assert LengthLimit.of(small, tokenizer, 32, 128) == (32, True)
    assert LengthLimit.of(config_of("LlamaConfig"), tokenizer, None, 4096) == (4096, True)
    text = [Text("film " * 31)]
    with pytest.raises(ValueError, match="a row has 33 tokens, but the model has 32 positions"):
        MaskedTexts(text, tokenizer, LengthLimit(32, False))
    with pytest.raises(ValueError, match="give --max-length 32"):
        TextViews(text, tokenizer, LengthLimit(32, False))
    assert len(MaskedTexts(text, tokenizer, 32)) == 2


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_without_room_for_text_is_an_error(length):
    tokenizer = tiny.word_piece()
    message = rf"--max-length {length} leaves no room for text"
    with pytest.raises(ValueError, match=message):
        check_max_length(config_of("BertConfig"), tokenizer, length)
    with pytest.raises(ValueError, match=message):
        MaskedTexts([Text("a film")], tokenizer, length)


# T8: long texts


def test_windows_cover_a_text_and_do_not_cut_words():
    assert windows(0, 4) == [] and windows(4, 4) == [(0, 4)]
    assert windows(10, 4) == [(0, 4), (4, 7), (7, 10)]
    words = [0, 0, 1, 1, 1, 2, 3, 3]
    assert windows(8, 4, words) == [(0, 2), (2, 5), (5, 8)]
    assert windows(6, 2, [0] * 6) == [(0, 2), (2, 4), (4, 6)]


def tokens_of(data):
    """Returns the tokens of all sequences without the special ones."""
    special = {2, 3}
    batch = data(list(range(len(data))), 0)
    return [
        [i for i, m in zip(ids, mask) if m and i not in special]
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist())
    ]


def joined(lists):
    return [item for part in lists for item in part]


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_long_text_becomes_windows_is_packed_or_cut(whole_word):
    tokenizer = tiny.word_piece()
    texts = [Text("the film was unbelievable . " * 60), Text("nobody laughed"), Text("a film")]
    alone = [tokenizer(text.text, add_special_tokens=False)["input_ids"] for text in texts]
    made = {}
    for kind in ("window", "pack", "cut"):
        counts = Counter()
        data = MaskedTexts(texts, tokenizer, 20, whole_word, kind, counts)
        batch = data(list(range(len(data))), 0)
        assert batch["input_ids"].shape[1] <= 20 and (batch["input_ids"][:, 0] == 2).all()
        assert torch.equal(batch["sample_ids"], torch.arange(len(data)))
        made[kind] = (tokens_of(data), counts)
        if whole_word:
            inside = (batch["attention_mask"] == 1) & (batch["input_ids"] > 4)
            assert ((batch["word_ids"] >= 0) == inside).all()
    sequences, counts = made["window"]
    assert joined(sequences) == joined(alone) and sequences[-2:] == alone[1:]
    assert counts == {"rows_split": 1, "sequences": len(sequences)}
    packed, counts = made["pack"]
    assert joined(packed) == joined(alone) and len(packed) < len(sequences)
    cut, counts = made["cut"]
    assert cut == [alone[0][:18], *alone[1:]]
    assert counts == {"rows_cut": 1, "tokens_cut": len(alone[0]) - 18, "sequences": 3}


def test_marks_that_are_there_are_not_written_again():
    tokenizer = tiny.word_piece()
    ids = MaskedTexts([Text("[CLS] a film [SEP]")], tokenizer, 20, True)([0], 0)
    assert ids["input_ids"].tolist() == [tokenizer("a film")["input_ids"]]
    assert ids["word_ids"].tolist()[0][0] == ids["word_ids"].tolist()[0][-1] == -1


def test_the_tokenizer_stays_as_it_came():
    tokenizer = tiny.word_piece()
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.to_str()
    texts = [Text("a film was good . " * 9)] * 2
    MaskedTexts(texts, tokenizer, 8, True)
    TextViews(texts, tokenizer, 8)([0, 1], 0)
    SentencePairs([["a film was good", "bad", "no"]], tokenizer, 9, 0)([0], 0)
    assert tokenizer.backend_tokenizer.to_str() == before


# T9: sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('He said "no." Then... left?! Yes', ['He said "no."', "Then...", "left?!", "Yes"]),
        ("It is 3.14 or a.b. c", ["It is 3.14 or a.b.", "c"]),
        ("今天。「好。」他？行", ["今天。", "「好。」", "他？", "行"]),
        ("यह है। वह॥", ["यह है।", "वह॥"]),
        ("هل؟ نعم۔ لا", ["هل؟", "نعم۔", "لا"]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences_of_any_script(text, expected):
    assert split_sentences(text) == expected


def test_no_sentence_of_a_document_is_left_out():
    for count in range(2, 12):
        sentences = [f"{n}." for n in range(count)]
        for size in range(1, 6):
            made = segments(sentences, size)
            assert " ".join(made).split() == sentences and len(made) >= 2
            assert max(len(part.split()) for part in made) <= size


def test_pairs_that_are_cut_are_counted():
    counts = Counter()
    SentencePairs([["a b c d e f", "g h i", "a"]], tiny.word_piece(), 9, 0, counts=counts)
    assert counts == {"rows_cut": 1, "tokens_cut": 3, "sequences": 2}


# Whole words


WORDS = {
    "byte-level": tiny.byte_level,
    "SentencePiece": tiny.sentence_piece,
    "SentencePiece that splits nothing": lambda: tiny.sentence_piece(split=False),
    "WordPiece": tiny.word_piece,
}


@pytest.mark.parametrize("kind", WORDS)
def test_whole_words_are_words_for_every_tokenizer(kind):
    tokenizer = WORDS[kind]()
    text = "nobody laughed at unbelievable things, a film"
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    numbers = token_words(text, made["offset_mapping"])
    words = {}
    for number, (a, b) in zip(numbers, made["offset_mapping"], strict=True):
        words.setdefault(number, []).append(text[a:b])
    joined = ["".join(parts).strip() for _, parts in sorted(words.items())]
    expected = ["nobody", "laughed", "at", "unbelievable", "things", ",", "a", "film"]
    if "," not in joined:  # a tokenizer may put the comma and its word into one token
        expected[4:6] = ["things,"]
    assert joined == expected
    batch = MaskedTexts([Text(text)], tokenizer, 60, whole_word=True)([0], 0)
    inside = batch["word_ids"][0] >= 0
    assert batch["word_ids"][0][inside].tolist() == numbers
    special = torch.tensor(tokenizer.all_special_ids)
    assert torch.equal(~inside, torch.isin(batch["input_ids"][0], special))


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece that splits nothing"])
def test_scripts_without_spaces_have_many_words(kind):
    tokenizer, text = WORDS[kind](), "明年冬季在家"
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    numbers = token_words(text, made["offset_mapping"])
    covered = [set(range(a, b)) for a, b in made["offset_mapping"]]
    for m, n in zip(range(len(numbers)), range(1, len(numbers))):
        same = bool(covered[m] & covered[n]) or not (covered[m] and text[min(covered[m])].strip())
        assert (numbers[m] == numbers[n]) == same
    assert len(set(numbers)) > 2


def test_a_tokenizer_that_tells_no_words_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match="--whole-word: ByT5Tokenizer does not tell where"):
        check_tells_words(ByT5Tokenizer())


def test_ids_that_are_no_words():
    tokenizer = tiny.word_piece()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert never_words(tokenizer, size + 4) == [0, 1, 2, 3, 4, size, size + 1, size + 2, size + 3]


# T13: contrastive rows


def test_rows_that_share_a_text_are_one_group():
    groups = groups_of([("a", "b"), ("c", "c"), ("b", "d"), ("e", "e"), ("d", "f")])
    assert groups[0] == groups[2] == groups[4] != groups[1] != groups[3] != groups[0]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3, 4, 8, 30])
def test_no_batch_holds_two_rows_of_a_group(whole, batch_size):
    groups = [n % 7 for n in range(14)] + [50] * 5 + list(range(100, 107))
    batches = ShuffledBatches(
        len(groups), batch_size, 1, lambda rows, step: rows, whole=whole, groups=groups
    )
    epochs = [
        [batches[epoch * batches.per_epoch + n] for n in range(batches.per_epoch)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        used = [row for batch in epoch for row in batch]
        assert len(used) == len(set(used))
        for batch in epoch:
            assert 0 < len(batch) <= batch_size
            assert len({groups[row] for row in batch}) == len(batch)
        if not whole:
            assert len(used) == len(groups) - batches.left_out
    assert epochs[0] != epochs[1]


def test_rows_without_duplicates_keep_their_order():
    plain = ShuffledBatches(9, 4, 3, lambda rows, step: rows)
    grouped = ShuffledBatches(9, 4, 3, lambda rows, step: rows, groups=list(range(9)))
    assert [plain[n] for n in range(6)] == [grouped[n] for n in range(6)]
    assert count_batches([1] * 5, 2, True) == 1 and batches_apart([1, 0], [0, 0], 2, 1) == [[1]]


def test_negatives_join_the_batch():
    tokenizer = tiny.word_piece()
    rows = [Text("a film", "the film", "no things"), Text("b", None, "a film"), Text("c")]
    views = TextViews(rows, tokenizer, 20)
    batch = views([0, 1, 2], 0)
    sides = [
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch[f"input_ids_{n}"]]
        for n in (1, 2)
    ]
    assert sides[0] == ["a film", "b", "c", "no things"]
    assert sides[1] == ["the film", "b", "c", "no things"]
    assert len(views) == 3 and views([2], 0)["input_ids_1"].shape[0] == 1
    assert json.dumps(views.groups)
