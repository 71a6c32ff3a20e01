"""Architectures: parameter counts as published, shapes, dropout, normalisation; prediction."""

import pytest
import torch
import torch.nn as nn
import torchvision

import common
from common import UsageError, build_model

PUBLISHED = {  # parameters with the stated number of classes, in millions where the source rounds
    ("wrn-16-2", 10): 0.69e6, ("wrn-40-2", 10): 2.2e6, ("wrn-28-10", 10): 36.5e6, ("wrn-16-8", 10): 11.0e6,
    ("preact_resnet34", 10): 21.3e6, ("preact_resnet18", 10): 11.17e6,
    ("resnet20", 10): 0.27e6, ("resnet32", 10): 0.46e6, ("resnet56", 10): 0.85e6, ("resnet110", 10): 1.7e6,
    ("resnet8x4", 100): 1_233_540, ("resnet32x4", 100): 7_433_860,
    # torchvision's ImageNet models, less 9408 for the 7×7 stem, plus 1728 for the 3×3 one, where they have such a stem
    ("resnet18", 1000): 11_689_512 - 7680, ("resnet34", 1000): 21_797_672 - 7680, ("resnet50", 1000): 25_557_032 - 7680,
    ("densenet121", 1000): 7_978_856 - 7680, ("densenet169", 1000): 14_149_480 - 7680,
    ("mobilenet_v2", 1000): 3_504_872, ("shufflenet_v2", 1000): 2_278_604,
}  # fmt: skip


@pytest.mark.parametrize("arch, classes", PUBLISHED)
def test_parameter_counts_are_the_published_ones(arch, classes):
    count = sum(p.numel() for p in build_model(arch, classes).parameters())
    published = PUBLISHED[arch, classes]
    if isinstance(published, int):
        assert count == published
    else:  # rounded to two or three digits
        assert abs(count / published - 1) < 0.02


SHAPES = {  # (channels, side) of each block's output for 32×32 images
    "wrn-10-2": [(32, 32), (64, 16), (128, 8)],
    "resnet8": [(16, 32), (32, 16), (64, 8)],
    "resnet14x4": [(64, 32), (128, 16), (256, 8)],
    "preact_resnet18": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "resnet18": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "mobilenet_v2": [(24, 32), (32, 16), (96, 8), (1280, 4)],
    "shufflenet_v2": [(116, 16), (232, 8), (1024, 4)],
    "densenet121": [(256, 32), (512, 16), (1024, 8), (1024, 4)],
}


@pytest.mark.parametrize("arch", SHAPES)
def test_features_are_the_outputs_of_stem_and_blocks(arch):
    model = build_model(arch, 7).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, features = model(images, features=True)
        assert torch.equal(logits, model(images)) and logits.shape == (2, 7)
        kept = [feature.clone() for feature in features]
        stem, *blocks = [(f.shape[1], f.shape[2]) for f in kept]
        assert blocks == SHAPES[arch] and stem[1] == 32 and all(f.shape[2] == f.shape[3] for f in kept)
        assert torch.equal(model.stem(images), kept[0])
        model(images)
        assert all(torch.equal(a, b) for a, b in zip(features, kept))  # not overwritten in place
        assert torch.allclose(model.head(features[-1]), logits, atol=1e-5)


def test_normalisation_is_inside_and_in_the_checkpointed_state():
    plain, normalised = (
        build_model("resnet8", 10),
        build_model("resnet8", 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    )
    state = normalised.state_dict()
    normalised.load_state_dict({**plain.state_dict(), "mean": state["mean"], "std": state["std"]})
    images = torch.rand(4, 3, 32, 32)
    by_hand = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(normalised.eval()(images), plain.eval()(by_hand), atol=1e-5)


def test_wrn_dropout_sits_between_the_convolutions_and_only_in_training():
    model = build_model("wrn-16-2", 10, dropout=0.4)
    blocks = [m for m in model.modules() if isinstance(m, common.PreActBlock)]
    assert len(blocks) == 6 and all(block.dropout.p == 0.4 for block in blocks)
    seen = []
    block = blocks[0]
    block.dropout.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    block.conv2.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    images = torch.rand(2, 3, 32, 32)
    model.train()(images)
    (before, after), into_conv = seen[:2]
    assert torch.equal(after, into_conv) and abs((after[before > 0] == 0).float().mean() - 0.4) < 0.02
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images))


def test_preact_block_by_hand():
    """conv2(relu(bn2(conv1(relu(bn1 x))))) + x where the shape stays, + a 1×1 convolution of relu(bn1 x) elsewhere."""
    same, down = common.PreActBlock(4, 4, 1).eval(), common.PreActBlock(4, 6, 2).eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        for block in (same, down):
            for bn in (block.bn1, block.bn2):
                bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2)
            active = torch.relu(block.bn1(x))
            inner = block.conv2(torch.relu(block.bn2(block.conv1(active))))
            assert torch.allclose(block(x), inner + (x if block is same else block.shortcut(active)), atol=1e-6)
        assert down(x).shape == (2, 6, 4, 4)


@pytest.mark.parametrize("arch", ["wrn-15-2", "wrn-4-1", "wrn-16-0", "resnet9", "resnet2", "resnet", "vgg16", ""])
def test_unknown_architectures_are_refused(arch):
    with pytest.raises(UsageError, match="--arch: unknown"):
        build_model(arch, 10)


