"""Speed in one run: ours and what a user would otherwise pick, in turns. Medians after a warm-up.

    python tests/benchmark.py [augment|corrupt|attack|leaves|train|photographs|all] [--device …] [--repeats 5]
    python tests/benchmark.py compiled  # training steps with torch.compile and without; minutes
    python tests/benchmark.py kernels   # operations that a step starts on a GPU, counted without one
    python tests/benchmark.py scaling   # seconds per epoch by images, batch size, threads: scaling.png

torchvision is there. `pip install -r tests/benchmark-requirements.txt` installs the other peers: kornia,
imagecorruptions and torchattacks. A peer that is missing, or fails with the installed libraries, is named and
left out.
"""

import argparse
import contextlib
import importlib
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import torchvision
from conftest import load_script
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import common
import evaluate
import kd_zoo
import noise_data_free_kd
import nrd
from common import to_float

GENERATOR = 26  # dead-leaves images (32×32) per second and core of the public generator, which is no package
WORKERS = os.cpu_count()


def compare(work, ours, peers, args):
    """Print a row for each peer: medians of items per second. Functions return a number of items.

    Returns our median.
    """
    measured = {name: [] for name in ("ours", *peers)}
    for _ in range(args.repeats + 1):
        for name, function in {"ours": ours, **peers}.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):  # progress, which is no part of the table
                count = function()
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            measured[name].append(count / (time.perf_counter() - start))
    median = {
        name: statistics.median(values[1:]) for name, values in measured.items()
    }  # the first is the warm-up
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


class PerSample(torch.utils.data.TensorDataset):
    """Images and labels, with a transform applied to one image at a time, as DataLoader workers do."""

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return self.transform(image), label


def loader(data, transform, batch_size, device):
    data.transform = transform
    options = {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": device.type == "cuda"}
    return torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True, **options)


def drain(batches, device):
    def run():
        for x, _ in batches:
            x.to(device, non_blocking=True)
        return len(batches) * batches.batch_size

    return run


def augment(args):
    images, labels = common.draw_shapes(2048, seed=0)
    resident = images.to(args.device)

    def batched(function):
        def run():
            for part in resident.split(128):
                function(to_float(part))
            return len(resident)

        return run

    kornia = peer("kornia.augmentation")
    others = {"kornia, batched": batched(kornia.auto.RandAugment(1, 3))} if kornia else {}
    for work, ours, theirs, more in (
        ("AugMix", common.aug_mix, v2.AugMix(), {}),
        ("RandAugment", lambda x: common.rand_augment(x, 1, 3), v2.RandAugment(1, 3), others),
    ):
        transform = v2.Compose([theirs, v2.ToDtype(torch.float32, scale=True)])
        batches = loader(PerSample(images, labels), transform, 128, args.device)
        peers = {f"torchvision v2, DataLoader of {WORKERS} workers": drain(batches, args.device), **more}
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
    compare(what, ours, {"imagecorruptions, one core": theirs}, args)


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
    flags = argparse.Namespace(pgd=[20], restarts=1, seed=0, step_size=0.003, worst_start=False)
    pgd, size = library.PGD(net, eps=0.031, alpha=0.003, steps=20), common.EVAL_BATCH[args.device.type]

    def ours():
        evaluate.evaluate_pgd(evaluate.Subject("", {}, net, "shapes", test, size), 0.031, flags)
        return len(x)

    def to_the_last_step():
        for part, true in zip(x.split(size), y.split(size)):
            evaluate.pgd(net, part, true)
        return len(x)

    def theirs_to_the_last_step():
        pgd(x, y)
        return len(x)

    def theirs():
        adversarial = pgd(x, y)
        with torch.no_grad():
            (net(adversarial).argmax(1) == y).float().mean().item()
        return len(x)

    compare("accuracy under PGD-20, images/s", ours, {"torchattacks": theirs}, args)
    compare(
        "PGD-20 to the last step, images/s", to_the_last_step, {"torchattacks": theirs_to_the_last_step}, args
    )


