"""Evaluate any checkpoint: PGD, CIFAR-C, CINIC-10, calibration and the transferability of adversarial examples.

    python evaluate.py CKPT                                          # clean accuracy, ECE, PGD-20
    python evaluate.py CKPT … --pgd 1 5 10 15 20 100 200 1000 --eps 8/255   # Table 4: more and more steps
    python evaluate.py CKPT … --pgd 20 --eps 1/255 2/255 10/255 20/255 25/255 50/255 100/255 200/255      # Table 5
    python evaluate.py CKPT … --cifar-c CIFAR-10-C --cinic CINIC-10  # mCA and CINIC columns, Figure 3
    python evaluate.py CKPT … --transfer --teacher TEACHER_CKPT      # Figure 1 of KD Beyond Model Compression
    python evaluate.py --show-corruptions --dataset cifar10          # what --cifar-c does without a folder

CKPT is the checkpoint.pt of a run folder; put checkpoints first. Those that differ only in their seed are reported as
mean ± sample standard deviation (n). Everything goes to --out (default: beside the first CKPT): evaluation.json, PNGs.
The parts done stay in evaluation.json: the same command, or a larger one, does only what is missing.

Arani, Sarfraz, Zonooz: Noise as a Resource for Learning in Knowledge Distillation (sections 2.2-2.4, Tables 1-6,
Figures 2 and 3). Sarfraz, Arani, Zonooz: Knowledge Distillation Beyond Model Compression (section IV-D, Figure 1).
Shon et al.: Neural Vicinal Risk Minimization (Figure 5: calibration).

Other people's weights: --arch NAME --num-classes N weights.pt (a state_dict for common.build_model) or --torchvision
NAME [weights.pt] (a torchvision model; without a file its published ImageNet weights), each with --dataset.

Everything is float32 in evaluation mode with deterministic convolutions, on CUDA as on the CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import statistics
import sys
import textwrap
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torchvision.datasets.folder import pil_loader

import common
from common import UsageError, number, predict, to_float

# ------------------------------------------------------------------------------------------------------------ arguments


def fraction(text):
    """argparse type: a float in [0, 1], written as 0.031 or as 8/255."""
    top, _, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1] like 0.031 or 8/255")
    return value


def parse_args():
    parser = common.Parser(__doc__)
    parser.add_argument(
        "checkpoints", nargs="*", type=Path, metavar="CKPT", help="checkpoint.pt, or the folder, of runs"
    )
    parser.add_argument("--part", default="model", help='which weights of CKPT: "model" (default), "ema", …')

    add = parser.add_argument_group("what to run (default: clean accuracy, --ece and --pgd 20)").add_argument
    add("--ece", action="store_true", help="ECE (15 equal-width bins), NLL, Brier score, reliability diagram")
    add(
        "--pgd",
        nargs="*",
        type=number(int, 1, 100_000),
        metavar="STEPS",
        help="l∞ PGD of so many steps; several: a sweep",
    )
    add("--eps", nargs="+", type=fraction, default=[0.031], help="radius in [0, 1], several: a sweep (default: 0.031)")
    add("--step-size", type=fraction, default=0.003, help="in [0, 1] (default: 0.003)")
    add("--restarts", type=number(int, 1, 100), default=5, help="random starts, the worst counts (default: 5)")
    add("--cifar-c", nargs="?", const="", metavar="DIR", help="19 corruptions: the official .npy files, else generated")
    add("--cinic", type=Path, metavar="DIR", help="the ImageNet images of CINIC-10, 2,100 a class")
    add("--transfer", action="store_true", help="adversarial images of each checkpoint on each other")
    add("--teacher", type=Path, metavar="CKPT", help="--transfer: one more source, in a column of its own")
    add("--show-corruptions", action="store_true", help="write corruptions.png, a contact sheet")

    add = parser.add_argument_group("data, machine and output").add_argument
    add("--dataset", help="as in the training scripts (default: what CKPT was trained on)")
    add("--data-dir", type=Path, metavar="DIR", help="where data sets are kept (default: as in training)")
    add("--limit-test", type=number(int, 1), metavar="N", help="use N evenly spaced test samples (default: all)")
    add(
        "--seed",
        type=number(int, 0, 2**62),
        default=0,
        help="of random starts, corruptions, CINIC's choice (default: 0)",
    )
    add("--batch-size", type=number(int, 1), help="images a forward pass (default: 125 on a CPU, else 500)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--out", type=Path, metavar="DIR", help="where results go (default: the folder of the first CKPT)")

    add = parser.add_argument_group("other people's weights").add_argument
    add("--arch", help="CKPT is a state_dict for this architecture of common.build_model")
    add("--torchvision", metavar="NAME", help="a torchvision model: weights CKPT, or its published ones without")
    add("--num-classes", type=number(int, 2), metavar="N", help="outputs of that model")
    add(
        "--mean",
        nargs=3,
        type=number(float, -1e9),
        default=[0, 0, 0],
        help="what it subtracts from each channel in [0, 1] …",
    )
    add("--std", nargs=3, type=number(float, 0), default=[1, 1, 1], help="… and then divides by")
    parser.set_defaults(amp=False)  # float32 throughout
    args = parser.parse_intermixed_args()

    paths = (path / "checkpoint.pt" if path.is_dir() else path for path in args.checkpoints)
    args.checkpoints = list(dict.fromkeys(paths))
    foreign = "--arch" if args.arch else "--torchvision" if args.torchvision else None
    if args.arch and args.torchvision:
        raise UsageError("--arch, --torchvision: name one of the two")
    if foreign and not args.dataset:
        raise UsageError(f"--dataset: {foreign} does not tell what to evaluate on; add --dataset NAME")
    if args.arch and not args.checkpoints:
        raise UsageError("--arch: name a file of weights too: --arch NAME --num-classes N weights.pt")
    if foreign and args.checkpoints and not args.num_classes:
        raise UsageError(f"--num-classes: {foreign} with a file of weights needs the number of classes")
    if min(args.std) == 0:
        raise UsageError("--std: must be above 0")
    if not args.checkpoints and not foreign and not (args.show_corruptions and args.dataset):
        raise UsageError("CKPT: name the checkpoint.pt of a run folder, before the other flags (--help explains)")
    if args.transfer and len(args.checkpoints) + (args.teacher is not None) < 2:
        raise UsageError("--transfer: takes two or more checkpoints")
    if args.teacher and not args.transfer:
        raise UsageError("--teacher: is for --transfer; add it")
    if args.transfer and len(args.eps) > 1:
        raise UsageError("--eps: --transfer takes one")
    chosen = args.ece, args.pgd is not None, args.cifar_c is not None, args.cinic, args.transfer, args.show_corruptions
    if not any(chosen):
        args.ece, args.pgd = True, []
    args.pgd = [] if args.pgd is None else sorted(set(args.pgd)) or [20]
    args.eps = sorted(set(args.eps))
    args.out = args.out or (args.checkpoints[0].parent if args.checkpoints else Path("runs") / "evaluation")
    return args


def progress(items, label):
    """Yield the items of a list; on a terminal keep a line with the share done and the time left; end with a line."""
    live, began, shown = sys.stdout.isatty(), time.perf_counter(), 0.0
    short = label[: shutil.get_terminal_size().columns - 25]
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if live and now - shown > 0.2:
            left = common.duration((now - began) / done * (len(items) - done))
            print(f"\r{short}  {100 * done / len(items):.0f} %  {left} left\x1b[K", end="", flush=True)
            shown = now
    start, end = ("\r", "\x1b[K") if live else ("", "")
    with contextlib.suppress(OSError):  # a reader that has gone must not cost the result
        print(f"{start}{label}  took {common.duration(time.perf_counter() - began)}{end}", flush=True)


# ------------------------------------------------------------------------------------------------------------------ PGD


def input_gradient(model, x, labels):
    """Logits [B, C], and the gradient of the cross-entropy with respect to x, float [B, 3, H, W], alone."""
    x = x.detach().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)
    return logits.detach(), gradient


def ascend(x, clean, gradient, eps, step_size):
    """One step of PGD: along the gradient's sign, then back into the ball around `clean` and into [0, 1]."""
    return (x + step_size * gradient.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)


