import multiprocessing
import os
import time

import pytest

from lit_sparse.data.cache import cached


def _build(out):
    out.mkdir()
    (out / "builder").write_text(str(os.getpid()))
    time.sleep(0.3)


def _ask(root, queue):
    queue.put((cached("rows", {"a": 1}, _build, root) / "builder").read_text())


def test_it_is_built_once_for_all_processes_that_ask(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    asking = [context.Process(target=_ask, args=(tmp_path, queue)) for _ in range(3)]
    for process in asking:
        process.start()
    answers = {queue.get(timeout=30) for _ in asking}
    for process in asking:
        process.join()
    assert len(answers) == 1
    assert cached("rows", {"a": 2}, _build, tmp_path) != cached("rows", {"a": 1}, _build, tmp_path)


def test_what_was_interrupted_is_built_again(tmp_path):
    def fail(out):
        out.mkdir()
        (out / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("rows", {}, fail, tmp_path)
    path = cached("rows", {}, _build, tmp_path)
    assert [child.name for child in path.iterdir()] == ["builder"]


def test_a_cache_that_cannot_be_written_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir"):
        cached("rows", {}, _build, tmp_path / "file")
