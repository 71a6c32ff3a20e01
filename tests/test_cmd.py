"""cmd.py: refined labels, threshold and losses against numpy and by hand, gradients, the name, whole runs."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    assert_resumes_to_the_same_bit,
    colours,
    crops_of,
    forward_passes,
    load_script,
    numbers_of,
    saved,
    within,
    write_npz,
)
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common

pytestmark = pytest.mark.usefixtures("quick", "tiny_npz")
cmd = load_script("cmd")
B, C = 7, 5
TINY = ["--dataset", "tiny.npz", "--arch", "wrn-10-1", "--batch-size", 20, "--epochs", 1, "--device", "cpu"]
NOISE = ["--noise=pair", "--rate=0.5"]


def softmax(logits):
    e = np.exp(np.float64(logits))
    return e / e.sum(1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(1)


@pytest.fixture
def draw():
    S_A, S_B = torch.randn(B, C) * 2, torch.randn(B, C) * 2
    y = torch.arange(B) % C
    return S_A, S_B, y, F.one_hot(y, C).float()


# ------------------------------------------------------------------------------------------------- the method


def test_entropy_trust_and_threshold_by_hand():
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0]])
    assert cmd.entropy(p).tolist() == pytest.approx([math.log(4), 0, math.log(2), 1.5 * math.log(2)])
    assert cmd.self_trust(p, 0.6).flatten().tolist() == pytest.approx([0, 0.6, 0.3, 0.15], abs=1e-6)
    assert cmd.self_trust(p, 0.6).shape == (4, 1)
    assert cmd.logistic(0, 16) == 0.5 and cmd.logistic(0.5, 16) == pytest.approx(1 / (1 + math.exp(-8)))
    assert (cmd.logistic(-0.5, 1e9), cmd.logistic(0.5, 1e9)) == (0, 1)  # the flags' whole range
    # at the beginning, in the middle and at the end: b2 = 0 is constant, -8 falls, 8 rises
    end, start = 2 / (1 + math.exp(4)), 2 / (1 + math.exp(-4))
    for t, falling, rising in ((0, start, end), (0.5, 1, 1), (1, end, start)):
        assert cmd.threshold(t, 2, -8, 10) == pytest.approx(math.log(10) / 2 * falling)
        assert cmd.threshold(t, 2, 8, 10) == pytest.approx(math.log(10) / 2 * rising)
        assert cmd.threshold(t, 3, 0, 10) == pytest.approx(math.log(10) / 3)


@pytest.mark.parametrize("self_kd, by_hand", [
    ("ce", None), ("ls", [0.75, 0.25]), ("cp", [0.4, -0.4]), ("boot-soft", [0.6, 0.4]),
    ("proselflc", [0.6, 0.4]), ("mconf", [0.6, 0.4]), ("tf-kd-reg", None),
])  # fmt: skip
def test_refined_labels_by_hand_and_in_numpy(draw, self_kd, by_hand):
    if by_hand:  # half of the label (1, 0), and half of something else where p = (0.2, 0.8)
        label = cmd.refined_label(self_kd, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 0.8]]), 0.5)
        assert label[0].tolist() == pytest.approx(by_hand)
    S, _, y, q = draw
    p, p_64, q_64 = S.requires_grad_().softmax(1), softmax(S.detach()), np.eye(C)[y]
    epsilon = cmd.self_trust(p, 0.7) if self_kd in ("proselflc", "mconf") else 0.0 if self_kd == "ce" else 0.3
    eps_64 = 0.7 * (1 - entropy(p_64) / np.log(C))[:, None] if self_kd in ("proselflc", "mconf") else epsilon
    virtual = softmax(np.where(q_64 == 1, 0.99, 0.01 / (C - 1)) / 20)
    other = {"ls": np.full((B, C), 1 / C), "cp": -p_64, "tf-kd-reg": virtual}.get(self_kd, p_64)
    label = cmd.refined_label(self_kd, q, p, epsilon)
    label_64 = (1 - eps_64) * q_64 + eps_64 * other
    assert np.allclose(label.detach(), label_64, atol=1e-6)
    (label * -p.log()).sum().backward()
    gradient = p_64 * label_64.sum(1, keepdims=True) - label_64
    if self_kd not in ("ce", "ls", "tf-kd-reg"):  # what the prediction in the label adds: that of ± eps H(p)
        sign = -1 if self_kd == "cp" else 1
        gradient -= sign * eps_64 * p_64 * (np.log(p_64) + entropy(p_64)[:, None])
    assert np.allclose(S.grad, gradient, atol=1e-5)


@pytest.mark.parametrize("chi", [-1.0, 0.4, 0.8, 1.2, 10.0])
def test_losses_in_numpy(draw, chi):
    """Equations 10 and 11 sample by sample; each network's gradient, the other's answers being constants."""
    S_A, S_B, _, _ = draw
    q_A, q_B = torch.rand(B, C), torch.rand(B, C)
    p_A, p_B = softmax(S_A), softmax(S_B)
    L_A = L_B = 0.0
    for i in range(B):
        L_A -= (q_A[i].numpy() * np.log(p_A[i] + 1e-6)).sum() / B
        L_B -= (q_B[i].numpy() * np.log(p_B[i] + 1e-6)).sum() / B
        if entropy(p_B[i : i + 1])[0] < chi:
            L_A -= (q_B[i].numpy() * np.log(p_A[i] + 1e-6)).sum() / B
        if entropy(p_A[i : i + 1])[0] < chi:
            L_B -= (q_A[i].numpy() * np.log(p_B[i] + 1e-6)).sum() / B
    for tensor in (S_A, S_B, q_A, q_B):
        tensor.requires_grad_()
    loss_A, loss_B, sure = cmd.cmd_losses(q_A, q_B, S_A.softmax(1), S_B.softmax(1), chi)
    assert (loss_A.item(), loss_B.item()) == pytest.approx((L_A, L_B), abs=1e-5)
    assert sure.tolist() == [(entropy(p) < chi).tolist() for p in (p_A, p_B)]
    assert torch.autograd.grad(loss_A, (S_B, q_B), retain_graph=True, allow_unused=True) == (None, None)
    assert torch.autograd.grad(loss_B, (S_A, q_A), retain_graph=True, allow_unused=True) == (None, None)
    gradient, of_label = torch.autograd.grad(loss_A, (S_A, q_A))
    assert np.allclose(of_label, -np.log(p_A + 1e-6) / B, atol=1e-5)  # the own label is no constant
    target = (q_A + sure[1].unsqueeze(1) * q_B).detach().numpy() * p_A / (p_A + 1e-6)
    assert np.allclose(gradient, (p_A * target.sum(1, keepdims=True) - target) / B, atol=1e-6)


def test_selection_by_hand():
    """Two samples, two classes; only B is sure, of the first: A learns twice there, and B nowhere."""
    p_A = torch.full((2, 2), 0.5)
    p_B = torch.tensor([[0.9, 0.1], [0.5, 0.5]])  # entropies 0.325 and log 2
    q_A, q_B = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1]])
    loss_A, loss_B, sure = cmd.cmd_losses(q_A, q_B, p_A, p_B, 0.5)
    assert sure.tolist() == [[False, False], [True, False]]
    # two of its own and one of B's, over two
    assert loss_A.item() == pytest.approx(3 * math.log(2) / 2, rel=1e-5)
    assert loss_B.item() == pytest.approx((math.log(10) + math.log(2)) / 2, rel=1e-5)
    uniform = cmd.entropy(torch.full((1, 2), 0.5)).item()
    # "<": a uniform prediction is not below H(u)
    assert cmd.cmd_losses(q_A, q_B, p_A, p_B, uniform)[2].sum() == 1
    for select, count in (("zero", 0), ("all", 2)):
        eta, _, b2 = cmd.SELECT[select]
        nearly = torch.tensor([[0.9, 0.1], [0.49, 0.51]])
        for t in (0.1, 0.5, 1):
            chi = cmd.threshold(t, eta, b2, 2)
            assert cmd.cmd_losses(q_A, q_B, nearly, nearly, chi)[2].sum() == 2 * count


def test_an_impossible_label_costs_no_more_than_supplement_c_says():
    """-log(0 + 1e-6). Where p is far below 1e-6, no gradient; far above, that of cross-entropy."""
    S = torch.tensor([[0.0, 40.0], [0.0, 5.0]], requires_grad=True)
    losses = cmd.cross_entropy(torch.tensor([[1.0, 0], [1, 0]]), S.softmax(1))
    assert losses.tolist() == pytest.approx([6 * math.log(10), math.log(1 + math.exp(5))], rel=1e-3)
    losses.sum().backward()
    assert S.grad[0].abs().max() < 1e-6 and S.grad[1, 0].item() == pytest.approx(
        -1 / (1 + math.exp(-5)), rel=1e-3
    )


def test_kdcl_by_hand_and_in_numpy(draw):
    S_A, S_B, y, _ = draw
    T = cmd.kdcl_teacher(S_A.requires_grad_(), S_B, y)
    less = [[row - row[label] for row, label in zip(np.float64(S.detach()), y)] for S in (S_A, S_B)]
    assert np.allclose(T, np.minimum(*less), atol=1e-5) and not T.requires_grad
    assert cmd.kdcl_teacher(
        torch.tensor([[3.0, 1]]), torch.tensor([[1.0, 2]]), torch.tensor([0])
    ).tolist() == [[0, -2]]
    p, q = softmax(S_A.detach()), softmax(S_B)
    assert cmd.hinton_loss(S_A, S_B, 1).item() == pytest.approx((q * np.log(q / p)).sum() / B, abs=1e-5)


def test_the_standard_library_keeps_its_cmd():
    """For code that imports it in the repository's root, and for Python's debugger, which runs the script."""
    code = "import cmd, pdb, sys; print(issubclass(pdb.Pdb, cmd.Cmd), 'torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("True False\n", "")
    command = [sys.executable, "-m", "pdb", "-c", "continue", "cmd.py", "x"]
    result = subprocess.run(command, cwd=ROOT, input="q\n", capture_output=True, text=True, timeout=60)
    assert "cmd.py: error: unrecognized arguments: x" in result.stdout + result.stderr


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags, sent", [
    ("", range(81)), ("--self-kd cp --select all", [80]), ("--self-kd tf-kd-reg --select zero", [0]),
    ("--mutual async", [None]), ("--rate 0 --arch-b resnet8", range(81)),
])  # fmt: skip
def test_a_run(cli, flags, sent):
    status, out, err = cli(cmd, *TINY, *NOISE, *flags.split(), "--out", "run")
    assert (status, err) == (0, "")
    checkpoint, data = saved("run"), common.load_dataset("tiny.npz")
    (last,) = checkpoint["metrics"]
    nets = [common.load_model(checkpoint, part) for part in ("model", "peer")]
    scores = [common.accuracy(common.predict(net, data.test_images), data.test_labels) for net in nets]
    assert [last["test_acc_A"], last["test_acc_B"]] == scores and last["test_acc"] == pytest.approx(
        sum(scores) / 2
    )
    assert [net.built_as["arch"] for net in nets] == [
        "wrn-10-1",
        "resnet8" if "resnet8" in flags else "wrn-10-1",
    ]
    assert not torch.equal(*(checkpoint[part]["stem.0.weight"] for part in ("model", "peer")))
    stats = torch.tensor(common.channel_stats(data))
    assert all(torch.allclose(torch.stack([net.mean, net.std]).flatten(1), stats) for net in nets)
    assert (last["train_acc_wrong"] is None) == ("--rate 0" in flags) and all(
        0 <= r <= 1 for r in last["certainty"]
    )
    assert last.get("communication") in sent


LABELS = common.corrupt_labels(torch.arange(40) % 3, "pair", 0.5, "abc", 0)


@pytest.fixture
def coloured(tmp_path):
    write_npz(tmp_path / "tiny.npz", train_images=colours(40))


@pytest.mark.parametrize("self_kd", ["mconf", "proselflc"])
def test_the_loop_follows_the_equations(cli, coloured, self_kd):
    """One step per epoch: trust in a network by its last epoch's certainty or by time, falling threshold."""
    flags = ["--self-kd", self_kd, "--eta", 1.5, "--b1", 6, "--b2", -2, "--lr", 0.01, "--epochs", 3]
    with forward_passes(scale=8) as passes:
        assert cli(cmd, *TINY, *NOISE, *flags, "--batch-size", 40, "--out", "run")[0] == 0
    passes = [step for step in passes if step.training]
    certainty, metrics = [0, 0], saved("run")["metrics"]
    for epoch, record in enumerate(metrics):
        steps = passes[2 * epoch : 2 * epoch + 2]  # of A and of B
        t, q = (epoch + 1) / 3, np.eye(3)[LABELS[numbers_of(steps[0].images)]]
        p = [softmax(step.logits.detach()) for step in steps]
        g = [1 / (1 + math.exp(-6 * (r - 0.5))) for r in (certainty if self_kd == "mconf" else (t, t))]
        eps = [(g[i] * (1 - entropy(p[i]) / np.log(3)))[:, None] for i in (0, 1)]
        own = [(1 - eps[i]) * q + eps[i] * p[i] for i in (0, 1)]
        chi = math.log(3) / 1.5 * 2 / (1 + math.exp(2 * (t - 0.5)))
        sure = [(entropy(x) < chi)[:, None] for x in p]
        loss = sum(-((own[i] + sure[1 - i] * own[1 - i]) * np.log(p[i] + 1e-6)).sum() / 40 for i in (0, 1))
        certainty = [1 - entropy(x).mean() / np.log(3) for x in p]
        assert record["train_loss"] == pytest.approx(loss, rel=1e-4) and record["threshold"] == pytest.approx(
            chi
        )
        assert record["communication"] == np.sum(sure) and record["certainty"] == pytest.approx(
            certainty, rel=1e-3
        )
    assert 0 < metrics[1]["communication"] < 80


