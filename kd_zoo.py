"""Eleven ways to distil knowledge into a student, and the baseline: the zoo of KD Beyond Model Compression.

From a teacher's output (Hinton, BSS), from its features (FitNet, FSP, AT), from how it relates samples (SP,
RKD-D, RKD-A, RKD-DA), from one's own branches (ONE), from a peer (DML). Each is one short function, with its
formula. The loop adds up the terms whose weight is set, so that any of them can be combined.

Sarfraz, Arani, Zonooz: Knowledge Distillation Beyond Model Compression, ICPR 2020. And with --add Table 2 of
Noise as a Resource for Learning in Knowledge Distillation (Arani, Sarfraz, Zonooz, WACV 2021).

    python kd_zoo.py                                      # Hinton on built-in data: 89.5 ± 1.1
    python kd_zoo.py --method baseline                    # the student alone: 76.6 ± 5.2
    python kd_zoo.py --method at --dataset cifar10        # a cell of Table III; the paper has 94.50
    python kd_zoo.py --method at --alpha 0.9 --beta 500   # a sum of two terms

Test accuracy in %, last epoch, n = 5, on a CPU. Not yet run at the paper's size.
In this order: the methods; main, the loop; what it calls; settings and flags; NOTES, every table's command.
"""

import inspect
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UsageError, accuracy, positive, predict, refuse, share

# ------------------------------------------------------------------------------------------------ the methods
# S, T: logits [B, C] of student and teacher. s, t: their features [B, K, H, W]; s[0]: stem, s[n]: block n


def hinton_loss(S, T, tau):
    """tau² KL(softmax(T / tau) || softmax(S / tau)), mean over the batch (Hinton et al. 2015)."""
    log_S, log_T = (S / tau).log_softmax(1), (T / tau).log_softmax(1)
    return tau**2 * F.kl_div(log_S, log_T, log_target=True, reduction="batchmean")


def boundary_samples(teacher, x, y, S, T, size=32, steps=10, step_size=0.3):
    """Images on the teacher's decision boundary (Heo et al. 2019): [≤ size, 3, H, W], from x [B, 3, H, W].

    They start from images that both networks classify as y: the `size` whose probabilities differ most,
    squared and summed over the wrong classes. Each moves towards one wrong class, which is drawn in
    proportion to the teacher's probabilities. A step is step_size · (gap of the scores + 1e-4) · gradient /
    ‖gradient‖₂. An image stops when the teacher's prediction changes, or after `steps` steps; it stays in
    [0, 1].
    """
    p_S, p_T = S.softmax(1), T.softmax(1)
    difference = ((p_S - p_T) ** 2).scatter(1, y.unsqueeze(1), 0).sum(1)
    both = (S.argmax(1) == y) & (T.argmax(1) == y)
    base = difference.masked_fill(~both, -1).topk(min(size, len(x))).indices
    base = base[both[base]]
    if len(base) == 0:
        return x[:0]
    moved, y = x[base], y[base]
    target = p_T[base].clamp(min=1e-12).scatter(1, y.unsqueeze(1), 0).multinomial(1)
    for _ in range(steps):
        moved.requires_grad_()
        scores = teacher(moved)
        gap = (scores.gather(1, y.unsqueeze(1)) - scores.gather(1, target)).squeeze(1)
        (gradient,) = torch.autograd.grad(-gap.sum(), moved)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        step = (step_size * (gap.detach() + 1e-4) / length).view(-1, 1, 1, 1) * gradient
        going = (scores.argmax(1) == y).view(-1, 1, 1, 1)
        moved = torch.where(going, (moved.detach() + step).clamp(0, 1), moved.detach())
    return moved


def fitnet_loss(regressor, s, t):
    """Mean squared difference of the teacher's block 2 and the student's after a regressor (Romero 2015).

    regressor: a 1×1 convolution.
    """
    return F.mse_loss(regressor(s[2]), t[2])


def fsp_matrices(f):
    """Gram matrices of each group's input and output (Yim et al. 2017), position means: [B, K, L] each."""
    pairs = [(F.adaptive_max_pool2d(before, after.shape[2:]), after) for before, after in zip(f, f[1:])]
    return [torch.einsum("bkhw,blhw->bkl", before, after) / after[0, 0].numel() for before, after in pairs]


