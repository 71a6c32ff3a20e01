"""What the scripts share, in the order the data flows through it:

    arguments -> processes -> data -> label noise -> augmentation -> models -> run folders -> teachers
    -> reporting

Functions take tensors and return tensors; copy one out if that is all you need. What a method is about (its
loss, its loop, its hyperparameters) is never in this file: it stands in the method's own script.
A fork may delete what it does not call: processes (torchrun), the data sets, kinds of noise, augmentations
and architectures of others, teachers. Arguments, run folders and reporting belong to every script.

Conventions. Images at rest are uint8 [N, 3, H, W]. Images in flight are float32 [B, 3, H, W] in [0, 1];
normalisation is part of the model. Labels are int64. Accuracies are percentages. Random draws come from
torch's global generator of the tensor's device, so that `torch.manual_seed` and the random states in a
checkpoint determine them; label noise has a seed of its own.
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

# torchvision and matplotlib are imported where they are used: each takes a second, and --help does not wait.

# -------------------------------------------------------------------------------------------------- arguments


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


def dataset_name(text):
    """argparse type: the name of a data set. A path in it gets one form: pics for ./pics and for pics/."""
    kind, colon, path = text.rpartition(":")
    return f"{kind}{colon}{Path(path)}"


def checkpoint_file(path):
    """argparse type: the path of a checkpoint, also where its run folder is named."""
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
    add("--dataset", type=dataset_name, default="shapes", metavar="NAME", help=DATASETS)
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the data sets")
    add("--noise", choices=NOISE_KINDS, help="kind of label noise in the training set")
    add("--rate", type=share, help="share of the training labels to corrupt; human-* has its own")
    add("--noise-seed", type=int, default=0, help="random seed of the label noise, whatever --seed is")
    add("--limit-train", type=count, metavar="N", help="number of training images, evenly spaced; None: all")
    add("--limit-test", type=count, metavar="N", help="number of test images, evenly spaced; None: all")
    add("--resize", type=count, default=256, metavar="PIXELS", help="side of the square of a photograph")
    add("--image-size", type=count, default=224, metavar="PIXELS", help="side of a crop of a photograph")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, help="passes over the training set; the schedule scales along")
    add("--batch-size", type=count, help="images per step; the incomplete last batch is left out")
    add("--lr", type=positive, help="initial learning rate")
    add("--weight-decay", type=share, help="L2 penalty of the optimiser")
    add("--seed", dest="seeds", type=int, nargs="+", default=[0],
        help="random seed; several: one run per seed")  # fmt: skip

    add = parser.add_argument_group("machine and output").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 models; on where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--out", type=Path, metavar="DIR", help="run folder; None: in runs/, named by the flags you type")
    add("--resume", action="store_true", help="continue the run in the run folder, or start it")
    add("--tensorboard", action="store_true", help="write metrics for TensorBoard too, into the run folder")
    return parser


TEACHER = ("teacher", "teacher_arch", "teacher_model", "mean", "std", "teacher_seeds")


def add_teacher_arguments(parser):
    """Add the flags of a script that distils from a teacher: TEACHER and --student-arch."""
    add = parser.add_argument_group("teacher and student").add_argument
    add("--teacher", type=checkpoint_file, metavar="PATH",
        help="run folder, checkpoint or public weights; None: train a teacher, once")  # fmt: skip
    add("--teacher-arch", metavar="ARCH", help="architecture of the trained teacher, or of public weights")
    add("--teacher-model", metavar="FILE.py:NAME",
        help="NAME() gives the teacher, from images in [0, 1] to logits")  # fmt: skip
    add("--mean", nargs=3, type=float, help="mean that public weights expect; None: the training images'")
    add("--std", nargs=3, type=float, help="standard deviation that they expect; both of images in [0, 1]")
    add("--teacher-seeds", type=count, default=1, metavar="K", help="teachers to train; the best one teaches")
    add("--student-arch", metavar="ARCH", help="wrn-D-K, resnetD, …")


# These flags do not decide what a run computes.
MACHINE = ("out", "resume", "device", "data_dir", "tensorboard")


def parse(parser, preset):
    """The command line as a Namespace. A flag that is left out has its value in preset(flags as typed).

    given: {flag: value} of the flags that are typed, also as their default, except --seed and MACHINE.
    name: the run folder's, from the script, the data set, the noise and `given`. seeds: sorted, each once.
    resize, image_size: None except for photographs. Raises UsageError for a rate of noise that has none, and
    for sizes of images that keep theirs.
    """
    as_typed = parser.parse_known_args()[0]  # with the parser's own defaults, often None
    unset = argparse.Namespace(**dict.fromkeys(vars(as_typed)))
    typed = vars(parser.parse_known_args(namespace=unset)[0])
    parser.set_defaults(amp=multiplies_bfloat16(as_typed.device), **preset(as_typed))  # --help shows them
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    args = parser.parse_args()
    args.seeds = sorted(set(args.seeds))
    left_out = ("seeds", *MACHINE)
    args.given = {flag: value for flag, value in typed.items() if value is not None and flag not in left_out}
    if args.noise in ("none", *HUMAN):
        refuse(args, ("rate",), f"--noise {args.noise} has no rate")
    if not is_photographs(args.dataset):
        refuse(args, ("resize", "image_size"), f"--dataset {args.dataset} keeps its size")
        args.resize = None
        args.image_size = None
    args.name = folder_name(args.script, args, args.given)
    return args


def refuse(args, flags, why):
    """Raise UsageError where one of these flags is typed: nothing reads it, and it would name the folder."""
    for flag in flags:
        if flag in args.given:
            raise UsageError(f"--{flag.replace('_', '-')}: {why}; leave it out")


def assignments(flags):
    """A dict of flags as a list of texts: "flag=value", "flag=1,2,3"."""
    return [
        f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for flag, value in flags.items()
    ]


def folder_name(first, args, flags):
    """first-dataset-noise-flag=value-…, in characters that file systems take; long names end in a digest."""
    noise = "clean" if args.noise == "none" else args.noise
    if args.rate is not None:
        noise += f"{args.rate:.12g}"
    others = {flag: value for flag, value in flags.items() if flag not in ("dataset", "noise", "rate")}
    name = "-".join([first, args.dataset.removesuffix(".npz"), noise, *assignments(others)])
    name = re.sub(r"[^\w.,=+-]", "_", name)
    if len(name.encode()) > 200:
        name = f"{name[:160]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def find_device(name):
    """The torch.device of --device. Raises UsageError for all except the CPU and visible CUDA devices."""
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"--device {name}: unknown; cpu, cuda and cuda:N work")
    device = torch.device(name)
    visible = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= visible:
        raise UsageError(f"--device {name}: {visible} CUDA devices are visible; --device cpu works")
    return device


def multiplies_bfloat16(device):
    """Whether the hardware of `device`, a text, multiplies bfloat16 itself, without emulation."""
    if find_device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


def run(parse_args, main):
    """Run a script: main(args) for each seed, the int args.seed; then print the mean of the metrics.

    UsageError and OSError become one line and exit status 2. Ctrl-C and SIGTERM end with status 130.
    """
    if not dist.is_torchelastic_launched():  # else torchrun ends a process that waits for others by SIGTERM
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± gets a question mark
    try:
        args = parse_args()
        results = []
        for seed in args.seeds:
            flags = vars(args) | {"seed": seed}
            del flags["seeds"]
            if args.out and len(args.seeds) > 1:
                flags["out"] = Path(f"{args.out}-seed{seed}")
            results.append(main(argparse.Namespace(**flags)))
        if len(results) > 1 and results[0]:  # pictures have no metrics
            print(f"{len(results)} seeds, last epoch, mean ± standard deviation:")
            for key in results[0]:
                values = [metrics.get(key) for metrics in results]
                if ("acc" in key or "top5" in key) and all(isinstance(value, float) for value in values):
                    print(f"    {key} {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")
    except (UsageError, OSError) as error:  # OSError: no such file, no network, no space left
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; a training run goes on from its last finished epoch with --resume", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def setup(args):
    """Seed the generators, choose the fast paths, join torchrun's processes: the torch.device to run on."""
    device = find_device(args.device)
    if dist.is_torchelastic_launched():
        if not dist.is_initialized():
            dist.init_process_group(timeout=datetime.timedelta(days=1))  # while one downloads, others wait
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if rank() > 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    return device


# -------------------------------------------------------------------------------------------------- processes
# `torchrun --nproc_per_node=N script.py …` starts a script N times. Each process ("rank") has the whole model
# and takes its part of every batch. Before a step, gradients and BatchNorm's running statistics are averaged
# over the processes. All start from the same seed, so that weights stay the same everywhere. Rank 0 alone
# prints and writes.


def rank():
    """The number of this process, int from 0 up."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until every process is here."""
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


# ------------------------------------------------------------------------------------------------------- data


class Dataset(NamedTuple):
    """A labelled image set. The arrays of an .npz file have the names of the first five fields."""

    train_images: torch.Tensor  # uint8 [N, 3, H, W], on the device or, where too large for it, memory-mapped
    train_labels: torch.Tensor  # int64 [N] on the device, in [0, len(classes)): the true ones
    test_images: torch.Tensor  # uint8 [M, 3, H', W']; of photographs H' < H
    test_labels: torch.Tensor  # int64 [M]
    classes: list  # names, str
    given_labels: torch.Tensor | None = (
        None  # int64 [N], maybe noisy; load_dataset takes train_labels for None
    )
    imagenet: tuple | None = None  # webvision: (images, labels) of ILSVRC12's validation images, same classes
    photographs: bool = False  # whether they are photographs
    train_digest: str = ""  # twelve characters, of all images and labels of this part; "" for one of your own
    test_digest: str = ""

    @property
    def image_size(self):
        """The longer side of a test image in pixels, by which build_model chooses an architecture's form."""
        return max(self.test_images.shape[2:])

    def batch(self, index):
        """Training images float32 [B, 3, H, W] in [0, 1] on the device of index, int64 [B]."""
        return to_float(self.train_images[index.to(self.train_images.device)].to(index.device))


ARRAYS = Dataset._fields[:5]
DATASETS = "shapes, cifar10, cifar100, svhn, food101, webvision, FILE.npz, imagefolder:DIR"
CLEANLY_LABELLED = ("shapes", "cifar10", "cifar100", "svhn")  # nrd, cmd and messy_collaboration add noise


def is_photographs(name):
    """Whether the data set `name` consists of photographs, whose sizes --resize and --image-size decide."""
    return name in ("food101", "webvision") or name.startswith("imagefolder:")


def load_data(args, device):
    """The Dataset that the flags name. Under torchrun the first process decodes, the others wait."""
    if rank() > 0:
        barrier()
    data = load_dataset(
        args.dataset, args.data_dir, args.limit_train, args.limit_test, device, args.resize, args.image_size
    )
    if rank() == 0:
        barrier()
    return data


