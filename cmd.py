"""CMD: two networks that teach each other only what they are confident of, under label noise.

Each network refines the given label q by its own prediction p (self-distillation): q~ = (1 - eps) q + eps p, eps being
how far it may trust itself. It learns from its own refined label and, for the samples on which its peer is confident,
from the peer's. Confident means that the peer's entropy is below a threshold, which falls during training:

    L_A = H(q~_A, p_A) + [H(p_B) < chi] H(q~_B, p_A)          L_B = H(q~_B, p_B) + [H(p_A) < chi] H(q~_A, p_B)
    chi = H(u) / eta * 2 h(t / T - 1/2, b2)                   h(x, b) = 1 / (1 + exp(-b x))

Li, Wang, Yang, Hu, Robertson, Clifton, Meinel: Not All Knowledge Is Created Equal: Mutual Distillation of Confident
Knowledge. Equations 2-12, Tables 1-7, Figures 2-4, supplement A.2 and C.

    python cmd.py                                                            # built-in data
    python cmd.py --self-kd ce --select zero                                 # the same with plain cross-entropy
    python cmd.py --dataset cifar100 --self-kd mconf --select progressive    # a cell of Table 1
    python cmd.py --dataset cifar100 --mutual kdcl                           # … of Table 5
    python cmd.py --dataset cifar100 --arch resnet18 --arch-b shufflenet_v2  # … of Table 6
    python cmd.py --dataset food101                                          # … of Table 4; and --dataset webvision

Attained by the first two commands: 63.2 and 49.3 % test accuracy (mean of A and B, last epoch, n = 1) in 1:18 minutes
on two CPU cores. README.md has Table 1 in miniature. Not yet run at the paper's size (Mconf, progressive: 69.09).

To know before reading on: targets are constants. So a network's own prediction in its label changes the size of its
gradient, not the direction: with Boot-soft, CP, ProSelfLC and Mconf the gradient of H(q~, p) by the logits is
(1 - eps) (p - q). They weigh samples; what p says is felt by the peer. And with --self-kd ce the peer's label is the
given one: a sample of which the peer is sure counts twice.

Our choices where the paper is silent: eps is 0.1 for LS and CP and 0.05 for Boot-soft, as in their own papers; b1 = 16.
CMD-S has eta = 4, the one of Table 7 that agrees with Table 1; CMD-P eta = 2, b2 = -8. t counts epochs, 1 … T. Mconf
has r = 0 in the first epoch. Tf-KD_reg is the label 0.9 q + 0.1 softmax(p_d / 20), p_d being 0.99 at the label.
SyncMKD and AsyncMKD have eps = 0.5. KDCL is its MinLogit, temperature 2, weight 1. Crops come with flips, as in the
paper of ResNet. ResNet-50 follows the settings of CDR as we know them: 100 epochs, lr 0.01, ×0.1 after 40 and 80,
weight decay 1e-3, batches of 64. Of WebVision's photographs the shorter side becomes 320 pixels, where the paper has
320 × 320; photographs are cropped as they are read. Table 1's cell CE, all is Table 5's SyncMKD: --mutual sync.

`import cmd` is Python's module of that name; to import from this file, copy it under another one.
"""

