"""cmd.py: refined labels, threshold and losses against numpy and by hand, gradients, symmetry, the name, whole runs."""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_augment import within
from test_run import assert_same_run

import common
import evaluate


def load(name="cmd_script"):
    """The script as a module; `import cmd` is the standard library's."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "cmd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cmd = load()
B, C = 7, 5


def softmax(logits):
    e = np.exp(np.float64(logits))
    return e / e.sum(1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(1)


def draw():
    S_A, S_B = torch.randn(B, C) * 2, torch.randn(B, C) * 2
    y = torch.arange(B) % C
    return S_A, S_B, y, torch.nn.functional.one_hot(y, C).float()


# ----------------------------------------------------------------------------------------------------------- the method


def test_entropy_in_numpy_and_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(cmd.entropy(p), torch.tensor([1.5 * math.log(2), 0, math.log(3)]))
    random = torch.randn(B, C).softmax(1)
    assert np.allclose(cmd.entropy(random), entropy(np.float64(random)), atol=1e-6)


def test_self_trust_is_model_trust_times_sample_confidence():
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert torch.allclose(cmd.self_trust(p, 0.6), torch.tensor([[0.0], [0.6], [0.3]]), atol=1e-6)
    assert cmd.logistic(0, 16) == 0.5 and cmd.logistic(0.5, 16) == pytest.approx(1 / (1 + math.exp(-8)))
    assert cmd.logistic(-0.25, 2) == pytest.approx(1 / (1 + math.exp(0.5)))
    assert cmd.logistic(-0.5, 1e9) == 0 and cmd.logistic(0.5, 1e9) == 1  # the flags' whole range


@pytest.mark.parametrize("self_kd, epsilon", [
    ("ce", 0.0), ("ls", 0.3), ("cp", 0.2), ("boot-soft", 0.4), ("proselflc", 0.7), ("mconf", 0.1), ("tf-kd-reg", 0.1),
])  # fmt: skip
def test_refined_labels_in_numpy(self_kd, epsilon):
    S, _, y, q = draw()
    p = S.softmax(1)
    adaptive = self_kd in ("proselflc", "mconf")
    eps = cmd.self_trust(p, epsilon) if adaptive else epsilon
    q_64, p_64 = np.eye(C)[y.numpy()], softmax(S)
    eps_64 = epsilon * (1 - entropy(p_64) / np.log(C))[:, None] if adaptive else epsilon
    virtual = softmax(np.where(q_64 == 1, 0.99, 0.01 / (C - 1)) / 20)
    second = {"ls": np.full((B, C), 1 / C), "cp": -p_64, "tf-kd-reg": virtual}.get(self_kd, p_64)
    assert np.allclose(cmd.refined_label(self_kd, q, p, eps), (1 - eps_64) * q_64 + eps_64 * second, atol=1e-6)


def test_refined_labels_by_hand():
    q, p = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 0.8]])
    cases = {"ce": (0.0, [1, 0]), "ls": (0.5, [0.75, 0.25]), "cp": (0.5, [0.4, -0.4]), "boot-soft": (0.5, [0.6, 0.4])}
    for self_kd, (epsilon, label) in cases.items():
        assert cmd.refined_label(self_kd, q, p, epsilon).tolist() == [pytest.approx(label)]


@pytest.mark.parametrize("self_kd", ["boot-soft", "cp", "proselflc", "mconf"])
def test_what_the_docstring_says_of_the_gradient(self_kd):
    """Of a network's own refined label: (1 - eps) (p - q), because the label is a constant."""
    S, _, _, q = draw()
    S.requires_grad_()
    p = S.softmax(1)
    eps = torch.rand(B, 1)
    label = cmd.refined_label(self_kd, q, p, eps)
    assert not label.requires_grad
    torch.nn.functional.cross_entropy(S, label, reduction="none").sum().backward()
    assert torch.allclose(S.grad, ((1 - eps) * (p - q)).detach(), atol=1e-6)


def test_threshold_by_hand():
    """At the beginning, in the middle and at the end; b2 = 0 is constant, -8 falls, 8 rises."""
    high = math.log(10)
    end, start = 2 / (1 + math.exp(4)), 2 / (1 + math.exp(-4))
    for t, falling, rising in ((0, start, end), (0.5, 1, 1), (1, end, start)):
        assert cmd.threshold(t, 2, -8, 10) == pytest.approx(high / 2 * falling)
        assert cmd.threshold(t, 2, 8, 10) == pytest.approx(high / 2 * rising)
        assert cmd.threshold(t, 3, 0, 10) == pytest.approx(high / 3)


