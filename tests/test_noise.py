"""Label noise, by counting; the files of CIFAR-10N and CIFAR-100N."""

import os

import pytest
import torch
from conftest import within

import common
from common import UsageError, corrupt_labels, evenly_spaced

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100 = sorted(common.CIFAR100_SUPERCLASSES.replace("/", " ").split())
LABELS = torch.arange(20000) % 10


def corrupt(kind, rate, labels=LABELS, classes=CIFAR10, seed=0, **options):
    return corrupt_labels(labels, kind, rate, classes, seed, **options)


@pytest.mark.parametrize("kind", ["sym", "sym-other", "pair", "asym"])
def test_noise_follows_its_seed_and_nothing_else(kind):
    before, state = LABELS.clone(), torch.get_rng_state()
    first = corrupt(kind, 0.4)
    assert torch.equal(torch.get_rng_state(), state)  # the training's random numbers stay as they are
    torch.rand(5)
    assert torch.equal(first, corrupt(kind, 0.4)) and not torch.equal(first, corrupt(kind, 0.4, seed=1))
    assert (
        torch.equal(LABELS, before) and first.dtype == torch.int64 and torch.equal(corrupt(kind, 0.0), LABELS)
    )


@pytest.mark.parametrize("rate", [0.2, 1.0])
@pytest.mark.parametrize("per_sample", [False, True])
def test_sym_draws_all_classes_alike(rate, per_sample):
    noisy = corrupt("sym", rate, per_sample=per_sample)
    changed = noisy != LABELS
    # round(rate·N) are drawn, or each with that probability; a drawn one stays the same with probability 1/10
    total, p = (20000, rate * 0.9) if per_sample else (round(rate * 20000), 0.9)
    assert within(int(changed.sum()), total, p)
    for classes in (LABELS, noisy):
        counts = torch.bincount(classes[changed], minlength=10).tolist()
        assert all(within(count, int(changed.sum()), 0.1) for count in counts)


def test_sym_other_never_keeps_a_drawn_label():
    step = (corrupt("sym-other", 0.3) - LABELS) % 10
    assert within(int((step > 0).sum()), 20000, 0.3)
    assert all(within(int((step == k).sum()), 20000, 0.3 / 9) for k in range(1, 10))
    assert (corrupt("sym-other", 1.0) != LABELS).all()


def test_pair_moves_to_the_next_class():
    step = (corrupt("pair", 0.4) - LABELS) % 10
    assert set(step.tolist()) == {0, 1}
    assert all(within(int(step[c == LABELS].sum()), 2000, 0.4) for c in range(10))


@pytest.mark.parametrize("rate, wrong", [(0.2, 0.096), (0.4, 0.184)])
def test_asym_cifar10_moves_class_by_class_over_the_labels_as_they_then_are(rate, wrong):
    noisy = corrupt("asym", rate, torch.arange(50000) % 10)
    labels = torch.arange(50000) % 10
    # by chance: which dogs were cats
    assert int((noisy != labels).sum()) == pytest.approx(wrong * 50000, abs=120)
    for source, target in (("bird", "airplane"), ("deer", "horse"), ("dog", "cat"), ("truck", "automobile")):
        of_source = noisy[labels == CIFAR10.index(source)]
        moved = of_source == CIFAR10.index(target)
        if (
            source == "dog"
        ):  # 5000 dogs and the cats that became dogs before; the share `rate` of all of them moves
            assert within(int(moved.sum()), 5000, rate)
        else:
            assert int(moved.sum()) == round(rate * 5000)
        assert ((of_source == CIFAR10.index(source)) | moved).all()
    cats = noisy[labels == CIFAR10.index("cat")]
    dogs = noisy == CIFAR10.index("dog")
    assert within(int((cats == CIFAR10.index("dog")).sum()), round(rate * 5000), 1 - rate)  # some came back
    assert int(dogs.sum()) == round((1 - rate) * (5000 + rate * 5000)) and set(cats.tolist()) == {3, 5}
    untouched = torch.isin(labels, torch.tensor([0, 1, 6, 7, 8]))
    assert torch.equal(noisy[untouched], labels[untouched])


