"""What the scripts share, in the order the data flows through it:

    arguments -> processes -> data -> label noise -> augmentation -> models -> run folders -> teachers -> reporting

Functions take tensors and return tensors; copy one out if that is all you need. What a method is about (its loss, its
loop, its hyperparameters) is never in this file: it stands in the method's own script.
A fork may delete what it does not call: processes (torchrun), the data sets, kinds of noise, augmentations and
architectures of others, teachers. Arguments, run folders and reporting belong to every script.

Conventions. Images at rest are uint8 [N, 3, H, W]. Images in flight are float32 [B, 3, H, W] in [0, 1]; normalisation
is part of the model. Labels are int64. Accuracies are percentages. Random draws come from torch's global generator of
the tensor's device, so that `torch.manual_seed` and the random states in a checkpoint determine them; label noise has
a seed of its own.
"""

import argparse
import codecs
import contextlib
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl
except ImportError:  # Windows has none: run folders are not locked there
    fcntl = None

# torchvision and matplotlib are imported where they are used: each takes a second, and --help should not wait for them.

# ------------------------------------------------------------------------------------------------------------ arguments


class UsageError(ValueError):
    """Something that the user can mend: the message names the flag or file and says what would work."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the script's docstring as it is written, and the default of every flag."""


def share(text):
    """argparse type: a float in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def positive(text):
    """argparse type: a float above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def count(text):
    """argparse type: an int from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def checkpoint_file(path):
    path = Path(path)
    return path / "checkpoint.pt" if path.is_dir() else path


def argument_parser(file, doc, notes=None):
    """The parser of the script `file` with the flags that every training script has. `parse` completes it.

    doc, notes: what --help shows before and after the flags.
    """
    parser = argparse.ArgumentParser(
        Path(file).name, description=doc, epilog=notes, formatter_class=HelpFormatter, add_help=False
    )
    parser.set_defaults(script=Path(file).stem)
    add = parser.add_argument_group("data and label noise").add_argument
    add("--dataset", default="shapes", metavar="NAME", help=DATASETS)
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where data sets are kept")
    add("--noise", choices=NOISE_KINDS, help="how training labels are corrupted")
    add("--rate", type=share, help="share of training labels to corrupt; human-* has its own")
    add("--noise-seed", type=int, default=0, help="of label noise: one corruption for all --seed")
    add("--limit-train", type=count, metavar="N", help="use N evenly spaced training samples")
    add("--limit-test", type=count, metavar="N", help="use N evenly spaced test samples")
    add("--resize", type=count, default=256, metavar="PIXELS", help="photographs: side of the square that is kept")
    add("--image-size", type=count, default=224, metavar="PIXELS", help="photographs: side of the crop a model sees")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, help="passes over the training set; the schedule scales along")
    add("--batch-size", type=count, help="images a step; the incomplete last batch is left out")
    add("--lr", type=positive, help="initial learning rate")
    add("--weight-decay", type=share, help="L2 penalty of the optimiser")
    add("--seed", type=int, nargs="+", default=[0], help="of weights, batches, augmentation; several: a run each")

    add = parser.add_argument_group("machine and output").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--amp", action=argparse.BooleanOptionalAction, help="models compute in bfloat16; on where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--out", type=Path, metavar="DIR", help="run folder; None: in runs/, named by the flags that are given")
    add("--resume", action="store_true", help="continue the run in the run folder, or start it")
    add("--tensorboard", action="store_true", help="write the metrics for TensorBoard too, into the run folder")
    return parser


TEACHER = ("teacher", "teacher_arch", "teacher_model", "mean", "std", "teacher_seeds")


def add_teacher_arguments(parser):
    """Add the flags of a script that distils from a teacher: TEACHER and --student-arch."""
    add = parser.add_argument_group("teacher and student").add_argument
    add("--teacher", type=Path, metavar="CKPT", help="checkpoint.pt, or public weights; None: train a teacher, once")
    add("--teacher-arch", metavar="ARCH", help="of the teacher that is trained, or of public weights")
    add("--teacher-model", metavar="FILE.py:NAME", help="NAME() gives the teacher, from images in [0, 1] to logits")
    add("--mean", nargs=3, type=float, help="of the images that public weights expect; None: of the training images")
    add("--std", nargs=3, type=float, help="the same, standard deviation")
    add("--teacher-seeds", type=count, default=1, metavar="K", help="train K teachers, take the best")
    add("--student-arch", metavar="ARCH", help="wrn-D-K, resnetD, …")


# These flags do not decide what a run computes, and neither does its name.
MACHINE = ("out", "resume", "device", "data_dir", "tensorboard")


def parse(parser, preset):
    """The command line as a Namespace; flags that are left out have the values of preset(flags as given), a dict.

    `given` is a dict of the flags on the command line that change something: whose value differs from what it would be
    if that flag were left out. `name` is the run folder's: the script, the data set, the noise, and these flags.
    """
    defaults = vars(parser.parse_known_args([])[0])
    unset = object()
    typed = vars(parser.parse_known_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, unset)))[0])
    typed = {flag: value for flag, value in typed.items() if value is not unset}

    def completed(flags):
        values = {**defaults, **flags}
        return {**values, "amp": multiplies_bfloat16(values["device"]), **preset(argparse.Namespace(**values)), **flags}

    parser.set_defaults(**completed(typed))  # --help shows them
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    args = parser.parse_args()
    args.given = {}
    for flag in (flag for flag in typed if flag not in ("seed", *MACHINE)):
        others = {other: value for other, value in typed.items() if other != flag}
        if typed[flag] != completed(others)[flag]:
            args.given[flag] = str(typed[flag]) if isinstance(typed[flag], Path) else typed[flag]
    if args.noise in ("none", *HUMAN):
        refuse(args, ("rate",), f"--noise {args.noise} has no rate")
    if not is_photographs(args.dataset):
        refuse(args, ("resize", "image_size"), f"--dataset {args.dataset} keeps its size")
    others = {flag: value for flag, value in args.given.items() if flag not in ("dataset", "noise", "rate")}
    args.name = folder_name(args.script, args.dataset, args.noise, args.rate, others)
    return args


def refuse(args, flags, why):
    """Raise UsageError where one of these flags is given: nothing reads it, but it would stand in the run's name."""
    for flag in flags:
        if flag in args.given:
            raise UsageError(f"--{flag.replace('_', '-')}: {why}; leave it out")


def find_device(name):
    """The torch.device of --device. Raises UsageError for anything but the CPU and the CUDA devices that are there."""
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"--device {name}: unknown; cpu, cuda and cuda:N work")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA device is visible; --device cpu works")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device {name}: the last visible CUDA device is cuda:{count - 1}")
    return device


def multiplies_bfloat16(device):
    """Whether the hardware of `device`, a text, multiplies bfloat16 itself, without emulation."""
    if find_device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