def losses_numpy(q_A, q_B, S_A, S_B, chi):
    """The paper's listing, sample by sample, with the self-distillation loss of equations 10 and 11."""
    p_A, p_B = softmax(S_A), softmax(S_B)
    L_A = L_B = 0.0
    for i in range(len(p_A)):
        L_A -= (q_A[i] * np.log(p_A[i])).sum() / len(p_A)
        L_B -= (q_B[i] * np.log(p_B[i])).sum() / len(p_A)
        if entropy(p_B[i : i + 1])[0] < chi:
            L_A -= (q_B[i] * np.log(p_A[i])).sum() / len(p_A)
        if entropy(p_A[i : i + 1])[0] < chi:
            L_B -= (q_A[i] * np.log(p_B[i])).sum() / len(p_A)
    return L_A, L_B


@pytest.mark.parametrize("chi", [-1.0, 0.4, 0.8, 1.2, 10.0])
def test_losses_in_numpy(chi):
    S_A, S_B, _, _ = draw()
    q_A, q_B = torch.rand(B, C), torch.rand(B, C)
    expected = losses_numpy(np.float64(q_A), np.float64(q_B), S_A, S_B, chi)
    loss_A, loss_B, sure = cmd.cmd_losses(q_A, q_B, S_A, S_B, chi)
    assert (loss_A.item(), loss_B.item()) == pytest.approx(expected, abs=1e-5)
    assert sure.tolist() == [(entropy(softmax(S)) < chi).tolist() for S in (S_A, S_B)]
    swapped = cmd.cmd_losses(q_B, q_A, S_B, S_A, chi)
    assert (swapped[0], swapped[1]) == (loss_B, loss_A) and torch.equal(swapped[2], sure.flip(0))


def test_selection_by_hand():
    """Two samples, two classes; only B is sure, of the first: A learns twice there, and B nowhere."""
    S_A = torch.zeros(2, 2)
    S_B = torch.tensor([[math.log(9), 0.0], [0.0, 0.0]])  # p_B: (0.9, 0.1), entropy 0.325, and uniform
    q_A, q_B = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1]])
    loss_A, loss_B, sure = cmd.cmd_losses(q_A, q_B, S_A, S_B, 0.5)
    assert sure.tolist() == [[False, False], [True, False]] and sure.sum(1).tolist() == [0, 1]
    assert loss_A.item() == pytest.approx(3 * math.log(2) / 2)  # two of its own and one of B's, over the batch of two
    assert loss_B.item() == pytest.approx((math.log(10) + math.log(2)) / 2)
    high = cmd.entropy(torch.full((1, 2), 0.5))
    assert (
        cmd.cmd_losses(q_A, q_B, S_A, S_B, high.item())[2].sum() == 1
    )  # strict: a uniform prediction is not below H(u)


def test_zero_and_all_are_the_formula():
    S_A, S_B, _, q = draw()
    own = [torch.nn.functional.cross_entropy(S, q) for S in (S_A, S_B)]
    for eta, times in ((math.inf, 1), (-1.0, 1), (1.0, 2), (0.3, 2)):
        for t in (0, 0.3, 1):
            loss_A, loss_B, sure = cmd.cmd_losses(q, q, S_A, S_B, cmd.threshold(t, eta, 0.0, C))
            assert (loss_A.item(), loss_B.item()) == pytest.approx([times * x.item() for x in own])
            assert sure.all() if times == 2 else not sure.any()
    assert cmd.SELECT["zero"][0] < 0 and cmd.SELECT["all"] == (1, 0) and cmd.SELECT["static"][1] == 0


def test_gradients_reach_only_the_network_that_learns():
    S_A, S_B, _, q = draw()
    S_A.requires_grad_(), S_B.requires_grad_()
    q_A, q_B = (cmd.refined_label("boot-soft", q, S.softmax(1), 0.5) for S in (S_A, S_B))
    loss_A, loss_B, _ = cmd.cmd_losses(q_A, q_B, S_A, S_B, 10.0)
    loss_A.backward()
    assert S_B.grad is None
    p_A, p_B = S_A.softmax(1), S_B.softmax(1)
    # H(q~_A, p_A) + H(q~_B, p_A), labels constant
    assert torch.allclose(S_A.grad, (2 * p_A - q_A - q_B) / B, atol=1e-6)
    S_A.grad = None
    loss_B.backward()
    assert S_A.grad is None and torch.allclose(S_B.grad, (2 * p_B - q_A - q_B) / B, atol=1e-6)


