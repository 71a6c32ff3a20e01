"""nrd.py as a user runs it: a run, its folder, resuming after a kill, stopping, bad input, analysis."""

import json
import os
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, write_npz

import common
import nrd

TIMES = ("images_per_second", "seconds")


def without_times(metrics):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in metrics]


def assert_same_run(a, b, parts=("model", "ema", "optimizer", "scheduler", "rng")):
    """Two run folders hold the same state to the bit, but for what a clock measured."""
    a, b = (common.load_checkpoint(folder / "checkpoint.pt") for folder in (a, b))
    assert a.keys() == b.keys() and without_times(a["metrics"]) == without_times(b["metrics"])

    def same(x, y, path):
        if isinstance(x, dict):
            assert x.keys() == y.keys(), path
            for key in x:
                same(x[key], y[key], f"{path}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y), path
            for i, (p, q) in enumerate(zip(x, y)):
                same(p, q, f"{path}[{i}]")
        elif torch.is_tensor(x):
            assert torch.equal(x, y), path
        else:
            assert x == y, path

    for part in parts:
        same(a[part], b[part], part)


def test_a_run_from_the_command_line(script, tmp_path):
    result = script("nrd.py", *TINY)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert "dataset=shapes" in lines[0] and "loss_params=[0.2, 0.6, 0.2]" in result.stdout
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert (
        len(epochs) == 2 and all("images/s" in line and "left" in line for line in epochs) and "\r" not in result.stdout
    )
    folder = tmp_path / "runs" / "nrd-shapes-sym0.5-seed0"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert metrics[0].keys() >= {
        *("lr", "train_loss", "test_acc", "ema_test_acc", "train_acc_right", "train_acc_wrong", "train_acc_wrong_true"),
        *TIMES,
    }
    final, best = metrics[-1]["test_acc"], max(m["test_acc"] for m in metrics)
    assert lines[-1].startswith(f"final test accuracy {final:.2f} %") and f"best {best:.2f} %" in lines[-1]
    assert lines[-1].endswith("runs/nrd-shapes-sym0.5-seed0")
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr"], config["noise"], config["rate"], config["arch"]) == (0.3, "sym", 0.5, "wrn-10-1")
    assert matplotlib.image.imread(folder / "curves.png").shape[2] in (3, 4)

    # the checkpoint alone rebuilds the model
    checkpoint = common.load_checkpoint(folder / "checkpoint.pt")
    assert (checkpoint["method"], checkpoint["dataset"], checkpoint["num_classes"]) == ("nrd", "shapes", 10)
    assert checkpoint["noise"] == {"kind": "sym", "rate": 0.5, "seed": 0} and checkpoint["metrics"] == metrics
    data = common.load_dataset("shapes", limit_train=96, limit_test=40)
    for part, key in (("model", "test_acc"), ("ema", "ema_test_acc")):
        logits = common.predict(common.load_model(checkpoint, part), data.test_images)
        assert common.accuracy(logits, data.test_labels) == pytest.approx(metrics[-1][key], abs=0.01)


def test_a_terminal_gets_a_live_line(nrd_cli, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, _ = nrd_cli(*TINY, "--epochs", "1")
    line = out.split("\r")[1]
    assert status == 0 and line.startswith("epoch 1/1  step 1/3") and "images/s" in line and "left" in line
    assert "\r\nfinal" not in out and out.splitlines()[-1].startswith("final test accuracy")


@pytest.mark.parametrize("loss", [loss for loss in nrd.HYPERPARAMETERS if loss != "nrd"])
def test_every_loss_runs_and_learns_the_batch(nrd_cli, loss, tmp_path):
    """On clean labels, without augmentation, every loss must fall: 6 epochs on 64 images."""
    size = ["--limit-train", 64, "--limit-test", 10, "--epochs", 6, "--batch-size", 16, "--device", "cpu"]
    status, out, err = nrd_cli("--loss", loss, "--noise", "none", "--lr", 0.05, *size)
    assert (status, err) == (0, "")
    metrics = [
        json.loads(x) for x in (tmp_path / f"runs/{loss}-shapes-clean-seed0/metrics.jsonl").read_text().splitlines()
    ]
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] and metrics[-1]["train_acc_wrong"] is None
    assert metrics[-1]["train_acc_right"] > metrics[0]["train_acc_right"]


def test_schedule_divides_by_ten_at_half_and_three_quarters(nrd_cli, tmp_path):
    status, *_ = nrd_cli(*TINY, "--epochs", 8, "--limit-train", 32, "--out", "run")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert status == 0 and rates == pytest.approx([0.3] * 4 + [0.03] * 2 + [0.003] * 2)


def test_ablation_flags(nrd_cli, tiny_npz):
    flags = ["--dataset", tiny_npz, "--epochs", 1, "--batch-size", 20, "--arch", "resnet8", "--device", "cpu"]
    views = ["--views", 2, "--student-augment", "autoaugment+erasing", "--teacher-augment", "randaugment+crop"]
    status, out, err = nrd_cli(*flags, *views, "--loss-params", 0.1, 0.7, 0.2, "--noise", "pair", "--rate", 0.3)
    assert (status, err) == (0, "") and "runs/nrd-tiny-pair0.3-seed0" in out.splitlines()[-1]
    status, out, err = nrd_cli(*flags, "--amp", "--loss", "gjs", "--noise", "sym-other")  # bfloat16 on the CPU
    assert (status, err) == (0, "")


# ------------------------------------------------------------------------------------------------- killed and continued


LONGER = [*TINY, "--limit-train", "480", "--epochs", "4"]


def start(folder, *flags):
    command = [sys.executable, str(ROOT / "nrd.py"), *LONGER, "--out", str(folder), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_after(process, folder, epochs, sent):
    """Send the signal a moment after `epochs` epochs are in the checkpoint, in the middle of the next."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < epochs:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    time.sleep(0.15)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_killed_runs_continue_to_the_same_bit(nrd_cli, tmp_path):
    """SIGKILL, then Ctrl-C, then SIGTERM, each in the middle of an epoch, against a run that nobody disturbed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert nrd_cli(*LONGER, "--out", whole)[0] == 0

    status, _, _ = stop_after(start(broken), broken, 1, signal.SIGKILL)
    assert status == -signal.SIGKILL
    for epochs, sent in ((2, signal.SIGINT), (3, signal.SIGTERM)):
        status, out, err = stop_after(start(broken, "--resume"), broken, epochs, sent)
        assert status == 130 and "Traceback" not in err and "--resume continues" in err
        assert common.load_checkpoint(broken / "checkpoint.pt")["epoch"] == epochs
    status, out, err = nrd_cli(*LONGER, "--out", broken, "--resume")
    assert status == 0 and "resuming" in out and err == ""
    assert_same_run(whole, broken)
    names = sorted(p.name for p in broken.iterdir())
    assert names == ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl"]  # no temporary file is left


def test_slow_saving_takes_a_share_of_the_time_and_never_the_end(nrd_cli, tmp_path, monkeypatch):
    """A save of 0.3 s may come every 6 s: not after each of these epochs, but after the last one."""
    written, original, divergence = [], torch.save, nrd.js_divergence

    def slow(state, path):
        written.append(state["epoch"])
        time.sleep(0.3)
        original(state, path)

    monkeypatch.setattr(torch, "save", slow)
    assert nrd_cli(*TINY, "--epochs", 4, "--out", "slow")[0] == 0
    assert written == [0, 4]
    monkeypatch.setattr(
        nrd, "js_divergence", lambda *a: divergence(*a) * (1 if time.sleep(0.1) or steps.pop() else nan)
    )
    steps, nan = [0, *[1] * 8], float("nan")  # three steps an epoch
    status, _, err = nrd_cli(*TINY, "--epochs", 4, "--out", "bad")
    assert status == 1 and "step 3 of epoch 3" in err and "holds epoch 0" in err
    monkeypatch.setattr(nrd, "js_divergence", divergence)
    status, out, _ = nrd_cli(*TINY, "--epochs", 4, "--out", "bad", "--resume")
    assert status == 0 and "after epoch 0 of 4" in out
    assert_same_run(tmp_path / "slow", tmp_path / "bad")


def test_resuming_a_finished_run_says_so_and_changes_nothing(nrd_cli, tmp_path):
    assert nrd_cli(*TINY, "--out", "run")[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    status, out, _ = nrd_cli(*TINY, "--out", "run", "--resume")
    assert status == 0 and "after epoch 2 of 2" in out and out.splitlines()[-1].startswith("final test accuracy")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(nrd_cli, tmp_path, monkeypatch):
    calls = []

    def explode(distributions, weights):
        calls.append(1)
        return original(distributions, weights) * (math_nan if len(calls) == 5 else 1)  # three steps an epoch

    original, math_nan = nrd.js_divergence, float("nan")
    monkeypatch.setattr(nrd, "js_divergence", explode)
    status, out, err = nrd_cli(*TINY, "--out", "run")
    assert status == 1 and err.count("\n") == 1 and "the loss is nan at step 2 of epoch 2" in err
    checkpoint = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["epoch"] == 1 and all(v.isfinite().all() for v in checkpoint["model"].values())


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = [
    (["--dataset", "cifra10"], "--dataset", "did you mean cifar10"),
    (["--dataset", "missing.npz"], "--dataset", "no file missing.npz"),
    (["--arch", "wrn-16"], "--arch", "did you mean wrn-16-2"),
    (["--arch", "wrn-17-2"], "--arch", "unknown"),
    (["--noise", "symm"], "--noise", "did you mean sym"),
    (["--loss", "gcce"], "--loss", "did you mean gce"),
    (["--rate", "1.5"], "--rate", "[0, 1]"),
    (["--rate", "-0.1"], "--rate", "[0, 1]"),
    (["--rate", "nan"], "--rate", "[0, 1]"),
    (["--noise", "none", "--rate", "0.2"], "--rate", "leave --rate out"),
    (["--noise", "asym"], "--noise asym", "only CIFAR-10 and CIFAR-100"),
    (["--noise", "human-worse"], "--noise human-worse", "CIFAR-10_human.pt"),
    (["--loss-params", "0.2", "0.6", "0.3"], "--loss-params", "sum to 1.1, not to 1"),
    (["--loss-params", "0.2", "0.8"], "--loss-params", "nrd takes 3"),
    (["--loss", "js", "--loss-params", "1"], "--loss-params", "between 0 and 1"),
    (["--loss", "gce", "--loss-params", "0"], "--loss-params", "--loss ce"),
    (["--noise", "none", "--rate", "0"], "--rate", "leave --rate out"),
    (["--seed", "99999999999999999999"], "--seed", "whole number"),
    (["--epochs", "9" * 400], "--epochs", "whole number"),
    (["--lr", "1e39"], "--lr", "number"),
    (["--dataset", ""], "--dataset", "valid: shapes"),
    (["--out", "x" * 300], "x" * 300, "File name too long"),
    (["--loss", "ce", "--loss-params", "1"], "--loss-params", "ce takes 0"),
    (["--student-augment", "crop+flop"], "--student-augment", "unknown 'flop'"),
    (["--epochs", "0"], "--epochs", "at least 1"),
    (["--epochs", "2.5"], "--epochs", "whole number"),
    (["--batch-size", "-3"], "--batch-size", "at least 1"),
    (["--lr", "fast"], "--lr", "number"),
    (["--frobnicate"], "--frobnicate", "--help"),
    (["--device", "cuda:99"], "--device cuda:99", "--device cpu works"),
    (["--device", "gpu"], "--device", "valid: cpu, cuda"),
    (["--resume"], "--resume", "no checkpoint.pt in runs"),
    (["--analyze", "nowhere.pt"], "--analyze", "no file nowhere.pt"),
    (["--out", "file/run"], "--out", "file/run"),
]


@pytest.mark.parametrize(
    "flags, names, says", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing(nrd_cli, tmp_path, flags, names, says):
    (tmp_path / "file").write_text("a file where a folder is asked for")
    status, out, err = nrd_cli(*TINY, *flags)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert names in err and says in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_bad_input_from_a_real_shell(script, tmp_path):
    path = write_npz(tmp_path / "bad.npz", train_labels=np.arange(40))
    result = script("nrd.py", "--dataset", path)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert str(path) in result.stderr and "Traceback" not in result.stderr


def test_cuda_is_refused_where_there_is_none(nrd_cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, _, err = nrd_cli(*TINY, "--device", "cuda")
    assert status == 2 and "--device cuda: 0 CUDA devices" in err


def test_a_run_folder_is_never_overwritten(nrd_cli, tmp_path):
    assert nrd_cli(*TINY, "--out", "run")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    cases = [
        ([], "already holds this run; --resume continues it, --out DIR starts one elsewhere"),
        (["--lr", "0.2"], "lr (0.3 there, 0.2 here)"),
        (
            ["--resume", "--seed", "1", "--beta", "0.9"],
            "differs in beta (0.95 there, 0.9 here), seed (0 there, 1 here)",
        ),
    ]
    for flags, says in cases:
        status, _, err = nrd_cli(*TINY, "--out", "run", *flags)
        assert status == 2 and err.count("\n") == 1 and says in err, err
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("precious")
    status, _, err = nrd_cli(*TINY, "--out", "mine")
    assert status == 2 and "mine is not empty" in err and (tmp_path / "mine/config.json").read_text() == "precious"


def test_no_write_permission(nrd_cli, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(
        tmp_path / "locked", os.W_OK
    ):  # root may write anywhere: let the system refuse as it would refuse others

        def refuse(path, *_, **__):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(common.Path, "mkdir", refuse)
    status, _, err = nrd_cli(*TINY, "--out", "locked/run")
    assert status == 2 and err.count("\n") == 1 and "cannot write locked/run" in err and "Permission denied" in err


def test_weights_that_are_not_finite_are_not_saved(nrd_cli, tmp_path):
    """Two steps of absurd size, one an epoch: the losses are finite, what the second leaves behind is not."""
    flags = ["--loss", "ce", "--limit-train", 32, "--limit-test", 10, "--epochs", 2, "--device", "cpu", "--out", "run"]
    status, _, err = nrd_cli(*flags, "--lr", "1e9", "--weight-decay", "1e9")
    assert status == 1 and err.count("\n") == 1 and "weights are not finite after epoch 2" in err
    checkpoint = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["epoch"] == 1 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_failed_first_save_leaves_a_folder_that_can_be_used_again(nrd_cli, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file: no space")

    monkeypatch.setattr(torch, "save", full)
    status, _, err = nrd_cli(*TINY, "--out", "run")
    assert status == 2 and "cannot write run/checkpoint.pt" in err and list((tmp_path / "run").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoint.partial.pt").write_text("cut off by a kill")
    assert nrd_cli(*TINY, "--epochs", 1, "--out", "run")[0] == 0


def test_damaged_checkpoints_are_noticed(nrd_cli, tmp_path):
    assert nrd_cli(*TINY, "--epochs", 1, "--out", "run")[0] == 0
    path = tmp_path / "run/checkpoint.pt"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(x ^ 255 for x in whole[middle : middle + 50]) + whole[middle + 50 :])
    status, _, err = nrd_cli(*TINY, "--epochs", 1, "--out", "run", "--resume")
    assert status == 2 and err.startswith("error: --resume") and "damaged" in err and err.count("\n") == 1


def test_interrupted_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), common.replacing(path) as partial:
        partial.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    for error in (OSError(28, "No space left on device"), RuntimeError("No space left, says torch.save\nat line 1")):
        with pytest.raises(common.UsageError, match="No space left.*--out"), common.replacing(path) as partial:
            raise error
    assert path.read_text() == "old"


def test_checkpoints_are_data_not_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "foreign.pt").read_bytes()[:200])
    for name, says in (
        ("evil.pt", "damaged or no checkpoint"),
        ("foreign.pt", "no checkpoint of these scripts"),
        ("cut.pt", "damaged"),
    ):
        with pytest.raises(common.UsageError, match=says):
            common.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------------- analysis


def test_analysis_of_a_memorised_model(nrd_cli, tmp_path):
    """Cross-entropy fitted to 64 images: the mislabelled are predicted wrongly, and the report counts just that."""
    flags = ["--loss", "ce", "--limit-train", 64, "--limit-test", 10, "--epochs", 40, "--batch-size", 16, "--lr", 0.05]
    assert nrd_cli(*flags, "--device", "cpu", "--out", "run")[0] == 0
    status, out, err = nrd_cli("--analyze", "run/checkpoint.pt", "--device", "cpu", "--views", 4)
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "run/analysis.json").read_text())

    checkpoint = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    data = common.load_dataset("shapes", limit_train=64)
    given = common.corrupt_labels(data.train_labels, "sym", 0.5, 10, 0)
    wrong = given != data.train_labels
    p = common.predict(common.load_model(checkpoint), data.train_images).softmax(1)
    plain = result["accuracy_for_true_label"]["not transformed"]
    for subset, mask in (("clean", ~wrong), ("mislabelled", wrong), ("overall", wrong | ~wrong)):
        assert plain[subset] == pytest.approx(common.accuracy(p[mask], data.train_labels[mask]))
    assert common.accuracy(p[wrong], given[wrong]) > 50 > plain["mislabelled"]  # it has memorised
    assert result["ece"]["not transformed"] == pytest.approx(common.calibration(p, data.train_labels)[0])
    assert 0.5 < result["auroc"] <= 1  # views that it has not trained on bring the true class nearer
    assert result["views"] == 4
    assert matplotlib.image.imread(tmp_path / "run/analysis.png").shape[1] > 1000
    status, _, err = nrd_cli("--analyze", "run/metrics.jsonl")
    assert status == 2 and "--analyze" in err


def test_analysis_needs_label_noise(nrd_cli):
    assert nrd_cli(*TINY, "--noise", "none", "--out", "run")[0] == 0
    status, _, err = nrd_cli("--analyze", "run/checkpoint.pt")
    assert status == 2 and "0 of its 96 labels are wrong" in err
