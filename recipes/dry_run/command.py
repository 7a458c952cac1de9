"""lit-sparse fit --dry-run[=GPU]: prints the plan of a run, or the one line that says what is
wrong.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lit_sparse.recipes.dry_run.build import Build
from lit_sparse.recipes.dry_run.report import lines
from lit_sparse.recipes.estimate.gpus import GPUS, Gpu
from lit_sparse.recipes.fit import resolve_configs
from lit_sparse.recipes.messages import own_words

FLAG, DEFAULT = "--dry-run", "h100"


def main(argv: list[str]) -> int:
    """Print the plan of `lit-sparse ARGV`. 2 where fit would refuse to start.

    Nothing is trained, read of weights, or written. `--dry-run=GPU` names the kind of GPU whose
    memory the run is held against, see `lit-sparse estimate --gpus`.
    """
    flags = [argument for argument in argv if argument.partition("=")[0] == FLAG]
    try:
        gpu = _gpu(flags[-1].partition("=")[2] or DEFAULT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What Lightning says of the accelerators of this machine.
            logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
            rest = resolve_configs([argument for argument in argv if argument not in flags])
            build = Build(rest)
            print("\n".join(lines(build, gpu)))
    except (ValueError, NotImplementedError, MisconfigurationException) as error:
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(f"lit-sparse: error: {own_words(error)}", file=sys.stderr)
        return 2
    return 0


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise ValueError(f"{FLAG}: {name} is not one of {', '.join(GPUS)}")
    return GPUS[name]