def leaves(args):
    count = 2**14 if args.device.type == "cuda" else 256

    def ours():
        noise_data_free_kd.dead_leaves(count, 32, args.device)
        return count

    speed = compare("", ours, {}, args)
    print(
        f"| dead leaves 32×32, images/s | {speed:,.0f} "
        f"| public generator | {GENERATOR} | {speed / GENERATOR:.2f} |"
    )


class Step(NamedTuple):
    """A training step as the scripts take it, and as repositories write it."""

    work: str
    archs: tuple  # of student and teacher
    views: Callable  # images float [B, 3, H, W] -> those of the student and those of the teacher
    loss: Callable  # of the logits of both and the labels
    plain_views: Callable  # the same of one uint8 image
    plain_loss: Callable


def learner(args, archs, losses, memory_format=torch.contiguous_format, amp=False, mode=None):
    """A function that trains an epoch and returns the number of images.

    losses: student, teacher -> loss of each step. mode: of torch.compile; None: nothing is compiled.
    """
    nets = [common.build_model(arch, 10, amp=amp) for arch in archs]
    student, teacher = (net.to(args.device, memory_format=memory_format) for net in nets)
    teacher.eval().requires_grad_(False)
    if mode:
        student.compile(mode=mode)
        teacher.compile(mode=mode)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def epoch():
        count = 0
        for value in losses(student, teacher):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            count += 128
        value.item()
        return count

    return epoch


def few_images(args):
    return common.draw_shapes(128 * (40 if args.device.type == "cuda" else 1), seed=0)


def ours(args, step, mode=None):
    """An epoch on resident images."""
    images, labels = (part.to(args.device) for part in few_images(args))

    def losses(student, teacher):
        for index in torch.randperm(len(images), device=args.device).split(128):
            torch.compiler.cudagraph_mark_step_begin()
            for_student, for_teacher = step.views(to_float(images[index]))
            with torch.no_grad():
                T = teacher(for_teacher)
            yield step.loss(student(for_student), T, labels[index])

    amp = common.multiplies_bfloat16(args.device.type)
    return learner(args, step.archs, losses, torch.channels_last, amp, mode)


def plain(args, step):
    """An epoch of a float32 NCHW loop over a DataLoader."""
    batches = loader(PerSample(*few_images(args)), step.plain_views, 128, args.device)

    def losses(student, teacher):
        for (for_student, for_teacher), y in batches:
            S = student(for_student.to(args.device))
            with torch.no_grad():
                T = teacher(for_teacher.to(args.device))
            value = step.plain_loss(S, T, y.to(args.device))
            yield value
            value.item()

    return learner(args, step.archs, losses)


def train(args):
    """Steps of training against the plain loop; and what ours is made of."""
    for step in steps():
        epoch = ours(args, step)
        peers = {f"plain float32 NCHW loop, DataLoader of {WORKERS} workers": plain(args, step)}
        speed = compare(f"{step.work}, batch 128, images/s", epoch, peers, args)
        with FlopCounterMode(display=False) as counter:
            count = epoch()
        dtype = torch.bfloat16 if common.multiplies_bfloat16(args.device.type) else torch.float32
        a, x = (
            torch.rand(4096, 4096, device=args.device, dtype=dtype),
            torch.rand(128, 3, 32, 32, device=args.device),
        )

        times = 40 if args.device.type == "cuda" else 1  # so that starting and waiting do not count

        def product(a=a, times=times):
            for _ in range(times):
                a @ a
            return times * 2 * 4096**3

        def augmented(step=step, x=x, times=times):
            for _ in range(times):
                step.views(x)
            return times * len(x)

        flops, of_product = speed * counter.get_total_flops() / count, compare("", product, {}, args)
        text = f"{step.work}: {100 * flops / of_product:.0f} % of the FLOP/s of a product of 4096×4096 "
        text += "matrices, "
        text += f"augmentation {100 * speed / compare('', augmented, {}, args):.1f} % of the time"
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
            epoch()
            text += f", at most {torch.cuda.max_memory_allocated(args.device) / 2**30:.2f} GiB"
        print(f"({text})", flush=True)