def load_dataset(
    name,
    data_dir="data",
    limit_train=None,
    limit_test=None,
    device="cpu",
    resize=256,
    image_size=224,
    test_only=False,
):
    """The data set `name` as a Dataset on `device`.

    name: "shapes" (drawn by code), "cifar10", "cifar100", "svhn" (data_dir/NAME.npz; downloaded once where
        that is missing), the path of any .npz file of that form, or photographs: "food101", "webvision" or
        "imagefolder:DIR" (`list_pictures` says where the files lie). These are decoded once, into arrays in
        data_dir. Arrays of more than a third of the device's memory stay memory-mapped on the host.
    limit_train, limit_test: how many samples are kept. They are evenly spaced: a file sorted by class stays
        balanced.
    resize, image_size: side of training images and of test images in pixels; photographs only.
    test_only: the training part is not read, and may be missing. Its tensors have length 0.
    Raises UsageError for an unknown name, for missing or malformed files, and where a download fails.
    """
    name = str(name)
    data_dir = Path(data_dir)
    device = torch.device(device)
    if name == "shapes":
        train = draw_shapes(0 if test_only else 2000, seed=0)
        data = Dataset(*train, *draw_shapes(1000, seed=1), SHAPES_CLASSES)
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

    most = math.inf if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory / 3

    def part(limit, digest, *tensors):
        """Evenly spaced rows of `tensors`, images and labels, and their digest.

        digest: of all images, or "" where it is to be computed from the rows.
        """
        if limit is not None:
            rows = evenly_spaced(len(tensors[0]), limit)
            tensors = [tensor[rows] for tensor in tensors]
        sha = hashlib.sha256(digest.encode())
        for tensor in tensors[1:] if digest else tensors:
            sha.update(np.ascontiguousarray(tensor))
        moved = [t if t.dim() > 1 and t.numel() >= most else t.to(device) for t in tensors]
        return *moved, sha.hexdigest()[:12]

    given_labels = data.train_labels if data.given_labels is None else data.given_labels
    *train, given_labels, train_digest = part(
        limit_train, data.train_digest, data.train_images, data.train_labels, given_labels
    )
    *test, test_digest = part(limit_test, data.test_digest, data.test_images, data.test_labels)
    imagenet = data.imagenet and tuple(tensor.to(device) for tensor in data.imagenet)
    return Dataset(
        *train, *test, data.classes, given_labels, imagenet, data.photographs, train_digest, test_digest
    )


def evenly_spaced(total, limit):
    """Indices int64 [min(total, limit)], evenly spaced over range(total)."""
    kept = min(total, limit)
    return torch.arange(kept) * total // kept


def read_npz(path, test_only=False):
    """The Dataset in an .npz file, read without pickle. Raises UsageError for what is missing or wrong.

    test_only: as for load_dataset.
    """
    names = ARRAYS[2:] if test_only else ARRAYS
    try:
        with np.lib.npyio.NpzFile(path) as file:  # np.load would take a web page for a pickle
            arrays = {name: np.ascontiguousarray(file[name]) for name in names}
            if "true_labels" in file and not test_only:
                arrays["true_labels"] = file["true_labels"]
    except Exception as error:  # no such file, or whatever a damaged one makes numpy raise
        advice = "README says how to write one"
        if path.stem in CLEANLY_LABELLED:
            advice = "remove it to download it again"
        raise UsageError(
            f"--dataset: {path} is no .npz file with {', '.join(names)} ({error}); {advice}"
        ) from None
    classes = [str(name) for name in arrays.pop("classes").ravel()]
    for name in [name for name in arrays if name.endswith("labels")]:
        labels = arrays[name]
        of = "test_images" if name == "test_labels" else "train_images"
        images = arrays[of]
        where = f"--dataset: {path}:"
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise UsageError(f"{where} {of} is {images.dtype} {list(images.shape)}, not uint8 [N, 3, H, W]")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            kind = f"{labels.dtype} {list(labels.shape)}"
            raise UsageError(f"{where} {name} is {kind}, not integer [{len(images)}]")
        if labels.min() < 0 or labels.max() >= len(classes):
            span = f"{labels.min()} to {labels.max()}"
            raise UsageError(f"{where} {name} are {span}, but {len(classes)} classes are named")
        arrays[name] = labels.astype(np.int64)
    if test_only:
        arrays["train_images"] = arrays["test_images"][:0]
        arrays["train_labels"] = arrays["test_labels"][:0]
    if arrays["train_images"].shape[2:] != arrays["test_images"].shape[2:]:
        raise UsageError(f"--dataset: {path}: test_images have another height or width than train_images")
    if "true_labels" in arrays:
        arrays["given_labels"] = arrays["train_labels"]
        arrays["train_labels"] = arrays.pop("true_labels")
    return Dataset(**{name: torch.from_numpy(array) for name, array in arrays.items()}, classes=classes)


