"""Noise-Robust Distillation (NRD) and the robust losses it is compared with: learning from noisy labels.

A network that has memorised a wrong label forgets it on views of the image that it never trained on. So the student
learns from three distributions at once: the given label y, its own prediction y_s on the usual augmentation, and the
prediction y_t of its moving average (EMA) on another augmentation, through which no gradient flows:

    L = JSD_pi(y, y_s, y_t) / Z     y_s = f(RandAugment + crop + flip + Cutout(x); theta)
                                    y_t = E[f(AugMix + crop + flip(x); EMA(theta))]

The teacher stays in training mode, as in the authors' code: BatchNorm normalises by the batch of its own views.

Shon, Koh, Jeon, Kim: Neural Vicinal Risk Minimization: Noise-robust Distillation for Noisy Labels, IJCAI-2024 AISafety
Workshop. Equations 19 and 24-27, Algorithm 1.

    python nrd.py                                             # built-in data, half its labels random: 89.4 ± 5.1 %
    python nrd.py --loss ce                                   # the same with cross-entropy: 74.1 ± 1.2 %
    python nrd.py --dataset cifar10 --noise sym --rate 0.8    # a cell of Table 2; the paper has 85.32
    python nrd.py --dataset cifar10 --noise human-worse       # the annotators of CIFAR-10N

Test accuracy of the last epoch, n = 5, on a CPU; GCE and GJS have 95.9 ± 0.8 and 98.2 ± 1.1. Not yet run at the paper's
size.

To change: the loss -> robust_loss; a view -> student_view, teacher_view; a setting -> preset; a step -> main.
The commands of every table, and what we chose where the paper is silent, stand at the end (NOTES).
"""

import argparse
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import UsageError, accuracy, count, predict, refuse, share

# ----------------------------------------------------------------------------------------------------------- the method


def js_divergence(distributions, weights):
    """Jensen-Shannon divergence sum_i pi_i KL(p_i || m) with m = sum_i pi_i p_i (equation 19): float [B], in nats.

    distributions: n tensors [B, C] of probabilities; weights: n floats pi_i that sum to 1.
    """
    assert math.isclose(sum(weights), 1, abs_tol=1e-6), f"weights {weights} sum to {sum(weights)}, not to 1"
    m = sum(pi * p for pi, p in zip(weights, distributions, strict=True))
    return sum(pi * (p * (log(p) - log(m))).sum(1) for pi, p in zip(weights, distributions))


def log(p):
    return p.clamp(min=1e-7).log()


def js_scale(pi1):
    """Z = -(1 - pi1) log(1 - pi1), by which the code of GJS divides, so that the loss is of cross-entropy's size."""
    return -(1 - pi1) * math.log(1 - pi1)


def student_view(x, augment, size):
    """The usual augmentation of x, float [B, 3, H, W] in [0, 1]; photographs, larger than `size`, are cropped to it."""
    if augment == "none":
        return x
    if augment == "crop":
        return common.crop_flip(x, size=size)
    if max(x.shape[2:]) > size:  # appendix A.2
        x = common.random_resized_crop(x, size)
        x = common.crop_flip(x, padding=0)
        return common.color_jitter(x)
    x = common.rand_augment(x, num_ops=1, magnitude=3)  # appendix A.1
    x = common.crop_flip(x)
    return common.cutout(x, size=5)


def teacher_view(x, size):
    """Another augmentation: AugMix, crop and flip; on photographs (appendix A.2) the crop is a random resized one."""
    photographs = max(x.shape[2:]) > size
    x = common.aug_mix(x)
    if photographs:
        x = common.random_resized_crop(x, size)
        return common.crop_flip(x, padding=0)
    return common.crop_flip(x)


