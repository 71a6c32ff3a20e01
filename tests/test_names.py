"""Run folders: for every flag of every script, two commands that differ have two folders, else one."""

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
            values = list(action.choices or {common.count: (3, 7), int: (3, 7), Path: ("a", "b")}.get(action.type, ()))
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
    for dest in flags.keys() - {"seed", *common.MACHINE, "show_source", "toy", "analyze"}:
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
        # given as it would be left out, it changes nothing
        plain = parse(script, context)
        for args in ways:
            if vars(args)[dest] == vars(plain)[dest]:
                assert args.name == plain.name, dest
        assert sum(vars(args)[dest] == vars(plain)[dest] for args in ways) == (plain.name in folders), dest


def test_names_of_any_length_are_taken_by_a_file_system():
    names = {common.folder_name("kd_zoo", "a" * 300, "sym", 0.2, {"lr": lr}) for lr in (0.1, 0.2)}
    assert len(names) == 2 and max(map(len, names)) <= 200


def test_a_preset_that_repeats_the_flag_does_not_hide_it(parse):
    """Table 1 of Noise as a Resource: a folder for each dropout; the preset's own has no name of its own."""
    script = load_script("fickle_teacher")
    dropouts = [[], *(["--dropout", rate] for rate in (0, 0.1, 0.2, 0.3))]
    names = [parse(script, flags).name for flags in dropouts]
    assert len(set(names)) == 4 and names[0] == names[3]  # on shapes 0.2