def download(name, path):
    """Fetch cifar10, cifar100 or svhn with torchvision and write it to `path` as .npz."""
    from torchvision.datasets import CIFAR10, CIFAR100, SVHN

    print(f"downloading {name} into {path}", flush=True)
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN}[name]
    arrays = {"classes": range(10)}  # SVHN's digits
    for part in ("train", "test"):
        try:
            found = source(path.parent, part if name == "svhn" else part == "train", download=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: something else came, such as a web page
            advice = f"try again, or bring {path} from a machine where it works"
            raise UsageError(f"--dataset {name}: torchvision's download failed ({error}); {advice}") from None
        if name == "svhn":
            arrays |= {f"{part}_images": found.data, f"{part}_labels": found.labels}
        else:
            images = found.data.transpose(0, 3, 1, 2)
            arrays |= {f"{part}_images": images, f"{part}_labels": found.targets, "classes": found.classes}
    with atomic_write(path) as partial:
        np.savez(partial, **arrays)


def photographs(name, data_dir, resize, image_size, test_only=False):
    """The Dataset of photographs: middle squares of `resize` pixels, for tests of `image_size` pixels."""
    if resize < image_size:
        raise UsageError(f"--resize: {resize} is smaller than --image-size {image_size}")
    parts = ["test"] if test_only else ["test", "train"]
    if name == "webvision" and (data_dir / "imagenet" / "val").is_dir():
        parts.append("imagenet")
    try:
        listed = {part: list_pictures(name, data_dir, part) for part in parts}
    except (OSError, RuntimeError) as error:  # RuntimeError: as in `download`
        raise UsageError(f"--dataset {name}: {error}; README says where its files belong") from None
    classes = listed["test"][1]
    data = {}
    for part, (_, found) in listed.items():
        if found != classes:
            odd = ", ".join(sorted(set(found) ^ set(classes)))
            raise UsageError(f"--dataset {name}: {part} has other classes than the test part: {odd}")
    for part, (samples, _) in listed.items():
        side = resize if part == "train" else image_size
        stem = re.sub(r"[^\w.-]", "_", name)[-60:]  # which every file system takes
        path = data_dir / "decoded" / f"{stem}-{part}-{resize}-{side}.raw"
        data[part] = decode(samples, resize, side, path)
    *test, digest = data["test"]
    *train, train_digest = data.get("train", [*(tensor[:0] for tensor in test), digest])
    imagenet = data["imagenet"][:2] if "imagenet" in data else None
    return Dataset(*train, *test, classes, None, imagenet, True, train_digest, digest)


def list_pictures(name, data_dir, part):
    """[(file, label), …] of the part "train" or "test" of a data set of photographs, and its classes' names.

    imagefolder:DIR: all files in DIR/train/CLASS and DIR/test/CLASS (or val), by torchvision's ImageFolder.
    food101: torchvision's Food101 in data_dir, downloaded where it is missing.
    webvision: the first 50 classes of WebVision 1.0 in data_dir/webvision ("mini-WebVision"): training images
        of info/train_filelist_google.txt, test images of info/val_filelist.txt in val_images_256. And
        "imagenet": ILSVRC12's validation images of the classes in info/synsets.txt, in
        data_dir/imagenet/val/WNID.
    """
    import torchvision

    if name == "food101":
        missing = not (data_dir / "food-101" / "images").is_dir()
        food = torchvision.datasets.Food101(data_dir, part, download=missing)
        return list(zip(food._image_files, food._labels)), food.classes
    if name.startswith("imagefolder:"):
        folder = Path(name.removeprefix("imagefolder:")) / part
        if part == "test" and not folder.is_dir():
            folder = folder.with_name("val")
        # `decode` finds out which files are pictures
        pictures = torchvision.datasets.ImageFolder(folder, is_valid_file=lambda path: True)
        return pictures.samples, pictures.classes
    root = data_dir / "webvision"

    def lines(name):
        return (root / "info" / name).read_text(encoding="utf-8").splitlines()

    synsets = [line.split() for line in lines("synsets.txt")[:50]]
    classes = [" ".join(words) for _, *words in synsets]
    if part == "imagenet":
        folders = [data_dir / "imagenet" / "val" / wnid for wnid, *_ in synsets]
        return [(file, c) for c, folder in enumerate(folders) for file in sorted(folder.iterdir())], classes
    file = "train_filelist_google.txt" if part == "train" else "val_filelist.txt"
    folder = root if part == "train" else root / "val_images_256"
    rows = [line.rsplit(maxsplit=1) for line in lines(file)]
    return [(folder / path, int(label)) for path, label in rows if int(label) < 50], classes


def read_square(file, resize, side):
    """The middle square of the picture in `file`, uint8 [3, side, side]; None where it is unreadable.

    Its shorter side is resized to `resize` pixels first. The pixels are as stored, as in torchvision's
    ImageFolder: EXIF's orientation and transparency do not count, and of several frames the first counts.
    Grey levels of 16 bits are scaled to 8. Grey levels of 32 bits, whose range is unknown, are unreadable,
    and so are pictures of more than 179 million pixels.
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
    """Decode `samples`, a list of (file, label): memory-mapped uint8 [n, 3, side, side] and labels int64 [n].

    The pictures are decoded once, into `path`, and again where the files have changed. Unreadable ones are
    named and left out. The third result is a digest of all pixels, computed when they are decoded. Raises
    UsageError where no picture is left.
    """
    files = [file for file, _ in samples]
    known = []
    for file in files:
        stat = os.stat(file) if os.path.exists(file) else None
        # ctime: an archive sets mtime, often to one time for all files
        known.append([str(file), stat and [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]])
    record = path.with_suffix(".json")  # of what is in `path`; it is written last
    saved = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if saved.get("files") != known or "pixels" not in saved or not path.exists():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        loader = torch.utils.data.DataLoader(
            files,
            None,
            num_workers=min(cores, 16),
            collate_fn=functools.partial(read_square, resize=resize, side=side),  # in the workers
            generator=torch.Generator(),  # the global one is for the draws of the method
        )
        for left in path.parent.glob(f"{path.stem}.*.partial{path.suffix}"):
            if time.time() - left.stat().st_mtime > 3600:  # of a process that was killed while it decoded
                left.unlink()
        rows = []
        sha = hashlib.sha256()
        # written, not mapped: on a full disk, writing into a map kills the process
        with atomic_write(path) as partial, open(partial, "wb") as raw:
            for i, image in enumerate(progress(loader, f"decoding {len(files):,} pictures into {path}")):
                if image is None:
                    print(f"cannot be read and is left out: {files[i]}", file=sys.stderr)
                else:
                    content = image.numpy().tobytes()
                    raw.write(content)
                    sha.update(content)
                    rows.append(i)
            record.unlink(missing_ok=True)  # it tells of the old pixels
        saved = {"files": known, "rows": rows, "pixels": sha.hexdigest()}
        with atomic_write(record) as partial:
            partial.write_text(json.dumps(saved), encoding="utf-8")
        print(f"decoded {len(rows):,} pictures, left out {len(files) - len(rows):,}")
    rows = saved["rows"]
    if not rows:
        raise UsageError(f"--dataset: none of the {len(files):,} pictures of {path.stem} can be read")
    images = np.memmap(path, np.uint8, "c", shape=(len(rows), 3, side, side))
    labels = [samples[i][1] for i in rows]
    return torch.from_numpy(images), torch.tensor(labels), saved["pixels"]


FORMS = ("disc", "bar", "triangle", "cross", "ring")
SHAPES_CLASSES = [f"{fabric} {form}" for form in FORMS for fabric in ("striped", "dotted")]


def draw_shapes(n, seed, size=32):
    """Ten classes of pictures, five forms striped or dotted: uint8 [n, 3, size, size] and labels int64 [n].

    Form and texture decide the class; colours, place, size, angle, phase, background, clutter and pixel noise
    don't. Every operation is one that IEEE 754 rounds exactly (no sin or normal draws): the same pixels on
    every machine.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    labels = torch.randperm(n, generator=generator) % 10
    form = (labels // 2).view(-1, 1, 1, 1)
    dotted = (labels % 2).view(-1, 1, 1, 1).bool()
    x = (torch.arange(size) + 0.5) * (2 / size) - 1
    y = x.view(-1, 1)

    t = uniform(-1, 1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos = flip * (1 - t * t) / (1 + t * t)  # with sin a point of the unit circle, without calling sin()
    sin = flip * 2 * t / (1 + t * t)
    dx = x - uniform(-0.2, 0.2)
    dy = y - uniform(-0.2, 0.2)
    u = cos * dx + sin * dy  # coordinates in the form's own frame
    v = cos * dy - sin * dx
    radius = uniform(0.6, 0.85)
    p = (u / radius).abs()
    q = v / radius

    rho = (p * p + q * q).sqrt()
    outline = torch.stack([  # each at most 1 inside the form
        rho / 0.9,
        torch.maximum(p, 3 * q.abs()),
        torch.maximum(1.7320508 * p + q, -2 * q),
        torch.minimum(torch.maximum(p, 3 * q.abs()), torch.maximum(3 * p, q.abs())),
        (rho - 0.72).abs() / 0.25,
    ])  # fmt: skip
    inside = outline.gather(0, form.expand(1, n, 1, size, size))[0] <= 1

    frequency = uniform(2.6, 3.4)
    a = (u * frequency + uniform(0, 1)) % 1 - 0.5
    b = (v * frequency + uniform(0, 1)) % 1 - 0.5
    texture = torch.where(dotted, a * a + b * b < 0.12, a.abs() < 0.25)

    light = uniform(0.7, 1, 3)
    dark = uniform(0, 0.3, 3)
    slope = x * uniform(-0.15, 0.15) + y * uniform(-0.15, 0.15)
    image = uniform(0.3, 0.7, 3) + slope
    for _ in range(3):  # clutter behind the form
        spot = (x - uniform(-1, 1)) ** 2 + (y - uniform(-1, 1)) ** 2 < uniform(0.08, 0.2) ** 2
        image = torch.where(spot, uniform(0.2, 0.8, 3), image)
    image = torch.where(inside, torch.where(texture, light, dark), image)
    noise = torch.rand(n, 3, size, size, generator=generator) - 0.5
    image = (image + 0.15 * noise).clamp(0, 1)
    return (image * 255).round().byte(), labels


def channel_stats(data):
    """Mean and standard deviation of each channel of a Dataset's training images, in [0, 1]: two lists of 3.

    Photographs have those of ImageNet. Raises UsageError where there are no training images.
    """
    if data.photographs:
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = data.train_images
    if not len(images):
        raise UsageError("--mean, --std: are needed; there are no training images to compute them from")
    histograms = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]
    counts = torch.stack(histograms).double().cpu()
    frequency = counts / counts.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = (frequency * level).sum(1)
    variance = (frequency * level**2).sum(1) - mean**2
    std = variance.clamp(min=0).sqrt()
    return mean.tolist(), std.where(std > 0, 1.0).tolist()  # 1 for a constant channel: one divides by it


def to_float(images):
    """uint8 [..., 3, H, W] -> float32 in [0, 1]."""
    return images / 255


# ------------------------------------------------------------------------------------------------ label noise

HUMAN = {  # kind: key in the file of CIFAR-10N, the last in that of CIFAR-100N
    "human-aggre": "aggre_label", "human-random1": "random_label1", "human-random2": "random_label2",
    "human-random3": "random_label3", "human-worse": "worse_label", "human-noisy": "noisy_label",
}  # fmt: skip
NOISE_KINDS = ("none", "sym", "sym-other", "pair", "asym", *HUMAN)

CIFAR10_CONFUSIONS = {"bird": "airplane", "cat": "dog", "deer": "horse", "dog": "cat", "truck": "automobile"}
CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale / aquarium_fish flatfish ray shark trout / orchid poppy rose sunflower tulip /
bottle bowl can cup plate / apple mushroom orange pear sweet_pepper /
clock keyboard lamp telephone television / bed chair couch table wardrobe /
bee beetle butterfly caterpillar cockroach / bear leopard lion tiger wolf /
bridge castle house road skyscraper / cloud forest mountain plain sea /
camel cattle chimpanzee elephant kangaroo / fox porcupine possum raccoon skunk /
crab lobster snail spider worm / baby boy girl man woman / crocodile dinosaur lizard snake turtle /
hamster mouse rabbit shrew squirrel / maple_tree oak_tree palm_tree pine_tree willow_tree /
bicycle bus motorcycle pickup_truck train / lawn_mower rocket streetcar tank tractor"""


def noisy_labels(args, data, per_sample=False):
    """The training labels that a Dataset gives, int64 [N], corrupted as --noise, --rate, --noise-seed say."""
    return corrupt_labels(
        data.given_labels, args.noise, args.rate, data.classes, args.noise_seed, args.data_dir, per_sample
    )


def corrupt_labels(labels, kind, rate, classes, seed, data_dir="data", per_sample=False):
    """A noisy copy of int64 labels [N], on the same device; the same for the same seed on every device.

    kind: none
        sym        exactly round(rate·N) samples get a label uniform over all classes (their own included);
                   with per_sample, each sample gets one with probability rate
        sym-other  each sample, with probability rate, gets one of the other classes
        pair       each sample, with probability rate, gets the next class, y+1 mod C
        asym       CIFAR-10: class by class, exactly round(rate·n) of the n samples that now have the label go
                   to its look-alike (Patrini et al. 2017; in this order in GJS's code and NRD's): some cats
                   that became dogs come back, and at a rate of 0.4 18.4 % of the labels are wrong;
                   CIFAR-100: round(rate·N) samples go to the next class of their superclass
        human-*    annotators' labels of CIFAR-10N (aggre, random1-3, worse) and CIFAR-100N (noisy); without
                   a rate
    rate: in [0, 1]. classes: their names, which asym goes by. data_dir: where CIFAR-10N's own files lie.
    Raises UsageError for an unknown kind, a rate outside [0, 1], asym without a map, human labels of another
    data set.
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
    n = len(labels)
    noisy = clean.clone()
    num_classes = len(classes)

    def some(samples):
        """Exactly round(rate · len(samples)) of them, at random."""
        return samples[torch.randperm(len(samples), generator=generator)[: round(rate * len(samples))]]

    if kind == "sym":
        if per_sample:
            chosen = (torch.rand(n, generator=generator) < rate).nonzero().squeeze(1)
        else:
            chosen = some(torch.arange(n))
        noisy[chosen] = torch.randint(num_classes, (len(chosen),), generator=generator)
    elif kind in ("sym-other", "pair"):
        flips = torch.rand(n, generator=generator) < rate
        step = torch.randint(1, num_classes, (n,), generator=generator) if kind == "sym-other" else 1
        noisy = torch.where(flips, (clean + step) % num_classes, clean)
    elif kind == "asym":
        if set(CIFAR10_CONFUSIONS) | set(CIFAR10_CONFUSIONS.values()) <= set(classes):
            for source, target in CIFAR10_CONFUSIONS.items():
                moved = some((noisy == classes.index(source)).nonzero().squeeze(1))
                noisy[moved] = classes.index(target)
        elif set(CIFAR100_SUPERCLASSES.replace("/", " ").split()) == set(classes):
            successor = torch.arange(num_classes)
            for family in CIFAR100_SUPERCLASSES.split("/"):
                members = sorted(classes.index(name) for name in family.split())
                successor[members] = torch.tensor(members[1:] + members[:1])
            moved = some(torch.arange(n))
            noisy[moved] = successor[clean[moved]]
        else:
            raise UsageError(
                "--noise asym: only CIFAR-10 and CIFAR-100 have a map of look-alikes; sym works anywhere"
            )
    return noisy.to(labels.device)


def human_labels(clean, kind, data_dir):
    """CIFAR-N's labels int64 [N] for clean labels int64 [N] in the official order, all or evenly spaced."""
    path = Path(data_dir) / ("CIFAR-100_human.pt" if kind == "human-noisy" else "CIFAR-10_human.pt")
    # The file is a pickle of numpy arrays: torch's restricted unpickler may call what builds these alone.
    rebuild = np.empty(0).__reduce__()[0]  # the function that makes an array; numpy 2 has renamed it
    allowed = [(rebuild, "numpy.core.multiarray._reconstruct"), rebuild, np.ndarray, np.dtype, codecs.encode]
    try:
        with torch.serialization.safe_globals([*allowed, type(np.dtype(np.int64))]):
            content = torch.load(path, weights_only=True)
        truth = torch.from_numpy(np.int64(content["clean_label"]))
        noisy = torch.from_numpy(np.int64(content[HUMAN[kind]]))
    except Exception as error:  # no such file, or whatever a damaged one makes the unpickler raise
        advice = "take it from CIFAR-N (github.com/UCSC-REAL/cifar-10-100n)"
        raise UsageError(f"--noise {kind}: cannot read {path} ({type(error).__name__}); {advice}") from None
    rows = evenly_spaced(len(truth), len(clean))
    if not torch.equal(truth[rows], clean):
        raise UsageError(
            f"--noise {kind}: {path} labels another data set, or the images are not in the official order"
        )
    return noisy[rows]


# ----------------------------------------------------------------------------------------------- augmentation
# Batched on the images' device, every sample with a draw of its own. What an operation does at a strength is
# a row of a table of numbers: the matrix of a warp, the factor of a blend, and so on. A batch takes its rows.
# Then each of six functions changes the images that are its own: few kernels, however large the batch is.
# Pixel values follow the 8-bit operations of torchvision.transforms.v2.

# The columns of the table. x_x … y_1: the matrix of a warp, x = x_x · x + x_y · y + x_1 and the same for y.
# factor: that of a blend. gray, mean_gray: how much it blends with the grey image and with the mean grey.
# step: between posterize's levels. threshold: solarize inverts the levels from there on. function: its place
# in FUNCTIONS.
COLUMNS = (
    "x_x", "x_y", "x_1", "y_x", "y_y", "y_1",
    "factor", "gray", "mean_gray", "step", "threshold", "function",
)  # fmt: skip


def check_images(images):
    fits = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    assert fits, f"images are {images.dtype} {list(images.shape)}, not float [B, 3, H, W] in [0, 1]"


def _column(rows, name):
    return rows[:, COLUMNS.index(name)].view(-1, 1, 1, 1)


def _warp(images, rows, mode):
    """Shear, translate or rotate: sample the input at matrix · (x, y, 1), in pixels from the centre."""
    height, width = images.shape[2:]
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device).view(-1, 1)
    by_x, by_y, shift = rows[:, :6].view(-1, 2, 3, 1, 1).unbind(2)
    # no matrix product: with TF32 or bfloat16 on, it would be too coarse
    grid = (by_x * x + by_y * y).add_(shift)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode=mode, align_corners=False)


def _gray(images):
    """Luma of images [B, 3, H, W]: [B, 1, H, W]. The 8-bit operations round it down."""
    red, green, blue = images.split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(images, rows, _):
    """factor · image + (1 - factor) · another: black (brightness), mean grey (contrast) or grey (colour)."""
    gray = _gray(images).floor_()
    mean = gray.mean((2, 3), keepdim=True)
    another = _column(rows, "gray") * gray + _column(rows, "mean_gray") * mean
    return torch.lerp(another, images, _column(rows, "factor")).clamp_(0, 255)


