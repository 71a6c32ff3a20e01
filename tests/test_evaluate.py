"""evaluate.py: attacks and measures against closed forms and naive versions, then the script as a user runs it."""

import csv
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, write_npz
from PIL import Image

import common
import evaluate

CLASSES = ["ant", "bee", "cat"]


def subject_of(model, images, labels, **fields):
    """A Subject of any module; images uint8."""
    data = common.Dataset(images[:1], labels[:1], images, labels, CLASSES)
    fields = {"batch_size": 125} | fields
    return evaluate.Subject("some.pt", Path(), f"{id(model)}", {}, model.eval(), "some", data, **fields)


class Net(nn.Sequential):
    """In double precision, so that rounding, which depends on the batch, decides nothing."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 10))
        self.double()

    def forward(self, images):
        return super().forward(images.double())


class Lookup(nn.Module):
    """Logits looked up by an image's first pixel, so that a test can say what is predicted for which image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


class Knows(nn.Module):
    """Class 0 for the clean images in one set, and for the attacked images in another. Its gradient is nought."""

    def __init__(self, clean, attacked):
        super().__init__()
        bits = torch.tensor([[bit == "1" for bit in clean], [bit == "1" for bit in attacked]])
        self.bits = nn.Parameter(bits.float())

    def forward(self, images):
        levels = images.flatten(1) * 255
        attacked = ((levels - levels.round()).abs().amax(1) > 1e-3).long()
        zero = self.bits[attacked, levels[:, 0].round().long()].view(-1, 1)
        return torch.cat([zero, 1 - zero], 1) + 0 * images.sum((1, 2, 3)).view(-1, 1)


def numbered(count, first=0):
    """Images uint8 [count, 3, 16, 16] whose pixels are their number."""
    return (torch.arange(count, dtype=torch.uint8) + first).view(-1, 1, 1, 1).repeat(1, 3, 16, 16)


def random_images(count):
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    return images


