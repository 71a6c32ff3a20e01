"""What a GPU is wanted for, the most wanted first: tests, speed, then the papers' tables at their own size.

    python tests/gpu.py --data-dir DIR --minutes 9  # again and again: each call goes on from the last one
    python tests/gpu.py --list                      # the jobs, and how far they are

--out, runs/gpu, gets gpu.json and gpu.md, the results beside the papers' figures, and a log of each job. Runs
and teachers are there too. A job that is done is not started again. A training that was cut off goes on.
Anything else starts anew. Where the tests fail, nothing else starts, unless --only leaves them out. Four jobs
at once, each slower than alone, once the first three are done:

    python tests/gpu.py --list | cut -d" " -f1 | xargs -P 4 -I NAME python tests/gpu.py --only NAME
"""

import argparse
import datetime
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from common import atomic_write  # noqa: E402

ZOO = """hinton 94.28, baseline 93.95, one 92.80, dml 94.38, bss 94.27, fitnet 94.34, fsp 94.31, at 94.50,
sp 94.64, rkd-d 94.42, rkd-a 94.62, rkd-da 94.52"""  # Table III of KD Beyond Model Compression
TABLE = """
transfer | evaluate.py METHODS --transfer --teacher | Figure 1
nrd-0.8 | nrd.py --dataset cifar10 --noise sym --rate 0.8 | 85.32
ce-0.8 | nrd.py --dataset cifar10 --noise sym --rate 0.8 --loss ce | 66.51
nrd-0.2 | nrd.py --dataset cifar10 --noise sym --rate 0.2 | 95.43
ce-0.2 | nrd.py --dataset cifar10 --noise sym --rate 0.2 --loss ce | 91.63
sr-0.05 | soft_randomization.py --dataset cifar10 --sigma 0.05 | 92.57
ga-0.05 | soft_randomization.py --dataset cifar10 --sigma 0.05 --method ga | 92.14
sr-0.2 | soft_randomization.py --dataset cifar10 --sigma 0.2 | 84.07
ga-0.2 | soft_randomization.py --dataset cifar10 --sigma 0.2 --method ga | 83.41
pgd | evaluate.py sr-0.05 ga-0.05 sr-0.2 ga-0.2 --pgd 20 | 15.56, 0.38, 24.14, 12.19
ft | fickle_teacher.py --dataset cifar10 --dropout 0.4 | 94.67, teacher 95.18
mc | messy_collaboration.py --dataset cifar10 --rate 0.25 | 85.22, teacher 78.94
gauss-cs | FREE --source gaussian --bn current | 87.11
gauss-rs | FREE --source gaussian --bn running | 13.18
leaves-cs | FREE --source dead-leaves --bn current | 89.7
leaves-rs | FREE --source dead-leaves --bn running | 42.45
"""  # NRD: Table 2; Noise as a Resource: Tables 3, 6, 1, 7; data-free: Table 2
TABLE = TABLE.replace("METHODS", "baseline hinton bss fitnet fsp at sp rkd-d rkd-a rkd-da one dml")
TABLE = TABLE.replace("FREE", "noise_data_free_kd.py --dataset cifar10 --student-arch resnet34")
# name: command, the paper's test accuracy in %. A name in a command of evaluate.py is the folder of that run.
JOBS = {"tests": ("pytest -q -rs tests/test_cuda.py", ""), "speed": ("tests/benchmark.py train", ""),
        "compiled": ("tests/benchmark.py compiled", "")}  # fmt: skip
JOBS |= {
    name: (f"kd_zoo.py --dataset cifar10 --method {name}", acc)
    for name, acc in map(str.split, ZOO.split(","))
}
JOBS |= {name: rest for name, *rest in (row.split(" | ") for row in TABLE.strip().splitlines())}