def folder_name(script, dataset, noise, rate, flags):
    """script-dataset-noise-flag=value-…, in characters that every file system takes; long names end in a digest."""
    if noise == "none":
        noise = "clean"
    elif rate is not None:
        noise = f"{noise}{rate:.12g}"
    parts = [script, dataset.removesuffix(".npz"), noise]
    for flag, value in flags.items():
        parts.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    name = re.sub(r"[^\w.,=+-]", "_", "-".join(parts))
    if len(name.encode()) > 200:
        name = f"{name[:160]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def run(parse_args, main):
    """Run a script: main(args) for each number of --seed; of several, the mean of the metrics that main returns.

    UsageError and OSError become one line and exit status 2. Ctrl-C and SIGTERM end with status 130.
    """
    if not dist.is_torchelastic_launched():  # else torchrun ends a process that waits for others by SIGTERM
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± gets a question mark
    args = ()
    try:
        args = parse_args()
        results = []
        seeds = vars(args).get("seeds") or args.seed
        for seed in seeds:
            out = Path(f"{args.out}-seed{seed}") if args.out and len(seeds) > 1 else args.out
            results.append(main(argparse.Namespace(**{**vars(args), "seed": seed, "out": out})))
        if len(results) > 1 and results[0]:  # pictures have no metrics
            print(f"{len(results)} seeds, last epoch, mean ± standard deviation:")
            for key in [key for key in results[0] if "acc" in key or "top5" in key]:
                values = [metrics[key] for metrics in results]
                if isinstance(values[0], float):
                    print(f"    {key} {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")
    except (UsageError, OSError) as error:  # OSError: no such file, no network, no space left
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        training = "; the same command with --resume goes on after the last finished epoch"
        print(f"\nstopped{training if 'resume' in args else ''}", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def setup(args):
    """Seed the generators, choose the fast paths, join torchrun's processes: the torch.device to run on."""
    device = find_device(args.device)
    if dist.is_torchelastic_launched():
        if not dist.is_initialized():
            dist.init_process_group(timeout=datetime.timedelta(days=1))  # while one downloads, the others wait
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if rank() > 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        if not vars(args).get("amp", True) and not multiplies_bfloat16(args.device):
            print("this GPU has no bfloat16; float32", flush=True)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    return device


# ------------------------------------------------------------------------------------------------------------ processes
# `torchrun --nproc_per_node=N script.py …` starts a script N times. Each process ("rank") has the whole model and takes
# its part of every batch. Before a step, gradients and BatchNorm's running statistics are averaged over the processes.
# All start from the same seed, so that weights stay the same everywhere. Rank 0 alone prints and writes.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor):
    """Add up a tensor over the processes, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average(tensors):
    """Replace each float tensor of a list by its mean over the processes."""
    if world_size() > 1:
        mean = all_reduce(torch.cat([tensor.flatten() for tensor in tensors])) / world_size()
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def act_as_one(optimizer, modules):
    """Make the optimiser of every process take the step of the whole batch."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def before_step(*_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        average(gradients + [value for norm in norms for value in (norm.running_mean, norm.running_var)])

    optimizer.register_step_pre_hook(before_step)


# ----------------------------------------------------------------------------------------------------------------- data


class Dataset(NamedTuple):
    """A labelled image set. The arrays of an .npz file have the names of the first five fields."""

    train_images: torch.Tensor  # uint8 [N, 3, H, W], on the device or, where too large for it, memory-mapped
    train_labels: torch.Tensor  # int64 [N] on the device, in [0, len(classes))
    test_images: torch.Tensor  # uint8 [M, 3, H', W']; of photographs H' < H
    test_labels: torch.Tensor  # int64 [M]
    classes: list  # names, str
    imagenet: tuple | None = None  # webvision: (images, labels) of ILSVRC12's validation images of the same classes

    @property
    def digest(self):
        """Twelve characters that tell this data from other: of its labels and of up to 1,000 images of each part."""
        sha = hashlib.sha256()
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            some = evenly_spaced(len(images), 1000).to(images.device)
            sha.update(images[some].cpu().numpy().tobytes() + labels.cpu().numpy().tobytes())
        return sha.hexdigest()[:12]

    @property
    def test_digest(self):
        sha = hashlib.sha256(self.test_images.cpu().numpy().tobytes())
        sha.update(self.test_labels.cpu().numpy().tobytes())
        return sha.hexdigest()[:12]

    @property
    def image_size(self):
        """The longer side of a test image in pixels, by which build_model chooses an architecture's form."""
        return max(self.test_images.shape[2:])

    def batch(self, index):
        """Training images float32 [B, 3, H, W] in [0, 1] on the device of index, int64 [B]."""
        return to_float(self.train_images[index.to(self.train_images.device)].to(index.device))


ARRAYS = Dataset._fields[:5]
DATASETS = "shapes, cifar10, cifar100, svhn, food101, webvision, FILE.npz, imagefolder:DIR"
CLEANLY_LABELLED = ("shapes", "cifar10", "cifar100", "svhn")  # nrd, cmd and messy_collaboration add noise to these


def is_photographs(name):
    return name in ("food101", "webvision") or name.startswith("imagefolder:")


def load_data(args, device):
    """The Dataset that the flags name. Under torchrun the first process downloads and decodes, the others wait."""
    if rank() > 0:
        barrier()
    limits = args.limit_train, args.limit_test
    data = load_dataset(args.dataset, args.data_dir, *limits, device, args.resize, args.image_size)
    if rank() == 0:
        barrier()
    return data


def load_dataset(name, data_dir="data", limit_train=None, limit_test=None, device="cpu", resize=256, image_size=224,
                 test_only=False):
    """The data set `name` as a Dataset on `device`.

    name: "shapes" (drawn by code), "cifar10", "cifar100", "svhn" (data_dir/NAME.npz; downloaded once where that is
        missing), the path of any .npz file of that form, or photographs: "food101", "webvision" or "imagefolder:DIR"
        (`list_pictures` says where the files lie). These are decoded once, into arrays in data_dir. Arrays of more than
        a third of the device's memory stay memory-mapped on the host.
    limit_train, limit_test: keep that many samples, evenly spaced, so that a file sorted by class stays balanced.
    resize, image_size: of photographs, the side in pixels of training images and of test images.
    Raises UsageError for an unknown name, for files that are missing or malformed, and where a download fails.
    """
    name = str(name)
    data_dir = Path(data_dir)
    device = torch.device(device)
    if name == "shapes":
        data = Dataset(*draw_shapes(2000, seed=0), *draw_shapes(1000, seed=1), SHAPES_CLASSES)
    elif name.endswith(".npz"):
        data = read_npz(Path(name), test_only)
    elif name in CLEANLY_LABELLED:
        path = data_dir / f"{name}.npz"
        if not path.exists():
            download(name, path)
        data = read_npz(path, test_only)
    elif is_photographs(name):
        data = photographs(name, data_dir, resize, image_size, test_only)
    else:
        raise UsageError(f"--dataset: unknown {name!r}; known are {DATASETS}")

    def part(images, labels, limit=None):
        if limit is not None:
            rows = evenly_spaced(len(labels), limit)
            images, labels = images[rows], labels[rows]
        if device.type == "cuda" and images.numel() >= torch.cuda.get_device_properties(device).total_memory / 3:
            return images, labels.to(device)
        return images.to(device), labels.to(device)

    train = part(data.train_images, data.train_labels, limit_train)
    test = part(data.test_images, data.test_labels, limit_test)
    imagenet = part(*data.imagenet) if data.imagenet else None
    return Dataset(*train, *test, data.classes, imagenet)


def evenly_spaced(total, limit):
    """Indices int64 [min(total, limit)], evenly spaced over range(total)."""
    count = min(total, limit)
    return torch.arange(count) * total // count


def read_npz(path, test_only=False):
    """The Dataset in an .npz file, read without pickle. Raises UsageError for a missing file and for wrong arrays."""
    try:
        with np.lib.npyio.NpzFile(path) as file:  # np.load would take a web page for a pickle
            arrays = {name: np.ascontiguousarray(file[name]) for name in (ARRAYS[2:] if test_only else ARRAYS)}
    except Exception as error:  # no such file, or whatever a damaged or foreign one makes numpy raise
        advice = "remove it to download it again" if path.stem in CLEANLY_LABELLED else "README says how to write one"
        raise UsageError(f"--dataset: {path} is no .npz file with {', '.join(ARRAYS)} ({error}); {advice}") from None
    classes = [str(name) for name in arrays["classes"].ravel()]
    for part in ("test",) if test_only else ("train", "test"):
        images = arrays[f"{part}_images"]
        labels = arrays[f"{part}_labels"]
        where = f"--dataset: {path}: {part}"
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise UsageError(f"{where}_images is {images.dtype} {list(images.shape)}, not uint8 [N, 3, H, W]")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise UsageError(f"{where}_labels is {labels.dtype} {list(labels.shape)}, not integer [{len(images)}]")
        if labels.min() < 0 or labels.max() >= len(classes):
            span = f"{labels.min()} to {labels.max()}"
            raise UsageError(f"{where}_labels are {span}, but {len(classes)} classes are named")
        arrays[f"{part}_labels"] = labels.astype(np.int64)
    if test_only:
        arrays |= {"train_images": arrays["test_images"][:0], "train_labels": arrays["test_labels"][:0]}
    tensors = [torch.from_numpy(arrays[name]) for name in ARRAYS[:4]]
    return Dataset(*tensors, classes)


def download(name, path):
    """Fetch cifar10, cifar100 or svhn with torchvision and write it to `path` as .npz."""
    from torchvision.datasets import CIFAR10, CIFAR100, SVHN

    print(f"downloading {name} into {path}", flush=True)
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN}[name]
    splits = ("train", "test") if name == "svhn" else (True, False)
    try:
        parts = [source(path.parent, split, download=True) for split in splits]
    except (OSError, RuntimeError) as error:  # RuntimeError: something else came, such as a web page
        advice = f"try again, or bring {path} from a machine where it works"
        raise UsageError(f"--dataset {name}: torchvision's download failed ({error}); {advice}") from None
    if name == "svhn":
        images = [part.data for part in parts]
        labels = [part.labels for part in parts]
        classes = [str(digit) for digit in range(10)]
    else:
        images = [part.data.transpose(0, 3, 1, 2) for part in parts]
        labels = [part.targets for part in parts]
        classes = parts[0].classes
    arrays = (images[0], np.int64(labels[0]), images[1], np.int64(labels[1]), np.array(classes))
    with atomic_write(path) as partial:
        np.savez(partial, **dict(zip(ARRAYS, arrays)))


def photographs(name, data_dir, resize, image_size, test_only=False):
    """The Dataset of photographs: the middle square of each, `resize` pixels for training, `image_size` for tests."""
    if resize < image_size:
        raise UsageError(f"--resize: {resize} is smaller than --image-size {image_size}")
    try:
        parts, classes = list_pictures(name, data_dir, test_only)
    except (OSError, RuntimeError) as error:  # RuntimeError: as in `download`
        raise UsageError(f"--dataset {name}: {error}; README says where its files belong") from None
    data = {}
    for part, samples in parts.items():
        if part == "train" and test_only:
            continue
        side = resize if part == "train" else image_size
        stem = re.sub(r"[^\w.-]", "_", name)[-60:]  # which every file system takes
        data[part] = decode(samples, resize, side, data_dir / "decoded" / f"{stem}-{part}-{resize}-{side}.raw")
    if test_only:
        data["train"] = [tensor[:0] for tensor in data["test"]]
    return Dataset(*data["train"], *data["test"], classes, data.get("imagenet"))