if __name__ == "cmd":  # pdb and others import Python's own module of this name, and find this file first: it gives way
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    spec = PathFinder.find_spec("cmd", elsewhere)
    sys.modules["cmd"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cmd"])
else:  # nothing outside functions may need these
    import argparse
    import math

    import torch
    import torch.nn.functional as F

    import common
    from common import UsageError, accuracy, number, one_of, predict, to_float

# -------------------------------------------------------------------------------------------------------- configuration

SELF_KD = {  # Table 2 and Tf-KD_reg: epsilon, where it is fixed
    "ce": 0.0, "ls": 0.1, "cp": 0.1, "boot-soft": 0.05, "proselflc": None, "mconf": None, "tf-kd-reg": 0.1,
}  # fmt: skip
SELECT = {  # equation 12: eta, b2
    "zero": (-1.0, 0.0), "all": (1.0, 0.0), "static": (4.0, 0.0), "progressive": (2.0, -8.0),
}  # fmt: skip
SCHEDULES = {  # A.2: epochs, batch size, lr, weight decay, epochs after which lr is multiplied by, this
    "resnet34": (100, 128, 0.1, 5e-4, (50, 80), 0.1),
    "resnet50": (100, 64, 0.01, 1e-3, (40, 80), 0.1),
    "wrn-10-1": (20, 32, 0.05, 5e-4, (10, 16), 0.1),  # ours: shapes
    "food101": (100, 32, 0.01, 5e-4, (50, 80), 0.1),  # ResNet-50; any other photographs too
    "webvision": (80, 32, 0.01, 5e-4, tuple(range(40, 80)), 0.1),  # Inception-ResNet-v2
    "other": (200, 128, 0.1, 5e-4, (60, 120, 160), 0.2),  # ResNet-18, ShuffleNetV2
}
OWN_FLAGS = {
    "ls": ["epsilon"], "cp": ["epsilon"], "boot-soft": ["epsilon"], "tf-kd-reg": ["epsilon"],
    "proselflc": ["b1"], "mconf": ["b1"], "static": ["eta"], "progressive": ["eta", "b2"],
    "sync": ["epsilon"], "async": ["epsilon"],
}  # fmt: skip


def schedule(args, arch):
    """The row of SCHEDULES: by architecture, of photographs by data set."""
    if common.of_photographs(args.dataset):
        return SCHEDULES["webvision" if args.dataset == "webvision" else "food101"]
    return SCHEDULES.get(arch, SCHEDULES["other"])


def preset(args):
    """What the flags left unset: A.2 for architecture or data set; on shapes a small net, which memorises uncropped."""
    shapes, photographs = args.dataset in (None, "shapes"), common.of_photographs(args.dataset)
    arch = {"webvision": "inception_resnet_v2"}.get(args.dataset, "resnet50") if photographs else "resnet34"
    arch = args.arch or ("wrn-10-1" if shapes else arch)
    epochs, batch_size, lr, weight_decay, _, _ = schedule(args, arch)
    eta, b2 = SELECT[args.select or "progressive"]
    noise = args.noise or ("none" if photographs else "sym-other")  # photographs have wrong labels of their own
    fixed = noise in ("none", *common.HUMAN)  # these have a rate of their own
    run = {
        "noise": noise, "rate": None if fixed else 0.4, "arch": arch, "arch_b": arch, "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "augment": "none" if shapes else "crop",
    }  # fmt: skip
    run |= {"pretrained": args.dataset == "food101"}
    run |= {"resize": 320, "image_size": 299} if args.dataset == "webvision" else {}
    if args.mutual == "cmd":
        self_kd = args.self_kd or "proselflc"
        run |= {"self_kd": self_kd, "select": "progressive", "eta": eta, "b2": b2, "epsilon": SELF_KD[self_kd]}
        run |= {"b1": 16.0} if SELF_KD[self_kd] is None else {}
    elif args.mutual != "kdcl":
        run["epsilon"] = 0.5
    return run


def parse_args():
    parser = common.Parser(__doc__)
    common.add_common_arguments(parser)
    add = parser.add_argument_group("two networks").add_argument
    names = "resnet34; on shapes wrn-10-1, food101 resnet50, webvision inception_resnet_v2"
    add("--arch", help=f"of A, and of B too (default: {names})")
    add("--arch-b", metavar="ARCH", help="of B, where it is another")
    add("--augment", type=one_of("crop", "none"), help="crop: padded by 4, and flips (default: crop; on shapes none)")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="torchvision's ImageNet weights (default: food101)")
    add("--validation", type=number(float, 0, 0.9), default=0.0, metavar="SHARE", help="of training, clean, held out")
    add = parser.add_argument_group("method (equations 2-12)").add_argument
    add("--self-kd", type=one_of(*SELF_KD), help=" | ".join(SELF_KD) + " (default: proselflc)")
    add("--epsilon", type=number(float, 0, 1), help="self trust of ls, cp, boot-soft, tf-kd-reg; peer's, of (a)sync")
    add("--b1", type=number(float, 0), help="steepness of the trust of proselflc and mconf (default: 16)")
    add("--select", type=one_of(*SELECT), help=" | ".join(SELECT) + " (default: progressive)")
    add("--eta", type=number(float, 1e-3), help="divides the threshold (default: static 4, progressive 2)")
    add("--b2", type=number(float, -1e9), help="below 0 the threshold falls, above it rises (default: -8)")
    add("--mutual", default="cmd", type=one_of("cmd", "sync", "async", "kdcl"), help="cmd | sync | async | kdcl")
    args = parser.parse_args()
    if args.mutual == "cmd":
        chosen = [args.self_kd or "proselflc", args.select or "progressive"]
    elif args.self_kd or args.select:
        raise UsageError(f"--self-kd, --select: --mutual {args.mutual} has neither; leave them out")
    else:
        chosen = [args.mutual]
    for name in ("epsilon", "b1", "eta", "b2"):
        if getattr(args, name) is not None and not any(name in OWN_FLAGS.get(choice, ()) for choice in chosen):
            raise UsageError(f"--{name}: {' with '.join(chosen)} does not use it; leave it out")
    common.fill(args, preset(args))
    args.arch_b = args.arch_b or args.arch
    return args


