"""What flags are where they are left out, and which optimisers and learning rates runs have by them."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script, write_npz
from PIL import Image

import common

SCRIPTS = {}


def script(name):
    if name not in SCRIPTS:
        SCRIPTS[name] = load_script(name)
    return SCRIPTS[name]


def value(text):
    try:
        return eval(text, {"__builtins__": {}, "range": range})
    except NameError:  # sym, wrn-10-1, …
        return text


PRESETS = """
nrd | arch=wrn-10-1 epochs=20 batch_size=32 lr=.5 weight_decay=5e-4 beta=.95 drops=[.5,.75] noise=sym rate=.5
nrd | student_augment=crop student_views=1 views=1 jsd_scale=True loss_params=[.2,.6,.2]
nrd --loss ce | lr=.2 loss_params=[] jsd_scale=False student_views=1
nrd --loss gjs | lr=.2 loss_params=[.9] jsd_scale=True student_views=2
nrd --loss js | lr=.2 loss_params=[.7] jsd_scale=True student_views=1
nrd --dataset cifar10 | arch=preact_resnet34 epochs=400 batch_size=128
nrd --dataset cifar10 | beta=.99 drops=[.5,.75] noise=sym rate=.5
nrd --dataset cifar10 | student_augment=paper student_views=1 jsd_scale=True lr=.1 weight_decay=5e-4
nrd --dataset cifar10 | loss_params=[.2,.6,.2]
nrd --dataset cifar10 --rate .8 | lr=.1 weight_decay=5e-4 loss_params=[.25,.5,.25]
nrd --dataset cifar10 --noise asym | rate=.4 lr=.1 weight_decay=1e-3 loss_params=[.15,.7,.15]
nrd --dataset cifar10 --noise asym --rate .2 | lr=.1 weight_decay=1e-3 loss_params=[.1,.8,.1]
nrd --dataset cifar10 --noise sym-other | rate=.5 lr=.1 weight_decay=5e-4 loss_params=[.2,.6,.2]
nrd --dataset cifar10 --noise pair | rate=.4 lr=.1 weight_decay=1e-3 loss_params=[.15,.7,.15]
nrd --dataset cifar10 --noise human-worse | rate=None lr=.1 weight_decay=1e-3 loss_params=[.15,.7,.15]
nrd --dataset cifar10 --noise human-aggre | rate=None lr=.1 weight_decay=1e-3 loss_params=[.1,.8,.1]
nrd --dataset cifar10 --noise none | rate=None lr=.1 weight_decay=5e-4 loss_params=[.2,.6,.2]
nrd --dataset cifar10 --noise none --loss js | lr=.01 weight_decay=5e-4 loss_params=[.1]
nrd --dataset cifar10 --rate .4 --loss ce | lr=.05 weight_decay=1e-3 loss_params=[] jsd_scale=False
nrd --dataset cifar10 --rate .8 --loss sce | lr=.01 weight_decay=5e-4 loss_params=[.1,1]
nrd --dataset cifar10 --rate .6 --loss nce+rce | lr=.005 weight_decay=1e-3 loss_params=[1,.1]
nrd --dataset cifar100 --rate .8 | lr=.2 weight_decay=5e-5 loss_params=[.15,.7,.15]
nrd --dataset cifar100 --noise asym | lr=.4 weight_decay=1e-4 loss_params=[.4,.2,.4]
nrd --dataset cifar100 --rate .6 --loss gjs | lr=.2 weight_decay=5e-5 loss_params=[.9] student_views=2
nrd --dataset x/cifar100.npz --noise sym --rate .8 | loss_params=[.15,.7,.15]
nrd --dataset mine.npz | noise=none rate=None arch=preact_resnet34 epochs=400
nrd --dataset webvision | arch=resnet50 epochs=300 batch_size=64 lr=.1 weight_decay=1e-4 beta=.99 noise=none
nrd --dataset webvision | loss_params=[.1,.8,.1] student_views=2 jsd_scale=False drops=[.3333,.6666]
nrd --dataset imagefolder:x | arch=resnet50 loss_params=[.1,.8,.1] student_views=2 student_augment=paper
nrd --dataset webvision --loss js | lr=.2 batch_size=64 loss_params=[.1] drops=None student_views=1 epochs=300
nrd --dataset webvision --loss gjs | lr=.1 batch_size=32 loss_params=[.1] drops=None student_views=2
nrd --dataset webvision --loss ce | lr=.1 batch_size=64 loss_params=[] drops=[.3333,.6666]
nrd --dataset webvision --loss gjs --drops .5 | drops=[.5]
fickle_teacher | teacher_arch=wrn-10-2 student_arch=wrn-10-1 dropout=.2 limit_train=300 batch_size=32 lr=.05
fickle_teacher | epochs=50 teacher_epochs=100 weight_decay=5e-4 alpha=.9 tau=4
fickle_teacher --dataset cifar10 | teacher_arch=wrn-40-2 student_arch=wrn-16-2 dropout=.4 batch_size=128 lr=.1
fickle_teacher --dataset cifar10 | epochs=350 teacher_epochs=200 weight_decay=5e-4 alpha=.9 tau=4 noise=none
fickle_teacher --dataset cifar10 --dropout 0 | epochs=200 teacher_epochs=200 dropout=0
fickle_teacher --dataset cifar10 --dropout .1 | epochs=250 teacher_epochs=200
fickle_teacher --dataset cifar10 --dropout .2 | epochs=250 teacher_epochs=200 dropout=.2
fickle_teacher --dataset cifar10 --dropout .3 | epochs=300 teacher_epochs=200 dropout=.3
fickle_teacher --dataset cifar10 --dropout .5 | epochs=350 teacher_epochs=200 dropout=.5
fickle_teacher --dataset cifar10 --epochs 70 | epochs=70 teacher_epochs=40
fickle_teacher --dataset cifar10 --method baseline | epochs=200 lr=.1
soft_randomization | teacher_arch=wrn-16-1 student_arch=wrn-10-1 sigma=.1
soft_randomization | limit_train=300 epochs=40 batch_size=32
soft_randomization | lr=.05 weight_decay=5e-4 alpha=.9 tau=4 clip=False
soft_randomization --dataset cifar10 | teacher_arch=wrn-40-2 student_arch=wrn-16-2
soft_randomization --dataset cifar10 | sigma=.2 epochs=200 noise=none
soft_randomization --dataset cifar10 | batch_size=128 lr=.1 weight_decay=5e-4 alpha=.9 tau=4
messy_collaboration | teacher_arch=wrn-16-1 student_arch=wrn-10-1 limit_train=500
messy_collaboration | epochs=60 batch_size=32 lr=.05
messy_collaboration | noise=sym rate=.4 target_noise=.1 weight_decay=5e-4 alpha=.9 tau=4
messy_collaboration --method baseline | target_noise=None
messy_collaboration --dataset svhn | teacher_arch=wrn-40-2 student_arch=wrn-16-2
messy_collaboration --dataset svhn | epochs=200 batch_size=128 lr=.1
messy_collaboration --dataset svhn | noise=sym rate=.25 weight_decay=5e-4 alpha=.9 tau=4
messy_collaboration --dataset mine.npz | noise=none rate=None epochs=200
kd_zoo | teacher_arch=wrn-16-1 student_arch=wrn-10-1 limit_train=300 epochs=40
kd_zoo | batch_size=32 lr=.05 alpha=.9 tau=4
kd_zoo --noise sym | limit_train=500 epochs=60
kd_zoo --method fitnet | epochs=40 init_epochs=20
kd_zoo --method fsp --epochs 2 | epochs=2 init_epochs=1
kd_zoo --method sp | gamma=100
kd_zoo --dataset cifar10 | epochs=200 init_epochs=0 lr=.1 batch_size=128
kd_zoo --dataset cifar10 | weight_decay=5e-4 noise=none alpha=.9 ce=.1
kd_zoo --dataset cifar10 | teacher_arch=wrn-40-2 student_arch=wrn-16-2 tau=4
kd_zoo --dataset cifar10 --student-arch resnet8 | teacher_arch=resnet26
kd_zoo --dataset cifar100 --student-arch resnet8x4 | teacher_arch=resnet26x4
kd_zoo --dataset cifar10 --method baseline | ce=1 alpha=None beta=None gamma=None lambda_d=None lambda_a=None
kd_zoo --dataset cifar10 --method bss | tau=4 ce=1 alpha=None epochs=200
kd_zoo --dataset cifar10 --method fitnet | alpha=.9 tau=4 ce=.1 epochs=200 init_epochs=100
kd_zoo --dataset cifar10 --method fsp | alpha=.9 tau=4 ce=.1 epochs=200 init_epochs=100
kd_zoo --dataset cifar10 --method fsp --epochs 21 | epochs=21 init_epochs=11
kd_zoo --dataset cifar10 --method fsp --epochs 21 --init-epochs 3 | init_epochs=3
kd_zoo --dataset cifar10 --method at | beta=1000 ce=1 alpha=None
kd_zoo --dataset cifar10 --method at --add ft | beta=1000 ce=.1 alpha=.9 tau=4
kd_zoo --dataset cifar10 --method at --alpha .5 | beta=1000 ce=.5 alpha=.5 tau=4
kd_zoo --dataset cifar10 --method sp | gamma=3000 ce=1
kd_zoo --dataset cifar10 --method rkd-d | lambda_d=25 lambda_a=None ce=1
kd_zoo --dataset cifar10 --method rkd-a | lambda_d=None lambda_a=50
kd_zoo --dataset cifar10 --method rkd-da | lambda_d=25 lambda_a=50
kd_zoo --dataset cifar10 --method one | tau=3 epochs=300 lr=.1
kd_zoo --dataset cifar10 --method dml | tau=4 epochs=200
cmd | arch=wrn-10-1 arch_b=wrn-10-1 epochs=20 batch_size=32
cmd | lr=.05 weight_decay=5e-4 milestones=[10,16] gamma=.1
cmd | noise=sym-other rate=.4 augment=none pretrained=False self_kd=proselflc select=progressive epsilon=None
cmd | b1=16 eta=1 b2=-8 mutual=cmd validation=0
cmd --select static | eta=2 b2=0
cmd --dataset cifar100 | arch=resnet34 arch_b=resnet34 epochs=100 batch_size=128 lr=.1 weight_decay=5e-4
cmd --dataset cifar100 | milestones=[50,80] gamma=.1 augment=crop pretrained=False noise=sym-other rate=.4
cmd --dataset cifar100 | self_kd=proselflc select=progressive epsilon=None b1=16 eta=4 b2=-8
cmd --dataset cifar100 --noise none | rate=None
cmd --dataset tiny.npz --epochs 50 | epochs=50 milestones=[25,40] noise=none rate=None
cmd --dataset tiny.npz --arch resnet18 --arch-b shufflenet_v2 | arch=resnet18 arch_b=shufflenet_v2
cmd --dataset tiny.npz --arch resnet18 | epochs=200 batch_size=128 lr=.1 milestones=[60,120,160] gamma=.2
cmd --dataset tiny.npz --arch shufflenet_v2 | epochs=200 lr=.1
cmd --dataset tiny.npz --arch shufflenet_v2 | milestones=[60,120,160] gamma=.2 weight_decay=5e-4
cmd --dataset tiny.npz --arch wrn-16-8 | epochs=200 batch_size=128 lr=.1 milestones=[60,120,160] gamma=.2
cmd --dataset tiny.npz --arch resnet50 | epochs=200 batch_size=64 lr=.01
cmd --dataset tiny.npz --arch resnet50 | weight_decay=1e-3 milestones=[40,80] gamma=.1
cmd --dataset food101 | arch=resnet50 epochs=100 batch_size=32
cmd --dataset food101 | lr=.01 weight_decay=5e-4 milestones=[50,80] gamma=.1
cmd --dataset food101 | pretrained=True augment=crop noise=none rate=None
cmd --dataset imagefolder:x | arch=resnet50 epochs=100 batch_size=32
cmd --dataset imagefolder:x | lr=.01 milestones=[50,80] pretrained=False
cmd --dataset webvision | arch=inception_resnet_v2 epochs=80 batch_size=32 lr=.01 weight_decay=5e-4 gamma=.1
cmd --dataset webvision | resize=320 image_size=299 pretrained=False augment=crop
cmd --dataset webvision | milestones=[*range(40,80)]
cmd --dataset cifar100 --select static | select=static eta=4 b2=0
cmd --dataset cifar100 --select zero | select=zero eta=-1 b2=0
cmd --dataset cifar100 --select all | select=all eta=1 b2=0
cmd --dataset cifar100 --self-kd ce | epsilon=0 eta=4 b2=-8
cmd --dataset cifar100 --self-kd ls | epsilon=.1
cmd --dataset cifar100 --self-kd cp | epsilon=.1
cmd --dataset cifar100 --self-kd boot-soft | epsilon=.05
cmd --dataset cifar100 --self-kd mconf | epsilon=None b1=16
cmd --dataset cifar100 --self-kd tf-kd-reg | epsilon=.1
cmd --dataset cifar100 --mutual sync | epsilon=.5 self_kd=None select=None b1=None eta=None b2=None
cmd --dataset cifar100 --mutual async | epsilon=.5 self_kd=None eta=None
cmd --dataset cifar100 --mutual kdcl | self_kd=None select=None b1=None eta=None b2=None
noise_data_free_kd | teacher_arch=wrn-16-1 student_arch=wrn-10-1 epochs=20
noise_data_free_kd | teacher_epochs=12 batch_size=64 lr=.002
noise_data_free_kd | weight_decay=0 running_fraction=0 schedule=plateau eval_batch_size=64 adjust_batches=16
noise_data_free_kd --dataset cifar10 | teacher_arch=resnet34 student_arch=resnet18
noise_data_free_kd --dataset cifar10 | epochs=200 teacher_epochs=100
noise_data_free_kd --dataset cifar10 | batch_size=256 lr=.001
noise_data_free_kd --dataset cifar10 | weight_decay=0 running_fraction=0 schedule=plateau
noise_data_free_kd --dataset cifar10 | source=dead-leaves eval_batch_size=256 adjust_batches=16 noise=none
noise_data_free_kd --dataset cifar10 --source gaussian | running_fraction=0 schedule=plateau
noise_data_free_kd --dataset cifar10 --source data | running_fraction=1 schedule=constant
noise_data_free_kd --dataset cifar10 --source data --bn current | running_fraction=0 schedule=constant
noise_data_free_kd --dataset cifar10 --bn running --batch-size 10 | running_fraction=1 eval_batch_size=10
noise_data_free_kd --dataset cifar100 | teacher_arch=wrn-28-10 student_arch=resnet18 lr=.001
noise_data_free_kd --dataset svhn | teacher_arch=resnet18
noise_data_free_kd --dataset food101 | teacher_arch=resnet101
"""


@pytest.mark.parametrize("row", PRESETS.strip().splitlines())
def test_flags_that_are_left_out(monkeypatch, row):
    command, flags = row.split("|")
    name, *arguments = command.split()
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    args = vars(script(name).parse_args())
    expected = {flag: value(text) for flag, text in (pair.split("=") for pair in flags.split())}
    assert {flag: args[flag] for flag in expected} == {flag: pytest.approx(v) for flag, v in expected.items()}


# Command, on data sets of 20 images | learning rates, each with its first epoch | options of the optimiser
# and its scheduler | the same of the teacher | its config.
SMALL = "--student-arch wrn-10-1 --teacher-arch wrn-10-1"
RUNS = """
nrd --dataset tiny.npz --arch wrn-10-1 --lr .01 --weight-decay .003 --epochs 4
    | 0:.01 2:.001 3:.0001 | momentum=.9 nesterov=True weight_decay=.003