def averaged_tensors(model):
    """Weights and BatchNorm's running statistics: what the EMA averages, tensors that share the model's memory."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


# ------------------------------------------------------------------------------------------------------------- training


def main(args):
    device = common.setup(args)
    data = common.load_data(args, device)
    num_classes, size = len(data.classes), data.image_size
    labels = common.noisy_labels(args, data)
    wrong = (labels != data.train_labels).float().mean().item()
    print(f"{len(labels):,} training images, {100 * wrong:.2f} % relabelled; {len(data.test_labels):,} test images")
    stats = common.channel_stats(data.train_images)
    model = common.build_model(args.arch, num_classes, 0.0, *stats, image_size=size, amp=args.amp).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)  # in training mode: BatchNorm normalises by the batch of its views
    decay = args.weight_decay
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=decay, nesterov=True)
    if follows_gjs(args):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.97)
    else:
        milestones = [math.ceil(drop * args.epochs) for drop in args.drops]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    run = common.Run(args, device, data)
    run.track(model=model, ema=ema, optimizer=optimizer, scheduler=scheduler)
    see_as_student, see_as_teacher = student_view, teacher_view
    if args.compile:
        model.compile()
        ema.compile()
        if device.type == "cuda":  # on a CPU they are faster as they are: they change the images concerned alone
            see_as_student, see_as_teacher = torch.compile(student_view), torch.compile(teacher_view)
    scale = js_scale(args.loss_params[0]) if args.jsd_scale else 1
    student_views = 1
    if args.loss == "gjs" or (args.loss == "nrd" and common.is_photographs(args.dataset)):
        student_views = 2
    if args.loss == "nrd":
        pi1, pi2, pi3 = args.loss_params
        weights = (pi1, *[pi2 / student_views] * student_views, pi3)
    theta_bar, theta = averaged_tensors(ema), averaged_tensors(model)

    for _ in range(run.epoch, run.epochs):
        model.train()
        lr, losses = scheduler.get_last_lr()[0], []
        predicted = torch.full_like(labels, -1)
        for index in run.batches(len(labels), args.batch_size):
            x, y = data.batch(index), F.one_hot(labels[index], num_classes).float()
            views = [see_as_student(x, args.student_augment, size) for _ in range(student_views)]
            logits = model(torch.cat(views))
            if args.loss == "nrd":
                y_s = logits.softmax(1).chunk(student_views)  # equation 26
                with torch.no_grad():  # the stop-gradient of Figure 3
                    answers = [ema(see_as_teacher(x, size)).softmax(1) for _ in range(args.views)]
                    y_t = sum(answers) / args.views  # equation 27
                loss = js_divergence((y, *y_s, y_t), weights).mean() / scale  # equation 25
            else:
                loss = robust_loss(args.loss, logits, y, args.loss_params, args.jsd_scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            torch._foreach_lerp_(theta_bar, theta, 1 - args.beta)  # equation 24

            losses.append(loss.detach())
            predicted[index] = logits[: len(index)].argmax(1)  # of the first view
        scheduler.step()
        run.end_epoch(
            losses,
            lr=lr,
            **common.test_accuracies(model, data),
            ema_test_acc=accuracy(predict(ema, data.test_images), data.test_labels),
            **common.label_accuracies(predicted, labels, data.train_labels),
        )
        if run.epoch in args.keep:
            run.save(run.folder / f"checkpoint{run.epoch}.pt")
    return run.finish()


# --------------------------------------------------------------------------------------------------------------- losses


def robust_loss(name, logits, y, params, jsd_scale=True):
    """The losses that NRD is compared with (section 5.1), mean over the batch; logits [B, C], y one-hot [B, C].

    In gjs the logits are [2B, C]: of one augmented view of the batch, then of another. jsd_scale: js and gjs are
    divided by js_scale.
    """
    assert y.is_floating_point() and y.ndim == 2, f"y is {y.dtype} {list(y.shape)}, not one-hot float [B, C]"
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    if name in ("js", "gjs"):
        (pi1,) = params
        Z = js_scale(pi1) if jsd_scale else 1
    if name == "gjs":
        half = (1 - pi1) / 2
        return js_divergence((y, *p.chunk(2)), (pi1, half, half)).mean() / Z
    log_p_y = (y * log_p).sum(1)
    p_y = (y * p).sum(1)
    rce = -math.log(1e-4) * (1 - p_y)  # reverse cross-entropy, log 0 taken as log 1e-4
    if name == "ce":
        loss = -log_p_y
    elif name == "bs":  # soft bootstrapping; the gradient flows through the target too, as entropy regularisation
        (beta,) = params
        loss = -(((1 - beta) * y + beta * p) * log(p)).sum(1)
    elif name == "ls":
        (epsilon,) = params
        loss = -(((1 - epsilon) * y + epsilon / y.shape[1]) * log_p).sum(1)
    elif name == "sce":
        alpha, beta = params
        loss = -alpha * log_p_y + beta * rce
    elif name == "gce":
        (q,) = params
        loss = (1 - p_y.clamp(min=1e-7) ** q) / q
    elif name == "nce+rce":
        alpha, beta = params
        loss = alpha * log_p_y / log_p.sum(1) + beta * rce
    elif name == "js":
        loss = js_divergence((y, p), (pi1, 1 - pi1)) / Z
    return loss.mean()


# -------------------------------------------------------------------------------------------------------- configuration

HYPERPARAMETERS = {  # of each loss, in the order of --loss-params
    "nrd": ("pi1", "pi2", "pi3"), "ce": (), "bs": ("beta",), "ls": ("epsilon",), "sce": ("alpha", "beta"),
    "gce": ("q",), "nce+rce": ("alpha", "beta"), "js": ("pi1",), "gjs": ("pi1",),
}  # fmt: skip

TABLE_5 = {  # left: lr, weight decay under symmetric and asymmetric noise; right: the loss's own hyperparameters
    "cifar10": """