def _sharpness(images, rows, _):
    """factor · image + (1 - factor) · smoothed image, which has the border of the image itself."""
    box = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    box = box[..., :-2] + box[..., 1:-1] + box[..., 2:]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = box.add_(images[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return torch.lerp(smooth, images, _column(rows, "factor")).clamp_(0, 255)


def _levels(images, rows, _):
    """Posterize: levels down to a multiple of the step. Solarize, invert: those from the threshold on."""
    step = _column(rows, "step")
    level = (images.round() / step).floor_() * step
    return torch.where(level < _column(rows, "threshold"), level, 255 - level)


def _auto_contrast(images, *_):
    """Stretch each channel to 0 … 255; one of a single level stays."""
    level = images.round()
    low = level.amin((2, 3), keepdim=True)
    high = level.amax((2, 3), keepdim=True)
    return torch.where(low < high, (level - low) / (high - low) * 255, level)


def _equalize(images, *_):
    """Equalize each channel's histogram; one with fewer than 255 pixels below its brightest level stays."""
    level = images.round().long().flatten(2)
    histogram = torch.zeros(len(images), 3, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, level, torch.ones_like(level))
    below = histogram.cumsum(2) - histogram
    step = below.gather(2, level.amax(2, keepdim=True)) // 255
    equal = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, equal.gather(2, level), level).to(images.dtype).view_as(images)


FUNCTIONS = (_warp, _blend, _sharpness, _levels, _auto_contrast, _equalize)  # in the order of apply_ops


def operations(bins, height, width, translate=150 / 331, posterize=8):
    """{name: (the function, its numbers by column where they are not 0)}.

    A number is a float, or float [bins, 1 or 2]: for each strength, with + and with -. Strengths are evenly
    spaced as in torchvision's spaces, from nothing to a shear of 0.3, a turn of 30°, a move of `translate`
    times the side in whole pixels, a blend by 1 ± 0.9, `posterize` - 4 bits, solarize from 0 on. AutoAugment
    and RandAugment move by up to 150/331 of the side and posterize to 8 … 4 bits. AugMix moves by up to 1/3
    and posterizes to 4 … 0 bits. AugMix draws from the first 13 operations, RandAugment from the first 14.
    """

    def spaced(start, end):
        return torch.linspace(start, end, bins).view(-1, 1)

    sign = torch.tensor([1.0, -1.0])
    shear = spaced(0, 0.3) * sign
    angle = spaced(0, 30) * sign * (math.pi / 180)
    factor = 1 + spaced(0, 0.9) * sign
    move_x, move_y = (spaced(0, translate * side).trunc() * sign for side in (width, height))
    bits = (posterize - torch.arange(bins) / ((bins - 1) / 4)).round().view(-1, 1)
    same = {"x_x": 1, "y_y": 1}
    turn = {"x_x": angle.cos(), "x_y": -angle.sin(), "y_x": angle.sin(), "y_y": angle.cos()}
    return {
        # shears keep the first row, the first column, in its place
        "ShearX": (_warp, same | {"x_y": shear, "x_1": shear * (height / 2)}),
        "ShearY": (_warp, same | {"y_x": shear, "y_1": shear * (width / 2)}),
        "TranslateX": (_warp, same | {"x_1": -move_x}),
        "TranslateY": (_warp, same | {"y_1": -move_y}),
        "Rotate": (_warp, turn),
        "Brightness": (_blend, {"factor": factor}),
        "Contrast": (_blend, {"factor": factor, "mean_gray": 1}),
        "Color": (_blend, {"factor": factor, "gray": 1}),
        "Sharpness": (_sharpness, {"factor": factor}),
        "Posterize": (_levels, {"step": 2 ** (8 - bits), "threshold": 256}),
        "Solarize": (_levels, {"step": 1, "threshold": 255 * spaced(1, 0)}),
        "AutoContrast": (_auto_contrast, {}),
        "Equalize": (_equalize, {}),
        "Identity": (None, {}),
        "Invert": (_levels, {"step": 1}),
    }


OPS = list(operations(2, 1, 1))
IDENTITY = OPS.index("Identity")
_tables = {}  # op_table's results by its arguments; not functools.cache, through which torch.compile looks


def op_table(bins, height, width, device, translate=150 / 331, posterize=8):
    """The numbers of all operations at each strength, with + and with -: float32 [15, bins, 2, 12]."""
    key = (bins, height, width, translate, posterize, device)
    if key not in _tables:
        table = torch.zeros(len(OPS), bins, 2, len(COLUMNS))
        for row, (function, numbers) in zip(table, operations(*key[:-1]).values()):
            for column, number in numbers.items():
                row[..., COLUMNS.index(column)] = number
            row[..., COLUMNS.index("function")] = FUNCTIONS.index(function) if function else -1
        table[..., :3] /= width / 2  # from pixels to grid_sample's units
        table[..., 3:6] /= height / 2
        _tables[key] = table.to(device)
    return _tables[key]


def apply_ops(images, table, op, strength, negative, mode="nearest"):
    """Apply to each image its own operation, the row [op, strength, negative] of the table; all int64 [B].

    images: float [B, 3, H, W] in 0 … 255, overwritten; returns the same. mode: how warps interpolate,
    "nearest" or "bilinear"; what comes in from outside the image is black.
    """
    rows = table[op, strength, negative]
    function = rows[:, COLUMNS.index("function")]
    masks = function == torch.arange(len(FUNCTIONS), device=images.device).view(-1, 1)
    for mask, transform in zip(masks, FUNCTIONS):
        if images.device.type == "cpu" and not torch.compiler.is_compiling():  # compute the rows concerned
            mine = mask.nonzero().squeeze(1)
            if len(mine):
                changed = transform(images.index_select(0, mine), rows.index_select(0, mine), mode)
                images.index_copy_(0, mine, changed)
        else:  # compute all rows: to count those concerned, the host would wait for the device
            images = torch.where(mask.view(-1, 1, 1, 1), transform(images, rows, mode), images)
    return images


def _coins(n, device):
    """Whether each strength is negative: int64 [n], 0 or 1."""
    return (torch.rand(n, device=device) < 0.5).long()


def rand_augment(images, num_ops, magnitude):
    """RandAugment: `num_ops` operations in turn, each drawn from 14, at strength `magnitude` of 0 … 30.

    This is torchvision's form. The authors of GJS used another package, whose (1, 3) is four times as strong.
    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)
    n = len(images)
    device = images.device
    table = op_table(31, *images.shape[2:], device)
    images = images * 255
    for _ in range(num_ops):
        op = torch.randint(14, (n,), device=device)
        images = apply_ops(images, table, op, magnitude, _coins(n, device))
    return images.div_(255)


def aug_mix(images, severity=3, width=3, depth=-1):
    """AugMix: an image mixed with `width` chains of operations by weights Dirichlet(1, …, 1) and Beta(1, 1).

    severity: strengths are drawn from the first `severity` of 10. depth: operations per chain; -1 draws 1-3
    for each. This is torchvision's form; the changes of the original code are 1.4 times as large.
    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)
    n = len(images)
    device = images.device
    table = op_table(10, *images.shape[2:], device, translate=1 / 3, posterize=4)
    longest = depth if depth > 0 else 3
    draws = (longest, width * n)
    op = torch.randint(13, draws, device=device)
    strength = torch.randint(severity, draws, device=device)
    negative = torch.randint(2, draws, device=device)
    if depth < 1:
        length = torch.randint(1, 4, (width * n,), device=device)
        op = torch.where(torch.arange(3, device=device).view(-1, 1) < length, op, IDENTITY)
    chains = (images.expand(width, *images.shape) * 255).flatten(0, 1)
    for step in zip(op, strength, negative):
        chains = apply_ops(chains, table, *step, mode="bilinear")
    weights = torch.empty(width, n, 1, 1, 1, device=device).exponential_()
    weights /= weights.sum(0)  # now Dirichlet(1, …, 1)
    mixed = chains.view(width, *images.shape).mul_(weights / 255).sum(0)
    beta = torch.rand(n, 1, 1, 1, device=device)  # Beta(1, 1)
    return torch.lerp(images, mixed, beta).clamp_(0, 1)  # rounding alone can leave [0, 1]


# The 25 sub-policies of AutoAugment for CIFAR-10: (operation, probability, strength of 0-9), twice.
AUTO_AUGMENT_CIFAR10 = """
Invert .1 0 Contrast .2 6 / Rotate .7 2 TranslateX .3 9 / Sharpness .8 1 Sharpness .9 3 /
ShearY .5 8 TranslateY .7 9 / AutoContrast .5 0 Equalize .9 0 / ShearY .2 7 Posterize .3 7 /
Color .4 3 Brightness .6 7 / Sharpness .3 9 Brightness .7 9 / Equalize .6 0 Equalize .5 0 /
Contrast .6 7 Sharpness .6 5 / Color .7 7 TranslateX .5 8 / Equalize .3 0 AutoContrast .4 0 /
TranslateY .4 3 Sharpness .2 6 / Brightness .9 6 Color .2 8 / Solarize .5 2 Invert 0 0 /
Equalize .2 0 AutoContrast .6 0 / Equalize .2 0 Equalize .6 0 / Color .9 9 Equalize .6 0 /
AutoContrast .8 0 Solarize .2 8 / Brightness .1 3 Color .7 0 / Solarize .4 5 AutoContrast .9 0 /
TranslateY .9 9 TranslateY .7 9 / AutoContrast .9 0 Solarize .8 3 / Equalize .8 0 Invert .1 0 /
TranslateY .7 9 AutoContrast .9 0"""


def auto_augment(images):
    """AutoAugment with its CIFAR-10 policy: for each image two operations of a sub-policy, by their chances.

    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)
    n = len(images)
    device = images.device
    table = op_table(10, *images.shape[2:], device)
    ops, probabilities, strengths = auto_augment_policy(device)
    policy = torch.randint(len(ops), (n,), device=device)
    images = images * 255
    for turn in (0, 1):
        active = torch.rand(n, device=device) < probabilities[policy, turn]
        op = torch.where(active, ops[policy, turn], IDENTITY)
        images = apply_ops(images, table, op, strengths[policy, turn], _coins(n, device))
    return images.div_(255)


@functools.cache
def auto_augment_policy(device):
    """The CIFAR-10 policy: operation int64, probability float32, strength int64, each [25, 2] on `device`."""
    words = np.array([policy.split() for policy in AUTO_AUGMENT_CIFAR10.split("/")])
    op = [[OPS.index(name) for name in names] for names in words[:, [0, 3]]]
    probability = np.float32(words[:, [1, 4]])
    strength = np.int64(words[:, [2, 5]])
    return tuple(torch.tensor(part, device=device) for part in (op, probability, strength))


def crop_flip(images, padding=4, mode="zero", size=None):
    """Random crop from the image padded by `padding` pixels, and a flip with probability 1/2.

    mode: of padding, "zero" or "reflect". size: sides that are longer are cropped to it; None: none is.
    images: float [B, 3, H, W]; returns float [B, 3, min(H, size), min(W, size)].
    """
    check_images(images)
    n = len(images)
    device = images.device
    height, width = (min(side, size or side) for side in images.shape[2:])
    if padding:
        images = F.pad(images, (padding,) * 4, mode="constant" if mode == "zero" else mode)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, 3, tops, lefts, height, width]
    if windows.shape[2:4] != (1, 1):
        top = torch.randint(windows.shape[2], (n,), device=device)
        left = torch.randint(windows.shape[3], (n,), device=device)
        images = windows[torch.arange(n, device=device), :, top, left]
    flip = torch.rand(n, 1, 1, 1, device=device) < 0.5
    return torch.where(flip, images.flip(3), images)


def _boxes(images, tallest, widest, scale, ratio, otherwise):
    """Random boxes in the images: top, left, height, width in pixels, each float [B, 1].

    scale: ends of the share of the image's area. ratio: ends of width / height. Of ten drawn the first that
    is at most `tallest` by `widest` is taken, as in torchvision; else height and width are `otherwise`.
    """
    height, width = images.shape[2:]
    area = torch.empty(len(images), 10, device=images.device).uniform_(*scale) * (height * width)
    aspect = torch.empty_like(area).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    h = (area / aspect).sqrt().round()
    w = (area * aspect).sqrt().round()
    fits = (h >= 1) & (h <= tallest) & (w >= 1) & (w <= widest)
    first = fits.int().argmax(1, keepdim=True)
    h = h.gather(1, first).where(fits.any(1, keepdim=True), otherwise[0])
    w = w.gather(1, first).where(fits.any(1, keepdim=True), otherwise[1])
    top = (torch.rand_like(h) * (height - h + 1)).floor()
    left = (torch.rand_like(w) * (width - w + 1)).floor()
    return top, left, h, w


def random_resized_crop(images, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Random resized crop: a box of `scale` of the area and `ratio` width to height, resized to size × size.

    Where no box fits it is the whole image. Bilinear without antialiasing: boxes should not be much larger
    than `size`.
    images: float [B, 3, H, W]; returns float [B, 3, size, size].
    """
    check_images(images)
    sides = images.shape[2:]
    return _resized_crop(images, *_boxes(images, *sides, scale, ratio, sides), size)


