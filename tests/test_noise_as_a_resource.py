"""fickle_teacher.py, soft_randomization.py, messy_collaboration.py: losses, noise, teachers and whole runs."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_resumes_to_the_same_bit, assert_same, saved, within, write_npz

import common
import fickle_teacher as ft
import kd_zoo
import messy_collaboration as mc
import soft_randomization as sr

ALONE = [
    "--dataset",
    "tiny.npz",
    "--batch-size",
    20,
    "--epochs",
    1,
    "--device",
    "cpu",
    "--student-arch",
    "resnet8",
]
TINY = [*ALONE, "--teacher-arch", "wrn-10-1"]


@pytest.fixture(autouse=True)
def quick(tiny_npz, monkeypatch):
    monkeypatch.setattr(common, "plot_curves", lambda *_: None)


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
    """Student (1/2, 1/2), teacher (3/4, 1/4), tau 2: 4 (3/4 log 3/2 + 1/4 log 1/2); one that agrees halves the mean."""
    S, T = torch.zeros(1, 2), 2 * torch.tensor([[3.0, 1.0]]).log()
    by_hand = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert script.hinton_loss(S, T, 2).item() == pytest.approx(by_hand, rel=1e-6)
    twice = script.hinton_loss(torch.cat([S, T]), torch.cat([T + 5, T]), 2)
    assert twice.item() == pytest.approx(by_hand / 2, rel=1e-6)
    S, T = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    script.hinton_loss(S, T, 1).backward()
    assert torch.allclose(S.grad, (S.softmax(1) - T.softmax(1)).detach() / 6, atol=1e-6)


@pytest.fixture
def seen(monkeypatch):
    """Of a run, step by step: images and logits of student "S" and teacher "T", clean images "x", targets "y"."""
    seen = {"S": [], "T": [], "x": [], "y": [], "teacher": []}
    forward, load, loss = common.Classifier.forward, common.load_teacher, F.cross_entropy

    def watched(net, images):
        logits = forward(net, images)
        if net.training or net in seen["teacher"]:
            seen["S" if net.training else "T"].append((images, logits.detach().numpy()))
        return logits

    def loaded(*args, **recipe):
        teacher, path = load(*args, **recipe)
        for steps in seen.values():
            steps.clear()  # forget the training of the teacher
        seen["teacher"].append(teacher)
        return teacher, path

    monkeypatch.setattr(common.Classifier, "forward", watched)
    monkeypatch.setattr(common, "load_teacher", loaded)
    monkeypatch.setattr(
        common, "crop_flip", lambda x, mode, size: seen["x"].append(x) or x
    )  # pixels tell the image
    monkeypatch.setattr(F, "cross_entropy", lambda S, y: seen["y"].append(y) or loss(S, y))
    return seen


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("script, single", [(ft, "baseline"), (sr, "ga"), (mc, "baseline")])
def test_a_run_minimises_equation_1_or_cross_entropy(cli, seen, script, single, alone):
    """The mean over its steps. The teacher's weights, gradients and BatchNorm stay as they are."""
    flags = [*ALONE, "--method", single] if alone else [*TINY, "--alpha", 0.7, "--tau", 3]
    status, out, err = cli(script, *flags, "--out", "run")
    assert (status, err) == (0, "") and out.splitlines()[-1].endswith(": run")
    answers, alpha = (seen["S"], 0) if alone else (seen["T"], 0.7)
    steps = [(S, T, y.numpy()) for (_, S), (_, T), y in zip(seen["S"], answers, seen["y"], strict=True)]
    expected = np.mean([distillation_loss(*step, alpha, 3) for step in steps])
    checkpoint = saved("run")
    assert len(steps) == 2 and checkpoint["metrics"][0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert checkpoint["built_as"]["model"]["dropout"] == 0 and Path("runs").exists() != alone
    if not alone:
        (teacher,) = seen["teacher"]
        assert_same(common.load_checkpoint(checkpoint["teacher"])["model"], teacher.state_dict())
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not teacher.mean.any()  # images as they are
        assert {m.p for m in teacher.modules() if isinstance(m, nn.Dropout)} == {0.4 if script is ft else 0.0}


def test_a_fickle_teacher_changes_its_mind_and_nothing_else():
    x = torch.rand(8, 3, 32, 32)
    teacher = common.build_model("wrn-10-1", 10, dropout=0.4)
    ft.fickle(teacher)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        assert (teacher(x) != teacher(x)).any(1).all()
        assert_same(before, teacher.state_dict())
    with pytest.raises(common.UsageError, match="no dropout module"):
        ft.fickle(common.build_model("wrn-10-1", 10, dropout=0.0))


@pytest.mark.parametrize("clip", [[], ["--clip"]])
def test_soft_randomization_shows_noise_to_the_student_only(cli, seen, clip):
    assert cli(sr, *TINY, "--sigma", 0.2, *clip)[0] == 0
    noisy, clean = (torch.cat([x for x, _ in seen[who]]) for who in "ST")
    assert torch.equal(clean, torch.cat(seen["x"]))
    inner = (clean > 0.45) & (clean < 0.55)
    delta = (noisy - clean)[inner]
    assert len(delta) > 5000 and abs(delta.mean()) < 0.015 and abs(delta.std() - 0.2) < 0.01
    assert (noisy.min(), noisy.max()) == (0, 1) if clip else noisy.min() < -0.5 and noisy.max() > 1.5
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


def test_labels_are_corrupted_once_and_targets_in_every_batch(cli, seen, monkeypatch):
    """By --noise-seed alone. The labels that targets start from are those that the teacher was given."""
    given, load = [], common.load_teacher
    monkeypatch.setattr(
        common, "load_teacher", lambda *args, **recipe: given.append(args[3]) or load(*args, **recipe)
    )
    flags = [*TINY, "--noise", "sym", "--rate", 0.5, "--target-noise", 0.3, "--epochs", 10]
    status, out, err = cli(mc, *flags, "--noise-seed", 3)
    data = common.load_dataset("tiny.npz")
    labels = common.corrupt_labels(data.train_labels, "sym", 0.5, "abc", 3, per_sample=True)
    wrong = 100 * (labels != data.train_labels).float().mean().item()
    assert (status, err) == (0, "") and f"40 training images, {wrong:.2f} % relabelled" in out and wrong > 0
    place = {image.numpy().tobytes(): i for i, image in enumerate(data.train_images)}
    images = (torch.cat(seen["x"]) * 255).round().byte()
    index = torch.tensor([place[image.numpy().tobytes()] for image in images])
    changed = torch.cat(seen["y"]) != labels[index]
    assert (
        within(int(changed.sum()), 400, 0.3 * 2 / 3) and len(index[changed].unique()) > 30
    )  # others in every epoch
    for seeds in ("--noise-seed 3 --seed 1", "--noise-seed 4"):
        cli(mc, *flags, "--epochs", 1, *seeds.split())
    assert (
        torch.equal(given[0], labels) and torch.equal(given[1], labels) and not torch.equal(given[2], labels)
    )


@pytest.mark.parametrize("script", [ft, sr, mc, kd_zoo])
def test_student_and_teacher_see_crops_padded_by_reflection(cli, monkeypatch, script):
    crops, crop = [], common.crop_flip

    def crop_flip(x, padding=4, mode="zero", size=None):
        crops.append((padding, mode))
        return crop(x, padding, mode, size)

    monkeypatch.setattr(common, "crop_flip", crop_flip)
    assert cli(script, *TINY)[0] == 0
    assert crops == [(4, "reflect")] * 4  # two steps each


def test_a_teacher_is_trained_once_and_found_again(cli):
    """By the same command, another seed, another sigma and the other scripts. It does not show in the student."""
    status, out, err = cli(sr, *TINY, "--out", "first")
    assert (status, err) == (0, "") and out.count("training a teacher first") == 1
    assert cli(sr, *TINY, "--out", "second")[::2] == (0, "")
    assert_same(saved("first"), saved("second"))  # the state of the random generator too
    for script, flags in ((sr, ["--seed", 1, "--sigma", 0.1]), (ft, ["--dropout", 0]), (mc, [])):
        assert "training a teacher" not in cli(script, *TINY, *flags)[1]


def test_a_teacher_that_was_stopped_is_trained_on_by_whoever_wants_it(cli):
    """By another script, and, where there is no label noise, with another seed of it."""
    end_epoch = common.Run.end_epoch

    def stop(run, *losses, **metrics):
        end_epoch(run, *losses, **metrics)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "end_epoch", stop)
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


