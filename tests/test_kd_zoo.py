"""kd_zoo.py: every loss against a float64 numpy version and by hand, invariances, gradients, whole runs."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Calls,
    assert_resumes_to_the_same_bit,
    colours,
    forward_passes,
    numbers_of,
    saved,
    within,
    write_npz,
)
from test_noise_as_a_resource import ALONE, TINY, log_softmax
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

import common
import kd_zoo

pytestmark = pytest.mark.usefixtures("quick", "tiny_npz")
B, C = 6, 5
SMALL = [*TINY, "--student-arch", "wrn-10-1"]


def small(method):
    """SMALL, without a teacher where the method has none."""
    return [*ALONE, "--student-arch", "wrn-10-1"] if method in kd_zoo.ALONE else SMALL


def features(seed, widths=(4, 4, 6, 8), sizes=(8, 8, 4, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, k, n, n, generator=generator) for k, n in zip(widths, sizes)]


# --------------------------------------------------------------------------------------------------- in numpy


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(1).mean()


def cross_entropy(logits, y):
    return -log_softmax(logits)[np.arange(len(y)), y].mean()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def huber(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, d**2 / 2, d - 0.5).mean()


def gram(f):
    rows = f[-1].reshape(B, -1)
    return unit(np.array([[np.dot(a, b) for b in rows] for a in rows]))


def embedded(f):
    return unit(f[-1].reshape(B, -1))


def distances(f):
    e = embedded(f)
    d = np.array([[np.linalg.norm(a - b) for b in e] for a in e])
    return d / d[d > 0].mean()


def angles(f):
    e, cosines = embedded(f), np.zeros((B, B, B))
    for i, j, k in itertools.product(range(B), repeat=3):
        if i not in (j, k):
            cosines[i, j, k] = unit(e[j] - e[i]) @ unit(e[k] - e[i])
    return cosines


def fsp(f, n):
    """The matrices of group n, whose input is a whole number of times as large as its output."""
    before, (_, channels, side, _) = f[n - 1], f[n].shape
    factor = before.shape[2] // side
    before = before.reshape(B, -1, side, factor, side, factor).max((3, 5)).reshape(B, -1, side**2)
    return before @ f[n].reshape(B, channels, -1).transpose(0, 2, 1) / side**2


def attention(f):
    return unit((f**2).mean(1).reshape(B, -1))


FEATURE_LOSSES = {
    "attention_loss": lambda s, t: sum(
        ((attention(a) - attention(b)) ** 2).mean() for a, b in zip(s[1:], t[1:])
    ),
    "similarity_loss": lambda s, t: ((gram(s) - gram(t)) ** 2).sum() / B**2,
    "rkd_distance_loss": lambda s, t: huber(distances(s), distances(t)),
    "rkd_angle_loss": lambda s, t: huber(angles(s), angles(t)),
    "fsp_loss": lambda s, t: sum(
        w * ((fsp(s, n) - fsp(t, n)) ** 2).mean() for n, w in ((1, 1), (2, 3), (3, 1))
    ),
}


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_losses_in_numpy_and_their_gradients(name):
    """Gradients against finite differences; finite where two samples coincide: a root has no derivative."""
    s, t, loss = features(1), features(2), getattr(kd_zoo, name)
    expected = FEATURE_LOSSES[name](*([np.float64(f) for f in part] for part in (s, t)))
    assert loss(s, t).item() == pytest.approx(expected, rel=1e-4) and expected > 1e-4
    s, t = ([f.double() for f in part] for part in (s, t))
    assert torch.autograd.gradcheck(lambda last: loss([*s[:-1], last], t), s[-1].requires_grad_(), atol=1e-6)
    for rows in ([0, 0, *range(2, B)], [0] * B):  # two samples coincide, then all
        twins = s[-1].detach()[rows].requires_grad_()
        value = loss([*s[:-1], twins], t)
        value.backward()
        assert value.isfinite() and twins.grad.isfinite().all()


def test_logit_losses_in_numpy():
    S, T, E = (torch.randn(B, C) * 2 for _ in range(3))
    y, tau = torch.arange(B) % C, 3.0
    s, t, e = (log_softmax(x / tau) for x in (S, T, E))
    assert kd_zoo.hinton_loss(S, T, tau).item() == pytest.approx(tau**2 * kl(t, s), rel=1e-5)
    dml = cross_entropy(S, y) + cross_entropy(T, y) + tau**2 * (kl(t, s) + kl(s, t))
    assert kd_zoo.dml_loss(S, T, y, tau).item() == pytest.approx(dml, rel=1e-5)
    one = sum(cross_entropy(x, y) for x in (S, T, E)) + np.exp(-5 * (1 - 0.3) ** 2) * tau**2 * (
        kl(e, s) + kl(e, t)
    )
    assert kd_zoo.one_loss([S, T], E, y, tau, 0.3).item() == pytest.approx(one, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- by hand


def image(*pixels):
    """One image of one channel and one row."""
    return torch.tensor(pixels).view(1, 1, 1, -1)


def test_losses_by_hand():
    S, T = torch.zeros(1, 2), torch.tensor([[9.0, 1.0]]).log()  # at temperature 2: (1/2, 1/2) and (3/4, 1/4)
    by_hand = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert kd_zoo.hinton_loss(S, T, 2.0).item() == pytest.approx(by_hand, rel=1e-6)
    # attention maps (1, 0) and (0, 1): squared difference 1 at both positions; the stem does not count
    assert kd_zoo.attention_loss(
        [image(9.0), image(3.0, 0)], [image(1.0), image(0, 2.0)]
    ).item() == pytest.approx(1)
    # two samples, parallel and orthogonal: Gram rows (1, 1)/√2 against (1, 0), twice
    s, t = (torch.tensor(rows).view(2, 2, 1, 1) for rows in ([[1.0, 0], [1, 0]], [[1.0, 0], [0, 1]]))
    assert kd_zoo.similarity_loss([s], [t]).item() == pytest.approx(
        2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4, rel=1e-6
    )
    # points 0, 1, 3 on a line have distances 1, 3, 2, mean 2
    assert kd_zoo.relative_distances(torch.tensor([[0.0], [1], [3]]))[0].tolist() == pytest.approx(
        [0, 0.5, 1.5]
    )
    # directions at 0°, 60°, 180°: chords 1, 2, √3; at 0°, 90°, 180°: √2, 2, √2
    points = ([1.0, 0], [0.5, 0.75**0.5], [-1.0, 0]), ([3.0, 0], [0.0, 1], [-2.0, 0])
    s, t = (torch.tensor(three).view(3, 2, 1, 1) for three in points)
    first, second = np.array([1, 2, 3**0.5]), np.array([2**0.5, 2, 2**0.5])
    squares = (first / first.mean() - second / second.mean()) ** 2
    assert kd_zoo.rkd_distance_loss([s], [t]).item() == pytest.approx(2 * (squares / 2).sum() / 9, rel=1e-5)
    # a right angle at the first of three corners, 45° at the others; a straight angle
    cosines = kd_zoo.angles(torch.tensor([[0.0, 0], [1, 0], [0, 1]]))
    assert [cosines[0, 1, 2].item(), cosines[1, 0, 2].item()] == pytest.approx([0, 0.5**0.5], abs=1e-6)
    assert kd_zoo.angles(torch.tensor([[0.0], [1], [-1]]))[0, 1, 2].item() == pytest.approx(-1)
    # one position, channels (1, 2) to (3): the matrix is their outer product
    (matrix,) = kd_zoo.fsp_matrices([torch.tensor([1.0, 2]).view(1, 2, 1, 1), image(3.0)])
    assert matrix.tolist() == [[[3.0], [6.0]]]
    regressor = torch.nn.Conv2d(1, 1, 1, bias=False)
    torch.nn.init.constant_(regressor.weight, 2.0)  # 2, 4 against 2, 1
    assert kd_zoo.fitnet_loss(
        regressor, [0, 0, image(1.0, 2.0)], [0, 0, image(2.0, 1.0)]
    ).item() == pytest.approx(4.5)


def test_invariances():
    """What is equal when the student's features change, and what is not."""
    s, t = features(1), features(2)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    relations = ("rkd_distance_loss", "rkd_angle_loss")
    for changed, same in (
        ([f * 7 for f in s], ("attention_loss", "similarity_loss", *relations)),
        (
            [*s[:-1], torch.einsum("kl,blhw->bkhw", turn, s[-1])],
            ("attention_loss", "similarity_loss", *relations),
        ),
        ([f + 1 for f in s], ()),
        (
            [f * (3 + torch.rand(B, 1, 1, 1)) for f in s],
            ("attention_loss", *relations),
        ),  # each by its own factor
    ):
        for loss in (getattr(kd_zoo, name) for name in FEATURE_LOSSES):
            equal = loss(changed, t).item() == pytest.approx(loss(s, t).item(), rel=1e-3)
            assert equal == (loss.__name__ in same), (loss, same)


