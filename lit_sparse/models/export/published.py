"""Weights under the names and in the shapes that files of a family have: what others read.

They are not always those of the model in transformers: it stacks the experts of Mixtral and
Qwen3-MoE when it loads them, and takes them apart when it saves them. vLLM reads them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor | None]


def published(
    model: PreTrainedModel, weights: Mapping[str, Tensor], read: Read
) -> tuple[Mapping[str, Tensor], Read]:
    """What `save_pretrained` would write of a model's weights.

    Args:
        model: says which family it is.
        weights: by name in the model, on the meta device.
        read: gives them by name; see `write_model`.

    Returns:
        Both by the names in files. What is one tensor in the model is read once where its parts are
        read one after the other, as they stand.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parts = {name: revert_weight_conversion(model, {name: x}) for name, x in weights.items()}
    whole = {part: name for name, own in parts.items() for part in own}
    if all(part == name for part, name in whole.items()):
        return weights, read
    last: dict[str, dict[str, Tensor]] = {}

    def read_part(part: str) -> Tensor | None:
        name = whole[part]
        if name not in last:
            last.clear()
            tensor = read(name)
            last[name] = {} if tensor is None else revert_weight_conversion(model, {name: tensor})
        found = last[name].get(part)
        return None if found is None else found.clone()  # files refuse views of one tensor

    return {part: x for own in parts.values() for part, x in own.items()}, read_part
