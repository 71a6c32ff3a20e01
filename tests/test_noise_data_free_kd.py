"""noise_data_free_kd.py: statistics of BatchNorm layer by layer, dead leaves by counting, whole runs, pictures."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import TINY, write_npz
from test_augment import within
from test_run import assert_same_run

import common
import evaluate
import noise_data_free_kd as dfkd

# ------------------------------------------------------------------------------------------------------------ BatchNorm


def by_hand(x, layer, mean, var):
    """BatchNorm in float64 numpy; x [B, K, H, W], mean and var [K]."""
    x, shape = np.float64(x), (1, -1, 1, 1)
    mean, var = np.reshape(np.float64(mean), shape), np.reshape(np.float64(var), shape)
    weight, bias = (np.float64(p.detach()).reshape(shape) for p in (layer.weight, layer.bias))
    return (x - mean) / np.sqrt(var + layer.eps) * weight + bias


def test_every_layer_normalises_by_its_own_statistics():
    """Inputs and outputs of each layer of a network half on running and half on current statistics."""
    net = common.build_model("resnet8", 10).eval()
    for layer in dfkd.batch_norms(net):
        nn.init.uniform_(layer.weight), nn.init.uniform_(layer.bias)
        layer.running_mean.uniform_(-1, 1), layer.running_var.uniform_(0.5, 2)
    buffers = copy.deepcopy({i: (m.running_mean, m.running_var) for i, m in enumerate(dfkd.batch_norms(net))})
    running = dfkd.on_running_statistics(net, 0.5, seed=1)
    assert 0 < len(running) < len(buffers)
    seen = []
    for layer in dfkd.batch_norms(net):
        layer.register_forward_hook(lambda layer, x, y: seen.append((layer, x[0].clone(), y.clone())))
    for training in (False, True):  # the mode of those on current statistics does not matter
        seen.clear()
        for layer in dfkd.batch_norms(net):
            layer.train(training and layer not in running)
        with torch.no_grad():
            net(torch.randn(6, 3, 32, 32))
        assert len(seen) == len(buffers)
        for layer, x, y in seen:
            i = dfkd.batch_norms(net).index(layer)
            statistics = buffers[i] if layer in running else (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
            assert np.allclose(y, by_hand(x, layer, *statistics), atol=1e-4)
    for layer in running:
        mean, var = buffers[dfkd.batch_norms(net).index(layer)]
        assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, var)


@pytest.mark.parametrize("fraction, count", [(0, 0), (0.25, 2), (0.5, 4), (0.75, 7), (0.9, 8), (1, 9)])
def test_the_fraction_of_layers_on_running_statistics(fraction, count):
    net = common.build_model("resnet8", 10)
    assert len(dfkd.batch_norms(net)) == 9
    running = dfkd.on_running_statistics(net, fraction, seed=0)
    assert len(running) == count == sum(layer.running_mean is not None for layer in dfkd.batch_norms(net))
    other = common.build_model("resnet8", 10)
    chosen = [dfkd.batch_norms(net).index(layer) for layer in running]
    again = [dfkd.batch_norms(other).index(layer) for layer in dfkd.on_running_statistics(other, fraction, seed=0)]
    assert chosen == again
    if 0 < fraction < 1:
        draws = []
        for seed in range(8):
            net = common.build_model("resnet8", 10)
            draws.append([dfkd.batch_norms(net).index(m) for m in dfkd.on_running_statistics(net, fraction, seed)])
        assert len(set(map(tuple, draws))) > 1


def test_logits_by_current_running_and_adjusted_statistics():
    net = common.build_model("wrn-10-1", 5)
    net.train()(torch.randn(32, 3, 32, 32))  # running statistics of noise
    net.eval()
    before = copy.deepcopy(net.state_dict())
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    logits = dfkd.logits_by_statistics(net, images, batch_size=8, adjust_batches=2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.training
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    parts = [common.to_float(images[part]) for part in order.split(8)]
    with torch.no_grad():
        assert torch.allclose(logits["running"], net(common.to_float(images)), atol=1e-5)
        batch_mode = copy.deepcopy(net).train()
        expected = torch.cat([batch_mode(part) for part in parts])
        assert torch.allclose(logits["current"][order], expected, atol=1e-5)
        # adjusted: layer by layer, the mean of the two batches' means and unbiased variances, as each batch had them
        direct, statistics = copy.deepcopy(net).train(), {}
        for name, layer in direct.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(
                    lambda layer, x, y, name=name: statistics.setdefault(name, []).append(
                        (x[0].mean((0, 2, 3)), x[0].var((0, 2, 3), correction=1))
                    )
                )
        for part in parts[:2]:
            direct(part)
        adjusted = copy.deepcopy(net)
        for name, ((mean_1, var_1), (mean_2, var_2)) in statistics.items():
            layer = adjusted.get_submodule(name)
            layer.running_mean, layer.running_var = (mean_1 + mean_2) / 2, (var_1 + var_2) / 2
        assert torch.allclose(logits["adjusted"], adjusted(common.to_float(images)), atol=1e-4)
    assert not torch.allclose(logits["adjusted"], logits["current"], atol=1e-2)
    all_ = dfkd.logits_by_statistics(net, images, batch_size=40, adjust_batches=9)
    assert not torch.allclose(all_["adjusted"], logits["adjusted"], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- dead leaves


def test_radii_have_the_density():
    """P(r < x) = ∫ (s^-3 - 1) ds, counted in 12 bins; the rest are no leaves."""
    n = 400_000
    r = dfkd.leaf_radii(n, generator=torch.Generator().manual_seed(0), device="cpu")
    kept = r[r > 0]
    assert kept.min() >= 0.03 and kept.max() <= 1 and (r[r <= 0] == -1).all()

    def mass(x):
        return (0.03**-2 - x**-2) / 2 - (x - 0.03)

    edges = [0.03, 0.032, 0.035, 0.04, 0.05, 0.065, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]
    for low, high in zip(edges, edges[1:]):
        share = (mass(high) - mass(low)) / mass(1.0)
        within(((kept >= low) & (kept < high)).sum(), len(kept), share)


def test_shapes_are_equally_likely_and_have_their_corners_on_the_circle():
    n = 60_000
    normal, distance = dfkd.leaf_edges(torch.full((n,), 2.0), torch.Generator().manual_seed(0))
    assert torch.allclose(normal.norm(dim=1), torch.ones(n, 4), atol=1e-5)
    angle = torch.atan2(normal[:, 1], normal[:, 0])
    disc = (distance == 4).all(1)
    square = torch.isclose(distance, torch.tensor(math.sqrt(2))).all(1) & ~disc  # edges at r cos 45°
    upright = square & torch.isclose((angle / (math.pi / 2)).round() * (math.pi / 2), angle, atol=1e-4).all(1)
    opposite = torch.isclose(distance[:, [0, 1]], distance[:, [2, 3]], atol=1e-4).all(1)
    rectangle = opposite & ~square & ~disc
    triangle = torch.isclose(distance, torch.tensor(2.0), atol=1e-6).any(1) & ~rectangle & ~disc
    for kind in (disc, upright, square & ~upright, rectangle, triangle):
        within(kind.sum(), n, 1 / 6)
    # each polygon's neighbouring edges meet on the circle: corner c satisfies n1·c = d1, n2·c = d2, |c| = r
    rest = (~disc & ~triangle).nonzero().squeeze(1)[:500]
    first, second = normal[rest].double(), normal[rest].double().roll(-1, 2)
    pairs = torch.stack([first, second], 3).permute(0, 2, 3, 1)  # [N, 4, 2 edges, 2]
    sides = torch.stack([distance[rest], distance[rest].roll(-1, 1)], 2).double()
    good = torch.linalg.det(pairs).abs() > 0.05
    corners = torch.linalg.solve(pairs[good], sides[good].unsqueeze(2)).squeeze(2)
    assert torch.allclose(corners.norm(dim=1), torch.full((len(corners),), 2.0).double(), atol=1e-3)


def slow_dead_leaves(n, size, seed):
    """One leaf at a time, each against every pixel that is still bare, in numpy."""
    generator = torch.Generator().manual_seed(seed)
    images = np.zeros((n, 3, size * size), dtype=np.float32)
    rows, columns = (place.ravel() for place in np.indices((size, size)))
    for image in images:
        bare = np.ones(size * size, dtype=bool)
        while bare.any():
            radii = size * dfkd.leaf_radii(200, generator=generator, device="cpu")
            normals, distances = (part.numpy() for part in dfkd.leaf_edges(radii, generator))
            places = size * torch.rand(200, 2, generator=generator).numpy() - 0.5
            colours = torch.rand(200, 3, generator=generator).numpy()
            for r, (cos, sin), edges, (x, y), colour in zip(radii.numpy(), normals, distances, places, colours):
                at = bare.nonzero()[0]
                dx, dy = columns[at] - x, rows[at] - y
                if r > 0:
                    within_edges = (np.outer(dx, cos) + np.outer(dy, sin) <= edges).all(1)
                    at = at[within_edges & (dx**2 + dy**2 <= r**2)]
                    image[:, at], bare[at] = colour[:, None], False
    return torch.from_numpy(images).view(n, 3, size, size)


def statistics(images):
    """What the image statistics tests compare: same-colour neighbours, spectrum, colours."""
    flat = images.mean(1)
    power = (torch.fft.fft2(flat - flat.mean((1, 2), keepdim=True)).abs() ** 2).mean(0)
    return {
        "equal to the right": (images[..., 1:] == images[..., :-1]).all(1).float().mean().item(),
        "equal below": (images[:, :, 1:] == images[:, :, :-1]).all(1).float().mean().item(),
        "equal at 4": (images[..., 4:] == images[..., :-4]).all(1).float().mean().item(),
        "low frequency": (power[0, 1] / power[0, 4]).log().item(),
    }


def test_dead_leaves_are_those_of_a_slow_loop():
    """Side 12: statistics of many fast images against those of an independent sequential generator."""
    slow = statistics(slow_dead_leaves(150, 12, seed=0))
    fast = statistics(dfkd.dead_leaves(4000, 12, torch.Generator().manual_seed(1), "cpu"))
    again = statistics(slow_dead_leaves(150, 12, seed=2))
    for key, value in fast.items():
        spread = abs(slow[key] - again[key]) + (0.25 if key == "low frequency" else 0.025)
        assert abs(value - (slow[key] + again[key]) / 2) < spread, key


def test_dead_leaves_cover_the_canvas_in_flat_colours():
    generator = torch.Generator().manual_seed(0)
    x = dfkd.dead_leaves(300, 32, generator, "cpu")
    assert x.shape == (300, 3, 32, 32) and x.dtype == torch.float32 and x.is_contiguous()
    assert x.min() >= 0 and x.max() < 1 and not (x == 0).all(1).any()  # nothing is left bare
    assert abs(x.mean() - 0.5) < 0.02 and abs(x.var() - 1 / 12) < 0.01  # uniform colours
    assert len({tuple(c) for c in x[0].flatten(1).T.tolist()}) < 700 and x.flatten(1).unique(dim=0).shape[0] == 300
    # power falls with frequency about as f^-2, as in natural images: slope of the radial mean between 2 and 12 cycles
    flat = x.mean(1)
    power = (torch.fft.fft2(flat - flat.mean((1, 2), keepdim=True)).abs() ** 2).mean(0)
    f = torch.fft.fftfreq(32) * 32
    radius = (f.view(-1, 1) ** 2 + f.view(1, -1) ** 2).sqrt().round()
    radial = [power[radius == k].mean().item() for k in range(2, 13)]
    slope = np.polyfit(np.log(np.arange(2, 13)), np.log(radial), 1)[0]
    assert -2.5 < slope < -0.8


def test_dead_leaves_are_determined_by_the_generator():
    first, second, other = (dfkd.dead_leaves(20, 16, torch.Generator().manual_seed(s), "cpu") for s in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.manual_seed(5)
    ours = dfkd.dead_leaves(3, 16, None, "cpu")
    torch.manual_seed(5)
    assert torch.equal(ours, dfkd.dead_leaves(3, 16, None, "cpu"))


def test_gaussian_noise_and_data():
    data = common.load_dataset("shapes", limit_train=50, limit_test=1)
    x = dfkd.samples("gaussian", 200, data)
    assert x.shape == (200, 3, 32, 32) and abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert dfkd.samples("data", 50, data, data.train_images).shape == (50, 3, 32, 32)
    assert dfkd.samples("dead-leaves", 7, data).shape == (7, 3, 32, 32)


# ----------------------------------------------------------------------------------------------------------- whole runs

SMALL = [*TINY, "--teacher-arch", "wrn-10-1", "--student-arch", "wrn-10-1", "--teacher-epochs", "1"]


@pytest.mark.parametrize("flags", [
    ["--source", "gaussian"], ["--source", "dead-leaves", "--bn", "running"], ["--source", "data"],
    ["--running-fraction", "0.5", "--schedule", "cosine"],
], ids=lambda flags: "-".join(flags).replace("--", ""))  # fmt: skip
def test_a_run_interrupted_and_continued_to_the_same_bit(cli, monkeypatch, flags, tmp_path):
    flags = [*SMALL, *flags]
    status, out, err = cli(dfkd, *flags, "--out", "whole")
    assert (status, err) == (0, "")
    (teacher,) = (tmp_path / "runs/teachers").iterdir()
    before = (teacher / "checkpoint.pt").read_bytes()
    end_epoch = common.Run.end_epoch

    def interrupt(run, *args, **metrics):
        end_epoch(run, *args, **metrics)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "end_epoch", interrupt)
    assert cli(dfkd, *flags, "--out", "broken")[0] == 130
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    assert cli(dfkd, *flags, "--out", "broken", "--resume")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken", ("model", "optimizer", "scheduler", "rng"))
    checkpoint = common.load_checkpoint("whole/checkpoint.pt")
    last = checkpoint["metrics"][-1]
    mode = "running" if "data" in flags else "current"
    assert checkpoint["batch_norm"] == mode and last["test_acc"] == last[f"test_acc_{mode}"]
    assert {"test_acc_current", "test_acc_running", "test_acc_adjusted", "test_loss"} <= last.keys()
    assert (teacher / "checkpoint.pt").read_bytes() == before  # untouched, bit for bit


def test_the_teacher_is_checked_in_every_epoch(cli, monkeypatch):
    """One that changes is noticed."""
    load = common.load_teacher

    def moving(*args, **options):
        teacher = load(*args, **options)

        def drift(module, x, y):
            module[0].weight.data.add_(1e-3)

        teacher.stem.register_forward_hook(drift)
        return teacher

    monkeypatch.setattr(common, "load_teacher", moving)
    with pytest.raises(RuntimeError, match="the teacher has changed"):
        cli(dfkd, *SMALL)


def test_the_student_sees_no_image(cli, monkeypatch):
    """While it trains, student and teacher are given the same noise and nothing else."""
    seen, sources, loss = [], [], torch.nn.functional.cross_entropy
    forward, make = common.Classifier.forward, dfkd.samples

    def watched(net, images, features=False):
        seen.append(images)
        return forward(net, images, features)

    def made(*args):
        seen.clear()
        sources.append(make(*args))
        return sources[-1]

    def check(S, target):
        if target.is_floating_point():
            assert len(seen) == 2 and all(x is sources[-1] for x in seen)
            assert not target.requires_grad and torch.allclose(target.sum(1), torch.ones(32))
        return loss(S, target)

    monkeypatch.setattr(common.Classifier, "forward", watched)
    monkeypatch.setattr(dfkd, "samples", made)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", check)
    assert cli(dfkd, *SMALL, "--source", "gaussian", "--epochs", 1)[0] == 0
    assert len(sources) == 3 and all(abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05 for x in sources)


def test_the_paper_is_the_preset(monkeypatch, tiny_npz):
    for name, teacher in (("cifar10", "resnet34"), ("cifar100", "wrn-28-10"), ("svhn", "resnet18")):
        monkeypatch.setattr("sys.argv", ["x", "--dataset", name])
        args = dfkd.parse_args()
        assert (args.epochs, args.teacher_epochs, args.batch_size, args.lr) == (200, 100, 256, 1e-3)
        assert (args.teacher_arch, args.student_arch, args.bn, args.running_fraction) == (
            teacher, "resnet18", "current", 0,
        )  # fmt: skip
    monkeypatch.setattr("sys.argv", ["x", "--source", "data"])
    assert dfkd.parse_args().running_fraction == 1


def test_the_teachers_recipe(cli, tmp_path):
    """Adam at the student's rate; for CIFAR-100 SGD 0.1, weight decay 5e-4 (A.7); a plateau schedule for both."""
    write_npz(tmp_path / "cifar100.npz")
    for flags in (["--lr", 0.003], ["--dataset", "cifar100.npz"]):
        assert cli(dfkd, *SMALL, "--epochs", 1, "--limit-train", 40, *flags)[0] == 0
    configs = [json.loads(path.read_text()) for path in (tmp_path / "runs/teachers").glob("*/config.json")]
    recipes = sorted((c["optimizer"], c["lr"], c["weight_decay"], c["epochs"], c["milestones"]) for c in configs)
    assert recipes == [("adam", 0.003, 0.0, 1, None), ("sgd", 0.1, 5e-4, 1, None)]


