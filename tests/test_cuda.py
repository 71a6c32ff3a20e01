"""On a GPU: it computes what the CPU computes, every script runs there, and no loop waits for the device.

Shares of pixels may differ: what is rounded, or taken from the nearest pixel, can fall to either side.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch.overrides import TorchFunctionMode

import common
import evaluate
import kd_zoo
import nrd
from common import draw_shapes, to_float

DEVICE = torch.device("cuda")
no_cuda = DEVICE.type == "cuda" and not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(no_cuda, reason="no CUDA device is visible, so that nothing is tested on one")
CMD = load_script("cmd")
TINY = ["--limit-train", 96, "--limit-test", 32, "--batch-size", 32, "--epochs", 2, "--device", DEVICE]


@pytest.fixture(autouse=True)
def exact():
    """No TF32 and no search for fast convolutions; common.setup, which a test may call, switches both on."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = True


class SameDraws(TorchFunctionMode):
    """Random draws are made on the CPU and moved. The global generator replaces one of another device."""

    in_place = (torch.Tensor.uniform_, torch.Tensor.exponential_)
    draws = (torch.rand, torch.randn, torch.randint, torch.rand_like, torch.poisson, *in_place)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def on_cpu(value):
            if isinstance(value, torch.Generator) and value.device.type != "cpu":
                return torch.default_generator
            return value.cpu() if torch.is_tensor(value) else value

        kwargs = dict(kwargs or {})
        if function not in self.draws:
            return function(*args, **kwargs)
        device = kwargs.pop("device", None) or next(
            (arg.device for arg in args if torch.is_tensor(arg)), "cpu"
        )
        drawn = function(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()}).to(
            device
        )
        return args[0].copy_(drawn) if function in self.in_place else drawn


def assert_pixels_agree(function, images, tolerance, share):
    """Where both devices draw the same, at most a `share` of the values differs by more than `tolerance`."""
    results = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)  # evaluate.corrupt gives its generator this seed too
        with SameDraws():
            result = function(images.to(device))
        assert result.device.type == torch.device(device).type
        results.append(result.cpu().float())
    off = ((results[0] - results[1]).abs() > tolerance).float().mean().item()
    assert off <= share, f"{100 * off:.2f} % of the values differ by more than {tolerance:.2g}"


def assert_statistics_agree(function, images, tolerance):
    """Each device draws its own: a channel's mean, and how far it is moved, differ by at most `tolerance`."""
    means = []
    for x in (images, images.to(DEVICE)):
        result = function(x).float()
        means.append(torch.stack([result.mean((0, 2, 3)), (result - x.float()).abs().mean((0, 2, 3))]).cpu())
    torch.testing.assert_close(*means, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("op", range(len(common.OPS)), ids=common.OPS)
def test_operation(op, mode):
    def apply(x):
        table, negative = common.op_table(31, 32, 32, x.device), torch.arange(len(x), device=x.device) % 2
        return common.apply_ops(x * 255, table, torch.full_like(negative, op), 17, negative, mode) / 255

    assert_pixels_agree(apply, to_float(draw_shapes(50, seed=7)[0]), 1e-4, 0.01)


AUGMENTATIONS = {
    "rand_augment": (2, 17), "aug_mix": (), "auto_augment": (), "crop_flip": (4, "reflect"), "cutout": (5,),
    "random_resized_crop": (32,), "color_jitter": (), "random_erasing": (),
}  # fmt: skip


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation(name):
    def augment(x):
        return getattr(common, name)(x, *AUGMENTATIONS[name])

    images = to_float(draw_shapes(1000, seed=7)[0])
    assert_pixels_agree(augment, images, 1e-3, 0.01)
    assert_statistics_agree(augment, images, 0.03)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", evaluate.CORRUPTIONS)
def test_corruption(name, severity):
    def corrupt(x):
        return evaluate.corrupt(x, name, severity)

    images = draw_shapes(500, seed=7)[0]
    assert_pixels_agree(corrupt, images, 1, 0.02)  # levels of 255
    assert_statistics_agree(corrupt, images, 4)


def robust(name):
    params = nrd.table_5("cifar10", name, "sym", 0.4)[2]
    if name == "nrd":
        return lambda S, T, q: nrd.js_divergence((q, S.softmax(1), T.softmax(1)), params).mean()
    return lambda S, T, q: nrd.LOSSES[name](torch.cat([S, T]) if name == "gjs" else S, q, *params).mean()


def mutual(self_kd):
    def loss(S, T, q):
        q_A, q_B = (
            CMD.refined_label(self_kd, q, p, CMD.self_trust(p, 0.5)) for p in (S.softmax(1), T.softmax(1))
        )
        return sum(CMD.cmd_losses(q_A, q_B, S.softmax(1), T.softmax(1), chi=1.9)[:2])

    return loss


LOSSES = {  # of logits S, T [B, 10] and one-hot labels q
    **{name: robust(name) for name in nrd.HYPERPARAMETERS},
    **{f"cmd {name}": mutual(name) for name in CMD.EPSILON},
    "kdcl": lambda S, T, q: CMD.hinton_loss(S, CMD.kdcl_teacher(S, T, q.argmax(1)), 2),
    "hinton": lambda S, T, q: kd_zoo.hinton_loss(S, T, 4.0),
    "one": lambda S, T, q: kd_zoo.one_loss([S, T], (S + T) / 2, q.argmax(1), 3.0, 0.5),
    "dml": lambda S, T, q: kd_zoo.dml_loss(S, T, q.argmax(1), 4.0),
}
FEATURE_LOSSES = {  # of lists of four features
    "fitnet": lambda s, t: kd_zoo.fitnet_loss(torch.nn.Identity(), s, t), "fsp": kd_zoo.fsp_loss,
    "at": kd_zoo.attention_loss, "sp": kd_zoo.similarity_loss, "rkd-d": kd_zoo.rkd_distance_loss,
    "rkd-a": kd_zoo.rkd_angle_loss,
}  # fmt: skip


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", [*LOSSES, *FEATURE_LOSSES])
def test_loss_and_its_gradients(name):
    q, shapes = F.one_hot(torch.randint(10, (32,)), 10).float(), [(10,)]
    if name in FEATURE_LOSSES:
        shapes = [(4, 8, 8), (4, 8, 8), (8, 4, 4), (16, 2, 2)]
    student, teacher = ([torch.randn(32, *shape) for shape in shapes] for _ in range(2))
    results = []
    for device in ("cpu", DEVICE):
        s, t = [part.to(device).requires_grad_() for part in student], [part.to(device) for part in teacher]
        loss = FEATURE_LOSSES[name](s, t) if name in FEATURE_LOSSES else LOSSES[name](*s, *t, q.to(device))
        gradients = torch.autograd.grad(loss, s, allow_unused=True)
        results.append([v.detach().cpu() for v in (loss, *gradients) if v is not None])
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) < 1e-4


