"""evaluate.py: attacks and measures against closed forms and naive versions; the script as a user runs it."""

import csv
import hashlib
import importlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
    return evaluate.Subject("some.pt", {}, model.eval(), "some", data, **fields)


class Net(nn.Sequential):
    """In double precision, so that rounding, which depends on the batch, decides nothing."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 10))
        self.double()

    def forward(self, images):
        return super().forward(images.double())


class Centred(Net):
    """Its answers depend on the batch, as those of BatchNorm on current statistics."""

    def forward(self, images):
        logits = super().forward(images)
        return logits - 0.2 * logits.mean(0)


class Lookup(nn.Module):
    """Logits looked up by an image's first pixel, so that a test can say what is predicted for which
    image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


class Knows(nn.Module):
    """Class 0 for the clean images in one set, and for the attacked images in another. Its gradient is
    nought."""

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


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("steps", [[9], [1, 2, 5, 9]], ids=str)
def test_accuracy_under_pgd_is_that_of_a_naive_attack(steps, by_batch):
    """Three restarts, each run to its end: a run loses a sample to PGD-k where a point up to step k fools."""
    model, images = Centred() if by_batch else Net(), random_images(150)
    clean = common.to_float(images)
    labels = model(clean).argmax(1)
    labels[::7] = 3  # some are wrong before the attack
    subject = subject_of(model, images, labels, batch_size=500 if by_batch else 7, by_batch=by_batch)
    args = SimpleNamespace(pgd=steps, restarts=3, seed=4, step_size=0.003, worst_start=False)
    worst_run = evaluate.evaluate_pgd(subject, 0.15, args)
    args.worst_start = True
    worst_start = evaluate.evaluate_pgd(subject, 0.15, args)
    lost = (model(clean).argmax(1) != labels).repeat(3, len(steps), 1)  # bool [restarts, step counts, N]
    for run, seed in zip(lost, (4, 5, 6)):
        points = naive_pgd(model, clean, labels, 0.15, 0.003, max(steps), torch.Generator().manual_seed(seed))
        for step, (_, logits) in enumerate(points):
            for k, so_far in zip(steps, run):
                so_far |= (logits.argmax(1) != labels) & (step <= k)
    assert worst_run == pytest.approx((100 * (~lost).double().mean(2).amin(0)).tolist(), abs=1e-4)
    assert worst_start == pytest.approx((100 * (~lost.any(0)).double().mean(1)).tolist(), abs=1e-4)
    assert len(set(worst_run)) == len(steps) and 0 < worst_start[-1] < worst_run[-1] < 80


@pytest.mark.parametrize("scale", [0.5, 3, 60])
def test_clean_metrics_are_numpy_s(scale):
    """Also where softmax is one to the last bit of float32."""
    logits = scale * torch.randn(250, 7)
    labels = torch.where(torch.rand(250) < 0.6, logits.argmax(1), torch.randint(0, 7, (250,)))
    subject = subject_of(Lookup(logits), numbered(250), labels)
    accuracy, numbers, bins = evaluate.evaluate_images(subject, numbered(250), labels)
    z, y = logits.double().numpy(), labels.numpy()
    log_p = z - z.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    p, hit = np.exp(log_p), z.argmax(1) == y
    which = np.digitize(p.max(1), np.linspace(0, 1, 16), right=True) - 1
    ece = sum(
        (which == b).mean() * abs(hit[which == b].mean() - p.max(1)[which == b].mean()) for b in set(which)
    )
    brier = ((p - np.eye(7)[y]) ** 2).sum(1).mean()
    expected = {"ECE": ece, "NLL": -log_p[np.arange(250), y].mean(), "Brier": brier}
    assert accuracy == pytest.approx(100 * hit.mean()) and numbers == pytest.approx(
        expected, rel=1e-9, abs=1e-9
    )
    for key, values in (("accuracy", hit), ("confidence", p.max(1))):
        means = [values[which == b].mean() if (which == b).any() else 0 for b in range(15)]
        assert bins[key] == pytest.approx(means)
    assert bins["share"] == pytest.approx([(which == b).mean() for b in range(15)])


def test_natural_robustness_by_hand(monkeypatch):
    """Four images of class 0, the first two right when clean; image 4k + i is image i at severity k."""
    right = ["1100", "1000", "0100", "0011", "1111", "0000"]
    logits = torch.tensor([[1.0, 0] if bit == "1" else [0, 1.0] for bit in "".join(right)])
    subject, never = (subject_of(Lookup(logits), numbered(4, k), torch.zeros(4).long()) for k in (0, 20))

    def corrupt(images, name, severity, seed):
        return numbered(4, 4 * severity if name == "fog" else 16)  # all others: right

    monkeypatch.setattr(evaluate, "corrupt", corrupt)
    monkeypatch.setattr(evaluate, "CORRUPTIONS", ["fog", "snow"])
    args = SimpleNamespace(cifar_c="", seed=0)
    found = evaluate.evaluate_corruptions(subject, args, None)
    assert found == {
        "accuracy": {"fog": (25 + 25 + 50 + 100 + 0) / 5, "snow": 100, "mean": 70},
        "natural robustness": {"fog": (50 + 50 + 0 + 100 + 0) / 5, "snow": 100, "mean": 70},
    }
    found = evaluate.evaluate_corruptions(never, args, None)
    assert found["accuracy"]["fog"] == 40 and all(math.isnan(v) for v in found["natural robustness"].values())


def test_transfer_by_hand(monkeypatch):
    """By PGD-20, of samples that source and target both classify correctly. The attack does no more than mark
    them."""
    attacks, real = [], evaluate.pgd
    monkeypatch.setattr(evaluate, "pgd", lambda *arguments: attacks.append(arguments) or real(*arguments))
    models = [Knows("111100", "011111"), Knows("111010", "011000"), Knows("000011", "111111")]
    source, target, lost = (subject_of(m, numbered(6), torch.zeros(6).long(), batch_size=3) for m in models)
    args = SimpleNamespace(seed=0, eps=[0.0015], step_size=0.003)
    found = evaluate.evaluate_transfer(source, [source, target, lost], args)
    assert found == pytest.approx([25, 100 / 3, math.nan], nan_ok=True)
    assert [(a[0], len(a[1]), a[3:6]) for a in attacks] == [(source.model, 2, (0.0015, 0.003, 20))] * 2


# ------------------------------------------------------------------------------------------ the script itself


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder with tiny.npz: 20 test images of three classes."""
    monkeypatch.chdir(tmp_path)
    write_npz("tiny.npz")
    return tmp_path


def write_test_set_alone(path):
    """That of tiny.npz."""
    with np.load("tiny.npz") as arrays:
        np.savez(path, **{name: arrays[name] for name in arrays if not name.startswith("train")})


def write_checkpoint(path, seed=0, changes=(), **flags):
    """A checkpoint as a training script leaves it, of an untrained net; `changes` are to its entries."""
    torch.manual_seed(seed)
    nets = {"model": common.build_model("wrn-10-1", 3), "ema": common.build_model("wrn-10-1", 3)}
    config = {
        "script": "nrd",
        "dataset": "tiny.npz",
        "data_dir": "data",
        "noise": "sym",
        "lr": 0.1,
        "seed": seed,
    }
    config |= {
        "device": "cpu",
        "out": None,
        "resume": False,
        "name": "nrd-tiny",
        "commit": "c0ffee",
        "given": [],
    }
    config |= flags
    checkpoint = {
        "script": config["script"],
        "dataset": "tiny.npz",
        "classes": CLASSES,
        "config": config,
        "rng": {},
    }
    checkpoint |= {
        "noise": {},
        "epochs": 2,
        "epoch": 2,
        "source": {"nrd.py": "the text", "common.py": "its text"},
    }
    checkpoint |= {"metrics": [{"epoch": epoch, "test_acc": 50.0 * epoch} for epoch in (1, 2)]}
    checkpoint |= {"built_as": {part: net.built_as for part, net in nets.items()}}
    checkpoint |= {part: net.state_dict() for part, net in nets.items()} | dict(changes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return checkpoint


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from now on, by their file's name; none is rendered."""
    drawn = {}

    def savefig(figure, path, dpi):
        Path(path).touch()
        drawn[Path(path).name.split(".")[0]] = figure

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    return drawn


