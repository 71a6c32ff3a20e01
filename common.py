"""What every script here shares, in the order the data flows through it:

    arguments -> data -> label noise -> augmentation -> models -> training state -> reporting

Functions take tensors and return tensors; copy one out if that is all you need. What a method is about
(its loss, its loop, its hyperparameters) is never in this file: it stands in the method's own script.

Conventions. Images at rest are uint8 [N, 3, H, W]; images in flight are float32 [B, 3, H, W] in [0, 1], normalisation
being part of the model. Labels are int64. Accuracies are percentages. Bad input raises UsageError, which `run_main`
turns into one line on stderr and exit status 2. Random draws come from torch's global generator of the tensor's device,
so that `torch.manual_seed` and the random states in a checkpoint determine them all; label noise has its own.
"""

import argparse
import codecs
import contextlib
import datetime
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import textwrap
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
import torchvision

# ------------------------------------------------------------------------------------------------------------ arguments


class UsageError(Exception):
    """Something the user can mend: the message names the flag or file and says what would work."""


def run_main(main, stopped="a run's checkpoint.pt holds the last epoch saved: --resume continues it", runs=True):
    """Call main(); UsageError becomes one line on stderr and status 2, Ctrl-C and SIGTERM one line and status 130.

    stopped: what that last line tells the user. runs: main() trains, so it can be called for several --seed (`sweep`),
    and by several processes (`torchrun`, see below).
    """
    launched = torch.distributed.is_torchelastic_launched()  # by torchrun
    rank = int(os.environ["RANK"]) if launched else 0

    def interrupt(*_):
        raise KeyboardInterrupt

    def fail(message):
        time.sleep(3 * (rank > 0))  # what fails everywhere, the first process says, and torchrun ends the others
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)

    if not launched:  # else torchrun sends it where another process has died, and this one may be waiting
        signal.signal(signal.SIGTERM, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter must not end the program
    try:
        if launched:
            if not runs:
                raise UsageError("torchrun: this script runs as one process; python starts it")
            torch.distributed.init_process_group(timeout=datetime.timedelta(days=30))  # for another's seeds, a download
            if rank:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sweep(main) if runs else main()
    except (UsageError, OSError) as error:  # OSError: a path that may not even be looked at
        fail(" ".join(str(error).split()))
    except torch.OutOfMemoryError as error:
        fail(f"out of memory, a smaller --batch-size needs less: {str(error).split('. ')[0]}")
    except KeyboardInterrupt:
        if rank:
            os._exit(130)
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # workers that are stopped as well are no news
        print("\n" * sys.stdout.isatty(), end="", flush=True)  # below the live line
        print(f"stopped; {stopped}", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            fail("--workers: a process that decodes has died; fewer of them, or more memory and /dev/shm, may help")
        if not rank or not ("gloo" in str(error) or isinstance(error, torch.distributed.DistError)):
            raise
        fail(f"process {rank} has lost the others")
    if launched:
        torch.distributed.destroy_process_group()


FINISHED = []  # the folder of each run finished by this process, and its last record
SWEEPING = []  # the seeds, where there are several


def sweep(main):
    """Call main() for each number after --seed, one after the other, into folders side by side; then their mean ± std.

    With --seeds-per-rank, under torchrun, each process takes other seeds.
    """
    given = sys.argv[1:]
    after = given[given.index("--seed") + 1 :] if "--seed" in given else []
    seeds = list(itertools.takewhile(str.isdecimal, after))
    apart = "--seeds-per-rank" in given
    if apart and (len(seeds) < 2 or not torch.distributed.is_initialized()):
        raise UsageError(
            "--seeds-per-rank: is for torchrun and several seeds: torchrun … --seed 0 1 2 --seeds-per-rank"
        )
    SWEEPING[:], FINISHED[:] = seeds if len(seeds) > 1 else [], []
    if not SWEEPING:
        return main()
    if len(set(map(int, seeds))) < len(seeds):
        raise UsageError(f"--seed: {' '.join(seeds)}: one of them comes twice")
    at = given.index("--seed")
    rest = given[:at] + given[at + 1 + len(seeds) :]
    size, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if apart else (1, 0)
    try:
        for seed in seeds[rank::size]:
            out = [i for i, flag in enumerate(rest) if "--out" in (flag.partition("=")[0], rest[i - 1])]
            sys.argv[1:] = [*rest, "--seed", seed]
            for i in out:
                if rest[i] != "--out":
                    sys.argv[1 + i] = f"{rest[i].rstrip('/')}-seed{seed}"
            main()
    finally:  # the mean of those that are done is told in any case
        finished = FINISHED
        if apart and sys.exception() is None:
            gathered = [None] * size
            torch.distributed.all_gather_object(gathered, FINISHED)
            finished = [run for runs in itertools.zip_longest(*gathered) for run in runs if run]
        if finished:
            print(f"{len(finished)} seeds, last epoch, mean ± standard deviation:")
            figures = [key for key in COLUMNS if not key.startswith("train") and finished[0][1].get(key) is not None]
            for key in figures:
                values = [record[key] for _, record in finished]
                deviation = statistics.stdev(values) if len(values) > 1 else math.nan
                print(f"    {LEGENDS[key]} {statistics.mean(values):.2f} ± {deviation:.2f} % (n = {len(values)})")
            print("in " + " ".join(str(folder) for folder, _ in finished))


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are a single line, and whose --help keeps the script's docstring as it is written."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        raise UsageError(f"{message.removeprefix('argument ')} (--help explains every flag)")


def unknown(name, valid):
    """What to say of a name that is not among `valid`: the nearest names first, then all of them."""
    near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {name!r}; {hint}valid: {', '.join(valid)}"


def one_of(*names):
    """argparse type: one of `names`; anything else is refused with the nearest names."""

    def check(text):
        if text not in names:
            raise argparse.ArgumentTypeError(unknown(text, names))
        return text

    return check


def number(kind, low, high=1e9):
    """argparse type: an int or float in [low, high]."""

    def check(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            span = f"in [{low}, {high}]" if high == 1 else f"of at least {low} and at most {high:g}"
            sort = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {sort} {span}")
        return value

    return check


def add_common_arguments(parser):
    """Add what every script shares. Flags left unset (None) are for `fill` to take from the script's preset table."""
    add = parser.add_argument_group("data and label noise").add_argument
    names = "shapes (built in), cifar10, cifar100, svhn, food101, webvision, path/to/file.npz, imagefolder:PATH"
    add("--dataset", help=f"{names} (default: shapes)")
    add("--data-dir", type=Path, metavar="DIR", help="where data sets are kept (default: data)")
    add("--noise", type=one_of(*NOISE_KINDS), metavar="KIND", help=" | ".join(NOISE_KINDS))
    add("--rate", type=number(float, 0, 1), help="share of training labels to corrupt, in [0, 1]; human-* has its own")
    add("--limit-train", type=number(int, 1), metavar="N", help="use N evenly spaced training samples")
    add("--limit-test", type=number(int, 1), metavar="N", help="use N evenly spaced test samples")
    add("--resize", type=number(int, 16), metavar="PIXELS", help="photographs: the shorter side becomes (default: 256)")
    add("--image-size", type=number(int, 16), metavar="PIXELS", help="photographs: side of the crop (default: 224)")
    add("--workers", type=number(int, 0), metavar="N", help="photographs: processes that decode (default: one a core)")

    add = parser.add_argument_group("training (unset: the paper's value for data set and noise)").add_argument
    add("--epochs", type=number(int, 1), help="passes over the training set; the schedule scales along")
    add("--batch-size", type=number(int, 1), help="images a step; the incomplete last batch is left out")
    add("--lr", type=number(float, 0), help="initial learning rate")
    add("--weight-decay", type=number(float, 0), help="L2 penalty of the optimiser")
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="of weights, batches, augmentation, label noise; several: a run each, side by side (default: 0)",
    )

    add = parser.add_argument_group("machine and output").add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the models")
    add("--out", type=Path, metavar="DIR", help="run folder (default: runs/METHOD-DATASET-NOISE-seedS)")
    add("--seeds-per-rank", action="store_true", help="torchrun: each process takes other --seed, whole batches")
    add("--resume", action="store_true", help="continue the run in the run folder (one CPU process: to the same bit)")


def add_teacher_arguments(parser):
    """Add the flags of a script that distils from a teacher."""
    add = parser.add_argument_group("teacher and student").add_argument
    add("--teacher", type=Path, metavar="CKPT", help="checkpoint.pt of a trained teacher (default: train one, once)")
    add("--teacher-arch", metavar="ARCH", help="of the teacher that is trained (default: the paper's; on shapes small)")
    add("--teacher-seeds", type=number(int, 1), default=1, metavar="K", help="train K, keep the best (default: 1)")
    add("--student-arch", metavar="ARCH", help="wrn-D-K, resnetD, … (default: the paper's; on shapes small)")


def fill(args, preset):
    """Give every argument that is still None its value from the dict `preset`; the rest stay as the user set them.

    Raises UsageError for a --rate given with a kind of noise that has none to choose.
    """
    rate_given = args.rate is not None
    defaults = {"dataset": "shapes", "data_dir": Path("data"), "resize": 256, "image_size": 224}
    for name, value in {**defaults, **preset}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if rate_given and args.noise in ("none", *HUMAN):
        raise UsageError(
            f"--rate: --noise {args.noise} has no rate to choose; leave --rate out, or name another --noise"
        )
    if args.dataset.startswith("imagefolder:"):
        if args.dataset == "imagefolder:":
            raise UsageError("--dataset imagefolder: names no folder; imagefolder:PATH does")
        args.dataset = f"imagefolder:{os.path.normpath(args.dataset.removeprefix('imagefolder:'))}"
    if of_photographs(args.dataset) and args.image_size > args.resize:
        raise UsageError(f"--image-size: {args.image_size} does not fit in --resize {args.resize}")
    return args


def setup(args):
    """Resolve --device and --amp, seed all generators, set the backends' fast paths; returns the torch.device.

    Raises UsageError for a device that is not there.
    """
    apart = vars(args).get("seeds_per_rank")
    TOGETHER[:] = [1, 0]
    if torch.distributed.is_initialized():
        if not apart:
            TOGETHER[:] = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if args.device not in (None, "cpu", "cuda"):
            raise UsageError(f"--device {args.device}: torchrun gives each process a GPU of its own; leave it out")
        if args.batch_size % TOGETHER[0]:
            fits = args.batch_size // TOGETHER[0] * TOGETHER[0] or TOGETHER[0]
            raise UsageError(f"--batch-size: {args.batch_size} does not divide by {TOGETHER[0]} processes; {fits} does")
        if args.device == "cuda" or args.device is None and torch.cuda.is_available():
            processes, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if processes > devices:
                raise UsageError(f"torchrun: {processes} processes for {devices} GPUs; --nproc_per_node={devices} fits")
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", args.device)
    if not match:
        raise UsageError(f"--device: {unknown(args.device, ['cpu', 'cuda', 'cuda:0'])}")
    if args.device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(f"--device {args.device}: {found} CUDA devices are visible; --device cpu works")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    UNREADABLE.clear()
    args.amp = device.type == "cuda" if args.amp is None else args.amp
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 where a matmul is left in float32
    if vars(args).get("compile"):
        print("compiling the models: the first steps take a minute or so", flush=True)
    return device


# ------------------------------------------------------------------------------------------------------------ processes
# `torchrun --nproc_per_node=N script.py …` starts a script N times. Each process ("rank") has the whole model and takes
# its share of every batch; before a step, gradients are averaged over the processes, and after it BatchNorm's running
# statistics: what DistributedDataParallel does, but for any number of networks and forward passes. As all start from
# the same seed, weights stay the same everywhere. BatchNorm normalises by the process's share, and losses that compare
# samples compare within it. The first process, rank 0, alone prints and writes. Without torchrun, nothing here does
# anything.

TOGETHER = [1, 0]  # how many processes share the batch, and which of them this is; set by `setup`


def average(tensors):
    """Replace each float tensor by its mean over the processes, all in one message."""
    if TOGETHER[0] == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / TOGETHER[0]).split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors)])