loss     sym        asym       none      sym0.2    sym0.4    sym0.6      sym0.8      asym0.2   asym0.4
ce       .05,1e-3   .1,1e-3    -         -         -         -           -           -         -
bs       .1,1e-3    .1,1e-3    .5        .5        .7        .7          .9          .7        .5
ls       .1,5e-4    .1,1e-3    .1        .5        .9        .7          .1          .1        .1
sce      .01,5e-4   .05,1e-3   .2,.1     .05,.1    .1,.1     .2,1        .1,1        .1,.1     .2,1
gce      .01,5e-4   .1,1e-3    .5        .7        .7        .7          .9          .1        .1
nce+rce  .005,1e-3  .05,1e-4   10,.1     10,.1     10,.1     1,.1        10,1        10,.1     1,.1
js       .01,5e-4   .1,1e-3    .1        .7        .7        .9          .9          .3        .3
gjs      .1,5e-4    .1,1e-3    .5        .3        .9        .1          .1          .3        .3
nrd      .1,5e-4    .1,1e-3    .2,.6,.2  .2,.6,.2  .2,.6,.2  .25,.5,.25  .25,.5,.25  .1,.8,.1  .15,.7,.15
""",
    "cifar100": """
loss     sym        asym       none      sym0.2    sym0.4    sym0.6      sym0.8      asym0.2     asym0.4
ce       .4,1e-4    .2,1e-4    -         -         -         -           -           -           -
bs       .4,1e-4    .4,1e-4    .7        .5        .5        .5          .9          .3          .3
ls       .2,5e-5    .4,1e-4    .1        .7        .7        .7          .9          .5          .7
sce      .2,1e-4    .4,5e-5    .1,.1     .1,.1     .1,.1     .1,1        .1,.1       .1,1        .1,1
gce      .4,1e-5    .2,1e-4    .5        .5        .5        .7          .7          .7          .7
nce+rce  .2,5e-5    .2,5e-5    20,.1     20,.1     20,.1     20,.1       20,.1       20,.1       10,.1
js       .2,1e-4    .1,1e-4    .1        .1        .3        .5          .3          .5          .5
gjs      .2,5e-5    .4,1e-4    .3        .3        .5        .9          .1          .5          .1
nrd      .2,5e-5    .4,1e-4    .2,.6,.2  .2,.6,.2  .2,.6,.2  .2,.6,.2    .15,.7,.15  .25,.5,.25  .4,.2,.4
""",
}

PHOTOGRAPHS = {  # lr, batch size, own hyperparameters; appendix A.2, and of JS and GJS the scripts of GJS
    "nrd": (0.1, 64, [0.1, 0.8, 0.1]),
    "js": (0.2, 64, [0.1]),
    "gjs": (0.1, 32, [0.1]),
}
SHAPES_LR = {  # each loss's best of one grid on other images (tests/RESULTS.md)
    "nrd": 0.5, "ce": 0.2, "bs": 0.5, "ls": 0.5, "sce": 0.5, "gce": 0.2, "nce+rce": 0.2, "js": 0.2, "gjs": 0.2,
}  # fmt: skip


def table_5(dataset, loss, noise, rate):
    """lr, weight decay, and the list of the loss's own hyperparameters."""
    header, *rows = [line.split() for line in TABLE_5[dataset].strip().splitlines()]
    (row,) = [dict(zip(header, row)) for row in rows if row[0] == loss]
    if noise in ("none", "sym", "sym-other"):
        kind, rates = "sym", (0.2, 0.4, 0.6, 0.8)
    else:
        kind, rates = "asym", (0.2, 0.4)
    nearest = min(rates, key=lambda column: round(abs(column - rate), 6))
    params = row["none" if noise == "none" else f"{kind}{nearest}"]
    lr, weight_decay = map(float, row[kind].split(","))
    return lr, weight_decay, [] if params == "-" else [float(p) for p in params.split(",")]


