"""Architectures: parameter counts as published, shapes, normalisation; prediction."""

import pytest
import torch
import torchvision

import common
from common import UsageError, build_model

PUBLISHED = {  # (architecture, classes): parameters; in millions where the source rounds
    ("wrn-16-2", 10): 0.69e6, ("wrn-40-2", 10): 2.2e6, ("wrn-28-10", 10): 36.5e6, ("wrn-16-8", 10): 11.0e6,
    ("preact_resnet18", 10): 11.17e6, ("preact_resnet34", 10): 1_860_138, ("resnet20", 10): 0.27e6,
    ("resnet110", 10): 1.7e6, ("resnet8x4", 100): 1_233_540, ("resnet32x4", 100): 7_433_860,
    # torchvision's ImageNet models, less 9408 for the 7×7 stem, plus 1728 for the 3×3 one, where they have it
    ("resnet18", 1000): 11_689_512 - 7680, ("densenet121", 1000): 7_978_856 - 7680,
    ("mobilenet_v2", 1000): 3_504_872, ("shufflenet_v2", 1000): 2_278_604,
    ("inception_resnet_v2", 1000): 55_843_464,
}  # fmt: skip


@pytest.mark.parametrize("arch, classes", PUBLISHED)
def test_parameter_counts_are_the_published_ones(arch, classes):
    with torch.device("meta"):
        size = 299 if arch == "inception_resnet_v2" else 32
        count = sum(p.numel() for p in build_model(arch, classes, image_size=size).parameters())
    published = PUBLISHED[arch, classes]
    assert count == published if isinstance(published, int) else abs(count / published - 1) < 0.02


@pytest.mark.parametrize("arch, sizes", [  # (channels, side) of each block's output for 32×32 images
    ("wrn-10-2", [(32, 32), (64, 16), (128, 8)]),
    ("resnet8", [(16, 32), (32, 16), (64, 8)]),
    ("resnet18", [(64, 32), (128, 16), (256, 8), (512, 4)]),
    ("mobilenet_v2", [(24, 32), (32, 16), (96, 8), (1280, 4)]),
    ("shufflenet_v2", [(116, 16), (232, 8), (1024, 4)]),
    ("densenet121", [(256, 32), (512, 16), (1024, 8), (1024, 4)]),
])  # fmt: skip
def test_features_are_the_outputs_of_stem_and_blocks(arch, sizes):
    model, images = build_model(arch, 7).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, features = model(images, features=True)
        assert torch.equal(logits, model(images)) and logits.shape == (2, 7)
        assert torch.equal(features[0], model.stem(images)) and features[0].shape[2:] == (32, 32)
        assert [f.shape[1:] for f in features[1:]] == [(channels, side, side) for channels, side in sizes]
        assert torch.allclose(model.head(features[-1]), logits, atol=1e-5)


@pytest.mark.parametrize("arch, deviation", [  # of the second convolution of the first block
    ("preact_resnet34", 1 / (3 * 32 * 9) ** 0.5), ("preact_resnet18", 1 / (3 * 64 * 9) ** 0.5),  # PyTorch's
    ("wrn-10-2", (2 / (32 * 9)) ** 0.5), ("resnet8", (2 / (16 * 9)) ** 0.5),  # Kaiming's, fan-out
])  # fmt: skip
def test_initial_weights_have_the_deviation_of_the_authors_code(arch, deviation):
    weight = build_model(arch, 10).blocks[0][0].conv2.weight
    assert weight.std().item() == pytest.approx(deviation, rel=0.05)


def test_normalisation_is_part_of_the_model_and_of_its_checkpoint():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    plain, model = (
        build_model("wrn-10-1", 3).eval(),
        build_model("wrn-10-1", 3, 0.1, mean, std, image_size=40),
    )
    images = torch.rand(4, 3, 40, 40)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))  # dropout, in training only
        plain.load_state_dict({**model.state_dict(), "mean": plain.mean, "std": plain.std})
        expected = plain((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        again = common.load_model({"built_as": {"ema": model.built_as}, "ema": model.state_dict()}, "ema")
        assert torch.allclose(again(images), expected, atol=1e-5) and not again.training
    assert again.built_as == {"arch": "wrn-10-1", "num_classes": 3, "dropout": 0.1, "image_size": 40}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "shufflenet_v2"])
