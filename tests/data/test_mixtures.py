"""Several stores in one run, text and conversations, from files to batches."""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lit_sparse.data import ByteTokenizer, PackedTextDataModule, load_tokenizer, pack
from lit_sparse.training.curriculum import Curriculum, Stage

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def sources(tmp_path):
    """Two stores of bytes: one of documents of a, one of documents of b; b's are longer."""
    stores = {}
    for letter, size in (("a", 100), ("b", 1000)):
        lines = [json.dumps({"text": letter * (size + i)}) for i in range(40)]
        source = tmp_path / f"{letter}.jsonl"
        source.write_text("\n".join(lines))
        stores[letter] = str(tmp_path / f"store-{letter}")
        pack([source], ByteTokenizer(), stores[letter])
    return stores


def module(path, stages, **others) -> PackedTextDataModule:
    arguments = {"row_tokens": 256, "rows_per_step": 2, "validation_fraction": 0.2}
    data = PackedTextDataModule(path, curriculum=Curriculum(stages), **arguments | others)
    data.setup()
    return data


def letters(batches) -> list[str]:
    """Which letter each row is made of; a row is of one store."""
    seen = [set(batch["input_ids"][0].tolist()) - {256} for batch in batches]
    assert all(len(ids) == 1 for ids in seen)
    return [chr(ids.pop()) for ids in seen]


def test_shares_are_true_all_along_and_change_with_the_stage(sources):
    a, b = sources["a"], sources["b"]
    stages = [Stage(64, 20), Stage(256, 10, mixture={b: 1.0})]
    batches = list(module({a: 3.0, b: 1.0}, stages).train_dataloader())
    rows = letters(batches)
    of_a = np.cumsum([letter == "a" for letter in rows[:40]])
    assert (abs(of_a - 0.75 * np.arange(1, 41)) < 1).all()
    assert rows[40:] == ["b"] * 20
    assert [int(batch["source"]) for batch in batches] == [letter == "b" for letter in rows]
    for step in range(30):
        pair = batches[2 * step : 2 * step + 2]
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in pair)
        assert [int(batch["step_tokens"]) for batch in pair] == [tokens, tokens]


def test_validation_holds_rows_of_every_store(sources):
    data = module({sources["a"]: 1.0, sources["b"]: 3.0}, [Stage(256, 4)], validation_rows=4)
    assert letters(data.val_dataloader()) == ["b", "a", "b", "b"]
    assert data.validation_text.store.path.name == "store-b"


def test_the_first_validation_rows_are_not_of_one_store(sources):
    data = module({sources["a"]: 1.0, sources["b"]: 1.0}, [Stage(256, 4)], validation_rows=4)
    assert letters(data.val_dataloader()) == ["a", "b", "a", "b"]


def test_what_a_run_trains_on_has_a_fingerprint(sources):
    def fingerprint(**others) -> str:
        path = others.pop("path", {sources["a"]: 1.0, sources["b"]: 1.0})
        return module(path, [Stage(64, 2)], **others).fingerprint

    assert fingerprint() == fingerprint(num_workers=1, validation_rows=2)
    others = [{"seed": 1}, {"packing": "concat"}, {"path": {sources["a"]: 1.0, sources["b"]: 2.0}}]
    others += [{"tasks": {"passkey": 0.5}}, {"tasks": {"passkey": 0.4}}, {"task_recalls": 1}]
    assert len({fingerprint(), *(fingerprint(**other) for other in others)}) == 7


def test_upsampled_documents_come_more_often(sources, tmp_path):
    lines = [json.dumps({"text": c * n}) for c, n in [("s", 50), ("l", 200)] * 200]
    (tmp_path / "both.jsonl").write_text("\n".join(lines))

    def share(**others) -> float:
        data = module(str(tmp_path / "both.jsonl"), [Stage(128, 100)], prefer_long=False, **others)
        ids = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
        return float((ids == ord("l")).sum() / (ids == ord("s")).sum())

    assert share() == pytest.approx(4, rel=0.2)
    assert share(upsample_longer_than=100, upsample_times=3.0) == pytest.approx(12, rel=0.3)


@pytest.mark.parametrize(
    ("path", "mixture", "message"),
    [
        ({"a": 1.0, "b": -1.0}, None, r"data\.path.*-1"),
        ({"a": 0.0, "b": 0.0}, None, r"data\.path"),
        ({"a": 1.0}, {"b": 1.0}, r"curriculum\.stages\[0\]\.mixture names '.*store-b'"),
    ],
)
def test_wrong_weights_are_refused_by_name(sources, path, mixture, message):
    path = {sources[letter]: weight for letter, weight in path.items()}
    if mixture is not None:
        mixture = {sources[letter]: weight for letter, weight in mixture.items()}
    with pytest.raises(ValueError, match=message):
        module(path, [Stage(64, 2, mixture=mixture)])


def test_a_store_of_another_tokenizer_is_refused(sources, tmp_path):
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*another tokenizer .*= null"):
        module(sources["a"], [Stage(64, 2)], tokenizer=str(tmp_path / "tokenizer"))


@pytest.fixture
def chat(tmp_path):
    """A store of conversations; every tenth is too long for 256 tokens."""
    folder = tmp_path / "chat-tokenizer"
    ByteTokenizer().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    turns = [
        [
            {"role": "user", "content": f"question {i} "},
            {"role": "assistant", "content": "A" * (600 if i % 10 == 0 else 50 + i)},
        ]
        for i in range(60)
    ]
    source = tmp_path / "chat.jsonl"
    source.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    pack([source], load_tokenizer(folder), tmp_path / "chat", chat=True)
    return str(tmp_path / "chat")


def test_conversations_are_learnt_where_the_assistant_speaks(chat):
    data = module(chat, [Stage(256, 10)])
    end = data.text_tokenizer.encode("x")  # the store brings its tokenizer
    assert len(end) == 1
    assert data.vocab_size == 259
    batches = list(data.train_dataloader())
    learnt = set()
    for batch in batches:
        labels, ids = batch["labels"][0], batch["input_ids"][0]
        learnt |= set(labels[labels != -100].tolist())
        for begin in (batch["position_ids"][0] == 0).nonzero().flatten().tolist():
            first = int(ids[begin])
            assert first == 257 or first == 256, "a piece begins where a conversation does"
        assert int((ids == ord("A")).sum()) > 0
    assert learnt == {ord("A"), 258}, "the answer and the token that ends it"
    total = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert total == sum(int(batch["step_tokens"]) for batch in batches) // 2
    assert "conversations truncated by" in data.describe()
    for batch in data.val_dataloader():
        labels = batch["labels"]
        assert set(labels[labels != -100].tolist()) <= {ord("A"), 258}
        assert batch["step_tokens"] == (labels != -100).sum()


def test_text_and_conversations_mix(chat, tmp_path):
    tokenizer = load_tokenizer(f"{chat}/tokenizer")
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": "t" * 400}) for _ in range(20))
    )
    pack([tmp_path / "text.jsonl"], tokenizer, tmp_path / "text")
    data = module({chat: 1.0, str(tmp_path / "text"): 1.0}, [Stage(256, 6)])
    batches = list(data.train_dataloader())
    for batch in batches:
        texts = bool((batch["input_ids"] == ord("t")).float().mean() > 0.5)
        assert bool(batch["source"]) is texts
    assert sum(int(batch["source"]) for batch in batches) == 6