def test_gradients_go_where_they_should():
    S, T, E = (torch.randn(B, C, requires_grad=True) for _ in range(3))
    y = torch.arange(B) % C
    kd_zoo.dml_loss(S, T, y, 4.0).backward()
    for own, peer in ((S, T), (T, S)):
        alone = F.cross_entropy(own, y) + kd_zoo.hinton_loss(own, peer.detach(), 4.0)
        assert torch.allclose(own.grad, *torch.autograd.grad(alone, own))  # as a peer, a student is detached
    kd_zoo.one_loss([S, T], E, y, 3.0, 1.0).backward()
    (own,) = torch.autograd.grad(F.cross_entropy(E, y), E)
    assert torch.allclose(E.grad, own)  # as a teacher, the ensemble is detached


def test_no_loss_waits_for_the_device():
    """Meta tensors have no values: what reads one, for which a CUDA step would have to wait, raises."""
    s, t = ([f.to("meta").requires_grad_() for f in features(seed)] for seed in (1, 2))
    S, T, y = (torch.zeros(shape, device="meta") for shape in ((B, C), (B, C), B))
    losses = [getattr(kd_zoo, name)(s, t) for name in FEATURE_LOSSES]
    losses += [kd_zoo.dml_loss(S, T, y.long(), 4.0), kd_zoo.one_loss([S, S], T, y.long(), 3.0, 0.5)]
    assert all(loss.shape == () for loss in losses)
    sum(losses).backward()


