"""Data sets: shapes, .npz files good and bad, downloads; batches and channel statistics."""

import hashlib
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import write_npz

import common
from common import UsageError, load_dataset


def test_shapes_are_the_same_pixels_everywhere():
    data = load_dataset("shapes")
    assert data.train_images.shape == (2000, 3, 32, 32) and data.test_images.shape == (1000, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert torch.bincount(data.train_labels).tolist() == [200] * 10 and len(data.classes) == 10
    assert torch.bincount(data.test_labels).tolist() == [100] * 10
    content = (
        data.train_images.numpy().tobytes() + data.train_labels.numpy().tobytes() + data.test_images.numpy().tobytes()
    )
    assert hashlib.sha256(content).hexdigest() == SHAPES_SHA256
    assert len({image.numpy().tobytes() for image in torch.cat([data.train_images, data.test_images])}) == 3000


SHAPES_SHA256 = "e24521d7ae8a32a35dc06af352cecccaa578a1bb7fd2832bf494647fa72a7425"


def test_a_linear_model_stays_below_60_percent_on_shapes():
    """Ridge regression at its best penalty, chosen on the test set itself: an upper bound for linear models."""
    data = load_dataset("shapes")
    train, test = (common.to_float(x).flatten(1).double() for x in (data.train_images, data.test_images))
    train, test = train - train.mean(0), test - train.mean(0)
    target = torch.nn.functional.one_hot(data.train_labels).double() - 0.1
    gram = train @ train.T
    best = 0
    for penalty in (1, 10, 100, 1e3, 1e4):
        dual = torch.linalg.solve(gram + penalty * torch.eye(len(train)), target)
        best = max(best, common.accuracy(test @ (train.T @ dual), data.test_labels))
    assert 10 < best < 60


def test_colour_does_not_tell_the_class_of_a_shape():
    data = load_dataset("shapes")
    means = common.to_float(data.train_images).mean((2, 3))
    per_class = torch.stack([means[data.train_labels == c].mean(0) for c in range(10)])
    assert (per_class - means.mean(0)).abs().max() < 0.05


def test_npz_round_trip(tiny_npz):
    data = load_dataset(str(tiny_npz))
    assert data.train_images.shape == (40, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64 and data.classes == ["ant", "bee", "cat"]
    raw = np.load(tiny_npz)
    assert np.array_equal(data.test_images.numpy(), raw["test_images"])


def test_limits_keep_a_file_sorted_by_class_balanced(tmp_path):
    labels = np.repeat(np.arange(4), 10)
    path = write_npz(tmp_path / "sorted.npz", train_labels=labels, classes=np.array(list("abcd")))
    data = load_dataset(str(path), limit_train=8, limit_test=1000)
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and len(data.test_labels) == 20


BAD = {
    "train_images": [
        (np.zeros((40, 3, 32, 32), np.float32), "float32"),
        (np.zeros((40, 32, 32, 3), np.uint8), "[40, 32, 32, 3]"),
        (np.zeros((0, 3, 32, 32), np.uint8), "N > 0"),
        (np.zeros((40, 3, 16, 16), np.uint8), "differ in size"),
        (np.zeros((40, 3, 8, 32), np.uint8), "at least [16, 16]"),
        (None, "lacks train_images"),
    ],
    "train_labels": [
        (np.arange(40) % 3 + 0.5, "float64"),
        (np.arange(39) % 3, "[39]"),
        (np.arange(40) % 4, "0 to 3, but 3 classes are named"),
        (np.arange(40) % 3 - 1, "-1 to 1"),
        (np.array([object()] * 40), "cannot be read"),
    ],
}


@pytest.mark.parametrize("key, value, says", [(key, *case) for key, cases in BAD.items() for case in cases])
def test_malformed_npz_is_refused_by_name(tmp_path, key, value, says):
    path = write_npz(tmp_path / "bad.npz", **{key: value})
    with pytest.raises(UsageError) as error:
        load_dataset(str(path))
    assert says in str(error.value) and str(path) in str(error.value) and "--dataset" in str(error.value)


def test_one_class_and_arrays_of_other_layout(tmp_path):
    with pytest.raises(UsageError, match="two to tell apart"):
        load_dataset(str(write_npz(tmp_path / "one.npz", train_labels=np.zeros(40, int), test_labels=np.zeros(20, int),
                                   classes=np.array(["ant"]))))  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    data = load_dataset(str(write_npz(tmp_path / "fortran.npz", train_images=np.asfortranarray(images))))
    assert data.train_images.is_contiguous() and np.array_equal(data.train_images.numpy(), images)
    strided = common.to_float(data.train_images).transpose(2, 3)
    for function in (common.auto_augment, common.aug_mix):
        torch.manual_seed(1)
        expected = function(strided.contiguous())
        torch.manual_seed(1)
        assert torch.equal(function(strided), expected)


def test_truncated_empty_and_foreign_files_are_refused(tiny_npz, tmp_path):
    whole = tiny_npz.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        tiny_npz.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="cannot be read as .npz"):
            load_dataset(str(tiny_npz))
    damaged = bytearray(whole)
    damaged[5000:9000] = bytes(4000)
    tiny_npz.write_bytes(damaged)
    with pytest.raises(UsageError, match="cannot be read as .npz"):
        load_dataset(str(tiny_npz))
    with open(tiny_npz, "wb") as file:  # an .npy under the wrong name
        np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match="cannot be read as .npz"):
        load_dataset(str(tiny_npz))
    with pytest.raises(UsageError, match="no file"):
        load_dataset(str(tmp_path / "missing.npz"))
    with pytest.raises(UsageError, match="did you mean cifar10"):
        load_dataset("cifra10")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(UsageError, match="lacks train_images"):
        load_dataset(str(tmp_path / "other.npz"))


