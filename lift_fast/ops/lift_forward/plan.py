"""The inference plan: LiFT's evaluation-mode function as a few dense linear maps.

Two exact identities derive it from the module's weights, both applied in float64:

1. Each BatchNorm folds into the convolution before it.
2. The 2x2 transposed convolution and the first 3x3 convolution are one linear map: nothing non-linear lies between
   them, and the concatenation with the image features splits the sum. Output pixel (2i + a, 2j + b) reads, for each of
   the four phases (a, b), a 2x2 window of the coarse grid. The transposed convolution's bias reaches the output only
   through taps inside the image, so its contribution differs on the border: nine position classes.

Everything here is independent of the device; :mod:`lift_fast.ops.lift_forward` runs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Architecture(NamedTuple):
    """What the plan needs in addition to the weights."""

    image_blocks: int
    """Convolution blocks of the first image encoder, 0 for a network without image."""
    pool: bool
    """2x2 max pool after the first image encoder (patch 16)."""


class ImageConv(NamedTuple):
    """One 3x3 convolution of the image encoder with its BatchNorm folded in; ReLU follows."""

    weight: Tensor
    """[out, in, 3, 3]"""
    bias: Tensor
    """[out]"""
    stride: int


@dataclass(frozen=True)
class Plan:
    """LiFT in evaluation mode as linear maps, float64. c = C // 2, K = C + G, G = F = image channels.

    With coarse = [x, g, 1] on the h x w grid and f on the 2h x 2w grid, both zero outside::

        u[2i+a, 2j+b] = relu(  sum_pq  coarse[i+a-1+p, j+b-1+q] @ phase[a, b, p, q]
                             + sum_dd' f[2i+a+d-1, 2j+b+d'-1] @ fine[d, d']
                             + bias)
        v = relu(conv3x3(u, conv) + conv_bias)
        y = v @ out + out_bias
    """

    image_convs_1: tuple[ImageConv, ...]
    pool: bool
    image_convs_2: tuple[ImageConv, ...]
    phase: Tensor
    """[2, 2, 2, 2, K + 1, c]: phase row a, phase column b, coarse row p, coarse column q; last input row: the ones."""
    fine: Tensor
    """[3, 3, F, c]: tap row, tap column, in, out."""
    bias: Tensor
    """[c]"""
    conv: Tensor
    """[3, 3, c, c]: tap row, tap column, in, out."""
    conv_bias: Tensor
    """[c]"""
    out: Tensor
    """[c, C]"""
    out_bias: Tensor
    """[C]"""

    def in_basis(self) -> Plan:
        """The same network with its output in an orthonormal basis of the descriptors' span (identity 3).

        The C-channel descriptors are W v + b, of rank c + 1 at most. With the thin QR decomposition [W | b] = Q R they
        are Q (R [v; 1]). This plan returns the coordinates R [v; 1], c + 1 channels, which have the descriptors' inner
        products and norms.
        """
        _, r = span_basis(self.out.t(), self.out_bias)
        return replace(self, out=r[:, :-1].t().contiguous(), out_bias=r[:, -1].contiguous())

    def edge_bias(self) -> Tensor:
        """The bias plus the ones channel's contribution, ``[3, 3, c]``, for backends without a ones channel.

        It depends only on the position's class: 0 the first row (column) of the fine grid, 2 the last, 1 between.
        """
        # (phase a, coarse rows p inside the image) of each class.
        classes = ((0, slice(1, 2)), (0, slice(0, 2)), (1, slice(0, 1)))
        shares = [[self.phase[a, b, p, q, -1].sum((0, 1)) for b, q in classes] for a, p in classes]
        return torch.stack([torch.stack(row) for row in shares]) + self.bias


def weight_names(architecture: Architecture) -> list[str]:
    """State-dict names in the order in which :func:`build_plan` takes the weights."""
    norm = ("weight", "bias", "running_mean", "running_var")
    names: list[str] = []
    encoders = [("image_convs_1", 3 * i) for i in range(architecture.image_blocks)]
    if architecture.image_blocks:
        encoders.append(("image_convs_2", 0))
    for prefix, index in encoders:
        names += [f"{prefix}.{index}.weight", f"{prefix}.{index}.bias"]
        names += [f"{prefix}.{index + 1}.{entry}" for entry in norm]
    names += ["up1.up.weight", "up1.up.bias"]
    for index in (0, 3):
        names.append(f"up1.conv_1.double_conv.{index}.weight")
        names += [f"up1.conv_1.double_conv.{index + 1}.{entry}" for entry in norm]
    return [*names, "outc.weight", "outc.bias"]


def build_plan(weights: Sequence[Tensor], epsilons: Sequence[float], architecture: Architecture) -> Plan:
    """Fold and compose LiFT's weights.

    Args:
        weights: parameters and BatchNorm statistics in the order of :func:`weight_names`, any floating dtype.
        epsilons: epsilon of each BatchNorm in the same order.
        architecture: the network's shape.

    Raises:
        ValueError: if a weight is not finite or a running variance is negative; names the state-dict entry.
    """
    names = weight_names(architecture)
    # Composing takes milliseconds, once per set of weights.
    exact = [_to_float64(weight) for weight in weights]
    for name, weight in zip(names, exact, strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"LiFT's weight {name} holds NaN or infinite values; load a valid checkpoint")
        if name.endswith("running_var") and bool((weight < 0).any()):
            raise ValueError(f"LiFT's buffer {name} holds negative variances; load a valid checkpoint")
    queue = iter(exact)
    epsilon = iter(epsilons)

    def take(count: int) -> list[Tensor]:
        return [next(queue) for _ in range(count)]

    def image_conv(stride: int) -> ImageConv:
        weight, bias, *norm = take(6)
        scale, shift = batch_norm_affine(norm, next(epsilon))
        return ImageConv(weight * scale.view(-1, 1, 1, 1), bias * scale + shift, stride)

    # The first two blocks halve the grid each, further ones keep it.
    convs_1 = tuple(image_conv(stride=2 if i < 2 else 1) for i in range(architecture.image_blocks))
    convs_2 = (image_conv(stride=2),) if architecture.image_blocks else ()
    up_weight, up_bias = take(2)
    first_weight, *first_norm = take(5)
    second_weight, *second_norm = take(5)
    out_weight, out_bias = take(2)

    scale, shift = batch_norm_affine(first_norm, next(epsilon))
    first_weight = first_weight * scale.view(-1, 1, 1, 1)
    up_channels = up_weight.shape[1]
    second_scale, second_shift = batch_norm_affine(second_norm, next(epsilon))
    return Plan(
        image_convs_1=convs_1,
        pool=architecture.pool,
        image_convs_2=convs_2,
        phase=compose_upsample(first_weight[:, :up_channels], up_weight, up_bias),
        fine=first_weight[:, up_channels:].permute(2, 3, 1, 0).contiguous(),
        bias=shift,
        conv=(second_weight * second_scale.view(-1, 1, 1, 1)).permute(2, 3, 1, 0).contiguous(),
        conv_bias=second_shift,
        out=out_weight.flatten(1).t().contiguous(),
        out_bias=out_bias,
    )


def span_basis(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR decomposition of ``[weight | bias]``, the span of all descriptors ``weight @ v + bias``.

    Args:
        weight: ``[C, c]``, c < C.
        bias: ``[C]``.

    Returns:
        ``q [C, c + 1]`` with orthonormal columns and ``r [c + 1, c + 1]`` with a non-negative diagonal; float64 on the
        device of ``weight``, without gradients.
    """
    # On the CPU: it is small, and the coordinates are then the same on every device.
    q, r = torch.linalg.qr(torch.cat([weight, bias[:, None]], dim=1).detach().cpu().double())
    # The decomposition leaves each coordinate's sign open.
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return (q * sign).to(weight.device), (r * sign[:, None]).to(weight.device)


