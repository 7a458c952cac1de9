"""`lit-sparse benchmark --what data`: what it prints is what it measured."""

import json

import pytest

from lit_sparse.cli import main


@pytest.mark.slow
def test_data_is_measured(tmp_path, capsys):
    out = tmp_path / "data.json"
    arguments = ["--megabytes", "1", "--documents", "20000", "--processes", "1"]
    assert main(["benchmark", "--what", "data", *arguments, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["tokenise"]["tokens"] > 100_000
    assert report["tokenise"]["ratio"] == pytest.approx(
        min(report["tokenise"]["seconds"]["bare"]) / min(report["tokenise"]["seconds"]["pack"])
    )
    best_fit, concat = report["rows"]
    assert best_fit["cut"] == 0 < concat["cut"]
    few, many = report["memory"]
    assert many["documents"] == 10 * few["documents"]
    assert many["peak_mib"] < 1.2 * few["peak_mib"]
    printed = capsys.readouterr().out
    assert f"{report['loader']['tokens_s']:,.0f} tokens/s" in printed


def test_wrong_numbers_are_refused(capsys):
    assert main(["benchmark", "--what", "data", "--documents", "0"]) == 2
    assert "--documents must be >= 1" in capsys.readouterr().err
