"""The order of tokens does not depend on ranks or workers: real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

CASES = ["1x0", "1x3", "2x1", "4x0"]
"""Ranks x workers."""
ROWS_PER_STEP, STEPS = 4, 6


def test_ranks_and_workers_train_on_the_same_rows_in_the_same_order(corpus_dir, tmp_path):
    script = Path(__file__).with_name("ranks.py")
    subprocess.run(
        [sys.executable, str(script), str(corpus_dir), str(tmp_path), *CASES],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )

    def order(case: str) -> list[list]:
        """(step, row) of the whole run: in each step the rows of rank 0 first."""
        seen = [json.loads(path.read_text()) for path in sorted((tmp_path / case).glob("*.json"))]
        share = ROWS_PER_STEP // len(seen)
        steps = [part[step * share : (step + 1) * share] for step in range(STEPS) for part in seen]
        return [row for part in steps for row in part]

    expected = order(CASES[0])
    assert [step for step, _ in expected] == [s for s in range(STEPS) for _ in range(ROWS_PER_STEP)]
    assert len({row for _, row in expected}) == STEPS * ROWS_PER_STEP
    for case in CASES[1:]:
        assert order(case) == expected, case
