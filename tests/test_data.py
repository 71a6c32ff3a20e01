"""Data sets: shapes, .npz files good and bad; photographs, decoded once into arrays."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_same, saved, write_npz
from PIL import Image
from torchvision.transforms import v2

import common
from common import UsageError, load_dataset


def test_shapes_are_the_same_pixels_everywhere():
    data = load_dataset("shapes")
    assert data.train_images.shape == (2000, 3, 32, 32) and data.test_images.shape == (1000, 3, 32, 32)
    content = b"".join(part.numpy().tobytes() for part in (data.train_images, data.train_labels, data.test_images))
    assert hashlib.sha256(content).hexdigest() == "e24521d7ae8a32a35dc06af352cecccaa578a1bb7fd2832bf494647fa72a7425"


def test_npz_arrays_are_read_whatever_their_layout(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (40, 3, 20, 24), dtype=np.uint8)
    labels = np.uint8(np.arange(40) % 3)
    path = write_npz(tmp_path / "a.npz", train_images=np.asfortranarray(images), train_labels=labels)
    data, raw = load_dataset(str(path)), np.load(path)
    assert data.train_images.is_contiguous() and data.train_labels.dtype == torch.int64
    assert np.array_equal(data.train_images, images) and np.array_equal(data.train_labels, labels)
    for part in ("test_images", "test_labels", "classes"):
        assert np.array_equal(getattr(data, part), raw[part])
    batch = data.batch(torch.tensor([7, 3, 3])).numpy()
    assert batch.dtype == np.float32 and np.array_equal(batch, np.float32(images[[7, 3, 3]]) / np.float32(255))


def test_limits_take_evenly_spaced_samples(tmp_path):
    path = write_npz(tmp_path / "sorted.npz", train_labels=np.repeat(np.arange(4), 10), classes=np.array(list("abcd")))
    data, whole = load_dataset(str(path), limit_train=8, limit_test=1000), load_dataset(str(path))
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and len(data.test_labels) == 20
    assert torch.equal(data.train_images, whole.train_images[::5])
    assert load_dataset(str(path), limit_test=3).test_labels.tolist() == whole.test_labels[[0, 6, 13]].tolist()


@pytest.mark.parametrize("key, value, says", [
    ("train_images", np.zeros((40, 3, 32, 32), np.float32), "train_images is float32 [40, 3, 32, 32], not uint8"),
    ("train_labels", np.arange(40) % 3 + 0.5, "train_labels is float64 [40], not integer [40]"),
    ("train_labels", np.arange(39) % 3, "train_labels is int64 [39]"),
    ("train_labels", np.arange(40) % 4, "train_labels are 0 to 3, but 3 classes are named"),
])  # fmt: skip
def test_wrong_arrays_are_refused_by_name(tmp_path, key, value, says):
    path = write_npz(tmp_path / "bad.npz", **{key: value})
    with pytest.raises(UsageError) as error:
        load_dataset(str(path))
    assert says in str(error.value) and str(error.value).startswith(f"--dataset: {path}")


def test_damaged_files_are_refused(tiny_npz):
    whole = tiny_npz.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:5000] + bytes(4000) + whole[9000:]):
        tiny_npz.write_bytes(content)
        with pytest.raises(UsageError, match="tiny.npz is no .npz file with train_images, train_labels"):
            load_dataset(str(tiny_npz))


def test_channel_stats_against_numpy():
    images = torch.randint(0, 256, (50, 3, 8, 9), dtype=torch.uint8)
    mean, std = common.channel_stats(images)
    pixels = images.numpy().astype(np.float64) / 255
    assert np.allclose(mean, pixels.mean((0, 2, 3))) and np.allclose(std, pixels.std((0, 2, 3)))


def write_picture(path, size, seed=0, mode="RGB"):
    """A picture of noise, size being (width, height); blurred, so that JPEG keeps it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size).convert(mode).save(path)


