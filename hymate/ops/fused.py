"""The operators on a GPU: mamba_ssm's kernels, and causal_conv1d's where it is installed, behind the signatures of
reference.py.

Not yet run on a GPU. What the kernels cannot do is done around them: Mamba-1's take neither a segment index nor an
initial state nor a direction, so a packed row is cut at its segments and each one runs by itself; a scan in reverse
runs forward over the flipped row.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from hymate.config import UserError
from hymate.ops import compose
from hymate.ops.reference import gated_rms_norm

__all__ = ["causal_conv1d", "gated_rms_norm", "mamba1", "mamba2", "selective_scan", "ssd_scan"]

HAS_CAUSAL_CONV1D = importlib.util.find_spec("causal_conv1d") is not None


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
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's chunked scan, which takes a segment index."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    events = [x_BLHP, dt_BLH, B_BLGN.to(x_BLHP.dtype), C_BLGN.to(x_BLHP.dtype)]
    segment = None if segment_BL is None else segment_BL - segment_BL[:, :1]  # a state only enters segment 0
    if reverse:
        events = [event.flip(1) for event in events]
        segment = _flipped(segment)
    x, dt, B, C = events
    y, final = mamba_chunk_scan_combined(
        x,
        dt,
        A_H,
        B,
        C,
        chunk_size=chunk_size,
        D=D_H,
        seq_idx=None if segment is None else segment.int().contiguous(),
        initial_states=initial_state_BHPN,
        return_final_states=True,
    )
    y = y.flip(1) if reverse else y
    return y, final


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDN: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan, one kernel call a segment."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    if initial_state_BDN is not None:
        raise UserError("mamba_ssm's Mamba-1 kernel takes no initial state: use HYMATE_OPS=reference")
    events = [event.transpose(1, 2) for event in (x_BLD, dt_BLD, B_BLN, C_BLN)]
    if reverse:
        events = [event.flip(2) for event in events]
    rows, states = [], []
    for row in range(x_BLD.shape[0]):
        lengths = _segment_lengths(segment_BL, row, x_BLD.shape[1])
        pieces = zip(
            *(event[row : row + 1].split(lengths[:: -1 if reverse else 1], 2) for event in events), strict=True
        )
        outputs = []
        for x, dt, B, C in pieces:
            y, state = selective_scan_fn(
                x.contiguous(), dt.to(x.dtype), A_DN, B.contiguous(), C.contiguous(), D_D, return_last_state=True
            )
            outputs.append(y)
        rows.append(torch.cat(outputs, dim=2))
        states.append(state)
    y = torch.cat(rows)
    y = (y.flip(2) if reverse else y).transpose(1, 2)
    return y, torch.cat(states)


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDK1: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """causal_conv1d with its segment index, or plain PyTorch without it; a carried state is put in front of the row."""
    past = weight_DK.shape[1] - 1
    x, segment = x_BLD, segment_BL
    if reverse:
        x, segment = x.flip(1), _flipped(segment)
    if initial_state_BDK1 is not None:
        x = torch.cat([initial_state_BDK1.transpose(1, 2).to(x), x], dim=1)
        segment = None if segment is None else F.pad(segment[:, None].float(), (past, 0), "replicate")[:, 0].int()
    convolve = _kernel_conv1d if HAS_CAUSAL_CONV1D else _plain_conv1d
    bias = None if bias_D is None else bias_D.to(x.dtype)
    y = convolve(x, weight_DK.to(x.dtype), bias, segment)[:, -x_BLD.shape[1] :]
    last = F.pad(x, (0, 0, past, 0))[:, -past:]
    if segment is not None:
        same = F.pad(segment, (past, 0), value=-1)[:, -past:] == segment[:, -1:]
        last = last * same[..., None]
    return y.flip(1) if reverse else y, last.transpose(1, 2)


def _kernel_conv1d(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, segment_BL: Tensor | None) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(
        x_BLD.contiguous().transpose(1, 2),  # the rows of a wider matrix are seldom aligned as it wants
        weight_DK,
        bias_D,
        seq_idx=None if segment_BL is None else segment_BL.int().contiguous(),
        activation="silu",
    ).transpose(1, 2)


def _plain_conv1d(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, segment_BL: Tensor | None) -> Tensor:
    length = x_BLD.shape[1]
    y = x_BLD * weight_DK[:, -1]
    for back in range(1, min(weight_DK.shape[1], length)):
        before = x_BLD[:, :-back]
        if segment_BL is not None:
            before = before * (segment_BL[:, back:] == segment_BL[:, :-back])[..., None]
        y = y + F.pad(before, (0, 0, back, 0)) * weight_DK[:, -1 - back]
    return F.silu(y if bias_D is None else y + bias_D)


def _flipped(segment_BL: Tensor | None) -> Tensor | None:
    return None if segment_BL is None else (segment_BL[:, -1:] - segment_BL).flip(1)


def _segment_lengths(segment_BL: Tensor | None, row: int, length: int) -> list[int]:
    if segment_BL is None:
        return [length]
    segment = segment_BL[row]
    cuts = [0, *(torch.nonzero(segment[1:] != segment[:-1])[:, 0] + 1).tolist(), length]
    return [stop - start for start, stop in itertools.pairwise(cuts)]


mamba1 = functools.partial(compose.mamba1, sys.modules[__name__])
mamba2 = functools.partial(compose.mamba2, sys.modules[__name__])
