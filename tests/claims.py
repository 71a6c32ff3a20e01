"""Every paper's claim at the size of a CPU: which of them can be seen in runs of a minute, with error bars.

    python tests/claims.py                     # all claims on the built-in data, five seeds; two core-hours
    python tests/claims.py sr mc --seeds 3     # those of two scripts
    python tests/claims.py --dataset cifar10   # on CIFAR-10, some thousand training images; four core-hours

Runs the methods of a claim and what they are compared with through the scripts, as a user calls them, and
prints the table of claims. The last epoch counts. All seeds have one corruption of the labels and one
teacher, as in the papers, so that the errors do not hold what another teacher would change. Run folders and
logs stay in runs/claims. What is there is not run again; after a change of a script, remove its folders and
logs. The seeds are worked through one after another, and a table has those that are there. Of all claims,
claims.json and .github/claims.png are written too, on CIFAR-10 claims-cifar10.json and
.github/claims-cifar10.png. .github/training.png is drawn where its runs are there.

On the built-in data the settings are the presets: few images, so that there is room above. Both sides of a
comparison have the same epochs, images and networks. RESULTS.md has what else was tried, and why a claim does
not show.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/claims")

# ----------------------------------------------------------------------------------------------------- claims

COMMANDS = {}
COMMANDS["shapes"] = """
nrd        NRD                nrd.py
nrd        CE                 nrd.py --loss ce
nrd        GCE                nrd.py --loss gce
nrd        GJS                nrd.py --loss gjs
nrd        NRD, 60 %          nrd.py --rate 0.6
nrd        CE, 60 %           nrd.py --rate 0.6 --loss ce
nrd        GCE, 60 %          nrd.py --rate 0.6 --loss gce
nrd        GJS, 60 %          nrd.py --rate 0.6 --loss gjs
nrd        NRD, 80 %          nrd.py --rate 0.8
nrd        CE, 80 %           nrd.py --rate 0.8 --loss ce
nrd        GCE, 80 %          nrd.py --rate 0.8 --loss gce
nrd        GJS, 80 %          nrd.py --rate 0.8 --loss gjs
ft         FT                 fickle_teacher.py
ft         Hinton             fickle_teacher.py --dropout 0 --epochs 50
ft         baseline           fickle_teacher.py --method baseline --epochs 50
sr         SR                 soft_randomization.py
sr         GA                 soft_randomization.py --method ga
mc         MC                 messy_collaboration.py
mc         Hinton             messy_collaboration.py --target-noise 0
mc         baseline           messy_collaboration.py --method baseline
zoo        Hinton             kd_zoo.py
zoo        AT                 kd_zoo.py --method at
zoo        SP                 kd_zoo.py --method sp
zoo        RKD-DA             kd_zoo.py --method rkd-da
zoo        baseline           kd_zoo.py --method baseline
zoo        noisy Hinton       kd_zoo.py --noise sym --rate 0.4
zoo        noisy SP           kd_zoo.py --noise sym --rate 0.4 --method sp
zoo        noisy baseline     kd_zoo.py --noise sym --rate 0.4 --method baseline
cmd        CMD-P              cmd.py
cmd        CMD-S              cmd.py --select static
cmd        all                cmd.py --select all
cmd        zero               cmd.py --select zero
cmd        CE                 cmd.py --self-kd ce --select zero
data-free  leaves, current    noise_data_free_kd.py
data-free  re-estimated       noise_data_free_kd.py
data-free  as trained         noise_data_free_kd.py
data-free  leaves, running    noise_data_free_kd.py --bn running
data-free  Gaussian, current  noise_data_free_kd.py --source gaussian
"""
CLAIMS = """
nrd | NRD is above cross-entropy and GCE | test_acc | NRD 94.65 | CE 87.74; GCE 92.82 | sym 40 %, Table 2
nrd | … and above GJS | test_acc | NRD 94.65 | GJS 93.57 | sym 40 %, Table 2
nrd | … at 60 % noise too | test_acc | NRD, 60 % 92.45 | CE, 60 % 81.99; GCE, 60 % 89.37; GJS, 60 % 91.64 | Table 2
nrd | … at 80 % noise too | test_acc | NRD, 80 % 85.32 | CE, 80 % 66.51; GCE, 80 % 79.19; GJS, 80 % 79.11 | Table 2
nrd | NRD is better calibrated | ECE | NRD 0.13 | CE 0.31 | sym 50 %, Figure 5
nrd | NRD memorises fewer wrong labels | train_acc_wrong | NRD - | CE - | section 5.2
nrd | NRD ends near its best epoch | drop | NRD - | CE - | Figure 4
nrd | NRD memorises fewer, without augmentation | train_acc_wrong | NRD, bare - | CE, bare - | section 5.2
nrd | … and is better calibrated | ECE | NRD, bare 0.13 | CE, bare 0.31 | sym 50 %, Figure 5
nrd | … and more accurate | test_acc | NRD, bare 94.65 | CE, bare 87.74 | sym 40 %, Table 2
ft | FT is above Hinton and baseline | test_acc | FT 94.67 | Hinton 94.28; baseline 93.95 | FT-0.4, Table 1
ft | … on corruptions too | mCA | FT 75.09 | Hinton 74.57; baseline 74.38 | FT-0.4, Table 1
sr | SR is more accurate | test_acc | SR 89.88 | GA 89.09 | σ 0.1, Table 3
sr | … and more robust | PGD-20 | SR 22.15 | GA 4.20 | σ 0.1, Table 6
sr | … and to weaker attacks | PGD-10 | SR - | GA - | Table 5
mc | MC and Hinton are above baseline | test_acc | MC 68.25; Hinton 67.97 | baseline 56.61 | 50 % noise, Table 7
mc | … and memorise fewer wrong labels | train_acc_wrong | MC -; Hinton - | baseline - | section 4.3
zoo | students beat baseline | test_acc | Hinton 94.28; AT 94.50; SP 94.64; RKD-DA 94.52 | baseline 93.95 | Table III
zoo | … far above on noisy labels | test_acc | noisy Hinton 76.32; noisy SP 70.32 | noisy baseline 64.47 | 40 %, Table V
zoo | the teacher's attacks fool AT most | transfer | AT 91.78 | Hinton 71.59; SP 78.21; RKD-DA 75.91 | Figure 1
cmd | CMD-P is above the others | test_acc | CMD-P 68.29 | CMD-S 67.26; all 59.26; zero 62.75 | CIFAR-100, Table 1
cmd | ProSelfLC is above cross-entropy | test_acc | zero 62.75 | CE 48.74 | CIFAR-100, Table 1
cmd | CMD-P memorises fewer wrong labels | train_acc_wrong | CMD-P - | zero -; CE - | section 1
data-free | the teacher wants current statistics | test_acc | leaves, current 89.40 | leaves, running 37.04 | Table 2
data-free | dead leaves beat Gaussian noise | test_acc | leaves, current 89.40 | Gaussian, current 85.98 | Table 2
data-free | re-estimated statistics recover the student | statistics | re-estimated - | as trained - | Figure 3a
"""  # noqa: E501 - script | claim | what is measured | what should be better | than this | the paper's figures; of CIFAR-10 except CMD's


def arms(text):
    """{"SR": 89.88} of "SR 89.88", arms separated by semicolons; None where the paper gives no figure."""
    pairs = [arm.rsplit(" ", 1) for arm in text.split("; ")]
    return {name: None if figure == "-" else float(figure) for name, figure in pairs}


class Claim(NamedTuple):
    part: str
    text: str
    measure: str  # of metrics.jsonl; "drop": best epoch minus last; or of EVALUATIONS
    better: dict  # {arm: the paper's figure}
    worse: dict
    source: str


# On CIFAR-10 teachers that are trained on all 50,000 images teach students that see one to five thousand.
CLEAN = (
    "kd_zoo.py --method baseline --dataset cifar10 --limit-test 2000 --student-arch wrn-16-1"
    " --epochs 12 --batch-size 64 --lr 0.05"
)
TEACHERS = {"CLEAN": CLEAN, "NOISY": f"{CLEAN} --noise sym --rate 0.5"}
SMALL = "--dataset cifar10 --limit-test 2000 --batch-size 32"
STUDENT = f"{SMALL} --student-arch wrn-10-1 --limit-train 2000 --lr 0.05"
CIFAR10 = {  # part: the flags that all its arms have
    "nrd": f"{SMALL} --arch wrn-10-1 --limit-train 4000 --epochs 30",
    "ft": f"{STUDENT} --epochs 25",
    "sr": f"{SMALL} --student-arch wrn-10-2 --limit-train 2000 --epochs 60 --lr 0.05 --sigma 0.1",
    "mc": f"{SMALL} --student-arch wrn-10-2 --limit-train 1000 --epochs 100 --lr 0.05 --rate 0.5",
    "zoo": f"{STUDENT} --epochs 20",
    "cmd": f"{SMALL} --arch wrn-10-1 --limit-train 2000 --epochs 40 --lr 0.05 --augment none",
    "data-free": "--dataset cifar10 --limit-test 2000 --student-arch wrn-10-1 --limit-train 5000 --epochs 12"
    " --batch-size 64 --lr 2e-3 --teacher CLEAN",
}
COMMANDS["cifar10"] = """
nrd        NRD                nrd.py --lr 0.2
nrd        CE                 nrd.py --loss ce --lr 0.05
nrd        GCE                nrd.py --loss gce --lr 0.1
nrd        GJS                nrd.py --loss gjs --lr 0.2
nrd        NRD, bare          nrd.py --student-augment none --lr 0.2
nrd        CE, bare           nrd.py --student-augment none --loss ce --lr 0.05
nrd        GCE, bare          nrd.py --student-augment none --loss gce --lr 0.1
ft         FT                 fickle_teacher.py --dropout 0.2 --teacher-arch wrn-10-2 --teacher-epochs 60
ft         Hinton             fickle_teacher.py --dropout 0 --teacher-arch wrn-10-2 --teacher-epochs 60
ft         baseline           fickle_teacher.py --method baseline
sr         SR                 soft_randomization.py --teacher CLEAN
sr         GA                 soft_randomization.py --method ga
mc         MC                 messy_collaboration.py --teacher NOISY
mc         Hinton             messy_collaboration.py --target-noise 0 --teacher NOISY
mc         baseline           messy_collaboration.py --method baseline
zoo        Hinton             kd_zoo.py --teacher CLEAN
zoo        AT                 kd_zoo.py --method at --teacher CLEAN
zoo        SP                 kd_zoo.py --method sp --gamma 100 --teacher CLEAN
zoo        RKD-DA             kd_zoo.py --method rkd-da --teacher CLEAN
zoo        baseline           kd_zoo.py --method baseline
cmd        CMD-P              cmd.py --eta 2
cmd        CMD-S              cmd.py --select static
cmd        all                cmd.py --select all
cmd        zero               cmd.py --select zero
cmd        CE                 cmd.py --self-kd ce --select zero
data-free  leaves, current    noise_data_free_kd.py
data-free  leaves, running    noise_data_free_kd.py --bn running
data-free  Gaussian, current  noise_data_free_kd.py --source gaussian
"""


def commands(dataset):
    """{part: {arm: command}} on "shapes" or "cifar10"."""
    table = {}
    for line in COMMANDS[dataset].strip().splitlines():
        part, arm, command = re.split(" {2,}", line)
        if dataset == "cifar10":
            command = f"{command} {CIFAR10[part]}"
        table.setdefault(part, {})[arm] = command
    return table


rows = [line.split(" | ") for line in CLAIMS.strip().splitlines()]
CLAIMS = [Claim(part, text, measure, arms(a), arms(b), source) for part, text, measure, a, b, source in rows]

EVALUATIONS = {  # measure: flags of evaluate.py
    "ECE": "--ece",
    "mCA": "--cifar-c --limit-test 200",
    "PGD-10": "--pgd 10 --eps 2/255 --restarts 1",
    "PGD-20": "--pgd 20 --eps 0.031 --restarts 1",
    "transfer": "--transfer --eps 0.031 --limit-test 300 --teacher",  # that of the student
}
LESS = ("train_acc_wrong", "drop", "ECE")  # is better
LABELS = {
    "train_acc_wrong": "wrong labels memorised (%)", "drop": "best epoch minus last (points)",
    "mCA": "mean accuracy, corrupted (%)", "PGD-10": "accuracy, PGD, ε 2/255 (%)",
    "PGD-20": "accuracy, PGD, ε 0.031 (%)",
    "transfer": "success of its images (%)", "ECE": "expected calibration error",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------- runs


def folder(command, seed):
    """The run folder of a command and seed, in runs/claims."""
    return RUNS / f"{command.replace('.py', '').replace(' --', '-').replace(' ', '=')}-seed{seed}"


def log_of(run):
    """The log file of a training run, beside its folder."""
    return run.with_name(f"{run.name}.log")


def execute(command, log):
    """Run a script on one thread, with its output in the file `log`, unless that is there."""
    if log.exists():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    partial = log.with_name(f"{log.name}.partial")
    for name, teacher in TEACHERS.items():
        command = command.replace(f"--teacher {name}", f"--teacher {folder(teacher, 100)}/checkpoint.pt")
    script, *flags = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(partial, "w", encoding="utf-8") as file:
        started = [sys.executable, str(ROOT / script), *flags]
        subprocess.run(started, stdout=file, stderr=subprocess.STDOUT, check=True, env=environment)
    partial.rename(log)


def job(command, seed, measures):
    """Train, then take the measures that are evaluate.py's."""
    run = folder(command, seed)
    execute(f"{command} --seed {seed} --out {run} --resume", log_of(run))
    for measure in sorted(measures):
        command = f"evaluate.py {run} {EVALUATIONS[measure]} --out {run / measure}"
        execute(command, run / f"{measure}.log")


