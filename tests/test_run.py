"""nrd.py as a user runs it: a run and its folder, resuming, stopping, several seeds, bad input, analysis."""

import argparse
import fcntl
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same, load_script, saved

import common
import nrd

FILES = ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl"]
SCRIPTS = ("nrd", "fickle_teacher", "soft_randomization", "messy_collaboration", "kd_zoo", "cmd", "noise_data_free_kd")


def assert_same_run(a, b):
    assert_same(saved(a), saved(b))


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_the_command_line(script, tmp_path):
    result = script("nrd.py", *TINY)
    assert (result.returncode, result.stderr) == (0, "")
    folder = next((tmp_path / "runs").iterdir())
    assert folder.name == "nrd-shapes-sym0.5-limit_train=96-limit_test=40-epochs=2-seed0"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    lines, metrics = result.stdout.splitlines(), metrics_of(folder)
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2 and all("images/s" in line and "left" in line for line in epochs)
    assert "loss_params=[0.2, 0.6, 0.2]" in result.stdout and "\r" not in result.stdout
    assert [record["epoch"] for record in metrics] == [1, 2]
    names = {"lr", "train_loss", "test_acc", "ema_test_acc", "images_per_second", "seconds"}
    assert metrics[0].keys() >= {*names, "train_acc_right", "train_acc_wrong", "train_acc_wrong_true"}
    best = max(record["test_acc"] for record in metrics)
    assert lines[-1].startswith(f"test_acc {metrics[-1]['test_acc']:.2f} % after epoch 2, best {best:.2f} %")
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr"], config["noise"], config["rate"], config["arch"]) == (0.3, "sym", 0.5, "wrn-10-1")
    assert config["torch"] == torch.__version__ and "commit" in config
    assert matplotlib.image.imread(folder / "curves.png").shape[1] > 1000

    # the checkpoint alone rebuilds the models
    checkpoint = common.load_checkpoint(folder / "checkpoint.pt")
    assert checkpoint["noise"] == {"kind": "sym", "rate": 0.5, "seed": 0} and checkpoint["metrics"] == metrics
    data = common.load_dataset("shapes", limit_train=96, limit_test=40)
    for part, key in (("model", "test_acc"), ("ema", "ema_test_acc")):
        logits = common.predict(common.load_model(checkpoint, part), data.test_images)
        assert common.accuracy(logits, data.test_labels) == pytest.approx(metrics[-1][key], abs=0.01)


