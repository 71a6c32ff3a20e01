"""Images in files: layouts, decoding, windows, damaged files, and every kind of script on them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_cmd import load
from test_run import assert_same_run
from torchvision.transforms import v2

import common
import fickle_teacher
import noise_data_free_kd
from common import Photographs, UsageError, load_dataset


@pytest.fixture(autouse=True)
def nothing_unreadable():
    common.UNREADABLE.clear()


COLOURS = [(220, 30, 30), (30, 200, 40), (40, 60, 220), (210, 200, 30), (200, 40, 210), (30, 200, 210), (120, 120, 120)]


def write_photograph(path, label, random, shape=None, **options):
    """A picture whose mean colour is that of its label, of some size and shape."""
    height, width = shape or random.integers(40, 90, 2)
    texture = random.integers(-25, 26, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(np.clip(np.array(COLOURS[label]) + texture, 0, 255))).save(path, **options)
    return path


def colour_of(images):
    """The label whose colour uint8 images [N, 3, H, W] have."""
    mean = images.float().mean((2, 3))
    return torch.cdist(mean, torch.tensor(COLOURS).float()).argmin(1)


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of six classes, 8 training and 4 test pictures each, JPEG and PNG."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for label in range(6):
            for i in range(count):
                name = f"{i}.{'jpg' if i % 2 else 'png'}"
                write_photograph(tmp_path / "photos" / part / f"class{label}" / name, label, random)
    return tmp_path / "photos"


SIZE = {"resize": 36, "image_size": 32, "workers": 0}


def flags_of(folder, workers=0):
    size = ["--resize", 36, "--image-size", 32, "--workers", workers, "--batch-size", 16, "--epochs", 2]
    return ["--dataset", f"imagefolder:{folder}", *size]


def test_the_labels_are_those_of_the_pictures(folder, capsys):
    data = load_dataset(f"imagefolder:{folder}", **SIZE)
    assert data.classes == [f"class{c}" for c in range(6)] and data.image_size == 32 and data.more == {}
    assert data.train_images.shape == (48, 3, 32, 32) and len(data.train_images) == 48
    assert data.test_images.shape == (24, 3, 32, 32) and data.test_images.dtype == torch.uint8
    assert torch.equal(colour_of(data.test_images), data.test_labels)
    assert data.train_labels.bincount().tolist() == [8] * 6
    order = torch.randperm(48)
    for part, images in common.fetch(data.train_images, list(order.split(10))):
        assert images.shape == (len(part), 3, 32, 32) and images.dtype == torch.uint8
        assert torch.equal(colour_of(images), data.train_labels[part])
    few = load_dataset(f"imagefolder:{folder}", limit_train=6, limit_test=12, **SIZE)
    assert few.train_labels.tolist() == list(range(6)) and few.test_labels.bincount().tolist() == [2] * 6
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shape", [(80, 60), (45, 90), (36, 36), (300, 200)])
def test_the_middle_is_the_library_s(tmp_path, shape):
    """Resize and CenterCrop of torchvision; of a JPEG the decoder may shrink first, which no eye can tell."""
    random = np.random.default_rng(1)
    path = write_photograph(tmp_path / "a.png", 2, random, shape)
    expected = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor()])(Image.open(path))
    found = common.read_photograph(path, 36, 32)
    assert found.shape == (3, 32, 32) and (found.float() - expected.float()).abs().mean() < 4

    smooth = Image.fromarray(np.uint8(np.add.outer(np.arange(shape[0]), np.arange(shape[1])) / sum(shape) * 255))
    smooth.convert("RGB").save(tmp_path / "b.jpg", quality=95)
    expected = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor()])(Image.open(tmp_path / "b.jpg"))
    assert (common.read_photograph(tmp_path / "b.jpg", 36, 32).float() - expected.float()).abs().max() <= 6


def test_windows_are_where_they_are_told_to_be(tmp_path):
    """A ramp from left to right and from top to bottom, at its own size: the pixels tell the place."""
    down, across = np.mgrid[:40, :80]
    Image.fromarray(np.stack([down, across, 0 * down], 2).astype(np.uint8)).save(tmp_path / "ramp.png")
    for place, corner in (((0, 0), (0, 0)), ((1, 1), (8, 48)), ((0.5, 0.5), (4, 24)), ((0.25, 0.75), (2, 36))):
        found = common.read_photograph(tmp_path / "ramp.png", 40, 32, place)
        assert (int(found[0, 0, 0]), int(found[1, 0, 0])) == corner
        assert (int(found[0, -1, -1]), int(found[1, -1, -1])) == (corner[0] + 31, corner[1] + 31)
    files = Photographs([tmp_path / "ramp.png"], 40, 32, workers=0)
    parts = [torch.zeros(200, dtype=torch.int64)]
    ((_, windows),) = common.fetch(files, parts)
    tops, lefts = windows[:, 0, 0, 0].tolist(), windows[:, 1, 0, 0].tolist()
    assert set(tops) == set(range(9)) and min(lefts) < 3 and max(lefts) > 45  # all over the picture
    ((_, windows),) = common.fetch(files, parts, random=False)
    assert (windows == windows[0]).all() and int(windows[0, 1, 0, 0]) == 24


def test_the_number_of_workers_does_not_matter(folder):
    """Nor do they touch the global generator but for the places of the windows, all drawn before the epoch."""
    found = []
    for workers in (0, 1, 2):
        data = load_dataset(f"imagefolder:{folder}", **{**SIZE, "workers": workers})
        torch.manual_seed(3)
        for _ in range(2):
            images = [images for _, images in common.fetch(data.train_images, list(torch.arange(48).split(16)))]
        found.append((torch.cat(images), torch.rand(1)))
    for images, after in found[1:]:
        assert torch.equal(images, found[0][0]) and torch.equal(after, found[0][1])


def spoil(folder):
    """Damage four pictures, each in another way; their paths."""
    bad = [folder / "train/class1/0.png", folder / "train/class4/3.jpg", folder / "test/class0/1.jpg"]
    bad[0].write_bytes(b"not a picture")
    bad[1].write_bytes(bad[1].read_bytes()[:300])
    bad[2].write_bytes(b"")
    return bad


def test_damaged_pictures_are_named_counted_and_skipped(folder, nrd_cli, tmp_path):
    bad = spoil(folder)
    data = load_dataset(f"imagefolder:{folder}", **SIZE)
    assert len(data.test_labels) == 23 and torch.equal(colour_of(data.test_images), data.test_labels)
    rows = []
    for part, images in common.fetch(data.train_images, list(torch.arange(48).split(16))):
        assert torch.equal(colour_of(images), data.train_labels[part]) and len(part) == 16  # others take their places
        rows += part.tolist()
    assert sorted(set(range(48)) - set(rows)) == [8, 35]

    status, out, err = nrd_cli(*flags_of(folder, 1), "--arch", "wrn-10-1", "--epochs", 3, "--out", "run")
    assert status == 0
    assert all(err.count(f"skipped: {path}: ") == 1 for path in bad) and err.count("\n") == 3
    assert "3 photographs could not be read and were skipped" in out.splitlines()
    assert len(common.load_checkpoint(tmp_path / "run/checkpoint.pt")["metrics"]) == 3


def test_a_folder_of_nothing_but_damage_is_refused(folder, nrd_cli):
    for path in (folder / "train").rglob("*.*"):
        path.write_bytes(b"")
    status, _, err = nrd_cli(*flags_of(folder), "--arch", "wrn-10-1", "--out", "run")
    assert not list(Path("run").iterdir())
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("error: --dataset") and "can be read" in last and "Traceback" not in err


def test_one_picture_left_over_may_be_damaged(tmp_path, nrd_cli):
    """The last of 33 test pictures, alone in its part; a batch of training pictures, all of them."""
    random = np.random.default_rng(0)
    for label, count in ((0, 32), (1, 1)):
        for part in ("train", "test"):
            for i in range(count):
                write_photograph(tmp_path / "p" / part / f"{label}" / f"{i}.png", label, random)
    for part in ("train", "test"):
        (tmp_path / "p" / part / "1/0.png").write_bytes(b"")
    files = load_dataset(f"imagefolder:{tmp_path / 'p'}", **SIZE)
    assert len(files.test_labels) == 32
    seen = [part.tolist() for part, _ in common.fetch(files.train_images, [torch.tensor([i]) for i in (31, 32, 5)])]
    assert seen == [[31], [5]]


def test_a_picture_that_is_missing_does_not_keep_a_teacher_from_being_trained(folder, cli, tmp_path):
    (folder / "train/class0/9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    nets = ["--teacher-arch", "wrn-10-1", "--student-arch", "wrn-10-1"]
    status, out, err = cli(fickle_teacher, *flags_of(folder), *nets, "--epochs", 1, "--out", "run")
    assert status == 0 and err.count("\n") == 1 and "1 photograph could not be read and was skipped" in out
    (teacher,) = (tmp_path / "runs/teachers").glob("wrn*/checkpoint.pt")
    assert common.load_checkpoint(teacher)["config"]["image_size"] == 32
    other = [*flags_of(folder), *nets, "--epochs", 1, "--teacher", teacher, "--image-size", 24, "--out", "other"]
    status, _, err = cli(fickle_teacher, *other)
    assert status == 2 and "has image size 32, not 24" in err


def test_the_spelling_of_a_folder_does_not_matter(folder, nrd_cli, tmp_path):
    for spelling in (f"{folder}/", f"{folder}/../photos"):
        flags = [*flags_of(spelling), "--arch", "wrn-10-1", "--epochs", 1, "--resume"]
        flags = flags if (tmp_path / "runs").exists() else flags[:-1]
        assert nrd_cli(*flags)[0] == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["nrd-photos-clean-seed0"]
    assert common.data_name("imagefolder:.") == tmp_path.name and common.data_name("a/b/cifar10.npz") == "cifar10"


def test_workers_end_without_a_word(folder):
    """Also where the program ends while they wait for more."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import common, torch\n"
        f"data = common.load_dataset('imagefolder:{folder}', resize=36, image_size=32, workers=6)\n"
        "print(sum(len(part) for part, _ in common.fetch(data.train_images, list(torch.arange(48).split(8)))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.endswith("48\n")


