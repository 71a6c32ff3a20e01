"""nrd.py: losses against float64 numpy and by hand, what is detached, the EMA, Table 5; calibration."""

import argparse
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import nrd
from nrd import js_divergence, robust_loss

FLOOR = 1e-7


def case(batch=16, classes=10, scale=3.0, seed=0):
    """Random logits and labels: torch float32 (logits, one-hot) and numpy float64 (probabilities, one-hot)."""
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


def np_z(pi1):
    return -(1 - pi1) * np.log(1 - pi1)


NUMPY = {  # name: (hyperparameters, loss of p and y), each written from its paper
    "ce": ((), lambda p, y: -np.log((p * y).sum(1))),
    "bs": ((0.7,), lambda p, y, t: -((t * p + (1 - t) * y) * np.log(np.maximum(p, FLOOR))).sum(1)),
    "ls": ((0.3,), lambda p, y, e: -(((1 - e) * y + e / p.shape[1]) * np.log(p)).sum(1)),
    "sce": ((0.2, 1.5), lambda p, y, a, b: -a * np.log((p * y).sum(1)) - b * (p * np.log(np.maximum(y, 1e-4))).sum(1)),
    "gce": ((0.7,), lambda p, y, q: (1 - np.maximum((p * y).sum(1), FLOOR) ** q) / q),
    "nce+rce": (
        (10, 0.1),
        lambda p, y, a, b: (
            a * -np.log((p * y).sum(1)) / -np.log(p).sum(1) - b * (p * np.log(np.maximum(y, 1e-4))).sum(1)
        ),
    ),
    "js": ((0.3,), lambda p, y, pi: np_js([y, p], [pi, 1 - pi]) / np_z(pi)),
}


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])  # the last has probabilities below the floor
def test_loss_equals_numpy(name, scale):
    logits, y, p, y64 = case(scale=scale)
    params, reference = NUMPY[name]
    assert robust_loss(name, logits, y, params).item() == pytest.approx(reference(p, y64, *params).mean(), rel=1e-4)


def test_gjs_equals_numpy():
    first, y, p1, y64 = case()
    second, _, p2, _ = case(seed=5)
    loss = robust_loss("gjs", torch.cat([first, second]), y, (0.3,))
    assert loss.item() == pytest.approx(np_js([y64, p1, p2], [0.3, 0.35, 0.35]).mean() / np_z(0.3), rel=1e-4)
    for name, logits, p in (("gjs", torch.cat([first, second]), [y64, p1, p2]), ("js", first, [y64, p1])):
        loss = robust_loss(name, logits, y, (0.3,), jsd_scale=False)
        assert loss.item() == pytest.approx(np_js(p, [0.3, *[0.7 / (len(p) - 1)] * (len(p) - 1)]).mean(), rel=1e-4)


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
        # m = (5/8, 3/8): 1/2 log(8/5) + 1/2 (1/4 log(2/5) + 3/4 log 2), over Z = 1/2 log 2
        ("js", (0.5,)): (0.5 * math.log(1.6) + 0.5 * (0.25 * math.log(0.4) + 0.75 * math.log(2))) / (0.5 * math.log(2)),
    }
    for (name, params), expected in by_hand.items():
        assert robust_loss(name, logits, y, params).item() == pytest.approx(expected, rel=1e-5), name


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
        loss = js_divergence((y, logits.softmax(1), logits.detach().softmax(1)), (0.2, 0.6, 0.2)).mean()
    elif name == "gjs":
        loss = robust_loss(name, logits.repeat(2, 1), y, (0.3,))
    else:
        loss = robust_loss(name, logits, y, NUMPY[name][0])
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_gradient_of_bootstrapping_flows_through_its_target():
    logits, y, _, _ = case()
    logits.requires_grad_()
    robust_loss("bs", logits, y, (1.0,)).backward()  # pure entropy: with a detached target the gradient would be zero
    assert logits.grad.abs().max() > 1e-3


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags): two steps of nrd.py on 40 images; the metrics of the epoch."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, epochs=1):
        size = ["--limit-train", "40", "--limit-test", "10", "--batch-size", "20", "--epochs", str(epochs)]
        monkeypatch.setattr("sys.argv", ["nrd.py", *size, "--device", "cpu", *flags])
        args = nrd.parse_args()
        args.seed = 0
        return nrd.main(args)

    return run