def run(job, args, seconds):
    """Its exit status; None where it is cut off. What it prints goes to the log."""
    words = JOBS[job][0].split()
    command = [ROOT / word if word.endswith(".py") else word for word in words]
    if words[0] == "pytest":
        command.insert(0, "-m")
    else:
        command += ["--device", args.device]
    if "--dataset" in words:
        command += ["--data-dir", args.data_dir, "--out", job, "--resume", *shlex.split(args.extra)]
    elif words[0] == "evaluate.py":
        command += ["--out", job]
    options = {"cwd": args.out, "stderr": subprocess.STDOUT, "start_new_session": True}
    with open(args.out / f"{job}.txt", "w") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # it ends, with what it has started; a training keeps its last saved epoch
            os.killpg(process.pid, signal.SIGKILL)


def measured(job, args):
    """The last record of a training, and what it says of its teacher, memory and end; else the log's end."""
    lines, metrics = (args.out / f"{job}.txt").read_text().splitlines(), args.out / job / "metrics.jsonl"
    if not metrics.exists():
        return {"lines": lines[-60:]}
    lines = [line for line in lines if line.startswith(("teacher: ", "peak device memory ", "test_acc "))][
        -3:
    ]
    lines = [re.sub(r" \S*/\S+", "", line) for line in lines]  # paths are long
    return {"last": json.loads(metrics.read_text().splitlines()[-1]), "lines": lines}


def read(args):
    path = args.out / "gpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(job, result, args):
    """Add the result to gpu.json, and write gpu.md anew. Other processes may be about the same."""
    with open(args.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(args) | {job: result}
        with atomic_write(args.out / "gpu.json") as partial:
            partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        rows, others = (
            ["| command | paper | test_acc | epoch | images/s in it | | measured |", "|---" * 7 + "|"],
            [],
        )
        for name in [name for name in JOBS if name in results]:
            (command, paper), result = JOBS[name], results[name]
            if "last" in result:
                numbers = [f"{result['last'][key]:g}" for key in ("test_acc", "epoch", "images_per_second")]
                cells = f"`{command}`", paper, *numbers, "<br>".join(result["lines"]), result["measured"]
                rows.append(f"| {' | '.join(cells)} |")
            else:
                heading = f"`{command}`, paper {paper}" if paper else f"`{command}`"
                others += ["", f"{heading}: {result['measured']}", "", "```", *result["lines"], "```"]
        with atomic_write(args.out / "gpu.md") as partial:
            partial.write_text("\n".join(rows + others) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="after which the job at work is cut off")
    add("--out", type=Path, default=ROOT / "runs/gpu", metavar="DIR")
    add("--data-dir", type=Path, default=ROOT / "data", metavar="DIR", help="where cifar10.npz lies")
    add("--device", default="cuda", help="cuda, cuda:N, or cpu, to try this program")
    add("--only", nargs="+", choices=JOBS, default=[*JOBS], metavar="NAME", help="do only these")
    add(
        "--extra", default="", help="flags for every training: --extra='--compile'; others want another --out"
    )
    add("--list", action="store_true", help="print the jobs, and do none")
    args = parser.parse_args()
    args.out, args.data_dir = args.out.resolve(), args.data_dir.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * args.minutes
    if not (args.list or args.device == "cpu" or torch.cuda.is_available()):
        parser.error(f"--device {args.device}: no CUDA device is visible")
    with_gpu = torch.cuda.is_available() and args.device != "cpu"
    gpu = torch.cuda.get_device_name(args.device) if with_gpu else "CPU"
    for job in args.only:
        (command, paper), done = JOBS[job], {name for name, result in read(args).items() if result["done"]}
        if args.list:
            print(f"{job:9} {'done' if job in done else '-':4}  {command}  [{paper}]")
            continue
        needed = {
            word for word in command.split() if word in JOBS and "evaluate.py" in command
        }  # runs that have ended
        if job in done or not needed <= done or time.monotonic() > end:
            continue
        print(f"{datetime.datetime.now():%H:%M:%S}  {job}", flush=True)
        status = run(job, args, end - time.monotonic())
        where = f"{datetime.date.today()}, {gpu}, torch {torch.__version__}"
        result = {"done": status == 0, "measured": where, **measured(job, args)}
        if status == 0 or "last" in result:
            keep(job, result, args)
        if status != 0:
            how = "cut off" if status is None else f"ends with status {status}"
            print(f"          {how}: {args.out / job}.txt", flush=True)
            if job == "tests":
                break
    if not args.list:
        print(f"results: {args.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