def compiled(args):
    """The same steps with torch.compile, without and with CUDA graphs, against those without."""
    for mode in ("default", "reduce-overhead"):
        for step in steps():
            peers = {"not compiled": ours(args, step)}
            compare(f"{step.work}, compiled, mode {mode}, images/s", ours(args, step, mode), peers, args)


def steps():
    """Hinton's, WRN-40-2 → WRN-16-2, and NRD's with PreActResNet-34."""

    def hinton(S, T, y):
        return 0.1 * F.cross_entropy(S, y) + 0.9 * kd_zoo.hinton_loss(S, T, 4.0)

    def plain_hinton(S, T, y):
        kl = F.kl_div(F.log_softmax(S / 4, 1), F.softmax(T / 4, 1), reduction="batchmean")
        return 0.1 * F.cross_entropy(S, y) + 0.9 * 16 * kl

    def js(S, T, y):
        y = F.one_hot(y, 10).float()
        return nrd.js_divergence((y, S.softmax(1), T.softmax(1)), (0.2, 0.6, 0.2)).mean()

    def plain_js(S, T, y):
        weights = (0.2, 0.6, 0.2)
        distributions = [
            p.clamp(1e-7, 1) for p in (F.one_hot(y, 10).float(), F.softmax(S, 1), F.softmax(T, 1))
        ]
        log_mean = sum(w * p for w, p in zip(weights, distributions)).log()
        return sum(w * F.kl_div(log_mean, p, reduction="batchmean") for w, p in zip(weights, distributions))

    def same_view(x):
        x = common.crop_flip(x, mode="reflect")
        return x, x

    def two_views(x):
        return nrd.student_view(x, "paper", 32), nrd.teacher_view(x, 32)

    to_tensor, flip = v2.ToDtype(torch.float32, scale=True), v2.RandomHorizontalFlip()
    crop = v2.Compose([v2.RandomCrop(32, padding=4, padding_mode="reflect"), flip, to_tensor])
    cutout = v2.RandomErasing(1.0, scale=(25 / 1024,) * 2, ratio=(1, 1))
    student_view = v2.Compose([v2.RandAugment(1, 3), v2.RandomCrop(32, padding=4), flip, to_tensor, cutout])
    teacher_view = v2.Compose([v2.AugMix(), to_tensor])

    def plain_same_view(image):
        x = crop(image)
        return x, x

    def plain_two_views(image):
        return student_view(image), teacher_view(image)

    wide, deep = ("wrn-16-2", "wrn-40-2"), ("preact_resnet34", "preact_resnet34")
    return [
        Step("Hinton WRN-40-2 → WRN-16-2", wide, same_view, hinton, plain_same_view, plain_hinton),
        Step("NRD PreActResNet-34", deep, two_views, js, plain_two_views, plain_js),
    ]


def photographs(args):
    """An epoch of random resized crops of 224 pixels and flips, of 500×375 JPEG files, decoded or not."""
    images, labels = common.draw_shapes(512, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        large = F.interpolate(to_float(images), (375, 500), mode="bilinear")
        for i, (image, label) in enumerate(zip(large, labels.tolist())):
            path = Path(folder) / "test" / f"class{label}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            v2.functional.to_pil_image((image + 0.03 * torch.randn_like(image)).clamp(0, 1)).save(
                path, quality=90
            )
        (Path(folder) / "train").symlink_to(Path(folder) / "test")
        data = common.load_dataset(f"imagefolder:{folder}", Path(folder) / "data", device=args.device)
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        transform = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *to_tensor])
        batches = loader(torchvision.datasets.ImageFolder(f"{folder}/train"), transform, 64, args.device)

        def ours():
            for index in torch.randperm(len(images), device=args.device).split(64):
                common.crop_flip(common.random_resized_crop(data.batch(index), 224), padding=0)
            return len(images)

        peers = {f"ImageFolder, DataLoader of {WORKERS} workers": drain(batches, args.device)}
        compare("photographs, random resized crop and flip, images/s", ours, peers, args)


