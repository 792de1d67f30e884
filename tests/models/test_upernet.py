"""Neck and heads: parameter counts, transformers' heads as an oracle, the keyed dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_nepa.models.draws import channel_dropout_factors
from megatron_nepa.models.pyramid import FeaturePyramid
from megatron_nepa.models.upernet import ConvNormRelu, FcnHead, UperNetHead
from megatron_nepa.parallel.batch_norm import BatchNorm
from megatron_nepa.parallel.parameters import initialize_parameters
from megatron_nepa.parallel.topology import TensorGroup

WIDTH, CLASSES, SEED = 32, 7, 3


def drawn(module: nn.Module) -> nn.Module:
    """Initialised, with weights and statistics of the norms away from 1 and 0."""
    initialize_parameters(module, SEED, 0.02, TensorGroup())
    generator = torch.Generator().manual_seed(SEED)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            for tensor in (part.weight.data, part.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (part.bias.data, part.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def levels() -> list[Tensor]:
    """A pyramid of two samples over an odd grid: 9 x 7 patches."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((36, 28), (18, 14), (9, 7), (4, 3))
    return [torch.randn(2, WIDTH, *size, generator=generator) for size in sizes]


def test_parameter_counts_at_width_768() -> None:
    """mmsegmentation's numbers for 150 classes: head 67.96M, neck 7.08M, auxiliary head 1.81M."""

    def count(module: nn.Module) -> float:
        return round(sum(param.numel() for param in module.parameters()) / 1e6, 2)

    with torch.device("meta"):
        assert count(UperNetHead(768, 150, BatchNorm, SEED)) == 67.96
        assert count(FeaturePyramid(768, BatchNorm)) == 7.08
        assert count(FcnHead(768, 256, 150, BatchNorm, SEED)) == 1.81


def test_pyramid_scales_and_values() -> None:
    """4, 2, 1 and 1/2 of the patch grid, equal to torch's own layers with the same weights."""
    neck = drawn(FeaturePyramid(WIDTH, BatchNorm)).eval()
    assert isinstance(neck, FeaturePyramid)
    maps = [torch.randn(2, WIDTH, 9, 7, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    quadruple, double, same, half = neck(maps)
    assert [x.shape[2:] for x in (quadruple, double, same, half)] == [(36, 28), (18, 14), (9, 7), (4, 3)]
    assert torch.equal(same, maps[2])
    assert torch.equal(half, nn.MaxPool2d(2)(maps[3]))

    def transposed(weight: Tensor, bias: Tensor) -> nn.Module:
        layer = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    norm = nn.BatchNorm2d(WIDTH).eval()
    norm.load_state_dict(neck.norm.state_dict(), strict=False)
    first, second = (transposed(part.weight, part.bias) for part in (neck.upsample1, neck.upsample2))
    torch.testing.assert_close(quadruple, nn.Sequential(first, norm, nn.GELU(), second)(maps[0]))
    torch.testing.assert_close(double, transposed(neck.upsample.weight, neck.upsample.bias)(maps[1]))


def test_first_weights() -> None:
    """Kaiming's spread for convolutions, 0.01 for the classifier, torch's for transposed convolutions, 0 for biases."""
    head, neck = UperNetHead(WIDTH, CLASSES, BatchNorm, SEED), FeaturePyramid(WIDTH, BatchNorm)
    for module in (head, neck):
        initialize_parameters(module, SEED, 0.02, TensorGroup())
        assert all(param.isfinite().all() for param in module.parameters())
    for weight, std in (
        (head.fusion.weight, (2 / (9 * WIDTH)) ** 0.5),
        (head.classifier.weight, 0.01),
        (neck.upsample.weight, nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2).weight.std()),
    ):
        assert 0.9 < weight.std() / std < 1.1
    assert not head.classifier.bias.any()


def copied(conv: ConvNormRelu, prefix: str) -> dict[str, Tensor]:
    """The weights of one convolution under transformers' names."""
    state = {f"{prefix}.conv.weight": conv.weight}
    return state | {f"{prefix}.batch_norm.{name}": value for name, value in conv.norm.state_dict().items()}


def test_heads_equal_transformers() -> None:
    """UperNetHead and UperNetFCNHead with copied weights give the same logits."""
    upernet = pytest.importorskip(
        "transformers.models.upernet.modeling_upernet", reason="transformers is the oracle: pip install transformers"
    )
    from transformers import UperNetConfig

    config = UperNetConfig(
        backbone_config={"model_type": "resnet"}, hidden_size=WIDTH, auxiliary_channels=16, auxiliary_in_channels=WIDTH
    )
    config.num_labels = CLASSES
    samples = torch.arange(2)

    head = drawn(UperNetHead(WIDTH, CLASSES, BatchNorm, SEED)).eval()
    assert isinstance(head, UperNetHead)
    state = {"classifier.weight": head.classifier.weight, "classifier.bias": head.classifier.bias}
    state |= copied(head.bottleneck, "bottleneck") | copied(head.fusion, "fpn_bottleneck")
    for ours, theirs in ((head.lateral, "lateral_convs"), (head.smooth, "fpn_convs"), (head.pooled, "psp_modules")):
        for i, conv in enumerate(ours):
            assert isinstance(conv, ConvNormRelu)
            state |= copied(conv, f"{theirs}.{i}" + (".1" if theirs == "psp_modules" else ""))
    oracle = upernet.UperNetHead(config, [WIDTH] * 4).eval()
    load(oracle, state)
    torch.testing.assert_close(head(levels(), samples), oracle(levels()), rtol=1e-5, atol=1e-6)

    auxiliary = drawn(FcnHead(WIDTH, 16, CLASSES, BatchNorm, SEED)).eval()
    assert isinstance(auxiliary, FcnHead)
    state = {"classifier.weight": auxiliary.classifier.weight, "classifier.bias": auxiliary.classifier.bias}
    oracle = upernet.UperNetFCNHead(config, [WIDTH] * 4).eval()
    load(oracle, state | copied(auxiliary.conv, "convs.0"))
    torch.testing.assert_close(auxiliary(levels()[2], samples), oracle(levels()), rtol=1e-5, atol=1e-6)


def load(oracle: nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing


def test_dropout_belongs_to_the_sample() -> None:
    """In training a tenth of the channels of a sample is dropped, whatever batch it stands in."""
    factors = channel_dropout_factors(0.1, 4000, "upernet", SEED, torch.arange(5))
    assert set(factors.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    assert 0.08 < (factors == 0).float().mean() < 0.12
    assert torch.equal(factors[3:4], channel_dropout_factors(0.1, 4000, "upernet", SEED, torch.tensor([3])))
    assert not torch.equal(factors, channel_dropout_factors(0.1, 4000, "fcn", SEED, torch.arange(5)))

    classifier = drawn(UperNetHead(WIDTH, CLASSES, BatchNorm, SEED)).classifier
    x, samples = levels()[0], torch.tensor([8, 9])
    both = classifier(x, samples)
    torch.testing.assert_close(both[1:], classifier(x[1:], samples[1:]))
    assert not torch.allclose(both, classifier(x, samples + 2))
    assert torch.equal(classifier.eval()(x, samples), classifier(x, samples + 2))
