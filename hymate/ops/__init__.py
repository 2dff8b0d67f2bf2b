"""The selective-scan operators behind the Mamba mixers, and packed attention."""

from hymate.ops.attention import packed_attention
from hymate.ops.cpu import causal_conv1d, gated_rms_norm, selective_scan, ssd_scan

__all__ = ["causal_conv1d", "gated_rms_norm", "packed_attention", "selective_scan", "ssd_scan"]
