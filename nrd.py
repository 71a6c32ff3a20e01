"""Noise-Robust Distillation (NRD) and the robust losses it is compared with: learning from noisy labels.

A network that has memorised a wrong label forgets it on views of the image that it never trained on. So the student
learns from three distributions at once: the given label y, its own prediction y_s on the usual augmentation, and the
prediction y_t of its moving average (EMA) on another augmentation, through which no gradient flows:

    L = JSD_pi(y, y_s, y_t)   y_s = f(RandAugment + crop + flip + Cutout(x); theta)   y_t = E[f(AugMix(x); EMA(theta))]

Shon, Koh, Jeon, Kim: Neural Vicinal Risk Minimization: Noise-robust Distillation for Noisy Labels, IJCAI-2024 AISafety
Workshop. Equations 19 and 24-27, Algorithm 1, Tables 1, 2, 4 and 5, Figures 1 and 2.

    python nrd.py                                                        # built-in data, a minute on two CPU cores
    python nrd.py --loss ce                                              # the same with cross-entropy
    python nrd.py --dataset cifar10 --noise sym --rate 0.8               # a cell of Table 2
    python nrd.py --dataset cifar10 --noise human-worse                  # the annotators of CIFAR-10N
    python nrd.py --dataset webvision                                    # Table 3
    python nrd.py --analyze runs/ce-cifar10-sym0.5-seed0/checkpoint.pt   # Table 1, Figures 1 and 2

Attained on two CPU cores by the first two commands: 67.0 % and 48.2 % test accuracy (last epoch, mean of 3 seeds), in
0:59 and 1:10 minutes; README.md has the rest. Not yet run at the paper's size (sym 80 %: 85.32, cross-entropy 66.51).
"""

import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import UsageError, accuracy, number, one_of, predict, to_float

# -------------------------------------------------------------------------------------------------------- configuration

HYPERPARAMETERS = {  # of each loss, in the order of --loss-params
    "nrd": ("pi1", "pi2", "pi3"), "ce": (), "bs": ("beta",), "ls": ("epsilon",), "sce": ("alpha", "beta"),
    "gce": ("q",), "nce+rce": ("alpha", "beta"), "js": ("pi1",), "gjs": ("pi1",),
}  # fmt: skip

# Table 5: (lr, weight decay) under symmetric and under asymmetric noise, then the loss's own hyperparameters under
#         no noise, symmetric 20 %, 40 %, 60 %, 80 %, asymmetric 20 %, 40 %
TABLE_5 = {
    "cifar10": {
        "ce": [(0.05, 1e-3), (0.1, 1e-3), *[()] * 7],
        "bs": [(0.1, 1e-3), (0.1, 1e-3), 0.5, 0.5, 0.7, 0.7, 0.9, 0.7, 0.5],
        "ls": [(0.1, 5e-4), (0.1, 1e-3), 0.1, 0.5, 0.9, 0.7, 0.1, 0.1, 0.1],
        "sce": [(0.01, 5e-4), (0.05, 1e-3), (0.2, 0.1),
                (0.05, 0.1), (0.1, 0.1), (0.2, 1), (0.1, 1), (0.1, 0.1), (0.2, 1)],
        "gce": [(0.01, 5e-4), (0.1, 1e-3), 0.5, 0.7, 0.7, 0.7, 0.9, 0.1, 0.1],
        "nce+rce": [(0.005, 1e-3), (0.05, 1e-4), *[(10, 0.1)] * 3, (1, 0.1), (10, 1), (10, 0.1), (1, 0.1)],
        "js": [(0.01, 5e-4), (0.1, 1e-3), 0.1, 0.7, 0.7, 0.9, 0.9, 0.3, 0.3],
        "gjs": [(0.1, 5e-4), (0.1, 1e-3), 0.5, 0.3, 0.9, 0.1, 0.1, 0.3, 0.3],
        "nrd": [(0.1, 5e-4), (0.1, 1e-3), (0.2, 0.6, 0.2),
                *[(0.2, 0.6, 0.2)] * 2, *[(0.25, 0.5, 0.25)] * 2, (0.1, 0.8, 0.1), (0.15, 0.7, 0.15)],
    },
    "cifar100": {
        "ce": [(0.4, 1e-4), (0.2, 1e-4), *[()] * 7],
        "bs": [(0.4, 1e-4), (0.4, 1e-4), 0.7, 0.5, 0.5, 0.5, 0.9, 0.3, 0.3],
        "ls": [(0.2, 5e-5), (0.4, 1e-4), 0.1, 0.7, 0.7, 0.7, 0.9, 0.5, 0.7],
        "sce": [(0.2, 1e-4), (0.4, 5e-5), *[(0.1, 0.1)] * 3, (0.1, 1), (0.1, 0.1), (0.1, 1), (0.1, 1)],
        "gce": [(0.4, 1e-5), (0.2, 1e-4), 0.5, 0.5, 0.5, 0.7, 0.7, 0.7, 0.7],
        "nce+rce": [(0.2, 5e-5), (0.2, 5e-5), *[(20, 0.1)] * 6, (10, 0.1)],
        "js": [(0.2, 1e-4), (0.1, 1e-4), 0.1, 0.1, 0.3, 0.5, 0.3, 0.5, 0.5],
        "gjs": [(0.2, 5e-5), (0.4, 1e-4), 0.3, 0.3, 0.5, 0.9, 0.1, 0.5, 0.1],
        "nrd": [(0.2, 5e-5), (0.4, 1e-4), (0.2, 0.6, 0.2),
                *[(0.2, 0.6, 0.2)] * 3, (0.15, 0.7, 0.15), (0.25, 0.5, 0.25), (0.4, 0.2, 0.4)],
    },
}  # fmt: skip


