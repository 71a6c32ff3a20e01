"""nrd.py: losses against float64 numpy and by hand, what is detached, the EMA, Table 5; calibration."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import colours, forward_passes, numbers_of, saved, write_npz
from PIL import Image

import common
import nrd
from nrd import LOSSES, js_divergence

FLOOR = 1e-7


def case(batch=16, classes=10, scale=3.0, seed=0):
    """Random logits and labels: torch float32 (logits, one-hot), numpy float64 (probabilities, one-hot)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator)
    y = F.one_hot(torch.randint(classes, (batch,), generator=generator), classes).float()
    z = logits.numpy().astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    return logits, y, p / p.sum(1, keepdims=True), y.numpy().astype(np.float64)


def np_kl(p, q):
    return np.where(p > 0, p * (np.log(np.maximum(p, FLOOR)) - np.log(np.maximum(q, FLOOR))), 0).sum(1)


def np_js(distributions, weights):
    m = sum(w * p for w, p in zip(weights, distributions))
    return sum(w * np_kl(p, m) for w, p in zip(weights, distributions))


NUMPY = {  # name: (hyperparameters, loss of p and y), each written from its paper
    "ce": ((), lambda p, y: -np.log((p * y).sum(1))),
    "bs": ((0.7,), lambda p, y, t: -((t * p + (1 - t) * y) * np.log(np.maximum(p, FLOOR))).sum(1)),
    "ls": ((0.3,), lambda p, y, e: -(((1 - e) * y + e / p.shape[1]) * np.log(p)).sum(1)),
    "sce": (
        (0.2, 1.5),
        lambda p, y, a, b: -a * np.log((p * y).sum(1)) - b * (p * np.log(np.maximum(y, 1e-4))).sum(1),
    ),
    "gce": ((0.7,), lambda p, y, q: (1 - np.maximum((p * y).sum(1), FLOOR) ** q) / q),
    "nce+rce": (
        (10, 0.1),
        lambda p, y, a, b: (
            a * -np.log((p * y).sum(1)) / -np.log(p).sum(1) - b * (p * np.log(np.maximum(y, 1e-4))).sum(1)
        ),
    ),
    "js": ((0.3,), lambda p, y, pi: np_js([y, p], [pi, 1 - pi])),
}


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])  # the last has probabilities below the floor
def test_loss_equals_numpy(name, scale):
    logits, y, p, y64 = case(scale=scale)
    params, reference = NUMPY[name]
    assert LOSSES[name](logits, y, *params).numpy() == pytest.approx(
        reference(p, y64, *params), rel=1e-4, abs=1e-6
    )


def test_gjs_equals_numpy():
    first, y, p1, y64 = case()
    second, _, p2, _ = case(seed=5)
    loss = nrd.gjs(torch.cat([first, second]), y, 0.3)
    assert loss.numpy() == pytest.approx(np_js([y64, p1, p2], [0.3, 0.35, 0.35]), rel=1e-4)


def test_losses_by_hand():
    """Two classes, the label has probability 1/4."""
    logits, y = torch.log(torch.tensor([[0.25, 0.75]])), torch.tensor([[1.0, 0.0]])
    log4, a = math.log(4), -math.log(1e-4)
    by_hand = {
        ("ce", ()): log4,
        ("bs", (0.5,)): 0.5 * log4 + 0.5 * (0.25 * log4 + 0.75 * math.log(4 / 3)),
        ("ls", (0.2,)): 0.9 * log4 + 0.1 * math.log(4 / 3),
        ("sce", (2.0, 1.0)): 2 * log4 + 0.75 * a,
        ("gce", (0.5,)): (1 - 0.5) / 0.5,
        ("nce+rce", (1.0, 2.0)): log4 / (log4 + math.log(4 / 3)) + 1.5 * a,
        # m = (5/8, 3/8): 1/2 log(8/5) + 1/2 (1/4 log(2/5) + 3/4 log 2)
        ("js", (0.5,)): 0.5 * math.log(1.6) + 0.5 * (0.25 * math.log(0.4) + 0.75 * math.log(2)),
    }
    for (name, params), expected in by_hand.items():
        assert LOSSES[name](logits, y, *params).item() == pytest.approx(expected, rel=1e-5), name


