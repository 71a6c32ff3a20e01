"""On device "cuda" without a GPU: a GPU would take every tensor, and in no step does the host wait.

Fake tensors stand in for those of the GPU. Two functions wait, as their data decide what is left to do, and
are tested on the CPU: the dead leaves of noise_data_free_kd.py and boundary_samples of kd_zoo.py.
"""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load_script
from fake_cuda import AUGMENTATIONS, epoch, fake_cuda

import common
import evaluate

LOAD_TEACHER = common.load_teacher
simulated = hasattr(torch._C, "_ensureCUDADeviceGuardSet")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py tests the same on the GPU"),
    pytest.mark.skipif(not simulated, reason="this torch has no CUDA tensors without a GPU"),
]
names = "cmd fickle_teacher kd_zoo messy_collaboration noise_data_free_kd nrd soft_randomization"
SCRIPTS = {name: load_script(name) for name in names.split()}
TINY = ["--limit-train", 24, "--limit-test", 8, "--batch-size", 8]
CMD, ZOO, NRD, FREE = (SCRIPTS[name] for name in ("cmd", "kd_zoo", "nrd", "noise_data_free_kd"))


@pytest.fixture
def watch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fake_cuda() as watch:
        yield watch


@pytest.fixture
def small(monkeypatch):
    """Networks of ten operations, so that the loops are soon gone through."""

    def build_model(arch, classes, dropout=0.0, mean=0, std=1, image_size=32, pretrained=False, amp=False):
        blocks = [nn.Conv2d(4, 4, 3, 2, 1) for _ in range(3)]
        head = common.pooled(nn.BatchNorm2d(4), nn.Dropout(dropout), classifier=nn.Linear(4, classes))
        model = common.Classifier(nn.Conv2d(3, 4, 1), blocks, head, amp=amp)
        model.built_as = {"arch": arch}
        return model

    monkeypatch.setattr(common, "build_model", build_model)


@pytest.mark.parametrize("line", [
    "fickle_teacher", "soft_randomization", "messy_collaboration --amp", "nrd --student-augment paper",
    "nrd --dataset food101", *(f"nrd --loss {loss}" for loss in NRD.HYPERPARAMETERS if loss != "nrd"),
    *(f"cmd --mutual {method}" for method in ("sync", "async", "kdcl")),
    *(f"cmd --mutual cmd --self-kd {method}" for method in CMD.EPSILON),
    *(f"kd_zoo --method {method}" for method in ZOO.TABLE_I), "kd_zoo --method one --amp", "kd_zoo --add ft",
    *(f"noise_data_free_kd --source {source}" for source in ("data", "gaussian", "dead-leaves")),
    "noise_data_free_kd --bn running",
])  # fmt: skip
def test_loop(line, watch, small, monkeypatch):
    monkeypatch.setattr(ZOO, "boundary_samples", lambda teacher, x, *others: x[:4])
    monkeypatch.setattr(
        FREE, "dead_leaves", lambda n, size, device: torch.rand(n, 3, size, size, device=device)
    )
    name, *flags = line.split()
    epoch(SCRIPTS[name], *TINY, *flags)


@pytest.mark.parametrize("method", ["fitnet", "fsp"])
def test_second_stage(method, watch, small, monkeypatch):
    monkeypatch.setattr(common.Run, "epoch", 20)
    epoch(ZOO, *TINY, "--method", method, "--init-epochs", 20)


@pytest.mark.parametrize("name", ["soft_randomization", "noise_data_free_kd"])  # by SGD and by Adam
def test_loop_of_the_teacher(name, watch, small):
    with pytest.MonkeyPatch.context() as patch:  # undone before fake_cuda's own
        patch.setattr(common, "load_teacher", LOAD_TEACHER)
        patch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
        epoch(SCRIPTS[name], *TINY)


@pytest.mark.parametrize("line", [
    "nrd --student-augment paper", "nrd --dataset food101", "cmd --validation 0.2",
    "noise_data_free_kd --source data", "kd_zoo --method baseline --imbalance 1 --limit-train 240",
])  # fmt: skip
def test_images_that_the_gpu_cannot_hold_stay_on_the_host(line, watch, small):
    """Steps have to wait for them, and for nothing else."""
    name, *flags = line.split()
    watch.memory = 1
    with pytest.raises(AssertionError, match="aten._to_copy.default is given or gives a tensor of the CPU"):
        epoch(SCRIPTS[name], *TINY, *flags, "--out", "waits")
    watch.in_step = False
    watch.waits = True
    epoch(SCRIPTS[name], *TINY, *flags)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation(name, watch):
    for watch.in_step in (False, True):  # the first call makes tables
        x = getattr(common, name)(torch.rand(4, 3, 32, 32, device="cuda"), *AUGMENTATIONS[name])
    assert x.device.type == "cuda"


