"""nrd.py as a user runs it: a run and its folder, resuming, stopping, several seeds, bad input."""

import fcntl
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same, saved, stopped_after_each_epoch

import common
import nrd

MULTIPLIES_BFLOAT16 = common.multiplies_bfloat16  # conftest.py replaces it
FILES = ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl"]


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_the_command_line(nrd_cli, tmp_path):
    """--resume starts it, and later repeats its last line."""
    command = [sys.executable, ROOT / "nrd.py", *TINY, "--resume"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert (result.returncode, result.stderr) == (0, "")
    folder = next((tmp_path / "runs").iterdir())
    assert folder.name == "nrd-shapes-sym0.5-limit_train=96-limit_test=40-epochs=2-batch_size=32-seed0"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    lines, metrics = result.stdout.splitlines(), metrics_of(folder)
    start = lines.index(f"runs/{folder.name}, given: limit_train=96 limit_test=40 epochs=2 batch_size=32")
    assert lines[start + 1].startswith("preset: dataset=shapes noise=sym rate=0.5 noise_seed=0 ")
    preset = lines[start + 1].split()
    assert {"lr=0.5", "loss_params=0.2,0.6,0.2"} <= set(preset) and lines[start + 2].startswith("epoch 1/2 ")
    hidden = {
        "epochs",
        "device",
        "data_dir",
        "out",
        "resume",
        "keep",
        "seed",
        "seeds",
        "resize",
        "image_size",
    }
    assert not hidden & {flag.split("=")[0] for flag in preset}
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2 and all("images/s" in line and "left" in line for line in epochs)
    names = "lr train_loss test_acc ema_test_acc seconds train_acc_wrong train_acc_wrong_true"
    assert metrics[0].keys() >= set(names.split())
    best = max(record["test_acc"] for record in metrics)
    assert lines[-1].startswith(f"test_acc {metrics[-1]['test_acc']:.2f} % after epoch 2, best {best:.2f} %")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == lines[-1]
    assert metrics_of(folder) == metrics
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr"], config["noise"], config["rate"], config["arch"]) == (0.5, "sym", 0.5, "wrn-10-1")
    assert config["given"] == {"limit_train": 96, "limit_test": 40, "epochs": 2, "batch_size": 32}
    assert config["seed"] == 0 and "seeds" not in config and {"train_digest", "test_digest"} <= config.keys()

    # the checkpoint alone rebuilds the models
    checkpoint = common.load_checkpoint(folder)
    assert checkpoint["source"] == {name: (ROOT / name).read_text() for name in ("nrd.py", "common.py")}
    assert checkpoint["config"] == config
    assert checkpoint["noise"] == {"kind": "sym", "rate": 0.5, "seed": 0} and checkpoint["metrics"] == metrics
    data = common.load_dataset("shapes", limit_train=96, limit_test=40)
    for part, key in (("model", "test_acc"), ("ema", "ema_test_acc")):
        logits = common.predict(
            common.load_model(checkpoint, part, amp=checkpoint["config"]["amp"]), data.test_images
        )
        assert common.accuracy(logits, data.test_labels) == pytest.approx(metrics[-1][key], abs=0.01)


def test_several_seeds_are_several_runs_and_their_mean(nrd_cli, tmp_path, quick):
    """With a loss of two views."""
    flags = [*TINY, "--limit-train", 32, "--loss", "gjs"]
    status, out, _ = nrd_cli(*flags, "--seed", 3, 4, 3)
    folders = sorted((tmp_path / "runs").iterdir())
    assert status == 0 and [folder.name[-6:] for folder in folders] == ["-seed3", "-seed4"]
    values = [metrics_of(folder)[-1]["test_acc"] for folder in folders]
    assert f"test_acc {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in out
    assert nrd_cli(*flags, "--seed", 4, "--out", "alone")[0] == 0
    assert_same(saved(folders[1]), saved("alone"))
    assert [saved(folder)["noise"]["seed"] for folder in folders] == [0, 0]  # one corruption for all


def test_a_killed_run_continues_to_the_same_bit(nrd_cli, tmp_path):
    """SIGKILL in the middle of an epoch, against a run that nobody disturbed; in bfloat16."""
    flags = [*TINY, "--limit-train", "320", "--epochs", "4", "--amp"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert nrd_cli(*flags, "--out", whole)[0] == 0
    rates = [record["lr"] for record in metrics_of(whole)]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.005])  # appendix A.1
    command = [sys.executable, ROOT / "nrd.py", *flags, "--out", broken]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (broken / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    time.sleep(0.15)
    process.kill()
    process.communicate(timeout=60)
    (broken / "checkpoint.1.partial.pt").touch()  # as of a process that was killed while it wrote
    rest = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=180)
    assert process.returncode == -signal.SIGKILL and (rest.returncode, rest.stderr) == (0, "")
    assert re.search(r"epoch [123] of 4", rest.stdout)
    assert_same(saved(whole), saved(broken))
    assert sorted(path.name for path in broken.iterdir()) == FILES


