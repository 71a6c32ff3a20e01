"""kd_zoo.py: every loss against a float64 numpy version and by hand, invariances, gradients, and whole runs."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import TINY
from test_augment import within
from test_run import assert_same_run

import common
import kd_zoo

B, C = 6, 5


def features(widths=(4, 4, 6, 8), sizes=(8, 8, 4, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, k, n, n, generator=generator) for k, n in zip(widths, sizes)]


def softmax(logits):
    e = np.exp(np.float64(logits))
    return e / e.sum(1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(1).mean()


def cross_entropy(logits, y):
    return -np.log(softmax(logits)[np.arange(len(y)), y]).mean()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def huber(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, d**2 / 2, d - 0.5).mean()


# ------------------------------------------------------------------------------------------------------------- in numpy


def attention_numpy(s, t):
    total = 0
    for a, b in zip(s[1:], t[1:]):
        maps = [unit((np.float64(f) ** 2).mean(1).reshape(B, -1)) for f in (a, b)]
        total += ((maps[0] - maps[1]) ** 2).mean()
    return total


def similarity_numpy(s, t):
    grams = []
    for f in (s[-1], t[-1]):
        rows = np.float64(f).reshape(B, -1)
        grams.append(unit(np.array([[np.dot(a, b) for b in rows] for a in rows])))
    return ((grams[1] - grams[0]) ** 2).sum() / B**2


def rkd_distance_numpy(s, t):
    tables = []
    for f in (s[-1], t[-1]):
        e = np.float64(f).mean((2, 3))
        d = np.array([[np.linalg.norm(a - b) for b in e] for a in e])
        tables.append(d / d[d > 0].mean())
    return huber(*tables)


def rkd_angle_numpy(s, t):
    tables = []
    for f in (s[-1], t[-1]):
        e, cosines = np.float64(f).mean((2, 3)), np.zeros((B, B, B))
        for i, j, k in itertools.product(range(B), repeat=3):
            if i not in (j, k):
                cosines[i, j, k] = unit(e[j] - e[i]) @ unit(e[k] - e[i])
        tables.append(cosines)
    return huber(*tables)


def fsp_numpy(s, t):
    total = 0
    for n, weight in ((1, 1), (2, 3), (3, 1)):
        matrices = []
        for f in (s, t):
            before, after = np.float64(f[n - 1]), np.float64(f[n])
            size = after.shape[2]
            factor = before.shape[2] // size
            before = before.reshape(*before.shape[:2], size, factor, size, factor).max((3, 5))
            flat = [x.reshape(B, x.shape[1], -1) for x in (before, after)]
            matrices.append(np.stack([a @ b.T / size**2 for a, b in zip(*flat)]))
        total += weight * ((matrices[0] - matrices[1]) ** 2).mean()
    return total


FEATURE_LOSSES = {
    kd_zoo.attention_loss: attention_numpy, kd_zoo.similarity_loss: similarity_numpy, kd_zoo.fsp_loss: fsp_numpy,
    kd_zoo.rkd_distance_loss: rkd_distance_numpy, kd_zoo.rkd_angle_loss: rkd_angle_numpy,
}  # fmt: skip


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
def test_feature_losses_against_numpy(loss):
    s, t = features(seed=1), features(seed=2)
    expected = FEATURE_LOSSES[loss]([f.numpy() for f in s], [f.numpy() for f in t])
    assert loss(s, t).item() == pytest.approx(expected, rel=1e-4) and expected > 1e-4
    assert loss(s, s).item() == pytest.approx(0, abs=1e-9)


def test_logit_losses_against_numpy():
    S, T, E = (torch.randn(B, C) * 2 for _ in range(3))
    y, tau = torch.arange(B) % C, 3.0
    s, t, e = (x.numpy() for x in (S, T, E))
    hinton = tau**2 * kl(softmax(t / tau), softmax(s / tau))
    assert kd_zoo.hinton_loss(S, T, tau).item() == pytest.approx(hinton, rel=1e-5)
    assert kd_zoo.hinton_loss(S, S, tau).item() == pytest.approx(0, abs=1e-6)
    back = tau**2 * kl(softmax(s / tau), softmax(t / tau))
    dml = cross_entropy(s, y) + cross_entropy(t, y) + hinton + back
    assert kd_zoo.dml_loss(S, T, y, tau).item() == pytest.approx(dml, rel=1e-5)
    w = np.exp(-5 * (1 - 0.3) ** 2)
    taught = sum(tau**2 * kl(softmax(e / tau), softmax(x / tau)) for x in (s, t))
    one = cross_entropy(s, y) + cross_entropy(t, y) + cross_entropy(e, y) + w * taught
    assert kd_zoo.one_loss([S, T], E, y, tau, 0.3).item() == pytest.approx(one, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- by hand


def test_losses_by_hand():
    S, T = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    assert kd_zoo.hinton_loss(S, T, 1.0).item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-6)
    # tau = 2 takes the square root of the odds 9 : 1, and multiplies by 4
    T = torch.tensor([[9.0, 1.0]]).log()
    assert kd_zoo.hinton_loss(S, T, 2.0).item() == pytest.approx(
        4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5)), rel=1e-6
    )

    def image(*pixels):
        return torch.tensor(pixels).view(1, 1, 1, -1)

    # attention maps (1, 0) and (0, 1): squared difference 1 at both positions; the stem does not count
    assert kd_zoo.attention_loss([image(9.0), image(3.0, 0)], [image(1.0), image(0, 2.0)]).item() == pytest.approx(1)
    # two samples, parallel and orthogonal: Gram rows (1, 1)/√2 against (1, 0), twice
    parallel, orthogonal = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]])
    s, t = [parallel.view(2, 2, 1, 1)], [orthogonal.view(2, 2, 1, 1)]
    expected = 2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4
    assert kd_zoo.similarity_loss(s, t).item() == pytest.approx(expected, rel=1e-6)
    # points 0, 1, 3 on a line have distances 1, 2, 3, mean 2; 0, 1, 2 have 1, 1, 2, mean 4/3
    s, t = (torch.tensor(points).view(3, 1, 1, 1) for points in ([0.0, 1, 3], [0.0, 1, 2]))
    differences = np.array([0.5 - 0.75, 1 - 0.75, 1.5 - 1.5])
    assert kd_zoo.rkd_distance_loss([s], [t]).item() == pytest.approx(2 * (differences**2 / 2).sum() / 9, rel=1e-5)
    # a right angle at one corner against a straight line: cosine 0 against -1, for the two orders of the other points
    corner = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    cosines = kd_zoo.angles(corner)
    assert cosines[0, 1, 2].item() == pytest.approx(0, abs=1e-6) and cosines[1, 0, 2].item() == pytest.approx(0.5**0.5)
    assert kd_zoo.angles(torch.tensor([[0.0], [1], [-1]]))[0, 1, 2].item() == pytest.approx(-1)
    # one position, channels (1, 2) to (3): the matrix is their outer product
    (matrix,) = kd_zoo.fsp_matrices([torch.tensor([1.0, 2]).view(1, 2, 1, 1), torch.tensor([3.0]).view(1, 1, 1, 1)])
    assert matrix.tolist() == [[[3.0], [6.0]]]
    regressor = torch.nn.Conv2d(1, 1, 1, bias=False)
    torch.nn.init.constant_(regressor.weight, 2.0)
    s, t = [None, None, image(1.0, 2.0)], [None, None, image(2.0, 1.0)]
    assert kd_zoo.fitnet_loss(regressor, s, t).item() == pytest.approx((0 + 9) / 2)


def test_invariances():
    s, t = features(seed=1), features(seed=2)
    scaled = [f * (3 + torch.rand(B, 1, 1, 1)) for f in s]  # each sample by its own factor
    assert kd_zoo.attention_loss(scaled, t).item() == pytest.approx(kd_zoo.attention_loss(s, t).item(), rel=1e-4)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    rotated = [*s[:-1], torch.einsum("kl,blhw->bkhw", rotation, s[-1])]
    for loss in (kd_zoo.similarity_loss, kd_zoo.rkd_angle_loss, kd_zoo.rkd_distance_loss):
        assert loss(rotated, t).item() == pytest.approx(loss(s, t).item(), rel=1e-3)
    for loss in (kd_zoo.rkd_distance_loss, kd_zoo.rkd_angle_loss, kd_zoo.similarity_loss):
        assert loss([f * 7 for f in s], t).item() == pytest.approx(loss(s, t).item(), rel=1e-3)
    moved = [f + 1 for f in s]
    for loss in (kd_zoo.rkd_distance_loss, kd_zoo.rkd_angle_loss):
        assert loss(moved, t).item() == pytest.approx(loss(s, t).item(), rel=1e-3)
    assert kd_zoo.similarity_loss(moved, t).item() != pytest.approx(kd_zoo.similarity_loss(s, t).item(), rel=1e-3)


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
def test_gradients_are_finite_and_right(loss):
    """In float64 against finite differences, also where two samples coincide, where a root has no derivative."""
    s, t = ([f.double() for f in features(seed=seed)] for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda last: loss([*s[:-1], last], t), s[-1].requires_grad_(), atol=1e-6)
    twins = [f.detach().clone() for f in s]
    twins[-1][1] = twins[-1][0]
    twins[-1].requires_grad_()
    loss(twins, t).backward()
    assert twins[-1].grad.isfinite().all()


def test_gradients_go_where_they_should():
    S, T = torch.randn(B, C, requires_grad=True), torch.randn(B, C, requires_grad=True)
    y = torch.arange(B) % C
    kd_zoo.dml_loss(S, T, y, 4.0).backward()
    alone = torch.nn.functional.cross_entropy(S, y) + kd_zoo.hinton_loss(S, T.detach(), 4.0)
    (own,) = torch.autograd.grad(alone, S)
    assert torch.allclose(S.grad, own)  # as a peer, S is detached
    S.grad = None
    E = torch.randn(B, C, requires_grad=True)
    kd_zoo.one_loss([S, S], E, y, 3.0, 1.0).backward()
    (own,) = torch.autograd.grad(torch.nn.functional.cross_entropy(E, y), E)
    assert torch.allclose(E.grad, own)  # as a teacher, the ensemble is detached


# ------------------------------------------------------------------------------------------------------------- the nets


def test_boundary_samples_cross_the_boundary_or_stop_at_ten_steps():
    """A linear teacher of two classes, whose boundary is known."""
    w = torch.randn(2, 48)
    calls = []

    def teacher(x):
        calls.append(len(x))
        return x.flatten(1) @ w.T

    x = torch.rand(64, 3, 4, 4)
    T = teacher(x)
    y = T.argmax(1)
    S = T + torch.randn_like(T) * 0.1
    agree = S.argmax(1) == y
    calls.clear()
    moved = kd_zoo.boundary_samples(teacher, x, y, S, T, max_eps=1)
    assert calls == [32] * 10 and len(moved) == 32 and not moved.requires_grad
    difference = ((S.softmax(1) - T.softmax(1)) ** 2).scatter(1, y.unsqueeze(1), 0).sum(1).masked_fill(~agree, -1)
    base = difference.topk(32).indices
    gap = (T[base, y[base]] - T[base, 1 - y[base]]).abs()
    after = teacher(moved)
    new_gap = after[torch.arange(32), y[base]] - after[torch.arange(32), 1 - y[base]]
    crossed = new_gap < 0
    assert crossed.any() and (new_gap < gap).all()
    # just across, not far: the last step began before the boundary, and covered gap + 1e-4 times 0.3 times ‖gradient‖
    length = (w[0] - w[1]).norm()
    assert (new_gap[crossed] > -0.3 * length * gap[crossed] - 1e-3).all()
    near = kd_zoo.boundary_samples(teacher, x, y, S, T)
    assert (near - x[base]).abs().max() <= 16 / 255 + 1e-6 and near.min() >= 0 and near.max() <= 1
    few = kd_zoo.boundary_samples(teacher, x, y, S, T, size=5)
    assert len(few) == 5
    assert len(kd_zoo.boundary_samples(teacher, x, 1 - y, S, T)) == 0  # nothing is classified correctly


def test_boundary_samples_aim_in_proportion_to_the_teacher():
    """Wrong classes 1 and 2 have teacher probabilities 3 : 1, so that three of four samples go towards class 1."""
    x = torch.zeros(4000, 3, 1, 1) + 0.5
    T = torch.tensor([8.0, 3.0, 1.0]).log().repeat(4000, 1)

    def teacher(x):
        return T[: len(x)] + 0.01 * (x[:, :, 0, 0] - 0.5)

    y = torch.zeros(4000, dtype=torch.int64)
    moved = kd_zoo.boundary_samples(teacher, x, y, T, T, size=4000, steps=1, max_eps=1)
    towards = (moved - x)[:, :, 0, 0].argmax(1)
    assert not (towards == 0).any()
    within((towards == 1).sum(), 4000, 0.75)


def test_one_shares_its_trunk_and_its_gate_sums_to_one():
    nets = [common.build_model("resnet8", C) for _ in range(3)]
    branches = kd_zoo.share_trunk(nets[0], nets[1:])
    x = torch.rand(4, 3, 32, 32)
    gate = kd_zoo.Gate(32, 3)
    assert torch.allclose(gate(torch.rand(4, 32, 8, 8)).sum(1), torch.ones(4))
    for net in (*branches, gate):
        net.eval()
    with torch.no_grad():
        logits, ensemble = kd_zoo.one_logits(branches, gate, x)
        shared = branches[0](x, features=True)[1][-2]
        assert all(torch.allclose(branch(x), S, atol=1e-5) for branch, S in zip(branches, logits))
        assert torch.allclose(ensemble, sum(w.unsqueeze(1) * S for w, S in zip(gate(shared).T, logits)), atol=1e-5)
    assert branches[1].stem is branches[0].stem and branches[2].blocks[1] is branches[0].blocks[1]
    last = [branch.blocks[2][0].conv1.weight for branch in branches]
    assert not torch.equal(last[0], last[1]) and not torch.equal(last[1], last[2])


def test_class_accuracies():
    logits = torch.eye(3)[[0, 0, 1, 2]]
    assert kd_zoo.class_accuracies(logits, torch.tensor([0, 1, 1, 0])) == [50, 50, 0]


def test_feature_shapes_are_those_of_the_network():
    data = common.load_dataset("shapes", limit_train=2, limit_test=2)
    for arch in ("wrn-10-1", "resnet8x4", "preact_resnet18"):
        with torch.no_grad():
            made = common.build_model(arch, 2)(common.to_float(data.train_images), features=True)[1]
        assert [tuple(s) for s in kd_zoo.feature_shapes(arch, data)] == [tuple(f.shape[1:]) for f in made]


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method, epochs, rates", [
    ("hinton", 200, {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 149: 0.004, 150: 0.0008, 199: 0.0008}),
    ("fitnet", 300, {0: 1e-3, 59: 1e-3, 60: 1e-4, 80: 1e-5, 99: 1e-5, 100: 0.1, 160: 0.02, 220: 0.004, 250: 0.0008}),
    ("one", 300, {0: 0.1, 149: 0.1, 150: 0.01, 224: 0.01, 225: 0.001, 299: 0.001}),
])  # fmt: skip
def test_table_1_is_the_preset(monkeypatch, tiny_npz, method, epochs, rates):
    monkeypatch.setattr("sys.argv", ["kd_zoo.py", "--method", method, "--dataset", str(tiny_npz)])
    args = kd_zoo.parse_args()
    assert args.init_epochs + args.epochs == epochs and (args.batch_size, args.weight_decay) == (128, 5e-4)
    assert (args.student_arch, args.teacher_arch) == ("wrn-16-2", "wrn-40-2")
    assert {epoch: kd_zoo.learning_rate(args, epoch) for epoch in rates} == pytest.approx(rates)


SMALL = [*TINY, "--teacher-arch", "wrn-10-1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One teacher for all the runs."""
    import sys

    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["kd_zoo.py", *SMALL, "--method", "baseline", "--out", "run"])
        kd_zoo.main()
    return folder / "run/checkpoint.pt"


