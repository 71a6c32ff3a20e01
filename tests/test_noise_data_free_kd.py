"""noise_data_free_kd.py: BatchNorm layer by layer, dead leaves by counting, whole runs, pictures."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    assert_resumes_to_the_same_bit,
    assert_same,
    crops_of,
    forward_passes,
    saved,
    within,
    write_npz,
)
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from test_noise_as_a_resource import ALONE, TINY, log_softmax

import common
import noise_data_free_kd as dfkd

pytestmark = pytest.mark.usefixtures("quick", "tiny_npz")
SMALL = [*TINY, "--student-arch", "wrn-10-1", "--teacher-epochs", 1]

# -------------------------------------------------------------------------------------------------- BatchNorm


def test_each_layer_normalises_by_its_own_statistics():
    """A network of which every other layer is on current statistics, layer by layer in numpy."""
    net, seen = common.build_model("resnet8", 10), []
    layers = dfkd.batch_norms(net)
    assert len(layers) == 9
    for layer in layers:
        nn.init.uniform_(layer.weight), nn.init.uniform_(layer.bias)
        layer.running_mean.uniform_(-1, 1), layer.running_var.uniform_(0.5, 2)
        layer.register_forward_hook(lambda layer, x, y: seen.append((layer, x[0].clone(), y.clone())))
    kept = {layer: [layer.running_mean.clone(), layer.running_var.clone()] for layer in layers[::2]}
    dfkd.use_current_statistics(layers[1::2])
    net.eval()
    for layer in layers[1::4]:
        layer.train()  # the mode of those on current statistics does not matter
    with torch.no_grad():
        net(torch.randn(6, 3, 32, 32))
    for layer, x, y in seen:
        mean, var = kept.get(layer) or (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        x, mean, var, weight, bias = (
            np.float64(v.detach()) for v in (x, mean, var, layer.weight, layer.bias)
        )
        expected = (np.moveaxis(x, 1, 3) - mean) / np.sqrt(var + layer.eps) * weight + bias
        assert np.allclose(np.moveaxis(y.numpy(), 1, 3), expected, atol=1e-4)
    assert len(seen) == 9 and all(torch.equal(layer.running_mean, kept[layer][0]) for layer in kept)


@pytest.mark.parametrize("fraction, count", [(0, 0), (0.25, 2), (0.5, 4), (0.75, 7), (0.9, 8), (1, 9)])
def test_the_fraction_of_layers_on_running_statistics(cli, tmp_path, fraction, count):
    pixels = np.zeros((20, 3, 8, 8), np.uint8)
    write_npz(tmp_path / "tiny.npz", train_images=pixels, train_labels=np.arange(20) % 3, test_images=pixels)
    Path("mine.py").write_text("import common\ndef net(): return common.build_model('resnet8', 3)")
    flags = [*ALONE, "--source", "gaussian", "--teacher-model", "mine.py:net", "--running-fraction", fraction]
    chosen = []
    for run, seed in enumerate((0, 0, 1, 2, 3)):
        with forward_passes() as passes:
            status, out, _ = cli(dfkd, *flags, "--seed", seed, "--out", run)
        assert status == 0 and f"of the teacher's 9 BatchNorm layers {count} use running statistics" in out
        chosen.append([layer.running_mean is not None for layer in dfkd.batch_norms(passes[0].net)])
    assert [sum(layers) for layers in chosen] == [count] * 5 and chosen[0] == chosen[1]
    assert (len(set(map(tuple, chosen))) > 1) == (0 < fraction < 1)


def test_logits_by_current_running_and_adjusted_statistics():
    net = common.build_model("wrn-10-1", 5)
    net.train()(torch.randn(32, 3, 32, 32))  # running statistics of noise
    before = copy.deepcopy(net.eval().state_dict())
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    logits = dfkd.logits_by_statistics(net, images, batch_size=8, adjust_batches=2)
    assert_same(before, net.state_dict())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    parts = [common.to_float(images[part]) for part in order.split(8)]
    # adjusted: layer by layer, the mean of the first two batches' means and unbiased variances
    direct, adjusted, seen = copy.deepcopy(net).train(), copy.deepcopy(net), {}
    for name, layer in direct.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, x, y, name=name: seen.setdefault(name, []).append(x[0]))
    with torch.no_grad():
        assert torch.allclose(logits["running"], net(common.to_float(images)), atol=1e-5)
        assert torch.allclose(
            logits["current"][order], torch.cat([direct(part) for part in parts]), atol=1e-5
        )
        for name, batches in seen.items():
            layer = adjusted.get_submodule(name)
            layer.running_mean = sum(x.mean((0, 2, 3)) for x in batches[:2]) / 2
            layer.running_var = sum(x.var((0, 2, 3), correction=1) for x in batches[:2]) / 2
        assert torch.allclose(logits["adjusted"], adjusted(common.to_float(images)), atol=1e-4)
    assert len(seen) == len(dfkd.batch_norms(net))
    assert not torch.allclose(logits["adjusted"], logits["current"], atol=1e-2)


# ------------------------------------------------------------------------------------------------ dead leaves


def test_radii_have_the_density():
    """P(r < x) = ∫ (s^-3 - 1) ds, counted in 12 bins; the rest are no leaves."""
    r = dfkd.leaf_radii(400_000, device="cpu")
    kept = r[r > 0]
    assert kept.min() >= 0.03 and kept.max() <= 1 and (r[r <= 0] == -1).all()

    def mass(x):
        return (0.03**-2 - x**-2) / 2 - (x - 0.03)

    assert within(len(kept), len(r), mass(1) / ((0.03**-2 - 1) / 2))
    edges = [0.03, 0.032, 0.035, 0.04, 0.05, 0.065, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]
    for low, high in zip(edges, edges[1:]):
        assert within(
            int(((kept >= low) & (kept < high)).sum()), len(kept), (mass(high) - mass(low)) / mass(1.0)
        )


def test_shapes_are_equally_likely_and_have_their_corners_on_the_circle():
    n = 60_000
    normal, distance = dfkd.leaf_edges(torch.full((n,), 2.0))
    assert torch.allclose(normal.norm(dim=1), torch.ones(n, 4), atol=1e-5)
    angle = torch.atan2(normal[:, 1], normal[:, 0])
    disc = (distance == 4).all(1)
    square = torch.isclose(distance, torch.tensor(math.sqrt(2))).all(1) & ~disc  # edges at r cos 45°
    upright = square & torch.isclose((angle / (math.pi / 2)).round() * (math.pi / 2), angle, atol=1e-4).all(1)
    opposite = torch.isclose(distance[:, [0, 1]], distance[:, [2, 3]], atol=1e-4).all(1)
    rectangle = opposite & ~square & ~disc
    triangle = torch.isclose(distance, torch.tensor(2.0), atol=1e-6).any(1) & ~rectangle & ~disc
    for kind in (disc, upright, square & ~upright, rectangle, triangle):
        assert within(int(kind.sum()), n, 1 / 6)
    assert (distance[disc | square | rectangle] > 0).all()  # the centre is inside
    # neighbouring edges of a polygon meet on the circle: corner c satisfies n1·c = d1, n2·c = d2, |c| = r
    rest = (~disc & ~triangle).nonzero().squeeze(1)[:500]
    first = normal[rest].double()
    pairs = torch.stack([first, first.roll(-1, 2)], 3).permute(0, 2, 3, 1)  # [N, 4, 2 edges, 2]
    sides = torch.stack([distance[rest], distance[rest].roll(-1, 1)], 2).double()
    good = torch.linalg.det(pairs).abs() > 0.05
    corners = torch.linalg.solve(pairs[good], sides[good].unsqueeze(2)).squeeze(2)
    assert len(corners) > 1000 and torch.allclose(corners.norm(dim=1), torch.tensor(2.0).double(), atol=1e-3)


def test_dead_leaves_are_those_of_a_slow_loop(monkeypatch):
    """The same leaves, each laid behind those before it, pixel by pixel."""
    n, size, drawn = 3, 16, {"rand": [], "leaf_radii": [], "leaf_edges": []}

    def noting(make, calls):
        return lambda *args, **more: calls.append((args, make(*args, **more))) or calls[-1][1]

    for owner, name in ((torch, "rand"), (dfkd, "leaf_radii"), (dfkd, "leaf_edges")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name), drawn[name]))
    images = dfkd.dead_leaves(n, size, "cpu")
    expected, bare = np.zeros((n, size, size, 3), np.float32), np.ones((n, size, size), bool)
    rows, columns = np.indices((size, size))
    uniform = [values.numpy() for _, values in drawn["rand"]]  # a round draws radii, x, y, shapes and colours
    for i, ((shown,), (normals, edges)) in enumerate(drawn["leaf_edges"]):
        r = size * drawn["leaf_radii"][i][1].numpy()
        x, y = (size * values - 0.5 for values in uniform[5 * i + 1 : 5 * i + 3])
        shapes = zip(shown.numpy(), normals.numpy(), edges.numpy(), uniform[5 * i + 4], strict=True)
        for k, image in enumerate(bare.any((1, 2)).nonzero()[0]):  # those that are not yet covered
            before = bare[image].copy()
            for leaf in (r[k] > 0).nonzero()[0]:
                dx, dy = columns - x[k, leaf], rows - y[k, leaf]
                if (before & (abs(dx) <= r[k, leaf]) & (abs(dy) <= r[k, leaf])).any():  # else it has no shape
                    radius, (cos, sin), edge, colour = next(shapes)
                    inside = (np.multiply.outer(dx, cos) + np.multiply.outer(dy, sin) <= edge).all(2)
                    new = bare[image] & inside & (dx**2 + dy**2 <= radius**2)
                    assert radius == r[k, leaf]
                    expected[image, new], bare[image, new] = colour, False
        assert next(shapes, None) is None
    assert not bare.any() and np.array_equal(images.permute(0, 2, 3, 1), expected)


def test_dead_leaves_cover_the_canvas_and_follow_the_seed():
    other = dfkd.dead_leaves(200, 32, "cpu")
    torch.manual_seed(1)
    x = dfkd.dead_leaves(200, 32, "cpu")
    torch.manual_seed(1)
    again = dfkd.dead_leaves(200, 32, "cpu")
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert x.shape == (200, 3, 32, 32) and x.dtype == torch.float32 and x.is_contiguous()
    assert x.min() >= 0 and x.max() < 1 and not (x == 0).all(1).any()  # nothing is left bare
    assert abs(x.mean() - 0.5) < 0.025 and abs(x.var() - 1 / 12) < 0.01  # uniform colours
    assert x.flatten(1).unique(dim=0).shape[0] == 200


def test_samples_are_of_the_form_of_the_images():
    pixels = torch.randint(0, 256, (50, 3, 24, 32), dtype=torch.uint8)
    data = common.Dataset(pixels, torch.zeros(50).long(), pixels, torch.zeros(50).long(), ["a"])
    mean, std = torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    x = dfkd.samples("gaussian", torch.arange(50), data, mean, std)
    standard = (x - mean) / std
    assert x.shape == (50, 3, 24, 32)
    assert standard.mean((0, 2, 3)).abs().max() < 0.03 and (standard.std((0, 2, 3)) - 1).abs().max() < 0.03
    leaves = dfkd.samples("dead-leaves", torch.arange(7), data, mean, std)
    assert leaves.shape == (7, 3, 24, 32) and leaves.min() >= 0 and leaves.max() <= 1 and leaves.std() > 0.2


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("source, flags, running", [
    ("gaussian", [], 0), ("dead-leaves", ["--bn", "running"], 7), ("data", [], 7),
    ("gaussian", ["--running-fraction", 0.5], 4),
])  # fmt: skip
def test_a_run(cli, source, flags, running):
    """Student and teacher see the noise alone, and the loss is the cross-entropy of their answers to it."""
    with forward_passes() as passes:
        assert cli(dfkd, *SMALL, "--source", source, *flags, "--out", "run")[::2] == (0, "")
    checkpoint, data = saved("run"), common.load_dataset("tiny.npz")
    (teacher,) = {step.net for step in passes if not any(p.requires_grad for p in step.net.parameters())}
    pairs = [(T, S) for T, S in zip(passes, passes[1:]) if T.net is teacher and T.images is S.images]
    of_teacher, of_student = zip(*pairs)
    assert len(pairs) == 2 and all(S.training for S in of_student)
    pixels = np.float64(data.train_images) / 255
    for state in (checkpoint["model"], teacher.state_dict()):
        assert np.allclose(state["mean"].flatten(), pixels.mean((0, 2, 3)))
        assert np.allclose(state["std"].flatten(), pixels.std((0, 2, 3)))
    x = torch.cat([step.images for step in of_student])
    if source == "gaussian":
        normalised = (x - teacher.mean) / teacher.std
        assert abs(normalised.mean()) < 0.02 and abs(normalised.std() - 1) < 0.02
    else:
        crops = crops_of(data.train_images, "constant")
        own = [image.numpy().tobytes() in crops for image in (x * 255).round().byte()]
        assert own == [source == "data"] * 40 and x.min() >= 0 and x.max() <= 1
    T, S = (torch.cat([step.logits.detach() for step in steps]) for steps in (of_teacher, of_student))
    loss = -(np.exp(log_softmax(T)) * log_softmax(S)).sum(1).mean()
    last, mode = checkpoint["metrics"][-1], "running" if source == "data" else "current"
    assert last["train_loss"] == pytest.approx(loss, rel=1e-4)
    assert checkpoint["batch_norm"] == mode and last["test_acc"] == last[f"test_acc_{mode}"]
    assert {"test_acc_current", "test_acc_running", "test_acc_adjusted"} <= last.keys()
    S = dfkd.logits_by_statistics(common.load_model(checkpoint), data.test_images, 20, 16)[mode]
    assert last["test_loss"] == pytest.approx(F.cross_entropy(S, torch.arange(20) % 3).item(), rel=1e-5)
    # training has changed nothing of the teacher, and its layers are on the statistics asked for
    before = common.load_checkpoint(checkpoint["teacher"])["model"]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert sum(layer.running_mean is not None for layer in dfkd.batch_norms(teacher)) == running


def test_an_interrupted_run_continues_to_the_same_bit(cli):
    assert_resumes_to_the_same_bit(cli, dfkd, *SMALL, "--epochs", 2, "--teacher-epochs", 2, stops=4)


@pytest.mark.parametrize("flags, rates", [
    ("--source gaussian", [2e-8] * 12 + [2e-9] * 2), ("--source data", [2e-8] * 14),
    ("--source gaussian --schedule cosine", [1e-8 * (1 + math.cos(math.pi * t / 14)) for t in range(14)]),
])  # fmt: skip
def test_the_rate_falls_on_a_plateau_or_as_a_cosine_or_not(cli, tmp_path, flags, rates):
    """By such steps the test loss stands still: after ten such epochs the rate is a tenth.

    On original data it stays.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    write_npz(tmp_path / "tiny.npz", train_images=pixels, train_labels=np.arange(20) % 3, test_images=pixels)
    assert cli(dfkd, *SMALL, *flags.split(), "--lr", 2e-8, "--epochs", 14, "--out", "run")[0] == 0
    found = [record["lr"] for record in saved("run")["metrics"]]
    assert found == pytest.approx(rates, rel=1e-6, abs=0)


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures, in the order in which they are saved."""
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, dpi: drawn.append(figure) or savefig(figure, path)
    )
    return drawn


@pytest.fixture
def made(monkeypatch):
    """Arguments and results of every call of `samples`."""
    calls, make = [], dfkd.samples
    monkeypatch.setattr(dfkd, "samples", lambda *args: calls.append((args, make(*args))) or calls[-1][1])
    return calls


def points(axes):
    """What the lines of `axes` go through: {label: (x, y)}."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def assert_histograms(axes, values):
    """`axes` has these histograms of 80 bins, each a density: {colour: values}."""
    for patch, (colour, expected) in zip(axes.patches, values.items(), strict=True):
        heights, edges = np.histogram(expected, 80, density=True)
        x, y = patch.get_xy().T  # a step at each edge
        assert patch.get_edgecolor() == to_rgba(colour)
        assert np.allclose(x[::2], edges, rtol=1e-4, atol=1e-4)
        assert abs(y[1:-1:2] - heights).mean() < 0.01 * heights.mean()


