"""Run folders: for every flag of every script, two commands that differ have two folders."""

import argparse
from pathlib import Path

import pytest
from conftest import load_script

import common

PICTURES = ["--dataset", "imagefolder:pictures"]
CONTEXTS = {  # a flag is tried in the first of these in which it is not refused
    "nrd": ([], ["--loss", "ce"], PICTURES),
    "fickle_teacher": ([], PICTURES),
    "soft_randomization": ([], PICTURES),
    "messy_collaboration": ([], PICTURES),
    "kd_zoo": ([], ["--method", "fitnet"], PICTURES),
    "cmd": ([], ["--self-kd", "ls"], ["--mutual", "sync"], PICTURES),
    "noise_data_free_kd": ([], PICTURES),
}


@pytest.fixture
def parse(monkeypatch):
    """parse(script, flags): its arguments, or None where they are refused."""

    def run(script, flags):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, flags)])
        try:
            return script.parse_args()
        except (common.UsageError, SystemExit):
            return None

    return run


def flags_of(script, monkeypatch):
    """The parser's flags: {dest: (option, number of values, two values to give it)}."""
    made = []

    def stop(parser, preset):
        made.extend(parser._actions)
        raise common.UsageError

    with monkeypatch.context() as patch:
        patch.setattr(common, "parse", stop)
        patch.setattr("sys.argv", ["script.py"])
        with pytest.raises(common.UsageError):
            script.parse_args()
    flags = {}
    for action in made:
        option = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            flags[action.dest] = [[option], [action.option_strings[1]]]
        elif action.nargs == 0:
            flags[action.dest] = [[option], []]
        else:
            values = list(
                action.choices or {common.count: (3, 7), int: (3, 7), Path: ("a", "b")}.get(action.type, ())
            )
            values = values or ([0.37, 0.61] if action.type else ["wrn-10-3", "wrn-16-3"])
            length = action.nargs if isinstance(action.nargs, int) else 1
            flags[action.dest] = [[option, *[value] * length] for value in values]
    return flags


@pytest.mark.parametrize("name", CONTEXTS)
def test_every_flag_that_changes_a_run_changes_its_folder(name, parse, monkeypatch):
    script = load_script(name)
    flags = flags_of(script, monkeypatch)
    special = {"loss_params": [["--loss-params", 0.1, 0.6, 0.3], ["--loss-params", 0.3, 0.6, 0.1]]}
    special["dataset"] = [["--dataset", "cifar10"], ["--dataset", "svhn"]]
    special["rate"] = [["--rate", 0.37, "--noise", "sym"], ["--rate", 0.61, "--noise", "sym"]]
    for dest in flags.keys() - {"seeds", *common.MACHINE, "show_source", "toy"}:
        if dest.startswith("plot_"):
            continue
        for context in CONTEXTS[name]:
            ways = [parse(script, [*context, *way]) for way in special.get(dest, flags[dest])]
            ways = [args for args in ways if args is not None]
            if len(ways) > 1:
                break
        assert len(ways) > 1, f"{dest} is refused everywhere"
        folders = {args.name: vars(args)[dest] for args in ways}
        assert len(folders) == len(ways), (dest, folders)
        plain = parse(script, context)
        assert folders.get(plain.name, vars(plain)[dest]) == vars(plain)[dest], dest


def test_names_of_any_length_are_taken_by_a_file_system(parse):
    script = load_script("kd_zoo")
    names = {parse(script, ["--dataset", f"{'a' * 300}.npz", "--lr", lr]).name for lr in (0.1, 0.2)}
    assert len(names) == 2 and max(map(len, names)) <= 200


@pytest.mark.parametrize("typed, name, given", [
    ("", "shapes-clean", {}),
    ("--dropout 0", "shapes-clean-dropout=0.0", {"dropout": 0.0}),
    ("--dropout 0.1", "shapes-clean-dropout=0.1", {"dropout": 0.1}),
    ("--dropout 0.2", "shapes-clean-dropout=0.2", {"dropout": 0.2}),  # the preset's
    ("--noise sym --rate 0.2 --alpha 0.9", "shapes-sym0.2-alpha=0.9",
     {"noise": "sym", "rate": 0.2, "alpha": 0.9}),
    ("--noise none", "shapes-clean", {"noise": "none"}),
    ("--no-amp", "shapes-clean-amp=False", {"amp": False}),
    ("--seed 2 1 2 --device cpu --data-dir d --out o --resume --tensorboard", "shapes-clean", {}),
    ("--dataset ./pics/a.npz", "pics_a-clean", {"dataset": "pics/a.npz"}),
    ("--dataset pics//a.npz", "pics_a-clean", {"dataset": "pics/a.npz"}),
    ("--dataset imagefolder:./pics", "imagefolder_pics-clean", {"dataset": "imagefolder:pics"}),
    ("--dataset imagefolder:pics/", "imagefolder_pics-clean", {"dataset": "imagefolder:pics"}),
    ("--dataset imagefolder:../pics/", "imagefolder_.._pics-clean", {"dataset": "imagefolder:../pics"}),
    ("--teacher ./t.pt --mean 0 0 .5", "shapes-clean-teacher=t.pt-mean=0.0,0.0,0.5",
     {"teacher": Path("t.pt"), "mean": [0, 0, 0.5]}),
    ("--method baseline --alpha 0.9", None, None), ("--noise none --rate 0", None, None),
    ("--image-size 224", None, None),  # typed as it would be left out, and nothing reads it
])  # fmt: skip
def test_a_folder_is_named_by_what_is_typed(parse, typed, name, given):
    args = parse(load_script("fickle_teacher"), typed.split())
    if name is None:
        assert args is None
    else:
        assert (args.name, args.given) == (f"fickle_teacher-{name}", given)
        assert args.seeds == ([1, 2] if "--seed" in typed else [0])


def test_help_shows_the_preset(parse, capsys):
    parse(load_script("fickle_teacher"), ["--dataset", "cifar10", "--dropout", 0.3, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for line in (
        "--epochs EPOCHS passes over the training set; the schedule scales along (default: 300)",
        "initial learning rate (default: 0.1)",
        "random seed; several: one run per seed (default: [0])",
    ):
        assert line in shown