def list_pictures(name, data_dir, test_only=False):
    """{"train": [(file, label), …], "test": [(file, label), …]} of a data set of photographs, and its classes.

    imagefolder:DIR: DIR/train/CLASS/* and DIR/test/CLASS/* (or val), torchvision's ImageFolder.
    food101: torchvision's Food101 in data_dir, downloaded where it is missing.
    webvision: the first 50 classes of WebVision 1.0 in data_dir/webvision ("mini-WebVision"): training images of
        info/train_filelist_google.txt, test images of info/val_filelist.txt in val_images_256. And as "imagenet", where
        there is a data_dir/imagenet/val/WNID, ILSVRC12's validation images of the same classes of info/synsets.txt.
    """
    import torchvision

    if name == "food101":
        missing = not (data_dir / "food-101" / "images").is_dir()
        sets = {part: torchvision.datasets.Food101(data_dir, part, download=missing) for part in ("train", "test")}
        return {part: list(zip(s._image_files, s._labels)) for part, s in sets.items()}, sets["train"].classes
    if name.startswith("imagefolder:"):
        root = Path(name.removeprefix("imagefolder:"))
        folder = root / "test" if (root / "test").is_dir() else root / "val"
        train = torchvision.datasets.ImageFolder(folder if test_only else root / "train")
        test = torchvision.datasets.ImageFolder(folder)
        if train.classes != test.classes:
            odd = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
            raise UsageError(f"--dataset {name}: train and {folder.name} have other classes: {odd}")
        return {"train": train.samples, "test": test.samples}, train.classes
    root = data_dir / "webvision"
    lines = (root / "info/synsets.txt").read_text(encoding="utf-8").splitlines()
    synsets = [line.split() for line in lines[:50]]
    lists = {"train": ("train_filelist_google.txt", root), "test": ("val_filelist.txt", root / "val_images_256")}
    parts = {}
    for part, (file, folder) in lists.items():
        lines = (root / "info" / file).read_text(encoding="utf-8").splitlines()
        rows = [line.rsplit(maxsplit=1) for line in lines]
        parts[part] = [(folder / path, int(label)) for path, label in rows if int(label) < 50]
    val = data_dir / "imagenet" / "val"
    if val.is_dir():
        folders = [val / wnid for wnid, *_ in synsets]
        parts["imagenet"] = [(file, c) for c, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    return parts, [" ".join(words) for _, *words in synsets]


def read_square(file, resize, side):
    """The picture in `file`: shorter side resized, middle square cut out: uint8 [3, side, side]; None: unreadable.

    The pixels are as stored, like torchvision's ImageFolder: EXIF's orientation and transparency do not count, and of
    several frames the first does. Grey levels of 16 bits are scaled to 8. Unreadable are those of 32 bits too, whose
    range is unknown, and pictures of more than 179 million pixels.
    """
    from PIL import Image
    from torchvision.transforms import v2

    square = v2.Compose([v2.PILToTensor(), v2.Resize(resize), v2.CenterCrop(side)])
    try:
        with Image.open(file) as picture:
            if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
                return None
            if picture.mode.startswith("I"):  # convert would make 255 of all levels above 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            return square(picture.convert("RGB"))
    except Exception:  # whatever a damaged or a huge file makes Pillow raise
        return None


def decode(samples, resize, side, path):
    """The pictures of samples, a list of (file, label): memory-mapped uint8 [n, 3, side, side], and labels int64 [n].

    They are decoded once, into `path`, and again where the files have changed. Unreadable ones are named and left out.
    Raises UsageError where none is left.
    """
    files = [file for file, _ in samples]
    known = []
    for file in files:
        stat = os.stat(file) if os.path.exists(file) else None
        # ctime: an archive sets mtime, often to one time for all files
        known.append([str(file), stat and [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]])
    record = path.with_suffix(".json")  # of what is in `path`; it is written last
    saved = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if saved.get("files") != known or not path.exists():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        read = functools.partial(read_square, resize=resize, side=side)  # what the workers make of each file
        own = torch.Generator()  # the global generator is for the draws of the method
        loader = torch.utils.data.DataLoader(files, None, num_workers=min(cores, 16), collate_fn=read, generator=own)
        for left in path.parent.glob(f"{path.stem}.*.partial{path.suffix}"):
            if time.time() - left.stat().st_mtime > 3600:  # of a process that was killed while it decoded
                left.unlink()
        rows = []
        # written, not mapped: on a full disk, writing into a map kills the process
        with atomic_write(path) as partial, open(partial, "wb") as pixels:
            for i, image in enumerate(progress(loader, f"decoding {len(files):,} pictures into {path}")):
                if image is None:
                    print(f"cannot be read and is left out: {files[i]}", file=sys.stderr)
                else:
                    pixels.write(image.numpy().tobytes())
                    rows.append(i)
            record.unlink(missing_ok=True)  # it tells of the old pixels
        saved = {"files": known, "rows": rows}
        with atomic_write(record) as partial:
            partial.write_text(json.dumps(saved), encoding="utf-8")
        print(f"decoded {len(rows):,} pictures, left out {len(files) - len(rows):,}")
    rows = saved["rows"]
    if not rows:
        raise UsageError(f"--dataset: none of the {len(files):,} pictures of {path.stem} can be read")
    images = np.memmap(path, np.uint8, "c", shape=(len(rows), 3, side, side))
    labels = [samples[i][1] for i in rows]
    return torch.from_numpy(images), torch.tensor(labels)


FORMS = ("disc", "bar", "triangle", "cross", "ring")
SHAPES_CLASSES = [f"{fabric} {form}" for form in FORMS for fabric in ("striped", "dotted")]


def draw_shapes(count, seed, size=32):
    """Ten classes of pictures, five forms striped or dotted: uint8 [count, 3, size, size] and labels int64 [count].

    Form and texture decide the class; colours, place, size, angle, phase, background, clutter and pixel noise don't.
    Every operation is one that IEEE 754 rounds exactly (no sin or normal draws): the same pixels on every machine.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    labels = torch.randperm(count, generator=generator) % 10
    form = (labels // 2).view(-1, 1, 1)
    dotted = (labels % 2).view(-1, 1, 1).bool()
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)

    t = uniform(-1, 1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = flip * (1 - t * t) / (1 + t * t), flip * 2 * t / (1 + t * t)  # a point of the unit circle, without sin()
    dx, dy = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # coordinates in the form's own frame
    radius = uniform(0.6, 0.85)
    p, q = (u / radius).abs(), v / radius

    rho = (p * p + q * q).sqrt()
    outline = torch.stack([  # each at most 1 inside the form
        rho / 0.9,
        torch.maximum(p, 3 * q.abs()),
        torch.maximum(1.7320508 * p + q, -2 * q),
        torch.minimum(torch.maximum(p, 3 * q.abs()), torch.maximum(3 * p, q.abs())),
        (rho - 0.72).abs() / 0.25,
    ])  # fmt: skip
    inside = outline.gather(0, form.expand(1, count, size, size))[0] <= 1

    frequency = uniform(2.6, 3.4)
    a = (u * frequency + uniform(0, 1)) % 1 - 0.5
    b = (v * frequency + uniform(0, 1)) % 1 - 0.5
    texture = torch.where(dotted, a * a + b * b < 0.12, a.abs() < 0.25)

    light, dark = uniform(0.7, 1, 3), uniform(0, 0.3, 3)
    slope = x * uniform(-0.15, 0.15).unsqueeze(1) + y * uniform(-0.15, 0.15).unsqueeze(1)
    image = uniform(0.3, 0.7, 3) + slope
    for _ in range(3):  # clutter behind the form
        spot = (x - uniform(-1, 1)) ** 2 + (y - uniform(-1, 1)) ** 2 < uniform(0.08, 0.2) ** 2
        image = torch.where(spot.unsqueeze(1), uniform(0.2, 0.8, 3), image)
    fabric = torch.where(texture.unsqueeze(1), light, dark)
    image = torch.where(inside.unsqueeze(1), fabric, image)
    noise = torch.rand(count, 3, size, size, generator=generator) - 0.5
    image = (image + 0.15 * noise).clamp(0, 1)
    return (image * 255).round().byte(), labels


def channel_stats(images):
    """Mean and standard deviation of each channel of uint8 images [N, 3, H, W], in [0, 1]: two lists of 3.

    Images from 128 pixels up are taken for photographs, which have the values of ImageNet.
    """
    images = getattr(images, "train_images", images)
    if not len(images):
        raise UsageError("--mean, --std: are needed; there are no training images to compute them from")
    if min(images.shape[2:]) >= 128:
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    histograms = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]
    counts = torch.stack(histograms).double().cpu()
    share = counts / counts.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * level).sum(1)
    variance = (share * level**2).sum(1) - mean**2
    std = variance.clamp(min=0).sqrt()
    return mean.tolist(), std.where(std > 0, 1.0).tolist()  # 1 for a constant channel: one divides by it


def to_float(images):
    """uint8 [..., 3, H, W] -> float32 in [0, 1]."""
    return images / 255


# ---------------------------------------------------------------------------------------------------------- label noise

HUMAN = {  # kind: key in the file of CIFAR-10N, the last in that of CIFAR-100N
    "human-aggre": "aggre_label", "human-random1": "random_label1", "human-random2": "random_label2",
    "human-random3": "random_label3", "human-worse": "worse_label", "human-noisy": "noisy_label",
}  # fmt: skip
NOISE_KINDS = ("none", "sym", "sym-other", "pair", "asym", *HUMAN)

CIFAR10_CONFUSIONS = {"bird": "airplane", "cat": "dog", "deer": "horse", "dog": "cat", "truck": "automobile"}
CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale / aquarium_fish flatfish ray shark trout / orchid poppy rose sunflower tulip /
bottle bowl can cup plate / apple mushroom orange pear sweet_pepper / clock keyboard lamp telephone television /
bed chair couch table wardrobe / bee beetle butterfly caterpillar cockroach / bear leopard lion tiger wolf /
bridge castle house road skyscraper / cloud forest mountain plain sea / camel cattle chimpanzee elephant kangaroo /
fox porcupine possum raccoon skunk / crab lobster snail spider worm / baby boy girl man woman /
crocodile dinosaur lizard snake turtle / hamster mouse rabbit shrew squirrel /
maple_tree oak_tree palm_tree pine_tree willow_tree / bicycle bus motorcycle pickup_truck train /
lawn_mower rocket streetcar tank tractor"""


def noisy_labels(args, data, per_sample=False):
    """The training labels of a Dataset, int64 [N], corrupted as --noise, --rate and --noise-seed say."""
    noise = args.noise, args.rate, data.classes, args.noise_seed
    return corrupt_labels(data.train_labels, *noise, args.data_dir, per_sample)


def corrupt_labels(labels, kind, rate, classes, seed, data_dir="data", per_sample=False):
    """A noisy copy of int64 labels [N], on the same device; the same for the same seed on every device.

    kind: none
        sym        exactly round(rate·N) samples get a label uniform over all classes (their own included);
                   with per_sample, each sample gets one with probability rate
        sym-other  each sample, with probability rate, gets one of the other classes
        pair       each sample, with probability rate, gets the next class, y+1 mod C
        asym       CIFAR-10: class by class, exactly round(rate·n) of the n samples that now have the label go to its
                   look-alike (Patrini et al. 2017; in this order in GJS's code and NRD's): some cats that became dogs
                   come back, and at a rate of 0.4 18.4 % of the labels are wrong;
                   CIFAR-100: round(rate·N) samples go to the next class of their superclass
        human-*    annotators' labels of CIFAR-10N (aggre, random1-3, worse) and CIFAR-100N (noisy); rate is ignored
    rate: in [0, 1]. classes: their names, which asym goes by. data_dir: where CIFAR-10N's own files lie.
    Raises UsageError for an unknown kind, a rate outside [0, 1], asym without a map, human labels of another data set.
    """
    assert labels.dtype == torch.int64, f"labels are {labels.dtype}, not int64"
    if kind in HUMAN:
        return human_labels(labels.cpu(), kind, data_dir).to(labels.device)
    if kind not in NOISE_KINDS:
        raise UsageError(f"--noise: unknown {kind!r}; known are {', '.join(NOISE_KINDS)}")
    if kind != "none" and not (rate is not None and 0 <= rate <= 1):
        raise UsageError(f"--rate: --noise {kind} needs a rate in [0, 1], not {rate}")
    generator = torch.Generator().manual_seed(seed)
    clean = labels.cpu()
    count = len(labels)
    noisy = clean.clone()
    num_classes = len(classes)
    if kind == "sym":
        if per_sample:
            chosen = (torch.rand(count, generator=generator) < rate).nonzero().squeeze(1)
        else:
            chosen = torch.randperm(count, generator=generator)[: round(rate * count)]
        noisy[chosen] = torch.randint(num_classes, (len(chosen),), generator=generator)
    elif kind in ("sym-other", "pair"):
        flips = torch.rand(count, generator=generator) < rate
        step = torch.randint(1, num_classes, (count,), generator=generator) if kind == "sym-other" else 1
        noisy = torch.where(flips, (clean + step) % num_classes, clean)
    elif kind == "asym":
        names = list(classes)
        if set(CIFAR10_CONFUSIONS) | set(CIFAR10_CONFUSIONS.values()) <= set(names):
            for source, target in CIFAR10_CONFUSIONS.items():
                pool = (noisy == names.index(source)).nonzero().squeeze(1)
                moved = pool[torch.randperm(len(pool), generator=generator)[: round(rate * len(pool))]]
                noisy[moved] = names.index(target)
        elif set(CIFAR100_SUPERCLASSES.replace("/", " ").split()) == set(names):
            successor = torch.arange(num_classes)
            for family in CIFAR100_SUPERCLASSES.split("/"):
                members = sorted(names.index(name) for name in family.split())
                successor[members] = torch.tensor(members[1:] + members[:1])
            moved = torch.randperm(count, generator=generator)[: round(rate * count)]
            noisy[moved] = successor[clean[moved]]
        else:
            raise UsageError("--noise asym: only CIFAR-10 and CIFAR-100 have a map of look-alikes; sym works anywhere")
    return noisy.to(labels.device)


def human_labels(clean, kind, data_dir):
    """CIFAR-N's labels int64 [N] for clean labels int64 [N] in the official order, all of them or evenly spaced."""
    path = Path(data_dir) / ("CIFAR-100_human.pt" if kind == "human-noisy" else "CIFAR-10_human.pt")
    # The file is a pickle of numpy arrays: allow torch's restricted unpickler what builds those, and nothing else.
    array = np.empty(0)
    rebuild, *_ = array.__reduce__()  # the function that makes an array; numpy 2 has given it another name
    allowed = [(rebuild, "numpy.core.multiarray._reconstruct"), rebuild, np.ndarray, np.dtype, codecs.encode]
    try:
        with torch.serialization.safe_globals([*allowed, type(np.dtype(np.int64))]):
            content = torch.load(path, weights_only=True)
        truth = torch.from_numpy(np.int64(content["clean_label"]))
        noisy = torch.from_numpy(np.int64(content[HUMAN[kind]]))
    except Exception as error:  # no such file, or whatever a damaged or foreign one makes the unpickler raise
        advice = "take it from CIFAR-N (github.com/UCSC-REAL/cifar-10-100n)"
        raise UsageError(f"--noise {kind}: cannot read {path} ({type(error).__name__}); {advice}") from None
    rows = evenly_spaced(len(truth), len(clean))
    if not torch.equal(truth[rows], clean):
        raise UsageError(f"--noise {kind}: {path} labels another data set, or the images are not in the official order")
    return noisy[rows]


# --------------------------------------------------------------------------------------------------------- augmentation
# Batched on the images' device, every sample with a draw of its own. What an operation does at a strength is one row of
# a table of numbers: the matrix of a warp, the factor of a blend, and so on. A batch takes its rows; then each of six
# kinds of operation changes the images that are its own, in a handful of kernels however large the batch.
# Pixel values follow the 8-bit operations of torchvision.transforms.v2.

OPS = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),  # warps
    *("Brightness", "Contrast", "Color", "Sharpness"),  # blends; up to here the strength has a random sign
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),  # up to here AugMix
    "Identity",  # up to here RandAugment
    "Invert",  # AutoAugment
)
SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, CONTRAST, COLOR, SHARPNESS = range(9)
POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE, IDENTITY, INVERT = range(9, 15)
# The columns of the table: the kind of operation; a warp's matrix, x = X_X · x + X_Y · y + X_1 and the same for y; a
# blend's factor, and the shares of the grey image and of the mean grey in the image blended with; posterize's step
# between levels; the level from which on solarize inverts.
KIND, X_X, X_Y, X_1, Y_X, Y_Y, Y_1, FACTOR, GRAY, MEAN_GRAY, STEP, THRESHOLD = range(12)