def naive_pgd(model, clean, labels, eps, step_size, steps, generator):
    """The points that are visited, the start included, and the logits there."""
    x = (clean + eps * (2 * torch.rand(clean.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(steps + 1):
        x.requires_grad_()
        logits = model(x)
        yield x.detach(), logits
        gradient = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)[0]
        x = torch.min(torch.max(x.detach() + step_size * gradient.sign(), clean - eps), clean + eps)
        x = x.clamp(0, 1)


def test_pgd_is_a_naive_one():
    model, images, labels = Net(), common.to_float(random_images(40)), torch.arange(40) % 10
    points = list(naive_pgd(model, images, labels, 0.02, 0.006, 9, torch.Generator().manual_seed(2)))
    for steps, (point, _) in enumerate(points):
        out = evaluate.pgd(model, images, labels, 0.02, 0.006, steps, torch.Generator().manual_seed(2))
        assert torch.allclose(out, point, atol=1e-6)


@pytest.mark.parametrize("fields", [{"batch_size": 7}, {"batch_size": 500, "by_batch": True}], ids=str)
@pytest.mark.parametrize("steps", [[9], [1, 2, 5, 9]], ids=str)
def test_accuracy_under_pgd_is_that_of_a_naive_attack(steps, fields):
    """Three restarts, each run to its end: a run loses a sample to PGD-k where a point up to step k fools."""
    model, images = Net(), random_images(150)
    clean = common.to_float(images)
    labels = model(clean).argmax(1)
    labels[::7] = 3  # some are wrong before the attack
    args = SimpleNamespace(pgd=steps, restarts=3, seed=4, step_size=0.003)
    found = evaluate.evaluate_pgd(subject_of(model, images, labels, **fields), 0.15, args)
    lost = (model(clean).argmax(1) != labels).repeat(3, len(steps), 1)  # bool [restarts, step counts, N]
    for run, seed in zip(lost, (4, 5, 6)):
        points = naive_pgd(model, clean, labels, 0.15, 0.003, max(steps), torch.Generator().manual_seed(seed))
        for step, (_, logits) in enumerate(points):
            for k, so_far in zip(steps, run):
                so_far |= (logits.argmax(1) != labels) & (step <= k)
    expected = {"worst run": (~lost).double().mean(2).amin(0), "worst start": (~lost.any(0)).double().mean(1)}
    assert found == {key: pytest.approx((100 * value).tolist(), abs=1e-4) for key, value in expected.items()}
    assert len(set(found["worst run"])) == len(steps) and 0 < found["worst start"][-1] < found["worst run"][-1] < 80


@pytest.mark.parametrize("scale", [0.5, 3, 60])
def test_clean_metrics_are_numpy_s(scale):
    """Also where softmax is one to the last bit of float32."""
    logits = scale * torch.randn(250, 7)
    labels = torch.where(torch.rand(250) < 0.6, logits.argmax(1), torch.randint(0, 7, (250,)))
    found = evaluate.evaluate_images(subject_of(Lookup(logits), numbered(250), labels), numbered(250), labels)
    z, y = logits.double().numpy(), labels.numpy()
    log_p = z - z.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    p, hit = np.exp(log_p), z.argmax(1) == y
    which = np.digitize(p.max(1), np.linspace(0, 1, 16), right=True) - 1
    ece = sum((which == b).mean() * abs(hit[which == b].mean() - p.max(1)[which == b].mean()) for b in set(which))
    assert found["accuracy"] == pytest.approx(100 * hit.mean()) and found["ece"] == pytest.approx(ece, abs=1e-9)
    assert found["nll"] == pytest.approx(-log_p[np.arange(250), y].mean(), rel=1e-9)
    assert found["brier"] == pytest.approx(((p - np.eye(7)[y]) ** 2).sum(1).mean(), rel=1e-9)
    assert found["bins"]["share"] == pytest.approx([(which == b).mean() for b in range(15)])


def test_natural_robustness_by_hand():
    """Four images of class 0, the first two right when clean; image 4k + i is image i at severity k."""
    right = ["1100", "1000", "0100", "0011", "1111", "0000"]
    logits = torch.tensor([[1.0, 0] if bit == "1" else [0, 1.0] for bit in "".join(right)])

    subject, never = (subject_of(Lookup(logits), numbered(4, k), torch.zeros(4).long()) for k in (0, 20))
    made = {(subject.test_set, severity): numbered(4, 4 * severity) for severity in range(1, 6)}  # by another model
    found = evaluate.evaluate_corruption(subject, "fog", 0, None, made)
    assert found == {"accuracy": [25, 25, 50, 100, 0], "natural_robustness": [50, 50, 0, 100, 0]}
    found = evaluate.evaluate_corruption(never, "fog", 0, None, made)
    assert found["accuracy"] == [25, 25, 50, 100, 0] and all(math.isnan(v) for v in found["natural_robustness"])


def test_transfer_by_hand(monkeypatch):
    """By PGD-20, of samples that source and target both classify correctly. The attack does no more than mark them."""
    attacks, real = [], evaluate.pgd
    monkeypatch.setattr(evaluate, "pgd", lambda *arguments: attacks.append(arguments) or real(*arguments))
    models = [Knows("111100", "011111"), Knows("111010", "011000"), Knows("000011", "111111")]
    source, target, lost = (subject_of(m, numbered(6), torch.zeros(6).long(), batch_size=3) for m in models)
    args = SimpleNamespace(seed=0, eps=[0.0015], step_size=0.003)
    found = evaluate.evaluate_transfer(source, [source, target, lost], args)
    assert found == pytest.approx([25, 100 / 3, math.nan], nan_ok=True)
    assert [(a[0], len(a[1]), a[3:6]) for a in attacks] == [(source.model, 2, (0.0015, 0.003, 20))] * 2


# --------------------------------------------------------------------------------------------------- the script itself


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder with tiny.npz: 20 test images of three classes."""
    monkeypatch.chdir(tmp_path)
    write_npz("tiny.npz")
    return tmp_path


def write_checkpoint(path, seed=0, changes=(), **flags):
    """A checkpoint as a training script leaves it, of an untrained net; `changes` are to its entries."""
    torch.manual_seed(seed)
    nets = {"model": common.build_model("wrn-10-1", 3), "ema": common.build_model("wrn-10-1", 3)}
    config = {"script": "nrd", "dataset": "tiny.npz", "data_dir": "data", "noise": "sym", "lr": 0.1, "seed": seed}
    config |= {"device": "cpu", "out": None, "resume": False, "name": "nrd-tiny"} | flags
    checkpoint = {"script": config["script"], "dataset": "tiny.npz", "classes": CLASSES, "config": config, "rng": {}}
    checkpoint |= {"noise": {}, "epochs": 2, "epoch": 2}
    checkpoint |= {"metrics": [{"epoch": epoch, "test_acc": 50.0 * epoch} for epoch in (1, 2)]}
    checkpoint |= {"built_as": {part: net.built_as for part, net in nets.items()}}
    checkpoint |= {part: net.state_dict() for part, net in nets.items()} | dict(changes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return checkpoint


@pytest.fixture
def run(monkeypatch):
    """run(*flags) evaluates in this process and returns the summary."""
    for name in ("draw_reliability", "draw_pgd", "draw_by", "draw_corruptions"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)  # the first test has them

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--device", "cpu"])
        return evaluate.main(evaluate.parse_args())

    return main


def test_end_to_end():
    """As a user runs it: tables, pictures, summary.json, and the results of each checkpoint beside it."""
    write_checkpoint("a/checkpoint.pt", lr=0.1, changes={"teacher": "a/checkpoint.pt"})
    write_checkpoint("b/checkpoint.pt", seed=1, lr=0.2, method="one")
    flags = "a b --ece --pgd 1 2 --eps 1/255 0.031 --restarts 1 --cifar-c --transfer --teacher"
    flags += " --curves --plot-by lr --pdf --table out/table.csv --limit-test 6 --out out --device cpu"
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    missing = subprocess.run([*command[:2], "missing.pt"], capture_output=True, text=True, timeout=120)
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
    pictures = [f"{name}.{kind}" for kind in ("png", "pdf")
                for name in ("reliability", "pgd", "training", "by-lr", "cifar-c", "transfer")]  # fmt: skip
    assert {path.name for path in Path("out").iterdir()} == {*pictures, "table.csv", "summary.json"}
    summary = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert list(summary["models"]) == ["nrd lr=0.1", "nrd lr=0.2"]
    for row in summary["models"].values():
        columns = ["accuracy (%)", "ECE", "NLL", "Brier"]
        columns += [f"PGD-{k}, ε {eps} (%)" for eps in ("1/255", "0.031") for k in (1, 2)]
        columns += ["mCA, generated (%)", "natural robustness (%)"]
        assert list(row) == ["checkpoints", *columns]
    assert f"{summary['models']['nrd lr=0.1']['NLL']['mean']:.4f}" in result.stdout
    assert "; PGD: worst run of 1 " in result.stdout
    with open("out/table.csv", newline="", encoding="utf-8") as file:
        heading, first, _ = csv.reader(file)
    assert heading[1:7] == [f"{column} {kind}" for column in columns[:2] for kind in ("mean", "std", "n")]
    assert float(first[4]) == summary["models"]["nrd lr=0.1"]["ECE"]["mean"] and first[5:7] == ["", "1"]
    assert Path("a/evaluation.json").exists() and Path("b/evaluation.json").exists()
    rates = np.array(summary["transfer"]["success_rate"])
    assert rates.shape == (3, 4)
    for column in (2, 3):  # the mean, in which ONE has no part, and the teacher, which is the first
        assert np.array_equal(rates[:, column], rates[:, 0], equal_nan=True)


@pytest.mark.parametrize("suffix, row", [
    (".md", "| a_b | 50.00 ± 14.14 (2) |"), (".tex", r"a\_b & 50.00 $\pm$ 14.14 (2) \\"),
])  # fmt: skip
def test_tables_to_take_along(tmp_path, suffix, row):
    members = [SimpleNamespace(numbers={"accuracy (%)": value}) for value in (40.0, 60.0)]
    path = tmp_path / f"table{suffix}"
    evaluate.write_table(path, "tiny", ["accuracy (%)"], [("a_b", members)])
    assert row in path.read_text(encoding="utf-8").splitlines()


def test_attacks_of_a_library(run, monkeypatch):
    """By name, with the radius and the labels; here one that turns images into their negatives."""
    asked = []

    class Negative:
        def __init__(self, model, eps):
            asked.append(eps)

        def __call__(self, images, labels):
            return 1 - images

    library = SimpleNamespace(Negative=Negative, __all__=["Negative"])
    monkeypatch.setitem(sys.modules, "torchattacks", library)
    write_checkpoint("a.pt")
    row = run("a.pt", "--attack", "Negative", "--eps", "8/255")["models"]["nrd"]
    data, model = common.load_dataset("tiny.npz"), common.load_model(common.load_checkpoint("a.pt"))
    assert row["Negative, ε 8/255 (%)"]["mean"] == common.accuracy(
        common.predict(model, 255 - data.test_images), data.test_labels
    )
    assert asked == [8 / 255]
    for module, says in ((library, "torchattacks has no Other; it has Negative"), (None, "pip install torchattacks")):
        monkeypatch.setitem(sys.modules, "torchattacks", module)
        with pytest.raises(common.UsageError, match=says):
            run("a.pt", "--attack", "Other")


def test_contact_sheet(monkeypatch):
    monkeypatch.setattr(evaluate, "CORRUPTIONS", {"fog": evaluate.fog, "contrast": evaluate.contrast})
    args = SimpleNamespace(out=Path("."), pdf=False, seed=0)
    evaluate.show_corruptions(args, common.read_npz(Path("tiny.npz")).test_images[:2])
    assert matplotlib.image.imread("corruptions.png")[..., :3].std() > 0.05


def test_plot_by_two_flags_puts_each_mean_in_its_place(monkeypatch):
    subjects = []
    for i, (sigma, rate, seed) in enumerate([(0.2, 0.5, 0), (0.2, 0.5, 1), (0.1, 0.0, 0), (None, 0.5, 0)]):
        config = {"script": "sr" if sigma else "teacher", "sigma": sigma, "rate": rate, "seed": seed}
        subjects.append(SimpleNamespace(config=config, numbers={"accuracy (%)": 10.0 * i}))
    drawn = []
    monkeypatch.setattr(evaluate, "heat_map", lambda _, *arguments: drawn.append(arguments))
    args = SimpleNamespace(plot_by=["sigma", "rate"], out=Path("."), pdf=False)
    evaluate.draw_by(args, subjects, "heading")
    ((values, rows, columns, title),) = drawn
    assert np.allclose(values, [[20, math.nan], [math.nan, 5], [math.nan, 30]], equal_nan=True)
    assert (rows, columns, title) == (["sr sigma=0.1", "sr sigma=0.2", "teacher"], [0.0, 0.5], "accuracy (%)")


def test_rows_are_seeds_and_named_by_every_flag_that_differs(run):
    """Mean ± sample standard deviation (n). A flag that another script has not is no difference."""
    for i, flags in enumerate([{"lr": 0.1, "loss": "ce"}, {"lr": 0.1, "loss": "ce"}, {"lr": 0.2, "loss": "nrd"}]):
        write_checkpoint(f"{i}.pt", seed=i, name=f"run{i}", device=f"cuda:{i}", **flags)
    write_checkpoint("3.pt", seed=3, script="cmd", arch="wrn", lr=0.2)
    models = run("0.pt", "1.pt", "2.pt", "3.pt", "--ece")["models"]
    assert list(models) == ["nrd lr=0.1 loss=ce", "nrd lr=0.2 loss=nrd", "cmd lr=0.2"]
    first, second = (run(f"{i}.pt", "--ece")["models"]["nrd"]["NLL"]["mean"] for i in range(2))
    expected = {"mean": statistics.fmean([first, second]), "std": abs(first - second) / math.sqrt(2), "n": 2}
    assert models["nrd lr=0.1 loss=ce"]["NLL"] == pytest.approx(expected) and first != second


def test_the_part_asked_for_is_evaluated(run, capsys):
    """And an unfinished checkpoint says so."""
    checkpoint = write_checkpoint("a.pt", changes={"epochs": 40})
    data, found = common.read_npz(Path("tiny.npz")), {}
    for part in ("model", "ema"):
        found[part] = run("a.pt", "--ece", "--part", part)["models"]["nrd"]["NLL"]["mean"]
        logits = common.predict(common.load_model(checkpoint, part), data.test_images)
        assert found[part] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)
    assert found["model"] != found["ema"] and "a.pt: epoch 2 of 40\n" in capsys.readouterr().out


def test_batch_norm_on_current_statistics(run):
    """As the checkpoint asks; the answers then depend on the batches."""
    checkpoint = write_checkpoint("a.pt", changes={"batch_norm": "current"})
    data, found = common.read_npz(Path("tiny.npz")), []
    for size in (20, 5):
        found.append(run("a.pt", "--ece", "--batch-size", size)["models"]["nrd"]["NLL"]["mean"])
    model = common.load_model(checkpoint).train()
    logits = model(common.to_float(data.test_images))
    assert found[0] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-4)
    assert abs(found[1] - found[0]) > 1e-4


@pytest.mark.parametrize("change, again", [
    ([], 0), (["--batch-size", 7], 0), (["--worst-start"], 0), (["--pgd", 1], 1), (["--eps", "0.02"], 1),
    (["--seed", 1], 2), (["--step-size", "0.004"], 1), (["--restarts", 1], 1), (["--limit-test", 10], 3),
    (["--part", "ema"], 3), ("other weights", 3), ("other images", 3),
], ids=str)  # fmt: skip
def test_what_is_there_is_not_measured_again(run, monkeypatch, change, again):
    calls = []

    def counted(function):
        return lambda *arguments: calls.append(function) or function(*arguments)

    for name in ("evaluate_images", "evaluate_pgd", "evaluate_corruption"):
        monkeypatch.setattr(evaluate, name, counted(getattr(evaluate, name)))
    monkeypatch.setattr(evaluate, "CORRUPTIONS", {"fog": evaluate.fog})
    write_checkpoint("a.pt")
    first = ["--ece", "--pgd", 1, 2, "--restarts", 2, "--eps", "0.01", "--cifar-c"]
    run("a.pt", *first)
    assert len(calls) == 3
    if change == "other weights":
        write_checkpoint("a.pt", seed=1)
    elif change == "other images":
        write_npz("tiny.npz", test_images=np.zeros((20, 3, 32, 32), np.uint8))
    run("a.pt", *first, *(change if isinstance(change, list) else []))
    assert len(calls) == 3 + again


class Numbered:
    """In place of an array [50000, 32, 32, 3] of CIFAR-10-C: each image has its row's number in its first two bytes."""

    def __getitem__(self, rows):
        images = np.zeros((len(rows), 32, 32, 3), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = rows // 256, rows % 256
        return images


def test_the_official_files_are_read_by_block_and_row(run, monkeypatch):
    """Of 10,000 test images the 20 evenly spaced ones are those of tiny.npz."""
    seen = []
    monkeypatch.setattr(evaluate, "predict", lambda model, images, **_: seen.append(images) or torch.zeros(20, 3))
    subject = subject_of(Net(), numbered(20), torch.zeros(20).long())
    evaluate.evaluate_corruption(subject, "fog", None, {"fog": Numbered()}, {})
    rows = [images[:, 0, 0, 0].int() * 256 + images[:, 1, 0, 0] for images in seen if images.shape[2] == 32]
    assert torch.equal(torch.cat(rows), torch.arange(0, 50000, 500))
    write_checkpoint("a.pt")
    Path("official").mkdir()
    for name in [*evaluate.CORRUPTIONS, "labels"]:
        np.save(f"official/{name}.npy", np.zeros(50000, np.uint8))
    with pytest.raises(common.UsageError, match="--cifar-c: official/labels.npy are not the labels of tiny.npz, 20 "):
        run("a.pt", "--cifar-c", "official")


def test_cinic_takes_the_images_of_imagenet_class_by_class(folder):
    """Six of each class lie over three splits, their red 10 · class + number; others are not taken."""
    cinic = folder / "cinic"
    files = {f"train/{name}/cifar10-train-1.png": 255 for name in evaluate.CIFAR10} | {"train/submarine/n11_0.png": 254}
    for c, name in enumerate(evaluate.CIFAR10):
        files |= {f"{split}/{name}/n0{c}_{i}.png": 10 * c + i for i, split in enumerate(["train", "valid", "test"] * 2)}
    for name, level in files.items():
        (cinic / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (level, 255 - level, 7)).save(cinic / name)
    images, labels = evaluate.load_cinic(cinic, seed=0, per_class=6)
    red = images[:, 0, 0, 0].long()
    expected = torch.stack([red, 255 - red, red * 0 + 7], 1).byte()[..., None, None].expand(60, 3, 32, 32)
    assert torch.equal(images, expected) and torch.equal(labels, red // 10)
    assert sorted(red.tolist()) == sorted(10 * c + i for c in range(10) for i in range(6))  # nothing else, none twice
    with pytest.raises(common.UsageError, match="--cinic: .*cinic has 6 images of ImageNet for airplane, not 7"):
        evaluate.load_cinic(cinic, 0, per_class=7)


BAD = [
    ("", "CKPT: name the checkpoint.pt of a run folder"),
    ("missing.pt", "CKPT: no file missing.pt"),
    ("weights.pt", "CKPT: weights.pt is no checkpoint of these scripts"),
    ("a.pt --part emma", "--part: a.pt has no 'emma'; it has model, ema"),
    ("a.pt --dataset renamed.npz", "--dataset: renamed.npz has other classes than a.pt"),
    ("a.pt other.pt --transfer", "--transfer: the checkpoints have different test sets"),
    ("a.pt --cinic nowhere", "--cinic: has the classes of cifar10"),
    ("a.pt --cifar-c nowhere", "--cifar-c: no file nowhere/gaussian_noise.npy"),
    ("a.pt --plot-by sigma", "--plot-by: name one or two flags of the runs' config.json, not sigma"),
    ("a.pt --transfer --teacher", "--teacher: the checkpoints name no teacher; add the path of one"),
    ("taught.pt other.pt --transfer --teacher", "--teacher: the checkpoints name t1.pt, t2.pt; add the path of one"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line(run, flags, says):
    checkpoint = write_checkpoint("a.pt")
    torch.save(checkpoint["model"], "weights.pt")
    write_npz("renamed.npz", classes=np.array(["ant", "bee", "cow"]))
    write_npz("other.npz", train_labels=np.zeros(40, int))
    write_checkpoint("taught.pt", changes={"teacher": "t1.pt"})
    write_checkpoint("other.pt", changes={"dataset": "other.npz", "teacher": "t2.pt"})
    with pytest.raises(common.UsageError) as error:
        run(*flags.split())
    assert says in str(error.value) and "\n" not in str(error.value)
