import json

import numpy as np
import pytest

from lit_sparse.data.stores import pack as pack_module
from lit_sparse.data.stores.pack import pack
from lit_sparse.data.stores.store import TokenStore
from lit_sparse.data.stores.workers import Progress
from lit_sparse.data.tokenizer import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A folder of files and JSON lines that is cut into several units."""
    monkeypatch.setattr(pack_module, "UNIT_BYTES", 2000)
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"{i} ünïcode text\n" * (i + 1) * 3)
    lines = [json.dumps({"text": f"line {i} " * (i % 7)}) for i in range(200)]
    lines[50] = "{"
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return folder


class Recorded(Progress):
    """What a packing tells about itself."""

    def __init__(self):
        self.started = None
        self.done = np.zeros(3, dtype=np.int64)

    def start(self, *values):
        self.started = values

    def advance(self, *values):
        self.done += values


def test_the_store_holds_the_documents_of_all_inputs_in_order(tmp_path, mixed):
    (tmp_path / "single.md").write_text("one more")
    store = pack([mixed, tmp_path / "single.md"], BYTES, tmp_path / "store")
    names = [store.name(i) for i in range(len(store))]
    lines = [f"lines.jsonl#{i + 1}" for i in range(200) if i % 7 and i != 50]
    assert names == [*(f"{i:02d}.txt" for i in range(20)), *lines, "single.md"]
    for i, name in enumerate(names[:20]):
        assert BYTES.decode(store.read(i)[:-1]) == (mixed / name).read_text()
    assert len(store.manifest.shards) > 3
    assert store.manifest.skipped.counts == {"broken JSON line": 1, "empty": 29}
    assert store.manifest.skipped.examples["broken JSON line"] == ["lines.jsonl#51"]
    assert store.manifest.text_bytes == store.tokens - len(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "single.md", "store"]
    assert not [path for path in store.path.rglob("*") if path.suffix in {".tmp", ".npz"}]


def test_the_store_does_not_depend_on_the_processes_or_where_it_lies(tmp_path, mixed):
    BYTES.save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    progress = Recorded()
    one = pack([mixed], tokenizer, tmp_path / "one")
    three = pack([mixed], tokenizer, tmp_path / "three", processes=3, progress=progress)
    assert three.fingerprint == one.fingerprint
    for file in (*one.manifest.shards, *one.manifest.index):
        assert (one.path / file.name).read_bytes() == (three.path / file.name).read_bytes()
    size = sum(path.stat().st_size for path in mixed.iterdir())
    assert progress.started == (size, 0, 0)
    assert progress.done.tolist() == [size, len(three), three.tokens]


def test_an_interrupted_packing_continues(tmp_path, mixed, monkeypatch):
    whole = pack([mixed], BYTES, tmp_path / "whole")
    calls = []

    class Interrupted(ByteTokenizer):
        def encode_many(self, texts):
            calls.append(texts)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return super().encode_many(texts)

    with pytest.raises(KeyboardInterrupt):
        pack([mixed], Interrupted(), tmp_path / "store")
    unfinished = tmp_path / "store.packing"
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match=r"not finished"):
        TokenStore.open(unfinished)
    with pytest.raises(ValueError, match=r"unfinished store of something else: field text, not b"):
        pack([mixed], BYTES, tmp_path / "store", field="body")
    (unfinished / "shard-00001.arrow").write_bytes(b"cut")  # as a full disk may leave it
    progress = Recorded()
    store = pack([mixed], BYTES, tmp_path / "store", progress=progress)
    total, resumed, _ = progress.started
    assert 0 < resumed < total
    assert progress.done[0] == total - resumed
    assert store.fingerprint == whole.fingerprint
    store.verify()


def test_changed_inputs_do_not_continue(tmp_path, mixed):
    class Failing(ByteTokenizer):
        def encode_many(self, texts):
            raise MemoryError

    with pytest.raises(MemoryError):
        pack([mixed], Failing(), tmp_path / "store")
    (mixed / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"mixed before it changed .* delete that folder"):
        pack([mixed], BYTES, tmp_path / "store")
    with pytest.raises(ValueError, match=r"INPUT .*/mixed; delete"):
        pack([mixed / "01.txt"], BYTES, tmp_path / "store")


def test_no_file_is_packed_twice(tmp_path, mixed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("mixed", mixed / ".." / "mixed", mixed / "01.txt"):
        with pytest.raises(ValueError, match=r"INPUT holds .*mixed/.* twice"):
            pack([mixed, other], BYTES, tmp_path / "store")


def test_what_is_there_is_never_made_again_or_replaced_unasked(tmp_path, mixed):
    out = tmp_path / "store"
    store = pack([mixed], BYTES, out)
    progress = Recorded()
    assert pack([mixed], BYTES, out, progress=progress).fingerprint == store.fingerprint
    assert progress.started is None
    other = mixed / "03.txt"
    with pytest.raises(ValueError, match=r"is a store of something else: INPUT .*--overwrite"):
        pack([other], BYTES, out)
    assert len(pack([other], BYTES, out, overwrite=True)) == 1
    assert not (tmp_path / "store.replaced").exists()
    folder = tmp_path / "folder"
    folder.mkdir()
    assert len(pack([other], BYTES, folder)) == 1  # it was empty
    for name in ("file", "full/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
        with pytest.raises(ValueError, match=r"holds something else than a token store"):
            pack([other], BYTES, tmp_path / name.split("/")[0], overwrite=True)
        assert (tmp_path / name).read_text() == "precious"
    (tmp_path / "new.packing").mkdir()
    (tmp_path / "new.packing" / "file").write_text("precious")
    with pytest.raises(ValueError, match=r"new.packing holds something else"):
        pack([other], BYTES, tmp_path / "new")


def test_a_damaged_store_is_made_again_with_overwrite(tmp_path, mixed):
    store = pack([mixed], BYTES, tmp_path / "store")
    (store.path / "shard-00000.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged.*--overwrite"):
        pack([mixed], BYTES, store.path)
    again = pack([mixed], BYTES, store.path, overwrite=True)
    again.verify()
    assert again.fingerprint == store.fingerprint


def test_input_without_a_document_and_strict(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"no": 1}\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no readable document \(2 skipped.*a.jsonl#1"):
        pack([tmp_path / "a.jsonl"], BYTES, tmp_path / "store")
    assert not (tmp_path / "store.packing").exists()
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{\n')
    with pytest.raises(ValueError, match=r"--strict.*1 broken JSON line \(b.jsonl#2\)"):
        pack([tmp_path / "b.jsonl"], BYTES, tmp_path / "store", strict=True)
    assert len(pack([tmp_path / "b.jsonl"], BYTES, tmp_path / "store")) == 1
    for inputs, options, message in (
        ([], {}, "at least one INPUT"),
        ([tmp_path / "b.jsonl"], {"processes": 0}, "--processes must be >= 1"),
        ([tmp_path / "store"], {}, "is a token store already"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(inputs, BYTES, tmp_path / "other", **options)
    with pytest.raises(ValueError, match=r"must not end in '.packing'"):
        pack([tmp_path / "b.jsonl"], BYTES, tmp_path / "x.packing")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("processes", [1, 2])
def test_conversations_keep_which_tokens_are_learnt(tmp_path, monkeypatch, processes):
    from transformers import AutoTokenizer

    monkeypatch.setattr(pack_module, "UNIT_BYTES", 150)
    BYTES.save_pretrained(tmp_path / "tokenizer")
    inner = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    inner.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    inner.chat_template = CHATML
    inner.save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    user, assistant = ({"role": role, "content": f"I {role}"} for role in ("user", "assistant"))
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}]
    conversations = [[user, assistant], [assistant, user], [user, assistant, user], shared, "text"]
    lines = [json.dumps({"turns": messages}) for messages in conversations]
    source = tmp_path / "chat.jsonl"
    source.write_text("\n".join(lines))
    options = {"chat": True, "messages": "turns", "processes": processes}
    store = pack([source], tokenizer, tmp_path / "store", **options)
    assert (store.kind, len(store)) == ("chat", 3)
    turns = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in (user, assistant)
    )
    assert tokenizer.decode(store.read(0)) == turns
    learnt = [tokenizer.decode(store.read(i)[store.loss_mask(i)]) for i in range(3)]
    assert learnt == ["I assistant<|im_end|>", "I assistant<|im_end|>", "you<|im_end|>"]
    assert store.manifest.skipped.counts == {
        "the assistant speaks first": 1,
        "field 'turns' no list of messages": 1,
    }
    assert store.manifest.text_bytes == len("I userI assistant" * 2 + "I user" + "hiyou")
