"""Other people's models: public weights by their order, any module from a file; metrics for TensorBoard."""

import argparse
import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import load_script, saved, write_npz

import common
import evaluate
import fickle_teacher
from common import UsageError, load_public

kd_zoo, nrd = load_script("kd_zoo"), load_script("nrd")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
TINY = ["--dataset", "tiny.npz", "--batch-size", 20, "--epochs", 1, "--device", "cpu", "--out", "run"]


class Block(nn.Module):
    """Of RepDistiller's WideResNet: its names, in its order."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs
        self.convShortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """RepDistiller's wrn_16_1, for normalised images."""

    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        for i, (inputs, outputs, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), 1):
            block = nn.Module()
            block.layer = nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1))
            setattr(self, f"block{i}", block)
        self.bn1, self.fc = nn.BatchNorm2d(64), nn.Linear(64, classes)

    def forward(self, x):
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block.layer(x)
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def public_net(classes=3):
    """With statistics and weights of BatchNorm as after training."""
    net = WideResNet(classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return net.eval()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder with tiny.npz, of three classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "plot_curves", lambda *_: None)
    write_npz("tiny.npz")


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_counts(state):
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}


FORMS = {
    "alone": lambda state: state,
    "model": lambda state: {"epoch": 240, "model": state, "best_acc": torch.tensor(75.6)},
    "net, parallel": lambda state: {"net": prefixed("module.", state)},
    "tutorial": lambda state: {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {},
        "loss": 0.4,
    },
    "named": lambda state: {"model": "wrn_16_1", "state_dict": state},
    "student": lambda state: {"student": state, "teacher": {}},
    "distiller": lambda state: {
        "model": prefixed("module.student.", state) | prefixed("module.teacher.", state)
    },
    "student's names": lambda state: prefixed("student.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "averaged": lambda state: {"n_averaged": torch.tensor(5)} | prefixed("module.", state),
    "before 0.4.1": lambda state: {
        "state_dict": prefixed("module.", without_counts(state)),
        "best_prec1": 91.7,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_those_of_the_network_that_the_weights_come_from(form):
    """Taken by their order, and by a module that has their names."""
    net, images = public_net(), torch.rand(5, 3, 32, 32)
    torch.save(
        FORMS[form](net.state_dict()), "wrn.pth", _use_new_zipfile_serialization=form != "before 0.4.1"
    )
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        logits = load_public(Path("wrn.pth"), "--teacher", "wrn-16-1", MEAN, STD)(images)
        assert logits.shape == (5, 3) and torch.allclose(logits, net(normalised), atol=1e-4)
        Path("mine.py").write_text(
            "from test_public import WideResNet\ndef net(): return WideResNet(3)", "utf-8"
        )
        assert torch.equal(common.load_module("mine.py:net", "--model", "wrn.pth")(images), net(images))


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("foreign code ran",)


def sorted_within_layers(state):
    layer = {name: name.rpartition(".")[0] for name in state}
    order = list(layer.values())
    return {name: state[name] for name in sorted(state, key=lambda name: (order.index(layer[name]), name))}


WHOLE = 'whole.pth", weights_only=False)["model"], "weights.pt")'
REFUSED = {  # what is in the file: what is said of it
    "list": (lambda state: [state], "has no state_dict, alone or under one of model,"),
    "tensor": (lambda state: torch.zeros(3), "has no state_dict"), "nothing": (lambda state: {}, "has no state_dict"),
    "numbers": (lambda state: {"epoch": 3, "model": "wrn"}, "has no state_dict"),
    "Namespace": (lambda state: {"opt": argparse.Namespace(lr=0.1), "model": state}, "holds argparse.Namespace beside"),
    "numpy": (lambda state: {"model": state, "best": np.float64(70)}, "multiarray.scalar beside tensors"),
    "whole": (lambda state: WideResNet(3), f'save its weights alone: torch.save(torch.load("{WHOLE}'),
    "foreign": (lambda state: {"model": state, "code": Foreign()}, "mkdir beside tensors"),
    "scalar": (lambda state: state | {"step": torch.tensor(5)}, "that has no tensor more, the file has step []"),
    "NaN": (lambda state: state | {"fc.bias": torch.tensor([1, torch.nan, 0])}, "has a NaN or an infinity in fc.bias"),
    "infinity": (lambda state: state | {"fc.bias": torch.tensor([1, torch.inf, 0])}, "an infinity in fc.bias"),
    "sorted": (lambda state: sorted_within_layers(state), "bn1.weight [16], the file has block1.layer.0.bn1.bias [16]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_the_weights_is_refused_in_a_line(cli, name):
    """The sorted file has each layer's tensors in another order; those of BatchNorm have equal shapes."""
    content, says = REFUSED[name]
    torch.save(content(public_net().state_dict()), f"{name}.pth")
    status, _, err = cli(kd_zoo, *TINY, "--teacher", f"{name}.pth", "--teacher-arch", "wrn-16-1")
    assert (
        status == 2
        and err.count("\n") == 1
        and err.startswith(f"error: --teacher: {name}.pth ")
        and says in err
    )
    assert not Path("foreign code ran").exists()


def test_weights_of_ours_have_their_normalisation():
    model = common.build_model("resnet8", 4, 0.0, MEAN, STD).eval()
    torch.save(model.state_dict(), "ours.pth")
    loaded, images = (
        load_public(Path("ours.pth"), "", "resnet8", (0, 0, 0), (1, 1, 1)),
        torch.rand(2, 3, 32, 32),
    )
    assert torch.equal(loaded(images), model(images))


def test_another_architecture_is_refused_by_the_first_tensor_that_differs():
    torch.save(public_net().state_dict(), "wrn.pth")
    for arch, theirs, ours in (("wrn-16-2", "block1.layer.0.conv1.weight", "blocks.0.0.conv1.weight"),
                               ("wrn-10-1", "block1.layer.1.conv1.weight", "blocks.1.0.conv1.weight")):  # fmt: skip
        with pytest.raises(UsageError) as error:
            load_public(Path("wrn.pth"), "--teacher", arch, MEAN, STD)
        says = rf"--teacher: wrn.pth is no {arch}: where that has {ours} \[.*\], the file has {theirs} \[.*\]"
        assert re.fullmatch(says, str(error.value))
    torch.save(common.build_model("wrn-16-1", 3).state_dict(), "ours.pth")
    with pytest.raises(UsageError, match="ours.pth is no wrn-16-2"):  # the same names
        load_public(Path("ours.pth"), "--teacher", "wrn-16-2", MEAN, STD)


def test_mean_and_std_are_of_public_weights_in_0_1(cli):
    torch.save(public_net().state_dict(), "wrn.pth")
    Path("mine.py").write_text(MODULE)
    assert cli(kd_zoo, *TINY, "--method", "baseline", "--student-arch", "wrn-10-1")[0] == 0
    of_255 = ["--mean", 125.3, 123.0, 113.9, "--std", 63.0, 62.1, 66.7]
    public = ["--teacher", "wrn.pth", "--teacher-arch", "wrn-16-1"]
    for flags, says in (([*public, *of_255], "divide those of 0 to 255 by 255"),
                        ([*public, "--std", 0.2, 0, 0.2], "not of images in [0, 1]"),
                        (["--teacher", "run/checkpoint.pt", "--std", 0.2, 0.2, 0.2], "every other teacher has its own"),
                        (["--teacher-model", "mine.py:net", "--mean", *MEAN], "every other teacher has its own"),
                        (["--mean", *MEAN], "every other teacher has its own")):  # fmt: skip
        status, _, err = cli(kd_zoo, *TINY[:-1], "other", *flags)
        assert (
            status == 2 and err.count("\n") == 1 and err.startswith("error: --mean, --std: ") and says in err
        )


@pytest.mark.parametrize("script, flags, refused", [
    (kd_zoo, "--teacher run/checkpoint.pt --teacher-arch wrn-10-2", "--teacher-arch: this teacher has its own"),
    (kd_zoo, "--teacher-model mine.py:net --teacher-arch wrn-10-2", "--teacher-arch: this teacher has its own"),
    (kd_zoo, "--teacher run/checkpoint.pt --teacher-seeds 2", "--teacher-seeds: this teacher is trained"),
    (kd_zoo, "--teacher-model mine.py:net --teacher-seeds 2", "--teacher-seeds: this teacher is trained"),
    (fickle_teacher, "--teacher run/checkpoint.pt --teacher-epochs 2", "--teacher-epochs: this teacher is trained"),
])  # fmt: skip
def test_a_given_teacher_is_not_built_or_trained(cli, script, flags, refused):
    Path("mine.py").write_text(MODULE)
    assert cli(kd_zoo, *TINY, "--method", "baseline", "--student-arch", "wrn-10-1")[0] == 0
    status, _, err = cli(script, *TINY[:-1], "other", "--student-arch", "wrn-10-1", *flags.split())
    assert status == 2 and err == f"error: {refused}; leave it out\n"


def test_public_weights_teach(cli):
    net = public_net()
    torch.save({"state_dict": net.state_dict()}, "wrn.pth")
    flags = [
        "--teacher",
        "wrn.pth",
        "--teacher-arch",
        "wrn-16-1",
        "--student-arch",
        "wrn-10-1",
        "--method",
        "at",
    ]
    status, out, err = cli(kd_zoo, *TINY, *flags)
    assert (status, err) == (0, "")
    data, checkpoint = common.load_dataset("tiny.npz"), saved("run")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in common.channel_stats(data))
    expected = common.accuracy(net((data.test_images / 255 - mean) / std), data.test_labels)
    assert checkpoint["teacher"] == "wrn.pth" and checkpoint["teacher_acc"] == expected
    assert f"teacher: wrn.pth, test_acc {expected:.2f} %" in out
    torch.save(public_net(5).state_dict(), "five.pth")
    status, _, err = cli(kd_zoo, *TINY[:-1], "other", *flags[2:], "--teacher", "five.pth")
    assert status == 2 and err == "error: --teacher: five.pth has 5 classes, not 3\n"


MODULE = """
import torchvision
def net():
    return torchvision.models.resnet18(num_classes=3)
"""


def test_any_module_is_evaluated_and_teaches(cli):
    Path("mine.py").write_text(MODULE)
    net = torchvision.models.resnet18(num_classes=3).eval()
    torch.save({"model": net.state_dict()}, "weights.pt")
    data = common.load_dataset("tiny.npz")
    flags = ["weights.pt", "--model", "mine.py:net", "--dataset", "tiny.npz", "--device", "cpu"]
    assert cli(evaluate, *flags)[::2] == (0, "")
    with torch.no_grad():
        expected = common.accuracy(net(data.test_images / 255), data.test_labels)
    assert (
        json.loads(Path("evaluation.jsonl").read_text(encoding="utf-8"))["numbers"]["accuracy (%)"]
        == expected
    )
    flags = ["--teacher-model", "mine.py:net", "--teacher", "weights.pt", "--student-arch", "wrn-10-1"]
    assert cli(kd_zoo, *TINY, *flags)[0] == 0 and saved("run")["teacher_acc"] == expected


OTHER_KINDS = {  # file: how it is written, what is said
    "script.pt": (lambda path: torch.jit.save(torch.jit.trace(nn.Flatten(), torch.rand(1, 3, 4, 4)), path),
                  'is a TorchScript archive; save its weights alone: torch.save(torch.jit.load("script.pt").state_d'),
    "net.onnx": (lambda path: Path(path).write_bytes(b"\x08\x07\x12\x07pytorch"), "is an ONNX model; save the state_"),
    "net.h5": (lambda path: Path(path).write_bytes(b"\x89HDF\r\n"), "is damaged or no checkpoint (UnpicklingError)"),
    "net.safetensors": (lambda path: Path(path).touch(), "needs the package; pip install safetensors"),
    "folder": (os.mkdir, "folder/checkpoint.pt; runs/*/checkpoint.pt are checkpoints"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", OTHER_KINDS)
def test_files_of_other_kinds_are_called_by_their_name(file, monkeypatch):
    write, says = OTHER_KINDS[file]
    write(file)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match=f"^CKPT: .*{re.escape(says)}"):
        load_public(file, "CKPT", "wrn-16-1", MEAN, STD)


def test_safetensors_are_read(monkeypatch):
    """Their tensors are sorted by name, so that only our names tell their order."""

    package = types.ModuleType("safetensors.torch")
    package.load_file = lambda path: dict(sorted(torch.load(path.with_suffix(".pt")).items()))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    for mean, std in ((MEAN, STD), ((0, 0, 0), (1, 1, 1))):
        model = common.build_model("wrn-16-1", 3, 0.0, mean, std).eval()
        state = {name: tensor for name, tensor in model.state_dict().items() if mean == MEAN or "." in name}
        torch.save(state, "ours.pt")
        Path("ours.safetensors").touch()
        loaded = load_public("ours.safetensors", "", "wrn-16-1", (0, 0, 0), (1, 1, 1))
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(loaded(images), model(images))
    torch.save(public_net().state_dict(), "theirs.pt")
    Path("theirs.safetensors").touch()
    with pytest.raises(UsageError, match="theirs.safetensors is no wrn-16-1"):
        load_public("theirs.safetensors", "", "wrn-16-1", MEAN, STD)
    Path("mine.py").write_text("from test_public import WideResNet\ndef net(): return WideResNet(3)", "utf-8")
    assert len(common.load_module("mine.py:net", "--model", "theirs.safetensors").state_dict()) > 30


@pytest.mark.parametrize("file, content", [
    ("own.py", "from common import head\ndef net(): return head()"),
    ("late.py", "def net():\n    import common\n    return common.head()"),
    ("pkg/relative.py", "from .common import head\ndef net(): return head()"),
    ("pkg/own.py", "from common import head\ndef net(): return head()"),
    ("pkg/sub/above.py", "from ..common import head\ndef net(): return head()"),
    ("folder/own.py", "from common.nets import head\ndef net(): return head()"),
    ("folder/our-net.v2.py", "from common.nets import head\nnet = head"),
])  # fmt: skip
def test_a_module_s_neighbours_come_before_our_own_files(file, content, monkeypatch):
    """And our own stay what they are."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])  # not where the user is
    head = "import torch.nn as nn\ndef head(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))"
    files = {"common.py": head, "pkg/__init__.py": "", "pkg/common.py": head, "pkg/sub/__init__.py": ""}
    files |= {"folder/common/__init__.py": "", "folder/common/nets.py": head, file: content}
    for path, text in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, "utf-8")
    assert isinstance(common.load_module(f"{file}:net", "--model")[1], nn.Linear)
    assert sys.modules["common"] is common
    Path("mine.py").write_text("import not_there", "utf-8")
    with pytest.raises(UsageError, match="^--model: mine.py:net: No module named 'not_there'$"):
        common.load_module("mine.py:net", "--model")


STRANGE = """
import torch.nn as nn
import beside
class Pair(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x
class Broken(nn.Module):
    def forward(self, x):
        return x.no_such_method()
class Colours(nn.Module):
    def forward(self, x):
        return beside.sharpen(x.mean((2, 3)))
pair, text, number, wide = Pair(), "net", lambda: 5, lambda width: 5
"""


def test_strange_modules(cli):
    """One without parameters, from a file that imports its neighbour, is a teacher. What is wrong is said in a line,
    but for what their own code raises."""
    Path("theirs").mkdir()
    Path("theirs/mine.py").write_text(STRANGE)
    Path("theirs/beside.py").write_text("def sharpen(x):\n    return 100 * x")
    flags = [*TINY, "--student-arch", "wrn-10-1", "--teacher-model"]
    assert cli(kd_zoo, *flags, "theirs/mine.py:Colours")[::2] == (0, "")
    data = common.load_dataset("tiny.npz")
    expected = common.accuracy((data.test_images / 255).mean((2, 3)), data.test_labels)
    assert saved("run")["teacher_acc"] == pytest.approx(expected)
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), "five.pt")
    Path("mine.py").write_text(MODULE)
    flags[TINY.index("run")] = "other"
    for text, says in (("other.py:net", "--teacher-model: other.py:net names no file; write FILE.py:NAME"),
                       ("mine.py", "--teacher-model: mine.py names no file; write FILE.py:NAME"),
                       ("mine.py:nett", "--teacher-model: mine.py has no function or class nett"),
                       ("theirs/mine.py:pair", "mine.py has no function or class pair"),
                       ("theirs/mine.py:text", "mine.py has no function or class text"),
                       ("theirs/mine.py:number", "mine.py:number gives int, not an nn.Module"),
                       ("theirs/mine.py:wide", "mine.py:wide is missing a required argument: 'width'; name a function"),
                       ("theirs/mine.py:Pair", "Pair gives a tuple; it must give logits [B, C] alone"),
                       ("mine.py:net --teacher five.pt", "five.pt does not fit mine.py:net: ")):  # fmt: skip
        status, _, err = cli(kd_zoo, *flags, *text.split())
        assert status == 2 and says in err and err.count("\n") == 1
    assert "size mismatch for fc.weight" in err
    with pytest.raises(AttributeError, match="no_such_method"):
        cli(kd_zoo, *flags, "theirs/mine.py:Broken")


FEATURES = """
import common, torch.nn as nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = common.build_model("wrn-16-1", 3)
    def forward(self, x, features=False):
        return self.inner(x, features)
def wide():
    return common.build_model("wrn-10-2", 3)
"""


@pytest.mark.parametrize(
    "method, flags", [("fitnet", ["--init-epochs", 1]), ("fsp", ["--init-epochs", 1]), ("at", [])]
)
def test_a_module_with_features_teaches_as_the_same_network_of_ours(cli, method, flags):
    """What is compared are the teacher's own features, whatever a standard teacher would be."""
    Path("mine.py").write_text(FEATURES)
    state = common.build_model("wrn-16-1", 3).state_dict()
    torch.save(state, "ours.pth")
    torch.save(prefixed("inner.", state), "theirs.pth")
    flags = ["--method", method, "--student-arch", "wrn-10-1", *flags]
    teachers = {
        "one": ["--teacher", "ours.pth", "--teacher-arch", "wrn-16-1"],
        "two": ["--teacher", "theirs.pth", "--teacher-model", "mine.py:Net"],
    }
    for out, teacher in teachers.items():
        assert cli(kd_zoo, *TINY[:-1], out, *flags, *teacher)[::2] == (0, "")
    ours, theirs = saved("one"), saved("two")
    assert theirs["metrics"] == ours["metrics"] and theirs["teacher_acc"] == ours["teacher_acc"]
    assert all(torch.equal(theirs["model"][name], tensor) for name, tensor in ours["model"].items())


def test_features_that_cannot_be_compared_are_refused(cli):
    Path("mine.py").write_text(MODULE + FEATURES)
    flags = [*TINY, "--student-arch", "wrn-16-1", "--teacher-model"]
    for method in ("fitnet", "at", "rkd-a"):
        status, _, err = cli(kd_zoo, *flags, "mine.py:net", "--method", method)
        assert (
            status == 2
            and err.count("\n") == 1
            and "for fitnet, fsp, at, sp and rkd module(x, features" in err
        )
    status, _, err = cli(kd_zoo, *flags, "mine.py:wide", "--method", "fsp")
    assert status == 2 and err.count("\n") == 1
    assert (
        "features [(16, 32, 32), (16, 32, 32), (32" in err
        and "teacher's [(16, 32, 32), (32, 32, 32), (64" in err
    )
    assert cli(kd_zoo, *flags, "mine.py:net")[::2] == (0, "")  # Hinton


DROPOUT = """
import torch.nn as nn, torch.nn.functional as F
class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x.mean((2, 3)), 0.4, self.training)
def none():
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Dropout(0))
def some():
    return nn.Sequential(nn.Dropout2d(0.3), nn.AvgPool2d(32), nn.Flatten())
"""


def test_a_fickle_teacher_of_other_people_has_dropout_modules(cli, monkeypatch):
    Path("mine.py").write_text(DROPOUT)
    modes, load = [], common.load_module
    monkeypatch.setattr(common, "load_module", lambda *args: modes.append(load(*args)) or modes[-1])
    for script, flags in ((fickle_teacher, []), (kd_zoo, ["--add", "ft"])):
        flags = [*TINY[:-1], script.__name__, "--student-arch", "wrn-10-1", *flags, "--teacher-model"]
        for name in ("Functional", "none"):
            status, _, err = cli(script, *flags, f"mine.py:{name}")
            assert (
                status == 2
                and err.count("\n") == 1
                and "the teacher has no dropout module to switch on" in err
            )
        assert cli(script, *flags, "mine.py:some")[::2] == (0, "")
        assert [layer.training for layer in modes[-1]] == [True, False, False]
    flags = ["--student-arch", "wrn-10-1", "--dropout", 0, "--teacher-model", "mine.py:some"]
    assert cli(fickle_teacher, *TINY, *flags)[::2] == (0, "")
    assert not any(layer.training for layer in modes[-1])  # Hinton, on purpose


def test_a_teacher_of_other_labels_is_the_user_s_decision(cli):
    flags = ["--student-arch", "wrn-10-1"]
    assert cli(kd_zoo, *TINY, *flags, "--method", "baseline")[0] == 0
    flags += [
        "--noise",
        "sym",
        "--rate",
        0.5,
        "--noise-seed",
        1,
        "--imbalance",
        2,
        "--teacher",
        "run/checkpoint.pt",
    ]
    status, out, err = cli(kd_zoo, *TINY[:-1], "other", *flags)
    assert (status, err) == (0, "")
    assert (
        "the teacher has noise {'kind': 'none', 'rate': None, 'seed': 0}; a trained one would have {" in out
    )
    assert "the teacher has imbalance None; a trained one would have 2.0" in out
    assert saved("other")["teacher_acc"] == saved("run")["metrics"][0]["test_acc"]
    status, out, _ = cli(
        kd_zoo, *TINY[:-1], "clean", "--student-arch", "wrn-10-1", *flags[-2:], "--noise-seed", 1
    )
    assert status == 0 and "a trained one would have" not in out  # no labels are wrong, by whatever seed


def test_public_weights_are_evaluated(cli):
    net = public_net()
    torch.save(net.state_dict(), "wrn.pth")
    flags = [
        "--arch",
        "wrn-16-1",
        "--dataset",
        "tiny.npz",
        "--mean",
        *map(str, MEAN),
        "--std",
        *map(str, STD),
    ]
    assert cli(evaluate, "wrn.pth", *flags, "--device", "cpu")[::2] == (0, "")
    data = common.load_dataset("tiny.npz")
    logits = load_public(Path("wrn.pth"), "", "wrn-16-1", MEAN, STD)(data.test_images / 255)
    numbers = json.loads(Path("evaluation.jsonl").read_text(encoding="utf-8"))["numbers"]
    assert numbers["accuracy (%)"] == common.accuracy(logits, data.test_labels)
    status, _, err = cli(evaluate, "wrn.pth", *flags[:4], "--model", "mine.py:net")
    assert (status, err) == (2, "error: --arch: a module has its own; leave it out\n")


def test_accuracies_go_to_tensorboard(cli, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == Path("run")

        def add_scalar(self, *point):
            written.append(point)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    assert cli(nrd, *TINY, "--arch", "wrn-10-1", "--tensorboard")[0] == 0
    (metrics,) = saved("run")["metrics"]
    assert ("test_acc", metrics["test_acc"], 1) in written and written[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = cli(nrd, *TINY[:-1], "other", "--arch", "wrn-10-1", "--tensorboard")
    assert status == 2 and err == "error: --tensorboard: needs the package; pip install tensorboard\n"
    assert not Path("other").exists()