def scaling(args):
    """Seconds per epoch of cross-entropy on WRN-10-1, and the line of what is proportional."""
    from matplotlib.figure import Figure

    images, labels = (part.to(args.device) for part in common.draw_shapes(50000, seed=0))
    threads = torch.get_num_threads()

    def epoch(count, batch_size, used=threads):
        torch.set_num_threads(used)
        model = common.build_model("wrn-10-1", 10, amp=common.multiplies_bfloat16(args.device.type)).to(
            args.device
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        batches = torch.randperm(count, device=args.device).split(batch_size)
        for step, index in enumerate([*batches[:3], *batches]):
            if step == 3:  # after the warm-up
                if args.device.type == "cuda":
                    torch.cuda.synchronize(args.device)
                began = time.perf_counter()
            loss = F.cross_entropy(model(common.crop_flip(to_float(images[index]))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()
        return time.perf_counter() - began

    panels = {
        "images, batch 128": {count: epoch(count, 128) for count in (1000, 2000, 5000, 10000, 20000, 50000)},
        "batch size, 5,000 images": {size: epoch(5000, size) for size in (16, 32, 64, 128, 256, 512)},
        "threads, 5,000 images, batch 128": {n: epoch(5000, 128, n) for n in range(1, threads + 1)},
    }
    torch.set_num_threads(threads)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (label, seconds), power in zip(figure.subplots(1, 3), panels.items(), (1, 0, -1)):
        print(f"{label}: " + ", ".join(f"{x:,}: {value:.2f} s" for x, value in seconds.items()), flush=True)
        first = next(iter(seconds))
        axes.loglog([*seconds], [*seconds.values()], "o-", label="measured")
        line = [seconds[first] * (x / first) ** power for x in seconds]
        axes.loglog([*seconds], line, "k:", label="equal" if power == 0 else "proportional")
        axes.set_xticks([*seconds], [f"{x:,}" for x in seconds], rotation=45)
        axes.minorticks_off()
        if power != 1:
            axes.set(yscale="linear", ylim=(0, None))
        axes.set(xlabel=label, ylabel="seconds per epoch")
        axes.legend()
    figure.savefig(Path(__file__).resolve().parent.parent / ".github/scaling.png", dpi=90)


def kernels(args):
    """Operations of a step at the paper's size, without views. A GPU's host starts each in 5 to 10 µs.

    backward: nodes of autograd's graph. optimiser: that, EMA and what is kept of a step. bfloat16: all of it
    with --amp, which casts weights and images. BSS has no row: it waits.
    """
    from fake_cuda import epoch, fake_cuda  # seconds to import

    lines = [f"kd_zoo --method {method}" for method in kd_zoo.TABLE_I if method != "bss"]
    lines += ["nrd", "nrd --loss gjs", "cmd", "fickle_teacher", "soft_randomization", "messy_collaboration"]
    parts = "forward", "augmentation", "backward", "optimiser"
    print(
        "| step | forward | of it augmentation | backward | optimiser | all | bfloat16 |\n" + "|---" * 7 + "|"
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), fake_cuda() as watch:
        for line in [*lines, "noise_data_free_kd --source gaussian"]:
            (name, *flags), counts = line.split(), []
            for amp in ("--amp", "--no-amp"):
                with contextlib.redirect_stdout(sys.stderr):
                    epoch(load_script(name), "--dataset", "cifar10", "--limit-train", 768, amp, *flags)
                counts.append(watch.counts.copy())
            forward, augmentation, *after = (counts[1][part] for part in parts)
            row = forward + augmentation, augmentation, *after, counts[1].total(), counts[0].total()
            print(f"| `{line}` | {' | '.join(f'{count:,}' for count in row)} |", flush=True)


ALL = (augment, corrupt, attack, leaves, train, photographs)
WORKS = {work.__name__: work for work in (*ALL, compiled, kernels, scaling)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="?", default="all", choices=[*WORKS, "all"])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.benchmark = True
    name = (
        torch.cuda.get_device_name(args.device)
        if args.device.type == "cuda"
        else platform.processor() or "CPU"
    )
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    if args.work != "kernels":
        print("| work | ours | peer | its speed | ratio |\n|---|---|---|---|---|")
    for work in ALL if args.work == "all" else [WORKS[args.work]]:
        torch.manual_seed(0)
        work(args)


if __name__ == "__main__":
    main()
