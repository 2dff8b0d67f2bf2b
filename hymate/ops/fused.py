"""The operators on a GPU: mamba_ssm's kernels, and causal_conv1d's where it is installed, behind the signatures of
reference.py.

Not yet run on a GPU. Tests run all of this file on a CPU, against the reference, over stand-ins that refuse what the
kernels refuse (tests/support/kernel_standins.py). mamba_ssm's own Triton kernels, Mamba-2's scan and the gated norm,
also run there, in Triton's interpreter (`make kernels`); its Mamba-1 scan and causal_conv1d are CUDA and never ran.

What a kernel can't do is done around it, with the reason beside it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hymate.ops import compose, reference

__all__ = ["causal_conv1d", "gated_rms_norm", "mamba1", "mamba2", "selective_scan", "ssd_scan"]


def _imports(module: str) -> bool:
    """Whether it can be used: what was built for another PyTorch is found, but does not import."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


HAS_CAUSAL_CONV1D = _imports("causal_conv1d")
WIDEST_NORM_BYTES = 1 << 16  # of a group: more does not fit the norm's kernel
FORGETTING = 110.0  # exp(-110) is 0 in float32, and less than float64 can add to 1


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int = 64,
    segment_BL: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's chunked scan, which takes a segment index."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    segment = None if segment_BL is None else segment_BL - segment_BL[:, :1]  # a state only enters segment 0
    return mamba_chunk_scan_combined(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLGN,
        C_BLGN,
        chunk_size=chunk_size,
        D=D_H,
        seq_idx=None if segment is None else segment.int().contiguous(),
        initial_states=initial_state_BHPN,
        return_final_states=True,
    )


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    dt_bias_D: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan, one kernel call for all rows. A gradient of the last state is refused: the kernel has none."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C = (events.transpose(1, 2).contiguous() for events in (x_BLD, dt_BLD, B_BLN, C_BLN))
    scanned_x, scanned_dt = x, dt
    if segment_BL is not None:  # the kernel takes none; recomputed in the backward, for its float32 tensors are large
        first_BL = F.pad(segment_BL[:, 1:] != segment_BL[:, :-1], (1, 0))
        scanned_x, scanned_dt = checkpoint(
            _forget_before, x, dt, dt_bias_D, A_DN, first_BL, use_reentrant=False, preserve_rng_state=False
        )
    y, last = selective_scan_fn(
        scanned_x, scanned_dt, A_DN, B, C, D_D, delta_bias=dt_bias_D, delta_softplus=True, return_last_state=True
    )
    if segment_BL is not None:  # what the kernel's D x lacks, 0 but at first events
        y = (y + D_D[:, None] * (x - scanned_x)).to(y.dtype)
    if initial_state_BDN is not None:  # the kernel takes none
        added, left = _from_state(initial_state_BDN, dt, dt_bias_D, A_DN, C, segment_BL)
        y, last = y + added.to(y.dtype), last + left
    return y.transpose(1, 2), _WithoutGradient.apply(last)


def _forget_before(x_BDL: Tensor, dt_BDL: Tensor, dt_bias_D: Tensor, A_DN: Tensor, first_BL: Tensor) -> Any:
    """x and dt with which the scan forgets what was before each `first` event.

    There dt is so large that all decays are 0, and x is smaller by as much, so that dt x B stays. What the kernel then
    finds for the gradient of dt's bias there is taken back through x.

    Two limits. A state that is not finite goes on into the next segments (0 times infinity). And where |A| is far below
    1, A's gradient loses digits: at such an event the kernel finds not quite 0, and multiplies it by dt.
    """
    bias_D1, first_B1L = dt_bias_D[:, None], first_BL[:, None]
    with torch.no_grad():
        large_D1 = (FORGETTING / A_DN.abs().amin(1, keepdim=True).clamp(max=1) - bias_D1).to(dt_BDL.dtype)
    factor_BDL = F.softplus(dt_BDL + bias_D1) / F.softplus(large_D1 + bias_D1)  # of dt as rounded: float32 + bfloat16
    x = torch.where(first_B1L, (x_BDL * factor_BDL).to(x_BDL.dtype), x_BDL)
    return x, torch.where(first_B1L, large_D1, dt_BDL)