nrd --dataset tiny.npz --arch wrn-10-1 --lr .01 --drops .25 --epochs 4
    | 0:.01 1:.001 | momentum=.9 nesterov=True weight_decay=5e-4
nrd --dataset imagefolder:pictures --arch wrn-10-1 --loss ce --lr .01 --epochs 4
    | 0:.01 2:.001 3:.0001 | momentum=.9 nesterov=True weight_decay=1e-4
nrd --dataset imagefolder:pictures --arch wrn-10-1 --loss js --lr .01 --epochs 4
    | 0:.01 1:.0097 2:.009409 3:.00912673 | momentum=.9 nesterov=True
nrd --dataset imagefolder:pictures --arch wrn-10-1 --loss gjs --lr .01 --epochs 2
    | 0:.01 1:.0097 | momentum=.9 nesterov=True
fickle_teacher --dataset tiny.npz SMALL --epochs 20 --teacher-epochs 20
    | 0:.1 6:.02 12:.004 16:.0008 | momentum=.9 nesterov=False weight_decay=5e-4
    | 0:.1 6:.02 12:.004 15:.0008 | momentum=.9 nesterov=False weight_decay=5e-4 | dropout=.4
fickle_teacher --dataset tiny.npz --student-arch wrn-10-1 --method baseline --epochs 20
    | 0:.1 6:.02 12:.004 15:.0008 | momentum=.9 nesterov=False weight_decay=5e-4
