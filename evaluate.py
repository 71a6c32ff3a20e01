"""Evaluate any checkpoint: PGD, CIFAR-C, CINIC-10, calibration and the transferability of adversarial examples.

    python evaluate.py CKPT                                          # clean accuracy, ECE, PGD-20
    python evaluate.py CKPT … --pgd 1 5 10 15 20 100 200 1000 --eps 8/255   # Table 4: more and more steps
    python evaluate.py CKPT … --pgd 20 --eps 1/255 2/255 10/255 20/255 25/255 50/255 100/255 200/255      # Table 5
    python evaluate.py CKPT … --cifar-c CIFAR-10-C --cinic CINIC-10  # mCA and CINIC columns, Figure 3
    python evaluate.py CKPT … --transfer --teacher TEACHER_CKPT      # Figure 1 of KD Beyond Model Compression
    python evaluate.py --show-corruptions --dataset cifar10          # what --cifar-c does without a folder

CKPT is the checkpoint.pt of a run folder; put checkpoints first. Those that differ only in their seed are one row of a
table: mean ± sample standard deviation (n). A row is named by every flag in which it differs from another row. The
results of a checkpoint stay beside it, in evaluation.json, and are not measured again. Pictures and summary.json, the
numbers of the tables, go to --out.

Arani, Sarfraz, Zonooz: Noise as a Resource for Learning in Knowledge Distillation (sections 2.2-2.4, Tables 1-6,
Figures 2 and 3). Sarfraz, Arani, Zonooz: Knowledge Distillation Beyond Model Compression (section IV-D, Figure 1).
Shon et al.: Neural Vicinal Risk Minimization (Figure 5: calibration).

Other people's weights need --dataset. `weights.pt --arch NAME` is a state_dict for common.build_model, `weights.pt
--torchvision NAME` one for a torchvision model; `--torchvision NAME` alone has the weights that torchvision publishes.

Everything is float32 in evaluation mode with deterministic convolutions, on CUDA as on the CPU.
"""

import argparse
import contextlib
import dataclasses
import fractions
import functools
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UsageError, evenly_spaced, evenly_split, predict, to_float

# torchvision, matplotlib and Pillow are imported where they are used: --help should not wait for them.

# ------------------------------------------------------------------------------------------------------------ arguments


def fraction(text):
    """argparse type: a float in [0, 1], written as 0.031 or as 8/255."""
    value = float(fractions.Fraction(text))
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def positive(text):
    """argparse type: an int from 1 up."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def parse_args():
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, default=[], metavar="CKPT", help="checkpoint.pt, or the folder, of runs")
    add("--part", default="model", help="the weights in CKPT: model, ema, …")

    add = parser.add_argument_group("what to run (none of these: --ece --pgd 20)").add_argument
    add("--ece", action="store_true", help="ECE (15 equal-width bins), NLL, Brier score, reliability diagram")
    add("--pgd", nargs="+", type=positive, default=[], metavar="N", help="l∞ PGD of N steps; several: a sweep")
    add("--eps", nargs="+", type=fraction, default=[0.031], help="radius in [0, 1], 0.031 or 8/255; several: a sweep")
    add("--step-size", type=fraction, default=0.003, help="in [0, 1]")
    add("--restarts", type=positive, default=5, help="random starts, the worst counts")
    add("--cifar-c", nargs="?", const="", metavar="DIR", help="19 corruptions: the official .npy files, else generated")
    add("--cinic", type=Path, metavar="DIR", help="the ImageNet images of CINIC-10, 2,100 a class")
    add("--transfer", action="store_true", help="PGD-20 images of each checkpoint on each other, of the smallest --eps")
    add("--teacher", type=Path, metavar="CKPT", help="--transfer: one more source, in a column of its own")
    add("--show-corruptions", action="store_true", help="write corruptions.png, a contact sheet")

    add = parser.add_argument_group("data, machine and output").add_argument
    add("--dataset", metavar="NAME", help="as in the training scripts; None: what CKPT was trained on")
    add("--data-dir", type=Path, metavar="DIR", help="where data sets are kept; None: as in training")
    add("--limit-test", type=positive, metavar="N", help="use N evenly spaced test samples")
    add("--seed", type=int, default=0, help="of random starts, corruptions, CINIC's choice")
    add("--batch-size", type=positive, help="images a forward pass; None: 125 on a CPU, else 500")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--out", type=Path, metavar="DIR", help="of pictures and summary.json; None: the folder of the first CKPT")

    add = parser.add_argument_group("other people's weights").add_argument
    add("--arch", metavar="NAME", help="CKPT is a state_dict for this architecture of common.build_model")
    add("--torchvision", metavar="NAME", help="CKPT is a state_dict for this model; no CKPT: its published weights")
    add("--num-classes", type=positive, metavar="N", help="outputs of the model; None: the classes of --dataset")
    add("--mean", nargs=3, type=float, default=[0, 0, 0], help="what it subtracts from each channel in [0, 1] …")
    add("--std", nargs=3, type=float, default=[1, 1, 1], help="… and then divides by")
    args = parser.parse_intermixed_args()

    if not (args.checkpoints or args.torchvision or args.show_corruptions):
        raise UsageError("CKPT: name the checkpoint.pt of a run folder, before the other flags")
    if (args.arch or args.torchvision) and not args.dataset:
        raise UsageError("--dataset: weights do not tell what to evaluate on; add --dataset NAME")
    args.checkpoints = [path / "checkpoint.pt" if path.is_dir() else path for path in args.checkpoints]
    asked = args.ece or args.pgd or args.cinic or args.transfer or args.show_corruptions
    if not asked and args.cifar_c is None:
        args.ece, args.pgd = True, [20]
    args.pgd, args.eps = sorted(set(args.pgd)), sorted(set(args.eps))
    args.out = args.out or (args.checkpoints[0].parent if args.checkpoints else Path("runs/evaluation"))
    return args


# ------------------------------------------------------------------------------------------------------------------ PGD


def random_start(images, eps, generator):
    """A uniform draw from the l∞ ball of radius eps around float images [B, 3, H, W], clipped to [0, 1]."""
    noise = torch.rand(images.shape, device=images.device, generator=generator)
    return (images + eps * (2 * noise - 1)).clamp(0, 1)


def ascend(model, x, images, labels, eps, step_size):
    """One step of PGD from x, float [B, 3, H, W]: the logits [B, C] at x, and the next point.

    The step follows the sign of the cross-entropy's gradient, then returns to the ball around `images` and to [0, 1].
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)
    following = x.detach() + step_size * gradient.sign()
    return logits.detach(), following.clamp(images - eps, images + eps).clamp(0, 1)


