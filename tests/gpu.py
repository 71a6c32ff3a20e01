"""All that wants a GPU, the most wanted first: tests, speed, then the papers' tables at their own size.

    python tests/gpu.py --data-dir DIR --minutes 9    # again and again: each call goes on where the last one stopped
    python tests/gpu.py --list                        # the jobs, and how far they are

--out, runs/gpu, gets gpu.json, a result for each command, and gpu.md, the same as tables beside the papers' figures.
Runs, teachers and logs lie there too: copy gpu.* alone to keep the figures without the checkpoints. A job whose result
is there is not started again. A training that is cut off goes on with the next call, anything else starts anew. Where
the tests fail nothing else starts, unless --only leaves them out. Another --extra wants another --out.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import atomic_write

# Name, command, the paper's figures. A name in a command of evaluate.py is the folder of that run.
TABLE = """
tests | -m pytest -q -rs tests/test_cuda.py |
speed | tests/benchmark.py train --device cuda |
compiled | tests/benchmark.py compiled --device cuda |
hinton | kd_zoo.py --dataset cifar10 --method hinton | 94.28 (teacher 95.11)
baseline | kd_zoo.py --dataset cifar10 --method baseline | 93.95
one | kd_zoo.py --dataset cifar10 --method one | 92.80
dml | kd_zoo.py --dataset cifar10 --method dml | 94.38
bss | kd_zoo.py --dataset cifar10 --method bss | 94.27
fitnet | kd_zoo.py --dataset cifar10 --method fitnet | 94.34
fsp | kd_zoo.py --dataset cifar10 --method fsp | 94.31
at | kd_zoo.py --dataset cifar10 --method at | 94.50
sp | kd_zoo.py --dataset cifar10 --method sp | 94.64
rkd-d | kd_zoo.py --dataset cifar10 --method rkd-d | 94.42
rkd-a | kd_zoo.py --dataset cifar10 --method rkd-a | 94.62
rkd-da | kd_zoo.py --dataset cifar10 --method rkd-da | 94.52
transfer | evaluate.py baseline hinton bss fitnet fsp at sp rkd-d rkd-a rkd-da one dml --transfer --teacher | Figure 1
nrd-0.8 | nrd.py --dataset cifar10 --noise sym --rate 0.8 | 85.32
ce-0.8 | nrd.py --dataset cifar10 --noise sym --rate 0.8 --loss ce | 66.51
nrd-0.2 | nrd.py --dataset cifar10 --noise sym --rate 0.2 | 95.43
ce-0.2 | nrd.py --dataset cifar10 --noise sym --rate 0.2 --loss ce | 91.63
sr-0.05 | soft_randomization.py --dataset cifar10 --sigma 0.05 | 92.57
ga-0.05 | soft_randomization.py --dataset cifar10 --sigma 0.05 --method ga | 92.14
sr-0.2 | soft_randomization.py --dataset cifar10 --sigma 0.2 | 84.07
ga-0.2 | soft_randomization.py --dataset cifar10 --sigma 0.2 --method ga | 83.41
pgd-sr-0.05 | evaluate.py sr-0.05 --pgd 20 | PGD-20 15.56
pgd-ga-0.05 | evaluate.py ga-0.05 --pgd 20 | PGD-20 0.38
pgd-sr-0.2 | evaluate.py sr-0.2 --pgd 20 | PGD-20 24.14
pgd-ga-0.2 | evaluate.py ga-0.2 --pgd 20 | PGD-20 12.19
ft | fickle_teacher.py --dataset cifar10 --dropout 0.4 | 94.67 (teacher 95.18)
mc | messy_collaboration.py --dataset cifar10 --rate 0.25 | 85.22 (teacher 78.94)
gauss-cs | noise_data_free_kd.py --dataset cifar10 --student-arch resnet34 --source gaussian --bn current | 87.11
gauss-rs | noise_data_free_kd.py --dataset cifar10 --student-arch resnet34 --source gaussian --bn running | 13.18
leaves-cs | noise_data_free_kd.py --dataset cifar10 --student-arch resnet34 --source dead-leaves --bn current | 89.7
leaves-rs | noise_data_free_kd.py --dataset cifar10 --student-arch resnet34 --source dead-leaves --bn running | 42.45
"""  # KD Beyond: Table III, Figure 1; NRD: Table 2; Noise as a Resource: Tables 3, 6, 1, 7; data-free: Table 2
SHARED = {  # runs that wait until the first one has trained the teacher that all of them have
    "hinton": "bss fitnet fsp at sp rkd-d rkd-a rkd-da sr-0.05 sr-0.2",
    "gauss-cs": "gauss-rs leaves-cs leaves-rs",
}
ROOT = Path(__file__).resolve().parent.parent
ALONE = ("tests", "speed", "compiled")  # nothing else may use the GPU meanwhile
HEADING = "| command | last epoch | paper | best epoch | teacher | epochs | images/s | processes | peak memory (GiB) |"


class Job(NamedTuple):
    name: str
    command: str
    paper: str

    @property
    def evaluates(self):
        return self.command.startswith("evaluate.py")


JOBS = [Job(*(cell.strip() for cell in line.split("|"))) for line in TABLE.strip().splitlines()]


def key(job, args):
    """The name of its result: the command as a user would type it."""
    extra = [] if job.name in ALONE else [args.extra, args.extra_evaluate if job.evaluates else ""]
    return " ".join(filter(None, [job.command, *extra]))


def start(job, args):
    """Start the job as a process that leads a group of its own, so that what it starts ends with it."""
    script, *words = job.command.split()
    command, folder = [sys.executable, ROOT / script, *words], args.out
    if job.name in ALONE:
        command, folder = [sys.executable, script, *words], ROOT
    elif job.evaluates:
        command += ["--out", job.name, *shlex.split(args.extra_evaluate)]
    else:
        command += ["--data-dir", args.data_dir, "--out", job.name, "--resume", *shlex.split(args.extra)]
    mode = "w" if job.name in ALONE else "a"
    with open(args.out / "logs" / f"{job.name}.txt", mode) as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def stop(processes):
    """End processes with all that they have started. A training script keeps its last saved epoch."""
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measured(job, args):
    """What the job has left, as a dict; None: nothing yet."""
    folder, log = args.out / job.name, (args.out / "logs" / f"{job.name}.txt").read_text(errors="replace")
    if job.name in ALONE:
        return {"lines": log.splitlines()[-1 if job.name == "tests" else 0 :]}
    if job.evaluates:
        if not (folder / "summary.json").exists():
            return None
        summary = json.loads((folder / "summary.json").read_text())
        if "transfer" in summary:
            return {"transfer": summary["transfer"]}
        (numbers,) = summary["models"].values()
        return {"numbers": {name: value["mean"] for name, value in numbers.items() if isinstance(value, dict)}}
    if not (folder / "metrics.jsonl").exists():
        return None
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config, peaks = json.loads((folder / "config.json").read_text()), re.findall(r"peak device memory (\S+) GiB", log)
    teachers = re.findall(r"^teacher: .* test_acc (\S+) %", log, re.MULTILINE)
    return {
        "test_acc": records[-1]["test_acc"],
        "best_test_acc": max(record["test_acc"] for record in records),
        "epoch": len(records),
        "epochs": config["epochs"] + config.get("init_epochs", 0),
        "teacher_acc": float(teachers[-1]) if teachers else None,
        "images_per_second": round(statistics.median(record["images_per_second"] for record in records)),
        "seconds": round(sum(record["seconds"] for record in records)),
        "peak_gib": float(peaks[-1]) if peaks else None,
        "last_epoch": records[-1],
    }


def save(results, args):
    """gpu.json and gpu.md."""
    with atomic_write(args.out / "gpu.json") as partial:
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    machines = sorted({f"{r['date']}: {r['gpu']}, torch {r['torch']}" for r in results.values()})
    notes = sorted({r["note"] for r in results.values() if r["note"]})
    runs, others = [], []
    for job in JOBS:
        r = results.get(key(job, args))
        if r and "epochs" in r:
            teacher, peak = (r[name] or "–" for name in ("teacher_acc", "peak_gib"))
            cells = [f"`{job.command}`", f"{r['test_acc']:.2f}", job.paper, f"{r['best_test_acc']:.2f}", teacher]
            cells += [f"{r['epoch']}/{r['epochs']}", f"{r['images_per_second']:,}", r["at_once"], peak]
            runs.append("| " + " | ".join(map(str, cells)) + " |")
        elif r and "numbers" in r:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in r["numbers"].items())
            others += ["", f"`{job.command}`: {numbers}. Paper: {job.paper}."]
        elif r and "transfer" in r:
            rows, columns, rates = r["transfer"].values()
            others += ["", f"Success rate (%), sources in columns, targets in rows. Paper: {job.paper}.", ""]
            others += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            others += [f"| {row} | {' | '.join(f'{v:.1f}' for v in values)} |" for row, values in zip(rows, rates)]
        elif r:
            others += ["", f"`{job.command}`", "", "```", *r["lines"], "```"]
    text = ["# Measured on a GPU", "", *(f"- {line}" for line in machines + notes), ""]
    text += ["Test accuracy in %, one seed; images/s: the median of the epochs, beside other processes."]
    text += [f"Flags of every training: `{args.extra}`; of evaluate.py: `{args.extra_evaluate}`.", "", HEADING]
    text += ["|---" * (HEADING.count("|") - 1) + "|", *runs, *others]
    with atomic_write(args.out / "gpu.md") as partial:
        partial.write_text("\n".join(text) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="after which all processes have ended")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", metavar="DIR")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", metavar="DIR", help="where cifar10.npz lies")
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help="processes at once on the GPU")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="NAME", help="do only these")
    parser.add_argument("--note", default="", metavar="TEXT", help="as 'CIFAR-10 is the JPEG re-encoding'")
    parser.add_argument("--extra", default="", help="flags for every training command: --extra='--compile'")
    parser.add_argument("--extra-evaluate", default="", help="the same for evaluate.py")
    parser.add_argument("--list", action="store_true", help="print the jobs, and do none")
    args = parser.parse_args()
    args.out, args.data_dir = args.out.resolve(), args.data_dir.resolve()
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    waiting = [job for job in JOBS if not args.only or job.name in args.only]
    if args.list:
        for job in waiting:
            r = results.get(key(job, args))
            state = "done" if r and r["done"] else f"{r['epoch']}/{r['epochs']}" if r else ""
            print(f"{state:>8}  {job.name:16}  {key(job, args)}  [{job.paper}]")
        return

    began, running, wrong = time.monotonic(), {}, []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    machine = {"gpu": gpu, "torch": str(torch.__version__), "note": args.note, "at_once": args.parallel}

    def done(name):
        return any(job.name == name and results.get(key(job, args), {}).get("done") for job in JOBS)

    def ready(job):
        if job.evaluates:
            return all(done(other.name) for other in JOBS if other.name in job.command.split())
        trained = [first for first, others in SHARED.items() if job.name in others.split()]
        pending = {other.name for other in [*waiting, *running]}
        return all(first not in pending or (args.out / first / "metrics.jsonl").exists() for first in trained)

    def record(job, finished):
        result = measured(job, args)
        if result and (finished or "epochs" in result):
            today = datetime.date.today().isoformat()
            results[key(job, args)] = {"done": finished, "date": today, **machine, **result}
        save(results, args)

    def say(text):
        seconds = round(time.monotonic() - began)
        print(f"{datetime.timedelta(seconds=seconds)}  {text}", flush=True)

    waiting = [job for job in waiting if not done(job.name)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while (waiting or running) and time.monotonic() - began < 60 * args.minutes:
            late = time.monotonic() - began > 60 * args.minutes - 45  # what starts now would finish no epoch
            for job in waiting.copy():
                alone = any(other.name in ALONE for other in [job, *running])
                if late or len(running) >= (1 if alone else args.parallel):
                    break
                if ready(job):
                    say(f"{job.name} starts")
                    waiting.remove(job)
                    running[job] = start(job, args)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                if process.returncode == 0:
                    record(job, finished=True)
                    say(f"{job.name} is done")
                else:
                    wrong.append(job.name)
                    say(f"{job.name} ends with status {process.returncode}: {args.out}/logs/{job.name}.txt")
            if "tests" in wrong or (not running and (late or not any(map(ready, waiting)))):
                break
            time.sleep(0.2)
    finally:
        stop(running.values())
        for job in running:
            record(job, finished=False)
        save(results, args)
    count = sum(done(job.name) for job in JOBS)
    say(f"{count} of {len(JOBS)} jobs are done, cut off: {' '.join(job.name for job in running) or 'none'}; "
        f"wrong: {' '.join(wrong) or 'none'}; {args.out}/gpu.md")  # fmt: skip
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