def _from_state(
    state_BDN: Tensor, dt_BDL: Tensor, dt_bias_D: Tensor, A_DN: Tensor, C_BNL: Tensor, segment_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a state adds to the outputs (B, D, L) of the first segment, and what is left of it (B, D, N) at the end."""
    elapsed_BDL = F.softplus(dt_BDL + dt_bias_D[:, None]).cumsum(-1)
    added_BDL = torch.zeros_like(elapsed_BDL)
    for n, A_D in enumerate(A_DN.unbind(1)):  # one by one: (B, D, L, N) would be N times a row's events
        added_BDL = added_BDL + C_BNL[:, n, None] * state_BDN[:, :, n, None] * torch.exp(A_D[:, None] * elapsed_BDL)
    left_BDN = state_BDN * torch.exp(A_DN * elapsed_BDL[:, :, -1:])
    if segment_BL is not None:
        first_B1L = (segment_BL == segment_BL[:, :1])[:, None]
        added_BDL, left_BDN = added_BDL * first_B1L, left_BDN * first_B1L[:, :, -1:]
    return added_BDL, left_BDN


class _WithoutGradient(torch.autograd.Function):
    """A state whose gradient the kernel would leave out without a word; a copy, for the kernel's keeps all chunks'."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise AssertionError("Mamba-1's kernel has no gradient of its last state")


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """mamba_ssm's kernel, which keeps no float32 copies; the plain norm for groups that are too wide for it."""
    if group_size * x.element_size() > WIDEST_NORM_BYTES:
        return reference.gated_rms_norm(x, z, weight, eps, group_size)
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(x, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDK1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """causal_conv1d with its segment index; plain PyTorch without it, and for what it refuses."""
    past, x, segment = weight_DK.shape[1] - 1, x_BLD, segment_BL
    if initial_state_BDK1 is not None:  # put in front of the row: with a segment index the kernel takes no state
        x = torch.cat([initial_state_BDK1.transpose(1, 2).to(x), x], dim=1)
        segment = None if segment is None else torch.cat([segment[:, :1].expand(-1, past), segment], dim=1)
    channels, length = x.shape[2], x.shape[1]
    # of one event, strides say nothing, and the kernel judges by those of the gradient, too
    taken = HAS_CAUSAL_CONV1D and 2 <= weight_DK.shape[1] <= 4 and channels % 8 == 0 and length > 1
    y = (_kernel_conv1d if taken else _plain_conv1d)(x, weight_DK, bias_D, segment)
    last = x[:, max(0, length - past) :]
    last = F.pad(last, (0, 0, past - last.shape[1], 0))  # a copy: a view would keep the row
    if segment is not None:
        end = segment[:, max(0, length - past) :]
        last = last * (F.pad(end, (past - end.shape[1], 0), value=-1) == segment[:, -1:])[..., None]
    return y[:, length - x_BLD.shape[1] :], last.transpose(1, 2)


def _kernel_conv1d(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, segment_BL: Tensor | None) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    # columns of a wider matrix are read in place where its rows are a multiple of 8 wide, as the kernel wants them
    aligned = all(number % 8 == 0 for number in (*x_BLD.stride()[:2], x_BLD.storage_offset())) and x_BLD.stride(2) == 1
    x_BLD = x_BLD if aligned else x_BLD.clone(memory_format=torch.contiguous_format)
    segment = None if segment_BL is None else segment_BL.int().contiguous()
    return causal_conv1d_fn(x_BLD.transpose(1, 2), weight_DK, bias_D, seq_idx=segment, activation="silu").transpose(
        1, 2
    )


def _plain_conv1d(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, segment_BL: Tensor | None) -> Tensor:
    y = x_BLD * weight_DK[:, -1]
    for back in range(1, min(weight_DK.shape[1], x_BLD.shape[1])):
        before = x_BLD[:, :-back]
        if segment_BL is not None:
            before = before * (segment_BL[:, back:] == segment_BL[:, :-back])[..., None]
        y = y + F.pad(before, (0, 0, back, 0)) * weight_DK[:, -1 - back]
    return F.silu(y if bias_D is None else y + bias_D).to(x_BLD.dtype)


_composed = compose.Composed(causal_conv1d, ssd_scan, selective_scan, gated_rms_norm)
mamba1, mamba2 = _composed.mamba1, _composed.mamba2