# --------------------------------------------------------------------------------------------------- the nets


def test_boundary_samples_begin_where_the_nets_differ_most():
    """Of those that both classify correctly, by the squared differences on wrong classes. No step is made."""
    S, T, x = torch.randn(64, 3) * 2, torch.randn(64, 3), torch.rand(64, 3, 1, 1)
    y = torch.where(torch.rand(64) < 0.2, 0, T.argmax(1))
    p, q = (np.exp(log_softmax(logits)) for logits in (S, T))
    scores = [((p[i] - q[i]) ** 2).sum() - (p[i, y[i]] - q[i, y[i]]) ** 2 for i in range(64)]
    correct = ((S.argmax(1) == y) & (T.argmax(1) == y)).nonzero().squeeze(1).tolist()
    best = sorted(correct, key=lambda i: -scores[i])
    for size in (5, 64):
        assert torch.equal(kd_zoo.boundary_samples(None, x, y, S, T, size=size, steps=0), x[best[:size]])
    assert 5 < len(best) < 40 and len(kd_zoo.boundary_samples(None, x, (T.argmax(1) + 1) % 3, S, T)) == 0


def test_boundary_samples_cross_the_boundary_or_stop_at_ten_steps():
    """A linear teacher of two classes, whose boundary is known."""
    w, x, calls = torch.randn(2, 48), torch.rand(64, 3, 4, 4), []

    def teacher(x):
        calls.append(len(x))
        return x.flatten(1) @ w.T

    T = teacher(x)
    y, S = T.argmax(1), T + torch.randn_like(T) * 0.1
    start = kd_zoo.boundary_samples(teacher, x, y, S, T, steps=0)
    calls.clear()
    moved = kd_zoo.boundary_samples(teacher, x, y, S, T)
    assert calls == [32] * 10 and len(moved) == 32 and not moved.requires_grad
    gap, new_gap = (logits[:, 0] - logits[:, 1] for logits in (teacher(start), teacher(moved)))
    gap, new_gap = gap.abs(), new_gap * gap.sign()
    crossed = new_gap < 0
    assert crossed.any() and (new_gap < gap).all()
    # just across: the last step began before the boundary and covered (gap + 1e-4) times 0.3 times ‖gradient‖
    assert (new_gap[crossed] > -0.3 * (w[0] - w[1]).norm() * gap[crossed] - 1e-3).all()
    far = kd_zoo.boundary_samples(teacher, x, y, S, T, step_size=30)
    assert (far - start).abs().max() > 0.5 and far.min() == 0 and far.max() == 1


def test_boundary_samples_aim_in_proportion_to_the_teacher():
    """Wrong classes 1 and 2 have teacher probabilities 3 : 1: three of four samples go towards class 1."""
    x = torch.full((4000, 3, 1, 1), 0.5)
    T = torch.tensor([8.0, 3.0, 1.0]).log().repeat(4000, 1)
    y = torch.zeros(4000, dtype=torch.int64)
    teacher = lambda x: T + 0.01 * (x[:, :, 0, 0] - 0.5)  # noqa: E731
    moved = kd_zoo.boundary_samples(teacher, x, y, T, T, size=4000, steps=1)
    towards = (moved - x)[:, :, 0, 0].argmax(1)
    assert not (towards == 0).any() and within(int((towards == 1).sum()), 4000, 0.75)