def batch_norm_affine(norm: Sequence[Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
    """Evaluation-mode BatchNorm ``[weight, bias, running_mean, running_var]`` as ``y = scale * x + shift``."""
    weight, bias, mean, variance = norm
    scale = weight / torch.sqrt(variance + epsilon)
    return scale, bias - mean * scale


def compose_upsample(conv: Tensor, up_weight: Tensor, up_bias: Tensor) -> Tensor:
    """Compose a 2x2 stride-2 transposed convolution with the 3x3 convolution that follows; differentiable.

    Args:
        conv: ``[c, U, 3, 3]``, the 3x3 convolution's kernel on the upsampled channels.
        up_weight: ``[K, U, 2, 2]``, the transposed convolution's kernel.
        up_bias: ``[U]``, carried as one more input channel that is 1 inside the image and 0 in the padding.

    Returns:
        ``phase [2, 2, 2, 2, K + 1, c]``, see :class:`Plan`.
    """
    ones = up_bias.view(1, -1, 1, 1).expand(1, -1, 2, 2)
    # one[dy, dx, s, t]: tap (dy, dx) applied to the upsampled sub-pixel (s, t), as a map from K + 1 to c channels.
    one = torch.einsum("oudx,kust->dxstko", conv, torch.cat([up_weight, ones]))
    phase = one.new_zeros((2, 2, 2, 2, *one.shape[-2:]))
    for a, b, dy, dx in itertools.product(range(2), range(2), range(3), range(3)):
        # Tap dy of output row 2i + a reads upsampled row 2i + a + dy - 1: coarse row i + (a + dy - 1) // 2.
        row, column = a + dy - 1, b + dx - 1
        phase[a, b, row // 2 - a + 1, column // 2 - b + 1] += one[dy, dx, row % 2, column % 2]
    return phase


def _to_float64(weight: Tensor) -> Tensor:
    # A pending negation would be lost, since the plan shares the memory of a float64 weight.
    weight = weight.detach().resolve_neg()
    # Not every accelerator computes in float64.
    if weight.device.type not in ("cpu", "cuda"):
        weight = weight.cpu()
    return weight.double()
