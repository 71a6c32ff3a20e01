"""Label noise, by counting; CIFAR-N's files; class imbalance."""

import pickle

import numpy as np
import pytest
import torch
from test_augment import within

import common
from common import NOISE_KINDS, UsageError, corrupt_labels

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100 = sorted(common.CIFAR100_SUPERCLASSES.replace("/", " ").split())
LABELS = torch.arange(20000) % 10


def corrupt(kind, rate, labels=LABELS, classes=CIFAR10, seed=0):
    return corrupt_labels(labels, kind, rate, len(classes), seed, classes)


@pytest.mark.parametrize("kind", ["none", "sym", "sym-other", "pair", "asym"])
def test_deterministic_in_the_seed_and_harmless_to_its_input(kind):
    before, state = LABELS.clone(), torch.get_rng_state()
    first, again, other = corrupt(kind, 0.4), corrupt(kind, 0.4), corrupt(kind, 0.4, seed=1)
    assert torch.equal(first, again) and torch.equal(LABELS, before) and first.dtype == torch.int64
    assert torch.equal(first, other) == (kind == "none")
    assert torch.equal(torch.get_rng_state(), state)  # the training's random numbers don't depend on the noise
    assert torch.equal(corrupt(kind, 0.0), LABELS)


def test_sym_draws_exactly_the_rate_and_all_classes_alike():
    for rate in (0.2, 0.5, 0.8, 1.0):
        noisy = corrupt("sym", rate)
        changed = noisy != LABELS
        # round(rate·N) are drawn; each keeps its label with probability 1/10
        assert within(int(changed.sum()), round(rate * 20000), 0.9)
        counts = torch.bincount(noisy[changed], minlength=10).tolist()
        assert all(within(count, int(changed.sum()), 0.1) for count in counts)
    labels = torch.zeros(10, dtype=torch.int64)  # rate·N is exact: of 7 drawn, the rest must keep class 0
    drawn = [int((corrupt_labels(labels, "sym", 0.7, 1000, seed) != 0).sum()) for seed in range(50)]
    assert max(drawn) == 7 and sum(drawn) >= 340


def test_sym_other_never_keeps_a_drawn_label():
    noisy = corrupt("sym-other", 0.3)
    changed = noisy != LABELS
    assert within(int(changed.sum()), 20000, 0.3)
    steps = torch.bincount((noisy - LABELS)[changed] % 10, minlength=10).tolist()
    assert steps[0] == 0 and all(within(s, sum(steps), 1 / 9) for s in steps[1:])
    assert (corrupt("sym-other", 1.0) != LABELS).all()


def test_pair_moves_to_the_next_class():
    noisy = corrupt("pair", 0.4)
    step = (noisy - LABELS) % 10
    assert set(step.tolist()) == {0, 1} and within(int(step.sum()), 20000, 0.4)


def test_asym_cifar10_moves_exactly_the_rate_of_each_source_class():
    noisy = corrupt("asym", 0.4)
    moves = {"truck": "automobile", "bird": "airplane", "cat": "dog", "dog": "cat", "deer": "horse"}
    for c, name in enumerate(CIFAR10):
        got = torch.bincount(noisy[c == LABELS], minlength=10)
        expected = torch.zeros(10, dtype=torch.int64)
        expected[c] = 2000
        if name in moves:
            expected[c] = 1200
            expected[CIFAR10.index(moves[name])] = 800
        assert torch.equal(got, expected), name


def test_asym_cifar100_moves_within_superclasses_cyclically():
    assert len(CIFAR100) == len(set(CIFAR100)) == 100
    families = [sorted(family.split()) for family in common.CIFAR100_SUPERCLASSES.split("/")]
    assert [len(family) for family in families] == [5] * 20
    assert ["bear", "leopard", "lion", "tiger", "wolf"] in families and families[18][:2] == ["bicycle", "bus"]
    labels = torch.arange(50000) % 100
    noisy = corrupt("asym", 0.4, labels, CIFAR100)
    assert int((noisy != labels).sum()) == 20000
    following = {a: family[(i + 1) % 5] for family in families for i, a in enumerate(family)}
    pairs = {(CIFAR100[a], CIFAR100[b]) for a, b in zip(labels.tolist(), noisy.tolist()) if a != b}
    assert pairs == set(following.items())
    assert ("wolf", "bear") in pairs and ("beaver", "dolphin") in pairs


