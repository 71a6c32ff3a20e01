"""Speed, side by side in one run: ours and what a user would otherwise pick, interleaved, medians after a warm-up.

    python tests/benchmark.py [augment|corrupt|attack|leaves|train|photographs|all] [--device …] [--repeats 5]

Peers: torchvision is there; `pip install -r tests/benchmark-requirements.txt` for kornia, imagecorruptions and
torchattacks. A peer that is missing, or fails under the installed libraries, is named in a line and left out.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import common
import evaluate
import kd_zoo
import noise_data_free_kd
import nrd
from common import to_float

GENERATOR = 26  # dead-leaves images (32×32) a second and core of the public generator, which is no package


def speed(function, device):
    """Items a second of one call; the function returns how many items it has done."""
    start = time.perf_counter()
    count = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - start)


def compare(work, ours, peers, args):
    """Print a row for each peer: the median of its speed and of ours, measured in turn."""
    functions = {"ours": ours, **peers}
    measured = {name: [] for name in functions}
    for repeat in range(args.repeats + 1):
        for name, function in functions.items():
            value = speed(function, args.device)
            if repeat:  # the first is the warm-up
                measured[name].append(value)
    median = {name: statistics.median(values) for name, values in measured.items()}
    for name in peers:
        ratio = median["ours"] / median[name]
        print(f"| {work} | {median['ours']:,.0f} | {name} | {median[name]:,.0f} | {ratio:.2f} |", flush=True)
    return median["ours"]


def peer(name):
    """The package, or None and a line."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever an old package makes of new libraries
        print(f"(without {name}: {error})")
        return None


def version(name):
    return f"{name} {importlib.metadata.version(name)}"


class PerSample(torch.utils.data.Dataset):
    """A transform applied to one image at a time, as DataLoader workers do."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def loader(images, labels, transform, batch_size=128, shuffle=False):
    workers = {"num_workers": os.cpu_count(), "persistent_workers": True}
    pinned = torch.cuda.is_available()
    data = PerSample(images, labels, transform)
    return torch.utils.data.DataLoader(data, batch_size, shuffle, drop_last=True, pin_memory=pinned, **workers)


def augment(args):
    images, labels = common.draw_shapes(2048, seed=0)
    resident = images.to(args.device)

    def batched(function):
        def run():
            for part in resident.split(128):
                function(to_float(part))
            return len(resident)

        return run

    def per_sample(*transforms):
        to = v2.Compose([*transforms, v2.ToDtype(torch.float32, scale=True)])
        batches = loader(images, labels, to)

        def run():
            for x, _ in batches:
                x.to(args.device, non_blocking=True)
            return len(images)

        return run

    crop = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    works = {
        "AugMix": (common.aug_mix, [v2.AugMix()], None),
        "RandAugment": (lambda x: common.rand_augment(x, 1, 3), [v2.RandAugment(1, 3)], "RandAugment"),
        "AutoAugment": (common.auto_augment, [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)], "AutoAugment"),
        "crop and flip": (common.crop_flip, crop, "crop"),
    }
    kornia = peer("kornia.augmentation")
    for work, (ours, theirs, name) in works.items():
        peers = {f"{version('torchvision')} v2, {os.cpu_count()} workers": per_sample(*theirs)}
        if kornia and name:
            other = {
                "RandAugment": lambda: kornia.auto.RandAugment(1, 3),
                "AutoAugment": lambda: kornia.auto.AutoAugment("cifar10"),
                "crop": lambda: torch.nn.Sequential(
                    kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip()
                ),
            }[name]()
            peers[f"{version('kornia')}, batched"] = batched(other)
        compare(f"{work}, images/s", batched(ours), peers, args)


def corrupt(args):
    library = peer("imagecorruptions")
    if not library:
        return
    images, _ = common.draw_shapes(1000, seed=0)
    resident, few = images.to(args.device), [image.permute(1, 2, 0).numpy() for image in images[:20]]
    works = []
    for name in evaluate.CORRUPTIONS:
        try:
            library.corrupt(few[0], corruption_name=name, severity=3)
            works.append(name)
        except Exception as error:
            print(f"(imagecorruptions cannot do {name} here: {str(error)[:60]})")

    def ours():
        for name in works:
            evaluate.corrupt(resident, name, 3)
        return len(images) * len(works)

    def theirs():
        for name in works:
            for image in few:
                library.corrupt(image, corruption_name=name, severity=3)
        return len(few) * len(works)

    what = f"CIFAR-C, {len(works)} corruptions, severity 3, images/s"
    compare(what, ours, {f"{version('imagecorruptions')}, one core": theirs}, args)


def attack(args):
    library = peer("torchattacks")
    if not library:
        return
    images, labels = (part.to(args.device) for part in common.draw_shapes(2000, seed=0))
    net = common.build_model("wrn-10-1", 10).to(args.device)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(4):  # so that there is something to attack
        for index in torch.randperm(2000, device=args.device).split(32):
            loss = F.cross_entropy(net(to_float(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval().requires_grad_(False)
    x, y = to_float(images[:500]), labels[:500]
    test = common.Dataset(images[:1], labels[:1], images[:500], labels[:500], common.SHAPES_CLASSES)
    flags = argparse.Namespace(pgd=[20], restarts=1, seed=0, step_size=0.003)
    size = common.EVAL_BATCH[args.device.type]
    theirs = library.PGD(net, eps=0.031, alpha=0.003, steps=20)

    def ours_whole():
        for part, truth in zip(x.split(size), y.split(size)):
            evaluate.pgd(net, part, truth)
        return len(x)

    def ours():
        subject = evaluate.Subject("", Path(), "", {}, net, "shapes", test, size)
        evaluate.evaluate_pgd(subject, 0.031, flags)
        return len(x)

    def peers():
        adversarial = theirs(x, y)
        with torch.no_grad():
            (net(adversarial).argmax(1) == y).float().mean().item()
        return len(x)

    name = version("torchattacks")
    compare("accuracy under PGD-20, images/s", ours, {name: peers}, args)
    compare("PGD-20 to the last step, images/s", ours_whole, {name: lambda: (theirs(x, y), len(x))[1]}, args)


def leaves(args):
    count = 2**14 if args.device.type == "cuda" else 256
    generator = torch.Generator(args.device).manual_seed(0)

    def ours():
        noise_data_free_kd.dead_leaves(count, 32, generator, args.device)
        return count

    ours_speed = compare("", ours, {}, args)
    print(f"| dead leaves 32×32, images/s | {ours_speed:,.0f} | public generator, one core | {GENERATOR} | "
          f"{ours_speed / GENERATOR:.0f} |")  # fmt: skip


class Bytes(TorchDispatchMode):
    """Counts what the operations read and write, each tensor of each operation once; views are free."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return result


