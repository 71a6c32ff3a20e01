"""Evaluate any checkpoint: PGD, CIFAR-C, CINIC-10, calibration, and transferability of adversarial examples.

    python evaluate.py CKPT …                       # accuracy, ECE, NLL, Brier score: Tables 7 and 8
    python evaluate.py CKPT … --cifar-c CIFAR-10-C --cinic CINIC-10          # Tables 1-3 and 9, Figure 3
    python evaluate.py CKPT … --pgd 1 5 10 15 20 100 200 1000 --eps 8/255    # Table 4: more and more steps
    python evaluate.py CKPT … --pgd 20 --eps 1/255 2/255 10/255 20/255 25/255 50/255 100/255 200/255 # Table 5
    python evaluate.py CKPT … --pgd 20 --plot-by sigma                       # Table 6, Figure 2
    python evaluate.py CKPT … --cinic CINIC-10 --plot-by target-noise rate   # Figures 4 and 5
    python evaluate.py CKPT … --attack AutoAttack --eps 8/255                # any l∞ attack of torchattacks
    python evaluate.py CKPT … --curves              # metrics of training: CMD's Figures 2, 3, NRD's Figure 4
    python evaluate.py CKPT … --transfer --teacher  # Figure 1 of KD Beyond Model Compression
    python evaluate.py CKPT … --ece                 # Figure 5 of Neural Vicinal Risk Minimization
    python evaluate.py CKPT … --memory              # its Table 1, Figures 1 and 2; of several epochs Table 6
    python evaluate.py CKPT … --plot-by batch-size  # Figure 3b of Noise-engineered Data-free KD
    python evaluate.py wrn_40_2.pth --arch wrn-40-2 --dataset cifar100     # public weights, as RepDistiller's
    python evaluate.py weights.pt --model mine.py:net --dataset cifar10    # any module: net() gives it

CKPT is the checkpoint.pt of a run or of a teacher, or its folder; put checkpoints first. Runs of one script,
commit, epoch and setting whose seeds differ are one row of a table: mean ± sample standard deviation (n). A
row is named by the typed flags whose values differ between the rows, and by its path where these do not tell
two rows apart. cmd.py trains two networks and reports their mean; here a row is of network A, with --part
peer of B. --out holds the pictures, and evaluation.jsonl: a line per checkpoint as soon as it is measured,
after the lines of earlier calls. No file is read back: each call measures anew. --memory and --curves may
stand beside other measures.

Tables and figures without another name are those of Noise as a Resource for Learning in Knowledge
Distillation (Arani, Sarfraz, Zonooz). evaluate.pgd takes any model, evaluate.corrupt any images. Everything
is float32 in evaluation mode with deterministic convolutions, on CUDA as on the CPU.
"""

import argparse
import csv
import dataclasses
import datetime
import fractions
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import shlex
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
from common import UsageError, evenly_spaced, evenly_split, predict, to_float

# -------------------------------------------------------------------------------------------------- arguments


def fraction(text):
    """argparse type: a float in [0, 1], written as 0.031 or as 8/255."""
    return common.share(fractions.Fraction(text))


READ_BY = {  # flags that do nothing without one of others
    "eps": ("pgd", "attack", "transfer"),
    "step_size": ("pgd", "transfer"),
    "restarts": ("pgd",),
    "worst_start": ("pgd",),
    "teacher": ("transfer",),
    "mean": ("arch",),
    "std": ("arch",),
}


def parse_args():
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__, formatter_class=common.HelpFormatter)
    path = common.checkpoint_file
    add = parser.add_argument
    add("checkpoints", nargs="*", type=path, default=[], metavar="CKPT", help="checkpoints, or run folders")
    add("--part", default="model", help="name of the weights in CKPT: model, ema, peer, …")
    add("--arch", help="architecture, where CKPT are public weights; needs --dataset")
    add("--mean", nargs=3, type=float, help="mean that public weights expect; None: of the training images")
    add("--std", nargs=3, type=float, help="deviation that they expect; None: of the training images")
    add("--model", metavar="FILE.py:NAME", help="NAME() is evaluated, with weights of CKPT; needs --dataset")

    add = parser.add_argument_group("measures (none of these: accuracy, ECE, NLL, Brier score)").add_argument
    add("--ece", action="store_true", help="ECE (15 equal-width bins), NLL, Brier score, reliability diagram")
    add("--pgd", nargs="+", type=common.count, default=[], metavar="N",
        help="steps of l∞ PGD; a sample is lost at the first point that fools; or a sweep")  # fmt: skip
    add("--eps", nargs="+", type=fraction, default=[0.031], help="radius, 0.031 or 8/255; or a sweep")
    add("--step-size", type=fraction, default=0.003, help="step of PGD in [0, 1]")
    add("--restarts", type=common.count, default=5, help="random starts of PGD; the worst restart counts")
    add("--worst-start", action="store_true", help="each sample's worst start counts, not the worst restart")
    add("--attack", nargs="+", default=[], metavar="NAME", help="l∞ attacks of torchattacks, as AutoAttack")
    add("--cifar-c", nargs="?", const="", metavar="DIR", help="19 corruptions: official files or generated")
    add("--cinic", type=Path, metavar="DIR", help="CINIC-10; 2,100 images of ImageNet per class are taken")
    add("--transfer", action="store_true", help="PGD-20 images of each CKPT on each other; smallest --eps")
    add("--teacher", nargs="?", type=path, const=True, metavar="CKPT",
        help="teacher, one more source of --transfer; no CKPT: the one that the students name")  # fmt: skip
    add("--memory", type=common.count, nargs="?", const=10, metavar="K",
        help="number of unseen views, or 10: what wrong labels of training left; memory1.png")  # fmt: skip
    add("--plot-by", nargs="+", default=[], metavar="FLAG", help="flag of training on the axis; two: a map")
    add("--curves", nargs="*", metavar="METRIC", help="draw training.png: these metrics by epoch, or all")

    add = parser.add_argument_group("data, machine and output").add_argument
    add("--dataset", metavar="NAME", help="data set, as in training scripts; None: that of CKPT's run")
    add("--data-dir", type=Path, metavar="DIR", help="where data sets are kept; None: as in training")
    pixels = {"type": common.count, "metavar": "PIXELS"}
    add("--resize", **pixels, help="photographs: side of the square that is kept; None: as in training")
    add("--image-size", **pixels, help="photographs: side of the crop; None: as in training")
    add("--limit-test", type=common.count, metavar="N", help="use N evenly spaced test samples")
    add("--seed", dest="seeds", nargs=1, type=int, default=[0], metavar="SEED",
        help="random seed of starts, corruptions, CINIC's choice")  # fmt: skip
    add("--batch-size", type=common.count, help="images per forward pass; None: 125 on a CPU, else 500")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--out", type=Path, metavar="DIR", help="folder of pictures and evaluation.jsonl; None: of CKPT")
    add("--table", type=Path, metavar="FILE", help="table as .csv, .md or .tex: mean, standard deviation, n")
    add("--pdf", action="store_true", help="write each picture as a vector PDF too")
    args = parser.parse_intermixed_args()
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    typed = vars(parser.parse_intermixed_args(namespace=unset))
    args.given = [flag for flag, value in typed.items() if value is not None]

    args.attacks = bool(args.pgd or args.attack or args.cinic or args.transfer or args.cifar_c is not None)
    asked = args.attacks or args.ece or args.plot_by or args.table
    args.measures = bool(asked or args.curves is None and not args.memory)
    if not (args.checkpoints or args.model):
        raise UsageError("CKPT: name the checkpoint.pt of a run folder, before the other flags")
    for flag, readers in READ_BY.items():
        if not any(getattr(args, reader) for reader in readers):
            common.refuse(args, [flag], f"nothing reads it without --{', --'.join(readers)}")
    if args.arch or args.model:
        if not args.dataset:
            raise UsageError("--dataset: weights do not tell what to evaluate on; add --dataset NAME")
        if args.model:
            common.refuse(args, ["arch"], "a module has its own")
        common.refuse(args, ["curves", "memory"], "weights hold no metrics of their training, and no labels")
        common.refuse(args, ["part"], "checkpoints of runs have parts, other weights have none")
    if args.table and args.table.suffix not in (".csv", ".md", ".tex"):
        raise UsageError(f"--table: {args.table} ends with none of .csv, .md, .tex")
    args.plot_by = [flag.replace("-", "_") for flag in args.plot_by]
    args.pgd = sorted(set(args.pgd))
    args.eps = sorted(set(args.eps))
    there = (path.parent for path in args.checkpoints if path.exists())
    args.out = args.out or next(there, Path("runs/evaluation"))
    return args


# -------------------------------------------------------------------------------------------------------- PGD


def random_start(images, eps, generator):
    """A uniform draw from the l∞ ball of radius eps around float images [B, 3, H, W], clipped to [0, 1]."""
    noise = torch.rand(images.shape, device=images.device, generator=generator)
    return (images + eps * (2 * noise - 1)).clamp(0, 1)