def test_asym_cifar100_moves_within_superclasses_cyclically():
    families = [sorted(family.split()) for family in common.CIFAR100_SUPERCLASSES.split("/")]
    assert len(set(CIFAR100)) == 100 and [len(family) for family in families] == [5] * 20
    labels = torch.arange(50000) % 100
    noisy = corrupt("asym", 0.4, labels, CIFAR100)
    assert int((noisy != labels).sum()) == 20000
    pairs = {(CIFAR100[a], CIFAR100[b]) for a, b in zip(labels.tolist(), noisy.tolist()) if a != b}
    assert pairs == {(name, family[(i + 1) % 5]) for family in families for i, name in enumerate(family)}
    assert ("wolf", "bear") in pairs and ("beaver", "dolphin") in pairs


def test_impossible_noise_is_refused():
    with pytest.raises(UsageError, match=r"--rate: --noise sym needs a rate in \[0, 1\], not"):
        corrupt("sym", 1.1)
    with pytest.raises(UsageError, match="only CIFAR-10 and CIFAR-100 have a map"):
        corrupt("asym", 0.2, classes=[f"class {c}" for c in range(10)])
    with pytest.raises(AssertionError, match="labels are torch.int32, not int64"):
        corrupt("sym", 0.2, LABELS.int())


@pytest.fixture
def human(tmp_path):
    """Files in CIFAR-N's form, dicts of numpy arrays: {kind: labels}."""
    keys = ["clean_label", "aggre_label", "random_label1", "random_label2", "random_label3", "worse_label"]
    kinds = ["clean", "aggre", "random1", "random2", "random3", "worse", "noisy"]
    labels = dict(zip(kinds, torch.randint(10, (7, 100))))
    ten = {key: values.numpy() for key, values in zip(keys, labels.values())}
    hundred = {"clean_label": labels["clean"].numpy(), "noisy_label": labels["noisy"].numpy()}
    path = tmp_path / "CIFAR-10_human.pt"
    torch.save(ten, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))  # as numpy 1 names its parts
    torch.save(hundred, tmp_path / "CIFAR-100_human.pt")
    return labels


@pytest.mark.parametrize("kind", ["aggre", "random1", "random2", "random3", "worse", "noisy"])
def test_human_labels_follow_the_images(human, tmp_path, kind):
    noisy = corrupt(f"human-{kind}", None, human["clean"], data_dir=tmp_path)
    assert torch.equal(noisy, human[kind]) and noisy.dtype == torch.int64
    part = evenly_spaced(100, 30)  # as --limit-train takes them
    assert torch.equal(corrupt(f"human-{kind}", None, human["clean"][part], data_dir=tmp_path), noisy[part])
    with pytest.raises(UsageError, match="another data set, or the images are not in the official order"):
        corrupt(f"human-{kind}", None, human["clean"].flip(0), data_dir=tmp_path)


class Command:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_files_that_are_not_cifar_n_s_are_refused(human, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, hundred = tmp_path / "CIFAR-10_human.pt", (tmp_path / "CIFAR-100_human.pt").read_bytes()
    torch.save({"clean_label": Command()}, "command.pt")
    command = (tmp_path / "command.pt").read_bytes()
    for content in (
        b"<!DOCTYPE html><title>404</title>",
        path.read_bytes()[:-1000],
        b"",
        hundred,
        command,
        None,
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(
            UsageError, match="^--noise human-worse: cannot read .*CIFAR-10_human.pt .*; take it from"
        ):
            corrupt("human-worse", None, human["clean"], data_dir=tmp_path)
        path.touch()
    assert not (tmp_path / "made").exists()  # nothing in a file is executed