def ceiling(device, dtype):
    """FLOP/s of a large matmul and bytes/s of a large copy: what the hardware allows."""
    big = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    flops = []
    for size in (1024, 2048, 4096, 8192)[: 4 if device.type == "cuda" else 3]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        flops += [speed(lambda a=a, b=b: (a @ b, 2 * len(a) ** 3)[1], device) for _ in range(6)]
    copied = [speed(lambda: (big.clone(), 2 * len(big))[1], device) for _ in range(6)]
    return max(flops), max(copied)


def race(args, work, archs, augmentation, loss, plain_transform, plain_loss, batch_size=128):
    """A training step of ours against a plain loop, and its share of what the hardware allows.

    archs: of the net that learns and of the one that teaches. augmentation: x -> the two nets' views. loss, plain_loss:
    of the logits of the learning net, those of the teaching one, and the labels.
    """
    device, cuda = args.device, args.device.type == "cuda"
    images, labels = common.draw_shapes(batch_size * (40 if cuda else 1), seed=0)
    resident, resident_labels = images.to(device), labels.to(device)

    def fresh(memory_format=torch.channels_last, compiled=False):
        student, teacher = (common.build_model(a, 10).to(device, memory_format=memory_format) for a in archs)
        optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        if compiled:
            student.compile()
            teacher.compile()
        return student.train(), teacher.eval().requires_grad_(False), optimizer

    def step(student, teacher, optimizer, x, y):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            for_student, for_teacher = augmentation(to_float(x))
            with torch.no_grad():
                T = teacher(for_teacher).float()
            value = loss(student(for_student).float(), T, y)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.detach()

    def ours(nets):
        def run():
            order = torch.randperm(len(images), device=device).split(batch_size)
            losses = [step(*nets, resident[index], resident_labels[index]) for index in order]
            torch.stack(losses).cpu()
            return len(images)

        return run

    batches = loader(images, labels, plain_transform, batch_size, shuffle=True)
    student, teacher, optimizer = fresh(torch.contiguous_format)

    def theirs():
        for x, y in batches:
            (x, view), y = (x if isinstance(x, list) else (x, x)), y.to(device)
            S = student(x.to(device))
            with torch.no_grad():
                T = teacher(view.to(device))
            value = plain_loss(S, T, y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            value.item()
        return len(images)

    nets = fresh()
    peers = {f"plain float32 NCHW loop, DataLoader of {os.cpu_count()} workers": theirs}
    peers["ours with --compile"] = ours(fresh(compiled=True))
    speed_ours = compare(f"{work}, batch {batch_size}, images/s", ours(nets), peers, args)

    x, y = resident[:batch_size], resident_labels[:batch_size]
    with FlopCounterMode(display=False) as counter:
        step(*nets, x, y)
    with Bytes() as moved:
        step(*nets, x, y)
    augmented = statistics.median(speed(lambda: (augmentation(to_float(x)), batch_size)[1], device) for _ in range(9))
    flops, copied = ceiling(device, torch.bfloat16 if cuda else torch.float32)
    flop, byte = counter.get_total_flops() / batch_size, moved.total / batch_size
    print(f"  of a step, augmentation takes {100 * speed_ours / augmented:.0f} %; {flop / 1e9:.2f} GFLOP and "
          f"{byte / 1e6:.0f} MB an image are {100 * speed_ours * flop / flops:.0f} % of a matmul's {flops / 1e12:.2f} "
          f"TFLOP/s and {100 * speed_ours * byte / copied:.0f} % of a copy's {copied / 1e9:.0f} GB/s")  # fmt: skip
    if cuda:
        print(f"  peak device memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB, all of the above")


def train(args):
    """Hinton's step, WRN-40-2 → WRN-16-2, and NRD's with PreActResNet-34: ours and as repositories write them."""

    def hinton(S, T, y):
        return 0.1 * F.cross_entropy(S, y) + 0.9 * kd_zoo.hinton_loss(S, T, 4.0)

    def plain_hinton(S, T, y):
        kl = F.kl_div(F.log_softmax(S / 4, 1), F.softmax(T / 4, 1), reduction="batchmean")
        return 0.1 * F.cross_entropy(S, y) + 0.9 * 16 * kl

    def js(S, T, y):
        y = F.one_hot(y, S.shape[1]).float()
        return nrd.js_divergence((y, S.softmax(1), T.softmax(1)), (0.2, 0.6, 0.2)).mean()

    def plain_js(S, T, y):
        y, weights = F.one_hot(y, S.shape[1]).float(), (0.2, 0.6, 0.2)
        distributions = [p.clamp(1e-7, 1) for p in (y, F.softmax(S, 1), F.softmax(T, 1))]
        mean = sum(w * p for w, p in zip(weights, distributions)).log()
        return sum(w * F.kl_div(mean, p, reduction="batchmean") for w, p in zip(weights, distributions))

    def same(x):
        x = common.crop_flip(x, mode="reflect")
        return x, x

    def two_views(x):
        return nrd.student_view(x, "paper", 32), nrd.teacher_view(x, 32)

    crop, to_tensor = v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.ToDtype(torch.float32, scale=True)
    flip = v2.RandomHorizontalFlip()
    erase = v2.RandomErasing(1.0, scale=(25 / 1024,) * 2, ratio=(1, 1))
    student_view = v2.Compose([v2.RandAugment(1, 3), v2.RandomCrop(32, padding=4), flip, to_tensor, erase])
    teacher_view = v2.Compose([v2.AugMix(), to_tensor])

    def both(image):
        return [student_view(image), teacher_view(image)]

    plain = v2.Compose([crop, flip, to_tensor])
    race(args, "Hinton WRN-40-2 → WRN-16-2", ("wrn-16-2", "wrn-40-2"), same, hinton, plain, plain_hinton)
    race(args, "NRD PreActResNet-34", ("preact_resnet34", "preact_resnet34"), two_views, js, both, plain_js)


def photographs(args):
    """An epoch of random resized crops of 224 pixels and flips, of 500×375 JPEG files, decoded before or each time."""
    workers, size = os.cpu_count(), 64
    images, labels = common.draw_shapes(512, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        large = F.interpolate(to_float(images), (375, 500), mode="bilinear")
        for i, (image, label) in enumerate(zip(large, labels.tolist())):
            path = Path(folder) / "test" / f"class{label}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            v2.functional.to_pil_image((image + 0.03 * torch.randn_like(image)).clamp(0, 1)).save(path, quality=90)
        (Path(folder) / "train").symlink_to(Path(folder) / "test")
        data = common.load_dataset(f"imagefolder:{folder}", Path(folder) / "data", device=args.device)
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        transforms = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *to_tensor]
        plain = torchvision.datasets.ImageFolder(f"{folder}/train", v2.Compose(transforms))
        options = {"num_workers": workers, "persistent_workers": True, "pin_memory": args.device.type == "cuda"}
        batches = torch.utils.data.DataLoader(plain, size, shuffle=True, drop_last=True, **options)

        def ours():
            for index in torch.randperm(len(images), device=args.device).split(size):
                common.crop_flip(common.random_resized_crop(data.batch(index), 224), padding=0)
            return len(images)

        def theirs():
            for x, _ in batches:
                x.to(args.device, non_blocking=True)
            return len(images)

        peers = {f"ImageFolder and DataLoader, {workers} workers": theirs}
        compare("photographs, random resized crop and flip, images/s", ours, peers, args)


WORKS = {"augment": augment, "corrupt": corrupt, "attack": attack, "leaves": leaves, "train": train,
         "photographs": photographs}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", default="all", choices=[*WORKS, "all"])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.processor() or "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, {version('torch')}, Python {platform.python_version()}")
    print("| work | ours | peer | its speed | ratio |\n|---|---|---|---|---|")
    for work in WORKS if args.work == "all" else [args.work]:
        torch.manual_seed(0)
        WORKS[work](args)


if __name__ == "__main__":
    main()
