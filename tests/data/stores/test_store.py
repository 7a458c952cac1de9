import json
import math
import multiprocessing
import pickle

import numpy as np
import pytest

from lit_sparse.data.stores import writer
from lit_sparse.data.stores.manifest import Skipped
from lit_sparse.data.stores.store import TokenStore, unigram_bits
from lit_sparse.data.stores.writer import Header, ShardWriter, finish

TEXT = Header("text", "bytes", "bytes", vocab_size=257, eos_id=256)
CHAT = Header("chat", "bytes", "bytes", vocab_size=257, eos_id=256)


def write(folder, documents: dict[str, np.ndarray], header: Header = TEXT, shards: int = 1):
    """A store of these documents. In a chat even ids are learnt."""
    (folder / "plan").mkdir(parents=True)
    units = []
    for number, names in enumerate(np.array_split(list(documents), shards)):
        shard = ShardWriter(folder, number, header)
        for name in map(str, names):
            ids = documents[name]
            shard.add(name, ids, ids % 2 == 0 if header.kind == "chat" else None)
        units.append(shard.close(text_bytes=10, skipped=Skipped()))
    finish(folder, header, units, {"made": "by a test"})
    return TokenStore.open(folder)


def texts(**values: str) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(text.encode(), np.uint8) for name, text in values.items()}


@pytest.fixture
def many(monkeypatch) -> dict[str, np.ndarray]:
    """Documents of a few record batches."""
    monkeypatch.setattr(writer, "BATCH_TOKENS", 300)
    rng = np.random.default_rng(0)
    return {f"{i}.txt": rng.integers(0, 256, i % 40) for i in range(100)}


def test_documents_stand_whole_and_end_with_eos(tmp_path):
    store = write(tmp_path / "s", texts(a="xyz", b="ä"))
    assert store.read(0).tolist() == [120, 121, 122, 256]
    assert store.read(1).tolist() == [0xC3, 0xA4, 256]
    assert store.read(0, 1, 2).tolist() == [121, 122]
    assert store.read(0, 3, 9).tolist() == [256]
    assert store.read(0, 9).tolist() == []
    assert store.loss_mask(0) is None
    assert store.read(0).dtype == np.uint16
    assert (store.lengths.tolist(), store.offsets.tolist()) == ([4, 3], [0, 4, 7])
    assert (len(store), store.tokens, store.name(1)) == (2, 7, "b")
    assert np.flatnonzero(store.counts).tolist() == [120, 121, 122, 0xA4, 0xC3, 256]
    assert (store.counts[256], store.bytes_per_token) == (2, 2.0)
    with pytest.raises(IndexError):
        store.read(2)


@pytest.mark.parametrize("header", [TEXT, CHAT])
def test_every_document_of_every_shard_is_read_also_in_other_processes(tmp_path, many, header):
    store = write(tmp_path / "s", many, header, shards=3)
    again = pickle.loads(pickle.dumps(store))
    for i, (name, ids) in enumerate(many.items()):
        whole = ids if header.kind == "chat" else np.append(ids, 256)
        assert np.array_equal(again.read(i), whole)
        if header.kind == "chat":
            assert np.array_equal(again.loss_mask(i, 2, 9), whole[2:11] % 2 == 0)
            assert again.loss_mask(i).dtype == bool
        assert again.name(i) == name
    store.read(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.map(store.read, [99])[0], store.read(99))
    store.verify()


@pytest.mark.parametrize("header", [TEXT, CHAT])
def test_hugging_face_datasets_open_it(tmp_path, many, header):
    from datasets import load_from_disk

    store = write(tmp_path / "s", many, header, shards=2)
    dataset = load_from_disk(str(store.path))
    assert len(dataset) == len(store)
    assert dataset[77]["name"] == "77.txt"
    assert dataset[77]["input_ids"] == store.read(77).tolist()
    if header.kind == "chat":
        assert dataset[77]["loss"] == store.loss_mask(77).astype(int).tolist()


def test_a_large_vocabulary_does_not_overflow(tmp_path):
    wide = Header("text", "wide", "wide", vocab_size=1 << 17, eos_id=(1 << 17) - 1)
    store = write(tmp_path / "s", texts(a="x"), wide)
    assert store.read(0).tolist() == [120, (1 << 17) - 1]
    with pytest.raises(ValueError, match=r"gave the id 300, but its vocab_size is 257"):
        write(tmp_path / "t", {"a": np.array([300])})


def test_equal_content_has_an_equal_fingerprint(tmp_path):
    store, same = (write(tmp_path / name, texts(a="x", b="y")) for name in "st")
    assert store.fingerprint == same.fingerprint
    assert write(tmp_path / "u", texts(a="x", b="z")).fingerprint != store.fingerprint
    other = Header("text", "bytes", "of another tokenizer", vocab_size=257, eos_id=256)
    assert write(tmp_path / "v", texts(a="x", b="y"), other).fingerprint != store.fingerprint


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_byte_is_found_where_it_is_read(tmp_path, many):
    store = write(tmp_path / "s", many, shards=2)
    shard = store.path / store.manifest.shards[1].name
    flip(shard, shard.read_bytes().index(store.read(99)[:-1].tobytes()))
    damaged = TokenStore.open(store.path)
    assert np.array_equal(damaged.read(0), np.append(many["0.txt"], 256))
    with pytest.raises(ValueError, match=r"damaged: .*shard-00001.arrow.*pack --verify"):
        damaged.read(99)
    with pytest.raises(ValueError, match=r"shard-00001.arrow does not have the checksum"):
        damaged.verify()


