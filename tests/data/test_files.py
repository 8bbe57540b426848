"""Files of every kind that people have, and what is wrong with them."""

import bz2
import gzip
import json
import lzma

import pytest

from apt_model.data.files import HELD_OUT, is_text_path, read_rows
from apt_model.data.preferences import load_rows
from apt_model.data.rows import REPORTED_ROWS, BadRow
from apt_model.data.texts import Text, load_documents, load_texts

ROWS = [{"prompt": "a", "id": 1}, {"prompt": "\u00e9\u4eca", "id": 2}]


def values(path, **options):
    return [row.value for row in read_rows(path, **options)]


def places(path, **options):
    return [row.place.removeprefix(str(path)) for row in read_rows(path, **options)]


def json_lines(rows=ROWS, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end


# T7: encodings and line ends


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_text_is_read_as_its_mark_says_with_any_line_end(tmp_path, encoding, end, pack):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(pack(json_lines(end=end).encode(encoding)))
    assert values(file) == ROWS and places(file) == [":1", ":2"]
    file = tmp_path / "texts.txt"
    file.write_bytes(pack(f"One.{end}{end}Tw\u00f6.".encode(encoding)))
    assert values(file, lines_are_rows=True) == ["One.", "", "Tw\u00f6."]
    assert load_texts(file) == [Text("One."), Text("Tw\u00f6.")]


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\0\0\xfe\xff"])
def test_marks_of_both_byte_orders(tmp_path, mark):
    name = "utf-16" if len(mark) == 2 else "utf-32"
    name += "-le" if mark[0] == 0xFF else "-be"
    file = tmp_path / "texts.txt"
    file.write_bytes(mark + "Eins.\nZwei.".encode(name))
    assert values(file, lines_are_rows=True) == ["Eins.", "Zwei."]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_text_of_unknown_encoding_is_refused(tmp_path, encoding):
    file = tmp_path / "texts.txt"
    file.write_bytes("One.\nTwo.\n".encode(encoding))
    with pytest.raises(ValueError, match=r"texts\.txt: expected UTF-8, or a byte-order mark"):
        load_texts(file)


def test_lines_end_where_chunks_do(tmp_path, monkeypatch):
    monkeypatch.setattr("apt_model.data.files.CHUNK", 3)
    file = tmp_path / "texts.txt"
    for end in ("\r\n", "\r", "\n"):
        file.write_bytes(end.join(["ab", "", "c", "defgh", "i"]).encode())
        assert values(file, lines_are_rows=True) == ["ab", "", "c", "defgh", "i"]


def test_other_separators_are_no_line_ends(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\u2028two\x0bthree\x85four\x0cfive\n", encoding="utf-8")
    assert len(values(file, lines_are_rows=True)) == 1


def test_a_line_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes(b"good\ncaf\xe9\nb\0d\n" + b"fine\n" * 20)
    reported = []
    assert len(load_texts(file, report=reported.append)) == 21
    assert "texts.txt:2: not UTF-8: byte 0xe9 at byte 4" in reported[0]
    assert "texts.txt:3: expected text, got a NUL character" in reported[1]


# JSON


def test_arrays_and_rows_of_several_lines(tmp_path):
    file = tmp_path / "rows.json"
    for text, lines in (
        (json.dumps(ROWS), [":1", ":1"]),
        (json.dumps(ROWS, indent=1), [":2", ":6"]),
        (json.dumps({"version": 1, "data": ROWS}), [":1", ":1"]),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), [":1", ":5"]),
        (json_lines(), [":1", ":2"]),
        (json.dumps(ROWS[0]), [":1"]),
    ):
        file.write_text(text)
        assert values(file) == ROWS[: len(lines)] and places(file) == lines
    as_lines = tmp_path / "rows.jsonl"
    as_lines.write_text(json.dumps(ROWS, indent=1))
    assert values(as_lines) == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a"}]', r"json:1: not JSON"),
        ('[{"a": 1}\n{"a": 2}]', r"json:1: .*expected ',' or ']'"),
        ('[{"a": 1},', "has no end"),
    ],
)
def test_a_broken_array_is_an_error(tmp_path, text, message):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        values(file)


