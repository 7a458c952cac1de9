"""The messages of a conversation, from the forms in which people keep them."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def read_messages(messages: Any) -> list[Message]:
    """The messages of a record as chat templates want them: `role`, and `content` a string.

    A message is `{"role", "content"}`, or ShareGPT's `{"from", "value"}` with "human" and "gpt". A
    content in parts is joined, if all of them are text. `tool_calls` may stand for the content.
    Other keys (`reasoning_content`, say) are kept, those with the value None are dropped.

    Raises:
        ValueError: it is no conversation with an assistant turn; the reason in a few words.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("not a list of messages")
    read = [_read_message(message) for message in messages]
    if all(message["role"] != "assistant" for message in read):
        raise ValueError("no assistant turn")
    return read


def _read_message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError("not a list of messages")
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        sender = message.pop("from")
        message["role"] = SHAREGPT_ROLES.get(str(sender), sender)
        if "value" in message:
            message["content"] = message.pop("value")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise ValueError("content that is not text")
        content = message["content"] = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or calls):
        raise ValueError("message without role or content")
    if message["role"] == "assistant" and not ((content or "").strip() or calls):
        raise ValueError("empty assistant turn")
    return message