@pytest.mark.parametrize("method", kd_zoo.TABLE_I)
def test_every_method_interrupted_and_continued_to_the_same_bit(cli, monkeypatch, method, teacher, tmp_path):
    """Stopped after every epoch, in stage 1 and in stage 2, against a run nobody disturbed."""
    flags = [*TINY, "--method", method]
    flags += [] if method in kd_zoo.ALONE else ["--teacher", teacher]
    stages = ["--init-epochs", 2] if method in ("fitnet", "fsp") else []
    status, out, err = cli(kd_zoo, *flags, *stages, "--out", "whole")
    assert (status, err) == (0, "")
    end_epoch = common.Run.end_epoch

    def interrupt(run, *args, **metrics):
        end_epoch(run, *args, **metrics)
        raise KeyboardInterrupt

    epochs = 4 if stages else 2
    monkeypatch.setattr(common.Run, "end_epoch", interrupt)
    for epoch in range(epochs):
        assert cli(kd_zoo, *flags, *stages, "--out", "broken", *["--resume"][:epoch])[0] == 130
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    assert cli(kd_zoo, *flags, *stages, "--out", "broken", "--resume")[0] == 0
    extra = {"one": ("branch1", "branch2", "branch3", "gate"), "dml": ("student1", "student2")}.get(
        method, ("regressor",)
    )
    assert_same_run(tmp_path / "whole", tmp_path / "broken", ("model", "optimizer", "rng", *extra))
    checkpoint = common.load_checkpoint("whole/checkpoint.pt")
    metrics = checkpoint["metrics"]
    assert len(metrics) == epochs and len(metrics[-1]["class_acc"]) == 10
    data = common.load_dataset("shapes", limit_train=1, limit_test=40)
    logits = common.predict(common.load_model(checkpoint), data.test_images)
    assert common.accuracy(logits, data.test_labels) == pytest.approx(metrics[-1]["test_acc"], abs=0.01)
    if method == "one":
        assert metrics[-1]["test_acc"] == max(metrics[-1]["branch_test_acc"]) and "ensemble_test_acc" in metrics[-1]
    if method == "dml":
        assert metrics[-1]["test_acc"] == max(metrics[-1]["student_test_acc"])
        both = [checkpoint[f"student{i}"]["stem.0.weight"] for i in (1, 2)]
        assert not torch.equal(*both)