@pytest.fixture
def run(monkeypatch, figures):
    """run(*flags) evaluates in this process."""

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--device", "cpu"])
        args = evaluate.parse_args()
        (args.seed,) = args.seeds  # as common.run does
        evaluate.main(args)

    return main


@pytest.fixture
def rows(run):
    """rows(*flags) evaluates in this process: {row of the table: {column: {"mean": …, "std": …, "n": …}}}."""

    def main(*flags):
        run(*flags, "--table", "rows.csv")
        with open("rows.csv", newline="", encoding="utf-8") as file:
            (_, *columns), *lines = csv.reader(file)
        found = {}
        for name, *cells in lines:
            found[name] = {}
            for column, cell in zip(columns, cells):
                column, kind = column.rsplit(" ", 1)
                found[name].setdefault(column, {})[kind] = float(cell) if cell else None
        return found

    return main


def lines_of(folder="."):
    """What is in evaluation.jsonl, a dict per line; NaN is no JSON."""
    text = (Path(folder) / "evaluation.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_end_to_end():
    """As a user runs it: tables, pictures and evaluation.jsonl, and nothing beside the checkpoints."""
    write_checkpoint("a/checkpoint.pt", lr=0.1, given=["lr"], changes={"teacher": "a/checkpoint.pt"})
    write_checkpoint("b/checkpoint.pt", seed=1, lr=0.2, given=["lr"], method="one")
    flags = "a b --ece --pgd 1 2 --eps 1/255 0.031 --restarts 1 --cifar-c --transfer --teacher"
    flags += " --curves --pdf --table out/table.csv --limit-test 6 --out out --device cpu"
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    missing = subprocess.run([*command[:2], "missing.pt"], capture_output=True, text=True, timeout=120)
    assert (
        missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
    )
    pictures = [f"{name}.{kind}" for kind in ("png", "pdf")
                for name in ("reliability", "pgd", "training", "cifar-c", "transfer")]  # fmt: skip
    assert {path.name for path in Path("out").iterdir()} == {*pictures, "table.csv", "evaluation.jsonl"}
    assert [path.name for folder in "ab" for path in Path(folder).iterdir()] == ["checkpoint.pt"] * 2

    columns = ["accuracy (%)", "ECE", "NLL", "Brier"]
    columns += [f"PGD-{k}, ε {eps} (%)" for eps in ("1/255", "0.031") for k in (1, 2)]
    columns += ["mCA, generated (%)", "natural robustness (%)"]
    *lines, transfer = lines_of("out")
    for folder, line in zip("ab", lines, strict=True):
        assert list(line["numbers"]) == ["test set", *columns] and line["command"].endswith(flags)
        assert line["checkpoint"] == f"{folder}/checkpoint.pt"
        assert line["digest"] == hashlib.sha256(Path(line["checkpoint"]).read_bytes()).hexdigest()[:12]
    numbers = lines[0]["numbers"]
    assert f"{numbers['NLL']:.4f}" in result.stdout and "; PGD: worst restart of 1 " in result.stdout
    rates = np.array(transfer["numbers"]["success_rate"], dtype=float)  # null: NaN
    assert rates.shape == (3, 4)
    for column in (2, 3):  # the mean, in which ONE has no part, and the teacher, which is the first
        assert np.array_equal(rates[:, column], rates[:, 0], equal_nan=True)

    with open("out/table.csv", newline="", encoding="utf-8") as file:
        heading, first, second, _, *matrix = csv.reader(file)
    assert heading[1:7] == [f"{column} {kind}" for column in columns[:2] for kind in ("mean", "std", "n")]
    assert [first[0], second[0]] == ["nrd lr=0.1", "nrd lr=0.2"]
    assert float(first[4]) == numbers["ECE"] and first[5:7] == ["", "1"]
    assert matrix[0][1:] == ["1", "2", "mean", "teacher"] and matrix[3][0] == "mean"
    assert [float(cell) for cell in matrix[1][1:]] == pytest.approx(rates[0], abs=0.005, nan_ok=True)


def test_lines_are_added_and_nothing_is_lost(run, monkeypatch):
    """A second call adds to the first one's lines; one that is stopped keeps what is measured."""
    write_checkpoint("a.pt")
    write_checkpoint("b.pt", seed=1)
    run("a.pt", "--pgd", 1, "--restarts", 1)
    measure = evaluate.measure

    def interrupted(subject, *how):
        if subject.path == "b.pt":
            raise KeyboardInterrupt
        measure(subject, *how)

    monkeypatch.setattr(evaluate, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("a.pt", "b.pt")
    columns = [list(line["numbers"])[1:] for line in lines_of()]
    assert columns == [["accuracy (%)", "PGD-1, ε 0.031 (%)"], ["accuracy (%)", "ECE", "NLL", "Brier"]]
    assert {line["checkpoint"] for line in lines_of()} == {"a.pt"}


def test_runs_without_a_finished_epoch_are_left_out(run, capsys):
    """With a line each, as after `evaluate.py runs/kd_zoo-*` where some were killed."""
    write_checkpoint("a.pt")
    Path("killed").mkdir()
    Path("killed/config.json").touch()
    Path("cut.pt").write_bytes(Path("a.pt").read_bytes()[:1000])
    run("killed", "a.pt", "cut.pt")
    left_out = capsys.readouterr().err.splitlines()
    for line, path in zip(left_out, ("killed/checkpoint.pt", "cut.pt"), strict=True):
        assert line.startswith("left out: CKPT: ") and path in line
    assert [line["checkpoint"] for line in lines_of()] == ["a.pt"]  # beside the first one that is there


def test_curves_alone_need_no_data(run, figures, capsys):
    write_checkpoint("a.pt", changes={"dataset": "gone.npz"}, dataset="gone.npz")
    run("a.pt", "--curves", "test_acc")
    assert set(figures) == {"training"} and not Path("evaluation.jsonl").exists()
    with pytest.raises(common.UsageError, match="gone.npz"):
        run("a.pt", "--curves", "--ece")


def test_other_images_or_labels_than_in_training_are_told(run, capsys):
    """A run that did not keep the digest is not compared."""
    digest = common.load_dataset("tiny.npz").test_digest
    write_checkpoint("old.pt")
    write_checkpoint("same.pt", test_digest=digest)
    write_checkpoint("other.pt", test_digest="0123456789ab")
    run("old.pt", "same.pt", "other.pt", "--out", "ev")
    told = [line for line in capsys.readouterr().out.splitlines() if "than in training" in line]
    assert told == ["other.pt: tested on other images or labels than in training"]
    write_npz("swapped.npz", test_labels=(np.arange(20) + 1) % 3)
    run("same.pt", "--dataset", "swapped.npz")
    assert "same.pt: tested on other images or labels than in training\n" in capsys.readouterr().out


def test_another_common_py_than_in_training_is_told(run, capsys):
    """It may build another network of that name; an edit of the script changes nothing here."""
    text = common.sources("")["common.py"]
    write_checkpoint("same.pt", changes={"source": {"nrd.py": "edited", "common.py": text}})
    write_checkpoint("fork.pt", changes={"source": {"nrd.py": "edited", "common.py": f"{text}# edited"}})
    run("same.pt", "fork.pt", "--out", "ev")
    told = [line for line in capsys.readouterr().out.splitlines() if "common.py" in line]
    assert told == ["fork.pt: trained with another common.py than this, which builds the network"]


def test_the_test_set_is_enough(run):
    """Of a run, a module, and of public weights whose mean and deviation are given."""
    write_test_set_alone("only.npz")
    write_checkpoint("a.pt")
    torch.save(write_checkpoint("b.pt", mean=None)["model"], "w.pth")
    Path("mine.py").write_text(MINE.replace("SCALE", "1"), encoding="utf-8")
    scaled = ["--mean", 0, 0, 0, "--std", 1, 1, 1]
    for flags in ["a.pt"], ["--model", "mine.py:net"], ["w.pth", "--arch", "wrn-10-1", *scaled]:
        run(*flags, "--dataset", "tiny.npz", "--out", "ev")
        run(*flags, "--dataset", "only.npz", "--out", "ev")
    numbers = [line["numbers"] for line in lines_of("ev")]
    for whole, alone in zip(numbers[::2], numbers[1::2], strict=True):
        assert {**alone, "test set": whole["test set"]} == whole
    assert numbers[0] == numbers[4] != numbers[2]


def test_radius_of_zero(rows, figures):
    """PGD then stays at the start, which is the image."""
    write_checkpoint("a.pt")
    row = rows("a.pt", "--pgd", 1, 2, "--eps", 0, "8/255", "--restarts", 1)["nrd"]
    assert row["PGD-2, ε 0/255 (%)"] == row["accuracy (%)"] and "pgd" in figures


OWN = """
import common, torch
def net():
    return common.build_model("wrn-10-1", 3)
def same():
    torch.manual_seed(3)
    return net()
"""


@pytest.mark.parametrize("kind", ["run", "folder", "weights", "own statistics", "module", "no weights"])
def test_teacher_that_students_name_is_built_again(run, kind):
    """Here a student is its own teacher, and so is as good a source of adversarial images."""
    images = np.full((40, 3, 32, 32), 255, np.uint8)
    images[np.arange(7) * 40 // 7] = np.arange(32) * 3  # those that training had
    write_npz("tiny.npz", train_images=images)
    stats = common.channel_stats(common.load_dataset("tiny.npz", limit_train=7))
    torch.manual_seed(3)
    net = common.build_model("wrn-10-1", 3, 0.0, *(stats if kind == "own statistics" else ()))
    state = net.state_dict()
    torch.save({key: value for key, value in state.items() if key not in ("mean", "std")}, "w.pth")
    Path("own.py").write_text(OWN, encoding="utf-8")
    torch.save(state, "module.pth")
    given = {  # the flags of training | what the checkpoint names
        "run": ({"teacher": "s/checkpoint.pt"}, "s/checkpoint.pt"),
        "folder": ({"teacher": "s"}, "s"),
        "weights": ({"teacher": "w.pth", "mean": [0.0] * 3, "std": [1.0] * 3}, "w.pth"),
        "own statistics": ({"teacher": "w.pth"}, "w.pth"),
        "module": ({"teacher_model": "own.py:net", "teacher": "module.pth"}, "own.py:net"),
        "no weights": ({"teacher_model": "own.py:same"}, "own.py:same"),
    }
    flags, name = given[kind]
    flags = {
        "teacher_model": None,
        "teacher_arch": "wrn-10-1",
        "mean": None,
        "std": None,
        "limit_train": 7,
    } | flags
    changes = {"model": state, "teacher": name}
    write_checkpoint("s/checkpoint.pt", changes=changes, **flags)
    write_checkpoint("o/checkpoint.pt")
    run("s", "o", "--transfer", "--teacher", "--eps", 0.1, "--step-size", 0.05, "--out", "ev")
    rates = np.array(lines_of("ev")[-1]["numbers"]["success_rate"], dtype=float)
    assert np.array_equal(rates[:, 0], rates[:, -1], equal_nan=True)
    assert not np.array_equal(rates[:, 1], rates[:, -1], equal_nan=True) and np.nanmax(rates[:, -1]) > 0


HEADS = ["accuracy (%)", "NLL", "1"]
CELLS = {
    "a_b": ["50.00 ± 14.14 (2)", "0.3000", "1"],
    "R&D#1^2~{a}|$\\": ["49.00", "0.2000", "2"],
    "c": ["nan", "nan", "nan"],
}
TEX = r"""\begin{tabular}{lrrr} \toprule  % \usepackage{booktabs}; tiny.npz, 20 test images
 & accuracy (\%) & NLL & 1 \\
\midrule
a\_b & \textbf{50.00 $\pm$ 14.14 (2)} & 0.3000 & 1 \\
R\&D\#1\textasciicircum{}2\textasciitilde{}\{a\}|\$\textbackslash{} & 49.00 & \textbf{0.2000} & 2 \\
c & nan & nan & nan \\
\bottomrule
\end{tabular}
"""
MARKDOWN = r"""| tiny.npz, 20 test images | accuracy (%) | NLL | 1 |
| --- | --- | --- | --- |
| a_b | 50.00 ± 14.14 (2) | 0.3000 | 1 |
| R&D#1^2~{a}\|$\ | 49.00 | 0.2000 | 2 |
| c | nan | nan | nan |
"""


@pytest.mark.parametrize("suffix, text", [(".md", MARKDOWN), (".tex", TEX)])
def test_tables_to_take_along(tmp_path, suffix, text):
    """Special characters are escaped; the best value of a column is bold in LaTeX, but none of the matrix."""
    path = tmp_path / f"table{suffix}"
    lines = [["tiny.npz, 20 test images", *HEADS], *([name, *cells] for name, cells in CELLS.items())]
    evaluate.write_table(path, [lines] * 2)
    assert path.read_text(encoding="utf-8") == f"{text}\n{text}"


def test_what_cannot_be_written_is_printed_all_the_same(run, capsys):
    write_checkpoint("a.pt")
    run("a.pt", "--ece")
    nll = lines_of()[0]["numbers"]["NLL"]
    capsys.readouterr()
    run("a.pt", "--out", "tiny.npz/below", "--ece")
    out, err = capsys.readouterr()
    assert f"{nll:.4f}" in out and "wrote" not in out
    no_folder = "[Errno 20] Not a directory: 'tiny.npz/below'"
    assert err.splitlines() == [no_folder, f"tiny.npz/below/reliability.png is not drawn: {no_folder}"]


MINE = """
import torch.nn as nn
class Net(nn.Linear):
    def forward(self, x):
        return SCALE * super().forward(x.mean((2, 3)))
def net():
    return Net(3, 3)
"""


def test_every_call_measures_what_is_there_now(run):
    """Images, weights and a module's code may change between two calls."""
    write_checkpoint("a.pt")
    run("a.pt", "--ece")
    write_npz("tiny.npz", test_images=np.zeros((20, 3, 32, 32), np.uint8))
    run("a.pt", "--ece")
    write_checkpoint("a.pt", seed=1)
    run("a.pt", "--ece")
    torch.save({"weight": torch.eye(3), "bias": torch.arange(3.0)}, "w.pt")
    for scale in ("1", "2"):
        Path("mine.py").write_text(MINE.replace("SCALE", scale), encoding="utf-8")
        run("w.pt", "--model", "mine.py:net", "--dataset", "tiny.npz")
    assert len({line["numbers"]["NLL"] for line in lines_of()}) == len(lines_of()) == 5


def library_of(*attacks):
    return SimpleNamespace(
        **{attack.__name__: attack for attack in attacks}, __all__=[a.__name__ for a in attacks]
    )


def test_attacks_of_a_library(rows, monkeypatch):
    """By name, with the radius and the labels; here one that turns images into their negatives."""
    asked = []

    class Negative:
        def __init__(self, model, eps):
            asked.append(eps)

        def __call__(self, images, labels):
            return 1 - images

    class PGDL2(Negative):
        pass

    class CW:
        def __init__(self, model, c=1, steps=50):
            pass

    library = library_of(Negative, PGDL2, CW)
    monkeypatch.setitem(sys.modules, "torchattacks", library)
    write_checkpoint("a.pt")
    row = rows("a.pt", "--attack", "Negative", "--eps", "8/255")["nrd"]
    data, model = common.load_dataset("tiny.npz"), common.load_model(common.load_checkpoint("a.pt"))
    assert row["Negative, ε 8/255 (%)"]["mean"] == common.accuracy(
        common.predict(model, 255 - data.test_images), data.test_labels
    )
    assert asked == [8 / 255]
    for name in ("Other", "PGDL2", "CW"):
        says = f"torchattacks has no {name} of a given l∞ radius; it has Negative$"
        with pytest.raises(common.UsageError, match=says):
            rows("a.pt", "--attack", name)
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(common.UsageError, match="pip install torchattacks"):
        rows("a.pt", "--attack", "Negative")


@pytest.mark.parametrize("classes", [3, 4, 10, 100])
def test_auto_attack_as_its_standard(monkeypatch, classes):
    """At most nine targets, at least four classes, and --seed decides every draw."""
    asked = []

    class AutoAttack:
        def __init__(
            self, model, norm="Linf", eps=8 / 255, version="standard", n_classes=10, seed=None, verbose=False
        ):
            asked.append({"eps": eps, "n_classes": n_classes, "seed": seed})

        def __call__(self, images, labels):
            asked.append(torch.rand(1).item())
            return images

    monkeypatch.setitem(sys.modules, "torchattacks", library_of(AutoAttack))
    if classes < 4:
        with pytest.raises(
            common.UsageError, match="--attack: AutoAttack needs four classes, and there are 3"
        ):
            evaluate.load_attack("AutoAttack", classes)
        return
    subject = subject_of(Lookup(torch.eye(classes)[[0, 1, 2, 3]]), numbered(4), torch.tensor([0, 1, 2, 2]))
    subject.data = subject.data._replace(classes=list(range(classes)))
    for _ in range(2):
        args = SimpleNamespace(seed=7)
        assert (
            evaluate.evaluate_attack(subject, evaluate.load_attack("AutoAttack", classes), 0.02, args) == 75
        )
    options = {"eps": 0.02, "n_classes": min(classes, 10), "seed": 7}
    assert asked[:2] == asked[2:] and asked[0] == options


# --------------------------------------------------------------------------------------------------- pictures


def drawn_subject(path="a.pt", seed=0, flags=(), **fields):
    """A Subject of which only what is drawn is there."""
    config = {"script": "nrd", "seed": seed, "given": dict(flags)} | dict(flags)
    return evaluate.Subject(path, config, None, "some", None, 1, **fields)


def test_runs_are_alike_where_as_many_epochs_are_to_come():
    """Not where one is measured before its end; a preset may tie epochs to the flag that is plotted."""
    first = drawn_subject(flags={"dropout": 0.1, "epochs": 2}, metrics=[{}] * 2)
    second = drawn_subject(flags={"dropout": 0.4, "epochs": 3}, metrics=[{}] * 3)
    early = drawn_subject(seed=1, flags={"dropout": 0.4, "epochs": 3}, metrics=[{}] * 2)
    rows = evaluate.grouped([first, second, early], ["dropout", "epochs"])
    assert sorted(len(members) for _, members in rows) == [1, 2] and [early] in [row for _, row in rows]


def curve(axes, label):
    """The points (x, y) of a curve, and the ends (low, high) of its band at each of them."""
    i = [line.get_label() for line in axes.lines].index(label)
    points = axes.lines[i].get_xydata().tolist()
    corners = axes.collections[i].get_paths()[0].vertices
    ends = [corners[corners[:, 0] == x, 1] for x, _ in points]
    return points, [[heights.min(), heights.max()] for heights in ends]


def legend(figure):
    """The title and the labels of a figure's one legend, of which nothing is cut off."""
    (found,) = figure.legends
    figure.draw_without_rendering()
    box = found.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0
    assert all(axes.get_window_extent().y0 > box.y1 for axes in figure.axes)
    title = found.get_title().get_text()
    return title, [text.get_text() for text in found.get_texts()]


def test_reliability_diagram(figures):
    """The bins of seeds are pooled; the hatched gap reaches from a bin's accuracy to its confidence, up or
    down."""
    bins = [
        {"share": [0.5, 0.5, 0.0, 0.0], "accuracy": [0.2, 0.9, 0, 0], "confidence": [0.25, 0.5, 0, 0]},
        {
            "share": [0.5, 0.488, 0.0, 0.012],
            "accuracy": [0.4, 0.9, 0, 0.5],
            "confidence": [0.15, 0.5, 0, 0.75],
        },
    ]
    members = [drawn_subject(bins=of, numbers={"ECE": 0.1 * i}) for i, of in enumerate(bins)]
    args = SimpleNamespace(out=Path("."), pdf=False)
    evaluate.draw_reliability(args, [("nrd", members)])
    (axes,) = figures["reliability"].axes
    accuracy, *_, share = axes.patches
    assert accuracy.get_data().values.tolist() == pytest.approx([0.3, 0.9, 0, 0.5])
    assert accuracy.get_data().edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    (gaps,) = axes.containers
    gaps = [(bar.get_x(), bar.get_y(), bar.get_y() + bar.get_height()) for bar in gaps]
    expected = [(0, 0.3, 0.2), (0.25, 0.9, 0.5), (0.5, 0, 0), (0.75, 0.5, 0.75)]
    assert gaps == [pytest.approx(gap) for gap in expected]
    assert share.get_data().values.tolist() == pytest.approx([0.5, 0.494, 0, 0.006])
    assert axes.get_title() == "nrd, ECE 0.0500 ± 0.0707 (2)"
    title, labels = legend(figures["reliability"])
    assert not title and len(labels) == 3


def test_picture_of_pgd(figures):
    """Over steps at the smallest radius, over radii at the most steps; from the clean accuracy at 0."""
    numbers = {"accuracy (%)": 90.0, "PGD-1, ε 1/255 (%)": 80.0, "PGD-5, ε 1/255 (%)": 70.0}
    numbers |= {"PGD-1, ε 2/255 (%)": 60.0, "PGD-5, ε 2/255 (%)": 50.0}
    members = [drawn_subject(numbers={k: v + i * spread for k, v in numbers.items()})
               for i, spread in ((-1, 1), (1, 1))]  # fmt: skip
    args = SimpleNamespace(out=Path("."), pdf=False, pgd=[1, 5], eps=[1 / 255, 2 / 255])
    evaluate.draw_pgd(args, [("nrd", members), ("_a long name" * 20, members[:1])], "heading")
    steps, radii = figures["pgd"].axes
    points, band = curve(steps, "nrd")
    assert points == [[0, 90], [1, 80], [5, 70]]
    assert band == [pytest.approx([y - 2**0.5, y + 2**0.5]) for _, y in points]
    points, _ = curve(radii, "nrd")
    assert points == [pytest.approx(point) for point in ([0, 90], [1 / 255, 70], [2 / 255, 50])]
    assert [text.get_text() for text in radii.get_xticklabels()] == ["0", "1/255", "2/255"]
    title, labels = legend(figures["pgd"])
    assert title == "mean ± standard deviation of 1 to 2 seeds"
    assert labels[0] == "nrd" and labels[1].replace("\n", " ") == " " + "_a long name" * 20


def test_picture_of_training(figures):
    """A line is the mean of the seeds, a band one sample standard deviation to either side."""
    runs = [[{"epoch": 1, "test_acc": 10.0, "loss": 0.1}, {"epoch": 2, "test_acc": 20.0, "loss": 0.1}],
            [{"epoch": 1, "test_acc": 14.0, "loss": 0.1},
             {"epoch": 2, "test_acc": 30.0, "loss": 0.1}]]  # fmt: skip
    groups = [
        ("two", [drawn_subject(metrics=run) for run in runs]),
        ("one", [drawn_subject(metrics=runs[1])]),
    ]
    groups.append(("without", [drawn_subject(metrics=[{"epoch": 1, "test_acc": None}, {"epoch": 2}])]))
    evaluate.draw_curves(SimpleNamespace(out=Path("."), pdf=False, curves=["test_acc"]), groups)
    (axes,) = figures["training"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"two": [[1, 12], [2, 25]], "one": [[1, 14], [2, 30]]}
    spread = [statistics.stdev([10, 14]), statistics.stdev([20, 30])]
    bands = [[mean - std, mean + std] for mean, std in zip((12, 25), spread)]
    assert curve(axes, "two")[1] == [pytest.approx(ends) for ends in bands]
    assert curve(axes, "one")[1] == [[14, 14], [30, 30]]
    assert axes.get_ylabel() == "test accuracy (%)"
    assert legend(figures["training"]) == ("mean ± standard deviation of 1 to 2 seeds", ["two", "one"])


def test_curves_are_of_every_metric_that_a_run_has(figures):
    """A row stands in the legend once, whatever panel has it. The learning rate is drawn on request."""
    groups = [("a", [drawn_subject(metrics=[{"epoch": 1, "lr": 0.1, "loss": 1.0, "train_acc_wrong": None}])]),
              ("b", [drawn_subject(metrics=[{"epoch": 1, "lr": 0.2, "seconds": 3, "train_acc_wrong": 7.0}])]),
              ("c", [drawn_subject(metrics=[{"epoch": 1, "communication": 5}])])]  # fmt: skip
    args = SimpleNamespace(out=Path("."), pdf=False, curves=[])
    evaluate.draw_curves(args, groups)
    panels = figures["training"].axes
    found = {axes.get_ylabel(): [line.get_label() for line in axes.lines] for axes in panels}
    assert found == {"loss": ["a"], "wrong labels that are predicted (%)": ["b"], "communication": ["c"]}
    assert legend(figures["training"])[1] == ["a", "b", "c"]
    args.curves = ["lr"]
    evaluate.draw_curves(args, groups)
    (axes,) = figures["training"].axes
    assert axes.get_ylabel() == "learning rate" and [line.get_label() for line in axes.lines] == ["a", "b"]


def test_curves_of_one_run(figures):
    """A metric that comes late, that goes, that is None; lists and texts are not drawn."""
    metrics = [
        {"epoch": 1, "lr": 0.1, "test_acc": 10.0, "gone": 1, "train_acc_wrong": None},
        {"epoch": 2, "lr": 0.1, "test_acc": 20.0, "new": 2, "train_acc_wrong": 5.0, "two": [1, 2]},
    ]
    common.plot_curves(Path("curves.png"), metrics, "a $title$", teacher_acc=90)
    figure = figures["curves"]
    panels = {axes.get_ylabel(): [line.get_label() for line in axes.lines] for axes in figure.axes}
    assert panels == {"accuracy (%)": ["test_acc", "teacher"], "gone": ["gone"], "new": ["new"], "lr": ["lr"],
                      "training labels (%)": ["train_acc_wrong"]}  # fmt: skip
    late = figure.axes[list(panels).index("new")].lines[0].get_xydata()
    assert np.array_equal(late, [[1, math.nan], [2, 2]], equal_nan=True)
    assert max(figure.get_size_inches()) <= 12


@pytest.mark.parametrize("drawing, says", [
    (lambda figure: figure.suptitle("$x_"), ""),
    (lambda figure: 1 / 0, "a.png is not drawn: division by zero\n"),
], ids=["text", "error"])  # fmt: skip
def test_no_picture_ends_a_program(monkeypatch, capsys, drawing, says):
    """LaTeX that is not there, a notebook's backend, a name with $, and what nobody has thought of."""
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    with matplotlib.rc_context({"text.usetex": True}), common.picture(Path("a.png"), 2, 2) as figure:
        figure.subplots().set(xscale="symlog", ylabel="$")
        drawing(figure)
    out, err = capsys.readouterr()
    assert (out, err) == ("", says) if says else ("wrote a.png\n", "")
    assert Path("a.png").exists() == (not says) and not list(Path().glob("*.partial*"))


def test_picture_of_corruptions(figures, monkeypatch):
    """Corruptions down, a bar per row of the table, of the mean over its seeds."""
    monkeypatch.setattr(evaluate, "CORRUPTIONS", ["fog", "snow"])

    def subject(*accuracies):
        accuracy = dict(zip(("fog", "snow", "mean"), accuracies))
        robustness = {name: value + 1 for name, value in accuracy.items()}
        return drawn_subject(corruptions={"accuracy": accuracy, "natural robustness": robustness})

    groups = [("one", [subject(10, 20, 15)]), ("two", [subject(30, 40, 35), subject(40, 50, 45)])]
    for some in groups, groups[1:]:
        evaluate.draw_corruptions(SimpleNamespace(out=Path("."), pdf=False), some, "title")
        accuracy, robustness = figures["cifar-c"].axes
        bars = [[bar.get_width() for bar in bars] for bars in accuracy.containers]
        assert bars == [[10, 20, 15], [35, 45, 40]][-len(some) :]
        bars = [[bar.get_width() for bar in bars] for bars in robustness.containers]
        assert bars == [[11, 21, 16], [36, 46, 41]][-len(some) :]
        assert [text.get_text() for text in accuracy.get_yticklabels()] == ["fog", "snow", "mean"]
        assert legend(figures["cifar-c"])[1] == ["one", "two"][-len(some) :]
    assert [text.get_text() for text in accuracy.texts] == ["35", "45", "40"]


def test_numbers_on_a_heat_map_can_be_read(figures):
    """White on dark cells, also where all cells have the one dark colour of the scale's end."""
    for values, colours in ([[5, 5]], "ww"), ([[0, 100]], "wk"), ([[math.nan, 7]], "w"):
        with common.picture(Path("map.png"), 2, 2) as figure:
            evaluate.heat_map(figure.subplots(), values, ["_row"], range(len(values[0])), "$")
        assert "".join(text.get_color() for text in figures["map"].axes[0].texts) == colours


def test_picture_of_transfer(figures, monkeypatch):
    """Targets down, sources across; ONE has no part in the means; the teacher comes after them."""
    one = drawn_subject("c", flags={"method": "one"})
    groups = [("a", [drawn_subject("a"), drawn_subject("b", seed=1)]), ("c", [one])]
    for _, members in groups:
        for subject in members:
            subject.data = common.Dataset(None, None, None, [0] * 4, CLASSES)
    rates = {
        "a": [1.0, 2, 3],
        "b": [4.0, 6, 8],
        "c": [50.0, 60, 70],
        "t": [7.0, 8, 9],
    }  # source: rate on each target
    monkeypatch.setattr(evaluate, "evaluate_transfer", lambda source, *_: rates[source.path])
    args = SimpleNamespace(out=Path("."), pdf=False, eps=[0.031])
    evaluate.report_transfer(args, groups, [drawn_subject("t")])
    expected = [[1, 4, 50, 2.5, 7], [2, 6, 60, 4, 8], [3, 8, 70, 5.5, 9], [1.5, 5, 55, 3.25, 7.5]]
    assert lines_of()[0]["numbers"]["success_rate"] == expected
    (axes,) = figures["transfer"].axes
    assert axes.images[0].get_array().tolist() == expected
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "1: a seed 0",
        "2: a seed 1",
        "3: c seed 0",
        "mean",
    ]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "3", "mean", "teacher"]
    assert axes.get_xlabel() == "source"
    rates["c"][1] = math.nan
    evaluate.report_transfer(args, groups, [drawn_subject("t")])
    assert figures["transfer"].axes[0].get_xlabel() == "source; blank: no image that both classify correctly"


BY = [(0.2, 0.5, 0), (0.2, 0.5, 1), (0.1, 0.0, 0), (0.1, 0.5, 0), (None, 0.5, 0)]  # sigma, rate, seed


def test_plot_by_flags(figures):
    """One flag: a curve of means for each value of the others. Two: a cell for each pair of values."""
    args = SimpleNamespace(plot_by=["untyped", "sigma"], out=Path("."), pdf=False)
    subjects = [drawn_subject(numbers={"NLL": 1.0}, flags={"sigma": 1}) for _ in range(2)]
    for i, subject in enumerate(subjects):
        subject.config["untyped"] = i
    evaluate.draw_by(args, subjects, "heading")
    assert figures["by-untyped-sigma"].axes[0].images[0].get_array().shape == (2, 1)

    subjects = []
    for i, (sigma, rate, seed) in enumerate(BY):
        given = {"rate": rate} | ({"sigma": sigma} if sigma else {})
        config = {
            "script": "sr" if sigma else "teacher",
            "sigma": sigma,
            "rate": rate,
            "seed": seed,
            "given": given,
        }
        subjects.append(
            evaluate.Subject(f"{i}.pt", config, None, "some", None, 1, numbers={"accuracy (%)": 10.0 * i})
        )
    evaluate.draw_by(
        SimpleNamespace(plot_by=["sigma", "rate"], out=Path("."), pdf=False), subjects, "heading"
    )
    (axes,) = figures["by-sigma-rate"].axes
    expected = [[20, 30], [math.nan, 5], [math.nan, 40]]
    assert np.array_equal(np.ma.filled(axes.images[0].get_array(), math.nan), expected, equal_nan=True)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["sr sigma=0.1", "sr sigma=0.2", "teacher"]
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "0.0",
        "0.5",
    ] and axes.get_title() == "accuracy (%)"

    evaluate.draw_by(SimpleNamespace(plot_by=["sigma"], out=Path("."), pdf=False), subjects, "heading")
    (axes,) = figures["by-sigma"].axes
    half = curve(axes, "sr rate=0.5")
    none = curve(axes, "sr rate=0.0")
    assert half[0] == [[0.1, 30], [0.2, 5]] and none[0] == [[0.1, 20]]
    assert half[1] == [[30, 30], pytest.approx([5 - 50**0.5, 5 + 50**0.5])] and none[1] == [[20, 20]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "0.2"]
    assert legend(figures["by-sigma"])[0] == "mean ± standard deviation of 1 to 2 seeds"