fickle_teacher --dataset tiny.npz SMALL --dropout 0 --epochs 4
    | 0:.1 1:.02 2:.004 3:.0008 | momentum=.9 nesterov=False weight_decay=5e-4
    | 0:.1 1:.02 2:.004 3:.0008 | momentum=.9 nesterov=False weight_decay=5e-4 | dropout=0
soft_randomization --dataset tiny.npz SMALL --epochs 20
    | 0:.1 6:.02 12:.004 15:.0008 | momentum=.9 nesterov=False weight_decay=5e-4
    | 0:.1 6:.02 12:.004 15:.0008 | momentum=.9 nesterov=False weight_decay=5e-4 | dropout=0
messy_collaboration --dataset tiny.npz SMALL --epochs 20
    | 0:.1 6:.02 12:.004 15:.0008 | momentum=.9 nesterov=False weight_decay=5e-4
    | 0:.1 6:.02 12:.004 15:.0008 | momentum=.9 nesterov=False weight_decay=5e-4 | dropout=0
kd_zoo --dataset tiny.npz SMALL --method fitnet --epochs 20
    | 0:.001 6:.0001 8:.00001 10:.1 16:.02 22:.004 25:.0008 | momentum=.9 nesterov=False weight_decay=5e-4
    | 0:.1 6:.02 12:.004 15:.0008 | momentum=.9 nesterov=False weight_decay=5e-4 | dropout=0