@pytest.mark.parametrize("method", ["at", "sp", "rkd-da"])
def test_hinton_on_top(cli, method, teacher, tmp_path):
    status, out, err = cli(kd_zoo, *TINY, "--method", method, "--add", "hinton", "--teacher", teacher, "--epochs", 1)
    assert (status, err) == (0, "") and f"runs/{method}+hinton-shapes-clean-seed0" in out


def test_a_fickle_teacher_on_top(cli, monkeypatch):
    seen = {}
    load = common.load_teacher

    def loaded(*args, **options):
        seen["teacher"] = load(*args, **options)
        return seen["teacher"]

    monkeypatch.setattr(common, "load_teacher", loaded)
    assert cli(kd_zoo, *SMALL, "--method", "sp", "--add", "ft", "--epochs", 1)[0] == 0
    modes = {type(m).__name__: (m.training, getattr(m, "p", None)) for m in seen["teacher"].modules()}
    assert modes["Dropout"] == (True, 0.4) and not modes["BatchNorm2d"][0]


def test_imbalance_reaches_student_and_teacher(cli):
    status, out, err = cli(
        kd_zoo, *SMALL, "--imbalance", 0.6, "--limit-train", 2000, "--batch-size", 128, "--epochs", 1
    )
    assert (status, err) == (0, "") and "runs/hinton-shapes-clean-imbalance0.6-seed0" in out
    labels = common.load_dataset("shapes").train_labels
    kept = labels[common.imbalance(labels, 0.6, 10, 0)].bincount(minlength=10)
    sizes, gamma = [], 0.6  # n_c = floor(a / (b + c^-γ)) with n_1 = 10, n_10 = 200
    b = (10 - 200 * 10**-gamma) / (200 - 10)
    a = 10 * (b + 1)
    sizes = [int(a / (b + c**-gamma) + 1e-6) for c in range(1, 11)]
    assert kept.tolist() == sizes and sizes[0] == 10 and sizes[-1] == 200
    for path in ("runs/hinton-shapes-clean-imbalance0.6-seed0", next(common.Path("runs/teachers").iterdir())):
        steps = common.load_checkpoint(common.Path(path) / "checkpoint.pt")["optimizer"]["state"]
        assert steps  # both were trained
    records = [
        json.loads(line) for line in common.Path("runs/hinton-shapes-clean-imbalance0.6-seed0/metrics.jsonl").open()
    ]
    assert len(records[0]["class_acc"]) == 10


@pytest.mark.parametrize("flags, names", [
    (["--method", "hintn"], "--method: unknown 'hintn'; did you mean hinton"), (["--add", "ft"], "--add"),
    (["--method", "dml", "--teacher", "x.pt"], "--teacher"), (["--method", "at", "--gamma", 1], "--gamma"),
    (["--method", "fsp", "--teacher-arch", "wrn-10-2"], "--student-arch"), (["--imbalance", 0], "--imbalance"),
    (["--method", "fitnet", "--teacher-arch", "preact_resnet18"], "--student-arch"), (["--noise", "sym"], "--rate"),
    (["--method", "at", "--teacher-arch", "mobilenet_v2"], "--student-arch"), (["--init-epochs", 3], "--init-epochs"),
])  # fmt: skip
def test_bad_input(cli, flags, names, tmp_path):
    status, _, err = cli(kd_zoo, *TINY, *flags)
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and names in err
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_run_from_the_command_line(script, tmp_path):
    result = script("kd_zoo.py", *TINY)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].endswith("runs/hinton-shapes-clean-seed0")