def random_start(clean, eps, generator):
    """A uniform draw from the l∞ ball of radius eps around images float [..., H, W], clipped to [0, 1]."""
    noise = torch.rand(clean.shape, device=clean.device, generator=generator)
    return (clean + eps * (2 * noise - 1)).clamp(0, 1)


@torch.enable_grad()
def pgd(model, images, labels, eps=0.031, step_size=0.003, steps=20, generator=None):
    """Projected gradient descent (Madry et al. 2018), l∞, from one random start: the adversarial images.

    model: logits of float images, in evaluation mode. images: float [B, 3, H, W] in [0, 1]; labels: int64 [B].
    eps, step_size: in [0, 1]. generator: of the random start, on the images' device; None: the global one.
    Returns float [B, 3, H, W], within eps of `images` and within [0, 1].
    """
    images = images.detach()
    x = random_start(images, eps, generator)
    for _ in range(steps):
        _, gradient = input_gradient(model, x, labels)
        x = ascend(x, images, gradient, eps, step_size)
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
    "zoom_blur": (1.05, 1.10, 1.15, 1.20, 1.25),  # largest zoom
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
    """CIFAR-C's corruption `name` of uint8 images [N, 3, H, W], H and W at least 16: the same, on the same device.

    severity: 1 … 5. The same seed gives the same pixels on the same kind of device, whatever images follow: each
    thousand has a generator of its own.
    Raises UsageError for an unknown name or severity.
    """
    if name not in SEVERITIES:
        raise UsageError(f"corruption: {common.unknown(name, list(SEVERITIES))}")
    if severity not in (1, 2, 3, 4, 5):
        raise UsageError(f"corruption: severity {severity} is not one of 1, 2, 3, 4, 5")
    function, constants = CORRUPTIONS[name], SEVERITIES[name][severity - 1]
    parts = []
    for i, part in enumerate(images.split(1000)):
        parts.append(function(to_float(part), constants, torch.Generator(images.device).manual_seed(seed + i)))
    return torch.cat([(part * 255).round().clamp(0, 255).byte() for part in parts])


def normal(like, generator):
    return torch.randn(like.shape, device=like.device, generator=generator)


def uniform(low, high, shape, like, generator):
    return low + (high - low) * torch.rand(shape, device=like.device, generator=generator)


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
    return trail(x, *constants, uniform(-45, 45, len(x), x, generator))