kd_zoo --dataset tiny.npz --student-arch wrn-10-1 --method one --epochs 8
    | 0:.1 4:.01 6:.001 | momentum=.9 nesterov=False weight_decay=5e-4
cmd --dataset tiny.npz --arch wrn-10-1 --epochs 5
    | 0:.05 3:.005 4:.0005 | momentum=.9 nesterov=False weight_decay=5e-4 dampening=0
noise_data_free_kd --dataset tiny.npz SMALL --epochs 1 --teacher-epochs 2
    | 0:.001 | betas=(.9,.999) eps=1e-8 weight_decay=0
    | 0:.001 | betas=(.9,.999) eps=1e-8 factor=.1 patience=10 threshold=1e-4 | milestones=None normalize=True
noise_data_free_kd --dataset cifar100.npz SMALL --epochs 1 --teacher-epochs 2
    | 0:.001 | betas=(.9,.999) weight_decay=0 factor=.1 patience=10 threshold=1e-4
    | 0:.1 | momentum=.9 nesterov=False weight_decay=5e-4 patience=10
    | batch_size=256 milestones=None epochs=2
noise_data_free_kd --epochs 1 --limit-train 20 --limit-test 20
    | 0:.002 | betas=(.9,.999) weight_decay=0
    | 0:.002 8:.0004 10:.00008 | betas=(.9,.999) weight_decay=0 gamma=.2
    | batch_size=64 epochs=12 normalize=True