@pytest.mark.parametrize("values, places, labels, scale", [
    ([16, 512, 64], [16, 64, 512], "16 64 512", "log"), ([0, 0.5, 10], [0, 0.5, 10], "0 0.5 10", "linear"),
    ([3, 1, 2], [1, 2, 3], "1 2 3", "linear"), (["sgd", "adam"], [0, 1], "adam sgd", "linear"),
    ([True, False], [0, 1], "False True", "linear"), ([[0.3], [0.2]], [0, 1], "[0.2] [0.3]", "linear"),
], ids=str)  # fmt: skip
def test_axes_of_numbers_are_numeric(figures, values, places, labels, scale):
    """One curve, though a preset sets another flag by this one."""
    subjects = []
    for i, value in enumerate(values):
        config = {"script": "sr", "flag": value, "follows": i, "seed": 0, "given": {"flag": value}}
        numbers = {"accuracy (%)": 10.0 * i}
        subjects.append(evaluate.Subject(f"{i}.pt", config, None, "some", None, 1, numbers=numbers))
    evaluate.draw_by(SimpleNamespace(plot_by=["flag"], out=Path("."), pdf=False), subjects, "heading")
    (axes,) = figures["by-flag"].axes
    assert [line.get_label() for line in axes.lines] == ["sr"] and axes.get_xscale() == scale
    assert [x for x, _ in curve(axes, "sr")[0]] == places == list(axes.get_xticks())
    assert " ".join(text.get_text() for text in axes.get_xticklabels()) == labels


