"""Arguments of recipes: what is wrong with them is said in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lit_sparse.recipes.benchmark.report import BadArgument


class Parser(argparse.ArgumentParser):
    """A parser that raises BadArgument instead of printing its usage and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise BadArgument(message)