def test_a_folder_is_never_shared(nrd_cli, tmp_path, quick):
    assert nrd_cli(*TINY, "--out", "run")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for flags, says in (
        ([], "run holds this run; --resume continues it"),
        (["--resume", "--seed", "1", "--beta", "0.9"], "run holds another run: beta (0.95 there, 0.9 here)"),
        (
            ["--resume", "--amp"],
            "amp (False there, True here); name another folder, or add --no-amp to compute as",
        ),
    ):
        status, _, err = nrd_cli(*TINY, "--out", "run", *flags)
        assert status == 2 and err.count("\n") == 1 and says in err, err
    with open("run/config.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = nrd_cli(*TINY, "--out", "run", "--resume")
        assert status == 2 and "another process is at work in run" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "taken").mkdir()
    for name in ("precious.txt", "config.json"):
        for text in ("precious", '{"script": "cmd"}', '{"about": {"script": "nrd"}}'):
            path = Path("taken") / name
            path.write_text(text)
            status, _, err = nrd_cli(*TINY, "--out", "taken")
            assert status == 2 and err.count("\n") == 1 and "name a new folder" in err
            assert [*Path("taken").iterdir()] == [path] and path.read_text() == text
        path.unlink()


def test_code_that_is_edited_while_a_run_is_stopped(nrd_cli, monkeypatch, tmp_path, quick):
    """The run goes on, with a metric more or less, and says so; both texts are kept."""
    end_epoch = common.Run.end_epoch
    texts = [(ROOT / "common.py").read_text()]

    def change(run, losses, test_acc, **metrics):
        end_epoch(run, losses, **metrics, weight_norm=1.5)

    for edit in range(2):
        with stopped_after_each_epoch():
            assert nrd_cli(*TINY, "--epochs", 4, "--out", "run", "--resume")[0] == 130
        (tmp_path / "nrd.py").write_text((ROOT / "nrd.py").read_text())
        texts.append(f"{texts[-1]}# edit {edit}\n")
        (tmp_path / "common.py").write_text(texts[-1])
        monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setattr(common.Run, "end_epoch", change)
    status, out, err = nrd_cli(*TINY, "--epochs", 4, "--out", "run", "--resume")
    assert status == 0 and "common.py was edited after epoch 2;" in out and "nrd.py was edited" not in out
    assert out.splitlines()[-1] == "4 epochs: run"
    assert ["test_acc" in record for record in metrics_of("run")] == [True, True, False, False]
    source = saved("run")["source"]
    assert source.pop("nrd.py") == (ROOT / "nrd.py").read_text()
    assert source == dict(zip(["common.py until epoch 1", "common.py until epoch 2", "common.py"], texts))


def test_a_fork_may_measure_with_numpy_and_leave_its_loop(nrd_cli, monkeypatch, quick):
    batches, end_epoch = common.Run.batches, common.Run.end_epoch
    monkeypatch.setattr(common.Run, "batches", lambda *args: itertools.islice(batches(*args), 1))
    f1 = np.mean([1, 2])
    monkeypatch.setattr(common.Run, "end_epoch", lambda *args, **others: end_epoch(*args, **others, f1=f1))
    status, out, _ = nrd_cli(*TINY, "--epochs", 1, "--out", "run")
    assert status == 0 and " f1 1.500 " in out and metrics_of("run")[0]["images_per_second"] == 0
    assert common.load_checkpoint("run/checkpoint.pt")["metrics"][0]["f1"] == 1.5


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(nrd_cli, monkeypatch, quick):
    calls, original = [], nrd.js_divergence

    def spoiled(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 5 else 1)  # three steps per epoch

    monkeypatch.setattr(nrd, "js_divergence", spoiled)
    status, out, err = nrd_cli(*TINY, "--out", "run")
    assert status == 1 and err.count("\n") == 1 and "not finite in epoch 2" in err
    checkpoint = common.load_checkpoint("run/checkpoint.pt")
    assert checkpoint["epoch"] == 1 and all(v.isfinite().all() for v in checkpoint["model"].values())


def test_interrupted_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), common.atomic_write(path) as partial:
        partial.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_bfloat16_is_asked_of_the_device_that_is_named(monkeypatch):
    """An A100 beside a T4, which multiplies none."""
    gpus = {"cuda:0": (8, 0), "cuda:1": (7, 5), "cuda": (8, 0)}
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.get)
    monkeypatch.setattr(common, "multiplies_bfloat16", MULTIPLIES_BFLOAT16)
    assert [MULTIPLIES_BFLOAT16(gpu) for gpu in gpus] == [True, False, True]
    for gpu in gpus:
        assert common.setup(Namespace(device=gpu, seed=0, amp=False)) == torch.device(gpu)
    with pytest.raises(common.UsageError, match="--device cuda:2: 2 CUDA devices are visible"):
        MULTIPLIES_BFLOAT16("cuda:2")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as in an older torch
    assert not MULTIPLIES_BFLOAT16("cpu")