def _resized_crop(images, top, left, height, width, size):
    """Cut the box [top, top + height) × [left, left + width) out of each image, resize it; all are [B, 1]."""
    step = (torch.arange(size, device=images.device) + 0.5) / size

    def coordinates(start, length, side):  # in pixels, within the box; then in grid_sample's units
        inside = (start + step * length - 0.5).clamp(min=start, max=start + length - 1)
        return (2 * inside + 1) / side - 1

    y = coordinates(top, height, images.shape[2])
    x = coordinates(left, width, images.shape[3])
    grid = torch.stack(torch.broadcast_tensors(x.unsqueeze(1), y.unsqueeze(2)), -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def color_jitter(images, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2):
    """Colour jitter: for each image factors uniform in [1 - s, 1 + s], hue turned by ± `hue` of a full turn.

    The order of the four is drawn once for the batch, on the host: torch.compile breaks the graph there.
    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    check_images(images)

    def uniform(low, high):
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    for step in torch.randperm(4).tolist():
        if step == 0:
            images = images * uniform(1 - brightness, 1 + brightness)
        elif step == 1:
            mean = _gray(images).mean((2, 3), keepdim=True)
            images = torch.lerp(mean, images, uniform(1 - contrast, 1 + contrast))
        elif step == 2:
            images = torch.lerp(_gray(images), images, uniform(1 - saturation, 1 + saturation))
        else:
            images = _turn_hue(images, uniform(-hue, hue))
        images = images.clamp(0, 1)
    return images


def _turn_hue(images, turn):
    """Add `turn` [B, 1, 1, 1], 1 being a full turn, to the hue of images [B, 3, H, W] in [0, 1]."""
    red, green, blue = images.unbind(1)
    high = images.amax(1)
    low = images.amin(1)
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
    top = torch.randint(height, (len(images), 1), device=images.device) - size // 2
    left = torch.randint(width, (len(images), 1), device=images.device) - size // 2
    return _black_box(images, top, left, size, size)


def random_erasing(images, probability=0.5):
    """Random erasing: with `probability` a black box of 2 to 33 % of the area, of height to width 0.3 to 3.3.

    Where no box fits the image stays as it is. images: float [B, 3, H, W]; returns the same.
    """
    check_images(images)
    height, width = images.shape[2:]
    top, left, h, w = _boxes(images, height - 1, width - 1, (0.02, 0.33), (1 / 3.3, 1 / 0.3), (0, 0))
    return _black_box(images, top, left, h.where(torch.rand_like(h) < probability, 0), w)


def _black_box(images, top, left, height, width):
    """Zero the box [top, top + height) × [left, left + width) of each image; all are [B, 1] or int."""
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows = (y >= top) & (y < top + height)
    columns = (x >= left) & (x < left + width)
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None], 0)


# ----------------------------------------------------------------------------------------------------- models


class Classifier(nn.Module):
    """Every architecture here: normalise, stem, blocks at falling resolution, head.

    model(x) takes images float [B, 3, H, W] in [0, 1] and gives logits [B, C];
    model(x, features=True) gives (logits, [output of the stem, of block 1, …]), outputs [B, K, H', W'].
    All are float32. amp: compute in bfloat16 between them (autocast); weights and BatchNorm's statistics stay
    float32.
    """

    def __init__(self, stem, blocks, head, mean=(0, 0, 0), std=(1, 1, 1), amp=False):
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.amp = amp
        for name, values in {"mean": mean, "std": std}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1))

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
    """BN-ReLU-conv twice (He et al. 2016) with dropout between them, of PreActResNet and Wide ResNet."""

    def __init__(self, inputs, outputs, stride, dropout=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
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
    """A stage of depths[i] blocks for each of widths[1:]; all except the first stage begin with stride 2."""
    made = []
    for inputs, outputs, depth in zip(widths, widths[1:], depths):
        layers = [block(inputs, outputs, 2 if made else 1)]
        layers += [block(outputs, outputs, 1) for _ in range(depth - 1)]
        made.append(nn.Sequential(*layers))
    return made


def conv_stem(outputs, *rest):
    """A 3×3 convolution of stride 1 from three channels to `outputs`, then the modules `rest`."""
    return nn.Sequential(nn.Conv2d(3, outputs, 3, 1, 1, bias=False), *rest)


def pooled(*before, classifier):
    """The modules `before`, the mean over height and width, then `classifier`."""
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
        self.branches = Parallel(*branches)
        self.conv = nn.Conv2d(inner, channels, 1)
        self.scale = scale
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x):
        return self.relu(x + self.scale * self.conv(self.branches(x)))


def per_stage(arch, others):
    """How many blocks of two layers each of three stages has, where there are `others` more layers."""
    n, rest = divmod(int(re.search("[0-9]+", arch)[0]) - others, 6)
    if n < 1 or rest:
        raise UsageError(f"--arch: unknown {arch!r}; D is {6 + others}, {12 + others}, {18 + others}, …")
    return n


# These functions give the stem, the blocks and the head of an architecture in ARCHITECTURES.


def wide_resnet(arch, num_classes, dropout, **_):
    n = per_stage(arch, 4)
    k = int(arch.split("-")[2])
    blocks = stages(functools.partial(PreActBlock, dropout=dropout), (16, 16 * k, 32 * k, 64 * k), (n, n, n))
    head = pooled(nn.BatchNorm2d(64 * k), nn.ReLU(), classifier=nn.Linear(64 * k, num_classes))
    return conv_stem(16), blocks, head


def cifar_resnet(arch, num_classes, **_):
    n = per_stage(arch, 2)
    widths = (32, 64, 128, 256) if arch.endswith("x4") else (16, 16, 32, 64)
    stem = conv_stem(widths[0], nn.BatchNorm2d(widths[0]), nn.ReLU())
    head = pooled(classifier=nn.Linear(widths[-1], num_classes))
    return stem, stages(basic_block, widths, (n, n, n)), head


def preact_resnet(arch, num_classes, **_):
    widths = (64, 64, 128, 256, 512)
    depths = (2, 2, 2, 2)
    if arch == "preact_resnet34":  # that of GJS's code, which NRD's tables compare
        widths = (32, 32, 64, 128)
        depths = (5, 5, 5)
    stem = conv_stem(widths[0])
    blocks = stages(PreActBlock, widths, depths)
    head = pooled(nn.BatchNorm2d(widths[-1]), nn.ReLU(), classifier=nn.Linear(widths[-1], num_classes))
    return stem, blocks, head


def inception_resnet_v2(arch, num_classes, **_):
    """Inception-ResNet-v2 (Szegedy et al. 2017), for images from 75 pixels up."""
    from torchvision.models.inception import BasicConv2d

    def chain(inputs, units):
        """Convolutions with BatchNorm and ReLU: each "outputs:kernel", padded, or "outputs:kernel/stride"."""
        layers = []
        for unit in units.split():
            size, _, stride = unit.partition("/")
            outputs, *kernel = map(int, re.split("[:x]", size))
            how = {"stride": int(stride)} if stride else {"padding": "same"}
            layers.append(BasicConv2d(inputs, outputs, kernel_size=kernel, **how))
            inputs = outputs
        return nn.Sequential(*layers)

    def branches(inputs, text):
        return [chain(inputs, units) for units in text.split("|")]

    def block35():
        text = "32:1x1 | 32:1x1 32:3x3 | 32:1x1 48:3x3 64:3x3"
        return InceptionResidual(320, 128, 0.17, *branches(320, text))

    def block17():
        text = "192:1x1 | 128:1x1 160:1x7 192:7x1"
        return InceptionResidual(1088, 384, 0.1, *branches(1088, text))

    def block8(scale=0.2, relu=True):
        text = "192:1x1 | 192:1x1 224:1x3 256:3x1"
        return InceptionResidual(2080, 448, scale, *branches(2080, text), relu=relu)

    average = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), chain(192, "64:1x1"))
    stem = nn.Sequential(
        chain(3, "32:3x3/2 32:3x3/1 64:3x3"),
        nn.MaxPool2d(3, 2),
        chain(64, "80:1x1 192:3x3/1"),
        nn.MaxPool2d(3, 2),
        Parallel(*branches(192, "96:1x1 | 48:1x1 64:5x5 | 64:1x1 96:3x3 96:3x3"), average),
    )
    text = "384:3x3/2 | 256:1x1 256:3x3 384:3x3/2"
    reduce_a = Parallel(*branches(320, text), nn.MaxPool2d(3, 2))
    text = "256:1x1 384:3x3/2 | 256:1x1 288:3x3/2 | 256:1x1 288:3x3 320:3x3/2"
    reduce_b = Parallel(*branches(1088, text), nn.MaxPool2d(3, 2))
    blocks = [
        nn.Sequential(*(block35() for _ in range(10))),
        nn.Sequential(reduce_a, *(block17() for _ in range(20))),
        nn.Sequential(
            reduce_b, *(block8() for _ in range(9)), block8(1.0, relu=False), chain(2080, "1536:1x1")
        ),
    ]
    return stem, blocks, pooled(classifier=nn.Linear(1536, num_classes))


def cut(net, layers, large):
    """Stem, blocks and head of torchvision's network `net`, without its dropout.

    layers: their names in it, as in TORCHVISION. large: False gives the CIFAR form that build_model
    describes.
    """
    parts = [[net.get_submodule(name) for name in part.split()] for part in layers.split("|")]
    stem, *blocks, (*before, classifier) = parts
    if not large:
        stem = [layer for layer in stem if not isinstance(layer, nn.MaxPool2d)]
        if isinstance(stem[0], nn.Conv2d):
            stem[0] = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        else:
            stem[0][0].stride = (1, 1)
        if layers == MOBILENET:
            net.features[2].conv[1][0].stride = (1, 1)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stem, *blocks = [part[0] if len(part) == 1 else nn.Sequential(*part) for part in (stem, *blocks)]
    return stem, blocks, pooled(*before, classifier=classifier)


def shufflenet(arch, num_classes, image_size, **_):
    from torchvision.models import get_model

    net = get_model("shufflenet_v2_x1_0", num_classes=num_classes)
    return cut(net, "conv1 maxpool | stage2 | stage3 | stage4 conv5 | fc", image_size >= 128)


# A row is an architecture: its name, and what gives its stem, its blocks and its head.
ARCHITECTURES = {  # function(arch, num_classes, dropout=…, image_size=…); D and K stand for numbers
    "wrn-D-K": wide_resnet,
    "resnetD": cifar_resnet,
    "resnetDx4": cifar_resnet,
    "preact_resnet18": preact_resnet,
    "preact_resnet34": preact_resnet,
    "inception_resnet_v2": inception_resnet_v2,
    "shufflenet_v2": shufflenet,
}
RESNET = "conv1 bn1 relu maxpool | layer1 | layer2 | layer3 | layer4 | fc"
MOBILENET = """
features.0 | features.1 features.2 features.3 | features.4 features.5 features.6 |
features.7 features.8 features.9 features.10 features.11 features.12 features.13 |
features.14 features.15 features.16 features.17 features.18 | classifier"""
DENSENET = """
features.conv0 features.norm0 features.relu0 features.pool0 | features.denseblock1 |
features.transition1 features.denseblock2 | features.transition2 features.denseblock3 |
features.transition3 features.denseblock4 | features.norm5 features.relu0 classifier"""
TORCHVISION = {  # torchvision's layers: stem | block | … | head, without its pooling; may be pretrained
    "resnet18": RESNET,
    "resnet34": RESNET,
    "resnet50": RESNET,
    "resnet101": RESNET,
    "mobilenet_v2": MOBILENET,
    "densenet121": DENSENET,
    "densenet169": DENSENET,
}


def build_model(
    arch, num_classes, dropout=0.0, mean=(0, 0, 0), std=(1, 1, 1), image_size=32, pretrained=False, amp=False
):
    """A Classifier, randomly initialised, in channels_last memory format.

    Convolutions are initialised by Kaiming's normal distribution with fan-out (He et al. 2015), those of
    PreActResNets as PyTorch does: GJS's and NRD's code leaves preact_resnet34 so, and the public code of
    preact_resnet18 does too.

    arch: a name of ARCHITECTURES (wrn-D-K has D = 6n + 4, resnetD and resnetDx4 have D = 6n + 2 and widths
        16-32-64 and 64-128-256) or of TORCHVISION.
    dropout: probability between a block's two convolutions, wrn only.
    mean, std: of each channel of the training images in [0, 1]; the default leaves the images as they are.
    image_size: side of the images in pixels, 16 or more (inception_resnet_v2: 75 or more). Below 128
        torchvision's architectures take their CIFAR forms: 3×3 stem of stride 1, no max-pooling,
        mobilenet_v2's second downsampling left out too.
    pretrained: torchvision's ImageNet weights (V1) instead, for image_size from 128 up; a classifier of
        another number of classes stays random.
    amp: compute in bfloat16.
    The model's `built_as` holds arch, num_classes, dropout and image_size; `load_model` builds it again from
    them. Raises UsageError for an unknown arch, and for dropout or pretrained where arch has none.
    """
    large = image_size >= 128
    names = [name for name in ARCHITECTURES if re.fullmatch(re.sub("[DK]", "[1-9][0-9]*", name), arch)]
    if dropout and not arch.startswith("wrn-"):
        raise UsageError(f"dropout: {arch} has none; wrn-D-K has")
    if pretrained and not (large and arch in TORCHVISION):
        have = f"{', '.join(TORCHVISION)} at 224 have"
        raise UsageError(f"--pretrained: {arch} at {image_size} pixels has none; {have}")
    if arch in TORCHVISION:
        from torchvision.models import get_model

        net = get_model(arch, num_classes=num_classes)
        if pretrained:
            with torch.random.fork_rng(devices=[]):  # the initial weights that it draws are replaced at once
                source = get_model(arch, weights="IMAGENET1K_V1").state_dict()
            state = net.state_dict()
            state |= {key: tensor for key, tensor in source.items() if tensor.shape == state[key].shape}
            net.load_state_dict(state)
        stem, blocks, head = cut(net, TORCHVISION[arch], large)
    elif names:
        make = ARCHITECTURES[names[0]]
        stem, blocks, head = make(arch, num_classes, dropout=dropout, image_size=image_size)
    else:
        raise UsageError(f"--arch: unknown {arch!r}; known are {', '.join([*ARCHITECTURES, *TORCHVISION])}")
    model = Classifier(stem, blocks, head, mean, std, amp)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not (pretrained or arch.startswith("preact_resnet")):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.built_as = {"arch": arch, "num_classes": num_classes, "dropout": dropout, "image_size": image_size}
    return model.to(memory_format=torch.channels_last)


EVAL_BATCH = {"cpu": 125, "cuda": 500}  # images per forward pass; on a CPU outputs stay in its caches


def evenly_split(rows, batch_size):
    """Cut index tensor rows [N] into batches of nearly equal size, at most batch_size."""
    batches = math.ceil(len(rows) / batch_size)
    # rows from all over: each batch stands for the whole of a file that is sorted by class
    return [rows[i::batches] for i in range(batches)]


@torch.no_grad()
def predict(model, images, batch_size=None):
    """Logits float32 [N, C] on the model's device of uint8 images [N, 3, H, W], in evaluation mode.

    batch_size: None takes that of EVAL_BATCH. Under torchrun every process has the logits of the first.
    Raises UsageError where the model gives something else than logits, and where it gives NaN.
    """
    assert images.dtype == torch.uint8, f"images are {images.dtype}, not uint8"
    device = next(model.parameters(), images).device  # a module of other people may have no parameters
    training = model.training
    name = type(model).__name__
    model.eval()
    order = torch.arange(len(images), device=images.device)
    batches = evenly_split(order, batch_size or EVAL_BATCH[device.type])
    outputs = []
    for rows in batches:
        output = model(to_float(images[rows].to(device)))
        if not torch.is_tensor(output) or output.dim() != 2:
            raise UsageError(f"{name} gives a {type(output).__name__}; it must give logits [B, C] alone")
        outputs.append(output)
    model.train(training)
    logits = torch.cat(outputs)[torch.cat(batches).argsort().to(device)]
    if world_size() > 1:
        dist.broadcast(logits, 0)
    undefined = logits.isnan().any(1)
    if undefined.any():
        finite = all(values.isfinite().all() for values in model.state_dict().values())
        if finite or not training:  # that weights diverge in training, Run.end_epoch tells
            raise UsageError(f"{name} gives NaN for {undefined.sum():,} of {len(images):,} images")
    return logits


def accuracy(scores, labels, k=1):
    """Top-k accuracy in percent of scores [N, C] for labels int64 [N], as a float."""
    top = scores.argmax(1, keepdim=True) if k == 1 else scores.topk(k).indices
    return 100 * (top == labels.unsqueeze(1)).any(1).double().mean().item()


def test_accuracies(model, data):
    """The model's accuracies in percent: {"test_acc": float}.

    Where there are more than ten classes, "test_top5" too. Where webvision has ILSVRC12's validation images,
    "imagenet_acc" and "imagenet_top5" too.
    """
    metrics = {}
    tests = {"test": (data.test_images, data.test_labels), "imagenet": data.imagenet}
    for name, test in tests.items():
        if test:
            logits = predict(model, test[0])
            metrics[f"{name}_acc"] = accuracy(logits, test[1])
            if len(data.classes) > 10:
                metrics[f"{name}_top5"] = accuracy(logits, test[1], k=5)
    return metrics


def label_accuracies(predicted, noisy, true):
    """How the predictions of an epoch agree with the labels, in percent; None where there is no such sample.

    predicted: int64 [N], the class predicted for each training sample (-1: not seen). noisy, true: int64 [N],
    the labels that are trained on and those of data.train_labels.
    train_acc_right: rightly labelled samples given their label. train_acc_wrong: wrongly labelled samples
    given their wrong label, which is memorisation. train_acc_wrong_true: wrongly labelled samples given their
    true class.
    """
    if world_size() > 1:
        dist.all_reduce(predicted, dist.ReduceOp.MAX)
    seen = predicted >= 0
    wrong = noisy != true

    def percent(hit, among):
        return 100 * hit[among].float().mean().item() if among.any() else None

    return {
        "train_acc_right": percent(predicted == noisy, seen & ~wrong),
        "train_acc_wrong": percent(predicted == noisy, seen & wrong),
        "train_acc_wrong_true": percent(predicted == true, seen & wrong),
    }


def calibration(probabilities, labels, bins=15):
    """Reliability (Guo et al. 2017): ECE in [0, 1]; accuracy, confidence and share of samples of each bin.

    probabilities: [N, C]; labels: int64 [N]. Bins are of equal width. The three lists are of length `bins`,
    and 0 where a bin is empty.
    """
    sums = probabilities.sum(1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-3), "rows must sum to 1; are these logits?"
    confidence, predicted = probabilities.double().max(1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin i is (i / bins, (i + 1) / bins]
    hit = (predicted == labels).double()
    size = torch.bincount(which, minlength=bins).double()
    acc = torch.bincount(which, hit, minlength=bins) / size.clamp(min=1)
    conf = torch.bincount(which, confidence, minlength=bins) / size.clamp(min=1)
    weight = size / len(labels)
    ece = (weight * (acc - conf).abs()).sum().item()
    return ece, acc.tolist(), conf.tolist(), weight.tolist()


# ------------------------------------------------------------------------------------------------ run folders


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`. It is renamed to `path` once the block has ended without error.

    Raises OSError, whose message names `path`, where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: so torch.save calls a full disk
        raise OSError(f"{path} cannot be written; is the disk full? ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def read_weights_only(path, flag):
    """What torch.save, or safetensors, wrote to `path`: tensors on the CPU, without executing pickled code.

    path: a file, or a run folder, whose checkpoint.pt is read. Raises UsageError for what cannot be read.
    """
    path = checkpoint_file(path)
    if not path.is_file():
        raise UsageError(f"{flag}: no file {path}; runs/*/checkpoint.pt are checkpoints")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UsageError(f"{flag}: {path} needs the package; pip install safetensors") from None
    except Exception as error:  # whatever a damaged file, or one of another kind, makes the reader raise
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"is damaged or no checkpoint ({type(error).__name__})"
        if name:
            alone = f'torch.save(torch.load("{path}", weights_only=False)["model"], "weights.pt")'
            why = (
                f"holds {name[1]} beside tensors, and to read that may run other people's code; if you trust "
                f"the file, save its weights alone: {alone}; "
                'of a whole module .state_dict() in place of ["model"]'
            )
        elif "TorchScript" in str(error):
            alone = f'torch.save(torch.jit.load("{path}").state_dict(), "weights.pt")'
            why = f"is a TorchScript archive; save its weights alone: {alone}"
        elif path.suffix == ".onnx":
            why = "is an ONNX model; save the state_dict of the module that it was made from by torch.save"
        raise UsageError(f"{flag}: {path} {why}") from None


def load_checkpoint(path, flag="checkpoint"):
    """The dict that `Run` saved at `path`, a file or a run folder. Tensors are on the CPU; no code is run.

    Keys: model and the other parts of the training state, each with its entry in built_as; best, the name of
    the part to take for the model where several networks were trained; script, dataset, classes, noise (kind,
    rate, seed), imbalance, config, source ({file: its text} of the script and common.py; after an edit also
    {"file until epoch N": its text before}), metrics (a dict per epoch), epoch, epochs, rng.
    Prints how far unfinished training is. Raises UsageError for a missing file and for one of other programs.
    """
    checkpoint = read_weights_only(path, flag)
    if not isinstance(checkpoint, dict) or "built_as" not in checkpoint:
        raise UsageError(f"{flag}: {path} is no checkpoint of these scripts; name a run folder")
    if checkpoint["epoch"] < checkpoint["epochs"]:
        print(f"{path}: epoch {checkpoint['epoch']} of {checkpoint['epochs']}", flush=True)
    return checkpoint


def load_model(checkpoint, part="model", device="cpu", amp=False):
    """The model whose weights are checkpoint[part] ("model", "ema", …), in evaluation mode on `device`.

    Of a run that trains several networks, "model" is the one that checkpoint["best"] names.
    """
    if part == "model":
        part = checkpoint.get("best", part)
    model = build_model(**checkpoint["built_as"][part], amp=amp)
    model.load_state_dict(checkpoint[part])
    return model.to(device).eval()


def public_state(path, flag):
    """The state_dict in other people's file, a dict of tensors on the CPU.

    It stands there alone or under "model", "state_dict", "net", "model_state_dict" or "student". Of a file
    with a teacher too (names with "student." and "teacher."), the student's. Prefixes such as DataParallel's
    are removed from the names. num_batches_tracked, which files from before torch 0.4.1 lack, is left out.
    Raises UsageError where there is no state_dict, and where a tensor has a NaN or an infinity.
    """
    state = read_weights_only(path, flag)
    keys = ("model", "state_dict", "net", "model_state_dict", "student")
    for key in keys:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not (isinstance(state, dict) and state and all(map(torch.is_tensor, state.values()))):
        raise UsageError(f"{flag}: {path} has no state_dict, alone or under one of {', '.join(keys)}")
    for prefix in ("module.", "_orig_mod.", "student."):
        inside = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }
        state = inside or state
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            advice = "take weights of an earlier epoch"
            raise UsageError(f"{flag}: {path} has a NaN or an infinity in {name}; {advice}")
    return state


def load_public(path, flag, arch, mean, std, image_size=32, dropout=0.0, amp=False):
    """A Classifier with other people's weights, in evaluation mode. Its number of classes is the file's.

    arch, image_size, dropout: as for build_model. mean, std: of the images in [0, 1] that the weights expect,
    where the file has none of ours. Tensors are matched by our names where the file has them, else by their
    order; the tensors of .safetensors are sorted by name, and have none. Raises UsageError where `arch` has
    other tensors, and where mean and std are not of images in [0, 1].
    """
    if max(*mean, *std) > 1 or min(std) <= 0:
        raise UsageError(
            f"--mean, --std: {mean}, {std} are not of images in [0, 1]; divide those of 0 to 255 by 255"
        )
    state = public_state(path, flag)
    left_out = {"mean", "std"} - state.keys()
    with torch.device("meta"):
        names = build_model(arch, 1, dropout, image_size=image_size).state_dict()
    names = [name for name in names if name.split(".")[-1] not in (*left_out, "num_batches_tracked")]
    if state.keys() == set(names):  # .safetensors are sorted by name
        state = {name: state[name] for name in names}
    lengths = [len(tensor) for tensor in state.values() if tensor.dim() > 0]
    # the classifier's bias comes last
    model = build_model(arch, lengths[-1], dropout, mean, std, image_size, amp=amp)
    own = model.state_dict()

    def described(name, tensors):
        return f"{name} {list(tensors[name].shape)}" if name else "no tensor more"

    for name, theirs in itertools.zip_longest(names, state):
        wanted = described(name, own)
        found = described(theirs, state)
        # "weight [16, 3, 3, 3]", whatever its layer is called
        if wanted.split(".")[-1] != found.split(".")[-1]:
            raise UsageError(f"{flag}: {path} is no {arch}: where that has {wanted}, the file has {found}")
    model.load_state_dict(own | dict(zip(names, state.values())))
    return model.eval()


def load_module(text, flag, path=None):
    """The nn.Module that NAME() gives, in evaluation mode. text: FILE.py:NAME. path: of its weights, or None.

    The module takes images float [B, 3, H, W] in [0, 1] and gives logits [B, C]. The file may be part of a
    package, and imports its neighbours before our files of their names. Raises UsageError where there is no
    such file or name, where an import fails, and for weights of another module.
    """
    file, _, name = text.rpartition(":")
    here = Path(file).resolve()
    if not here.is_file():
        raise UsageError(f"{flag}: {text} names no file; write FILE.py:NAME")
    root = here.parent
    while (root / "__init__.py").exists():
        root = root.parent
    sys.path[:0] = [str(here.parent), str(root)]  # as for `python FILE.py`; for the package
    beside = {neighbour.stem for neighbour in here.parent.iterdir()}  # "common" for common.py and common/
    ours = {file.stem for file in Path(__file__).parent.glob("*.py")}
    aside = {module: sys.modules.pop(module) for module in beside & ours & sys.modules.keys()}
    try:
        dotted = ".".join(here.relative_to(root).with_suffix("").parts)  # "package.module"
        make = runpy.run_path(file, run_name=dotted).get(name)
        if not callable(make) or isinstance(make, nn.Module):
            raise UsageError(f"{flag}: {file} has no function or class {name}")
        try:
            inspect.signature(make).bind()
        except TypeError as error:  # missing a required argument: 'num_classes'
            advice = "name a function that needs none and gives the module"
            raise UsageError(f"{flag}: {text} is {error}; {advice}") from None
        model = make()
    except ImportError as error:
        raise UsageError(f"{flag}: {text}: {error}") from None
    finally:
        sys.modules.update(aside)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{flag}: {text} gives {type(model).__name__}, not an nn.Module")
    if path:
        state = public_state(path, flag)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # names every tensor that is missing, left over or of another shape
            why = textwrap.shorten(str(error), 300)
            raise UsageError(f"{flag}: {path} does not fit {text}: {why}") from None
    return model.eval()


def claim(folder, config, wait):
    """Hold `folder` for this process by an advisory lock on its config.json, the open file that is returned.

    wait: until no other process holds it; for a folder whose name alone tells that it is of this run.
    Raises UsageError where a process holds it, and where the folder has other files, another run, or, without
    --resume, this one.
    """
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() and any(folder.iterdir()):
        raise UsageError(f"--out: {folder} is not empty; name a new folder")
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"--out: another process is at work in {folder}") from None
    except OSError:
        pass  # a file system without locks: nothing holds the folder
    for partial in folder.glob("*.partial.*"):  # of a process that was killed while it wrote
        partial.unlink()
    text = path.read_text(encoding="utf-8")
    try:
        old = json.loads(text) if text else config
    except ValueError:
        old = {}
    if old.get("script") != config["script"]:
        raise UsageError(f"--out: {path} is not of a run of {config['script']}; name a new folder")
    if (folder / "checkpoint.pt").exists():
        ignored = (*MACHINE, "given", "name", "torch", "commit")
        differs = [key for key in sorted(config) if key not in ignored and old.get(key) != config[key]]
        if differs and not wait:
            told = ", ".join(f"{key} ({old.get(key)} there, {config[key]} here)" for key in differs)
            advice = "name another folder"
            if "amp" in differs:  # begun where the hardware has bfloat16, or has none
                advice += f", or add {'--amp' if old.get('amp') else '--no-amp'} to compute as there"
            raise UsageError(f"--out: {folder} holds another run: {told}; {advice}")
        if not config["resume"]:
            raise UsageError(f"--out: {folder} holds this run; --resume continues it, --out starts another")
    else:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return file


def sources(script):
    """{name: text} of the script and of this file. They tell what a run computed: a fork has no commit."""
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in Path(__file__).parent.glob("*.py")
        if file.stem in (script, "common")
    }


class Run:
    """A run folder: config.json, metrics.jsonl, checkpoint.pt and curves.png, and what is printed on the way.

        run = Run(args, device, data)                                # claims the folder
        run.track(model=model, optimizer=optimizer, …)               # saved per epoch, read back by --resume
        for epoch in range(run.epoch, run.epochs):
            for index in run.batches(len(labels), args.batch_size):  # int64 [batch_size]
                …
            run.end_epoch(losses, lr=…, test_acc=…)                  # printed and saved
        return run.finish()                                          # drawn

    origin: a dict that the checkpoint takes over, like that of load_teacher. epochs: None takes args.epochs.
    wait: see `claim`. Raises UsageError as `claim` does, for a batch that cannot be split over the processes,
    and where --tensorboard lacks its package.
    """

    images_per_second = 0.0  # of an epoch that a fork leaves by break

    def __init__(self, args, device, data, origin=None, epochs=None, wait=False):
        self.args = args
        self.device = device
        self.epochs = epochs or args.epochs
        self.folder = args.out or Path("runs") / f"{args.name}-seed{args.seed}"
        self.path = self.folder / "checkpoint.pt"
        if args.batch_size % world_size():
            raise UsageError(f"--batch-size: {args.batch_size} cannot be split over {world_size()} processes")
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard: needs the package; pip install tensorboard") from None
        config = json.loads(json.dumps(vars(args), default=str))  # paths as texts
        config |= {"train_digest": data.train_digest, "test_digest": data.test_digest}
        origin = origin or {}
        config["teacher_acc"] = origin.get("teacher_acc")  # another teacher may have its path now
        self.header = {
            "script": args.script, "dataset": args.dataset, "classes": list(data.classes),
            "noise": {"kind": args.noise, "rate": args.rate, "seed": args.noise_seed},
            "imbalance": vars(args).get("imbalance"), "epochs": self.epochs,
            "config": config, "source": sources(args.script),
        } | origin  # fmt: skip
        self.board = None
        if rank() == 0:
            options = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
            commit = subprocess.run("git rev-parse HEAD", **options).stdout.strip()  # "" without git
            config |= {"torch": str(torch.__version__), "commit": commit}
            self.claimed = claim(self.folder, config, wait)
            if args.tensorboard:
                self.board = SummaryWriter(self.folder)
        barrier()
        hidden = (*args.given, *MACHINE, "given", "name", "script", "seed")
        preset = {
            flag: value
            for flag, value in vars(args).items()
            if flag not in hidden and value not in (None, [])
        }
        print(f"{self.folder}, given:", *assignments(args.given))
        print("preset:", *assignments(preset), flush=True)
        self.metrics = []
        if args.resume and self.path.exists():
            saved = load_checkpoint(self.path, "--resume")
            self.metrics = saved["metrics"]
            source = self.header["source"]
            for name, text in saved["source"].items():
                if source.get(name, text) != text:
                    print(f"{name} was edited after epoch {self.epoch}; the run goes on with it as it is now")
                    name = f"{name} until epoch {self.epoch}"
                source.setdefault(name, text)

    @property
    def epoch(self):
        """Number of finished epochs."""
        return len(self.metrics)

    def track(self, **parts):
        """The parts of the training state, whose state_dict() is saved. --resume reads them back here."""
        self.parts = parts
        self.modules = [part for part in parts.values() if isinstance(part, nn.Module)]
        if self.metrics:
            saved = read_weights_only(self.path, "--resume")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in saved["rng"]:
                torch.cuda.set_rng_state(saved["rng"]["cuda"], self.device)
        if world_size() > 1:
            if self.device.type == "cuda":
                for module in self.modules:
                    nn.SyncBatchNorm.convert_sync_batchnorm(module)  # in place
            parts["optimizer"].register_step_pre_hook(self.average_gradients)

    def average_gradients(self, optimizer, *_):
        """Before a step: make it that of the whole batch on every process."""
        tensors = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for module in self.modules:
            for layer in module.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    tensors += [layer.running_mean, layer.running_var]
        average(tensors)

    def save(self, path=None):
        """Write checkpoint.pt, or `path`, then metrics.jsonl, which has the metrics of the checkpoint."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint = {**self.header, "metrics": self.metrics, "epoch": self.epoch, "rng": rng}
        checkpoint["built_as"] = {
            name: part.built_as for name, part in self.parts.items() if hasattr(part, "built_as")
        }
        checkpoint |= {name: part.state_dict() for name, part in self.parts.items()}
        if rank() == 0:
            with atomic_write(path or self.path) as partial:
                torch.save(checkpoint, partial)
            with atomic_write(self.folder / "metrics.jsonl") as partial:
                lines = [json.dumps(record) + "\n" for record in self.metrics]
                partial.write_text("".join(lines), encoding="utf-8")

    def batches(self, total, batch_size):
        """One epoch: a random order of range(total), int64 [batch_size] at a time; no incomplete last batch.

        Keeps a line with the time left of the epoch. Under torchrun each process gets its part of each batch.
        """
        if rank() > 0:  # draws of its own, and none that a checkpoint would have to hold
            torch.manual_seed((self.args.seed * self.epochs + self.epoch) * world_size() + rank())
        order = torch.randperm(total, device=self.device)
        if world_size() > 1:
            dist.broadcast(order, 0)
        batch_size = min(batch_size, total)
        steps = order.unfold(0, batch_size, batch_size)[:, rank() :: world_size()]
        self.epoch_began = time.perf_counter()
        yield from progress(steps, f"epoch {self.epoch + 1}/{self.epochs}", took=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.images_per_second = len(steps) * batch_size / (time.perf_counter() - self.epoch_began)

    def end_epoch(self, losses, **metrics):
        """Record an epoch: check losses and weights, save, print a line.

        metrics: floats, ints, lists of floats or None. losses: the loss of every step, a list of scalar
        tensors, which stay on the device until now. Where a loss or a weight is not finite, the program ends
        with status 1; the last checkpoint stays.
        """
        losses = torch.stack(losses).float()
        average([losses])
        weights = [value for module in self.modules for value in module.state_dict().values()]
        if not all(values.isfinite().all() for values in (losses, *weights)):
            sys.exit(f"error: a loss or weight is not finite in epoch {self.epoch + 1}; lower --lr")
        seconds = time.perf_counter() - self.epoch_began
        metrics = json.loads(json.dumps(metrics))  # a number of NumPy could not be loaded again
        metrics["train_loss"] = losses.mean().item()
        record = {"epoch": self.epoch + 1, **metrics}
        record["images_per_second"] = round(self.images_per_second, 1)
        record["seconds"] = round(seconds, 2)
        self.metrics.append(record)
        self.save()
        if self.board:
            for key, value in record.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, self.epoch)
        forms = {float: "#.4g", int: ","}
        shown = [f"{key} {value:{forms[type(value)]}}" for key, value in metrics.items()
                 if type(value) in forms]  # fmt: skip
        left = duration(seconds * (self.epochs - self.epoch))
        shown += [f"{self.images_per_second:,.0f} images/s", f"{left} left"]
        show("  ".join([f"epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}", *shown]))

    def finish(self):
        """Draw curves.png, print the last line and let the folder go. Returns the last epoch's metrics."""
        last = self.metrics[-1]
        if rank() == 0:
            teacher_acc = self.header.get("teacher_acc")
            plot_curves(self.folder / "curves.png", self.metrics, self.folder.name, teacher_acc)
            self.claimed.close()
        if self.board:
            self.board.close()
        if self.device.type == "cuda":
            print(f"peak device memory {torch.cuda.max_memory_allocated(self.device) / 2**30:.2f} GiB")
        final = f"{self.epoch} epochs"
        if "test_acc" in last:
            best = max(self.metrics, key=lambda record: record.get("test_acc", 0))
            final = f"test_acc {last['test_acc']:.2f} % after epoch {last['epoch']}"
            final += f", best {best['test_acc']:.2f} % after epoch {best['epoch']}"
        print(f"{final}: {self.folder}", flush=True)
        return last


# --------------------------------------------------------------------------------------------------- teachers


def load_teacher(args, device, data, labels, arch, dropout=0.0, **recipe):
    """The teacher in --teacher or --teacher-model, or one that is trained, now or by an earlier run.

    data: the Dataset. labels: int64 [N], the training labels as the student is given them.
    arch, dropout: of the network that is trained, or that public weights are of.
    recipe: how it is trained by cross-entropy, on crops, padded by reflection, and flips.
        epochs, batch_size, lr, weight_decay: numbers.
        milestones: the epochs after which lr falls to a fifth; None: to a tenth where the test loss has not
            fallen for ten epochs.
        optimizer: "sgd", with momentum 0.9, or "adam"; left out: "sgd".
        normalize: whether the network normalises by the training images' mean and deviation; left out: False.
    A trained teacher stays in a folder of runs/teachers. It is taken again where arch, dropout, recipe,
    --amp, the data and the labels are the same, also after an edit of this file, which a line then says: so a
    run that is resumed keeps its teacher. Of --teacher-seeds K, seeds 0 … K-1, the most accurate one teaches.
    Returns the model in evaluation mode without gradients, and what the checkpoint keeps of it: {"teacher":
    its path, "teacher_acc": its test accuracy in percent}. The global random states stay as they are.
    Prints where a --teacher had other label noise, imbalance or dropout than a trained one would have. Raises
    UsageError for a --teacher of other classes or image size, for --mean or --std without public weights, and
    for flags that tell how to build or train a teacher where one is given.
    """
    saved = read_weights_only(args.teacher, "--teacher") if args.teacher and not args.teacher_model else None
    is_ours = isinstance(saved, dict) and "built_as" in saved
    if saved is None or is_ours:
        refuse(args, ("mean", "std"), "public weights in --teacher need it; every other teacher has its own")
    if args.teacher_model or is_ours:
        refuse(args, ("teacher_arch",), "this teacher has its own")
    path = args.teacher_model or args.teacher
    if path:
        refuse(args, ("teacher_seeds", "teacher_epochs"), "this teacher is trained")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if args.teacher_model:
            teacher = load_module(path, "--teacher-model", args.teacher)
        elif is_ours:
            checkpoint = load_checkpoint(path, "--teacher")
            theirs = checkpoint | checkpoint["built_as"][checkpoint.get("best", "model")]
            ours = {
                "classes": list(data.classes), "image_size": data.image_size,
                "noise": {"kind": args.noise, "rate": args.rate, "seed": args.noise_seed},
                "imbalance": vars(args).get("imbalance"), "dropout": dropout,
            }  # fmt: skip
            if args.noise == theirs["noise"]["kind"] == "none":  # the seed of no noise decides nothing
                ours["noise"] = theirs["noise"]
            for key, value in ours.items():
                if theirs[key] != value:
                    if key in ("classes", "image_size"):
                        differs = f"{key} {theirs[key]}, not {value}"
                        raise UsageError(f"--teacher: {path} has {differs}; leave it out to train one")
                    print(f"the teacher has {key} {theirs[key]}; a trained one would have {value}")
            teacher = load_model(checkpoint, "model", device, args.amp)
        elif args.teacher:
            mean, std = channel_stats(data)
            mean = args.mean or mean
            std = args.std or std
            teacher = load_public(path, "--teacher", arch, mean, std, data.image_size, dropout, args.amp)
        else:
            recipe = {"optimizer": "sgd", "normalize": False, "arch": arch, "dropout": dropout} | recipe
            seeds = range(args.teacher_seeds)
            teachers = [train_teacher(args, device, data, labels, seed, recipe) for seed in seeds]
            path, checkpoint = max(teachers, key=lambda teacher: teacher[1]["metrics"][-1]["test_acc"])
            teacher = load_model(checkpoint, "model", device, args.amp)
        logits = predict(teacher.to(device).requires_grad_(False), data.test_images)
    if logits.shape[1] != len(data.classes):
        raise UsageError(f"--teacher: {path} has {logits.shape[1]} classes, not {len(data.classes)}")
    test_acc = accuracy(logits, data.test_labels)
    print(f"teacher: {path}, test_acc {test_acc:.2f} %", flush=True)
    return teacher, {"teacher": str(path), "teacher_acc": test_acc}


def train_teacher(args, device, data, labels, seed, recipe):
    """Train the teacher that load_teacher describes, or find it trained: its path and checkpoint."""
    decides = [recipe, args.amp, data.train_digest, data.test_digest, labels.tolist()]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    name = folder_name(recipe["arch"], args, {"epochs": recipe["epochs"]})
    path = Path("runs/teachers") / f"{name}-{digest}-seed{seed}" / "checkpoint.pt"
    shared = """dataset data_dir noise rate noise_seed imbalance limit_train limit_test resize image_size
                device amp compile"""
    flags = {flag: vars(args).get(flag) for flag in shared.split()}
    args = argparse.Namespace(
        **recipe, **flags, given=recipe, seed=seed, script="teacher", out=path.parent, resume=True,
        tensorboard=False,
    )  # fmt: skip
    checkpoint = load_checkpoint(path, "teacher") if path.exists() else None
    if checkpoint and checkpoint["epoch"] == args.epochs:
        if checkpoint["source"] != sources("teacher"):
            print(f"common.py was edited after {path.parent} was trained; remove the folder to train it anew")
        return path, checkpoint

    print("training a teacher first, or waiting for a process that does; it stays for later runs", flush=True)
    torch.manual_seed(seed)
    run = Run(args, device, data, wait=True)
    stats = channel_stats(data) if args.normalize else ()
    model = build_model(
        args.arch, len(data.classes), args.dropout, *stats, image_size=data.image_size, amp=args.amp
    ).to(device)
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
    if args.milestones:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.milestones, gamma=0.2)
    else:
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=10)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    if args.compile:
        model.compile()
    for _ in range(run.epoch, args.epochs):
        model.train()
        lr = optimizer.param_groups[0]["lr"]
        losses = []
        for index in run.batches(len(labels), args.batch_size):
            x = crop_flip(data.batch(index), mode="reflect", size=data.image_size)
            loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
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