def fsp_loss(s, t, weights=(1, 3, 1)):
    """Mean squared differences of the FSP matrices, weighted."""
    return sum(w * F.mse_loss(a, b) for w, a, b in zip(weights, fsp_matrices(s), fsp_matrices(t)))


def attention_map(f):
    """Mean over channels of the squared activations, flattened and of unit length: [B, H W]."""
    return F.normalize(f.square().mean(1).flatten(1))


def attention_loss(s, t):
    """Σ over blocks of the mean squared difference of the attention maps (Zagoruyko and Komodakis 2017)."""
    return sum(F.mse_loss(attention_map(a), attention_map(b)) for a, b in zip(s[1:], t[1:]))


def similarity_loss(s, t):
    """1/b² ‖G_T - G_S‖_F² of block 3's Gram matrices of samples, rows of unit length (Tung and Mori 2019)."""
    f_S, f_T = s[-1].flatten(1), t[-1].flatten(1)
    return F.mse_loss(F.normalize(f_S @ f_S.T), F.normalize(f_T @ f_T.T))


def embedded(f):
    """Block 3, flattened and of unit length, as in the group's code: [B, K H W]."""
    return F.normalize(f[-1].flatten(1))


def distances(e):
    """Euclidean distances between the rows of e [B, D]: [B, B], exactly 0 between equal rows."""
    return torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist")


def relative_distances(e):
    """Distances between the rows of e [B, D], divided by the mean of those above 0: [B, B]."""
    d = distances(e)
    return d * (d > 0).sum() / d.sum().clamp(min=1e-12)  # where all rows are equal: 0, not 0 / 0


def rkd_distance_loss(s, t):
    """Huber loss between the distances within the batch (Park et al. 2019)."""
    return F.smooth_l1_loss(relative_distances(embedded(s)), relative_distances(embedded(t)))


def angles(e):
    """Cosine of the angle at row i between rows j and k of e [B, D], by the law of cosines: [B, B, B]."""
    d = distances(e)
    ij, ik, jk = d.unsqueeze(2), d.unsqueeze(1), d.unsqueeze(0)
    product = 2 * ij * ik
    return (ij**2 + ik**2 - jk**2) / product.where(product > 0, math.inf)  # 0 where two rows are equal


def rkd_angle_loss(s, t):
    """Huber loss between the angles of all triplets of the batch (Park et al. 2019)."""
    return F.smooth_l1_loss(angles(embedded(s)), angles(embedded(t)))


class ONE(nn.Module):
    """Branches on a shared trunk, and their gate. Each branch has a last group and a classifier of its own.

    branches: networks of one architecture; the first one's trunk replaces the others'. width: channels of the
    shared features. The output is the ensemble's logits [B, C].
    """

    def __init__(self, branches, width):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        for branch in branches[1:]:
            branch.stem = branches[0].stem
            branch.blocks = nn.ModuleList([*branches[0].blocks[:-1], branch.blocks[-1]])
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, len(branches)),
                                  nn.BatchNorm1d(len(branches)), nn.ReLU(), nn.Softmax(1))  # fmt: skip

    def logits(self, x):
        """Those of each branch, a list of [B, C], and of the gated ensemble, [B, C]."""
        first = self.branches[0]
        with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16, enabled=first.amp):
            shared = first.stem((x - first.mean) / first.std)
            for block in first.blocks[:-1]:
                shared = block(shared)
            logits = [branch.head(branch.blocks[-1](shared)).float() for branch in self.branches]
        weights = self.gate(shared.float()).unsqueeze(2)  # [B, branches, 1]; the weights of a row sum to 1
        return logits, (weights * torch.stack(logits, 1)).sum(1)

    def forward(self, x):
        return self.logits(x)[1]


def one_loss(logits, ensemble, y, tau, ramp):
    """Σ CE(branch) + CE(ensemble) + w Σ tau² KL(ensemble || branch), w = exp(-5 (1 - ramp)²) (Lan 2018)."""
    w = math.exp(-5 * (1 - ramp) ** 2)
    ce = sum(F.cross_entropy(S, y) for S in logits) + F.cross_entropy(ensemble, y)
    return ce + w * sum(hinton_loss(S, ensemble.detach(), tau) for S in logits)