def test_one_shares_its_trunk_and_weighs_its_branches():
    alone = [common.build_model("resnet8", C).eval() for _ in range(3)]
    one, x = kd_zoo.ONE(alone, width=32).eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        logits, ensemble = one.logits(x)
        weights = one.gate(alone[0](x, features=True)[1][-2])
        assert weights.shape == (4, 3) and torch.allclose(weights.sum(1), torch.ones(4)) and weights.std() > 0
        assert all(torch.allclose(net(x), S, atol=1e-5) for net, S in zip(alone, logits, strict=True))
        expected = sum(w.unsqueeze(1) * S for w, S in zip(weights.T, logits))
        assert torch.allclose(ensemble, expected, atol=1e-5) and torch.equal(one(x), ensemble)
    shared = {id(p) for p in alone[0].parameters()} & {id(p) for p in alone[2].parameters()}
    trunk = [alone[0].stem, *alone[0].blocks[:-1]]
    assert shared == {
        id(p) for part in trunk for p in part.parameters()
    }  # last group and classifier are its own


# ------------------------------------------------------------------------------------------------- whole runs


IMBALANCED = {  # the sizes of the group's code for CIFAR-10
    0.2: [5000, 858, 557, 439, 375, 333, 304, 282, 264, 250],
    0.6: [5000, 1166, 720, 539, 440, 376, 331, 297, 271, 250],
    1: [5000, 1607, 957, 682, 529, 433, 366, 317, 280, 250],
    2: [5000, 3173, 1972, 1289, 892, 648, 490, 382, 306, 250],
}  # fmt: skip


@pytest.mark.parametrize("gamma", IMBALANCED)
def test_imbalance_has_the_sizes_of_the_group_s_code(gamma, capsys):
    labels = torch.arange(50000) * 7 % 10
    kept = kd_zoo.imbalance(labels, gamma, 10)
    assert labels[kept].bincount().tolist() == IMBALANCED[gamma] and torch.equal(kept, kept.unique())
    assert capsys.readouterr().out == ""
    for c in range(10):  # the first of each class
        assert torch.equal(
            kept[labels[kept] == c], (labels == c).nonzero().squeeze(1)[: IMBALANCED[gamma][c]]
        )


def test_imbalance_says_which_class_is_too_small(capsys):
    labels = torch.tensor([0] * 4 + [1] * 32 + [2] * 32)  # the formula has 22, 2 and 1
    assert labels[kd_zoo.imbalance(labels, 1, 3)].bincount().tolist() == [4, 2, 1]
    assert (
        capsys.readouterr().out == "--imbalance: class 0 has 4 training images, not the 22 of the formula\n"
    )


def test_student_and_teacher_have_the_same_imbalanced_images(cli, tmp_path):
    write_npz(tmp_path / "large.npz", train_images=colours(120), train_labels=np.arange(120) % 3)
    flags = ["--dataset", "large.npz", "--imbalance", 2, "--batch-size", 1000]
    with forward_passes() as passes, Calls(F.cross_entropy) as losses:
        assert cli(kd_zoo, *TINY, *flags)[::2] == (0, "")
    number = [numbers_of(step.images) for step in passes if step.training]
    kept = kd_zoo.imbalance(torch.arange(120) % 3, 2, 3)
    assert len(number) == 2 and all(torch.equal(n.sort().values, kept) for n in number) and len(kept) < 120
    labels = [y for S, y, _ in losses.calls if S.requires_grad]
    assert torch.equal(torch.cat(number) % 3, torch.cat(labels))