# -------------------------------------------------------------------------------------------------- reporting


def show(text, live=False):
    """Print a line. On a terminal, the next line overwrites a live one."""
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="" if live else "\n", flush=True)
    else:
        print(text, flush=True)


def duration(seconds):
    """Seconds as a text, such as 0:01:30."""
    return str(datetime.timedelta(seconds=round(seconds)))


def progress(items, label, took=True):
    """Yield the items, which have a length; keep a line with the share done and the time left.

    took: whether a last line says how long it took.
    """
    began = shown = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - shown > (0.2 if sys.stdout.isatty() else 60):
            shown = now
            left = duration((now - began) / done * (len(items) - done))
            show(f"{label}  {100 * done / len(items):.0f} %  {left} left", live=True)
    if took:
        show(f"{label}  took {duration(time.perf_counter() - began)}")


@contextlib.contextmanager
def picture(path, width, height, pdf=False, quiet=False):
    """Yield an empty matplotlib Figure of that size in inches, which is written to `path` after the block.

    path: a .png. pdf: write a .pdf beside it too. quiet: do not print what is written. Text is drawn as it
    is: `$` and usetex of the user's settings mean nothing, and a log axis needs ticks or a formatter without
    `$`. No picture ends a program: what cannot be drawn or written becomes one line.
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
                if not quiet:
                    print(f"wrote {file}")
    except Exception as error:  # whatever fonts, settings or a full disk make matplotlib raise
        print(f"{path} is not drawn: {error}", file=sys.stderr)


@contextlib.contextmanager
def panels(path, title, count, width, height, sharey=False, pdf=False, quiet=False):
    """As `picture`, with a title and `count` panels of that size in inches, at most three side by side.

    title: "" for none. sharey: whether the panels have one y-axis. Yields the figure and a list of its axes.
    """
    columns = 2 if count == 4 else min(3, count)
    rows = math.ceil(count / columns)
    with picture(path, width * columns, height * rows, pdf, quiet) as figure:
        if title:
            figure.suptitle(textwrap.fill(title, round(8 * width * columns)))
        axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False).flatten()
        for unused in axes[count:]:
            unused.remove()
        yield figure, list(axes[:count])


def plot_curves(path, metrics, title, teacher_acc=None):
    """Draw the numbers of `metrics`, a dict per epoch, and the teacher's accuracy, to `path`, a .png."""
    numbers = [key for record in metrics for key, value in record.items() if isinstance(value, (int, float))]
    keys_of = {}  # {label of a panel: metrics}
    for key in sorted(dict.fromkeys(numbers), key=lambda key: key == "lr"):
        panel = "loss" if "loss" in key else key
        if "acc" in key or "top5" in key:
            panel = "training labels (%)" if key.startswith("train_acc") else "accuracy (%)"
        if key not in ("epoch", "seconds", "images_per_second"):
            keys_of.setdefault(panel, []).append(key)
    epochs = [record["epoch"] for record in metrics]
    with panels(path, title, len(keys_of), 4, 3, quiet=True) as (_, drawn):
        for axes, (panel, keys) in zip(drawn, keys_of.items()):
            for i, key in enumerate(keys):  # ever thinner, so that no curve hides another
                width = 1 + 1.5 * (len(keys) - 1 - i)
                values = [record.get(key) for record in metrics]
                axes.plot(epochs, values, ".-", lw=width, ms=4 + width, label=key)
            if panel == "accuracy (%)" and teacher_acc is not None:
                axes.axhline(teacher_acc, color="k", linestyle=":", label="teacher")
            axes.set(xlabel="epoch", ylabel=panel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if panel != keys[0]:
                axes.legend(fontsize="small")