ARCHITECTURES = (
    "wrn-10-1", "preact_resnet18", "resnet8", "resnet8x4", "resnet18", "resnet50", "mobilenet_v2",
    "shufflenet_v2", "densenet121", "inception_resnet_v2",
)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_network_and_its_gradient(arch):
    size = 96 if arch == "inception_resnet_v2" else 32
    images, y, results = torch.rand(8, 3, size, size), torch.randint(10, (8,)), []
    state = common.build_model(arch, 10, image_size=size).state_dict()
    for device in ("cpu", DEVICE):
        model = common.build_model(arch, 10, image_size=size).to(device)
        model.load_state_dict(state)
        logits = model.train()(images.to(device))
        F.cross_entropy(logits, y.to(device)).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append([v.detach().cpu() for v in (logits, model.eval()(images.to(device)), gradient)])
    errors = [relative_error(a, b) for a, b in zip(*results)]
    # on a CPU float32 is up to 6e-5, 2e-5 and 4e-2 from float64: a ReLU near 0 passes a gradient or none
    assert errors[0] < 1e-3 and errors[1] < 1e-3 and errors[2] < 0.1, errors


SMALL = ["--teacher-arch", "wrn-10-1"]  # as the students, so that there is less to compile
SCRIPTS = {
    "nrd": ["--student-augment", "paper"], "cmd": ["--augment", "crop"], "kd_zoo": SMALL,
    "fickle_teacher": SMALL, "soft_randomization": SMALL, "messy_collaboration": SMALL,
    "noise_data_free_kd": [*SMALL, "--teacher-epochs", 2],
}  # fmt: skip


@pytest.mark.parametrize("flags", [["--no-amp"], ["--amp"], ["--amp", "--compile"]], ids=" ".join)
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(name, flags, cli):
    torch.compiler.reset()
    status, out, err = cli(load_script(name), *TINY, *SCRIPTS[name], *flags)
    assert status == 0, err


@pytest.mark.parametrize("method", kd_zoo.TABLE_I)
def test_method_of_the_zoo_runs(method, cli):
    flags = [] if method in kd_zoo.ALONE else SMALL
    assert cli(kd_zoo, *TINY, *flags, "--amp", "--method", method)[0] == 0


def test_stopped_run_goes_on(cli, monkeypatch):
    command, end_epoch = [nrd, *TINY, "--amp", "--out", "run", "--resume"], common.Run.end_epoch

    def interrupt(*args, **metrics):
        end_epoch(*args, **metrics)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "end_epoch", interrupt)
    assert cli(*command)[0] == 130
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    assert cli(*command)[0] == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]


def watch(monkeypatch, before, after):
    """Call before() and after() around what a loop does with a batch. The first of an epoch is a warm-up."""
    batches = common.Run.batches

    def watched(*args):
        for step, index in enumerate(batches(*args)):
            if step > 0:
                before()
            yield index
            if step > 0:
                after()

    monkeypatch.setattr(common.Run, "batches", watched)


@pytest.mark.parametrize("name", SCRIPTS)
def test_loop_does_not_wait_for_the_device(name, cli, monkeypatch):
    """Except those of dead leaves and of BSS: their data decide what is left to do."""
    noise = ["--source", "gaussian"] if name == "noise_data_free_kd" else []
    modes, switch = [], torch.cuda.set_sync_debug_mode
    # error: torch raises
    watch(monkeypatch, lambda: modes.append(switch("error")), lambda: switch("default"))
    try:
        assert cli(load_script(name), *TINY, *SCRIPTS[name], *noise, "--amp")[0] == 0
    finally:
        switch("default")
    assert len(modes) >= 4


@pytest.mark.parametrize("amp", ["--amp", "--no-amp"])
def test_memory_of_hinton_at_batch_128(amp, cli, monkeypatch):
    peaks, cuda = [], torch.cuda
    watch(monkeypatch, cuda.reset_peak_memory_stats, lambda: peaks.append(cuda.max_memory_allocated()))
    flags = [
        "--teacher-arch",
        "wrn-40-2",
        "--student-arch",
        "wrn-16-2",
        "--batch-size",
        128,
        "--limit-train",
        512,
    ]
    assert cli(kd_zoo, *TINY, *flags, "--epochs", 1, amp)[0] == 0
    assert 0 < max(peaks) < 4e9
