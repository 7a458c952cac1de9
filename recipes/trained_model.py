"""A model as a checkpoint holds it: without memory, its weights are read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.distributed.loading import TensorFiles
from lit_sparse.distributed.stored_weights import StoredTensor
from lit_sparse.models import build_model, model_without_weights, weight_files
from lit_sparse.models.export.write import stored_tensors
from lit_sparse.models.lora.adapters import LoRA, add_lora
from lit_sparse.models.lora.base import Base
from lit_sparse.models.lora.merge import plain_name


class TrainedModel:
    """A transformers model on the meta device, and where its weights are.

    Args:
        checkpoint: for messages.
        name: attribute path of the model in the module that was trained.
        config: the model's.
        weights: of the checkpoint, by name.
        dtype: of the weights to be written; None: that of the checkpoint, or, of adapters, that of
            the weights that they were trained on.

    Raises:
        ValueError: the checkpoint has no weight of the model.
    """

    def __init__(
        self,
        checkpoint: Path,
        name: str,
        config: Mapping[str, Any],
        weights: Mapping[str, StoredTensor],
        dtype: torch.dtype | None,
    ) -> None:
        from transformers import AutoConfig

        self._checkpoint, self._prefix = checkpoint, f"{name}." if name else ""
        self._weights = {
            key.removeprefix(self._prefix): weight
            for key, weight in weights.items()
            if key.startswith(self._prefix)
        }
        if not self._weights:
            raise ValueError(f"{checkpoint} has no weights of {name}")
        self._asked = dtype
        self.dtype = dtype or next(iter(self._weights.values())).dtype
        self.model = model_without_weights(AutoConfig.for_model(**config), self.dtype)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name, on the meta device."""
        return stored_tensors(self.model)

    def add_adapters(self, saved: Mapping[str, Any], directory: Path | None) -> None:
        """Make it a model with adapters, whose other weights are read from a directory.

        Args:
            saved: what the checkpoint says about them, see `describe_adapters`.
            directory: instead of the one that they were trained on.

        Raises:
            ValueError: the directory is not there, or has other weights.
        """
        dtype = getattr(torch, saved["dtype"])
        self.dtype = self._asked or dtype
        self.model.to(dtype)
        base = None
        if saved["base"] is not None:
            base, key = Base(**saved["base"]), "--base"
            if directory is None:
                directory, key = Path(base.directory), "the checkpoint has adapters alone"
            if not directory.is_dir():
                raise ValueError(
                    f"{key}: there is no directory {directory}, of the weights that they were "
                    "trained on: say where it is now with --base DIR"
                )
            base.check(key, directory)
            base = Base(str(directory.absolute()), base.fingerprint)
        add_lora(self.model, LoRA(**saved["lora"]), base)
        if base is not None:
            names = {n for n, p in self.model.named_parameters() if not p.requires_grad}
            self._weights |= _base_weights(Path(base.directory), names, dtype)

    def check(self) -> None:
        """ValueError where the weights are not those that the config asks for."""
        for key, tensor in self.tensors.items():
            found = self._weights.get(key)
            if found is None or found.shape != tensor.shape:
                held = "lacks" if found is None else f"has {list(found.shape)} as"
                raise ValueError(
                    f"{self._checkpoint} {held} {self._prefix}{key}; its config asks for "
                    f"{list(tensor.shape)}"
                )

    def read(self, key: str) -> Tensor:
        return self._weights[key].contiguous()


class _FileTensor:
    """A tensor of some files, in the dtype in which adapters were trained on it."""

    def __init__(self, files: TensorFiles, name: str, dtype: torch.dtype) -> None:
        self.files, self.name, self.dtype = files, name, dtype
        self.shape = torch.Size(files.shapes[name])

    def contiguous(self) -> Tensor:
        return self.files.read(self.name).to(self.dtype)


def _base_weights(directory: Path, names: set[str], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Frozen weights, by their names in the model with adapters."""
    files = TensorFiles(weight_files(directory))
    if all(plain_name(name) in files.shapes for name in names):
        return {name: _FileTensor(files, plain_name(name), dtype) for name in names}
    # Files with other names than the model has: transformers puts the tensors together.
    model = build_model(directory, dtype=dtype)
    loaded = dict(model.named_parameters(remove_duplicate=False))
    return {name: loaded[plain_name(name)].detach() for name in names}
