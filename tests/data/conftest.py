from pathlib import Path

import pytest


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    """24 text files of 100 to 2400 bytes, no two alike."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(24):
        text = "".join(f"{i:02d}/{j:04d} line\n" for j in range((i + 1) * 100 // 13 + 1))
        (folder / f"{i:02d}.txt").write_text(text[: (i + 1) * 100])
    return folder