def ascend(model, x, images, labels, eps, step_size):
    """One step of PGD from x, float [B, 3, H, W]: the logits [B, C] at x, and the next point.

    The step follows the sign of the cross-entropy's gradient, then returns to the ball around `images` and
    to [0, 1].
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)
    following = x.detach() + step_size * gradient.sign()
    return logits.detach(), following.clamp(images - eps, images + eps).clamp(0, 1)


def pgd(model, images, labels, eps=0.031, step_size=0.003, steps=20, generator=None):
    """Projected gradient descent (Madry et al. 2018), l∞, from one random start: the adversarial images.

    model: gives logits of float images, in evaluation mode. images: float [B, 3, H, W] in [0, 1].
    labels: int64 [B]. eps, step_size: in [0, 1].
    generator: of the random start, on the images' device; None: the global one.
    Returns float [B, 3, H, W], within eps of `images` and within [0, 1].
    """
    x = random_start(images, eps, generator)
    for _ in range(steps):
        _, x = ascend(model, x, images, labels, eps, step_size)
    return x


# ------------------------------------------------------------------------------------------------ corruptions
# CIFAR-C (Hendrycks and Dietterich 2019), batched: each function takes x float [B, 3, H, W] in [0, 1], the
# constants of its severity, made for 32×32 pixels, and a generator, and gives x corrupted, not yet clipped.
# All repeat the published generator except three. JPEG's values differ from Pillow's by up to 50 of 255, its
# mean pixel distance by 0.3 %. Frost and spatter have the published mean pixel distances on CIFAR-10 to 15 %.

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
    # mean and deviation of the flakes, zoom, threshold, radius and deviation of their trails, image's weight
    "snow": ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
             (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
             (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
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
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
                          (0.1, 0.03, 0.03)),
}  # fmt: skip


def corrupt(images, name, severity, seed=0):
    """CIFAR-C's corruption `name` (a key of CORRUPTIONS) of images: uint8 [N, 3, H, W], on the same device.

    images: uint8 [N, 3, H, W], H and W at least 16. severity: 1 … 5. The same seed gives the same pixels on
    the same kind of device. Each thousand images has a generator of its own, so that they do not depend on
    what follows.
    """
    assert images.dtype == torch.uint8 and severity in range(1, 6)
    function = CORRUPTIONS[name]
    constants = SEVERITIES[name][severity - 1]
    parts = []
    for i, part in enumerate(images.split(1000)):
        x = function(to_float(part), constants, torch.Generator(images.device).manual_seed(seed + i))
        x = x * 255 + 1e-3  # float32's own error
        parts.append(x.clamp(0, 255).byte())  # cut off, as CIFAR-C's
    return torch.cat(parts)


def truncated(x):
    """x in whole steps of 1/255, as np.uint8 and ImageMagick cut off; 1e-4: float32's error in a blur."""
    return (x * 255 + 1e-4).floor() / 255


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
def gaussian_matrix(size, sigma, device, cut, mode):
    """[size, size]: blur of an axis by a Gaussian. cut: in deviations. mode: scipy's, for the border."""
    matrix = scipy.ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0, mode=mode, truncate=cut)
    return torch.from_numpy(matrix).float().to(device)


def blur(x, sigma, cut=4, mode="nearest"):
    """Gaussian blur of [B, K, H, W], sigma in pixels: a matrix for each axis."""
    height, width = (gaussian_matrix(size, sigma, x.device, cut, mode) for size in x.shape[2:])
    return torch.einsum("bkhw,ih,jw->bkij", x, height, width)


def gaussian_blur(x, sigma, generator):
    return blur(x, sigma)


def defocus_blur(x, constants, generator):
    """Convolution with a disc, itself blurred by a 3×3 Gaussian against aliasing."""
    radius, alias = constants
    reach = math.floor(radius) + 1
    squares = np.arange(-reach, reach + 1) ** 2
    disc = (squares + squares[:, None] <= radius**2) / 1.0
    kernel = scipy.ndimage.gaussian_filter(disc / disc.sum(), alias, mode="constant", radius=1)
    kernel = torch.from_numpy(kernel).float().to(x.device)
    x = F.pad(x, (reach,) * 4, mode="reflect").contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, kernel.expand(3, 1, -1, -1), groups=3).contiguous()


def glass_blur(x, constants, generator):
    """Each pixel takes the value of one up to `shift` above and left of it. That is done `rounds` times,
    between two blurs.

    The published generator sets out to swap the two pixels, but its swap overwrites one before it is read:
    a copy.
    """
    sigma, shift, rounds = constants
    count, _, height, width = x.shape
    place = torch.arange(height * width, device=x.device).view(height, width)
    pixels = truncated(blur(x, sigma)).flatten(2)
    for _ in range(rounds):
        draw = (2, count, height - 2 * shift, width - 2 * shift)
        up, left = torch.randint(-shift, shift, draw, device=x.device, generator=generator)
        source = place.repeat(count, 1, 1)
        source[:, shift + 1 : height - shift + 1, shift + 1 : width - shift + 1] += up * width + left
        pixels = pixels.gather(2, source.view(count, 1, -1).expand_as(pixels))
    return blur(pixels.view_as(x), sigma)


def trail(x, radius, sigma, degrees):
    """Motion blur as ImageMagick's: x [B, K, H, W] drawn out one way, fading as half a Gaussian.

    degrees: float [B], the direction.
    """
    reach = 2 * radius
    steps = torch.arange(reach + 1.0)
    weights = (-0.5 * (steps / sigma) ** 2).exp()
    steps = steps.view(-1, 1).to(x.device)
    angle = degrees * (math.pi / 180)
    down, right = ((steps * part - 0.5).ceil().long() + reach for part in (angle.sin(), angle.cos()))
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    windows = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # a view, shifted images
    rows = torch.arange(len(x), device=x.device)
    weights = (weights / weights.sum()).tolist()
    return sum(w * windows[rows, :, down[i], right[i]] for i, w in enumerate(weights))


def motion_blur(x, constants, generator):
    return trail(x, *constants, uniform(-45, 45, len(x), x, generator))


def middle(x, height, width):
    """The middle of [B, K, H, W]: [B, K, height, width]."""
    top = (x.shape[2] - height) // 2
    left = (x.shape[3] - width) // 2
    return x[..., top : top + height, left : left + width]


def zoomed(x, factor):
    """The middle of [B, K, H, W] enlarged `factor` times, linearly, to the same size."""
    height, width = x.shape[2:]
    h = math.ceil(height / factor)
    w = math.ceil(width / factor)
    size = round(h * factor), round(w * factor)
    x = F.interpolate(middle(x, h, w), size, mode="bilinear", align_corners=True)
    return middle(x, height, width)


def zoom_blur(x, end, generator):
    x = x.contiguous(memory_format=torch.channels_last)  # faster to interpolate
    zooms = np.arange(1, end, 0.01).tolist()  # numpy's rounding decides whether `end` is one of them
    return (x + sum(zoomed(x, zoom) for zoom in zooms)).contiguous() / (len(zooms) + 1)


def snow(x, constants, generator):
    mean, std, zoom, threshold, radius, sigma, keep = constants
    flakes = zoomed(mean + std * normal(x[:, :1], generator), zoom)
    flakes = truncated(flakes.masked_fill(flakes < threshold, 0).clamp(0, 1))
    flakes = truncated(trail(flakes, radius, sigma, uniform(-135, -45, len(x), x, generator)))
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
    dy = axis.view(-1, 1, 1) - seeds[:, 0]
    dx = axis.view(1, -1, 1) - seeds[:, 1]
    nearest = (dx**2 + dy**2).argmin(2, keepdim=True)
    cos = angle.cos()
    sin = angle.sin()
    along = (cos * dx + sin * dy).gather(2, nearest)[..., 0]
    across = (cos * dy - sin * dx).gather(2, nearest)[..., 0].abs()
    branches = 0.5 + 0.5 * torch.cos((along.abs() - across / math.tan(math.pi / 3)) * (2 * math.pi / 4.5))
    ice = 0.2 + 0.7 * (-across / 1.2).exp() + 0.7 * branches * (-across / 10).exp()
    clouds = blur(torch.randn(1, 1, size, size, generator=generator), 5)[0, 0]
    ice = ice * (0.85 + 0.3 * clouds / clouds.std())
    ice = ice * (0.75 + 0.5 * torch.rand(size, size, generator=generator))
    ice = ice.clamp(0, 1) * torch.tensor([0.85, 0.95, 1.0]).view(3, 1, 1)
    return (0.4 + 0.6 * ice).to(device)  # as bright as the photographs, whose mean level is 157 … 176 of 255


