"""Ten ways to distil knowledge into a student, and the baseline: the zoo of KD Beyond Model Compression.

From a teacher's output (Hinton, BSS), from its features (FitNet, FSP, AT), from how it relates samples to each other
(SP, RKD-D, RKD-A, RKD-DA), from one's own branches (ONE), from a peer (DML). Each is one short function below, with its
formula; the loop adds them up.

Sarfraz, Arani, Zonooz: Knowledge Distillation Beyond Model Compression, ICPR 2020. Tables I-VI and Figure 1. And with
--add Table 2 of Noise as a Resource for Learning in Knowledge Distillation.

    python kd_zoo.py                                                        # Hinton on built-in data
    python kd_zoo.py --method rkd-da                                        # another way
    python kd_zoo.py --method at --dataset cifar10                          # a cell of Table III
    python kd_zoo.py --method sp --dataset cifar10 --noise sym --rate 0.4   # … of Table V
    python kd_zoo.py --method dml --dataset cifar10 --imbalance 0.6         # … of Table VI
    python kd_zoo.py --method sp --add ft --dataset cifar10                 # … of Table 2 of Noise as a Resource

Not yet run at the paper's size (Hinton 94.28, baseline 93.95); README.md has all twelve at the size of a CPU.

Our choices where the paper is silent: the distillation terms of BSS and DML are Hinton's loss with its factor tau². BSS
attacks the teacher and moves no pixel further than 16/255. FSP's matrices relate a group's input, max-pooled to the
output's size, to its output. ONE keeps to its own paper: 300 epochs, lr ×0.1 at half and three quarters. --add puts
Hinton's loss, (1 - alpha) CE + alpha tau² KL, in the place of the cross-entropy. Stage 2 starts without momentum.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UsageError, accuracy, number, one_of, predict, to_float

# -------------------------------------------------------------------------------------------------------- configuration

STANDARD = {"epochs": 200, "lr": 0.1, "batch_size": 128, "weight_decay": 5e-4}  # lr ×0.2 after epochs 60, 120, 150
TABLE_I = {
    "baseline": {},
    "hinton": {"alpha": 0.9, "tau": 4.0},
    "bss": {"tau": 4.0},  # its attack: boundary_samples
    "fitnet": {"alpha": 0.9, "tau": 4.0, "init_epochs": 100},  # stage 1: block 2, lr 0.001, ×0.1 after epochs 60, 80
    "fsp": {"alpha": 0.9, "tau": 4.0, "init_epochs": 100},  # stage 1: weights 1, 3, 1 of blocks 1, 2, 3; lr as above
    "at": {"beta": 1000.0},  # blocks 1, 2, 3
    "sp": {"gamma": 3000.0},  # block 3
    "rkd-d": {"lambda_d": 25.0},  # block 3
    "rkd-a": {"lambda_a": 50.0},
    "rkd-da": {"lambda_d": 25.0, "lambda_a": 50.0},
    "one": {"tau": 3.0, "epochs": 300},  # three branches; lr ×0.1 after epochs 150, 225
    "dml": {"tau": 4.0},  # two students
}
ALONE = ("baseline", "one", "dml")  # no teacher


def preset(args):
    """What the flags left unset: Table I and section III of the paper; on shapes, small nets for a CPU."""
    run = STANDARD | TABLE_I[args.method] | {"noise": "none", "student_arch": "wrn-16-2"}
    if args.add:
        run |= {"alpha": 0.9, "tau": 4.0}
    if args.dataset in (None, "shapes"):
        run |= {"epochs": 15, "batch_size": 32, "lr": 0.05, "student_arch": "wrn-10-1"}
        run |= {"init_epochs": 5} if "init_epochs" in run else {}
    student = args.student_arch or run["student_arch"]
    large = "resnet26x4" if student.endswith("x4") else "resnet26" if student.startswith("resnet") else "wrn-40-2"
    run["teacher_arch"] = "wrn-16-1" if args.dataset in (None, "shapes") else large
    return {name: value for name, value in run.items() if name in vars(args)}


def parse_args():
    parser = common.Parser(__doc__)
    common.add_common_arguments(parser)
    common.add_teacher_arguments(parser)
    add = parser.add_argument_group("method (unset: Table I)").add_argument
    add("--method", default="hinton", type=one_of(*TABLE_I), help=" | ".join(TABLE_I) + " (default: hinton)")
    add(
        "--add", type=one_of("hinton", "ft"), help="the term of Hinton or of the Fickle Teacher on top of at, sp, rkd-*"
    )
    add("--imbalance", type=number(float, 1e-3), metavar="GAMMA", help="class sizes by the power law of section IV-C")
    add("--alpha", type=number(float, 0, 1), help="weight of Hinton's term against cross-entropy")
    add("--tau", type=number(float, 1e-3), help="temperature")
    add("--beta", type=number(float, 0), help="weight of attention transfer")
    add("--gamma", type=number(float, 0), help="weight of similarity preservation")
    add("--lambda-d", type=number(float, 0), help="weight of RKD's distances")
    add("--lambda-a", type=number(float, 0), help="weight of RKD's angles")
    add("--init-epochs", type=number(int, 1), help="epochs of stage 1 of fitnet and fsp")
    args = parser.parse_args()
    if args.add and args.method not in ("at", "sp", "rkd-d", "rkd-a", "rkd-da"):
        raise UsageError(f"--add: goes on top of at, sp, rkd-d, rkd-a and rkd-da, not of {args.method}")
    if args.teacher and args.method in ALONE:
        raise UsageError(f"--teacher: {args.method} has none; leave it out")
    used = {*TABLE_I[args.method], *(("alpha", "tau") if args.add else ())}
    for name in ("alpha", "tau", "beta", "gamma", "lambda_d", "lambda_a", "init_epochs"):
        if getattr(args, name) is not None and name not in used:
            raise UsageError(f"--{name.replace('_', '-')}: {args.method} does not use it; leave it out")
    common.fill(args, preset(args))
    args.init_epochs = args.init_epochs or 0
    return args


def learning_rate(args, epoch):
    """Of epoch 0, 1, …: stage 1, if there is one, then the standard scheme, or that of ONE."""
    if epoch < args.init_epochs:
        return 0.001 * 0.1 ** sum(epoch >= round(share * args.init_epochs) for share in (0.6, 0.8))
    factor, shares = (0.1, (0.5, 0.75)) if args.method == "one" else (0.2, (0.3, 0.6, 0.75))
    return args.lr * factor ** sum(epoch - args.init_epochs >= round(share * args.epochs) for share in shares)


# ---------------------------------------------------------------------------------------------------------- the methods
# S, T: logits [B, C] of student and teacher; s, t: their features, [B, K, H, W] each, s[0] the stem's, s[n] block n's.


def hinton_loss(S, T, tau):
    """tau² KL(softmax(T / tau) || softmax(S / tau)), mean over the batch (Hinton et al. 2015)."""
    log_S, log_T = (S / tau).log_softmax(1), (T / tau).log_softmax(1)
    return tau**2 * F.kl_div(log_S, log_T, log_target=True, reduction="batchmean")


def boundary_samples(teacher, x, y, S, T, size=32, steps=10, step_size=0.3, max_eps=16 / 255):
    """Images on the teacher's decision boundaries (Heo et al. 2019): [≤ size, 3, H, W], made from x [B, 3, H, W].

    Of those that both nets classify as y, the `size` with the largest Σ over wrong classes of the squared difference of
    the probabilities go towards a wrong class, drawn in proportion to the teacher's probability, until the teacher's
    prediction changes, for at most `steps` steps of step_size · (gap of the scores + 1e-4) · gradient / ‖gradient‖₂.
    They stay in [0, 1] and within max_eps of x.
    """
    p_S, p_T = S.softmax(1), T.softmax(1)
    difference = ((p_S - p_T) ** 2).scatter(1, y.unsqueeze(1), 0).sum(1)
    both = (S.argmax(1) == y) & (T.argmax(1) == y)
    base = difference.masked_fill(~both, -1).topk(min(size, len(x))).indices
    base = base[both[base]]
    if len(base) == 0:
        return x[:0]
    x, y = x[base], y[base]
    target = p_T[base].scatter(1, y.unsqueeze(1), 0).clamp(min=1e-12).scatter(1, y.unsqueeze(1), 0).multinomial(1)
    moved = x.clone()
    for _ in range(steps):
        with torch.enable_grad():
            moved.requires_grad_()
            scores = teacher(moved).float()
            gap = (scores.gather(1, y.unsqueeze(1)) - scores.gather(1, target)).squeeze(1)
            (gradient,) = torch.autograd.grad(-gap.sum(), moved)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        step = (step_size * (gap.detach() + 1e-4) / length).view(-1, 1, 1, 1) * gradient
        going = (scores.argmax(1) == y).view(-1, 1, 1, 1)
        nearer = (moved.detach() + step).clamp(x - max_eps, x + max_eps).clamp(0, 1)
        moved = torch.where(going, nearer, moved.detach())
    return moved


def fitnet_loss(regressor, s, t):
    """Mean squared difference between the teacher's block 2 and its regression on the student's (Romero et al. 2015).

    regressor: a 1×1 convolution.
    """
    return F.mse_loss(regressor(s[2]), t[2])


def fsp_matrices(f):
    """Gram matrices of the input and the output of each group (Yim et al. 2017): [B, K, L] each, position means."""
    pairs = [(F.adaptive_max_pool2d(before, after.shape[2:]), after) for before, after in zip(f, f[1:])]
    return [torch.einsum("bkhw,blhw->bkl", before, after) / after[0, 0].numel() for before, after in pairs]


def fsp_loss(s, t, weights=(1, 3, 1)):
    """Mean squared differences of the FSP matrices, weighted."""
    return sum(w * F.mse_loss(a, b) for w, a, b in zip(weights, fsp_matrices(s), fsp_matrices(t)))


def attention_loss(s, t):
    """Σ over blocks of the mean squared difference of the attention maps (Zagoruyko and Komodakis 2017).

    A map is the mean over channels of the squared activations, flattened and of unit length.
    """
    maps = [[F.normalize(f.square().mean(1).flatten(1)) for f in features[1:]] for features in (s, t)]
    return sum(F.mse_loss(a, b) for a, b in zip(*maps))


def similarity_loss(s, t):
    """1/b² ‖G_T - G_S‖_F² of block 3's Gram matrices between samples, rows of unit length (Tung and Mori 2019)."""
    G_S, G_T = (F.normalize(f @ f.T) for f in (features[-1].flatten(1) for features in (s, t)))
    return F.mse_loss(G_S, G_T)


