"""fickle_teacher.py, soft_randomization.py, messy_collaboration.py: losses, noise, teachers, whole runs."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Calls,
    assert_resumes_to_the_same_bit,
    assert_same,
    colours,
    crops_of,
    forward_passes,
    numbers_of,
    saved,
    stopped_after_each_epoch,
    within,
    write_npz,
)  # fmt: skip

import common
import fickle_teacher as ft
import kd_zoo
import messy_collaboration as mc
import soft_randomization as sr

pytestmark = pytest.mark.usefixtures("quick", "tiny_npz")
ALONE = ["--dataset", "tiny.npz", "--batch-size", 20, "--epochs", 1, "--device", "cpu"]
ALONE += ["--student-arch", "resnet8"]
TINY = [*ALONE, "--teacher-arch", "wrn-10-1"]


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def distillation_loss(S, T, y, alpha, tau):
    """Equation 1 in float64, written out."""
    log_s, log_t = log_softmax(S / tau), log_softmax(T / tau)
    kl = (np.exp(log_t) * (log_t - log_s)).sum(1).mean()
    return (1 - alpha) * -log_softmax(S)[np.arange(len(y)), y].mean() + alpha * tau**2 * kl


@pytest.mark.parametrize("script", [ft, sr, mc])
def test_hinton_loss_by_hand(script):
    """Student (1/2, 1/2), teacher (3/4, 1/4), tau 2: 4 (3/4 log 3/2 + 1/4 log 1/2).

    A teacher that agrees adds nothing to the mean.
    """
    S, T = torch.zeros(1, 2), 2 * torch.tensor([[3.0, 1.0]]).log()
    by_hand = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert script.hinton_loss(S, T, 2).item() == pytest.approx(by_hand, rel=1e-6)
    twice = script.hinton_loss(torch.cat([S, T]), torch.cat([T + 5, T]), 2)
    assert twice.item() == pytest.approx(by_hand / 2, rel=1e-6)
    S, T = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    script.hinton_loss(S, T, 1).backward()
    assert torch.allclose(S.grad, (S.softmax(1) - T.softmax(1)).detach() / 6, atol=1e-6)


@pytest.fixture
def teacher(tmp_path):
    """--teacher-model mine.py:net --teacher weights.pth is this network."""
    (tmp_path / "mine.py").write_text(
        "import common\ndef net(): return common.build_model('wrn-10-1', 3, dropout=0.4)"
    )
    net = common.build_model("wrn-10-1", 3, dropout=0.4)
    net.train()(torch.rand(20, 3, 32, 32))  # running statistics of its own
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    return net


GIVEN = [*ALONE, "--teacher-model", "mine.py:net", "--teacher", "weights.pth"]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("script, single", [(ft, "baseline"), (sr, "ga"), (mc, "baseline")])
def test_a_run_minimises_equation_1_or_cross_entropy(cli, tiny_npz, teacher, script, single, alone):
    """One step, which moves no weight. The teacher's weights, gradients and BatchNorm stay as they are."""
    x = common.to_float(torch.from_numpy(colours(40)))
    write_npz(tiny_npz, train_images=colours(40))
    flags = [*ALONE, "--method", single] if alone else [*GIVEN, "--alpha", 0.7, "--tau", 3]
    flags += {sr: ["--sigma", 0], mc: [] if alone else ["--target-noise", 0]}.get(script, [])
    with forward_passes() as passes:
        status, out, err = cli(script, *flags, "--batch-size", 40, "--lr", 1e-30, "--out", "run")
    assert (status, err) == (0, "") and out.splitlines()[-1].endswith(": run")
    checkpoint = saved("run")
    S = common.load_model(checkpoint).train()(x).detach()
    T = S
    if not alone:
        given = passes[0].net
        (T,) = [step.logits for step in passes[1:] if step.net is given]
        T = T[numbers_of(passes[1].images).argsort()]
        theirs, ours = teacher.state_dict(), given.state_dict()
        assert_same(*({k: v for k, v in s.items() if "num_batches" not in k} for s in (theirs, ours)))
        assert not any(p.requires_grad for p in given.parameters())
        assert torch.allclose(T, teacher.eval()(x), atol=1e-5) == (script is not ft)  # which has dropout
    expected = distillation_loss(S, T, np.arange(40) % 3, 0 if alone else 0.7, 3)
    assert checkpoint["metrics"][0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert checkpoint["built_as"]["model"]["dropout"] == 0 and not Path("runs").exists()


def test_a_fickle_teacher_changes_its_mind_and_nothing_else():
    x = torch.rand(8, 3, 32, 32)
    teacher = common.build_model("wrn-10-1", 10, dropout=0.4)
    ft.fickle(teacher)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        assert (teacher(x) != teacher(x)).any(1).all()
        assert_same(before, teacher.state_dict())


@pytest.mark.parametrize("clip", [[], ["--clip"]])
def test_soft_randomization_shows_noise_to_the_student_only(cli, tiny_npz, teacher, clip):
    images = colours(40) * np.uint8(6)
    write_npz(tiny_npz, train_images=images)
    with forward_passes() as passes:
        assert cli(sr, *GIVEN, "--sigma", 0.2, *clip)[0] == 0
    noisy = torch.cat([step.images for step in passes if step.training])
    clean = torch.cat([step.images for step in passes[1:] if step.net is passes[0].net])
    order = (numbers_of(clean) // 6).tolist()
    assert sorted(order) == list(range(40)) and torch.equal(
        clean, common.to_float(torch.tensor(images[order]))
    )
    inner = (clean > 0.45) & (clean < 0.55)
    delta = (noisy - clean)[inner]
    assert len(delta) > 5000 and abs(delta.mean()) < 0.015 and abs(delta.std() - 0.2) < 0.01
    assert (noisy.min(), noisy.max()) == (0, 1) if clip else noisy.min() < -0.5 and noisy.max() > 1.3
    first, second = (noisy - clean).split(20)
    assert (first != second).float().mean() > 0.6  # drawn anew


def test_messy_targets_by_counting():
    y = torch.arange(50_000) % 10
    first, second = (mc.messy(y, 0.3, 10) for _ in range(2))
    assert within(int((first != y).sum()), len(y), 0.3 * 0.9)
    for c in range(10):  # every other class is as likely
        assert within(int((first[y != c] == c).sum()), int((y != c).sum()), 0.03)
    assert within(int(((first != y) & (second != y)).sum()), len(y), (0.3 * 0.9) ** 2)  # drawn anew
    assert torch.equal(mc.messy(y, 0, 10), y)


def test_labels_are_corrupted_once_and_targets_in_every_batch(cli, tiny_npz):
    """By --noise-seed alone. The labels that targets start from are those that the teacher was given."""
    write_npz(tiny_npz, train_images=colours(40))
    flags = [*TINY, "--noise", "sym", "--rate", 0.5, "--target-noise", 0.3, "--epochs", 5]
    with forward_passes() as passes, Calls(F.cross_entropy) as losses:
        status, out, err = cli(mc, *flags, "--noise-seed", 3)
    true = torch.arange(40) % 3
    labels = common.corrupt_labels(true, "sym", 0.5, "abc", 3, per_sample=True)
    wrong = 100 * (labels != true).float().mean().item()
    assert (status, err) == (0, "") and f"40 training images, {wrong:.2f} % relabelled" in out and wrong > 0
    index = torch.cat([numbers_of(step.images) for step in passes if step.training])
    targets = torch.cat([y for S, y, _ in losses.calls if S.requires_grad])
    changed = targets != labels[index]
    assert len(index) == 400 and not changed[:200].any()  # the teacher's
    assert within(int(changed.sum()), 200, 0.3 * 2 / 3)
    assert len(index[changed].unique()) > 20  # others in every epoch
    for seeds, teachers in (("--noise-seed 3", 2), ("--noise-seed 3 --seed 1", 2), ("--noise-seed 4", 3)):
        assert cli(mc, *flags, "--epochs", 1, *seeds.split())[0] == 0
        assert len(list(Path("runs/teachers").iterdir())) == teachers


@pytest.mark.parametrize("script", [ft, sr, mc, kd_zoo])
def test_student_and_teacher_see_crops_padded_by_reflection(cli, script):
    """And flips. The teacher's images are not normalised; it has dropout where it is to be fickle."""
    flags = ["--sigma", 0] if script is sr else []
    with forward_passes() as passes:
        assert cli(script, *TINY, *flags)[0] == 0
    places = crops_of(common.load_dataset("tiny.npz").train_images, "reflect")
    seen = torch.cat([step.images for step in passes if step.training])
    found = {places[image.numpy().tobytes()] for image in (seen * 255).round().byte()}
    assert len(seen) == 80 and len(found) > 30 and {0, 8} <= {top for top, _, _ in found}
    (path,) = Path("runs/teachers").glob("*/checkpoint.pt")
    checkpoint = common.load_checkpoint(path)
    assert checkpoint["built_as"]["model"]["dropout"] == (0.4 if script is ft else 0)
    assert not checkpoint["model"]["mean"].any()


def test_a_teacher_is_trained_once_and_found_again(cli):
    """By the same command, another seed, another sigma and the other scripts. The student stays the same."""
    status, out, err = cli(sr, *TINY, "--out", "first")
    assert (status, err) == (0, "") and out.count("training a teacher first") == 1
    assert cli(sr, *TINY, "--out", "second")[::2] == (0, "")
    assert_same(saved("first"), saved("second"))  # the state of the random generator too
    for script, flags in ((sr, ["--seed", 1, "--sigma", 0.1]), (ft, ["--dropout", 0]), (mc, [])):
        assert "training a teacher" not in cli(script, *TINY, *flags)[1]


def test_a_teacher_that_was_stopped_is_trained_on_by_whoever_wants_it(cli):
    """By another script, and, where there is no label noise, with another seed of it."""
    with stopped_after_each_epoch():
        assert cli(sr, *TINY, "--epochs", 2)[0] == 130
    (folder,) = Path("runs/teachers").iterdir()
    assert cli(mc, *TINY, "--epochs", 2, "--noise-seed", 1, "--out", "run")[::2] == (0, "")
    assert saved("run")["teacher"] == str(folder / "checkpoint.pt") and [*folder.parent.iterdir()] == [folder]


def test_a_teacher_of_an_edited_common_py_is_taken_and_that_is_said(cli, monkeypatch, tmp_path):
    """So that a run that was stopped goes on with the teacher that it has."""
    assert cli(sr, *TINY)[0] == 0
    (folder,) = Path("runs/teachers").iterdir()
    for text, said in (("", False), ("# edited", True)):
        (tmp_path / "common.py").write_text(Path(common.__file__).read_text() + text)
        monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
        status, out, _ = cli(sr, *TINY, "--out", f"run{said}")
        assert status == 0 and (f"common.py was edited after {folder} was trained" in out) == said
        assert saved(f"run{said}")["teacher"] == str(folder / "checkpoint.pt")


def test_what_would_make_another_teacher_names_another_folder(cli, tiny_npz):
    """A short one: network, data, noise, epochs, and a digest of the rest."""
    pixels = np.zeros((40, 3, 8, 8), np.uint8)
    few = {"train_images": pixels, "test_images": pixels[:20]}
    write_npz(tiny_npz, **few)
    changes = [
        "", "--dropout 0", "--noise sym --rate 0.2", "--noise sym --rate 0.3", "--noise pair --rate 0.2",
        "--noise sym --rate 0.2 --noise-seed 1", "--limit-train 30", "--teacher-epochs 2", "--batch-size 10",
        "--lr 0.01", "--weight-decay 0", "--teacher-arch resnet8 --dropout 0", "--amp",
    ]  # fmt: skip
    for change in changes:
        assert cli(ft, *TINY, *change.split())[0] == 0, change
    others = {"test_labels": np.arange(20)[::-1] % 3, "train_images": pixels + np.uint8(1)}
    for seed, (name, array) in enumerate(others.items(), 1):
        write_npz(tiny_npz, **few | {name: array})
        assert cli(ft, *TINY, "--seed", seed)[0] == 0
    folders = list(Path("runs/teachers").iterdir())
    assert len(folders) == len(changes) + 2
    name = r"[\w-]+-tiny-(clean|\w+0\.[23])-epochs=[12]-[0-9a-f]{8}-seed0"
    assert all(re.fullmatch(name, folder.name) for folder in folders)
    cli(ft, *TINY, "--tau", 3, "--alpha", 0.5, "--epochs", 2, "--teacher-epochs", 1, "--seed", 3)
    assert set(Path("runs/teachers").iterdir()) == set(folders)  # which change nothing of it


def test_other_data_of_the_same_name_is_another_run_and_another_teacher(cli, tiny_npz):
    assert cli(sr, *TINY, "--out", "first")[0] == 0
    write_npz(tiny_npz, train_labels=np.arange(40)[::-1] % 3)
    status, out, err = cli(sr, *TINY, "--out", "first", "--resume")
    assert status == 2 and "training a teacher first" in out
    assert "first holds another run: " in err and "train_digest (" in err


def test_another_teacher_of_the_same_path_is_another_run(cli, tiny_npz, teacher):
    assert cli(sr, *GIVEN, "--out", "run")[0] == 0
    with torch.no_grad():
        teacher.head[-1].bias[0] += 100  # it answers class 0
    torch.save(teacher.state_dict(), "weights.pth")
    status, _, err = cli(sr, *GIVEN, "--out", "run", "--resume")
    assert status == 2 and "run holds another run: teacher_acc (" in err


@pytest.mark.parametrize("best", [0, 1])
def test_the_best_of_several_teachers_teaches(cli, tiny_npz, best):
    """The test labels become the answers of one of them; teachers do not learn from these."""
    flags = [*TINY, "--teacher-seeds", 2]
    assert cli(sr, *flags)[0] == 0
    teachers = sorted(Path("runs/teachers").glob("*/checkpoint.pt"))
    states = [common.load_checkpoint(path)["model"] for path in teachers]
    assert len(teachers) == 2 and not torch.equal(*(state["stem.0.weight"] for state in states))
    model = common.load_model(common.load_checkpoint(teachers[best]))
    answers = common.predict(model, common.load_dataset("tiny.npz").test_images).argmax(1)
    write_npz(tiny_npz, test_labels=answers.numpy())
    Path("runs").rename("before")
    assert cli(sr, *flags, "--out", "run")[::2] == (0, "")
    teachers = sorted(map(str, Path("runs/teachers").glob("*/checkpoint.pt")))
    assert (saved("run")["teacher"], saved("run")["teacher_acc"]) == (teachers[best], 100)


def test_a_given_teacher_is_used_by_its_file_or_its_run_folder(cli):
    assert cli(sr, *ALONE, "--method", "ga", "--out", "made")[0] == 0
    flags = [*ALONE, "--teacher", "made/checkpoint.pt"]
    for out, teacher in (("run", "made/checkpoint.pt"), ("by-folder", "made")):
        assert cli(mc, *flags[:-1], teacher, "--out", out)[::2] == (0, "")
        assert saved(out)["teacher"] == "made/checkpoint.pt"
    assert not Path("runs").exists()  # nothing is trained


def test_an_interrupted_run_continues_to_the_same_bit(cli):
    assert_resumes_to_the_same_bit(cli, ft, *TINY, "--epochs", 2, stops=3)  # one of them is the teacher's
