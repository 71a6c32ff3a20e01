"""Shared by the tests: the scripts' folder on the path, and a way to run a script as a user would."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: a script's name must not hide a library's


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def script(tmp_path):
    """script("nrd.py", "--epochs", 1, …) runs it in an empty folder and gives the CompletedProcess, output as text."""

    def run(name, *arguments, cwd=tmp_path, timeout=180):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def tiny_npz(tmp_path):
    """A well-formed data set file: 40 training and 20 test images of 32×32, three classes."""
    return write_npz(tmp_path / "tiny.npz")


def write_npz(path, **changes):
    """Write a small valid data set, with some arrays changed (None: left out)."""
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8),
        "train_labels": np.arange(40) % 3,
        "test_images": random.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8),
        "test_labels": np.arange(20) % 3,
        "classes": np.array(["ant", "bee", "cat"]),
    }
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


TINY = ["--limit-train", "96", "--limit-test", "40", "--batch-size", "32", "--epochs", "2", "--device", "cpu"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(module, *flags) runs a script in this process in an empty folder: (exit status, stdout, stderr)."""
    import common

    monkeypatch.chdir(tmp_path)

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            common.run_main(module.main)
            status = 0
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):  # what the interpreter does with sys.exit("message")
                print(status, file=sys.stderr)
                status = 1
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def nrd_cli(cli):
    """nrd_cli(*flags) runs nrd.py so."""
    import nrd

    return functools.partial(cli, nrd)
