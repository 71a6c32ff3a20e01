"""test_processes.py starts this by torchrun: FOLDER COMMAND …. Each process writes its state to FOLDER."""

import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import load_script

import common

folder, *commands = sys.argv[1:]
dist.init_process_group("gloo")  # once for all commands
dist.destroy_process_group = lambda: None
finish = common.Run.finish


def written(run):
    """Run.finish, which also writes the parts of the training state as this process has them."""
    state = {name: part.state_dict() for name, part in run.parts.items()}
    metrics = [
        {k: v for k, v in record.items() if k not in ("seconds", "images_per_second")}
        for record in run.metrics
    ]
    content = {"state": state, "metrics": metrics, "draws": torch.rand(3)}
    torch.save(content, f"{folder}/{run.header['script']}-{os.environ['RANK']}.pt")
    return finish(run)


common.plot_curves = lambda *args: None  # three seconds, and nothing that processes change
common.Run.finish = written
for command in commands:
    name, *sys.argv[1:] = shlex.split(command)
    script = load_script(Path(name).stem)
    common.run(script.parse_args, script.main)
