"""What the command line's parser says of wrong keys, in one line."""

from __future__ import annotations

import re

_KEY = re.compile(r'^( *)(?:- )?Parser key "([^"]+)":', re.MULTILINE)
_REPLACED = {
    "data.passkey_fraction": "data.tasks: {passkey: SHARE}",
    "data.passkey_recalls": "data.task_recalls",
}
_WANTED = re.compile(r"Expected an? (.+)\. Got value: (.*)")


def own_words(error: BaseException) -> str:
    """What is wrong: jsonargparse wraps what a constructor raised, or why a value has not the type
    of its key, in all that the argument might have been.
    """
    while str(error).startswith("Does not validate against any") and error.__cause__ is not None:
        listed = re.findall(r"^  - (.*)$", str(error), re.MULTILINE)
        own = [line for line in listed if not line.startswith("Expected a <")]
        if len(own) == 1:
            return own[0]
        error = error.__cause__
    for key, now in _REPLACED.items():
        if key in str(error):
            return f"there is no key {key} any more: write {now}"
    return _wrong_value(str(error)) or str(error)


def _wrong_value(text: str) -> str | None:
    """The innermost key that a message is about, what it may be, and what it is."""
    keys = list(_KEY.finditer(text))
    depths = [len(key[1]) for key in keys]
    if not keys or depths != sorted(set(depths)):  # alternatives beside each other
        return None
    name, rest = ".".join(key[2] for key in keys), text[keys[-1].end() :]
    if exact := _WANTED.match(rest.lstrip()):
        return f"{name} must be {_readable(exact[1])}, got {exact[2]}"
    if unknown := re.search(r"Option '(\w+)' is not accepted", rest):
        return f"{name} has no key {unknown[1]!r}"
    if failed := re.search(r"Problem with given class_path '([\w.]+)':\n +(.*)", rest):
        return f"{name}: {failed[1]}: {failed[2]}"
    types = re.search(r"Subtypes: \[(.*)\]\n", rest)
    given = re.search(r"Given value: (.*)", rest)
    return f"{name} must be {_readable(types[1])}, got {given[1]}" if types and given else None


def _readable(types: str) -> str:
    """Python's names of types in those of YAML."""
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", types)
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types)
    return re.sub(r", (\w+)$", r" or \1", types.replace("NoneType", "null"))
