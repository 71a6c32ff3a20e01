"""evaluate.py: attacks and measures against closed forms and naive versions, then the script as a user runs it."""

import functools
import json
import math
import os
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import ROOT, write_npz
from PIL import Image

import common
import evaluate
import nrd

SMALL = ["--limit-test", 50, "--device", "cpu"]
draw_shapes_once = functools.cache(common.draw_shapes)


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    """Half a second for each of the many evaluations here is saved."""
    monkeypatch.setattr(common, "draw_shapes", draw_shapes_once)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: run folder}: two small nets that differ in their seed alone, and one of another method, on shapes."""
    folder = tmp_path_factory.mktemp("runs")
    size = ["--limit-train", 400, "--batch-size", 16, "--arch", "wrn-10-1", "--lr", 0.05, "--noise", "none", *SMALL]
    for name, loss, seed, epochs in (("ce0", "ce", 0, 5), ("ce1", "ce", 1, 5), ("nrd0", "nrd", 0, 1)):
        flags = ["--loss", loss, "--seed", seed, "--epochs", epochs, "--out", folder / name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "plot_curves", lambda *_: None)  # not looked at here
            patch.setattr(sys, "argv", ["nrd.py", *map(str, size + flags)])
            nrd.main()
    return {name: folder / name for name in ("ce0", "ce1", "nrd0")}


@pytest.fixture(scope="module")
def ckpt(runs):
    """{name: checkpoint.pt}"""
    return {name: folder / "checkpoint.pt" for name, folder in runs.items()}


@pytest.fixture
def evaluate_cli(cli):
    """evaluate_cli(*flags) runs evaluate.py in this process in an empty folder: (exit status, stdout, stderr)."""
    return functools.partial(cli, evaluate)


def read(folder):
    return json.loads((Path(folder) / "evaluation.json").read_text(encoding="utf-8"))


def results(folder, name):
    """What evaluation.json holds of a part, in the order in which it was done."""
    return [part["result"] for part in read(folder)["parts"] if part["part"] == name]


def table(out, heading):
    """{row: its cells} of the table in the output whose first column is headed so; cells are two spaces apart."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading + "  "))
    rows = [[text.strip() for text in line.split("  ") if text.strip()] for line in lines[start:]]
    names, *rows = rows[: next((i for i, row in enumerate(rows) if not row or row[0].startswith("wrote ")), None)]
    assert all(len(row) == len(names) for row in rows)
    return {row[0]: dict(zip(names[1:], row[1:])) for row in rows}


def subject_of(model, images, labels, classes=10):
    """A Subject of any module; images uint8."""
    data = common.Dataset(images[:1], labels[:1], images, labels, [str(c) for c in range(classes)])
    return evaluate.Subject("some.pt", f"{id(model)}", model.eval(), "some", Path(), "some", {}, None, data)


def trained(path):
    """The Subject in a checkpoint."""
    data = common.load_dataset("shapes", limit_test=50)
    return subject_of(common.load_model(common.load_checkpoint(path)), data.test_images, data.test_labels)


class Linear(nn.Module):
    """Two classes; logits are a linear function of the pixels."""

    def __init__(self, pixels):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2, pixels, generator=generator) / 50)
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, images):
        return F.linear(images.flatten(1) - 0.5, self.weight, self.bias)

    def optimum(self, images, labels, eps):
        """The point of the l∞ ball where the loss is largest."""
        down = (self.weight[labels] - self.weight[1 - labels]).sign().view_as(images)
        return (images - eps * down).clamp(0, 1).detach()


