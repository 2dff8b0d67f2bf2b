"""Whole encoders on one history of 1,024 to 65,536 events, forward + backward, beside peers of equal width and depth.

    python tests/benchmarks/peers.py [--quick] [--limit 120]

Eight blocks of width 128 each:

    hymate small            MMMAMMMA, Mamba-2, a window of 512; its triplet embedding included, unlike the peers'
    hymate MMMMMMMM         the same without attention
    PyTorch Transformer     torch.nn.TransformerEncoder, causal, 4 heads, fused attention
    transformers Mamba2     its PyTorch path, pre-norm residual blocks around it
    mambapy                 its Mamba-1 with the parallel scan
    PyHealth EHRMamba       its MambaBlock, a convolution as long as the history
    PyHealth JambaLayer     2 Transformer and 6 Mamba layers

Every case runs in a process of its own: a warm-up on 256 events, then the fastest of some steps. A case that took more
than a quarter of --limit seconds is not tried at four times the length. PyHealth is left out where it is not installed:
it pins versions of its own and is no part of the bench extra.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from length import free_bytes
from rows import random_row

D_MODEL, BLOCKS, HEADS = 128, 8, 4
LENGTHS = (1024, 4096, 16384, 65536)
QUICK = LENGTHS[:2]
VOCABULARY = 1000

Step = Callable[[int], Tensor]  # a loss of a random history of so many events


def hymate(layers: str = "") -> tuple[nn.Module, Step]:
    from hymate.command import load
    from hymate.model.encoder import HyMaTE
    from hymate.training.memory import keep_freed_memory
    from hymate.training.pretraining import PretrainConfig

    overrides = ["data.path=none", "model=small", "model.dropout=0.0", *([f"model.layers={layers}"] if layers else [])]
    keep_freed_memory()  # as every training process does
    model = HyMaTE(load("pretrain", overrides, PretrainConfig).model, VOCABULARY)
    return model, lambda events: model.encode(random_row([events], vocab_size=VOCABULARY)).sum()


def encoder(blocks: nn.Module) -> tuple[nn.Module, Step]:
    return blocks, lambda events: blocks(torch.randn(1, events, D_MODEL, requires_grad=True)).sum()


class Residual(nn.Module):
    """x + block(norm(x)), for peers whose mixers come without it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block = nn.RMSNorm(D_MODEL), block

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.block(self.norm(x_BLD))


def transformer() -> tuple[nn.Module, Step]:
    layer = nn.TransformerEncoderLayer(
        D_MODEL, HEADS, 4 * D_MODEL, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    stack = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)

    def step(events: int) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(1)  # is_causal alone decides, but it wants a mask
        return stack(torch.randn(1, events, D_MODEL, requires_grad=True), mask=mask, is_causal=True).sum()

    return stack, step


def transformers_mamba2() -> tuple[nn.Module, Step]:
    from mixers import peer_mamba2

    return encoder(nn.Sequential(*(Residual(peer_mamba2(256)) for _ in range(BLOCKS))))


def mambapy() -> tuple[nn.Module, Step]:
    from mambapy.mamba import Mamba, MambaConfig

    return encoder(Mamba(MambaConfig(d_model=D_MODEL, n_layers=BLOCKS, d_state=16)))


def ehrmamba() -> tuple[nn.Module, Step]:
    from pyhealth.models.ehrmamba import MambaBlock

    return encoder(nn.Sequential(*(MambaBlock(D_MODEL) for _ in range(BLOCKS))))


def jamba() -> tuple[nn.Module, Step]:
    from pyhealth.models.jamba_ehr import JambaLayer

    layer = JambaLayer(D_MODEL, 2, BLOCKS - 2, heads=HEADS, dropout=0.0)
    return layer, lambda events: layer(torch.randn(1, events, D_MODEL, requires_grad=True))[0].sum()


CASES: dict[str, Callable[[], tuple[nn.Module, Step]]] = {
    "hymate small": hymate,
    "hymate MMMMMMMM": lambda: hymate("MMMMMMMM"),
    "PyTorch Transformer": transformer,
    "transformers Mamba2": transformers_mamba2,
    "mambapy": mambapy,
    "PyHealth EHRMamba": ehrmamba,
    "PyHealth JambaLayer": jamba,
}


def run_case(name: str, events: int, repeats: int) -> None:
    """Print seconds of the fastest step, peak resident MiB and the number of parameters."""
    torch.manual_seed(0)
    free = free_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))  # an allocation fails instead of the machine
    model, step = CASES[name]()
    step(256).backward()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(events).backward()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"seconds": min(seconds), "peak": peak, "parameters": parameters}))


def measured(name: str, events: int, options: argparse.Namespace) -> dict[str, float] | str:
    repeats = 2 if events > 16384 else 3
    command = [sys.executable, __file__, "--case", name, str(events), str(repeats)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=(repeats + 1) * options.limit)
    except subprocess.TimeoutExpired:
        return f"over {options.limit} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "memory" in done.stderr or done.returncode < 0:
        return "out of memory"
    sys.exit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 4,096 events")
    parser.add_argument("--limit", type=float, default=120, help="seconds of a step beyond which none is tried")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case[0], int(options.case[1]), int(options.case[2]))
        return
    pyhealth = importlib.util.find_spec("pyhealth") is not None
    names = [name for name in CASES if pyhealth or not name.startswith("PyHealth")]
    packages = ["torch", "transformers", "mambapy", *(["pyhealth"] if pyhealth else [])]
    print(f"d_model {D_MODEL}, {BLOCKS} blocks, float32, {torch.get_num_threads()} threads; ", end="")
    print(", ".join(f"{package} {version(package)}" for package in packages) + "\n")
    lengths = QUICK if options.quick else LENGTHS
    print("us an event (times hymate small), peak MiB\n")
    print("| encoder | parameters | " + " | ".join(f"{events:,} events" for events in lengths) + " |")
    print("|---|---|" + "---|" * len(lengths))
    ours: dict[int, float] = {}
    for name in names:
        cells: list[str] = []
        last: float | str = 0.0  # seconds, or why there is no more
        parameters = 0.0
        for events in lengths:
            if isinstance(last, float) and 4 * last > options.limit:
                last = f"over {options.limit:.0f} s"
            if not isinstance(last, str):
                case = measured(name, events, options)
                if isinstance(case, str):
                    last = case
                else:
                    last, parameters = case["seconds"], case["parameters"]
                    ours.setdefault(events, last)
                    cell = f"{1e6 * last / events:,.0f} ({last / ours[events]:.1f}), {case['peak']:,.0f}"
            cells.append(last if isinstance(last, str) else cell)
        print(f"| {name} | {parameters / 1e6:.1f} M | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