def write_colour(path, label, size=(40, 44)):
    """A picture in a colour that tells the label; see `labels_of`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (5 * label, 128, 255 - 5 * label)).save(path)


def labels_of(images):
    return (images[:, 0].double().mean((1, 2)) / 5).round().long()


def assert_pictures(images, files, resize, side):
    """That images are the files through torchvision's transforms of PIL images, which round a little differently."""
    square = v2.Compose([v2.Resize(resize), v2.CenterCrop(side), v2.PILToTensor()])
    expected = torch.stack([square(Image.open(file).convert("RGB")) for file in files])
    assert images.dtype == torch.uint8 and images.shape == expected.shape
    assert (images.short() - expected.short()).abs().max() <= 1


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of two classes, pictures of odd sizes and modes: four for training and two for tests."""
    sizes = {"train/ape/1.png": (60, 80), "train/ape/2.jpg": (91, 45), "train/bat/1.png": (36, 36), "train/bat/9.JPG":
             (200, 101), "test/ape/1.jpg": (50, 70), "test/bat/1.png": (30, 20)}  # fmt: skip
    for seed, (name, size) in enumerate(sizes.items()):
        write_picture(tmp_path / "pictures" / name, size, seed, "L" if seed == 2 else "RGB")
    return tmp_path / "pictures"


def load(folder):
    return load_dataset(f"imagefolder:{folder}", folder.parent / "data", resize=36, image_size=32)


def test_pictures_become_arrays(folder):
    data = load(folder)
    assert_pictures(data.train_images, sorted(folder.rglob("train/*/*")), 36, 36)
    assert_pictures(data.test_images, sorted(folder.rglob("test/*/*")), 36, 32)
    assert data.train_labels.tolist() == [0, 0, 1, 1] and data.test_labels.tolist() == [0, 1]
    assert data.classes == ["ape", "bat"] and data.image_size == 32 and data.imagenet is None
    (folder / "test").rename(folder / "val")
    assert torch.equal(load(folder).test_images, data.test_images)
    (folder / "val/bat").rename(folder / "val/cow")
    with pytest.raises(UsageError, match="train and val have other classes: bat, cow"):
        load(folder)


def test_they_are_decoded_once_and_a_run_is_the_same(folder, nrd_cli, monkeypatch):
    """Decoding draws nothing from the global generators. The labels count as they are."""
    flags = ["--dataset", "imagefolder:pictures", "--resize", 36, "--image-size", 32, "--arch", "resnet8"]
    flags += ["--epochs", 1, "--batch-size", 4, "--device", "cpu"]
    status, first, _ = nrd_cli(*flags, "--out", "first")
    assert status == 0 and "decoded 4 pictures" in first and "0.00 % relabelled" in first
    monkeypatch.delattr(common, "read_square")  # whoever decodes fails
    assert nrd_cli(*flags, "--out", "second")[0] == 0
    assert_same(saved("first"), saved("second"))


def test_a_changed_folder_is_decoded_again(folder):
    load(folder)
    picture = folder / "train/ape/2.jpg"
    size = picture.stat().st_size
    write_picture(picture, (40, 40), seed=9)
    picture.write_bytes(picture.read_bytes().ljust(size, b"\0"))  # as long as before
    assert_pictures(load(folder).train_images, sorted(folder.rglob("train/*/*")), 36, 36)
    picture.rename(folder / "train/bat/2.jpg")
    after = load(folder)
    assert_pictures(after.train_images, sorted(folder.rglob("train/*/*")), 36, 36)
    assert after.train_labels.tolist() == [0, 1, 1, 1]


def test_what_cannot_be_read_is_named_counted_and_left_out(folder, capsys):
    bad = [folder / "train/ape/1.png", folder / "train/bat/1.png"]
    bad[0].write_bytes(b"not a picture")
    bad[1].write_bytes(bad[1].read_bytes()[:-40])
    for _ in range(2):  # decoded, and read again
        data = load(folder)
        assert_pictures(data.train_images, [folder / "train/ape/2.jpg", folder / "train/bat/9.JPG"], 36, 36)
        assert data.train_labels.tolist() == [0, 1]
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"cannot be read and is left out: {path}" for path in bad]
    assert out.count("decoded 2 pictures, left out 2") == 1


def test_a_stopped_decode_leaves_nothing_that_looks_finished(folder, monkeypatch):
    def stop(items, label):
        yield next(iter(items))
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "progress", stop)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert [path for path in (folder.parent / "data").rglob("*") if path.is_file()] == []


def test_food101(tmp_path, monkeypatch):
    """Two of the classes in torchvision's layout, which its download makes."""

    def download(_):
        for part, numbers in (("train", "123"), ("test", "4")):
            listed = {kind: [f"{kind}/{i}" for i in numbers] for kind in ("ramen", "paella")}
            (tmp_path / "food-101/meta").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"food-101/meta/{part}.json").write_text(json.dumps(listed))
            for label, kind in enumerate(("paella", "ramen")):
                for i in numbers:
                    write_colour(tmp_path / f"food-101/images/{kind}/{i}.jpg", label)

    monkeypatch.setattr(torchvision.datasets.Food101, "_download", download)
    data = load_dataset("food101", tmp_path, resize=36, image_size=32)
    assert data.classes == ["paella", "ramen"]
    assert data.train_labels.bincount().tolist() == [3, 3] and data.test_labels.bincount().tolist() == [1, 1]
    assert torch.equal(labels_of(data.train_images), data.train_labels)
    assert torch.equal(labels_of(data.test_images), data.test_labels)


def test_mini_webvision(tmp_path):
    """The first 50 of 52 classes; ILSVRC12's validation images of the same."""
    info, order = tmp_path / "webvision/info", np.random.default_rng(0).permutation(104)
    info.mkdir(parents=True)
    (info / "synsets.txt").write_text("".join(f"n{10 + c:08} thing {c}, stuff\n" for c in range(52)))
    train = [f"google/q{i // 2:04}/{i}.jpg {i // 2}" for i in order]
    val = [f"val{i:06}.jpg {i % 52}" for i in order[:52]]
    (info / "train_filelist_google.txt").write_text("\n".join(train))
    (info / "val_filelist.txt").write_text("\n".join(val))
    for root, lines in ((tmp_path / "webvision", train), (tmp_path / "webvision/val_images_256", val)):
        for file, label in map(str.split, lines):
            write_colour(root / file, int(label))
    for c in range(52):
        write_colour(tmp_path / f"imagenet/val/n{10 + c:08}/ILSVRC2012_val_{52 - c}.JPEG", c)

    data = load_dataset("webvision", tmp_path, limit_test=10, resize=36, image_size=32)
    assert len(data.classes) == 50 and data.classes[7] == "thing 7, stuff"
    assert data.train_labels.bincount().tolist() == [2] * 50
    assert torch.equal(labels_of(data.train_images), data.train_labels)
    assert torch.equal(labels_of(data.test_images), data.test_labels) and len(data.test_labels) == 10
    images, labels = data.imagenet
    assert images.shape == (50, 3, 32, 32) and labels.tolist() == list(range(50))
    assert torch.equal(labels_of(images), labels)
