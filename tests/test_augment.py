"""Augmentation: each operation against torchvision.transforms.v2, the policies by counting their draws."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import within
from scipy.stats import ks_2samp
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import common
from common import IDENTITY, OPS, apply_ops, draw_shapes, op_table, to_float

CPU = torch.device("cpu")
ROTATE = OPS.index("Rotate")
SPACES = {  # (the library's class, bins, arguments of op_table, how warps interpolate)
    "rand": (v2.RandAugment(), 31, {}, "nearest"),
    "auto": (v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), 10, {}, "nearest"),
    "mix": (v2.AugMix(), 10, {"translate": 1 / 3, "posterize": 4}, "bilinear"),
}


@pytest.fixture(scope="module")
def pictures():
    """Images with structure, and extreme ones: random, constant, of two values, dark, nearly constant."""
    random = torch.randint(
        0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    return torch.cat(
        [draw_shapes(5, seed=7)[0], random, flat, (random[:1] > 128).byte() * 200, random[:1] // 64]
    )


def from_library(space, images, name, strength=0, sign=1):
    library, bins, _, mode = SPACES[space]
    make, signed = library._AUGMENTATION_SPACE[name]
    magnitudes = make(bins, *images.shape[2:])
    magnitude = 0.0 if magnitudes is None else (sign if signed else 1) * float(magnitudes[strength])
    mode = v2.InterpolationMode(mode)
    return library._apply_image_or_video_transform(images, name, magnitude, mode, fill={torch.Tensor: None})


@pytest.mark.parametrize(
    "space, name", [(s, name) for s in SPACES for name in SPACES[s][0]._AUGMENTATION_SPACE]
)
def test_operations_are_the_library_s_at_every_strength(space, name, pictures):
    _, bins, arguments, mode = SPACES[space]
    table, op = op_table(bins, 32, 32, CPU, **arguments), torch.full((len(pictures),), OPS.index(name))
    truncated = name in ("Brightness", "Contrast", "Color", "Sharpness", "AutoContrast")
    for strength in range(bins):
        for negative in (0, 1):
            expected = from_library(space, pictures, name, strength, (1, -1)[negative])
            result = apply_ops(pictures.float(), table, op, strength, negative, mode)
            error = (result - expected.float()).abs().max().item()
            assert error < (1.001 if truncated else 0.501), (
                f"strength {strength}, sign {negative}: {error:.3f}"
            )


def test_each_sample_gets_its_own_operation(pictures):
    images, op, negative = pictures[:5].repeat(3, 1, 1, 1).float(), torch.arange(15), torch.arange(15) % 2
    table, strength = op_table(10, 32, 32, CPU), torch.arange(15) % 3 + 7
    together = apply_ops(images.clone(), table, op, strength, negative)
    for i, image in enumerate(images.split(1)):
        assert torch.equal(
            together[[i]], apply_ops(image.clone(), table, op[[i]], strength[[i]], negative[[i]])
        )
        assert torch.equal(together[[i]], image) == (i == IDENTITY)


@pytest.fixture
def drawn(monkeypatch):
    """Records what apply_ops is called with; it returns the images as they are."""
    record = []

    def spy(images, *arguments, mode="nearest"):
        record.append((*arguments, mode))
        return images

    monkeypatch.setattr(common, "apply_ops", spy)
    return record


def test_rand_augment_draws_uniformly(drawn):
    common.rand_augment(torch.zeros(28000, 3, 8, 8), num_ops=2, magnitude=20)
    for table, op, strength, negative, mode in drawn:
        assert torch.equal(table, op_table(31, 8, 8, CPU)) and (strength, mode) == (20, "nearest")
        assert int(op.max()) == IDENTITY
        assert all(within(count, 28000, 1 / 14) for count in torch.bincount(op).tolist())
        assert within(int(negative[op == ROTATE].sum()), int((op == ROTATE).sum()), 0.5)
    (_, first, *_), (_, second, *_) = drawn
    assert within(int((first == second).sum()), 28000, 1 / 14)  # the two are drawn independently


@pytest.mark.parametrize("magnitude", [3, 30])
def test_rand_augment_gives_the_library_s_images(pictures, magnitude):
    """Of one image every result is one of torchvision's 14 operations, with + or -, at this magnitude."""
    signed = [(name, sign) for name in SPACES["rand"][0]._AUGMENTATION_SPACE for sign in (1, -1)]
    expected = torch.cat([from_library("rand", pictures[:1], name, magnitude, sign) for name, sign in signed])
    expected, ways = expected.float().flatten(1).unique(dim=0, return_counts=True)
    results = common.rand_augment(to_float(pictures[:1]).expand(2800, -1, -1, -1), 1, magnitude) * 255
    distance, found = torch.cdist(results.flatten(1), expected, p=torch.inf).min(1)
    assert (distance < 1.001).all()  # blends are not truncated
    assert all(
        within(n, 2800, way / 28)
        for n, way in zip(torch.bincount(found).tolist(), ways.tolist(), strict=True)
    )