def embedded(f):
    """Block 3, pooled: [B, K]."""
    return F.adaptive_avg_pool2d(f[-1], 1).flatten(1)


def distances(e):
    """Euclidean distances between rows of e [B, K], divided by the mean of those above 0: [B, B]."""
    squares = (e.unsqueeze(0) - e.unsqueeze(1)).square().sum(2)
    d = torch.where(squares > 0, squares.clamp(min=1e-12).sqrt(), 0)
    return d * (d > 0).sum() / d.sum()


def rkd_distance_loss(s, t):
    """Huber loss between the distances within the batch (Park et al. 2019)."""
    return F.smooth_l1_loss(distances(embedded(s)), distances(embedded(t)))


def angles(e):
    """Cosine of the angle at row i between rows j and k of e [B, K]: [B, B, B]."""
    directions = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)


def rkd_angle_loss(s, t):
    """Huber loss between the angles of all triplets of the batch (Park et al. 2019)."""
    return F.smooth_l1_loss(angles(embedded(s)), angles(embedded(t)))


class Gate(nn.Module):
    """ONE's weights of the branches [B, branches], from the shared features [B, K, H, W]; each row sums to 1."""

    def __init__(self, width, branches):
        super().__init__()
        self.linear, self.bn = nn.Linear(width, branches), nn.BatchNorm1d(branches)

    def forward(self, shared):
        return F.relu(self.bn(self.linear(F.adaptive_avg_pool2d(shared, 1).flatten(1)))).softmax(1)


