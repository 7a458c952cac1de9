import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from lit_sparse.data.stores.manifest import Skipped
from lit_sparse.data.stores.reading import cut, documents
from lit_sparse.data.stores.sources import Input, Reading, inputs_fingerprint


def read(path, size=1 << 20, reading=Reading()):  # noqa: B008
    """Names, texts, and what was skipped."""
    skipped = Skipped()
    found = [
        pair
        for entry in Input(path, reading).entries
        for piece in cut(entry, size, reading)
        for pair in documents(piece, reading, skipped)
    ]
    return [name for name, _ in found], [text for _, text in found], skipped


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.py", "a/b.md", "c.bin", ".git/x.txt", "__pycache__/y.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"text of {name}\r\n".encode())
    names, texts, skipped = read(tmp_path)
    assert names == ["a/b.md", "a/z.py", "b.txt"]
    assert texts[0] == "text of a/b.md\r\n"
    assert skipped.total == 0


def test_a_file_given_by_name_is_read_as_text_whatever_it_is_called(tmp_path):
    (tmp_path / "notes.xyz").write_bytes(b"\xef\xbb\xbfsome text")
    assert read(tmp_path / "notes.xyz")[:2] == (["notes.xyz"], ["some text"])


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_each_json_line_is_a_document_wherever_the_file_is_cut(tmp_path, size):
    lines = [json.dumps({"body": f"text {i}\u2028"}, ensure_ascii=False) for i in range(30)]
    lines[9] = " "
    (tmp_path / "d.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    names, texts, skipped = read(tmp_path / "d.jsonl", size, Reading("body"))
    assert names == [f"d.jsonl#{i + 1}" for i in range(30) if i != 9]
    assert texts == [f"text {i}\u2028" for i in range(30) if i != 9]
    assert skipped.total == 0


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_tables_are_read_by_rows(tmp_path, size):
    texts = [f"text {i}" * (i + 1) for i in range(20)]
    table = pa.table({"other": list(range(20)), "text": texts})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=6)
    dataset = Dataset.from_dict({"text": texts, "other": texts})
    dataset.save_to_disk(tmp_path / "plain")
    DatasetDict(train=dataset, test=dataset.select([3])).save_to_disk(tmp_path / "splits")
    names, found, _ = read(tmp_path, size, Reading(split="train"))
    rows = [f"{name}#{i}" for name in ("plain", "splits", "t.parquet") for i in range(20)]
    assert names == rows
    assert found == texts * 3
    assert read(tmp_path / "splits", size, Reading(split="test"))[1] == [texts[3]]
    with pytest.raises(ValueError, match=r"splits train, test; choose one: --split"):
        read(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"splits train, test, but no 'dev'"):
        read(tmp_path / "splits", reading=Reading(split="dev"))
    for name in ("t.parquet", "plain"):
        with pytest.raises(ValueError, match=r"no column 'body' but .*other.*--field"):
            read(tmp_path / name, reading=Reading("body"))


def test_what_cannot_be_read_is_counted_with_file_and_line(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"text\0text")
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 is missing")
    for i in range(5):
        (tmp_path / f"empty{i}.txt").write_text(" \n")
    (tmp_path / "d.jsonl").write_bytes(
        b'{"text": "fine"}\n{"text": \n{"no": 1}\n[1]\n{"text": "\xff"}\n{"text": 5}\n'
        b'{"text": ""}\n{"text": "\\ud800"}\n' + b"[" * 100_000
    )
    names, texts, skipped = read(tmp_path)
    assert names == ["d.jsonl#1", "d.jsonl#8", "good.txt"]
    assert texts == ["fine", "?", "text"]
    assert skipped.counts == {
        "empty": 6,
        "not UTF-8": 2,
        "binary": 1,
        "unreadable": 2,
        "broken JSON line": 2,
        "without field 'text'": 2,
        "field 'text' no string": 1,
    }
    assert "6 empty (d.jsonl#7, empty0.txt, empty1.txt, ...)" in str(skipped)
    assert "2 broken JSON line (d.jsonl#2, d.jsonl#9)" in str(skipped)


def test_pipes_are_not_waited_for_and_names_are_text(tmp_path):
    for name in ("p.txt", "p.jsonl", "p.parquet"):
        os.mkfifo(tmp_path / name)
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    for size in (0, 1 << 20):
        names, texts, skipped = read(tmp_path, size)
        assert (names, texts) == (["caf\\xe9.txt"], ["text"])
        assert skipped.counts == {"unreadable": 3}


def test_conversations_are_lists_of_messages(tmp_path):
    good = [{"role": "user", "content": "hi"}]
    rows = [{"messages": value} for value in (good, "text", [], None)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "readme.md").write_text("about them")
    names, values, skipped = read(tmp_path, reading=Reading("messages", chat=True))
    assert (names, values) == (["c.jsonl#1"], [good])
    assert skipped.counts == {
        "field 'messages' no list of messages": 2,
        "empty": 1,
        "no table of conversations": 1,
    }


def test_the_standard_library_comes_without_its_tests():
    names = [entry.name for entry in Input("stdlib", Reading()).entries]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_no_such_input_and_stores_as_input(tmp_path):
    with pytest.raises(ValueError, match=r"INPUT .*missing.* does not exist"):
        Input(tmp_path / "missing", Reading())
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "lit_sparse.json").write_text("{}")
    (tmp_path / "store" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is a token store already"):
        Input(tmp_path / "store", Reading())
    (tmp_path / "b.txt").write_text("x")
    assert read(tmp_path)[0] == ["b.txt"]


def test_the_fingerprint_of_inputs_changes_with_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    before = inputs_fingerprint([tmp_path])
    assert inputs_fingerprint([tmp_path]) == before
    (tmp_path / "a.txt").write_text("xy")
    assert inputs_fingerprint([tmp_path]) != before