_tables = {}  # op_table's results by its arguments; not functools.cache, through which torch.compile looks


def op_table(bins, height, width, device, translate=150 / 331, posterize=8):
    """What each operation does at each strength, with + and with -: float32 [15, bins, 2, 12] on `device`.

    Strengths are evenly spaced as in torchvision's spaces, from nothing to a shear of 0.3, a turn of 30°, a move of
    `translate` times the side in whole pixels, a blend by 1 ± 0.9, `posterize` - 4 bits, solarize from 0 on.
    AutoAugment and RandAugment move by up to 150/331 of the side and posterize to 8 … 4 bits; AugMix moves by up to
    1/3 and posterizes to 4 … 0 bits.
    """
    key = (bins, height, width, device, translate, posterize)
    if key in _tables:
        return _tables[key]

    def spaced(start, end):
        return torch.linspace(start, end, bins).view(-1, 1)

    sign = torch.tensor([1.0, -1.0])
    shear, angle, change = spaced(0, 0.3) * sign, spaced(0, 30) * sign * (math.pi / 180), spaced(0, 0.9) * sign
    move_x, move_y = (spaced(0, translate * side).trunc() * sign for side in (width, height))
    bits = (posterize - torch.arange(bins) / ((bins - 1) / 4)).round().view(-1, 1)

    table = torch.zeros(len(OPS), bins, 2, 12)
    kinds = [1] * 5 + [2] * 3 + [3, 4, 4, 5, 6, 0, 4]  # in the order of apply_ops; 0: nothing is done
    table[..., KIND] = torch.tensor(kinds).view(-1, 1, 1)

    table[..., [X_X, Y_Y]] = 1
    table[SHEAR_X, ..., X_Y], table[SHEAR_X, ..., X_1] = shear, shear * (height / 2)  # keeps the first row in place
    table[SHEAR_Y, ..., Y_X], table[SHEAR_Y, ..., Y_1] = shear, shear * (width / 2)  # keeps the first column in place
    table[TRANSLATE_X, ..., X_1], table[TRANSLATE_Y, ..., Y_1] = -move_x, -move_y
    table[ROTATE, ..., X_X] = table[ROTATE, ..., Y_Y] = angle.cos()
    table[ROTATE, ..., X_Y], table[ROTATE, ..., Y_X] = -angle.sin(), angle.sin()
    table[..., X_X : X_1 + 1] /= width / 2  # from pixels to grid_sample's units
    table[..., Y_X : Y_1 + 1] /= height / 2

    table[BRIGHTNESS : SHARPNESS + 1, ..., FACTOR] = 1 + change
    table[COLOR, ..., GRAY] = table[CONTRAST, ..., MEAN_GRAY] = 1

    table[..., STEP], table[..., THRESHOLD] = 1, 256
    table[POSTERIZE, ..., STEP] = 2 ** (8 - bits)
    table[SOLARIZE, ..., THRESHOLD] = 255 * spaced(1, 0)
    table[INVERT, ..., THRESHOLD] = 0
    _tables[key] = table.to(device)
    return _tables[key]


def apply_ops(images, table, op, strength, negative, mode="nearest"):
    """Apply to each image its own operation, the row [op, strength, negative] of the table; all three int64 [B].

    images: float [B, 3, H, W] in 0 … 255, overwritten; returns the same. mode: how warps interpolate, "nearest" or
    "bilinear"; what comes in from outside the image is black.
    """
    rows = table[op, strength, negative]
    kinds = (functools.partial(_warp, mode=mode), _blend, _sharpness, _levels, _auto_contrast, _equalize)
    masks = rows[:, KIND] == torch.arange(1, 7, device=images.device).view(-1, 1)
    for mask, transform in zip(masks, kinds):
        if images.device.type == "cpu" and not torch.compiler.is_compiling():  # compute only the rows concerned
            mine = mask.nonzero().squeeze(1)
            if len(mine):
                images.index_copy_(0, mine, transform(images.index_select(0, mine), rows.index_select(0, mine)))
        else:  # compute all rows: to count those concerned, the host would wait for the device
            images = torch.where(mask.view(-1, 1, 1, 1), transform(images, rows), images)
    return images


def check_images(images):
    fits = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    assert fits, f"images are {images.dtype} {list(images.shape)}, not float [B, 3, H, W] in [0, 1]"


def _column(rows, name):
    return rows[:, name].view(-1, 1, 1, 1)


def _warp(images, rows, mode):
    """Shear, translate or rotate: sample the input at matrix · (x, y, 1), x and y in pixels from the centre."""
    height, width = images.shape[2:]
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device).view(-1, 1)
    by_x, by_y, shift = rows[:, X_X : Y_1 + 1].view(-1, 2, 3, 1, 1).unbind(2)
    grid = (by_x * x + by_y * y).add_(shift)  # no matrix product: with TF32 or bfloat16 on, it would be too coarse
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode=mode, align_corners=False)


def _gray(images):
    """Luma of images [B, 3, H, W]: [B, 1, H, W]. The 8-bit operations round it down."""
    red, green, blue = images.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(images, rows):
    """factor · image + (1 - factor) · another: black for brightness, the mean grey for contrast, grey for colour."""
    gray = _gray(images).floor_()
    another = _column(rows, GRAY) * gray + _column(rows, MEAN_GRAY) * gray.mean((2, 3), keepdim=True)
    return torch.lerp(another, images, _column(rows, FACTOR)).clamp_(0, 255)


def _sharpness(images, rows):
    """factor · image + (1 - factor) · smoothed image, which has the border of the image itself."""
    box = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    box = box[..., :-2] + box[..., 1:-1] + box[..., 2:]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = box.add_(images[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return torch.lerp(smooth, images, _column(rows, FACTOR)).clamp_(0, 255)


def _levels(images, rows):
    """Posterize: levels down to a multiple of the step. Solarize, invert: from the threshold on upside down."""
    step = _column(rows, STEP)
    level = (images.round() / step).floor_() * step
    return torch.where(level < _column(rows, THRESHOLD), level, 255 - level)


def _auto_contrast(images, _):
    """Stretch each channel to 0 … 255; one of a single level stays."""
    level = images.round()
    low, high = level.amin((2, 3), keepdim=True), level.amax((2, 3), keepdim=True)
    return torch.where(low < high, (level - low) / (high - low) * 255, level)


def _equalize(images, _):
    """Equalize the histogram of each channel; one with fewer than 255 pixels below its brightest level stays."""
    level = images.round().long().flatten(2)
    histogram = torch.zeros(len(images), 3, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, level, torch.ones_like(level))
    below = histogram.cumsum(2) - histogram
    step = below.gather(2, level.amax(2, keepdim=True)) // 255
    equal = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, equal.gather(2, level), level).to(images.dtype).view_as(images)


def _coins(count, device):
    """Whether each strength is negative: int64 [count], 0 or 1."""
    return (torch.rand(count, device=device) < 0.5).long()


def rand_augment(images, num_ops, magnitude):
    """RandAugment: `num_ops` operations in turn, each drawn uniformly from 14, at strength `magnitude` of 0 … 30.

    This is torchvision's form. The authors of GJS used another package, whose (1, 3) is four times as strong.
    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)
    count, device = len(images), images.device
    table = op_table(31, *images.shape[2:], device)
    images = images * 255
    for _ in range(num_ops):
        op = torch.randint(IDENTITY + 1, (count,), device=device)
        images = apply_ops(images, table, op, magnitude, _coins(count, device))
    return images.div_(255)


def aug_mix(images, severity=3, width=3, depth=-1):
    """AugMix: the image mixed with `width` chains of operations, by weights Dirichlet(1, …, 1) and Beta(1, 1).

    severity: strengths are drawn from the first `severity` of 10. depth: operations a chain; -1 draws 1-3 for each.
    This is torchvision's form; the changes of the original code are 1.4 times as large.
    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)
    count, device = len(images), images.device
    table = op_table(10, *images.shape[2:], device, translate=1 / 3, posterize=4)
    longest = depth if depth > 0 else 3
    draws = (longest, width * count)
    op, strength, negative = (torch.randint(n, draws, device=device) for n in (EQUALIZE + 1, severity, 2))
    if depth < 1:
        length = torch.randint(1, 4, (width * count,), device=device)
        op = torch.where(torch.arange(3, device=device).view(-1, 1) < length, op, IDENTITY)
    chains = (images.expand(width, *images.shape) * 255).flatten(0, 1)
    for step in zip(op, strength, negative):
        chains = apply_ops(chains, table, *step, mode="bilinear")
    weights = torch.empty(width, count, 1, 1, 1, device=device).exponential_()
    weights /= weights.sum(0)  # now Dirichlet(1, …, 1)
    mixed = chains.view(width, *images.shape).mul_(weights / 255).sum(0)
    beta = torch.rand(count, 1, 1, 1, device=device)  # Beta(1, 1)
    return torch.lerp(images, mixed, beta).clamp_(0, 1)  # rounding alone can leave [0, 1]


# The 25 sub-policies of AutoAugment for CIFAR-10: (operation, probability, strength of 0-9), twice.
AUTO_AUGMENT_CIFAR10 = """
Invert .1 0 Contrast .2 6 / Rotate .7 2 TranslateX .3 9 / Sharpness .8 1 Sharpness .9 3 / ShearY .5 8 TranslateY .7 9 /
AutoContrast .5 0 Equalize .9 0 / ShearY .2 7 Posterize .3 7 / Color .4 3 Brightness .6 7 /
Sharpness .3 9 Brightness .7 9 / Equalize .6 0 Equalize .5 0 / Contrast .6 7 Sharpness .6 5 /
Color .7 7 TranslateX .5 8 / Equalize .3 0 AutoContrast .4 0 / TranslateY .4 3 Sharpness .2 6 /
Brightness .9 6 Color .2 8 / Solarize .5 2 Invert 0 0 / Equalize .2 0 AutoContrast .6 0 /
Equalize .2 0 Equalize .6 0 / Color .9 9 Equalize .6 0 /
AutoContrast .8 0 Solarize .2 8 / Brightness .1 3 Color .7 0 /
Solarize .4 5 AutoContrast .9 0 / TranslateY .9 9 TranslateY .7 9 / AutoContrast .9 0 Solarize .8 3 /
Equalize .8 0 Invert .1 0 / TranslateY .7 9 AutoContrast .9 0"""