def test_photographs_get_the_library_s_architecture(arch, monkeypatch):
    """With the same weights the logits are those of torchvision's model."""
    made, get_model, x = [], torchvision.models.get_model, torch.rand(2, 3, 128, 128)
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda *a, **k: made.append(get_model(*a, **k)) or made[-1]
    )
    model = build_model(arch, 7, image_size=128).eval()
    for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(bn.bias)
    with torch.no_grad():
        assert torch.allclose(model(x), made[0].eval()(x), rtol=1e-3, atol=1e-4)


def test_pretrained_weights_but_for_a_classifier_of_another_size(monkeypatch):
    source, weights = torchvision.models.resnet18(), torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    in_file = {key: value for key, value in source.state_dict().items() if "num_batches_tracked" not in key}
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: in_file)
    net, whole = (build_model("resnet18", classes, image_size=224, pretrained=True) for classes in (7, 1000))
    assert torch.equal(net.stem[0].weight, source.conv1.weight) and net.head[-1].weight.shape == (7, 512)
    assert torch.equal(net.blocks[3][1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(whole.head[-1].weight, source.fc.weight)

    def offline(self, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    with pytest.raises(OSError, match="no route to host"):
        build_model("resnet18", 7, image_size=224, pretrained=True)


def test_predict_is_the_model_in_evaluation_mode_row_by_row():
    model, images = (
        build_model("wrn-10-1", 10).train(),
        torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8),
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    logits = common.predict(model, images, batch_size=7)
    model.amp = True
    half = common.predict(model, images)
    model.amp = False
    assert model.training and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert logits.dtype == half.dtype == torch.float32 and not logits.requires_grad
    # bfloat16: to its precision
    assert torch.allclose(half, logits, atol=0.1) and not torch.equal(half, logits)
    with torch.no_grad():
        assert torch.allclose(logits, model.eval()(images / 255), atol=1e-4)


class Standardised(torch.nn.Module):
    """0 / 0 for an image of one colour."""

    def forward(self, x):
        return (x / x.std((1, 2, 3), keepdim=True)).mean((2, 3))


def test_logits_that_are_nan_are_refused_and_not_class_0():
    """Except where a network diverges in training: its weights are not finite, which the epoch's end says."""
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    images[[3, 17]] = 0
    for training in (False, True):
        with pytest.raises(UsageError, match="^Standardised gives NaN for 2 of 30 images$"):
            common.predict(Standardised().train(training), images)
    model = build_model("wrn-10-1", 3)
    model.head[-1].bias.data[0] = torch.nan
    assert common.predict(model.train(), images).isnan().any()
    with pytest.raises(UsageError, match="^Classifier gives NaN for 30 of 30 images$"):
        common.predict(model.eval(), images)


@pytest.mark.parametrize("arch, options, says", [
    ("wrn-17-2", {}, "--arch: unknown 'wrn-17-2'; D is 10, 16, 22, …"),
    ("resnet19x4", {}, "--arch: unknown 'resnet19x4'; D is 8, 14, 20, …"),
    ("wrn-10-0", {}, "--arch: unknown 'wrn-10-0'; known are wrn-D-K, resnetD, .*, resnet18, .*, densenet169"),
    ("resnet18x4", {}, "--arch: unknown 'resnet18x4'; D is 8"),
    ("resnet8", {"dropout": 0.1}, "dropout: resnet8 has none; wrn-D-K has"),
    ("resnet18", {"pretrained": True}, "--pretrained: resnet18 at 32 pixels has none; resnet18, .* at 224"),
    ("shufflenet_v2", {"pretrained": True, "image_size": 224}, "--pretrained: shufflenet_v2 at 224 pixels"),
])  # fmt: skip
def test_what_does_not_exist_is_refused(arch, options, says):
    with pytest.raises(UsageError, match=f"^{says}"):
        build_model(arch, 10, **options)