def dml_loss(first, second, y, tau):
    """The sum of both students' CE + tau² KL(peer || self), the peer detached (Zhang et al. 2018)."""
    ce = F.cross_entropy(first, y) + F.cross_entropy(second, y)
    return ce + hinton_loss(first, second.detach(), tau) + hinton_loss(second, first.detach(), tau)


# --------------------------------------------------------------------------------------------------- training


def main(args):
    device = common.setup(args)
    data = common.load_data(args, device)
    num_classes = len(data.classes)
    size = data.image_size
    method = args.method
    tau = args.tau
    if method == "bss" and common.world_size() > 1:  # where one process finds no image, the others would wait
        raise UsageError("--method: bss runs in one process, not under torchrun")
    if args.imbalance:
        kept = imbalance(data.train_labels, args.imbalance, num_classes)
        data = data._replace(
            train_images=data.train_images[kept.to(data.train_images.device)],
            train_labels=data.train_labels[kept],
            given_labels=data.given_labels[kept],
        )
    labels = common.noisy_labels(args, data, per_sample=True)
    names = {"one": ["net1", "net2", "net3"], "dml": ["net1", "net2"]}.get(method, ["model"])
    parts = {  # what learns
        name: common.build_model(args.student_arch, num_classes, image_size=size, amp=args.amp).to(device)
        for name in names
    }
    nets = list(parts.values())
    student = nets[0]
    by_features = any((args.init_epochs, args.beta, args.gamma, args.lambda_d, args.lambda_a))
    images = common.to_float(data.test_images[:2]).to(device)
    student_shapes = feature_shapes(student.eval(), images)
    if by_features and not (args.teacher or args.teacher_model):  # before a teacher is trained
        with torch.device("meta"):
            untrained = common.build_model(args.teacher_arch, num_classes, image_size=size)
        check_features(args, student_shapes, feature_shapes(untrained, images.to("meta")))
    teacher = None
    origin = {}
    if method not in ALONE:
        milestones = [round(part * args.epochs) for part in (0.3, 0.6, 0.75)]
        teacher, origin = common.load_teacher(
            args, device, data, labels, arch=args.teacher_arch, dropout=0.4 if args.add == "ft" else 0.0,
            epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay,
            milestones=milestones,
        )  # fmt: skip
        if by_features:
            teacher_shapes = feature_shapes(teacher, images)
            check_features(args, student_shapes, teacher_shapes)
        if args.add == "ft":
            from fickle_teacher import fickle  # --add ft needs that file beside this one

            fickle(teacher)
    run = common.Run(args, device, data, origin, args.init_epochs + args.epochs)
    if method == "fitnet":
        parts["regressor"] = nn.Conv2d(student_shapes[2][0], teacher_shapes[2][0], 1, bias=False).to(device)
    if method == "one":
        parts["one"] = ONE(nets, width=student_shapes[-2][0]).to(device)
    modules = nn.ModuleDict(parts)  # has each parameter once: the branches of one share a trunk
    optimizer = torch.optim.SGD(modules.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    run.track(**parts, optimizer=optimizer)
    if args.compile:
        for net in nets:
            net.compile()

    for epoch in range(run.epoch, run.epochs):
        modules.train()
        if epoch == args.init_epochs:
            optimizer.state.clear()  # stage 2 starts without momentum
        lr = learning_rate(args, epoch)
        losses = []
        for group in optimizer.param_groups:
            group["lr"] = lr
        for index in run.batches(len(labels), args.batch_size):
            x, y = common.crop_flip(data.batch(index), mode="reflect", size=size), labels[index]
            if method == "one":
                ramp = min(epoch / args.epochs * 300 / 80, 1)  # from 0 up to epoch 80 of 300
                logits, ensemble = parts["one"].logits(x)
                loss = one_loss(logits, ensemble, y, tau, ramp)
            elif method == "dml":
                first, second = (net(x) for net in nets)
                loss = dml_loss(first, second, y, tau)
            else:
                S, s = student(x, features=True) if by_features else (student(x), None)
                loss = args.ce * F.cross_entropy(S, y)
                if teacher:
                    with torch.no_grad():
                        T, t = teacher(x, features=True) if by_features else (teacher(x), None)
                if epoch < args.init_epochs:
                    loss = fitnet_loss(parts["regressor"], s, t) if method == "fitnet" else fsp_loss(s, t)
                elif method == "bss":
                    done = (epoch + 1) / args.epochs
                    # divided by tau²: the code of BSS does not have this factor
                    loss = loss + (1 + 3 * (1 - done)) * hinton_loss(S, T, tau) / tau**2
                    moved = boundary_samples(teacher, x, y, S, T)
                    if len(moved):
                        bss = hinton_loss(student(moved), teacher(moved), tau) / tau**2
                        loss = loss + 2 * max(1 - 4 / 3 * done, 0) * bss
                elif args.alpha is not None:  # hinton, stage 2 of fitnet and fsp, and --add
                    loss = loss + args.alpha * hinton_loss(S, T, tau)
                if args.beta:
                    loss = loss + args.beta * attention_loss(s, t)
                if args.gamma:
                    loss = loss + args.gamma * similarity_loss(s, t)
                if args.lambda_d:
                    loss = loss + args.lambda_d * rkd_distance_loss(s, t)
                if args.lambda_a:
                    loss = loss + args.lambda_a * rkd_angle_loss(s, t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        logits = [predict(net, data.test_images) for net in nets]
        each = [accuracy(S, data.test_labels) for S in logits]
        best = each.index(max(each))
        metrics = {"test_acc": each[best]}
        if len(nets) > 1:
            run.header["best"] = f"net{best + 1}"
            metrics["each_test_acc"] = each
        if method == "one":
            metrics["ensemble_test_acc"] = accuracy(predict(parts["one"], data.test_images), data.test_labels)
        run.end_epoch(losses, lr=lr, **metrics)
    return run.finish()


def feature_shapes(model, images):
    """Shapes (K, H, W) of a model's features of images [B, 3, H, W], the stem's first.

    The model is in evaluation mode. Raises UsageError where it has no features, as most --teacher-model.
    """
    if "features" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            "--teacher-model: for fitnet, fsp, at, sp and rkd module(x, features=True) must give "
            "(logits, [output of the stem, of block 1, …]); hinton needs logits alone"
        )
    with torch.no_grad():
        return [tuple(f.shape[1:]) for f in model(images, features=True)[1]]


def check_features(args, s, t):
    """Raise UsageError where FitNet, FSP or AT cannot compare features of shapes s (student), t (teacher)."""
    same = True
    if args.method == "fitnet":
        same = s[2][1:] == t[2][1:]
    if args.method == "fsp":
        same = s == t
    if args.beta:
        same = same and [shape[1:] for shape in s[1:]] == [shape[1:] for shape in t[1:]]
    if not same:
        raise UsageError(f"--student-arch: {args.method} cannot compare features {s} with the teacher's {t}")


def learning_rate(args, epoch):
    """The rate of epoch 0, 1, …: of stage 1, if there is one, then of the scheme in TABLE_I."""
    if epoch < args.init_epochs:
        falls = sum(epoch >= round(drop * args.init_epochs) for drop in (0.6, 0.8))
        return 0.001 * 0.1**falls
    falls = sum(epoch - args.init_epochs >= round(drop * args.epochs) for drop in args.drops)
    return args.lr * args.factor**falls


def imbalance(labels, gamma, num_classes):
    """Indices of a class-imbalanced subset of int64 labels [N] (section IV-C), ascending.

    Class c = 1 … C keeps its first n_c = a / (b + c^gamma) samples, rounded. a and b are such that the first
    class keeps as many samples as a balanced class has, the last a twentieth (5000 and 250 on CIFAR-10). This
    is the group's code; the printed formula is infinite at c = 1. Prints where a class has fewer samples.
    """
    first = len(labels) // num_classes
    last = first / 20
    b = (last * num_classes**gamma - first) / (first - last)
    a = first * (b + 1)
    kept = []
    for c in range(num_classes):
        size = round(a / (b + (c + 1) ** gamma))
        samples = (labels == c).nonzero().squeeze(1)
        if len(samples) < size:
            print(f"--imbalance: class {c} has {len(samples)} training images, not the {size} of the formula")
        kept.append(samples[:size])
    return torch.cat(kept).sort().values


# ---------------------------------------------------------------------------------------------- configuration

STANDARD = {  # section III; drops: shares of the epochs after which lr is multiplied by the factor
    "epochs": 200, "batch_size": 128, "lr": 0.1, "drops": [0.3, 0.6, 0.75], "factor": 0.2,
    "weight_decay": 5e-4, "teacher_arch": "wrn-40-2", "student_arch": "wrn-16-2", "init_epochs": 0,
    "noise": "none",
}  # fmt: skip
HINTON = {"alpha": 0.9, "tau": 4.0}
TABLE_I = {
    "baseline": {},
    "hinton": HINTON,
    "bss": {"tau": 4.0},  # its attack: boundary_samples
    "fitnet": HINTON | {"init_epochs": 100},  # stage 1: block 2
    "fsp": HINTON | {"init_epochs": 100},  # stage 1: weights 1, 3, 1 of blocks 1, 2, 3
    "at": {"beta": 1000.0},  # blocks 1, 2, 3
    "sp": {"gamma": 3000.0},  # block 3
    "rkd-d": {"lambda_d": 25.0},  # block 3
    "rkd-a": {"lambda_a": 50.0},
    "rkd-da": {"lambda_d": 25.0, "lambda_a": 50.0},
    "one": {"tau": 3.0, "epochs": 300, "drops": [0.5, 0.75], "factor": 0.1},  # three branches
    "dml": {"tau": 4.0},  # two students
}
ALONE = ("baseline", "one", "dml")  # no teacher


def preset(args):
    """The flags that are left out: Table I and section III of the paper; on shapes, small nets for a CPU."""
    values = STANDARD | TABLE_I[args.method]
    if args.add or args.alpha is not None:
        values |= HINTON
    alpha = values.get("alpha", 0.0) if args.alpha is None else args.alpha
    values["ce"] = round(1 - alpha, 9)
    student = args.student_arch or "wrn-16-2"
    if student.startswith("resnet"):
        values["teacher_arch"] = "resnet26x4" if student.endswith("x4") else "resnet26"
    if args.dataset == "shapes":
        values |= {
            "student_arch": "wrn-10-1", "teacher_arch": "wrn-16-1", "limit_train": 300, "epochs": 40,
            "batch_size": 32, "lr": 0.05,
        }  # fmt: skip
        if args.noise not in (None, "none"):
            values |= {"limit_train": 500, "epochs": 60}
        if args.method == "sp":
            values["gamma"] = 100.0  # in so few steps 3000 lets the student learn nothing else
    values["init_epochs"] = math.ceil(values["init_epochs"] * (args.epochs or values["epochs"]) / 200)
    return values


def parse_args():
    parser = common.argument_parser(__file__, __doc__, NOTES)
    common.add_teacher_arguments(parser)
    add = parser.add_argument_group("method (Table I); a term whose weight is None is left out").add_argument
    add("--method", default="hinton", choices=TABLE_I, help="row of Table I")
    add("--add", choices=("hinton", "ft"), help="loss to add to the method, Hinton's or the Fickle Teacher's")
    add("--imbalance", type=positive, metavar="GAMMA",
        help="exponent of the power law of class sizes, section IV-C; None: all images")  # fmt: skip
    add("--ce", type=float, help="weight of cross-entropy; left out: 1 - alpha")
    add("--alpha", type=share, help="weight of Hinton's term")
    add("--tau", type=positive, help="temperature")
    add("--beta", type=float, help="weight of attention transfer")
    add("--gamma", type=float, help="weight of similarity preservation")
    add("--lambda-d", type=float, help="weight of RKD's distances")
    add("--lambda-a", type=float, help="weight of RKD's angles")
    add("--init-epochs", type=common.count, help="epochs of stage 1 of fitnet and fsp")
    args = common.parse(parser, preset)
    if args.method in ALONE:
        refuse(args, (*common.TEACHER, "add", "ce", "alpha", "beta", "gamma", "lambda_d", "lambda_a"),
            f"{args.method} has no teacher")  # fmt: skip
    if args.method == "bss":
        refuse(args, ("add", "ce", "alpha"), "bss has weights of its own")
    if args.alpha is None and "tau" not in TABLE_I[args.method]:
        refuse(args, ("tau",), f"{args.method} has no temperature; --alpha adds Hinton's term")
    if "init_epochs" not in TABLE_I[args.method]:
        refuse(args, ("init_epochs",), f"{args.method} has no stage 1")
    if args.method == "one" and args.batch_size < 2:
        raise UsageError("--batch-size: the gate of one has a BatchNorm layer, which needs 2 images or more")
    return args


# ------------------------------------------------------------------------------------------------------ notes

NOTES = """
A line that begins with a method, a data set or "all" has the paper's own figures; "all" is in the order of
--method {baseline,hinton,bss,fitnet,fsp,at,sp,rkd-d,rkd-a,rkd-da,one,dml}.

Table I      the table of settings in this file. Every other table has --method {…} --seed 0 1 2 3 4,
             and --teacher-seeds 5 where a teacher teaches
Table II     the teachers in runs/teachers that the other tables leave
             cifar10: resnet26 93.83, wrn-40-2 95.11; cifar100: resnet26x4 79.22, wrn-40-2 76.06
             cifar10, wrn-40-2: Table V 82.66 66.34 45.97; Table VI 78.87 80.23 81.13 84.40
Table III    --dataset cifar10
             --student-arch {resnet8,resnet14,resnet20,resnet26,wrn-10-2,wrn-16-2,wrn-28-2,wrn-40-2}
             baseline: 87.64 91.44 92.64 93.32 90.62 93.95 94.82 95.01
             hinton: 88.80 92.50 93.25 93.58 91.72 94.28 94.97 95.12
             all, wrn-16-2: 93.95 94.28 94.27 94.34 94.31 94.50 94.64 94.42 94.62 94.52 92.80 94.38
Table IV     --dataset cifar100 --student-arch {resnet8x4,resnet14x4,resnet20x4,resnet26x4,wrn-10-2,…}
             baseline: 71.78 76.95 77.92 78.82 67.99 72.35 74.93 75.94
             hinton: 72.78 78.18 79.58 79.73 67.70 74.12 76.08 77.07
             all, wrn-16-2: 72.35 74.12 73.04 72.82 73.86 72.78 73.42 72.52 72.87 72.88 69.78 74.44
Table V      --dataset cifar10 --noise sym --rate {0.2,0.4,0.6}
             baseline: 79.44 64.47 47.84; hinton: 87.23 76.32 58.18
             all, 0.4: 64.47 76.32 71.46 76.73 76.47 64.46 70.32 64.05 64.61 65.10 68.64 76.33
Table VI     --dataset cifar10 --imbalance {0.2,0.6,1,2}
             baseline: 78.05 78.83 80.09 83.33; hinton: 79.15 80.08 81.18 83.69
             all, 1: 80.09 81.18 80.44 81.15 81.12 80.96 80.33 81.48 81.52 81.50 79.48 81.33
Figure 1     evaluate.py runs/kd_zoo-cifar10-clean-*wrn-16-2*seed0 --transfer --teacher

And of Noise as a Resource:
Table 1      --dataset {cifar10,svhn} --method {baseline,hinton,at,sp,rkd-d,rkd-a,rkd-da}
             cifar10: 93.95 94.28 94.50 94.64 94.42 94.62 94.52
             svhn: 96.14 96.80 96.28 96.61 96.49 96.57 96.58
Table 2      --dataset cifar10 --method {at,sp,rkd-d,rkd-a,rkd-da}; --add hinton; --add ft
             --add hinton: 94.63 94.39 94.39 94.38 94.43; --add ft: 94.83 94.66 94.76 94.68 94.59

From the group's code, not from the papers: the class sizes of --imbalance. RKD compares block 3's output,
flattened and of unit length. BSS keeps its images in [0, 1] and no nearer to the original (the 16 of Table I
is never used). BSS has 200 epochs and the standard drops. Its distillation terms have no factor tau², as in
the code of BSS.

Every teacher is in evaluation mode, as in the public code of each method. ONE's and DML's answer in
training mode, because they learn; test_acc is that of the best on the test set, as in the papers.

Our choices where both are silent. DML's distillation terms are Hinton's loss with its factor tau². FSP's
matrices relate a group's input, max-pooled to the output's size, to its output; their squared differences are
averaged over the entries. ONE has the 300 epochs of its own paper, with lr × 0.1 at half and three quarters.
The standard is lr × 0.2 after epochs 60, 120 and 150 of 200. Stage 1 of FitNet and FSP has lr 0.001, × 0.1
after epochs 60 and 80 of 100; with other --epochs it is longer or shorter in proportion. Stage 2 starts
without momentum. The sums of RepDistiller (-r -a -b) are --ce, --alpha and the method's own weight.
"""

if __name__ == "__main__":
    common.run(parse_args, main)
