"""Other people's models: public weights by their order, any module from a file; metrics for TensorBoard."""

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import load_script, saved, write_npz

import common
import evaluate
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
    write_npz("tiny.npz")


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"epoch": 240, "model": state, "best_acc": torch.tensor(75.6)},
    lambda state: {"net": {f"module.{name}": tensor for name, tensor in state.items()}},
])  # fmt: skip
def test_public_weights_are_taken_by_their_order(wrap):
    net, images = public_net(), torch.rand(5, 3, 32, 32)
    torch.save(wrap(net.state_dict()), "wrn.pth")
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    logits = load_public(Path("wrn.pth"), "--teacher", "wrn-16-1", MEAN, STD)(images)
    assert logits.shape == (5, 3) and torch.allclose(logits, net(normalised), atol=1e-4)


def test_weights_with_our_names_are_taken_by_name():
    model = common.build_model("resnet8", 4, 0.0, MEAN, STD).eval()
    torch.save(model.state_dict(), "ours.pth")
    loaded, images = load_public(Path("ours.pth"), "", "resnet8", (0, 0, 0), (1, 1, 1)), torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))  # with the normalisation that the file has


def test_another_architecture_is_refused_by_the_first_tensor_that_differs():
    torch.save(public_net().state_dict(), "wrn.pth")
    for arch, theirs, ours in (("wrn-16-2", "block1.layer.0.conv1.weight", "blocks.0.0.conv1.weight"),
                               ("wrn-10-1", "block1.layer.1.conv1.weight", "blocks.1.0.conv1.weight")):  # fmt: skip
        with pytest.raises(UsageError) as error:
            load_public(Path("wrn.pth"), "--teacher", arch, MEAN, STD)
        assert str(error.value).startswith("--teacher: wrn.pth is no ") and f"{theirs} is not like {ours}" in str(error)


def test_public_weights_teach(cli):
    net = public_net()
    torch.save({"state_dict": net.state_dict()}, "wrn.pth")
    flags = ["--teacher", "wrn.pth", "--teacher-arch", "wrn-16-1", "--student-arch", "wrn-10-1", "--method", "at"]
    status, out, err = cli(kd_zoo, *TINY, *flags)
    assert (status, err) == (0, "")
    data, checkpoint = common.load_dataset("tiny.npz"), saved("run")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in common.channel_stats(data.train_images))
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


def test_any_module_is_evaluated_and_teaches(cli, monkeypatch):
    Path("mine.py").write_text(MODULE)
    net = torchvision.models.resnet18(num_classes=3).eval()
    torch.save({"model": net.state_dict()}, "weights.pt")
    data = common.load_dataset("tiny.npz")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "weights.pt", "--model", "mine.py:net", "--dataset", "tiny.npz"])
    summary = evaluate.main(evaluate.parse_args())
    with torch.no_grad():
        expected = common.accuracy(net(data.test_images / 255), data.test_labels)
    assert summary["models"]["weights"]["accuracy (%)"]["mean"] == expected
    flags = ["--teacher-model", "mine.py:net", "--teacher", "weights.pt", "--student-arch", "wrn-10-1"]
    assert cli(kd_zoo, *TINY, *flags)[0] == 0 and saved("run")["teacher_acc"] == expected
    for text, says in (("other.py:net", "no file other.py"), ("mine.py:nett", "mine.py has no nett")):
        status, _, err = cli(kd_zoo, *TINY[:-1], "other", "--teacher-model", text)
        assert status == 2 and says in err and err.count("\n") == 1


def test_public_weights_are_evaluated(monkeypatch):
    net = public_net()
    torch.save(net.state_dict(), "wrn.pth")
    flags = ["--arch", "wrn-16-1", "--dataset", "tiny.npz", "--mean", *map(str, MEAN), "--std", *map(str, STD)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "wrn.pth", *flags])
    summary = evaluate.main(evaluate.parse_args())
    data = common.load_dataset("tiny.npz")
    logits = load_public(Path("wrn.pth"), "", "wrn-16-1", MEAN, STD)(data.test_images / 255)
    assert summary["models"]["wrn"]["accuracy (%)"]["mean"] == common.accuracy(logits, data.test_labels)


def test_metrics_go_to_tensorboard(cli, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == Path("run")

        def add_scalar(self, *point):
            written.append(point)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert cli(nrd, *TINY, "--arch", "wrn-10-1", "--tensorboard")[0] == 0
    (metrics,) = saved("run")["metrics"]
    assert ("test_acc", metrics["test_acc"], 1) in written and written[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = cli(nrd, *TINY[:-1], "other", "--arch", "wrn-10-1", "--tensorboard")
    assert status == 2 and err == "error: --tensorboard: needs the package; pip install tensorboard\n"