class Lookup(nn.Module):
    """Logits looked up by an image's first pixel, so that a test can say what is predicted for which image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits)

    def forward(self, images):
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def numbered(count, first=0):
    """Images uint8 [count, 3, 16, 16] whose pixels are their number."""
    return (torch.arange(count, dtype=torch.uint8) + first).view(-1, 1, 1, 1).repeat(1, 3, 16, 16)


def random_images(count, size=16):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    return images


# ------------------------------------------------------------------------------------------------------------------ PGD


@pytest.mark.parametrize("eps", [0.031, 8 / 255, 0.3])
def test_pgd_reaches_the_optimum_of_a_linear_model(eps):
    images, labels = common.to_float(random_images(40)), torch.arange(40) % 2
    model = Linear(images[0].numel())
    adversarial = evaluate.pgd(model, images, labels, eps, eps / 5, steps=11)  # the diameter is ten steps
    assert torch.equal(adversarial, model.optimum(images, labels, eps))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_pgd_goes_as_many_steps_as_it_is_told(steps):
    images, labels = torch.full((6, 3, 16, 16), 0.5), torch.arange(6) % 2
    model, generator = Linear(768), torch.Generator()
    start = evaluate.random_start(images, 0.3, generator.manual_seed(2))
    out = evaluate.pgd(model, images, labels, 0.3, 0.01, steps, generator.manual_seed(2))
    direction = (model.optimum(images, labels, 0.3) - images).sign()
    expected = (start + 0.01 * steps * direction).clamp(0.2, 0.8)
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("eps, step_size", [(0, 0.003), (0.031, 0.003), (0.031, 0.5), (1, 0.3), (1, 1), (0.1, 0)])
def test_pgd_stays_in_the_ball_and_in_the_range(eps, step_size):
    images, labels = common.to_float(random_images(8)), torch.arange(8) % 10
    model, before = common.build_model("wrn-10-1", 10).eval(), images.clone()
    for steps in (0, 1, 5):
        out = evaluate.pgd(model, images, labels, eps, step_size, steps)
        assert out.dtype == torch.float32 and not out.requires_grad
        assert out.min() >= 0 and out.max() <= 1 and (out - images).abs().max() <= eps + 1e-7
        assert torch.equal(out, images) == (eps == 0)
    assert torch.equal(images, before) and not images.requires_grad


def test_pgd_leaves_the_model_alone():
    images, labels = common.to_float(random_images(8)), torch.arange(8) % 10
    model = common.build_model("wrn-10-1", 10).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert any("running_mean" in key for key in before)
    evaluate.pgd(model, images, labels, steps=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training


def test_the_generator_decides_the_start():
    images, labels = common.to_float(random_images(8)), torch.arange(8) % 2
    model = Linear(images[0].numel())

    def attacked(seed):
        return evaluate.pgd(model, images, labels, steps=3, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(attacked(5), attacked(5)) and not torch.equal(attacked(5), attacked(6))
    assert torch.equal(torch.get_rng_state(), state)
    first = evaluate.pgd(model, images, labels, steps=3)  # without one it is the global generator
    assert not torch.equal(evaluate.pgd(model, images, labels, steps=3), first)
    torch.set_rng_state(state)
    assert torch.equal(evaluate.pgd(model, images, labels, steps=3), first)


def test_no_steps_are_the_random_start_which_is_uniform_in_the_ball():
    images, labels, generator = torch.full((40, 3, 16, 16), 0.5), torch.zeros(40).long(), torch.Generator()
    out = evaluate.pgd(Linear(768), images, labels, 0.1, steps=0, generator=generator.manual_seed(3))
    assert torch.equal(out, evaluate.random_start(images, 0.1, generator.manual_seed(3)))
    from scipy.stats import kstest

    assert kstest((out - images).flatten().numpy(), "uniform", (-0.1, 0.2)).pvalue > 1e-3


def pgd_args(steps, restarts=1, seed=0, step_size=0.003):
    return SimpleNamespace(pgd=steps, restarts=restarts, seed=seed, step_size=step_size)


@pytest.mark.parametrize("block", [evaluate.BLOCK, 768 * 30, 1])
def test_accuracy_under_pgd_of_a_linear_model(monkeypatch, block):
    """However many images are attacked at once."""
    monkeypatch.setattr(evaluate, "BLOCK", block)
    images = random_images(200)
    model = Linear(768)
    labels = model(common.to_float(images)).argmax(1)
    labels[::10] = 1 - labels[::10]  # some are wrong before the attack
    for eps in (0.002, 0.006, 0.015):
        worst = model(model.optimum(common.to_float(images), labels, eps)).argmax(1)
        expected = 100 * (worst == labels).double().mean().item()
        found = evaluate.evaluate_pgd(subject_of(model, images, labels, 2), eps, pgd_args([30], step_size=eps / 10))
        assert found == {"30": pytest.approx(expected, abs=1e-4)}
        assert 5 < expected < 85


def naive_pgd(subject, eps, args):
    """Every restart in full and every sample to the end; a sample counts for k where no point up to step k fools."""
    clean, labels = common.to_float(subject.test.test_images), subject.test.test_labels
    visited = [[subject.model(clean).argmax(1) != labels]] * args.restarts
    for restart in range(args.restarts):
        generator = torch.Generator().manual_seed(args.seed + restart)
        x = (clean + eps * (2 * torch.rand(clean.shape, generator=generator) - 1)).clamp(0, 1)
        wrong = list(visited[restart])
        for _ in range(max(args.pgd) + 1):
            x.requires_grad_()
            logits = subject.model(x)
            wrong.append(logits.argmax(1) != labels)
            gradient = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)[0]
            x = torch.min(torch.max(x.detach() + args.step_size * gradient.sign(), clean - eps), clean + eps)
            x = x.clamp(0, 1)
        visited[restart] = wrong
    lost = {k: torch.stack([w for wrong in visited for w in wrong[: k + 2]]).any(0) for k in args.pgd}
    return {str(k): 100 * (~lost[k]).double().mean().item() for k in args.pgd}


@pytest.mark.parametrize("batch_size", [7, 500])
@pytest.mark.parametrize("steps", [[9], [1, 2, 5, 9], [3, 4]])
def test_accuracy_under_pgd_is_that_of_a_naive_attack(steps, batch_size):
    """Of a net in double precision, so that rounding, which depends on the batch, decides nothing."""

    class Net(nn.Sequential):
        def forward(self, images):
            return super().forward(images.double())

    model = Net(nn.Flatten(), nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 10)).double()
    images = random_images(150)
    labels = model(common.to_float(images)).argmax(1)
    labels[::7] = 3
    subject = subject_of(model, images, labels)
    subject.batch_size = batch_size
    args = pgd_args(steps, restarts=3, seed=4, step_size=0.003)
    found = evaluate.evaluate_pgd(subject, 0.02, args)
    assert found == pytest.approx(naive_pgd(subject, 0.02, args), abs=1e-4)
    assert len(set(found.values())) == len(steps) and 0 < min(found.values()) < 80  # the step counts are told apart


def test_accuracy_under_pgd_falls_with_steps_eps_and_restarts(ckpt):
    subject = trained(ckpt["ce0"])
    clean = 100 * subject.right.double().mean().item()
    by_eps = [evaluate.evaluate_pgd(subject, eps, pgd_args([1, 4, 12], step_size=0.01)) for eps in (0, 0.01, 0.03, 0.1)]
    assert by_eps[0] == {k: pytest.approx(clean, abs=1e-4) for k in ("1", "4", "12")}
    for found in by_eps:
        assert found["1"] >= found["4"] >= found["12"]
    assert by_eps[3]["1"] > by_eps[3]["4"] > by_eps[3]["12"]
    last = [found["12"] for found in by_eps]
    assert last[0] > last[1] > last[2] > last[3]
    by_restarts = [evaluate.evaluate_pgd(subject, 0.3, pgd_args([1], restarts=n))["1"] for n in (1, 2, 4, 8)]
    assert by_restarts == sorted(by_restarts, reverse=True) and by_restarts[0] > by_restarts[-1]


# ------------------------------------------------------------------------------------------- clean images and corrupted


def test_clean_metrics_by_hand():
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    found = evaluate.evaluate_clean(subject_of(Lookup(logits), numbered(2), torch.tensor([0, 1]), 2))
    bins = found.pop("bins")
    assert found == {
        "accuracy": 50,
        "ece": pytest.approx((abs(1 - 0.8) + abs(0 - 0.6)) / 2),
        "nll": pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2),
        "brier": pytest.approx((2 * 0.2**2 + 2 * 0.6**2) / 2),
    }
    assert {key: len(values) for key, values in bins.items()} == {"accuracy": 15, "confidence": 15, "share": 15}
    assert sorted(bins["share"])[-3:] == [0, 0.5, 0.5]


@pytest.mark.parametrize("scale", [0.5, 3, 60])
def test_clean_metrics_are_numpy_s(scale):
    """Also where softmax is one to the last bit of float32."""
    logits = scale * torch.randn(250, 7)
    labels = torch.where(torch.rand(250) < 0.6, logits.argmax(1), torch.randint(0, 7, (250,)))
    found = evaluate.evaluate_clean(subject_of(Lookup(logits), numbered(250), labels, 7))
    z, y = logits.double().numpy(), labels.numpy()
    log_p = z - z.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    p, hit = np.exp(log_p), z.argmax(1) == y
    which = np.digitize(p.max(1), np.linspace(0, 1, 16), right=True) - 1
    ece = sum((which == b).mean() * abs(hit[which == b].mean() - p.max(1)[which == b].mean()) for b in set(which))
    assert found["accuracy"] == pytest.approx(100 * hit.mean(), abs=1e-4)
    assert found["ece"] == pytest.approx(ece, abs=1e-9)
    assert found["nll"] == pytest.approx(-log_p[np.arange(250), y].mean(), rel=1e-9)
    assert found["brier"] == pytest.approx(((p - np.eye(7)[y]) ** 2).sum(1).mean(), rel=1e-9)
    for b in range(15):
        inside = which == b
        assert found["bins"]["share"][b] == pytest.approx(inside.mean())
        assert found["bins"]["accuracy"][b] == pytest.approx(hit[inside].mean() if inside.any() else 0)
        assert found["bins"]["confidence"][b] == pytest.approx(p.max(1)[inside].mean() if inside.any() else 0)


def test_natural_robustness_by_hand():
    """Four images of class 0, the first two right when clean; image 4k + i is image i at severity k."""
    right = ["1100", "1000", "0100", "0011", "1111", "0000"]
    logits = torch.tensor([[1.0, 0] if bit == "1" else [0, 1.0] for bit in "".join(right)])
    subject = subject_of(Lookup(logits), numbered(4), torch.zeros(4).long(), 2)
    found = evaluate.evaluate_corruption(subject, lambda severity: numbered(4, 4 * severity))
    assert found == {"accuracy": [25, 25, 50, 100, 0], "natural_robustness": [50, 50, 0, 100, 0]}


def test_natural_robustness_is_null_where_nothing_is_right():
    subject = subject_of(Lookup(torch.tensor([[0, 1.0]] * 3 + [[1.0, 0]])), numbered(3), torch.zeros(3).long(), 2)
    found = evaluate.evaluate_corruption(subject, lambda severity: numbered(3, 1))
    assert found == {"accuracy": [pytest.approx(100 / 3)] * 5, "natural_robustness": [None] * 5}
    assert json.loads(json.dumps(found))["natural_robustness"] == [None] * 5


# ------------------------------------------------------------------------------------------------------------- transfer


def transfer_args(seed=0, eps=0.031, step_size=0.003):
    return SimpleNamespace(seed=seed, eps=[eps], step_size=step_size)


def test_transfer_to_itself_is_the_white_box_attack(ckpt):
    """PGD-20: with so small a step, other numbers of steps fool other samples."""
    source, other = trained(ckpt["ce0"]), trained(ckpt["ce1"])
    found = evaluate.evaluate_transfer(source, [source, other], transfer_args(3, 0.03, 0.0005))
    images, labels = common.to_float(source.test.test_images), source.test.test_labels
    rows = source.right.nonzero().squeeze(1)

    def fooled(steps):
        generator = torch.Generator().manual_seed(3)
        attacked = evaluate.pgd(source.model, images[rows], labels[rows], 0.03, 0.0005, steps, generator)
        return {s: s.model(attacked).argmax(1) != labels[rows] for s in (source, other)}

    rates = {steps: 100 * fooled(steps)[source].double().mean().item() for steps in (10, 20, 30)}
    both = other.right[rows]
    assert found[source.sha256] == pytest.approx(rates[20]) and len(set(rates.values())) == 3
    assert found[other.sha256] == pytest.approx(100 * fooled(20)[other][both].double().mean().item())
    assert found[source.sha256] > found[other.sha256] and 0 < both.sum() < len(rows)


class Knows(nn.Module):
    """Class 0 for the clean images in one set, and for the attacked images in another."""

    def __init__(self, clean, attacked):
        super().__init__()
        self.bits = torch.tensor([[bit == "1" for bit in clean], [bit == "1" for bit in attacked]])

    def forward(self, images):
        levels = images.flatten(1) * 255
        attacked = ((levels - levels.round()).abs().amax(1) > 1e-3).long()
        zero = self.bits[attacked, levels[:, 0].round().long()].float().view(-1, 1)
        return torch.cat([zero, 1 - zero], 1) + 0 * images.sum((1, 2, 3)).view(-1, 1)


def test_a_sample_that_is_wrong_when_clean_is_lost_whatever_the_attack_does():
    """The third is misclassified at its own pixels, and nowhere else."""
    subject = subject_of(Knows("110", "111"), numbered(3), torch.zeros(3).long(), 2)
    assert evaluate.evaluate_pgd(subject, 0.0015, pgd_args([1, 3])) == pytest.approx(dict.fromkeys("13", 200 / 3))


def test_only_samples_that_both_classify_correctly_count():
    """The attack does no more than mark the images: its gradient is nought, its ball less than half a level."""
    labels = torch.zeros(6).long()
    source, target, lost = (
        subject_of(Knows(*bits), numbered(6), labels, 2)
        for bits in (("111100", "111111"), ("111010", "011000"), ("000011", "111111"))
    )
    source.batch_size = 4
    found = evaluate.evaluate_transfer(source, [source, target, lost], transfer_args(eps=0.0015))
    assert found == {source.sha256: 0, target.sha256: pytest.approx(100 / 3), lost.sha256: None}


def test_transfer_table(evaluate_cli, ckpt, tmp_path):
    """Targets in rows, sources in columns; the teacher is a source alone, its column behind the students' mean."""
    names = ["ce0", "ce1", "nrd0"]
    checkpoint = common.load_checkpoint(ckpt["ce0"])
    torch.save({**checkpoint, "model": checkpoint["ema"]}, tmp_path / "teacher.pt")
    flags = ["--transfer", "--teacher", "teacher.pt", "--eps", "2/255", *SMALL, "--out", "out"]
    status, out, err = evaluate_cli(*(ckpt[name] for name in names), *flags)
    assert (status, err) == (0, "")
    found = read("out")["transfer"]
    assert found["columns are sources"] == ["ce seed 0", "ce seed 1", "nrd", "mean", "teacher"]
    assert found["rows are targets"] == ["ce seed 0", "ce seed 1", "nrd", "mean"]
    digests = [part["sha256"] for part in read("out")["parts"] if part["part"] == "clean"]
    sources = results("out", "transfer")
    students, teacher = [[source[d] for d in digests] for source in sources[:3]], [sources[3][d] for d in digests]
    body = [[*targets, statistics.fmean(targets), own] for *targets, own in zip(*students, teacher)]
    assert found["success_rate"][:3] == [pytest.approx(row) for row in body]
    assert found["success_rate"][3] == pytest.approx([statistics.fmean(column) for column in zip(*body)])
    assert len({value for row in students for value in row}) > 4
    rows = table(out, "success rate (%), source → / target ↓")
    for name, row in zip(found["rows are targets"], found["success_rate"]):
        assert rows[name] == dict(zip(found["columns are sources"], (f"{value:.2f}" for value in row)))
    assert matplotlib.image.imread("out/transfer.png").shape[1] > 500


