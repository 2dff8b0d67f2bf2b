"""Cross-entropy over a large vocabulary, in pieces: the logits of all events are never there at once.

Shape legend: N events, D width, V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIECE = 1 << 21  # logits at once: 8 MB in float32, which a last-level cache still holds


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over events of the cross-entropy of the logits x @ weight.T + bias, and how many targets have the highest.

    Memory is that of one piece of logits, besides the gradients of x, weight and bias, which the forward already
    computes: the loss is a sum, so they only wait to be scaled, and no logits are kept or computed twice. Under
    autocast the products are in its dtype; the softmax and the sums over events are at least float32.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        x_ND, weight_VD, bias_V = (t.to(torch.get_autocast_dtype(device)) for t in (x_ND, weight_VD, bias_V))
    with torch.autocast(device, enabled=False):
        loss, hits = _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, target_N, torch.is_grad_enabled())
    return loss, hits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        V = len(weight_VD)
        wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        loss, hits = x_ND.new_zeros((), dtype=wide), x_ND.new_zeros((), dtype=wide)
        dx_ND = torch.empty_like(x_ND)
        dweight_VD, dbias_V = (torch.zeros_like(t, dtype=wide) for t in (weight_VD, bias_V))
        size = max(1, PIECE // V)
        for x, dx, target in zip(x_ND.split(size), dx_ND.split(size), target_N.split(size), strict=True):
            log_p = F.log_softmax(F.linear(x, weight_VD, bias_V), dim=-1, dtype=wide)
            loss -= log_p.gather(1, target[:, None]).sum()
            hits += (log_p.argmax(dim=-1) == target).sum()
            if keep:
                dlogits = log_p.exp_().scatter_add_(1, target[:, None], log_p.new_full((len(x), 1), -1.0))
                dbias_V += dlogits.sum(dim=0)
                dlogits = dlogits.to(x.dtype)
                dx.copy_(dlogits @ weight_VD)
                dweight_VD += dlogits.T @ x
        if keep:
            ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype), dbias_V.to(bias_V.dtype))
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * dloss for gradient in ctx.saved_tensors), None, None
