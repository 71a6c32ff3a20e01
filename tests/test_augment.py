"""Augmentation: each operation against torchvision.transforms.v2, the random policies by counting their draws."""

import numpy as np
import pytest
import torch
from conftest import within
from scipy.stats import ks_2samp
from torchvision.transforms import v2

import common
from common import IDENTITY, OPS, apply_ops, draw_shapes, op_magnitudes, to_float

CPU = torch.device("cpu")
SPACES = {  # (the library's class, bins, arguments of op_magnitudes, how warps interpolate)
    "rand": (v2.RandAugment(), 31, {}, "nearest"),
    "auto": (v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), 10, {}, "nearest"),
    "mix": (v2.AugMix(), 10, {"translate": 1 / 3, "posterize": 4}, "bilinear"),
}


@pytest.fixture(scope="module")
def pictures():
    """Images with structure, and degenerate ones: random, constant, of two values, dark and nearly constant."""
    random = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    return torch.cat([draw_shapes(5, seed=7)[0], random, flat, (random[:1] > 128).byte() * 200, random[:1] // 64])


@pytest.mark.parametrize("space, name", [(s, name) for s in SPACES for name in SPACES[s][0]._AUGMENTATION_SPACE])
def test_operations_are_the_library_s_at_every_magnitude(space, name, pictures):
    library, bins, arguments, mode = SPACES[space]
    make, signed = library._AUGMENTATION_SPACE[name]
    theirs = make(bins, 32, 32)
    assert signed == (name in OPS[:9])
    ours = op_magnitudes(bins, 32, 32, CPU, **arguments)[OPS.index(name)]
    truncated = name in ("Brightness", "Contrast", "Color", "Sharpness", "AutoContrast")
    for strength in range(bins if theirs is not None else 1):
        for sign in (1, -1) if signed else (1,):
            magnitude = 0.0 if theirs is None else sign * float(theirs[strength])
            expected = library._apply_image_or_video_transform(
                pictures, name, magnitude, interpolation=v2.InterpolationMode(mode), fill={torch.Tensor: None}
            )
            op = torch.full((len(pictures),), OPS.index(name))
            result = apply_ops(to_float(pictures), op, (sign * ours[strength]).expand(len(pictures)), mode)
            error = (result * 255 - expected.float()).abs().max().item()
            assert error < (1.001 if truncated else 0.501), f"strength {strength}, sign {sign}: {error:.3f}/255"


def test_each_sample_gets_its_own_operation(pictures):
    images = to_float(pictures[:5].repeat(3, 1, 1, 1))
    op, magnitude = torch.arange(15), op_magnitudes(10, 32, 32, CPU)[torch.arange(15), 7]
    together = apply_ops(images, op, magnitude)
    for i, image in enumerate(images.split(1)):
        assert torch.equal(together[[i]], apply_ops(image, op[[i]], magnitude[[i]]))
        assert torch.equal(together[[i]], image) == (i == IDENTITY)


@pytest.fixture
def drawn(monkeypatch):
    """Records every (op, magnitude, mode) that apply_ops is called with; it returns the images as they are."""
    record = []

    def spy(images, op, magnitude, mode="nearest", inplace=False):
        record.append((op, magnitude, mode))
        return images

    monkeypatch.setattr(common, "apply_ops", spy)
    return record


def test_rand_augment_draws_uniformly(drawn):
    common.rand_augment(torch.zeros(28000, 3, 8, 8), num_ops=2, magnitude=20)
    table = op_magnitudes(31, 8, 8, CPU)
    assert [mode for _, _, mode in drawn] == ["nearest"] * 2
    for op, magnitude, _ in drawn:
        assert int(op.max()) == IDENTITY
        assert all(within(count, 28000, 1 / 14) for count in torch.bincount(op).tolist())
        assert torch.equal(magnitude.abs(), table[op, 20]) and (magnitude[op >= 9] >= 0).all()
        assert within(int((magnitude[op < 9] < 0).sum()), int((op < 9).sum()), 0.5)
    assert within(int((drawn[0][0] == drawn[1][0]).sum()), 28000, 1 / 14)  # the two are drawn independently


def test_aug_mix_draws_operations_and_strengths(drawn):
    common.aug_mix(torch.zeros(9000, 3, 8, 8), severity=3, width=3)
    assert [mode for _, _, mode in drawn] == ["bilinear"] * 3
    for position, (op, magnitude, _) in enumerate(drawn):
        share = 1 - position / 3  # 1 to 3 operations a chain
        assert within(int((op != IDENTITY).sum()), 27000, share) and not (op == OPS.index("Invert")).any()
        assert all(within(int((op == k).sum()), 27000, share / 13) for k in range(13))
        rotations = magnitude[op == OPS.index("Rotate")].abs()
        assert rotations.unique().tolist() == pytest.approx([0, 30 / 9, 60 / 9])
        assert all(within(int((rotations == r).sum()), len(rotations), 1 / 3) for r in rotations.unique())


def test_aug_mix_mixes_by_weights_that_sum_to_one(drawn, monkeypatch):
    images = torch.rand(64, 3, 8, 8)
    assert torch.allclose(common.aug_mix(images), images, atol=1e-6)  # chains that change nothing
    chains = torch.tensor([1.0, 0.0, 0.0]).repeat_interleave(20000).view(-1, 1, 1, 1)
    monkeypatch.setattr(common, "apply_ops", lambda images, *_, **__: chains.expand_as(images))
    lost = 1 - common.aug_mix(torch.ones(20000, 3, 2, 2))[:, 0, 0, 0]  # uniform, times 1 - Beta(1, 2)
    assert abs(lost.mean() - 1 / 3) < 0.01 and abs(lost.var() - 1 / 18) < 0.003


def test_auto_augment_is_the_library_s_policy_at_its_frequencies(drawn):
    ops, probabilities, strengths = common.auto_augment_policy(CPU)
    rows = zip(ops.flatten().tolist(), probabilities.flatten().tolist(), strengths.flatten().tolist())
    expected = [step for policy in SPACES["auto"][0]._policies for step in policy]
    assert [(OPS[op], p, s) for op, p, s in rows] == [(name, pytest.approx(p), s or 0) for name, p, s in expected]
    common.auto_augment(torch.zeros(50000, 3, 8, 8))
    table = op_magnitudes(10, 8, 8, CPU)
    assert [mode for _, _, mode in drawn] == ["nearest"] * 2
    for turn, (op, magnitude, _) in enumerate(drawn):
        share = torch.zeros(15).scatter_add_(0, ops[:, turn], probabilities[:, turn]) / 25
        assert all(within(int((op == k).sum()), 50000, share[k].item()) for k in range(15) if k != IDENTITY)
        rotations = magnitude[op == OPS.index("Rotate")].abs()
        assert (rotations == table[OPS.index("Rotate"), 2]).all()


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
    monkeypatch.setattr(common, "_resized_crop", lambda images, *box: boxes.append(box[:4]) or resize(images, *box))
    images = torch.rand(3000, 3, 64, 64)
    out = common.random_resized_crop(images, 20)
    top, left, height, width = (column.flatten().numpy() for column in boxes[0])
    for image, found, *box in zip(images[:100], out, top, left, height, width):
        expected = v2.functional.resized_crop(image, *map(int, box), [20, 20], antialias=False)
        assert torch.allclose(found, expected, atol=1e-5)
    library = [v2.RandomResizedCrop(20).make_params([images[0]]) for _ in range(3000)]
    theirs = {key: np.array([params[key] for params in library]) for key in ("top", "left", "height", "width")}
    pairs = [(height * width, theirs["height"] * theirs["width"]), (height / width, theirs["height"] / theirs["width"])]
    for mine, other in [*pairs, (top, theirs["top"]), (left, theirs["left"])]:
        assert ks_2samp(mine, other).pvalue > 1e-3


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_jitter_is_the_library_s(pictures, monkeypatch, name):
    images, factors, uniform = to_float(pictures), [], torch.Tensor.uniform_

    def noted(tensor, low, high):
        factors.append((low, high, uniform(tensor, low, high).flatten().tolist()))
        return tensor

    monkeypatch.setattr(torch.Tensor, "uniform_", noted)
    out = common.color_jitter(images, **{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, name: 0.3})
    ((low, high, factor),) = [draw for draw in factors if draw[0] != draw[1]]
    assert (low, high) == ((-0.3, 0.3) if name == "hue" else (0.7, 1.3)) and len(set(factor)) == len(images)
    expected = [getattr(v2.functional, f"adjust_{name}")(image, f) for image, f in zip(images, factor)]
    assert torch.allclose(out, torch.stack(expected), atol=2e-5)


@pytest.mark.parametrize("function", [
    lambda x: common.rand_augment(x, num_ops=2, magnitude=20), common.aug_mix, common.auto_augment, common.crop_flip,
    lambda x: common.random_resized_crop(x, 32), common.color_jitter, lambda x: common.cutout(x, size=5),
    common.random_erasing,
])  # fmt: skip
def test_every_augmentation_returns_new_images_and_the_same_under_autocast(function, pictures):
    images, out = to_float(pictures), []
    for amp in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out.append(function(images))
    assert torch.equal(*out) and out[0].dtype == torch.float32 and out[0].min() >= 0 and out[0].max() <= 1
    assert torch.equal(images, to_float(pictures)) and not torch.equal(out[0], images)
