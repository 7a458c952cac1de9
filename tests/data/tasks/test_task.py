"""What holds for every task, with bytes and with a tokenizer that joins digits and letters."""

import re
from collections import Counter

import numpy as np
import pytest

from lit_sparse.data.tasks import TASKS, Variables, make_task, prompts

TEXT = "Lorem ipsum dolor sit amet, " * 60
EVERY = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in TASKS for kind in ("bytes", "bpe")]
)
NUMBER = r"((?: *\d)+)"


def solve(name: str, text: str) -> str:
    """The answer to the question that a text ends with, read off what it states."""
    if name == "copy":
        return text
    line = text.splitlines()[-1]
    if name == "passkey":
        return re.findall(rf"# passkey: {NUMBER}\n", text)[0]
    if name == "multikey":
        (asked,) = re.findall(r"# key of (\w+): $", line)
        return dict(re.findall(rf"# key of (\w+): {NUMBER}\n", text))[asked]
    if name == "multivalue":
        (asked,) = re.findall(r"# all values of (\w+): $", line)
        return "".join(re.findall(rf"# value of {asked}: {NUMBER}\n", text))
    if name == "variables":
        (asked,) = re.findall(r"# value of (\w+): $", line)
        said = dict(re.findall(r"# (\w+) =(.+)\n", text))
        while not re.search(r"\d", asked):
            asked = said[asked.strip()]
        return asked[1:]
    (listed,) = re.findall(r"# words:((?: \w+)+)\n# most common word:$", text)
    (first, most), (_, second) = Counter(listed.split()).most_common(2)
    assert most >= 2 * second
    return f" {first}"


@EVERY
def test_the_text_states_the_answer_which_ends_the_piece(tokenizers, name, kind):
    tokenizer = tokenizers[kind]
    task = make_task(name, tokenizer)
    text = tokenizer.encode(TEXT)
    seen = set()
    for seed in range(12):
        piece = text[: task.shortest + 29 * seed]
        planted = task.plant(piece, np.random.default_rng(seed))
        assert planted.ids.shape == planted.answer.shape == piece.shape
        assert (planted.ids.dtype, planted.answer.dtype) == (np.int64, bool)
        assert (planted.depth is not None) == task.has_depth
        start = int(planted.answer.argmax())
        told = solve(name, tokenizer.decode(planted.ids[:start]))
        answer = tokenizer.decode(planted.ids[planted.answer])
        # Of a run of tokens the copy may end early.
        assert answer == told or (name == "copy" and told.startswith(answer))
        between = tokenizer.decode(planted.ids[start:][~planted.answer[start:]])
        assert set(between) <= {",", " "}, "nothing but what separates values stands between them"
        assert planted.answer[-1]
        seen.add(told)
        again = task.plant(piece, np.random.default_rng(seed))
        assert np.array_equal(planted.ids, again.ids)
    assert len(seen) > 6, "answers are drawn"
    assert np.array_equal(text, tokenizer.encode(TEXT)), "the store is not written to"


@pytest.mark.parametrize("hops", [1, 3])
def test_only_the_chain_tells_a_variable(tokenizers, hops):
    tokenizer = tokenizers["bytes"]
    task = Variables(tokenizer, hops=hops, chains=2)
    planted = task.plant(tokenizer.encode(TEXT)[:500], np.random.default_rng(0))
    *said, (asked, value) = re.findall(
        r"# (?:value of )?(\w+)(?: =|:) (\w+)", tokenizer.decode(planted.ids)
    )
    assert len(said) == 2 * (hops + 1)
    assert (asked, value) not in said
    for _ in range(hops):
        asked = dict(said)[asked]
        assert not asked.isdigit()
    assert dict(said)[asked] == value