# ----------------------------------------------------------------------------------------------------------- the method
# S: logits [B, C]; p: their softmax; q: given labels, one-hot, and q~ refined ones, [B, C]; entropies in nats.


def logistic(x, b):
    """h(x, b) = 1 / (1 + exp(-b x))."""
    return 0.5 + 0.5 * math.tanh(b * x / 2)  # the same, and never too large


def entropy(p):
    """H(p) of each row: [B]."""
    return torch.special.entr(p).sum(1)


def self_trust(p, g):
    """eps = g l(p) with l(p) = 1 - H(p) / H(u), equation 5: [B, 1]. g: trust in the network as a whole, in [0, 1]."""
    return g * (1 - entropy(p) / math.log(p.shape[1])).unsqueeze(1)


def refined_label(self_kd, q, p, epsilon):
    """The label q~ of Table 2, without gradient. epsilon: a float, or [B, 1] from self_trust; p: own prediction."""
    if self_kd == "ls":
        other = torch.full_like(q, 1 / q.shape[1])
    elif self_kd == "cp":
        other = -p
    elif self_kd == "tf-kd-reg":  # a virtual teacher that is right in 99 % (Yuan et al. 2020)
        other = (torch.where(q == 1, 0.99, 0.01 / (q.shape[1] - 1)) / 20).softmax(1)
    else:  # boot-soft, proselflc, mconf; ce, where epsilon is 0
        other = p
    return ((1 - epsilon) * q + epsilon * other).detach()


def threshold(t, eta, b2, num_classes):
    """chi in nats at the share t in [0, 1] of training, equation 12; eta infinite or negative selects nothing."""
    return math.log(num_classes) / eta * 2 * logistic(t - 0.5, b2)


def cmd_losses(q_A, q_B, S_A, S_B, chi):
    """L_A and L_B of equations 10 and 11, means over the whole batch; and who is confident, bool [2, B], A first."""
    sure_A, sure_B = (entropy(S.detach().softmax(1)) < chi for S in (S_A, S_B))
    loss_A = F.cross_entropy(S_A, q_A, reduction="none") + sure_B * F.cross_entropy(S_A, q_B, reduction="none")
    loss_B = F.cross_entropy(S_B, q_B, reduction="none") + sure_A * F.cross_entropy(S_B, q_A, reduction="none")
    return loss_A.mean(), loss_B.mean(), torch.stack([sure_A, sure_B])


