"""Architectures: parameter counts as published, shapes, dropout, normalisation; prediction."""

import pytest
import torch
import torch.nn as nn

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
