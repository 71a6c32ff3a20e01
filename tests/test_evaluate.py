"""evaluate.py: attacks and measures against closed forms and naive versions, then the script as a user runs it."""

import ast
import json
import math
import runpy
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


class Linear(nn.Module):
    """Two classes; logits are a linear function of the pixels."""

    def __init__(self, pixels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, pixels, generator=torch.Generator().manual_seed(1)) / 50)

    def forward(self, images):
        return F.linear(images.flatten(1) - 0.5, self.weight)

    def optimum(self, images, labels, eps):
        """The point of the l∞ ball where the loss is largest."""
        down = (self.weight[labels] - self.weight[1 - labels]).sign().view_as(images)
        return (images - eps * down).clamp(0, 1).detach()


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


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_pgd_by_hand(steps):
    """From a start that is uniform in the ball, by the given generator or the global one, along the gradient's sign."""
    from scipy.stats import kstest

    images, labels, model = torch.full((40, 3, 16, 16), 0.5), torch.arange(40) % 2, Linear(768)
    generator = torch.Generator()
    start = evaluate.random_start(images, 0.3, generator.manual_seed(2))
    assert kstest((start - images).flatten().numpy(), "uniform", (-0.3, 0.6)).pvalue > 1e-3
    direction = (model.optimum(images, labels, 0.3) - images).sign()
    expected = (start + 0.01 * steps * direction).clamp(0.2, 0.8)
    out = evaluate.pgd(model, images, labels, 0.3, 0.01, steps, generator.manual_seed(2))
    assert torch.allclose(out, expected, atol=1e-6)
    torch.manual_seed(2)
    assert torch.equal(evaluate.pgd(model, images, labels, 0.3, 0.01, steps), out)
    assert not torch.equal(evaluate.pgd(model, images, labels, 0.3, 0.01, steps), out)


@pytest.mark.parametrize("eps, step_size", [(0, 0.003), (0.031, 0.5), (1, 0.3), (0.1, 0)])
def test_pgd_stays_in_the_ball_and_in_the_range_and_leaves_the_model_alone(eps, step_size):
    images, labels = common.to_float(random_images(8)), torch.arange(8) % 10
    model, clean = common.build_model("wrn-10-1", 10).eval(), images.clone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for steps in (0, 3):
        out = evaluate.pgd(model, images, labels, eps, step_size, steps)
        assert out.dtype == torch.float32 and not out.requires_grad and torch.equal(out, images) == (eps == 0)
        assert out.min() >= 0 and out.max() <= 1 and (out - images).abs().max() <= eps + 1e-7
    assert torch.equal(images, clean) and not images.requires_grad and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def pgd_args(steps, restarts=1, seed=0, step_size=0.003):
    return SimpleNamespace(pgd=steps, restarts=restarts, seed=seed, step_size=step_size)


def naive_pgd(subject, eps, args):
    """Every restart in full and every sample to the end; a sample counts for k where no point up to step k fools."""
    clean, labels = common.to_float(subject.data.test_images), subject.data.test_labels
    lost = {k: subject.model(clean).argmax(1) != labels for k in args.pgd}
    for restart in range(args.restarts):
        generator = torch.Generator().manual_seed(args.seed + restart)
        x = (clean + eps * (2 * torch.rand(clean.shape, generator=generator) - 1)).clamp(0, 1)
        for step in range(max(args.pgd) + 1):
            x.requires_grad_()
            logits = subject.model(x)
            for k in args.pgd:
                lost[k] |= (logits.argmax(1) != labels) & (step <= k)
            gradient = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)[0]
            x = torch.min(torch.max(x.detach() + args.step_size * gradient.sign(), clean - eps), clean + eps)
            x = x.clamp(0, 1)
    return {evaluate.pgd_column(k, eps): 100 * (~lost[k]).double().mean().item() for k in args.pgd}