def frost(x, constants, generator):
    keep, amount = constants
    height, width = x.shape[2:]
    pane = frost_texture(max(height, width) + 224, x.device)
    windows = pane.unfold(1, height, 1).unfold(2, width, 1)  # a view: [3, tops, lefts, H, W]
    tops, lefts = windows.shape[1:3]
    top = torch.randint(tops, (len(x),), device=x.device, generator=generator)
    left = torch.randint(lefts, (len(x),), device=x.device, generator=generator)
    return keep * x + amount * windows[:, top, left].transpose(0, 1)


def plasma(x, decay, generator):
    """Plasma fractal by midpoint displacement on a torus: [B, 1, H, W] in [0, 1] for images x."""
    count, _, height, width = x.shape
    size = 2 ** math.ceil(math.log2(max(height, width)))
    field = torch.zeros(count, size, size, device=x.device)
    step = size
    amplitude = 1.0

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
        step = half
        amplitude = amplitude / decay**2  # CIFAR-C's displacement is the square of what it decays
    low = field.amin((1, 2), keepdim=True)
    high = field.amax((1, 2), keepdim=True)
    return ((field - low) / (high - low)).unsqueeze(1)[..., :height, :width]


def fog(x, constants, generator):
    amount, decay = constants
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma(x, decay, generator)) * (brightest / (brightest + amount))


def spatter(x, constants, generator):
    """Drops of water that catch the light, or mud.

    CIFAR-C takes the drops' height from an edge detector and a distance transform. Here it is the number of
    times that a pixel of rim can be taken off.
    """
    mean, std, sigma, threshold, amount, mud = constants
    liquid = blur(mean + std * normal(x[:, :1], generator), sigma)
    wet = (liquid > threshold).float()
    if mud:
        cover = blur(wet, amount)
        cover = cover.masked_fill(cover < 0.8, 0)
        return x * (1 - cover) + cover * torch.tensor([63, 42, 20], device=x.device).view(3, 1, 1) / 255
    mean_of_nine = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
    height = inside = wet
    for _ in range(3):
        inside = 1 - F.max_pool2d(1 - inside, 3, 1, padding=1)
        height = height + inside
    # From the upper left. CIFAR-C has 1 in the middle; 0.7 comes nearer to its mean distances.
    light = torch.tensor([[-2, -1, 0], [-1, 0.7, 1], [0, 1, 2]], device=x.device)[None, None]
    relief = F.conv2d(F.pad(mean_of_nine(height), (1,) * 4, mode="replicate"), light).clamp(min=0)
    drops = liquid * wet * mean_of_nine(relief)
    drops = drops / drops.amax((2, 3), keepdim=True).clamp(min=1e-6)
    return x + amount * drops * torch.tensor([175, 238, 238], device=x.device).view(3, 1, 1) / 255


def brightness(x, amount, generator):
    """HSV's value plus `amount`. As hue and saturation stay, that scales the pixel, and makes black gray."""
    value = x.amax(1, keepdim=True)
    new = (value + amount).clamp(0, 1)
    return torch.where(value > 0, x * (new / value.clamp(min=1e-6)), new)


def contrast(x, factor, generator):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def saturate(x, constants, generator):
    """HSV's saturation times `factor`, plus `plus`.

    With hue and value kept, that stretches the channels' distance from the largest.
    """
    factor, plus = constants
    value = x.amax(1, keepdim=True)
    below = (value - x) / value.clamp(min=1e-6)
    saturation = below.amax(1, keepdim=True)
    red = torch.tensor([0.0, 1, 1], device=x.device).view(3, 1, 1)  # the hue that HSV gives to gray
    below = torch.where(saturation > 0, below / saturation.clamp(min=1e-6), red)
    return value * (1 - below * (factor * saturation + plus).clamp(0, 1))


def box_matrix(size, new):
    """[new, size]: an axis resampled with Pillow's box filter: the mean of pixels with centres in the box."""
    scale = size / new
    distance = torch.arange(size) + 0.5 - (torch.arange(new) + 0.5).view(-1, 1) * scale
    half = max(scale, 1) / 2
    weights = ((distance > -half) & (distance <= half)).float()
    return weights / weights.sum(1, keepdim=True)


def pixelate(x, share, generator):
    """Down and up again with Pillow's box filter, which rounds to whole levels after each axis."""
    height, width = x.shape[2:]
    for new_height, new_width in ((int(height * share), int(width * share)), (height, width)):
        x = truncated(x @ box_matrix(x.shape[3], new_width).T.to(x.device) + 0.5 / 255)
        x = truncated(box_matrix(x.shape[2], new_height).to(x.device) @ x + 0.5 / 255)
    return x


