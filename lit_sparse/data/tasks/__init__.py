"""Long-range tasks: what a text states is asked for at its end. For training and for evaluation."""

from __future__ import annotations

from lit_sparse.data.tasks.common_word import CommonWord
from lit_sparse.data.tasks.copying import Copy
from lit_sparse.data.tasks.multikey import MultiKey
from lit_sparse.data.tasks.multivalue import MultiValue
from lit_sparse.data.tasks.passkey import Passkey
from lit_sparse.data.tasks.task import Planted, Prompts, Task, prompts
from lit_sparse.data.tasks.variables import Variables
from lit_sparse.data.tokenizer import Tokenizer

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Copy, Passkey, MultiKey, MultiValue, Variables, CommonWord)
}
"""The tasks by the names that configs and commands give them."""

__all__ = [
    "TASKS",
    "CommonWord",
    "Copy",
    "MultiKey",
    "MultiValue",
    "Passkey",
    "Planted",
    "Prompts",
    "Task",
    "Variables",
    "make_task",
    "prompts",
]


def make_task(name: str, tokenizer: Tokenizer) -> Task:
    """A task as it is by default, in the tokens of a tokenizer.

    Raises:
        ValueError: there is none of this name, or the tokenizer does not allow it.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name](tokenizer)