def middle(x, size):
    """The middle of [B, K, H, W], `size` = [H', W'] of it."""
    top, left = ((large - small) // 2 for large, small in zip(x.shape[2:], size))
    return x[..., top : top + size[0], left : left + size[1]]


def zoomed(x, factor):
    """The middle of [B, K, H, W] enlarged `factor` times, linearly, to the same size."""
    inner = [math.ceil(side / factor) for side in x.shape[2:]]
    large = [round(side * factor) for side in inner]
    return middle(F.interpolate(middle(x, inner), large, mode="bilinear", align_corners=True), x.shape[2:])


def zoom_blur(x, largest, generator):
    x = x.contiguous(memory_format=torch.channels_last)  # faster to interpolate
    zooms = [1 + 0.01 * i for i in range(round((largest - 1) * 100) + 1)]
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
    return (ice.clamp(0, 1) * torch.tensor([0.85, 0.95, 1.0]).view(3, 1, 1)).to(device)


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
    while step > 1:
        half = step // 2

        def displaced(total, amplitude=amplitude):
            return total / 4 + uniform(-amplitude, amplitude, total.shape, x, generator)

        corners = field[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centres = displaced(pairs + pairs.roll(-1, 2))
        field[:, half::step, half::step] = centres
        field[:, ::step, half::step] = displaced(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        field[:, half::step, ::step] = displaced(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, amplitude = half, amplitude / decay**2  # CIFAR-C's displacement is the square of what it decays
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    return ((field - low) / (high - low)).unsqueeze(1)[..., :height, :width]


def fog(x, constants, generator):
    amount, decay = constants
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma(x, decay, generator)) * (brightest / (brightest + amount))


def spatter(x, constants, generator):
    """Drops of water that catch the light on their rims, or mud. CIFAR-C takes the drops' relief from an edge detector
    and a distance transform; here it is the smoothed outline."""
    mean, std, sigma, threshold, amount, mud = constants
    liquid = blur(mean + std * normal(x[:, :1], generator), sigma)
    wet = (liquid > threshold).float()
    if mud:
        cover = blur(wet, amount)
        cover = cover.masked_fill(cover < 0.8, 0)
        return x * (1 - cover) + cover * torch.tensor([63, 42, 20], device=x.device).view(3, 1, 1) / 255
    light = torch.tensor([[-2.0, -1, 0], [-1, 0, 1], [0, 1, 2]], device=x.device)[None, None]  # on the upper left rims
    relief = F.avg_pool2d(F.pad(wet, (1,) * 4, mode="replicate"), 3, 1)
    relief = F.conv2d(F.pad(relief, (1,) * 4, mode="replicate"), light).clamp(min=0)
    drops = liquid * wet * F.avg_pool2d(F.pad(relief, (1,) * 4, mode="replicate"), 3, 1)
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
    return torch.einsum("bkhw,ih,jw->bkij", x, height, width)


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
    return rgb[..., :height, :width] / 255


def sampled(x, points):
    """x [B, K, H, W] at `points` [B, H, W, 2], (x, y) in pixels, linearly, mirrored at its border pixels."""
    size = torch.tensor([x.shape[3], x.shape[2]], device=x.device)
    grid = points * 2 / (size - 1) - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


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
    x = sampled(x, torch.einsum("hwi,bij->bhwj", F.pad(points, (0, 1), value=1.0), inverse))
    if amount == 0:
        return x
    shift = amount * blur(uniform(-1, 1, (count, 2, height, width), x, generator), smoothness, 3, True)
    return sampled(x, points + shift.permute(0, 2, 3, 1))


CORRUPTIONS = {name: globals()[name] for name in SEVERITIES}


def official_corruptions(folder, subjects):
    """The CIFAR-10-C files in `folder`: {name: memory map uint8 [50000, 32, 32, 3]}, severities in blocks of 10,000.

    Raises UsageError for a file that is missing or of another form, and where labels.npy does not repeat the labels of
    every subject's test set.
    """
    arrays = {}
    for name in [*SEVERITIES, "labels"]:
        path = Path(folder) / f"{name}.npy"
        shape, kind = ((50000,), "iu") if name == "labels" else ((50000, 32, 32, 3), "u")
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise UsageError(f"--cifar-c: no {path}; --cifar-c without a folder generates the corruptions") from None
        except Exception as error:  # whatever a damaged or foreign file makes numpy raise
            raise UsageError(f"--cifar-c: {path} cannot be read as .npy ({type(error).__name__})") from None
        found = arrays[name]
        if not isinstance(found, np.ndarray):
            raise UsageError(f"--cifar-c: {path} is an archive, not a .npy file")
        if found.shape != shape or found.dtype.kind not in kind or kind == "u" and found.itemsize > 1:
            wanted = "integer [50000]" if name == "labels" else f"uint8 {list(shape)}"
            raise UsageError(f"--cifar-c: {path} is {found.dtype} {list(found.shape)}, not {wanted}")
    labels = arrays.pop("labels").reshape(5, 10000)
    for subject in subjects:
        own = subject.test.test_labels.cpu().numpy()
        if len(own) > 10000 or (labels[:, common.spread(10000, len(own)).numpy()] != own).any():
            raise UsageError(f"--cifar-c: {folder}/labels.npy are not the labels of {subject.dataset}'s test set")
    return arrays


def corrupted_images(official, images, name, severity, seed):
    """`images` uint8 [N, 3, H, W] corrupted: from official_corruptions' arrays; generated where that is None."""
    if official is None:
        return corrupt(images, name, severity, seed)
    rows = 10000 * (severity - 1) + common.spread(10000, len(images)).numpy()
    return torch.from_numpy(official[name][rows]).permute(0, 3, 1, 2).contiguous().to(images.device)


# ---------------------------------------------------------------------------------------------------------------- CINIC

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cinic(folder, data_dir, seed, per_class=2100):
    """The ImageNet images of CINIC-10 (Darlow et al. 2018): uint8 [N, 3, 32, 32], and int64 [N] in CIFAR-10's order.

    Drawn by seed are `per_class` of each class's PNG files below `folder`, in whatever split, whose names do not start
    with "cifar10-". Cached in data_dir as .npz. Raises UsageError for a class with too few images and for a bad image.
    """
    if not folder.is_dir():
        raise UsageError(f"--cinic: no folder {folder}")
    random, files = np.random.default_rng(seed), []
    found = {name: [] for name in CIFAR10}
    for path in sorted(folder.rglob("*.png")):
        if path.parent.name in found and not path.name.startswith("cifar10-"):
            found[path.parent.name].append(path.relative_to(folder).as_posix())
    for name, paths in found.items():
        if len(paths) < per_class:
            few = f"{len(paths)} images of ImageNet for class {name}"
            raise UsageError(f"--cinic: {folder} has {few}, {per_class} are needed: …/{name}/*.png, not cifar10-*.png")
        files += [paths[i] for i in sorted(random.permutation(len(paths))[:per_class])]
    labels = torch.arange(len(CIFAR10)).repeat_interleave(per_class)
    cache = data_dir / f"cinic10-imagenet-{per_class}-seed{seed}.npz"
    stats = [(folder / file).stat() for file in files]
    files_now = [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in zip(files, stats)]
    if cache.exists():
        try:
            with np.load(cache, allow_pickle=False) as saved:
                if saved["files"].tolist() == files_now:
                    return torch.from_numpy(saved["images"]), labels
        except Exception:  # damaged or foreign: made again
            print(f"{cache} cannot be used; making it again")
    images = torch.empty(len(files), 3, 32, 32, dtype=torch.uint8)
    for i in progress(range(len(files)), "reading CINIC-10"):
        try:
            image = torch.from_numpy(np.array(pil_loader(folder / files[i]))).permute(2, 0, 1)
        except (OSError, SyntaxError, ValueError):  # as Pillow has it
            image = None
        if image is None or image.shape != images[i].shape:
            raise UsageError(f"--cinic: {folder / files[i]} is no 32×32 PNG image; unpack CINIC-10 again")
        images[i] = image
    with common.replacing(cache) as partial:
        np.savez(partial, images=images.numpy(), files=np.array(files_now))
    return images, labels


# ---------------------------------------------------------------------------------------------------- what is evaluated


@dataclasses.dataclass(eq=False)
class Subject:
    """A trained model, the test set it is evaluated on, and its results."""

    path: str
    sha256: str  # of the file, and which part of it
    model: nn.Module
    dataset: str
    data_dir: Path
    method: str
    config: dict  # the training flags that make the experiment
    seed: int | None
    test: common.Dataset | None = None
    data: str = ""  # name, size and fingerprint of the test set
    clean: dict = dataclasses.field(default_factory=dict)  # what evaluate_clean returns
    pgd: dict = dataclasses.field(default_factory=dict)  # {eps: what evaluate_pgd returns}
    corruptions: dict = dataclasses.field(default_factory=dict)  # {name: what evaluate_corruption returns}
    cinic: dict = dataclasses.field(default_factory=dict)  # {"accuracy": percent}
    transfer: dict = dataclasses.field(default_factory=dict)  # what evaluate_transfer returns
    by_batch: bool = False  # BatchNorm on the statistics of each batch
    batch_size: int = common.PASS["cpu"]

    @functools.cached_property
    def right(self):
        """bool [N]: the test images that are classified correctly."""
        logits = predict(self.model, self.test.test_images, batch_size=self.batch_size)
        return logits.argmax(1) == self.test.test_labels


def load_subject(path, args, device, flag="CKPT", part="model"):
    """The Subject in a run's checkpoint; UsageError where it is none or lacks the part asked for."""
    try:
        checkpoint = common.load_checkpoint(path, flag)
    except UsageError as error:
        raise UsageError(f"{error}; other people's weights take --arch or --torchvision") from None
    config, apart = checkpoint["config"], ("seed", *common.Run.SAME_RUN)
    try:
        parts = [k for k, v in checkpoint.items() if isinstance(v, dict) and v.keys() == checkpoint["model"].keys()]
        parts += [k for k in checkpoint.get("archs", {}) if k not in parts]
        model = common.load_model(checkpoint, part if part in parts else "model", device).requires_grad_(False)
        digest, by_batch = f"{file_digest(path)} {part}", checkpoint.get("batch_norm") == "current"
        size = args.batch_size or common.PASS[device.type]
        if by_batch:  # its accuracy holds on the statistics of the batch
            common.current_statistics(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
            size = args.batch_size or 500  # on every device
            digest += f", batches of {size}"
            print(f"{path}: BatchNorm on the statistics of each batch (--batch-size {size})")
        subject = Subject(
            str(path), digest, model, args.dataset or checkpoint["dataset"],
            args.data_dir or Path(config["data_dir"]), checkpoint["method"],
            {k: v for k, v in config.items() if k not in apart}, config["seed"],
            by_batch=by_batch, batch_size=size,
        )  # fmt: skip
    except (UsageError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        fault = f"does not fit together ({type(error).__name__}): {str(error)[:80]}"
        raise UsageError(f"{flag}: {path} {fault}; name a checkpoint that these scripts wrote") from None
    if part not in parts:
        raise UsageError(f"--part: {path}: {common.unknown(part, parts)}")
    return subject


def load_foreign(path, args, device):
    """The Subject in other people's weights at `path`, or (None) torchvision's published ones; UsageError likewise."""
    mean, std, library = args.mean, args.std, torchvision.models
    name = args.arch or args.torchvision
    if args.arch:
        model = common.build_model(name, args.num_classes, 0.0, mean, std)
    elif name not in library.list_models(library):
        raise UsageError(f"--torchvision: {common.unknown(name, library.list_models(library))}")
    elif path:
        model = library.get_model(name, num_classes=args.num_classes)
    else:
        weights = library.get_model_weights(name).DEFAULT
        mean, std = weights.transforms().mean, weights.transforms().std
        try:
            model = library.get_model(name, weights=weights)
        except Exception as error:  # whatever the network makes torch.hub raise
            raise UsageError(f"--torchvision: no weights of {name} from the network ({error}); name a file") from None
    if path:
        state, wanted = read_weights(path), model.state_dict()
        if args.arch:  # a file from elsewhere has no mean and std: the flags have
            state = {key: wanted[key] for key in ("mean", "std")} | state
        shapes, fitting = ({key: tuple(value.shape) for key, value in s.items()} for s in (state, wanted))
        wrong = [key for key in {**fitting, **shapes} if shapes.get(key) != fitting.get(key)]
        if wrong:
            first = [f"{k} ({shapes.get(k, 'none')} there, {fitting.get(k, 'none')} here)" for k in wrong[:3]]
            raise UsageError(f"CKPT: {path} does not fit {name}: {', '.join(first)}, {len(wrong)} in all")
        model.load_state_dict(state)
    if args.torchvision:
        model = nn.Sequential(torchvision.transforms.Normalize(mean, std), model)
    return Subject(
        str(path or name), f"{file_digest(path) if path else 'published'} {name} {mean} {std}",
        model.to(device).eval().requires_grad_(False),
        args.dataset, args.data_dir or Path("data"), path.stem if path else name, {}, None,
        batch_size=args.batch_size or common.PASS[device.type],
    )  # fmt: skip


def read_weights(path):
    """The state_dict in a file, wherever a training script, DataParallel or torch.compile have put it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"CKPT: no file {path}") from None
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        raise UsageError(f"CKPT: {path} is no file of weights that loads safely ({type(error).__name__})") from None
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = (
        {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)} if isinstance(state, dict) else {}
    )
    if not tensors:
        raise UsageError(f"CKPT: {path} holds no state_dict; torch.save(model.state_dict(), …) writes one")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in tensors.items()}


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def grouped(subjects):
    """{label: subjects that differ in their seed alone}.

    A label is the method and, where methods repeat, the first training flags that tell them apart: "sr sigma=0.05".
    """
    groups = {}
    for subject in subjects:
        same = json.dumps([subject.method, subject.config, None if subject.config else subject.path], sort_keys=True)
        groups.setdefault(same, []).append(subject)
    labelled = {}
    for members in groups.values():
        label, config = members[0].method, members[0].config
        rivals = [other[0].config for other in groups.values() if other[0].method == label and other is not members]
        for flag in sorted(
            config, key=("epochs", "batch_size", "lr", "weight_decay").__contains__
        ):  # consequences last
            alike = [rival for rival in rivals if rival.get(flag) == config[flag]]
            label += f" {flag}={config[flag]}" * (len(alike) < len(rivals))
            rivals = alike
        labelled[f"{label} ({members[0].path})" if label in labelled else label] = members
    return labelled


def check_fit(subject):
    """Give the test set its fingerprint; UsageError where the model cannot take its images or has other classes."""
    images, labels = subject.test.test_images, subject.test.test_labels
    content = hashlib.sha256(images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()
    subject.data = f"{common.data_name(str(subject.dataset))}, {len(labels)} images, sha256 {content[:16]}"
    try:
        logits = predict(subject.model, images[:2])
    except Exception as error:  # whatever a network says to images of a size it was not made for
        raise UsageError(f"CKPT: {subject.path} does not take {subject.dataset}'s images: {error}") from None
    theirs, ours = logits.shape[1], len(subject.test.classes)
    if theirs != ours:
        raise UsageError(f"CKPT: {subject.path} has {theirs} classes, {subject.dataset} {ours}")
    if not logits.isfinite().all():
        raise UsageError(f"CKPT: {subject.path} answers NaN: its training went wrong; train it again with a lower --lr")


class Evaluation:
    """evaluation.json: what has been measured of which model, so that nothing is measured twice."""

    def __init__(self, folder):
        self.path, self.summary, self.parts = folder / "evaluation.json", {}, []
        self.save()  # finds out now whether that can be read and written

    def part(self, name, subject, settings, function, *arguments, needed=()):
        """function(*arguments), a dict; taken from the file where that part of that model is done in these settings and
        has the keys `needed`."""
        head = {"part": name, "sha256": subject.sha256, "settings": {"data": subject.data, **settings}}
        for old in self.parts:
            if all(old[key] == head[key] for key in head) and set(needed) <= old["result"].keys():
                return old["result"]
        self.parts.append({**head, "checkpoint": subject.path, "result": function(*arguments)})
        self.save()
        return self.parts[-1]["result"]

    def save(self):
        """Write the summary and the parts, with those that another process may have added."""
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            usable = isinstance(saved["parts"], list)
            usable &= all({"part", "sha256", "settings", "result"} <= part.keys() for part in saved["parts"])
        except FileNotFoundError:
            saved, usable = {"parts": []}, True
        except (ValueError, KeyError, TypeError, AttributeError):
            usable = False
        if not usable:
            raise UsageError(f"--out: {self.path} is no evaluation of this script; name another folder")
        known = saved.pop("parts")
        self.parts = known + [part for part in self.parts if part not in known]
        self.summary = self.summary or saved
        with common.replacing(self.path) as partial:
            partial.write_text(json.dumps({**self.summary, "parts": self.parts}, indent=1) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- what is measured


def evaluate_clean(subject):
    """Accuracy in percent, ECE with its bins (Guo et al. 2017), NLL in nats, Brier score (summed over classes)."""
    logits = predict(subject.model, subject.test.test_images, batch_size=subject.batch_size).double()
    p, labels = logits.softmax(1), subject.test.test_labels
    ece, *bins = common.calibration(p, labels)
    return {
        "accuracy": common.accuracy(p, labels),
        "ece": ece,
        "nll": F.cross_entropy(logits, labels).item(),
        "brier": (p - F.one_hot(labels, p.shape[1])).square().sum(1).mean().item(),
        "bins": dict(zip(("accuracy", "confidence", "share"), bins)),
    }


BLOCK = 2**26  # values that are attacked at once: 256 MB, more than all of CIFAR's


def evaluate_pgd(subject, eps, args):
    """Accuracy in percent under PGD of each number of steps in args.pgd, in the worst of args.restarts random starts.

    A sample is lost to PGD-k if any point visited in the first k steps, the start included, is misclassified; so one
    trajectory serves all step counts. It leaves the work as soon as no step to come could change its result, except
    where it is part of its batch's statistics.
    """
    images, labels = subject.test.test_images, subject.test.test_labels
    longest = max(args.pgd)
    below = [max((k for k in args.pgd if k < step), default=0) for step in range(longest + 1)]
    survived = longest * subject.right.long()  # the largest of the step counts that each sample withstands
    blocks = torch.arange(len(labels), device=images.device).split(max(1, BLOCK // images[0].numel()))
    turns = list(itertools.product(range(len(blocks)), range(args.restarts), range(longest + 1)))
    for i, restart, step in progress(turns, f"PGD, ε {eps_name(eps)}, on {subject.path}"):
        block = blocks[i]
        if step == 0:
            clean = to_float(images[block])
            seed = args.seed + restart + args.restarts * i
            x = random_start(clean, eps, torch.Generator(clean.device).manual_seed(seed))
        at_stake = (survived[block] >= max(step, 1)) | subject.by_batch
        for rows in common.even_batches(at_stake.nonzero().squeeze(1), subject.batch_size):
            here = block[rows]
            truth = labels[here]
            if step < longest:
                logits, gradient = input_gradient(subject.model, x[rows], truth)
                x[rows] = ascend(x[rows], clean[rows], gradient, eps, args.step_size)
            else:
                with torch.no_grad():
                    logits = subject.model(x[rows])
            lost = logits.argmax(1) != truth
            survived[here] = torch.where(lost, survived[here].clamp(max=below[step]), survived[here])
    return {str(k): 100 * (survived >= k).double().mean().item() for k in args.pgd}


def evaluate_corruption(subject, corrupted):
    """Accuracy in percent on corrupted(severity), uint8 [N, 3, H, W], for severities 1 … 5, and natural robustness.

    That is the same among the samples classified correctly when clean (Gu et al. 2019), null if there are none.
    """
    hits = [
        predict(subject.model, corrupted(severity), batch_size=subject.batch_size).argmax(1) == subject.test.test_labels
        for severity in range(1, 6)
    ]
    given = [hit[subject.right].double() for hit in hits]
    return {
        "accuracy": [100 * hit.double().mean().item() for hit in hits],
        "natural_robustness": [100 * hit.mean().item() if len(hit) else None for hit in given],
    }


def evaluate_cinic(subject, images, labels):
    return {"accuracy": common.accuracy(predict(subject.model, images, batch_size=subject.batch_size), labels)}


def evaluate_transfer(source, targets, args):
    """Success rate in percent on each target of PGD-20 on `source`: {target's sha256: rate}, null where nothing counts.

    What counts are the samples that source and target both classify correctly; the attack succeeds where the target
    misclassifies the adversarial image. On the source itself that is the white-box success rate.
    """
    images, labels = source.test.test_images, source.test.test_labels
    generator = torch.Generator(images.device).manual_seed(args.seed)
    fooled, both = dict.fromkeys(targets, 0), dict.fromkeys(targets, 0)
    rows = common.even_batches(source.right.nonzero().squeeze(1), source.batch_size)
    for part in progress(rows, f"transfer, ε {eps_name(args.eps[0])}, from {source.path}"):
        attack = args.eps[0], args.step_size, 20, generator
        adversarial = pgd(source.model, to_float(images[part]), labels[part], *attack)
        for target in targets:
            with torch.no_grad():
                wrong = target.model(adversarial).argmax(1) != labels[part]
            fooled[target] += (wrong & target.right[part]).sum()  # stays on the device
            both[target] += target.right[part].sum()
    return {t.sha256: 100 * int(fooled[t]) / int(both[t]) if both[t] else None for t in targets}


# ------------------------------------------------------------------------------------------------------------ reporting


def eps_name(eps):
    """8/255 for 0.0313725…, the decimal for 0.031."""
    return f"{eps * 255:.0f}/255" if math.isclose(eps * 255, round(eps * 255), abs_tol=1e-6) else f"{eps:.4g}"


def mean(values):
    """Of those that are not None; None of none."""
    values = [v for v in values if v is not None]
    return statistics.fmean(values) if values else None


def mean_std(values):
    """Mean, sample standard deviation (None of one value) and number of the values that are not None."""
    values = [v for v in values if v is not None]
    return mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def cell(values, digits=2):
    """94.28, or 94.28 ± 0.09 (5) for five seeds, or – for none."""
    centre, std, n = mean_std(values)
    return f"{centre:.{digits}f} ± {std:.{digits}f} ({n})" if n > 1 else f"{centre:.{digits}f}" if n else "–"


def print_table(heading, columns, rows):
    """columns: names; rows: {name: a text for each column}."""
    widths = [max(map(len, texts)) for texts in zip(columns, *rows.values())]
    first = max(map(len, [heading, *rows]))
    print()
    for name, texts in ((heading, columns), *rows.items()):
        print(name.ljust(first), *(text.rjust(width) for text, width in zip(texts, widths)), sep="  ")


def averages(subject, kind, severities=(1, 2, 3, 4, 5)):
    """{corruption: mean over severities}, and last their mean, which for kind "accuracy" is mCA."""
    means = {name: mean(subject.corruptions[name][kind][k - 1] for k in severities) for name in SEVERITIES}
    return means | {"mean": mean(means.values())}


def report(args, groups, teacher):
    """Print the tables, draw the pictures, and return the summary for evaluation.json."""
    subjects = [subject for members in groups.values() for subject in members]
    metrics = {"accuracy (%)": lambda s: s.clean["accuracy"]}
    if args.ece:
        metrics |= {name: lambda s, name=name: s.clean[name.lower()] for name in ("ECE", "NLL", "Brier")}
    if args.cinic:
        metrics["CINIC (%)"] = lambda s: s.cinic["accuracy"]
    if args.cifar_c is not None:
        metrics[f"mCA, {'official' if args.cifar_c else 'generated'} (%)"] = lambda s: averages(s, "accuracy")["mean"]
        metrics["natural robustness (%)"] = lambda s: averages(s, "natural_robustness")["mean"]
    for eps, steps in itertools.product(args.eps, args.pgd):
        metrics[f"PGD-{steps}, ε {eps_name(eps)} (%)"] = lambda s, eps=eps, steps=steps: s.pgd[eps][str(steps)]

    values = {
        label: {name: [f(s) for s in members] for name, f in metrics.items()} for label, members in groups.items()
    }
    sweep = len(args.pgd) * len(args.eps) > 1
    names = [name for name in metrics if not (sweep and name.startswith("PGD"))]
    digits = {"ECE": 4, "NLL": 4, "Brier": 4}
    print_table("model", names, {label: [cell(of[n], digits.get(n, 2)) for n in names] for label, of in values.items()})
    if sweep:  # Table 4 has a column for each number of steps, Table 5 for each ε
        columns, lines = (args.eps, [args.pgd[0]]) if len(args.pgd) == 1 else (args.pgd, args.eps)
        rows = {}
        for (label, members), line in itertools.product(groups.items(), lines):
            keys = [(column, line) if columns is args.eps else (line, column) for column in columns]
            name = label if columns is args.eps else f"{label}, ε {eps_name(line)}"
            rows[name] = [cell([s.pgd[eps][str(steps)] for s in members]) for eps, steps in keys]
        heading = f"accuracy (%) under PGD-{lines[0]}, ε" if columns is args.eps else "accuracy (%) under PGD, steps"
        print_table(heading, [eps_name(c) if columns is args.eps else str(c) for c in columns], rows)

    if args.ece:
        draw_reliability(args.out / "reliability.png", groups)
    if sweep:
        draw_pgd(args.out / "pgd.png", groups, args.pgd, args.eps)
    if args.cifar_c is not None:
        draw_corruptions(args.out / "cifar-c.png", groups, args.cifar_c or "generated here")
    summary = {"models": {}}
    for label, members in groups.items():
        stats = {name: dict(zip(("mean", "std", "n"), mean_std(v))) for name, v in values[label].items()}
        summary["models"][label] = {"checkpoints": [s.path for s in members], **stats}
    if args.transfer:
        summary["transfer"] = report_transfer(args, groups, subjects, teacher)
    return summary


def report_transfer(args, groups, subjects, teacher):
    """The matrix of KD Beyond's Figure 1: targets in rows, sources in columns, the teacher after the mean."""
    labels = {}
    for label, members in groups.items():
        for subject in members:
            name = label if len(members) == 1 else f"{label} seed {subject.seed}"
            labels[subject] = f"{name} ({subject.path})" if name in labels.values() else name
    rows = {labels[t]: [s.transfer[t.sha256] for s in subjects] for t in subjects}
    rows = {name: [*row, mean(row)] for name, row in rows.items()}
    if teacher:
        rows = {name: [*row, teacher[0].transfer[t.sha256]] for (name, row), t in zip(rows.items(), subjects)}
    rows["mean"] = [mean(column) for column in zip(*rows.values())]
    columns = [*(labels[s] for s in subjects), "mean", *["teacher"] * len(teacher)]
    heading = "success rate (%), source → / target ↓"
    print_table(heading, columns, {name: [cell([v]) for v in row] for name, row in rows.items()})
    figure = Figure(figsize=(3.5 + 0.8 * len(columns), 2.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    heat_map(axes, list(rows.values()), list(rows), columns, f"success rate (%), PGD-20, ε = {eps_name(args.eps[0])}")
    axes.set(xlabel="source", ylabel="target")
    save_figure(figure, args.out / "transfer.png")
    return {"columns are sources": columns, "rows are targets": list(rows), "success_rate": list(rows.values())}


def wrapped(text, width=25):
    return "\n".join(textwrap.wrap(text, width))


def heat_map(axes, values, rows, columns, title):
    """Numbers in coloured cells; None leaves a cell empty."""
    values = np.array([[math.nan if v is None else v for v in row] for row in values])
    axes.imshow(values, cmap="viridis", aspect="auto")
    known = values[~np.isnan(values)]
    for (i, j), v in np.ndenumerate(values):
        if not math.isnan(v):
            dark = v < (known.min() + known.max()) / 2
            axes.text(j, i, f"{v:.1f}", ha="center", va="center", color="w" if dark else "k")
    axes.set_title(title, parse_math=False)
    axes.set_yticks(range(len(rows)), map(wrapped, rows), parse_math=False)
    axes.set_xticks(range(len(columns)), map(wrapped, columns), parse_math=False, rotation=90)


def save_figure(figure, path):
    with common.replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    print(f"wrote {path}")


def draw_reliability(path, groups):
    """Reliability diagrams, one a group, the bins of its seeds pooled."""
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(4 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (label, members) in itertools.zip_longest(panels, groups.items(), fillvalue=(None, None)):
        if members is None:
            axes.axis("off")
            continue
        share, acc, conf = (
            np.array([s.clean["bins"][k] for s in members]) for k in ("share", "accuracy", "confidence")
        )
        total = share.sum(0).clip(1e-12)
        acc, conf, share = (share * acc).sum(0) / total, (share * conf).sum(0) / total, share.mean(0)
        edges = np.linspace(0, 1, len(share) + 1)
        axes.bar(edges[:-1], acc, 1 / len(share), align="edge", color="tab:blue", edgecolor="w", label="accuracy")
        gap = dict(align="edge", color="none", edgecolor="tab:red", hatch="////", label="gap to confidence")
        axes.bar(edges[:-1], conf - acc, 1 / len(share), bottom=acc, **gap)
        axes.stairs(share, edges, color="k", label="share of samples")
        axes.plot([0, 1], [0, 1], "k--", lw=1)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        ece = cell([s.clean["ece"] for s in members], 3)
        axes.set_title(wrapped(f"{label}, ECE {ece}", 45), fontsize="medium", parse_math=False)
    panels[0].legend(loc="upper left", fontsize="small")
    save_figure(figure, path)


def draw_pgd(path, groups, steps, eps):
    """Accuracy under attack against the number of steps, for each ε, and against ε, for the largest number of steps."""
    sweeps = []
    if len(steps) > 1:
        sweeps += [("PGD steps", steps, [[(e, k) for k in steps] for e in eps])]
    if len(eps) > 1:
        sweeps += [(f"ε of PGD-{steps[-1]}", eps, [[(e, steps[-1]) for e in eps]])]
    colours = matplotlib.colormaps["tab20"]
    entries = len(groups) * max(len(lines) for _, _, lines in sweeps)
    figure = Figure(figsize=(8.5 * len(sweeps), max(4.5, 0.3 * entries)), layout="constrained")
    for axes, (name, ticks, lines) in zip(figure.subplots(1, len(sweeps), squeeze=False).flat, sweeps):
        for i, (label, members) in enumerate(groups.items()):
            for line, style in zip(lines, itertools.cycle(("-", "--", "-.", ":"))):
                stats = [mean_std([s.pgd[e][str(k)] for s in members]) for e, k in line]
                legend = wrapped(label if len(lines) == 1 else f"{label}, ε {eps_name(line[0][0])}", 30)
                options = {"linestyle": style, "color": f"C{i}" if len(groups) <= 10 else colours(i), "marker": "."}
                means, deviations = [m for m, _, _ in stats], [d or 0 for _, d, _ in stats]
                axes.errorbar(ticks, means, deviations, capsize=3 * (len(members) > 1), label=legend, **options)
        axes.set(ylim=(0, None), ylabel="accuracy under attack (%)", xlabel=name)
        axes.set_xscale("symlog", linthresh=min(filter(None, ticks)))
        axes.set_xticks(ticks, [eps_name(t) if ticks is eps else t for t in ticks], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        for text in axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)).get_texts():
            text.set_parse_math(False)
    save_figure(figure, path)


def draw_corruptions(path, groups, source):
    """Figure 3 of Noise as a Resource: corruption by model; for a single model, corruption by severity."""
    figure = Figure(figsize=(5 + 1.6 * max(5, len(groups)), 9), layout="constrained")
    figure.suptitle(f"CIFAR-C, {source}", parse_math=False)
    titles = {
        "accuracy": "accuracy (%)",
        "natural_robustness": "natural robustness: accuracy (%) where\nthe clean image is classified right",
    }
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        columns = {label: [averages(s, kind) for s in members] for label, members in groups.items()}
        if len(groups) == 1:
            (members,) = groups.values()
            single = {f"severity {k}": [averages(s, kind, [k]) for s in members] for k in range(1, 6)}
            columns = single | {"mean": list(*columns.values())}
        rows = [*SEVERITIES, "mean"]
        values = [[mean(a[row] for a in column) for column in columns.values()] for row in rows]
        heat_map(axes, values, rows, list(columns), title)
    save_figure(figure, path)


def show_corruptions(path, images, seed):
    """A contact sheet: a corruption a row, clean and severity 1 … 5 of two images uint8 [2 or 1, 3, H, W]."""
    side = images.shape[3] + 2
    rows = []
    for name in SEVERITIES:
        row = torch.stack([images, *(corrupt(images, name, severity, seed) for severity in range(1, 6))], 1)
        rows.append(torch.cat(list(F.pad(row.flatten(0, 1), (1,) * 4, value=255)), 2))
    sheet = torch.cat(rows, 1).permute(1, 2, 0).cpu().numpy()
    figure = Figure(figsize=(13, 19.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([(i + 0.5) * side for i in range(len(SEVERITIES))], SEVERITIES)
    axes.set_xticks([(i + 0.5) * side for i in range(6 * len(images))], ["clean", *"12345"] * len(images))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------- main


def main():
    args = parse_args()
    device = common.setup(args)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.backends.cudnn.allow_tf32 = False

    if args.show_corruptions and not (args.checkpoints or args.torchvision):
        images = common.load_dataset(args.dataset, args.data_dir or "data", 1, args.limit_test, device).test_images
        return show_corruptions(args.out / "corruptions.png", images[common.spread(len(images), 2)], args.seed)

    if args.arch or args.torchvision:
        subjects = [load_foreign(path, args, device) for path in args.checkpoints or [None]]
    else:
        subjects = [load_subject(path, args, device, part=args.part) for path in args.checkpoints]
    once = {subject.sha256: subject for subject in reversed(subjects)}
    for subject in subjects:
        if subject is not once[subject.sha256]:
            print(f"{subject.path} is the same as {once[subject.sha256].path}, and left out")
    subjects = [subject for subject in subjects if subject is once[subject.sha256]]
    teacher = [load_subject(args.teacher, args, device, "--teacher")] if args.teacher else []
    if args.transfer and len(subjects + teacher) < 2:
        raise UsageError("--transfer: takes two or more different checkpoints")
    load_data = functools.cache(
        lambda name, at, *size: common.load_dataset(name, at, 1, args.limit_test, device, *size)
    )
    for subject in subjects + teacher:
        sizes = (subject.config.get(key, size) for key, size in (("resize", 256), ("image_size", 224)))  # photographs
        subject.test = load_data(subject.dataset, subject.data_dir, *sizes)
        check_fit(subject)
    if args.transfer and len({subject.data for subject in subjects + teacher}) > 1:
        kinds = ", ".join({subject.dataset: 0 for subject in subjects + teacher})
        raise UsageError(f"--transfer: the checkpoints' data sets differ ({kinds}); --dataset NAME takes one for all")
    official = official_corruptions(args.cifar_c, subjects) if args.cifar_c else None
    if args.cinic:
        for subject in subjects:
            if tuple(subject.test.classes) != CIFAR10:
                raise UsageError(f"--cinic: has the classes of cifar10; {subject.path} has those of {subject.dataset}")
        cinic = [part.to(device) for part in load_cinic(args.cinic, subjects[0].data_dir, args.seed)]
    evaluation = Evaluation(args.out)
    print(f"{len(subjects)} model{'s' * (len(subjects) > 1)} on {device}, results in {args.out}", flush=True)

    if args.show_corruptions:
        images = subjects[0].test.test_images
        show_corruptions(args.out / "corruptions.png", images[common.spread(len(images), 2)], args.seed)
    for subject in subjects:
        subject.clean = evaluation.part("clean", subject, {}, evaluate_clean, subject)
    for subject, eps in itertools.product(subjects, args.eps if args.pgd else []):
        settings = {"eps": eps, "step_size": args.step_size, "restarts": args.restarts, "seed": args.seed}
        steps = map(str, args.pgd)
        subject.pgd[eps] = evaluation.part("PGD", subject, settings, evaluate_pgd, subject, eps, args, needed=steps)
    for data in {subject.data: 0 for subject in subjects} if args.cifar_c is not None else []:
        members = [subject for subject in subjects if subject.data == data]
        images = members[0].test.test_images
        for name in progress(list(SEVERITIES), f"CIFAR-C, {args.cifar_c or 'generated'}, of {members[0].dataset}"):
            corrupted = functools.cache(functools.partial(corrupted_images, official, images, name, seed=args.seed))
            source = file_digest(Path(args.cifar_c) / f"{name}.npy") if official else f"generated, seed {args.seed}"
            settings = {"corruption": name, "source": source}
            for subject in members:
                result = evaluation.part("CIFAR-C", subject, settings, evaluate_corruption, subject, corrupted)
                subject.corruptions[name] = result
    for subject in subjects if args.cinic else []:
        settings = {"images": hashlib.sha256(cinic[0].cpu().numpy().tobytes()).hexdigest()}
        subject.cinic = evaluation.part("CINIC", subject, settings, evaluate_cinic, subject, *cinic)
    for source in subjects + teacher if args.transfer else []:
        settings = {"eps": args.eps[0], "step_size": args.step_size, "steps": 20, "seed": args.seed}
        work, targets = (source, subjects, args), [target.sha256 for target in subjects]
        source.transfer = evaluation.part("transfer", source, settings, evaluate_transfer, *work, needed=targets)
    evaluation.summary = report(args, grouped(subjects), teacher)
    evaluation.save()
    common.count_unreadable()
    print(f"wrote {evaluation.path}")


if __name__ == "__main__":
    common.run_main(main, "the same command goes on from evaluation.json, which holds the parts that are done", False)
