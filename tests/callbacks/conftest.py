import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """case -> what rank 0 and rank 1 found; see two_ranks.py."""
    out = tmp_path_factory.mktemp("two_ranks")
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    return {
        case.name: [json.loads((case / f"{rank}.json").read_text()) for rank in range(2)]
        for case in out.iterdir()
    }