def test_the_picture_of_activations(cli, monkeypatch, figures, made):
    """Figures 2, 3a and 5 to 8: each curve is of the images and statistics that its label and colour say."""
    assert cli(dfkd, *SMALL, "--epochs", 2, "--out", "a")[0] == 0
    made.clear()
    crops, crop = [], common.crop_flip
    monkeypatch.setattr(
        common, "crop_flip", lambda x, **how: crops.append((x, how, crop(x, **how))) or crops[-1][2]
    )
    flags = ["--plot-activations", "a", "--device", "cpu", "--eval-batch-size", 5]
    status, out, err = cli(dfkd, *flags)
    assert (status, err) == (0, "") and Path("a/activations.png").exists() and Path("a/adjust.png").exists()
    ((source, index, data, mean, std), noise), (images, how, real) = made[0], crops[0]
    checkpoint = common.load_checkpoint("a/checkpoint.pt")
    student = common.load_model(checkpoint)
    teacher = common.load_model(common.load_checkpoint(checkpoint["teacher"]))
    assert source == "dead-leaves" and torch.equal(mean, student.mean) and torch.equal(std, student.std)
    assert torch.equal(images, data.batch(index)) and len(index.unique()) == 40 and how["padding"] == 0

    def layers(net, x, current):
        net = copy.deepcopy(net).train(current)  # in training mode statistics are current ones
        with torch.no_grad():
            return [output.mean((2, 3)).numpy() for output in net(x, features=True)[1]]

    figure, adjust = figures
    *of_teacher, scatter, density = [axes for part in figure.subfigs for axes in part.axes]
    red, blue, black = (
        layers(teacher, real, False),
        layers(teacher, noise, False),
        layers(teacher, noise, True),
    )
    assert [axes.get_title() for axes in of_teacher] == ["stem", "block 1", "block 2", "block 3"]
    for i, axes in enumerate(of_teacher):
        assert_histograms(axes, {"red": red[i].mean(1), "blue": blue[i].mean(1), "black": black[i].mean(1)})
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == [
        "original data, running statistics",
        "dead-leaves, running statistics",
        "dead-leaves, current statistics",
    ]
    red, blue, black = (layers(student, *case)[-1] for case in ((real, False), (noise, False), (real, True)))
    assert_histograms(density, {"red": red.flatten(), "blue": blue.flatten(), "black": black.flatten()})
    for line, colour, values in zip(scatter.lines, ("red", "blue", "black"), (red, blue, black), strict=True):
        assert line.get_color() == colour
        assert np.allclose(line.get_xdata(), blue.mean(0), atol=1e-4)
        assert np.allclose(line.get_ydata(), values.mean(0), atol=1e-4)

    numbers, expected = [1, 2, 4], {"adjusted": [], "current": [], "running": []}
    for number in numbers:
        for name, logits in dfkd.logits_by_statistics(student, data.test_images, 5, number).items():
            expected[name].append(common.accuracy(logits, data.test_labels))
    assert points(adjust.axes[0]) == {
        f"{name} statistics": (numbers, scores) for name, scores in expected.items()
    }
    assert list(adjust.axes[0].get_xticks()) == numbers
    for axes in (*of_teacher, scatter, density, adjust.axes[0]):
        ticks = [*axes.xaxis.get_ticklabels(which="both"), *axes.yaxis.get_ticklabels(which="both")]
        assert not any("$" in tick.get_text() for tick in ticks)
    status, _, err = cli(dfkd, "--plot-activations", checkpoint["teacher"], "--device", "cpu")
    assert status == 2 and re.match("error: --plot-activations: .* is no student of this script", err)
    for number, score in zip(numbers, expected["adjusted"]):
        assert f"statistics of {number} batches of 5: test_acc {score:.2f} %\n" in out


