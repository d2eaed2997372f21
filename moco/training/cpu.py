"""Faster training on a CPU: memory that is not returned to the system, and bf16 where the processor is faster in it."""

import ctypes
import sys

import torch
from torch import nn
from torch.nn import functional


def is_faster_in_bf16(arch, compiled):
    """Whether this CPU trains the architecture faster in bf16 than in float32.

    A ResNeXt's grouped convolutions gain only when compiled, unless there are instructions for bf16 itself.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native or compiled or not arch.startswith("resnext")


def disable_malloc_trim():
    """Let the C library keep freed memory: Linux would clear each page that is returned and requested again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_max, trim_threshold = -4, -1  # numbers of glibc's malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


def replace_slow_bf16_modules(model):
    """Replace the modules of model that are slower in bf16 than in float32 on a CPU.

    The gradient of a strided depthwise convolution with respect to its input takes 10 to 50 times as long as without
    strides.
    """
    for module in model.modules():
        is_depthwise = type(module) is nn.Conv2d and module.groups == module.in_channels > 1
        is_zero_padded = is_depthwise and module.padding_mode == "zeros" and module.padding != "valid"
        if is_zero_padded and module.stride != (1, 1):
            module.__class__ = _StridedDepthwiseConv2d


class _StridedDepthwiseConv2d(nn.Conv2d):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        y = _StridedDepthwise.apply(x, self.weight.to(x.dtype), self.stride, self.padding, self.dilation)
        return y if self.bias is None else y + self.bias.to(x.dtype)[:, None, None]


class _StridedDepthwise(torch.autograd.Function):
    """A strided depthwise convolution whose gradient with respect to its input is that of the one without strides.

    The latter computes all positions, of which the former keeps some; the gradient of the others is 0.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding, dilation):
        ctx.save_for_backward(x, weight)
        ctx.layout = stride, padding, dilation
        return functional.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        (down, right), padding, dilation = ctx.layout

        def convolution_backward(gradient, stride, output_mask):
            options = (stride, padding, dilation, False, (0, 0), x.shape[1], output_mask)
            return torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)

        height, width = (
            side + 2 * pad - spread * (kernel - 1)
            for side, pad, spread, kernel in zip(x.shape[2:], padding, dilation, weight.shape[2:], strict=True)
        )
        shape = (len(x), len(weight), height, width)
        full = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).zero_()
        full[:, :, ::down, ::right] = gradient
        of_x = convolution_backward(full, (1, 1), (True, False, False))[0]
        of_weight = convolution_backward(gradient, (down, right), (False, True, False))[1]
        return of_x, of_weight, None, None, None