def test_refusals():
    with pytest.raises(UsageError, match="did you mean asym or sym"):
        corrupt("asymm", 0.2)
    for rate in (-0.1, 1.1, None, float("nan")):
        with pytest.raises(UsageError, match=r"--rate: --noise sym needs a rate in \[0, 1\]"):
            corrupt("sym", rate)
    with pytest.raises(UsageError, match="only CIFAR-10 and CIFAR-100 have a map"):
        corrupt("asym", 0.2, classes=[f"class {i}" for i in range(10)])


@pytest.fixture
def human(tmp_path):
    """A file in CIFAR-10N's own form: torch.save of a dict of numpy arrays. Gives (folder, clean, worse)."""
    clean = np.arange(100) * 7 % 10
    worse = np.where(np.arange(100) % 5 < 2, (clean + 3) % 10, clean)
    content = {
        "clean_label": clean,
        "worse_label": worse,
        "aggre_label": clean,
        **{f"random_label{i}": worse for i in (1, 2, 3)},
    }
    torch.save(content, tmp_path / "CIFAR-10_human.pt")
    torch.save({"clean_label": clean, "noisy_label": worse}, tmp_path / "CIFAR-100_human.pt")
    return tmp_path, torch.from_numpy(clean), torch.from_numpy(worse)


@pytest.mark.parametrize("kind", [kind for kind in NOISE_KINDS if kind.startswith("human")])
def test_human_labels_follow_the_images(human, kind):
    folder, clean, worse = human
    noisy = corrupt_labels(clean, kind, None, 10, 0, CIFAR10, folder)
    assert torch.equal(noisy, clean if kind == "human-aggre" else worse)
    part = common.spread(100, 30)  # --limit-train
    assert torch.equal(corrupt_labels(clean[part], kind, None, 10, 0, CIFAR10, folder), noisy[part])


def test_human_labels_refuse_what_does_not_fit(human, tmp_path):
    folder, clean, _ = human
    with pytest.raises(UsageError, match="another data set, or the images are not in the official order"):
        corrupt_labels(clean.flip(0), "human-worse", None, 10, 0, CIFAR10, folder)
    with pytest.raises(UsageError, match="another data set"):
        corrupt_labels(clean.repeat(2), "human-worse", None, 10, 0, CIFAR10, folder)
    with pytest.raises(UsageError, match="CIFAR-10_human.pt"):
        corrupt_labels(clean, "human-worse", None, 10, 0, CIFAR10, tmp_path / "nowhere")
    (folder / "CIFAR-10_human.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="is not CIFAR-N's file"):
        corrupt_labels(clean, "human-worse", None, 10, 0, CIFAR10, folder)


def test_human_label_files_are_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"clean_label": Evil(), "worse_label": 0}, tmp_path / "CIFAR-10_human.pt")
    with pytest.raises(UsageError, match="is not CIFAR-N's file"):
        corrupt_labels(LABELS, "human-worse", None, 10, 0, CIFAR10, tmp_path)
    (tmp_path / "CIFAR-10_human.pt").write_bytes(pickle.dumps({"clean_label": Evil()}))
    with pytest.raises(UsageError):
        corrupt_labels(LABELS, "human-worse", None, 10, 0, CIFAR10, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_imbalance_follows_the_power_law():
    labels = torch.arange(50000) % 10
    sizes = {}
    for gamma in (0.2, 0.6, 1.0, 2.0):
        kept = common.imbalance(labels, gamma, 10, seed=0)
        counts = torch.bincount(labels[kept], minlength=10).tolist()
        # a and b solved from n_1 = 250 and n_10 = 5000, independently of the code: n_c (b + c^-gamma) = a
        b = (250 * 1 - 5000 * 10**-gamma) / (5000 - 250)
        a = 250 * (b + 1)
        expected = [int(np.floor(round(a / (b + c**-gamma), 6))) for c in range(1, 11)]
        assert counts == expected and counts[0] == 250 and counts[-1] == 5000 and counts == sorted(counts)
        assert len(kept.unique()) == len(kept) and torch.equal(kept, kept.sort().values)
        sizes[gamma] = len(kept)
    assert list(sizes.values()) == sorted(sizes.values())  # 0.2 leaves fewest, the order of Table VI
    by_hand = torch.bincount(labels[common.imbalance(labels, 1.0, 10, 0)], minlength=10)
    # gamma = 1: b = (250 - 500) / 4750 = -1/19, a = 250 · 18/19, n_2 = a / (1/2 - 1/19) = 4500 / 8.5
    assert by_hand[1] == 529
    small = torch.arange(2000) % 10  # ends scale with the class size: 10 and 200
    counts = torch.bincount(small[common.imbalance(small, 0.6, 10, 0)], minlength=10).tolist()
    assert counts[0] == 10 and counts[-1] == 200
