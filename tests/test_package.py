"""The house: what is in the wheel, which way imports run, what importing costs."""

import ast
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import lit_sparse

ROOT = Path(__file__).parents[1]
LAYERS = {
    # package -> those that it may import (DESIGN: recipes -> callbacks -> training, distributed,
    # data, models -> attention -> budget, theory)
    "files": set(),
    "budget": set(),
    "theory": set(),
    "calibration": {"theory", "budget"},
    "attention": {"budget"},
    "models": {"files", "attention", "budget", "theory"},
    "distributed": {"files", "models", "attention", "budget"},
    "training": {"files", "distributed", "models", "attention", "budget"},
    "data": {"training", "distributed", "models", "attention", "budget"},
    "evaluation": {"data", "training", "models", "attention", "budget"},
    "callbacks": {
        "evaluation",
        "training",
        "distributed",
        "data",
        "models",
        "attention",
        "budget",
        "theory",
    },
    "recipes": {
        "files",
        "callbacks",
        "evaluation",
        "training",
        "distributed",
        "data",
        "models",
        "attention",
        "calibration",
        "budget",
        "theory",
    },
}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            yield node.module


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package):
    home = ROOT / "lit_sparse" / package
    files = sorted(home.glob("**/*.py")) if home.is_dir() else [home.with_suffix(".py")]
    assert files
    for path in files:
        for name in _imports(path):
            if name.startswith("lit_sparse."):
                target = name.split(".")[1]
                assert target in LAYERS[package] | {package}, f"{path} imports {name}"


def test_the_operator_knows_no_model_and_no_trainer():
    for path in (ROOT / "lit_sparse" / "attention").glob("**/*.py"):
        for name in _imports(path):
            assert name.split(".")[0] not in ("transformers", "pytorch_lightning"), path


def _python(code, executable=sys.executable, **options):
    return subprocess.run(
        [str(executable), "-c", code], capture_output=True, text=True, check=True, **options
    ).stdout


def test_importing_the_package_is_light():
    code = "import sys, lit_sparse; print([m for m in %s if m in sys.modules])"
    heavy = ("torch", "transformers", "pytorch_lightning", "deepspeed", "matplotlib")
    assert _python(code % (heavy,)).strip() == "[]"


def test_public_names_exist():
    for name in lit_sparse.__all__:
        assert getattr(lit_sparse, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such"):
        _ = lit_sparse.no_such


def _build_wheel(folder):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _run_quickstart(environment, folder):
    scripts = environment / "bin"
    command = [scripts / "lit-sparse", "fit", "--config", "quickstart", "--trainer.max_steps", "2"]
    # The checkout must not be what runs.
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensorboard --logdir runs/quickstart" in done.stdout
    assert (folder / "runs" / "quickstart" / "huggingface" / "model.safetensors").exists()
    where = _python(
        "import lit_sparse.callbacks; print(lit_sparse.__file__, lit_sparse.callbacks.__file__)",
        scripts / "python",
        cwd=folder,
        env=clean,
    )
    assert str(ROOT) not in where


def test_the_wheel_runs_the_quickstart_outside_the_checkout(tmp_path):
    """In a new environment that sees this one's libraries, but not its editable install."""
    wheel = _build_wheel(tmp_path)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    packages = Path(_python("import site; print(site.getsitepackages()[0])", pip[0]).strip())
    # A plain path line: .pth files inside that folder (the editable install's) are not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run_quickstart(environment, tmp_path)


@pytest.mark.slow
def test_the_wheel_brings_its_dependencies(tmp_path):
    """In a new environment where pip installs everything that the wheel asks for."""
    wheel = _build_wheel(tmp_path)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True, capture_output=True)
    _run_quickstart(environment, tmp_path)