def test_js_divergence():
    _, _, p1, y = case()
    _, _, p2, _ = case(seed=5)
    weights = (0.2, 0.6, 0.2)
    ours = js_divergence([torch.tensor(d) for d in (y, p1, p2)], weights)
    assert ours.shape == (16,) and np.allclose(ours, np_js([y, p1, p2], weights), rtol=1e-6)
    same = torch.tensor(p1)
    assert js_divergence([same, same, same], weights).abs().max() < 1e-12
    # three disjoint one-hot distributions: the entropy of the weights
    corners = torch.eye(3, dtype=torch.float64).unsqueeze(1)
    assert js_divergence(list(corners), weights).item() == pytest.approx(
        -sum(w * math.log(w) for w in weights), rel=1e-6
    )
    with pytest.raises(AssertionError, match="not to 1"):
        js_divergence([same, same], (0.5, 0.6))
    with pytest.raises(ValueError):
        js_divergence([same, same], weights)


@pytest.mark.parametrize("name", [*NUMPY, "gjs", "nrd"])
def test_losses_and_gradients_stay_finite_at_extremes(name):
    logits = torch.tensor([[200.0, -200, 0], [-200, 200, 0], [0, 0, 0]], requires_grad=True)
    y = F.one_hot(torch.tensor([0, 0, 1]), 3).float()
    if name == "nrd":
        loss = js_divergence((y, logits.softmax(1), logits.detach().softmax(1)), (0.2, 0.6, 0.2))
    elif name == "gjs":
        loss = nrd.gjs(logits.repeat(2, 1), y, 0.3)
    else:
        loss = LOSSES[name](logits, y, *NUMPY[name][0])
    loss.mean().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_gradient_of_bootstrapping_flows_through_its_target():
    logits, y, _, _ = case()
    logits.requires_grad_()
    nrd.bs(
        logits, y, 1.0
    ).mean().backward()  # pure entropy: with a detached target the gradient would be zero
    assert logits.grad.abs().max() > 1e-3


TINY = ["--dataset", "tiny.npz", "--arch", "wrn-10-1", "--student-augment", "crop", "--noise", "sym"]
TINY += ["--rate", 0.5, "--device", "cpu", "--batch-size", 40, "--epochs", 1]
LABELS = common.corrupt_labels(torch.arange(40) % 3, "sym", 0.5, "abc", 0)


@pytest.fixture
def train(nrd_cli, tmp_path, quick):
    """train(*flags): one step of nrd.py on 40 images of one colour each. Its metrics and forward passes."""
    write_npz(tmp_path / "tiny.npz", train_images=colours(40))

    def run(*flags):
        with forward_passes() as passes:
            assert nrd_cli(*TINY, "--out", "run", *flags)[::2] == (0, "")
        return saved(flags[1] if "--out" in flags else "run")["metrics"], passes

    return run