def auto_augment(images):
    """AutoAugment with its CIFAR-10 policy: a sub-policy for each image, its two operations applied with their chances.

    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)
    count, device = len(images), images.device
    table = op_table(10, *images.shape[2:], device)
    ops, probabilities, strengths = auto_augment_policy(device)
    policy = torch.randint(len(ops), (count,), device=device)
    images = images * 255
    for turn in (0, 1):
        active = torch.rand(count, device=device) < probabilities[policy, turn]
        op = torch.where(active, ops[policy, turn], IDENTITY)
        images = apply_ops(images, table, op, strengths[policy, turn], _coins(count, device))
    return images.div_(255)


@functools.cache
def auto_augment_policy(device):
    """The CIFAR-10 policy as tensors on `device`: operation int64, probability float, strength int64, each [25, 2]."""
    words = np.array([policy.split() for policy in AUTO_AUGMENT_CIFAR10.split("/")])
    op = torch.tensor([[OPS.index(name) for name in names] for names in words[:, [0, 3]]])
    probability, strength = np.float32(words[:, [1, 4]]), np.int64(words[:, [2, 5]])
    return op.to(device), torch.from_numpy(probability).to(device), torch.from_numpy(strength).to(device)


def crop_flip(images, padding=4, mode="zero", size=None):
    """Random crop from the image padded by `padding` pixels ("zero" or "reflect"), and a flip with probability 1/2.

    padding: 0 where nothing is padded. size: to which longer sides of photographs are cropped; None: none is.
    images: float [B, 3, H, W]; returns float [B, 3, min(H, size), min(W, size)].
    """
    check_images(images)
    count, (height, width) = len(images), [min(side, size or side) for side in images.shape[2:]]
    if padding:
        images = F.pad(images, (padding,) * 4, mode="constant" if mode == "zero" else mode)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, 3, tops, lefts, height, width]
    if windows.shape[2:4] != (1, 1):
        top, left = (torch.randint(n, (count,), device=images.device) for n in windows.shape[2:4])
        images = windows[torch.arange(count, device=images.device), :, top, left]
    flip = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def _boxes(images, tallest, widest, scale, ratio):
    """Heights and widths float [B, 1] of boxes of `scale` of an image's area and `ratio` width to height.

    Of ten drawn the first that fits is taken, as in torchvision; third, bool [B, 1]: whether one did.
    """
    area = torch.empty(len(images), 10, device=images.device).uniform_(*scale) * images[0, 0].numel()
    aspect = torch.empty_like(area).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h >= 1) & (h <= tallest) & (w >= 1) & (w <= widest)
    first = fits.int().argmax(1, keepdim=True)
    return h.gather(1, first), w.gather(1, first), fits.any(1, keepdim=True)


def random_resized_crop(images, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Random resized crop: a box of `scale` of the area and `ratio` width to height, resized to size × size pixels.

    Where no box fits it is the whole image. Bilinear, no antialiasing, for boxes that are not much larger than `size`.
    images: float [B, 3, H, W]; returns float [B, 3, size, size].
    """
    check_images(images)
    height, width = images.shape[2:]
    h, w, fits = _boxes(images, height, width, scale, ratio)
    h, w = h.where(fits, height), w.where(fits, width)
    top = (torch.rand_like(h) * (height - h + 1)).floor()
    left = (torch.rand_like(w) * (width - w + 1)).floor()
    return _resized_crop(images, top, left, h, w, size)


def _resized_crop(images, top, left, height, width, size):
    """Cut the box [top, top + height) × [left, left + width) out of each image and resize it; all four are [B, 1]."""
    step = (torch.arange(size, device=images.device) + 0.5) / size

    def coordinates(start, length, side):  # in pixels, within the box; then in grid_sample's units
        inside = (start + step * length - 0.5).clamp(min=start, max=start + length - 1)
        return (2 * inside + 1) / side - 1

    y, x = coordinates(top, height, images.shape[2]), coordinates(left, width, images.shape[3])
    grid = torch.stack(torch.broadcast_tensors(x.unsqueeze(1), y.unsqueeze(2)), -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def color_jitter(images, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2):
    """Colour jitter: factors uniform in [1 - s, 1 + s] for each image, hue turned by up to ± `hue` of a full turn.

    The order of the four is drawn for the whole batch, on the host: torch.compile cannot take it into one graph.
    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)

    def uniform(low, high):
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    for step in torch.randperm(4).tolist():
        if step == 0:
            images = images * uniform(1 - brightness, 1 + brightness)
        elif step == 1:
            images = torch.lerp(_gray(images).mean((2, 3), keepdim=True), images, uniform(1 - contrast, 1 + contrast))
        elif step == 2:
            images = torch.lerp(_gray(images), images, uniform(1 - saturation, 1 + saturation))
        else:
            images = _turn_hue(images, uniform(-hue, hue))
        images = images.clamp(0, 1)
    return images


def _turn_hue(images, turn):
    """Add `turn` [B, 1, 1, 1], 1 being a full turn, to the hue of images [B, 3, H, W] in [0, 1]."""
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    safe = chroma.where(chroma > 0, 1.0)
    sector = torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sector = torch.where(high == red, (green - blue) / safe, sector).unsqueeze(1)  # hue in sixths of a turn
    k = (sector + 6 * turn + torch.arange(5.0, 0.0, -2.0, device=images.device).view(3, 1, 1)) % 6
    return high.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def cutout(images, size):
    """Cutout: a black square of `size` pixels, centred anywhere in the image and clipped at its border.

    images: float [B, 3, H, W]; returns the same.
    """
    check_images(images)
    height, width = images.shape[2:]
    top = torch.randint(height, (len(images), 1, 1, 1), device=images.device) - size // 2
    left = torch.randint(width, (len(images), 1, 1, 1), device=images.device) - size // 2
    return _black_box(images, top, left, size, size)


def random_erasing(images, probability=0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)):
    """Random erasing: with `probability` a black box in the image, of `scale` of its area and `ratio` height to width.

    Where no box fits the image stays as it is. images: float [B, 3, H, W]; returns the same.
    """
    check_images(images)
    height, width = images.shape[2:]
    h, w, fits = _boxes(images, height - 1, width - 1, scale, (1 / ratio[1], 1 / ratio[0]))
    chosen = fits & (torch.rand_like(h) < probability)
    h, w = h.where(chosen, 0).view(-1, 1, 1, 1), w.where(chosen, 0).view(-1, 1, 1, 1)
    top = (torch.rand_like(h) * (height - h + 1)).floor()
    left = (torch.rand_like(w) * (width - w + 1)).floor()
    return _black_box(images, top, left, h, w)


def _black_box(images, top, left, height, width):
    """Zero the box [top, top + height) × [left, left + width) of each image; all four broadcast to [B, 1, 1, 1]."""
    y = torch.arange(images.shape[2], device=images.device).view(-1, 1)
    x = torch.arange(images.shape[3], device=images.device)
    box = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return images.masked_fill(box, 0)


# --------------------------------------------------------------------------------------------------------------- models


class Classifier(nn.Module):
    """Every architecture here: normalise, stem, blocks at falling resolution, head.

    model(x) takes images float [B, 3, H, W] in [0, 1] and gives logits [B, C];
    model(x, features=True) gives (logits, [output of the stem, of block 1, of block 2, …]), each [B, K, H', W'].
    All are float32. amp: between them it computes in bfloat16 (autocast), but for weights and BatchNorm's statistics.
    """

    def __init__(self, stem, blocks, head, mean=(0, 0, 0), std=(1, 1, 1), amp=False):
        super().__init__()
        self.stem, self.blocks, self.head, self.amp = stem, nn.ModuleList(blocks), head, amp
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images, features=False):
        with torch.autocast("cuda" if images.is_cuda else "cpu", torch.bfloat16, enabled=self.amp):
            x = self.stem((images - self.mean) / self.std)
            outputs = [x]
            for block in self.blocks:
                x = block(x)
                outputs.append(x)
            logits = self.head(x).float()
        return (logits, [output.float() for output in outputs]) if features else logits


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice (He et al. 2016), the block of PreActResNet and Wide ResNet; dropout between the two."""

    def __init__(self, inputs, outputs, stride, dropout=0.0):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        x = self.conv1(active)
        return self.conv2(self.dropout(F.relu(self.bn2(x)))) + shortcut


def basic_block(inputs, outputs, stride):
    """conv-BN-ReLU-conv-BN plus shortcut (He et al. 2015), projected where the shape changes."""
    from torchvision.models.resnet import BasicBlock

    down = None
    if stride != 1 or inputs != outputs:
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, down)


def stages(block, widths, depths):
    """A stage of depths[i] blocks for each of widths[1:]; all but the first stage begin with stride 2."""
    made = []
    for i, depth in enumerate(depths):
        layers = [block(widths[i], widths[i + 1], 1 if i == 0 else 2)]
        layers += [block(widths[i + 1], widths[i + 1], 1) for _ in range(depth - 1)]
        made.append(nn.Sequential(*layers))
    return made


def conv_stem(outputs, *rest):
    return nn.Sequential(nn.Conv2d(3, outputs, 3, 1, 1, bias=False), *rest)


def pooled(*before, classifier):
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)


class Parallel(nn.Module):
    """Branches side by side, their outputs concatenated."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class InceptionResidual(nn.Module):
    """x + scale · conv(branches(x)), then ReLU."""

    def __init__(self, channels, inner, scale, *branches, relu=True):
        super().__init__()
        self.branches, self.conv = Parallel(*branches), nn.Conv2d(inner, channels, 1)
        self.scale, self.relu = scale, nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x):
        return self.relu(x + self.scale * self.conv(self.branches(x)))


def inception_resnet_v2():
    """Stem and three blocks of Inception-ResNet-v2 (Szegedy et al. 2017), for images from 75 pixels up."""
    from torchvision.models.inception import BasicConv2d

    def chain(inputs, *units):
        """Convolutions with BatchNorm and ReLU: (outputs, kernel), padded, or (outputs, kernel, stride), not padded."""
        layers = []
        for outputs, kernel, *stride in units:
            how = {"stride": stride[0]} if stride else {"padding": "same"}
            layers.append(BasicConv2d(inputs, outputs, kernel_size=kernel, **how))
            inputs = outputs
        return nn.Sequential(*layers)

    def block35():
        branches = chain(320, (32, 1)), chain(320, (32, 1), (32, 3)), chain(320, (32, 1), (48, 3), (64, 3))
        return InceptionResidual(320, 128, 0.17, *branches)

    def block17():
        branches = chain(1088, (192, 1)), chain(1088, (128, 1), (160, (1, 7)), (192, (7, 1)))
        return InceptionResidual(1088, 384, 0.1, *branches)

    def block8(scale=0.2, relu=True):
        branches = chain(2080, (192, 1)), chain(2080, (192, 1), (224, (1, 3)), (256, (3, 1)))
        return InceptionResidual(2080, 448, scale, *branches, relu=relu)

    average = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), chain(192, (64, 1)))
    stem = nn.Sequential(
        chain(3, (32, 3, 2), (32, 3, 1), (64, 3)), nn.MaxPool2d(3, 2), chain(64, (80, 1), (192, 3, 1)),
        nn.MaxPool2d(3, 2),
        Parallel(chain(192, (96, 1)), chain(192, (48, 1), (64, 5)), chain(192, (64, 1), (96, 3), (96, 3)), average),
    )  # fmt: skip
    longest = chain(320, (256, 1), (256, 3), (384, 3, 2))
    reduce_a = Parallel(chain(320, (384, 3, 2)), longest, nn.MaxPool2d(3, 2))
    longest = chain(1088, (256, 1), (288, 3), (320, 3, 2))
    others = chain(1088, (256, 1), (384, 3, 2)), chain(1088, (256, 1), (288, 3, 2))
    reduce_b = Parallel(*others, longest, nn.MaxPool2d(3, 2))
    return stem, [
        nn.Sequential(*(block35() for _ in range(10))),
        nn.Sequential(reduce_a, *(block17() for _ in range(20))),
        nn.Sequential(reduce_b, *(block8() for _ in range(9)), block8(1.0, relu=False), chain(2080, (1536, 1))),
    ]


def library_model(arch, num_classes, pretrained, **options):
    """torchvision's model; pretrained: with its ImageNet weights (V1), but for a classifier of another size."""
    import torchvision

    net = torchvision.models.get_model(arch, num_classes=num_classes, **options)
    if pretrained:
        with torch.random.fork_rng(devices=[]):  # the initial weights that it draws are replaced at once
            source = torchvision.models.get_model(arch, weights="IMAGENET1K_V1").state_dict()
        state = net.state_dict()
        state |= {key: tensor for key, tensor in source.items() if tensor.shape == state[key].shape}
        net.load_state_dict(state)
    return net


