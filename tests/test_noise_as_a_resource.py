"""fickle_teacher.py, soft_randomization.py, messy_collaboration.py: losses, noise, teachers and whole runs."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, write_npz
from test_augment import within
from test_run import assert_same_run

import common
import fickle_teacher
import messy_collaboration
import soft_randomization

SCRIPTS = {"ft": fickle_teacher, "sr": soft_randomization, "mc": messy_collaboration}
ALONE = {"ft": "baseline", "sr": "ga", "mc": "baseline"}


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def distillation_loss(S, T, y, alpha, tau):
    """Equation 1 in float64, written out."""
    log_s, log_t = log_softmax(S / tau), log_softmax(T / tau)
    kl = (np.exp(log_t) * (log_t - log_s)).sum(1).mean()
    return (1 - alpha) * -log_softmax(S)[np.arange(len(y)), y].mean() + alpha * tau**2 * kl


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_kl_divergence_by_hand(script):
    """Student (1/2, 1/2), teacher (3/4, 1/4): 3/4 log 3/2 + 1/4 log 1/2; one more that agrees halves the mean."""
    S, T = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    by_hand = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert script.kl_divergence(S, T).item() == pytest.approx(by_hand, rel=1e-6)
    assert script.kl_divergence(torch.cat([S, T]), torch.cat([T, T])).item() == pytest.approx(by_hand / 2, rel=1e-6)
    assert script.kl_divergence(T + 5, T).item() == pytest.approx(0, abs=1e-7)


@pytest.fixture
def spy(monkeypatch):
    """Record what the student and the teacher of a run see and answer, and the targets of the cross-entropy."""
    seen = {"x": [], "student": [], "S": [], "teacher": [], "T": [], "y": []}
    build, load, crop, loss = (
        common.build_model,
        common.load_teacher,
        common.crop_flip,
        torch.nn.functional.cross_entropy,
    )

    def built(*args, **more):
        model = build(*args, **more)

        def note(module, inputs, output):
            if module.training:
                seen["student"].append(inputs[0])
                seen["S"].append(output.detach())

        model.register_forward_hook(note)
        return model

    def loaded(*args):
        teacher = load(*args)
        seen["teacher model"], seen["before"] = teacher, {k: v.clone() for k, v in teacher.state_dict().items()}

        def note(module, inputs, output):
            seen["teacher"].append(inputs[0])
            seen["T"].append(output)

        teacher.register_forward_hook(note)
        for recorded in ("x", "student", "S", "y"):  # forget what training a teacher left
            seen[recorded].clear()
        return teacher

    def cropped(*args, **options):
        seen["x"].append(crop(*args, **options))
        return seen["x"][-1]

    def cross_entropy(logits, y):
        seen["y"].append(y)
        return loss(logits, y)

    monkeypatch.setattr(common, "build_model", built)
    monkeypatch.setattr(common, "load_teacher", loaded)
    monkeypatch.setattr(common, "crop_flip", cropped)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    return seen


NETS = ["--teacher-arch", "wrn-10-1", "--student-arch", "resnet8"]


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_loop_minimises_equation_1(cli, spy, method, tmp_path):
    """Every step's loss, and that nothing of the teacher moves: weights, BatchNorm's averages, gradients."""
    status, out, err = cli(SCRIPTS[method], *TINY, *NETS, "--alpha", 0.7, "--tau", 3, "--out", "run", "--epochs", 1)
    assert (status, err) == (0, "")
    assert len(spy["S"]) == len(spy["T"]) == len(spy["y"]) == 3
    expected = [
        distillation_loss(S.numpy(), T.numpy(), y.numpy(), 0.7, 3) for S, T, y in zip(spy["S"], spy["T"], spy["y"])
    ]
    (record,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert record["train_loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    teacher = spy["teacher model"]
    assert all(torch.equal(v, spy["before"][k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(T.requires_grad for T in spy["T"])


@pytest.mark.parametrize("method", SCRIPTS)
def test_alone_it_is_cross_entropy_without_a_teacher(cli, spy, method, tmp_path):
    status, out, err = cli(SCRIPTS[method], *TINY, *NETS, "--method", ALONE[method], "--out", "run", "--epochs", 1)
    assert (status, err) == (0, "") and "teacher:" not in out and not (tmp_path / "runs").exists()
    cross_entropy = [-log_softmax(S.numpy())[np.arange(len(y)), y].mean() for S, y in zip(spy["S"], spy["y"])]
    (record,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert record["train_loss"] == pytest.approx(np.mean(cross_entropy), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- noise


def test_a_fickle_teacher_changes_its_mind_and_nothing_else():
    x = torch.rand(8, 3, 32, 32)
    teacher = fickle_teacher.fickle(common.build_model("wrn-10-1", 10, dropout=0.4))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.no_grad():
        first, second = teacher(x), teacher(x)
        alone = torch.cat([teacher.eval()(part) for part in x.split(1)])
        assert torch.allclose(alone, teacher(x), atol=1e-5)  # in evaluation mode the others of the batch don't matter
    assert (first != second).any(1).all()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    modes = {type(m).__name__: m.training for m in fickle_teacher.fickle(teacher).modules()}
    assert modes["Dropout"] and not modes["BatchNorm2d"]
    hinton = fickle_teacher.fickle(common.build_model("wrn-10-1", 10, dropout=0.0))
    with torch.no_grad():
        assert torch.equal(hinton(x), hinton(x))


def test_only_the_teacher_has_dropout(cli, spy):
    assert cli(fickle_teacher, *TINY, "--teacher-arch", "wrn-10-1", "--epochs", 1, "--dropout", 0.3)[0] == 0
    rates = {m.p for m in spy["teacher model"].modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.3}
    checkpoint = common.load_checkpoint("runs/ft-shapes-clean-dropout0.3-seed0/checkpoint.pt")
    assert checkpoint["dropout"] == 0 and "dropout0.3" in checkpoint["teacher"]


@pytest.mark.parametrize("rate, epochs, drops", [(0, 200, (60, 120, 150)), (0.1, 250, (75, 150, 200)),
                                                (0.2, 250, (75, 150, 200)), (0.3, 300, (90, 180, 240)),
                                                (0.4, 350, (105, 210, 280)), (0.5, 350, (105, 210, 280))])  # fmt: skip
def test_the_schedule_of_section_4_1(cli, monkeypatch, rate, epochs, drops, tiny_npz):
    seen = {}

    def stop(args, run, data, labels, milestones, dropout):
        seen.update(args=args, milestones=milestones, dropout=dropout)
        raise common.UsageError("far enough")

    monkeypatch.setattr(common, "load_teacher", stop)
    cli(fickle_teacher, "--dataset", tiny_npz, "--dropout", rate)
    args = seen["args"]
    assert (args.epochs, tuple(seen["milestones"]), seen["dropout"]) == (epochs, drops, rate)
    assert (args.teacher_arch, args.student_arch, args.batch_size) == ("wrn-40-2", "wrn-16-2", 128)
    assert (args.lr, args.weight_decay, args.alpha, args.tau) == (0.1, 5e-4, 0.9, 4)


def test_soft_randomization_shows_noise_to_the_student_only(cli, spy):
    assert cli(soft_randomization, *TINY, *NETS, "--sigma", 0.2, "--epochs", 1)[0] == 0
    delta = torch.cat([noisy - x for noisy, x in zip(spy["student"], spy["x"])])
    assert all(torch.equal(a, b) for a, b in zip(spy["teacher"], spy["x"]))
    n = delta.numel()
    assert abs(delta.mean()) < 4 * 0.2 / n**0.5 and abs(delta.std() - 0.2) < 4 * 0.2 / (2 * n) ** 0.5
    assert not torch.equal(delta[:32], delta[32:64])
    assert min(x.min() for x in spy["student"]) < -0.1  # not clipped


def test_clipping_is_an_option(cli, spy):
    assert cli(soft_randomization, *TINY, *NETS, "--method", "ga", "--clip", "--epochs", 1)[0] == 0
    noisy, x = torch.cat(spy["student"]), torch.cat(spy["x"])
    assert noisy.min() == 0 and noisy.max() == 1 and (noisy != x).float().mean() > 0.5


def test_messy_targets_by_counting():
    y = torch.arange(50_000) % 10
    first, second = messy_collaboration.messy(y, 0.3, 10), messy_collaboration.messy(y, 0.3, 10)
    for targets in (first, second):
        within((targets != y).sum(), len(y), 0.3 * 0.9)
        for c in range(10):  # whatever the label, every other class is as likely
            within((targets[y != c] == c).sum(), int((y != c).sum()), 0.03)
    within(((first != y) & (second != y)).sum(), len(y), (0.3 * 0.9) ** 2)  # drawn anew
    assert torch.equal(messy_collaboration.messy(y, 0, 10), y)


def test_messy_targets_are_drawn_anew_for_every_batch(cli, spy):
    size = ["--limit-train", 640, "--limit-test", 10, "--batch-size", 320, "--epochs", 3, "--device", "cpu"]
    flags = ["--noise", "none", "--target-noise", 0.5, *NETS, *size]
    assert cli(messy_collaboration, *flags)[0] == 0
    x, y = torch.cat(spy["x"]), torch.cat(spy["y"])
    counts = torch.stack([batch.bincount(minlength=10) for batch in spy["y"]])
    assert len(spy["y"]) == 6 and x.shape[0] == len(y) == 1920
    labels = common.load_dataset("shapes", limit_train=640).train_labels.bincount(minlength=10)
    epochs = counts.view(3, 2, 10).sum(1)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(epochs[0], labels)


def test_the_cross_entropy_term_alone_is_messy(cli, spy):
    """Share of wrong targets against the labels of the same images, found again by their pixels."""
    data = common.load_dataset("shapes", limit_train=96)
    label = {image.float().mean().item(): y.item() for image, y in zip(data.train_images, data.train_labels)}
    flags = ["--noise", "none", "--target-noise", 1, *NETS, *TINY, "--epochs", 4]
    common.crop_flip, keep = lambda x, **_: spy["x"].append(x) or x, common.crop_flip
    try:
        assert cli(messy_collaboration, *flags)[0] == 0
    finally:
        common.crop_flip = keep
    x, y = torch.cat(spy["x"][-12:]), torch.cat(spy["y"])
    true = torch.tensor([label[(image * 255).round().mean().item()] for image in x])
    within((true != y).sum(), len(y), 0.9)


def test_labels_are_corrupted_with_a_probability_each():
    labels = torch.arange(20_000) % 10
    shares = []
    for seed in range(6):
        noisy = common.corrupt_labels(labels, "sym", 0.25, 10, seed, per_sample=True)
        within((noisy != labels).sum(), len(labels), 0.25 * 0.9)
        shares.append((noisy != labels).sum().item())
        assert torch.equal(noisy, common.corrupt_labels(labels, "sym", 0.25, 10, seed, per_sample=True))
    assert len(set(shares)) > 1


# ------------------------------------------------------------------------------------------------------------- teachers


def test_a_teacher_is_trained_once_and_found_again(cli, tmp_path):
    flags = [*TINY, *NETS]
    status, out, err = cli(soft_randomization, *flags, "--out", "first")
    assert (status, err) == (0, "") and out.count("training a teacher first") == 1
    (folder,) = (tmp_path / "runs/teachers").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl"]
    teacher = common.load_checkpoint(folder / "checkpoint.pt")
    assert (teacher["method"], teacher["arch"], teacher["epoch"]) == ("teacher", "wrn-10-1", 2)
    status, out, err = cli(soft_randomization, *flags, "--out", "second")
    assert (
        (status, err) == (0, "") and "training a teacher" not in out and f"teacher: runs/teachers/{folder.name}" in out
    )
    # whether the teacher was there or not does not show in the student
    a, b = (common.load_checkpoint(f"{name}/checkpoint.pt") for name in ("first", "second"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and torch.equal(
        *(c["rng"]["cpu"] for c in (a, b))
    )
    assert a["teacher"] == b["teacher"] == f"runs/teachers/{folder.name}/checkpoint.pt"
    # another seed of the student, another sigma, the other scripts: the same teacher
    assert "training a teacher" not in cli(soft_randomization, *flags, "--seed", 1, "--sigma", 0.1)[1]
    assert "training a teacher" not in cli(fickle_teacher, *flags, "--dropout", 0)[1]
    assert "training a teacher" not in cli(messy_collaboration, *flags, "--noise", "none")[1]


@pytest.mark.parametrize("change", [
    ["--noise", "sym", "--rate", 0.2], ["--noise", "sym", "--rate", 0.3, "--seed", 1], ["--epochs", 1], ["--lr", 0.01],
    ["--batch-size", 48], ["--weight-decay", 0], ["--limit-train", 90], ["--teacher-arch", "resnet8"],
])  # fmt: skip
def test_what_identifies_a_teacher(monkeypatch, cli, change):
    """Whatever would have made another teacher makes another folder; no training needed to see which."""
    folders = []

    class Stop(common.UsageError):
        pass

    def stop(self, args, *_, **__):
        folders.append(args.out)
        raise Stop("far enough")

    run = common.Run
    for flags in ([], change):
        made = []

        def first_student(self, args, *a, made=made, **k):
            if made:
                stop(self, args)
            made.append(run.__init__(self, args, *a, **k))

        monkeypatch.setattr(common, "Run", type("Run", (run,), {"__init__": first_student}))
        cli(soft_randomization, *TINY, *NETS, "--out", f"run{len(folders)}", *flags)
    assert len(folders) == 2 and folders[0] != folders[1]
    assert all(folder.parts[:2] == ("runs", "teachers") for folder in folders)


def test_dropout_identifies_a_teacher_and_label_noise_reaches_it(cli, tmp_path):
    for dropout in (0, 0.3):
        assert "training a teacher" in cli(fickle_teacher, *TINY, "--teacher-arch", "wrn-10-1", "--dropout", dropout)[1]
    rates = {common.load_checkpoint(f)["dropout"] for f in tmp_path.glob("runs/teachers/*/checkpoint.pt")}
    assert rates == {0, 0.3}


def test_the_best_of_several_teachers_teaches(cli, tmp_path):
    status, out, err = cli(soft_randomization, *TINY, *NETS, "--teacher-seeds", 3)
    assert (status, err) == (0, "")
    teachers = {f: common.load_checkpoint(f) for f in tmp_path.glob("runs/teachers/*/checkpoint.pt")}
    assert sorted(c["config"]["seed"] for c in teachers.values()) == [0, 1, 2]
    best = max(c["metrics"][-1]["test_acc"] for c in teachers.values())
    chosen = common.load_checkpoint("runs/sr-shapes-clean-sigma0.2-seed0/checkpoint.pt")["teacher"]
    assert common.load_checkpoint(chosen)["metrics"][-1]["test_acc"] == best
    weights = [c["model"]["stem.0.weight"] for c in teachers.values()]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_given_teacher_is_used_as_it_is(cli, spy):
    assert cli(soft_randomization, *TINY, *NETS, "--out", "first")[0] == 0
    path = common.load_checkpoint("first/checkpoint.pt")["teacher"]
    status, out, err = cli(messy_collaboration, *TINY, "--epochs", 1, "--noise", "none", "--teacher", path)
    assert (status, err) == (0, "") and "training a teacher" not in out
    saved = common.load_checkpoint(path)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in spy["teacher model"].state_dict().items())


def test_a_teacher_that_does_not_fit_is_refused(cli, tmp_path, tiny_npz):
    assert cli(soft_randomization, *TINY, *NETS, "--method", "ga", "--out", "made")[0] == 0
    other = write_npz(tmp_path / "shapes.npz")  # the same name, other classes
    for flags, says in (
        (["--dataset", tiny_npz], "data set shapes, not tiny"),
        (["--dataset", other], "classes"),
        (["--teacher", "nowhere.pt"], "no file nowhere.pt"),
        (["--teacher", tiny_npz], "damaged or no checkpoint"),
    ):
        status, _, err = cli(soft_randomization, *TINY, "--teacher", "made/checkpoint.pt", "--out", "new", *flags)
        assert status == 2 and err.count("\n") == 1 and err.startswith("error: --teacher: ") and says in err
        assert not list(tmp_path.glob("new/*"))
    status, _, err = cli(fickle_teacher, *TINY, "--teacher", "made/checkpoint.pt")
    assert status == 2 and err.count("\n") == 1 and "dropout 0.0, not 0.4" in err


@pytest.mark.parametrize("flags, names", [
    (["--dropout", 1.5], "--dropout"), (["--dropout", 0.4, "--teacher-arch", "resnet8"], "--dropout"),
    (["--teacher-arch", "wrn-11-2"], "--arch"), (["--student-arch", "vgg"], "--arch"), (["--tau", 0], "--tau"),
    (["--alpha", 2], "--alpha"), (["--teacher-seeds", 0], "--teacher-seeds"), (["--method", "hinton"], "--method"),
])  # fmt: skip
def test_bad_input(cli, flags, names, tmp_path):
    status, _, err = cli(fickle_teacher, *TINY, *flags)
    assert status == 2 and err.count("\n") == 1 and names in err and not list(tmp_path.glob("runs/*/*"))


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method, folder, tables", [
    ("fickle_teacher.py", "ft-shapes-clean-dropout0.4-seed0", "dropout=0.4"),
    ("soft_randomization.py", "sr-shapes-clean-sigma0.2-seed0", "sigma=0.2"),
    ("messy_collaboration.py", "mc-shapes-sym0.25-r0.1-seed0", "target_noise=0.1"),
])  # fmt: skip
def test_a_run_from_the_command_line(script, tmp_path, method, folder, tables):
    result = script(method, *TINY)
    assert (result.returncode, result.stderr) == (0, "") and tables in result.stdout
    assert "training a teacher first" in result.stdout and result.stdout.splitlines()[-1].endswith(f"runs/{folder}")
    assert sorted(p.name for p in (tmp_path / "runs" / folder).iterdir()) == [
        *("checkpoint.pt", "config.json", "curves.png", "metrics.jsonl")
    ]


@pytest.mark.parametrize("method", SCRIPTS)
def test_interrupted_runs_continue_to_the_same_bit(cli, monkeypatch, method):
    """Ctrl-C after the first epoch of the teacher, then after that of the student, against a run nobody disturbed."""
    flags = [*TINY, "--teacher-arch", "wrn-10-1", "--student-arch", "resnet8"]
    assert cli(SCRIPTS[method], *flags, "--out", "whole")[0] == 0
    teacher = common.load_checkpoint("whole/checkpoint.pt")["teacher"]
    common.Path("runs").rename("kept")

    end_epoch = common.Run.end_epoch

    def interrupt(run, *args, **metrics):
        end_epoch(run, *args, **metrics)
        if run.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "end_epoch", interrupt)
    assert cli(SCRIPTS[method], *flags, "--out", "broken")[0] == 130
    assert not list(common.Path("broken").iterdir()) and common.load_checkpoint(teacher)["epoch"] == 1
    status, out, _ = cli(SCRIPTS[method], *flags, "--out", "broken")  # the teacher goes on by itself
    assert status == 130 and "resuming runs/teachers" in out and common.load_checkpoint(teacher)["epoch"] == 2
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    status, out, err = cli(SCRIPTS[method], *flags, "--out", "broken", "--resume")
    assert (status, err) == (0, "") and "resuming broken after epoch 1 of 2" in out
    parts = ("model", "optimizer", "scheduler", "rng")
    assert_same_run(common.Path("whole"), common.Path("broken"), parts)
    assert_same_run(common.Path("kept", *common.Path(teacher).parts[1:-1]), common.Path(teacher).parent, parts)


def test_a_killed_run_continues_to_the_same_bit(cli, tmp_path):
    """SIGKILL in the middle of the student's training."""
    flags = [*TINY, *NETS, "--epochs", "3", "--limit-train", "480"]
    assert cli(fickle_teacher, *flags, "--dropout", 0.2, "--teacher-arch", "wrn-10-1", "--out", "whole")[0] == 0
    command = [sys.executable, str(ROOT / "fickle_teacher.py"), *flags, "--dropout", "0.2", "--out", "broken"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, deadline = tmp_path / "broken/metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 1:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cli(fickle_teacher, *flags, "--dropout", 0.2, "--out", "broken", "--resume")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken", ("model", "optimizer", "scheduler", "rng"))
