"""Shared by the tests: the scripts' folder on the path, tiny data, ways to run a script and to look on."""

import contextlib
import importlib.util
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib  # noqa: F401 - where its folder cannot be written, it says so now, and not in the middle of a test
import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
    return abs(count - total * p) <= sigmas * (total * p * (1 - p)) ** 0.5 + 1e-9


def write_npz(path, **changes):
    """Write a data set of 40 training and 20 test images, three classes; `changes` replace arrays."""
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8),
        "train_labels": np.arange(40) % 3,
        "test_images": random.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8),
        "test_labels": np.arange(20) % 3,
        "classes": np.array(["ant", "bee", "cat"]),
        **changes,
    }
    np.savez(path, **arrays)
    return path


def colours(count):
    """Images uint8 [count, 3, 32, 32], each of one colour, its number. Crops and flips do not hide it."""
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)


def numbers_of(images):
    """int64 [B], of images float32 [B, 3, H, W] that `colours` has made."""
    return (images[:, 0, images.shape[2] // 2, images.shape[3] // 2] * 255).round().long()


def crops_of(images, mode):
    """{bytes: (top, left, flipped)} of every crop of uint8 images [N, 3, H, W], padded by four pixels.

    mode: of the padding, as in np.pad.
    """
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)), mode)
    height, width = images.shape[2:]
    crops = {}
    for top, left in itertools.product(range(9), repeat=2):
        cropped = padded[:, :, top : top + height, left : left + width]
        crops |= {image.tobytes(): (top, left, False) for image in cropped}
        crops |= {image.tobytes(): (top, left, True) for image in cropped[..., ::-1]}
    return crops


@contextlib.contextmanager
def forward_passes(scale=1):
    """Give a list of the forward passes within, of every common.Classifier: net, training, images, logits.

    scale: what all logits are multiplied by, so that networks that have hardly been trained are confident.
    """
    import common

    passes = []

    def note(net, arguments, output):
        if isinstance(net, common.Classifier):
            if scale != 1:
                output = scale * output
            step = {"net": net, "training": net.training, "images": arguments[0], "logits": output}
            passes.append(SimpleNamespace(**step))
            return output

    handle = register_module_forward_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


class Calls(TorchFunctionMode):
    """Within, `calls` lists the calls of `function`, one of torch's: (*arguments, result)."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is self.function:
            self.calls.append((*args, result))
        return result


@contextlib.contextmanager
def stopped_after_each_epoch():
    """Within, a run is stopped by Ctrl-C as soon as an epoch is saved."""
    import common

    end_epoch = common.Run.end_epoch

    def interrupt(run, *losses, **metrics):
        end_epoch(run, *losses, **metrics)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "end_epoch", interrupt)
        yield


def saved(folder):
    """The checkpoint of a run folder, without its config and without what a clock measured."""
    import common

    checkpoint = common.load_checkpoint(Path(folder) / "checkpoint.pt")
    for record in checkpoint["metrics"]:
        del record["seconds"], record["images_per_second"]
    return {key: value for key, value in checkpoint.items() if key != "config"}


def assert_same(a, b):
    """Two dicts with tensors are the same to the bit."""
    assert a.keys() == b.keys()
    for key in a:
        pairs = zip(tree_leaves(a[key]), tree_leaves(b[key]), strict=True)
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs), key


def assert_resumes_to_the_same_bit(cli, script, *flags, stops):
    """A run that Ctrl-C stops after each epoch, of its teacher too, ends as one that nobody disturbed."""
    assert cli(script, *flags, "--out", "whole")[::2] == (0, "")
    if Path("runs").exists():
        Path("runs").rename("kept")  # so that a teacher is trained again
    with stopped_after_each_epoch():
        assert [cli(script, *flags, "--out", "broken", "--resume")[0] for _ in range(stops)] == [130] * stops
    status, out, err = cli(script, *flags, "--out", "broken", "--resume")
    assert (status, err) == (0, "") and "\nepoch " not in out
    assert_same(saved("whole"), saved("broken"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_npz(tmp_path):
    return write_npz(tmp_path / "tiny.npz")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Whatever the machine: --amp has tests of its own."""
    import common

    monkeypatch.setattr(common, "multiplies_bfloat16", lambda device: False)


@pytest.fixture
def quick(monkeypatch):
    """No curves.png, which takes most of the time of a tiny run."""
    import common

    monkeypatch.setattr(common, "plot_curves", lambda *_: None)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(module, *flags) runs a script in this process, in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        capsys.readouterr()  # forget what came before
        status = 0
        try:
            importlib.import_module("common").run(module.parse_args, module.main)
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):  # as Python does for sys.exit("message")
                print(status, file=sys.stderr)
                status = 1
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def nrd_cli(cli):
    return lambda *flags: cli(importlib.import_module("nrd"), *flags)
