"""Reward functions of rows and responses: how they are called, what they return, their errors."""

import asyncio
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from apt_model.rl.reward_functions import RewardFunction, RowReward, Sampled
from apt_model.rl.reward_source import RewardError, RewardSource, TextReward

ROW = {"prompt": "2 + 2", "answer": "4"}


def sampled(*responses, finished=True):
    return [
        Sampled({**ROW, "id": i}, f"data.jsonl:{i + 1}", "2 + 2", text, [i, 9], finished)
        for i, text in enumerate(responses)
    ]


# How they are called


def test_a_row_and_a_response():
    def score(row, response):
        row["answer"] += "!"  # a row of one's own
        return float(row["answer"] == response + "!")

    assert RewardFunction(score)(sampled("4", "5", "4")) == [1.0, 0.0, 1.0]
    assert RewardFunction(score).name == "score"


def test_what_is_asked_for_by_name():
    def score(row, text, finished, *, token_ids, prompt="none"):
        assert prompt == "2 + 2" and text == "4"
        return len(token_ids) + 10 * finished

    def all_of_it(row, response, **known):
        assert sorted(known) == ["finished", "prompt", "token_ids"]
        return 1

    assert RewardFunction(score)(sampled("4")) == [12.0]
    assert RewardFunction(score)(sampled("4", finished=False)) == [2.0]
    assert RewardFunction(all_of_it)(sampled("4")) == [1.0]


def test_a_whole_batch():
    def score(responses, answer, rows, finished, token_ids, prompts):
        assert len(rows) == len(finished) == len(token_ids) == len(prompts) == 2
        return [float(a == r) for a, r in zip(answer, responses, strict=True)]

    def as_in_trl(prompts, completions, completion_ids, answer, **columns):
        assert columns["id"] == [0, 1]
        return np.array([len(ids) + (a == c) for ids, a, c in
                         zip(completion_ids, answer, completions, strict=True)])  # fmt: skip

    assert RewardFunction(score)(sampled("4", "5")) == [1.0, 0.0]
    assert RewardFunction(as_in_trl)(sampled("4", "5")) == [3.0, 2.0]


def test_coroutine_functions_run_side_by_side():
    waiting = []

    async def score(row, response):
        waiting.append(response)
        while len(waiting) < 3:  # all three have begun
            await asyncio.sleep(0)
        return None if response == "none" else float(response)

    class Judge:
        async def __call__(self, responses):
            await asyncio.sleep(0)
            return [asyncio.get_running_loop().time() > 0] * len(responses)

    assert RewardFunction(score)(sampled("1", "none", "3")) == [1.0, None, 3.0]
    assert RewardFunction(Judge())(sampled("1", "2")) == [1.0, 1.0]

    async def within_a_notebook():
        return RewardFunction(score)(sampled("5", "6"))

    assert asyncio.run(within_a_notebook()) == [5.0, 6.0]


def test_a_client_keeps_its_event_loop():
    loops = []

    async def score(row, response):
        loops.append(asyncio.get_running_loop())
        return 0

    RewardFunction(score)(sampled("1"))
    RewardFunction(score)(sampled("1"))
    assert loops[0] is loops[1] and loops[0].is_running()


