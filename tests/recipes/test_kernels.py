"""lit-sparse kernels: the compiler's word on every kernel; bad launches are seen as such."""

import json
import os
import subprocess
import sys

import pytest

from lit_sparse.cli import main

TARGETS = ("sm_80", "sm_90")
GATHERING = {"forward_kernel", "dq_kernel", "dkdv_kernel"}
KERNELS = GATHERING | {
    "fill_kernel", "means_kernel", "masses_kernel", "choose_kernel", "statistics_kernel",
    "reduce_kernel",
}  # fmt: skip
LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}


def _start(*command):
    """Outside of the interpreter that this process may run kernels in."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip


def _output(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


def _report(folder, *options, targets=TARGETS):
    """What the command prints and writes for all targets, each in a process of its own."""
    paths = [folder / f"{target}.json" for target in targets]
    running = [
        _start("-m", "lit_sparse", "kernels", "--targets", target, "--json", str(path), *options)
        for target, path in zip(targets, paths, strict=True)
    ]
    tables = [_output(process) for process in running]
    return "\n".join(tables), [r for path in paths for r in json.loads(path.read_text())]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return _report(tmp_path_factory.mktemp("kernels"), "--head-dims", "64,96,128")


def test_every_kernel_at_every_head_dimension_for_both_gpus(report):
    table, reports = report
    seen = {(r["target"], r["dim"], r["kernel"]) for r in reports if r["dim"]}
    without_dim = {"fill_kernel", "choose_kernel"}
    assert seen == {
        (t, d, k) for t in TARGETS for d in (64, 96, 128) for k in KERNELS - without_dim
    }
    assert without_dim <= {r["kernel"] for r in reports}
    for name in KERNELS:
        assert name.removesuffix("_kernel") in table


def test_no_spills_up_to_head_dimension_128(report):
    for r in report[1]:
        assert r["spills"] == 0, r


def test_shared_memory_fits(report):
    for r in report[1]:
        assert r["shared"] <= LIMIT[r["target"]], r
        assert r["programs"] >= 1, r


def test_gathered_loads_are_in_flight_two_steps_ahead(report):
    for r in report[1]:
        assert r["ahead"] >= 2 or r["kernel"] not in GATHERING, r


def test_products_run_on_the_tensor_cores_and_nothing_is_serialised(report):
    for r in report[1]:
        assert r["warnings"] == [], r
        if r["kernel"] in GATHERING | {"masses_kernel"}:
            assert r["tensor_cores"] == ("wgmma" if r["target"] == "sm_90" else "mma"), r


BAD = """
import json, sys
from dataclasses import asdict
from lit_sparse.attention.triton import config
from lit_sparse.attention.triton.ahead_of_time import attention_calls, compile_call
for target, kernel, dim, row in (
    # Two stages prefetch nothing.
    ("sm_90", "forward", 128, config.Launch(128, 64, 8, stages=2, tma=True)),
    ("sm_80", "forward", 128, config.Launch(128, 64, 8, stages=2)),
    # Both sums of 64 keys do not fit the registers: ptxas spills and serialises the products.
    ("sm_90", "dkdv", 256, config.Launch(64, 64, 4, tma=True)),
    ("sm_90", "forward", 128, config.Launch(128, 64, 8, stages=7, tma=True)),
):
    config.TABLE[target][kernel][dim] = row
    call = next(c for c in attention_calls(target, dim) if c.kernel.__name__ == kernel + "_kernel")
    print(json.dumps(asdict(compile_call(call, target))))
"""


def test_bad_launches_are_seen():
    lines = _output(_start("-c", BAD)).splitlines()
    hopper, ampere, serialised, large = map(json.loads, lines)
    assert hopper["ahead"] < 2
    assert ampere["ahead"] < 2
    assert serialised["spills"] > 0
    assert "wgmma.mma_async instructions are serialized" in serialised["warnings"][0]
    assert large["shared"] > LIMIT["sm_90"]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 3, 7, 8, 16])
def test_every_group_size(groups, tmp_path):
    options = ("--groups", str(groups), "--head-dims", "64,128")
    for r in _report(tmp_path, *options)[1]:
        assert r["shared"] <= LIMIT[r["target"]], r
        assert r["ahead"] >= 2 or r["kernel"] not in GATHERING, r
        assert r["warnings"] == [], r
        assert r["spills"] == 0, r


@pytest.mark.slow
def test_head_dimension_256(tmp_path):
    """dK alone spills, on Hopper."""
    for r in _report(tmp_path, "--head-dims", "256")[1]:
        assert r["shared"] <= LIMIT[r["target"]], r
        assert r["ahead"] >= 2 or r["kernel"] not in GATHERING, r
        assert r["warnings"] == [], r
        spilling = (r["target"], r["kernel"]) == ("sm_90", "dkdv_kernel")
        assert r["spills"] == 0 or spilling or r["kernel"] not in GATHERING, r


@pytest.mark.slow
def test_gpus_with_little_shared_memory(tmp_path):
    for r in _report(tmp_path, targets=["sm_86"])[1]:
        assert r["shared"] <= LIMIT["sm_86"], r
        assert r["ahead"] >= 2 or r["kernel"] not in GATHERING, r
        assert r["spills"] == 0 or r["dim"] > 128 or r["kernel"] not in GATHERING, r


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--targets", "sm_70"], "--targets must be of sm_80, sm_86, sm_90, got sm_70"),
        (["--head-dims", "72"], "--head-dims must be multiples of 16"),
        (["--head-dims", "a"], "--head-dims must be whole numbers"),
        (["--groups", "0"], "--groups must be from 1 to 16"),
    ],
)
def test_arguments(argument, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["kernels", *argument])
    assert message in capsys.readouterr().err


def test_the_interpreter_is_no_compiler(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