def test_kdcl_in_numpy_and_by_hand():
    S_A, S_B, y, _ = draw()
    S_A.requires_grad_()
    expected = np.minimum(
        *(np.float64([row - row[k] for row, k in zip(np.float64(S.detach()), y)]) for S in (S_A, S_B))
    )
    T = cmd.kdcl_teacher(S_A, S_B, y)
    assert np.allclose(T, expected, atol=1e-5) and not T.requires_grad
    assert cmd.kdcl_teacher(torch.tensor([[3.0, 1]]), torch.tensor([[1.0, 2]]), torch.tensor([0])).tolist() == [[0, -2]]
    p, q = softmax(S_A.detach()), softmax(S_B)
    assert cmd.kl_divergence(S_A, S_B).item() == pytest.approx((q * np.log(q / p)).sum() / B, abs=1e-5)
    assert cmd.kl_divergence(S_B, S_B).item() == pytest.approx(0, abs=1e-6)


def test_the_held_out_samples():
    kept, held = cmd.hold_out(50, 0.1, seed=3)
    assert len(held) == 5 and torch.equal(torch.cat([kept, held]).sort().values, torch.arange(50))
    assert torch.equal(held, held.sort().values) and not torch.equal(held, cmd.hold_out(50, 0.1, seed=4)[1])
    assert [len(part) for part in cmd.hold_out(50, 0.0, seed=3)] == [50, 0]


def test_held_out_samples_are_not_the_corrupted_ones():
    """With the exact count of symmetric noise too, whose samples are drawn from the same seed."""
    true = torch.arange(20_000) % 10
    noisy = common.corrupt_labels(true, "sym", 0.4, 10, seed=0)
    for part in cmd.hold_out(20_000, 0.1, seed=0):
        within((noisy[part] != true[part]).sum(), len(part), 0.36)


def test_validation_is_clean_and_apart(cli, monkeypatch):
    """Labels, all of which noise moves, stay true in the validation set; none of its images is trained on."""
    data = common.load_dataset("shapes", limit_train=96, limit_test=40)
    kept, held = cmd.hold_out(96, 0.25, seed=0)
    scored, shown, accuracy, batches = [], [], common.accuracy, common.batches
    monkeypatch.setattr(cmd, "accuracy", lambda S, labels: scored.append(labels) or accuracy(S, labels))
    monkeypatch.setattr(common, "batches", lambda count, *rest: shown.append(count) or batches(count, *rest))
    assert cli(cmd, *TINY, "--epochs", 1, "--noise", "pair", "--rate", 1, "--validation", 0.25)[0] == 0
    assert torch.equal(scored[-1], data.train_labels[held]) and shown == [72] == [len(kept)]


# ------------------------------------------------------------------------------------------------------------ the name


STANDARD = {  # what a user does in the repository's root, or a fork's
    "import": ["-c", "import cmd; print(cmd.Cmd.__module__, 'torch' in __import__('sys').modules)"],
    "pdb": ["-c", "import pdb; print(issubclass(pdb.Pdb, __import__('cmd').Cmd))"],
    "torch": ["-c", "import torch, cmd; print(cmd.Cmd)"],
    "pytest": ["-m", "pytest", "--version"],
    "compile": ["-c", "import torch; print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)))"],
}