def share_trunk(student, others):
    """ONE: make the other networks use all of `student` but its last group and classifier; returns all of them."""
    for other in others:
        other.stem, other.blocks = student.stem, nn.ModuleList([*student.blocks[:-1], other.blocks[-1]])
    return [student, *others]


def one_logits(branches, gate, x):
    """Logits [B, C] of each branch, a list, and of the gated ensemble; the shared part is computed once."""
    shared = branches[0].stem((x - branches[0].mean) / branches[0].std)
    for block in branches[0].blocks[:-1]:
        shared = block(shared)
    logits = [branch.head(branch.blocks[-1](shared)).float() for branch in branches]
    weights = gate(shared).float()
    return logits, sum(w.unsqueeze(1) * S for w, S in zip(weights.unbind(1), logits))


def one_loss(logits, ensemble, y, tau, ramp):
    """Σ CE(branch) + CE(ensemble) + w(t) Σ tau² KL(ensemble || branch), w = exp(-5 (1 - ramp)²) (Lan et al. 2018)."""
    w = math.exp(-5 * (1 - ramp) ** 2)
    ce = sum(F.cross_entropy(S, y) for S in logits) + F.cross_entropy(ensemble, y)
    return ce + w * sum(hinton_loss(S, ensemble.detach(), tau) for S in logits)


