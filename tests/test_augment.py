"""Augmentation: every operation against torchvision.transforms.v2, the random policies by counting."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2

import common
from common import IDENTITY, OPS, apply_ops, draw_shapes, op_magnitudes, to_float

LIBRARY = {"rand": v2.RandAugment(), "auto": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), "mix": v2.AugMix()}
SPACES = {  # our space: (bins, arguments of op_magnitudes, how warps interpolate, the library's space)
    "rand": (31, {}, "nearest", v2.RandAugment._AUGMENTATION_SPACE),
    "auto": (10, {}, "nearest", v2.AutoAugment._AUGMENTATION_SPACE),
    "mix": (10, {"translate": 1 / 3, "posterize": 4}, "bilinear", v2.AugMix._AUGMENTATION_SPACE),
}
SIGNED = OPS[:9]


@pytest.fixture(scope="module")
def pictures():
    """Images with structure, plus the degenerate ones: random, constant, two-valued, one dark and nearly constant."""
    random = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    return torch.cat([draw_shapes(5, seed=7)[0], random, flat, (random[:1] > 128).byte() * 200, random[:1] // 64])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", OPS)
def test_operation_equals_the_library_at_every_magnitude(space, name, pictures):
    bins, arguments, mode, spaces = SPACES[space]
    if name not in spaces:
        assert (space, name) in {("rand", "Invert"), ("mix", "Invert"), ("mix", "Identity"), ("auto", "Identity")}
        return
    theirs, signed = spaces[name]
    theirs = theirs(bins, 32, 32)
    assert signed == (name in SIGNED)
    ours = op_magnitudes(bins, 32, 32, torch.device("cpu"), **arguments)[OPS.index(name)]
    tolerance = 2 if name in OPS[:5] and mode == "bilinear" else 1
    for strength in range(bins if theirs is not None else 1):
        for sign in (1, -1) if signed else (1,):
            magnitude = 0.0 if theirs is None else sign * float(theirs[strength])
            expected = LIBRARY[space]._apply_image_or_video_transform(
                pictures, name, magnitude, interpolation=v2.InterpolationMode(mode), fill={torch.Tensor: None}
            )
            op = torch.full((len(pictures),), OPS.index(name))
            result = apply_ops(to_float(pictures), op, (sign * ours[strength]).expand(len(pictures)), mode)
            assert result.min() >= 0 and result.max() <= 1
            error = (result * 255 - expected.float()).abs().max().item()
            assert error <= tolerance + 1e-3, f"{name} at strength {strength}, sign {sign}: {error:.3f}/255"


def test_each_sample_gets_its_own_operation(pictures):
    images = to_float(pictures[:5].repeat(3, 1, 1, 1))
    op, magnitude = torch.arange(15), op_magnitudes(10, 32, 32, torch.device("cpu"))[torch.arange(15), 7]
    together = apply_ops(images, op, magnitude)
    alone = [apply_ops(images[i : i + 1], op[i : i + 1], magnitude[i : i + 1]) for i in range(15)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[IDENTITY], images[IDENTITY])
    assert all(not torch.equal(together[i], images[i]) for i in range(15) if i != IDENTITY)


def test_dense_and_sparse_paths_agree(pictures, monkeypatch):
    """On CUDA every row is computed and selected; the CPU picks rows. The same draws must give the same images."""
    images, op = to_float(pictures), torch.arange(len(pictures)) + 2
    magnitude = op_magnitudes(31, 32, 32, torch.device("cpu"))[op, 20]
    sparse = apply_ops(images, op, magnitude)
    dense = images.clone()
    warps = dict.fromkeys(range(common.ROTATE + 1), lambda *a: common._warp(*a, mode="nearest"))
    others = {common.COLOR: common._color, common.SHARPNESS: common._sharpness, common.EQUALIZE: common._equalize}
    for kind in set(range(len(common.OPS))) - {IDENTITY}:
        transform = {**warps, **others}.get(kind, common._look_up)
        dense = torch.where((op == kind).view(-1, 1, 1, 1), transform(images, op, magnitude), dense)
    assert torch.equal(sparse, dense)


@pytest.fixture
def drawn(monkeypatch):
    """Records every (op, magnitude) handed to apply_ops."""
    record = []

    def spy(images, op, magnitude, mode="nearest"):
        record.append((op, magnitude, mode))
        return images

    monkeypatch.setattr(common, "apply_ops", spy)
    return record


def within(count, total, p, sigmas=5):
    return abs(count - total * p) <= sigmas * math.sqrt(total * p * (1 - p)) + 1e-9


def test_rand_augment_draws_uniformly(drawn):
    common.rand_augment(torch.zeros(28000, 3, 8, 8), num_ops=2, magnitude=20)
    assert len(drawn) == 2
    table = op_magnitudes(31, 8, 8, torch.device("cpu"))
    for op, magnitude, mode in drawn:
        assert mode == "nearest"
        counts = torch.bincount(op, minlength=15)
        assert counts[14] == 0 and all(within(c, 28000, 1 / 14) for c in counts[:14].tolist())
        assert torch.equal(magnitude.abs(), table[op, 20])
        for kind in range(9):
            signs = magnitude[op == kind]
            assert within(int((signs < 0).sum()), len(signs), 0.5)
        assert (magnitude[op >= 9] >= 0).all()


def test_aug_mix_draws(drawn):
    common.aug_mix(torch.zeros(9000, 3, 8, 8), severity=3, width=3)
    assert len(drawn) == 3
    total = 27000
    for position, (op, magnitude, mode) in enumerate(drawn):
        active = op != IDENTITY
        assert mode == "bilinear" and within(int(active.sum()), total, 1 - position / 3)
        assert all(within(int((op == k).sum()), total, (1 - position / 3) / 13) for k in range(13))
        assert not (op == OPS.index("Invert")).any()
        rotations = magnitude[op == OPS.index("Rotate")].abs()
        assert rotations.unique().tolist() == pytest.approx([0, 30 / 9, 60 / 9])


def test_autocast_does_not_coarsen_augmentation(pictures):
    """Matrix products would run in bfloat16 under autocast: coordinates and mixtures must not be made of any."""
    images = to_float(pictures)
    for function in (lambda x: common.rand_augment(x, 2, 20), common.aug_mix, common.auto_augment):
        torch.manual_seed(4)
        plain = function(images)
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(images), plain)


def test_aug_mix_weights_are_convex(drawn):
    """With operations that change nothing the mixture must be the image itself, whatever the weights drawn."""
    images = torch.rand(64, 3, 8, 8)
    assert torch.allclose(common.aug_mix(images), images, atol=1e-6)
    assert torch.allclose(common.aug_mix(images, width=2, depth=4, alpha=0.3), images, atol=1e-6)


def test_aug_mix_mixes_original_and_chains(monkeypatch):
    """With constants for chains: the mean weight of the original is 1/2, of each of three chains 1/6."""
    monkeypatch.setattr(common, "apply_ops", lambda images, op, *_, **__: torch.zeros_like(images))
    kept = common.aug_mix(torch.ones(20000, 3, 2, 2))[:, 0, 0, 0]
    assert abs(kept.mean() - 0.5) < 0.01 and abs(kept.var() - 1 / 12) < 0.005  # Beta(1, 1) is uniform
    levels = torch.tensor([1.0, 0.0, 0.0]).repeat_interleave(20000).view(-1, 1, 1, 1)
    monkeypatch.setattr(common, "apply_ops", lambda images, op, *_, **__: levels.expand_as(images))
    first = common.aug_mix(torch.zeros(20000, 3, 2, 2))[:, 0, 0, 0]
    assert abs(first.mean() - 1 / 6) < 0.01


def test_auto_augment_policy_is_the_library_s():
    ops, probabilities, strengths = common.auto_augment_policy(torch.device("cpu"))
    library = LIBRARY["auto"]._policies
    assert len(library) == len(ops) == 25
    for i, policy in enumerate(library):
        for j, (name, probability, strength) in enumerate(policy):
            assert OPS[ops[i, j]] == name and probabilities[i, j] == pytest.approx(probability)
            assert strengths[i, j] == (strength or 0)


def test_auto_augment_frequencies(drawn):
    common.auto_augment(torch.zeros(50000, 3, 8, 8))
    ops, probabilities, _ = common.auto_augment_policy(torch.device("cpu"))
    for turn, (op, _, _) in enumerate(drawn):
        expected = torch.zeros(15).scatter_add_(0, ops[:, turn], probabilities[:, turn]) / 25
        for k in range(15):
            if k != IDENTITY:
                assert within(int((op == k).sum()), 50000, expected[k].item())


@pytest.mark.parametrize("mode, library_mode", [("zero", "constant"), ("reflect", "reflect")])
def test_crop_flip_is_a_crop_of_the_library_s_padding(mode, library_mode):
    images = torch.rand(500, 3, 12, 10)
    padded = v2.functional.pad(images, [4, 4], padding_mode=library_mode)
    out = common.crop_flip(images, 4, mode)
    assert out.shape == images.shape
    seen, flips = torch.zeros(9, 9), 0
    for k in range(500):
        found = [
            (t, s, flip)
            for t in range(9) for s in range(9) for flip in (False, True)
            if torch.equal(out[k], (lambda w: w.flip(2) if flip else w)(padded[k, :, t : t + 12, s : s + 10]))
        ]  # fmt: skip
        assert len(found) == 1
        seen[found[0][:2]] += 1
        flips += found[0][2]
    assert within(flips, 500, 0.5)
    assert all(within(n, 500, 1 / 9) for n in [*seen.sum(0).tolist(), *seen.sum(1).tolist()])


def test_cutout_blackens_one_clipped_square():
    out = common.cutout(torch.ones(4000, 3, 16, 16), size=5)
    black = out == 0
    assert torch.equal(black[:, 0], black[:, 1]) and torch.equal(black[:, 0], black[:, 2])
    rows, columns = black[:, 0].any(2).sum(1), black[:, 0].any(1).sum(1)
    assert torch.equal(black[:, 0].sum((1, 2)), rows * columns)  # a full rectangle
    assert rows.max() == 5 and rows.min() == 3 and columns.max() == 5 and columns.min() == 3
    assert within(int((rows == 5).sum()), 4000, 12 / 16)  # centres 2 … 13 of 16 leave it whole


def test_random_erasing_boxes_follow_the_library():
    """Share of erased images, and the distribution of the erased area, as torchvision's own class draws them."""
    ours = (common.random_erasing(torch.ones(3000, 3, 32, 32), probability=0.7) == 0)[:, 0]
    erase = v2.RandomErasing(p=0.7)
    theirs = torch.stack([erase(torch.ones(3, 32, 32))[0] == 0 for _ in range(3000)])
    assert within(int(ours.any(2).any(1).sum()), 3000, 0.7)
    for box in (ours, theirs):
        assert torch.equal(box.sum((1, 2)), box.any(2).sum(1) * box.any(1).sum(1))
    from scipy.stats import ks_2samp

    for measure in (
        lambda b: b.sum((1, 2)),
        lambda b: b.any(2).sum(1),
        lambda b: b.any(1).sum(1),
        lambda b: b.int().argmax(1).amax(1),
    ):
        assert ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-4