# ------------------------------------------------------------------------------------- memory of wrong labels


@pytest.mark.parametrize("script, per_sample", [
    ("nrd", False), ("cmd", False), ("kd_zoo", True), ("teacher", True),
])  # fmt: skip
def test_memory_is_measured_on_the_labels_of_training(run, figures, script, per_sample):
    """By hand for the images as they are; wrong labels are drawn anew as the script has drawn them."""
    data = common.load_dataset("tiny.npz")
    flags = {"noise": "sym", "rate": 0.5, "noise_seed": 3, "limit_train": 30, "script": script}
    true = data.train_labels[common.evenly_spaced(40, 30)]
    given = common.corrupt_labels(true, "sym", 0.5, CLASSES, 3, per_sample=per_sample)
    call = ", per_sample=True" if script == "kd_zoo" else ""  # a teacher has no script
    source = common.sources("") | {script: f"labels = common.noisy_labels(args, data{call})"}
    checkpoint = write_checkpoint("a.pt", changes={"source": source}, **flags)
    run("a.pt", "--memory", 2, "--out", "ev")
    (line,) = lines_of("ev")
    wrong = given != true
    images = data.train_images[common.evenly_spaced(40, 30)]
    p = common.predict(common.load_model(checkpoint), images).softmax(1)
    plain = line["numbers"]["memory"]["images as they are"]
    for subset, mask in (("clean", ~wrong), ("mislabelled", wrong), ("overall", wrong | ~wrong)):
        assert plain[subset] == pytest.approx(common.accuracy(p[mask], true[mask]))
    assert plain["ECE"] == pytest.approx(common.calibration(p, true)[0], abs=1e-6)
    assert (
        list(line["numbers"]["memory"]) == ["images as they are", "2 unseen views"]
        and 0 <= line["numbers"]["AUROC"] <= 1
    )
    histogram, _, *polygons = figures["memory1"].axes
    assert -p[wrong, true[wrong]].log().max() < histogram.get_xlim()[1] < 3  # an untrained net: about log 3
    names = [axes.get_title().split("\nlabelled ") for axes in polygons]
    assert [name == label for name, label in names] == [True] * 3 + [False] * 4
    assert {name for pair in names for name in pair} <= set(CLASSES)