@pytest.mark.parametrize("mutual", ["sync", "kdcl"])
def test_the_loop_of_the_methods_compared(cli, coloured, mutual):
    with forward_passes() as passes:
        assert cli(cmd, *TINY, *NOISE, "--mutual", mutual, "--batch-size", 40, "--out", "run")[0] == 0
    S = [step.logits.detach().numpy() for step in passes[:2]]
    q = np.eye(3)[LABELS[numbers_of(passes[0].images)]]
    p = [softmax(logits) for logits in S]
    if mutual == "sync":
        loss = sum(-((q + p[1 - i]) / 2 * np.log(p[i] + 1e-6)).sum() / 40 for i in (0, 1))
    else:
        T = softmax(np.minimum(*(x - (x * q).sum(1, keepdims=True) for x in S)) / 2)
        loss = sum((-(q * np.log(p[i])) + 4 * T * np.log(T / softmax(S[i] / 2))).sum() / 40 for i in (0, 1))
    assert saved("run")["metrics"][0]["train_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("batch_size, steps", [(40, 1), (20, 2), (13, 3)])
def test_asynchronous_networks_take_turns(cli, batch_size, steps):
    """Step by step through the whole training, A first, whatever the number of steps per epoch."""
    turns = []

    def look(optimizer, *_):
        A, *_, B = optimizer.param_groups[0]["params"]
        turns.append("A" * (A.grad is not None) + "B" * (B.grad is not None))

    handle = register_optimizer_step_pre_hook(look)
    status, _, _ = cli(cmd, *TINY, "--mutual", "async", "--batch-size", batch_size, "--epochs", 3)
    handle.remove()
    assert status == 0 and turns == [*"ABABABABA"][: 3 * steps]


def test_crops_are_padded_by_four_and_flipped(cli):
    """Both networks see the same images; on shapes, these are the data set's."""
    found = {}
    for augment in ("crop", "none"):
        with forward_passes() as passes:
            assert cli(cmd, *TINY, "--mutual", "sync", "--augment", augment, "--out", augment)[0] == 0
        crops = crops_of(common.load_dataset("tiny.npz").train_images, "constant")
        seen = [(step.images * 255).round().byte().numpy() for step in passes if step.training]
        assert len(seen) == 4 and np.array_equal(seen[0], seen[1]) and np.array_equal(seen[2], seen[3])
        found[augment] = {crops[image.tobytes()] for image in np.concatenate(seen)}
    assert len(found["crop"]) > 20 and {0, 8} <= {top for top, _, _ in found["crop"]}
    assert found["none"] == {(4, 4, False)}


def test_photographs_are_cropped_without_padding(cli):
    for part, i in itertools.product(("train", "val"), range(4)):
        path = Path(f"pictures/{part}/{'ab'[i % 2]}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "white").save(path)
    with forward_passes() as passes:
        flags = ["--resize", 36, "--image-size", 32, "--mutual", "sync", "--batch-size", 2]
        assert cli(cmd, *TINY, *flags, "--dataset", "imagefolder:pictures")[0] == 0
    assert all(step.images.shape[2:] == (32, 32) and (step.images == 1).all() for step in passes)


def test_validation_is_clean_and_never_trained_on(cli, coloured):
    """All labels are moved; those held out are the true ones."""
    flags = ["--validation", 0.25, "--batch-size", 10, "--epochs", 2, "--out", "run"]
    with forward_passes() as passes:
        status, out, _ = cli(cmd, *TINY, "--noise", "pair", "--rate", 1, *flags)
    assert status == 0 and "30 training images, 100.00 % relabelled" in out
    trained = torch.cat([numbers_of(step.images) for step in passes if step.training])
    assert trained.bincount(minlength=40).unique().tolist() == [0, 4]  # by two networks in two epochs
    data = common.load_dataset("tiny.npz")
    held = (trained.bincount(minlength=40) == 0).nonzero().squeeze(1)
    checkpoint = saved("run")
    nets = [common.load_model(checkpoint, part) for part in ("model", "peer")]
    scores = [
        common.accuracy(common.predict(net, data.train_images[held]), data.train_labels[held]) for net in nets
    ]
    assert checkpoint["metrics"][-1]["val_acc"] == pytest.approx(sum(scores) / 2)


def test_which_samples_are_held_out_does_not_follow_the_noise(cli, tmp_path):
    """sym relabels the first of an order drawn from the same seed."""
    pixels = np.zeros((9000, 3, 1, 1), np.uint8)
    write_npz(
        tmp_path / "many.npz", train_images=pixels, train_labels=np.arange(9000) % 3, test_images=pixels[:20]
    )
    flags = [
        "--dataset",
        "many.npz",
        "--noise",
        "sym",
        "--rate",
        0.5,
        "--validation",
        0.5,
        "--batch-size",
        4500,
    ]
    _, out, _ = cli(cmd, *TINY, *flags)
    share = float(out.partition("images, ")[2].partition(" %")[0]) / 100
    assert out.startswith("4,500 training images") and within(round(share * 4500), 4500, 1 / 3)


@pytest.mark.parametrize("flags, epochs", [
    ("--self-kd mconf --arch-b resnet8 --validation 0.25 --batch-size 10", 3),
    ("--mutual async --batch-size 13", 2),
])  # fmt: skip
def test_an_interrupted_run_continues_to_the_same_bit(cli, flags, epochs):
    assert_resumes_to_the_same_bit(cli, cmd, *TINY, *NOISE, *flags.split(), "--epochs", epochs, stops=epochs)
