"""The configs that come with the package: found by bare name, listed with a line each."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

import lit_sparse


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every shipped config."""
    folder = Path(lit_sparse.__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> str:
    """The file of a config given by path or by bare name.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    if Path(name).is_file():
        return name
    configs = shipped_configs()
    if name in configs:
        return str(configs[name])
    if Path(name).suffix or len(Path(name).parts) > 1:
        raise ValueError(f"--config: there is no file {name}")
    near = get_close_matches(name, configs, n=3, cutoff=0.4)
    guess = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(configs)}"
    raise ValueError(f"--config: no shipped config and no file is called {name}; {guess}")


def describe(path: Path) -> str:
    """The first comment line of a config: what it is for."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").rstrip()


def main(argv: list[str]) -> int:
    """`lit-sparse configs`: list the shipped configs."""
    if argv:
        print("usage: lit-sparse configs\n\nLists the shipped configs, for --config NAME.")
        return 0 if argv in (["-h"], ["--help"]) else 2
    configs = shipped_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        print(f"{name.ljust(width)}  {describe(path)}")
    return 0
