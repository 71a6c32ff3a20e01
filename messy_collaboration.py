"""Messy Collaboration (MC): random targets in every batch, against memorising wrong labels.

The labels are corrupted once and for all: that is the problem. In each batch a share r of the targets of the
cross-entropy term is then drawn at random anew: that is the method. Nothing random can be memorised twice, while the
teacher, trained on the same corrupted labels, still tells which classes resemble each other:

    L = (1 - alpha) L_CE(S(x), y') + alpha tau^2 D_KL(S^tau(x) || T^tau(x))     y' = y, or with probability r any class

Arani, Sarfraz, Zonooz: Noise as a Resource for Learning in Knowledge Distillation, WACV 2021. Equation 1, section 4.3,
Tables 7-9, Figures 4 and 5. With r = 0 MC is Hinton's method.

    python messy_collaboration.py                                                     # built-in data
    python messy_collaboration.py --target-noise 0                                    # Hinton
    python messy_collaboration.py --method baseline                                   # the student alone
    python messy_collaboration.py --dataset cifar10 --rate 0.25 --target-noise 0.1    # a cell of Table 7

Attained by the first command: 90.1 % test accuracy, last epoch, n = 1, 1:53 minutes on two CPU cores, teacher included.
Not yet run at the paper's size (85.22 at 25 % and r = 0.1); README.md has runs of the size of a CPU.
"""

import torch
import torch.nn.functional as F

import common
from common import accuracy, number, one_of, predict, to_float

# -------------------------------------------------------------------------------------------------------- configuration


def preset(args):
    """What the flags left unset, from section 3 of the paper; on shapes, small nets for a CPU."""
    if args.dataset in (None, "shapes"):
        nets = {"teacher_arch": "wrn-10-2", "student_arch": "wrn-10-1", "epochs": 15, "batch_size": 32, "lr": 0.05}
    else:
        nets = {"teacher_arch": "wrn-40-2", "student_arch": "wrn-16-2", "epochs": 200, "batch_size": 128, "lr": 0.1}
    rate = None if args.noise in ("none", *common.HUMAN) else 0.25
    return {"noise": "sym", "rate": rate, "weight_decay": 5e-4, **nets}


def parse_args():
    parser = common.Parser(__doc__)
    common.add_common_arguments(parser)
    common.add_teacher_arguments(parser)
    add = parser.add_argument_group("method (section 4.3)").add_argument
    add("--method", default="mc", type=one_of("mc", "baseline"), help="mc | baseline (default: mc)")
    add("--target-noise", default=0.1, type=number(float, 0, 1), metavar="R", help="r, a probability (default: 0.1)")
    add("--alpha", default=0.9, type=number(float, 0, 1), help="weight of the teacher (default: 0.9)")
    add("--tau", default=4.0, type=number(float, 1e-3), help="temperature (default: 4)")
    args = parser.parse_args()
    return common.fill(args, preset(args))


def messy(y, r, num_classes):
    """Targets int64 [B] of which each, with probability r, is replaced by a class drawn uniformly."""
    return torch.where(torch.rand(len(y), device=y.device) < r, torch.randint_like(y, num_classes), y)


def kl_divergence(S, T):
    """Hinton's loss on logits [B, C]: KL(softmax T || softmax S) in nats, mean over the batch.

    The paper's D_KL(S || T) has the arguments in the order of the usual call, kl_div(student, teacher), which is this.
    """
    return F.kl_div(S.log_softmax(1), T.log_softmax(1), log_target=True, reduction="batchmean")


# ------------------------------------------------------------------------------------------------------------- training


def main():
    args = parse_args()
    device = common.setup(args)
    data = common.load_data(args, device)
    num_classes = len(data.classes)
    labels = common.corrupt_labels(
        data.train_labels, args.noise, args.rate, num_classes, args.seed, data.classes, args.data_dir, per_sample=True
    )
    student = common.build_model(args.student_arch, num_classes, image_size=data.image_size).to(device)
    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    milestones = [round(share * args.epochs) for share in (0.3, 0.6, 0.75)]  # 60, 120, 150 of 200
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    run = common.Run(
        args, device, method=args.method, arch=args.student_arch, classes=data.classes,
        tag=f"r{args.target_noise:g}" if args.method == "mc" else "",
        model=student, optimizer=optimizer, scheduler=scheduler,
    )  # fmt: skip
    wrong = (labels != data.train_labels).float().mean().item()
    print(f"{len(labels):,} training images, {100 * wrong:.2f} % relabelled; {len(data.test_labels):,} test images")
    if args.method == "mc":
        teacher = common.load_teacher(args, run, data, labels, milestones)
    if args.compile:
        student.compile()
    alpha, tau = args.alpha, args.tau

    for _ in range(run.epoch, args.epochs):
        student.train()
        lr, losses, predicted = scheduler.get_last_lr()[0], [], torch.full_like(labels, -1)
        for index, images in run.progress(data.train_images, common.batches(len(labels), args.batch_size, device)):
            x, y = common.crop_flip(to_float(images), mode="reflect"), labels[index]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                S = student(x).float()
                if args.method == "mc":  # equation 1
                    with torch.no_grad():
                        T = teacher(x).float()
                    y = messy(y, args.target_noise, num_classes)
                    loss = (1 - alpha) * F.cross_entropy(S, y) + alpha * tau**2 * kl_divergence(S / tau, T / tau)
                else:
                    loss = F.cross_entropy(S, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            predicted[index] = S.argmax(1)
        scheduler.step()
        logits = predict(student, data.test_images, args.amp)
        run.end_epoch(
            losses,
            lr=lr,
            test_acc=accuracy(logits, data.test_labels),
            **common.more_accuracies(student, data, args.amp, logits),
            **common.label_accuracies(predicted, labels, data.train_labels),
        )
    run.finish()


if __name__ == "__main__":
    common.run_main(main)
