"""The likelihood of when each of many codes comes next, in pieces: the hazards of all are never there at once.

Shape legend: A anchors, J bins of time, R rank, V codes, N codes that came after their anchors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIECE = 1 << 21  # hazards at once: 8 MB in float32, which a last-level cache still holds


def linear_hazard_loss(
    x_AJR: Tensor,
    weight_VR: Tensor,
    bias_V: Tensor,
    at_risk_AJ: Tensor,
    anchor_N: Tensor,
    code_N: Tensor,
    bin_N: Tensor,
    spared_NJ: Tensor,
    lengths: list[int],
) -> Tensor:
    """Minus the log-likelihood of piecewise-constant hazards exp(x @ weight.T + bias), summed over anchors and codes.

    at_risk_AJ: hours in each bin for which a code is at risk that does not come until the record ends.
    anchor_N, code_N, bin_N: int64, which code came after which anchor, and in which bin; the anchors never decrease.
    spared_NJ: hours of at_risk_AJ for which such a code was no longer at risk, because it had come.
    lengths: A Python ints, how many codes came after each anchor.

    As `linear_cross_entropy`, the forward already computes the gradients, and no hazards are kept or computed twice.
    Under autocast the products are in its dtype; hazards, hours and sums are at least float32.
    """
    device = x_AJR.device.type
    if torch.is_autocast_enabled(device):
        x_AJR, weight_VR = (t.to(torch.get_autocast_dtype(device)) for t in (x_AJR, weight_VR))
    with torch.autocast(device, enabled=False):
        events = (at_risk_AJ, anchor_N, code_N, bin_N, spared_NJ, lengths)
        return _LinearHazardLoss.apply(x_AJR, weight_VR, bias_V, *events, torch.is_grad_enabled())


class _LinearHazardLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_AJR: Tensor,
        weight_VR: Tensor,
        bias_V: Tensor,
        at_risk_AJ: Tensor,
        anchor_N: Tensor,
        code_N: Tensor,
        bin_N: Tensor,
        spared_NJ: Tensor,
        lengths: list[int],
        keep: bool,
    ) -> Tensor:
        (V, _), J = weight_VR.shape, x_AJR.shape[1]
        wide = torch.float64 if x_AJR.dtype == torch.float64 else torch.float32
        loss, dx_AJR = x_AJR.new_zeros((), dtype=wide), torch.empty_like(x_AJR)
        dweight_VR, dbias_V = (torch.zeros_like(t, dtype=wide) for t in (weight_VR, bias_V))
        size, came, bin_J = max(1, PIECE // (J * V)), 0, torch.arange(J, device=x_AJR.device)
        for first in range(0, len(x_AJR), size):
            piece = slice(first, first + size)
            own = slice(came, came := came + sum(lengths[piece]))
            x = x_AJR[piece].flatten(0, 1)
            hazard = F.linear(x, weight_VR).to(wide)  # its logarithm at first
            hazard += bias_V
            at_nJ = ((anchor_N[own, None] - first) * J + bin_J) * V + code_N[own, None]
            loss -= hazard.view(-1)[at_nJ].gather(1, bin_N[own, None]).sum()
            hazard.exp_()
            spared_nJ = hazard.view(-1)[at_nJ] * spared_NJ[own]
            hazard *= at_risk_AJ[piece].reshape(-1, 1)
            hazard.view(-1).index_add_(0, at_nJ.flatten(), -spared_nJ.flatten())
            loss += hazard.sum()
            if keep:
                came_n = torch.ones_like(spared_nJ[:, 0])
                hazard.view(-1).index_add_(0, at_nJ.gather(1, bin_N[own, None])[:, 0], -came_n)
                dbias_V += hazard.sum(dim=0)
                dlog = hazard.to(x.dtype)
                dx_AJR[piece] = (dlog @ weight_VR).view(-1, J, x.shape[1])
                dweight_VR += dlog.T @ x
        if keep:
            ctx.save_for_backward(dx_AJR, dweight_VR.to(weight_VR.dtype), dbias_V.to(bias_V.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * dloss for gradient in ctx.saved_tensors), None, None, None, None, None, None, None