def test_no_gradient_reaches_the_teacher_and_its_views_are_averaged(train, monkeypatch):
    """In the loop: y_t carries no graph, y_s does, the weights are the preset's, y_t is the mean over K EMA views.

    The EMA is in training mode, in the second epoch too: BatchNorm normalises by the batch of the view.
    """
    seen, views = [], []

    def spy(distributions, weights):
        seen.append((distributions, weights))
        return js_divergence(distributions, weights)

    monkeypatch.setattr(nrd, "js_divergence", spy)
    monkeypatch.setattr(nrd, "teacher_view", lambda x, size: views.append(x) or x.flip(len(views) % 2 + 2))
    modes, averaged_tensors = [], nrd.averaged_tensors

    def watched(model):
        if not next(model.parameters()).requires_grad:  # the EMA
            model.register_forward_pre_hook(lambda module, _: modes.append((torch.is_grad_enabled(), module.training)))
        return averaged_tensors(model)

    monkeypatch.setattr(nrd, "averaged_tensors", watched)
    train("--views", "2", epochs=2)
    of_epoch = [(False, True)] * 4 + [(False, False)]  # two steps of two views; then the test images
    assert modes == of_epoch * 2
    seen, views = seen[:2], views[:4]
    for (y, y_s, y_t), weights in seen:
        assert y_s.requires_grad and not y_t.requires_grad and not y.requires_grad
        assert list(weights) == [0.2, 0.6, 0.2]
        assert torch.allclose(y_t.sum(1), torch.ones(20), atol=1e-5) and set(y.unique().tolist()) == {0.0, 1.0}
    # before the first step the EMA is the initial model, which the seed gives again
    torch.manual_seed(0)
    data = common.load_dataset("shapes", limit_train=40, limit_test=10)
    model = common.build_model("wrn-10-1", 10, 0.0, *common.channel_stats(data))
    with torch.no_grad():
        expected = sum(model(views[k].flip((k + 1) % 2 + 2)).softmax(1) for k in (0, 1)) / 2
    assert torch.allclose(seen[0][0][2], expected, atol=1e-5)


def test_views_are_the_appendix_s(monkeypatch):
    """A.1: RandAugment(1, 3), crop, flip, Cutout(5), and AugMix, crop, flip; A.2, for photographs: resized crops."""
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
        (lambda: nrd.student_view(small, "paper", 32), [("rand_augment", 1, 3), (*crop, None), ("cutout", 5)]),
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
    scaled, plain = train("--lr", "1e-30")["train_loss"], train("--lr", "1e-30", "--no-jsd-scale")["train_loss"]
    assert plain / scaled == pytest.approx(-0.8 * math.log(0.8), rel=1e-5)


def test_two_student_views_share_pi2_on_photographs(train, monkeypatch):
    seen = []

    def spy(distributions, weights):
        seen.append((len(distributions), list(weights)))
        return js_divergence(distributions, weights)

    monkeypatch.setattr(nrd, "js_divergence", spy)
    monkeypatch.setattr(common, "is_photographs", lambda name: True)
    train("--arch", "wrn-10-1")
    assert seen == [(4, pytest.approx([0.1, 0.4, 0.4, 0.1]))] * 2


@pytest.mark.parametrize("flags, photographs, schedule", [
    ((), False, [1, 1, 0.1, 0.01]),
    (("--drops", "0.25"), False, [1, 0.1, 0.1, 0.1]),
    (("--loss", "ce"), True, [1, 1, 0.1, 0.01]),
    (("--loss", "js"), True, [1, 0.97, 0.97**2, 0.97**3]),
    (("--loss", "gjs"), True, [1, 0.97, 0.97**2, 0.97**3]),
])  # fmt: skip
def test_optimiser_and_schedule(train, monkeypatch, flags, photographs, schedule):
    """SGD with Nesterov momentum 0.9; lr falls to a tenth after the drops, of JS and GJS on photographs by 3 %."""
    groups, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: groups.append(self.param_groups[0]["lr"]) or step(self))
    monkeypatch.setattr(common, "is_photographs", lambda name: photographs)
    made, init = [], torch.optim.SGD.__init__
    monkeypatch.setattr(torch.optim.SGD, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k))
    train("--lr", "0.01", "--weight-decay", "0.003", "--arch", "wrn-10-1", *flags, epochs=4)
    (group,) = made[0].param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0.003)
    assert groups[::2] == pytest.approx([0.01 * factor for factor in schedule])


def test_ema_by_hand_over_two_steps(train, monkeypatch):
    """Equation 24 in the loop: beta² θ0 + beta (1 - beta) θ1 + (1 - beta) θ2, for weights; for running statistics too,
    on which the EMA's own forward pass leaves its mark besides."""
    states, history = [], []
    original, step = nrd.averaged_tensors, torch.optim.SGD.step

    def remember(model):
        states.append(original(model))
        history.append([value.clone() for value in states[-1]])  # θ0, of the EMA and of the model
        return states[-1]

    def spy(self, *args, **kwargs):
        step(self, *args, **kwargs)
        history.append([value.clone() for value in states[1]])

    monkeypatch.setattr(nrd, "averaged_tensors", remember)
    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train("--beta", "0.7")
    (ema, model), (start, same, first, second) = states, history
    names = [k for k, value in common.build_model("wrn-10-1", 10).state_dict().items() if value.is_floating_point()]
    for name, value, theta, t, t0, t1, t2 in zip(names, ema, model, same, start, first, second, strict=True):
        assert torch.equal(t, t0) and torch.equal(theta, t2)
        averaged = torch.allclose(value, 0.49 * t0 + 0.21 * t1 + 0.3 * t2, atol=1e-6)
        assert averaged != ("running" in name), name
    moved = {name for name, t0, t2 in zip(names, start, second, strict=True) if not torch.equal(t0, t2)}
    assert moved >= {"stem.0.weight", "blocks.0.0.bn1.running_mean", "blocks.2.0.bn2.running_var", "head.4.bias"}