def dml_loss(first, second, y, tau):
    """The sum of what the two students minimise: CE + tau² KL(peer || self), the peer detached (Zhang et al. 2018)."""
    ce = F.cross_entropy(first, y) + F.cross_entropy(second, y)
    return ce + hinton_loss(first, second.detach(), tau) + hinton_loss(second, first.detach(), tau)


# ------------------------------------------------------------------------------------------------------------- training


def main():
    args = parse_args()
    device = common.setup(args)
    data = common.load_data(args, device)
    if args.imbalance:
        kept = common.imbalance(data.train_labels, args.imbalance, len(data.classes), args.seed)
        data = data._replace(train_images=data.train_images[kept], train_labels=data.train_labels[kept])
    labels = common.corrupt_labels(
        data.train_labels, args.noise, args.rate, len(data.classes), args.seed, data.classes, args.data_dir,
        per_sample=True,
    )  # fmt: skip
    student = common.build_model(args.student_arch, len(data.classes), image_size=data.image_size).to(device)
    {"one": train_one, "dml": train_dml}.get(args.method, train_student)(args, device, data, labels, student)


def start(args, device, data, *modules, **parts):
    """The optimiser of the modules' parameters, each once, and the Run."""
    parameters = dict.fromkeys(p for module in modules for p in module.parameters())
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    method = f"{args.method}+{args.add}" if args.add else args.method
    tag = f"imbalance{args.imbalance:g}" if args.imbalance else ""
    total = args.init_epochs + args.epochs
    parts = {"tag": tag, "epochs": total, **parts, "optimizer": optimizer}
    return optimizer, common.Run(args, device, method, args.student_arch, data.classes, **parts)