def preset(args):
    """What the flags left unset, from the paper: Table 5 for the loss, data set and noise; appendix A.1 for the rest.

    Our choices where the paper is silent: a rate between two columns takes the nearer one (50 % that of 40 %); no noise
    takes symmetric noise's (lr, weight decay); sym-other counts as symmetric, pair and human-* as asymmetric (40 % for
    human-worse and -noisy, else 20 %); other data sets than CIFAR-100 take CIFAR-10's rows. On shapes a run has 1,240
    steps, the paper's 156,000: hence a small net, a faster EMA, a larger lr for nrd's smaller gradients, and no
    augmentation for the student, against which a net of this size would need far longer to memorise anything.
    All photographs are treated as WebVision is (appendix A.2, and the text's general weight decay), with the labels
    that they have. The teacher's AugMix comes after its crop, where there are fewer pixels; the paper's order is
    --teacher-augment augmix+resizedcrop+flip. The other losses' own hyperparameters are CIFAR-10's without noise.
    """
    photographs = common.of_photographs(args.dataset)
    noise, rate = args.noise or ("none" if photographs else "sym"), args.rate
    if rate is None:
        forty = ("pair", "asym", "human-worse", "human-noisy")
        rate = {"none": 0.0, "sym": 0.5, "sym-other": 0.5, **dict.fromkeys(forty, 0.4)}.get(noise, 0.2)
    symmetric = noise in ("none", "sym", "sym-other")
    row = TABLE_5["cifar100" if Path(args.dataset or "shapes").stem == "cifar100" else "cifar10"][args.loss]
    columns = {2: 0.0, 3: 0.2, 4: 0.4, 5: 0.6, 6: 0.8} if symmetric else {7: 0.2, 8: 0.4}
    nearest = min(columns, key=lambda column: round(abs(columns[column] - rate), 6))
    lr, weight_decay = row[0] if symmetric else row[1]
    params = row[nearest] if isinstance(row[nearest], tuple) else (row[nearest],)
    run = {"arch": "preact_resnet34", "epochs": 400, "batch_size": 128, "beta": 0.99,
           "student_augment": "randaugment+crop+cutout", "teacher_augment": "augmix"}  # fmt: skip
    if photographs:
        run |= {"arch": "resnet50", "epochs": 300, "batch_size": 64}
        run |= {"student_augment": "resizedcrop+flip+jitter", "teacher_augment": "resizedcrop+flip+augmix"}
        lr, weight_decay, params = 0.1, 1e-4, (0.1, 0.8, 0.1) if args.loss == "nrd" else params
    if args.dataset in (None, "shapes"):
        run |= {"arch": "wrn-10-1", "epochs": 20, "batch_size": 32, "beta": 0.95, "student_augment": "none"}
        lr = 0.3 if args.loss == "nrd" else lr
    fixed = noise in ("none", *common.HUMAN)  # these have a rate of their own
    return {
        "noise": noise, "rate": None if fixed else rate, "lr": lr, "weight_decay": weight_decay,
        "loss_params": list(params), "views": 10 if args.analyze else 1,
        "data_dir": None if args.analyze else Path("data"), **run,
    }  # fmt: skip


