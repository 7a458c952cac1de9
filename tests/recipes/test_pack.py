import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lit_sparse.cli import main
from lit_sparse.data.stores.store import TokenStore

# Packs in small units, and stops for good before the fourth is complete.
HELD = """
import sys, time
from lit_sparse import cli
from lit_sparse.data.stores import pack, writer

pack.UNIT_BYTES = 5000
close = writer.ShardWriter.close

def hold(self, *arguments):
    if self._number == 3:
        print("held", flush=True)
        time.sleep(600)
    return close(self, *arguments)

if len(sys.argv) > 1 and sys.argv[1] == "hold":
    writer.ShardWriter.close = hold
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    texts = [{"text": f"document {i} says {i * 7919 % 1000} " * (1 + i % 5)} for i in range(800)]
    path.write_text("\n".join(map(json.dumps, texts)) + '\n{"text": 5}\n')
    return path


def test_a_packing_that_was_killed_continues_to_the_same_store(tmp_path, lines, capsys):
    script = tmp_path / "held.py"
    script.write_text(HELD)
    command = ["pack", str(lines), "--tokenizer", "bytes", "--processes", "1", "--out"]
    out = tmp_path / "store"
    arguments = [sys.executable, str(script), "hold", *command, str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert main(["pack", "--describe", f"{out}.packing"]) == 2
    assert "not finished" in capsys.readouterr().err

    arguments[2] = "go on"
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    assert "Continuing: " in done.stderr
    assert f"lit-sparse fit --config NAME --data.path {out}" in done.stdout
    assert "1 skipped: 1 field 'text' no string (lines.jsonl#801)" in done.stdout
    whole = [*arguments[:-1], str(tmp_path / "whole")]
    subprocess.run(whole, capture_output=True, env=environment, check=True)
    stores = [TokenStore.open(tmp_path / name) for name in ("store", "whole")]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert len(stores[0].manifest.shards) > 6
    stores[0].verify()


def test_worker_processes_end_with_a_parent_that_is_killed(tmp_path, lines):
    script = tmp_path / "held.py"
    script.write_text(
        "from lit_sparse.data.stores import pack\n"
        "from lit_sparse.data.tokenizer import ByteTokenizer\n"
        "import os, sys, time\n"
        "class Slow(ByteTokenizer):\n"
        "    def encode_many(self, texts):\n"
        "        os.write(1, f'{os.getpid()}\\n'.encode())  # at once: lines of two must not mix\n"
        "        time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    pack.UNIT_BYTES = 5000\n"
        "    pack.pack(sys.argv[1:2], Slow(), sys.argv[2], processes=2)\n"
    )
    arguments = [sys.executable, str(script), str(lines), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            workers = [int(process.stdout.readline()) for _ in range(2)]
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""  # its end: nobody holds the other end open
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}/stat") and _runs(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_describe_and_verify(tmp_path, lines, capsys):
    out = tmp_path / "store"
    command = ["pack", str(lines), "--tokenizer", "bytes", "--processes", "1", "--out", str(out)]
    assert main(command) == 0
    assert "800 documents" in capsys.readouterr().out
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["pack", "--describe", str(out)]) == 0
    assert "documents    800" in capsys.readouterr().out
    assert main(["pack", "--verify", str(out)]) == 0
    shard = out / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(["pack", "--verify", str(out)]) == 1
    assert "shard-00000.arrow" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, lines, capsys):
    out = ["--out", str(tmp_path / "store")]
    for arguments, message in (
        ([str(tmp_path / "no"), "--tokenizer", "bytes", *out], r"/no' does not exist"),
        ([str(lines), "--tokenizer", "gpt2", *out], "--tokenizer 'gpt2' is neither 'bytes' nor"),
        ([str(lines), "--tokenizer", "bytes", "--out", str(tmp_path)], "holds something else"),
        ([str(lines), "--tokenizer", "bytes", "--field", "b", *out], "without field 'b'"),
    ):
        assert main(["pack", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("lit-sparse: error: ")
        assert message in error
    for arguments in ([], [str(lines), *out], ["--tokenizer", "bytes", *out]):
        with pytest.raises(SystemExit):
            main(["pack", *arguments])