JPEG_TABLES = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99"""


def jpeg_compression(x, quality, generator):
    """The lossy half of JPEG: YCbCr, chroma at half resolution, DCT of 8×8 pixels, rounding by the tables."""
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
    luma = coded(luma, grain[0])
    chroma = coded(F.avg_pool2d(chroma, 2).round(), grain[1])
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear") - 128
    cb, cr = chroma.split(1, 1)
    rgb = torch.cat([luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb], 1)
    return rgb[..., :height, :width].round() / 255


def sampled(x, points, repeat):
    """x [B, K, H, W] at `points` [B, H, W, 2], (x, y) in pixels, linearly.

    Beyond its border x is mirrored: c b a b c, or with `repeat` the border pixel comes twice: b a a b.
    """
    size = torch.tensor([x.shape[3], x.shape[2]], device=x.device)
    grid = (2 * points + 1) / size - 1 if repeat else 2 * points / (size - 1) - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=not repeat)


def elastic_transform(x, constants, generator):
    """A random affine map, given by where three points go, then a smooth random displacement."""
    count, _, height, width = x.shape
    side = min(height, width)
    amount, smoothness, jitter = (share * side for share in constants)
    rows = torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).float()  # [H, W, 2]
    third = torch.tensor([[1.0, 1], [1, -1], [-1, -1]], device=x.device) * (side // 3)
    before = third + torch.tensor([width // 2, height // 2], device=x.device)
    after = before + uniform(-jitter, jitter, (count, 3, 2), x, generator)
    after = F.pad(after, (0, 1), value=1.0)
    inverse = torch.linalg.solve(after, before.expand(count, 3, 2))  # after -> before
    x = sampled(x, torch.einsum("hwi,bij->bhwj", F.pad(points, (0, 1), value=1.0), inverse), repeat=False)
    if amount == 0:
        return x
    shift = amount * blur(uniform(-1, 1, (count, 2, height, width), x, generator), smoothness, 3, "reflect")
    return sampled(x, points + shift.permute(0, 2, 3, 1), repeat=True)


CORRUPTIONS = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, defocus_blur, glass_blur,
        motion_blur, zoom_blur, snow, frost, fog, spatter, brightness, contrast, saturate, pixelate,
        jpeg_compression, elastic_transform,
    )
}  # fmt: skip


def read_cifar_c(folder, subjects):
    """The official CIFAR-10-C: {corruption: memory map uint8 [5, 10000, 32, 32, 3]}, in order of severity.

    Raises UsageError for a file that is missing, damaged or of another form, and where
    labels.npy does not repeat the labels of every subject's test set.
    """

    def read(name, *shape):
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r").reshape(5, 10000, *shape)
            assert array.dtype == np.uint8 or not shape
        except Exception as error:  # no such file, or whatever a damaged one makes numpy raise
            says = f"{path} is missing, damaged or not CIFAR-10-C's ({type(error).__name__})"
            raise UsageError(f"--cifar-c: {says}; without a folder the corruptions are generated") from None
        return array

    images = {name: read(name, 32, 32, 3) for name in CORRUPTIONS}
    labels = read("labels")
    for subject in subjects:
        expected = subject.data.test_labels.cpu().expand(5, -1)
        if not np.array_equal(labels[:, evenly_spaced(10000, expected.shape[1])], expected):
            raise UsageError(f"--cifar-c: {folder}/labels.npy are not the labels of {subject.test_set}")
    return images


# ------------------------------------------------------------------------------------------------------ CINIC

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def load_cinic(folder, seed, per_class=2100):
    """ImageNet's images in CINIC-10 (Darlow et al. 2018): uint8 [N, 3, 32, 32]; int64 [N], CIFAR-10's order.

    The seed draws `per_class` PNG files of each class below `folder`, in whatever split, whose names do not
    start with "cifar10-". Raises UsageError for a class with too few, and for a file that cannot be read.
    """
    random = np.random.default_rng(seed)
    files = []
    images = []
    for name in CIFAR10:
        found = sorted(f for f in folder.glob(f"**/{name}/*.png") if not f.name.startswith("cifar10-"))
        if len(found) < per_class:
            there = f"{folder} has {len(found)} images of ImageNet for {name}"
            raise UsageError(f"--cinic: {there}, not {per_class}")
        files += [found[i] for i in random.permutation(len(found))[:per_class]]
    for file in common.progress(files, "reading CINIC-10"):
        try:
            images.append(np.asarray(Image.open(file).convert("RGB")).reshape(32, 32, 3))
        except Exception as error:  # whatever a damaged file makes Pillow raise; ValueError for another size
            says = f"{file} is no picture of 32×32 pixels ({error})"
            raise UsageError(f"--cinic: {says}; unpack it again") from None
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return images, torch.arange(len(CIFAR10)).repeat_interleave(per_class)


# ------------------------------------------------------------------------------------------ what is evaluated


@dataclasses.dataclass(eq=False)
class Subject:
    """A trained model, the test set it is evaluated on, and what has been measured."""

    path: str  # of the checkpoint
    config: dict  # the flags of training
    model: nn.Module | None = None  # in evaluation mode, without gradients; None where only curves are drawn
    dataset: str = ""
    data: common.Dataset | None = None
    batch_size: int = 0
    by_batch: bool = False  # BatchNorm normalises by the batch at hand
    source: dict | None = None  # {"nrd.py": text, "common.py": text}, the code that trained it
    metrics: list = dataclasses.field(default_factory=list)  # of training, a dict per epoch
    teacher: str | None = None  # the path of its teacher's checkpoint, as training named it
    numbers: dict = dataclasses.field(default_factory=dict)  # {column of the tables: number}
    bins: dict = dataclasses.field(default_factory=dict)  # of evaluate_images
    corruptions: dict = dataclasses.field(default_factory=dict)  # of evaluate_corruptions

    @property
    def test_set(self):
        return f"{self.dataset}, {len(self.data.test_labels):,} test images"

    @functools.cached_property
    def right(self):
        """bool [N]: the test images that are classified correctly."""
        logits = predict(self.model, self.data.test_images, batch_size=self.batch_size)
        return logits.argmax(1) == self.data.test_labels


load_dataset = functools.cache(common.load_dataset)  # one copy for all checkpoints


def read_data(args, dataset, config, test_only=True):
    """The Dataset `dataset`, read as the flags say, else as in training (config), else as by default."""
    if not common.is_photographs(dataset):
        common.refuse(args, ("resize", "image_size"), f"the images of {dataset} keep their size")
    resize = args.resize or config.get("resize") or 256
    image_size = args.image_size or config.get("image_size") or 224
    data_dir = args.data_dir or config.get("data_dir", "data")
    limit = None if test_only else config.get("limit_train")
    return load_dataset(dataset, data_dir, limit, args.limit_test, args.device, resize, image_size, test_only)


def subject_of_run(path, checkpoint, part, args):
    """The Subject in `part` ("model", "ema", …) of a run's checkpoint.

    It has neither model nor data where only curves are drawn. Where training left BatchNorm on current
    statistics, the batch size is that of training too. Prints where the test set is another one than in
    training. Raises UsageError where the checkpoint does not have this part, or has other classes than the
    data set.
    """
    config = checkpoint["config"]
    parts = checkpoint["built_as"]
    network = part
    if "peer" in parts:  # cmd.py's two networks are equal
        network = "B" if part == "peer" else "A"
    if network != "model":
        config = config | {"script": f"{config['script']}, network {network}"}
    if part not in (*parts, "model"):
        raise UsageError(f"--part: {path} has no {part!r}; it has {', '.join(parts)}")
    subject = Subject(
        str(path), config, **{key: checkpoint.get(key) for key in ("source", "metrics", "teacher")}
    )
    if not (args.measures or args.memory):
        return subject
    subject.dataset = args.dataset or checkpoint["dataset"]
    subject.data = data = read_data(args, subject.dataset, config)
    if list(data.classes) != checkpoint["classes"]:
        raise UsageError(f"--dataset: {subject.dataset} has other classes than {path}, or in another order")
    if config.get("test_digest") not in (None, data.test_digest):
        print(f"{path}: tested on other images or labels than in training", flush=True)
    if not common.sources("").items() <= subject.source.items():
        print(f"{path}: trained with another common.py than this, which builds the network")
    subject.model = common.load_model(checkpoint, part, args.device).requires_grad_(False)
    batch_size = common.EVAL_BATCH[data.test_labels.device.type]
    if checkpoint.get("batch_norm") == "current":
        subject.by_batch = True
        batch_size = config.get("eval_batch_size", config["batch_size"])
        for layer in subject.model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean = layer.running_var = None
    subject.batch_size = args.batch_size or batch_size
    return subject


def subject_of_weights(path, flags, dataset, args):
    """The Subject of a module or of public weights, as a training script takes them for a teacher.

    path: of the weights, or None. flags: config of a student: teacher_model, teacher_arch, mean, std and
    more. Raises UsageError where the model has another number of classes than the data set, and where it
    gives probabilities.
    """
    module = flags["teacher_model"]
    mean = flags["mean"]
    std = flags["std"]
    try:
        data = read_data(args, dataset, flags, bool(module or mean and std or common.is_photographs(dataset)))
    except UsageError:  # as where there are test images alone, which channel_stats then says
        data = read_data(args, dataset, flags)
    if module:
        model = common.load_module(module, "--model", path)
    else:
        if not (mean and std):
            stats = common.channel_stats(data)
            mean = mean or stats[0]
            std = std or stats[1]
        model = common.load_public(path, "CKPT", flags["teacher_arch"], mean, std, data.image_size)
    logits = predict(model.to(args.device).requires_grad_(False), data.test_images[:100])
    if logits.shape[1] != len(data.classes):
        raise UsageError(f"--dataset: {dataset} has {len(data.classes)} classes, the model {logits.shape[1]}")
    if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-2:
        raise UsageError(f"--model: {module} gives probabilities, not logits; leave its softmax out")
    config = {"script": path.stem if path else module, "seed": 0, "given": []}
    batch_size = args.batch_size or common.EVAL_BATCH[logits.device.type]
    return Subject(str(path or module), config, model, dataset, data, batch_size)


def find_teacher(subjects, args):
    """The Subject of --teacher, or of the teacher that the students name, as their training was given it."""
    students = {subject.teacher: subject for subject in subjects if subject.teacher}
    name = str(args.teacher)
    if args.teacher is True:
        if len(students) != 1:  # baselines, ONE and DML name none
            named = ", ".join(sorted(students)) or "no teacher"
            raise UsageError(f"--teacher: the checkpoints name {named}; add the path of one")
        (name,) = students
    student = students.get(name)
    config = student.config if student else {}
    weights = config.get("teacher")
    is_module = config.get("teacher_model")
    if is_module or weights and "built_as" not in common.read_weights_only(weights, "--teacher"):
        return subject_of_weights(weights and Path(weights), config, student.dataset, args)
    return subject_of_run(name, common.load_checkpoint(name, "--teacher"), "model", args)


def by_value(value):
    """Sort key: numbers by size, then texts, then None."""
    if isinstance(value, (int, float)):
        return 0, value
    return 2 if value is None else 1, str(value)


def grouped(subjects, leave_out=()):
    """[(name, subjects)], the rows of the tables: runs of one script, commit, epoch and setting, other seeds.

    --seed and --noise-seed count as seeds: runs may differ in one of them or in both. Flags of training in
    `leave_out` may differ too. A name is the script, and the typed flags whose values differ between rows,
    with these values: "nrd loss=ce". The rows are sorted by the script and by them. Where two rows have one
    name, the path of the first checkpoint follows.
    """
    seeds = ("seed", "noise_seed", *leave_out)
    ignored = (*seeds, "name", "given", *common.MACHINE)
    alike = {}
    for subject in subjects:
        settings = {flag: value for flag, value in subject.config.items() if flag not in ignored}
        to_come = subject.config.get("epochs", 0) - len(subject.metrics)
        key = json.dumps([settings, subject.source, to_come], sort_keys=True)
        alike.setdefault(key, []).append(subject)
    rows = []
    for members in alike.values():
        draws = [[subject.config.get(flag) for flag in seeds] for subject in members]
        if all(draws.count(draw) == 1 for draw in draws):
            rows.append(members)
        else:  # copies, or two parts of one run
            rows += [[subject] for subject in members]

    typed = {flag for subject in subjects for flag in subject.config["given"]} - {*seeds}
    differing = [
        flag for flag in sorted(typed) if len({by_value(row[0].config.get(flag)) for row in rows}) > 1
    ]
    rows.sort(key=lambda row: [by_value(row[0].config.get(flag)) for flag in ("script", *differing)])
    names = []
    for row in rows:
        config = row[0].config
        flags = [f"{flag}={config[flag]}" for flag in differing if config.get(flag) is not None]
        names.append(" ".join([config["script"], *flags]))
    unique = [f"{name}, {row[0].path}" if names.count(name) > 1 else name for name, row in zip(names, rows)]
    return list(zip(unique, rows))


# ------------------------------------------------------------------------------------------- what is measured


def evaluate_images(subject, images, labels):
    """Accuracy in percent; {ECE, NLL in nats, Brier, summed over classes}; the bins of ECE (Guo et al. 2017).

    images: uint8 [N, 3, H, W]; labels: int64 [N].
    """
    logits = predict(subject.model, images, batch_size=subject.batch_size).double()
    p = logits.softmax(1)
    ece, accuracy, confidence, share = common.calibration(p, labels)
    brier = (p - F.one_hot(labels, p.shape[1])).square().sum(1).mean().item()
    numbers = {"ECE": ece, "NLL": F.cross_entropy(logits, labels).item(), "Brier": brier}
    bins = {"accuracy": accuracy, "confidence": confidence, "share": share}
    return common.accuracy(p, labels), numbers, bins


def evaluate_pgd(subject, eps, args):
    """Accuracy in percent under PGD of each number of steps in args.pgd, from args.restarts starts: a list.

    A restart loses a sample to PGD-k if any point visited in its first k steps, the start included, is
    misclassified; so one trajectory serves all step counts. A lost sample is attacked no further, except
    where it is part of its batch's statistics. The restart with the lowest accuracy counts; with
    args.worst_start, the worst restart of each sample.
    """
    images = subject.data.test_images
    labels = subject.data.test_labels
    longest = args.pgd[-1]
    never = longest + 1
    lost_at = torch.full((args.restarts, len(labels)), never, device=labels.device)  # step that first fools
    lost_at[:, ~subject.right] = 0
    size = max(1, 2**26 // images[0].numel())  # images attacked at once: 256 MB
    for block, start in enumerate(range(0, len(labels), size)):
        clean = to_float(images[start : start + size].to(labels.device))
        true = labels[start : start + size]
        for restart in range(args.restarts):
            seed = args.seed + restart + args.restarts * block
            x = random_start(clean, eps, torch.Generator(clean.device).manual_seed(seed))
            lost = lost_at[restart, start : start + size]  # a view
            label = f"PGD, ε {eps_name(eps)}, on {subject.path}, restart {restart + 1} of {args.restarts}"
            for step in common.progress(range(longest + 1), label):
                at_stake = (lost == never) | subject.by_batch
                for rows in evenly_split(at_stake.nonzero().squeeze(1), subject.batch_size):
                    logits, x[rows] = ascend(
                        subject.model, x[rows], clean[rows], true[rows], eps, args.step_size
                    )
                    fooled = rows[logits.argmax(1) != true[rows]]
                    lost[fooled] = lost[fooled].clamp(max=step)
    withstood = torch.stack([lost_at > k for k in args.pgd]).double()  # [step counts, restarts, N]
    worst = withstood.amin(1).mean(1) if args.worst_start else withstood.mean(2).amin(1)
    return (100 * worst).tolist()


def load_attack(name, classes):
    """The class `name` of torchattacks. Raises UsageError where it has no l∞ radius or needs more classes."""
    try:
        import torchattacks
    except ImportError:
        raise UsageError("--attack: needs torchattacks; pip install torchattacks") from None
    known = {name: getattr(torchattacks, name) for name in torchattacks.__all__ if not name.endswith("L2")}
    known = {name: attack for name, attack in known.items() if "eps" in inspect.signature(attack).parameters}
    if name not in known:
        names = ", ".join(known)
        raise UsageError(f"--attack: torchattacks has no {name} of a given l∞ radius; it has {names}")
    if name in ("AutoAttack", "APGDT") and classes < 4:  # their targeted loss compares four logits
        fewer = "APGD and Square take fewer"
        raise UsageError(f"--attack: {name} needs four classes, and there are {classes}; {fewer}")
    return known[name]


def fooled_by(attack, source, rows, targets, label):
    """bool [targets, N]: whether each target misclassifies a test image of the source once it is attacked.

    attack: gives the adversarial images of float images [B, 3, H, W] and labels [B]. rows: int64, the images
    that are attacked; the others count as not misclassified.
    """
    images = source.data.test_images
    labels = source.data.test_labels
    fooled = torch.zeros(len(targets), len(labels), dtype=torch.bool, device=labels.device)
    for batch in common.progress(evenly_split(rows, source.batch_size), label):
        clean = to_float(images[batch.to(images.device)].to(labels.device))
        adversarial = attack(clean, labels[batch]).detach()
        for i, target in enumerate(targets):
            fooled[i, batch] = target.model(adversarial).argmax(1) != labels[batch]
    return fooled


def evaluate_attack(subject, attack, eps, args):
    """Accuracy in percent under an attack of load_attack with its own settings, of l∞ radius eps."""
    classes = min(10, len(subject.data.classes))  # AutoAttack: 9 targets
    options = {"eps": eps, "seed": args.seed, "n_classes": classes}
    takes = inspect.signature(attack).parameters
    label = f"{attack.__name__}, ε {eps_name(eps)}, on {subject.path}"
    attack = attack(subject.model, **{name: value for name, value in options.items() if name in takes})
    torch.manual_seed(args.seed)
    rows = torch.arange(len(subject.right), device=subject.right.device)
    fooled = fooled_by(attack, subject, rows, [subject], label)
    return 100 * (~fooled).double().mean().item()


def evaluate_corruptions(subject, args, official):
    """{"accuracy": {corruption: in percent, the mean over severities}, "natural robustness": the same}; the
    key "mean" of both has the mean over corruptions, of accuracy that is mCA.

    Natural robustness is the accuracy among the samples classified correctly when clean (Gu et al. 2019), NaN
    if there are none. official: of read_cifar_c; None generates the images.
    """
    images = subject.data.test_images
    labels = subject.data.test_labels
    found = {"accuracy": {}, "natural robustness": {}}
    rows = evenly_spaced(10000, len(images)).numpy()  # of the official files
    label = f"CIFAR-C, {args.cifar_c or 'generated'}, on {subject.path}"
    for name in common.progress(list(CORRUPTIONS), label):
        hits = []
        for severity in range(1, 6):
            if official:
                corrupted = torch.from_numpy(official[name][severity - 1, rows]).permute(0, 3, 1, 2)
            else:
                corrupted = corrupt(images, name, severity, args.seed)
            hits.append(predict(subject.model, corrupted, batch_size=subject.batch_size).argmax(1) == labels)
        hits = torch.stack(hits).double()  # [5, N]
        found["accuracy"][name] = 100 * hits.mean().item()
        found["natural robustness"][name] = 100 * hits[:, subject.right].mean().item()
    for by_name in found.values():
        by_name["mean"] = statistics.fmean(by_name.values())
    return found


def evaluate_transfer(source, targets, args):
    """Success rate in percent on each of `targets` of PGD-20 on `source`: a list, NaN where nothing counts.

    What counts are the samples that source and target both classify correctly. The attack succeeds where the
    target misclassifies the adversarial image. On the source itself that is the white-box success rate.
    """
    generator = torch.Generator(source.right.device).manual_seed(args.seed)

    def attack(images, labels):
        return pgd(source.model, images, labels, args.eps[0], args.step_size, 20, generator)

    label = f"transfer, ε {eps_name(args.eps[0])}, from {source.path}"
    fooled = fooled_by(attack, source, source.right.nonzero().squeeze(1), targets, label)
    return [
        100 * of[source.right & target.right].double().mean().item() for of, target in zip(fooled, targets)
    ]


def measure(subject, args, attacks, official, cinic):
    """Put what the flags ask for, except --transfer, into the subject. attacks: {name: class}."""
    numbers = subject.numbers
    data = subject.data
    accuracy, calibration, subject.bins = evaluate_images(subject, data.test_images, data.test_labels)
    numbers["accuracy (%)"] = accuracy
    if args.ece or not args.attacks:
        numbers |= calibration
    if cinic:
        numbers["CINIC (%)"] = evaluate_images(subject, *cinic)[0]
    if args.pgd:
        for eps in args.eps:
            for k, accuracy in zip(args.pgd, evaluate_pgd(subject, eps, args)):
                numbers[pgd_column(k, eps)] = accuracy
    for name, attack in attacks.items():
        for eps in args.eps:
            numbers[f"{name}, ε {eps_name(eps)} (%)"] = evaluate_attack(subject, attack, eps, args)
    if args.cifar_c is not None:
        subject.corruptions = evaluate_corruptions(subject, args, official)
        numbers[f"mCA, {'official' if official else 'generated'} (%)"] = (
            subject.corruptions["accuracy"]["mean"]
        )
        numbers["natural robustness (%)"] = subject.corruptions["natural robustness"]["mean"]


# ------------------------------------------------------------------------------------- memory of wrong labels
# Neural Vicinal Risk Minimization, section 3.5 and appendix B. A network that has memorised a wrong label
# forgets it on views of the image on which it was not trained.


def seen(model, view, images):
    """Softmax [N, C] of a view of each of the uint8 images [N, 3, H, W].

    view: a function of float [B, 3, H, W], which gives the same.
    """
    with model.register_forward_pre_hook(lambda _, inputs: view(*inputs)):
        return predict(model, images).softmax(1)


def views_of(subject):
    """Three views of images, functions of float [B, 3, H, W]: as they are, as in training, AutoAugment.

    Photographs are cut to the size in which the subject saw them; in the first and last view to their middle.
    The view as in training is the script's student_view, where the run has --student-augment, else a crop and
    a flip.
    """
    size = subject.data.image_size
    height, width = subject.data.test_images.shape[2:]
    plain = functools.partial(middle, height=height, width=width)
    as_in_training = functools.partial(common.crop_flip, size=size)
    augment = subject.config.get("student_augment")
    if augment:  # nrd.py or its fork
        name = subject.config["script"].split(",")[0]  # without its network
        script = importlib.import_module(name)
        as_in_training = functools.partial(script.student_view, augment=augment, size=size)
    return plain, as_in_training, lambda images: common.auto_augment(plain(images))


def training_labels(args, subject):
    """The Dataset on which a subject was trained, and the labels that training was given, int64 [N].

    Raises UsageError where these cannot be told, and where fewer than four of them are right or wrong.
    """
    config = subject.config
    about = f"--memory: {subject.path}"
    for flag in ("imbalance", "validation"):
        if config.get(flag):
            raise UsageError(f"{about} was trained on a part of the images; train it without --{flag}")
    data = read_data(args, subject.dataset, config, test_only=False)
    if config.get("train_digest", data.train_digest) != data.train_digest:
        raise UsageError(f"{about} was trained on other images or labels than {subject.dataset} has now")
    noise = argparse.Namespace(**config | {"data_dir": args.data_dir or config["data_dir"]})
    # as the script calls noisy_labels; a teacher is given the labels of a script that has per_sample
    per_sample = config["script"] == "teacher" or "per_sample=True" in str(subject.source)
    given = common.noisy_labels(noise, data, per_sample)
    wrong = int((given != data.train_labels).sum())
    if not 4 <= wrong <= len(given) - 4:
        raise UsageError(f"{about}: {wrong} of its {len(given)} labels are wrong; train it with --noise")
    return data, given


VIEWS = {"views as in training": "tab:red", "AutoAugment, unseen": "tab:blue"}


def report_memory(args, subjects):
    """Print, record and draw what each subject predicts for its training images.

    For the images as they are, and the mean over args.memory views of each: AutoAugment and random erasing,
    as in Table 1 and Figure 1. Figure 2a and Table 6 have AutoAugment alone. The pictures are memory1.png for
    the first row that is printed, and so on. Of several epochs of one run there is confidence.png too.
    """
    from scipy.stats import mannwhitneyu  # a second to import, and only here

    confidence = {}  # {epoch: p(true class) [2 kinds of views, 4 mislabelled images, 40 views]}
    for number, subject in enumerate(subjects, 1):
        torch.manual_seed(args.seed)
        data, given = training_labels(args, subject)
        images = data.train_images
        true = data.train_labels
        wrong = given != true
        plain, as_in_training, auto_augment = views_of(subject)
        unseen = [lambda x, view=auto_augment: common.random_erasing(view(x))] * args.memory
        masks = {"clean": ~wrong, "mislabelled": wrong, "overall": wrong | ~wrong}
        rows = {}  # of Table 1
        nll = {}  # of the true class, of each mislabelled image
        bins = {}  # the accuracy of each bin of confidence
        for name, views in (("images as they are", [plain]), (f"{args.memory} unseen views", unseen)):
            p = sum(seen(subject.model, view, images) for view in views) / len(views)
            rows[name] = {subset: common.accuracy(p[mask], true[mask]) for subset, mask in masks.items()}
            rows[name]["ECE"], bins[name], *_ = common.calibration(p, true)
            nll[name] = -p[wrong, true[wrong]].clamp(min=1e-30).log().cpu().numpy()
        auroc = float(mannwhitneyu(*nll.values()).statistic) / int(wrong.sum()) ** 2
        record(args, subject.path, {"memory": rows, "AUROC": auroc})
        lines = [[f"{subject.path}, AUROC {auroc:.4f}, accuracy (%) for the true label", *masks, "ECE"]]
        lines += [[name, *(f"{value:.2f}" for value in row.values())] for name, row in rows.items()]
        print_table(lines)

        some = [mask.nonzero().squeeze(1) for mask in (~wrong, wrong)]
        some = torch.cat([rows[evenly_spaced(len(rows), count)] for rows, count in zip(some, (3, 4))])
        repeated = images[some.to(images.device)].repeat_interleave(40, 0)
        clouds = [seen(subject.model, view, repeated) for view in (as_in_training, auto_augment)]
        clouds = torch.stack(clouds).unflatten(1, (7, 40)).cpu()
        given = given[some].tolist()
        true = true[some].tolist()
        epoch = subject.metrics[-1]["epoch"]
        confidence[epoch] = torch.stack([clouds[:, k, :, true[k]] for k in range(3, 7)], 1)
        path = args.out / f"memory{number}.png"
        title = f"{subject.path}, epoch {epoch}, AUROC {auroc:.3f}"
        with common.panels(path, title, 9, 4.2, 3.6, pdf=args.pdf) as (figure, drawn):
            draw_memory(drawn, nll, bins, clouds, given, true, data.classes)
            legend_below(figure)
    if len(confidence) > 1 and len({str(subject.config) for subject in subjects}) == 1:
        draw_confidence(args, confidence)


def draw_memory(panels, nll, bins, clouds, given, true, classes):
    """Figure 1, of the mislabelled images; Figure 2b, calibration of all images for the true labels;
    Figure 2a, softmax vectors in the polygon of classes (equiradial projection), a panel per image.

    nll, bins: {kind of views: array}. clouds: [2 kinds of views, images, views, C]. given, true: the classes
    of these images.
    """
    histogram, calibration, *polygons = panels
    edges = np.linspace(0, max(map(max, nll.values())), 41)
    for name, colour in zip(nll, VIEWS.values()):
        style = {"color": colour, "alpha": 0.5, "label": name}
        histogram.hist(nll[name], edges, density=True, **style)
        calibration.stairs(bins[name], np.linspace(0, 1, len(bins[name]) + 1), fill=True, **style)
    histogram.set(xlabel="-log p(true class), mislabelled images", ylabel="density")
    calibration.plot([0, 1], [0, 1], "k--", lw=1)
    calibration.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy for the true label")
    angles = torch.arange(len(classes)) * (2 * math.pi / len(classes))
    corners = torch.stack([angles.cos(), angles.sin()], 1)  # [C, 2]; a softmax vector p lies at p @ corners
    for k, axes in enumerate(polygons):
        axes.fill(*corners.T, fill=False)
        axes.plot(*corners[given[k]], "s", color="tab:orange", ms=14, mfc="none", mew=2, label="given label")
        axes.plot(*corners[true[k]], "*", color="tab:green", ms=14, label="true class")
        for (label, colour), cloud, marker in zip(VIEWS.items(), clouds, "+."):
            axes.plot(*(cloud[k] @ corners).T, marker, color=colour, ms=8, alpha=0.6, label=label)
        axes.set_title(f"{classes[true[k]]}\nlabelled {classes[given[k]]}", fontsize="medium")
        axes.set_aspect("equal")
        axes.axis("off")


def draw_confidence(args, confidence):
    """Table 6, left: p(true class) of four mislabelled images over the epochs, mean and quartiles."""
    epochs = sorted(confidence)
    values = torch.stack([confidence[epoch] for epoch in epochs], 2)  # [2, 4, epochs, 40]
    title = "four mislabelled images: p(true class), mean and quartiles of 40 views"
    with common.panels(args.out / "confidence.png", title, 4, 4, 3, True, args.pdf) as (figure, drawn):
        for k, axes in enumerate(drawn):
            for (label, colour), p in zip(VIEWS.items(), values[:, k]):
                low, high = p.quantile(torch.tensor([0.25, 0.75]), 1)
                axes.fill_between(epochs, low, high, color=colour, alpha=0.2)
                axes.plot(epochs, p.mean(1), ".-", color=colour, label=label)
            axes.set(xlabel="epoch", ylim=(0, 1))
        legend_below(figure)


# -------------------------------------------------------------------------------------------------- reporting


def eps_name(eps):
    """8/255 for 0.0313725…, the decimal for 0.031."""
    whole = round(eps * 255)
    return f"{whole}/255" if math.isclose(eps * 255, whole, abs_tol=1e-6) else f"{eps:.4g}"


def pgd_column(steps, eps):
    return f"PGD-{steps}, ε {eps_name(eps)} (%)"


ERRORS = ("ECE", "NLL", "Brier")  # columns in which less is better


def statistic(members, column):
    """Mean, sample standard deviation (None of one) and number of a column over subjects."""
    values = [subject.numbers[column] for subject in members]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def cell(members, column):
    """94.28, or 94.28 ± 0.09 (5) for five seeds."""
    mean, std, n = statistic(members, column)
    digits = 4 if column in ERRORS else 2
    return f"{mean:.{digits}f}" if n == 1 else f"{mean:.{digits}f} ± {std:.{digits}f} ({n})"


def print_table(lines):
    """lines: lists of texts. The first one is the header; a line begins with the name of its row."""
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for name, *texts in lines:
        print(name.ljust(first), *(text.rjust(width) for text, width in zip(texts, widths)), sep="  ")


def record(args, path, numbers):
    """Add a line to evaluation.jsonl in --out: numbers, their checkpoint, the command and the date."""
    entry = {
        "date": datetime.datetime.now().isoformat(" ", "seconds"),
        "command": shlex.join(sys.argv),
        "checkpoint": path,
        "digest": None,
        "numbers": numbers,
    }
    if Path(path).is_file():
        entry["digest"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    entry = json.loads(json.dumps(entry), parse_constant=lambda nan: None)  # JSON has no NaN
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "evaluation.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        print(error, file=sys.stderr)


TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "ε": r"$\epsilon$", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
}  # fmt: skip


def latex(lines):
    """A tabular of booktabs, of lines as for print_table.

    The best of several values of a column is bold, where its name tells whether more is better.
    """
    caption, *columns = lines[0]
    texts = [[text.translate(str.maketrans(TEX)) for text in line] for line in lines]
    texts[0][0] = ""
    for j, column in enumerate(columns, 1):
        means = [float(line[j].split()[0]) for line in lines[1:]]
        known = [mean for mean in means if not math.isnan(mean)]
        if len(known) > 1 and (column in ERRORS or "(%)" in column):
            best = min(known) if column in ERRORS else max(known)
            for line, mean in zip(texts[1:], means):
                if mean == best:
                    line[j] = rf"\textbf{{{line[j]}}}"
    head, *body = [" & ".join(line) + r" \\" for line in texts]
    begin = rf"\begin{{tabular}}{{l{'r' * len(columns)}}} \toprule  % \usepackage{{booktabs}}; {caption}"
    return "\n".join([begin, head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def write_table(path, tables):
    """Write tables, each lines as for print_table, as CSV, Markdown or LaTeX."""
    texts = []
    for lines in tables:
        if path.suffix == ".csv":
            file = io.StringIO()
            csv.writer(file).writerows(lines)
            texts.append(file.getvalue())
        elif path.suffix == ".md":
            rows = [[text.replace("|", r"\|") for text in line] for line in lines]
            rows.insert(1, ["---"] * len(lines[0]))
            texts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
        else:
            texts.append(latex(lines))
    with common.atomic_write(path) as partial:
        partial.write_text("\n".join(texts), encoding="utf-8", newline="")
    print(f"wrote {path}")


def report(args, groups, teacher):
    """Print the tables and write the files. teacher: a list, empty without one."""
    subjects = [subject for _, members in groups for subject in members]
    columns = list(subjects[0].numbers)
    test_sets = heading = "; ".join(sorted({subject.test_set for subject in subjects}))
    if args.pgd:
        worst = "start of each sample" if args.worst_start else "restart"
        heading += f"; PGD: worst {worst} of {args.restarts}"
    lines = [[heading, *columns]]
    for name, members in groups:
        lines.append([name, *(cell(members, column) for column in columns)])
    print_table(lines)
    if args.table and args.table.suffix == ".csv":  # numbers, not texts
        lines = [[heading, *(f"{column} {kind}" for column in columns for kind in ("mean", "std", "n"))]]
        for name, members in groups:
            lines.append([name, *(v for column in columns for v in statistic(members, column))])
    tables = [lines]
    if args.transfer:
        tables.append(report_transfer(args, groups, teacher))
    if args.ece:
        draw_reliability(args, groups)
    if len(args.pgd) > 1 or args.pgd and len(args.eps) > 1:
        draw_pgd(args, groups, heading)
    if args.plot_by:
        draw_by(args, subjects, heading)
    if args.cifar_c is not None:
        draw_corruptions(args, groups, f"{test_sets}; CIFAR-C, {args.cifar_c or 'generated'}")
    if args.table:
        write_table(args.table, tables)


def report_transfer(args, groups, teacher):
    """The matrix of KD Beyond's Figure 1: targets in rows, sources in columns, the teacher after the mean.

    ONE and DML have no teacher and are not in that figure: they have a row and a column, but no part in the
    means. Returns lines as for print_table.
    """
    subjects = [subject for _, members in groups for subject in members]
    names = [f"{name} seed {subject.config['seed']}" for name, members in groups for subject in members]
    counted = [i for i, subject in enumerate(subjects) if subject.config.get("method") not in ("one", "dml")]
    values = np.array([evaluate_transfer(source, subjects, args) for source in subjects + teacher]).T
    values = np.insert(values, len(subjects), values[:, counted].mean(1), axis=1)
    values = np.vstack([values, values[counted].mean(0)]).tolist()
    rows = [*(f"{i}: {name}" for i, name in enumerate(names, 1)), "mean"]
    columns = [*(str(i) for i in range(1, len(rows))), "mean", *("teacher" for _ in teacher)]
    lines = [[f"{subjects[0].test_set}: success rate (%), source → / target ↓", *columns]]
    lines += [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(rows, values)]
    print_table(lines)
    record(args, "", {"rows are targets": rows, "columns are sources": columns, "success_rate": values})
    size = 6 + 0.8 * len(columns), 2.5 + 0.45 * len(rows)
    with common.picture(args.out / "transfer.png", *size, args.pdf) as figure:
        axes = figure.subplots()
        heat_map(axes, values, rows, columns, f"success rate (%), PGD-20, ε = {eps_name(args.eps[0])}")
        blank = "; blank: no image that both classify correctly" if np.isnan(values).any() else ""
        axes.set(xlabel=f"source{blank}", ylabel="target")
    return lines


# --------------------------------------------------------------------------------------------------- pictures


def heat_map(axes, values, rows, columns, title):
    """Numbers in coloured cells; NaN leaves a cell empty."""
    values = np.array(values)
    axes.imshow(values, aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), v in np.ndenumerate(values):
        if not math.isnan(v):
            axes.text(j, i, f"{v:.3g}", ha="center", va="center", color="w" if v <= middle else "k")
    axes.set_title(title)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=90)


def label_of(name):
    """The name of a row as a legend takes it: matplotlib leaves out what begins with _."""
    return f" {name}" if name.startswith("_") else name


def draw_means(axes, groups, points):
    """A curve per row of the tables: the mean over its seeds, ± standard deviation as a band.

    points: {subject: [(place on the x-axis, number)]}. Returns how many seeds each point of a curve is of.
    """
    counts = []
    for i, (name, members) in enumerate(groups):
        numbers = {}  # {place: those of the seeds}
        for subject in members:
            for place, number in points[subject]:
                numbers.setdefault(place, []).append(number)
        if not numbers:
            continue
        places = sorted(numbers)
        mean = np.array([statistics.fmean(numbers[place]) for place in places])
        std = np.array([np.std(numbers[place], ddof=len(numbers[place]) > 1) for place in places])
        color = f"C{i % 10}"
        axes.plot(places, mean, ".-" if i < 10 else ".--", color=color, label=label_of(name))
        axes.fill_between(places, mean - std, mean + std, color=color, alpha=0.2, lw=2)  # lw: for one place
        counts += map(len, numbers.values())
    axes.grid(alpha=0.3)
    return counts


def legend_below(figure, counts=(1,)):
    """One legend for all panels, in as many columns as fit. The figure grows by its height.

    counts: of draw_means; where there are several seeds, the title says how many, and what the bands are.
    """
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    letters = round(13 * figure.get_figwidth())  # that fit beside one another
    labels = [textwrap.fill(label, letters - 8) for label in handles]
    columns = max(1, letters // (max(map(len, labels)) + 8))
    few = min(counts)
    many = max(counts)
    seeds = many if few == many else f"{few} to {many}"
    title = f"mean ± standard deviation of {seeds} seeds" if many > 1 else None
    style = {"loc": "outside lower center", "fontsize": "small", "title_fontsize": "small"}
    figure.legend(handles.values(), labels, title=title, ncols=columns, **style)
    figure.set_figheight(figure.get_figheight() + 0.2 * (len(labels) / columns + 1))


KEPT_APART = {"script", "dataset", "amp", "train_digest", "test_digest", "torch", "commit"}  # in draw_by


def draw_by(args, subjects, heading):
    """Each column of the tables over a flag of training: a curve for each value of the other flags given.

    Over two flags: a heat map of the means, the second flag across, the first and all others down. Runs
    without the last flag are left out, as a teacher without sigma.
    """
    *first, flag = args.plot_by
    subjects = [subject for subject in subjects if subject.config.get(flag) is not None]
    apart = KEPT_APART.union(first, *(subject.config["given"] for subject in subjects))
    follow = {name for subject in subjects for name in subject.config} - apart  # what presets set
    groups = grouped(subjects, [flag, *follow])
    values = {subject: subject.config[flag] for subject in subjects}
    numeric = all(isinstance(value, (int, float)) for value in values.values())
    if not numeric:
        values = {subject: str(value) for subject, value in values.items()}
    across = sorted(set(values.values()))
    places = across if numeric else range(len(across))
    columns = list(subjects[0].numbers)
    path = args.out / f"by-{'-'.join(args.plot_by)}.png"
    height = max(3.4, 0.3 * len(groups))
    with common.panels(path, heading, len(columns), 4.8, height, bool(first), args.pdf) as (figure, drawn):
        for axes, column in zip(drawn, columns):
            if first:
                means = []
                for _, members in groups:
                    seeds = [[s.numbers[column] for s in members if values[s] == value] for value in across]
                    means.append([statistics.fmean(numbers) if numbers else math.nan for numbers in seeds])
                heat_map(axes, means, [name for name, _ in groups], across, column)
            else:
                if numeric and min(across) > 0 and max(across) >= 20 * min(across):
                    axes.set_xscale("log")
                place_of = dict(zip(across, places))
                points = {
                    subject: [(place_of[values[subject]], subject.numbers[column])] for subject in subjects
                }
                counts = draw_means(axes, groups, points)
                axes.set_xticks(places, across)
                axes.minorticks_off()
                axes.set_ylabel(column)
            axes.set_xlabel(flag)
        if not first:
            legend_below(figure, counts)


def draw_reliability(args, groups):
    """A reliability diagram per group, the bins of its seeds pooled."""
    path = args.out / "reliability.png"
    with common.panels(path, "", len(groups), 4, 4.2, True, args.pdf) as (figure, drawn):
        for axes, (name, members) in zip(drawn, groups):
            shares = np.array([subject.bins["share"] for subject in members])  # [seeds, bins]
            weights = shares + 1e-12  # empty bins have accuracy 0
            accuracy = np.average([subject.bins["accuracy"] for subject in members], 0, weights)
            confidence = np.average([subject.bins["confidence"] for subject in members], 0, weights)
            edges = np.linspace(0, 1, len(accuracy) + 1)
            axes.stairs(accuracy, edges, fill=True, color="tab:blue", label="accuracy")
            gap = {"color": "none", "edgecolor": "tab:red", "hatch": "////", "label": "gap to confidence"}
            axes.bar(edges[:-1], confidence - accuracy, edges[1], accuracy, align="edge", **gap)
            axes.stairs(shares.mean(0), edges, color="k", label="share of samples")
            axes.plot([0, 1], [0, 1], "k--", lw=1)
            axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
            axes.set_title(textwrap.fill(f"{name}, ECE {cell(members, 'ECE')}", 45), fontsize="medium")
        legend_below(figure)


def draw_corruptions(args, groups, title):
    """Figure 3: a bar per corruption and model, the mean over its seeds."""
    rows = [*CORRUPTIONS, "mean"]
    places = np.arange(len(rows))
    thickness = 0.8 / len(groups)
    height = 4 + 3 * len(groups)
    with common.panels(args.out / "cifar-c.png", title, 2, 5, height, True, args.pdf) as (figure, drawn):
        for axes, kind in zip(drawn, ("accuracy", "natural robustness")):
            for i, (name, members) in enumerate(groups):
                means = [statistics.fmean(s.corruptions[kind][row] for s in members) for row in rows]
                bars = axes.barh(places + i * thickness, means, thickness, align="edge", label=label_of(name))
                axes.bar_label(bars, fmt="%.0f", fontsize="x-small", padding=2)
            axes.set_yticks(places + 0.4, rows)
            axes.set(xlabel=f"{kind} (%)", xlim=(0, 105), ylim=(len(rows), -0.2))
        legend_below(figure)


def draw_pgd(args, groups, heading):
    """Accuracy by the number of PGD's steps at the smallest ε, and by ε at the largest number; 0 is clean."""
    subjects = [subject for _, members in groups for subject in members]
    steps = args.pgd[-1]
    sweeps = {  # label of the axis: (place on it, tick, column of the tables)
        "PGD steps": [(k, str(k), pgd_column(k, args.eps[0])) for k in args.pgd],
        f"ε of PGD-{steps}": [(eps, eps_name(eps), pgd_column(steps, eps)) for eps in args.eps],
    }
    sweeps = {label: points for label, points in sweeps.items() if len(points) > 1}
    with common.panels(args.out / "pgd.png", heading, len(sweeps), 6, 4.2, pdf=args.pdf) as (figure, drawn):
        for axes, (label, points) in zip(drawn, sweeps.items()):
            places, ticks, columns = zip((0, "0", "accuracy (%)"), *points)
            numbers = {
                s: [(place, s.numbers[column]) for place, column in zip(places, columns)] for s in subjects
            }
            counts = draw_means(axes, groups, numbers)
            axes.set_xscale("symlog", linthresh=min(place for place in places if place > 0))
            axes.set_xticks(places, ticks, rotation=45)
            axes.minorticks_off()
            axes.set(xlabel=label, ylabel="accuracy (%)", ylim=(0, None))
        legend_below(figure, counts)


