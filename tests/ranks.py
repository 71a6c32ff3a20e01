"""What tests/test_processes.py has torchrun start: the scripts, as they are or with something put into their way.

torchrun --nproc_per_node=2 tests/ranks.py JOB SCRIPT [flags]
"""

import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import common  # noqa: E402

RANK = int(os.environ.get("RANK", 0))


def load(name):
    spec = importlib.util.spec_from_file_location(f"{Path(name).stem}_script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(run):
    """Of all weights and buffers of a run, BatchNorm's and the optimiser's; not of BatchNorm's count of its batches."""
    state = [part.state_dict() for part in run.parts.values()]
    values = [v for v in tree_leaves(state) if torch.is_tensor(v) and v.is_floating_point()]
    return hashlib.sha256(b"".join(v.contiguous().numpy().tobytes() for v in values)).hexdigest()


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_ranks():
    """After each epoch the ranks hold the same; of each batch each has a part that no other has."""
    end_epoch, batches, orders = common.Run.end_epoch, common.batches, []

    def ended(run, *args, **metrics):
        result = end_epoch(run, *args, **metrics)
        assert len(set(gathered(digest(run)))) == 1, "the ranks' states differ"
        assert len(set(gathered(json.dumps([run.metrics[-1][key] for key in metrics])))) == 1, "the metrics differ"
        shares = gathered([index.tolist() for index in orders.pop()])
        rows = [row for share in shares for index in share for row in index]
        assert len(rows) == len(set(rows)) > 0, "shards overlap"
        assert len({len(index) for share in shares for index in share}) == 1, "shards of different sizes"
        noise = gathered(torch.rand(3).tolist())
        assert noise[0] != noise[1], "the ranks draw the same numbers"
        print(f"checked epoch {run.epoch} of {run.header['method']}, {len(rows)} rows")
        return result

    common.Run.end_epoch = ended
    common.batches = lambda *args: orders.append(batches(*args)) or orders[-1]


def stop_after_an_epoch():
    end_epoch = common.Run.end_epoch

    def ended(run, *args, **metrics):
        end_epoch(run, *args, **metrics)
        common.wait()
        sys.exit(7)

    common.Run.end_epoch = ended


def batch_norm_in_evaluation_mode():
    torch.nn.BatchNorm2d.train = lambda module, mode=True: torch.nn.Module.train(module, False)


def die_on_rank_1():
    update = torch.optim.SGD.step

    def step(optimizer, *args):
        if RANK == 1:
            raise ArithmeticError("rank 1 has died")
        return update(optimizer, *args)

    torch.optim.SGD.step = step


if __name__ == "__main__":
    job, *scripts = sys.argv[1:]
    {
        "check": check_ranks,
        "stop": stop_after_an_epoch,
        "evaluation": batch_norm_in_evaluation_mode,
        "die": die_on_rank_1,
    }[job]()
    init, dist.destroy_process_group = dist.init_process_group, lambda: None
    dist.init_process_group = lambda **how: dist.is_initialized() or init(**how)  # once for all that follow one another
    for command in " ".join(scripts).split(" then "):
        name, *flags = command.split()
        sys.argv = [name, *flags]
        common.run_main(load(name).main)
