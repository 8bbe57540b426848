"""Inputs as people bring them to the commands; each is one of a kind, with its right result."""

import json
from pathlib import Path

import pytest
import torch

from apt_model.commands.main import main
from support import tiny_tokenizers as tiny
from support.tiny_encoders import tiny_bert
from support.tiny_models import VOCABULARY, tiny_llama

WORDS = ["a", "film", "was", "good", "bad", "fine", "Question", "Answer"]
PAIR = {"prompt": "a film", "chosen": "was good", "rejected": "was bad"}
SURROGATE = '{"prompt": "a film", "chosen": "was good", "rejected": "was bad", "more": ["\\ud83d"]}'
TEXTS = [f"w{i} w{i + 1} w{i % 3} w{i % 5}" for i in range(12)]


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    words = [*WORDS, *(f"w{i}" for i in range(VOCABULARY - len(WORDS) - 3))]
    tokenizer = tiny.whitespace(words)
    tokenizer.chat_template = tiny.WITHOUT_SYSTEM.replace("<", " <").replace(">", "> ")
    tokenizer.save_pretrained(folder)
    tiny_llama().float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny.around(made, "[CLS]", "[SEP]")
    made.enable_truncation(17)
    made.enable_padding(length=19)
    tiny.fast(
        made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    tiny_bert().float().save_pretrained(folder)
    return folder


@pytest.fixture
def reward(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(
        "SEEN = []\n\ndef score(row, response):\n"
        "    open(__file__ + '.seen', 'a').write(f\"{row.get('id')}\\n\")\n"
        "    return len(response) / 10\n"
    )
    return file


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(command, model, data, output, *more):
    batch = "1" if command.startswith("train") else "2"
    files = data if isinstance(data, list) else [data]
    return main(
        [command, f"--model={model}", "--data", *map(str, files),
         f"--output={output}", "--device=cpu", f"--batch-size={batch}", *more]
    )  # fmt: skip


def summary_of(output):
    return json.loads((Path(output) / "summary.json").read_text())


def more_of(command, reward):
    of_policies = [f"--reward={reward}:score", "--max-new-tokens=3", "--group-size=2"]
    return {
        "train-grpo": of_policies,
        "train-rlhf": [*of_policies[:2], "--minibatch-size=1", "--ppo-epochs=1"],
        "pretrain-contrastive": ["--hidden-dim=8"],
        "pretrain-mlm --nsp": ["--nsp", "--segment-sentences=1"],
    }.get(command, [])


# T1


@pytest.mark.parametrize("command", ["train-dpo", "train-reward-model"])
def test_pairs_that_fit_are_whole_and_others_counted(causal, tmp_path, command):
    row = {"prompt": "a film was a film", "chosen": "good w1", "rejected": "bad"}
    data = write(tmp_path / "rows.jsonl", [row])
    assert run(command, causal, data, tmp_path / "fits", "--max-length=8") == 0
    assert summary_of(tmp_path / "fits").keys() & {"rows_cut", "rows_dropped"} == set()
    assert run(command, causal, data, tmp_path / "cut", "--max-length=7") == 0
    cut = summary_of(tmp_path / "cut")
    assert cut["pairs"] == 1 and cut["rows_cut"] == 1 and cut["tokens_cut"] == 2
    data = write(tmp_path / "rows.jsonl", [row, PAIR])
    options = ["--max-length=7", "--truncate=drop", "--bad-rows=fail"]
    assert run(command, causal, data, tmp_path / "drop", *options) == 0
    dropped = summary_of(tmp_path / "drop")
    assert dropped["pairs"] == 1 and dropped["rows_dropped"] == 1


# T3


COMMANDS = [
    "train-dpo", "train-reward-model", "train-grpo", "train-rlhf", "pretrain-mlm",
    "pretrain-mlm --nsp", "pretrain-contrastive",
]  # fmt: skip
BAD = {
    "surrogate": SURROGATE,
    "positive": '{"text": "w1", "positive": "\\udead", "prompt": "a"}',
    "nesting": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_in_every_command_and_in_eval(
    causal, encoder, reward, tmp_path, command, bad, capsys
):
    of_texts = command.startswith("pretrain")
    good = (
        [{"text": f"w{i}. w2. w3 w4. w5."} for i in range(4)]
        if of_texts
        else [{**PAIR, "id": 1}, {**PAIR, "prompt": "a", "id": 2}]
    )
    clean = write(tmp_path / "clean.jsonl", good)
    dirty = write(tmp_path / "dirty.jsonl", [good[0], BAD[bad], *good[1:]])
    model, more = (encoder if of_texts else causal), more_of(command, reward)
    name = command.split()[0]
    for data, held_out, key in ((dirty, clean, ""), (clean, dirty, "held_out_")):
        options = [*more, f"--eval={held_out}"]
        assert run(name, model, data, tmp_path / f"out{key}", *options) == 0
        error = capsys.readouterr().err
        assert error.count(f"{dirty}:2: ") == 1 and "(row skipped)" in error
        assert summary_of(tmp_path / f"out{key}")[f"{key}rows_skipped"] == 1
        assert run(name, model, data, tmp_path / "fail", *options, "--bad-rows=fail") == 1
        assert f"error: {dirty}:2: " in capsys.readouterr().err
        assert not (tmp_path / "fail" / "model").exists()


# T4, T5


@pytest.mark.parametrize("command", ["train-grpo", "train-rlhf"])
def test_rows_of_one_prompt_are_told_apart(causal, reward, tmp_path, command):
    rows = [
        {"prompt": "a film", "id": 1, "chosen": None, "rejected": None},
        {"prompt": "a film", "id": 2},
        {"prompt": "unknown film", "id": 3},
        {"prompt": "other film", "id": 4},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "a film", "id": 5}])
    more = [*more_of(command, reward), f"--eval={held_out}", "--bad-rows=fail"]
    assert run(command, causal, data, tmp_path / "out", *more) == 0
    seen = Path(f"{reward}.seen").read_text().split()
    assert set(seen) == {"1", "2", "3", "4", "5"}
    assert all(seen.count(i) == seen.count("1") for i in "234")


# T6


@pytest.mark.parametrize("command", ["train-dpo", "train-reward-model", "train-grpo", "train-rlhf"])
def test_conversations_are_trained_on(causal, reward, tmp_path, command, capsys):
    prompt = [{"role": "system", "content": "w1"}, {"role": "user", "content": "a film"}]
    chosen, rejected = ([{"role": "assistant", "content": f"was {w}"}] for w in ("good", "bad"))
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    more = [*more_of(command, reward), "--bad-rows=fail"]
    assert run(command, causal, data, tmp_path / "out", *more) == 0
    assert "leaves out messages of the system" in capsys.readouterr().err
    counted = summary_of(tmp_path / "out")
    assert counted["rows_with_a_message_left_out"] == 2


# T7, T8, T9


def test_texts_of_other_encodings(encoder, tmp_path, capsys):
    data = tmp_path / "texts.txt"
    data.write_bytes("\n".join(TEXTS).encode("utf-16-le"))
    assert run("pretrain-mlm", encoder, data, tmp_path / "out") == 1
    assert "expected UTF-8, or a byte-order mark" in capsys.readouterr().err
    for encoding, end in (("utf-16", "\n"), ("utf-32", "\r\n"), ("utf-8-sig", "\r")):
        data.write_bytes(end.join(TEXTS).encode(encoding))
        assert run("pretrain-mlm", encoder, data, tmp_path / "out", "--restart") == 0
        assert summary_of(tmp_path / "out")["texts"] == len(TEXTS)


@pytest.mark.parametrize("long_texts", ["window", "pack", "cut"])
def test_a_long_text_is_not_lost(encoder, tmp_path, long_texts):
    data = tmp_path / "texts.txt"
    data.write_text(" ".join(f"w{i % 40}" for i in range(700)) + "\n")
    options = ["--max-length=20", f"--long-texts={long_texts}", "--batch-size=64"]
    assert run("pretrain-mlm", encoder, data, tmp_path / "out", *options) == 0
    told = summary_of(tmp_path / "out")
    masked = told["curves"]["num_masked"][0]
    if long_texts == "cut":
        assert told["sequences"] == 1 and told["tokens_cut"] == 682 and masked <= 18
    else:
        assert told["sequences"] == 39 and "tokens_cut" not in told and 60 < masked < 150


def test_next_sentences_of_berts_corpus_and_other_scripts(encoder, tmp_path):
    data = tmp_path / "corpus.txt"
    options = ["--nsp", "--segment-sentences=1"]
    for text, texts, pairs in (
        ("w1 w2\nw3 w4\nw5\n\nw6\nw7\n", 2, 3),
        ("w1\u3002w2\uff01w3\u3002\nw4\u0964 w5\u0965\nw6\u061f w7\u06d4\n", 3, 4),
    ):
        data.write_text(text, encoding="utf-8")
        assert run("pretrain-mlm", encoder, data, tmp_path / "out", *options, "--restart") == 0
        told = summary_of(tmp_path / "out")
        assert (told["texts"], told["sequences"]) == (texts, pairs)


# T10


@pytest.mark.parametrize("command", COMMANDS)
def test_the_tokenizer_is_saved_as_it_came(causal, encoder, reward, tmp_path, command):
    of_texts = command.startswith("pretrain")
    model = encoder if of_texts else causal
    rows = [{"text": f"w{i} w1. w2 w3. " * 9} for i in range(4)] if of_texts else [PAIR, PAIR]
    data = write(tmp_path / "rows.jsonl", rows)
    options = ["--max-length=16", *more_of(command, reward)]
    assert run(command.split()[0], model, data, tmp_path / "out", *options) == 0
    before, after = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (model, tmp_path / "out" / "model")
    )
    assert after["truncation"] == before["truncation"] and after["padding"] == before["padding"]
    assert after["model"] == before["model"] and after["post_processor"] == before["post_processor"]


