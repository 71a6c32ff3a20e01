"""torchrun on the CPU: two processes that act as one, and several seeds."""

import errno
import json
import os
import re
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from test_run import assert_same_run, without_times

import common


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(script, *flags, processes=2) in an empty folder: the CompletedProcess, output as text."""

    def run(*command, processes=2, timeout=120):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [*launcher, *map(str, command)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run


SMALL = "--limit-train 64 --limit-test 40 --batch-size 16 --epochs 2 --device cpu"
NETS = "--teacher-arch wrn-10-1 --student-arch wrn-10-1"
SCRIPTS = {
    "nrd.py": "",
    "cmd.py": "",
    "fickle_teacher.py": NETS,
    "soft_randomization.py": NETS,
    "messy_collaboration.py": NETS,
    "noise_data_free_kd.py": f"{NETS} --teacher-epochs 1",
    "kd_zoo.py": f"{NETS} --method hinton",
}
ZOO = ("one", "dml", "bss", "fitnet --init-epochs 1", "rkd-da")


def test_two_processes_hold_the_same_and_share_each_batch(torchrun, tmp_path):
    """Every script end to end, and methods of several networks; what each epoch must fulfil stands in ranks.py."""
    commands = [f"{script} {SMALL} {flags} --out {script}-run" for script, flags in SCRIPTS.items()]
    commands += [f"kd_zoo.py {SMALL} {NETS} --method {m} --out {m.split()[0]}.py-run" for m in ZOO]
    result = torchrun(ROOT / "tests/ranks.py", "check", " then ".join(commands))
    assert result.returncode == 0, result.stderr
    folders = sorted(folder.name for folder in tmp_path.glob("*.py-run"))
    assert len(folders) == len(commands)
    for name in folders:
        folder = tmp_path / name
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert metrics == common.load_checkpoint(folder / "checkpoint.pt")["metrics"]
        assert not list(folder.glob("*.partial*")) and (folder / "curves.png").stat().st_size > 1000
    lines = result.stdout.splitlines()
    assert sum(line.startswith("final test accuracy") and "py-run" in line for line in lines) == len(commands)
    assert sum(line.startswith("checked epoch 2") for line in lines) >= len(commands)


def test_the_loss_is_that_of_one_process(torchrun, nrd_cli, tmp_path, monkeypatch):
    """The same global batches, BatchNorm in evaluation mode, no augmentation: losses to 1e-6, weights likewise."""
    flags = [*TINY, "--epochs", "3", "--student-augment", "none", "--teacher-augment", "none", "--weight-decay", "0.01"]
    result = torchrun(ROOT / "tests/ranks.py", "evaluation", "nrd.py", *flags, "--out", "two")
    assert result.returncode == 0, result.stderr
    evaluated = lambda module, mode=True: torch.nn.Module.train(module, False)  # noqa: E731
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", evaluated)
    assert nrd_cli(*flags, "--out", "one")[0] == 0
    one, two = (common.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], abs=1e-6)
        assert theirs["train_acc_right"] == mine["train_acc_right"]
    assert one["metrics"][0]["train_loss"] > one["metrics"][-1]["train_loss"] + 1e-4  # and they have learnt something
    for part in ("model", "ema"):
        for key, value in one[part].items():
            assert torch.allclose(value, two[part][key], atol=1e-5), (part, key)


def test_resuming_on_another_number_of_processes(torchrun, nrd_cli, tmp_path, monkeypatch):
    """An epoch in one process, the next in two, the last in one."""
    flags = [*TINY, "--epochs", "3", "--out", "run"]
    end_epoch = common.Run.end_epoch

    def stop(run, *args, **metrics):
        end_epoch(run, *args, **metrics)
        sys.exit(9)

    monkeypatch.setattr(common.Run, "end_epoch", stop)
    assert nrd_cli(*flags)[0] == 9
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    first = (tmp_path / "run/metrics.jsonl").read_text()
    two = torchrun(ROOT / "tests/ranks.py", "stop", "nrd.py", *flags, "--resume")
    assert "after epoch 1 of 3" in two.stdout
    second = (tmp_path / "run/metrics.jsonl").read_text()
    assert second.startswith(first) and second.count("\n") == 2
    status, out, _ = nrd_cli(*flags, "--resume")
    assert status == 0 and "after epoch 2 of 3" in out
    third = (tmp_path / "run/metrics.jsonl").read_text()
    assert third.startswith(second) and third.count("\n") == 3


def test_a_process_that_dies_ends_the_other_with_its_error(torchrun, tmp_path):
    result = torchrun(ROOT / "tests/ranks.py", "die", "nrd.py", *TINY, "--out", "run", timeout=60)
    assert result.returncode != 0 and "ArithmeticError: rank 1 has died" in result.stderr
    assert common.load_checkpoint(tmp_path / "run/checkpoint.pt")["epoch"] == 0


def test_bad_input_is_one_line(torchrun):
    result = torchrun(ROOT / "nrd.py", *TINY, "--batch-size", "33")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: --batch-size: 33 does not divide by 2 processes; 32 does"]
    assert result.returncode != 0 and re.search(r"exitcode *: 2\b", result.stderr)


def test_what_torchrun_asks_for_must_be_there(monkeypatch):
    """As a process of two finds it; no process group is needed to see that."""
    args = SimpleNamespace(device="cuda:1", batch_size=32, seed=0)
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(common, "TOGETHER", [1, 0])
    with pytest.raises(common.UsageError, match="--device cuda:1: .* leave it out"):
        common.setup(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(common.UsageError, match="2 processes for 1 GPUs"):
        common.setup(SimpleNamespace(device=None, batch_size=32, seed=0))
    with pytest.raises(common.UsageError, match="2 processes for 1 training images"):
        common.batches(1, 32, "cpu")


def test_evaluate_runs_as_one_process(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        common.run_main(lambda: None, runs=False)
    assert capsys.readouterr().err == "error: torchrun: this script runs as one process; python starts it\n"


# ------------------------------------------------------------------------------------------------------- several seeds


def test_several_seeds_are_the_single_runs_and_their_mean(nrd_cli, tmp_path):
    status, out, err = nrd_cli(*TINY, "--seed", 0, 3, 5, "--out", "run")
    assert (status, err) == (0, "")
    finals = []
    for seed in (0, 3, 5):
        assert nrd_cli(*TINY, "--seed", seed, "--out", f"alone{seed}")[0] == 0
        assert_same_run(tmp_path / f"run-seed{seed}", tmp_path / f"alone{seed}")
        finals.append(common.load_checkpoint(tmp_path / f"alone{seed}/checkpoint.pt")["metrics"][-1])
    assert len({record["train_loss"] for record in finals}) == 3
    for name, key in (("test", "test_acc"), ("test, EMA", "ema_test_acc")):
        values = [record[key] for record in finals]
        line = f"    {name} {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} % (n = 3)"
        assert line in out.splitlines()


def test_a_seed_that_fails_does_not_take_the_mean_of_the_others(nrd_cli, tmp_path):
    (tmp_path / "run-seed3").mkdir()
    (tmp_path / "run-seed3/notes.txt").touch()
    for flags in ([], ["--resume"]):
        status, out, err = nrd_cli(*TINY, "--seed", 0, 3, 5, "--out=run/", *flags)
        assert status == 2 and "run-seed3 is not empty" in err and "(n = 1)" in out
    assert not (tmp_path / "run-seed5").exists() and len(list((tmp_path / "run-seed3").iterdir())) == 1


def test_a_sweep_that_was_stopped_goes_on(nrd_cli, tmp_path):
    assert nrd_cli(*TINY, "--seed", 1)[0] == 0
    before = (tmp_path / "runs/nrd-shapes-sym0.5-seed1/checkpoint.pt").read_bytes()
    status, _, err = nrd_cli(*TINY, "--seed", 1, 2)
    assert status == 2 and "--resume" in err
    status, out, _ = nrd_cli(*TINY, "--seed", 1, 2, "--resume")
    assert status == 0 and "(n = 2)" in out
    assert (tmp_path / "runs/nrd-shapes-sym0.5-seed1/checkpoint.pt").read_bytes() == before
    assert common.load_checkpoint(tmp_path / "runs/nrd-shapes-sym0.5-seed2/checkpoint.pt")["epoch"] == 2
    assert nrd_cli(*TINY, "--seed", 4, "--resume")[0] == 2  # of a single run there must be something


def test_seeds_per_rank(torchrun, nrd_cli, tmp_path):
    """Three seeds on two processes, whole batches, the numbers of single runs."""
    result = torchrun(ROOT / "nrd.py", *TINY, "--seed", 0, 1, 2, "--seeds-per-rank", "--out", "run")
    assert result.returncode == 0, result.stderr
    assert "(n = 3)" in result.stdout and result.stdout.count("seeds, last epoch") == 1
    order = [result.stdout.splitlines()[-1].find(f"run-seed{seed}") for seed in range(3)]
    assert order == sorted(order) and order[0] > 0
    assert nrd_cli(*TINY, "--seed", 1, "--out", "alone")[0] == 0
    mine, theirs = (common.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("alone", "run-seed1"))
    for a, b in zip(without_times(mine["metrics"]), without_times(theirs["metrics"]), strict=True):
        assert a == pytest.approx(b, abs=0.05)  # another number of threads


@pytest.mark.parametrize("flags", [
    ["--seeds-per-rank"], ["--seed", 0, 1, "--seeds-per-rank"], ["--seed", 0, "x"], ["--seed", 1, 2, "01"],
    ["--seed", 0, 1, "--ou", "x"],
])  # fmt: skip
def test_bad_seeds(nrd_cli, tmp_path, flags):
    status, _, err = nrd_cli(*TINY, *flags)
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_of_several_processes_one_makes_what_the_others_find(tmp_path):
    """The lock that one holds keeps the others out until it is done, also those that come later; then it is gone."""
    code = (
        f"import sys, time; sys.path.append({str(ROOT)!r}); import common; from pathlib import Path\n"
        "while not Path('go').exists(): time.sleep(0.01)\n"
        "time.sleep(float(sys.argv[1]))\n"
        "with common.locked(Path('thing')):\n"
        "    began = time.time(); time.sleep(0.5); print(began, time.time())"
    )
    command = [sys.executable, "-c", code]
    group = [subprocess.Popen([*command, str(t)], cwd=tmp_path, stdout=-1) for t in (0, 0.1, 0.55)]
    (tmp_path / "go").touch()
    spans = [process.communicate(timeout=60)[0].split()[-2:] for process in group]
    spans = sorted((float(began), float(ended)) for began, ended in spans)
    assert all(ended <= began + 1e-3 for (_, ended), (began, _) in zip(spans, spans[1:]))
    assert not (tmp_path / "thing.lock").exists()


def test_without_locks_nothing_is_locked(tmp_path, monkeypatch):
    """On file systems that have none, and in folders that may not be written."""
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    done = []
    with common.locked(tmp_path / "thing"):
        done.append("thing")
    with common.locked(tmp_path / "thing.lock/under a file"):
        done.append("under a file")
    assert done == ["thing", "under a file"]


def test_the_second_process_writes_only_what_any_may(tmp_path, monkeypatch):
    """A data set that was downloaded is kept, whichever process did it; a picture is the first one's."""
    monkeypatch.setattr(common, "TOGETHER", [2, 1])
    for name, by_all in (("picture.png", False), ("data.npz", True)):
        with common.replacing(tmp_path / name, by_all) as partial:
            partial.write_text(name)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]