def total(tensor, how="SUM"):
    """The sum ("MAX": the largest) over the processes of a tensor, element by element; the tensor itself changes."""
    if TOGETHER[0] > 1:
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how))
    return tensor


def act_as_one(optimizer, modules):
    """Make the optimiser of each process take the step that a single process with the whole batch would take."""
    norms = {id(m): m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

    def gradients(optimizer, *_):
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        average([p.grad for p in parameters if p.grad is not None])

    def running_statistics(*_):
        used = (norm for norm in norms.values() if norm.training and norm.track_running_stats)
        average([value for norm in used for value in (norm.running_mean, norm.running_var)])

    optimizer.register_step_pre_hook(gradients)
    optimizer.register_step_post_hook(running_statistics)


def wait():
    """Wait until all processes are here."""
    if TOGETHER[0] > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def locked(path):
    """Of several processes on one machine that need `path`, let one make it; the others then find it.

    By a file NAME.lock beside it, while that lasts. Where there are no such locks, or none may be written, nothing.
    """
    lock, file = path.with_name(f"{path.name}.lock"), None
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        while file is None:
            file = os.open(lock, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that makes {path}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.exists() or os.stat(lock).st_ino != os.fstat(file).st_ino:  # it was another's, and is gone
                os.close(file)
                file = None
    except (ImportError, OSError):
        if file is not None:
            os.close(file)
            file = None
    try:
        yield
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)  # workers that were started in here have the file open too
            os.close(file)


# ----------------------------------------------------------------------------------------------------------------- data


class Dataset(NamedTuple):
    """A labelled image set; the arrays of an .npz file have the names of the first five."""

    train_images: torch.Tensor  # uint8 [N, 3, H, W]; or Photographs, whose windows may be larger than test images
    train_labels: torch.Tensor  # int64 [N], in [0, len(classes))
    test_images: torch.Tensor  # uint8 [M, 3, H, W], always in memory
    test_labels: torch.Tensor  # int64 [M]
    classes: list  # names, str
    more: dict = {}  # further test sets: name: (images, labels)

    @property
    def image_size(self):
        """The longer side of a test image in pixels, by which build_model chooses an architecture's form."""
        return max(self.test_images.shape[2:])


ARRAYS = Dataset._fields[:5]
DATASETS = ("shapes", "cifar10", "cifar100", "svhn", "food101", "webvision")


def data_name(name):
    """cifar10 of cifar10 or of path/to/cifar10.npz, photos of imagefolder:path/to/photos."""
    return (
        Path(name.removeprefix("imagefolder:")).resolve().name if name.startswith("imagefolder:") else Path(name).stem
    )


def of_photographs(name):
    """Whether the data set `name` is one of photographs, which stay in their files."""
    return name in ("food101", "webvision") or str(name).startswith("imagefolder:")


def load_data(args, device, window=None):
    """The data set that the flags of add_common_arguments name: load_dataset's Dataset."""
    limits = args.limit_train, args.limit_test
    return load_dataset(
        args.dataset, args.data_dir, *limits, device, args.resize, args.image_size, window, args.workers
    )


def load_dataset(
    name,
    data_dir="data",
    limit_train=None,
    limit_test=None,
    device="cpu",
    resize=256,
    image_size=224,
    window=None,
    workers=None,
):
    """The data set `name`, as a Dataset on `device`; of photographs the training images stay in their files.

    name: "shapes" (drawn by code), "cifar10", "cifar100", "svhn" (read from data_dir/NAME.npz; where that is missing,
        downloaded by torchvision and cached there), the path of any .npz file of the same form, or photographs:
        "food101", "webvision" or "imagefolder:PATH" (list_photographs says where they lie).
    limit_train, limit_test: keep that many samples, evenly spaced, so that a file sorted by class stays balanced.
    resize, image_size: of photographs, the shorter side after resizing and the side of the square that is cut out, in
        pixels. window: that side for training images, if another one. workers: processes that decode, None: one a core.
    Raises UsageError if the name is unknown, the file is unreadable or malformed, or the download fails.
    """
    if of_photographs(name):
        lists, classes = list_photographs(str(name), Path(data_dir))
        images, labels = {}, {}
        for part, (paths, targets) in lists.items():
            rows = spread(len(paths), limit_train if part == "train" else limit_test)
            side = window or image_size if part == "train" else image_size
            files = Photographs([paths[i] for i in rows], resize, side, device, workers)
            if part != "train":
                print(f"decoding {len(files):,} photographs of the {part} set, which stay in memory", flush=True)
                files, seen = decoded(files)
                rows = rows[seen.cpu()]
            images[part], labels[part] = files, torch.tensor(targets)[rows].to(device)
        if not len(images["test"]):
            raise UsageError(f"--dataset {name}: none of the test photographs could be read")
        more = {part: (images[part], labels[part]) for part in lists if part not in ("train", "test")}
        return Dataset(images["train"], labels["train"], images["test"], labels["test"], classes, more)
    if name == "shapes":
        train_images, train_labels = draw_shapes(SHAPES_TRAIN, seed=0)
        test_images, test_labels = draw_shapes(SHAPES_TEST, seed=1)
        data = Dataset(train_images, train_labels, test_images, test_labels, SHAPES_CLASSES)
    elif str(name).endswith(".npz"):
        data = read_npz(Path(name), "--dataset")
    elif name in DATASETS:  # cifar10, cifar100, svhn
        path = Path(data_dir) / f"{name}.npz"
        if not path.exists():
            with locked(path):
                if not path.exists():
                    download(name, path)
        data = read_npz(path, f"--dataset {name}")
    else:
        raise UsageError(f"--dataset: {unknown(name, [*DATASETS, 'path/to/file.npz', 'imagefolder:PATH'])}")
    train, test = spread(len(data.train_labels), limit_train), spread(len(data.test_labels), limit_test)
    parts = (data.train_images[train], data.train_labels[train], data.test_images[test], data.test_labels[test])
    return Dataset(*(part.to(device) for part in parts), data.classes)


def spread(total, limit):
    """Indices int64 [min(total, limit)], evenly spaced over range(total); all of them where limit is None."""
    count = min(total, limit or total)
    return torch.arange(count) * total // count


def read_npz(path, flag):
    """The Dataset in an .npz file, read without pickle and checked; UsageError names `flag`, the file and the fault."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ARRAYS if key not in file.files]
            arrays = {key: np.ascontiguousarray(file[key]) for key in ARRAYS if key not in missing}
    except FileNotFoundError:
        raise UsageError(f"{flag}: no file {path}; --dataset shapes needs none") from None
    except Exception as error:  # whatever a damaged or foreign file makes the readers of zip and npy raise
        raise UsageError(
            f"{flag}: {path} cannot be read as .npz ({type(error).__name__}); write it again with numpy.savez"
        ) from None
    if missing:
        raise UsageError(f"{flag}: {path} lacks {', '.join(missing)}; it needs {', '.join(ARRAYS)}")
    classes = [str(c) for c in arrays["classes"].ravel()]
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        where = f"{flag}: {path}: {part}"
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
            raise UsageError(f"{where}_images is {images.dtype} {list(images.shape)}, not uint8 [N, 3, H, W], N > 0")
        if min(images.shape[2:]) < 16:
            raise UsageError(f"{where}_images are {list(images.shape[2:])} pixels; the models need at least [16, 16]")
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
            raise UsageError(f"{where}_labels is {labels.dtype} {list(labels.shape)}, not integer [{len(images)}]")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UsageError(
                f"{where}_labels are {labels.min()} to {labels.max()}, but {len(classes)} classes are named"
            )
        arrays[f"{part}_labels"] = labels.astype(np.int64)
    if len(classes) < 2:
        raise UsageError(f"{flag}: {path}: classes names {len(classes)}; it takes two to tell apart")
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise UsageError(f"{flag}: {path}: train_images and test_images differ in size")
    return Dataset(*(torch.from_numpy(arrays[key]) for key in ARRAYS[:4]), classes)


def download(name, path):
    """Fetch cifar10, cifar100 or svhn with torchvision and write it to `path` as .npz; UsageError where that fails."""
    try:
        if name == "svhn":
            parts = [torchvision.datasets.SVHN(path.parent, split, download=True) for split in ("train", "test")]
            images, labels, classes = [p.data for p in parts], [p.labels for p in parts], [str(d) for d in range(10)]
        else:
            source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
            parts = [source(path.parent, train, download=True) for train in (True, False)]
            images, labels = [p.data.transpose(0, 3, 1, 2) for p in parts], [p.targets for p in parts]
            classes = parts[0].classes
    except Exception as error:  # whatever the network or a broken archive makes torchvision raise
        raise UsageError(
            f"--dataset {name}: no {path}, and the download failed ({error}); put a {name}.npz with "
            f"{', '.join(ARRAYS)} there; --dataset shapes needs none"
        ) from None
    arrays = (images[0], np.int64(labels[0]), images[1], np.int64(labels[1]), np.array(classes))
    with replacing(path, by_all=True) as partial:
        np.savez(partial, **dict(zip(ARRAYS, arrays)))


UNREADABLE = {}  # of this run: path of a photograph: what is wrong with it


def unreadable(path, fault, by_all=False):
    """Name a photograph that is skipped, once. by_all: every process finds it, and the first says so."""
    if str(path) not in UNREADABLE:
        UNREADABLE[str(path)] = fault
        if by_all and TOGETHER[1]:
            return
        print(f"skipped: {path}: {fault}", file=sys.stderr, flush=True)


def count_unreadable():
    """Print how many photographs were skipped, if any, by all processes."""
    found = [[*UNREADABLE]] * TOGETHER[0]
    if TOGETHER[0] > 1:
        torch.distributed.all_gather_object(found, [*UNREADABLE])
    if count := len(set(itertools.chain(*found))):
        print(f"{count:,} photograph{'s' * (count > 1)} could not be read and {'were' if count > 1 else 'was'} skipped")


def list_photographs(name, data_dir):
    """Paths and labels of each part, {"train": (list, list), "test": …}, and the classes.

    imagefolder:PATH: PATH/train/CLASS/* and PATH/test/CLASS/* (or val), in torchvision's ImageFolder layout.
    food101: torchvision's Food101 in data_dir, downloaded where it is missing.
    webvision: the first 50 classes of WebVision 1.0 in data_dir/webvision, "mini-WebVision": training images of
        info/train_filelist_google.txt, test images of info/val_filelist.txt in val_images_256; and as part "imagenet",
        where there is a data_dir/imagenet/val/WNID, ILSVRC12's validation images of the same 50 of info/synsets.txt.
    Raises UsageError for folders that are missing or do not match.
    """
    library = torchvision.datasets
    if name == "food101":
        try:
            with locked(data_dir / "food-101"):
                missing = not all((data_dir / "food-101" / folder).is_dir() for folder in ("meta", "images"))
                parts = [library.Food101(data_dir, split, download=missing) for split in ("train", "test")]
        except UsageError:
            raise
        except Exception as error:  # whatever the network or a broken archive makes torchvision raise
            raise UsageError(f"--dataset food101: not in {data_dir}, and the download failed ({error})") from None
        return {n: (p._image_files, p._labels) for n, p in zip(("train", "test"), parts)}, parts[0].classes
    if name == "webvision":
        return list_webvision(data_dir / "webvision", data_dir / "imagenet" / "val")
    root = Path(name.removeprefix("imagefolder:"))
    folders = [root / "train", root / ("test" if (root / "test").is_dir() else "val")]
    try:
        train, test = (library.ImageFolder(folder) for folder in folders)
    except OSError as error:
        layout = f"{root}/train/CLASS/… and {root}/test/CLASS/… (or val) are needed"
        raise UsageError(f"--dataset {name}: {error}; {layout}") from None
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        raise UsageError(f"--dataset {name}: train and {folders[1].name} have other classes: {odd}")
    if len(train.classes) < 2:
        raise UsageError(f"--dataset {name}: {folders[0]} has one class; it takes two to tell apart")
    return {n: tuple(zip(*part.samples)) for n, part in (("train", train), ("test", test))}, train.classes


def list_webvision(root, imagenet, count=50):
    """list_photographs of WebVision's first `count` classes in root, and of the same of ILSVRC12 in imagenet/WNID."""
    lists = {}
    try:
        synsets = [line.split() for line in (root / "info/synsets.txt").read_text().splitlines()[:count]]
        files = {"train": ("train_filelist_google.txt", root), "test": ("val_filelist.txt", root / "val_images_256")}
        for part, (file, folder) in files.items():
            rows = [line.rsplit(maxsplit=1) for line in (root / "info" / file).read_text().splitlines()]
            chosen = [(folder / path, int(label)) for path, label in rows if int(label) < count]
            for path in (path for path, _ in chosen if not path.is_file()):
                unreadable(path, "missing", by_all=True)
            lists[part] = [(path, label) for path, label in chosen if str(path) not in UNREADABLE]
    except FileNotFoundError as error:
        raise UsageError(f"--dataset webvision: no file {error.filename}; WebVision 1.0 belongs in {root}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset webvision: {root}/info is not WebVision's: {error}") from None
    if (
        min(map(len, synsets), default=0) < 2
        or len(synsets) < count
        or any(len(set(label for _, label in rows)) < count for rows in lists.values())
    ):
        raise UsageError(
            f"--dataset webvision: the lists in {root}/info, or its files, lack some of the first {count} classes"
        )
    if imagenet.is_dir():
        lacking = [wnid for wnid, *_ in synsets if not (imagenet / wnid).is_dir()]
        if lacking:
            raise UsageError(f"--dataset webvision: {imagenet} lacks {', '.join(lacking[:5])}, {len(lacking)} in all")
        folders = [(sorted((imagenet / wnid).iterdir()), label) for label, (wnid, *_) in enumerate(synsets)]
        lists["imagenet"] = [(path, label) for paths, label in folders for path in paths]
    else:
        print(f"no {imagenet}: without ILSVRC12's validation images of the same classes")
    return {part: tuple(zip(*rows)) for part, rows in lists.items()}, [" ".join(words[1:]) for words in synsets]


class Photographs:
    """Images in files, decoded when they are wanted: training images that do not fit in memory.

    len(), shape and device are those of the uint8 tensor [N, 3, side, side] that they stand for, and [rows] is the
    Photographs of these rows; `fetch` gives pixels.
    """

    def __init__(self, paths, resize, side, device="cpu", workers=None):
        self.paths, self.resize, self.side, self.device = list(paths), resize, min(side, resize), torch.device(device)
        self.shape = torch.Size((len(self.paths), 3, self.side, self.side))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if workers is None else workers
        self.orders = []  # of the loader: what its workers are to decode next

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        paths = self.paths[rows] if isinstance(rows, slice) else [self.paths[i] for i in rows.tolist()]
        return Photographs(paths, self.resize, self.side, self.device, self.workers)

    @functools.cached_property
    def loader(self):
        """Each worker decodes whole batches, those in `orders`; the workers live as long as the photographs."""
        warnings.filterwarnings(
            "ignore", "This DataLoader will create"
        )  # more workers than cores are the user's choice
        return torch.utils.data.DataLoader(
            Decoder(self.paths, self.resize, self.side),
            batch_size=None,
            worker_init_fn=start_worker,
            sampler=self.orders,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the global one is for the draws of the method
        )


def start_worker(_):
    """Ctrl-C is for the first process, which then ends its workers; and a worker has nothing to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")


class Decoder(torch.utils.data.Dataset):
    """What a worker does: [rows, places] -> uint8 [n, 3, side, side], the n rows that could be read, {path: fault}."""

    def __init__(self, paths, resize, side):
        self.paths, self.resize, self.side = paths, resize, side

    def __getitem__(self, order):
        images, kept, faults = [], [], {}
        for i, (row, place) in enumerate(zip(order[0].tolist(), order[1].tolist())):
            try:
                images.append(read_photograph(self.paths[row], self.resize, self.side, place))
                kept.append(i)
            except Exception as error:  # whatever a damaged file makes the decoder raise
                faults[str(self.paths[row])] = " ".join(str(error).split()) or type(error).__name__
        return torch.stack(images) if images else None, torch.tensor(kept), faults


def read_photograph(path, resize, side, place=(0.5, 0.5)):
    """uint8 [3, side, side] from an image file: the shorter side resized to `resize` pixels, a square window cut out.

    place: of the window, whose side is side / resize of the shorter side: down and across, from 0 (top, left) to 1.
    Bilinear with antialiasing.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional as v2

    with Image.open(path) as file:
        file.draft("RGB", (resize, resize))  # JPEG only: decoded at 1/2, 1/4, 1/8 where that is still large enough
        image = v2.pil_to_tensor(file.convert("RGB"))  # resizing is twice as fast on a tensor
    height, width = image.shape[1:]
    window = max(1, round(min(height, width) * side / resize))
    top, left = (round(p * (n - window)) for p, n in zip(place, (height, width)))
    return v2.resized_crop(image, top, left, window, window, [side, side], antialias=True)


def fetch(images, parts, random=True):
    """Yield (part, images[part]) for each index tensor of the list `parts`: int64 [b] and uint8 [b, 3, H, W].

    images: a uint8 tensor, or Photographs, which workers decode ahead, windows at random places, else in the middle. A
    photograph that cannot be read is named, counted and skipped: at random, another one of its part takes its place, so
    that all parts keep their size; else it is missing. None: None is yielded for the images.
    Raises UsageError where nothing can be read.
    """
    if not isinstance(images, Photographs):
        yield from ((part, None if images is None else images[part]) for part in parts)
        return
    sizes, empty = [len(part) for part in parts], True
    places = torch.rand(sum(sizes), 2) if random else torch.full((sum(sizes), 2), 0.5)
    rows = torch.cat(parts).cpu().split(sizes)
    images.orders[:] = [(some.numpy(), place.numpy()) for some, place in zip(rows, places.split(sizes))]
    for part, (pixels, kept, faults) in zip(parts, images.loader):
        for path, fault in faults.items():
            unreadable(path, fault, by_all=not random)
        if pixels is None:
            if TOGETHER[0] > 1 and random:  # a process that skips a step would leave the others waiting
                raise UsageError(f"--dataset: none of the {len(part)} photographs of a batch can be read: {path}, …")
            continue
        if faults and random:
            full = torch.arange(len(part)) % len(kept)
            pixels, kept = pixels[full], kept[full]
        empty = False
        yield (part[kept.to(part.device)] if faults else part), pixels.to(images.device, non_blocking=True)
    if empty and parts:
        raise UsageError(f"--dataset: none of {len(images):,} photographs can be read: {images.paths[0]}, …")


def decoded(images):
    """Images in memory, uint8 [n, 3, H, W], and the rows int64 [n] that could be read; of Photographs the middle."""
    rows = torch.arange(len(images), device=images.device)
    if not isinstance(images, Photographs):
        return images, rows
    pixels, seen = torch.empty(images.shape, dtype=torch.uint8, device=images.device), [rows[:0]]
    for part, some in fetch(images, list(rows.split(32)), random=False) if len(rows) else ():
        pixels[sum(map(len, seen)) :][: len(part)] = some
        seen.append(part)
        if sys.stdout.isatty():
            print(f"\r{int(part[-1]) + 1:,} of {len(images):,}\x1b[K", end="\r", flush=True)
    seen = torch.cat(seen)
    return pixels[: len(seen)], seen


SHAPES_TRAIN, SHAPES_TEST = 2000, 1000
SHAPES_CLASSES = [
    f"{fabric} {form}" for form in ["disc", "bar", "triangle", "cross", "ring"] for fabric in ("striped", "dotted")
]


def draw_shapes(count, seed, size=32):
    """Ten classes of pictures, five forms striped or dotted: uint8 [count, 3, size, size] and labels int64 [count].

    Form and texture decide the class; colours, place, size, angle, phase, background, clutter and pixel noise don't.
    Every operation is one that IEEE 754 rounds exactly (no sin or normal draws): the same pixels on every machine.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    labels = torch.randperm(count, generator=generator) % 10
    form, dotted = (labels // 2).view(-1, 1, 1), (labels % 2).view(-1, 1, 1).bool()
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)

    t, flip = uniform(-1, 1), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
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
    a, b = (u * frequency + uniform(0, 1)) % 1 - 0.5, (v * frequency + uniform(0, 1)) % 1 - 0.5
    texture = torch.where(dotted, a * a + b * b < 0.12, a.abs() < 0.25)

    light, dark = uniform(0.7, 1, 3), uniform(0, 0.3, 3)
    slope = x * uniform(-0.15, 0.15).unsqueeze(1) + y * uniform(-0.15, 0.15).unsqueeze(1)
    image = uniform(0.3, 0.7, 3) + slope
    for _ in range(3):  # clutter behind the form
        spot = (x - uniform(-1, 1)) ** 2 + (y - uniform(-1, 1)) ** 2 < uniform(0.08, 0.2) ** 2
        image = torch.where(spot.unsqueeze(1), uniform(0.2, 0.8, 3), image)
    image = torch.where(inside.unsqueeze(1), torch.where(texture.unsqueeze(1), light, dark), image)
    noise = torch.rand(count, 3, size, size, generator=generator) - 0.5
    return ((image + 0.15 * noise).clamp(0, 1) * 255).round().byte(), labels


def channel_stats(images):
    """Mean and standard deviation of each channel of uint8 images [N, 3, H, W], in [0, 1]: two lists of 3.

    The deviation of a channel that is constant is given as 1, so that one can divide by it. Photographs have those of
    ImageNet.
    """
    if isinstance(images, Photographs):
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double().cpu()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255
    mean = (share * level).sum(1)
    std = ((share * level**2).sum(1) - mean**2).clamp(min=0).sqrt()
    return mean.tolist(), std.where(std > 0, 1.0).tolist()


def to_float(images):
    """uint8 [..., 3, H, W] -> float32 in [0, 1]."""
    return images / 255


def batches(count, batch_size, device):
    """A fresh random order of range(count), cut into full batches: int64 [batch_size] index tensors on `device`.

    The incomplete last batch is left out, so that every step has the same shape. Of several processes that share the
    batches, each gets its own part of each.
    """
    size, rank = TOGETHER
    share = min(batch_size, count) // size
    if not share:
        raise UsageError(f"torchrun: {size} processes for {count} training images; take fewer")
    whole = share * size
    order = torch.randperm(count, device=device)
    if size > 1:
        torch.distributed.broadcast(order, 0)
    return [batch[rank * share :][:share] for batch in order[: count // whole * whole].split(whole)]


# ---------------------------------------------------------------------------------------------------------- label noise

HUMAN = {  # kind: (file of CIFAR-10N / CIFAR-100N, key in it)
    "human-aggre": ("CIFAR-10_human.pt", "aggre_label"),
    "human-random1": ("CIFAR-10_human.pt", "random_label1"),
    "human-random2": ("CIFAR-10_human.pt", "random_label2"),
    "human-random3": ("CIFAR-10_human.pt", "random_label3"),
    "human-worse": ("CIFAR-10_human.pt", "worse_label"),
    "human-noisy": ("CIFAR-100_human.pt", "noisy_label"),
}
NOISE_KINDS = ("none", "sym", "sym-other", "pair", "asym", *HUMAN)

CIFAR10_CONFUSIONS = {"truck": "automobile", "bird": "airplane", "cat": "dog", "dog": "cat", "deer": "horse"}
CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale / aquarium_fish flatfish ray shark trout / orchid poppy rose sunflower tulip /
bottle bowl can cup plate / apple mushroom orange pear sweet_pepper / clock keyboard lamp telephone television /
bed chair couch table wardrobe / bee beetle butterfly caterpillar cockroach / bear leopard lion tiger wolf /
bridge castle house road skyscraper / cloud forest mountain plain sea / camel cattle chimpanzee elephant kangaroo /
fox porcupine possum raccoon skunk / crab lobster snail spider worm / baby boy girl man woman /
crocodile dinosaur lizard snake turtle / hamster mouse rabbit shrew squirrel /
maple_tree oak_tree palm_tree pine_tree willow_tree / bicycle bus motorcycle pickup_truck train /
lawn_mower rocket streetcar tank tractor"""


def corrupt_labels(labels, kind, rate, num_classes, seed, classes=(), data_dir="data", per_sample=False):
    """A noisy copy of int64 labels [N], on the same device; the same for the same seed on every device.

    kind: none
        sym        exactly round(rate·N) samples get a label uniform over all classes (their own included);
                   with per_sample, each sample gets one with probability rate
        sym-other  each sample, with probability rate, gets one of the other classes
        pair       each sample, with probability rate, gets the next class, y+1 mod C
        asym       CIFAR-10: exactly round(rate·n) of each confusable class go to their look-alike (Patrini et al.);
                   CIFAR-100: round(rate·N) samples go to the next class of their superclass
        human-*    annotators' labels of CIFAR-10N (aggre, random1-3, worse) and CIFAR-100N (noisy); rate is ignored
    rate: in [0, 1]. classes: names, which asym goes by. data_dir: where CIFAR-10N's own files lie.
    Raises UsageError for an unknown kind, a rate outside [0, 1], asym without a map, human labels of another data set.
    """
    if kind not in NOISE_KINDS:
        raise UsageError(f"--noise: {unknown(kind, NOISE_KINDS)}")
    if kind in HUMAN:
        return human_labels(labels.cpu(), kind, data_dir).to(labels.device)
    if kind != "none" and not (rate is not None and 0 <= rate <= 1):
        raise UsageError(
            f"--rate: --noise {kind} needs a rate in [0, 1]" + (f", not {rate}" if rate is not None else "")
        )
    generator = torch.Generator().manual_seed(seed)
    clean, count = labels.cpu(), len(labels)
    noisy = clean.clone()
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
        successor = torch.arange(num_classes)
        if set(CIFAR10_CONFUSIONS) | set(CIFAR10_CONFUSIONS.values()) <= set(names):
            for source, target in CIFAR10_CONFUSIONS.items():
                successor[names.index(source)] = names.index(target)
            pools = [(clean == names.index(source)).nonzero().squeeze(1) for source in CIFAR10_CONFUSIONS]
        elif set(CIFAR100_SUPERCLASSES.replace("/", " ").split()) == set(names):
            for family in CIFAR100_SUPERCLASSES.split("/"):
                members = sorted(names.index(name) for name in family.split())
                successor[members] = torch.tensor(members[1:] + members[:1])
            pools = [torch.arange(count)]
        else:
            raise UsageError(
                "--noise asym: only CIFAR-10 and CIFAR-100 have a map of look-alikes; sym and pair work anywhere"
            )
        for pool in pools:
            chosen = pool[torch.randperm(len(pool), generator=generator)[: round(rate * len(pool))]]
            noisy[chosen] = successor[clean[chosen]]
    return noisy.to(labels.device)


def human_labels(clean, kind, data_dir):
    """CIFAR-N's labels int64 [N] for clean labels int64 [N] in the official order, whole or a `spread` of it.

    The file is a pickle of numpy arrays; torch's restricted unpickler is allowed to build those and nothing else.
    """
    name, key = HUMAN[kind]
    path = Path(data_dir) / name
    rebuild = np.empty(0).__reduce__()[0]  # numpy's _reconstruct, which the file knows by its name in numpy 1
    arrays = [(rebuild, "numpy.core.multiarray._reconstruct"), rebuild, np.ndarray, np.dtype, codecs.encode]
    arrays.append(type(np.dtype(np.int64)))
    try:
        with torch.serialization.safe_globals(arrays):
            content = torch.load(path, weights_only=True)
        truth, noisy = (torch.from_numpy(np.int64(content[k])) for k in ("clean_label", key))
    except FileNotFoundError:
        source = "github.com/UCSC-REAL/cifar-10-100n"
        raise UsageError(f"--noise {kind}: no {path}; it is part of CIFAR-N ({source})") from None
    except OSError as error:
        raise UsageError(f"--noise {kind}: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        fault = f"is not CIFAR-N's file ({type(error).__name__})"
        raise UsageError(f"--noise {kind}: {path} {fault}; fetch it again") from None
    if len(clean) <= len(truth) and torch.equal(truth[spread(len(truth), len(clean))], clean):
        return noisy[spread(len(truth), len(clean))]
    raise UsageError(f"--noise {kind}: {path} labels another data set, or the images are not in the official order")


def imbalance(labels, gamma, num_classes, seed):
    """Indices of a class-imbalanced subset of int64 labels [N] (KD Beyond Model Compression, section IV-C), ascending.

    Class c = 1 … C keeps floor(a / (b + c^-gamma)) samples, with a and b such that the first keeps 5 % and the last all
    of a balanced class (250 and 5000 on CIFAR-10). A smaller gamma leaves fewer samples in between.
    gamma: above 0, else UsageError.
    """
    if gamma <= 0:
        raise UsageError(f"--imbalance: {gamma} is not above 0; the paper has 0.2, 0.6, 1 and 2")
    per_class = len(labels) // num_classes
    low, high = per_class / 20, per_class
    last = num_classes**-gamma
    b = (low - high * last) / (high - low)
    a = low * (b + 1)
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for c in range(num_classes):
        pool = (labels.cpu() == c).nonzero().squeeze(1)
        size = math.floor(a / (b + (c + 1) ** -gamma) + 1e-6)  # 1e-6: the ends are whole numbers but for rounding
        kept.append(pool[torch.randperm(len(pool), generator=generator)[:size]])
    return torch.cat(kept).sort().values.to(labels.device)


# --------------------------------------------------------------------------------------------------------- augmentation
# Batched on the images' device, every sample with a draw of its own. An operation is of one of three kinds, each a
# handful of kernels however large the batch: a warp (one grid_sample), a blend with a degenerate image, or a look-up
# table per sample and channel (one gather). Pixel values follow the 8-bit operations of torchvision.transforms.v2.

OPS = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),  # warps
    *("Brightness", "Contrast", "Color", "Sharpness"),  # up to here the magnitude has a random sign
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),  # up to here AugMix
    "Identity",  # up to here RandAugment
    "Invert",  # AutoAugment
)
SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, CONTRAST, COLOR, SHARPNESS = range(9)
POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE, IDENTITY, INVERT = range(9, 15)


@functools.cache
def op_magnitudes(bins, height, width, device, translate=150 / 331, posterize=8):
    """Magnitude of each operation at each strength: float32 [15, bins] on `device`, as torchvision's spaces.

    Shear as a slope, translation in whole pixels, rotation in degrees, posterize in bits, solarize as a threshold in
    [0, 1], brightness, contrast, colour and sharpness as the blend factor minus one. AutoAugment and RandAugment
    translate by up to 150/331 of the side and posterize to 8 … 4 bits; AugMix by up to 1/3 and to 4 … 0 bits.
    """
    table = torch.zeros(len(OPS), bins)
    table[[SHEAR_X, SHEAR_Y]] = torch.linspace(0, 0.3, bins)
    table[TRANSLATE_X] = torch.linspace(0, translate * width, bins).trunc()
    table[TRANSLATE_Y] = torch.linspace(0, translate * height, bins).trunc()
    table[ROTATE] = torch.linspace(0, 30, bins)
    table[[BRIGHTNESS, CONTRAST, COLOR, SHARPNESS]] = torch.linspace(0, 0.9, bins)
    table[POSTERIZE] = (posterize - torch.arange(bins) / ((bins - 1) / 4)).round()
    table[SOLARIZE] = torch.linspace(1, 0, bins)
    return table.to(device)


def apply_ops(images, op, magnitude, mode="nearest"):
    """Apply to each image its own operation: images float [B, 3, H, W] in [0, 1], op int64 [B] in OPS, magnitude [B].

    mode: how warps interpolate, "nearest" or "bilinear"; what comes in from outside the image is black.
    """
    images = images.clone()
    kinds = (
        (op <= ROTATE, functools.partial(_warp, mode=mode)),
        (op == COLOR, _color),
        (op == SHARPNESS, _sharpness),
        (((op > ROTATE) & (op < COLOR)) | ((op > SHARPNESS) & (op < EQUALIZE)) | (op == INVERT), _look_up),
        (op == EQUALIZE, _equalize),
    )
    for mask, transform in kinds:
        if images.device.type == "cpu":  # compute only the rows concerned
            rows = mask.nonzero().squeeze(1)
            if len(rows):
                some = (values.index_select(0, rows) for values in (images, op, magnitude))
                images.index_copy_(0, rows, transform(*some))
        else:  # compute all rows: counting them would make the host wait for the device
            images = torch.where(mask.view(-1, 1, 1, 1), transform(images, op, magnitude), images)
    return images


def _warp(images, op, magnitude, mode):
    """Shear, translate or rotate: sample the input at (a · (x, y, 1), b · (x, y, 1)), in pixels from the centre."""
    height, width = images.shape[2:]
    kinds = (SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE)
    shear_x, shear_y, move_x, move_y, degrees = (torch.where(op == kind, magnitude, 0) for kind in kinds)
    cos, sin = (degrees * (math.pi / 180)).cos(), (degrees * (math.pi / 180)).sin()
    a = (cos, shear_x - sin, shear_x * (height / 2) - move_x)  # shears keep the first row and column in place
    b = (shear_y + sin, cos, shear_y * (width / 2) - move_y)
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device).view(-1, 1)

    def parts(row, half):  # no matrix product: where TF32 or bfloat16 is on, it would be too coarse
        by_x, by_y, shift = (part.view(-1, 1, 1) / half for part in row)
        return by_x * x, by_y * y, shift

    along, across, shift = (torch.stack(pair, -1) for pair in zip(parts(a, width / 2), parts(b, height / 2)))
    grid = (along + across).add_(shift)  # [B, 1, W, 2] + [B, H, 1, 2] + [B, 1, 1, 2]
    return F.grid_sample(images, grid, mode=mode, align_corners=False)


def _gray(images):
    """Luma of images [B, 3, H, W] in [0, 255], rounded down as the 8-bit library does: [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor().unsqueeze(1)


def _color(images, op, magnitude):
    """Saturation: (1 + m) · image - m · grey."""
    images = images * 255
    return torch.lerp(_gray(images), images, 1 + magnitude.view(-1, 1, 1, 1)).clamp_(0, 255).div_(255)


def _sharpness(images, op, magnitude):
    """(1 + m) · image - m · smoothed image, which has the border of the image itself."""
    images = images * 255
    box = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    box = box[..., :-2] + box[..., 1:-1] + box[..., 2:]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = box.add_(images[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return torch.lerp(smooth, images, 1 + magnitude.view(-1, 1, 1, 1)).clamp_(0, 255).div_(255)


def _look_up(images, op, magnitude):
    """The operations that map each level to another: build every sample's table of 256, look its pixels up."""
    value = (images * 255).round_()
    level = torch.arange(256, device=images.device, dtype=torch.float32)
    op, magnitude = op.view(-1, 1, 1), magnitude.view(-1, 1, 1)

    # most are a straight line: scale · level + shift, both [B, 3 or 1, 1]
    mean = _gray(value).mean((2, 3)).unsqueeze(2)
    darkest, brightest = (end((2, 3)).unsqueeze(2) for end in (value.amin, value.amax))
    stretch = torch.where(brightest > darkest, 255 / (brightest - darkest), 0)  # 0: one level only, left as it is
    lines = {
        BRIGHTNESS: (1 + magnitude, 0.0),
        CONTRAST: (1 + magnitude, -mean * magnitude),
        AUTO_CONTRAST: (stretch.where(stretch > 0, 1.0), -darkest * stretch),
        INVERT: (-1.0, 255.0),
    }
    scale, shift = torch.ones_like(darkest), torch.zeros_like(darkest)
    for name, (new_scale, new_shift) in lines.items():
        scale, shift = torch.where(op == name, new_scale, scale), torch.where(op == name, new_shift, shift)
    table = torch.addcmul(shift, scale, level).clamp_(0, 255)

    grain = (2 ** (8 - magnitude.clamp(0, 8))).round()
    table = torch.where(op == POSTERIZE, level - level % grain, table)
    table = torch.where(op == SOLARIZE, torch.where(level >= 255 * magnitude, 255 - level, level), table)
    return table.div_(255).gather(2, value.long().flatten(2)).view_as(images)


def _equalize(images, *_):
    """Equalize the histogram of each channel."""
    pixels = images[0, 0].numel()
    value = (images * 255).round_().long().flatten(2)
    histogram = torch.zeros(len(images), 3, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, value, torch.ones_like(value))
    step = (pixels - histogram.gather(2, value.amax(2, keepdim=True))) // 255  # all but the brightest level
    below = histogram.cumsum(2) - histogram
    equal = (below + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, equal, torch.arange(256, device=images.device)).clamp(max=255) / 255
    return table.gather(2, value).view_as(images)


def _signed(magnitude, op):
    """Flip the sign of half of the magnitudes, for the operations that have one."""
    flip = (torch.rand_like(magnitude) < 0.5) & (op <= SHARPNESS)
    return torch.where(flip, -magnitude, magnitude)


def rand_augment(images, num_ops, magnitude):
    """RandAugment: `num_ops` operations in turn, each drawn uniformly from 14, at strength `magnitude` of 0 … 30.

    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    table = op_magnitudes(31, *images.shape[2:], images.device)
    for _ in range(num_ops):
        op = torch.randint(IDENTITY + 1, (len(images),), device=images.device)
        images = apply_ops(images, op, _signed(table[op, magnitude], op))
    return images


def aug_mix(images, severity=3, width=3, depth=-1, alpha=1.0):
    """AugMix: the image mixed with `width` chains of operations, weights Dirichlet(alpha) and Beta(alpha, alpha).

    severity: strengths are drawn from the first `severity` of 10. depth: operations a chain; -1 draws 1-3 for each.
    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    size, device = len(images), images.device
    table = op_magnitudes(10, *images.shape[2:], device, translate=1 / 3, posterize=4)
    chains = images.repeat(width, 1, 1, 1)
    low, high = (1, 3) if depth < 1 else (depth, depth)
    depths = torch.randint(low, high + 1, (len(chains),), device=device)
    for position in range(high):
        op = torch.randint(EQUALIZE + 1, (len(chains),), device=device)
        op = torch.where(depths > position, op, IDENTITY)
        strength = torch.randint(severity, (len(chains),), device=device)
        chains = apply_ops(chains, op, _signed(table[op, strength], op), mode="bilinear")

    def dirichlet(count):  # weights [count, B, 1, 1, 1]
        law = torch.distributions.Dirichlet(torch.full((count,), float(alpha), device=device), validate_args=False)
        return law.sample((size,)).T.view(count, size, 1, 1, 1)

    keep, change = dirichlet(2)
    mixed = (dirichlet(width) * chains.view(width, *images.shape)).sum(0)
    return (keep * images + change * mixed).clamp(0, 1)  # rounding alone can leave [0, 1]


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


@functools.cache
def auto_augment_policy(device):
    """The CIFAR-10 policy as tensors on `device`: operation int64, probability float, strength int64, each [25, 2]."""
    steps = [policy.split() for policy in AUTO_AUGMENT_CIFAR10.split("/")]
    op = torch.tensor([[OPS.index(p[0]), OPS.index(p[3])] for p in steps])
    probability = torch.tensor([[float(p[1]), float(p[4])] for p in steps])
    strength = torch.tensor([[int(p[2]), int(p[5])] for p in steps])
    return op.to(device), probability.to(device), strength.to(device)


def auto_augment(images):
    """AutoAugment with its CIFAR-10 policy: a sub-policy for each image, its two operations applied with their chances.

    images: float [B, 3, H, W] in [0, 1]; returns the same.
    """
    table = op_magnitudes(10, *images.shape[2:], images.device)
    ops, probabilities, strengths = auto_augment_policy(images.device)
    policy = torch.randint(len(ops), (len(images),), device=images.device)
    for turn in (0, 1):
        active = torch.rand(len(images), device=images.device) < probabilities[policy, turn]
        op = torch.where(active, ops[policy, turn], IDENTITY)
        images = apply_ops(images, op, _signed(table[op, strengths[policy, turn]], op))
    return images


def crop_flip(images, padding=4, mode="zero"):
    """Random crop from the image padded by `padding` pixels ("zero" or "reflect"), and a flip with probability 1/2.

    padding: 0 only flips. images: float [B, 3, H, W]; returns the same shape.
    """
    height, width = images.shape[2:]
    if padding:
        padded = F.pad(images, (padding,) * 4, mode="constant" if mode == "zero" else mode)
        top, left = torch.randint(2 * padding + 1, (2, len(images)), device=images.device)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, 3, 2·padding + 1, 2·padding + 1, H, W]
        images = windows[torch.arange(len(images), device=images.device), :, top, left]
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def random_resized_crop(images, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Random resized crop: a box of `scale` of the area and `ratio` width to height, resized to size × size pixels.

    Of ten boxes drawn the first that fits is taken, as in torchvision, or the whole image. Bilinear, no antialiasing,
    for boxes that are not much larger than `size`. images: float [B, 3, H, W]; returns float [B, 3, size, size].
    """
    count, (height, width), device = len(images), images.shape[2:], images.device
    area = height * width * torch.empty(count, 10, device=device).uniform_(*scale)
    aspect = torch.empty(count, 10, device=device).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    first, whole = fits.int().argmax(1, keepdim=True), ~fits.any(1, keepdim=True)
    h, w = h.gather(1, first).masked_fill(whole, height), w.gather(1, first).masked_fill(whole, width)
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

    The order of the four is drawn for the whole batch. images: float [B, 3, H, W] in [0, 1]; returns the same.
    """

    def uniform(low, high):
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    def gray(x):
        red, green, blue = x.unbind(1)
        return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)

    steps = (
        lambda x: x * uniform(1 - brightness, 1 + brightness),
        lambda x: torch.lerp(gray(x).mean((2, 3), keepdim=True), x, uniform(1 - contrast, 1 + contrast)),
        lambda x: torch.lerp(gray(x), x, uniform(1 - saturation, 1 + saturation)),
        lambda x: _turn_hue(x, uniform(-hue, hue)),
    )
    for i in torch.randperm(4).tolist():
        images = steps[i](images).clamp(0, 1)
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
    height, width = images.shape[2:]
    top = torch.randint(height, (len(images), 1, 1, 1), device=images.device) - size // 2
    left = torch.randint(width, (len(images), 1, 1, 1), device=images.device) - size // 2
    return _black_box(images, top, left, size, size)


def random_erasing(images, probability=0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)):
    """Random erasing: with `probability` a black box in the image, of `scale` of its area and `ratio` height to width.

    Of ten boxes drawn the first that fits is taken, as in torchvision. images: float [B, 3, H, W]; returns the same.
    """
    size, (height, width), device = len(images), images.shape[2:], images.device
    area = height * width * torch.empty(size, 10, device=device).uniform_(*scale)
    aspect = torch.empty(size, 10, device=device).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    chosen = (torch.rand(size, 1, device=device) < probability) & fits.any(1, keepdim=True)
    h, w = torch.where(chosen, h, 0).view(-1, 1, 1, 1), torch.where(chosen, w, 0).view(-1, 1, 1, 1)
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
    """

    def __init__(self, stem, blocks, head, mean=(0, 0, 0), std=(1, 1, 1)):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.image_size = 32  # what build_model was told

    def forward(self, images, features=False):
        x = self.stem((images - self.mean) / self.std)
        outputs = [x]
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        logits = self.head(x)
        return (logits, outputs) if features else logits


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
    down = None
    if stride != 1 or inputs != outputs:
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return torchvision.models.resnet.BasicBlock(inputs, outputs, stride, down)


def groups(block, widths, depths):
    """A group of depths[i] blocks for each of widths[1:]; all but the first group begin with stride 2."""
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


def conv_unit(inputs, outputs, kernel, stride=1, padding=0):
    """conv-BN-ReLU, the unit of Inception."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU(inplace=True))


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
    """Stem and three blocks of Inception-ResNet-v2 (Szegedy et al. 2017), for images from 75 pixels up; 1536 channels.

    With a classifier of 1000 classes 55.8 million parameters.
    """
    unit, chain = conv_unit, nn.Sequential
    average = chain(nn.AvgPool2d(3, 1, 1, count_include_pad=False), unit(192, 64, 1))
    stem = chain(
        unit(3, 32, 3, 2), unit(32, 32, 3), unit(32, 64, 3, padding=1), nn.MaxPool2d(3, 2),
        unit(64, 80, 1), unit(80, 192, 3), nn.MaxPool2d(3, 2),
        Parallel(
            unit(192, 96, 1),
            chain(unit(192, 48, 1), unit(48, 64, 5, padding=2)),
            chain(unit(192, 64, 1), unit(64, 96, 3, padding=1), unit(96, 96, 3, padding=1)),
            average,
        ),
    )  # fmt: skip

    def block35():
        return InceptionResidual(
            320, 128, 0.17,
            unit(320, 32, 1),
            chain(unit(320, 32, 1), unit(32, 32, 3, padding=1)),
            chain(unit(320, 32, 1), unit(32, 48, 3, padding=1), unit(48, 64, 3, padding=1)),
        )  # fmt: skip

    def block17():
        across, down = unit(128, 160, (1, 7), padding=(0, 3)), unit(160, 192, (7, 1), padding=(3, 0))
        return InceptionResidual(1088, 384, 0.1, unit(1088, 192, 1), chain(unit(1088, 128, 1), across, down))

    def block8(scale=0.2, relu=True):
        across, down = unit(192, 224, (1, 3), padding=(0, 1)), unit(224, 256, (3, 1), padding=(1, 0))
        return InceptionResidual(
            2080, 448, scale, unit(2080, 192, 1), chain(unit(2080, 192, 1), across, down), relu=relu
        )

    reduce_a = Parallel(
        unit(320, 384, 3, 2),
        chain(unit(320, 256, 1), unit(256, 256, 3, padding=1), unit(256, 384, 3, 2)),
        nn.MaxPool2d(3, 2),
    )
    reduce_b = Parallel(
        chain(unit(1088, 256, 1), unit(256, 384, 3, 2)),
        chain(unit(1088, 256, 1), unit(256, 288, 3, 2)),
        chain(unit(1088, 256, 1), unit(256, 288, 3, padding=1), unit(288, 320, 3, 2)),
        nn.MaxPool2d(3, 2),
    )
    blocks = [
        chain(*(block35() for _ in range(10))),
        chain(reduce_a, *(block17() for _ in range(20))),
        chain(reduce_b, *(block8() for _ in range(9)), block8(1.0, relu=False), unit(2080, 1536, 1)),
    ]
    return stem, blocks


ARCHS = (
    *("wrn-16-2", "wrn-40-2", "wrn-28-10", "resnet8", "resnet14", "resnet20", "resnet26", "resnet8x4", "resnet26x4"),
    *("preact_resnet18", "preact_resnet34", "resnet18", "resnet34", "resnet50", "resnet101"),
    *("mobilenet_v2", "shufflenet_v2", "densenet121", "densenet169", "inception_resnet_v2"),
)


def library_model(arch, num_classes, pretrained, **options):
    """torchvision's model; pretrained: with its ImageNet weights (V1), but for a classifier of another size."""
    net = torchvision.models.get_model(arch, num_classes=num_classes, **options)
    if pretrained:
        weights = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # whatever the network makes torch.hub raise
            hint = f"put {weights.url.rsplit('/', 1)[1]} into {torch.hub.get_dir()}/checkpoints"
            raise UsageError(f"--pretrained: no weights of {arch} from the network ({error}); {hint}") from None
        own = net.state_dict()
        net.load_state_dict({key: state[key] if state[key].shape == own[key].shape else own[key] for key in own})
    return net


def build_model(arch, num_classes, dropout=0.0, mean=(0, 0, 0), std=(1, 1, 1), image_size=32, pretrained=False):
    """A Classifier, randomly initialised, in channels_last memory format.

    arch: wrn-D-K (any depth D = 6n + 4, width K), resnetD and resnetDx4 (D = 6n + 2; widths 16-32-64 and 64-128-256),
        preact_resnet18|34, torchvision's resnet18|34|50|101, mobilenet_v2, shufflenet_v2 and densenet121|169, and
        inception_resnet_v2.
    dropout: probability between a block's two convolutions, wrn only.
    mean, std: of each channel of the training images in [0, 1]; the default leaves the images as they are.
    image_size: of the images in pixels; any from 16 up runs. Below 128 torchvision's architectures take their CIFAR
        forms: 3×3 stem of stride 1, no max-pooling, mobilenet_v2's second downsampling left out too.
    pretrained: torchvision's ImageNet weights instead, for image_size from 128 up.
    Raises UsageError for an unknown arch, dropout where the architecture has none, and where weights or size don't fit.
    """
    wide = re.fullmatch(r"wrn-([0-9]+)-([0-9]+)", arch)
    deep = re.fullmatch(r"resnet([0-9]+)(x4)?", arch)
    large = image_size >= 128
    library = functools.partial(library_model, arch, num_classes, pretrained)
    of_library = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "densenet121", "densenet169")
    if dropout and not wide:
        raise UsageError(f"--dropout: {arch} has none; wrn-D-K has")
    if pretrained and not (large and arch in of_library):
        raise UsageError(
            f"--pretrained: {arch} at {image_size} pixels has no weights, {', '.join(of_library)} at 224 have; "
            f"--no-pretrained starts from random ones"
        )
    if wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]) >= 1:
        k, n = int(wide[2]), (int(wide[1]) - 4) // 6
        block = functools.partial(PreActBlock, dropout=dropout)
        blocks = groups(block, (16, 16 * k, 32 * k, 64 * k), (n, n, n))
        head = pooled(nn.BatchNorm2d(64 * k), nn.ReLU(), classifier=nn.Linear(64 * k, num_classes))
        model = Classifier(conv_stem(16), blocks, head, mean, std)
    elif arch in ("preact_resnet18", "preact_resnet34"):
        depths = (2, 2, 2, 2) if arch.endswith("18") else (3, 4, 6, 3)
        blocks = groups(PreActBlock, (64, 64, 128, 256, 512), depths)
        head = pooled(nn.BatchNorm2d(512), nn.ReLU(), classifier=nn.Linear(512, num_classes))
        model = Classifier(conv_stem(64), blocks, head, mean, std)
    elif arch in ("resnet18", "resnet34", "resnet50", "resnet101"):
        net = library()
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool) if large else conv_stem(64, net.bn1, net.relu)
        blocks = [net.layer1, net.layer2, net.layer3, net.layer4]
        model = Classifier(stem, blocks, pooled(classifier=net.fc), mean, std)
    elif deep and int(deep[1]) >= 8 and int(deep[1]) % 6 == 2:
        n = (int(deep[1]) - 2) // 6
        widths = (32, 64, 128, 256) if deep[2] else (16, 16, 32, 64)
        stem = conv_stem(widths[0], nn.BatchNorm2d(widths[0]), nn.ReLU())
        head = pooled(classifier=nn.Linear(widths[-1], num_classes))
        model = Classifier(stem, groups(basic_block, widths, (n, n, n)), head, mean, std)
    elif arch == "mobilenet_v2":
        net = library(dropout=0.0)
        layers = list(net.features)
        if not large:
            layers[0][0].stride = layers[2].conv[1][0].stride = (1, 1)
        blocks = [nn.Sequential(*layers[a:b]) for a, b in ((1, 4), (4, 7), (7, 14), (14, 19))]
        model = Classifier(layers[0], blocks, pooled(classifier=net.classifier), mean, std)
    elif arch == "shufflenet_v2":
        net = torchvision.models.shufflenet_v2_x1_0(num_classes=num_classes)
        if not large:
            net.conv1[0].stride = (1, 1)
        stem = nn.Sequential(net.conv1, net.maxpool) if large else net.conv1
        blocks = [net.stage2, net.stage3, nn.Sequential(net.stage4, net.conv5)]
        model = Classifier(stem, blocks, pooled(classifier=net.fc), mean, std)
    elif arch in ("densenet121", "densenet169"):
        net = library()
        part = net.features
        stem = nn.Sequential(part.conv0, part.norm0, part.relu0, part.pool0)
        blocks = [part.denseblock1]
        blocks += [
            nn.Sequential(part.get_submodule(f"transition{i - 1}"), part.get_submodule(f"denseblock{i}"))
            for i in (2, 3, 4)
        ]
        head = pooled(part.norm5, nn.ReLU(), classifier=net.classifier)
        model = Classifier(stem if large else conv_stem(64, part.norm0, nn.ReLU()), blocks, head, mean, std)
    elif arch == "inception_resnet_v2":
        if image_size < 75:
            raise UsageError(f"--arch: {arch} needs images from 75 pixels up, not {image_size}; resnet50 takes them")
        model = Classifier(*inception_resnet_v2(), pooled(classifier=nn.Linear(1536, num_classes)), mean, std)
    else:
        raise UsageError(f"--arch: {unknown(arch, ARCHS)}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not pretrained:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.image_size = image_size
    return model.to(memory_format=torch.channels_last)


def even_batches(rows, batch_size):
    """Cut index tensor rows [N] into batches of nearly equal size, at most batch_size, each from all over `rows`.

    So that a batch stands for the whole where files are sorted by class.
    """
    count = math.ceil(len(rows) / batch_size)
    return [rows[i::count] for i in range(count)]


def current_statistics(layers):
    """Make these BatchNorm layers normalise by the batch at hand from now on, in evaluation mode too.

    Their running statistics are taken from them, so that nothing can change those.
    """
    for layer in layers:
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None


PASS = {"cpu": 125, "cuda": 500}  # images a forward pass: on a CPU, layers' outputs that stay in its caches


@torch.no_grad()
def predict(model, images, amp=False, batch_size=None):
    """Logits float32 [N, C] of uint8 images [N, 3, H, W], the model in evaluation mode (its mode is put back after).

    batch_size: None takes that of PASS.
    """
    training, device = model.training, images.device.type
    model.eval()
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        parts = even_batches(torch.arange(len(images), device=images.device), batch_size or PASS[device])
        size, rank = (
            TOGETHER if len(parts) >= TOGETHER[0] else (1, 0)
        )  # the processes share the work where it is enough
        mine = [(part, model(to_float(images[part])).float()) for part in parts[rank::size]]
    model.train(training)
    logits = torch.zeros(len(images), mine[0][1].shape[1], device=images.device)
    for part, some in mine:
        logits[part] = some
    return total(logits) if size > 1 else logits


def accuracy(scores, labels, k=1):
    """Top-k accuracy in percent of scores [N, C] for labels int64 [N], as a float."""
    if k == 1:
        return 100 * (scores.argmax(1) == labels).double().mean().item()
    return 100 * (scores.topk(k).indices == labels.unsqueeze(1)).any(1).double().mean().item()


def more_accuracies(model, data, amp, logits, predict=predict):
    """What is reported of photographs besides top-1 accuracy: top-5, and both on further test sets; {} of others.

    logits: of the test images. predict: how they were made of model, images and amp.
    """
    if not isinstance(data.train_images, Photographs) or len(data.classes) < 6:
        return {}
    scores = {"test_top5": accuracy(logits, data.test_labels, 5)}
    for name, (images, labels) in data.more.items():
        logits = predict(model, images, amp)
        scores |= {f"{name}_acc": accuracy(logits, labels), f"{name}_top5": accuracy(logits, labels, 5)}
    return scores


# ------------------------------------------------------------------------------------------------------- training state


@contextlib.contextmanager
def replacing(path, by_all=False):
    """Yield a temporary path beside `path`, renamed over `path` once the block has written it without an error.

    Of several processes that run together only the first renames its file, unless by_all; the others' is deleted.

    Raises UsageError where that cannot be written; `path` is then as it was, and no temporary file is left.
    """
    rank = 0 if by_all else TOGETHER[1]
    partial = path.with_name(f"{path.stem}.partial{rank or ''}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if not rank:
            os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where the disk is full
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"cannot write {path}: {reason}; --out chooses another folder") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load_checkpoint(path, flag="checkpoint"):
    """The dict that `Run` saved at `path`, tensors on the CPU, read without executing pickled code.

    Keys: model and the other parts of the training state; arch, num_classes, classes, dropout, dataset, method, noise
    (kind, rate, seed), config, metrics (one dict an epoch), epoch, rng. Raises UsageError if it is no such file.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not match")
    except FileNotFoundError:
        raise UsageError(f"{flag}: no file {path}; runs/*/checkpoint.pt are checkpoints") from None
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        fault = f"is damaged or no checkpoint ({type(error).__name__})"
        raise UsageError(f"{flag}: {path} {fault}; name the checkpoint.pt of a run folder") from None
    keys = {
        "model",
        "arch",
        "num_classes",
        "classes",
        "dropout",
        "dataset",
        "method",
        "noise",
        "config",
        "metrics",
        "rng",
    }
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys() or not isinstance(checkpoint["config"], dict):
        raise UsageError(f"{flag}: {path} is no checkpoint of these scripts; name the checkpoint.pt of a run folder")
    return checkpoint


def load_model(checkpoint, part="model", device="cpu"):
    """Rebuild the model whose weights are checkpoint[part] ("model", "ema", …), in evaluation mode on `device`."""
    arch = checkpoint.get("archs", {}).get(part, checkpoint["arch"])  # a part may be of another architecture
    size = checkpoint.get("image_size", 32)
    model = build_model(arch, checkpoint["num_classes"], checkpoint["dropout"], image_size=size)
    model.load_state_dict(checkpoint[part])
    return model.to(device).eval()


class Run:
    """A run folder: config.json, metrics.jsonl, checkpoint.pt and curves.png, and what is printed on the way.

    A script's loop reads

        run = Run(args, device, method=..., arch=..., classes=..., model=model, optimizer=optimizer, ...)
        for epoch in range(run.epoch, args.epochs):
            for index, images in run.progress(data.train_images, batches(...)):
                ...
            run.end_epoch(losses, lr=..., test_acc=...)
        run.finish()

    tag is what else the folder's name should tell; epochs their number, if not args.epochs. The other keyword arguments
    are the parts whose state_dict() goes into the checkpoint. With --resume they
    are loaded from it, with the random states, and run.epoch is the number of epochs done. Raises UsageError where the
    folder holds something that would be lost, or --resume finds nothing, or a run of another configuration.
    """

    # flags that may differ between a run and its continuation
    SAME_RUN = frozenset(("out", "resume", "device", "data_dir", "amp", "compile", "workers", "seeds_per_rank"))

    def __init__(self, args, device, method, arch, classes, dropout=0.0, tag="", epochs=None, **parts):
        noise = args.noise if args.rate is None or args.noise == "none" else f"{args.noise}{args.rate:g}"
        noise = "clean" if args.noise == "none" else noise
        name = [method, data_name(args.dataset), noise, tag, f"seed{args.seed}"]
        args.out = args.out or Path("runs") / "-".join(filter(None, name))
        self.folder, self.device, self.epochs, self.parts = args.out, device, epochs or args.epochs, parts
        self.path = self.folder / "checkpoint.pt"
        config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        self.header = {
            "arch": arch, "num_classes": len(classes), "classes": list(classes), "dropout": dropout,
            "dataset": args.dataset, "method": method, "config": config,
            "noise": {"kind": args.noise, "rate": args.rate, "seed": args.seed},
            "image_size": next((part.image_size for part in parts.values() if isinstance(part, Classifier)), 32),
        }  # fmt: skip
        self.metrics, differs = [], []
        saved = load_checkpoint(self.path, "--resume" if args.resume else "--out") if self.path.is_file() else None
        if saved:
            old, keys = saved["config"], sorted((config.keys() | saved["config"].keys()) - self.SAME_RUN)
            differs = [f"{k} ({old.get(k)} there, {config.get(k)} here)" for k in keys if old.get(k) != config.get(k)]
        changes = ", ".join(differs)
        if args.resume and not saved and not SWEEPING:
            raise UsageError(f"--resume: no checkpoint.pt in {self.folder}; leave --resume out to start that run")
        if args.resume and differs:
            raise UsageError(f"--resume: the run in {self.folder} differs in {changes}; give it the same flags")
        if not args.resume and differs:
            raise UsageError(
                f"--out: {self.folder} already holds another run: {changes}; --out DIR starts one elsewhere"
            )
        if not args.resume and saved:
            hint = "--resume continues it, --out DIR starts one elsewhere"
            raise UsageError(f"--out: {self.folder} already holds this run; {hint}")
        if not saved and self.folder.is_dir() and any(".partial" not in p.name for p in self.folder.iterdir()):
            raise UsageError(f"--out: {self.folder} is not empty; name a new folder")

        print(textwrap.fill(" ".join(f"{k}={v}" for k, v in config.items()), 120, break_on_hyphens=False), flush=True)
        if saved:
            try:
                for key, part in parts.items():
                    part.load_state_dict(saved[key])
            except (KeyError, RuntimeError, ValueError) as error:
                raise UsageError(f"--resume: {self.path} does not fit this script ({type(error).__name__})") from None
            self.metrics = saved["metrics"]
            torch.set_rng_state(saved["rng"]["cpu"])
            if device.type == "cuda" and "cuda" in saved["rng"]:
                torch.cuda.set_rng_state(saved["rng"]["cuda"], device)
            print(f"resuming {self.folder} after epoch {len(self.metrics)} of {self.epochs}", flush=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "--out chooses another folder"
            raise UsageError(f"cannot write {self.folder}: {error.strerror}; {hint}") from None
        self.began, self.done_before = None, len(self.metrics)
        if TOGETHER[0] > 1:
            act_as_one(parts["optimizer"], [part for part in parts.values() if isinstance(part, nn.Module)])
            wait()  # until all have looked at the folder
        self.rng = self.rng_states()  # as an epoch finds it, before it draws its order

    @property
    def epoch(self):
        """Number of finished epochs."""
        return len(self.metrics)

    def rng_states(self):
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def write_text(self, name, text):
        if TOGETHER[1]:
            return
        with replacing(self.folder / name) as partial:
            partial.write_text(text + "\n" if text else "", encoding="utf-8")

    def save(self):
        """Write checkpoint.pt, then metrics.jsonl, which is always the checkpoint's list of metrics."""
        began = time.perf_counter()
        if not TOGETHER[1]:
            state = {key: part.state_dict() for key, part in self.parts.items()}
            with replacing(self.path) as partial:
                state |= {"metrics": self.metrics, "epoch": self.epoch, "rng": self.rng}
                torch.save({**self.header, **state}, partial)
        self.write_text("metrics.jsonl", "\n".join(map(json.dumps, self.metrics)))
        self.saved, self.saved_epoch = time.perf_counter(), self.epoch
        self.save_seconds = self.saved - began

    def progress(self, images, batches):
        """Yield (index, images[index]) for the index tensors `batches`, as `fetch` does; on a terminal keep a line with
        images/s and time left up to date.
        """
        size, rank = TOGETHER
        if rank:  # draws of its own, and none that a checkpoint would have to hold
            torch.manual_seed(hash((self.header["config"]["seed"], self.epoch, rank)) % 2**63)
        self.epoch_began, shown, count = time.perf_counter(), 0.0, 0
        parts = fetch(images, batches)
        parts = itertools.chain([next(parts)], parts)
        if self.began is None:  # nothing is written before there is something to learn from
            self.save()
            self.write_text("config.json", json.dumps(self.header["config"], indent=2))
            self.began = self.drawn = time.perf_counter()
        for step, (index, part) in enumerate(parts):
            yield index, part
            count += len(index) * size
            now = time.perf_counter()
            if sys.stdout.isatty() and now - shown > 0.2:
                shown, speed = now, count / (now - self.epoch_began)
                done = self.epoch - self.done_before + (step + 1) / len(batches)
                left = duration((now - self.began) * (self.epochs - self.done_before - done) / done)
                where = f"epoch {self.epoch + 1}/{self.epochs}  step {step + 1}/{len(batches)}"
                print(f"\r{where}  {speed:,.0f} images/s  {left} left\x1b[K", end="", flush=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.images_per_second = count / (time.perf_counter() - self.epoch_began)

    def end_epoch(self, losses, **metrics):
        """Record an epoch: check the losses, save the checkpoint (of large models not every time), print a line.

        losses: the loss of every step, a list of scalar tensors, left on the device until now. metrics: floats or None.
        A loss or weight that is not finite ends the program with status 1 and leaves the last checkpoint.
        """
        losses = torch.stack(losses).float()
        average([losses])
        losses = losses.cpu()
        bad = (~losses.isfinite()).nonzero().flatten()
        if len(bad):
            step = f"step {bad[0] + 1} of epoch {self.epoch + 1}"
            held = f"{self.path} holds epoch {self.saved_epoch}"
            sys.exit(1 if TOGETHER[1] else f"error: the loss is {losses[bad[0]]:.0f} at {step}; {held}; lower --lr")
        state = [v for part in self.parts.values() if isinstance(part, nn.Module) for v in part.state_dict().values()]
        if not torch.stack([v.isfinite().all() for v in state]).all():
            held = f"{self.path} holds epoch {self.saved_epoch}"
            sys.exit(1 if TOGETHER[1] else f"error: weights are not finite after epoch {self.epoch + 1}; {held}")
        record = {"epoch": self.epoch + 1, **metrics, "train_loss": losses.mean().item()}
        record["images_per_second"] = round(self.images_per_second, 1)
        record["seconds"] = round(time.perf_counter() - self.epoch_began, 2)
        self.metrics.append(record)
        self.rng, now = self.rng_states(), time.perf_counter()
        if self.save_seconds < 0.2 or now - self.saved > 20 * self.save_seconds or self.epoch == self.epochs:
            self.save()  # where that is slow, it may take a twentieth of the run
        if now - self.drawn > 60:
            self.drawn = now
            plot_curves(self.folder / "curves.png", self.metrics, self.folder.name)
        left = (now - self.began) / (self.epoch - self.done_before) * (self.epochs - self.epoch)
        columns = [f"epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}", f"loss {record['train_loss']:.4f}"]
        columns += [f"{COLUMNS[k]} {v:5.2f}" for k, v in metrics.items() if k in COLUMNS and v is not None]
        columns += [f"{record['images_per_second']:,.0f} images/s", f"{duration(left)} left"]
        start, end = ("\r", "\x1b[K") if sys.stdout.isatty() else ("", "")
        print(start + "  ".join(columns) + end, flush=True)

    def finish(self):
        """Draw curves.png and print the last line: final and best test accuracy, and the folder."""
        wait()  # until the checkpoint is written
        plot_curves(self.folder / "curves.png", self.metrics, self.folder.name)
        best = max(self.metrics, key=lambda record: record["test_acc"])
        final = self.metrics[-1]
        if self.header["method"] != "teacher":
            FINISHED.append((self.folder, final))
        count_unreadable()
        others = [k for k in COLUMNS if k != "test_acc" and not k.startswith("train") and final.get(k) is not None]
        if self.device.type == "cuda":
            print(f"peak device memory {torch.cuda.max_memory_allocated(self.device) / 2**30:.2f} GiB")
        beside = f" ({', '.join(f'{COLUMNS[k]} {final[k]:.2f} %' for k in others)})" if others else ""
        print(
            f"final test accuracy {final['test_acc']:.2f} %{beside} after epoch {final['epoch']}, "
            f"best {best['test_acc']:.2f} % after epoch {best['epoch']}: {self.folder}"
        )


def load_teacher(args, run, data, labels, milestones, dropout=0.0, **recipe):
    """The teacher in --teacher, or a standard one, trained by cross-entropy now or by an earlier run.

    run: the student's Run, whose checkpoints will name the teacher. data: the Dataset. labels: int64 [N], the training
    labels as the student is given them. A teacher is trained by SGD with the student's epochs, batch size, lr and
    weight decay, `milestones` (epochs after which lr falls to a fifth; None: to a tenth where the test loss has not
    fallen for ten), crops padded by reflection, and flips; `dropout` is its network's. recipe: epochs, lr, weight_decay
    and optimizer ("sgd" or "adam"), where they are other ones. It stays in runs/teachers, in a folder named by a digest
    of all that, images and labels included. Of --teacher-seeds K, seeds 0 … K-1, the one with the highest test accuracy
    teaches.
    Returns the model in evaluation mode, without gradients. The student's random states are as if it had been there.
    Raises UsageError for a --teacher of other classes, another data set or another dropout.
    """
    if args.teacher:
        path, checkpoint = args.teacher, load_checkpoint(args.teacher, "--teacher")
        size = checkpoint.get("image_size", data.image_size)
        there = (data_name(checkpoint["dataset"]), checkpoint["classes"], checkpoint["dropout"], size)
        here = (data_name(args.dataset), list(data.classes), dropout, data.image_size)
        for what, theirs, ours in zip(("data set", "classes", "dropout", "image size"), there, here):
            if theirs != ours:
                theirs, ours = (textwrap.shorten(str(value), 60) for value in (theirs, ours))
                raise UsageError(f"--teacher: {path} has {what} {theirs}, not {ours}; leave it out to train one")
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        if not args.teacher:
            seeds = range(args.teacher_seeds)
            trained = []
            for seed in seeds:
                own = teacher_arguments(args, data, labels, milestones, dropout, seed, recipe)
                with contextlib.nullcontext() if TOGETHER[1] else locked(own.out):
                    wait()  # until the first process has the lock, so that all see the same
                    trained.append(train_teacher(own, run.device, data, labels))
                    wait()
            path, checkpoint = max(trained, key=lambda teacher: teacher[1]["metrics"][-1]["test_acc"])
        teacher = load_model(checkpoint, "model", run.device).requires_grad_(False)
    run.header["teacher"] = str(path)
    print(f"teacher: {path}, test accuracy {checkpoint['metrics'][-1]['test_acc']:.2f} %", flush=True)
    return teacher


def fingerprint(images):
    """Bytes that tell image sets apart: the pixels; of Photographs the files' names and sizes, and how they are cut."""
    if not isinstance(images, Photographs):
        return images.cpu().numpy().tobytes()
    sizes = (os.path.getsize(path) if os.path.exists(path) else -1 for path in images.paths)
    files = [(*Path(path).parts[-2:], size) for path, size in zip(images.paths, sizes)]
    return json.dumps([images.resize, images.side, files]).encode()


def teacher_arguments(args, data, labels, milestones, dropout, seed, recipe):
    """What determines a teacher, and in `out` the folder named after that."""
    flags = "dataset data_dir noise rate limit_train limit_test epochs batch_size lr weight_decay device amp compile"
    flags += " resize image_size" if of_photographs(args.dataset) else ""
    own = argparse.Namespace(**{flag: getattr(args, flag) for flag in flags.split()})
    own.arch, own.dropout, own.milestones, own.seed = args.teacher_arch, dropout, milestones, seed
    vars(own).update({"optimizer": "sgd", **recipe})
    own.data = hashlib.sha256(fingerprint(data.train_images) + labels.cpu().numpy().tobytes()).hexdigest()
    identity = {flag: value for flag, value in vars(own).items() if flag not in Run.SAME_RUN}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    own.out = Path("runs/teachers") / f"{own.arch}-{data_name(own.dataset)}-dropout{dropout:g}-seed{seed}-{digest}"
    return own


def train_teacher(own, device, data, labels):
    """Train a teacher, go on with it, or find it done: the path of its checkpoint, and the checkpoint."""
    path = own.out / "checkpoint.pt"
    own.resume = path.is_file()
    if own.resume:
        checkpoint = load_checkpoint(path, "teacher")
        if checkpoint["epoch"] == own.epochs:
            return path, checkpoint
    print(f"training a teacher first; it stays in {own.out} for later runs", flush=True)
    torch.manual_seed(own.seed)
    model = build_model(own.arch, len(data.classes), own.dropout, image_size=data.image_size).to(device)
    if own.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), own.lr, momentum=0.9, weight_decay=own.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), own.lr, weight_decay=own.weight_decay)
    if own.milestones:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, own.milestones, gamma=0.2)
    else:
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=10)
    run = Run(
        own, device, method="teacher", arch=own.arch, classes=data.classes, dropout=own.dropout,
        model=model, optimizer=optimizer, scheduler=scheduler,
    )  # fmt: skip
    if own.compile:
        model.compile()
    for _ in range(run.epoch, own.epochs):
        model.train()
        lr, losses = optimizer.param_groups[0]["lr"], []
        for index, images in run.progress(data.train_images, batches(len(labels), own.batch_size, device)):
            x = crop_flip(to_float(images), mode="reflect")
            with torch.autocast(device.type, torch.bfloat16, enabled=own.amp):
                loss = F.cross_entropy(model(x).float(), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        logits = predict(model, data.test_images, own.amp)
        test_loss = F.cross_entropy(logits, data.test_labels)
        average([test_loss])
        scheduler.step(*[] if own.milestones else [test_loss.item()])
        more = more_accuracies(model, data, own.amp, logits)
        run.end_epoch(losses, lr=lr, test_acc=accuracy(logits, data.test_labels), **more)
    run.finish()
    return path, load_checkpoint(path, "teacher")


# ------------------------------------------------------------------------------------------------------------ reporting

COLUMNS = {  # metric: its heading in the line printed each epoch
    "test_acc": "test", "ema_test_acc": "EMA", "ensemble_test_acc": "ensemble",
    "test_top5": "top-5", "imagenet_acc": "ImageNet", "imagenet_top5": "top-5",
    "test_acc_A": "A", "test_acc_B": "B", "val_acc": "validation",
    "test_acc_current": "current", "test_acc_running": "running", "test_acc_adjusted": "adjusted",
    "train_acc_right": "right", "train_acc_wrong": "wrong",
}  # fmt: skip
LEGENDS = {
    "test_acc": "test",
    "ema_test_acc": "test, EMA",
    "test_top5": "test, top-5",
    "imagenet_acc": "ImageNet",
    "imagenet_top5": "ImageNet, top-5",
    "ensemble_test_acc": "test, ensemble",
    "test_acc_A": "test, A",
    "test_acc_B": "test, B",
    "val_acc": "validation",
    "test_acc_current": "test, current statistics",
    "test_acc_running": "test, running statistics",
    "test_acc_adjusted": "test, re-estimated statistics",
    "train_acc_right": "rightly labelled samples: the label",
    "train_acc_wrong": "wrongly labelled samples: the wrong label (memorised)",
    "train_acc_wrong_true": "wrongly labelled samples: the true label",
}


def duration(seconds):
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def label_accuracies(predicted, noisy, true):
    """How an epoch's predictions agree with the labels, in percent; None where there is no such sample.

    predicted: int64 [N], the class predicted for each training sample (-1: not seen). noisy, true: int64 [N].
    train_acc_right: rightly labelled samples given their label. train_acc_wrong: wrongly labelled samples given their
    wrong label, which is memorisation. train_acc_wrong_true: wrongly labelled samples given their true class.
    """
    seen, wrong = total(predicted, "MAX") >= 0, noisy != true

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
    confidence, predicted = probabilities.double().max(1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin i is (i / bins, (i + 1) / bins]
    hit = (predicted == labels).double()
    size = torch.bincount(which, minlength=bins).double()
    acc = torch.bincount(which, hit, minlength=bins) / size.clamp(min=1)
    conf = torch.bincount(which, confidence, minlength=bins) / size.clamp(min=1)
    ece = (size / len(labels) * (acc - conf).abs()).sum().item()
    return ece, acc.tolist(), conf.tolist(), (size / len(labels)).tolist()


def plot_curves(path, metrics, title):
    """Draw test accuracy, accuracy on training labels, loss and learning rate over the epochs to `path` (PNG)."""
    from matplotlib.figure import Figure  # half a second to import, and only here

    if not metrics or TOGETHER[1]:
        return
    epochs = [record["epoch"] for record in metrics]
    shown = [key for key in LEGENDS if metrics[-1].get(key) is not None]
    panels = {"test": "test accuracy (%)", "train": "share of training samples predicted as … (%)", "loss": "loss"}
    if not any(key.startswith("train") for key in shown):
        del panels["train"]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = dict(zip(panels, figure.subplots(1, len(panels))))
    for key in shown:
        axes["train" if key.startswith("train") else "test"].plot(
            epochs, [record[key] for record in metrics], ".-", label=LEGENDS[key]
        )
    axes["loss"].plot(epochs, [record["train_loss"] for record in metrics], ".-", label="training loss")
    for name, panel in axes.items():
        panel.set(xlabel="epoch", ylabel=panels[name])
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    rate = axes["loss"].twinx()
    rate.plot(epochs, [record["lr"] for record in metrics], "k:", drawstyle="steps-post", label="learning rate (right)")
    rate.set(yscale="log" if metrics[-1]["lr"] > 0 else "linear", ylabel="learning rate")
    axes["test"].legend(fontsize="small")
    if "train" in axes:
        axes["train"].set(ylim=(-2, 135), yticks=range(0, 101, 20))
        axes["train"].legend(fontsize="small", loc="upper center")
    lines = axes["loss"].get_lines() + rate.get_lines()
    axes["loss"].legend(lines, [line.get_label() for line in lines])
    with replacing(Path(path)) as partial:
        figure.savefig(partial, dpi=110)
