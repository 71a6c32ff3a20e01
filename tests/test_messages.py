"""What a user gets wrong: one line on stderr that begins as in this table, status 2, and no file is made."""

import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, load_script, write_npz
from PIL import Image

import common

# Script and flags | how the line begins, after "error: ". In it [^] stands for any characters.
# An "argument …" is refused by argparse, which prints the usage first. SHORT explains words in capitals.
ROWS = """
arguments
nrd --lr -1 | argument --lr: -1 is
nrd --lr nan | argument --lr: nan is
nrd --weight-decay -1 | argument --weight-decay: -1 is
nrd --epochs 0 | argument --epochs: 0 is
nrd --batch-size 0 | argument --batch-size: 0 is
nrd --limit-train -1 | argument --limit-train: -1 is
nrd --limit-test 0 | argument --limit-test: 0 is
nrd --rate 2 | argument --rate: 2 is
nrd --beta 1.1 | argument --beta: 1.1 is
nrd --views 0 | argument --views: 0 is
kd_zoo --imbalance 0 | argument --imbalance: 0 is
nrd --drops -0.1 | argument --drops: -0.1 is
fickle_teacher --dropout 2 | argument --dropout: 2 is
fickle_teacher --tau 0 | argument --tau: 0 is
kd_zoo --teacher-seeds 0 | argument --teacher-seeds: 0 is
kd_zoo --init-epochs -5 | argument --init-epochs: -5 is
soft_randomization --sigma -1 | argument --sigma: -1 is
noise_data_free_kd --adjust-batches 0 | argument --adjust-batches: 0 is
evaluate run.pt --eps 2 | argument --eps: 2 is not in [0, 1]
evaluate run --pgd 0 | argument --pgd: 0 is
nrd --device cuda | --device cuda: 0 CUDA devices are visible; --device cpu works
nrd --device cuda:9 | --device cuda:9: 0 CUDA devices are visible
nrd --device 0 | --device 0: unknown; cpu, cuda and cuda:N work
nrd --device mps | --device mps: unknown
nrd --dataset tiny.npz --resize 40 | --resize: --dataset tiny.npz keeps its size; leave it out
data
nrd --dataset cifra10 | --dataset: unknown 'cifra10'; known are shapes, cifar10
nrd --dataset missing.npz | --dataset: missing.npz is no .npz file
nrd --dataset page.npz | --dataset: page.npz is no .npz file with train_images,[^]; README says
nrd --dataset cut.npz | --dataset: cut.npz is no .npz file with train_images,
nrd --dataset cifar10 | --dataset: data/cifar10.npz is no .npz file[^]; remove it to download it again
nrd --dataset floats.npz | --dataset: floats.npz: train_images is float32 [40, 3, 32, 32], not uint8
nrd --dataset halves.npz | --dataset: halves.npz: train_labels is float64 [40], not integer [40]
nrd --dataset short.npz | --dataset: short.npz: train_labels is int64 [39]
nrd --dataset four.npz | --dataset: four.npz: train_labels are 0 to 3, but 3 classes are named
nrd --dataset true.npz | --dataset: true.npz: true_labels are -1 to 1, but 3 classes are named
nrd --dataset few.npz | --dataset: few.npz: true_labels is int64 [20], not integer [40]
nrd --dataset flat.npz | --dataset: flat.npz: test_images is uint8 [20, 3, 32], not uint8 [N, 3, H, W]
nrd --dataset wide.npz | --dataset: wide.npz: test_images have another height or width than train_images
nrd --dataset imagefolder:nowhere | --dataset imagefolder:nowhere: [^]; README says
nrd --dataset imagefolder:pictures | --dataset imagefolder:pictures: train has other classes
nrd --dataset imagefolder:x --resize 32 --image-size 36 | --resize: 32 is smaller than --image-size 36
nrd --noise none --rate 0.2 | --rate: --noise none has no rate; leave it out
nrd --dataset tiny.npz --noise asym | --noise asym: only CIFAR-10 and CIFAR-100
nrd --dataset tiny.npz --noise human-worse | --noise human-worse: cannot read data/CIFAR-10_human.pt
nrd
nrd --dataset tiny.npz --arch wrn-17-2 | --arch: unknown 'wrn-17-2'
nrd --loss-params 0.2 0.6 0.3 | --loss-params: pi1 pi2 pi3 are not shares that sum to 1
nrd --loss-params 0.5 -0.2 0.7 | --loss-params: pi1 pi2 pi3 are not shares that sum to 1
nrd --loss gjs --loss-params 1.5 --no-jsd-scale | --loss-params: pi1 is 1.5; 0 < pi1 < 1 works
nrd --loss-params 0.2 0.8 | --loss-params: nrd takes 3 (pi1 pi2 pi3), not 2
nrd --loss-params 0 0.5 0.5 | --loss-params: pi1 is 0; 0 < pi1 < 1 works
nrd --loss gce --loss-params 0 | --loss-params: q is 0; gce needs q above 0
nrd --loss ce --views 2 | --views: ce has no teacher's views; leave it out
nrd --loss ce --jsd-scale | --jsd-scale: ce is no Jensen-Shannon divergence; leave it out
cmd
cmd --eta 0 | --eta: 0 cannot divide the threshold
cmd --dataset tiny.npz --arch wrn-10-1 --validation 1 | --validation: holds out every image
cmd --mutual sync --self-kd ls | --self-kd: --mutual sync has none
cmd --mutual async --b1 3 | --b1: --mutual async has none
cmd --mutual kdcl --eta 3 | --eta: --mutual kdcl has none
cmd --mutual kdcl --epsilon 0.1 | --epsilon: --mutual kdcl has none
cmd --epsilon 0.1 | --epsilon: --self-kd proselflc decides it
cmd --self-kd ls --b1 3 | --b1: --self-kd ls has none
kd_zoo
kd_zoo --method dml --teacher x.pt | --teacher: dml has no teacher
kd_zoo --method baseline --alpha 0.5 | --alpha: baseline has no teacher
kd_zoo --method one --gamma 3 | --gamma: one has no teacher
kd_zoo --method one --batch-size 1 | --batch-size: the gate of one
kd_zoo --method bss --alpha 0.5 | --alpha: bss has weights of its own
kd_zoo --method at --tau 2 | --tau: at has no temperature
kd_zoo --init-epochs 3 | --init-epochs: hinton has no stage 1
ZOO --method fsp --student-arch resnet8 --teacher-arch wrn-10-2 | --student-arch: fsp cannot compare
ZOO --method fitnet --student-arch resnet8 --teacher-arch shufflenet_v2 | --student-arch: fitnet cannot
ZOO --method at --student-arch resnet8 --teacher-arch preact_resnet18 | --student-arch: at cannot compare
FREE --bn current --running-fraction 0.5 | --running-fraction: --bn is short for
FREE --bn running --running-fraction 0 | --running-fraction: --bn is short for
FREE --plot-activations run.pt | --plot-activations: run.pt is no student
teachers
ZOO --teacher run.pt --teacher-arch wrn-10-2 | --teacher-arch: this teacher has its own; leave it out
ZOO --teacher-model mine.py:net --teacher-arch wrn-10-2 | --teacher-arch: this teacher has its own
ZOO --teacher run.pt --teacher-seeds 2 | --teacher-seeds: this teacher is trained; leave it out
ZOO --teacher-model mine.py:net --teacher-seeds 2 | --teacher-seeds: this teacher is trained; leave it out
FICKLE --teacher run.pt --teacher-epochs 2 | --teacher-epochs: this teacher is trained; leave it out
ZOO --teacher nowhere.pt | --teacher: no file nowhere.pt
ZOO --teacher cut.pt | --teacher: cut.pt is damaged or no checkpoint
ZOO --teacher run.pt --dataset renamed.npz | --teacher: run.pt has classes ['ant', 'bee', 'cat'],
ZOO --teacher run.pt --dataset small.npz | --teacher: run.pt has image_size 32, not 16
WRN five.pth | --teacher: five.pth has 5 classes, not 3
WRN list.pth | --teacher: list.pth has no state_dict, alone or under one of model,
WRN tensor.pth | --teacher: tensor.pth has no state_dict
WRN nothing.pth | --teacher: nothing.pth has no state_dict
WRN numbers.pth | --teacher: numbers.pth has no state_dict
WRN evil.pth | --teacher: evil.pth holds [^].mkdir beside tensors, and to read that may run
WRN opt.pth | --teacher: opt.pth holds argparse.Namespace beside tensors
WRN numpy.pth | --teacher: numpy.pth holds numpy[^]multiarray.scalar beside tensors
WRN whole.pth | --teacher: whole.pth holds [^] beside tensors,[^]torch.load("whole.pth"
WRN scalar.pth | --teacher: scalar.pth is no wrn-10-1: where that has no tensor more, the file has step []
WRN nan.pth | --teacher: nan.pth has a NaN or an infinity in head.4.bias
WRN inf.pth | --teacher: inf.pth has a NaN or an infinity in head.4.bias
WRN wrn.pth --teacher-arch wrn-10-2 | --teacher: wrn.pth is no wrn-10-2: where that has blocks.0.0.conv1
WRN wrn.pth --mean 125 123 114 --std 63 62 67 | --mean, --std: [^] divide those of 0 to 255 by 255
WRN wrn.pth --std 0.2 0 0.2 | --mean, --std: [^] are not of images in [0, 1]
ZOO --teacher run.pt --std 0.2 0.2 0.2 | --std: [^] every other teacher has its own
ZOO --teacher-model mine.py:net --mean 0.5 0.4 0.3 | --mean: [^] every other teacher has its own
ZOO --mean 0.5 0.4 0.3 | --mean: [^] every other teacher has its own
ZOO --teacher-model other.py:net | --teacher-model: other.py:net names no file; write FILE.py:NAME
ZOO --teacher-model mine.py | --teacher-model: mine.py names no file; write FILE.py:NAME
ZOO --teacher-model mine.py:nett | --teacher-model: mine.py has no function or class nett
ZOO --teacher-model mine.py:made | --teacher-model: mine.py has no function or class made
ZOO --teacher-model mine.py:text | --teacher-model: mine.py has no function or class text
ZOO --teacher-model mine.py:number | --teacher-model: mine.py:number gives int, not an nn.Module
ZOO --teacher-model mine.py:wide | --teacher-model: mine.py:wide is missing a required argument:
ZOO --teacher-model mine.py:Pair | Pair gives a tuple; it must give logits [B, C] alone
ZOO --teacher-model mine.py:net --teacher five.pth | --teacher-model: five.pth does not fit mine.py:net:
ZOO --teacher-model mine.py:net --method fitnet | --teacher-model: for fitnet, fsp, at, sp and rkd
ZOO --teacher-model mine.py:net --method at | --teacher-model: for fitnet, fsp, at, sp and rkd
ZOO --teacher-model mine.py:net --method rkd-a | --teacher-model: for fitnet, fsp, at, sp and rkd
ZOO --teacher-model mine.py:features --method fsp | --student-arch: fsp cannot compare [^]features [(16,
ZOO --teacher-model mine.py:net --add ft | [^]the teacher has no dropout module to switch on
FICKLE --teacher-model mine.py:net | [^]the teacher has no dropout module
FICKLE --teacher-model mine.py:nought | [^]the teacher has no dropout module
evaluate
evaluate | CKPT: name the checkpoint.pt of a run folder
evaluate missing.pt | CKPT: no file missing.pt
evaluate wrn.pth | CKPT: wrn.pth is no checkpoint of these scripts
evaluate evil.pth | CKPT: evil.pth holds [^].mkdir beside tensors
evaluate cut.pt | CKPT: cut.pt is damaged or no checkpoint
evaluate run.pt --part emma | --part: run.pt has no 'emma'; it has model
evaluate run.pt --dataset renamed.npz | --dataset: renamed.npz has other classes than run.pt
evaluate run.pt other.pt --transfer | --transfer: the checkpoints have different test sets
evaluate run.pt --transfer --teacher | --teacher: the checkpoints name no teacher; add the path of one
evaluate taught.pt other.pt --transfer --teacher | --teacher: the checkpoints name t1.pt, t2.pt;
evaluate run.pt --cinic nowhere | --cinic: has the classes of cifar10
evaluate run.pt --cifar-c nowhere | --cifar-c: nowhere/gaussian_noise.npy is missing
evaluate run.pt --image-size 32 | --image-size: the images of tiny.npz keep their size
evaluate run.pt --plot-by sigma | --plot-by: name one or two flags of config.json, not sigma
evaluate run.pt --curves nonsense | --curves: no run has nonsense; they have epoch,
evaluate run.pt --table table.xls | --table: table.xls ends with none of .csv, .md, .tex
evaluate run.pt --attack PGD | --attack: needs torchattacks; pip install torchattacks
evaluate wrn.pth --arch wrn-10-1 | --dataset: weights do not tell what to evaluate on
evaluate wrn.pth --arch wrn-10-1 --dataset tiny.npz --model mine.py:net | --arch: a module has its own
evaluate five.pth --arch wrn-10-1 --dataset tiny.npz | --dataset: tiny.npz has 3 classes, the model 5
evaluate --model mine.py:soft --dataset tiny.npz | --model: mine.py:soft gives probabilities, not logits
evaluate --model mine.py:soft --dataset tiny.npz --resize 40 | --resize: the images of tiny.npz keep
evaluate --model mine.py:soft --dataset tiny.npz --curves | --curves: weights hold no metrics
evaluate run.pt --curves test_acc test_los | --curves: no run has test_los; they have epoch,
evaluate run.pt --transfer --teacher missing.pt | --teacher: no file missing.pt
evaluate missing.pt wrn.pth | CKPT: none of these can be evaluated
evaluate wrn.pth --arch wrn-10-1 --dataset tiny.npz --memory | --memory: weights hold no metrics
evaluate wrn.pth --arch wrn-10-1 --dataset tiny.npz --part model | --part: checkpoints of runs have parts
evaluate wrn.pth --arch wrn-10-1 --dataset only.npz --mean 0 0 0 | --mean, --std: are needed; there are no
evaluate wrn.pth --model mine.py:net --dataset tiny.npz --std 1 1 1 | --std: NOTHING --arch
evaluate run.pt --mean 0.5 0.4 0.3 | --mean: NOTHING --arch
evaluate run.pt --eps 0.031 | --eps: NOTHING --pgd, --attack, --transfer
evaluate run.pt --cifar-c --step-size 0.003 | --step-size: NOTHING --pgd, --transfer
evaluate run.pt --transfer --restarts 5 | --restarts: NOTHING --pgd
evaluate run.pt --attack APGD --worst-start | --worst-start: NOTHING --pgd
evaluate run.pt --pgd 2 --teacher | --teacher: NOTHING --transfer
"""
SMALL = "--dataset tiny.npz --student-arch wrn-10-1 --batch-size 20 --epochs 1"
SHORT = {
    "NOTHING": "nothing reads it without",
    "FREE": "noise_data_free_kd",
    "ZOO": f"kd_zoo {SMALL}",
    "FICKLE": f"fickle_teacher {SMALL}",
    "WRN": f"kd_zoo {SMALL} --teacher-arch wrn-10-1 --teacher",
}
NAMES = "cmd evaluate fickle_teacher kd_zoo noise_data_free_kd nrd soft_randomization"
SCRIPTS = {name: load_script(name) for name in NAMES.split()}
MINE = """
import torch.nn as nn
import common
class Pair(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x
def net():
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(3, 3))
def soft():
    return nn.Sequential(net(), nn.Softmax(1))
def nought():
    return nn.Sequential(net(), nn.Dropout(0))
def features():
    return common.build_model("wrn-10-2", 3)
made, text, number, wide = net(), "net", lambda: 5, lambda width: 5
"""


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def write_files():
    """Whatever the rows name, in the current folder."""
    page = b"<!DOCTYPE html><title>404</title>"
    write_npz("tiny.npz")
    write_npz("renamed.npz", classes=np.array(["ant", "bee", "cow"]))
    write_npz("other.npz", test_labels=np.zeros(20, int))
    small = np.zeros((40, 3, 16, 16), np.uint8)
    write_npz("small.npz", train_images=small, test_images=small[:20])
    write_npz("floats.npz", train_images=np.zeros((40, 3, 32, 32), np.float32))
    write_npz("halves.npz", train_labels=np.arange(40) % 3 + 0.5)
    write_npz("short.npz", train_labels=np.arange(39) % 3)
    write_npz("four.npz", train_labels=np.arange(40) % 4)
    write_npz("true.npz", true_labels=np.arange(40) % 3 - 1)
    write_npz("few.npz", true_labels=np.arange(20) % 3)
    write_npz("flat.npz", test_images=np.zeros((20, 3, 32), np.uint8))
    write_npz("wide.npz", test_images=np.zeros((20, 3, 32, 40), np.uint8))
    arrays = np.load("tiny.npz")
    np.savez("only.npz", **{name: arrays[name] for name in ("test_images", "test_labels", "classes")})
    Path("cut.npz").write_bytes(Path("tiny.npz").read_bytes()[:5000])
    Path("page.npz").write_bytes(page)
    Path("data").mkdir()
    Path("data/cifar10.npz").write_bytes(page)
    for name in ("train/ape", "train/bat", "val/ape", "val/cow"):
        Path("pictures", name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(f"pictures/{name}/1.png")
    Path("mine.py").write_text(MINE)

    state = common.build_model("wrn-10-1", 3).state_dict()
    weights = {
        "wrn": state, "five": common.build_model("wrn-10-1", 5).state_dict(), "whole": torch.nn.Linear(3, 3),
        "list": [state], "tensor": torch.zeros(3), "nothing": {}, "numbers": {"epoch": 3, "model": "wrn"},
        "opt": {"opt": argparse.Namespace(lr=0.1), "model": state},
        "numpy": {"model": state, "best": np.float64(70)}, "evil": {"model": state, "code": Evil()},
        "scalar": state | {"step": torch.tensor(5)},
        "nan": state | {"head.4.bias": torch.tensor([1, torch.nan, 0])},
        "inf": state | {"head.4.bias": torch.tensor([1, torch.inf, 0])},
    }  # fmt: skip
    for name, content in weights.items():
        torch.save(content, f"{name}.pth")
    Path("cut.pt").write_bytes(Path("wrn.pth").read_bytes()[:200])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With files and run/, a baseline of kd_zoo.py on tiny.npz; taught.pt and other.pt name teachers."""
    folder = tmp_path_factory.mktemp("messages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_files()
        flags = "--dataset tiny.npz --student-arch wrn-10-1 --method baseline --out run"
        patch.setattr(sys, "argv", ["kd_zoo.py", *TINY, *flags.split()])
        common.run(SCRIPTS["kd_zoo"].parse_args, SCRIPTS["kd_zoo"].main)
        checkpoint = torch.load("run/checkpoint.pt")
        torch.save(checkpoint, "run.pt")
        torch.save(checkpoint | {"teacher": "t1.pt"}, "taught.pt")
        torch.save(checkpoint | {"teacher": "t2.pt", "dataset": "other.npz"}, "other.pt")
    return folder


@pytest.mark.parametrize(
    "row", [row for row in ROWS.splitlines() if "|" in row], ids=lambda row: row.split(" |")[0]
)
def test_message(row, folder, monkeypatch, cli):
    for short, long in SHORT.items():
        row = row.replace(short, long)
    command, says = row.split(" | ")
    script, *flags = command.split()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing is trained
    before = set(folder.rglob("*"))
    status, _, err = cli(SCRIPTS[script], *flags)
    *others, line = err.splitlines()
    argparse_says = says.startswith("argument")
    begins = f"{script}.py: error: " if argparse_says else "error: "
    assert re.match(re.escape(begins + says).replace(r"\[\^\]", ".*"), line), line
    assert status == 2 and (argparse_says or all(line.startswith("left out: ") for line in others))
    assert set(folder.rglob("*")) == before