def test_what_has_memorised_is_told_from_what_has_not(cli, run, figures):
    """Cross-entropy fitted to 64 images: views on which it was not trained bring the true class nearer."""
    flags = "--loss ce --limit-train 64 --limit-test 10 --epochs 40 --batch-size 16 --lr 0.05"
    flags += " --student-augment none --keep 20 --device cpu --out run"
    assert cli(importlib.import_module("nrd"), *flags.split())[0] == 0
    run("run/checkpoint20.pt", "run", "--memory", 4)
    first, last = lines_of("run")
    assert [line["checkpoint"] for line in (first, last)] == ["run/checkpoint20.pt", "run/checkpoint.pt"]
    plain, unseen = last["numbers"]["memory"].values()
    assert plain["mislabelled"] < 20 and plain["clean"] > 80 and unseen["clean"] > 40
    assert 0.5 < last["numbers"]["AUROC"] <= 1 and unseen["ECE"] < plain["ECE"]
    assert {"memory1", "memory2", "confidence"} <= figures.keys()
    clouds = [line.get_xydata().round(5) for line in figures["memory2"].axes[8].lines[2:]]
    in_training, auto_augment = [len({tuple(point) for point in cloud}) for cloud in clouds]
    assert list(map(len, clouds)) == [40, 40]
    assert in_training == 1 and auto_augment > 4  # it was trained on the images themselves
    red, blue = figures["confidence"].axes[3].lines
    assert red.get_xdata().tolist() == [20, 40]
    true = figures["memory2"].axes[8].lines[1].get_xydata()[0]
    model = common.load_model(common.load_checkpoint("run/checkpoint.pt"))
    data = common.load_dataset("shapes", limit_train=64)
    wrong = common.corrupt_labels(data.train_labels, "sym", 0.5, data.classes, 0) != data.train_labels
    last_wrong = wrong.nonzero().squeeze(1)[common.evenly_spaced(int(wrong.sum()), 4)][3]
    label = data.train_labels[last_wrong]
    p = common.predict(model, data.train_images[last_wrong, None]).softmax(1)[0, label].item()
    assert red.get_ydata()[1] == pytest.approx(p, rel=1e-4)
    angle = 2 * math.pi * label.item() / 10
    assert true == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_photographs_are_seen_in_the_size_of_training():
    """As they are and under AutoAugment their middle, as in training a crop from anywhere."""
    train, test = torch.randint(0, 256, (200, 3, 40, 40), dtype=torch.uint8), numbered(2).repeat(1, 1, 2, 2)
    data = common.Dataset(train, torch.zeros(200).long(), test, torch.zeros(2).long(), CLASSES)
    subject = evaluate.Subject("a.pt", {"student_augment": "crop", "script": "nrd"}, None, "pics", data, 1)
    plain, as_in_training, auto_augment = evaluate.views_of(subject)
    x = common.to_float(train)
    middle = x[:, :, 4:36, 4:36]
    assert torch.equal(plain(x), middle)
    assert as_in_training(x).shape == auto_augment(x).shape == middle.shape
    assert (auto_augment(x) == middle).flatten(1).all(1).any()  # no operation applied
    crops = as_in_training(x)
    assert not any(torch.equal(crop, x) for crop, x in zip(crops, middle))
    places = {(top, left) for crop, x in zip(crops, x) for top in range(9) for left in range(9)
              if torch.equal(crop, x[:, top : top + 32, left : left + 32])}  # fmt: skip
    assert len(places) > 20  # of the half that is not flipped