def build_model(
    arch, num_classes, dropout=0.0, mean=(0, 0, 0), std=(1, 1, 1), image_size=32, pretrained=False, amp=False
):
    """A Classifier, randomly initialised, in channels_last memory format.

    Convolutions are initialised by Kaiming's normal distribution with fan-out (He et al. 2015), those of PreActResNets
    as PyTorch does: GJS's and NRD's code leaves preact_resnet34 so, and the public code of preact_resnet18 does too.

    arch: wrn-D-K (any depth D = 6n + 4, width K), resnetD and resnetDx4 (D = 6n + 2; widths 16-32-64 and 64-128-256),
        preact_resnet18|34, torchvision's resnet18|34|50|101, mobilenet_v2, shufflenet_v2 and densenet121|169, and
        inception_resnet_v2.
    dropout: probability between a block's two convolutions, wrn only.
    mean, std: of each channel of the training images in [0, 1]; the default leaves the images as they are.
    image_size: of the images in pixels, from 16 up, of inception_resnet_v2 from 75 up. Below 128 torchvision's
        architectures take their CIFAR forms: 3×3 stem of stride 1, no max-pooling, mobilenet_v2's second downsampling
        left out too.
    pretrained: torchvision's ImageNet weights instead, for image_size from 128 up.
    amp: compute in bfloat16.
    The model's `built_as` holds arch, num_classes, dropout and image_size, from which `load_model` builds it again.
    Raises UsageError for an unknown arch, and for dropout or pretrained where the architecture has none.
    """
    wide = re.fullmatch(r"wrn-([0-9]+)-([0-9]+)", arch)
    deep = re.fullmatch(r"resnet([0-9]+)(x4)?", arch)
    large = image_size >= 128
    of_library = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "densenet121", "densenet169")
    if dropout and not wide:
        raise UsageError(f"--dropout: {arch} has none; wrn-D-K has")
    if pretrained and not (large and arch in of_library):
        raise UsageError(f"--pretrained: {arch} at {image_size} pixels has none; {', '.join(of_library)} at 224 have")
    if wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]) >= 1:
        k, n = int(wide[2]), (int(wide[1]) - 4) // 6
        blocks = stages(functools.partial(PreActBlock, dropout=dropout), (16, 16 * k, 32 * k, 64 * k), (n, n, n))
        head = pooled(nn.BatchNorm2d(64 * k), nn.ReLU(), classifier=nn.Linear(64 * k, num_classes))
        stem = conv_stem(16)
    elif arch in ("preact_resnet18", "preact_resnet34"):
        widths, depths = (64, 64, 128, 256, 512), (2, 2, 2, 2)
        if arch == "preact_resnet34":  # that of GJS's code, which NRD's tables compare
            widths, depths = (32, 32, 64, 128), (5, 5, 5)
        stem, blocks = conv_stem(widths[0]), stages(PreActBlock, widths, depths)
        head = pooled(nn.BatchNorm2d(widths[-1]), nn.ReLU(), classifier=nn.Linear(widths[-1], num_classes))
    elif arch in ("resnet18", "resnet34", "resnet50", "resnet101"):
        net = library_model(arch, num_classes, pretrained)
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool) if large else conv_stem(64, net.bn1, net.relu)
        blocks, head = [net.layer1, net.layer2, net.layer3, net.layer4], pooled(classifier=net.fc)
    elif deep and int(deep[1]) >= 8 and int(deep[1]) % 6 == 2:
        n, widths = (int(deep[1]) - 2) // 6, (32, 64, 128, 256) if deep[2] else (16, 16, 32, 64)
        stem = conv_stem(widths[0], nn.BatchNorm2d(widths[0]), nn.ReLU())
        head = pooled(classifier=nn.Linear(widths[-1], num_classes))
        blocks = stages(basic_block, widths, (n, n, n))
    elif arch == "mobilenet_v2":
        net = library_model(arch, num_classes, pretrained, dropout=0.0)
        layers = list(net.features)
        if not large:
            layers[0][0].stride = layers[2].conv[1][0].stride = (1, 1)
        stem, head = layers[0], pooled(classifier=net.classifier)
        blocks = [nn.Sequential(*layers[a:b]) for a, b in ((1, 4), (4, 7), (7, 14), (14, 19))]
    elif arch == "shufflenet_v2":
        net = library_model("shufflenet_v2_x1_0", num_classes, pretrained)
        if not large:
            net.conv1[0].stride = (1, 1)
        stem, head = nn.Sequential(net.conv1, net.maxpool) if large else net.conv1, pooled(classifier=net.fc)
        blocks = [net.stage2, net.stage3, nn.Sequential(net.stage4, net.conv5)]
    elif arch in ("densenet121", "densenet169"):
        net = library_model(arch, num_classes, pretrained)
        f = net.features
        stem = nn.Sequential(f.conv0, f.norm0, f.relu0, f.pool0) if large else conv_stem(64, f.norm0, nn.ReLU())
        blocks = [f.denseblock1, nn.Sequential(f.transition1, f.denseblock2)]
        blocks += [nn.Sequential(f.transition2, f.denseblock3), nn.Sequential(f.transition3, f.denseblock4)]
        head = pooled(f.norm5, nn.ReLU(), classifier=net.classifier)
    elif arch == "inception_resnet_v2":
        stem, blocks = inception_resnet_v2()
        head = pooled(classifier=nn.Linear(1536, num_classes))
    else:
        known = "wrn-D-K, resnetD and resnetDx4 of CIFAR, preact_resnet18, preact_resnet34, shufflenet_v2"
        raise UsageError(f"--arch: unknown {arch!r}; known are {known}, {', '.join(of_library)}, inception_resnet_v2")
    model = Classifier(stem, blocks, head, mean, std, amp)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not (pretrained or arch.startswith("preact_resnet")):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.built_as = {"arch": arch, "num_classes": num_classes, "dropout": dropout, "image_size": image_size}
    return model.to(memory_format=torch.channels_last)


EVAL_BATCH = {"cpu": 125, "cuda": 500}  # images a forward pass: on a CPU, outputs of layers that stay in its caches


def evenly_split(rows, batch_size):
    """Cut index tensor rows [N] into batches of nearly equal size, at most batch_size."""
    count = math.ceil(len(rows) / batch_size)
    return [rows[i::count] for i in range(count)]  # from all over: a batch stands for a file that is sorted by class


@torch.no_grad()
def predict(model, images, batch_size=None):
    """Logits float32 [N, C], on the model's device, of uint8 images [N, 3, H, W]; the model is in evaluation mode.

    batch_size: None takes that of EVAL_BATCH. Under torchrun every process has the logits of the first.
    Raises UsageError where the model gives something else than logits.
    """
    assert images.dtype == torch.uint8, f"images are {images.dtype}, not uint8"
    device = next(model.parameters(), images).device  # a module of other people may have no parameters
    training, logits = model.training, None
    model.eval()
    for rows in evenly_split(torch.arange(len(images), device=images.device), batch_size or EVAL_BATCH[device.type]):
        part = model(to_float(images[rows].to(device)))
        if not torch.is_tensor(part) or part.dim() != 2:
            raise UsageError(f"{type(model).__name__} gives a {type(part).__name__}; it must give logits [B, C] alone")
        logits = part.new_empty(len(images), part.shape[1]) if logits is None else logits
        logits[rows.to(device)] = part
    model.train(training)
    if world_size() > 1:
        dist.broadcast(logits, 0)
    return logits


def accuracy(scores, labels, k=1):
    """Top-k accuracy in percent of scores [N, C] for labels int64 [N], as a float."""
    if k == 1:
        return 100 * (scores.argmax(1) == labels).double().mean().item()
    return 100 * (scores.topk(k).indices == labels.unsqueeze(1)).any(1).double().mean().item()


def test_accuracies(model, data):
    """{"test_acc": …}; with more than ten classes "test_top5" too; for webvision both on ILSVRC12, "imagenet_…"."""
    metrics, tests = {}, {"test": (data.test_images, data.test_labels), "imagenet": data.imagenet}
    for name, test in tests.items():
        if test:
            logits = predict(model, test[0])
            metrics[f"{name}_acc"] = accuracy(logits, test[1])
            if len(data.classes) > 10:
                metrics[f"{name}_top5"] = accuracy(logits, test[1], k=5)
    return metrics


def label_accuracies(predicted, noisy, true):
    """How an epoch's predictions agree with the labels, in percent; None where there is no such sample.

    predicted: int64 [N], the class predicted for each training sample (-1: not seen). noisy, true: int64 [N].
    train_acc_right: rightly labelled samples given their label. train_acc_wrong: wrongly labelled samples given their
    wrong label, which is memorisation. train_acc_wrong_true: wrongly labelled samples given their true class.
    """
    if world_size() > 1:
        dist.all_reduce(predicted, dist.ReduceOp.MAX)
    seen, wrong = predicted >= 0, noisy != true

    def share(hit, among):
        return 100 * hit[among].float().mean().item() if among.any() else None

    return {
        "train_acc_right": share(predicted == noisy, seen & ~wrong),
        "train_acc_wrong": share(predicted == noisy, seen & wrong),
        "train_acc_wrong_true": share(predicted == true, seen & wrong),
    }