@pytest.mark.parametrize("arguments, severity, width, depth", [
    ({}, 3, 3, -1), ({"severity": 5, "width": 2}, 5, 2, -1), ({"depth": 2}, 3, 3, 2),
])  # fmt: skip
def test_aug_mix_draws_operations_and_strengths(drawn, arguments, severity, width, depth):
    common.aug_mix(torch.zeros(9000, 3, 8, 8), **arguments)
    assert len(drawn) == (3 if depth < 0 else depth)
    for position, (table, op, strength, negative, mode) in enumerate(drawn):
        assert (
            torch.equal(table, op_table(10, 8, 8, CPU, translate=1 / 3, posterize=4)) and mode == "bilinear"
        )
        total = 9000 * width
        assert len(op) == total and not (op == OPS.index("Invert")).any()
        share = 1 - position / 3 if depth < 0 else 1  # 1 to 3 operations a chain
        assert all(within(int((op == k).sum()), total, share / 13) for k in range(13))
        assert within(int((op != IDENTITY).sum()), total, share)
        assert all(within(count, total, 1 / severity) for count in torch.bincount(strength).tolist())
        assert within(int(negative.sum()), total, 0.5) and within(
            int(negative[op == ROTATE].sum()), total, share / 26
        )


def test_aug_mix_mixes_by_dirichlet_and_beta(drawn, monkeypatch):
    images = torch.rand(64, 3, 8, 8)
    assert torch.allclose(common.aug_mix(images), images, atol=1e-6)  # chains that change nothing
    channel = 255 * torch.eye(3).repeat_interleave(20000, 0).view(-1, 3, 1, 1)  # the k-th chain is channel k
    monkeypatch.setattr(common, "apply_ops", lambda images, *_, **__: channel.expand_as(images).clone())
    mixed = common.aug_mix(torch.zeros(20000, 3, 2, 2))[:, :, 0, 0]
    beta = mixed.sum(1)  # uniform
    assert abs(beta.mean() - 1 / 2) < 0.01 and abs(beta.var() - 1 / 12) < 0.003
    weights = mixed / beta.unsqueeze(1)
    assert torch.allclose(weights.mean(0), torch.tensor(1 / 3), atol=0.01)
    assert torch.allclose(weights.T.cov(), torch.eye(3) / 12 - 1 / 36, atol=0.002)
    assert abs(torch.stack([beta, weights[:, 0]]).corrcoef()[0, 1]) < 0.05


