"""Conversations through a tokenizer's chat template, and the tokens of them that a model learns.

The span of an assistant turn is found in the rendered text. Every message is rendered with an
invisible mark behind its text; the mark shows where the message lies, whatever it contains. The
turn begins where the generation prompt ends, as the model would get it at that point, and ends with
the token that closes the turn. Templates with `{% generation %}` blocks say it themselves.
Templates run in transformers' sandbox (jinja2's `ImmutableSandboxedEnvironment`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_sparse.data.stores.messages import Message, read_messages
from lit_sparse.data.tokenizer import Tokenizer

Span = tuple[int, int]

# Noncharacters of Unicode: no text holds them, and neither `trim` nor `tojson` touches them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
# Values that a template compares or measures, so they are left as they are.
_NAMES = frozenset({"role", "type", "id", "tool_call_id", "name"})
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """A conversation: `ids` int64 [n], and `loss` bool [n], true for the tokens to be learnt."""

    ids: np.ndarray
    loss: np.ndarray


class ChatEncoder:
    """Ids of conversations, exactly `apply_chat_template`'s, and which of them the model learns.

    Learnt is what the model has to write after the generation prompt: the content of an assistant
    turn, its reasoning and tool calls as the template writes them, and the end-of-turn token; never
    a header, another's turn, or the white space behind the end-of-turn token. Where a template has
    `{% generation %}` blocks they decide, but for the end-of-turn token: it is learnt also if it
    stands right behind a block, and white space behind it is not.

    Conversations have the forms that `read_messages` takes. Special tokens spelled out in a message
    become such tokens, as `apply_chat_template` has it.

    Args:
        tokenizer: a Hugging Face one with offsets (a fast one) and a chat template.

    Raises:
        ValueError: it has none of these; the message names `--chat` and `--tokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._inner: Any = getattr(tokenizer, "inner", None)
        if self._inner is None or not self._inner.chat_template:
            raise ValueError(
                "--chat needs a chat template and this --tokenizer has none; give a local Hugging "
                "Face directory whose tokenizer_config.json or chat_template.jinja holds one"
            )
        if not self._inner.is_fast:
            raise ValueError(
                "--chat needs a --tokenizer with offsets, a directory with a tokenizer.json"
            )
        added = self._inner.added_tokens_decoder.values()
        self._special = _any_of({token.content for token in added if token.special})
        try:
            self._closing = _any_of(self._closers())
        except ValueError as error:
            raise ValueError(
                f"--chat: the chat template of --tokenizer fails on a plain conversation: {error}"
            ) from error

    def encode(self, messages: Any, tools: list[dict] | None = None) -> Encoded:
        """One conversation.

        Raises:
            ValueError: it is no conversation or the template cannot write it. The message is short,
                without what is special to this conversation, so that its likes can be counted.
        """
        return self._tokenize([self._render_turns(messages, tools)])[0]

    def encode_many(
        self, conversations: Sequence[Any], tools: Sequence[list[dict] | None] | None = None
    ) -> list[Encoded | ValueError]:
        """`encode` of each, tokenised in parallel; for a bad one the error in its place."""
        results: list[Any] = []
        for messages, offered in zip(
            conversations, tools or [None] * len(conversations), strict=True
        ):
            try:
                results.append(self._render_turns(messages, offered))
            except ValueError as error:
                results.append(error)
        good = [i for i, result in enumerate(results) if not isinstance(result, ValueError)]
        for i, encoded in zip(good, self._tokenize([results[i] for i in good]), strict=True):
            results[i] = encoded
        return results

    def _render_turns(self, messages: Any, tools: list[dict] | None) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters of it that the model learns."""
        messages = read_messages(messages)
        text = self._render(messages, tools)
        marked = _mark_all(messages)
        unmarked, ends = _read_marks(self._render(marked, tools))
        for k, message in enumerate(messages):
            if k not in ends and message.get("content", "").strip():
                raise ValueError(f"the chat template leaves out a turn of role {message['role']!r}")
        if _GENERATION.search(self._inner.get_chat_template(tools=tools)):
            return text, self._block_spans(messages, tools)
        if unmarked != text:
            raise ValueError("the chat template changes with the text of a turn")
        return text, self._turn_spans(text, marked, ends, tools)

    def _turn_spans(
        self, text: str, marked: list[Message], ends: dict[int, int], tools: list[dict] | None
    ) -> list[Span]:
        spans: list[Span] = []
        # Generation prompts, by the role before and the white space its mark stands before, and how
        # turns met them. To render the prompt of every turn would be quadratic in turns.
        prompts: dict[tuple[str, str], str] = {}
        met: set[tuple[tuple[str, str], str]] = set()
        for k, message in enumerate(marked):
            if message["role"] != "assistant":
                continue
            if k == 0:
                raise ValueError("the assistant speaks first")
            white = marked[k - 1].get("content", "").rpartition(_CLOSE)[2]
            before = (marked[k - 1]["role"], white)
            begin, prompt = ends.get(k - 1, -1), prompts.get(before, "")
            shared = _common_prefix(prompt, text[begin : begin + len(prompt)])
            if begin < 0 or (before, shared) not in met:
                prompted = self._render(marked[:k], tools, add_generation_prompt=True)
                *_, (last, prompt) = [(-1, prompted), *_after_marks(prompted)]
                begin = ends.get(last, 0)
                shared = _common_prefix(prompt, text[begin : begin + len(prompt)])
                if last == k - 1:
                    prompts[before] = prompt
                    met.add((before, shared))
            start = begin + self._whole_tokens(prompt, len(shared))
            written = ends.get(k, start)
            if start < begin or written < start or (spans and start < spans[-1][1]):
                raise ValueError("the chat template changes the order of turns")
            limit = min((end for other, end in ends.items() if other > k), default=len(text))
            if closing := self._closing.search(text, written, limit):
                written = closing.end()
            elif message.get("tool_calls"):
                written = self._end_of_calls(text, written, marked[: k + 1], tools)
            if not self._closing.sub("", text[start:written]).strip():
                raise ValueError("the chat template leaves an assistant turn empty")
            spans.append((start, written))
        return spans

    def _end_of_calls(
        self, text: str, written: int, marked: list[Message], tools: list[dict] | None
    ) -> int:
        """Where tool calls end that have an end of their own: what is there without a next turn."""
        *_, (_, tail) = [(-1, ""), *_after_marks(self._render(marked, tools))]
        end = written + len(_common_prefix(tail, text[written:]).rstrip())
        if self._special.search(text, written, end):
            return end
        header = self._special.match(text, end)  # or it is the header of the tool that ends them
        return header.end() if header else end

    def _whole_tokens(self, prompt: str, shared: int) -> int:
        """Characters of the tokens that lie in the shared part of a generation prompt.

        A prompt may open a think block which the template drops from a finished turn.
        """
        if shared == len(prompt):
            return shared
        ends = self._offsets([prompt])["offset_mapping"][0]
        return max((end for _, end in ends if end <= shared), default=0)

    def _block_spans(self, messages: list[Message], tools: list[dict] | None) -> list[Span]:
        # The mask that apply_chat_template makes of the blocks is wrong at trimmed white space.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        try:
            (text,), (blocks,) = render(
                conversations=[messages],
                tools=tools,
                chat_template=self._inner.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True,
                **self._inner.special_tokens_map,
            )
        except Exception as error:
            raise _refusal(error) from error
        spans = []
        for start, end in blocks:
            written = start + len(text[start:end].rstrip())
            closed = [token.end() for token in self._closing.finditer(text, start, end)]
            if behind := self._closing.match(text, end):
                end = behind.end()
            elif written in closed:
                end = written
            spans.append((start, end))
        return spans

    def _closers(self) -> set[str]:
        """What ends a turn: the special tokens behind one, or the text behind the last."""
        turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant") * 2]
        tails = dict(_after_marks(self._render(_mark_all(turns), None)))
        if len(tails) != len(turns):
            raise ValueError("it leaves out a turn whose content is a string")
        if not (last := self._special.search(tails[3])):
            inner = self._special.search(tails[1])
            return {inner.group() if inner else tails[3].strip()} - {""}
        # Some close with two tokens in a row. In the middle the header of the next turn follows.
        run = re.match(f"(?:{self._special.pattern})+", tails[3][last.start() :])
        if run and run.group() in tails[1]:
            return {run.group()}
        return {token.group() for tail in (1, 3) if (token := self._special.search(tails[tail]))}

    def _render(
        self,
        messages: list[Message],
        tools: list[dict] | None,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            text = self._inner.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            text.encode()  # a lone surrogate would fail the tokenizer, and with it the whole batch
            return text
        except Exception as error:  # a template may fail in any way that Python can
            raise _refusal(error) from error

    def _offsets(self, texts: list[str]) -> Mapping[str, Any]:
        return self._inner(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _tokenize(self, rendered: list[tuple[str, list[Span]]]) -> list[Encoded]:
        if not rendered:
            return []
        batch = self._offsets([text for text, _ in rendered])
        results = []
        for (_, spans), ids, offsets in zip(
            rendered, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            ends = np.maximum.accumulate(places[:, 1])
            # Some tokenizers trim white space off the offsets; a token begins where one ended.
            begins = np.minimum(places[:, 0], np.concatenate([[0], ends[:-1]]))
            loss = np.zeros(len(ids), dtype=bool)
            for start, end in spans:
                first = np.searchsorted(ends, start, side="right")
                loss[first : np.searchsorted(begins, end)] = True
            results.append(Encoded(np.asarray(ids, dtype=np.int64), loss))
        return results


def _refusal(error: Exception) -> ValueError:
    return ValueError(f"the chat template refuses it: {error}")


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Finds any of the texts, the longest first; of none, nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _common_prefix(one: str, other: str) -> str:
    unequal = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(unequal, min(len(one), len(other)))]


def _mark_all(messages: list[Message]) -> list[Message]:
    return [_mark(message, f"{_OPEN}{k}{_CLOSE}") for k, message in enumerate(messages)]


def _mark(value: Any, mark: str) -> Any:
    """The value with a mark behind each text in it, before white space a template may strip."""
    if isinstance(value, str) and value.strip():
        text = value.rstrip()
        return text + mark + value[len(text) :]
    if isinstance(value, dict):
        return {key: v if key in _NAMES else _mark(v, mark) for key, v in value.items()}
    if isinstance(value, list):
        return [_mark(item, mark) for item in value]
    return value


def _read_marks(marked: str) -> tuple[str, dict[int, int]]:
    """The text without marks, and where in it the last mark of each message was."""
    ends, removed = {}, 0
    for mark in _MARK.finditer(marked):
        ends[int(mark[1])] = mark.start() - removed
        removed += len(mark[0])
    return _MARK.sub("", marked), ends


def _after_marks(marked: str) -> list[tuple[int, str]]:
    """Number of each mark and the text between it and the next, in order."""
    _, *pieces = _MARK.split(marked)
    return [(int(number), text) for number, text in zip(pieces[::2], pieces[1::2], strict=True)]