def calibration(probabilities, labels, bins=15):
    """Reliability (Guo et al. 2017): ECE in [0, 1], then each bin's accuracy, confidence and share of samples.

    probabilities: [N, C]; labels: int64 [N]. Equal-width bins; the three lists are of length `bins`, empty bins 0.
    """
    sums = probabilities.sum(1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-3), "rows must sum to 1; are these logits?"
    confidence, predicted = probabilities.double().max(1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin i is (i / bins, (i + 1) / bins]
    hit = (predicted == labels).double()
    size = torch.bincount(which, minlength=bins).double()
    acc = torch.bincount(which, hit, minlength=bins) / size.clamp(min=1)
    conf = torch.bincount(which, confidence, minlength=bins) / size.clamp(min=1)
    ece = (size / len(labels) * (acc - conf).abs()).sum().item()
    return ece, acc.tolist(), conf.tolist(), (size / len(labels)).tolist()


# ---------------------------------------------------------------------------------------------------------- run folders


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; it is renamed to `path` once the block has ended without an error.

    Raises OSError, whose message has `path`, where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def read_weights_only(path, flag):
    """What torch.save wrote to `path`, tensors on the CPU, without executing pickled code. Raises UsageError."""
    if not Path(path).is_file():
        raise UsageError(f"{flag}: no file {path}; runs/*/checkpoint.pt are checkpoints")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name:
            alone = f'torch.save(torch.load("{path}", weights_only=False)["model"], "weights.pt")'
            raise UsageError(
                f"{flag}: {path} holds {name[1]} beside tensors, and to read that may run foreign code; if you trust "
                f'the file, save its weights alone: {alone}; of a whole module .state_dict() in place of ["model"]'
            ) from None
        raise UsageError(f"{flag}: {path} is damaged or no checkpoint ({type(error).__name__})") from None


def load_checkpoint(path, flag="checkpoint"):
    """The dict that `Run` saved at `path`, tensors on the CPU, read without executing pickled code.

    Keys: model and the other parts of the training state, each with its entry in built_as; best, the name of the part
    to take for the model where several networks were trained; script, dataset, classes, noise (kind, rate, seed),
    imbalance, config, source (the script's text), metrics (a dict an epoch), epoch, epochs, rng. Says how far
    unfinished training is. Raises UsageError where there is no such file, where it is none of ours, where no epoch is
    finished.
    """
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else path
    checkpoint = read_weights_only(path, flag)
    if not isinstance(checkpoint, dict) or not {"built_as", "epoch", "epochs", "source"} <= checkpoint.keys():
        raise UsageError(f"{flag}: {path} is no checkpoint of these scripts; name the checkpoint.pt of a run folder")
    epoch, epochs = checkpoint["epoch"], checkpoint["epochs"]
    if epoch == 0:
        raise UsageError(f"{flag}: {path} has finished no epoch; train it first")
    if epoch < epochs:
        print(f"{path}: epoch {epoch} of {epochs}", flush=True)
    return checkpoint


def load_model(checkpoint, part="model", device="cpu", amp=False):
    """Rebuild the model whose weights are checkpoint[part] ("model", "ema", …), in evaluation mode on `device`.

    Of a run that trains several networks, "model" is the one that checkpoint["best"] names.
    """
    if part == "model":
        part = checkpoint.get("best", part)
    model = build_model(**checkpoint["built_as"][part], amp=amp)
    model.load_state_dict(checkpoint[part])
    return model.to(device).eval()


def public_state(path, flag):
    """The state_dict in a file of other people's, without the prefixes that DataParallel and others put before names.

    It stands there alone or under "model", "state_dict", "net", "model_state_dict" or "student". Of a file with a
    teacher too (names with "student." and "teacher."), the student's. Raises UsageError where there is none, and where
    a tensor has a NaN or an infinity.
    """
    state = read_weights_only(path, flag)
    keys = ("model", "state_dict", "net", "model_state_dict", "student")
    for key in keys:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise UsageError(f"{flag}: {path} has no state_dict, alone or under one of {', '.join(keys)}")
    for prefix in ("module.", "_orig_mod.", "student."):
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        state = inside or state
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UsageError(f"{flag}: {path} has a NaN or an infinity in {name}; take weights of an earlier epoch")
    return state


def load_public(path, flag, arch, mean, std, image_size=32, dropout=0.0, amp=False):
    """A Classifier with other people's weights, in evaluation mode. Its number of classes is the file's.

    arch, image_size, dropout: as for build_model. mean, std: of the images in [0, 1] that the weights expect, where the
    file has none of ours. Tensors are matched by their order; num_batches_tracked, which files from before torch 0.4.1
    lack, is left out. Raises UsageError where `arch` has other tensors, or mean and std another scale.
    """
    if max(*mean, *std) > 1 or min(std) <= 0:
        raise UsageError(f"--mean, --std: {mean}, {std} are not of images in [0, 1]; divide those of 0 to 255 by 255")
    state = public_state(path, flag)
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    lengths = [len(tensor) for tensor in state.values() if tensor.dim() > 0] or [1]
    classes = lengths[-1]  # the classifier's bias comes last
    model = build_model(arch, classes, dropout, mean, std, image_size, amp=amp)
    own = model.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    names = [name for name in names if name in state or name not in ("mean", "std")]

    def described(name, tensors):
        return f"{name} {list(tensors[name].shape)}" if name else "no tensor more"

    for name, theirs in itertools.zip_longest(names, state):
        wanted, found = described(name, own), described(theirs, state)
        if wanted.split(".")[-1] != found.split(".")[-1]:  # "weight [16, 3, 3, 3]", whatever its layer is called
            raise UsageError(f"{flag}: {path} is no {arch}: where that has {wanted}, the file has {found}")
    model.load_state_dict(own | dict(zip(names, state.values())))
    return model.eval()


def load_module(text, flag, path=None):
    """The nn.Module that NAME() gives, text being "FILE.py:NAME", with the state_dict in `path`, if there is one.

    It takes images float [B, 3, H, W] in [0, 1] and gives logits [B, C]. In evaluation mode. The file may import its
    neighbours. Raises UsageError where there is no such file or name, and for weights of another module.
    """
    file, _, name = text.rpartition(":")
    if not Path(file).is_file():
        raise UsageError(f"{flag}: {text} names no file; write FILE.py:NAME")
    sys.path.insert(0, str(Path(file).resolve().parent))  # as for `python FILE.py`
    make = runpy.run_path(file).get(name)
    if not callable(make) or isinstance(make, nn.Module):
        raise UsageError(f"{flag}: {file} has no function or class {name}")
    try:
        inspect.signature(make).bind()
    except TypeError as error:  # missing a required argument: 'num_classes'
        raise UsageError(f"{flag}: {text} is {error}; name a function that needs none and gives the module") from None
    model = make()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{flag}: {text} gives {type(model).__name__}, not an nn.Module")
    if path:
        state = public_state(path, flag)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # names every tensor that is missing, left over or of another shape
            raise UsageError(f"{flag}: {path} does not fit {text}: {textwrap.shorten(str(error), 300)}") from None
    return model.eval()


def claim(folder, config, resume, wait):
    """Hold `folder` for this process by an advisory lock on its config.json, the open file that is returned.

    wait: until no other process holds it. Raises UsageError where one holds it, and where the folder has other files,
    another run, or, without resume, this one.
    """
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() and any(folder.iterdir()):
        raise UsageError(f"--out: {folder} is not empty; name a new folder")
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"--out: another process is at work in {folder}") from None
    except OSError:
        pass  # a file system without locks: nothing holds the folder
    for partial in folder.glob("*.partial.*"):  # of a process that was killed while it wrote
        partial.unlink()
    file.seek(0)
    text = file.read()
    if text and f'"script": "{config["script"]}"' not in text:
        raise UsageError(f"--out: {path} is not of a run of {config['script']}; name a new folder")
    if (folder / "checkpoint.pt").exists():
        old = json.loads(text)
        keys = sorted(config.keys() - {*MACHINE, "given", "name", "torch", "commit"})
        differs = [f"{k} ({old.get(k)} there, {config[k]} here)" for k in keys if old.get(k) != config[k]]
        if differs:
            raise UsageError(f"--out: {folder} holds another run: {', '.join(differs)}; name another folder")
        if not resume:
            raise UsageError(f"--out: {folder} holds this run; --resume continues it, --out DIR starts one elsewhere")
    else:
        file.truncate(0)
        file.write(json.dumps(config, indent=2) + "\n")
        file.flush()
    return file


