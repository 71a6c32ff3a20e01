"""CMD: two networks that teach each other only what they are confident of, under label noise.

Each network refines the given label q by its prediction p, which it trusts by eps: q~ = (1 - eps) q + eps p.
It learns from its own refined label. Where its peer is confident of a sample, it learns from the peer's label
too. It is confident where the entropy H of its prediction is below chi, which falls in training (u: uniform).

    L_A = H(q~_A, p_A) + [H(p_B) < chi] H(q~_B, p_A)         L_B = H(q~_B, p_B) + [H(p_A) < chi] H(q~_A, p_B)
    chi = H(u) / eta * 2 h(t / T - 1/2, b2)                  h(x, b) = 1 / (1 + exp(-b x))

Li, Wang, Yang, Hu, Robertson, Clifton, Meinel: Not All Knowledge Is Created Equal: Mutual Distillation of
Confident Knowledge. Equations 2-12, supplement A.2 and C.

    python cmd.py                                             # built-in data, CMD-P: 70.6 ± 2.0
    python cmd.py --select zero                               # without a peer: 54.9 ± 1.3
    python cmd.py --self-kd ce --select zero                  # plain cross-entropy: 54.1 ± 2.2
    python cmd.py --dataset cifar100 --self-kd mconf          # a cell of Table 1; the paper has 69.09

Test accuracy in %, mean of A and B, last epoch, n = 5, on a CPU. Not yet run at the paper's size.
In this order: the method; main, the loop; its rivals; settings and flags; NOTES, every table's command.
"""

if __name__ == "cmd":  # `import cmd` means Python's module of this name, as in pdb; this file is found first
    import runpy
    import sysconfig

    globals().update(runpy.run_path(sysconfig.get_path("stdlib") + "/cmd.py", run_name="cmd"))
else:  # nothing outside functions may need these
    import argparse
    import math

    import torch
    import torch.nn.functional as F

    import common
    from common import UsageError, accuracy, predict, refuse, share

# ------------------------------------------------------------------------------------------------- the method
# p: predictions, the softmax of logits S. q: labels, one-hot; q~: refined. All [B, C]; entropies in nats.


def logistic(x, b):
    """h(x, b) = 1 / (1 + exp(-b x))."""
    return 0.5 + 0.5 * math.tanh(b * x / 2)  # the same, and never too large


def entropy(p):
    """H(p) of each row: [B]."""
    return torch.special.entr(p).sum(1)


def cross_entropy(q, p):
    """H(q, p) of each row: [B]. The 1e-6 is that of supplement C: no class costs more than 13.8."""
    return -(q * (p + 1e-6).log()).sum(1)


def self_trust(p, g):
    """eps = g l(p) with l(p) = 1 - H(p) / H(u), equation 5: [B, 1], no gradient. g: trust in the network."""
    return g * (1 - entropy(p.detach()) / math.log(p.shape[1])).unsqueeze(1)


def refined_label(self_kd, q, p, epsilon):
    """The label q~ of Table 2: [B, C]. p: own prediction, with gradient. epsilon: a float or [B, 1]."""
    if self_kd == "ls":
        other = torch.full_like(q, 1 / q.shape[1])
    elif self_kd == "cp":
        other = -p
    elif self_kd == "tf-kd-reg":  # a virtual teacher that is right in 99 % (Yuan et al. 2020)
        other = (torch.where(q == 1, 0.99, 0.01 / (q.shape[1] - 1)) / 20).softmax(1)
    else:  # boot-soft, proselflc, mconf; ce, where epsilon is 0
        other = p
    return (1 - epsilon) * q + epsilon * other


def threshold(t, eta, b2, num_classes):
    """chi in nats at the share t in [0, 1] of training, equation 12. A negative eta selects nothing."""
    return math.log(num_classes) / eta * 2 * logistic(t - 0.5, b2)