@pytest.mark.parametrize("changes, says", [
    ({"noise": "none", "rate": None}, ": 0 of its 40 labels are wrong; train it with --noise"),
    ({"imbalance": 0.2}, " was trained on a part of the images; train it without --imbalance"),
    ({"validation": 0.1}, " was trained on a part of the images; train it without --validation"),
])  # fmt: skip
def test_memory_that_cannot_be_measured_is_one_line(run, changes, says):
    write_checkpoint("a.pt", **{"noise": "sym", "rate": 0.5, "noise_seed": 0, "limit_train": None} | changes)
    with pytest.raises(common.UsageError, match=f"^--memory: a.pt{says}$"):
        run("a.pt", "--memory")
    assert not Path("evaluation.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- rows


def test_rows_are_seeds(rows):
    """Mean ± sample standard deviation (n)."""
    for i, loss in enumerate(["ce", "ce", "nrd"]):
        machine = {"name": f"run{i}", "device": f"cuda:{i}", "tensorboard": i == 1, "out": f"{i}"}
        write_checkpoint(f"{i}.pt", seed=i, loss=loss, given=["loss"], **machine)
    models = rows("0.pt", "2.pt", "1.pt", "--ece")
    first, second = (rows(f"{i}.pt", "--ece")["nrd"]["NLL"]["mean"] for i in range(2))
    expected = {"mean": statistics.fmean([first, second]), "std": abs(first - second) / math.sqrt(2), "n": 2}
    assert models["nrd loss=ce"]["NLL"] == pytest.approx(expected) and first != second
    assert models["nrd loss=nrd"]["NLL"]["n"] == 1


LR = ["lr"]
NAMES = [  # what the runs are, in the order of the command line | the rows
    ([{"lr": 0.2, "given": LR}, {"lr": 0.1}, {"lr": 0.05, "given": LR}],
     ["nrd lr=0.05", "nrd lr=0.1", "nrd lr=0.2"]),
    ([{"lr": 10, "given": LR}, {"lr": 9, "given": LR}], ["nrd lr=9", "nrd lr=10"]),
    ([{"lr": 0.1, "given": LR}, {"lr": 0.1}], ["nrd"]),  # typed or not, it is the same
    ([{"dataset": "tiny.npz", "given": ["dataset", "loss"], "loss": "ce"},
      {"dataset": "tiny.npz", "given": ["dataset"], "loss": "nrd"}], ["nrd loss=ce", "nrd loss=nrd"]),
    ([{"loss": "nrd"}, {"script": "cmd", "given": ["arch"], "arch": "wrn"}], ["cmd arch=wrn", "nrd"]),
    ([{"script": "b", "lr": 2, "given": LR}, {"script": "a", "lr": 3}, {"script": "b", "lr": 1}],
     ["a lr=3", "b lr=1", "b lr=2"]),
    ([{"eta": None}, {"eta": 4, "given": ["eta"]}, {"eta": "max", "given": ["eta"]}],
     ["nrd eta=4", "nrd eta=max", "nrd"]),
]  # fmt: skip


@pytest.mark.parametrize("runs, names", NAMES, ids=[str(names) for _, names in NAMES])
def test_rows_are_named_by_typed_flags_that_differ_and_sorted_by_their_values(rows, runs, names):
    for i, flags in enumerate(runs):
        write_checkpoint(f"{i}.pt", seed=i, **flags)
    found = rows(*(f"{i}.pt" for i in range(len(runs))), "--out", "ev")
    assert list(found) == names


def test_each_of_two_equal_networks_is_named(rows):
    """As of cmd.py, which reports their mean; any other part that is asked for is named too."""
    changes = {"built_as": {"model": common.build_model("wrn-10-1", 3).built_as}}
    changes["built_as"]["peer"] = changes["built_as"]["model"]
    changes["peer"] = common.build_model("wrn-10-1", 3).state_dict()
    write_checkpoint("c.pt", changes=changes | {"script": "cmd"}, script="cmd")
    write_checkpoint("n.pt")
    names = [
        list(rows(*flags)) for flags in (["c.pt"], ["c.pt", "--part", "peer"], ["n.pt", "--part", "ema"])
    ]
    assert names == [["cmd, network A"], ["cmd, network B"], ["nrd, network ema"]]


def test_runs_with_wrong_labels_of_their_own_are_seeds_too(rows):
    """As the five runs of a cell of Neural Vicinal Risk Minimization's tables."""
    for i in range(2):
        write_checkpoint(f"{i}.pt", seed=i, noise_seed=i)
    models = rows("0.pt", "1.pt", "--out", "ev")
    assert list(models) == ["nrd"] and models["nrd"]["accuracy (%)"]["n"] == 2


@pytest.mark.parametrize("other", [
    {"seed": 0}, {"changes": {"source": {"nrd.py": "another text", "common.py": "its text"}}},
    {"changes": {"source": {"nrd.py": "the text", "common.py": "another text"}}},
    {"commit": "decade"}, {"torch": "2.6"}, {"lr": 0.2},
    {"changes": {"metrics": [{"epoch": 1, "test_acc": 50.0}], "epoch": 1}},
], ids=str)  # fmt: skip
def test_runs_that_differ_in_more_than_their_seed_are_rows_of_their_own(rows, other):
    write_checkpoint("a.pt", seed=0)
    write_checkpoint("b.pt", **{"seed": 1} | other)
    assert list(rows("a.pt", "b.pt", "--out", "ev")) == ["nrd, a.pt", "nrd, b.pt"]


def test_two_files_of_one_name_are_two_rows(rows):
    for folder in ("x", "y"):
        torch.save(write_checkpoint(f"{folder}/net.pt")["model"], f"{folder}/net.pt")
    models = rows("x/net.pt", "y/net.pt", "--arch", "wrn-10-1", "--dataset", "tiny.npz", "--out", "ev")
    assert list(models) == ["net, x/net.pt", "net, y/net.pt"]


def test_the_part_asked_for_is_evaluated(rows, capsys):
    """And an unfinished checkpoint says so."""
    checkpoint = write_checkpoint("a.pt", changes={"epochs": 40})
    data, found = common.read_npz(Path("tiny.npz")), {}
    for part in ("model", "ema"):
        (row,) = rows("a.pt", "--ece", "--part", part).values()
        found[part] = row["NLL"]["mean"]
        logits = common.predict(common.load_model(checkpoint, part), data.test_images)
        assert found[part] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)
    assert found["model"] != found["ema"] and "a.pt: epoch 2 of 40\n" in capsys.readouterr().out
    write_checkpoint("b.pt", changes={"best": "ema"})  # as of ONE and DML
    assert rows("b.pt", "--ece")["nrd"]["NLL"]["mean"] == found["ema"]