def test_transfer_between_runs_of_one_seed_keeps_both(evaluate_cli, ckpt, tmp_path):
    """Such as one computed on a GPU and one on a CPU: they have the same flags, but are two models."""
    for name in ("here", "there"):
        checkpoint = torch.load(ckpt["ce0"], weights_only=True)
        checkpoint["model"]["head.4.bias"] += 1e-3 * (name == "there")
        torch.save(checkpoint, tmp_path / f"{name}.pt")
    status, out, err = evaluate_cli("here.pt", "there.pt", "--transfer", *SMALL, "--out", "out")
    assert (status, err) == (0, "")
    found = read("out")["transfer"]
    assert len(found["rows are targets"]) == len(found["success_rate"]) == 3
    assert len(set(found["rows are targets"])) == 3


# ------------------------------------------------------------------------------------------------ from the command line


def test_a_first_evaluation_as_a_user(script, runs, tmp_path):
    """Without a choice: accuracy, calibration and PGD-20, beside the checkpoint."""
    shutil.copytree(runs["ce0"], tmp_path / "run")
    result = script("evaluate.py", "run/checkpoint.pt", *SMALL)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\r" not in result.stdout and result.stdout.splitlines()[-1] == "wrote run/evaluation.json"
    written = {p.name for p in (tmp_path / "run").iterdir()} - {p.name for p in runs["ce0"].iterdir()}
    assert written == {"evaluation.json", "reliability.png"}
    assert matplotlib.image.imread(tmp_path / "run/reliability.png").shape[0] > 300

    found = read(tmp_path / "run")["models"]["ce"]
    metrics = json.loads((runs["ce0"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert found.pop("checkpoints") == ["run/checkpoint.pt"]
    assert found["accuracy (%)"]["mean"] == pytest.approx(metrics["test_acc"], abs=1e-3) and metrics["test_acc"] > 30
    assert list(found) == ["accuracy (%)", "ECE", "NLL", "Brier", "PGD-20, ε 0.031 (%)"]
    row = table(result.stdout, "model")["ce"]
    digits = [2, 4, 4, 4, 2]
    assert row == {name: f"{v['mean']:.{d}f}" for (name, v), d in zip(found.items(), digits)}
    assert found["PGD-20, ε 0.031 (%)"]["mean"] < found["accuracy (%)"]["mean"]
    assert all((v["std"], v["n"]) == (None, 1) for v in found.values())


def test_the_part_asked_for_is_evaluated(evaluate_cli, runs, ckpt):
    metrics = json.loads((runs["nrd0"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["test_acc"] != metrics["ema_test_acc"]
    for part, key in (("model", "test_acc"), ("ema", "ema_test_acc")):
        status, _, err = evaluate_cli(ckpt["nrd0"], "--ece", "--part", part, *SMALL, "--out", "out")
        assert (status, err) == (0, "")
        assert read("out")["models"]["nrd"]["accuracy (%)"]["mean"] == pytest.approx(metrics[key], abs=1e-3)


def test_seeds_are_grouped(evaluate_cli, ckpt):
    """Mean ± sample standard deviation (n) in the table, and in evaluation.json."""
    status, out, err = evaluate_cli(*ckpt.values(), "--ece", *SMALL, "--out", "out")
    assert (status, err) == (0, "")
    models = read("out")["models"]
    own = {name: result for name, result in zip(ckpt, results("out", "clean"))}
    assert models.keys() == {"ce", "nrd"}
    assert sorted(models["ce"]["checkpoints"]) == sorted(str(ckpt[name]) for name in ("ce0", "ce1"))
    rows = table(out, "model")
    for name, key, digits in (("accuracy (%)", "accuracy", 2), ("NLL", "nll", 4), ("ECE", "ece", 4)):
        a, b = (own[run][key] for run in ("ce0", "ce1"))
        mean, std = (a + b) / 2, abs(a - b) / math.sqrt(2)  # of two values, divided by n - 1
        assert models["ce"][name] == {"mean": pytest.approx(mean), "std": pytest.approx(std), "n": 2} and std > 0
        assert rows["ce"][name] == f"{mean:.{digits}f} ± {std:.{digits}f} (2)"
        assert rows["nrd"][name] == f"{own['nrd0'][key]:.{digits}f}"


def test_groups_are_told_apart_by_what_differs():
    def subject(method, path, seed=0, **config):
        return evaluate.Subject(path, path, None, "d", Path(), method, config, seed)

    a, b = subject("sr", "a", 0, lr=0.1, sigma=0.05), subject("sr", "b", 1, lr=0.1, sigma=0.05)
    c, d = subject("sr", "c", 0, lr=0.1, sigma=0.2), subject("kd", "d", 0, lr=0.1)
    assert evaluate.grouped([a, c, b, d]) == {"sr sigma=0.05": [a, b], "sr sigma=0.2": [c], "kd": [d]}
    e, f = subject("weights", "x/weights.pt", None), subject("weights", "y/weights.pt", None)
    assert list(evaluate.grouped([e, f]).values()) == [[e], [f]]  # without flags to compare, files stay apart


@pytest.mark.filterwarnings("error")
def test_sweeps(evaluate_cli, ckpt):
    """Steps by ε as Table 4 and Table 5 have them: a number a column, with pgd.png."""
    flags = ["--restarts", 1, *SMALL, "--out", "out"]
    status, out, err = evaluate_cli(ckpt["ce0"], ckpt["ce1"], "--pgd", 3, 1, 3, "--eps", 8 / 255, "0", *flags)
    assert (status, err) == (0, "") and matplotlib.image.imread("out/pgd.png").shape[1] > 1000
    models = read("out")["models"]["ce"]
    rows = table(out, "accuracy (%) under PGD, steps")
    assert list(rows) == ["ce, ε 0/255", "ce, ε 8/255"]
    for name, row in rows.items():
        assert list(row) == ["1", "3"]
        for steps, text in row.items():
            found = models[f"PGD-{steps},{name[3:]} (%)"]
            assert text == f"{found['mean']:.2f} ± {found['std']:.2f} (2)"
    assert models["PGD-3, ε 0/255 (%)"] == models["accuracy (%)"] != models["PGD-3, ε 8/255 (%)"]

    status, out, err = evaluate_cli(ckpt["ce0"], "--pgd", 3, "--eps", "1/255", "8/255", 0.02, *flags)
    rows = table(out, "accuracy (%) under PGD-3, ε")
    assert (status, err) == (0, "") and list(rows) == ["ce"] and list(rows["ce"]) == ["1/255", "0.02", "8/255"]
    assert float(rows["ce"]["1/255"]) > float(rows["ce"]["8/255"])


def test_fractions():
    assert evaluate.fraction("8/255") == 8 / 255 and evaluate.fraction("0.031") == 0.031
    assert evaluate.fraction("1") == 1 and evaluate.fraction("0/255") == 0
    assert evaluate.eps_name(8 / 255) == "8/255" and evaluate.eps_name(0.031) == "0.031"


def test_fractions_reach_the_attack(evaluate_cli, ckpt):
    status, _, err = evaluate_cli(
        ckpt["ce0"], "--pgd", 1, "--eps", "2/255", "--step-size", "1/510", *SMALL, "--out", "out"
    )
    assert (status, err) == (0, "")
    (settings,) = (part["settings"] for part in read("out")["parts"] if part["part"] == "PGD")
    expected = evaluate.evaluate_pgd(trained(ckpt["ce0"]), 2 / 255, pgd_args([1], 5, step_size=1 / 510))
    assert (settings["eps"], settings["step_size"]) == (2 / 255, 1 / 510)
    assert results("out", "PGD") == [pytest.approx(expected, abs=1e-3)]
    assert not Path("out/pgd.png").exists() and not Path("out/reliability.png").exists()


def test_generated_corruptions(evaluate_cli, ckpt):
    flags = ["--cifar-c", "--show-corruptions", "--seed", 3, "--limit-test", 20, "--device", "cpu", "--out", "out"]
    status, out, err = evaluate_cli(ckpt["ce0"], *flags)
    assert (status, err) == (0, "")
    found = [(part["settings"]["corruption"], part["result"]) for part in read("out")["parts"][1:]]
    assert [name for name, _ in found] == list(evaluate.SEVERITIES)
    assert all(len(result["accuracy"]) == 5 for _, result in found)
    summary = read("out")["models"]["ce"]
    mca = statistics.fmean(value for _, result in found for value in result["accuracy"])
    robust = statistics.fmean(value for _, result in found for value in result["natural_robustness"])
    assert summary["mCA, generated (%)"]["mean"] == pytest.approx(mca) and robust > mca
    assert summary["natural robustness (%)"]["mean"] == pytest.approx(robust)
    assert table(out, "model")["ce"]["mCA, generated (%)"] == f"{mca:.2f}"

    data = common.load_dataset("shapes", limit_test=20)
    model = common.load_model(common.load_checkpoint(ckpt["ce0"]))
    for name, severity in (("gaussian_noise", 2), ("elastic_transform", 5)):
        logits = common.predict(model, evaluate.corrupt(data.test_images, name, severity, seed=3))
        expected = common.accuracy(logits, data.test_labels)
        assert dict(found)[name]["accuracy"][severity - 1] == pytest.approx(expected)
    for name in ("cifar-c.png", "corruptions.png"):
        assert matplotlib.image.imread(f"out/{name}").shape[0] > 800


@pytest.mark.filterwarnings("error")
def test_a_model_that_is_never_right_has_no_natural_robustness(evaluate_cli, ckpt, tmp_path):
    data = common.load_dataset("shapes", limit_test=4)
    logits = common.predict(common.load_model(common.load_checkpoint(ckpt["ce0"])), data.test_images)
    classes = np.array(data.classes)
    arrays = {"test_images": data.test_images.numpy(), "test_labels": logits.argmin(1).numpy(), "classes": classes}
    path = write_npz(tmp_path / "wrong.npz", **arrays)
    status, out, err = evaluate_cli(ckpt["ce0"], "--cifar-c", "--dataset", path, "--device", "cpu", "--out", "out")
    assert (status, err) == (0, "")
    assert read("out")["models"]["ce"]["natural robustness (%)"] == {"mean": None, "std": None, "n": 0}
    row = table(out, "model")["ce"]
    assert (row["accuracy (%)"], row["natural robustness (%)"]) == ("0.00", "–")


def test_show_corruptions_needs_no_checkpoint(evaluate_cli):
    status, out, err = evaluate_cli("--show-corruptions", "--dataset", "shapes", *SMALL)
    assert (status, err) == (0, "") and out == "wrote runs/evaluation/corruptions.png\n"
    picture = matplotlib.image.imread("runs/evaluation/corruptions.png")
    assert picture.shape[0] > 1500 and picture[..., :3].std() > 0.1
    assert [p.name for p in Path("runs/evaluation").iterdir()] == ["corruptions.png"]


def test_a_terminal_gets_a_live_line(evaluate_cli, ckpt, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, _ = evaluate_cli(ckpt["ce0"], "--pgd", 5, "--restarts", 1, *SMALL, "--out", "out")
    line = out.split("\r")[1]
    assert status == 0 and line.startswith("PGD, ε 0.031, on ") and " %  " in line and "left" in line
    assert "\nmodel" in out and out.splitlines()[-1] == "wrote out/evaluation.json"


# ------------------------------------------------------------------------------------------------- the official CIFAR-C


@pytest.fixture(scope="module")
def cifar_c(tmp_path_factory):
    """A folder as CIFAR-10-C is, but sparse, and a data set of 10,000 test images, of which 20 evenly spaced are drawn.

    Severity k of corruption c holds those 20 with some of them black, which ones tells 5c + k.
    """
    folder = tmp_path_factory.mktemp("cifar-c")
    images, labels = common.load_dataset("shapes", limit_test=20)[2:4]
    rows = common.spread(10000, 20).numpy()
    header = {"shape": (50000, 32, 32, 3), "fortran_order": False, "descr": "|u1"}
    for c, name in enumerate(evaluate.SEVERITIES):
        with open(folder / f"{name}.npy", "wb") as file:  # by hand: a writable memory map takes far longer
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            file.truncate(start + math.prod(header["shape"]))
            for k in range(1, 6):
                for row, image in zip(rows, blackened(images, 5 * c + k)):
                    file.seek(start + (10000 * (k - 1) + int(row)) * image.numel())
                    file.write(image.permute(1, 2, 0).numpy().tobytes())
    all_labels = np.random.default_rng(0).integers(0, 10, 10000)
    all_labels[rows] = labels
    np.save(folder / "labels.npy", np.tile(all_labels, 5).astype(np.uint8))
    test_images = np.zeros((10000, 3, 32, 32), np.uint8)
    test_images[rows] = images
    classes = np.array(common.SHAPES_CLASSES)
    write_npz(folder / "data.npz", test_images=test_images, test_labels=all_labels, classes=classes)
    return folder


def blackened(images, number):
    """The images, those black whose place has a one in the binary digits of the number."""
    keep = [number >> place & 1 == 0 for place in range(len(images))]
    return images * torch.tensor(keep).view(-1, 1, 1, 1)


def test_the_official_files_are_read_by_block_and_row(evaluate_cli, ckpt, cifar_c):
    flags = ["--cifar-c", cifar_c, "--dataset", cifar_c / "data.npz", "--limit-test", 20, "--device", "cpu"]
    status, out, err = evaluate_cli(ckpt["ce0"], *flags, "--out", "out")
    assert (status, err) == (0, "")
    model, data = common.load_model(common.load_checkpoint(ckpt["ce0"])), common.load_dataset("shapes", limit_test=20)
    found = {part["settings"]["corruption"]: part for part in read("out")["parts"][1:]}
    expected = [
        common.accuracy(common.predict(model, blackened(data.test_images, number)), data.test_labels)
        for number in range(1, 96)
    ]
    assert len(set(expected)) > 3
    for c, name in enumerate(evaluate.SEVERITIES):
        assert found[name]["result"]["accuracy"] == pytest.approx(expected[5 * c : 5 * c + 5])
        assert found[name]["settings"]["source"] == evaluate.file_digest(cifar_c / f"{name}.npy")


def test_the_official_images_are_those_in_the_file(cifar_c):
    data = common.load_dataset(cifar_c / "data.npz", limit_test=20)
    official = evaluate.official_corruptions(cifar_c, [SimpleNamespace(test=data, dataset="data")])
    for c, name in enumerate(evaluate.SEVERITIES):
        for k in range(1, 6):
            found = evaluate.corrupted_images(official, data.test_images, name, k, seed=0)
            assert found.is_contiguous() and torch.equal(found, blackened(data.test_images, 5 * c + k))


def damage(name, change):
    """A case: the file `name` of the folder, and what replaces it."""
    return pytest.param(name, change, id=f"{name}-{change.__name__ if callable(change) else 'missing'}")


def garbage(path):
    path.write_bytes(b"\x93NUMPY but not quite")


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, images=np.zeros(3))


def only_one_severity(path):
    np.save(path, np.zeros((10000, 32, 32, 3), np.uint8))


def floats(path):
    np.lib.format.open_memmap(path, "w+", np.float32, (50000, 32, 32, 3))


def other_labels(path):
    np.save(path, np.zeros(50000, np.int64))


def float_labels(path):
    np.save(path, np.zeros(50000))


CASES = [("fog", None), ("labels", None), ("fog", garbage), ("fog", archive), ("fog", only_one_severity)]
CASES += [("fog", floats), ("labels", other_labels), ("labels", float_labels), ("labels", only_one_severity)]


@pytest.mark.parametrize("name, change", [damage(*case) for case in CASES])
def test_other_files_are_refused_by_name(evaluate_cli, ckpt, cifar_c, tmp_path, name, change):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for path in cifar_c.glob("*.npy"):
        if path.stem != name:
            (folder / path.name).symlink_to(path)
    if change:
        change(folder / f"{name}.npy")
    flags = ["--cifar-c", "CIFAR-10-C", "--dataset", cifar_c / "data.npz", "--limit-test", 20, "--device", "cpu"]
    status, _, err = evaluate_cli(ckpt["ce0"], *flags, "--out", "out")
    assert status == 2 and err.startswith("error: --cifar-c: ") and err.count("\n") == 1
    assert f"CIFAR-10-C/{name}.npy" in err and not Path("out").exists()


def test_labels_must_be_those_of_the_rows_that_are_read(cifar_c):
    """CIFAR-C holds 10,000 images: a smaller test set must be spread over them as these 20 are, and these 13 not."""
    for count in (20, 13):
        subject = SimpleNamespace(test=common.load_dataset("shapes", limit_test=count), dataset="shapes")
        if count == 20:
            assert len(evaluate.official_corruptions(cifar_c, [subject])) == 19
        else:
            with pytest.raises(common.UsageError, match="labels.npy are not the labels of shapes's test set"):
                evaluate.official_corruptions(cifar_c, [subject])


# ---------------------------------------------------------------------------------------------------------------- CINIC


def write_png(path, level, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size[1], size[0]), (level, 255 - level, 7)).save(path)


@pytest.fixture
def cinic(tmp_path):
    """A folder as CINIC-10 is: six images of ImageNet a class over three splits, their red 10 · class + number."""
    folder = tmp_path / "cinic"
    for c, name in enumerate(evaluate.CIFAR10):
        for i, split in enumerate(["train", "valid", "test"] * 2):
            write_png(folder / split / name / f"n0{c}_{i}.png", 10 * c + i)
        write_png(folder / "train" / name / "cifar10-train-1.png", 255)
    write_png(folder / "train" / "submarine" / "n11_0.png", 254)
    write_png(folder / "n12_0.png", 253)
    return folder


def test_cinic_takes_the_images_of_imagenet_class_by_class(cinic, tmp_path):
    images, labels = evaluate.load_cinic(cinic, tmp_path / "data", seed=0, per_class=6)
    assert images.dtype == torch.uint8 and images.shape == (60, 3, 32, 32)
    assert labels.dtype == torch.int64 and labels.tolist() == [c for c in range(10) for _ in range(6)]
    red = images[:, 0, 0, 0].long()
    assert torch.equal(images, torch.stack([red, 255 - red, red * 0 + 7], 1).byte()[..., None, None].expand_as(images))
    assert sorted(red.tolist()) == sorted(10 * c + i for c in range(10) for i in range(6))  # nothing else, none twice
    assert torch.equal(red // 10, labels)


def test_cinic_draws_by_seed(cinic, tmp_path):
    def drawn(seed, cache):
        return evaluate.load_cinic(cinic, tmp_path / cache, seed, per_class=3)[0][:, 0, 0, 0].tolist()

    first = drawn(0, "a")
    assert len(set(first)) == 30 and drawn(0, "b") == first and drawn(1, "a") != first and drawn(0, "a") == first
    assert len({tuple(i % 10 for i in first[3 * c : 3 * c + 3]) for c in range(10)}) > 1  # a draw for each class


def test_cinic_is_cached(cinic, tmp_path, monkeypatch, capsys):
    opened, real = [], evaluate.pil_loader
    monkeypatch.setattr(evaluate, "pil_loader", lambda path: opened.append(path) or real(path))

    def load():
        opened.clear()
        images, labels = evaluate.load_cinic(cinic, tmp_path / "data", 0, per_class=5)
        return images, labels, len(opened)

    images, labels, count = load()
    assert count == 50
    again, same, count = load()
    assert count == 0 and torch.equal(again, images) and torch.equal(same, labels)
    (cache,) = (tmp_path / "data").iterdir()

    whole = cache.read_bytes()
    for damaged in (whole[:1000], b"", b"something else"):
        cache.write_bytes(damaged)
        capsys.readouterr()
        again, _, count = load()
        assert count == 50 and torch.equal(again, images) and str(cache) in capsys.readouterr().out
    write_npz(cache)  # another file of that name
    assert load()[2] == 50 and load()[2] == 0

    victim = next(path for path in sorted(cinic.rglob("cat/n0*.png")) if str(path) in opened_names(cache, cinic))
    victim.rename(victim.with_name("n0_new.png"))
    changed, _, count = load()
    assert count == 50 and changed.shape == images.shape
    assert [p.name for p in (tmp_path / "data").iterdir()] == [cache.name]


def opened_names(cache, folder):
    with np.load(cache) as saved:
        return {str(folder / file.rsplit(" ", 2)[0]) for file in saved["files"].tolist()}


def test_cinic_refuses_by_name(cinic, tmp_path):
    def refusal(per_class=6, folder=cinic):
        with pytest.raises(common.UsageError) as caught:
            evaluate.load_cinic(folder, tmp_path / "data", 0, per_class)
        assert not (tmp_path / "data").exists()
        return str(caught.value)

    assert f"no folder {tmp_path / 'nowhere'}" in refusal(folder=tmp_path / "nowhere")
    assert "6 images of ImageNet for class airplane, 7 are needed" in refusal(7)
    for path in cinic.glob("*/deer/n0*.png"):
        path.rename(path.with_suffix(".jpg"))
    assert "0 images of ImageNet for class deer" in refusal()
    (tmp_path / "empty").mkdir()
    assert "empty has 0 images of ImageNet for class airplane" in refusal(folder=tmp_path / "empty")


@pytest.mark.parametrize("size", [(16, 16), (32, 33), (64, 32), (1, 1), (32, 1)])
def test_cinic_refuses_images_of_another_size(cinic, tmp_path, size):
    path = cinic / "valid" / "dog" / "n05_1.png"
    write_png(path, 51, size)
    with pytest.raises(common.UsageError, match=f"--cinic: .*{path.relative_to(cinic)} is no 32×32 PNG image"):
        evaluate.load_cinic(cinic, tmp_path / "data", 0, per_class=6)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n and then nothing", None])
def test_cinic_refuses_broken_images(cinic, tmp_path, content):
    path = cinic / "valid" / "dog" / "n05_1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(common.UsageError, match=f"--cinic: .*{path.relative_to(cinic)} is no 32×32 PNG image"):
        evaluate.load_cinic(cinic, tmp_path / "data", 0, per_class=6)
    assert not (tmp_path / "data").exists()


@pytest.fixture
def ten(tmp_path):
    """A data set with CIFAR-10's classes."""
    return write_npz(tmp_path / "ten.npz", classes=np.array(evaluate.CIFAR10))


def fill_with_shapes(folder):
    """Put what the nets here have learnt into a folder of CINIC, class by class, under the names of its files."""
    shapes = common.load_dataset("shapes")
    for c, name in enumerate(evaluate.CIFAR10):
        pictures = shapes.test_images[shapes.test_labels == c].permute(0, 2, 3, 1).numpy()
        for path, picture in zip(sorted(folder.glob(f"*/{name}/n0*.png")), pictures):
            Image.fromarray(picture).save(path)


def test_cinic_from_the_command_line(evaluate_cli, ckpt, cinic, ten, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_cinic", functools.partial(evaluate.load_cinic, per_class=6))
    fill_with_shapes(cinic)
    flags = ["--cinic", cinic, "--dataset", ten, "--data-dir", "cache", "--device", "cpu", "--out", "out"]
    status, out, err = evaluate_cli(ckpt["ce0"], *flags)
    assert (status, err) == (0, "")
    images, labels = evaluate.load_cinic(cinic, tmp_path / "another cache", 0)
    expected = common.accuracy(common.predict(common.load_model(common.load_checkpoint(ckpt["ce0"])), images), labels)
    assert read("out")["models"]["ce"]["CINIC (%)"] == {"mean": pytest.approx(expected), "std": None, "n": 1}
    assert table(out, "model")["ce"]["CINIC (%)"] == f"{expected:.2f}" and expected > 30
    assert not {"ECE", "PGD-20, ε 0.031 (%)"} & read("out")["models"]["ce"].keys()  # what was not asked for


def test_another_folder_of_cinic_is_measured_anew(evaluate_cli, ckpt, cinic, ten, tmp_path, monkeypatch):
    """Even where its files have the same names: it is another test set."""
    monkeypatch.setattr(evaluate, "load_cinic", functools.partial(evaluate.load_cinic, per_class=6))
    shutil.copytree(cinic, tmp_path / "other")
    fill_with_shapes(tmp_path / "other")
    found = []
    for folder in ("cinic", "other"):
        flags = [
            "--cinic",
            folder,
            "--dataset",
            ten,
            "--data-dir",
            f"cache-{folder}",
            "--device",
            "cpu",
            "--out",
            "out",
        ]
        assert evaluate_cli(ckpt["ce0"], *flags)[0] == 0
        found.append(read("out")["models"]["ce"]["CINIC (%)"]["mean"])
    assert found[1] > found[0] + 10


# -------------------------------------------------------------------------------------------- interrupted and continued

SWEEP = ["--pgd", 4, 12, "--eps", "0.001", "0.002", "0.003", "0.004", "--restarts", 1, "--ece", *SMALL]


def test_a_killed_evaluation_goes_on_to_the_same_end(evaluate_cli, ckpt, tmp_path):
    """SIGKILL as soon as a part of PGD is in evaluation.json, against an evaluation that nobody disturbed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert evaluate_cli(ckpt["ce0"], *SWEEP, "--out", whole)[0] == 0

    command = [sys.executable, str(ROOT / "evaluate.py"), str(ckpt["ce0"]), *map(str, SWEEP), "--out", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (broken / "evaluation.json").exists() or not results(broken, "PGD"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    done = len(results(broken, "PGD"))
    assert process.returncode == -signal.SIGKILL and 1 <= done <= 3 and "models" not in read(broken)

    status, out, err = evaluate_cli(ckpt["ce0"], *SWEEP, "--out", broken)
    assert (status, err) == (0, "") and out.count("  took ") == 4 - done  # the rest alone is computed
    assert read(broken) == read(whole)
    assert sorted(p.name for p in broken.iterdir()) == ["evaluation.json", "pgd.png", "reliability.png"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopping_says_how_to_go_on(ckpt, monkeypatch, capsys, tmp_path, sent):
    """The script itself, stopped while it measures the second checkpoint: what it has of the first is kept."""
    calls, real = [], common.calibration

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(sent)
        return real(*arguments)

    monkeypatch.setattr(common, "calibration", stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without
    flags = [ckpt["ce0"], ckpt["ce1"], "--ece", *SMALL, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    line = "stopped; the same command goes on from evaluation.json, which holds the parts that are done\n"
    assert end.value.code == 130 and capsys.readouterr().err == line
    assert [part["checkpoint"] for part in read(tmp_path)["parts"]] == [str(ckpt["ce0"])]


CHANGES = {  # flags of the second evaluation: the parts that may come from the first
    (): {"clean", "PGD"},
    ("--batch-size", 17): {"clean", "PGD"},
    ("--seed", 1): {"clean"},
    ("--eps", "0.02"): {"clean"},
    ("--step-size", "0.004"): {"clean"},
    ("--restarts", 2): {"clean"},
    ("--pgd", 2): {"clean"},
    ("--limit-test", 40): set(),
    ("--part", "ema"): set(),
    ("--dataset", "same-names.npz"): set(),
    ("another checkpoint",): set(),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(map(str, change)) or "none")
def test_what_is_done_is_not_done_again_unless_it_would_differ(evaluate_cli, ckpt, tmp_path, change):
    """The first results are altered: where they come back they were read, where not they were computed."""
    path = tmp_path / "checkpoint.pt"
    shutil.copy(ckpt["ce0"], path)
    shapes = common.load_dataset("shapes", limit_test=50)
    arrays = {key: getattr(shapes, key).numpy() for key in ("test_images", "test_labels")}
    write_npz(tmp_path / "same-names.npz", **arrays, classes=np.array(shapes.classes))
    first = ["--pgd", 1, "--restarts", 1, "--eps", "0.01", *SMALL]
    if "--dataset" in change:  # the same name, and the same number of images, but others
        first += ["--dataset", "same-names.npz"]
    assert evaluate_cli(path, *first)[0] == 0
    stored = read(tmp_path)
    for part in stored["parts"]:
        part["result"] |= {"accuracy": 777.0} if part["part"] == "clean" else {"1": 777.0}
    (tmp_path / "evaluation.json").write_text(json.dumps(stored))
    if "--dataset" in change:
        write_npz(tmp_path / "same-names.npz", **arrays | {"test_images": 255 - arrays["test_images"]},
                  classes=np.array(shapes.classes))  # fmt: skip
    flags = change
    if change == ("another checkpoint",):
        flags = ()
        shutil.copy(ckpt["ce1"], path)
    status, _, err = evaluate_cli(path, *first, *flags)
    assert (status, err) == (0, "")
    (found,) = read(tmp_path)["models"].values()
    (attack,) = (value for name, value in found.items() if name.startswith("PGD"))
    assert (found["accuracy (%)"]["mean"] == 777) == ("clean" in CHANGES[change])
    assert (attack["mean"] == 777) == ("PGD" in CHANGES[change])


def test_a_larger_command_does_only_what_is_missing(evaluate_cli, ckpt, monkeypatch):
    attack = ["--pgd", 1, "--restarts", 1, *SMALL, "--out", "out"]
    assert evaluate_cli(ckpt["ce0"], *attack, "--eps", "0.01")[0] == 0
    measured = []
    for name in ("evaluate_clean", "evaluate_pgd"):
        real = getattr(evaluate, name)
        monkeypatch.setattr(evaluate, name, lambda s, *a, n=name, f=real: measured.append((n, s.path)) or f(s, *a))
    assert evaluate_cli(ckpt["ce0"], ckpt["ce1"], *attack, "--eps", "0.01", "0.02")[0] == 0
    ce0, ce1 = str(ckpt["ce0"]), str(ckpt["ce1"])
    assert measured == [("evaluate_clean", ce1), ("evaluate_pgd", ce0), ("evaluate_pgd", ce1), ("evaluate_pgd", ce1)]
    assert len(read("out")["parts"]) == 6


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '"text"', '{"parts": 3}', '{"parts": {}}', '{"parts": [{"name": "wheel"}]}', "\ufeff\x00"],
)
def test_an_evaluation_json_of_something_else_is_refused_and_left(evaluate_cli, ckpt, tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content, encoding="utf-16" if "\x00" in content else "utf-8")
    before = (tmp_path / "evaluation.json").read_bytes()
    status, _, err = evaluate_cli(ckpt["ce0"], "--ece", *SMALL, "--out", ".")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("error: --out: evaluation.json is no evaluation of this script; name another folder")
    assert (tmp_path / "evaluation.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


# ----------------------------------------------------------------------------------------------- other people's weights


@pytest.fixture
def bare(ckpt):
    """The weights of a run as others would publish them, without mean and std; and the flags that say the rest."""
    state = common.load_checkpoint(ckpt["ce0"])["model"]
    mean, std = (state[key].flatten().tolist() for key in ("mean", "std"))
    flags = ["--arch", "wrn-10-1", "--num-classes", 10, "--dataset", "shapes", "--mean", *mean, "--std", *std]
    return {key: value for key, value in state.items() if key not in ("mean", "std")}, flags


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}},
    "DataParallel": lambda state: {"net": {f"module.{key}": value for key, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "compiled DDP": lambda state: {"state_dict": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
    "DDP of compiled": lambda state: {"state_dict": {f"module._orig_mod.{key}": v for key, v in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_dict_is_evaluated_as_the_run_it_came_from(evaluate_cli, ckpt, bare, tmp_path, wrapper):
    state, flags = bare
    torch.save(WRAPPERS[wrapper](state), tmp_path / "weights.pt")
    status, out, err = evaluate_cli("weights.pt", "--ece", *flags, *SMALL)
    assert (status, err) == (0, "") and list(table(out, "model")) == ["weights"]
    expected = evaluate.evaluate_clean(trained(ckpt["ce0"]))
    found = read(tmp_path)["models"]["weights"]
    assert found["NLL"]["mean"] == pytest.approx(expected["nll"], rel=1e-4)
    assert found["accuracy (%)"]["mean"] == pytest.approx(expected["accuracy"], abs=1e-3)


def test_mean_and_std_belong_to_the_model(evaluate_cli, bare, tmp_path):
    """Measured again where they change, though the file does not."""
    state, flags = bare
    torch.save(state, tmp_path / "weights.pt")
    found = []
    for change in ([], ["--mean", 0, 0, 0], ["--std", 1, 1, 1]):
        assert evaluate_cli("weights.pt", "--ece", *flags, *change, *SMALL)[0] == 0
        found.append(read(tmp_path)["models"]["weights"]["NLL"]["mean"])
    assert len(set(found)) == 3


def test_weights_of_other_shapes_are_refused(evaluate_cli, bare, tmp_path):
    state, flags = bare
    first, *_, last = state
    wide = common.build_model("wrn-10-2", 10).state_dict()
    cases = {
        "wide": (wide, "blocks.0.0.conv1.weight ((32, 16, 3, 3) there, (16, 16, 3, 3) here)"),
        "short": ({key: value for key, value in state.items() if key != last}, f"{last} (none there, "),
        "long": ({**state, "extra.weight": torch.zeros(2)}, "extra.weight ((2,) there, none here), 1 in all"),
    }
    for name, (weights, says) in cases.items():
        torch.save(weights, tmp_path / f"{name}.pt")
        status, _, err = evaluate_cli(f"{name}.pt", *flags, *SMALL)
        assert status == 2 and err.count("\n") == 1
        assert err.startswith(f"error: CKPT: {name}.pt does not fit wrn-10-1: ") and says in err
    assert err.count(" there, ") == 1


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """(file of weights, module): torchvision's resnet18 with ten outputs."""
    path = tmp_path_factory.mktemp("torchvision") / "resnet.pth"
    model = torchvision.models.resnet18(num_classes=10)
    torch.save(model.state_dict(), path)
    return path, model.eval()


def test_a_torchvision_model_with_a_file(evaluate_cli, resnet):
    path, model = resnet
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    flags = ["--torchvision", "resnet18", "--num-classes", 10, "--dataset", "shapes", "--mean", *mean, "--std", *std]
    status, out, err = evaluate_cli(path, "--ece", *flags, *SMALL, "--out", "out")
    assert (status, err) == (0, "")
    data = common.load_dataset("shapes", limit_test=50)
    images = (data.test_images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = F.cross_entropy(model(images), data.test_labels).item()
    assert read("out")["models"]["resnet"]["NLL"]["mean"] == pytest.approx(expected, rel=1e-4)


def test_the_published_weights_of_a_torchvision_model(evaluate_cli, monkeypatch, tmp_path):
    """With the mean and std that its weights were trained with; the download is replaced."""
    model, asked = torchvision.models.resnet18(), []
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: asked.append((name, weights)) or model)
    path = write_npz(tmp_path / "imagenet.npz", classes=np.arange(1000).astype(str))
    flags = ["--torchvision", "resnet18", "--dataset", path, "--ece", "--device", "cpu", "--out", "out"]
    status, out, err = evaluate_cli(*flags)
    assert (status, err) == (0, "") and asked == [("resnet18", torchvision.models.ResNet18_Weights.DEFAULT)]
    data = common.load_dataset(path)
    normal = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(normal(data.test_images / 255)), data.test_labels).item()
    assert read("out")["models"]["resnet18"]["NLL"]["mean"] == pytest.approx(expected, rel=1e-4)

    def fail(name, weights):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    status, _, err = evaluate_cli(*flags)
    assert status == 2 and err.count("\n") == 1 and "--torchvision: no weights of resnet18" in err


def test_a_model_that_does_not_take_the_images_is_refused(evaluate_cli, monkeypatch, tmp_path):
    """torchvision's vision transformers take images of 224 pixels alone, and say so by an assertion."""
    small = dict(image_size=224, patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    model = torchvision.models.VisionTransformer(**small, num_classes=10)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, num_classes: model)
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    flags = ["--torchvision", "vit_b_16", "--num-classes", 10, "--dataset", "shapes", *SMALL]
    status, _, err = evaluate_cli("vit.pt", *flags)
    assert status == 2 and err.startswith("error: CKPT: vit.pt does not take shapes's images: ")
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ bad input

OF_TEN = ["--arch", "wrn-10-1", "--num-classes", "10"]
BAD = [
    ([], "CKPT", "before the other flags"),
    (["missing.pt"], "missing.pt", "no file"),
    (["missing.pt", "--arch", "wrn-10-1", "--num-classes", "10", "--dataset", "shapes"], "missing.pt", "no file"),
    (["text.pt"], "text.pt", "damaged or no checkpoint"),
    (["text.pt", *OF_TEN, "--dataset", "shapes"], "text.pt", "no file of weights"),
    (["damaged.pt"], "damaged.pt", "damaged or no checkpoint"),
    (["bare.pt"], "bare.pt", "take --arch or --torchvision"),
    (["list.pt", *OF_TEN, "--dataset", "shapes"], "list.pt", "no state_dict"),
    (["a.pt", "--dataset", "missing.npz"], "--dataset", "no file missing.npz"),
    (["a.pt", "--dataset", "shape"], "--dataset", "did you mean shapes"),
    (["a.pt", "--dataset", "three.npz"], "a.pt", "10 classes, three.npz 3"),
    (["a.pt", "--part", "emma"], "--part", "did you mean ema"),
    (["a.pt", "--part", "optimizer"], "--part", "valid: model, ema"),
    (["a.pt", "mixed.pt", "--transfer"], "--transfer", "differ (shapes, ten.npz)"),
    (["a.pt", "--transfer", "--teacher", "mixed.pt"], "--transfer", "differ (shapes, ten.npz)"),
    (["a.pt", "--transfer"], "--transfer", "two or more"),
    (["a.pt", "a.pt", "--transfer"], "--transfer", "two or more"),
    (["a.pt", "--teacher", "b.pt"], "--teacher", "is for --transfer"),
    (["a.pt", "b.pt", "--transfer", "--eps", "0.1", "0.2"], "--eps", "takes one"),
    (["a.pt", "--transfer", "--teacher", "missing.pt"], "missing.pt", "no file"),
    (["--pgd", "a.pt"], "--pgd", "'a.pt' is not a whole number"),
    (["--pgd", "20", "a.pt"], "--pgd", "'a.pt' is not a whole number"),
    (["--cifar-c", "a.pt"], "CKPT", "before the other flags"),
    (["a.pt", "--pgd", "0"], "--pgd", "at least 1"),
    (["a.pt", "--eps", "2"], "--eps", "[0, 1]"),
    (["a.pt", "--eps", "1/0"], "--eps", "'1/0' is not a number in [0, 1]"),
    (["a.pt", "--eps", "8/255/3"], "--eps", "'8/255/3' is not a number"),
    (["a.pt", "--eps", "-0.1"], "--eps", ""),
    (["a.pt", "--eps", "nan"], "--eps", "[0, 1]"),
    (["a.pt", "--eps", "much"], "--eps", "'much' is not a number"),
    (["a.pt", "--step-size", "3/2"], "--step-size", "[0, 1]"),
    (["a.pt", "--restarts", "0"], "--restarts", "at least 1"),
    (["a.pt", "--seed", "-1"], "--seed", "at least 0"),
    (["a.pt", "--limit-test", "0"], "--limit-test", "at least 1"),
    (["a.pt", "--cinic", "folder"], "--cinic", "those of shapes"),
    (["a.pt", "--dataset", "ten.npz", "--cinic", "nowhere"], "--cinic", "no folder nowhere"),
    (["a.pt", "--cifar-c", "nowhere"], "--cifar-c", "no nowhere/gaussian_noise.npy"),
    (["a.pt", "--device", "gpu"], "--device", "valid: cpu, cuda"),
    (["a.pt", "--frobnicate"], "--frobnicate", "--help"),
    (["a.pt", "--out", "text.pt/folder"], "text.pt/folder", "directory"),
    (["bare.pt", *OF_TEN], "--dataset", "add --dataset NAME"),
    (["bare.pt", "--arch", "wrn-10-1", "--dataset", "shapes"], "--num-classes", "needs the number"),
    ([*OF_TEN, "--dataset", "shapes"], "--arch", "weights.pt"),
    (["bare.pt", *OF_TEN, "--torchvision", "resnet18", "--dataset", "shapes"], "--torchvision", "one of the two"),
    (["bare.pt", "--arch", "wrn-16", "--num-classes", "10", "--dataset", "shapes"], "--arch", "did you mean wrn-16-2"),
    (["--torchvision", "resnet-18", "--dataset", "shapes"], "--torchvision", "did you mean resnet18"),
    (["bare.pt", *OF_TEN, "--dataset", "shapes", "--std", "1", "0", "1"], "--std", "above 0"),
    (["bare.pt", *OF_TEN, "--dataset", "shapes", "--mean", "0.5"], "--mean", "3 arguments"),
    (["--show-corruptions"], "CKPT", ""),
]


@pytest.fixture(scope="module")
def files(ckpt, tmp_path_factory):
    """What the command lines above name."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(ckpt["ce0"], folder / "a.pt")
    shutil.copy(ckpt["ce1"], folder / "b.pt")
    content = (folder / "a.pt").read_bytes()
    middle = len(content) // 2
    (folder / "damaged.pt").write_bytes(content[:middle] + bytes(50) + content[middle + 50 :])
    (folder / "text.pt").write_text("no checkpoint")
    checkpoint = common.load_checkpoint(folder / "a.pt")
    torch.save({**checkpoint, "dataset": "ten.npz"}, folder / "mixed.pt")
    torch.save(checkpoint["model"], folder / "bare.pt")
    torch.save([torch.zeros(2)], folder / "list.pt")
    (folder / "folder").mkdir()
    write_npz(folder / "three.npz")
    write_npz(folder / "ten.npz", classes=np.array(evaluate.CIFAR10))
    return folder


@pytest.mark.parametrize(
    "flags, names, says", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing(evaluate_cli, files, monkeypatch, flags, names, says):
    before = sorted(files.rglob("*"))
    monkeypatch.chdir(files)
    status, out, err = evaluate_cli(*flags, *([] if "--device" in flags else ["--device", "cpu"]))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert names in err and says in err, err
    assert sorted(files.rglob("*")) == before and "took" not in out


@pytest.mark.parametrize("change", [
    {"arch": "wrn-16-2"}, {"arch": "foo-1"}, {"model": None}, {"model": {}}, {"config": {}}, {"num_classes": "10"},
], ids=str)  # fmt: skip
def test_a_checkpoint_at_odds_with_itself(evaluate_cli, ckpt, tmp_path, change):
    torch.save({**common.load_checkpoint(ckpt["ce0"]), **change}, tmp_path / "odd.pt")
    status, _, err = evaluate_cli("odd.pt", "--ece", *SMALL)
    assert status == 2 and err.startswith("error: CKPT: odd.pt does not fit together") and err.count("\n") == 1


def test_weights_that_are_not_numbers_are_no_robust_model(evaluate_cli, ckpt, tmp_path):
    checkpoint = common.load_checkpoint(ckpt["ce0"])
    checkpoint["model"]["stem.0.weight"] *= math.nan
    torch.save(checkpoint, tmp_path / "nan.pt")
    status, _, err = evaluate_cli("nan.pt", "--ece", *SMALL)
    assert status == 2 and err.startswith("error: CKPT: nan.pt answers NaN") and err.count("\n") == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_a_run_folder_stands_for_its_checkpoint(evaluate_cli, runs):
    assert evaluate_cli(runs["ce0"], "--ece", *SMALL, "--out", "out")[0] == 0
    assert read("out")["models"]["ce"]["checkpoints"] == [str(runs["ce0"] / "checkpoint.pt")]


def test_a_copy_is_not_another_seed(evaluate_cli, ckpt, tmp_path):
    shutil.copy(ckpt["ce0"], tmp_path / "copy.pt")
    status, out, err = evaluate_cli(ckpt["ce0"], "copy.pt", "--ece", *SMALL, "--out", "out")
    assert (status, err) == (0, "") and "copy.pt is the same as" in out
    assert read("out")["models"]["ce"]["accuracy (%)"]["n"] == 1
    status, _, err = evaluate_cli(ckpt["ce0"], "copy.pt", "--transfer", *SMALL, "--out", "out")
    assert status == 2 and "--transfer: takes two or more different checkpoints" in err


def test_step_counts_and_targets_that_are_there_are_not_measured_again(evaluate_cli, ckpt, monkeypatch):
    attack = ["--restarts", 1, *SMALL, "--out", "out"]
    assert evaluate_cli(ckpt["ce0"], "--pgd", 1, 2, 3, *attack)[0] == 0
    assert evaluate_cli(ckpt["ce0"], ckpt["ce1"], ckpt["nrd0"], "--transfer", *attack)[0] == 0
    monkeypatch.setattr(evaluate, "evaluate_pgd", None)
    monkeypatch.setattr(evaluate, "evaluate_transfer", None)
    status, out, err = evaluate_cli(ckpt["ce0"], "--pgd", 3, 1, *attack)
    (row,) = table(out, "accuracy (%) under PGD, steps").values()
    assert (status, err) == (0, "") and float(row["1"]) == results("out", "PGD")[0]["1"]
    assert evaluate_cli(ckpt["nrd0"], ckpt["ce0"], "--transfer", *attack)[0] == 0


def test_what_another_process_has_measured_meanwhile_is_kept(ckpt, tmp_path):
    one, two = evaluate.Evaluation(tmp_path), evaluate.Evaluation(tmp_path)
    subject = trained(ckpt["ce0"])
    one.part("first", subject, {}, dict, {"a": 1})
    two.part("second", subject, {}, dict, {"b": 2})
    assert one.part("second", subject, {}, dict, {"b": 3}) == {"b": 3}  # not known yet: measured
    assert [part["part"] for part in read(tmp_path)["parts"]][:2] == ["first", "second"]
    one.summary = {"models": {}}
    one.save()
    assert evaluate.Evaluation(tmp_path).part("first", subject, {}, None) == {"a": 1}
    assert "models" in read(tmp_path)  # an evaluation that only begins leaves the summary


def test_a_terminal_without_the_letters(ckpt, tmp_path):
    command = [sys.executable, ROOT / "evaluate.py", ckpt["ce0"], "--pgd", "1", "--restarts", "1", "--out", tmp_path]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([*map(str, command), *map(str, SMALL)], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and "PGD" in result.stdout