def test_no_python_loop_over_samples():
    """The number of kernels launched must not grow with the batch."""
    from torch.profiler import ProfilerActivity, profile

    def launches(size):
        torch.manual_seed(1)
        images = torch.rand(size, 3, 16, 16)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            out = common.crop_flip(common.aug_mix(common.auto_augment(common.rand_augment(images, 2, 9))))
            common.random_erasing(common.cutout(out, 5))
        return sum(event.count for event in profiler.key_averages())

    few, many = launches(64), launches(512)
    assert many <= 1.1 * few  # eight times the images


def test_on_cuda_nothing_waits_for_the_device(monkeypatch):
    """On fake CUDA tensors, which know shapes and devices but no values: reading a value or mixing devices raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Dirichlet:  # the only operation without a fake kernel
        def __init__(self, concentration, validate_args):
            self.concentration = concentration

        def sample(self, shape):
            return torch.rand(*shape, len(self.concentration), device=self.concentration.device).softmax(1)

    monkeypatch.setattr(torch.distributions, "Dirichlet", Dirichlet)
    caches = (common.op_magnitudes, common.auto_augment_policy)
    for cache in caches:
        cache.cache_clear()
    try:
        with FakeTensorMode():
            images = torch.rand(8, 3, 32, 32, device="cuda")
            with pytest.raises(Exception, match="local_scalar_dense"):
                images.sum().item()
            out = common.crop_flip(common.aug_mix(common.auto_augment(common.rand_augment(images, 2, 9))), 4, "reflect")
            out = common.random_erasing(common.cutout(common.aug_mix(out, depth=2), 5))
            assert out.device.type == "cuda" and out.shape == images.shape
    finally:
        for cache in caches:
            cache.cache_clear()


# ---------------------------------------------------------------------------------------------------------- photographs


def test_resized_crops_are_the_library_s(pictures):
    """Boxes of many shapes, larger and smaller than what they become."""
    images = to_float(pictures)
    boxes = [(0, 0, 32, 32), (3, 5, 20, 11), (10, 0, 7, 30), (31, 31, 1, 1), (8, 9, 16, 16), (0, 12, 32, 20)]
    boxes = (boxes * 2)[: len(images)]
    top, left, height, width = (torch.tensor(column).float().view(-1, 1) for column in zip(*boxes))
    for size in (16, 24, 40):
        found = common._resized_crop(images, top, left, height, width, size)
        for image, mine, box in zip(images, found, boxes):
            expected = v2.functional.resized_crop(image, *box, [size, size], antialias=False)
            assert torch.allclose(mine, expected, atol=1e-5)


def test_random_resized_crop_draws_what_the_library_draws(monkeypatch):
    """Area, shape and place of the boxes, against the library's own draws: Kolmogorov and Smirnov's test."""
    drawn = []
    monkeypatch.setattr(common, "_resized_crop", lambda images, *box: drawn.append(box[:4]) or images)
    common.random_resized_crop(torch.zeros(3000, 3, 64, 64), 48)
    top, left, height, width = (column.flatten().numpy() for column in drawn[0])
    assert (top >= 0).all() and (top + height <= 64).all() and (left >= 0).all() and (left + width <= 64).all()
    image = torch.zeros(3, 64, 64)
    library = [v2.RandomResizedCrop(48).make_params([image]) for _ in range(3000)]
    theirs = {key: np.array([params[key] for params in library]) for key in ("top", "left", "height", "width")}
    pairs = [(height * width, theirs["height"] * theirs["width"]), (height / width, theirs["height"] / theirs["width"])]
    pairs += [(top, theirs["top"]), (left, theirs["left"])]
    for mine, other in pairs:
        assert ks_2samp(mine, other).pvalue > 1e-3


def test_random_resized_crop_takes_the_whole_image_where_no_box_fits():
    images = torch.rand(5, 3, 20, 20)
    found = common.random_resized_crop(images, 20, scale=(0.99, 1.0), ratio=(3.0, 4.0))
    assert torch.allclose(found, images, atol=1e-5)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_jitter_is_the_library_s(pictures, monkeypatch, name):
    """One of the four at a time, by the factors that were drawn."""
    images, factors = to_float(pictures), []
    uniform = torch.Tensor.uniform_

    def noted(tensor, low, high):
        factors.append((low, high, uniform(tensor, low, high).flatten()))
        return tensor

    monkeypatch.setattr(torch.Tensor, "uniform_", noted)
    amounts = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | {name: 0.3}
    out = common.color_jitter(images, **amounts)
    ((low, high, factor),) = [drawn for drawn in factors if drawn[0] != drawn[1]]
    assert (low, high) == ((-0.3, 0.3) if name == "hue" else (0.7, 1.3)) and len(set(factor.tolist())) == len(images)
    adjust = getattr(v2.functional, f"adjust_{name}")
    for mine, image, f in zip(out, images, factor.tolist()):
        assert torch.allclose(mine, adjust(image, f), atol=2e-5)


def test_colour_jitter_draws_the_order(pictures, monkeypatch):
    """Darker and then more contrast is not more contrast and then darker: all orders come."""
    seen, images = set(), to_float(pictures[:1])
    order = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n: seen.add(tuple((drawn := order(n)).tolist())) or drawn)
    for _ in range(200):
        out = common.color_jitter(images)
        assert out.min() >= 0 and out.max() <= 1
    assert len(seen) == 24