# T11, T12


@pytest.fixture(scope="session")
def four_positions(tmp_path_factory, causal):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=4, n_embd=8, n_layer=1, n_head=1, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(causal).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["train-dpo", "train-reward-model", "train-grpo", "train-rlhf"])
@pytest.mark.parametrize("given", [["--max-length=6"], []])
def test_rows_beyond_the_positions_are_an_error_before_training(
    four_positions, reward, tmp_path, command, given, capsys
):
    row = {"prompt": "a film was", "chosen": "good w1", "rejected": "bad"}
    data = write(tmp_path / "rows.jsonl", [row])
    options = [*more_of(command, reward), *given]
    assert run(command, four_positions, data, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert "--max-length 4" in error and "4 positions" in error and error.count("error:") == 1
    assert run(command, four_positions, data, tmp_path / "out", *options, "--max-length=4") == 0


@pytest.mark.parametrize("command", ["pretrain-mlm", "pretrain-contrastive"])
def test_texts_beyond_the_positions_are_an_error_before_training(
    encoder, tmp_path, command, capsys
):
    most = tiny_bert().config.max_position_embeddings
    data = write(tmp_path / "texts.txt", ["w1 " * (most - 1), "w2", "w3 w4"])
    options = more_of(command, None)
    for given in ([f"--max-length={most + 1}"], []):
        assert run(command, encoder, data, tmp_path / "out", *options, *given) == 1
        error = capsys.readouterr().err
        assert f"--max-length {most}" in error and f"{most} positions" in error
    options += [f"--max-length={most}"]
    assert run(command, encoder, data, tmp_path / "out", *options) == 0
    for length in (1, 2):
        options = [*more_of(command, None), f"--max-length={length}"]
        assert run(command, encoder, data, tmp_path / "short", *options) == 1
        error = capsys.readouterr().err
        assert f"--max-length {length} leaves no room for text" in error
        assert not (tmp_path / "short" / "model").exists()


# T13


def test_duplicates_negatives_and_misspelt_columns(encoder, tmp_path, capsys):
    rows = [{"text": f"w{i % 6} w1", "positive": f"w{i % 6} w2 w3"} for i in range(12)]
    rows += [{"text": f"w{i} w9", "negatives": "w5"} for i in range(20, 24)]
    rows += [{"text": "w30 w9", "negative": "w31 w9"}]
    data = write(tmp_path / "rows.jsonl", rows)
    options = ["--hidden-dim=8", "--batch-size=8", "--epochs=2"]
    assert run("pretrain-contrastive", encoder, data, tmp_path / "out", *options) == 0
    error = capsys.readouterr().err
    assert error.count("'negatives' (did you mean 'negative'?)") == 1
    assert summary_of(tmp_path / "out")["total_steps"] == 4
    data = write(tmp_path / "rows.jsonl", [{"text": "w1 w2"}] * 9 + [{"text": "w3"}])
    assert run("pretrain-contrastive", encoder, data, tmp_path / "two", *options) == 0
    assert "8 rows repeat a text" in capsys.readouterr().err


# Files


def test_files_of_several_kinds_and_renamed_columns(causal, tmp_path):
    datasets = pytest.importorskip("datasets")
    first = tmp_path / "a.csv"
    first.write_text("question,chosen,rejected\na film,was good,was bad\n")
    second = tmp_path / "b.parquet"
    table = datasets.Dataset.from_list([{**PAIR, "question": "a"}])
    table.remove_columns("prompt").to_parquet(second)
    folder = tmp_path / "folder"
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder)
    options = ["--columns", "prompt=question", f"--eval={folder}", "--bad-rows=fail"]
    assert run("train-dpo", causal, [first, second, folder], tmp_path / "out", *options) == 0
    told = summary_of(tmp_path / "out")
    assert told["pairs"] == 3 and told["held_out_pairs"] == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--columns=prompt", "--columns: expected NAME=COLUMN, got 'prompt'"),
        ("--max-length=0", "--max-length must be at least 1, got 0"),
        ("--max-prompt-length=600", "--max-prompt-length must be below 512, got 600"),
    ],
)
def test_wrong_options_of_texts(causal, tmp_path, option, message, capsys):
    data = write(tmp_path / "rows.jsonl", [PAIR])
    assert run("train-dpo", causal, data, tmp_path / "out", option) == 1
    assert message in capsys.readouterr().err