def value(command, seed, measure):
    """What was measured, or None where it is not there yet."""
    run = folder(command, seed)
    if not (run / f"{measure}.log" if measure in EVALUATIONS else log_of(run)).exists():
        return None
    if measure in EVALUATIONS:
        lines = (run / measure / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
        numbers = json.loads(lines[-1])["numbers"]
        if measure == "transfer":
            return numbers["success_rate"][0][-1]  # the last column is the teacher's
        return next(number for column, number in numbers.items() if column.startswith(measure))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if measure == "drop":
        return max(record["test_acc"] for record in metrics) - metrics[-1]["test_acc"]
    return metrics[-1][measure]


# ----------------------------------------------------------------------------------------------------- report


def compare(claim, table, seeds):
    """The rows of a claim: a dict for each pair of arms, over the seeds of both. table: {arm: command}."""
    rows = []
    measures = (claim.measure,)
    if claim.measure == "statistics":  # the same run, tested with other statistics
        measures = "test_acc_adjusted", "test_acc_running"
    for arm, other in itertools.product(claim.better, claim.worse):
        a, b = table[arm], table[other]
        pairs = [(value(a, s, measures[0]), value(b, s, measures[-1])) for s in range(seeds)]
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            print(f"left out, not complete: {claim.text}: {arm}, {other}")
            continue
        x, y = (list(values) for values in zip(*pairs))
        difference = (statistics.fmean(x) - statistics.fmean(y)) * (-1 if claim.measure in LESS else 1)
        error = (
            math.sqrt((statistics.variance(x) + statistics.variance(y)) / len(x)) if len(x) > 1 else math.inf
        )
        rows.append({
            "part": claim.part, "claim": claim.text, "measure": claim.measure, "better": arm, "worse": other,
            "commands": [a, b], "paper": [claim.better[arm], claim.worse[other]], "paper_from": claim.source,
            "n": len(x), "values": [[round(v, 4) for v in x], [round(v, 4) for v in y]],
            "difference": round(difference, 4), "standard_error": round(error, 4),
            "shows": difference > 2 * error,
        })  # fmt: skip
    return rows


def spread(values):
    """72.1 ± 3.4: mean and sample standard deviation; of values below 1 with two places."""
    digits = 2 if max(values) < 1 else 1
    mean, deviation = (
        f"{statistics.fmean(values):.{digits}f}",
        statistics.stdev(values) if len(values) > 1 else None,
    )
    return mean if deviation is None else f"{mean} ± {deviation:.{digits}f}"


def print_table(rows):
    """Markdown. A positive difference is as the paper has it; it shows where it is above two errors."""
    print("\n| | claim | the paper's | ours | n | difference, standard error | shows |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        paper = ", ".join(f"{figure:.2f}" for figure in row["paper"] if figure is not None) or "–"
        ours = f"{row['better']} **{spread(row['values'][0])}**, {row['worse']} {spread(row['values'][1])}"
        digits = 2 if row["measure"] == "ECE" else 1
        difference = f"{row['difference']:.{digits}f} ± {row['standard_error']:.{digits}f}"
        cells = [
            row["part"],
            row["claim"],
            paper,
            ours,
            str(row["n"]),
            difference,
            "yes" if row["shows"] else "no",
        ]
        print("|", " | ".join(cells), "|")


def draw(path, rows):
    """One panel per claim, one dot per seed, a line at the mean. Red is what the claim names first."""
    from matplotlib.figure import Figure

    panels = {}  # {(part, claim): [rows]}
    for row in rows:
        panels.setdefault((row["part"], row["claim"]), []).append(row)
    figure = Figure(figsize=(11, 2.6 * math.ceil(len(panels) / 5)), layout="constrained")
    grid = list(figure.subplots(math.ceil(len(panels) / 5), 5, squeeze=False).flat)
    for axes, ((part, text), compared) in zip(grid, panels.items()):
        arms = {row["better"]: (row["values"][0], "tab:red") for row in compared}
        arms |= {row["worse"]: (row["values"][1], "dimgray") for row in compared}
        for place, (values, colour) in enumerate(arms.values()):
            x = [place + 0.11 * (i - (len(values) - 1) / 2) for i in range(len(values))]
            axes.plot(x, values, "o", color=colour, ms=4, alpha=0.6)
            axes.hlines(statistics.fmean(values), place - 0.36, place + 0.36, color=colour, lw=2)
        names = [
            textwrap.fill(name.removeprefix("noisy "), 10, break_on_hyphens=len(arms) < 4) for name in arms
        ]
        axes.set_xticks(range(len(arms)), names, rotation=0 if len(arms) < 4 else 25)
        axes.set_xlim(-0.6, len(arms) - 0.4)
        shown = sum(row["shows"] for row in compared)
        verdict = f"shows in {shown} of {len(compared)}" if 0 < shown < len(compared) else "shows"
        colour = "tab:green" if shown == len(compared) else "tab:orange" if shown else "tab:red"
        axes.set_title(textwrap.fill(f"{part}: {text}", 23), fontsize=9.5)
        axes.set_xlabel(verdict if shown else "does not show", color=colour, weight="bold", fontsize=9)
        axes.set_ylabel(LABELS.get(compared[0]["measure"], "test accuracy (%)"), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def draw_training(path, seeds):
    """README's first picture, where two seeds or more of its runs are there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="Learnt: built-in pictures", ylabel="test accuracy (%)")
    right.set(title="Memorised: CIFAR-10, no augmentation", ylabel="wrong labels memorised (%)")
    names = {"NRD": "NRD", "GCE": "GCE (generalised cross-entropy)", "CE": "cross-entropy"}
    for axes, dataset, setting in ((left, "shapes", ""), (right, "cifar10", ", bare")):
        metric = "test_acc" if axes is left else "train_acc_wrong"
        for (arm, name), colour in zip(names.items(), ("tab:red", "tab:blue", "dimgray")):
            runs = [folder(commands(dataset)["nrd"][arm + setting], seed) for seed in range(seeds)]
            runs = [run for run in runs if log_of(run).exists()]
            if len(runs) < 2:
                return
            curves = [(run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for run in runs]
            epochs = list(zip(*([json.loads(line)[metric] for line in curve] for curve in curves)))
            mean = [statistics.fmean(values) for values in epochs]
            deviation = [statistics.stdev(values) for values in epochs]
            low = [m - d for m, d in zip(mean, deviation)]
            high = [m + d for m, d in zip(mean, deviation)]
            axes.plot(range(1, len(mean) + 1), mean, color=colour, label=name)
            axes.fill_between(range(1, len(mean) + 1), low, high, color=colour, alpha=0.2, lw=0)
        axes.axhline(10, color="k", ls=":", lw=1, label="chance")
        axes.set_xlabel(f"epoch; line and band: mean ± standard deviation of {len(runs)} seeds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle("Half of the training labels are random")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "parts",
        nargs="*",
        default="all",
        choices=[*commands("shapes"), "all"],
        help="scripts, all claims of each",
    )
    add("--dataset", default="shapes", choices=COMMANDS, help="what the scripts train on")
    add("--seeds", type=int, default=5, metavar="N", help="0 … N-1")
    add("--jobs", type=int, default=2, metavar="N", help="runs at a time, a thread each")
    add("--report", action="store_true", help="run nothing: the table of what is there")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal without ± gets a question mark
    table = commands(args.dataset)
    known = [
        claim
        for claim in CLAIMS
        if table.get(claim.part, {}).keys() >= claim.better.keys() | claim.worse.keys()
    ]
    claims = [claim for claim in known if "all" in args.parts or claim.part in args.parts]

    todo = {}  # {(seed, command): measures of evaluate.py}, seed by seed
    for seed in range(0 if args.report else args.seeds):
        for claim in claims:
            for arm in claim.better | claim.worse:
                measures = todo.setdefault((seed, table[claim.part][arm]), set())
                measures |= {claim.measure} & EVALUATIONS.keys()
    for name, teacher in TEACHERS.items():
        if any(f"--teacher {name}" in command for _, command in todo):
            job(teacher, 100, [])
    began = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(job, command, seed, of): (seed, command) for (seed, command), of in todo.items()}
        try:
            for done, future in enumerate(as_completed(jobs), 1):
                (seed, command), error = jobs[future], future.exception()
                minutes = (time.perf_counter() - began) / done * (len(jobs) - done) / 60
                print(
                    f"{done}/{len(jobs)}, {minutes:.0f} min left: {command}, seed {seed} {error or ''}",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise

    rows = [row for claim in claims for row in compare(claim, table[claim.part], args.seeds)]
    print_table(rows)
    rows = [row for row in rows if row["n"] > 1]
    if claims == known and rows:
        name = "claims" if args.dataset == "shapes" else f"claims-{args.dataset}"
        draw(ROOT / f".github/{name}.png", rows)
        draw_training(ROOT / ".github/training.png", args.seeds)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (ROOT / f"tests/{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