@pytest.mark.parametrize("flags, config, size", [
    ([], {"batch_size": 5}, 5), ([], {"batch_size": 5, "eval_batch_size": 10}, 10),
    (["--batch-size", 20], {"batch_size": 5}, 20),
], ids=str)  # fmt: skip
def test_batch_norm_on_current_statistics_has_the_batches_of_training(rows, flags, config, size):
    checkpoint = write_checkpoint("a.pt", changes={"batch_norm": "current"}, **config)
    data = common.read_npz(Path("tiny.npz"))
    found = rows("a.pt", "--ece", *flags)["nrd"]["NLL"]["mean"]
    model = common.load_model(checkpoint).train()
    expected = {}
    for batch_size in (5, 10, 20):
        logits = torch.empty(20, 3)
        for rows in common.evenly_split(torch.arange(20), batch_size):
            logits[rows] = model(common.to_float(data.test_images[rows])).detach()
        expected[batch_size] = F.cross_entropy(logits, data.test_labels).item()
    assert min(expected, key=lambda batch_size: abs(expected[batch_size] - found)) == size
    assert found == pytest.approx(expected[size], rel=1e-6)


SIZES = """
import torch.nn as nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
    def forward(self, x):
        open("seen", "a").write(f"{x.shape[2]} ")
        return self.fc(x.mean((2, 3)))
"""