def test_what_would_make_another_teacher_names_another_folder(cli, monkeypatch, tiny_npz):
    """A short one: network, data, noise, epochs, and a digest of the rest."""
    folders = []

    def load_teacher(*args, **how):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                common, "predict", lambda *_: (_ for _ in ()).throw(common.UsageError("far enough"))
            )
            return load(*args, **how)

    def teachers(*change):
        cli(ft, *TINY, *change)
        (folder,) = set(Path("runs/teachers").iterdir()) - set(folders)
        folders.append(folder)

    load = common.load_teacher
    monkeypatch.setattr(common, "load_teacher", load_teacher)
    changes = ["--dropout 0", "", "--noise sym --rate 0.2", "--noise sym --rate 0.3", "--noise pair --rate 0.2",
               "--noise sym --rate 0.2 --noise-seed 1", "--limit-train 30", "--teacher-epochs 2", "--batch-size 10",
               "--lr 0.01", "--weight-decay 0", "--teacher-arch resnet8 --dropout 0", "--amp"]  # fmt: skip
    for change in changes:
        teachers(*change.split())
    write_npz(tiny_npz, test_labels=np.arange(20)[::-1] % 3)
    teachers()
    write_npz(tiny_npz, train_images=np.zeros((40, 3, 32, 32), np.uint8))
    teachers()
    assert all(
        re.fullmatch(r"[\w-]+-tiny-(clean|\w+0\.[23])-epochs=[12]-[0-9a-f]{8}-seed0", f.name) for f in folders
    )
    cli(ft, *TINY, "--tau", 3, "--alpha", 0.5, "--epochs", 2, "--teacher-epochs", 1, "--seed", 1)
    assert set(Path("runs/teachers").iterdir()) == set(folders)  # which change nothing of it