def nrd_loss(S, T, labels, weights):
    """In float64, of one view or more of the student, one after the other in S, and views of the teacher."""
    y_s, views = S.detach().softmax(1).double().numpy(), [view.softmax(1).double().numpy() for view in T]
    y = np.eye(y_s.shape[1])[labels]
    return np_js([y, *np.split(y_s, len(y_s) // len(y)), sum(views) / len(views)], weights).mean()


def test_the_loop_minimises_equation_25_with_a_teacher_without_gradient(train):
    """Two steps, of one epoch each: y_t is the mean over two views of the EMA, the weights are the preset's.

    The EMA is in training mode, in the second epoch too: BatchNorm normalises by the batch of the view.
    """
    metrics, passes = train("--views", 2, "--epochs", 2)
    ema = passes[1].net
    modes = [(step.logits.requires_grad, step.training) for step in passes if step.net is ema]
    assert modes == ([(False, True)] * 2 + [(False, False)]) * 2  # two views; then the test images
    steps = [step for step in passes if step.training]
    for record, (student, *views) in zip(metrics, (steps[:3], steps[3:]), strict=True):
        assert (
            student.net is not ema
            and student.logits.requires_grad
            and not torch.equal(*(v.images for v in views))
        )
        T = [view.logits for view in views]
        loss = nrd_loss(student.logits, T, LABELS[numbers_of(student.images)], [0.2, 0.6, 0.2])
        assert record["train_loss"] == pytest.approx(loss / (-0.8 * math.log(0.8)), rel=1e-4)  # its Z
    # before the first step the EMA is the initial model, which the seed gives again
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", 3, 0.0, *common.channel_stats(common.load_dataset("tiny.npz")))
    assert torch.allclose(steps[1].logits, model(steps[1].images), atol=1e-5)


def test_two_student_views_share_pi2_on_photographs(train, tmp_path):
    for part, numbers in (("train", range(40)), ("val", range(2))):
        for i in numbers:
            path = tmp_path / "pictures" / part / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (i, i, i)).save(path)
    flags = ["--dataset", "imagefolder:pictures", "--resize", 40, "--image-size", 32, "--noise-seed", 0]
    (record,), passes = train(*flags)
    student, teacher = passes[:2]
    labels = common.load_dataset("imagefolder:pictures", resize=40, image_size=32).train_labels
    labels = common.corrupt_labels(labels, "sym", 0.5, "ab", 0)
    index = torch.tensor([*range(0, 40, 2), *range(1, 40, 2)]).argsort()[numbers_of(student.images)]
    assert torch.equal(index[:40], index[40:]) and not torch.equal(*student.images.split(40))
    loss = nrd_loss(student.logits, [teacher.logits], labels[index[:40]], [0.1, 0.4, 0.4, 0.1])
    assert record["train_loss"] == pytest.approx(loss, rel=1e-4)


def test_views_are_the_appendix_s(monkeypatch):
    """A.1: RandAugment(1, 3), crop, flip, Cutout(5), and AugMix, crop, flip; A.2: resized crops."""
    calls = []
    for name in ("rand_augment", "crop_flip", "cutout", "aug_mix", "random_resized_crop", "color_jitter"):
        signature = inspect.signature(getattr(common, name))

        def record(x, *args, name=name, signature=signature, **kwargs):
            bound = signature.bind(x, *args, **kwargs)
            bound.apply_defaults()
            calls.append((name, *list(bound.arguments.values())[1:]))
            return x

        monkeypatch.setattr(common, name, record)
    small, large = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 40, 40)
    crop = ("crop_flip", 4, "zero")  # padding 4, black
    resized, flip = ("random_resized_crop", 32, (0.08, 1.0), (3 / 4, 4 / 3)), ("crop_flip", 0, "zero", None)
    aug_mix = ("aug_mix", 3, 3, -1)  # severity, width, depth 1-3
    cases = [
        (
            lambda: nrd.student_view(small, "paper", 32),
            [("rand_augment", 1, 3), (*crop, None), ("cutout", 5)],
        ),
        (lambda: nrd.teacher_view(small, 32), [aug_mix, (*crop, None)]),
        (lambda: nrd.student_view(small, "crop", 32), [(*crop, 32)]),
        (lambda: nrd.student_view(small, "none", 32), []),
        (lambda: nrd.student_view(large, "paper", 32), [resized, flip, ("color_jitter", 0.4, 0.4, 0.4, 0.2)]),
        (lambda: nrd.teacher_view(large, 32), [aug_mix, resized, flip]),
    ]
    for view, names in cases:
        calls.clear()
        view()
        assert calls == names


def test_views_compile_without_a_graph_break():
    """On the path that CUDA takes: a compiled graph computes all rows."""
    x = torch.rand(4, 3, 32, 32)
    for view, arguments in ((nrd.student_view, ("paper", 32)), (nrd.teacher_view, (32,))):
        explained = torch._dynamo.explain(view)(x, *arguments)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_jsd_scale_divides_the_loss(train):
    (scaled,), _ = train("--out", "scaled")
    (plain,), _ = train("--out", "plain", "--no-jsd-scale")
    assert plain["train_loss"] / scaled["train_loss"] == pytest.approx(-0.8 * math.log(0.8), rel=1e-5)


@pytest.mark.parametrize("loss", ["sce", "js", "gjs"])
def test_the_loop_has_the_loss_that_is_named(train, loss):
    """Its mean over the batch, divided by Z where it is a divergence; gjs sees two views, the others one."""
    (record,), passes = train("--loss", loss)
    logits = passes[0].logits.detach()
    index = numbers_of(passes[0].images)
    y = F.one_hot(LABELS[index[:40]], 3).float()
    params = {"sce": [0.1, 0.1], "js": [0.7], "gjs": [0.9]}[loss]  # of Table 5 at 50 %
    Z = 1 if loss == "sce" else -(1 - params[0]) * math.log(1 - params[0])
    assert len(index) == (80 if loss == "gjs" else 40) and torch.equal(index[:40], index[-40:])
    assert record["train_loss"] == pytest.approx(LOSSES[loss](logits, y, *params).mean().item() / Z, rel=1e-5)


def test_a_loss_without_a_row_has_the_settings_of_cross_entropy(monkeypatch, cli):
    monkeypatch.setitem(LOSSES, "focal", lambda logits, y, gamma: gamma)
    monkeypatch.setitem(nrd.HYPERPARAMETERS, "focal", ["gamma"])
    flags = ["--dataset", "cifar100", "--rate", "0.4", "--loss", "focal"]
    monkeypatch.setattr("sys.argv", ["nrd.py", *flags, "--loss-params", "2"])
    args = nrd.parse_args()
    assert (args.lr, args.weight_decay, args.loss_params, args.jsd_scale) == (0.4, 1e-4, [2], False)
    assert cli(nrd, *flags)[::2] == (2, "error: --loss-params: focal takes 1 (gamma), not 0\n")


def test_ema_by_hand_over_two_steps(train):
    """Equation 24: beta² θ0 + beta (1 - beta) θ1 + (1 - beta) θ2, for weights. One step per epoch.

    Running statistics are averaged too. The EMA's own forward passes change them besides.
    """
    train("--beta", 0.7, "--keep", 1, 2, "--epochs", 2)
    first, second = (common.load_checkpoint(f"run/checkpoint{epoch}.pt") for epoch in (1, 2))
    torch.manual_seed(0)
    stats = common.channel_stats(common.load_dataset("tiny.npz"))
    start = common.build_model("wrn-10-1", 3, 0.0, *stats).state_dict()
    moved = set()
    for name, t0 in start.items():
        t1, t2 = first["model"][name], second["model"][name]
        if t0.is_floating_point() and name not in ("mean", "std"):
            averaged = torch.allclose(second["ema"][name], 0.49 * t0 + 0.21 * t1 + 0.3 * t2, atol=1e-6)
            assert averaged != ("running" in name), name
            if not torch.equal(t0, t2):
                moved.add(name)
    assert moved >= {
        "stem.0.weight",
        "blocks.0.0.bn1.running_mean",
        "blocks.2.0.bn2.running_var",
        "head.4.bias",
    }


def test_every_row_of_table_5_fits_its_loss():
    assert nrd.HYPERPARAMETERS["sce"] == ["alpha", "beta"] and nrd.HYPERPARAMETERS["ce"] == []
    for text in nrd.TABLE_5.values():
        header, *rows = [line.split() for line in text.strip().splitlines()]
        assert {row[0] for row in rows} == nrd.HYPERPARAMETERS.keys() and all(
            len(row) == len(header) for row in rows
        )
        for loss, _, _, *cells in rows:
            for cell in cells:
                params = [] if cell == "-" else [float(p) for p in cell.split(",")]
                assert len(params) == len(nrd.HYPERPARAMETERS[loss])
                assert loss != "nrd" or (sum(params) == pytest.approx(1) and params[0] == params[2])


def test_calibration_by_hand_and_against_a_loop():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    ece, acc, conf, share = common.calibration(p, torch.tensor([0, 1, 1, 0]), bins=2)
    assert acc == [0.0, 0.5] and share == [0.0, 1.0] and conf[1] == pytest.approx(0.7375)
    assert ece == pytest.approx(0.2375)
    logits, y, p, _ = case(batch=500, classes=5, scale=1.5)
    labels = y.argmax(1)
    ece, *_ = common.calibration(torch.tensor(p), labels)
    expected = 0
    for i in range(15):
        inside = (p.max(1) > i / 15) & (p.max(1) <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(
                (p.argmax(1) == labels.numpy())[inside].mean() - p.max(1)[inside].mean()
            )
    assert ece == pytest.approx(expected)


def test_label_accuracies_by_hand():
    true, noisy = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 0, 0, 0, 0])
    # two right samples seen (one hit), two wrong (one memorised, one corrected)
    predicted = torch.tensor([0, 2, 0, 3, -1, -1])
    got = common.label_accuracies(predicted, noisy, true)
    assert got == {"train_acc_right": 50.0, "train_acc_wrong": 50.0, "train_acc_wrong_true": 50.0}
    clean = common.label_accuracies(true, true, true)
    assert clean == {"train_acc_right": 100.0, "train_acc_wrong": None, "train_acc_wrong_true": None}