def kdcl_teacher(S_A, S_B, y):
    """KDCL-MinLogit (Guo et al. 2020): of both networks' logits less the label's own, the smaller: [B, C], detached."""
    return torch.minimum(*(S.detach() - S.detach().gather(1, y.unsqueeze(1)) for S in (S_A, S_B)))


def kl_divergence(S, T):
    """KL(softmax T || softmax S), mean over the batch."""
    return F.kl_div(S.log_softmax(1), T.log_softmax(1), log_target=True, reduction="batchmean")


# ------------------------------------------------------------------------------------------------------------- training


def hold_out(count, share, seed):
    """Indices of training and of validation samples, both ascending."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2**63 - 1 - seed))  # not the noise's order
    held = round(share * count)
    return order[held:].sort().values, order[:held].sort().values


def main():
    args = parse_args()
    device = common.setup(args)
    data = common.load_data(args, device)
    num_classes = len(data.classes)
    labels = common.corrupt_labels(
        data.train_labels, args.noise, args.rate, num_classes, args.seed, data.classes, args.data_dir
    )
    kept, held = hold_out(len(labels), args.validation, args.seed)
    if not len(kept) or args.validation and not len(held):
        raise UsageError(f"--validation: {args.validation:g} of {len(labels)} samples leaves one part empty")
    held_images, seen = common.decoded(data.train_images[held])
    held_labels = data.train_labels[held][seen]
    train_images, labels, true = data.train_images[kept], labels[kept], data.train_labels[kept]
    stats = common.channel_stats(train_images)
    how = {"image_size": data.image_size, "pretrained": args.pretrained and not args.resume}
    A = common.build_model(args.arch, num_classes, 0.0, *stats, **how).to(device)
    try:
        B = common.build_model(args.arch_b, num_classes, 0.0, *stats, **how).to(device)
    except UsageError as error:
        raise UsageError(str(error).replace("--arch:", "--arch-b:")) from None
    optimizer = torch.optim.SGD(
        [*A.parameters(), *B.parameters()], args.lr, momentum=0.9, weight_decay=args.weight_decay
    )
    epochs, _, _, _, milestones, gamma = schedule(args, args.arch)
    milestones = [math.ceil(m / epochs * args.epochs) for m in milestones]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
    selective = args.select in ("static", "progressive")
    run = common.Run(
        args, device, method=f"{args.self_kd}-{args.select}" if args.mutual == "cmd" else args.mutual, arch=args.arch,
        classes=data.classes, tag=f"eta{args.eta:g}b{args.b2:g}" if selective else "",
        model=A, peer=B, optimizer=optimizer, scheduler=scheduler,
    )  # fmt: skip
    run.header["archs"] = {"peer": args.arch_b}
    wrong = (labels != true).float().mean().item()
    print(f"{len(labels):,} training images, {100 * wrong:.2f} % relabelled; {len(data.test_labels):,} test images")
    if args.compile:
        A.compile()
        B.compile()

    padding = 0 if common.of_photographs(args.dataset) else 4  # these are cropped as they are read

    for epoch in range(run.epoch, args.epochs):
        A.train()
        B.train()
        lr, losses, predicted = scheduler.get_last_lr()[0], [], torch.full((2, len(labels)), -1, device=device)
        sent, uncertainty = torch.zeros(2, device=device), torch.zeros(2, device=device)
        t = (epoch + 1) / args.epochs
        epsilon, chi = (args.epsilon, args.epsilon), None
        if args.mutual == "cmd":
            chi = threshold(t, args.eta, args.b2, num_classes)
        if args.b1 is not None:  # trust in a network: ProSelfLC's grows with time, Mconf's with its certainty
            certainty = run.metrics[-1]["certainty"] if run.metrics else (0, 0)
            trust = [logistic(c - 0.5, args.b1) for c in (certainty if args.self_kd == "mconf" else (t, t))]

        order = common.batches(len(labels), args.batch_size, device)
        for step, (index, images) in enumerate(run.progress(train_images, order), epoch * len(order) + 1):
            x, y = to_float(images), labels[index]
            x = common.crop_flip(x, padding) if args.augment == "crop" else x
            q = F.one_hot(y, num_classes).float()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                S_A, S_B = A(x).float(), B(x).float()
                p_A, p_B = S_A.detach().softmax(1), S_B.detach().softmax(1)
                if args.mutual == "cmd":
                    if args.b1 is not None:
                        epsilon = self_trust(p_A, trust[0]), self_trust(p_B, trust[1])
                    q_A, q_B = (refined_label(args.self_kd, q, p, eps) for p, eps in zip((p_A, p_B), epsilon))
                    loss_A, loss_B, confident = cmd_losses(q_A, q_B, S_A, S_B, chi)
                    sent += confident.sum(1)
                elif args.mutual == "kdcl":
                    T = kdcl_teacher(S_A, S_B, y)
                    loss_A, loss_B = (F.cross_entropy(S, y) + 4 * kl_divergence(S / 2, T / 2) for S in (S_A, S_B))
                else:  # equations 2-4: the peer's prediction is mixed into the label
                    loss_A = F.cross_entropy(S_A, (1 - args.epsilon) * q + args.epsilon * p_B)
                    loss_B = F.cross_entropy(S_B, (1 - args.epsilon) * q + args.epsilon * p_A)
                loss = loss_A + loss_B
                if args.mutual == "async":  # one network learns at a time
                    loss = loss_A if step % 2 == 1 else loss_B
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            predicted[:, index] = torch.stack([p_A.argmax(1), p_B.argmax(1)])
            uncertainty += torch.stack([entropy(p_A).sum(), entropy(p_B).sum()])
        scheduler.step()

        logits = [predict(net, data.test_images, args.amp) for net in (A, B)]
        each = [accuracy(S, data.test_labels) for S in logits]
        more = [common.more_accuracies(net, data, args.amp, S) for net, S in zip((A, B), logits)]
        validation = [accuracy(predict(net, held_images, args.amp), held_labels) for net in (A, B)] if len(held) else []
        common.average([uncertainty])
        seen = len(order) * len(order[0])
        run.end_epoch(
            losses,
            lr=lr,
            test_acc=sum(each) / 2,
            test_acc_A=each[0],
            test_acc_B=each[1],
            **{name: (more[0][name] + more[1][name]) / 2 for name in more[0]},
            val_acc=sum(validation) / 2 if validation else None,
            threshold=chi,
            communication=int(common.total(sent).sum()) if args.mutual == "cmd" else None,
            certainty=(1 - uncertainty / (seen * math.log(num_classes))).tolist(),
            **common.label_accuracies(predicted.flatten(), labels.repeat(2), true.repeat(2)),
        )
    run.finish()
    if args.mutual == "cmd":
        draw(run, 2 * len(labels))


def draw(run, everything):
    """communication.png: Figure 2, how many samples an epoch one network teaches the other, and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [record["epoch"] for record in run.metrics]
    axes.plot(
        epochs, [record["communication"] for record in run.metrics], ".-", label="samples taught, A to B plus B to A"
    )
    axes.axhline(everything, color="grey", lw=0.8, ls="--", label="all")
    axes.set_title(run.folder.name, parse_math=False)
    axes.set(xlabel="epoch", ylabel="knowledge communication (samples)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    chi = axes.twinx()
    chi.plot(epochs, [record["threshold"] for record in run.metrics], "k:", label="threshold (right)")
    chi.set(ylabel="entropy (nats)")
    figure.legend(handles=[*axes.get_lines(), *chi.get_lines()], loc="outside lower center", ncols=3, fontsize="small")
    with common.replacing(run.folder / "communication.png") as partial:
        figure.savefig(partial, dpi=110)


if __name__ == "__main__":
    common.run_main(main)