@pytest.mark.parametrize("name", evaluate.CORRUPTIONS)
def test_corruption(name, watch):
    watch.in_step = watch.uploads = True
    for severity in (1, 5):
        constants, x = evaluate.SEVERITIES[name][severity - 1], torch.rand(4, 3, 32, 32, device="cuda")
        assert evaluate.CORRUPTIONS[name](x, constants, None).device.type == "cuda"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs of nrd.py on the CPU, a and b, and a CIFAR-10-C with fake tensors' labels."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(common, "plot_curves", lambda *_: None)
        cpu = ["--device=cpu", "--no-amp", "--epochs=1"]
        for name in "ab":
            patch.setattr("sys.argv", ["nrd.py", *map(str, TINY), *cpu, f"--out={name}"])
            args = NRD.parse_args()
            args.seed = 0
            NRD.main(args)
    (folder / "official").mkdir()
    np.lib.format.open_memmap(folder / "official/fog.npy", "w+", np.uint8, (50000, 32, 32, 3))
    (folder / "official/snow.npy").symlink_to("fog.npy")
    np.save(folder / "official/labels.npy", np.full(50000, 4))
    return folder


@pytest.mark.parametrize("memory", [1, 2**40])
@pytest.mark.parametrize("flags", [
    "--pgd 1 2 --restarts 2", "--pgd 1 --worst-start --cifar-c official", "--cifar-c",
    "--transfer --teacher a/checkpoint.pt", "--memory 2",
])  # fmt: skip
def test_evaluation(flags, memory, trained, watch, monkeypatch, capsys):
    """With images on the GPU, and with those that it cannot hold."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(
        evaluate, "CORRUPTIONS", {name: evaluate.CORRUPTIONS[name] for name in ("fog", "snow")}
    )
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: path.touch())
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "a", "b", *flags.split(), "--limit-test=9", "--device=cuda"]
    )
    watch.memory = memory
    args = evaluate.parse_args()
    args.seed = 0
    evaluate.main(args)
    assert "ensor" not in capsys.readouterr().err  # what is on the GPU cannot be drawn


def test_what_waits_makes_every_tensor_on_the_device_of_its_arguments():
    """Dead leaves and BSS. A factory that is not told the device makes a tensor that fits no other."""
    x = torch.rand(8, 3, 4, 4)
    scores = x.mean((2, 3))
    with torch.device("meta"):
        images = FREE.dead_leaves(2, 16, x.device)
        moved = ZOO.boundary_samples(lambda x: x.mean((2, 3)), x, scores.argmax(1), scores, scores)
    assert images.device == moved.device == x.device and len(moved) == 8


@pytest.mark.parametrize("fault, says", [
    (lambda x: x[torch.arange(4)], "aten.index.Tensor is given"),
    (lambda x: x * torch.rand(8, 1, 1, 1), "two .*devices"),
    (lambda x: torch.tensor([0.5], device=x.device), "aten._to_copy.default is given"),
    (lambda x: x.to("cpu"), "aten._to_copy.default is given"),
    (lambda x: x.mean().item(), "_local_scalar_dense"), (lambda x: bool(x.any()), "_local_scalar_dense"),
    (lambda x: x[:, 0, 0, 0].tolist(), "_local_scalar_dense"), (lambda x: x[x > 0], "aten.nonzero"),
    (lambda x: x.nonzero(), "aten.nonzero"), (lambda x: x.numpy(), "numpy"),
    (lambda x: torch.rand(8, device="cuda", generator=torch.Generator()), "given a generator of cpu"),
    (lambda x: torch.rand(8, generator=torch.Generator("cuda")), "given a generator of cuda"),
    (lambda x: torch.rand(8)[x[:, 0, 0, 0].long()], "of the CPU is given an index of cuda"),
    (lambda x: x.bfloat16()[:, 0] @ x[:, 1], "is given torch.bfloat16 and torch.float32"),
    (lambda x: x.long().flatten().bincount(torch.ones(x.numel()), 9), "given tensors of two devices"),
])  # fmt: skip
def test_these_tests_can_fail(fault, says, watch, small):
    with pytest.MonkeyPatch.context() as patch, pytest.raises((AssertionError, RuntimeError), match=says):
        patch.setattr(common, "crop_flip", lambda x, **options: (x, fault(x))[0])
        epoch(SCRIPTS["messy_collaboration"], *TINY)