def pgd(model, images, labels, eps=0.031, step_size=0.003, steps=20, generator=None):
    """Projected gradient descent (Madry et al. 2018), l∞, from one random start: the adversarial images.

    model: gives logits of float images, in evaluation mode. images: float [B, 3, H, W] in [0, 1]; labels: int64 [B].
    eps, step_size: in [0, 1]. generator: of the random start, on the images' device; None: the global one.
    Returns float [B, 3, H, W], within eps of `images` and within [0, 1].
    """
    x = random_start(images, eps, generator)
    for _ in range(steps):
        _, x = ascend(model, x, images, labels, eps, step_size)
    return x


# ---------------------------------------------------------------------------------------------------------- corruptions
# CIFAR-C (Hendrycks and Dietterich 2019), batched: each function takes x float [B, 3, H, W] in [0, 1], the constants of
# its severity and a generator, and gives x corrupted, not yet clipped. The constants are those of 32×32 pixels.

SEVERITIES = {  # severity 1 … 5
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons at full brightness
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),  # standard deviation, times the value
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # standard deviation in pixels
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # disc radius, its own blur
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),  # blur, shift, rounds
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, standard deviation
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # end of np.arange(1, end, 0.01)
    # mean and deviation of the flakes, zoom, threshold, radius and deviation of their trails, weight of the image
    "snow": ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
             (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # weights of image and frost
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of the plasma
    # mean and deviation of the liquid, its blur, threshold, amount, mud instead of water
    "spatter": ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
                (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to HSV's value
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor about the channel's mean
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # HSV's saturation times, plus
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # side
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
    # displacement, its smoothness, jitter of the affine part, as shares of the side
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
}  # fmt: skip


def corrupt(images, name, severity, seed=0):
    """CIFAR-C's corruption `name` (a key of CORRUPTIONS) of images: uint8 [N, 3, H, W] again, on the same device.

    images: uint8 [N, 3, H, W], H and W at least 16. severity: 1 … 5. The same seed gives the same pixels on the same
    kind of device. Each thousand images has a generator of its own, so that they do not depend on what follows.
    Raises ValueError for images of another dtype, an unknown name and an unknown severity.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, not uint8")
    if name not in CORRUPTIONS or severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"no {name!r} of severity {severity}; known are 1 … 5 of {', '.join(CORRUPTIONS)}")
    function, constants = CORRUPTIONS[name], SEVERITIES[name][severity - 1]
    parts = []
    for i, part in enumerate(images.split(1000)):
        x = function(to_float(part), constants, torch.Generator(images.device).manual_seed(seed + i))
        parts.append((x * 255 + 1e-3).clamp(0, 255).byte())  # cut off, as CIFAR-C's files; 1e-3 is float32's error
    return torch.cat(parts)


def normal(like, generator):
    return torch.randn(like.shape, device=like.device, generator=generator)


def uniform(low, high, shape, like, generator):
    return low + (high - low) * torch.rand(shape, device=like.device, generator=generator)


def whole(x):
    """Round to the 256 levels that a picture has."""
    return (x * 255).round() / 255


def gaussian_noise(x, sigma, generator):
    return x + sigma * normal(x, generator)


def shot_noise(x, photons, generator):
    return torch.poisson(x * photons, generator) / photons


def impulse_noise(x, share, generator):
    """Salt and pepper."""
    u = uniform(0, 1, x.shape, x, generator)
    return x.masked_fill(u < share / 2, 0).masked_fill(u > 1 - share / 2, 1)


def speckle_noise(x, sigma, generator):
    return x + sigma * x * normal(x, generator)


@functools.cache
def gaussian_matrix(size, sigma, device, cut, mirrored):
    """[size, size]: blur of an axis by a Gaussian, as scipy's: cut off at so many deviations, mirrored at its ends or
    with the last value repeated."""
    reach = int(cut * sigma + 0.5)
    taps = torch.arange(-reach, reach + 1)
    weights = (-0.5 * (taps / max(sigma, 1e-6)) ** 2).exp()
    source = torch.arange(size).view(-1, 1) + taps
    folded = torch.minimum(source % (2 * size), 2 * size - 1 - source % (2 * size))
    source = folded if mirrored else source.clamp(0, size - 1)
    matrix = torch.zeros(size, size).scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))
    return matrix.to(device)


def blur(x, sigma, cut=4, mirrored=False):
    """Gaussian blur of [B, K, H, W], sigma in pixels: a matrix for each axis."""
    height, width = (gaussian_matrix(size, sigma, x.device, cut, mirrored) for size in x.shape[2:])
    return torch.einsum("bkhw,ih,jw->bkij", x, height, width)


def gaussian_blur(x, sigma, generator):
    return blur(x, sigma)


def defocus_blur(x, constants, generator):
    """Convolution with a disc, itself blurred by a 3×3 Gaussian against aliasing."""
    radius, alias = constants
    reach = math.floor(radius) + 1
    squares = torch.arange(-reach, reach + 1) ** 2
    disc = (squares + squares.view(-1, 1) <= radius**2).float()
    soft = (-0.5 * (torch.arange(-1, 2) / alias) ** 2).exp()
    kernel = F.conv2d((disc / disc.sum())[None, None], torch.outer(soft, soft)[None, None] / soft.sum() ** 2, padding=1)
    x = F.pad(x, (reach,) * 4, mode="reflect").contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, kernel.to(x.device).expand(3, -1, -1, -1), groups=3).contiguous()


def glass_blur(x, constants, generator):
    """Each pixel takes the value of one up to `shift` above and left of it, `rounds` times, between two blurs.

    The published generator sets out to swap the two pixels, but its swap overwrites one before it is read: a copy.
    """
    sigma, shift, rounds = constants
    count, _, height, width = x.shape
    place = torch.arange(height * width, device=x.device).view(height, width)
    pixels = blur(x, sigma).flatten(2)
    for _ in range(rounds):
        draw = (2, count, height - 2 * shift, width - 2 * shift)
        up, left = torch.randint(-shift, shift, draw, device=x.device, generator=generator)
        source = place.repeat(count, 1, 1)
        source[:, shift + 1 : height - shift + 1, shift + 1 : width - shift + 1] += up * width + left
        pixels = pixels.gather(2, source.view(count, 1, -1).expand_as(pixels))
    return blur(pixels.view_as(x), sigma)


def trail(x, radius, sigma, degrees):
    """Motion blur as ImageMagick's: [B, K, H, W] drawn out one way at `degrees` [B], fading as half a Gaussian."""
    reach = 2 * radius
    steps = torch.arange(reach + 1.0)
    weights = (-0.5 * (steps / sigma) ** 2).exp()
    steps, angle = steps.view(-1, 1).to(x.device), degrees * (math.pi / 180)
    down, right = ((steps * part - 0.5).ceil().long() + reach for part in (angle.sin(), angle.cos()))
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    windows = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # a view, shifted images
    rows = torch.arange(len(x), device=x.device)
    return sum(w * windows[rows, :, down[i], right[i]] for i, w in enumerate((weights / weights.sum()).tolist()))


def motion_blur(x, constants, generator):
    return whole(trail(x, *constants, uniform(-45, 45, len(x), x, generator)))


def middle(x, size):
    """The middle of [B, K, H, W], `size` = [H', W'] of it."""
    top, left = ((large - small) // 2 for large, small in zip(x.shape[2:], size))
    return x[..., top : top + size[0], left : left + size[1]]


def zoomed(x, factor):
    """The middle of [B, K, H, W] enlarged `factor` times, linearly, to the same size."""
    inner = [math.ceil(side / factor) for side in x.shape[2:]]
    large = [round(side * factor) for side in inner]
    return middle(F.interpolate(middle(x, inner), large, mode="bilinear", align_corners=True), x.shape[2:])


def zoom_blur(x, end, generator):
    x = x.contiguous(memory_format=torch.channels_last)  # faster to interpolate
    zooms = np.arange(1, end, 0.01).tolist()  # numpy's rounding decides whether `end` is one of them
    return (x + sum(zoomed(x, zoom) for zoom in zooms)).contiguous() / (len(zooms) + 1)


def snow(x, constants, generator):
    mean, std, zoom, threshold, radius, sigma, keep = constants
    flakes = zoomed(mean + std * normal(x[:, :1], generator), zoom)
    flakes = flakes.masked_fill(flakes < threshold, 0).clamp(0, 1)
    flakes = trail(flakes, radius, sigma, uniform(-135, -45, len(x), x, generator))
    red, green, blue = x.unbind(1)
    gray = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    return keep * x + (1 - keep) * torch.maximum(x, 1.5 * gray + 0.5) + flakes + flakes.flip(2, 3)


@functools.cache
def frost_texture(size, device):
    """A frosted pane [3, size, size] in [0, 1], in place of CIFAR-C's photographs, which do not ship.

    Ferns of ice, each with a spine and branches at 60°, that meet where they have grown towards each other.
    """
    generator = torch.Generator().manual_seed(0)
    seeds = size * torch.rand(size**2 // 400, 2, generator=generator)
    angle = 2 * math.pi * torch.rand(len(seeds), generator=generator)
    axis = torch.arange(size) + 0.5
    dy, dx = axis.view(-1, 1, 1) - seeds[:, 0], axis.view(1, -1, 1) - seeds[:, 1]
    nearest = (dx**2 + dy**2).argmin(2, keepdim=True)
    cos, sin = angle.cos(), angle.sin()
    along = (cos * dx + sin * dy).gather(2, nearest)[..., 0]
    across = (cos * dy - sin * dx).gather(2, nearest)[..., 0].abs()
    branches = 0.5 + 0.5 * torch.cos((along.abs() - across / math.tan(math.pi / 3)) * (2 * math.pi / 4.5))
    ice = 0.2 + 0.7 * (-across / 1.2).exp() + 0.7 * branches * (-across / 10).exp()
    clouds = blur(torch.randn(1, 1, size, size, generator=generator), 5)[0, 0]
    ice = ice * (0.85 + 0.3 * clouds / clouds.std()) * (0.75 + 0.5 * torch.rand(size, size, generator=generator))
    ice = ice.clamp(0, 1) * torch.tensor([0.85, 0.95, 1.0]).view(3, 1, 1)
    return (0.4 + 0.6 * ice).to(device)  # as bright as the photographs, whose mean level is 157 … 176 of 255


def frost(x, constants, generator):
    keep, amount = constants
    height, width = x.shape[2:]
    pane = frost_texture(max(height, width) + 224, x.device)
    windows = pane.unfold(1, height, 1).unfold(2, width, 1)  # a view: [3, tops, lefts, H, W]
    top, left = (torch.randint(n, (len(x),), device=x.device, generator=generator) for n in windows.shape[1:3])
    return keep * x + amount * windows[:, top, left].transpose(0, 1)


def plasma(x, decay, generator):
    """Plasma fractal by midpoint displacement on a torus: [B, 1, H, W] in [0, 1] for images x."""
    count, _, height, width = x.shape
    size = 2 ** math.ceil(math.log2(max(height, width)))
    field = torch.zeros(count, size, size, device=x.device)
    step, amplitude = size, 1.0

    def displaced(total, amplitude):
        return total / 4 + uniform(-amplitude, amplitude, total.shape, x, generator)

    while step > 1:
        half = step // 2
        corners = field[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centres = displaced(pairs + pairs.roll(-1, 2), amplitude)
        sides = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        field[:, half::step, half::step] = centres
        field[:, ::step, half::step] = displaced(sides, amplitude)
        sides = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        field[:, half::step, ::step] = displaced(sides, amplitude)
        step, amplitude = half, amplitude / decay**2  # CIFAR-C's displacement is the square of what it decays
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    return ((field - low) / (high - low)).unsqueeze(1)[..., :height, :width]


def fog(x, constants, generator):
    amount, decay = constants
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma(x, decay, generator)) * (brightest / (brightest + amount))


def mean_of_nine(x):
    return F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)


def spatter(x, constants, generator):
    """Drops of water that catch the light, or mud.

    CIFAR-C takes the drops' height from an edge detector and a distance transform; here a drop is as high as the number
    of times that a pixel of rim can be taken off.
    """
    mean, std, sigma, threshold, amount, mud = constants
    liquid = blur(mean + std * normal(x[:, :1], generator), sigma)
    wet = (liquid > threshold).float()
    if mud:
        cover = blur(wet, amount)
        cover = cover.masked_fill(cover < 0.8, 0)
        return x * (1 - cover) + cover * torch.tensor([63, 42, 20], device=x.device).view(3, 1, 1) / 255
    height = inside = wet
    for _ in range(3):
        inside = 1 - F.max_pool2d(1 - inside, 3, 1, padding=1)
        height = height + inside
    # From the upper left. With 0.9 in the middle the mean distances are CIFAR-C's to 15 %; CIFAR-C itself has 1.
    light = torch.tensor([[-2, -1, 0], [-1, 0.9, 1], [0, 1, 2]], device=x.device)[None, None]
    relief = F.conv2d(F.pad(mean_of_nine(height), (1,) * 4, mode="replicate"), light).clamp(min=0)
    drops = liquid * wet * mean_of_nine(relief)
    drops = drops / drops.amax((2, 3), keepdim=True).clamp(min=1e-6)
    return x + amount * drops * torch.tensor([175, 238, 238], device=x.device).view(3, 1, 1) / 255


def brightness(x, amount, generator):
    """HSV's value plus `amount`; with hue and saturation kept, that scales the pixel, and makes black gray."""
    value = x.amax(1, keepdim=True)
    new = (value + amount).clamp(0, 1)
    return torch.where(value > 0, x * (new / value.clamp(min=1e-6)), new)


def contrast(x, factor, generator):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def saturate(x, constants, generator):
    """HSV's saturation times, plus; with hue and value kept, that stretches the channels' distance from the largest."""
    factor, plus = constants
    value = x.amax(1, keepdim=True)
    below = (value - x) / value.clamp(min=1e-6)
    saturation = below.amax(1, keepdim=True)
    red = torch.tensor([0.0, 1, 1], device=x.device).view(3, 1, 1)  # the hue that HSV gives to gray
    below = torch.where(saturation > 0, below / saturation.clamp(min=1e-6), red)
    return value * (1 - below * (factor * saturation + plus).clamp(0, 1))


def box_matrix(size, new):
    """[new, size]: an axis resampled with Pillow's box filter, the mean of the pixels whose centres lie in the box."""
    scale = size / new
    distance = torch.arange(size) + 0.5 - (torch.arange(new) + 0.5).view(-1, 1) * scale
    half = max(scale, 1) / 2
    weights = ((distance > -half) & (distance <= half)).float()
    return weights / weights.sum(1, keepdim=True)


def pixelate(x, share, generator):
    sides = [(side, int(side * share)) for side in x.shape[2:]]
    height, width = ((box_matrix(b, a) @ box_matrix(a, b)).to(x.device) for a, b in sides)
    return whole(torch.einsum("bkhw,ih,jw->bkij", x, height, width))


JPEG_TABLES = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99"""


def jpeg_compression(x, quality, generator):
    """The lossy half of JPEG: YCbCr, chroma at half resolution, DCT of 8×8 pixels, rounding to the tables' grain."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([int(v) for v in JPEG_TABLES.split()], device=x.device).view(2, 8, 8)
    grain = ((tables * scale + 50) / 100).floor().clamp(1, 255)
    k = torch.arange(8.0, device=x.device)
    dct = torch.cos((2 * k + 1) * k.view(-1, 1) * (math.pi / 16)) / 2
    dct[0] /= math.sqrt(2)

    def coded(plane, grain):
        blocks = plane.unfold(2, 8, 8).unfold(3, 8, 8) - 128
        frequencies = torch.einsum("bkmnij,ui,vj->bkmnuv", blocks, dct, dct)
        frequencies = (frequencies / grain).round() * grain
        blocks = torch.einsum("bkmnuv,ui,vj->bkminj", frequencies, dct, dct)
        return blocks.reshape(plane.shape).add(128).round().clamp(0, 255)

    height, width = x.shape[2:]
    x = F.pad((x * 255).round(), (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = x.split(1, 1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    chroma = torch.cat([(blue - luma) / 1.772, (red - luma) / 1.402], 1) + 128
    luma, chroma = coded(luma, grain[0]), coded(F.avg_pool2d(chroma, 2).round(), grain[1])
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear") - 128
    cb, cr = chroma.split(1, 1)
    rgb = torch.cat([luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb], 1)
    return rgb[..., :height, :width].round() / 255


def sampled(x, points, repeat):
    """x [B, K, H, W] at `points` [B, H, W, 2], (x, y) in pixels, linearly. Beyond its border x is mirrored: c b a b c,
    or with `repeat` the border pixel comes twice: b a a b."""
    size = torch.tensor([x.shape[3], x.shape[2]], device=x.device)
    grid = (2 * points + 1) / size - 1 if repeat else 2 * points / (size - 1) - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=not repeat)


def elastic_transform(x, constants, generator):
    """A random affine map, given by where three points go, then a smooth random displacement."""
    count, _, height, width = x.shape
    side = min(height, width)
    amount, smoothness, jitter = (share * side for share in constants)
    rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) for n in (height, width)), indexing="ij")
    points = torch.stack([columns, rows], -1).float()  # [H, W, 2]
    third = torch.tensor([[1.0, 1], [1, -1], [-1, -1]], device=x.device) * (side // 3)
    before = third + torch.tensor([width // 2, height // 2], device=x.device)
    after = before + uniform(-jitter, jitter, (count, 3, 2), x, generator)
    inverse = torch.linalg.solve(F.pad(after, (0, 1), value=1.0), before.expand(count, 3, 2))  # after -> before
    x = sampled(x, torch.einsum("hwi,bij->bhwj", F.pad(points, (0, 1), value=1.0), inverse), repeat=False)
    if amount == 0:
        return x
    shift = amount * blur(uniform(-1, 1, (count, 2, height, width), x, generator), smoothness, 3, True)
    return sampled(x, points + shift.permute(0, 2, 3, 1), repeat=True)


CORRUPTIONS = {
    "gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise,
    "speckle_noise": speckle_noise, "gaussian_blur": gaussian_blur, "defocus_blur": defocus_blur,
    "glass_blur": glass_blur, "motion_blur": motion_blur, "zoom_blur": zoom_blur, "snow": snow, "frost": frost,
    "fog": fog, "spatter": spatter, "brightness": brightness, "contrast": contrast, "saturate": saturate,
    "pixelate": pixelate, "jpeg_compression": jpeg_compression, "elastic_transform": elastic_transform,
}  # fmt: skip


def read_cifar_c(folder, subjects):
    """The official CIFAR-10-C: {corruption: memory map uint8 [50000, 32, 32, 3]}, severities in blocks of 10,000.

    Raises UsageError for a file of `folder` that is missing or of another shape, and where labels.npy does not repeat
    the labels of every subject's test set.
    """
    arrays = {}
    for name in [*CORRUPTIONS, "labels"]:
        path, shape = folder / f"{name}.npy", (50000,) if name == "labels" else (50000, 32, 32, 3)
        if not path.exists():
            raise UsageError(f"--cifar-c: no file {path}; --cifar-c without a folder generates the corruptions")
        arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        if arrays[name].shape != shape:
            raise UsageError(f"--cifar-c: {path} is {list(arrays[name].shape)}, not {list(shape)}")
    for subject in subjects:
        labels = subject.data.test_labels.cpu().numpy()
        blocks = arrays["labels"].reshape(5, 10000)[:, evenly_spaced(10000, len(labels)).numpy()]
        if not all(np.array_equal(block, labels) for block in blocks):
            raise UsageError(f"--cifar-c: {folder}/labels.npy are not the labels of {subject.test_set}")
    return arrays


# ---------------------------------------------------------------------------------------------------------------- CINIC

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def load_cinic(folder, data_dir, seed, per_class=2100):
    """The ImageNet images of CINIC-10 (Darlow et al. 2018): uint8 [N, 3, 32, 32], and int64 [N] in CIFAR-10's order.

    The seed draws `per_class` PNG files of each class below `folder`, in whatever split, whose names do not start with
    "cifar10-". They stay in data_dir as .npz, which is read the next time, whatever `folder` is then.
    Raises UsageError for a class with too few images.
    """
    path = data_dir / f"cinic10-imagenet-{per_class}-seed{seed}.npz"
    if not path.exists():
        from PIL import Image

        random, files = np.random.default_rng(seed), []
        for name in CIFAR10:
            found = sorted(f for f in folder.glob(f"**/{name}/*.png") if not f.name.startswith("cifar10-"))
            if len(found) < per_class:
                raise UsageError(f"--cinic: {folder} has {len(found)} images of ImageNet for {name}, not {per_class}")
            files += [found[i] for i in random.permutation(len(found))[:per_class]]
        images = [np.asarray(Image.open(file).convert("RGB")) for file in common.progress(files, "reading CINIC-10")]
        with common.atomic_write(path) as partial:
            np.savez(partial, images=np.stack(images).transpose(0, 3, 1, 2))
    with np.load(path) as saved:
        return torch.from_numpy(saved["images"]), torch.arange(len(CIFAR10)).repeat_interleave(per_class)


# ---------------------------------------------------------------------------------------------------- what is evaluated


@dataclasses.dataclass(eq=False)
class Subject:
    """A trained model, the test set it is evaluated on, and what has been measured."""

    path: str  # of the file of weights; the name of published ones
    file: Path  # the JSON that keeps the results …
    key: str  # … under this: the sha256 of the weights, and what else decides the model's answers
    config: dict  # the flags of training
    model: nn.Module  # in evaluation mode, without gradients
    dataset: str
    data: common.Dataset
    batch_size: int
    by_batch: bool = False  # BatchNorm normalises by the batch at hand
    numbers: dict = dataclasses.field(default_factory=dict)  # {column of the tables: number}
    results: dict = dataclasses.field(default_factory=dict)  # {"clean", a corruption or "transfer": what is measured}

    @functools.cached_property
    def test_set(self):
        """shapes, 1,000 test images; of a file of one's own, which may change, with its sha256."""
        text = f"{self.dataset}, {len(self.data.test_labels):,} test images"
        return f"{text} (sha256 {digest(self.dataset)[:8]})" if self.dataset.endswith(".npz") else text

    @functools.cached_property
    def right(self):
        """bool [N]: the test images that are classified correctly."""
        logits = predict(self.model, self.data.test_images, batch_size=self.batch_size)
        return logits.argmax(1) == self.data.test_labels


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_run(path, part, args, device, load_dataset, flag="CKPT"):
    """The Subject in `part` ("model", "ema", …) of a run's checkpoint.

    Raises UsageError where it is no checkpoint, has not this part, or has other classes than the data set.
    """
    checkpoint = common.load_checkpoint(path, flag)
    if part not in checkpoint["built_as"]:
        raise UsageError(f"--part: {path} has no {part!r}; it has {', '.join(checkpoint['built_as'])}")
    config, dataset = checkpoint["config"], args.dataset or checkpoint["dataset"]
    data_dir = args.data_dir or config["data_dir"]
    sizes = config.get("resize", 256), config.get("image_size", 224)
    data = load_dataset(dataset, data_dir, 1, args.limit_test, device, *sizes)
    for theirs, ours in itertools.zip_longest(checkpoint["classes"], data.classes, fillvalue="none"):
        if theirs != ours:
            raise UsageError(f"--dataset: {dataset} has class {ours!r} where {path} has {theirs!r}")
    model = common.load_model(checkpoint, part, device).requires_grad_(False)
    key, by_batch = f"{digest(path)} {part}", checkpoint.get("batch_norm") == "current"
    batch_size = args.batch_size or common.EVAL_BATCH[device.type]
    if by_batch:
        batch_size = args.batch_size or 500  # on every device: the answers depend on it
        key += f", batches of {batch_size}"
        print(f"{path}: BatchNorm normalises by the batch at hand, --batch-size {batch_size}")
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    results = path.with_name("evaluation.json")
    return Subject(str(path), results, key, config, model, dataset, data, batch_size, by_batch)


def load_weights(path, args, device, load_dataset):
    """The Subject in other people's weights, the state_dict at `path`; None: in those that torchvision publishes.

    Raises UsageError for an unknown architecture, weights that do not fit it, and another number of classes.
    """
    data = load_dataset(args.dataset, args.data_dir or "data", 1, args.limit_test, device)
    num_classes, mean, std = args.num_classes or len(data.classes), args.mean, args.std
    name, state = args.arch or args.torchvision, read_weights(path) if path else None
    try:
        if args.arch:
            model = common.build_model(name, num_classes, 0.0, mean, std, data.image_size)
            state = {"mean": model.mean, "std": model.std} | state  # a file from elsewhere has none
        else:
            from torchvision import models, transforms

            if path:
                model = models.get_model(name, num_classes=num_classes)
            else:
                weights = models.get_model_weights(name).DEFAULT
                mean, std = weights.transforms().mean, weights.transforms().std
                model = models.get_model(name, weights=weights)
        if path:
            model.load_state_dict(state)
    except (ValueError, RuntimeError, OSError) as error:  # an unknown name; other shapes or keys; no network
        raise UsageError(f"CKPT: {path or 'no file'} as {name}: {textwrap.shorten(str(error), 400)}") from None
    if args.torchvision:
        model = nn.Sequential(transforms.Normalize(mean, std), model)
    model = model.to(device).eval().requires_grad_(False)
    outputs = predict(model, data.test_images[:1]).shape[1]
    if outputs != len(data.classes):
        raise UsageError(f"--dataset: {args.dataset} has {len(data.classes)} classes, {path or name} has {outputs}")
    results = path.with_suffix(".evaluation.json") if path else args.out / f"{name}.evaluation.json"
    key = f"{digest(path) if path else 'published'} {name}, mean {mean}, std {std}"
    config = {"script": path.stem if path else name, "weights": str(path), "seed": None}
    batch_size = args.batch_size or common.EVAL_BATCH[device.type]
    return Subject(str(path or name), results, key, config, model, args.dataset, data, batch_size)


def read_weights(path):
    """The state_dict in a file, wherever a training script, DataParallel or torch.compile have put it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # no file, or whatever a foreign one makes the unpickler raise
        raise UsageError(f"CKPT: {path} is no file of weights that loads safely ({type(error).__name__})") from None
    for key in ("state_dict", "model_state_dict", "model", "net"):
        state = state.get(key, state)
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state.items()}


def grouped(subjects):
    """[(name, subjects that differ in their seed alone)]: the rows of the tables.

    A name is the script and every flag that has another value in another row: "nrd loss=ce rate=0.8".
    """
    apart = ("seed", "out", "resume", "device", "data_dir", "name", "commit", "torch")
    groups = {}
    for subject in subjects:
        flags = {flag: value for flag, value in subject.config.items() if flag not in apart}
        groups.setdefault(json.dumps(flags), (flags, []))[1].append(subject)
    rows = []
    for flags, members in groups.values():
        name = flags["script"]
        for flag, value in flags.items():
            if flag != "script" and any(other.get(flag, value) != value for other, _ in groups.values()):
                name += f" {flag}={value}"
        rows.append((name, members))
    return rows


# ----------------------------------------------------------------------------------------------------- what is measured


def measured(subject, settings, needed, function, *arguments):
    """The result of a measurement, a dict with the keys `needed`: from subject.file, or function(subject, *arguments).

    The file is JSON, {subject.key: {settings: result}}.
    """
    name = json.dumps({"data": subject.test_set, **settings}, ensure_ascii=False)
    result = read_json(subject.file).get(subject.key, {}).get(name, {})
    if any(key not in result for key in needed):
        result |= function(subject, *arguments)
        saved = read_json(subject.file)  # again: another process may have written meanwhile
        saved.setdefault(subject.key, {})[name] = result
        write_json(subject.file, saved)
    return result


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_json(path, content):
    with common.atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def evaluate_images(subject, images, labels):
    """Accuracy in percent, ECE with its bins (Guo et al. 2017), NLL in nats, Brier score (summed over classes).

    images: uint8 [N, 3, H, W]; labels: int64 [N].
    """
    logits = predict(subject.model, images, batch_size=subject.batch_size).double()
    p = logits.softmax(1)
    ece, accuracy, confidence, share = common.calibration(p, labels)
    return {
        "accuracy": common.accuracy(p, labels),
        "ece": ece,
        "nll": F.cross_entropy(logits, labels).item(),
        "brier": (p - F.one_hot(labels, p.shape[1])).square().sum(1).mean().item(),
        "bins": {"accuracy": accuracy, "confidence": confidence, "share": share},
    }


BLOCK = 2**26  # values that are attacked at once: 256 MB, more than all of CIFAR's


def evaluate_pgd(subject, eps, args):
    """Accuracy in percent under PGD of each number of steps in args.pgd, in the worst of args.restarts random starts.

    A sample is lost to PGD-k if any point visited in the first k steps, the start included, is misclassified; so one
    trajectory serves all step counts. It leaves the work as soon as no step to come could change its result, except
    where it is part of its batch's statistics. Returns {column of the tables: accuracy}.
    """
    images, labels, model = subject.data.test_images, subject.data.test_labels, subject.model
    longest, size = max(args.pgd), max(1, BLOCK // images[0].numel())
    withstood = longest * subject.right.long()  # int64 [N]: the largest of the step counts that a sample withstands
    below = [max((k for k in args.pgd if k < step), default=0) for step in range(longest + 1)]
    turns = list(itertools.product(range(0, len(labels), size), range(args.restarts), range(longest + 1)))
    for start, restart, step in common.progress(turns, f"PGD, ε {eps_name(eps)}, on {subject.path}"):
        block = slice(start, start + size)
        if step == 0:
            clean = to_float(images[block].to(labels.device))
            seed = args.seed + restart + args.restarts * (start // size)
            x = random_start(clean, eps, torch.Generator(clean.device).manual_seed(seed))
        true, left = labels[block], withstood[block]  # views
        at_stake = (left >= max(step, 1)) | subject.by_batch
        for rows in evenly_split(at_stake.nonzero().squeeze(1), subject.batch_size):
            if step < longest:
                logits, x[rows] = ascend(model, x[rows], clean[rows], true[rows], eps, args.step_size)
            else:
                with torch.no_grad():
                    logits = model(x[rows])
            lost = logits.argmax(1) != true[rows]
            left[rows] = torch.where(lost, left[rows].clamp(max=below[step]), left[rows])
    return {pgd_column(k, eps): 100 * (withstood >= k).double().mean().item() for k in args.pgd}


def corrupted_images(test_sets, official, name, seed, test_set, severity):
    """test_sets[test_set] corrupted, uint8 [N, 3, H, W]: from the arrays of read_cifar_c, or generated (None)."""
    images = test_sets[test_set]
    if official is None:
        return corrupt(images, name, severity, seed)
    rows = 10000 * (severity - 1) + evenly_spaced(10000, len(images)).numpy()
    return torch.from_numpy(official[name][rows]).permute(0, 3, 1, 2).to(images.device)


def evaluate_corruption(subject, corrupted):
    """Accuracy in percent on images corrupted with severity 1 … 5, and natural robustness: two lists of 5.

    Natural robustness is the accuracy among the samples classified correctly when clean (Gu et al. 2019), NaN if there
    are none. corrupted: a function of the name of the test set and the severity that gives the images.
    """
    result = {"accuracy": [], "natural_robustness": []}
    for severity in range(1, 6):
        images = corrupted(subject.test_set, severity)
        hit = predict(subject.model, images, batch_size=subject.batch_size).argmax(1) == subject.data.test_labels
        result["accuracy"].append(100 * hit.double().mean().item())
        result["natural_robustness"].append(100 * hit[subject.right].double().mean().item())
    return result


def evaluate_transfer(source, targets, args):
    """Success rate in percent on each target of PGD-20 on `source`: {target.key: rate}, NaN where nothing counts.

    What counts are the samples that source and target both classify correctly. The attack succeeds where the target
    misclassifies the adversarial image. On the source itself that is the white-box success rate.
    """
    images, labels = source.data.test_images, source.data.test_labels
    generator = torch.Generator(labels.device).manual_seed(args.seed)
    missed = torch.zeros(len(targets), len(labels), dtype=torch.bool, device=labels.device)
    batches = evenly_split(source.right.nonzero().squeeze(1), source.batch_size)
    for rows in common.progress(batches, f"transfer, ε {eps_name(args.eps[0])}, from {source.path}"):
        clean = to_float(images[rows.to(images.device)].to(labels.device))
        adversarial = pgd(source.model, clean, labels[rows], args.eps[0], args.step_size, 20, generator)
        for i, target in enumerate(targets):
            with torch.no_grad():
                missed[i, rows] = target.model(adversarial).argmax(1) != labels[rows]
    rates = {}
    for i, target in enumerate(targets):
        both = source.right & target.right
        rates[target.key] = 100 * missed[i, both].double().mean().item()
    return rates


def measure_corruptions(subjects, args, official):
    """CIFAR-C of all subjects; those of one test set share the corrupted images, which are made once."""
    source = "official" if official else "generated"
    test_sets = {subject.test_set: subject.data.test_images for subject in subjects}
    for name in common.progress(list(CORRUPTIONS), f"CIFAR-C, {source}"):
        corrupted = functools.cache(functools.partial(corrupted_images, test_sets, official, name, args.seed))
        settings = {"measure": name, "source": source, "seed": None if official else args.seed}
        for subject in subjects:
            subject.results[name] = measured(subject, settings, ["accuracy"], evaluate_corruption, corrupted)
    for subject in subjects:
        subject.numbers[f"mCA, {source} (%)"] = averages(subject, "accuracy")["mean"]
        subject.numbers["natural robustness (%)"] = averages(subject, "natural_robustness")["mean"]


def measure(subject, args, cinic):
    """Put what the flags ask for, but CIFAR-C and transferability, into subject.numbers and subject.results."""
    data = subject.data
    clean = measured(subject, {"measure": "clean"}, ["accuracy"], evaluate_images, data.test_images, data.test_labels)
    subject.results["clean"], subject.numbers["accuracy (%)"] = clean, clean["accuracy"]
    if args.ece:
        subject.numbers |= {"ECE": clean["ece"], "NLL": clean["nll"], "Brier": clean["brier"]}
    if cinic:
        settings = {"measure": "CINIC", "images": len(cinic[1]), "seed": args.seed}
        subject.numbers["CINIC (%)"] = measured(subject, settings, ["accuracy"], evaluate_images, *cinic)["accuracy"]
    if args.pgd:
        for eps in args.eps:
            settings = {"measure": "PGD", "eps": eps, "step_size": args.step_size}
            settings |= {"restarts": args.restarts, "seed": args.seed}
            columns = [pgd_column(steps, eps) for steps in args.pgd]
            result = measured(subject, settings, columns, evaluate_pgd, eps, args)
            subject.numbers |= {column: result[column] for column in columns}


# ------------------------------------------------------------------------------------------------------------ reporting


def eps_name(eps):
    """8/255 for 0.0313725…, the decimal for 0.031."""
    return f"{eps * 255:.0f}/255" if math.isclose(eps * 255, round(eps * 255), abs_tol=1e-6) else f"{eps:.4g}"


def pgd_column(steps, eps):
    return f"PGD-{steps}, ε {eps_name(eps)} (%)"


def averages(subject, kind, severities=(1, 2, 3, 4, 5)):
    """{corruption: mean over severities}, and last their mean, which for kind "accuracy" is mCA."""
    means = {name: statistics.fmean(subject.results[name][kind][k - 1] for k in severities) for name in CORRUPTIONS}
    return means | {"mean": statistics.fmean(means.values())}


def statistic(members, column):
    """Mean, sample standard deviation (None of one) and number of a column over subjects, as a dict."""
    values = [subject.numbers[column] for subject in members]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}


def cell(members, column):
    """94.28, or 94.28 ± 0.09 (5) for five seeds."""
    mean, std, n = statistic(members, column).values()
    digits = 4 if column in ("ECE", "NLL", "Brier") else 2
    return f"{mean:.{digits}f}" if n == 1 else f"{mean:.{digits}f} ± {std:.{digits}f} ({n})"


def print_table(heading, columns, rows):
    """heading: of the first column. columns: names. rows: [(name, a text for each column)]. Nine columns at a time."""
    lines = [(heading, columns), *rows]
    first = max(len(name) for name, _ in lines)
    for start in range(0, len(columns), 9):
        texts = [line[start : start + 9] for _, line in lines]
        widths = [max(len(text) for text in column) for column in zip(*texts)]
        print()
        for (name, _), line in zip(lines, texts):
            print(name.ljust(first), *(text.rjust(width) for text, width in zip(line, widths)), sep="  ")


def report(args, groups, teacher):
    """Print the tables, draw the pictures and return the summary. groups: of `grouped`. teacher: a list."""
    subjects = [subject for _, members in groups for subject in members]
    test_sets = "; ".join(sorted({subject.test_set for subject in subjects}))
    columns = list(subjects[0].numbers)
    print_table(test_sets, columns, [(name, [cell(members, c) for c in columns]) for name, members in groups])
    summary = {"test_set": test_sets, "models": {}}
    for name, members in groups:
        numbers = {column: statistic(members, column) for column in columns}
        summary["models"][name] = {"checkpoints": [subject.path for subject in members], **numbers}

    if args.ece:
        draw_reliability(args.out / "reliability.png", groups)
    if len(args.pgd) * len(args.eps) > 1:
        draw_pgd(args.out / "pgd.png", groups, args.pgd, args.eps)
    if args.cifar_c is not None:
        draw_corruptions(args.out / "cifar-c.png", groups, args.cifar_c or "generated here")
    if args.transfer:
        summary["transfer"] = report_transfer(args, groups, teacher)
    return summary


def report_transfer(args, groups, teacher):
    """The matrix of KD Beyond's Figure 1: targets in rows, sources in columns, the teacher after the mean."""
    names, subjects = [], []
    for name, members in groups:
        for subject in members:
            names.append(name if len(members) == 1 else f"{name} seed {subject.config['seed']}")
            subjects.append(subject)
    values = []
    for target in subjects:
        rates = [source.results["transfer"][target.key] for source in subjects]
        own = [source.results["transfer"][target.key] for source in teacher]
        values.append([*rates, statistics.fmean(rates), *own])
    values.append([statistics.fmean(column) for column in zip(*values)])
    numbers = [str(i) for i in range(1, len(names) + 1)]
    rows = [*(f"{number}: {name}" for number, name in zip(numbers, names)), "mean"]
    columns = [*numbers, "mean", *("teacher" for _ in teacher)]
    heading = f"{subjects[0].test_set}: success rate (%), source → / target ↓"
    print_table(heading, columns, [(name, [f"{v:.2f}" for v in row]) for name, row in zip(rows, values)])
    with picture(args.out / "transfer.png", 6 + 0.8 * len(columns), 2.5 + 0.45 * len(rows)) as figure:
        axes = figure.subplots()
        heat_map(axes, values, rows, columns, f"success rate (%), PGD-20, ε = {eps_name(args.eps[0])}")
        axes.set(xlabel="source", ylabel="target")
    return {"rows are targets": rows, "columns are sources": columns, "success_rate": values}


# ------------------------------------------------------------------------------------------------------------- pictures


@contextlib.contextmanager
def picture(path, width, height):
    """Yield an empty figure of that size in inches, which is written to `path` at the end of the block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with common.atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)
    print(f"wrote {path}")


def wrapped(text, width):
    return "\n".join(textwrap.wrap(text, width))


def heat_map(axes, values, rows, columns, title):
    """Numbers in coloured cells; NaN leaves a cell empty."""
    values = np.array(values)
    axes.imshow(values, cmap="viridis", aspect="auto")
    known = values[~np.isnan(values)]
    for (i, j), v in np.ndenumerate(values):
        if not math.isnan(v):
            dark = v < (known.min() + known.max()) / 2
            axes.text(j, i, f"{v:.1f}", ha="center", va="center", color="w" if dark else "k")
    axes.set_title(title, parse_math=False)
    axes.set_yticks(range(len(rows)), [wrapped(name, 50) for name in rows], parse_math=False)
    axes.set_xticks(range(len(columns)), [wrapped(name, 25) for name in columns], parse_math=False, rotation=90)


def draw_reliability(path, groups):
    """Reliability diagrams, one a group, the bins of its seeds pooled."""
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    with picture(path, 4 * columns, 4.2 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (name, members) in zip(panels, groups):
            bins = [subject.results["clean"]["bins"] for subject in members]
            share, acc, conf = (np.array([b[key] for b in bins]) for key in ("share", "accuracy", "confidence"))
            total = share.sum(0).clip(1e-12)
            acc, conf, share = (share * acc).sum(0) / total, (share * conf).sum(0) / total, share.mean(0)
            edges, width = np.linspace(0, 1, len(share) + 1), 1 / len(share)
            axes.bar(edges[:-1], acc, width, align="edge", color="tab:blue", edgecolor="w", label="accuracy")
            gap = {"color": "none", "edgecolor": "tab:red", "hatch": "////", "label": "gap to confidence"}
            axes.bar(edges[:-1], conf - acc, width, bottom=acc, align="edge", **gap)
            axes.stairs(share, edges, color="k", label="share of samples")
            axes.plot([0, 1], [0, 1], "k--", lw=1)
            axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
            axes.set_title(wrapped(f"{name}, ECE {cell(members, 'ECE')}", 45), fontsize="medium", parse_math=False)
        panels[0].legend(loc="upper left", fontsize="small")
        for axes in panels[len(groups) :]:
            axes.axis("off")


def draw_pgd(path, groups, steps, eps):
    """Accuracy under attack against the number of steps, for each ε, and against ε, for the largest number of steps."""
    import matplotlib

    sweeps = []  # x axis, its ticks, their names, {end of a line's name: the line's columns in the tables}
    if len(steps) > 1:
        lines = {f", ε {eps_name(e)}": [pgd_column(k, e) for k in steps] for e in eps}
        sweeps.append(("PGD steps", steps, steps, lines))
    if len(eps) > 1:
        lines = {"": [pgd_column(steps[-1], e) for e in eps]}
        sweeps.append((f"ε of PGD-{steps[-1]}", eps, [eps_name(e) for e in eps], lines))
    colours = matplotlib.colormaps["tab10" if len(groups) <= 10 else "tab20"].colors
    entries = len(groups) * max(len(lines) for *_, lines in sweeps)
    with picture(path, 8.5 * len(sweeps), max(4.5, 0.3 * entries)) as figure:
        for axes, (label, ticks, names, lines) in zip(figure.subplots(1, len(sweeps), squeeze=False).flat, sweeps):
            for (name, members), colour in zip(groups, itertools.cycle(colours)):
                for (end, columns), style in zip(lines.items(), itertools.cycle(("-", "--", "-.", ":"))):
                    stats = [statistic(members, column) for column in columns]
                    means, deviations = [s["mean"] for s in stats], [s["std"] or 0 for s in stats]
                    options = {"color": colour, "linestyle": style, "marker": ".", "label": wrapped(name + end, 30)}
                    axes.errorbar(ticks, means, deviations, capsize=3 if len(members) > 1 else 0, **options)
            axes.set(ylim=(0, None), ylabel="accuracy under attack (%)", xlabel=label)
            axes.set_xscale("symlog", linthresh=min(tick for tick in ticks if tick > 0))
            axes.set_xticks(ticks, names, rotation=45)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            for text in axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)).get_texts():
                text.set_parse_math(False)


def draw_corruptions(path, groups, source):
    """Figure 3 of Noise as a Resource: corruption by model; for a single model, corruption by severity."""
    with picture(path, 5 + 1.6 * max(5, len(groups)), 9) as figure:
        figure.suptitle(f"CIFAR-C, {source}", parse_math=False)
        robust = "natural robustness: accuracy (%) where\nthe clean image is classified right"
        titles = {"accuracy": "accuracy (%)", "natural_robustness": robust}
        for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
            columns = {}
            if len(groups) == 1:
                for k in range(1, 6):
                    columns[f"severity {k}"] = [averages(subject, kind, [k]) for subject in groups[0][1]]
            for name, members in groups:
                columns["mean" if len(groups) == 1 else name] = [averages(subject, kind) for subject in members]
            rows = [*CORRUPTIONS, "mean"]
            values = [[statistics.fmean(of[row] for of in column) for column in columns.values()] for row in rows]
            heat_map(axes, values, rows, list(columns), title)


def show_corruptions(path, images, seed):
    """A contact sheet: a corruption a row, clean and severity 1 … 5 of the images uint8 [N, 3, H, W], one or two."""
    side = images.shape[3] + 2
    rows = []
    for name in CORRUPTIONS:
        row = torch.stack([images, *(corrupt(images, name, severity, seed) for severity in range(1, 6))], 1)
        rows.append(torch.cat(list(F.pad(row.flatten(0, 1), (1, 1, 1, 1), value=255)), 2))
    with picture(path, 13, 19.5) as figure:
        axes = figure.subplots()
        axes.imshow(torch.cat(rows, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes.set_yticks([(i + 0.5) * side for i in range(len(CORRUPTIONS))], list(CORRUPTIONS))
        axes.set_xticks([(i + 0.5) * side for i in range(6 * len(images))], ["clean", *"12345"] * len(images))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


# ----------------------------------------------------------------------------------------------------------------- main


def main(args):
    """Evaluate what the flags name; returns what is written to summary.json."""
    device = common.setup(args)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.backends.cudnn.allow_tf32 = False
    load_dataset = functools.cache(common.load_dataset)

    if args.arch or args.torchvision:
        subjects = [load_weights(path, args, device, load_dataset) for path in args.checkpoints or [None]]
    else:
        subjects = [load_run(path, args.part, args, device, load_dataset) for path in args.checkpoints]
    teacher = []
    if args.teacher:
        teacher.append(load_run(args.teacher, "model", args, device, load_dataset, "--teacher"))
    if args.transfer and len({subject.test_set for subject in subjects + teacher}) > 1:
        raise UsageError("--transfer: the checkpoints have different test sets; --dataset NAME takes one for all")
    official = read_cifar_c(Path(args.cifar_c), subjects) if args.cifar_c else None
    cinic = None
    if args.cinic:
        for subject in subjects:
            if list(subject.data.classes) != CIFAR10:
                raise UsageError(f"--cinic: has the classes of cifar10, not those of {subject.test_set}")
        cinic = [part.to(device) for part in load_cinic(args.cinic, args.data_dir or Path("data"), args.seed)]

    if args.show_corruptions:
        own = subjects[0].data if subjects else load_dataset(args.dataset or "shapes", args.data_dir or "data")
        images = own.test_images
        show_corruptions(args.out / "corruptions.png", images[evenly_spaced(len(images), 2)], args.seed)
    if not subjects:
        return {}
    for subject in subjects:
        measure(subject, args, cinic)
    if args.cifar_c is not None:
        measure_corruptions(subjects, args, official)
    if args.transfer:
        keys = [target.key for target in subjects]
        settings = {"measure": "transfer", "eps": args.eps[0], "step_size": args.step_size, "seed": args.seed}
        for source in subjects + teacher:
            source.results["transfer"] = measured(source, settings, keys, evaluate_transfer, subjects, args)
    summary = report(args, grouped(subjects), teacher)
    write_json(args.out / "summary.json", summary)
    print(f"wrote {args.out / 'summary.json'}")
    return summary


if __name__ == "__main__":
    try:
        main(parse_args())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what is not measured yet", file=sys.stderr)
        sys.exit(130)