def test_the_rate_falls_on_a_plateau(cli, monkeypatch, tmp_path):
    """The test loss stands still: after ten such epochs the rate is a tenth."""
    S = torch.randn(40, 10)
    monkeypatch.setattr(dfkd, "logits_by_statistics", lambda *_: dict.fromkeys(("current", "running", "adjusted"), S))
    flags = ["--limit-train", 32, "--source", "gaussian", "--lr", 0.01, "--epochs", 14, "--out", "run"]
    assert cli(dfkd, *SMALL, *flags)[0] == 0
    rates = [record["lr"] for record in common.load_checkpoint(tmp_path / "run/checkpoint.pt")["metrics"]]
    assert rates == pytest.approx([0.01] * 12 + [0.001] * 2)


def test_pictures(cli, tmp_path):
    assert cli(dfkd, "--toy")[0] == 0
    for source in ("gaussian", "dead-leaves", "data"):
        assert cli(dfkd, "--show-source", "--source", source, "--limit-train", 100)[0] == 0
    assert cli(dfkd, *SMALL, "--out", "a", "--batch-size", 16)[0] == cli(dfkd, *SMALL, "--out", "b")[0] == 0
    flags = ["--limit-train", 40, "--limit-test", 40, "--device", "cpu"]
    status, out, err = cli(dfkd, "--plot-activations", "a/checkpoint.pt", *flags)
    assert (status, err) == (0, "") and "batches of 16: 1: " in out and ", 2: " in out and ", 4: " not in out
    status, out, err = cli(dfkd, "--plot-batch-size", "b/checkpoint.pt", "a/checkpoint.pt")
    finals = {
        b: common.load_checkpoint(f"{n}/checkpoint.pt")["metrics"][-1]["test_acc"] for n, b in (("a", 16), ("b", 32))
    }
    assert (status, err) == (0, "") and out.splitlines()[-1] == f"16: {finals[16]:.2f} %, 32: {finals[32]:.2f} %"
    from PIL import Image

    names = [f"runs/{n}.png" for n in ("toy", "gaussian", "dead-leaves", "data", "batch-size")]
    for name in (*names, "a/activations.png", "a/adjust.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)))) > 20, name


def test_the_toy_comes_back_with_current_statistics(cli):
    status, out, err = cli(dfkd, "--toy", "--out", "t")
    distances = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines() if "Fréchet" in line]
    assert (status, err) == (0, "") and distances[0] == 0 and distances[2] < distances[1] / 10