@pytest.mark.parametrize("source", ["gaussian", "dead-leaves", "data"])
def test_the_sheet_of_samples(cli, figures, made, source):
    assert cli(dfkd, *SMALL, "--show-source", "--source", source)[::2] == (0, "")
    (_, _, data, mean, std), x = made[0]
    stats = torch.stack([mean, std]).flatten(1)
    assert torch.allclose(stats, torch.tensor(common.channel_stats(data)))
    sheet = np.asarray(figures[0].axes[0].images[0].get_array())
    assert sheet.shape == (8 * 34 + 2, 8 * 34 + 2, 3) and len(x) == 64 and Path(f"runs/{source}.png").exists()
    for i, tile in enumerate(x.clamp(0, 1).permute(0, 2, 3, 1).numpy()):
        cell = sheet[34 * (i // 8) :, 34 * (i % 8) :][:34, :34]
        assert np.array_equal(cell[2:, 2:], tile) and (cell[:2] == 1).all() and (cell[:, :2] == 1).all()


def test_the_toy(cli, figures):
    """Figure 1; with current statistics the embeddings of noise come back to those of the circles."""
    status, _, err = cli(dfkd, "--toy", "--device", "cpu")
    assert (status, err) == (0, "") and Path("runs/toy.png").exists()
    left, middle, *right = figures[0].axes
    (circles,), (noise,) = left.collections, middle.collections
    radius, outer = np.linalg.norm(circles.get_offsets(), axis=1), circles.get_array() == 1
    assert len(radius) == 1000 and outer.sum() == 500
    assert abs(radius[outer].mean() - 1) < 0.02 and abs(radius[~outer].mean() - 0.5) < 0.02
    assert len(noise.get_offsets()) == 1000 and abs(noise.get_offsets().std() - 1) < 0.05
    embedded = {}
    for axes in right:
        name = axes.get_title().removeprefix("embeddings: ")
        embedded[name] = np.float64(axes.collections[0].get_offsets())
    for axes, e in zip(right, embedded.values()):  # all within the same limits
        assert axes.get_xlim() == axes.get_ylim() == right[0].get_xlim() and e.max() < axes.get_xlim()[1]
    names = ["circles, running statistics", "noise, running statistics", "noise, current statistics"]
    assert list(embedded) == names
    true, running, current = (e.mean(0) for e in embedded.values())
    assert abs(current - true).sum() < abs(running - true).sum() / 10
