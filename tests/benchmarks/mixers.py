"""Forward + backward of one Mamba mixer against its own projections and the peers, side by side in one run.

    python tests/benchmarks/mixers.py [--repeats 7] [--mambapy]

Correctness first: our mixer with transformers' weights must give transformers' output.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as PeerMixer

from hymate.model import Mamba1Mixer, Mamba2Mixer

BATCH, EVENTS, D_MODEL, D_STATE, HEADDIM = 4, 1024, 128, 64, 64


def peer_mixer(chunk_size: int) -> PeerMixer:
    config = Mamba2Config(
        hidden_size=D_MODEL,
        state_size=D_STATE,
        head_dim=HEADDIM,
        num_heads=2 * D_MODEL // HEADDIM,
        expand=2,
        n_groups=1,
        chunk_size=chunk_size,
        num_hidden_layers=1,
        use_bias=False,
        rms_norm=True,
    )
    return PeerMixer(config, layer_idx=0)


class Projections(nn.Module):
    """The mixer's two matrix products and nothing else: the floor."""

    def __init__(self, mixer: Mamba2Mixer) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.d_inner = mixer.in_proj, mixer.out_proj, mixer.d_inner

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.out_proj(self.in_proj(x_BLD)[..., : self.d_inner])


def milliseconds(module: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    module(x).sum().backward()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--mambapy", action="store_true", help="also time mambapy's Mamba-1 (about 1 s a repeat)")
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(BATCH, EVENTS, D_MODEL, requires_grad=True)
    ours = Mamba2Mixer(D_MODEL, d_state=D_STATE, headdim=HEADDIM)
    peers = {f"transformers Mamba2Mixer, PyTorch path, chunks of {size}": peer_mixer(size) for size in (256, 64)}
    for peer in peers.values():
        peer.load_state_dict(ours.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours(x), peer(x), rtol=1e-3, atol=1e-4)
    candidates: dict[str, Callable[[Tensor], Tensor]] = {
        "its two projections alone": Projections(ours),
        "hymate Mamba2Mixer": ours,
        **peers,  # 256 is its default
        "hymate Mamba1Mixer (d_state 16)": Mamba1Mixer(D_MODEL, d_state=16),
    }
    if options.mambapy:
        from mambapy.mamba import MambaBlock, MambaConfig

        candidates["mambapy MambaBlock (d_state 16)"] = MambaBlock(MambaConfig(d_model=D_MODEL, n_layers=1, d_state=16))
    for module in candidates.values():
        milliseconds(module, x)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, module in candidates.items():
            times[name].append(milliseconds(module, x))
    floor = statistics.median(times["its two projections alone"])
    print(f"batch {BATCH}, {EVENTS} events, d_model {D_MODEL}, d_state {D_STATE}; float32, forward + backward")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}"
    )
    print("| mixer | ms, median (min to max) | times its projections |\n|---|---|---|")
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.1f} ({min(values):.1f} to {max(values):.1f}) | {middle / floor:.2f} |")


if __name__ == "__main__":
    main()