# What they return


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0), (True, 1.0), (False, 0.0), (-2.5, -2.5), (None, None), (np.float32(0.5), 0.5),
        (np.int64(3), 3.0), (np.bool_(True), 1.0), (np.array(2.0), 2.0), (torch.tensor(0.25), 0.25),
        (torch.tensor([4]), 4.0), (torch.tensor(1.5, requires_grad=True), 1.5),
        (Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5), (torch.tensor(2.0).bfloat16(), 2.0),
    ],
)  # fmt: skip
def test_numbers(value, expected):
    found = RewardFunction(lambda row, response: value)(sampled("4"))
    assert found == [expected] and type(found[0]) in (float, type(None))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "must return a number, or None .*; of data.jsonl:1 it returned str"),
        (b"1", "returned bytes"), ([1.0], "returned list"), ({}, "returned dict"),
        (1j, "returned complex"), (np.complex64(1), "returned complex64"),
        (object, "returned type"),
        (torch.ones(2), "returned Tensor"), (torch.ones(1) * 1j, "returned Tensor"),
        ((x for x in "1"), "returned generator"), (np.ones(3), "returned ndarray"),
        (float("nan"), "must be finite, or None where it abstains; of data.jsonl:1 it is nan"),
        (float("inf"), "it is inf"), (torch.tensor(float("-inf")), "it is -inf"),
        (10**400, "returned int"),
    ],
)  # fmt: skip
def test_what_is_no_number(value, message):
    with pytest.raises(RewardError, match=message) as caught:
        RewardFunction(lambda row, response: value, "happy", "a.py:happy")(sampled("4"))
    assert str(caught.value).startswith("reward a.py:happy ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "returned 1 rewards for 2 responses"),
        ([1.0] * 3, "returned 3 rewards for 2 responses"),
        (None, "must return a list of 2 numbers, one a response, got NoneType"),
        (1.0, "got float"), ("ab", "got str"), ({0: 1.0, 1: 1.0}, "got dict"),
        ([1.0, "1"], "of data.jsonl:2 it returned str '1'"),
        ([1.0, float("nan")], "of data.jsonl:2 it is nan"),
        (torch.tensor(1.0), "got Tensor"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(value, message):
    with pytest.raises(RewardError, match=message):
        RewardFunction(lambda responses: value)(sampled("4", "5"))
    assert RewardFunction(lambda responses: (1.0, None))(sampled("4", "5")) == [1.0, None]


# Errors


def fails_on_5(row, response):
    if response == "5":
        raise KeyError("wanted")
    return 1.0


async def later(row, response):
    await asyncio.sleep(0)
    return fails_on_5(row, response)


class Scorer:
    def __call__(self, row, response):
        return np.zeros(2)[5] if response == "5" else 1.0


@pytest.mark.parametrize("function", [fails_on_5, later])
def test_an_error_names_function_row_and_line(function):
    line = fails_on_5.__code__.co_firstlineno + 2
    with pytest.raises(RewardError) as caught:
        RewardFunction(function, origin="a.py:f")(sampled("4", "5", "5"))
    assert str(caught.value) == (
        f"reward a.py:f failed on data.jsonl:2: KeyError: 'wanted' ({__file__}:{line})"
    )


def test_errors_of_objects_and_batches():
    line = Scorer.__call__.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"data.jsonl:1: IndexError: .*py:{line}\)$"):
        RewardFunction(Scorer())(sampled("5"))
    with pytest.raises(
        RewardError, match=r"data.jsonl:1, data.jsonl:2, data.jsonl:3 and 2 more: Z"
    ):
        RewardFunction(lambda responses: 1 / 0)(sampled(*"12345"))


@pytest.mark.parametrize(
    "function", [lambda: 1, lambda row: 1, lambda a, b, c: 1, lambda a, b, *, wanted: 1, str.lower]
)
def test_signatures_that_cannot_be_called(function):
    with pytest.raises(ValueError, match="reward f: it is called with a row and a response"):
        RewardFunction(function, "f")
    with pytest.raises(TypeError, match="a reward must be callable, got float"):
        RewardFunction(0.5)


# As a reward model


class Tokenizer:
    """Word i is w<i>; 90 to 99 are special."""

    def batch_decode(self, rows, skip_special_tokens):
        def word(token):
            return f"<{token}>" if token >= 90 else f"w{token}"

        return [" ".join(word(t) for t in row if t < 90 or not skip_special_tokens) for row in rows]


IDS = torch.tensor([[0, 5, 6, 91, 7, 92, 99], [5, 6, 8, 8, 8, 91, 7]])
MASKS = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
TOKENS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
ROWS = [{"id": i} for i in range(4)]


def ask(reward, rows=(3, 1)):
    finished = torch.tensor([True, False])
    return reward(IDS, MASKS, TOKENS, torch.tensor(rows), finished)


@pytest.mark.parametrize(
    ("special", "texts"),
    [
        ("strip", ["w7", "w8 w8 w8 w7"]),
        ("keep", ["<91> w7 <92>", "w8 w8 w8 <91> w7"]),
    ],
)
def test_texts_with_and_without_special_tokens(special, texts):
    """A reward that looks for <think>, a special token, sees it where it is asked for."""
    seen = []

    def score(row, response, token_ids, finished, prompt):
        seen.append((row["id"], prompt, response, token_ids, finished))
        return 1.0

    reward = RowReward([score], Tokenizer(), ROWS, special_tokens=special, end_token_ids=[99])
    assert ask(reward) == {"rewards": [1.0, 1.0]}
    assert seen == [
        (3, "w5 w6", texts[0], [91, 7, 92, 99], True),
        (1, "w5 w6", texts[1], [8, 8, 8, 91, 7], False),
    ]


def test_a_function_without_a_return_is_named():
    reward = RowReward(
        [RewardFunction(lambda row, response: None, origin="a.py:f")], Tokenizer(), ROWS
    )
    with pytest.raises(RewardError, match=r"^reward a.py:f returned None for all 2 .*`return`"):
        RewardSource(reward)(IDS, MASKS, TOKENS, torch.tensor([3, 1]), torch.tensor([True, True]))


def test_texts_of_prompts_and_responses():
    for special, expected in (("strip", ["w7", "w8 w8 w8 w7"]),
                              ("keep", ["<91> w7 <92> <99>", "w8 w8 w8 <91> w7"])):  # fmt: skip

        def score(prompts, responses):
            assert prompts == ["w5 w6"] * 2 and responses == expected  # noqa: B023
            return [1.0, None]

        assert TextReward(score, Tokenizer(), special)(IDS, MASKS, TOKENS) == [1.0, None]


def test_rows_are_known_by_their_positions():
    """The same prompt may stand in several rows, that differ in other columns."""
    reward = RowReward([lambda row, response: row["id"]], Tokenizer(), ROWS)
    assert ask(reward, (1, 2))["rewards"] == [1.0, 2.0]
    assert ask(reward, (2, 2))["rewards"] == [2.0, 2.0]
    with pytest.raises(ValueError, match="rows: expected the positions of the prompts' rows"):
        reward(IDS, MASKS, TOKENS)


def test_several_functions_with_weights():
    def length(row, response):
        return len(response.split())

    def odd(row, response):
        return None if row["id"] == 3 else 1.0

    reward = RowReward([length, odd, odd], Tokenizer(), ROWS, weights=[0.5, 2, -1])
    assert ask(reward) == {
        "rewards": [0.5, 3.0],
        "parts": {"length": [1.0, 4.0], "odd": [None, 1.0], "odd_2": [None, 1.0]},
    }
    assert ask(RowReward([odd, odd], Tokenizer(), ROWS))["rewards"] == [None, 2.0]
    with pytest.raises(ValueError, match=r"weights: expected one for each of 2 .*, got 1"):
        RowReward([length, odd], Tokenizer(), ROWS, weights=[1.0])
    with pytest.raises(ValueError, match="special_tokens must be 'strip' or 'keep'"):
        RowReward([length], Tokenizer(), ROWS, special_tokens="all")


def test_places_are_told_in_errors():
    def fails(row, response):
        raise KeyError("x")

    places = [f"data.jsonl:{i + 10}" for i in range(4)]
    with pytest.raises(
        RewardError, match=r"reward fails failed on data.jsonl:13: KeyError: 'x' \("
    ):
        ask(RowReward([fails], Tokenizer(), ROWS, places))
    with pytest.raises(RewardError, match="failed on row 3: "):
        ask(RowReward([fails], Tokenizer(), ROWS))
    source = RewardSource(RowReward([fails], Tokenizer(), ROWS, places))
    with pytest.raises(RewardError, match=r"^reward fails failed on data.jsonl:13: "):
        source(IDS, MASKS, TOKENS, torch.tensor([3, 1]), torch.tensor([True, True]))
