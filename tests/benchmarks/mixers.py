"""Forward + backward of the Mamba mixers against their own projections and the peers, side by side in one run.

    python tests/benchmarks/mixers.py [--quick] [--repeats 15]

Correctness first: our mixers with the peers' weights must give the peers' outputs. Then every candidate runs once in
turn, again and again; a ratio is that of two medians, and in brackets that of two minima, which others who use the
machine disturb least.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import transformers
from mambapy.mamba import MambaBlock, MambaConfig
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as PeerMixer

from hymate.model.mixers import Mamba1Mixer, Mamba2Mixer
from hymate.training.memory import keep_freed_memory

BATCH, EVENTS, D_MODEL, D_STATE, HEADDIM, D_STATE_1 = 4, 1024, 128, 64, 64, 16
LONG = 65_536  # events in one row, against as many in rows of EVENTS

Times = dict[str, list[float]]


def peer_mamba2(chunk_size: int) -> PeerMixer:
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
    """A mixer's two matrix products and nothing else: the floor."""

    def __init__(self, mixer: Mamba1Mixer | Mamba2Mixer) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.d_inner = mixer.in_proj, mixer.out_proj, mixer.d_inner

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.out_proj(self.in_proj(x_BLD)[..., : self.d_inner])


def assert_same(mixer: nn.Module, peer: nn.Module, x_BLD: Tensor) -> None:
    peer.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(mixer(x_BLD), peer(x_BLD), rtol=1e-3, atol=1e-4)


def measure(calls: Mapping[str, tuple[nn.Module, Tensor]], repeats: int) -> Times:
    """Milliseconds of forward + backward, interleaved; the first call of each warms up."""
    times: Times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, (module, x_BLD) in calls.items():
            start = time.perf_counter()
            module(x_BLD).sum().backward()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def ratio(times: Times, numerator: str, denominator: str) -> str:
    middle, least = (reduce(times[numerator]) / reduce(times[denominator]) for reduce in (statistics.median, min))
    return f"{middle:.2f} ({least:.2f})"


def table(times: Times) -> None:
    print("| mixer | ms, median (min to max) |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 repeats, and an eighth of the events in the long rows")
    options = parser.parse_args()
    repeats, long = (3, LONG // 8) if options.quick else (options.repeats, LONG)
    torch.manual_seed(0)
    ours: dict[str, Callable[[], Mamba1Mixer | Mamba2Mixer]] = {
        "Mamba2Mixer": lambda: Mamba2Mixer(D_MODEL, d_state=D_STATE, headdim=HEADDIM),
        "Mamba1Mixer": lambda: Mamba1Mixer(D_MODEL, d_state=D_STATE_1),
    }
    mamba2, mamba1 = (build() for build in ours.values())
    peer256, peer64 = peer_mamba2(256), peer_mamba2(64)  # 256 is the default
    mambapy = MambaBlock(MambaConfig(d_model=D_MODEL, n_layers=1, d_state=D_STATE_1))
    x_BLD = torch.randn(BATCH, EVENTS, D_MODEL, requires_grad=True)
    for mixer, peer in ((mamba2, peer256), (mamba2, peer64), (mamba1, mambapy)):
        assert_same(mixer, peer, x_BLD)

    print(f"batch {BATCH}, {EVENTS:,} events, d_model {D_MODEL}, d_state {D_STATE} (Mamba-1: {D_STATE_1}), float32")
    print(f"forward + backward, {torch.get_num_threads()} threads, {platform.machine()}, {repeats} repeats")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    modules = {
        "projections of Mamba2Mixer": Projections(mamba2),
        "hymate Mamba2Mixer": mamba2,
        "transformers Mamba2Mixer, PyTorch path, chunks of 256": peer256,
        "transformers Mamba2Mixer, PyTorch path, chunks of 64": peer64,
        "projections of Mamba1Mixer": Projections(mamba1),
        "hymate Mamba1Mixer": mamba1,
        "mambapy MambaBlock": mambapy,
    }
    times = measure({name: (module, x_BLD) for name, module in modules.items()}, repeats)
    table(times)
    keep_freed_memory()  # as every training process does; the peers above ran without
    rows = {
        f"{name}, {batch} x {events:,}": (build(), torch.randn(batch, events, D_MODEL, requires_grad=True))
        for name, build in ours.items()
        for batch, events in ((long // EVENTS, EVENTS), (1, long))
    }
    lengths = measure(rows, max(3, repeats // 3))
    print()
    table(lengths)

    print("\n| ratio | median (of minima) | target |\n|---|---|---|")
    chunks = "transformers Mamba2Mixer, PyTorch path, chunks of"
    for what, numerator, denominator, target in (
        ("Mamba-2 / its projections", "hymate Mamba2Mixer", "projections of Mamba2Mixer", "at most 2.5"),
        ("transformers, chunks of 256 / Mamba-2", f"{chunks} 256", "hymate Mamba2Mixer", "at least 3.5"),
        ("transformers, chunks of 64 / Mamba-2", f"{chunks} 64", "hymate Mamba2Mixer", ""),
        ("Mamba-1 / its projections", "hymate Mamba1Mixer", "projections of Mamba1Mixer", ""),
        ("mambapy / Mamba-1", "mambapy MambaBlock", "hymate Mamba1Mixer", "at least 15"),
    ):
        print(f"| {what} | {ratio(times, numerator, denominator)} | {target} |")
    for name in ours:
        one, many = f"{name}, 1 x {long:,}", f"{name}, {long // EVENTS} x {EVENTS:,}"
        print(f"| {name}: an event in a row of {long:,} / of {EVENTS:,} | {ratio(lengths, one, many)} | at most 1.1 |")


if __name__ == "__main__":
    main()