def preset(args):
    """The flags that are left out: Table 5 for the loss, data set and noise, appendix A for the rest."""
    noise = args.noise or ("sym" if args.dataset in common.CLEANLY_LABELLED else "none")
    rate = {"sym": 0.5, "sym-other": 0.5, "asym": 0.4, "pair": 0.4}.get(noise)
    column = rate if args.rate is None else args.rate
    if column is None:
        column = 0.4 if noise in ("human-worse", "human-noisy") else 0.2
    rows = "cifar100" if Path(args.dataset).stem == "cifar100" else "cifar10"
    lr, weight_decay, params = table_5(rows, args.loss, noise, column)
    values = {"noise": noise, "rate": rate, "views": 1}
    if common.is_photographs(args.dataset):  # appendix A.2, and the text's weight decay
        lr, batch_size, params = PHOTOGRAPHS.get(args.loss, (0.1, 64, params))
        values |= {"arch": "resnet50", "epochs": 300, "batch_size": batch_size, "lr": lr, "weight_decay": 1e-4}
        values |= {"beta": 0.99, "student_augment": "paper", "drops": [1 / 3, 2 / 3], "jsd_scale": False}
        return values | {"loss_params": params}
    values |= {"loss_params": params, "weight_decay": weight_decay, "drops": [0.5, 0.75]}
    values["jsd_scale"] = args.loss in ("nrd", "js", "gjs")
    if args.dataset == "shapes":
        values |= {"arch": "wrn-10-1", "epochs": 20, "batch_size": 32, "lr": SHAPES_LR.get(args.loss, lr)}
        return values | {"beta": 0.95, "student_augment": "crop"}
    values |= {"arch": "preact_resnet34", "epochs": 400, "batch_size": 128, "lr": lr}
    return values | {"beta": 0.99, "student_augment": "paper"}


def follows_gjs(args):
    """Whether the run has the schedule of GJS's scripts for WebVision: lr × 0.97 an epoch."""
    return common.is_photographs(args.dataset) and args.loss in ("js", "gjs")


def parse_args():
    parser = common.argument_parser(__file__, __doc__, NOTES)
    add = parser.add_argument_group("method").add_argument
    params = "; ".join(f"{loss} {' '.join(names)}" for loss, names in HYPERPARAMETERS.items() if names)
    add("--loss", default="nrd", choices=HYPERPARAMETERS, help="equation 25, or a loss of section 5.1")
    add("--loss-params", nargs="*", type=float, metavar="P", help=f"its hyperparameters: {params}")
    add("--arch", help="wrn-D-K, resnetD, preact_resnet18, …")
    add("--beta", type=share, help="decay of the EMA, equation 24")
    add("--views", type=count, metavar="K", help="views averaged in equation 27")
    add("--student-augment", choices=("paper", "crop", "none"), help="crop: crops and flips alone, as in Figure 2")
    add("--drops", nargs="*", type=share, metavar="SHARE", help="of the epochs, after which lr falls to a tenth")
    scale = "divide nrd, js, gjs by Z = -(1-pi1) log(1-pi1), as the code of GJS and of NRD does"
    add("--jsd-scale", action=argparse.BooleanOptionalAction, help=scale)
    add("--keep", nargs="+", type=int, default=[], metavar="EPOCH", help="keep these epochs' checkpoints too")
    args = common.parse(parser, preset)
    names, given = HYPERPARAMETERS[args.loss], len(args.loss_params)
    if given != len(names):
        raise UsageError(f"--loss-params: {args.loss} takes {len(names)} ({' '.join(names)}), not {given}")
    if args.loss == "nrd" and not math.isclose(sum(args.loss_params), 1, abs_tol=1e-6):
        raise UsageError(f"--loss-params: pi1 pi2 pi3 sum to {sum(args.loss_params):g}, not to 1")
    if args.loss not in ("nrd", "js", "gjs"):
        refuse(args, ("jsd_scale",), f"{args.loss} is no Jensen-Shannon divergence")
    elif args.jsd_scale and not 0 < args.loss_params[0] < 1:
        raise UsageError(f"--loss-params: pi1 is {args.loss_params[0]:g}, where Z is 0; 0 < pi1 < 1 works")
    if args.loss == "gce" and not args.loss_params[0] > 0:
        raise UsageError(f"--loss-params: q is {args.loss_params[0]:g}; gce needs q above 0")
    if args.loss != "nrd":
        refuse(args, ("views",), f"{args.loss} has no teacher's views")
    if follows_gjs(args):
        refuse(args, ("drops",), "lr falls by 3 % an epoch here, as in GJS's scripts")
    return args