def test_other_data_of_the_same_name_is_another_run_and_another_teacher(cli, tiny_npz):
    assert cli(sr, *TINY, "--out", "first")[0] == 0
    write_npz(tiny_npz, train_labels=np.arange(40)[::-1] % 3)
    status, out, err = cli(sr, *TINY, "--out", "first", "--resume")
    assert status == 2 and "training a teacher first" in out
    assert "first holds another run: " in err and "train_digest (" in err


@pytest.mark.parametrize("best", [0, 1])
def test_the_best_of_several_teachers_teaches(cli, monkeypatch, best):
    scores = [50 + (seed == best) for seed in (0, 1)] + [
        51,
        90,
    ]  # of the teachers, the best again, the student
    monkeypatch.setattr(common, "accuracy", lambda *_: float(scores.pop(0)))
    assert cli(sr, *TINY, "--teacher-seeds", 2, "--out", "run")[::2] == (0, "")
    paths = sorted(map(str, Path("runs/teachers").glob("*/checkpoint.pt")))
    assert len(paths) == 2 and saved("run")["teacher"] == paths[best]
    first, second = (common.load_checkpoint(path)["model"]["stem.0.weight"] for path in paths)
    assert not torch.equal(first, second)


def test_a_given_teacher_is_used_where_it_fits_and_refused_where_not(cli, tmp_path):
    small = np.zeros((40, 3, 16, 16), np.uint8)
    write_npz(tmp_path / "small.npz", train_images=small, test_images=small[:20])
    write_npz(tmp_path / "other.npz", classes=np.array(["ant", "bee", "cow"]))
    assert cli(sr, *ALONE, "--method", "ga", "--out", "made")[0] == 0
    flags = [*ALONE, "--teacher", "made/checkpoint.pt"]
    for script, changes, says in (
        (sr, ["--dataset", "other.npz"], "classes ['ant', 'bee', 'cat'], not ['ant', 'bee', 'cow'];"),
        (sr, ["--dataset", "small.npz"], "image_size 32, not 16;"),
    ):
        status, _, err = cli(script, *flags, *changes)
        assert status == 2 and err.count("\n") == 1
        assert err.startswith(f"error: --teacher: made/checkpoint.pt has {says}")
    for out, teacher in (("run", "made/checkpoint.pt"), ("by-folder", "made")):
        assert cli(mc, *flags[:-1], teacher, "--out", out)[::2] == (0, "")
        assert saved(out)["teacher"] == "made/checkpoint.pt"
    assert not Path("runs").exists()  # nothing is trained, and what is refused leaves no folder


def test_an_interrupted_run_continues_to_the_same_bit(cli):
    assert_resumes_to_the_same_bit(cli, ft, *TINY, "--epochs", 2, stops=3)  # one of them is the teacher's