def test_bss_is_refused_under_torchrun(cli, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    status, _, err = cli(kd_zoo, *SMALL, "--method", "bss")
    assert (status, err) == (2, "error: --method: bss runs in one process, not under torchrun\n")


STAGES = {"fitnet": ["--init-epochs", 1], "fsp": ["--init-epochs", 1]}


@pytest.mark.parametrize("method", kd_zoo.TABLE_I)
def test_every_method_runs(cli, method):
    status, out, err = cli(
        kd_zoo, *small(method), "--method", method, *STAGES.get(method, []), "--out", "run"
    )
    assert (status, err) == (0, "") and ("training a teacher first" in out) == (method not in kd_zoo.ALONE)
    checkpoint, data = saved("run"), common.load_dataset("tiny.npz")
    *_, last = metrics = checkpoint["metrics"]
    logits = common.predict(common.load_model(checkpoint), data.test_images)
    assert len(metrics) == 1 + (method in STAGES) and last["test_acc"] == common.accuracy(
        logits, data.test_labels
    )
    if method in ("one", "dml"):  # the best of several networks
        assert last["test_acc"] == max(last["each_test_acc"]) and len(last["each_test_acc"]) == 2 + (
            method == "one"
        )
        assert not torch.equal(*(checkpoint[part]["blocks.2.0.conv1.weight"] for part in ("net1", "net2")))


TERMS = {
    "hinton_loss": 3, "attention_loss": 5, "similarity_loss": 7, "rkd_distance_loss": 11,
    "rkd_angle_loss": 13, "fitnet_loss": 17, "fsp_loss": 19,
}  # fmt: skip
SUMS = {  # what the loop makes of them, epoch by epoch, cross-entropy being 2
    "baseline": [2], "hinton": [0.1 * 2 + 0.9 * 3], "at": [2 + 1000 * 5], "sp": [2 + 3000 * 7],
    "rkd-d": [2 + 25 * 11], "rkd-a": [2 + 50 * 13], "rkd-da": [2 + 25 * 11 + 50 * 13],
    "fitnet": [17, 2.9], "fsp": [19, 2.9],
    "at --add hinton": [2.9 + 1000 * 5], "at --ce 3 --alpha 0.5": [3 * 2 + 0.5 * 3 + 1000 * 5],
    "sp --add ft": [2.9 + 3000 * 7], "dml": [2 * 2 + 2 * 3],
    "one": [4 * 2 + np.exp(-5 * (1 - min(300 / 80 * e / 4, 1)) ** 2) * 3 * 3 for e in (0, 1, 2, 3)],
    "bss": [2 + (4 - 3 * e / 4) * 3 / 16 + max(2 - 8 / 3 * e / 4, 0) * 3 / 16 for e in (1, 2, 3, 4)],
}  # fmt: skip


@pytest.mark.parametrize("method", SUMS)
def test_the_loop_adds_up_the_terms_of_table_1(cli, monkeypatch, method):
    """Each term is replaced by a number of its own. The teacher's dropout is on where it is to be fickle."""

    def constant(value):
        return lambda *args, **_: value + 0 * sum(x.sum() for x in tree_leaves(args) if torch.is_tensor(x))

    for name, value in TERMS.items():
        monkeypatch.setattr(kd_zoo, name, constant(value))
    monkeypatch.setattr(F, "cross_entropy", constant(2))
    monkeypatch.setattr(kd_zoo, "boundary_samples", lambda teacher, x, *_: x[:2])
    steps = []
    note = lambda sgd, *_: steps.append((sgd.param_groups[0]["lr"], len(sgd.state)))  # noqa: E731
    handle = register_optimizer_step_pre_hook(note)
    name, *add = method.split()
    flags = [*STAGES.get(name, []), "--epochs", len(SUMS[method]) - (name in STAGES), "--batch-size", 40]
    with forward_passes() as passes:
        assert cli(kd_zoo, *small(name), *flags, "--method", name, *add, "--out", "run")[0] == 0
    handle.remove()
    metrics = saved("run")["metrics"]
    assert [record["train_loss"] for record in metrics] == pytest.approx(SUMS[method])
    assert [lr for lr, _ in steps[-len(metrics) :]] == [record["lr"] for record in metrics]
    if name in STAGES:  # stage 2 begins without momentum
        assert [state for _, state in steps[-2:]] == [0, 0]
    teachers = {step.net for step in passes if not any(p.requires_grad for p in step.net.parameters())}
    assert len(teachers) == (name not in kd_zoo.ALONE)
    for teacher in teachers:
        modes = {
            type(module).__name__: (module.training, getattr(module, "p", 0)) for module in teacher.modules()
        }
        assert (
            modes["Dropout"] == ((True, 0.4) if add[-1:] == ["ft"] else (False, 0))
            and not modes["BatchNorm2d"][0]
        )


@pytest.mark.parametrize("method, stops", [("fitnet", 5), ("one", 2), ("dml", 2)])
def test_an_interrupted_run_continues_to_the_same_bit(cli, method, stops):
    flags = [*small(method), "--method", method, "--epochs", 2, *STAGES.get(method, [])]
    assert_resumes_to_the_same_bit(cli, kd_zoo, *flags, stops=stops)