@pytest.mark.parametrize("flags, names", [
    (["--source", "leaves"], "did you mean dead-leaves"), (["--bn", "running", "--running-fraction", 0.5], "--bn"),
    (["--running-fraction", 2], "--running-fraction"), (["--eval-batch-size", 1], "--eval-batch-size"),
    (["--plot-activations", "none.pt"], "--plot-activations"), (["--plot-batch-size", "none.pt"], "--plot-batch-size"),
    (["--student-arch", "resnet9"], "--arch"), (["--teacher", "none.pt"], "--teacher"),
])  # fmt: skip
def test_bad_input(cli, flags, names, tmp_path):
    status, _, err = cli(dfkd, *TINY, *flags)
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and names in err
    assert not list(tmp_path.glob("runs/*/*"))


def test_evaluate_honours_the_mode(cli, tmp_path):
    """The accuracy on the statistics of its batches, in whatever order the file has the classes."""
    data = common.load_dataset("shapes", limit_train=96, limit_test=40)
    order = data.test_labels.argsort()
    write_npz(
        tmp_path / "sorted.npz", train_images=data.train_images.numpy(), train_labels=data.train_labels.numpy(),
        test_images=data.test_images[order].numpy(), test_labels=data.test_labels[order].numpy(), classes=data.classes,
    )  # fmt: skip
    flags = ["--eval-batch-size", 40, "--out", "run", "--lr", 0.003, "--epochs", 3, "--dataset", "sorted.npz"]
    assert cli(dfkd, *SMALL, *flags)[0] == 0
    checkpoint = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    net = common.load_model(checkpoint)
    common.current_statistics(dfkd.batch_norms(net))
    images, labels = (common.load_dataset(tmp_path / "sorted.npz")[i] for i in (2, 3))
    for size in (40, 20):
        flags = ["--ece", "--pgd", 1, "--eps", "1/255", "--batch-size", size, "--device", "cpu", "--out", f"e{size}"]
        status, out, err = cli(evaluate, "run/checkpoint.pt", *flags)
        assert (status, err) == (0, "")
        assert f"statistics of each batch (--batch-size {size})" in out
        with torch.no_grad():  # two batches of every other image
            parts = [net(common.to_float(images[i :: 40 // size])) for i in range(40 // size)]
        hits = sum((S.argmax(1) == labels[i :: 40 // size]).sum().item() for i, S in enumerate(parts))
        parts = {
            p["part"]: p["result"] for p in json.loads((tmp_path / f"e{size}/evaluation.json").read_text())["parts"]
        }
        assert parts["clean"]["accuracy"] == 100 * hits / 40 and parts["PGD"]["1"] <= parts["clean"]["accuracy"]
    assert checkpoint["metrics"][-1]["test_acc_current"] > 0


def test_bfloat16(cli):
    assert cli(dfkd, *SMALL, "--epochs", 1, "--amp")[::2] == (0, "")


def test_a_compiled_student_is_tested_like_any_other():
    """Its copy, whose statistics are re-estimated, is a network of its own."""
    net, images = common.build_model("wrn-10-1", 5), torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    plain = dfkd.logits_by_statistics(net, images, 20, 1)
    net.compile(backend="eager")
    before = copy.deepcopy(net.state_dict())
    for name, logits in dfkd.logits_by_statistics(net, images, 20, 1).items():
        assert torch.allclose(logits, plain[name], atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