BAD_LINES = {
    b'{"a": "\\ud83d"}': r"lone surrogate U\+D83D",
    b'{"a": {"b": ["\\udc00 x"]}}': r"lone surrogate U\+DC00",
    b'{"\\ud83d": 1}': "lone surrogate",
    b"[" * 100_000 + b"]" * 100_000: "nested too deeply",
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000: "nested too deeply",
    b'{"a": 1,}': "not JSON",
    b'{"a": 1} {"a": 2}': "not JSON",
    b'{"a": 1, "a": 2}': "has the key 'a' twice",
    b"[1]": "must be an object with a, got list",
    b'"a"': "must be an object with a, got str",
    b"null": "must be an object with a, got NoneType",
    b'{"a": "\0"}': "not JSON",
    b'{"a": "\xff"}': "not UTF-8",
    b'{"a": ' + b"9" * 5000 + b"}": "digits",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_skipped_or_fatal(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 4}\n')
    reported = []

    def load(**options):
        return load_rows(file, lambda row, told: row["a"], ("a",), wanted="a", **options)

    from collections import Counter

    counts = Counter()
    assert load(report=reported.append, counts=counts) == [1, 4]
    assert counts == {"rows_skipped": 1} and len(reported) == 1
    assert reported[0].startswith(f"{file}:3: ") and reported[0].endswith("(row skipped)")
    with pytest.raises(BadRow, match=BAD_LINES[line]):
        load(fail_on_bad_row=True)


def test_marks_inside_a_file_and_numbers_that_are_none(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": NaN, "b": Infinity}\n \t \n')
    first, second = values(file)
    assert first == {"a": 1} and second["b"] == float("inf") and second["a"] != second["a"]


def test_many_bad_rows_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("x\n" * (REPORTED_ROWS + 3) + '{"a": 1}\n')
    reported = []
    load_rows(file, lambda row, told: row, ("a",), report=reported.append)
    assert len(reported) == REPORTED_ROWS + 1
    assert reported[-1] == f"{file}: 3 more rows skipped"
    file.write_text("x\n")
    with pytest.raises(BadRow, match="no row can be used"):
        load_rows(file, lambda row, told: row, ("a",), report=reported.append)


# Tables


def test_csv(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes('\ufeffprompt,id\r\n"a, ""b""\r\nc",007\r\n\r\nNA,\r\nd\r\n'.encode())
    assert values(file)[:2] == [
        {"prompt": 'a, "b"\nc', "id": "007"},
        {"prompt": "NA", "id": None},
    ]
    assert places(file) == [":2", ":5", ":6"]
    assert "has 1 cells, expected 2" in str(values(file)[2])
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(b"a;b\n1;2\n", mtime=0))
    assert values(packed) == [{"a": "1", "b": "2"}]
    tabs = tmp_path / "rows.TSV"
    tabs.write_text("a\tb\n1, 2\t3\n")
    assert values(tabs) == [{"a": "1, 2", "b": "3"}]
    tabs.write_bytes(b"a\tb\ncaf\xe9\t3\nx\ty\n")
    bad, good = values(tabs)
    assert "not UTF-8" in str(bad) and good == {"a": "x", "b": "y"}
    tabs.write_text("a\ta\n")
    with pytest.raises(ValueError, match="twice"):
        values(tabs)


def test_parquet_and_arrow_and_folders_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": [{"role": "user", "content": "a", "name": None}], "chosen": None, "id": 1},
        {"prompt": [{"role": "user", "content": "b", "name": "x"}], "chosen": "c", "id": 2},
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "folder")
    both = datasets.DatasetDict({"train": table, "test": table.select([1])})
    both.save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "others")
    assert values(tmp_path / "rows.parquet") == rows
    assert places(tmp_path / "rows.parquet") == [": row 1", ": row 2"]
    assert values(tmp_path / "folder") == rows
    assert values(next((tmp_path / "folder").glob("*.arrow"))) == rows
    assert values(tmp_path / "splits") == rows and is_text_path(tmp_path / "splits")
    assert values(tmp_path / "splits", splits=HELD_OUT) == rows[1:]
    assert values(tmp_path / "splits" / "test") == rows[1:]
    with pytest.raises(ValueError, match="holds the splits a, b"):
        values(tmp_path / "others")