@pytest.mark.parametrize("fields", [{"batch_size": 7}, {"batch_size": 500, "by_batch": True}], ids=str)
@pytest.mark.parametrize("steps", [[9], [1, 2, 5, 9]], ids=str)
def test_accuracy_under_pgd_is_that_of_a_naive_attack(steps, fields):
    model, images = Net(), random_images(150)
    labels = model(common.to_float(images)).argmax(1)
    labels[::7] = 3
    subject = subject_of(model, images, labels, **fields)
    found = evaluate.evaluate_pgd(subject, 0.02, pgd_args(steps, restarts=3, seed=4))
    assert found == pytest.approx(naive_pgd(subject, 0.02, pgd_args(steps, restarts=3, seed=4)), abs=1e-4)
    assert len(set(found.values())) == len(steps) and 0 < min(found.values()) < 80  # the step counts are told apart


@pytest.mark.parametrize("block", [evaluate.BLOCK, 768 * 30, 1])
def test_accuracy_under_pgd_of_a_linear_model_however_many_images_are_attacked_at_once(monkeypatch, block):
    monkeypatch.setattr(evaluate, "BLOCK", block)
    images, model = random_images(100), Linear(768)
    labels = model(common.to_float(images)).argmax(1)
    labels[::10] = 1 - labels[::10]  # some are wrong before the attack
    worst = model(model.optimum(common.to_float(images), labels, 0.006)).argmax(1)
    found = evaluate.evaluate_pgd(subject_of(model, images, labels), 0.006, pgd_args([30], step_size=0.0006))
    expected = 100 * (worst == labels).double().mean().item()
    assert found == {"PGD-30, ε 0.006 (%)": pytest.approx(expected)} and 5 < expected < 85


def test_a_sample_that_is_wrong_when_clean_is_lost_whatever_the_attack_does():
    """The third is misclassified at its own pixels, and nowhere else."""
    subject = subject_of(Knows("110", "111"), numbered(3), torch.zeros(3).long())
    found = evaluate.evaluate_pgd(subject, 0.0015, pgd_args([1, 3]))
    assert list(found.values()) == pytest.approx([200 / 3, 200 / 3])


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


def test_natural_robustness_by_hand(monkeypatch):
    """Four images of class 0, the first two right when clean; image 4k + i is image i at severity k."""
    right = ["1100", "1000", "0100", "0011", "1111", "0000"]
    logits = torch.tensor([[1.0, 0] if bit == "1" else [0, 1.0] for bit in "".join(right)])
    monkeypatch.setattr(evaluate, "corrupt", lambda images, name, severity, seed: numbered(4, 4 * severity))
    subject, never = (subject_of(Lookup(logits), numbered(4, k), torch.zeros(4).long()) for k in (0, 20))
    found = evaluate.evaluate_corruption(subject, "fog", 0, None)
    assert found == {"accuracy": [25, 25, 50, 100, 0], "natural_robustness": [50, 50, 0, 100, 0]}
    found = evaluate.evaluate_corruption(never, "fog", 0, None)
    assert found["accuracy"] == [25, 25, 50, 100, 0] and all(math.isnan(v) for v in found["natural_robustness"])