def test_dropout_is_refused_where_there_is_none_and_names_are_suggested():
    with pytest.raises(UsageError, match="--dropout: resnet8 has none"):
        build_model("resnet8", 10, dropout=0.1)
    with pytest.raises(UsageError, match="did you mean preact_resnet34"):
        build_model("preactresnet34", 10)


def test_predict_uses_evaluation_mode_and_puts_the_mode_back():
    model = build_model("wrn-10-1", 10).train()
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    logits = common.predict(model, images, batch_size=7)
    assert model.training and logits.dtype == torch.float32
    bn = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert int(bn.num_batches_tracked) == 0
    with torch.no_grad():
        assert torch.allclose(logits, model.eval()(common.to_float(images)), atol=1e-4)
    half = common.predict(model, images, amp=True)  # bfloat16 autocast: the same to its precision
    assert half.dtype == torch.float32 and torch.allclose(half, logits, atol=0.1) and not torch.equal(half, logits)


def test_accuracy_by_hand():
    scores = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert common.accuracy(scores, torch.tensor([1, 0, 0, 1])) == 75.0


def test_small_net_reaches_95_percent_on_shapes():
    """The other half of what shapes is for: easy for convolutions, impossible for a linear model."""
    data = common.load_dataset("shapes")
    model = build_model("wrn-10-1", 10, 0.0, *common.channel_stats(data.train_images))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=8 * 62)
    for _ in range(8):
        for index in common.batches(2000, 32, "cpu"):
            images = common.crop_flip(common.to_float(data.train_images[index]), 2)
            loss = nn.functional.cross_entropy(model(images), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    assert common.accuracy(common.predict(model, data.test_images), data.test_labels) > 95


# ---------------------------------------------------------------------------------------------------------- photographs


def test_inception_resnet_v2_is_as_published():
    """55.8 million parameters at 1000 classes; sizes of its outputs at 299 pixels (Szegedy et al. 2017, Figure 15)."""
    with torch.device("meta"):
        net = common.build_model("inception_resnet_v2", 1000, image_size=299)
        assert sum(p.numel() for p in net.parameters()) == 55_843_464
        logits, features = net.eval()(torch.empty(2, 3, 299, 299), features=True)
    assert logits.shape == (2, 1000)
    assert [tuple(f.shape[1:]) for f in features] == [(320, 35, 35), (320, 35, 35), (1088, 17, 17), (1536, 8, 8)]
    net = common.build_model("inception_resnet_v2", 5, image_size=75)
    net(torch.rand(2, 3, 75, 75)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(UsageError, match="75"):
        common.build_model("inception_resnet_v2", 5)


LIBRARY = ["resnet18", "resnet50", "resnet101", "mobilenet_v2", "densenet121", "shufflenet_v2"]


@pytest.mark.parametrize("arch", LIBRARY)
def test_photographs_get_the_library_s_architecture(arch, monkeypatch):
    """The same weights give the same logits as torchvision's own model; below 128 pixels it is another form."""
    made = []
    library = torchvision.models.shufflenet_v2_x1_0 if arch == "shufflenet_v2" else torchvision.models.get_model
    name = "shufflenet_v2_x1_0" if arch == "shufflenet_v2" else "get_model"
    monkeypatch.setattr(torchvision.models, name, lambda *a, **k: made.append(library(*a, **k)) or made[-1])
    net = common.build_model(arch, 7, image_size=128).eval()
    x = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.allclose(net(x), made[0].eval()(x), rtol=1e-3, atol=1e-4)
        _, large = net(x, features=True)
        _, small = common.build_model(arch, 7, image_size=127).eval()(x, features=True)
    assert small[-1].shape[-1] >= 4 * large[-1].shape[-1] and net.image_size == 128


def test_pretrained_weights_but_for_another_classifier(monkeypatch):
    source = torchvision.models.resnet18()
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: source.state_dict())
    net = common.build_model("resnet18", 7, image_size=224, pretrained=True)
    assert torch.equal(net.stem[0].weight, source.conv1.weight) and net.head[-1].weight.shape == (7, 512)
    assert torch.equal(net.blocks[3][1].conv2.weight, source.layer4[1].conv2.weight)
    whole = common.build_model("resnet18", 1000, image_size=224, pretrained=True)
    assert torch.equal(whole.head[-1].weight, source.fc.weight)

    def offline(self, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    with pytest.raises(UsageError, match="no route to host.*resnet18-f37072fd.pth"):
        common.build_model("resnet18", 7, image_size=224, pretrained=True)
    for arch, size in (("resnet18", 32), ("wrn-10-1", 224)):
        with pytest.raises(UsageError, match="--pretrained"):
            common.build_model(arch, 7, image_size=size, pretrained=True)


def test_a_checkpoint_of_photographs_gives_the_form_back(tmp_path):
    net = common.build_model("mobilenet_v2", 3, image_size=160)
    header = {"arch": "mobilenet_v2", "num_classes": 3, "dropout": 0.0, "image_size": 160}
    x = torch.rand(1, 3, 160, 160)
    again = common.load_model({**header, "model": net.state_dict()})
    with torch.no_grad():
        assert again.image_size == 160 and torch.equal(again(x), net.eval()(x))
