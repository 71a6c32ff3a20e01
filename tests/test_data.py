"""Data sets: shapes, .npz files good and bad; photographs, decoded once into arrays."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_same, load_script, saved, write_npz
from PIL import Image
from torchvision.transforms import v2

import common
from common import UsageError, load_dataset


def test_shapes_are_the_same_pixels_everywhere():
    data = load_dataset("shapes")
    assert data.train_images.shape == (2000, 3, 32, 32) and data.test_images.shape == (1000, 3, 32, 32)
    content = b"".join(
        part.numpy().tobytes() for part in (data.train_images, data.train_labels, data.test_images)
    )
    assert (
        hashlib.sha256(content).hexdigest()
        == "e24521d7ae8a32a35dc06af352cecccaa578a1bb7fd2832bf494647fa72a7425"
    )


def test_npz_arrays_are_read_whatever_their_layout(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (40, 3, 20, 24), dtype=np.uint8)
    labels = np.uint8(np.arange(40) % 3)
    changes = {"train_images": np.asfortranarray(images), "train_labels": labels, "test_images": images[:20]}
    path = write_npz(tmp_path / "a.npz", **changes)
    data, raw = load_dataset(str(path)), np.load(path)
    assert data.train_images.is_contiguous() and data.train_labels.dtype == torch.int64
    assert np.array_equal(data.train_images, images) and np.array_equal(data.train_labels, labels)
    for part in ("test_images", "test_labels", "classes"):
        assert np.array_equal(getattr(data, part), raw[part])
    batch = data.batch(torch.tensor([7, 3, 3])).numpy()
    assert batch.dtype == np.float32 and np.array_equal(
        batch, np.float32(images[[7, 3, 3]]) / np.float32(255)
    )


def test_limits_take_evenly_spaced_samples(tmp_path):
    path = write_npz(
        tmp_path / "sorted.npz", train_labels=np.repeat(np.arange(4), 10), classes=np.array(list("abcd"))
    )
    data, whole = load_dataset(str(path), limit_train=8, limit_test=1000), load_dataset(str(path))
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and len(data.test_labels) == 20
    assert torch.equal(data.train_images, whole.train_images[::5])
    assert (
        load_dataset(str(path), limit_test=3).test_labels.tolist() == whole.test_labels[[0, 6, 13]].tolist()
    )


@pytest.mark.parametrize("changes, train, test", [  # which digests differ from those of the file as it is
    ({}, False, False), ({"limit_train": 40, "limit_test": 20}, False, False),
    ({"test_only": True}, None, False), ({"limit_train": 39}, True, False), ({"limit_test": 19}, False, True),
    ({"train_images": -1}, True, False), ({"train_labels": -1}, True, False),
    ({"true_labels": -1}, True, False), ({"test_images": -1}, False, True),
    ({"test_labels": -1}, False, True),
])  # fmt: skip
def test_digests_are_of_all_that_is_in_a_part(tmp_path, changes, train, test):
    path = write_npz(tmp_path / "a.npz", true_labels=np.zeros(40, int))
    before = load_dataset(path)
    arrays = dict(np.load(path))
    options = {name: value for name, value in changes.items() if name not in arrays}
    for name in changes.keys() - options.keys():
        arrays[name].flat[-1] ^= 1  # one bit of the last label or pixel
    np.savez(path, **arrays)
    after = load_dataset(path, **options)
    assert re.fullmatch("[0-9a-f]{12}", before.train_digest) and before.train_digest != before.test_digest
    assert train is None or (before.train_digest != after.train_digest) == train
    assert (before.test_digest != after.test_digest) == test


def test_true_labels_are_what_memorisation_is_measured_against(cli, tmp_path):
    """Label noise that somebody else made. Without true_labels the labels count as they are."""
    given = np.arange(40) % 3
    true = np.where(np.arange(40) < 10, (given + 1) % 3, given)
    path = write_npz(tmp_path / "noisy.npz", true_labels=np.uint8(true))
    data = load_dataset(path, limit_train=8)
    assert data.given_labels.tolist() == given[::5].tolist() and data.train_labels.dtype == torch.int64
    assert data.train_labels.tolist() == true[::5].tolist()
    without = load_dataset(write_npz(tmp_path / "clean.npz"))
    assert torch.equal(without.given_labels, without.train_labels)
    flags = ["--dataset", path, "--noise", "none", "--batch-size", 20, "--epochs", 1, "--device", "cpu"]
    for name, arch in (("nrd", "--arch"), ("cmd", "--arch"), ("messy_collaboration", "--student-arch")):
        extra = ["--teacher-arch", "wrn-10-1"] if name == "messy_collaboration" else []
        status, out, err = cli(load_script(name), *flags, *extra, arch, "wrn-10-1", "--out", name)
        assert (status, err) == (0, "") and "25.00 % " in out, name
        (metrics,) = saved(name)["metrics"]
        for accuracy in (metrics["train_acc_wrong"], metrics["train_acc_wrong_true"]):
            assert round(accuracy, 3) % 5 == 0  # of ten labels, by one network or two
    assert cli(load_script("evaluate"), "nrd", "--memory", 1, "--device", "cpu", "--out", "ev")[::2] == (
        0,
        "",
    )
    found = json.loads(Path("ev/evaluation.jsonl").read_text())["numbers"]["memory"]["images as they are"]
    data = load_dataset(path)
    p = common.predict(common.load_model(saved("nrd")), data.train_images)
    for subset, mask in (("clean", given == true), ("mislabelled", given != true)):
        assert found[subset] == pytest.approx(common.accuracy(p[mask], data.train_labels[mask]))


def test_a_test_part_alone(tmp_path, folder, capsys):
    path = write_npz(tmp_path / "test.npz")
    whole = {"test.npz": load_dataset(path), "shapes": load_dataset("shapes"), "pictures": load(folder)}
    arrays = np.load(path)
    np.savez(path, **{name: arrays[name] for name in ("test_images", "test_labels", "classes")})
    shutil.rmtree(folder / "train")
    (folder / "test").rename(folder / "val")
    (folder.parent / "data").rename(folder.parent / "decoded before")
    capsys.readouterr()
    alone = {
        "test.npz": load_dataset(path, limit_train=5, test_only=True),
        "shapes": load_dataset("shapes", test_only=True),
        "pictures": load(folder, test_only=True),
    }
    assert capsys.readouterr().out.count("decoded ") == 1
    for name, data in alone.items():
        assert len(data.train_images) == len(data.train_labels) == len(data.given_labels) == 0
        assert torch.equal(data.test_images, whole[name].test_images) and data.classes == whole[name].classes
        assert torch.equal(data.test_labels, whole[name].test_labels)
        assert data.test_digest == whole[name].test_digest
    assert common.channel_stats(alone["pictures"])[1] == [0.229, 0.224, 0.225]
    with pytest.raises(UsageError, match="--mean, --std: are needed"):
        common.channel_stats(alone["test.npz"])
    for name in (path, f"imagefolder:{folder}"):
        with pytest.raises(UsageError, match="--dataset.*train.*README says"):
            load_dataset(name, folder.parent / "data", resize=36, image_size=32)


def test_damaged_files_are_refused(tiny_npz):
    whole = tiny_npz.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:5000] + bytes(4000) + whole[9000:]):
        tiny_npz.write_bytes(content)
        with pytest.raises(
            UsageError, match="tiny.npz is no .npz file with train_images, .*; README says"
        ) as error:
            load_dataset(str(tiny_npz))
        assert "pickle" not in str(error.value)


def test_a_download_becomes_a_file(tmp_path, monkeypatch):
    """With classes that have torchvision's attributes."""
    pixels, labels = torch.randint(256, (2, 5, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (2, 5))

    def cifar(root, train, download):
        data = pixels[1 - train].permute(0, 2, 3, 1).numpy()
        return types.SimpleNamespace(
            data=data, targets=labels[1 - train].tolist(), classes=list("abcdefghij")
        )

    def svhn(root, split, download):
        part = ["train", "test"].index(split)
        return types.SimpleNamespace(data=pixels[part].numpy(), labels=labels[part].numpy())

    def web_page(*_, **__):
        raise RuntimeError("File not found or corrupted.")  # torchvision's, where the digest is another

    for name, source, classes in (("CIFAR100", cifar, "abcdefghij"), ("SVHN", svhn, "0123456789")):
        monkeypatch.setattr(torchvision.datasets, name, web_page)
        says = "torchvision's download failed .File not found or corrupted..; try again"
        says = f"--dataset {name.lower()}: {says}"
        with pytest.raises(UsageError, match=says):
            load_dataset(name.lower(), tmp_path)
        for now in (source, web_page):  # downloaded, and not again
            monkeypatch.setattr(torchvision.datasets, name, now)
            data = load_dataset(name.lower(), tmp_path)
            assert torch.equal(data.train_images, pixels[0]) and torch.equal(data.test_images, pixels[1])
            assert torch.equal(data.train_labels, labels[0]) and torch.equal(data.test_labels, labels[1])
            assert data.classes == list(classes)


def test_channel_stats_against_numpy():
    """Of images of any size, except photographs."""
    images = torch.randint(0, 256, (5, 3, 130, 140), dtype=torch.uint8)
    data = common.Dataset(images, torch.zeros(5).long(), images, torch.zeros(5).long(), ["a"])
    mean, std = common.channel_stats(data)
    assert common.channel_stats(data._replace(photographs=True))[0] == [0.485, 0.456, 0.406]  # ImageNet's
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
    """Images are the files through torchvision's transforms of PIL images, which round a little otherwise."""
    square = v2.Compose([v2.Resize(resize), v2.CenterCrop(side), v2.PILToTensor()])
    expected = torch.stack([square(Image.open(file).convert("RGB")) for file in files])
    assert images.dtype == torch.uint8 and images.shape == expected.shape
    assert (images.short() - expected.short()).abs().max() <= 1


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of two classes, pictures of odd sizes and modes: four for training and two for tests."""
    sizes = {
        "train/ape/1.png": (60, 80), "train/ape/2.jpg": (91, 45), "train/bat/1.png": (36, 36),
        "train/bat/9.JPG": (200, 101), "test/ape/1.jpg": (50, 70), "test/bat/1.png": (30, 20),
    }  # fmt: skip
    for seed, (name, size) in enumerate(sizes.items()):
        write_picture(tmp_path / "pictures" / name, size, seed, "L" if seed == 2 else "RGB")
    return tmp_path / "pictures"


def load(folder, **options):
    return load_dataset(f"imagefolder:{folder}", folder.parent / "data", resize=36, image_size=32, **options)


def test_pictures_become_arrays(folder):
    """Whatever their endings."""
    (folder / "train/bat/9.JPG").rename(folder / "train/bat/9.jfif")
    data = load(folder)
    assert data.photographs
    assert_pictures(data.train_images, sorted(folder.rglob("train/*/*")), 36, 36)
    assert_pictures(data.test_images, sorted(folder.rglob("test/*/*")), 36, 32)
    assert data.train_labels.tolist() == [0, 0, 1, 1] and data.test_labels.tolist() == [0, 1]
    assert data.classes == ["ape", "bat"] and data.image_size == 32 and data.imagenet is None
    (folder / "test").rename(folder / "val")
    assert torch.equal(load(folder).test_images, data.test_images)
    (folder / "val/bat").rename(folder / "val/cow")
    with pytest.raises(UsageError, match="train has other classes than the test part: bat, cow"):
        load(folder)


def test_pixels_are_as_stored(tmp_path):
    """Of every kind of picture: no transparency, no turn, and 16 bits for 8. 32 bits have no known range."""
    rgb = np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    grey = rgb[..., 0]
    deep, alpha = grey * np.uint16(257), rgb[..., 1]
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = Image.fromarray(grey // 64)
    palette.putpalette([10, 20, 30, 200, 0, 7, 0, 255, 1, 90, 90, 90])
    colours = np.array(palette.getpalette("RGB")).reshape(-1, 3)
    big_endian = Image.frombytes("I;16B", (40, 36), deep.astype(">u2").tobytes())
    (tmp_path / "deep.pgm").write_bytes(b"P5 40 36 65535\n" + deep.astype(">u2").tobytes())
    pictures = {
        "rgb.png": (Image.fromarray(rgb), rgb, {"exif": turned}),
        "rgba.png": (Image.fromarray(np.dstack([rgb, alpha])), rgb, {}),
        "la.png": (Image.fromarray(np.dstack([grey, alpha])), grey, {}),
        "palette.png": (palette, colours[grey // 64], {"transparency": 1}),
        "bits.png": (Image.fromarray(grey > 99), (grey > 99) * 255, {}),
        "frames.webp": (Image.fromarray(rgb), rgb,
                        {"save_all": True, "append_images": [Image.fromarray(255 - rgb)], "lossless": True}),
        "deep.png": (Image.fromarray(deep), grey, {}),
        "deep.tif": (Image.fromarray(deep), grey, {}),
        "deep.tiff": (big_endian, grey, {}),
        "deep.pgm": (None, grey, {}),
        "integers.tif": (Image.fromarray(np.int32(deep)), None, {}),
        "floats.tif": (Image.fromarray(np.float32(grey)), None, {}),
    }  # fmt: skip
    for name, (picture, expected, options) in pictures.items():
        if picture:
            picture.save(tmp_path / name, **options)
        image = common.read_square(tmp_path / name, 36, 36)
        if expected is None:
            assert image is None, name
        else:
            columns = expected[:, 2:-2]
            assert np.array_equal(
                image, columns.transpose(2, 0, 1) if columns.ndim == 3 else [columns] * 3
            ), name


def test_decoding_takes_the_cores_that_the_process_may_use(folder, monkeypatch):
    loader, workers = torch.utils.data.DataLoader, []

    def record(*args, num_workers, **options):
        workers.append(num_workers)
        return loader(*args, num_workers=num_workers, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", record)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
    load(folder)
    assert workers == [3, 3]


def test_decoded_files_have_short_and_plain_names(folder):
    load(folder.rename(folder.with_name("a:b " * 40)))
    names = [path.name for path in (folder.parent / "data/decoded").iterdir()]
    assert len(names) == 4 and all(re.fullmatch(r"[\w.-]{,99}", name) for name in names)


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
    picture = folder / "train/ape/2.jpg"
    os.utime(picture, (0, 0))
    size = picture.stat().st_size
    before = load(folder)
    picture.touch()
    record = next((folder.parent / "data/decoded").glob("*train*.json"))
    assert load(folder).train_digest == before.train_digest  # pixels decide, and not the times of the files
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "pixels"}))
    assert load(folder).train_digest == before.train_digest  # a record of an earlier version has no digest
    write_picture(picture, (40, 40), seed=9)
    picture.write_bytes(picture.read_bytes().ljust(size, b"\0"))  # as long as before
    os.utime(picture, (0, 0))  # and as old
    changed = load(folder)
    assert changed.train_digest != before.train_digest and changed.test_digest == before.test_digest
    assert_pictures(changed.train_images, sorted(folder.rglob("train/*/*")), 36, 36)
    picture.rename(folder / "train/bat/2.jpg")
    after = load(folder)
    assert_pictures(after.train_images, sorted(folder.rglob("train/*/*")), 36, 36)
    assert after.train_labels.tolist() == [0, 1, 1, 1] and after.train_digest != changed.train_digest


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns"])
def test_a_file_is_another_by_its_size_and_by_both_times(folder, capsys, monkeypatch, field):
    """Each alone: not every system keeps all three."""
    load(folder)
    stat, picture = os.stat, str(folder / "test/ape/1.jpg")

    def changed(file, **options):
        found = stat(file, **options)
        if str(file) != picture:
            return found
        values = {key: getattr(found, key) for key in dir(found) if key.startswith("st_")}
        values[field] += 1
        return types.SimpleNamespace(**values)

    monkeypatch.setattr(os, "stat", changed)
    capsys.readouterr()
    load(folder)
    load(folder)
    assert capsys.readouterr().out.count("decoded 2 pictures") == 1


def test_what_cannot_be_read_is_named_counted_and_left_out(folder, capsys):
    bad = [folder / f"train/{name}" for name in ("ape/1.png", "bat/1.png", "bat/huge.bmp", "bat/notes.txt")]
    bad[3].write_text("Of bats.")
    bad[0].write_bytes(b"not a picture")
    bad[1].write_bytes(bad[1].read_bytes()[:-40])
    Image.new("L", (8, 8)).save(bad[2])
    header = bytearray(bad[2].read_bytes())
    header[18:26] = (13400).to_bytes(4, "little") * 2  # width and height
    bad[2].write_bytes(header)
    for _ in range(2):  # decoded, and read again
        data = load(folder)
        assert_pictures(data.train_images, [folder / "train/ape/2.jpg", folder / "train/bat/9.JPG"], 36, 36)
        assert data.train_labels.tolist() == [0, 1]
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"cannot be read and is left out: {path}" for path in bad]
    assert out.count("decoded 2 pictures, left out 4") == 1
    for file in folder.rglob("test/*/*"):
        file.write_bytes(b"<html>")
    for _ in range(2):
        with pytest.raises(UsageError, match="none of the 2 pictures of .*pictures-test-36-32 can be read"):
            load(folder)


def test_a_stopped_decode_leaves_nothing_that_looks_finished(folder, monkeypatch):
    def stop(items, label):
        yield next(iter(items))
        raise KeyboardInterrupt

    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    full = "pictures-test-36-32.raw cannot be written; .*No space left"
    for name, value, error, says in (
        ("progress", stop, KeyboardInterrupt, None),
        ("open", FullDisk, OSError, full),
    ):
        with monkeypatch.context() as patch, pytest.raises(error, match=says):
            patch.setattr(common, name, value, raising=False)
            load(folder)
        assert [path for path in (folder.parent / "data").rglob("*") if path.is_file()] == []


def test_food101(tmp_path, monkeypatch):
    """Two of the classes in torchvision's layout, which its download makes."""

    def download(_):
        for part, numbers in (("train", "123"), ("test", "4")):
            listed = {kind: [f"{kind}/{i}" for i in numbers] for kind in ("ramen", "paella")}
            (tmp_path / "food-101/meta").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"food-101/meta/{part}.json").write_text(json.dumps(listed), encoding="utf-8")
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
    synsets = "".join(f"n{10 + c:08} thing {c}, stuff\n" for c in range(52))
    (info / "synsets.txt").write_text(synsets, encoding="utf-8")
    train = [f"google/q{i // 2:04}/{i}.jpg {i // 2}" for i in order]
    val = [f"val{i:06}.jpg {i % 52}" for i in order[:52]]
    (info / "train_filelist_google.txt").write_text("\n".join(train), encoding="utf-8")
    (info / "val_filelist.txt").write_text("\n".join(val), encoding="utf-8")
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
