"""Shared by the tests: the scripts' folder on the path, and ways to run a script as a user would."""

import functools
import importlib.util
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: a script's name must not hide a library's
TINY = ["--limit-train", "96", "--limit-test", "40", "--batch-size", "32", "--epochs", "2", "--device", "cpu"]


def load_script(name):
    """The script NAME.py as a new module NAME_script; `import cmd` would give Python's own cmd."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def within(count, total, p, sigmas=5):
    """Whether `count` of `total` draws is what draws of probability p give."""
    return abs(count - total * p) <= sigmas * math.sqrt(total * p * (1 - p)) + 1e-9


def write_npz(path, **changes):
    """Write a data set of 40 training and 20 test images, three classes; `changes` replace arrays, None drops one."""
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8),
        "train_labels": np.arange(40) % 3,
        "test_images": random.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8),
        "test_labels": np.arange(20) % 3,
        "classes": np.array(["ant", "bee", "cat"]),
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_npz(tmp_path):
    """The file of write_npz, in a new folder."""
    return write_npz(tmp_path / "tiny.npz")


@pytest.fixture
def script(tmp_path):
    """script("nrd.py", "--epochs", 1, …) runs it in an empty folder and gives the CompletedProcess, output as text."""

    def run(name, *arguments, cwd=tmp_path, timeout=180):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(module, *flags) runs a script in this process, in an empty folder: (exit status, stdout, stderr)."""
    import common

    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        capsys.readouterr()  # forget what came before
        status = 0
        try:
            common.run(module.parse_args, module.main)
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):  # as Python does for sys.exit("message")
                print(status, file=sys.stderr)
                status = 1
        return (status, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def nrd_cli(cli):
    """nrd_cli(*flags) runs nrd.py so."""
    import nrd

    return functools.partial(cli, nrd)