STEPS = {  # of --student-augment and --teacher-augment (appendix A); images float [B, 3, H, W] in [0, 1]
    "none": lambda x, size: x,
    "crop": lambda x, size: common.crop_flip(x),
    "flip": lambda x, size: common.crop_flip(x, padding=0),
    "cutout": lambda x, size: common.cutout(x, size=5),
    "randaugment": lambda x, size: common.rand_augment(x, num_ops=1, magnitude=3),
    "augmix": lambda x, size: common.aug_mix(x),
    "autoaugment": lambda x, size: common.auto_augment(x),
    "erasing": lambda x, size: common.random_erasing(x),
    "resizedcrop": common.random_resized_crop,  # to size × size pixels
    "jitter": lambda x, size: common.color_jitter(x),
}


def steps(text):
    """argparse type: "randaugment+crop+cutout" as it is, once every step is known."""
    return "+".join(map(one_of(*STEPS), text.split("+")))


def augment(images, text, size=None):
    """Apply the steps named in `text`, as in "randaugment+crop+cutout", one after the other.

    size: what resizedcrop makes of them, in pixels; None: as they are.
    """
    for step in text.split("+"):
        images = STEPS[step](images, size or images.shape[-1])
    return images


def parse_args():
    parser = common.Parser(__doc__)
    common.add_common_arguments(parser)
    add = parser.add_argument_group("method (equations 19-27, Table 5)").add_argument
    params = "; ".join(f"{loss} {' '.join(names)}" for loss, names in HYPERPARAMETERS.items() if names)
    add("--loss", default="nrd", type=one_of(*HYPERPARAMETERS), help=" | ".join(HYPERPARAMETERS) + " (default: nrd)")
    add("--loss-params", nargs="+", type=number(float, 0), metavar="P", help=f"default: Table 5; {params}")
    add("--arch", help="wrn-D-K, resnetD, … (default: preact_resnet34; on shapes wrn-10-1, photographs resnet50)")
    add("--beta", type=number(float, 0, 1), help="decay of the EMA, equation 24 (default: 0.99; on shapes 0.95)")
    add("--views", type=number(int, 1), metavar="K", help="views averaged in equation 27 (default: 1; --analyze: 10)")
    add("--student-augment", type=steps, metavar="A+B", help=f"of {', '.join(STEPS)}; default: appendix A, see preset")
    add("--teacher-augment", type=steps, metavar="A+B", help="default: augmix; on photographs resizedcrop+flip+augmix")
    add("--jsd-scale", action="store_true", help="divide nrd by -(1-pi1) log(1-pi1), as the code of GJS does")
    add("--analyze", type=Path, metavar="CHECKPOINT", help="Table 1, Figures 1 and 2 of a trained model; no training")
    args = parser.parse_args()
    common.fill(args, preset(args))
    names = HYPERPARAMETERS[args.loss]
    if len(args.loss_params) != len(names):
        raise UsageError(
            f"--loss-params: {args.loss} takes {len(names)} ({' '.join(names)}), not {len(args.loss_params)}"
        )
    if args.loss == "nrd" and not math.isclose(sum(args.loss_params), 1, abs_tol=1e-6):
        raise UsageError(
            f"--loss-params: pi1 pi2 pi3 sum to {sum(args.loss_params):g}, not to 1; the paper has 0.2 0.6 0.2"
        )
    scaled = args.loss in ("js", "gjs") or args.loss == "nrd" and args.jsd_scale
    if scaled and not 0 < args.loss_params[0] < 1:
        raise UsageError(f"--loss-params: pi1 is {args.loss_params[0]:g}, not between 0 and 1")
    if args.loss == "gce" and args.loss_params[0] == 0:
        raise UsageError("--loss-params: gce with q = 0 is cross-entropy; --loss ce")
    return args


# --------------------------------------------------------------------------------------------------------------- losses


def log(p):
    return p.clamp(min=1e-7).log()