def preset(**flags):
    defaults = {"dataset": "cifar10", "noise": "sym", "rate": 0.4, "loss": "nrd", "analyze": None}
    return nrd.preset(argparse.Namespace(**{**defaults, **flags}))


@pytest.mark.parametrize("flags, lr, weight_decay, params", [
    ({"rate": 0.8}, 0.1, 5e-4, [0.25, 0.5, 0.25]),
    ({"rate": 0.5}, 0.1, 5e-4, [0.2, 0.6, 0.2]),
    ({"noise": "asym", "rate": 0.4}, 0.1, 1e-3, [0.15, 0.7, 0.15]),
    ({"noise": "human-worse", "rate": None}, 0.1, 1e-3, [0.15, 0.7, 0.15]),
    ({"noise": "human-aggre", "rate": None}, 0.1, 1e-3, [0.1, 0.8, 0.1]),
    ({"noise": "none", "rate": None}, 0.1, 5e-4, [0.2, 0.6, 0.2]),
    ({"dataset": "cifar100", "rate": 0.8}, 0.2, 5e-5, [0.15, 0.7, 0.15]),
    ({"dataset": "cifar100", "noise": "asym", "rate": 0.4}, 0.4, 1e-4, [0.4, 0.2, 0.4]),
    ({"loss": "ce"}, 0.05, 1e-3, []),
    ({"loss": "sce", "rate": 0.8}, 0.01, 5e-4, [0.1, 1]),
    ({"loss": "gjs", "dataset": "cifar100", "rate": 0.6}, 0.2, 5e-5, [0.9]),
])  # fmt: skip
def test_presets_are_table_5(flags, lr, weight_decay, params):
    got = preset(**flags)
    assert (got["lr"], got["weight_decay"], got["loss_params"]) == (lr, weight_decay, params)
    assert (got["arch"], got["epochs"], got["batch_size"], got["beta"]) == ("preact_resnet34", 400, 128, 0.99)
    assert (got["student_augment"], got["drops"]) == ("paper", [0.5, 0.75])


@pytest.mark.parametrize("loss, lr, batch_size, params", [
    ("nrd", 0.1, 64, [0.1, 0.8, 0.1]), ("js", 0.2, 64, [0.1]), ("gjs", 0.1, 32, [0.1]), ("ce", 0.1, 64, []),
])  # fmt: skip
def test_presets_of_webvision(loss, lr, batch_size, params):
    got = preset(dataset="webvision", noise=None, rate=None, loss=loss)
    assert (got["lr"], got["batch_size"], got["loss_params"], got["weight_decay"]) == (lr, batch_size, params, 1e-4)
    assert (got["epochs"], got["arch"], got["noise"], got["jsd_scale"]) == (300, "resnet50", "none", False)
    assert got["drops"] == pytest.approx([1 / 3, 2 / 3])
    assert preset(loss=loss)["jsd_scale"] == (loss in ("nrd", "js", "gjs"))


def test_every_row_of_table_5_fits_its_loss():
    for text in nrd.TABLE_5.values():
        header, *rows = [line.split() for line in text.strip().splitlines()]
        assert {row[0] for row in rows} == nrd.HYPERPARAMETERS.keys() and all(len(row) == len(header) for row in rows)
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
            expected += inside.mean() * abs((p.argmax(1) == labels.numpy())[inside].mean() - p.max(1)[inside].mean())
    assert ece == pytest.approx(expected)


def test_label_accuracies_by_hand():
    true, noisy = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 0, 0, 0, 0])
    predicted = torch.tensor(
        [0, 2, 0, 3, -1, -1]
    )  # two right samples seen (one hit), two wrong (one memorised, one corrected)
    got = common.label_accuracies(predicted, noisy, true)
    assert got == {"train_acc_right": 50.0, "train_acc_wrong": 50.0, "train_acc_wrong_true": 50.0}
    clean = common.label_accuracies(true, true, true)
    assert clean == {"train_acc_right": 100.0, "train_acc_wrong": None, "train_acc_wrong_true": None}