def test_help_answers_without_slow_imports(tmp_path):
    """torchvision and matplotlib take seconds to import; --help prints the preset of the cell that was asked for."""
    code = (
        "import sys; sys.argv[1:] = sys.argv[2:]; import nrd\n"
        "try: nrd.parse_args()\n"
        "finally: print('slow:', *{'torchvision', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    flags = ["--dataset", "cifar100", "--noise", "sym", "--rate", "0.8", "--help"]
    result = subprocess.run([sys.executable, "-c", code, "nrd.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "slow:"
    assert "(default: 5e-05)" in result.stdout and "[0.15, 0.7, 0.15]" in result.stdout


def test_live_lines(nrd_cli, monkeypatch):
    """On a terminal a line that is overwritten; without one a line after a minute, then after five more."""
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # every look at it takes 40 seconds
    monkeypatch.setattr(common, "plot_curves", lambda *_: None)
    _, out, _ = nrd_cli(*TINY, "--epochs", 1, "--limit-train", 960, "--out", "file")
    assert 1 < len(re.findall("step", out)) < 10 and "images/s" in out and "\r" not in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = nrd_cli(*TINY, "--epochs", 1, "--out", "terminal")
    assert len(re.findall(r"\repoch 1/1  step \d/3  [\d,]+ images/s  [\d:]+ left\x1b\[K", out)) == 3


def test_every_loss_learns_its_batch(nrd_cli):
    """On clean labels, without augmentation, every loss must fall: 6 epochs on 32 images."""
    size = ["--limit-train", 32, "--limit-test", 10, "--epochs", 6, "--batch-size", 16, "--device", "cpu"]
    for loss in nrd.HYPERPARAMETERS:
        status, out, err = nrd_cli("--loss", loss, "--noise", "none", "--lr", 0.05, *size, "--out", loss)
        assert (status, err) == (0, "")
        first, *_, last = metrics = metrics_of(loss)
        assert last["train_loss"] < first["train_loss"] and last["train_acc_wrong"] is None, loss
        assert [record["lr"] for record in metrics] == pytest.approx([0.05] * 3 + [0.005] * 2 + [0.0005])  # A.1


def test_several_seeds_are_several_runs_and_their_mean(nrd_cli, tmp_path):
    status, out, _ = nrd_cli(*TINY, "--limit-train", 32, "--seed", 3, 4)
    folders = sorted((tmp_path / "runs").iterdir())
    assert status == 0 and [folder.name[-6:] for folder in folders] == ["-seed3", "-seed4"]
    values = [metrics_of(folder)[-1]["test_acc"] for folder in folders]
    assert f"test_acc {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in out
    alone = ["--limit-train", 32, "--seed", 4, "--out", "alone"]
    assert nrd_cli(*TINY, *alone)[0] == 0
    assert_same_run(folders[1], tmp_path / "alone")
    noise = [common.load_checkpoint(folder / "checkpoint.pt")["noise"] for folder in folders]
    assert noise == [{"kind": "sym", "rate": 0.5, "seed": 0}] * 2  # one corruption for all seeds


def test_own_data_are_taken_as_they_are(nrd_cli, cli, tiny_npz):
    flags = ["--dataset", tiny_npz, "--epochs", 1, "--batch-size", 20, "--device", "cpu"]
    assert "40 training images, 0.00 % relabelled" in nrd_cli(*flags, "--arch", "resnet8")[1]
    assert "40 training images, 0.00 % relabelled" in cli(load_script("cmd"), *flags, "--arch", "resnet8")[1]
    assert "relabelled; 20 test" in nrd_cli(*flags, "--arch", "resnet8", "--noise", "pair", "--rate", 0.5)[1]


# ------------------------------------------------------------------------------------------------- killed and continued


LONGER = [*TINY, "--limit-train", "480", "--epochs", "4"]


def stop_after(folder, epochs, sent, *flags):
    """Start nrd.py and send the signal a moment after `epochs` epochs are saved, in the middle of the next."""
    command = [sys.executable, str(ROOT / "nrd.py"), *LONGER, "--out", str(folder), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics_of(folder)) < epochs:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    time.sleep(0.15)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_killed_runs_continue_to_the_same_bit(nrd_cli, tmp_path):
    """SIGKILL, then SIGTERM, each in the middle of an epoch, against a run that nobody disturbed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert nrd_cli(*LONGER, "--out", whole)[0] == 0
    assert stop_after(broken, 1, signal.SIGKILL)[0] == -signal.SIGKILL
    status, err = stop_after(broken, 2, signal.SIGTERM, "--resume")
    assert status == 130 and "Traceback" not in err and "--resume" in err
    status, out, err = nrd_cli(*LONGER, "--out", broken, "--resume")
    assert (status, err) == (0, "") and re.search(r"epoch [23] of 4", out)
    assert_same_run(whole, broken)
    assert sorted(path.name for path in broken.iterdir()) == FILES


def test_resume_starts_continues_and_repeats_the_last_line(nrd_cli, tmp_path, monkeypatch):
    flags = [*TINY, "--out", "run", "--resume"]
    status, started, _ = nrd_cli(*flags)
    assert status == 0 and started.count("epoch ") == 4  # two lines an epoch each, and two in the last line
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    status, finished, _ = nrd_cli(*flags)
    assert status == 0 and finished.splitlines()[-1] == started.splitlines()[-1]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before

    def stop(run, *args, **metrics):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "end_epoch", stop)
    assert nrd_cli(*TINY, "--out", "stopped")[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert nrd_cli(*TINY, "--out", "stopped")[0] == 0  # nothing was saved, so that nothing can be lost
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_a_folder_is_never_shared(nrd_cli, tmp_path):
    assert nrd_cli(*TINY, "--out", "run")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    cases = [
        ([], "run holds this run; --resume continues it"),
        (["--lr", "0.2"], "run holds another run: lr (0.3 there, 0.2 here)"),
        (["--resume", "--seed", "1", "--beta", "0.9"], "beta (0.95 there, 0.9 here)"),
    ]
    for flags, says in cases:
        status, _, err = nrd_cli(*TINY, "--out", "run", *flags)
        assert status == 2 and err.count("\n") == 1 and says in err, err
    with open("run/config.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = nrd_cli(*TINY, "--out", "run", "--resume")
        assert status == 2 and "another process is at work in run" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    for name in ("config.json", "precious.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("precious")
        status, _, err = nrd_cli(*TINY, "--out", name)
        assert status == 2 and "name a new folder" in err and (tmp_path / name / name).read_text() == "precious"


def test_a_teacher_that_another_process_trains_is_waited_for(tmp_path):
    config = {"script": "teacher"}
    held = common.claim(tmp_path / "run", config, False, False)
    with pytest.raises(common.UsageError, match="another process"):
        common.claim(tmp_path / "run", config, False, False)
    claim = "common.claim(common.Path(sys.argv[1]), {'script': 'teacher'}, False, True)"
    code = f"import sys, common\n{claim}\nprint('got')"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    waiting = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "waiting for the process" in waiting.stdout.readline()
    held.close()
    assert waiting.communicate(timeout=60)[0] == "got\n"


def parsed(monkeypatch, command):
    """The Namespace of a command such as "python nrd.py --loss ce"."""
    _, name, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    return load_script(Path(name).stem).parse_args()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_that_matters_is_told_by_the_folder(name, monkeypatch):
    """Each flag with a value that is not the preset's gives a name of its own; where and how a run runs does not."""
    parsers = []
    parse = common.parse
    monkeypatch.setattr(common, "parse", lambda parser, preset: parsers.append(parser) or parse(parser, preset))
    usual = parsed(monkeypatch, f"python {name}.py")
    names = {usual.name}
    for action in parsers[0]._actions:
        flag, default = action.option_strings[0], vars(usual).get(action.dest)
        if action.choices:
            values = [choice for choice in action.choices if choice != default and not choice.startswith("human")][:1]
        elif action.nargs == 0:
            values = [""]
        elif action.dest == "loss_params":
            values = ["0.1 0.8 0.1"]
        elif action.type is Path or action.type is None:
            values = ["wrn-28-1"]
        else:
            values = ["1" if default in (0, [0], 0.0, None) else str(default / 2 if action.type is not int else 7)]
        flag = {"--rate": "--noise sym --rate", "--init-epochs": "--method fsp --init-epochs"}.get(flag, flag)
        if flag == "-h" or action.dest == "device":
            continue
        other = parsed(monkeypatch, f"python {name}.py {flag} {' '.join(values)}").name
        assert (other in names) == (action.dest in ("seed", *common.MACHINE)), (flag, values, other)
        names.add(other)


def commands():
    """Every command that README and the docstrings of the scripts print."""
    texts = [(ROOT / "README.md").read_text()] + [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    pattern = rf"^ *(python (?:{'|'.join(SCRIPTS)})\.py[^#\n`|]*)"
    found = re.findall(pattern, "\n".join(texts), re.MULTILINE)
    return sorted({" ".join(command.split()) for command in found})


def test_printed_commands_are_valid_and_have_folders_of_their_own(monkeypatch):
    names = {}
    for command in commands():
        args = parsed(monkeypatch, command)
        if not any(vars(args).get(flag) for flag in ("analyze", "toy", "show_source", "plot_activations")):
            names.setdefault(args.name, set()).add(command.split(" --seed")[0].removesuffix(" --resume"))
    assert len(names) > 20 and all(len(same) == 1 for same in names.values()), names


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(nrd_cli, tmp_path, monkeypatch):
    calls, original = [], nrd.js_divergence
    factor = lambda: calls.append(1) or (float("nan") if len(calls) == 5 else 1)  # noqa: E731  three steps an epoch
    monkeypatch.setattr(nrd, "js_divergence", lambda *args: original(*args) * factor())
    status, out, err = nrd_cli(*TINY, "--out", "run")
    assert status == 1 and err.count("\n") == 1 and "not finite in epoch 2" in err
    checkpoint = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["epoch"] == 1 and all(v.isfinite().all() for v in checkpoint["model"].values())
    # two steps of absurd size, one an epoch: the losses are finite, what the second leaves behind is not
    flags = ["--loss", "ce", "--limit-train", 32, "--limit-test", 10, "--epochs", 2, "--device", "cpu", "--out", "two"]
    assert nrd_cli(*flags, "--lr", "1e9", "--weight-decay", "1e9")[0] == 1
    assert common.load_checkpoint(tmp_path / "two/checkpoint.pt")["epoch"] == 1


def test_interrupted_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), common.atomic_write(path) as partial:
        partial.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_checkpoints_are_data_not_code_and_finished_or_say_so(nrd_cli, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "foreign.pt").read_bytes()[:200])
    assert nrd_cli(*TINY, "--epochs", 1, "--out", "run")[0] == 0
    whole = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    torch.save(whole | {"metrics": [], "epoch": 0}, tmp_path / "none.pt")
    torch.save(whole | {"epochs": 40}, tmp_path / "some.pt")
    expected = {"evil.pt": "damaged or no", "cut.pt": "damaged or no", "foreign.pt": "no checkpoint of these scripts",
                "none.pt": "has finished no epoch", "missing.pt": "no file"}  # fmt: skip
    for name, says in expected.items():
        status, _, err = nrd_cli("--analyze", name)
        assert status == 2 and f"--analyze: {says}" in err.replace(f"{name} ", "").replace("is ", ""), err
    assert not (tmp_path / "executed").exists()
    assert "some.pt: epoch 1 of 40" in nrd_cli("--analyze", "some.pt")[1]


BAD = [
    (["--dataset", "cifra10"], "--dataset: unknown 'cifra10'; known are shapes, cifar10"),
    (["--dataset", "missing.npz"], "--dataset: no file missing.npz"),
    (["--dataset", "imagefolder:nowhere"], "--dataset imagefolder:nowhere"),
    (["--dataset", "imagefolder:nowhere", "--resize", "200"], "--resize: 200 is smaller than --image-size 224"),
    (["--arch", "wrn-17-2"], "--arch: unknown 'wrn-17-2'"),
    (["--noise", "symm"], "argument --noise: invalid choice: 'symm'"),
    (["--loss", "gcce"], "argument --loss: invalid choice"),
    (["--rate", "1.5"], "argument --rate: 1.5 is not in [0, 1]"),
    (["--rate", "nan"], "argument --rate: nan is not in [0, 1]"),
    (["--epochs", "2.5"], "argument --epochs"),
    (["--frobnicate"], "--frobnicate"),
    (["--noise", "none", "--rate", "0.2"], "--rate: --noise none has no rate"),
    (["--noise", "asym"], "--noise asym: only CIFAR-10 and CIFAR-100"),
    (["--noise", "human-worse"], "CIFAR-10_human.pt"),
    (["--loss-params", "0.2", "0.6", "0.3"], "--loss-params: pi1 pi2 pi3 sum to 1.1"),
    (["--loss", "ce", "--loss-params", "1"], "--loss-params: ce takes 0"),
    (["--device", "cuda"], "--device cuda: no CUDA device is visible"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_status_2(nrd_cli, monkeypatch, flags, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = nrd_cli(*TINY, *flags)
    line = err.splitlines()[-1]
    assert status == 2 and says in line, err
    assert err.startswith("error: ") and err.count("\n") == 1 or err.startswith("usage: ")


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
    assert matplotlib.image.imread(tmp_path / "run/analysis.png").shape[1] > 1000
    clean = argparse.Namespace(**checkpoint["noise"] | {"kind": "none"})
    torch.save(checkpoint | {"noise": vars(clean)}, tmp_path / "clean.pt")
    assert "0 of its labels are wrong" in nrd_cli("--analyze", "clean.pt")[2]