def test_auto_augment_is_the_library_s_policy_at_its_frequencies(drawn):
    ops, probabilities, strengths = common.auto_augment_policy(CPU)
    rows = zip(ops.flatten().tolist(), probabilities.flatten().tolist(), strengths.flatten().tolist())
    expected = [step for policy in SPACES["auto"][0]._policies for step in policy]
    assert [(OPS[op], p, s) for op, p, s in rows] == [
        (name, pytest.approx(p), s or 0) for name, p, s in expected
    ]
    common.auto_augment(torch.zeros(50000, 3, 8, 8))
    for turn, (table, op, strength, negative, mode) in enumerate(drawn):
        assert torch.equal(table, op_table(10, 8, 8, CPU)) and mode == "nearest"
        share = torch.zeros(15).scatter_add_(0, ops[:, turn], probabilities[:, turn]) / 25
        assert all(within(int((op == k).sum()), 50000, share[k].item()) for k in range(15) if k != IDENTITY)
        possible = probabilities[:, turn] > 0
        steps = set(zip(ops[possible, turn].tolist(), strengths[possible, turn].tolist()))
        active = op != IDENTITY
        assert set(zip(op[active].tolist(), strength[active].tolist())) == steps
        assert within(int(negative.sum()), 50000, 0.5)


@pytest.mark.parametrize("mode, padding, size", [("zero", 4, None), ("reflect", 2, 11), ("zero", 0, 7)])
def test_crop_flip_is_the_library_s_random_crop(mode, padding, size):
    """Every result is one window of the library's padding, or its mirror image; all windows come alike."""
    images = torch.rand(1000, 3, 12, 10)
    padded = v2.functional.pad(images, [padding], padding_mode={"zero": "constant"}.get(mode, mode))
    out = common.crop_flip(images, padding, mode, size)
    height, width = min(12, size or 12), min(10, size or 10)  # a shorter side stays as it is
    assert out.shape == (1000, 3, height, width)
    tops, lefts = padded.shape[2] - height + 1, padded.shape[3] - width + 1
    windows = [padded[:, :, t : t + height, s : s + width] for t in range(tops) for s in range(lefts)]
    found = torch.stack([(window == o).flatten(1).all(1) for o in (out, out.flip(3)) for window in windows])
    assert (found.sum(0) == 1).all()
    counts = found.sum(1).view(2, tops, lefts)
    assert within(int(counts[0].sum()), 1000, 0.5)
    assert all(within(n, 1000, 1 / tops) for n in counts.sum((0, 2)).tolist())
    assert all(within(n, 1000, 1 / lefts) for n in counts.sum((0, 1)).tolist())


def test_cutout_blackens_one_clipped_square():
    black = common.cutout(torch.ones(4000, 3, 16, 16), size=5) == 0
    assert torch.equal(black, black[:, :1].expand_as(black))
    rows, columns = black[:, 0].any(2).sum(1), black[:, 0].any(1).sum(1)
    assert torch.equal(black[:, 0].sum((1, 2)), rows * columns)  # a full rectangle
    assert rows.max() == 5 and rows.min() == 3 and columns.max() == 5 and columns.min() == 3
    assert within(int((rows == 5).sum()), 4000, 12 / 16)  # centres 2 … 13 of 16 leave it whole


def test_random_erasing_boxes_follow_the_library():
    ours = (common.random_erasing(torch.ones(3000, 3, 32, 32), probability=0.7) == 0)[:, 0]
    erase = v2.RandomErasing(p=0.7)
    theirs = torch.stack([erase(torch.ones(3, 32, 32))[0] == 0 for _ in range(3000)])
    assert within(int(ours.any(2).any(1).sum()), 3000, 0.7)
    assert torch.equal(ours.sum((1, 2)), ours.any(2).sum(1) * ours.any(1).sum(1))  # full rectangles

    def measures(box):
        rows, columns = box.any(2).int(), box.any(1).int()
        return box.sum((1, 2)), rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)

    for mine, other in zip(measures(ours), measures(theirs)):
        assert ks_2samp(mine.numpy(), other.numpy()).pvalue > 1e-4


