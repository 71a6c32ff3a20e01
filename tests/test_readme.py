"""README's fork section: its diffs, applied to a copy of two scripts in an empty folder, make a project that runs."""

import json
import re
import subprocess
import sys

from conftest import ROOT


def apply(text, diff):
    """`text` with a diff of one hunk applied, whose context stands in it just once."""
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] in " -") + "\n"
    after = "\n".join(line[1:] for line in lines if line[0] in " +") + "\n"
    assert text.count(before) == 1, diff
    return text.replace(before, after)


def test_the_fork_section_is_a_project(tmp_path):
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Fork") : readme.index("## Results")]
    blocks = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    diffs = [diff for block in blocks for diff in block.split("@@\n")]
    command = re.search(r"`(python nrd.py --dataset tinted[^`]*)`", section)[1].split()[1:]
    assert len(diffs) == 6 and sum(line.startswith("+") for diff in diffs for line in diff.splitlines()) < 20
    for name in ("nrd.py", "common.py", "evaluate.py"):
        text = (ROOT / name).read_text()
        for diff in diffs if name != "evaluate.py" else []:
            first = diff.splitlines()[-1 if diff.startswith("+") else 0][1:]
            text = apply(text, diff) if f"{first}\n" in text else text
        (tmp_path / name).write_text(text)

    def run(*arguments):
        result = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    flags = [*command, "--epochs", "2", "--batch-size", "32", "--device", "cpu", "--no-amp", "--out", "run"]
    out = run(*flags)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert f"weight_norm {metrics[-1]['weight_norm']:#.4g}" in out and "loss_params=2.0" in out
    assert metrics[-1]["test_acc"] > 90  # red against blue
    assert run(*flags, "--resume").splitlines()[-1] == out.splitlines()[-1]
    assert f"{metrics[-1]['test_acc']:.2f}" in run("evaluate.py", "run/checkpoint.pt")
