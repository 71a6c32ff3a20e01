"""Fickle Teacher (FT): a teacher that keeps its dropout on while it teaches.

Dropout makes a trained network answer a little differently every time it is asked, most where it is least certain. A
student that is taught by such answers gets to see the teacher's uncertainty; it uses no dropout itself.

    L = (1 - alpha) L_CE(S(x), y) + alpha tau^2 D_KL(S^tau(x) || T^tau(x))        T with dropout active

Arani, Sarfraz, Zonooz: Noise as a Resource for Learning in Knowledge Distillation, WACV 2021. Equation 1, section 4.1,
Table 1. Without dropout FT is Hinton's method.

    python fickle_teacher.py                                   # built-in data, teacher and student
    python fickle_teacher.py --dropout 0                       # Hinton
    python fickle_teacher.py --method baseline                 # the student alone, cross-entropy
    python fickle_teacher.py --dataset cifar10 --dropout 0.4   # a row of Table 1

Attained by the first command: 95.4 % test accuracy (teacher 83.2 %), last epoch, n = 1, 2:34 minutes on two CPU cores
with its teacher. Not yet run at the paper's size (94.67); README.md has runs of the size of a CPU.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import accuracy, number, one_of, predict, to_float

# -------------------------------------------------------------------------------------------------------- configuration


def preset(args):
    """What the flags left unset, from sections 3 and 4.1 of the paper; on shapes, small nets for a CPU.

    The more fickle the teacher, the longer the student listens: 200 epochs without dropout, 250 up to a rate of 0.2,
    300 up to 0.3, 350 above.
    """
    rate = args.dropout if args.method == "ft" else 0
    epochs = 200 if rate == 0 else 250 if rate <= 0.2 else 300 if rate <= 0.3 else 350
    run = {"teacher_arch": "wrn-40-2", "student_arch": "wrn-16-2", "epochs": epochs, "batch_size": 128, "lr": 0.1}
    if args.dataset in (None, "shapes"):
        small = {"teacher_arch": "wrn-10-2", "student_arch": "wrn-10-1", "epochs": epochs // 25}
        run |= {**small, "batch_size": 32, "lr": 0.05}
    return {"noise": "none", "weight_decay": 5e-4, **run}


def parse_args():
    parser = common.Parser(__doc__)
    common.add_common_arguments(parser)
    common.add_teacher_arguments(parser)
    add = parser.add_argument_group("method (equation 1, section 4.1)").add_argument
    add("--method", default="ft", type=one_of("ft", "baseline"), help="ft | baseline (default: ft)")
    add(
        "--dropout",
        default=0.4,
        type=number(float, 0, 1),
        help="of the teacher, in training and teaching (default: 0.4)",
    )
    add("--alpha", default=0.9, type=number(float, 0, 1), help="weight of the teacher (default: 0.9)")
    add("--tau", default=4.0, type=number(float, 1e-3), help="temperature (default: 4)")
    args = parser.parse_args()
    return common.fill(args, preset(args))


def fickle(teacher):
    """Switch dropout on in a network that is otherwise in evaluation mode; returns the network.

    BatchNorm stays in evaluation mode. On batch statistics the answer to an image would also hang on the other images
    of the batch, which is another noise than dropout's, and the running averages would drift while teaching.
    """
    teacher.eval()
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    return teacher


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
    labels = common.corrupt_labels(
        data.train_labels, args.noise, args.rate, len(data.classes), args.seed, data.classes, args.data_dir
    )
    student = common.build_model(args.student_arch, len(data.classes), image_size=data.image_size).to(device)
    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    last = 0.8 if args.method == "ft" and args.dropout > 0 else 0.75
    milestones = [round(share * args.epochs) for share in (0.3, 0.6, last)]  # 105, 210, 280 of 350; 60, 120, 150 of 200
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    run = common.Run(
        args, device, method=args.method, arch=args.student_arch, classes=data.classes,
        tag=f"dropout{args.dropout:g}" if args.method == "ft" else "",
        model=student, optimizer=optimizer, scheduler=scheduler,
    )  # fmt: skip
    if args.method == "ft":
        teacher = fickle(common.load_teacher(args, run, data, labels, milestones, args.dropout))
    if args.compile:
        student.compile()
    alpha, tau = args.alpha, args.tau

    for _ in range(run.epoch, args.epochs):
        student.train()
        lr, losses = scheduler.get_last_lr()[0], []
        for index, images in run.progress(data.train_images, common.batches(len(labels), args.batch_size, device)):
            x, y = common.crop_flip(to_float(images), mode="reflect"), labels[index]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                S = student(x).float()
                if args.method == "ft":  # equation 1
                    with torch.no_grad():
                        T = teacher(x).float()  # another answer every time
                    loss = (1 - alpha) * F.cross_entropy(S, y) + alpha * tau**2 * kl_divergence(S / tau, T / tau)
                else:
                    loss = F.cross_entropy(S, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        scheduler.step()
        logits = predict(student, data.test_images, args.amp)
        more = common.more_accuracies(student, data, args.amp, logits)
        run.end_epoch(losses, lr=lr, test_acc=accuracy(logits, data.test_labels), **more)
    run.finish()


if __name__ == "__main__":
    common.run_main(main)
