"""Messy Collaboration (MC): random targets in every batch, against memorising wrong labels.

The labels are corrupted once and for all: that is the problem. In each batch a share r of the targets of
cross-entropy is drawn at random anew: that is the method. Nothing random can be memorised twice. The teacher,
trained on the same corrupted labels, still tells which classes resemble each other:

    L = (1 - alpha) L_CE(S(x), y') + alpha tau^2 D_KL(S^tau(x) || T^tau(x))    y' = y, or random at rate r

Arani, Sarfraz, Zonooz: Noise as a Resource for Learning in Knowledge Distillation, WACV 2021. Equation 1,
section 4.3. With r = 0 MC is Hinton's method.

    python messy_collaboration.py                    # built-in data, 40 % noise: 67.5 ± 0.7
    python messy_collaboration.py --target-noise 0   # Hinton: 68.1 ± 0.8
    python messy_collaboration.py --method baseline  # the student alone: 56.1 ± 2.4
    python messy_collaboration.py --dataset cifar10  # 25 % noise, a cell of Table 7; the paper has 85.22

Test accuracy in %, last epoch, n = 5, on a CPU. Not yet run at the paper's size.
In this order: the method; main, the loop; settings and flags; NOTES, every table's command.
"""

import torch
import torch.nn.functional as F

import common
from common import positive, share

# ------------------------------------------------------------------------------------------------- the method


def messy(y, r, num_classes):
    """Targets int64 [B] of which each, with probability r, is replaced by a class drawn uniformly."""
    return torch.where(torch.rand(len(y), device=y.device) < r, torch.randint_like(y, num_classes), y)


def hinton_loss(S, T, tau):
    """tau² KL(softmax(T/tau) || softmax(S/tau)) of logits [B, C], batch mean: the paper's D_KL(S || T)."""
    log_S, log_T = (S / tau).log_softmax(1), (T / tau).log_softmax(1)
    return tau**2 * F.kl_div(log_S, log_T, log_target=True, reduction="batchmean")


# --------------------------------------------------------------------------------------------------- training


def main(args):
    device = common.setup(args)
    data = common.load_data(args, device)
    num_classes = len(data.classes)
    size = data.image_size
    labels = common.noisy_labels(args, data, per_sample=True)
    wrong = 100 * (labels != data.train_labels).float().mean().item()
    print(f"{len(labels):,} training images, {wrong:.2f} % relabelled; {len(data.test_labels):,} test images")
    student = common.build_model(args.student_arch, num_classes, image_size=size, amp=args.amp).to(device)
    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    milestones = [round(part * args.epochs) for part in (0.3, 0.6, 0.75)]  # 60, 120, 150 of 200
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    origin = {}
    if args.method == "mc":
        teacher, origin = common.load_teacher(
            args, device, data, labels, arch=args.teacher_arch, milestones=milestones,
            epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay,
        )  # fmt: skip
    run = common.Run(args, device, data, origin)
    run.track(model=student, optimizer=optimizer, scheduler=scheduler)
    if args.compile:
        student.compile()

    for _ in range(run.epoch, run.epochs):
        student.train()
        lr = scheduler.get_last_lr()[0]
        losses = []
        predicted = torch.full_like(labels, -1)
        for index in run.batches(len(labels), args.batch_size):
            x, y = common.crop_flip(data.batch(index), mode="reflect", size=size), labels[index]
            S = student(x)
            if args.method == "mc":  # equation 1
                with torch.no_grad():
                    T = teacher(x)
                y = messy(y, args.target_noise, num_classes)
                loss = (1 - args.alpha) * F.cross_entropy(S, y) + args.alpha * hinton_loss(S, T, args.tau)
            else:
                loss = F.cross_entropy(S, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            predicted[index] = S.argmax(1)
        scheduler.step()
        run.end_epoch(
            losses,
            lr=lr,
            **common.test_accuracies(student, data),
            **common.label_accuracies(predicted, labels, data.train_labels),
        )
    return run.finish()


# ---------------------------------------------------------------------------------------------- configuration


def preset(args):
    """The flags that are left out, from section 3 of the paper; on shapes, small nets for a CPU."""
    noise = args.noise or ("sym" if args.dataset in common.CLEANLY_LABELLED else "none")
    values = {
        "noise": noise, "rate": 0.25, "epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4,
        "teacher_arch": "wrn-40-2", "student_arch": "wrn-16-2",
    }  # fmt: skip
    if args.dataset == "shapes":
        values |= {
            "rate": 0.4, "limit_train": 500, "epochs": 60, "batch_size": 32, "lr": 0.05,
            "teacher_arch": "wrn-16-1", "student_arch": "wrn-10-1",
        }  # fmt: skip
    if noise in ("none", *common.HUMAN):
        values["rate"] = None
    return values


def parse_args():
    parser = common.argument_parser(__file__, __doc__, NOTES)
    common.add_teacher_arguments(parser)
    add = parser.add_argument_group("method (section 4.3)").add_argument
    add("--method", default="mc", choices=("mc", "baseline"), help="mc: equation 1; baseline: no teacher")
    add("--target-noise", default=0.1, type=share, metavar="R", help="probability r that a target is random")
    add("--alpha", default=0.9, type=share, help="weight of the teacher")
    add("--tau", default=4.0, type=positive, help="temperature")
    args = common.parse(parser, preset)
    if args.method == "baseline":
        common.refuse(args, (*common.TEACHER, "target_noise", "alpha", "tau"), "baseline has no teacher")
        args.target_noise = None
    return args


# ------------------------------------------------------------------------------------------------------ notes

NOTES = """
A line that begins with a method has the paper's own figures, by --rate; those of MC are for r = 0.1.

Table 7, Figure 4   --dataset cifar10 --rate {0,0.05,0.1,0.15,0.25,0.5} with --method baseline;
                    --target-noise {0,0.05,0.1,0.15,0.25,0.5} --teacher-seeds 5; all --seed 0 1 2 3 4, then
                    evaluate.py TEACHERS runs/messy_collaboration-cifar10-* --plot-by target-noise rate
                    TEACHERS: the folders in runs/teachers that the runs name
                    MC: 94.41 92.53 90.73 89.33 85.22 68.25
                    Hinton: 94.26 92.67 90.69 89.36 85.32 67.97
                    baseline: 93.95 90.51 86.91 83.51 76.07 56.61
                    teacher: 95.11 92.61 89.37 86.56 78.94 55.53
Table 8, Figure 4   the same with --dataset svhn
                    MC: 96.72 96.34 95.95 95.63 94.73 91.74
                    Hinton: 96.81 96.29 95.94 95.61 94.80 91.93
                    baseline: 96.11 93.92 92.78 91.58 89.01 81.56
                    teacher (Table 8): 96.23 94.07 93.19 91.82 89.53 82.84
Table 9, Figure 5   Table 7 with --cinic CINIC-10
                    MC: 69.02 65.97 63.57 61.68 56.15 44.92
                    Hinton: 68.95 65.52 63.83 61.24 56.68 44.42
                    baseline: 68.89 63.22 59.50 55.00 50.08 37.21
                    teacher (Table 9): 70.23 66.22 62.66 59.07 53.63 36.75
"""

if __name__ == "__main__":
    common.run(parse_args, main)
