"""torchrun on the CPU: two processes that act as one."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_npz
from torch.utils._pytree import tree_leaves

import common

CPU = "--epochs 1 --device cpu --no-amp"
SMALL = f"--dataset tiny.npz --batch-size 20 {CPU}"
NETS = "--teacher-arch wrn-10-1 --student-arch wrn-10-1"
ONE_STEP = (
    f"nrd.py --loss ce --lr 0.05 --student-augment none --limit-train 32 --batch-size 32 {CPU} --out one-step"
)
COMMANDS = [
    f"nrd.py {SMALL} --arch wrn-10-1",
    f"cmd.py {SMALL} --arch wrn-10-1",
    f"fickle_teacher.py {SMALL} {NETS} --teacher-epochs 1",
    f"soft_randomization.py {SMALL} {NETS}",
    f"messy_collaboration.py {SMALL} {NETS}",
    f"kd_zoo.py {SMALL} --student-arch wrn-10-1 --method one",
    f"noise_data_free_kd.py {SMALL} {NETS} --teacher-epochs 1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one step of nrd.py, and every script, have been run by two processes."""
    folder = tmp_path_factory.mktemp("two")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    write_npz(folder / "tiny.npz", train_images=pixels, test_images=pixels[:20])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "tests/ranks.py"), str(folder), ONE_STEP, *COMMANDS]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("after epoch 1, best") == 1 + len(COMMANDS) + 3  # three teachers
    return folder


@pytest.mark.parametrize("name", [command.split(".")[0] for command in COMMANDS])
def test_both_processes_end_with_the_same_weights(folder, name):
    first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    leaves = [tree_leaves(state["state"]) for state in (first, second)]
    tensors = [pair for pair in zip(*leaves, strict=True) if torch.is_tensor(pair[0])]
    assert len(tensors) > 30 and all(torch.equal(a, b) for a, b in tensors)
    assert first["metrics"] == second["metrics"]
    assert not torch.equal(first["draws"], second["draws"])  # of augmentation


def test_the_first_step_is_that_of_the_mean_gradient_of_the_halves(folder):
    """Without augmentation: gradients of the batch's two halves, averaged; SGD with Nesterov momentum."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two had: other sums would be rounded otherwise
    data = common.load_dataset("shapes", limit_train=32)
    labels = common.corrupt_labels(data.train_labels, "sym", 0.5, data.classes, 0)
    model = common.build_model("wrn-10-1", 10, 0.0, *common.channel_stats(data)).train()
    halves, gradients, statistics = torch.randperm(32).view(16, 2).T, [], []
    for index in halves:
        net = copy.deepcopy(model)
        loss = F.cross_entropy(net(data.batch(index)), labels[index])
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
        statistics.append({key: value for key, value in net.named_buffers() if "running" in key})
    torch.set_num_threads(threads)
    found = common.load_checkpoint(folder / "one-step/checkpoint.pt")["model"]
    lr, weight_decay, momentum = 0.05, 1e-3, 0.9
    for (key, theta), a, b in zip(model.named_parameters(), *gradients, strict=True):
        expected = theta - lr * (1 + momentum) * ((a + b) / 2 + weight_decay * theta)
        assert (found[key] - expected).abs().max() < 1e-6, key
    for key in statistics[0]:
        assert torch.allclose(found[key], (statistics[0][key] + statistics[1][key]) / 2, atol=1e-6), key
