"""Ids are those of `apply_chat_template`; learnt is what the assistant writes, its end included."""

import json

import numpy as np
import pytest

from lit_sparse.data import ByteTokenizer, load_tokenizer
from lit_sparse.data.stores.chat import ChatEncoder

# The shapes of published templates, cut down to what decides the spans.
CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
{{- '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# No generation prompt; the system prompt goes into the last question.
MISTRAL = """{{ bos_token }}{% set system, turns = '', messages %}
{%- if messages[0].role == 'system' %}
{%- set system, turns = messages[0].content + '\n\n', messages[1:] %}{% endif %}
{%- for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}
{{- '[INST] ' }}{% if loop.revindex <= 2 %}{{ system }}{% endif %}
{{- m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Thinking before the last question is dropped; the last answer always has a think block.
QWEN3 = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content, think = m.content or '', m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set think = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or think) %}
{{- '<think>\n' + think.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}
{%- for call in m.tool_calls or [] %}{% set f = call.function %}
{{- '\n<tool_call>\n{"name": "' + f.name + '", "arguments": ' + f.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\nPROMPT' }}{% endif %}"""
QWEN3_EMPTY_THINK = QWEN3.replace("PROMPT", r"<think>\n\n</think>\n\n")
QWEN3_OPEN_THINK = QWEN3.replace("PROMPT", r"<think>\n")
QWEN3 = QWEN3.replace("PROMPT", "")

CALLS = """{% for m in messages %}
{{- '<|im_start|>tool\n' if m.role == 'tool' else '<|im_start|>' + m.role + '\n' }}
{%- for call in m.tool_calls or [] %}{{ 'CALL ' + call.function.arguments | tojson + 'END' }}
{%- endfor %}{% if m.content %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Templates made for training mark what is learnt, with the end of the turn or without.
BLOCKS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + 'INSIDE' }}{% endgeneration %}{{ 'OUTSIDE' }}{% else %}
{{- m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"""
BLOCKS_WITH_END = BLOCKS.replace("INSIDE", r"<|im_end|>\n").replace("OUTSIDE", "")
BLOCKS_WITHOUT_END = BLOCKS.replace("INSIDE", "").replace("OUTSIDE", r"<|im_end|>\n")

# GLM closes a turn with the header of the next; Vicuna has no header token; Alpaca no token at all.
GLM = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
VICUNA = """{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
ALPACA = """{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"""

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|user|>"]
SPECIAL += ["<|assistant|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Makes encoders of bytes and the special tokens of all templates; "<think>" is not special."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    ByteTokenizer().save_pretrained(folder / "bytes")
    inner = AutoTokenizer.from_pretrained(folder / "bytes", local_files_only=True)
    inner.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": SPECIAL}
    )
    inner.add_tokens(["<think>", "</think>"])

    def make(template, trim_offsets=False):
        (folder / "saved" / "chat_template.jinja").unlink(missing_ok=True)
        inner.chat_template = template
        inner.save_pretrained(folder / "saved")
        if trim_offsets:  # as Llama 3 has it
            path = folder / "saved" / "tokenizer.json"
            saved = json.loads(path.read_text())
            post = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            saved["post_processor"] = {"type": "ByteLevel", **post}
            path.write_text(json.dumps(saved))
        return ChatEncoder(load_tokenizer(folder / "saved"))

    return make


def turns(*contents, system=None):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def learnt(encoder, messages, tools=None):
    """The stretches of text to be learnt, after a check of the ids."""
    encoded = encoder.encode(messages, tools)
    inner = encoder._inner
    assert encoded.ids.tolist() == inner.apply_chat_template(messages, tools=tools)["input_ids"]
    assert encoded.ids.dtype == np.int64
    assert encoded.loss.dtype == bool
    edges = np.flatnonzero(np.diff(encoded.loss.astype(int), prepend=0, append=0))
    return [inner.decode(encoded.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        pytest.param(CHATML, "{}<|im_end|>", id="chatml"),
        pytest.param(LLAMA3, "{}<|eot_id|>", id="llama3"),
        pytest.param(MISTRAL, " {}</s>", id="mistral"),
        pytest.param(GEMMA, "{}<end_of_turn>", id="gemma"),
        pytest.param(QWEN3_EMPTY_THINK, "{}<|im_end|>", id="qwen3"),
        pytest.param(BLOCKS_WITH_END, "{}<|im_end|>", id="blocks_with_end"),
        pytest.param(BLOCKS_WITHOUT_END, "{}<|im_end|>", id="blocks_without_end"),
        pytest.param(VICUNA, " {}</s>", id="vicuna"),
        pytest.param(ALPACA, "{}", id="alpaca"),
    ],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_answer_and_its_end_are_learnt(encoder, template, form, trim_offsets):
    encoder = encoder(template, trim_offsets)
    for answers in (["42."], ["yes", "naïve 日本語 🙂\n\n\tcode", "<b>no</b>"]):
        messages = turns(*(text for answer in answers for text in ("Why?", answer)))
        assert learnt(encoder, messages) == [form.format(answer) for answer in answers]
    # What a turn says may look like anything that a template writes.
    header = (
        "<|im_end|>\n<|im_start|>assistant\nUSER: [/INST] ### assistant:\n<start_of_turn>model\n"
    )
    messages = turns(f"a{header}b", f"c{header}d", f"{header}", "e</s>f<|eot_id|>")
    assert learnt(encoder, messages) == [
        form.format(f"c{header}d"),
        form.format("e</s>f<|eot_id|>"),
    ]
    # A question without an answer is no loss, and nothing is appended.
    assert learnt(encoder, turns("a", "b", "c")) == [form.format("b")]


def test_white_space_is_learnt_as_the_template_writes_it(encoder):
    messages = turns("  q \n", " \n answer  \n", "q", "x ")
    assert learnt(encoder(LLAMA3), messages) == ["answer<|eot_id|>", "x<|eot_id|>"]
    assert learnt(encoder(MISTRAL), messages) == [" answer</s>", " x</s>"]
    kept = [" \n answer  \n<|im_end|>", "x <|im_end|>"]
    for template in (CHATML, BLOCKS_WITH_END, BLOCKS_WITHOUT_END):
        assert learnt(encoder(template, trim_offsets=True), messages) == kept


def test_a_system_prompt_is_not_learnt_wherever_it_stands(encoder):
    messages = turns("q", "a", "r", "b", system="Be brief.")
    assert learnt(encoder(CHATML), messages) == ["a<|im_end|>", "b<|im_end|>"]
    assert learnt(encoder(MISTRAL), messages) == [" a</s>", " b</s>"]
    with pytest.raises(ValueError, match="refuses it: System role not supported"):
        encoder(GEMMA).encode(messages)


def test_thinking_is_learnt_where_it_is_written_and_not_given(encoder):
    messages = turns("q", "<think>\nlong\n</think>\n\nyes", "r", "<think>\nshort\n</think>\n\nno")
    written = ["yes<|im_end|>", "<think>\nshort\n</think>\n\nno<|im_end|>"]
    assert learnt(encoder(QWEN3), messages) == written
    # The generation prompt opens the block itself, in the turns that keep one.
    assert learnt(encoder(QWEN3_OPEN_THINK), messages) == [
        "yes<|im_end|>",
        "short\n</think>\n\nno<|im_end|>",
    ]
    # A prompt with an empty block shares no whole token with an answer in angle brackets.
    assert learnt(encoder(QWEN3_EMPTY_THINK), turns("q", "<p>", "r", "<i>")) == [
        "<p><|im_end|>",
        "<i><|im_end|>",
    ]
    apart = [*turns("q"), {"role": "assistant", "content": "no", "reasoning_content": "hm"}]
    assert learnt(encoder(QWEN3), apart) == ["<think>\nhm\n</think>\n\nno<|im_end|>"]


def test_tool_calls_are_learnt_and_answers_of_tools_are_not(encoder):
    def call(**arguments):
        function = {"name": "look_up", "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}

    messages = [
        *turns("weather?"),
        {**call(place="Zürich<|im_end|>", days=3), "content": ""},
        {"role": "tool", "content": "sunny <|im_end|>"},
        {**call(n=1), "content": None},
        {"role": "tool", "content": "22"},
        {"role": "assistant", "content": "Warm."},
    ]
    form = '\n<tool_call>\n{{"name": "look_up", "arguments": {}}}\n</tool_call><|im_end|>'
    assert learnt(encoder(QWEN3), messages) == [
        form.format('{"place": "Zürich<|im_end|>", "days": 3}'),
        form.format('{"n": 1}'),
        "<think>\n\n</think>\n\nWarm.<|im_end|>",
    ]


def test_tool_calls_may_end_in_their_own_way(encoder):
    messages = [
        *turns("q"),
        {"role": "assistant", "tool_calls": [{"function": {"arguments": {"x": "<s>"}}}]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    # gpt-oss has a token for it; GLM ends them with the header of the tool, as it ends a turn.
    own_token = CALLS.replace("END", "<|eot_id|>")
    assert learnt(encoder(own_token), messages) == ['CALL {"x": "<s>"}<|eot_id|>', "a<|im_end|>"]
    next_header = CALLS.replace("END", "").replace("<|im_start|>tool", "<|user|>tool")
    assert learnt(encoder(next_header), messages) == ['CALL {"x": "<s>"}<|user|>', "a<|im_end|>"]


def test_an_end_of_two_tokens_is_learnt_whole(encoder):
    template = CHATML.replace("<|im_end|>\n", "<|im_end|><|eot_id|>")
    assert learnt(encoder(template), turns("q", "a", "r", "b")) == [
        "a<|im_end|><|eot_id|>",
        "b<|im_end|><|eot_id|>",
    ]


def test_a_turn_that_the_next_header_closes_learns_that_header(encoder):
    assert learnt(encoder(GLM), turns("q", "a", "r", "b")) == ["a<|user|>", "b"]


def test_two_answers_in_a_row_are_both_learnt(encoder):
    messages = [*turns("q", "a"), {"role": "assistant", "content": "b"}]
    assert learnt(encoder(CHATML), messages) == ["a<|im_end|>", "b<|im_end|>"]


def test_sharegpt_and_content_in_parts_are_read(encoder):
    encoder = encoder(CHATML)
    wanted = encoder.encode(turns("q", "a b"))
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a b"}]
    parts = [{"type": "text", "text": text} for text in ("a ", None, "b")]  # None: of Parquet
    for messages in (sharegpt, turns("q", parts)):
        encoded = encoder.encode(messages)
        assert np.array_equal(encoded.ids, wanted.ids)
        assert np.array_equal(encoded.loss, wanted.loss)


def test_many_at_once_give_the_same_and_errors_in_their_places(encoder):
    encoder = encoder(LLAMA3)
    conversations = [turns("q", "a"), [], turns("q", "\ud800"), turns("longer", "answer")]
    first, empty, surrogate, last = encoder.encode_many(conversations)
    assert str(empty) == "not a list of messages"
    assert "refuses it" in str(surrogate)
    for encoded, messages in ((first, conversations[0]), (last, conversations[3])):
        assert np.array_equal(encoded.ids, encoder.encode(messages).ids)
        assert np.array_equal(encoded.loss, encoder.encode(messages).loss)
    assert encoder.encode_many([]) == []


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "not a list of messages"),
        (["hello"], "not a list of messages"),
        ([{"content": "x"}], "message without role or content"),
        ([{"role": "user"}], "message without role or content"),
        ([{"role": "user", "content": 3}], "message without role or content"),
        (turns("q"), "no assistant turn"),
        (turns("q", " "), "empty assistant turn"),
        (turns([{"type": "image"}], "a"), "content that is not text"),
        (turns("q", "a", system="x")[::2], "roles must alternate"),
        ([{"role": "assistant", "content": "a"}], "roles must alternate"),
    ],
)
def test_a_bad_conversation_is_refused_in_a_few_words(encoder, messages, reason):
    with pytest.raises(ValueError, match=reason):
        encoder(MISTRAL).encode(messages)


def test_what_a_template_hides_or_moves_is_refused(encoder):
    messages = turns("q", "a", "r", "b")
    no_system = CHATML.replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(ValueError, match="leaves out a turn of role 'system'"):
        encoder(no_system).encode(turns("q", "a", system="s"))
    with pytest.raises(ValueError, match="order of turns"):
        encoder(CHATML.replace("in messages", "in messages | reverse")).encode(messages)
    measured = CHATML.replace("m['content']", "m['content'] ~ m['content'] | length")
    with pytest.raises(ValueError, match="changes with the text"):
        encoder(measured).encode(messages)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
    with pytest.raises(ValueError, match="leaves an assistant turn empty"):
        encoder(CHATML).encode(
            [*turns("q"), {**turns("q", "a")[1], "content": "", "tool_calls": [call]}]
        )
    silent = CHATML.replace("m['content']", "''")
    with pytest.raises(ValueError, match="--tokenizer.*whose content is a string"):
        encoder(silent)
    with pytest.raises(ValueError, match="the assistant speaks first"):
        encoder(CHATML).encode(messages[1:])


def test_a_template_cannot_reach_python(encoder):
    with pytest.raises(ValueError, match="--tokenizer fails on a plain conversation.*unsafe"):
        encoder("{{ messages.__class__.__mro__ }}")


def test_a_tokenizer_without_template_names_the_flags(encoder):
    with pytest.raises(ValueError, match="--chat needs a chat template.*--tokenizer"):
        ChatEncoder(ByteTokenizer())
    with pytest.raises(ValueError, match="--chat needs a chat template.*--tokenizer"):
        encoder(None)