def test_size_of_pictures_is_asked_for_or_that_of_training(run):
    """And training pictures are not decoded, nor need they be there."""
    for name in CLASSES:
        (Path("pics/val") / name).mkdir(parents=True)
        Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(f"pics/val/{name}/1.png")
    Path("sizes.py").write_text(SIZES, encoding="utf-8")
    for flags, size in ([], 224), (["--image-size", 48], 48), (["--resize", 40, "--image-size", 32], 32):
        Path("seen").unlink(missing_ok=True)
        run("--model", "sizes.py:Net", "--dataset", "imagefolder:pics", "--out", "ev", *flags)
        assert set(Path("seen").read_text(encoding="utf-8").split()) == {str(size)}
    write_checkpoint("a.pt", changes={"dataset": "imagefolder:pics"}, resize=50, image_size=36)
    run("a.pt")
    run("a.pt", "--image-size", 32)
    write_checkpoint("small.pt", resize=None, image_size=None)  # as on images that keep their size
    run("small.pt", "--dataset", "imagefolder:pics")
    decoded = {path.stem.removeprefix("imagefolder_pics-") for path in Path("data/decoded").glob("*.raw")}
    assert decoded == {"test-256-224", "test-256-48", "test-40-32", "test-50-36", "test-50-32"}


@pytest.fixture
def official(folder):
    """A CIFAR-10-C of sparse files: the images that 20 evenly spaced ones are taken from are numbered by
    their row."""
    images = np.lib.format.open_memmap("images.npy", "w+", np.uint8, (50000, 32, 32, 3))
    rows = np.arange(0, 50000, 500)
    images[rows, 0, 0, 0] = rows // 256
    images[rows, 0, 0, 1] = rows % 256
    images.flush()
    (folder / "official").mkdir()
    labels = np.zeros(50000, np.uint8)
    labels[rows] = np.tile(np.arange(20) % 3, 5)
    np.save("official/labels.npy", labels)
    for name in evaluate.CORRUPTIONS:
        Path(f"official/{name}.npy").symlink_to("../images.npy")
    return folder / "official"


def test_the_official_files_are_read_by_severity_and_row(official, monkeypatch):
    """Of 10,000 test images the 20 evenly spaced ones are those of tiny.npz."""
    seen = []
    monkeypatch.setattr(
        evaluate, "predict", lambda model, images, **_: seen.append(images) or torch.zeros(20, 3)
    )
    subject = subject_of(Net(), numbered(20), torch.arange(20) % 3)
    files = evaluate.read_cifar_c(official, [subject])
    monkeypatch.setattr(evaluate, "CORRUPTIONS", ["fog"])
    evaluate.evaluate_corruptions(subject, SimpleNamespace(cifar_c="official"), files)
    rows = [images[:, 0, 0, 0].int() * 256 + images[:, 1, 0, 0] for images in seen if images.shape[2] == 32]
    assert torch.equal(torch.cat(rows), torch.arange(0, 50000, 500))


DAMAGED = {  # name: what is written in place of official/fog.npy
    "page": lambda path: path.write_text("<html>"),
    "cut": lambda path: path.write_bytes(Path("images.npy").read_bytes()[:1000]),
    "short": lambda path: np.save(path, np.zeros((10, 32, 32, 3), np.uint8)),
    "pickle": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "empty": lambda path: path.touch(),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_of_cifar_c_are_named(official, run, kind):
    write_checkpoint("a.pt")
    (official / "fog.npy").unlink()
    DAMAGED[kind](official / "fog.npy")
    with pytest.raises(
        common.UsageError, match="^--cifar-c: official/fog.npy is missing, damaged or not CIFAR-10-C's"
    ):
        run("a.pt", "--cifar-c", "official")


def test_cifar_c_of_other_labels_and_numbers_is_refused(official, run):
    write_checkpoint("a.pt")
    np.save("official/labels.npy", np.zeros(50000, np.uint8))
    with pytest.raises(
        common.UsageError, match="--cifar-c: official/labels.npy are not the labels of tiny.npz, 20 "
    ):
        run("a.pt", "--cifar-c", "official")
    large = evaluate.Subject("a.pt", {}, data=SimpleNamespace(test_labels=torch.zeros(10001)))
    with pytest.raises(common.UsageError, match="are not the labels of"):  # as of SVHN's 26,032 images
        evaluate.read_cifar_c(official, [large])
    (official / "fog.npy").unlink()
    np.lib.format.open_memmap("official/fog.npy", "w+", np.float32, (50000, 32, 32, 3))
    with pytest.raises(common.UsageError, match="--cifar-c: official/fog.npy is missing, damaged or"):
        run("a.pt", "--cifar-c", "official")


def test_cinic_takes_the_images_of_imagenet_class_by_class(folder):
    """Six of each class lie over three splits, their red 10 · class + number; others are not taken."""
    cinic = folder / "cinic"
    files = {f"train/{name}/cifar10-train-1.png": 255 for name in evaluate.CIFAR10} | {
        "train/submarine/n11_0.png": 254
    }
    for c, name in enumerate(evaluate.CIFAR10):
        files |= {
            f"{split}/{name}/n0{c}_{i}.png": 10 * c + i
            for i, split in enumerate(["train", "valid", "test"] * 2)
        }
    for name, level in files.items():
        (cinic / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (level, 255 - level, 7)).save(cinic / name)
    images, labels = evaluate.load_cinic(cinic, seed=0, per_class=6)
    red = images[:, 0, 0, 0].long()
    expected = torch.stack([red, 255 - red, red * 0 + 7], 1).byte()[..., None, None].expand(60, 3, 32, 32)
    assert torch.equal(images, expected) and torch.equal(labels, red // 10)
    assert sorted(red.tolist()) == sorted(
        10 * c + i for c in range(10) for i in range(6)
    )  # nothing else, none twice
    with pytest.raises(
        common.UsageError, match="--cinic: .*cinic has 6 images of ImageNet for airplane, not 7"
    ):
        evaluate.load_cinic(cinic, 0, per_class=7)
    damaged = cinic / "train/frog/n06_0.png"
    Image.new("RGB", (28, 28)).save("small.png")
    for content in (damaged.read_bytes()[:60], b"<html>", Path("small.png").read_bytes()):
        damaged.write_bytes(content)
        with pytest.raises(common.UsageError, match=f"--cinic: {damaged} is no picture of 32×32 pixels"):
            evaluate.load_cinic(cinic, 0, per_class=6)