noise_data_free_kd --dataset tiny.npz SMALL --epochs 1 --teacher-epochs 1
    --lr .03 --weight-decay .1 --batch-size 10
    | 0:.03 | weight_decay=.1
    | 0:.001 | weight_decay=0 | batch_size=256
"""


@pytest.fixture
def data(tmp_path, quick):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    few = {"train_images": images[:20], "train_labels": np.arange(20) % 3, "test_images": images[20:]}
    for name in ("tiny", "cifar100"):
        write_npz(tmp_path / f"{name}.npz", **few)
    for i, pixels in enumerate(images[:16]):
        path = tmp_path / "pictures" / ("train", "test")[i // 8] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(pixels.transpose(1, 2, 0), np.ones((2, 2, 1), np.uint8))).save(path)


def assert_trained(folder, rates, options):
    """The run in `folder` has had these learning rates, and its optimiser has these options."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    changes = {int(epoch): float(rate) for epoch, rate in (pair.split(":") for pair in rates.split())}
    expected = [changes[max(start for start in changes if start <= epoch)] for epoch in range(len(records))]
    assert [record["lr"] for record in records] == pytest.approx(expected)
    checkpoint = common.load_checkpoint(folder / "checkpoint.pt")
    (group,) = checkpoint["optimizer"]["param_groups"]
    found = group | checkpoint.get("scheduler", {})
    for option, text in (pair.split("=") for pair in options.split()):
        assert found[option] == pytest.approx(value(text)), option
    next_epoch = (pytest.approx(expected[-1]), pytest.approx(0.97 * expected[-1]))
    assert group["lr"] in next_epoch
    return checkpoint


@pytest.mark.parametrize("row", RUNS.replace("\n    ", " ").strip().splitlines())
def test_optimisers_and_learning_rates(cli, data, row):
    command, rates, options, *of_teacher = row.split("|")
    name, *flags = command.replace("SMALL", SMALL).split()
    flags += ["--device", "cpu", "--out", "run"]
    if "imagefolder" in command:
        flags += ["--resize", 16, "--image-size", 8, "--batch-size", 4]
    assert cli(script(name), *flags)[::2] == (0, "")
    assert_trained(Path("run"), rates, options)
    teachers = list(Path("runs/teachers").glob("*")) if Path("runs").exists() else []
    assert len(teachers) == bool(of_teacher)
    if of_teacher:
        rates, options, recipe = of_teacher
        checkpoint = assert_trained(teachers[0], rates, options)
        for flag, text in (pair.split("=") for pair in recipe.split()):
            assert checkpoint["config"][flag] == value(text), flag