LABELS = {  # of the metrics whose names do not say it
    "lr": "learning rate",
    "train_acc_right": "right labels that are predicted (%)",
    "train_acc_wrong": "wrong labels that are predicted (%)",
    "train_acc_wrong_true": "wrongly labelled, true class predicted (%)",
}


def draw_curves(args, groups):
    """The metrics of training over its epochs: the mean of a group's seeds, ± standard deviation as a band.

    args.curves: names of metrics; empty: all except learning rate and speed. A group that lacks a metric is
    not in its panel. Raises UsageError for a metric that no run has.
    """
    subjects = [subject for _, members in groups for subject in members]
    records = [record for subject in subjects for record in subject.metrics]
    known = [key for record in records for key, value in record.items() if isinstance(value, (int, float))]
    for name in args.curves:
        if name not in known:
            raise UsageError(f"--curves: no run has {name}; they have {', '.join(sorted(set(known)))}")
    unseen = ("epoch", "lr", "seconds", "images_per_second")
    names = args.curves or [key for key in dict.fromkeys(known) if key not in unseen]
    counts = []
    with common.panels(args.out / "training.png", "", len(names), 5, 3.4, pdf=args.pdf) as (figure, drawn):
        for key, axes in zip(names, drawn):
            points = {}
            for subject in subjects:
                records = [record for record in subject.metrics if record.get(key) is not None]
                points[subject] = [(record["epoch"], record[key]) for record in records]
            counts += draw_means(axes, groups, points)
            label = key.replace("acc", "accuracy").replace("top5", "top-5 accuracy").replace("_", " ")
            label = f"{label} (%)" if "accuracy" in label else label
            axes.set(xlabel="epoch", ylabel=LABELS.get(key, label))
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend_below(figure, counts)