def test_a_stopped_group_of_processes_says_one_line(folder, tmp_path):
    """As schedulers do it: SIGTERM to the run and its workers at once."""
    flags = [*flags_of(folder, 2), "--arch", "wrn-10-1", "--epochs", 500, "--out", "run"]
    command = [sys.executable, str(ROOT / "nrd.py"), *map(str, flags)]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    os.killpg(run.pid, signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.count("\n") == 1 and err.startswith("stopped; ")


def test_folders_that_do_not_match_are_refused(folder, nrd_cli, tmp_path):
    (folder / "test/class5").rename(folder / "test/other")
    cases = [(f"imagefolder:{folder}", "other classes: class5, other"), ("imagefolder:none", "none/train/CLASS")]
    cases += [
        ("imagefolder", "imagefolder:PATH"),
        ("imagefolder:", "names no folder"),
        ("food101", "download failed"),
        ("webvision", "WebVision 1.0"),
    ]
    for name, says in cases:
        status, _, err = nrd_cli("--dataset", name, "--data-dir", "nowhere", "--epochs", 1)
        assert status == 2 and err.count("\n") == 1 and says in err, err
    status, _, err = nrd_cli("--dataset", f"imagefolder:{folder}", "--resize", 30, "--image-size", 32)
    assert status == 2 and "--image-size: 32 does not fit in --resize 30" in err
    assert not (tmp_path / "runs").exists()


def test_val_is_another_name_for_test(folder):
    (folder / "test").rename(folder / "val")
    data = load_dataset(f"imagefolder:{folder}", **SIZE)
    assert torch.equal(colour_of(data.test_images), data.test_labels)


def write_webvision(root):
    """Fifty classes and two more, the picture of class c in colour c % 7; with ILSVRC12's validation images."""
    random = np.random.default_rng(0)
    info, wnids = root / "webvision/info", [f"n{10 + c:08}" for c in range(52)]
    info.mkdir(parents=True)
    (info / "synsets.txt").write_text("".join(f"{wnid} thing {c}, stuff\n" for c, wnid in enumerate(wnids)))
    train, val = [], []
    for c in range(52):
        for i in range(2):
            train.append(f"google/q{c:04}/{i}.jpg {c}")
            write_photograph(root / "webvision" / train[-1].split()[0], c % 7, random, (40, 40))
        val.append(f"val{c:06}.jpg {c}")
        write_photograph(root / "webvision/val_images_256" / val[-1].split()[0], c % 7, random, (40, 44))
        write_photograph(root / "imagenet/val" / wnids[c] / "ILSVRC2012_val_1.JPEG", c % 7, random, (40, 40))
    order = random.permutation(len(train))
    (info / "train_filelist_google.txt").write_text("".join(f"{train[i]}\n" for i in order))
    (info / "val_filelist.txt").write_text("".join(f"{line}\n" for line in val))


def test_mini_webvision(tmp_path, capsys, nrd_cli):
    """The first 50 classes, and ILSVRC12's images of the same; a file that is missing is named and left out."""
    write_webvision(tmp_path)
    (tmp_path / "webvision/google/q0003/1.jpg").unlink()
    data = load_dataset("webvision", tmp_path, **SIZE)
    assert len(data.classes) == 50 and data.classes[7] == "thing 7, stuff"
    assert len(data.train_labels) == 99 and data.train_labels.bincount().tolist() == [2 - (c == 3) for c in range(50)]
    assert capsys.readouterr().err.count("skipped: ") == 1
    ((_, images),) = common.fetch(data.train_images, [torch.arange(99)])
    assert torch.equal(colour_of(images), data.train_labels % 7)
    for images, labels in ((data.test_images, data.test_labels), data.more["imagenet"]):
        assert labels.tolist() == list(range(50)) and torch.equal(colour_of(images), labels % 7)

    flags = ["--dataset", "webvision", "--data-dir", tmp_path, "--resize", 36, "--image-size", 32, "--workers", 0]
    status, out, err = nrd_cli(*flags, "--arch", "wrn-10-1", "--epochs", 1, "--batch-size", 32, "--out", "run")
    assert status == 0 and "1 photograph could not be read" in out
    (record,) = common.load_checkpoint("run/checkpoint.pt")["metrics"]
    assert {"test_acc", "test_top5", "imagenet_acc", "imagenet_top5"} <= record.keys()
    assert record["test_acc"] <= record["test_top5"] and record["imagenet_acc"] <= record["imagenet_top5"]
    model = common.load_model(common.load_checkpoint("run/checkpoint.pt"))
    logits = common.predict(model, data.more["imagenet"][0])
    assert record["imagenet_top5"] == pytest.approx(common.accuracy(logits, torch.arange(50), 5))


@pytest.mark.parametrize("fault", ["classes", "list", "imagenet", "label", "none"])
def test_a_class_list_that_does_not_match_is_refused(tmp_path, nrd_cli, fault):
    write_webvision(tmp_path)
    info = tmp_path / "webvision/info"
    if fault == "classes":
        (info / "synsets.txt").write_text("n00000001 thing\n")
    elif fault == "list":
        lines = (info / "val_filelist.txt").read_text().splitlines()
        (info / "val_filelist.txt").write_text("\n".join(lines[:49]))
    elif fault == "imagenet":
        (tmp_path / "imagenet/val/n00000012").rename(tmp_path / "imagenet/val/n99999999")
    elif fault == "label":
        (info / "train_filelist_google.txt").write_text("google/q0000/0.jpg cat\n")
    else:
        (info / "train_filelist_google.txt").unlink()
    status, _, err = nrd_cli("--dataset", "webvision", "--data-dir", tmp_path, "--epochs", 1)
    says = {"imagenet": "lacks n00000012", "label": "cat", "none": "train_filelist_google.txt"}.get(fault, "first 50")
    assert status == 2 and err.count("\n") == 1 and says in err


def test_food101(tmp_path):
    """In torchvision's layout, two of the classes."""
    random, food = np.random.default_rng(0), tmp_path / "food-101"
    lists = {"train": ["1", "2", "3"], "test": ["4"]}
    for part, names in lists.items():
        listed = {kind: [f"{kind}/{name}" for name in names] for kind in ("ramen", "paella")}
        (food / "meta").mkdir(parents=True, exist_ok=True)
        (food / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for label, kind in enumerate(("paella", "ramen")):
            for name in names:
                write_photograph(food / "images" / kind / f"{name}.jpg", label, random)
    data = load_dataset("food101", tmp_path, **SIZE)
    assert data.classes == ["paella", "ramen"] and torch.equal(colour_of(data.test_images), data.test_labels)
    ((part, images),) = common.fetch(data.train_images, [torch.arange(6)])
    assert torch.equal(colour_of(images), data.train_labels) and data.train_labels.bincount().tolist() == [3, 3]


# ------------------------------------------------------------------------------------------------------------- scripts


def test_a_stopped_run_continues_to_the_same_bit(folder, nrd_cli, tmp_path, monkeypatch):
    flags = [*flags_of(folder, 1), "--arch", "wrn-10-1", "--epochs", 3]
    assert nrd_cli(*flags, "--out", "whole")[0] == 0
    end_epoch = common.Run.end_epoch

    def stop(run, *args, **metrics):
        end_epoch(run, *args, **metrics)
        sys.exit(9)

    monkeypatch.setattr(common.Run, "end_epoch", stop)
    assert nrd_cli(*flags, "--out", "broken")[0] == 9
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    assert nrd_cli(*flags, "--out", "broken", "--resume", "--workers", 0)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_photographs_are_learnt(folder, nrd_cli):
    """Colours are: a few steps of cross-entropy tell them apart, where labels belonged to other rows they would not."""
    flags = [*flags_of(folder), "--epochs", 25, "--arch", "wrn-10-1", "--loss", "ce", "--student-augment", "flip"]
    status, out, _ = nrd_cli(*flags, "--out", "run")
    metrics = common.load_checkpoint("run/checkpoint.pt")["metrics"]
    assert status == 0 and metrics[-1]["test_acc"] > 80 and metrics[-1]["test_top5"] == 100


def test_the_other_scripts(folder, cli, tmp_path):
    nets = ["--teacher-arch", "wrn-10-1", "--student-arch", "wrn-10-1"]
    cmd = load()
    assert cli(cmd, *flags_of(folder), "--arch", "wrn-10-1", "--validation", 0.2, "--out", "cmd")[0] == 0
    record = common.load_checkpoint("cmd/checkpoint.pt")["metrics"][-1]
    assert {"test_top5", "val_acc", "test_acc_A"} <= record.keys()
    assert cli(fickle_teacher, *flags_of(folder), *nets, "--out", "ft")[0] == 0
    teachers = [path.name for path in (tmp_path / "runs/teachers").iterdir()]
    assert cli(fickle_teacher, *flags_of(folder), *nets, "--seed", 1, "--out", "ft1")[0] == 0
    assert [path.name for path in (tmp_path / "runs/teachers").iterdir()] == teachers  # the teacher is found again
    dfkd = noise_data_free_kd
    for source in ("data", "gaussian"):
        flags = [*flags_of(folder), *nets, "--teacher-epochs", 1, "--source", source]
        assert cli(dfkd, *flags, "--out", source)[0] == 0
        assert common.load_checkpoint(f"{source}/checkpoint.pt")["metrics"][-1]["test_top5"] > 0
    status, _, err = cli(dfkd, "--plot-activations", "gaussian/checkpoint.pt", "--limit-train", 20, "--workers", 0)
    assert status == 0, err
    import evaluate

    flags = ["--ece", "--pgd", 1, "--eps", "1/255", "--restarts", 1, "--out", "evaluation"]
    assert cli(evaluate, "cmd/checkpoint.pt", *flags)[0] == 0
    (found,) = json.loads((tmp_path / "evaluation/evaluation.json").read_text())["models"].values()
    assert found["accuracy (%)"]["mean"] == pytest.approx(record["test_acc_A"])
    test = load_dataset(f"imagefolder:{folder}", **SIZE)  # of the size that the network was trained on
    content = hashlib.sha256(test.test_images.numpy().tobytes() + test.test_labels.numpy().tobytes()).hexdigest()
    assert content[:16] in (tmp_path / "evaluation/evaluation.json").read_text()


@pytest.mark.parametrize("script, dataset, expected", [
    ("nrd", "webvision", dict(arch="resnet50", epochs=300, batch_size=64, lr=0.1, loss_params=[0.1, 0.8, 0.1],
                              beta=0.99, noise="none", student_augment="resizedcrop+flip+jitter", image_size=224)),
    ("cmd", "food101", dict(arch="resnet50", epochs=100, batch_size=32, lr=0.01, weight_decay=5e-4, pretrained=True,
                            noise="none", image_size=224)),
    ("cmd", "webvision", dict(arch="inception_resnet_v2", epochs=80, batch_size=32, lr=0.01, pretrained=False,
                              resize=320, image_size=299)),
    ("dfkd", "food101", dict(teacher_arch="resnet101", batch_size=256, lr=1e-3, epochs=200, teacher_epochs=100)),
])  # fmt: skip
def test_presets(script, dataset, expected, monkeypatch):
    import nrd

    module = {"nrd": nrd, "cmd": load(), "dfkd": noise_data_free_kd}[script]
    monkeypatch.setattr(sys, "argv", ["script", "--dataset", dataset])
    args = module.parse_args()
    assert {key: getattr(args, key) for key in expected} == expected
    if script == "cmd":
        milestones, factor = module.schedule(args, args.arch)[4:]
        assert factor == 0.1 and milestones[:2] == ((50, 80) if dataset == "food101" else (40, 41))


def test_top_5():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1]])
    labels = torch.tensor([4, 1, 6])
    assert common.accuracy(scores, labels, 5) == pytest.approx(200 / 3)
    assert common.accuracy(scores, labels) == pytest.approx(100 / 3)


def test_an_unknown_name_still_is(capsys):
    with pytest.raises(UsageError, match="imagefolder:PATH"):
        load_dataset("food102")