def test_download_is_cached_in_our_form(tmp_path, monkeypatch):
    """CIFAR comes as [N, 32, 32, 3] and a list of labels, SVHN as [N, 3, 32, 32] and an array."""
    calls = []

    def fake_cifar(root, train, download):
        calls.append((root, train))
        images = np.arange(4 * 3072, dtype=np.int64).reshape(4, 32, 32, 3).astype(np.uint8)
        return types.SimpleNamespace(data=images if train else images[:2], targets=[1, 0, 1, 0][: 4 if train else 2],
                                     classes=["a", "b"])  # fmt: skip

    monkeypatch.setattr(common.torchvision.datasets, "CIFAR10", fake_cifar)
    data = load_dataset("cifar10", tmp_path)
    assert (
        data.train_images.shape == (4, 3, 32, 32)
        and data.train_images[0, 1, 0, 0] == 1
        and data.train_images[0, 0, 0, 1] == 3
    )
    assert data.train_labels.tolist() == [1, 0, 1, 0] and data.classes == ["a", "b"]
    again = load_dataset("cifar10", tmp_path)
    assert len(calls) == 2 and torch.equal(again.train_images, data.train_images)
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10.npz"]

    def fake_svhn(root, split, download):
        count = 12 if split == "train" else 10
        return types.SimpleNamespace(data=np.zeros((count, 3, 32, 32), np.uint8), labels=np.arange(count) % 10)

    monkeypatch.setattr(common.torchvision.datasets, "SVHN", fake_svhn)
    data = load_dataset("svhn", tmp_path)
    assert len(data.train_labels) == 12 and data.classes == list("0123456789")


def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(common.torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(UsageError) as error:
        load_dataset("cifar100", tmp_path / "data")
    message = str(error.value)
    assert str(tmp_path / "data" / "cifar100.npz") in message and "shapes needs none" in message and "\n" not in message


def test_channel_stats_against_numpy():
    images = torch.randint(0, 256, (50, 3, 8, 9), dtype=torch.uint8)
    mean, std = common.channel_stats(images)
    pixels = images.numpy().astype(np.float64) / 255
    assert np.allclose(mean, pixels.mean((0, 2, 3))) and np.allclose(std, pixels.std((0, 2, 3)))


def test_batches_are_full_disjoint_and_reshuffled():
    first, second = (torch.cat(common.batches(103, 10, "cpu")) for _ in range(2))
    assert len(first) == 100 and len(first.unique()) == 100 and not torch.equal(first, second)
    assert [len(b) for b in common.batches(7, 10, "cpu")] == [7]