@EVERY
def test_answers_take_the_same_number_of_tokens_and_the_tokens_they_were_stated_in(
    tokenizers, name, kind
):
    task = make_task(name, tokenizers[kind])
    text = tokenizers[kind].encode(TEXT)[:400]
    sizes = set()
    for seed in range(12):
        planted = task.plant(text, np.random.default_rng(seed))
        sizes.add(int(planted.answer.sum()))
        start = int(planted.answer.argmax())
        run = int(np.append(planted.answer[start:], False).argmin())
        windows = np.lib.stride_tricks.sliding_window_view(planted.ids[:start], run)
        assert (windows == planted.ids[start : start + run]).all(1).any()
    assert len(sizes) == 1


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("name", [name for name in TASKS if name != "copy"])
def test_recalls_are_more_that_was_told_before(tokenizers, name, kind):
    tokenizer = tokenizers[kind]
    task = make_task(name, tokenizer)
    text = tokenizer.encode(TEXT)
    for seed in range(6):
        planted = task.plant(text[:900], np.random.default_rng(seed), recalls=4)
        starts = np.flatnonzero(np.diff(planted.answer.astype(int), prepend=0) == 1)
        runs = [slice(a, a + int(np.append(planted.answer[a:], False).argmin())) for a in starts]
        # Of several values one each; of the other tasks each recall is one.
        assert len(runs) >= (3 + 4 if name == "multivalue" else 1 + 4)
        for run in runs:
            before = tokenizer.decode(planted.ids[: run.start])
            told = tokenizer.decode(planted.ids[run])
            if name == "aggregation":
                assert told == solve(name, before[before.rindex("\n# words:") :])
            elif name == "multivalue":
                assert told in before
            else:
                assert told == solve(name, before)
        # As many as fit, which may be none.
        piece = text[: task.shortest]
        assert len(task.plant(piece, np.random.default_rng(seed), recalls=4).ids) == len(piece)


@EVERY
def test_a_piece_too_short_and_a_depth_that_is_none_are_refused(tokenizers, name, kind):
    task = make_task(name, tokenizers[kind])
    piece = tokenizers[kind].encode(TEXT)[: task.shortest]
    with pytest.raises(ValueError, match=rf"{name} needs pieces of at least {task.shortest}"):
        task.plant(piece[1:], np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"depth must be in \[0, 1\], got 2"):
        task.plant(piece, np.random.default_rng(0), depth=2)


@EVERY
def test_prompts_ask_at_even_depths(documents_of, tokenizers, name, kind):
    tokenizer = tokenizers[kind]
    task = make_task(name, tokenizer)
    documents = documents_of(TEXT)
    asked = prompts(task, documents, 400, 5, np.random.default_rng(0))
    assert asked.ids.shape == asked.answer.shape == (5, 400)
    for answer in asked.answer:
        assert np.array_equal(answer, asked.answer[0]), "the answer stands at the same places"
        assert asked.answer_start == answer.argmax()
    if task.has_depth:
        assert asked.depths == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    else:
        assert np.isnan(asked.depths).all()
    again = prompts(task, documents, 400, 5, np.random.default_rng(0))
    other = prompts(task, documents, 400, 5, np.random.default_rng(1))
    assert np.array_equal(asked.ids, again.ids)
    assert not np.array_equal(asked.ids, other.ids)
    with pytest.raises(ValueError, match=rf"{name} needs at least \d+ tokens, got length = 10"):
        prompts(task, documents, 10, 1, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].has_depth])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_the_evidence_stands_where_it_was_asked_to(tokenizers, name, kind, depth):
    tokenizer = tokenizers[kind]
    task = make_task(name, tokenizer)
    for length in (task.shortest + 1, task.shortest + 30, 500):
        text = tokenizer.encode(TEXT)[:length]
        planted = task.plant(text, np.random.default_rng(0), depth=depth)
        before = tokenizer.decode(planted.ids[: planted.answer.argmax()])
        statement = before.splitlines()[-1] + solve(name, before)
        found = len(tokenizer.encode(before[: before.index(f"\n{statement}\n")]))
        # What is between, in tokens: the text before the question without the statement.
        room = length - task.question_tokens - task.statement_tokens
        assert found == pytest.approx(depth * room, abs=0.5 if kind == "bytes" else 4)
        assert planted.depth == pytest.approx(depth, abs=0.5 / room)


def test_the_text_of_prompts_is_of_one_document_or_of_several(documents_of, tokenizers):
    task = make_task("passkey", tokenizers["bytes"])
    rng = np.random.default_rng(0)
    for texts in (["lorem ipsum " * 200], ["dolor sit "] * 90):
        asked = prompts(task, documents_of(*texts), 500, 2, rng)
        assert tokenizers["bytes"].eos_id not in asked.ids
    with pytest.raises(ValueError, match="documents hold 100"):
        prompts(task, documents_of("x" * 60, "y" * 40), 1000, 1, rng)


def test_an_unknown_task_is_refused_by_name(tokenizers):
    with pytest.raises(ValueError, match="no task 'needle'; there are copy, passkey, multikey"):
        make_task("needle", tokenizers["bytes"])