def test_a_damaged_loss_flag_is_found(tmp_path, many):
    store = write(tmp_path / "s", many, CHAT)
    shard = store.path / store.manifest.shards[0].name
    flip(shard, shard.read_bytes().index(store.loss_mask(39).tobytes()))
    with pytest.raises(ValueError, match=r"damaged: .*shard-00000.arrow"):
        TokenStore.open(store.path).read(39)


def test_a_damaged_index_is_found_before_rows_are_made_of_it(tmp_path, many):
    store = write(tmp_path / "s", many)
    for name in ("lengths", "offsets", "keys", "counts", "batches"):
        path = store.path / "index" / f"{name}.npy"
        content = path.read_bytes()
        for place in (-1, 60):  # a number; the header, which numpy reads as Python
            flip(path, place)
            with pytest.raises(ValueError, match=f"damaged: .*{name}.npy"):
                TokenStore.open(store.path).split(0.1, 0)
            path.write_bytes(content)
    assert len(TokenStore.open(store.path).split(0.1, 0)) == 2


def test_a_truncated_or_missing_file_is_found_at_once(tmp_path):
    store = write(tmp_path / "s", texts(a="x"))
    for name in ("shard-00000.arrow", "index/lengths.npy"):
        path = store.path / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"{name} has {len(content) - 1} bytes, not"):
            TokenStore.open(store.path)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            TokenStore.open(store.path)
        path.write_bytes(content)
    TokenStore.open(store.path).verify()


def test_what_is_no_store_does_not_open(tmp_path):
    with pytest.raises(ValueError, match=r"is no token store.*lit-sparse pack"):
        TokenStore.open(tmp_path)
    store = write(tmp_path / "s", texts(a="x"))
    manifest = store.path / "lit_sparse.json"
    newer = json.loads(manifest.read_text()) | {"version": 99}
    for text, reason in (
        (json.dumps(newer), "format 99"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("\xff", "cannot be read"),
        (json.dumps(newer | {"version": 1, "dtype": "uinp16"}), "cannot be read"),
    ):
        manifest.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=reason):
            TokenStore.open(store.path)
    store.path.rename(tmp_path / "s.packing")
    with pytest.raises(ValueError, match=r"not finished; run .* again and it continues"):
        TokenStore.open(tmp_path / "s.packing")


def test_the_split_keeps_documents_apart_and_stays_when_the_corpus_grows(tmp_path):
    documents = {f"{i}.txt": np.array([i % 256]) for i in range(400)}
    store = write(tmp_path / "s", documents)
    train, validation = store.split(0.2, seed=1)
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(400))
    assert 50 < len(validation) < 110
    grown = write(tmp_path / "t", {"new": np.array([1]), **documents})
    assert set(grown.split(0.2, seed=1)[0] - 1) - {-1} == set(train)
    assert not np.array_equal(store.split(0.2, seed=2)[0], train)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_the_split_is_empty(tmp_path, fraction):
    sides = write(tmp_path / "s", texts(a="1", b="2", c="3")).split(fraction, seed=0)
    assert sorted(map(len, sides)) == [1, 2]


def test_one_document_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path holds 1 document"):
        write(tmp_path / "s", texts(a="1")).split(0.5, seed=0)
    with pytest.raises(ValueError, match=r"data\.validation_fraction"):
        write(tmp_path / "t", texts(a="1", b="2")).split(1.0, seed=0)


def test_unigram_bits(tmp_path):
    # 3 a, 1 b, and one added to each of the 256 bytes; the ends of documents do not count.
    store = write(tmp_path / "s", texts(x="aaab", y="ab", z="c"))
    expected = -(math.log2(4 / 260) + math.log2(2 / 260) + math.log2(1 / 260)) / 3
    assert unigram_bits(store, np.array([1, 2])) == pytest.approx(expected)
    assert math.isnan(unigram_bits(store, np.array([], dtype=np.int64)))
    everything = "".join(map(chr, range(128))) * 1000
    even = write(tmp_path / "t", texts(x=everything, y=everything))
    assert unigram_bits(even, np.array([1])) == pytest.approx(7, abs=0.01)


def test_describe_shows_facts_and_lengths(tmp_path):
    store = write(tmp_path / "s", texts(a="x" * 99, b="x" * 100, c="x"))
    text = store.describe()
    for part in ("documents    3", "tokens       203 (uint16)", store.fingerprint, "0 skipped"):
        assert part in text
    lines = [line.split() for line in text.splitlines() if " to " in line]
    assert lines[0][:7] == ["2", "to", "3", "1", "33.3%", "2", "1.0%"]
    assert lines[-1][:7] == ["64", "to", "127", "2", "66.7%", "201", "99.0%"]
    assert len(lines[-1][7]) == 40