def begin_epoch(args, epoch, optimizer, *modules):
    """Training mode and this epoch's learning rate, which is returned; stage 2 starts without momentum."""
    for module in modules:
        module.train()
    if epoch == args.init_epochs:
        optimizer.state.clear()
    lr = learning_rate(args, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def update(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def view(images):
    return common.crop_flip(to_float(images), mode="reflect")


def class_accuracies(logits, labels):
    """Accuracy in percent of each class: a list."""
    hit, classes = logits.argmax(1) == labels, logits.shape[1]
    count = labels.bincount(minlength=classes).clamp(min=1)
    return (100 * labels[hit].bincount(minlength=classes) / count).tolist()


def feature_shapes(arch, data):
    """Shapes (K, H, W) of the features of an architecture, stem first, computed without computing."""
    with torch.device("meta"):
        model = common.build_model(arch, 2, image_size=data.image_size)
        return [f.shape[1:] for f in model(torch.empty(2, *data.train_images.shape[1:]), features=True)[1]]


def train_student(args, device, data, labels, student):
    """One student, with a teacher or alone: stage 1, where the method has one, then stage 2."""
    method, alpha, tau = args.method, args.alpha, args.tau
    regressor, teacher = nn.Identity(), None
    if method in ("fitnet", "fsp", "at"):  # these compare features as they are
        path = args.teacher
        arch = common.load_checkpoint(path, "--teacher")["arch"] if path else args.teacher_arch
        s, t = (feature_shapes(name, data) for name in (args.student_arch, arch))
        matter = {"fitnet": lambda f: f[2][1:], "fsp": lambda f: f, "at": lambda f: [size[1:] for size in f[1:]]}[
            method
        ]
        if len(s) != len(t) or matter(s) != matter(t):
            s, t = ([*map(tuple, shapes)] for shapes in (s, t))
            raise UsageError(f"--student-arch: {method} cannot compare features {s} with {arch}'s {t}; sp, rkd-da can")
        if method == "fitnet":
            regressor = nn.Conv2d(s[2][0], t[2][0], 1, bias=False).to(device)
    optimizer, run = start(args, device, data, student, regressor, model=student, regressor=regressor)
    if method not in ALONE:
        milestones = [round(share * args.epochs) for share in (0.3, 0.6, 0.75)]
        teacher = common.load_teacher(args, run, data, labels, milestones, dropout=0.4 if args.add == "ft" else 0.0)
        for module in teacher.modules():
            module.training = args.add == "ft" and isinstance(module, nn.Dropout)  # fickle: fickle_teacher.py says why
    if args.compile:
        student.compile()

    for epoch in range(run.epoch, args.init_epochs + args.epochs):
        lr, losses = begin_epoch(args, epoch, optimizer, student, regressor), []
        for index, images in run.progress(data.train_images, common.batches(len(labels), args.batch_size, device)):
            x, y = view(images), labels[index]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                S, s = student(x, features=True)
                if teacher:
                    with torch.no_grad():
                        T, t = teacher(x, features=True)
                        T, t = T.float(), [f.float() for f in t]
                S, s = S.float(), [f.float() for f in s]
                ce = F.cross_entropy(S, y)
                if epoch < args.init_epochs:
                    loss = fitnet_loss(regressor, s, t) if method == "fitnet" else fsp_loss(s, t)
                elif method == "bss":
                    done = (epoch + 1) / args.epochs
                    moved = boundary_samples(teacher, x, y, S.detach(), T, size=max(1, 32 // common.TOGETHER[0]))
                    loss = ce + (1 + 3 * (1 - done)) * hinton_loss(S, T, tau)
                    if len(moved):
                        bss = hinton_loss(student(moved).float(), teacher(moved).float(), tau)
                        loss = loss + 2 * max(1 - 4 / 3 * done, 0) * bss
                elif alpha is not None:  # hinton, fitnet, fsp; and --add
                    loss = (1 - alpha) * ce + alpha * hinton_loss(S, T, tau)
                else:
                    loss = ce
                if method == "at":
                    loss = loss + args.beta * attention_loss(s, t)
                if method == "sp":
                    loss = loss + args.gamma * similarity_loss(s, t)
                if args.lambda_d:
                    loss = loss + args.lambda_d * rkd_distance_loss(s, t)
                if args.lambda_a:
                    loss = loss + args.lambda_a * rkd_angle_loss(s, t)
            losses.append(update(optimizer, loss))
        logits = predict(student, data.test_images, args.amp)
        test_acc, class_acc = accuracy(logits, data.test_labels), class_accuracies(logits, data.test_labels)
        more = common.more_accuracies(student, data, args.amp, logits)
        run.end_epoch(losses, lr=lr, test_acc=test_acc, class_acc=class_acc, **more)
    run.finish()


def best_of(students):
    """A part of the checkpoint that is the best of several networks; `best` is its index, set before saving."""
    part = SimpleNamespace(best=0, load_state_dict=lambda state: None)
    part.state_dict = lambda: students[part.best].state_dict()
    return part


def train_one(args, device, data, labels, student):
    """ONE: three branches on a shared trunk, taught by their gated ensemble; the best is the checkpoint's model."""
    arch, classes, size = args.student_arch, len(data.classes), data.image_size
    others = [common.build_model(arch, classes, image_size=size).to(device) for _ in range(2)]
    branches = share_trunk(student, others)
    width = feature_shapes(args.student_arch, data)[-2][0]
    gate = Gate(width, len(branches)).to(device)
    best, named = best_of(branches), {f"branch{i + 1}": branch for i, branch in enumerate(branches)}
    optimizer, run = start(args, device, data, *branches, gate, model=best, **named, gate=gate)

    @torch.no_grad()
    def predicted(images):
        for module in (*branches, gate):
            module.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            parts = [one_logits(branches, gate, to_float(part)) for part in images.split(common.PASS[device.type])]
        return [torch.cat(p) for p in zip(*(branch for branch, _ in parts))], torch.cat([e for _, e in parts])

    for epoch in range(run.epoch, args.epochs):
        lr, losses = begin_epoch(args, epoch, optimizer, *branches, gate), []
        ramp = min((epoch + 1) / args.epochs * 300 / 80, 1)  # epoch 80 of 300
        for index, images in run.progress(data.train_images, common.batches(len(labels), args.batch_size, device)):
            x, y = view(images), labels[index]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits, ensemble = one_logits(branches, gate, x)
                loss = one_loss(logits, ensemble, y, args.tau, ramp)
            losses.append(update(optimizer, loss))
        logits, ensemble = predicted(data.test_images)
        scores = [accuracy(S, data.test_labels) for S in logits]
        best.best = scores.index(max(scores))
        run.end_epoch(
            losses, lr=lr, test_acc=max(scores), branch_test_acc=scores,
            ensemble_test_acc=accuracy(ensemble, data.test_labels),
            **common.more_accuracies(branches[best.best], data, args.amp, logits[best.best]),
            class_acc=class_accuracies(logits[best.best], data.test_labels),
        )  # fmt: skip
    run.finish()


def train_dml(args, device, data, labels, student):
    """DML: two students that teach each other. The better one is the checkpoint's model."""
    other = common.build_model(args.student_arch, len(data.classes), image_size=data.image_size)
    students = [student, other.to(device)]
    best = best_of(students)
    optimizer, run = start(args, device, data, *students, model=best, student1=students[0], student2=students[1])

    for epoch in range(run.epoch, args.epochs):
        lr, losses = begin_epoch(args, epoch, optimizer, *students), []
        for index, images in run.progress(data.train_images, common.batches(len(labels), args.batch_size, device)):
            x, y = view(images), labels[index]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = dml_loss(*(one(x).float() for one in students), y, args.tau)
            losses.append(update(optimizer, loss))
        logits = [predict(one, data.test_images, args.amp) for one in students]
        scores = [accuracy(S, data.test_labels) for S in logits]
        best.best = scores.index(max(scores))
        class_acc = class_accuracies(logits[best.best], data.test_labels)
        more = common.more_accuracies(students[best.best], data, args.amp, logits[best.best])
        run.end_epoch(losses, lr=lr, test_acc=max(scores), student_test_acc=scores, class_acc=class_acc, **more)
    run.finish()


if __name__ == "__main__":
    common.run_main(main)