# ------------------------------------------------------------------------------------------------------- main


def main(args):
    """Evaluate what the flags name."""
    common.setup(args)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    load_dataset.cache_clear()  # files may have changed since an earlier call

    subjects = []
    if args.arch or args.model:
        flags = {"teacher_model": args.model, "teacher_arch": args.arch, "mean": args.mean, "std": args.std}
        for path in args.checkpoints or [None]:
            subjects.append(subject_of_weights(path, flags, args.dataset, args))
    else:
        for path in args.checkpoints:
            try:
                checkpoint = common.load_checkpoint(path, "CKPT")
            except UsageError as error:  # as of a run that was killed in its first epoch
                if len(args.checkpoints) == 1:
                    raise
                print(f"left out: {error}", file=sys.stderr, flush=True)
            else:
                subjects.append(subject_of_run(path, checkpoint, args.part, args))
        if not subjects:
            raise UsageError("CKPT: none of these can be evaluated; name checkpoints of runs")
    groups = grouped(subjects)
    subjects = [subject for _, members in groups for subject in members]
    if args.memory:
        report_memory(args, subjects)
    if args.curves is not None:
        draw_curves(args, groups)
    if not args.measures:
        return

    if args.plot_by and all(subject.config.get(args.plot_by[-1]) is None for subject in subjects):
        raise UsageError(f"--plot-by: name one or two flags of config.json, not {' '.join(args.plot_by)}")
    teacher = [find_teacher(subjects, args)] if args.teacher else []
    if args.transfer and len({subject.data.test_digest for subject in subjects + teacher}) > 1:
        raise UsageError("--transfer: the checkpoints have different test sets; --dataset NAME takes one")
    attacks = {name: load_attack(name, min(len(s.data.classes) for s in subjects)) for name in args.attack}
    official = read_cifar_c(Path(args.cifar_c), subjects) if args.cifar_c else None
    cinic = None
    if args.cinic:
        if any(list(subject.data.classes) != CIFAR10 for subject in subjects):
            raise UsageError("--cinic: has the classes of cifar10, and a checkpoint has other ones")
        cinic = [part.to(args.device) for part in load_cinic(args.cinic, args.seed)]
    for subject in subjects:
        measure(subject, args, attacks, official, cinic)
        record(args, subject.path, {"test set": subject.test_set, **subject.numbers})
    report(args, groups, teacher)


if __name__ == "__main__":
    common.run(parse_args, main)
