"""README: the step is nrd.py's loop; the fork's diffs, applied to copies of the files, make a project."""

import json
import re
import shutil
import subprocess
import sys
import textwrap

from conftest import ROOT, write_npz

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_step_is_the_text_of_the_loop():
    step = textwrap.indent(blocks("python")[0], " " * 12)
    assert "# equation 25" in step and "# equation 24" in step
    assert step in (ROOT / "nrd.py").read_text(encoding="utf-8")


def test_the_fork_section_is_a_project(tmp_path):
    """On data of its own and on CIFAR-100's kind; two seeds are one row."""
    for name in ("nrd.py", "common.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    write_npz(tmp_path / "cifar100.npz")

    def run(*command, **options):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    patch = "".join(blocks("diff"))
    run("git", "apply", "-", input=patch)
    assert sum(line.startswith("+") for line in patch.splitlines()) < 25
    (command,) = re.findall(r"`python (nrd.py --dataset tinted[^`]*)`", README)
    flags = [*command.split(), "--epochs", "2", "--batch-size", "32", "--device", "cpu", "--no-amp"]
    out = run(sys.executable, *flags, "--seed", "0", "1", "--out", "tinted")
    metrics = [
        json.loads(line) for line in (tmp_path / "tinted-seed0/metrics.jsonl").read_text().splitlines()
    ]
    assert f"weight_norm {metrics[-1]['weight_norm']:#.4g}" in out and "2 seeds" in out
    assert metrics[-1]["test_acc"] > 90  # red against blue
    row = run(sys.executable, "evaluate.py", "tinted-seed0", "tinted-seed1").splitlines()[-1]
    assert row.startswith("nrd ") and " ± " in row and "(2)" in row
    flags[flags.index("tinted")] = "cifar100.npz"
    assert "test_acc" in run(sys.executable, *flags)