def test_transfer_by_hand(monkeypatch):
    """By PGD-20, of samples that source and target both classify correctly. The attack does no more than mark them."""
    attacks, real = [], evaluate.pgd
    monkeypatch.setattr(evaluate, "pgd", lambda *arguments: attacks.append(arguments) or real(*arguments))
    models = [Knows("111100", "011111"), Knows("111010", "011000"), Knows("000011", "111111")]
    source, target, lost = (subject_of(m, numbered(6), torch.zeros(6).long(), batch_size=3) for m in models)
    args = SimpleNamespace(seed=0, eps=[0.0015], step_size=0.003)
    found = evaluate.evaluate_transfer(source, [source, target, lost], args)
    assert found[source.key] == 25 and found[target.key] == pytest.approx(100 / 3) and math.isnan(found[lost.key])
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
    checkpoint |= {"noise": {}, "epochs": 2, "epoch": 2, "metrics": [{"epoch": 1}, {"epoch": 2}]}
    checkpoint |= {"built_as": {part: net.built_as for part, net in nets.items()}}
    checkpoint |= {part: net.state_dict() for part, net in nets.items()} | dict(changes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return checkpoint


@pytest.fixture
def run(monkeypatch):
    """run(*flags) evaluates in this process and returns the summary."""
    for name in ("draw_reliability", "draw_pgd", "draw_corruptions"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)  # the first test has them

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--device", "cpu"])
        return evaluate.main(evaluate.parse_args())

    return main


def test_end_to_end():
    """As a user runs it: tables, all pictures, summary.json, and the results of each checkpoint beside it."""
    write_checkpoint("a/checkpoint.pt", lr=0.1)
    write_checkpoint("b/checkpoint.pt", seed=1, lr=0.2)
    flags = "a b --ece --pgd 1 2 --eps 1/255 0.031 --restarts 1 --cifar-c --transfer --teacher a/checkpoint.pt"
    flags += " --show-corruptions --out out --device cpu"
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    names = ("reliability", "pgd", "cifar-c", "transfer", "corruptions")
    assert {p.name for p in Path("out").iterdir()} == {*(f"{name}.png" for name in names), "summary.json"}
    for name in names:
        picture = matplotlib.image.imread(f"out/{name}.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05
    summary = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert list(summary["models"]) == ["nrd lr=0.1", "nrd lr=0.2"]
    for row in summary["models"].values():
        columns = ["accuracy (%)", "ECE", "NLL", "Brier", "mCA, generated (%)", "natural robustness (%)"]
        columns += [f"PGD-{k}, ε {eps} (%)" for eps in ("1/255", "0.031") for k in (1, 2)]
        assert list(row) == ["checkpoints", *columns]
        assert row[columns[-1]]["mean"] <= row[columns[-2]]["mean"] <= row["accuracy (%)"]["mean"]
    assert "tiny.npz, 20 test images (sha256 " in result.stdout
    assert f"{summary['models']['nrd lr=0.1']['NLL']['mean']:.4f}" in result.stdout
    own = json.loads(Path("a/evaluation.json").read_text(encoding="utf-8"))
    (key,) = own
    assert key == f"{evaluate.digest('a/checkpoint.pt')} model" and len(own[key]) == 1 + 2 + 19 + 1
    fog = [result for name, result in own[key].items() if json.loads(name)["measure"] == "fog"]
    data, model = common.read_npz(Path("tiny.npz")), common.load_model(common.load_checkpoint("a/checkpoint.pt"))
    logits = common.predict(model, evaluate.corrupt(data.test_images, "fog", 4))
    assert fog[0]["accuracy"][3] == pytest.approx(common.accuracy(logits, data.test_labels))
    rates = np.array(summary["transfer"]["success_rate"])
    assert rates.shape == (3, 4) and np.allclose(rates[:, 2], rates[:, :2].mean(1), equal_nan=True)
    assert np.allclose(rates[:, 3], rates[:, 0], equal_nan=True)  # the teacher is the first student


def test_help_does_not_wait_for_large_imports():
    tree = ast.parse((ROOT / "evaluate.py").read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    large = {"torchvision", "matplotlib", "scipy", "PIL"}
    assert "torch" in names and not {name.split(".")[0] for name in names} & large


def test_rows_are_seeds_and_named_by_every_flag_that_differs(run, capsys):
    """Mean ± sample standard deviation (n). A flag that another script has not is no difference."""
    for i, flags in enumerate([{"lr": 0.1, "loss": "ce"}, {"lr": 0.1, "loss": "ce"}, {"lr": 0.2, "loss": "nrd"}]):
        write_checkpoint(f"{i}.pt", seed=i, name=f"run{i}", device=f"cuda:{i}", **flags)
    write_checkpoint("3.pt", seed=3, script="cmd", arch="wrn", lr=0.2)
    models = run("0.pt", "1.pt", "2.pt", "3.pt", "--ece")["models"]
    assert list(models) == ["nrd lr=0.1 loss=ce", "nrd lr=0.2 loss=nrd", "cmd lr=0.2"]
    first, second = (run(f"{i}.pt", "--ece")["models"]["nrd"]["NLL"]["mean"] for i in range(2))
    expected = {"mean": statistics.fmean([first, second]), "std": abs(first - second) / math.sqrt(2), "n": 2}
    assert models["nrd lr=0.1 loss=ce"]["NLL"] == pytest.approx(expected) and first != second
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("tiny.npz, 20 test images (sha256 ") and lines[2].startswith("nrd lr=0.1 loss=ce  ")
    assert f"{expected['mean']:.4f} ± {expected['std']:.4f} (2)" in lines[2]


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
    ([], 0), (["--batch-size", 7], 0), (["--pgd", 1], 0), (["--pgd", 1, 2, 3], 1), (["--eps", "0.02"], 1),
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


def test_transfer_rates_that_are_there_are_not_measured_again(run, monkeypatch):
    for i in range(3):
        write_checkpoint(f"{i}.pt", seed=i)
    run("0.pt", "1.pt", "2.pt", "--transfer")
    monkeypatch.setattr(evaluate, "evaluate_transfer", None)
    assert len(run("2.pt", "1.pt", "--transfer")["transfer"]["success_rate"]) == 3


def test_the_official_files_are_read_by_block_and_row(run, monkeypatch):
    """Of 10,000 test images the 20 evenly spaced ones are those of tiny.npz.

    Severity k of corruption c holds them with some black, which ones tells 5c + k. The files are sparse.
    """
    data, rows = common.read_npz(Path("tiny.npz")), common.evenly_spaced(10000, 20).numpy()
    keep = torch.tensor([[number >> place & 1 == 0 for place in range(20)] for number in range(1, 96)])
    expected = data.test_images * keep.view(95, 20, 1, 1, 1)
    Path("official").mkdir()
    for name, severities in zip(evaluate.CORRUPTIONS, expected.split(5)):
        with open(f"official/{name}.npy", "wb") as file:  # by hand: a writable memory map takes far longer
            header = {"shape": (50000, 32, 32, 3), "fortran_order": False, "descr": "|u1"}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            file.truncate(start + 50000 * 3072)
            for k, images in enumerate(severities.permute(0, 1, 3, 4, 2).numpy()):
                for row, image in zip(rows.tolist(), images):
                    file.seek(start + (10000 * k + row) * 3072)
                    file.write(image.tobytes())
    labels = np.zeros(10000, np.uint8)
    labels[rows] = data.test_labels
    np.save("official/labels.npy", np.tile(labels, 5))
    write_checkpoint("a.pt")
    seen, real = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda model, images, **_: seen.append(images) or real(model, images))
    row = run("a.pt", "--cifar-c", "official")["models"]["nrd"]
    corrupted = [images for images in seen if not torch.equal(images, data.test_images)]
    assert torch.equal(torch.stack(corrupted), expected)
    model = common.load_model(common.load_checkpoint("a.pt"))
    mca = statistics.fmean(common.accuracy(real(model, images), data.test_labels) for images in expected)
    assert row["mCA, official (%)"]["mean"] == pytest.approx(mca)
    with pytest.raises(common.UsageError, match="--cifar-c: official/labels.npy are not the labels of tiny.npz, 13 "):
        run("a.pt", "--cifar-c", "official", "--limit-test", 13)


def test_cinic_takes_the_images_of_imagenet_class_by_class(folder, monkeypatch):
    """Six of each class lie over three splits, their red 10 · class + number; others are not taken."""
    cinic = folder / "cinic"
    files = {f"train/{name}/cifar10-train-1.png": 255 for name in evaluate.CIFAR10} | {"train/submarine/n11_0.png": 254}
    for c, name in enumerate(evaluate.CIFAR10):
        files |= {f"{split}/{name}/n0{c}_{i}.png": 10 * c + i for i, split in enumerate(["train", "valid", "test"] * 2)}
    for name, level in files.items():
        (cinic / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (level, 255 - level, 7)).save(cinic / name)
    images, labels = evaluate.load_cinic(cinic, Path("data"), seed=0, per_class=6)
    assert images.dtype == torch.uint8 and images.shape == (60, 3, 32, 32)
    assert labels.dtype == torch.int64 and labels.tolist() == [c for c in range(10) for _ in range(6)]
    red = images[:, 0, 0, 0].long()
    expected = torch.stack([red, 255 - red, red * 0 + 7], 1).byte()[..., None, None].expand_as(images)
    assert torch.equal(images, expected) and torch.equal(red // 10, labels)
    assert sorted(red.tolist()) == sorted(10 * c + i for c in range(10) for i in range(6))  # nothing else, none twice
    drawn = {seed: evaluate.load_cinic(cinic, Path("data"), seed, per_class=3)[0][:, 0, 0, 0] for seed in (0, 1)}
    assert len(drawn[0].unique()) == 30 and not torch.equal(drawn[0], drawn[1])
    monkeypatch.setattr(Image, "open", None)  # read from the cache
    assert torch.equal(evaluate.load_cinic(Path("nowhere"), Path("data"), 0, per_class=3)[0][:, 0, 0, 0], drawn[0])
    with pytest.raises(common.UsageError, match="--cinic: .*cinic has 6 images of ImageNet for airplane, not 7"):
        evaluate.load_cinic(cinic, Path("data"), 0, per_class=7)


def test_cinic_from_the_command_line(run, monkeypatch):
    images, labels = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8), torch.arange(10).repeat(3)
    monkeypatch.setattr(evaluate, "load_cinic", lambda *_: (images, labels))
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", 10).eval()
    state, built_as = {"model": model.state_dict()}, {"model": model.built_as}
    write_checkpoint("a.pt", changes={"classes": evaluate.CIFAR10, "built_as": built_as, **state})
    write_npz("ten.npz", classes=np.array(evaluate.CIFAR10))
    row = run("a.pt", "--cinic", "somewhere", "--dataset", "ten.npz")["models"]["nrd"]
    assert row["CINIC (%)"]["mean"] == pytest.approx(common.accuracy(common.predict(model, images), labels))
    assert list(row) == ["checkpoints", "accuracy (%)", "CINIC (%)"]  # what was not asked for is not there


def prefixed(state):
    return {"state_dict": {f"_orig_mod.module.{key}": value for key, value in state.items()}, "epoch": 3}


@pytest.mark.parametrize("wrap", [dict, prefixed])
def test_a_state_dict_is_evaluated_as_the_run_it_came_from(run, wrap):
    """Without mean and std, which the flags tell and which belong to the model."""
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", 3, 0.0, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]).eval()
    data = common.read_npz(Path("tiny.npz"))
    torch.save(wrap({k: v for k, v in model.state_dict().items() if k not in ("mean", "std")}), "weights.pt")
    flags = ["--ece", "--arch", "wrn-10-1", "--dataset", "tiny.npz", "--mean", 0.4, 0.5, 0.6]
    found = [run("weights.pt", *flags, "--std", *std)["models"]["weights"]["NLL"]["mean"]
             for std in ((0.2, 0.3, 0.25), (1, 1, 1))]  # fmt: skip
    expected = F.cross_entropy(common.predict(model, data.test_images), data.test_labels).item()
    assert found[0] == pytest.approx(expected, rel=1e-5) and found[1] != pytest.approx(expected, rel=1e-3)
    assert Path("weights.evaluation.json").exists() and Path("summary.json").exists()


def test_a_torchvision_model(run, monkeypatch):
    """With a file; or published weights, with the mean and std that they were trained with, here not downloaded."""
    from torchvision import models, transforms

    name, model = "squeezenet1_1", models.squeezenet1_1(num_classes=3).eval()
    torch.save(model.state_dict(), "weights.pt")
    data = common.read_npz(Path("tiny.npz"))
    flags = ["--torchvision", name, "--dataset", "tiny.npz", "--ece", "--out", "out"]
    own = run("weights.pt", *flags, "--mean", 0.4, 0.5, 0.6)["models"]["weights"]
    monkeypatch.setattr(models, "get_model", lambda name, weights: model if weights else None)
    published = run(*flags)["models"][name]
    preset = models.get_model_weights(name).DEFAULT.transforms()
    for row, mean, std in ((own, (0.4, 0.5, 0.6), (1, 1, 1)), (published, preset.mean, preset.std)):
        with torch.no_grad():
            logits = model(transforms.Normalize(mean, std)(common.to_float(data.test_images)))
        assert row["NLL"]["mean"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-4)
    assert Path("weights.evaluation.json").exists() and Path(f"out/{name}.evaluation.json").exists()


BARE = "weights.pt --dataset tiny.npz --arch"
BAD = [
    ("", "CKPT: name the checkpoint.pt of a run folder"),
    ("missing.pt", "CKPT: no file missing.pt"),
    ("tiny.npz", "CKPT: tiny.npz is damaged or no checkpoint"),
    ("weights.pt", "CKPT: weights.pt is no checkpoint of these scripts"),
    ("new.pt", "CKPT: new.pt has finished no epoch"),
    ("a.pt --transfer --teacher missing.pt", "--teacher: no file missing.pt"),
    ("a.pt --part emma", "--part: a.pt has no 'emma'; it has model, ema"),
    ("a.pt --dataset missing.npz", "--dataset: no file missing.npz"),
    ("a.pt --dataset renamed.npz", "--dataset: renamed.npz has class 'cow' where a.pt has 'cat'"),
    ("a.pt --dataset four.npz", "--dataset: four.npz has class 'dog' where a.pt has 'none'"),
    ("a.pt other.pt --transfer", "--transfer: the checkpoints have different test sets"),
    ("a.pt --cinic nowhere", "--cinic: has the classes of cifar10, not those of tiny.npz"),
    ("ten.pt --cinic nowhere", "--cinic: nowhere has 0 images of ImageNet for airplane, not 2100"),
    ("a.pt --cifar-c nowhere", "--cifar-c: no file nowhere/gaussian_noise.npy"),
    ("a.pt --cifar-c small", "--cifar-c: small/gaussian_noise.npy is [10, 32, 32, 3], not [50000, 32, 32, 3]"),
    ("weights.pt --arch wrn-10-1", "--dataset: weights do not tell what to evaluate on"),
    (f"{BARE} wrn-16", "unknown 'wrn-16'; known are"),
    (f"{BARE} wrn-10-2", "CKPT: weights.pt as wrn-10-2: Error(s) in loading state_dict"),
    (f"{BARE} wrn-10-1 --num-classes 4", "weights.pt as wrn-10-1: Error(s) in loading state_dict"),
    ("tiny.npz --dataset tiny.npz --arch wrn-10-1", "CKPT: tiny.npz is no file of weights that loads safely"),
    ("--torchvision resnet-18 --dataset tiny.npz", "resnet-18"),
    ("wide.pt --dataset tiny.npz --arch wrn-10-1 --num-classes 4", "tiny.npz has 3 classes, wide.pt has 4"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line(run, flags, says):
    checkpoint = write_checkpoint("a.pt")
    write_checkpoint("new.pt", changes={"metrics": [], "epoch": 0})
    torch.save(checkpoint["model"], "weights.pt")
    torch.save(common.build_model("wrn-10-1", 4).state_dict(), "wide.pt")
    write_npz("renamed.npz", classes=np.array(["ant", "bee", "cow"]))
    write_npz("four.npz", classes=np.array([*CLASSES, "dog"]))
    write_npz("other.npz", train_labels=np.zeros(40, int))
    write_checkpoint("other.pt", changes={"dataset": "other.npz"})
    if "ten.pt" in flags:
        write_npz("ten.npz", classes=np.array(evaluate.CIFAR10))
        write_checkpoint("ten.pt", changes={"dataset": "ten.npz", "classes": evaluate.CIFAR10})
    Path("small").mkdir()
    np.save("small/gaussian_noise.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(common.UsageError) as error:
        run(*flags.split())
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("error, status, says", [
    (common.UsageError("--flag: wrong"), 2, "error: --flag: wrong\n"),
    (KeyboardInterrupt(), 130, "\nstopped; the same command goes on"),
])  # fmt: skip
def test_the_script_ends_with_one_line_and_a_status(monkeypatch, capsys, error, status, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(common, "setup", fail)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "a.pt"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert end.value.code == status and err.startswith(says) and err.strip().count("\n") == 0


@pytest.mark.parametrize("flags", ["--pgd 0", "--eps 2", "--eps nan", "--step-size 3/2", "--restarts 0", "--frob"])
def test_a_mistyped_flag_is_argparse_s(run, capsys, flags):
    with pytest.raises(SystemExit) as end:
        run("a.pt", *flags.split())
    assert end.value.code == 2 and f"{flags.split()[0]}" in capsys.readouterr().err