def cmd_losses(q_A, q_B, p_A, p_B, chi):
    """L_A and L_B of equations 10 and 11, batch means, and where A and B are confident, bool [2, B]."""
    sure_A, sure_B = entropy(p_A) < chi, entropy(p_B) < chi
    B2A = sure_B * cross_entropy(q_B.detach(), p_A)  # equation 8
    A2B = sure_A * cross_entropy(q_A.detach(), p_B)  # equation 9
    loss_A, loss_B = cross_entropy(q_A, p_A) + B2A, cross_entropy(q_B, p_B) + A2B
    return loss_A.mean(), loss_B.mean(), torch.stack([sure_A, sure_B])


# --------------------------------------------------------------------------------------------------- training


def main(args):
    device = common.setup(args)
    data = common.load_data(args, device)
    num_classes = len(data.classes)
    size = data.image_size
    labels = common.noisy_labels(args, data)
    draw = torch.Generator().manual_seed(2**63 - 1 - args.noise_seed)  # the label noise has another one
    order = torch.randperm(len(labels), generator=draw).to(device)
    held_out = round(args.validation * len(labels))
    if held_out == len(labels):
        raise UsageError("--validation: holds out every image; below 1 some are left to train on")
    held = order[:held_out].sort().values
    kept = order[held_out:].sort().values
    wrong = 100 * (labels != data.train_labels)[kept].float().mean().item()
    print(f"{len(kept):,} training images, {wrong:.2f} % relabelled; {len(data.test_labels):,} test images")
    stats = common.channel_stats(data)
    A = common.build_model(args.arch, num_classes, 0.0, *stats, size, args.pretrained, args.amp).to(device)
    B = common.build_model(args.arch_b, num_classes, 0.0, *stats, size, args.pretrained, args.amp).to(device)
    parameters = [*A.parameters(), *B.parameters()]
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.milestones, args.gamma)
    run = common.Run(args, device, data)
    run.track(model=A, peer=B, optimizer=optimizer, scheduler=scheduler)
    if args.compile:
        A.compile()
        B.compile()
    steps = max(1, len(kept) // args.batch_size)  # per epoch

    for epoch in range(run.epoch, run.epochs):
        A.train()
        B.train()
        t = (epoch + 1) / args.epochs
        lr = scheduler.get_last_lr()[0]
        losses = []
        predicted = torch.full((2, len(labels)), -1, device=device)  # by A and B
        sent, uncertainty, seen = torch.zeros(3, 2, device=device)
        if args.mutual == "cmd":
            chi = threshold(t, args.eta, args.b2, num_classes)
            certainty = [t, t]  # trust in a network grows with time
            if args.self_kd == "mconf":  # with its certainty in the epoch before
                certainty = run.metrics[-1]["certainty"] if run.metrics else [0, 0]
            trust_A, trust_B = [logistic(r - 0.5, args.b1) for r in certainty]
        for step, index in enumerate(run.batches(len(kept), args.batch_size), 1):
            index = kept[index]
            x, y = data.batch(index), labels[index]
            if args.augment == "crop":
                x = common.crop_flip(x, 0 if data.photographs else 4, size=size)
            q = F.one_hot(y, num_classes).float()
            S_A, S_B = A(x), B(x)
            p_A, p_B = S_A.softmax(1), S_B.softmax(1)
            if args.mutual == "cmd":
                epsilon_A = epsilon_B = args.epsilon
                if args.epsilon is None:
                    epsilon_A = self_trust(p_A, trust_A)
                    epsilon_B = self_trust(p_B, trust_B)
                q_A = refined_label(args.self_kd, q, p_A, epsilon_A)
                q_B = refined_label(args.self_kd, q, p_B, epsilon_B)
                loss_A, loss_B, confident = cmd_losses(q_A, q_B, p_A, p_B, chi)
                sent += confident.sum(1)
            elif args.mutual == "kdcl":
                T = kdcl_teacher(S_A, S_B, y)
                loss_A = F.cross_entropy(S_A, y) + hinton_loss(S_A, T, tau=2)
                loss_B = F.cross_entropy(S_B, y) + hinton_loss(S_B, T, tau=2)
            else:  # equations 2-4: the peer's prediction is mixed into the label
                loss_A = cross_entropy((1 - args.epsilon) * q + args.epsilon * p_B.detach(), p_A).mean()
                loss_B = cross_entropy((1 - args.epsilon) * q + args.epsilon * p_A.detach(), p_B).mean()
            loss = loss_A + loss_B
            if args.mutual == "async":  # equation 2: they take turns, step by step
                loss = loss_A if (epoch * steps + step) % 2 == 1 else loss_B
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            predicted[:, index] = torch.stack([p_A.argmax(1), p_B.argmax(1)])
            uncertainty += torch.stack([entropy(p_A).sum(), entropy(p_B).sum()]).detach()
            seen += len(index)
        scheduler.step()

        of_A = common.test_accuracies(A, data)
        of_B = common.test_accuracies(B, data)
        metrics = {key: (of_A[key] + of_B[key]) / 2 for key in of_A}
        metrics |= {"test_acc_A": of_A["test_acc"], "test_acc_B": of_B["test_acc"]}
        if held_out:
            images = data.train_images[held.to(data.train_images.device)]
            scores = [accuracy(predict(net, images), data.train_labels[held]) for net in (A, B)]
            metrics["val_acc"] = sum(scores) / 2
        sent, uncertainty, seen = common.all_reduce(torch.stack([sent, uncertainty, seen]))
        if args.mutual == "cmd":
            metrics |= {"threshold": chi, "communication": int(sent.sum())}
        certainty = (1 - uncertainty / (seen * math.log(num_classes))).tolist()
        memory = common.label_accuracies(predicted.flatten(), labels.repeat(2), data.train_labels.repeat(2))
        run.end_epoch(losses, lr=lr, **metrics, certainty=certainty, **memory)
    return run.finish()


# ----------------------------------------------------------------------------------------------------- rivals


def kdcl_teacher(S_A, S_B, y):
    """KDCL-MinLogit (Guo et al. 2020): the smaller of both logits less the label's: [B, C], detached."""
    less_A = S_A - S_A.gather(1, y.unsqueeze(1))
    less_B = S_B - S_B.gather(1, y.unsqueeze(1))
    return torch.minimum(less_A, less_B).detach()


def hinton_loss(S, T, tau):
    """tau² KL(softmax(T / tau) || softmax(S / tau)), mean over the batch (Hinton et al. 2015)."""
    log_S, log_T = (S / tau).log_softmax(1), (T / tau).log_softmax(1)
    return tau**2 * F.kl_div(log_S, log_T, log_target=True, reduction="batchmean")


# ---------------------------------------------------------------------------------------------- configuration

ARCHITECTURES = {"shapes": "wrn-10-1", "webvision": "inception_resnet_v2"}
SCHEDULES = {  # A.2, by architecture, of photographs by data set; the last one is ours, for shapes
    # epochs, batch size, lr, weight decay, epochs after which lr falls, factor by which it falls
    "resnet34": (100, 128, 0.1, 5e-4, (50, 80), 0.1),
    "resnet50": (200, 64, 0.01, 1e-3, (40, 80), 0.1),
    "resnet18": (200, 128, 0.1, 5e-4, (60, 120, 160), 0.2),  # shufflenet_v2 too, and what has no row
    "food101": (100, 32, 0.01, 5e-4, (50, 80), 0.1),
    "webvision": (80, 32, 0.01, 5e-4, range(40, 80), 0.1),
    "wrn-10-1": (20, 32, 0.05, 5e-4, (10, 16), 0.1),
}
SELECT = {  # eta, eta on shapes, b2
    "zero": (-1.0, -1.0, 0.0),
    "all": (1.0, 1.0, 0.0),
    "static": (4.0, 2.0, 0.0),
    "progressive": (4.0, 1.0, -8.0),
}
EPSILON = {  # Table 2 and Tf-KD_reg: how far a network trusts itself; None: self_trust decides
    "ce": 0.0, "ls": 0.1, "cp": 0.1, "boot-soft": 0.05, "proselflc": None, "mconf": None, "tf-kd-reg": 0.1,
}  # fmt: skip


def preset(args):
    """The flags that are left out, from A.2; `milestones` and `gamma` of lr, which have no flag."""
    photographs = common.is_photographs(args.dataset)
    arch = args.arch or ARCHITECTURES.get(args.dataset, "resnet50" if photographs else "resnet34")
    if photographs:
        row = SCHEDULES.get(args.dataset, SCHEDULES["food101"])
    else:
        row = SCHEDULES.get(arch, SCHEDULES["resnet18"])
    epochs, batch_size, lr, weight_decay, drops, gamma = row
    noise = args.noise or ("sym-other" if args.dataset in common.CLEANLY_LABELLED else "none")
    values = {
        "arch": arch, "arch_b": arch, "pretrained": args.dataset == "food101",
        "augment": "none" if args.dataset == "shapes" else "crop",
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "gamma": gamma,
        "milestones": [math.ceil(drop * (args.epochs or epochs) / epochs) for drop in drops],
        "noise": noise, "rate": None if noise in ("none", *common.HUMAN) else 0.4,
    }  # fmt: skip
    if args.dataset == "webvision":
        values |= {"resize": 320, "image_size": 299}
    if args.mutual != "cmd":
        return values | {"epsilon": 0.5}
    self_kd = args.self_kd or "proselflc"
    select = args.select or "progressive"
    eta, eta_on_shapes, b2 = SELECT[select]
    return values | {
        "self_kd": self_kd, "epsilon": EPSILON[self_kd], "b1": 16.0, "select": select,
        "eta": eta_on_shapes if args.dataset == "shapes" else eta, "b2": b2,
    }  # fmt: skip


def parse_args():
    parser = common.argument_parser(__file__, __doc__, NOTES)
    add = parser.add_argument_group("two networks").add_argument
    add("--arch", help="architecture of A, and of B where --arch-b is left out")
    add("--arch-b", metavar="ARCH", help="architecture of B")
    add("--augment", choices=("crop", "none"), help="augmentation; crop: pad by 4 pixels, crop and flip")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="start from torchvision's weights")
    add("--validation", type=share, default=0.0, metavar="SHARE",
        help="share of the training images to hold out, with their true labels, for val_acc")  # fmt: skip
    add = parser.add_argument_group("method (equations 2-12)").add_argument
    add("--self-kd", choices=EPSILON, help="row of Table 2, by which a network refines its label")
    add("--epsilon", type=share,
        help="trust of a network in itself; sync, async: in its peer; None: equation 5")  # fmt: skip
    add("--b1", type=float, help="steepness of the trust of proselflc and mconf")
    add("--select", choices=SELECT, help="selection of the samples whose label the peer gets")
    add("--eta", type=float, help="divisor of the threshold")
    add("--b2", type=float, help="steepness of the threshold: below 0 it falls, above 0 it rises")
    add("--mutual", default="cmd", choices=("cmd", "sync", "async", "kdcl"), help="cmd, or rival of Table 5")
    args = common.parse(parser, preset)
    if args.mutual != "cmd":
        refuse(args, ("self_kd", "select", "b1", "eta", "b2"), f"--mutual {args.mutual} has none")
    elif args.self_kd not in ("proselflc", "mconf"):
        refuse(args, ("b1",), f"--self-kd {args.self_kd} has none")
    if args.mutual == "kdcl":
        refuse(args, ("epsilon",), "--mutual kdcl has none")
    if args.self_kd in ("ce", "proselflc", "mconf"):
        refuse(args, ("epsilon",), f"--self-kd {args.self_kd} decides it")
    if args.eta == 0:
        raise UsageError("--eta: 0 cannot divide the threshold; below 0 no sample is sent")
    return args