def js_divergence(distributions, weights):
    """Jensen-Shannon divergence sum_i pi_i KL(p_i || m) with m = sum_i pi_i p_i (equation 19): float [B], in nats.

    distributions: n tensors [B, C] of probabilities; weights: n floats pi_i that sum to 1, else ValueError.
    """
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f"weights {weights} sum to {sum(weights)}, not to 1")
    m = sum(pi * p for pi, p in zip(weights, distributions, strict=True))
    return sum(pi * (p * (log(p) - log(m))).sum(1) for pi, p in zip(weights, distributions))


def js_scale(pi1):
    """Z = -(1 - pi1) log(1 - pi1), by which the code of GJS divides so that its size matches cross-entropy's."""
    return -(1 - pi1) * math.log(1 - pi1)


def robust_loss(name, logits, y, params):
    """The losses that NRD is compared with (section 5.1), mean over the batch; logits [B, C], y one-hot [B, C].

    In gjs the logits are [2B, C]: of one augmented view of the batch, then of another.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    if name == "gjs":
        (pi1,) = params
        half = (1 - pi1) / 2
        return (js_divergence((y, *p.chunk(2)), (pi1, half, half)) / js_scale(pi1)).mean()
    log_p_y = (y * log_p).sum(1)
    p_y = log_p_y.exp()
    rce = -math.log(1e-4) * (1 - p_y)  # reverse cross-entropy, log 0 taken as log 1e-4
    if name == "ce":
        loss = -log_p_y
    elif name == "bs":  # soft bootstrapping; the gradient flows through the target too, as entropy regularisation
        (beta,) = params
        loss = -(((1 - beta) * y + beta * p) * log_p).sum(1)
    elif name == "ls":
        (epsilon,) = params
        loss = -(((1 - epsilon) * y + epsilon / y.shape[1]) * log_p).sum(1)
    elif name == "sce":
        alpha, beta = params
        loss = -alpha * log_p_y + beta * rce
    elif name == "gce":
        (q,) = params
        loss = (1 - (q * log_p_y).exp()) / q
    elif name == "nce+rce":
        alpha, beta = params
        loss = alpha * log_p_y / log_p.sum(1) + beta * rce
    elif name == "js":
        (pi1,) = params
        loss = js_divergence((y, p), (pi1, 1 - pi1)) / js_scale(pi1)
    return loss.mean()


def float_state(model):
    """What the EMA averages: weights and BatchNorm's running statistics, tensors that share the model's memory.

    The paper does not say what becomes of the statistics. Averaged, they lag behind the student's just as the weights
    that they belong to; the teacher predicts in evaluation mode, so that its own views never enter them.
    """
    return [value for value in model.state_dict().values() if value.is_floating_point()]


# ------------------------------------------------------------------------------------------------------------- training


def main():
    args = parse_args()
    device = common.setup(args)
    if args.analyze:
        return analyze(args, device)

    used = [args.student_augment, *([args.teacher_augment] if args.loss == "nrd" else [])]
    whole = all("resizedcrop" in text for text in used)  # then this crop is made here, from the whole shorter side
    data = common.load_data(args, device, window=args.resize if whole else None)
    num_classes = len(data.classes)
    labels = common.corrupt_labels(
        data.train_labels, args.noise, args.rate, num_classes, args.seed, data.classes, args.data_dir
    )
    stats, size = common.channel_stats(data.train_images), data.image_size
    model = common.build_model(args.arch, num_classes, 0.0, *stats, image_size=size).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    # on WebVision those of the appendix; the text of section 5.1 has 150 and 250 of 300
    shares = (1 / 3, 2 / 3) if common.of_photographs(args.dataset) else (0.5, 0.75)
    milestones = [math.ceil(share * args.epochs) for share in shares]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    run = common.Run(
        args, device, method=args.loss, arch=args.arch, classes=data.classes,
        model=model, ema=ema, optimizer=optimizer, scheduler=scheduler,
    )  # fmt: skip
    wrong = (labels != data.train_labels).float().mean().item()
    print(f"{len(labels):,} training images, {100 * wrong:.2f} % relabelled; {len(data.test_labels):,} test images")
    if args.compile:
        model.compile()
        ema.compile()
    scale = js_scale(args.loss_params[0]) if args.loss == "nrd" and args.jsd_scale else 1
    theta_bar, theta = float_state(ema), float_state(model)

    for _ in range(run.epoch, args.epochs):
        model.train()
        lr, losses, predicted = scheduler.get_last_lr()[0], [], torch.full_like(labels, -1)
        for index, images in run.progress(data.train_images, common.batches(len(labels), args.batch_size, device)):
            x = to_float(images)
            y = F.one_hot(labels[index], num_classes).float()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                if args.loss == "nrd":
                    logits = model(augment(x, args.student_augment, size)).float()
                    y_s = logits.softmax(1)  # equation 26
                    with torch.no_grad():  # the stop-gradient of Figure 3
                        views = [augment(x, args.teacher_augment, size) for _ in range(args.views)]
                        y_t = sum(ema(view).float().softmax(1) for view in views) / args.views  # equation 27
                    loss = js_divergence((y, y_s, y_t), args.loss_params).mean() / scale  # equation 25
                else:
                    views = [augment(x, args.student_augment, size) for _ in range(2 if args.loss == "gjs" else 1)]
                    logits = model(torch.cat(views)).float()
                    loss = robust_loss(args.loss, logits, y, args.loss_params)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            torch._foreach_lerp_(theta_bar, theta, 1 - args.beta)  # equation 24

            losses.append(loss.detach())
            predicted[index] = logits[: len(index)].argmax(1)
        scheduler.step()
        test_logits = predict(model, data.test_images, args.amp)
        run.end_epoch(
            losses,
            lr=lr,
            test_acc=accuracy(test_logits, data.test_labels),
            **common.more_accuracies(model, data, args.amp, test_logits),
            ema_test_acc=accuracy(predict(ema, data.test_images, args.amp), data.test_labels),
            **common.label_accuracies(predicted, labels, data.train_labels),
        )
    run.finish()


# ------------------------------------------------------------------------------------------------------------- analysis


def analyze(args, device):
    """The paper's look inside a model that has memorised noise (section 3.5), for any checkpoint of this script.

    Predictions on the training images as they are, and averaged over --views views by AutoAugment and random erasing,
    which the model has not trained on. Writes analysis.json and analysis.png into the checkpoint's folder (or --out).
    """
    checkpoint = common.load_checkpoint(args.analyze, "--analyze")
    config = checkpoint["config"]
    noise, data_dir = checkpoint["noise"], args.data_dir or Path(config["data_dir"])
    if common.of_photographs(config["dataset"]):
        raise UsageError(f"--analyze: {args.analyze} was trained on photographs; name a run whose images fit in memory")
    data = common.load_dataset(config["dataset"], data_dir, config["limit_train"], 1, device)
    given = common.corrupt_labels(
        data.train_labels, noise["kind"], noise["rate"], len(data.classes), noise["seed"], data.classes, data_dir
    )
    true, wrong = data.train_labels, given != data.train_labels
    if min(wrong.sum(), (~wrong).sum()) < 4:
        few = f"{wrong.sum()} of its {len(wrong)} labels are wrong"
        raise UsageError(f"--analyze: {args.analyze}: {few}; it takes 4 wrong and 4 right ones: train with --noise")
    model = common.load_model(checkpoint, "model", device)
    unseen, usual = "autoaugment+erasing", config.get("student_augment", "none")

    @torch.no_grad()
    def view(images, steps):
        """Softmax [N, C] of one view, augmented by `steps`, of each uint8 image."""
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            parts = images.split(common.PASS[device.type])
            return torch.cat([model(augment(to_float(part), steps)).float().softmax(1) for part in parts])

    predictions = {
        "not transformed": view(data.train_images, "none"),
        "transformed": sum(view(data.train_images, unseen) for _ in range(args.views)) / args.views,
    }

    # Table 1: accuracy for the true label
    subsets, table = {"clean": ~wrong, "mislabelled": wrong, "overall": torch.ones_like(wrong)}, {}
    for name, p in predictions.items():
        table[name] = {subset: accuracy(p[mask], true[mask]) for subset, mask in subsets.items()}
        print(f"{name:>16}: " + "  ".join(f"{k} {v:.2f} %" for k, v in table[name].items()))

    # Figure 1: cross-entropy with the true label of the mislabelled samples, and how far the two histograms lie apart
    from scipy.stats import mannwhitneyu  # a second to import, and only here

    nll = {name: -p[wrong, true[wrong]].clamp(min=1e-30).log().cpu() for name, p in predictions.items()}
    before, after = nll.values()
    auroc = float(mannwhitneyu(before.numpy(), after.numpy()).statistic) / (len(before) * len(after))
    # Figure 2b
    reliability = {name: common.calibration(p, true) for name, p in predictions.items()}
    result = {
        "checkpoint": str(args.analyze), "views": args.views, "accuracy_for_true_label": table, "auroc": auroc,
        "ece": {name: r[0] for name, r in reliability.items()},
    }  # fmt: skip
    print(f"AUROC {auroc:.4f}; " + ", ".join(f"ECE {name} {ece:.3f}" for name, ece in result["ece"].items()))

    # Figure 2a: four clean and four mislabelled samples, 40 views of each
    chosen = torch.cat([mask.nonzero().squeeze(1)[common.spread(int(mask.sum()), 4)] for mask in (~wrong, wrong)])
    repeated = data.train_images[chosen].repeat_interleave(40, 0)
    clouds = [view(repeated, steps).view(len(chosen), 40, -1).cpu() for steps in (usual, unseen)]

    folder = args.out or args.analyze.parent
    with common.replacing(folder / "analysis.json") as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")
    picture = folder / "analysis.png"
    draw_analysis(picture, nll, auroc, reliability, clouds, usual, given[chosen], true[chosen], data.classes)
    print(f"wrote {folder / 'analysis.json'} and analysis.png")


def draw_analysis(path, nll, auroc, reliability, clouds, usual, given, true, classes):
    """Figure 1 (histogram), 2b (calibration), 2a (softmax vectors in the polygon of classes: equiradial projection)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.4))
    histogram, calibration = left.subplots(2, 1)
    for (name, values), colour in zip(nll.items(), ("tab:red", "tab:blue")):
        histogram.hist(values.numpy(), bins=60, range=(0, 30), density=True, alpha=0.6, color=colour, label=name)
    histogram.set(
        title=f"mislabelled training samples, AUROC {auroc:.4f}", xlabel="-log p(true class)", ylabel="density"
    )
    histogram.legend()
    for (name, (ece, acc, _, _)), colour in zip(reliability.items(), ("tab:red", "tab:blue")):
        edges = [i / len(acc) for i in range(len(acc))]
        calibration.bar(edges, acc, 1 / len(acc), align="edge", alpha=0.5, color=colour, label=f"{name}, ECE {ece:.2f}")
    calibration.plot([0, 1], [0, 1], "k--")
    calibration.set(title="training samples against their true labels", xlim=(0, 1), ylim=(0, 1))
    calibration.set(xlabel="confidence", ylabel="accuracy")
    calibration.legend(loc="upper left")

    angles = torch.arange(len(classes)) * (2 * math.pi / len(classes))
    corners = torch.stack([angles.cos(), angles.sin()], 1)  # [C, 2]; a softmax vector p lies at p @ corners
    outline = torch.cat([corners, corners[:1]])
    for k, axes in enumerate(right.subplots(2, len(given) // 2).flat):
        axes.plot(*outline.T, "k-", lw=0.8)
        axes.plot(*(clouds[0][k] @ corners).T, "r+", ms=9, label=f"as in training: {usual}")
        axes.plot(*(clouds[1][k] @ corners).T, "b.", ms=7, alpha=0.6, label="unseen: AutoAugment + erasing")
        marks = {int(true[k]): "true", int(given[k]): "label" if given[k] != true[k] else "label, true"}
        for c, name in enumerate(classes):
            if c in marks or c % max(1, len(classes) // 20) == 0:
                text, weight = (f"{name}\n({marks[c]})", "bold") if c in marks else (name, "normal")
                axes.text(
                    *(1.2 * corners[c]), text, ha="center", va="center", fontsize=8, weight=weight, parse_math=False
                )
        kind = "clean" if given[k] == true[k] else "mislabelled"
        axes.set(title=kind, xlim=(-1.4, 1.4), ylim=(-1.35, 1.35), aspect="equal")
        axes.axis("off")
    right.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with common.replacing(path) as partial:
        figure.savefig(partial, dpi=100)


if __name__ == "__main__":
    common.run_main(main)