def test_random_resized_crop_is_the_library_s(monkeypatch):
    """Boxes by their distribution, what is cut out pixel by pixel."""
    boxes, resize = [], common._resized_crop
    monkeypatch.setattr(
        common, "_resized_crop", lambda images, *box: boxes.append(box[:4]) or resize(images, *box)
    )
    images = torch.rand(3000, 3, 64, 64)
    out = common.random_resized_crop(images, 20)
    top, left, height, width = (column.flatten().numpy() for column in boxes[0])
    for image, found, *box in zip(images[:100], out, top, left, height, width):
        expected = v2.functional.resized_crop(image, *map(int, box), [20, 20], antialias=False)
        assert torch.allclose(found, expected, atol=1e-5)
    library = [v2.RandomResizedCrop(20).make_params([images[0]]) for _ in range(3000)]
    theirs = {
        key: np.array([params[key] for params in library]) for key in ("top", "left", "height", "width")
    }
    pairs = [
        (height * width, theirs["height"] * theirs["width"]),
        (height / width, theirs["height"] / theirs["width"]),
    ]
    for mine, other in [*pairs, (top, theirs["top"]), (left, theirs["left"])]:
        assert ks_2samp(mine, other).pvalue > 1e-3


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_jitter_is_the_library_s(pictures, monkeypatch, name):
    images, factors, uniform = to_float(pictures), [], torch.Tensor.uniform_

    def noted(tensor, low, high):
        factors.append((low, high, uniform(tensor, low, high).flatten().tolist()))
        return tensor

    monkeypatch.setattr(torch.Tensor, "uniform_", noted)
    out = common.color_jitter(
        images, **{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, name: 0.3}
    )
    ((low, high, factor),) = [draw for draw in factors if draw[0] != draw[1]]
    assert (low, high) == ((-0.3, 0.3) if name == "hue" else (0.7, 1.3)) and len(set(factor)) == len(images)
    expected = [getattr(v2.functional, f"adjust_{name}")(image, f) for image, f in zip(images, factor)]
    assert torch.allclose(out, torch.stack(expected), atol=2e-5)


def rand_augment(images):
    return common.rand_augment(images, num_ops=1, magnitude=3)


def cutout(images):
    return common.cutout(images, size=5)


def random_resized_crop(images):
    return common.random_resized_crop(images, 32)


AUGMENTATIONS = [
    *(rand_augment, cutout, random_resized_crop),
    *(common.aug_mix, common.auto_augment, common.crop_flip, common.random_erasing, common.color_jitter),
]


@pytest.mark.parametrize("function", AUGMENTATIONS)
def test_every_augmentation_returns_new_images_and_the_same_under_autocast(function, pictures):
    images, out = to_float(pictures), []
    for amp in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out.append(function(images))
    assert torch.equal(*out) and out[0].dtype == torch.float32 and out[0].min() >= 0 and out[0].max() <= 1
    assert torch.equal(images, to_float(pictures)) and not torch.equal(out[0], images)


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something; a view computes nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view:
            self.counts[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("function, most", [
    (rand_augment, 90), (common.aug_mix, 250), (common.crop_flip, 10), (cutout, 20),
    (random_resized_crop, 70), (common.random_erasing, 60),
])  # fmt: skip
def test_compiled_an_augmentation_is_one_graph_of_few_kernels_with_the_same_images(function, most, pictures):
    """Compiled, an augmentation computes all rows of a batch, as on CUDA. The operations are counted."""
    counts = []

    def backend(graph, _):
        def run(*arguments):
            with Kernels() as kernels:
                result = graph(*arguments)
            counts.append(kernels.counts)
            return result

        return run

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    images = to_float(pictures)
    for batch in (images, images[:7], images[:5]):
        results = []
        for view in (function, compiled):
            torch.manual_seed(5)
            results.append(view(batch))
        assert torch.allclose(*results, atol=1e-6)
    assert len(counts) == 3 and max(sum(count.values()) for count in counts) <= most, counts


def test_a_compiled_step_gives_the_loss_of_an_eager_one(pictures):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.Flatten(), torch.nn.Linear(512, 10)
    )

    def step(images):
        student = net(cutout(common.crop_flip(rand_augment(images))))
        return F.cross_entropy(student, net(common.aug_mix(images)).softmax(1))

    losses, gradients = [], []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(6)
        net.zero_grad()
        losses.append(function(to_float(pictures)))
        losses[-1].backward()
        gradients.append(net[0].weight.grad.clone())
    assert abs(losses[0] - losses[1]) < 1e-5 and torch.allclose(*gradients, atol=1e-5)
