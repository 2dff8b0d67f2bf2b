"""The parts of gpu.py, each run by it in a process of its own: python gpu_parts.py PART [options] REPORT.

A part reports of each measurement its numbers, or why it was left out, or its error with the traceback. Each is in the
file before the next one begins. Times are wall-clock times of many steps between two synchronisations, after
warm-up; the first step's, with the compilation of kernels, stands apart.

Shape legend: L events, D d_model, B histories of a padded batch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_setting import VOCABULARY, LeftOut, Measures, Report, Setting, rate, timed
from rows import random_row
from torch import Tensor, nn

from hymate.config import ModelConfig, ObjectiveConfig, TrainConfig
from hymate.data.feeding import fed
from hymate.data.packing import pack
from hymate.model.batch import Batch
from hymate.model.encoder import HyMaTE, RiskModel, decay_groups
from hymate.model.pretrain_model import PretrainModel
from hymate.training.deepspeed import AdamW

TASK = "readmission"


# -------------------------------------------------------------------------------------------------- the machine


def machine(report: Report, setting: Setting) -> None:
    """What torch sees, and which versions of the kernels can be imported."""

    def torch_sees() -> Measures:
        measures: Measures = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "varlen": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        }
        if setting.device.type == "cuda":
            properties = torch.cuda.get_device_properties(0)
            measures |= {
                "card": properties.name,
                "memory_gib": properties.total_memory / 2**30,
                "multiprocessors": properties.multi_processor_count,
                "capability": f"{properties.major}.{properties.minor}",
            }
        return measures

    def imported(name: str) -> Measures:
        module = importlib.import_module(name)
        return {"version": getattr(module, "__version__", "unknown")}

    report.attempt("torch", torch_sees)
    kernels = ("triton", "causal_conv1d", "mamba_ssm", "selective_scan_cuda")  # the last is Mamba-1's
    for name in (*kernels, "deepspeed", "transformers"):
        report.attempt(name, functools.partial(imported, name))


def ceilings(report: Report, setting: Setting) -> None:
    """The rate of bf16 matrix products of random numbers, and the bandwidth of copies (bytes read and written)."""

    def product(n: int) -> Measures:
        a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
        measured = timed(setting, lambda: a @ b)
        return {"tflops": 2 * n**3 / measured["ms"] / 1e9, **measured}

    def copy(source: Tensor, target: Tensor, times: int) -> Measures:
        measured = timed(setting, lambda: target.copy_(source, non_blocking=True))
        return {"gb_per_second": times * source.nbytes / measured["ms"] / 1e6, **measured}

    def on_device() -> Measures:
        source = torch.randint(0, 256, (setting.copied_mib * 2**20,), dtype=torch.uint8, device=setting.device)
        return copy(source, torch.empty_like(source), 2)

    def from_host(pinned: bool) -> Measures:
        if pinned and setting.device.type != "cuda":
            raise LeftOut("no memory to pin without a GPU")
        source = torch.randint(0, 256, (setting.copied_mib * 2**18,), dtype=torch.uint8)
        source = source.pin_memory() if pinned else source
        return copy(source, torch.empty_like(source, device=setting.device), 1)

    for n in setting.matrices:
        report.attempt(f"bf16 matrix product, {n:,} square", functools.partial(product, n))
    report.attempt("copy on the device", on_device)
    report.attempt("copy to the device, pinned", lambda: from_host(True))
    report.attempt("copy to the device, not pinned", lambda: from_host(False))


# --------------------------------------------------------------------------------------------------- training


def planned(config: ModelConfig, events: int, history_events: int, recomputed: bool = False) -> Measures:
    """What `hymate.plan` says of a row under plain AdamW: operations an event, and memory."""
    from hymate.training.footprint import Shapes, event_flops, num_parameters, row_bytes, worker_bytes

    shapes = Shapes(config, ObjectiveConfig(), VOCABULARY, events, history_events, "bf16")
    parameters = num_parameters(shapes)
    held = worker_bytes(parameters, 0, 1).most(row_bytes(shapes, 0, recomputed).most)
    flops = sum(part.forward + part.backward for part in event_flops(shapes).values())
    return {"events": events, "flops_per_event": flops, "parameters": parameters, "planned_gib": held / 2**30}


def training(report: Report, setting: Setting, name: str, mixer: str) -> None:
    """Full rows of one model: plain PyTorch on rows that lie on the device, DeepSpeed on rows that are fed to it."""
    config = setting.model(name, mixer=mixer)
    batches = setting.rows(4)
    events = round(statistics.mean(batch.num_events for batch in batches))
    history_events = round(statistics.mean(batch.num_events / batch.num_segments for batch in batches))
    planning = functools.partial(planned, config, events, history_events)
    plan = report.attempt(f"{name}, {mixer}, by hymate.plan", planning)

    def measured(step: Callable[[Any], object], rows: Iterator[Any]) -> Measures:
        return rate(setting, lambda: step(next(rows)), events, plan)

    def plain(compiled: bool) -> Measures:
        from hymate.training.loop import compute_as

        if compiled and setting.device.type == "cpu":
            raise LeftOut("compiling for a CPU takes minutes, and brought nothing")
        module, optimizer = model_and_adamw(setting, config)
        compute_as(module, TrainConfig(compile=compiled))
        there = [module.ask(batch).to(setting.device) for batch in batches]
        return measured(functools.partial(plain_step, setting, module, optimizer), itertools.cycle(there))

    def with_deepspeed() -> Measures:
        from hymate.training import loop

        train = TrainConfig(rows_per_step=1, zero_stage=2, precision="bf16")
        with loop.single_process(setting.device) as worker:
            module, optimizer = model_and_adamw(setting, config)
            wrapped = loop.build_engine(module, optimizer, train, worker)
            endless = itertools.cycle([[batch] for batch in batches])
            with contextlib.closing(fed(endless, worker.device, module.ask)) as ready:
                return measured(lambda rows: loop.train_step(wrapped, rows, worker.device), ready)

    report.attempt(f"{name}, {mixer}, plain", functools.partial(plain, compiled=False))
    report.attempt(f"{name}, {mixer}, DeepSpeed ZeRO 2", with_deepspeed)
    report.attempt(f"{name}, {mixer}, plain, train.compile=true", functools.partial(plain, compiled=True))


def model_and_adamw(setting: Setting, config: ModelConfig) -> tuple[PretrainModel, AdamW]:
    torch.manual_seed(0)
    module = PretrainModel(config, ObjectiveConfig(), VOCABULARY).to(setting.device)
    fused = setting.device.type == "cuda"
    return module, AdamW(decay_groups(module, 0.05), lr=1e-4, betas=(0.9, 0.98), fused=fused)


def plain_step(setting: Setting, module: PretrainModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    with setting.autocast():
        loss = module.loss(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def long(report: Report, setting: Setting) -> None:
    """One history in one step."""
    config, events = setting.model("base"), setting.long_events

    def measured(recomputed: bool, plan: Measures) -> Measures:
        module, optimizer = model_and_adamw(setting, config)
        module.backbone.activation_checkpointing = recomputed
        batch = module.ask(random_row([events], vocab_size=VOCABULARY)).to(setting.device)
        return rate(setting, functools.partial(plain_step, setting, module, optimizer, batch), events, plan)

    for recomputed in (True, False):
        what = f"base, {events:,} events, activations {'computed again' if recomputed else 'kept'}"
        planning = functools.partial(planned, config, events, events, recomputed)
        plan = report.attempt(f"{what}, by hymate.plan", planning)
        report.attempt(what, functools.partial(measured, recomputed, plan))


# ------------------------------------------------------------------------------------------------------- peers


def peers(report: Report, setting: Setting) -> None:
    """Encoders of Mamba-2 blocks of `base`'s width, forward and backward in bf16: HyMaTE's, packed, with its embedding,
    and transformers' Mamba2Model on vectors. Padded batches hold as many slots as packed rows; events are real ones."""
    config = setting.model("base", layers="M" * setting.blocks, mixer="mamba2", mlp_ratio=0, dropout=0.0)
    histories = setting.lengths(4 * setting.row_events)
    equal = [setting.row_events // 8] * 32

    def ours(lengths: Sequence[int]) -> Measures:
        torch.manual_seed(0)
        module = HyMaTE(config, VOCABULARY).to(setting.device)
        packed = [[lengths[i] for i in row] for row in pack(np.array(lengths), setting.row_events)]
        batches = [random_row(row, vocab_size=VOCABULARY).to(setting.device) for row in packed]
        return passes(lambda batch: module(batch), batches, sum(lengths), setting.row_events * len(batches))

    def theirs(lengths: Sequence[int], how: str) -> Measures:
        module, width, kernels = transformers_mamba2(config).to(setting.device), config.d_model, peer_kernels()
        module.train(kernels == "mamba_ssm")  # in training it wants the convolution's kernel, too
        if how == "packed" and kernels != "mamba_ssm":
            raise LeftOut(f"it packs only with all kernels; it has {kernels}")
        batches: list[tuple[Tensor, dict[str, Tensor]]] = []
        for group in groups(lengths, how, setting.row_events):
            counts = torch.tensor(group)
            if how == "packed":
                index = torch.arange(len(group), dtype=torch.int32).repeat_interleave(counts)[None]
                shape, extra = (1, sum(group)), {"seq_idx": index.to(setting.device)}
            else:
                shape = (len(group), max(group))
                mask = (torch.arange(max(group)) < counts[:, None]).long()
                extra = {"attention_mask": mask.to(setting.device)}
            batches.append((torch.randn(*shape, width, device=setting.device, requires_grad=True), extra))

        def encode(batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
            out = module(inputs_embeds=batch[0], use_cache=False, **batch[1]).last_hidden_state
            return out if how == "packed" else out * batch[1]["attention_mask"][..., None]

        slots = sum(batch.shape[0] * batch.shape[1] for batch, _ in batches)
        return {**passes(encode, batches, sum(lengths), slots), "kernels": kernels}

    def passes(encode: Callable[[Any], Tensor], batches: Sequence[Any], events: int, slots: int) -> Measures:
        def all_batches() -> None:
            for batch in batches:
                with setting.autocast():
                    out = encode(batch)
                out.float().sum().backward()

        measured = timed(setting, all_batches)
        return {"events_per_second": 1000 * events / measured["ms"], "filled": events / slots, **measured}

    for what, lengths in (("real lengths", histories), ("equal lengths", equal)):
        report.attempt(f"HyMaTE, packed, {what}", functools.partial(ours, lengths))
        for how in ("padded", "padded, sorted by length", "packed") if lengths is histories else ("padded",):
            report.attempt(f"transformers Mamba2, {how}, {what}", functools.partial(theirs, lengths, how))


def groups(lengths: Sequence[int], how: str, slots: int) -> list[list[int]]:
    """Histories that are computed together: in padded batches or packed rows of at most so many slots."""
    if how == "packed":
        return [[lengths[i] for i in row] for row in pack(np.array(lengths), slots)]
    batches: list[list[int]] = [[]]
    for length in sorted(lengths) if "sorted" in how else lengths:
        if (len(batches[-1]) + 1) * max([*batches[-1], length]) > slots:
            batches.append([])
        batches[-1].append(length)
    return batches


def transformers_mamba2(config: ModelConfig) -> nn.Module:
    """An encoder with the sizes of `config`'s M blocks."""
    from transformers import Mamba2Config, Mamba2Model

    torch.manual_seed(0)
    return Mamba2Model(
        Mamba2Config(
            vocab_size=2,
            hidden_size=config.d_model,
            state_size=config.d_state,
            head_dim=config.headdim,
            num_heads=config.expand * config.d_model // config.headdim,
            expand=config.expand,
            n_groups=1,
            chunk_size=config.chunk_size,
            num_hidden_layers=len(config.layers),
            use_bias=False,
            rms_norm=True,
        )
    )


def peer_kernels() -> str:
    """What transformers will use: it falls back to plain PyTorch in silence."""
    try:
        importlib.import_module("mamba_ssm")
    except Exception as error:
        return f"none, plain PyTorch ({type(error).__name__})"
    return "mamba_ssm" if importlib.util.find_spec("causal_conv1d") else "mamba_ssm without causal_conv1d"


# --------------------------------------------------------------------------------------------------- inference


def inference(report: Report, setting: Setting) -> None:
    """Prediction over full rows, and a long history as it grows; beside the CPU's logits."""
    config = setting.model("base", mixer="mamba2")

    def model(device: torch.device) -> RiskModel:
        torch.manual_seed(0)
        return RiskModel(config, VOCABULARY, [TASK]).to(device).eval()

    def prediction(rounded: bool) -> Measures:
        there, batches = model(setting.device), setting.rows(4)
        events = statistics.mean(batch.num_events for batch in batches)
        with contextlib.closing(fed(itertools.cycle(batches), setting.device, there.ask)) as ready:

            def step() -> None:
                with torch.no_grad(), torch.autocast(setting.device.type, torch.bfloat16, enabled=rounded):
                    there(next(ready))["logit_AT"].cpu()

            measured = timed(setting, step)
        return {"events_per_second": 1000 * events / measured["ms"], **measured}

    def same_as_cpu() -> Measures:
        batch = random_row([setting.row_events // 16, 1, 100], vocab_size=VOCABULARY)
        with torch.no_grad():
            there, here = (model(d)(batch.to(d))["logit_AT"].cpu() for d in (setting.device, torch.device("cpu")))
        return {"largest_difference_of_logits": float((there - here).abs().max())}

    def streaming() -> Measures:
        from random_histories import random_history, random_vocabulary

        from hymate.inference.streaming import StreamingModel

        vocabulary = random_vocabulary(VOCABULARY)
        stream = StreamingModel(model(setting.device), vocabulary, vocabulary.codes)
        history = random_history(setting.long_events + 256, vocabulary)
        events_L = stream.events(history)
        stream.append(None, events_L[:256])  # compiles
        setting.wait()
        began = time.perf_counter()
        state = stream.append(None, events_L[:-256])
        setting.wait()
        measures: Measures = {"events_per_second": setting.long_events / (time.perf_counter() - began)}
        for k in (1, 16, 256):
            more_L = events_L[-256:][:k]
            measures[f"append_{k}_ms"] = timed(setting, functools.partial(stream.append, state, more_L))["ms"]
        at = int(history.time[-1])
        measures["outputs_ms"] = timed(setting, lambda: stream.outputs(state, history, at))["ms"]
        return {**measures, "peak_gib": setting.peak_gib()}

    report.attempt("base, prediction, float32", lambda: prediction(False))
    report.attempt("base, prediction, bf16", lambda: prediction(True))
    report.attempt("base, prediction here and on the CPU", same_as_cpu)
    report.attempt(f"base, streaming {setting.long_events:,} events", streaming)


# ----------------------------------------------------------------------------------------------------- profile


def profile(report: Report, setting: Setting) -> None:
    """One training step of `base`: where its time goes, and how often the CPU waits for the device."""

    def step() -> Measures:
        module, optimizer = model_and_adamw(setting, setting.model("base"))
        batch = module.ask(setting.rows(1)[0]).to(setting.device)
        once = functools.partial(plain_step, setting, module, optimizer, batch)
        for _ in range(3):
            once()
        setting.wait()
        on_gpu = setting.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
        with torch.profiler.profile(activities=activities) as watched:
            began = time.perf_counter()
            once()
            setting.wait()
            wall = time.perf_counter() - began
        averages = watched.key_averages()
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        times = {
            e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count)
            for e in averages
            if e.device_type == kind
        }
        waits = sum(e.count for e in averages if "Synchronize" in e.key or e.key == "aten::_local_scalar_dense")
        busy = sum(us for us, _ in times.values()) / 1e6
        longest = sorted(times.items(), key=lambda item: -item[1][0])[:10]
        return {
            "ms": 1000 * wall,
            "busy_fraction": busy / wall,
            "launches": sum(count for _, count in times.values()),
            "waits": waits,
            "longest": [f"{key[:90]}: {us / 1000:.2f} ms in {count}" for key, (us, count) in longest],
        }

    report.attempt("base, one step", step)


# -------------------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[Report, Setting], None]] = {
    "machine": machine,
    "ceilings": ceilings,
    "base": functools.partial(training, name="base", mixer="mamba2"),
    "peers": peers,
    "long": long,
    "profile": profile,
    "inference": inference,
    "mamba1": functools.partial(training, name="base", mixer="mamba1"),
    "small": functools.partial(training, name="small", mixer="mamba2"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("report", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--tflops", type=float, default=0.0)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    report = Report(options.report)
    if options.rehearse:
        torch.set_num_threads(1)
        setting = Setting(torch.device("cpu"), options.tflops, options.data, 256, 1024, 1, (64,), 4)
    elif torch.cuda.is_available():
        setting = Setting(torch.device("cuda", 0), options.tflops, options.data)
    else:
        report.attempt(options.part, no_gpu)
        return
    PARTS[options.part](report, setting)


def no_gpu() -> Measures:
    raise LeftOut(f"torch {torch.__version__} sees no CUDA device")


if __name__ == "__main__":
    main()
