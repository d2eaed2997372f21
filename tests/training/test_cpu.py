"""Training on a CPU: what is led around slow bf16 still computes the same."""

import pytest
import torch
from torch import nn

from moco.networks import architectures
from moco.training import cpu


@pytest.mark.parametrize(
    "options, size",
    [
        (dict(out_channels=6, kernel_size=3, stride=2, padding=1, bias=False), (8, 8)),
        (dict(out_channels=6, kernel_size=3, stride=2, padding=1, bias=False), (7, 10)),
        (dict(out_channels=12, kernel_size=(5, 3), stride=(2, 3), padding=(2, 0), dilation=(1, 2)), (11, 13)),
    ],
)
def test_a_strided_depthwise_convolution_has_the_gradients_of_torch(options, size):
    torch.manual_seed(0)
    plain = nn.Conv2d(in_channels=6, groups=6, **options).double()
    ours = nn.Conv2d(in_channels=6, groups=6, **options).double()
    ours.load_state_dict(plain.state_dict())
    cpu.replace_slow_bf16_modules(ours)
    assert type(ours) is not nn.Conv2d
    image = torch.randn(2, 6, *size, dtype=torch.float64)
    found = []
    for layer in (plain, ours):
        x = image.clone().requires_grad_()
        y = layer(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
        found.append([y, x.grad, *(weight.grad for weight in layer.parameters())])
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain)


def test_under_autocast_it_takes_inputs_of_either_precision():
    layer = nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False)
    cpu.replace_slow_bf16_modules(layer)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 4, 6, 6).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32


def test_only_strided_depthwise_convolutions_are_replaced():
    model = architectures.build("mobilenet_v2", 5)
    cpu.replace_slow_bf16_modules(model)
    changed = [name for name, module in model.named_modules() if "Strided" in type(module).__name__]
    assert changed == [f"features.{block}.conv.1.0" for block in (2, 4, 7, 14)]


@pytest.mark.parametrize("options", [{"padding": 1, "padding_mode": "circular"}, {"padding": "valid"}])
def test_other_padding_is_left_alone(options):
    convolution = torch.nn.Conv2d(4, 4, 3, stride=2, groups=4, **options)
    cpu.replace_slow_bf16_modules(convolution)
    assert type(convolution) is torch.nn.Conv2d
