"""What makes the loops fast and can be checked without a clock: no step waits for the device."""

import pytest
import torch
from test_cmd import load

import common
import fickle_teacher
import kd_zoo
import messy_collaboration
import nrd


def losses(cmd):
    """Name: a function of logits S, T [B, C], labels y, images x and features s, t that gives a scalar."""

    def one_hot(y, S):
        return torch.nn.functional.one_hot(y, S.shape[1]).float()

    def nrd_loss(S, T, y, **_):
        return nrd.js_divergence((one_hot(y, S), S.softmax(1), T.softmax(1)), (0.2, 0.6, 0.2)).mean()

    def robust(name, params):
        return lambda S, T, y, **_: nrd.robust_loss(
            name, torch.cat([S, S]) if name == "gjs" else S, one_hot(y, S), params
        )

    def mutual(S, T, y, **_):
        p_A, p_B = S.softmax(1), T.softmax(1)
        q_A, q_B = (cmd.refined_label("proselflc", one_hot(y, S), p, cmd.self_trust(p, 0.5)) for p in (p_A, p_B))
        return sum(cmd.cmd_losses(q_A, q_B, S, T, 1.0)[:2])

    robusts = {"ce": (), "bs": (0.5,), "ls": (0.1,), "sce": (1, 1), "gce": (0.7,), "nce+rce": (1, 1), "js": (0.5,)}
    return {
        "nrd": nrd_loss,
        **{name: robust(name, params) for name, params in {**robusts, "gjs": (0.5,)}.items()},
        "ft": lambda S, T, **_: fickle_teacher.kl_divergence(S, T),
        "mc": lambda S, y, **_: torch.nn.functional.cross_entropy(S, messy_collaboration.messy(y, 0.1, S.shape[1])),
        "hinton": lambda S, T, **_: kd_zoo.hinton_loss(S, T, 4.0),
        "fsp": lambda s, t, **_: kd_zoo.fsp_loss(s, t),
        "at": lambda s, t, **_: kd_zoo.attention_loss(s, t),
        "sp": lambda s, t, **_: kd_zoo.similarity_loss(s, t),
        "rkd-d": lambda s, t, **_: kd_zoo.rkd_distance_loss(s, t),
        "rkd-a": lambda s, t, **_: kd_zoo.rkd_angle_loss(s, t),
        "one": lambda S, T, y, **_: kd_zoo.one_loss([S, T], (S + T) / 2, y, 3.0, 0.5),
        "dml": lambda S, T, y, **_: kd_zoo.dml_loss(S, T, y, 4.0),
        "cmd": mutual,
        "kdcl": lambda S, T, y, **_: cmd.kl_divergence(S / 2, cmd.kdcl_teacher(S, T, y) / 2),
    }


@pytest.mark.parametrize("name", losses(None))
def test_no_step_reads_a_value(name):
    """On meta tensors, which have no values: what reads one, for which a CUDA step would have to wait, raises."""
    with torch.device("meta"):
        images, y = torch.empty(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
        student, teacher = (common.build_model(arch, 10) for arch in ("wrn-10-1", "wrn-16-1"))
        optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
        x = common.crop_flip(common.to_float(images), mode="reflect")
        S, s = student(x, features=True)
        with torch.no_grad():
            T, t = teacher(x, features=True)
        loss = kd_zoo.update(optimizer, losses(load())[name](S=S, T=T, y=y, x=x, s=s, t=t))
        assert loss.shape == ()
        with pytest.raises(RuntimeError, match="meta"):
            loss.item()