# --------------------------------------------------------------------------------------------------------------- notes

NOTES = """
Table 1, Figures 1, 2b  --dataset cifar10 --loss ce --student-augment crop --rate {0.2,0.5,0.8}, then
                        evaluate.py runs/nrd-cifar10-sym0.5-loss=ce-student_augment=crop-seed0 --memory
Figure 2a, Table 6      the same with --rate 0.4 --epochs 200 --keep 40 70 100 150, then
                        evaluate.py RUN/checkpoint*.pt --memory
Table 2                 --dataset {cifar10,cifar100} --loss {ce,bs,ls,sce,gce,nce+rce,js,gjs,nrd}
                        --noise sym --rate {0.2,0.4,0.6,0.8}; --noise asym --rate {0.2,0.4}; each of its five runs draws
                        new wrong labels: --seed 0 --noise-seed 0, …, --seed 4 --noise-seed 4
Table 3                 --dataset webvision --loss {ce,js,gjs,nrd}
Table 4                 --dataset {cifar10,cifar100} --loss {ce,gce,gjs,nrd} --noise none
Table 5                 TABLE_5
Figure 4                --dataset cifar100 --loss {gjs,nrd} --rate {0.2,0.4,0.6,0.8} --epochs 1000 --drops 0.3 0.8
Figure 5                --dataset cifar10 --loss {ce,nrd} --rate {0.2,0.5,0.8}, then evaluate.py RUN … --ece

From code, not from the paper: NRD's authors and those of GJS (Englesson and Azizpour 2021), whose settings and results
NRD's tables take over, divide the divergence by Z on CIFAR and not on WebVision, train with Nesterov momentum, crop and
flip the teacher's view, give the student two views on WebVision, each with half of pi2, and take GJS's own
PreActResNet-34, three groups of 32, 64 and 128 channels, with PyTorch's initialisation. No state of NRD's code has EMA
and divergence together: its EMA runs, and two of the three states of its loop with the divergence, have a teacher in
training mode, the last state (January 2024) one in evaluation mode. Ours is the EMA of equation 24 after every step,
from the first, in training mode. Its running statistics, which only its test accuracy uses, are averaged as the weights
are, and follow its own views besides. Figure 2a and Table 6 have 200 epochs and AutoAugment alone,
Figure 4 falls after 30 and 80 %. BS and GCE floor the probability at 1e-7. On WebVision JS and GJS have pi1 = 0.1, lr
0.2 for JS, batches of 32 for GJS, and an lr that falls by 3 % an epoch. There the paper's text has drops after 150 and
250 epochs, its appendix after 100 and 200: we follow the appendix.

Where we differ from these. Images are normalised by their own mean and deviation; GJS's code has 0.20 for CIFAR-10's
deviations of 0.25. AugMix is torchvision's form; the original's changes are 1.4 times as large. RandAugment is
torchvision's; GJS used another package, whose (1, 3) is four times as strong. Cutout has length 5, as the paper has
it; GJS's scripts have 16. NRD's scripts for Table 1 give the student AutoAugment where the paper has RandAugment and
Cutout. One script for WebVision has lr 0.4, batches of 128 and × 0.97 per epoch, where the appendix has 0.1, 64 and
two drops. The code of Figures 1 and 2 crops, flips and erases a grey square of 15 %.

Our choices. A rate between two columns of Table 5 takes the nearer one (50 % that of 40 %). No noise takes the lr and
weight decay of symmetric noise. sym-other counts as symmetric; pair and human-* count as asymmetric, of 40 % for
human-worse and human-noisy, else of 20 %. Other data sets than CIFAR-100 take CIFAR-10's rows. Any photographs are
treated as WebVision. On shapes a run has 1,240 steps, the paper's has 156,000: hence a small net, a faster EMA, crops
alone for the student, and for each loss the best lr of one grid on other images (tests/RESULTS.md).
"""

if __name__ == "__main__":
    common.run(parse_args, main)
