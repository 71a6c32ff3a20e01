"""Soft Randomization (SR): a student on noisy images, its teacher on clean ones. And Gaussian Augmentation.

Training on images with Gaussian noise makes a network more robust and less accurate. A teacher that was
trained on clean images sees the clean image x. It tells the student, which sees x + delta, how to answer:

    L = (1 - alpha) L_CE(S(x + delta), y) + alpha tau^2 D_KL(S^tau(x + delta) || T^tau(x))
    delta ~ N(0, sigma^2)

Arani, Sarfraz, Zonooz: Noise as a Resource for Learning in Knowledge Distillation, WACV 2021. Equations 1
and 2, section 4.2. Gaussian Augmentation (GA) is cross-entropy on x + delta alone.

    python soft_randomization.py                                # built-in data: 89.0 ± 1.8
    python soft_randomization.py --method ga                    # the same without a teacher: 76.0 ± 5.1
    python soft_randomization.py --dataset cifar10 --sigma 0.2  # a cell of Table 3; the paper has 84.07

Test accuracy in %, last epoch, n = 5, on a CPU. Not yet run at the paper's size.
In this order: the method; main, the loop; settings and flags; NOTES, every table's command.
"""

import torch
import torch.nn.functional as F

import common
from common import positive, share

# ------------------------------------------------------------------------------------------------- the method


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
    student = common.build_model(args.student_arch, num_classes, image_size=size, amp=args.amp).to(device)
    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    milestones = [round(part * args.epochs) for part in (0.3, 0.6, 0.75)]  # 60, 120, 150 of 200
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    origin = {}
    if args.method == "sr":
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
        for index in run.batches(len(labels), args.batch_size):
            x, y = common.crop_flip(data.batch(index), mode="reflect", size=size), labels[index]
            noisy = x + args.sigma * torch.randn_like(x)  # x + delta
            if args.clip:
                noisy = noisy.clamp(0, 1)
            S = student(noisy)
            loss = F.cross_entropy(S, y)
            if args.method == "sr":  # equation 2
                with torch.no_grad():
                    T = teacher(x)
                loss = (1 - args.alpha) * loss + args.alpha * hinton_loss(S, T, args.tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        scheduler.step()
        run.end_epoch(losses, lr=lr, **common.test_accuracies(student, data))
    return run.finish()


# ---------------------------------------------------------------------------------------------- configuration


def preset(args):
    """The flags that are left out, from section 3 of the paper; on shapes, small nets for a CPU."""
    values = {
        "noise": "none", "epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4,
        "teacher_arch": "wrn-40-2", "student_arch": "wrn-16-2", "sigma": 0.2,
    }  # fmt: skip
    if args.dataset == "shapes":
        values |= {
            "limit_train": 300, "epochs": 40, "batch_size": 32, "lr": 0.05,
            "teacher_arch": "wrn-16-1", "student_arch": "wrn-10-1", "sigma": 0.1,
        }  # fmt: skip
    return values


def parse_args():
    parser = common.argument_parser(__file__, __doc__, NOTES)
    common.add_teacher_arguments(parser)
    add = parser.add_argument_group("method (equation 2)").add_argument
    add("--method", default="sr", choices=("sr", "ga"), help="sr: equation 2; ga: no teacher")
    add("--sigma", type=share, help="standard deviation of the noise, on images in [0, 1]")
    add("--clip", action="store_true", help="clip x + delta to [0, 1]; equation 2 does not")
    add("--alpha", default=0.9, type=share, help="weight of the teacher")
    add("--tau", default=4.0, type=positive, help="temperature")
    args = common.parse(parser, preset)
    if args.method == "ga":
        common.refuse(args, (*common.TEACHER, "alpha", "tau"), "ga has no teacher")
    return args


# ------------------------------------------------------------------------------------------------------ notes

NOTES = """
A line that begins with SR or GA has the paper's own figures.

Table 3             --dataset {cifar10,svhn} with --method ga; --teacher-seeds 5; all --seed 0 1 2 3 4
                    --sigma {0.01,0.02,0.03,0.04,0.05,0.1,0.2,0.3,0.4,0.5}, then
                    evaluate.py runs/soft_randomization-cifar10-* --cinic CINIC-10
                    SR, cifar10: 94.29 94.07 93.53 93.04 92.57 89.88 84.07 78.51 73.35 68.95
                    SR, CINIC: 69.19 69.11 68.77 68.33 68.07 65.44 60.08 55.19 51.03 47.44
                    SR, svhn: 96.78 96.79 96.77 96.72 96.56 96.01 93.39 89.70 85.08 79.69
                    GA, cifar10: 93.80 93.65 93.14 92.67 92.14 89.09 83.41 78.00 72.88 68.39
Table 4             evaluate.py runs/soft_randomization-* --pgd 1 5 10 15 20 100 200 1000 --eps 8/255
                    SR, cifar10, sigma 0.2: 78.05 53.64 35.92 28.05 24.14 16.87 16.36 15.98
                    SR, svhn, sigma 0.2: 89.80 71.85 59.11 52.23 51.39 36.51 35.33 34.48
Table 5             … --pgd 20 --eps 1/255 2/255 10/255 20/255 25/255 50/255 100/255 200/255
                    SR, cifar10, sigma 0.2: 75.47 64.91 20.98 16.91 16.12 13.57 4.90 0.03
                    SR, svhn, sigma 0.2: 88.09 80.18 45.11 40.15 38.97 34.69 21.61 1.60
Table 6, Figure 2   … --pgd 20 --plot-by sigma
                    SR, cifar10: 0.78 3.83 8.30 12.89 15.56 22.15 24.14 23.29 23.42 23.54
                    SR, svhn: 21.07 27.82 33.41 39.97 41.75 50.35 51.39 45.99 41.28 40.13
                    GA, cifar10: 0.00 0.00 0.02 0.12 0.38 4.20 12.19 17.64 20.98 22.34
Figure 3            evaluate.py runs/soft_randomization-cifar10-* --cifar-c CIFAR-10-C
"""

if __name__ == "__main__":
    common.run(parse_args, main)