class Run:
    """A run folder: config.json, metrics.jsonl, checkpoint.pt and curves.png, and what is printed on the way.

        run = Run(args, device, data)                                      # claims the folder
        run.track(model=model, optimizer=optimizer, …)                     # saved every epoch, read back by --resume
        for epoch in range(run.epoch, run.epochs):
            for index in run.batches(len(labels), args.batch_size):        # int64 [batch_size]
                …
            run.end_epoch(losses, lr=…, test_acc=…)                        # printed, saved and drawn
        return run.finish()

    epochs: None takes args.epochs. wait, and what is raised: see `claim`.
    """

    def __init__(self, args, device, data, epochs=None, wait=False):
        self.args, self.device, self.epochs = args, device, epochs or args.epochs
        self.folder = args.out or Path("runs") / f"{args.name}-seed{args.seed}"
        self.path = self.folder / "checkpoint.pt"
        if args.batch_size % world_size():
            raise UsageError(f"--batch-size: {args.batch_size} cannot be split over {world_size()} processes")
        config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        config.setdefault("given", {})  # of a teacher
        source = Path(__file__).with_name(f"{args.script}.py")  # a fork has no commit
        self.header = {
            "script": args.script, "dataset": args.dataset, "classes": list(data.classes), "epochs": self.epochs,
            "noise": {"kind": args.noise, "rate": args.rate, "seed": args.noise_seed},
            "imbalance": vars(args).get("imbalance"), "config": config,
            "source": source.read_text(encoding="utf-8") if source.exists() else "",
        }  # fmt: skip
        if rank() == 0:
            options = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
            commit = subprocess.run("git rev-parse HEAD", **options).stdout.strip()  # "" where there is no git
            config |= {"data": data.digest, "torch": str(torch.__version__), "commit": commit}
            self.claimed = claim(self.folder, config, args.resume, wait)
        self.board = None
        if vars(args).get("tensorboard") and rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard: needs the package; pip install tensorboard") from None
            self.board = SummaryWriter(self.folder)
        barrier()
        shown = " ".join(f"{key}={value}" for key, value in config.items() if key != "given")
        print(textwrap.fill(shown, 120, break_on_hyphens=False), flush=True)
        self.saved = load_checkpoint(self.path, "--resume") if args.resume and self.path.exists() else {"metrics": []}
        self.metrics, self.done_before = self.saved["metrics"], len(self.saved["metrics"])

    @property
    def epoch(self):
        """Number of finished epochs."""
        return len(self.metrics)

    def time_left(self, done):
        """A text, when `done` epochs, a float, are finished."""
        seconds = (time.perf_counter() - self.began) * (self.epochs - done) / (done - self.done_before)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def track(self, **parts):
        """The parts of the training state, whose state_dict() is saved. With --resume they are read back here."""
        self.parts, saved, self.saved = parts, self.saved, None
        if self.metrics:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in saved["rng"]:
                torch.cuda.set_rng_state(saved["rng"]["cuda"], self.device)
        if world_size() > 1:
            modules = [part for part in parts.values() if isinstance(part, nn.Module)]
            if self.device.type == "cuda":
                modules = [nn.SyncBatchNorm.convert_sync_batchnorm(module) for module in modules]
            act_as_one(parts["optimizer"], modules)
        self.began = self.drawn = time.perf_counter()

    def save(self, path=None):
        """Write checkpoint.pt, or `path`, then metrics.jsonl, which is always the checkpoint's list of metrics."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint = {**self.header, "metrics": self.metrics, "epoch": self.epoch, "rng": rng}
        checkpoint["built_as"] = {name: part.built_as for name, part in self.parts.items() if hasattr(part, "built_as")}
        checkpoint |= {name: part.state_dict() for name, part in self.parts.items()}
        if rank() == 0:
            with atomic_write(path or self.path) as partial:
                try:
                    torch.save(checkpoint, partial)
                except RuntimeError as error:  # so PyTorch's writer calls a full disk
                    raise OSError(f"is the disk full? ({error})") from None
            with atomic_write(self.folder / "metrics.jsonl") as partial:
                partial.write_text("".join(json.dumps(record) + "\n" for record in self.metrics), encoding="utf-8")

    def batches(self, count, batch_size):
        """One epoch: a random order of range(count), int64 [batch_size] at a time, without the incomplete last batch.

        Keeps the line with images/s and time left up to date. Under torchrun each process gets its part of each batch.
        """
        if rank() > 0:  # draws of its own, and none that a checkpoint would have to hold
            torch.manual_seed((self.args.seed * self.epochs + self.epoch) * world_size() + rank())
        order = torch.randperm(count, device=self.device)
        if world_size() > 1:
            dist.broadcast(order, 0)
        batch_size = min(batch_size, count)
        steps = order[: count // batch_size * batch_size].view(-1, world_size(), batch_size // world_size())
        self.epoch_began = printed = time.perf_counter()
        for step, index in enumerate(steps[:, rank()], 1):
            yield index
            now = time.perf_counter()
            if now - printed > (0.2 if sys.stdout.isatty() else 60):
                printed, speed = now, f"{step * batch_size / (now - self.epoch_began):,.0f} images/s"
                where = f"epoch {self.epoch + 1}/{self.epochs}  step {step}/{len(steps)}"
                show(f"{where}  {speed}  {self.time_left(self.epoch + step / len(steps))}", live=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.images_per_second = len(steps) * batch_size / (time.perf_counter() - self.epoch_began)

    def end_epoch(self, losses, **metrics):
        """Record an epoch: check losses and weights, save, print a line. metrics: floats, lists of floats or None.

        losses: the loss of every step, a list of scalar tensors, which stay on the device until now. Where a loss or a
        weight is not finite, the program ends with status 1; the last checkpoint stays.
        """
        losses = torch.stack(losses).float()
        average([losses])
        weights = [v for part in self.parts.values() if isinstance(part, nn.Module) for v in part.state_dict().values()]
        if not all(values.isfinite().all() for values in (losses, *weights)):
            sys.exit(f"error: a loss or weight is not finite in epoch {self.epoch + 1}, and not saved; lower --lr")
        now = time.perf_counter()
        record = {"epoch": self.epoch + 1, **metrics, "train_loss": losses.mean().item()}
        record["images_per_second"] = round(self.images_per_second, 1)
        record["seconds"] = round(now - self.epoch_began, 2)
        self.metrics.append(record)
        self.save()
        if now - self.drawn > 60 and rank() == 0:
            self.drawn = now
            plot_curves(self.folder / "curves.png", self.metrics, self.folder.name, self.header.get("teacher_acc"))
        if self.board:
            for key, value in record.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, self.epoch)
        numbers = {"loss": record["train_loss"], **metrics}
        shown = [f"{key} {value:#.4g}" for key, value in numbers.items() if isinstance(value, float)]
        shown += [f"{key} {value:,}" for key, value in numbers.items() if isinstance(value, int)]
        shown += [f"{self.images_per_second:,.0f} images/s", self.time_left(self.epoch)]
        show("  ".join([f"epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}", *shown]))

    def finish(self):
        """Draw curves.png, print the last line and let the folder go. Returns the metrics of the last epoch."""
        last, best = self.metrics[-1], max(self.metrics, key=lambda record: record["test_acc"])
        if rank() == 0:
            plot_curves(self.folder / "curves.png", self.metrics, self.folder.name, self.header.get("teacher_acc"))
            self.claimed.close()
        if self.board:
            self.board.close()
        if self.device.type == "cuda":
            print(f"peak device memory {torch.cuda.max_memory_allocated(self.device) / 2**30:.2f} GiB")
        final = f"test_acc {last['test_acc']:.2f} % after epoch {last['epoch']}"
        print(f"{final}, best {best['test_acc']:.2f} % after epoch {best['epoch']}: {self.folder}", flush=True)
        return last


# ------------------------------------------------------------------------------------------------------------- teachers


def load_teacher(args, device, data, labels, milestones, dropout=0.0, **recipe):
    """The teacher in --teacher or --teacher-model, or a standard one, trained by cross-entropy now or earlier.

    data: the Dataset. labels: int64 [N], the training labels as the student is given them. A standard teacher is
    trained by SGD with the student's epochs, batch size, lr and weight decay, `milestones` (epochs after which lr falls
    to a fifth; None: to a tenth where the test loss has not fallen for ten), crops padded by reflection, and flips.
    recipe: epochs, batch_size, lr, weight_decay and optimizer ("sgd" or "adam"), where they are other ones; normalize:
    whether the teacher normalises by the training images' mean and deviation, which others leave alone. It stays in
    a folder of runs/teachers named by all of that. Of --teacher-seeds K, seeds 0 … K-1, the most accurate one teaches.
    Returns the model in evaluation mode without gradients, and what the checkpoint keeps of it: {"teacher": its path,
    "teacher_acc": its test accuracy in percent}. The global random states stay as they are.
    Prints where a --teacher had other label noise, imbalance or dropout than a standard one would have. Raises
    UsageError for a --teacher of other classes or image size, for --mean or --std without public weights, and for flags
    that tell how to build or train a teacher where one is given.
    """
    shared = ["dataset", "data_dir", "noise", "rate", "noise_seed", "limit_train", "limit_test"]
    shared += ["epochs", "batch_size", "lr", "weight_decay", "device", "amp", "compile"]
    if is_photographs(args.dataset):
        shared += ["resize", "image_size"]
    standard = {"arch": args.teacher_arch, "dropout": dropout, "imbalance": vars(args).get("imbalance")}
    standard |= {"optimizer": "sgd"} | {flag: getattr(args, flag) for flag in shared}
    standard |= {"milestones": milestones} | recipe
    if args.dataset.endswith(".npz") or args.dataset.startswith("imagefolder:"):  # files that may be replaced by others
        standard["data"] = data.digest

    saved = read_weights_only(args.teacher, "--teacher") if args.teacher and not args.teacher_model else None
    is_ours = isinstance(saved, dict) and "built_as" in saved
    if (args.mean or args.std) and (saved is None or is_ours):
        raise UsageError("--mean, --std: are of public weights in --teacher; every other teacher has its own")
    if args.teacher_model or is_ours:
        refuse(args, ("teacher_arch",), "this teacher has its own")
    if args.teacher_model or args.teacher:
        refuse(args, ("teacher_seeds", "teacher_epochs"), "this teacher is trained")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if args.teacher_model:
            path, teacher = args.teacher_model, load_module(args.teacher_model, "--teacher-model", args.teacher)
        elif is_ours:
            path, checkpoint = args.teacher, load_checkpoint(args.teacher, "--teacher")
            theirs = checkpoint | checkpoint["built_as"][checkpoint.get("best", "model")]
            for key, value in {"classes": list(data.classes), "image_size": data.image_size}.items():
                if theirs[key] != value:
                    differs = f"{key} {theirs[key]}, not {value}"
                    raise UsageError(f"--teacher: {path} has {differs}; leave it out to train one")
            noise = {"kind": args.noise, "rate": args.rate, "seed": args.noise_seed}
            if args.noise == theirs["noise"]["kind"] == "none":  # the seed of no noise decides nothing
                noise = theirs["noise"]
            for key, value in {"noise": noise, "imbalance": standard["imbalance"], "dropout": dropout}.items():
                if theirs[key] != value:
                    print(f"the teacher has {key} {theirs[key]}; a standard teacher would have {value}", flush=True)
            teacher = load_model(checkpoint, "model", device, args.amp)
        elif args.teacher:
            mean, std = channel_stats(data.train_images)
            mean, std = args.mean or mean, args.std or std
            path, size = args.teacher, data.image_size
            teacher = load_public(path, "--teacher", args.teacher_arch, mean, std, size, dropout, args.amp)
        else:
            teachers = [train_teacher(standard, seed, device, data, labels) for seed in range(args.teacher_seeds)]
            path, checkpoint = max(teachers, key=lambda teacher: teacher[1]["metrics"][-1]["test_acc"])
            teacher = load_model(checkpoint, "model", device, args.amp)
        logits = predict(teacher.to(device).requires_grad_(False), data.test_images)
    if logits.shape[1] != len(data.classes):
        raise UsageError(f"--teacher: {path} has {logits.shape[1]} classes, not {len(data.classes)}")
    test_acc = accuracy(logits, data.test_labels)
    print(f"teacher: {path}, test_acc {test_acc:.2f} %", flush=True)
    return teacher, {"teacher": str(path), "teacher_acc": test_acc}


def train_teacher(standard, seed, device, data, labels):
    """Train the teacher that the dict `standard` of load_teacher describes, or find it trained: path and checkpoint."""
    elsewhere = ("arch", "dataset", "noise", "rate", *MACHINE)  # in the name, or not of the result
    flags = {flag: value for flag, value in standard.items() if value and flag not in elsewhere}
    name = folder_name(standard["arch"], standard["dataset"], standard["noise"], standard["rate"], flags)
    args = argparse.Namespace(**standard, script="teacher", name=name, seed=seed, resume=True)
    args.out = Path("runs/teachers") / f"{name}-seed{seed}"
    path = args.out / "checkpoint.pt"
    checkpoint = load_checkpoint(path, "teacher") if path.exists() else None
    if checkpoint and checkpoint["epoch"] == args.epochs:
        return path, checkpoint

    print("training a teacher first, or waiting for a process that does; it stays for later runs", flush=True)
    torch.manual_seed(seed)
    run = Run(args, device, data, wait=True)
    classes, size = len(data.classes), data.image_size
    stats = channel_stats(data.train_images) if vars(args).get("normalize") else ()
    model = build_model(args.arch, classes, args.dropout, *stats, image_size=size, amp=args.amp).to(device)
    algorithm = {"sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam}[args.optimizer]
    optimizer = algorithm(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    if args.milestones:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.milestones, gamma=0.2)
    else:
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=10)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    if args.compile:
        model.compile()
    for _ in range(run.epoch, args.epochs):
        model.train()
        lr, losses = optimizer.param_groups[0]["lr"], []
        for index in run.batches(len(labels), args.batch_size):
            x = crop_flip(data.batch(index), mode="reflect", size=data.image_size)
            loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        logits = predict(model, data.test_images)
        if args.milestones:
            scheduler.step()
        else:
            scheduler.step(F.cross_entropy(logits, data.test_labels).item())
        run.end_epoch(losses, lr=lr, test_acc=accuracy(logits, data.test_labels))
    run.finish()
    barrier()  # the first process has written the checkpoint
    return path, load_checkpoint(path, "teacher")


# ------------------------------------------------------------------------------------------------------------ reporting


def show(text, live=False):
    """Print a line. On a terminal, a live line is overwritten by the next."""
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="" if live else "\n", flush=True)
    else:
        print(text, flush=True)


def progress(items, label):
    """Yield the items, which have a length; keep a line with the share done and the time left."""
    began = shown = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - shown > (0.2 if sys.stdout.isatty() else 60):
            shown, left = now, datetime.timedelta(seconds=round((now - began) / done * (len(items) - done)))
            show(f"{label}  {100 * done / len(items):.0f} %  {left} left", live=True)
    show(f"{label}  took {datetime.timedelta(seconds=round(time.perf_counter() - began))}")


@contextlib.contextmanager
def picture(path, width, height, pdf=False):
    """Yield an empty matplotlib Figure of that size in inches. At the end of the block it is written to `path`, a .png.

    pdf: write a .pdf beside it too. Text is drawn as it is: `$` and usetex of the user's settings mean nothing. No
    picture ends a program: what cannot be drawn or written becomes one line.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own cannot be imported elsewhere
    import matplotlib  # half a second, and only here
    from matplotlib.figure import Figure

    try:
        with matplotlib.rc_context({"text.usetex": False, "text.parse_math": False}):
            figure = Figure(figsize=(width, height), layout="constrained")
            yield figure
            for file in [path, path.with_suffix(".pdf")] if pdf else [path]:
                with atomic_write(file) as partial:
                    figure.savefig(partial, dpi=110)
    except UsageError:
        raise
    except Exception as error:  # whatever fonts, settings or a full disk make matplotlib raise
        print(f"{path} is not drawn: {error}", file=sys.stderr)


def plot_curves(path, metrics, title, teacher_acc=None):
    """Draw the numbers of `metrics`, a dict an epoch, over the epochs to `path` (PNG), and the teacher's accuracy."""
    panels = {}
    names = [key for key in metrics[-1] if key not in ("epoch", "seconds", "images_per_second", "lr")]
    for key in [*names, "lr"]:
        if isinstance(metrics[-1][key], (int, float)):
            of_training = "training labels (%)" if key.startswith("train_acc") else "accuracy (%)"
            panel = key
            if "acc" in key or "top5" in key:
                panel = of_training
            elif "loss" in key:
                panel = "loss"
            panels.setdefault(panel, []).append(key)
    epochs = [record["epoch"] for record in metrics]
    with picture(path, 4 * len(panels), 3.6) as figure:
        figure.suptitle(title)
        for axes, (panel, keys) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items()):
            for i, key in enumerate(keys):  # ever thinner, so that no curve hides another
                width = 1 + 1.5 * (len(keys) - 1 - i)
                axes.plot(epochs, [record[key] for record in metrics], ".-", lw=width, ms=4 + width, label=key)
            if panel == "accuracy (%)" and teacher_acc is not None:
                axes.axhline(teacher_acc, color="k", linestyle=":", label="teacher")
            axes.set(xlabel="epoch", ylabel=panel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if panel != keys[0]:
                axes.legend(fontsize="small")