@pytest.mark.parametrize("use", STANDARD)
def test_the_standard_library_keeps_its_cmd(use):
    result = subprocess.run([sys.executable, *STANDARD[use]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    words = {"import": "cmd False", "pdb": "True", "torch": "cmd.Cmd", "pytest": "pytest", "compile": "tensor([2.])"}
    assert words[use] in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["nrd.py", "cmd.py"])
def test_the_debugger_runs_the_scripts(name, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pdb", "-c", "continue", name, "--epochs", "0"], cwd=ROOT, input="q\n",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "--epochs: '0' is not a whole number" in result.stdout + result.stderr
    assert "circular" not in result.stdout + result.stderr and "no attribute" not in result.stdout + result.stderr


def test_a_data_loader_with_spawned_workers(tmp_path):
    """Spawned workers import the main file anew, under a name of its own."""
    (tmp_path / "cmd.py").write_text((ROOT / "cmd.py").read_text().replace("    common.run_main(main)\n", """\
    loader = torch.utils.data.DataLoader(range(4), num_workers=1, multiprocessing_context="spawn")
    print([x.item() for x in loader])
"""))  # fmt: skip
    result = subprocess.run(
        [sys.executable, "cmd.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "[0, 1, 2, 3]\n"), result.stderr


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("arch, schedule", [
    ("resnet34", (100, 128, 0.1, 5e-4)), ("resnet18", (200, 128, 0.1, 5e-4)),
    ("shufflenet_v2", (200, 128, 0.1, 5e-4)), ("resnet50", (100, 64, 0.01, 1e-3)),
])  # fmt: skip
def test_the_presets_are_those_of_the_supplement(monkeypatch, tiny_npz, arch, schedule):
    monkeypatch.setattr("sys.argv", ["cmd.py", "--arch", arch, "--dataset", str(tiny_npz)])
    args = cmd.parse_args()
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == schedule
    assert (args.arch_b, args.augment, args.noise, args.rate) == (arch, "crop", "sym-other", 0.4)
    assert (args.self_kd, args.select, args.eta, args.b2, args.b1) == ("proselflc", "progressive", 2, -8, 16)


@pytest.mark.parametrize("arch, first, falls, factor", [
    ("resnet34", 0.1, (5, 8), 0.1), ("resnet18", 0.1, (3, 6, 8), 0.2), ("resnet50", 0.01, (4, 8), 0.1),
])  # fmt: skip
def test_the_learning_rate_falls_as_in_the_supplement(cli, monkeypatch, arch, first, falls, factor):
    """Ten epochs in place of a hundred or two hundred, of a small network in the large one's place."""
    build = common.build_model
    monkeypatch.setattr(common, "build_model", lambda arch, *rest, **more: build("wrn-10-1", *rest, **more))
    flags = ["--arch", arch, "--epochs", 10, "--limit-train", 4, "--limit-test", 4, "--device", "cpu", "--out", "run"]
    assert cli(cmd, *flags)[0] == 0
    rates = [record["lr"] for record in common.load_checkpoint(common.Path("run/checkpoint.pt"))["metrics"]]
    assert rates == pytest.approx([first * factor ** sum(epoch >= fall for fall in falls) for epoch in range(10)])


RUNS = {
    "proselflc": ["--self-kd", "proselflc"], "mconf": ["--self-kd", "mconf", "--select", "static"],
    "cp": ["--self-kd", "cp", "--select", "all", "--augment", "crop"], "sync": ["--mutual", "sync"],
    "async": ["--mutual", "async"], "kdcl": ["--mutual", "kdcl"], "tf": ["--self-kd", "tf-kd-reg", "--select", "zero"],
    "clean": ["--noise", "none"], "two": ["--arch-b", "resnet8", "--validation", "0.1"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_and_continued_to_the_same_bit(cli, monkeypatch, name, tmp_path):
    flags = [*TINY, *RUNS[name]]
    assert cli(cmd, *flags, "--out", "whole")[::2] == (0, "")
    end_epoch = common.Run.end_epoch

    def interrupt(run, *args, **metrics):
        end_epoch(run, *args, **metrics)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "end_epoch", interrupt)
    assert cli(cmd, *flags, "--out", "broken")[0] == 130
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    for _ in range(2):  # the second finds it done
        assert cli(cmd, *flags, "--out", "broken", "--resume")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken", ("model", "peer", "optimizer", "scheduler", "rng"))
    checkpoint = common.load_checkpoint("whole/checkpoint.pt")
    last = checkpoint["metrics"][-1]
    data = common.load_dataset("shapes", limit_train=1, limit_test=40)
    nets = [common.load_model(checkpoint, part) for part in ("model", "peer")]
    scores = [common.accuracy(common.predict(net, data.test_images), data.test_labels) for net in nets]
    assert [last["test_acc_A"], last["test_acc_B"]] == pytest.approx(scores, abs=0.01)
    assert last["test_acc"] == pytest.approx(sum(scores) / 2, abs=0.01)
    assert not torch.equal(checkpoint["model"]["stem.0.weight"], checkpoint["peer"]["stem.0.weight"])
    assert (tmp_path / "whole/communication.png").exists() == (name not in ("sync", "async", "kdcl"))
    assert (last["train_acc_wrong"] is None) == (name == "clean") and (last["val_acc"] is None) == (name != "two")
    sent = {"cp": 2 * 96, "tf": 0, "sync": None, "async": None, "kdcl": None}
    assert last["communication"] == sent.get(name, last["communication"])
    assert all(0 <= r <= 1 for r in last["certainty"])


def test_seeds_swapped_swap_the_networks(cli, monkeypatch):
    """A built as B and B as A: the same two curves under each other's name, to the bit."""
    build, fresh, curves = common.build_model, [], []

    def built(*args, **more):
        net = build(*args, **more)
        fresh.append(copy.deepcopy(net))
        return net

    def swapped(*args, **more):  # the random numbers are drawn as before
        build(*args, **more)
        return fresh.pop()

    for how in (built, swapped):
        monkeypatch.setattr(common, "build_model", how)
        assert cli(cmd, *TINY, "--out", how.__name__)[0] == 0
        curves.append(common.load_checkpoint(common.Path(how.__name__) / "checkpoint.pt"))
    first, second = curves
    for key, value in first["model"].items():
        assert torch.equal(value, second["peer"][key]) and torch.equal(first["peer"][key], second["model"][key])
    for one, other in zip(first["metrics"], second["metrics"]):
        assert (one["test_acc_A"], one["test_acc_B"]) == (other["test_acc_B"], other["test_acc_A"])
        assert one["certainty"] == other["certainty"][::-1] and one["communication"] == other["communication"]


def test_asynchronous_networks_take_turns(cli, monkeypatch):
    """One step an epoch: A moves in the first, B in the second."""
    snapshots = []
    end_epoch = common.Run.end_epoch

    def look(run, *args, **metrics):
        snapshots.append([run.parts[k].stem[0].weight.detach().clone() for k in ("model", "peer")])
        end_epoch(run, *args, **metrics)

    monkeypatch.setattr(common.Run, "end_epoch", look)
    assert cli(cmd, *TINY, "--mutual", "async", "--batch-size", 96, "--epochs", 3)[0] == 0
    (a1, b1), (a2, b2), (a3, b3) = snapshots
    assert torch.equal(a1, a2) and not torch.equal(b1, b2) and torch.equal(b2, b3) and not torch.equal(a2, a3)


def test_mconf_trusts_by_the_certainty_of_the_last_epoch(cli, monkeypatch):
    seen = []
    trust = cmd.self_trust
    monkeypatch.setattr(cmd, "self_trust", lambda p, g: seen.append(g) or trust(p, g))
    assert cli(cmd, *TINY, "--self-kd", "mconf", "--batch-size", 96)[0] == 0
    metrics = [json.loads(line) for line in next(common.Path("runs").glob("*/metrics.jsonl")).open()]
    expected = [cmd.logistic(r - 0.5, 16) for r in (0, 0, *metrics[0]["certainty"])]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("flags, names", [
    (["--select", "progresive"], "did you mean progressive"), (["--self-kd", "ce", "--epsilon", 0.2], "--epsilon"),
    (["--mutual", "sync", "--self-kd", "ls"], "--self-kd"), (["--select", "zero", "--eta", 2], "--eta"),
    (["--select", "static", "--b2", 1], "--b2"), (["--self-kd", "ls", "--b1", 1], "--b1"),
    (["--arch-b", "resnet9"], "--arch-b: unknown 'resnet9'"), (["--validation", 2], "--validation"),
    (["--rate", 2], "--rate"),
    (["--mutual", "kdcl", "--epsilon", 0.2], "--epsilon"), (["--eta", 0], "--eta"), (["--validation", 0.001], "--val"),
    (["--noise", "none", "--rate", 0.2], "--rate"),
])  # fmt: skip
def test_bad_input(cli, flags, names, tmp_path):
    status, _, err = cli(cmd, *TINY, *flags)
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and names in err
    assert not list(tmp_path.glob("runs/*/*"))


def test_evaluate_takes_either_network(cli, tmp_path):
    assert cli(cmd, *TINY, "--epochs", 1, "--arch-b", "resnet8", "--out", "run")[0] == 0
    for part, field in (("model", "test_acc_A"), ("peer", "test_acc_B")):
        flags = ["--ece", "--limit-test", 40, "--device", "cpu", "--out", part, "--part", part]
        status, out, err = cli(evaluate, "run/checkpoint.pt", *flags)
        assert (status, err) == (0, "")
        metrics = common.load_checkpoint(tmp_path / "run/checkpoint.pt")["metrics"]
        assert f"{metrics[-1][field]:.1f}" in out