# ------------------------------------------------------------------------------------------------------ notes

NOTES = """
A line that begins with CMD or zero has the paper's own figures.

Table 1     --dataset cifar100 --self-kd {ce,ls,cp,proselflc,mconf} --select {zero,all,static,progressive}
            except the cell CE, all, which is SyncMKD of Table 5: --dataset cifar100 --mutual sync
            zero:  48.74 51.53 50.06 62.75 65.04
            CMD-S: 52.52 55.10 53.86 67.26 68.45
            CMD-P: 54.28 56.73 56.47 68.29 69.09
Table 2     refined_label
Table 3     --dataset cifar100 with --noise {pair,sym-other} --rate {0.2,0.4} or --noise none, and
            --self-kd {ce,ls,cp,boot-soft,proselflc,mconf} --select zero;
            --self-kd {proselflc,mconf} --select {static,progressive}
            CMD-P, ProSelfLC: pair 75.76 74.55, sym-other 72.58 68.29, none 77.32
            CMD-P, Mconf:     pair 75.89 74.72, sym-other 73.22 69.09, none 76.42
Table 4     --dataset {food101,webvision}; --dataset cifar100 --arch resnet50 --noise {pair,sym-other}
            --rate {0.2,0.4}; with --self-kd ce --select zero; --self-kd {proselflc,mconf}
            --select {zero,progressive}. For WebVision the paper tests on ILSVRC12's images: imagenet_acc
            CMD-P, ProSelfLC: pair 75.16 73.36, sym-other 73.25 64.09, Food-101 87.54, WebVision 67.40
            CMD-P, Mconf:     pair 74.38 73.86, sym-other 72.23 64.30, Food-101 87.60, WebVision 67.48
Table 5     Table 1; --self-kd tf-kd-reg --select zero; --mutual {kdcl,sync,async}
            CMD-P: ProSelfLC 68.29, Mconf 69.09
Table 6     Table 5 with --arch resnet18 --arch-b shufflenet_v2
            CMD-P: ProSelfLC 65.77 59.77, Mconf 68.10 64.37
Table 7     --dataset cifar100 --rate {0.2,0.4,0.6,0.8} --select static --eta {1,2,3,4}
            CMD-S: eta 1 70.37 59.26 36.18 16.17, eta 2 72.11 65.04 46.15 18.62, eta 4 73.25 67.26 54.34 22.45
Figure 2    --dataset cifar100 --eta 2: communication in curves.png
Figure 4a   --dataset cifar100 --rate {0.2,0.4,0.6,0.8} --eta 2 --b2 {-16,-8,-4,0,4}
Figure 4b   --dataset cifar100 --rate 0.6 --eta {2,3,4} --b2 {-16,-8,-4,0,4}
            b1, b2 and eta are chosen by the same with --validation 0.1, which holds out clean samples

The paper's tables disagree. CMD-S with ProSelfLC at 20 % is 72.11 in Table 3, which Table 7 has for eta = 2
(eta = 4: 73.25). At 40 % both have 67.26, which is eta = 4. Without a peer Table 1 has 48.74 (CE), 50.06 (CP)
and 62.75 (ProSelfLC), Table 3 for the same 47.20, 51.09 and 64.07. Table 4's caption has ResNet-50
throughout, A.2 Inception-ResNet-v2 for WebVision, which is taken here.

From code. H(q, p) takes log(p + 1e-6), in a network's own term too, as supplement C does, and as the code of
ProSelfLC does, which is the same group's. So a label that the network holds for next to impossible costs 13.8
and has no gradient. The gradient of a network's own term flows through its prediction in q~ too, as in that
code, but not through eps. To the peer, q~ is a constant. It is that of the peer's own step, in training mode.
The labels of CE, LS and Tf-KD_reg contain no prediction, so that the peer hands over the given label: a
sample of which it is sure counts twice. CP's label goes to the peer as equation 10 has it. Its negative part
drives the two predictions apart.

Our choices where the paper is silent. eps is 0.1 for LS and CP and 0.05 for Boot-soft, as in their own
papers; b1 is 16. CMD-S has eta = 4, the one of Table 7 that agrees with Table 1. CMD-P has eta = 4, the best
of Figure 4b, and b2 = -8. On shapes they have eta 2 and 1, because the networks stay unsure in 20 epochs. t
counts epochs, 1 … T. Mconf has r = 0 in the first epoch. Tf-KD_reg is the label 0.9 q + 0.1 softmax(p_d /
20), where p_d is 0.99 at the label. SyncMKD and AsyncMKD have eps = 0.5. KDCL is its MinLogit, with
temperature 2 and weight 1. Crops come with flips, as in the paper of ResNet. ResNet-50 has the settings of
CDR's code: 200 epochs, lr 0.01, × 0.1 after 40 and 80, weight decay 1e-3, batches of 64. WebVision's
photographs are squares of 320 pixels, as in the paper, cropped to 299.

`import cmd` is Python's module of that name. To import from this file, copy it under another name.
"""

if __name__ == "__main__":
    common.run(parse_args, main)
