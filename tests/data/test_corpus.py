import json

import pytest

from lit_sparse.data import read_corpus


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.py", "a/b.md", "c.bin", ".git/x.txt", "__pycache__/y.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"text of {name}\r\n".encode())
    corpus = read_corpus(tmp_path)
    assert corpus.names == ["a/b.md", "a/z.py", "b.txt"]
    assert corpus.texts[0] == "text of a/b.md\r\n"
    assert corpus.skipped.total == 0


def test_each_json_line_is_a_document(tmp_path):
    lines = [json.dumps({"body": f"text {i}\u2028"}, ensure_ascii=False) for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    corpus = read_corpus(tmp_path / "d.jsonl", text_field="body")
    assert corpus.names == ["d.jsonl#1", "d.jsonl#2", "d.jsonl#3"]
    assert corpus.texts[1] == "text 1\u2028"


def test_what_cannot_be_read_is_counted_and_named_in_one_warning(tmp_path, recwarn):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    for i in range(5):
        (tmp_path / f"empty{i}.txt").write_text(" \n")
    (tmp_path / "d.jsonl").write_bytes(
        b'{"text": "fine"}\n{"text": \n{"no": 1}\n[1]\n{"text": "\xff"}'
    )
    corpus = read_corpus(tmp_path)
    assert corpus.names == ["d.jsonl#1", "good.txt"]
    assert corpus.skipped.counts == {
        "empty": 5,
        "not UTF-8": 2,
        "unreadable": 1,
        "broken JSON line": 1,
        "without text field": 2,
    }
    messages = [str(w.message) for w in recwarn if "skipped" in str(w.message)]
    assert len(messages) == 1
    assert "5 empty (empty0.txt, empty1.txt, empty2.txt, ...)" in messages[0]
    assert "broken JSON line (d.jsonl#2)" in messages[0]


def test_the_standard_library_comes_without_its_tests():
    corpus = read_corpus("stdlib")
    assert "json/decoder.py" in corpus.names
    assert corpus.names == sorted(corpus.names)
    assert not [
        name for name in corpus.names if {"test", "tests", "site-packages"} & set(name.split("/"))
    ]


def test_nothing_to_read_names_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path.*does not exist"):
        read_corpus(tmp_path / "missing")
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.path.*1 empty \(b\.txt\).*\.jsonl.*\.txt"):
        read_corpus(tmp_path)