def test_several_files_of_several_kinds(tmp_path):
    (tmp_path / "a.csv").write_text("text\none\n")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "c.txt").write_text("three\n")
    files = [tmp_path / name for name in ("a.csv", "b.jsonl", "c.txt")]
    assert load_texts(files) == [Text("one"), Text("two"), Text("three")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", b"no parquet", "not Parquet"),
        ("rows.arrow", b"no arrow", "not an Arrow table"),
        ("rows.jsonl", gzip.compress(b"{}" * 999, mtime=0)[:-9], "damaged archive"),
        ("rows.jsonl", b"PK\x03\x04rest", "a zip archive: unpack it"),
        ("rows.csv", b'a,b\n"x,y\n', "not CSV"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        values(file)
    assert str(file) in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        values(tmp_path / "nowhere")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"is a folder, .* name the files in it \(a\.jsonl\)"):
        values(tmp_path)
    for name in ("empty.jsonl", "empty.csv", "empty.parquet", "empty.txt"):
        (tmp_path / name).write_bytes(b"")
        assert values(tmp_path / name, lines_are_rows=True) == []
        with pytest.raises(BadRow, match=f"{name}: no row can be used"):
            load_texts(tmp_path / name)


# T9: documents


def test_berts_corpus_format_and_sentences_of_any_script(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("Dr. A came. He sat.\nHe left\n\n\nOne.\nTwo.\nThree.\n\nlonely\n")
    reported = []
    documents = [["Dr. A came. He sat.", "He left"], ["One.", "Two.", "Three."]]
    assert load_documents(file, report=reported.append) == documents
    assert len(reported) == 1 and "corpus.txt:9: has no two segments" in reported[0]
    file.write_text("One\nTwo\nThree\n")  # one document, a sentence a line
    assert load_documents(file) == [["One", "Two", "Three"]]
    file.write_text("One. Two.\nThree! Four?\n")  # a document a line
    assert load_documents(file) == [["One.", "Two."], ["Three!", "Four?"]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(
            json.dumps({"text": text})
            for text in (
                "\u4eca\u5929\u3002\u660e\u5929\uff01",
                "\u092f\u0939\u0964 \u0935\u0939\u0965",
                "\u0647\u0644\u061f \u0646\u0639\u0645\u06d4",
            )
        )
    )
    assert [len(document) for document in load_documents(rows)] == [2, 2, 2]


def test_texts_of_conversations_and_completions(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a ", "completion": "b"},
        {"text": "c", "messages": None},
    ]
    file.write_text(json_lines(rows))
    assert [text.text for text in load_texts(file)] == ["a\nb", "a b", "c"]


# T13: columns


def test_a_misspelt_column_is_named_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "positiv": "b", "id": 1}\n' * 30)
    reported = []
    load_texts(file, report=reported.append)
    assert len(reported) == 1
    assert "'id', 'positiv' (did you mean 'positive'?)" in reported[0]
    with pytest.raises(BadRow, match=r"has no 'text' \(did you mean 'texts'\?\)"):
        file.write_text('{"texts": "a"}\n')
        load_texts(file, fail_on_bad_row=True)
    assert load_texts(file, columns={"text": "texts"}) == [Text("a")]
