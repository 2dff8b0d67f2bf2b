"""Streaming inference: a history in pieces equals one pass, its memory does not grow, and appending costs what it adds.

    python tests/benchmarks/streaming.py [--quick] [--threads 2] [--repeats 15]

Correctness first: `predict` over a context longer than the history (one packed pass) and `predict_whole` (chunk by
chunk) must give the same probabilities at several prediction times. Then, in a process of its own, the model reads a
history of a million events (--quick: 100,000): events per second; peak resident memory above the process with its
model loaded and compiled, which includes the history; the cost of appending k events to the states after 1,000, a
tenth and all of the events, in turns; and what `predict states=DIR` adds to it: checking a state against its
history, which is read and hashed whole, and writing it. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hymate.config import DataConfig, ModelConfig
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.label_files import LABEL_SCHEMA
from hymate.data.meds import DATA_SCHEMA, write_metadata, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.vocabulary import Vocabulary
from hymate.device import CPU
from hymate.inference.bundle import Bundle, build_model, read_bundle
from hymate.inference.scoring import predict, predict_whole
from hymate.inference.states import StateFolder
from hymate.inference.streaming import PatientState, StreamingModel
from hymate.model.encoder import RiskModel

# configs/model/small.yaml
MODEL = ModelConfig(d_model=128, layers="MMMAMMMA", d_state=64, headdim=32, num_heads=4, window=512)
COMPARED_EVENTS, NUM_CODES = 10_000, 500
APPENDED = (1, 16, 256)


def write_dataset(folder: Path, num_events: int) -> Path:
    """Subject 1 (train) with COMPARED_EVENTS events and three labels, subject 2 (held out) with num_events."""
    rng = np.random.default_rng(0)
    codes = np.array([f"LAB//{code}" for code in range(NUM_CODES)])
    times: dict[int, np.ndarray] = {}
    for subject_id, split, length in ((1, "train", COMPARED_EVENTS), (2, "held_out", num_events)):
        code_L = rng.integers(0, NUM_CODES, length)
        times[subject_id] = 10**15 + np.cumsum(rng.integers(0, 600, length)) * 1_000_000
        value_L = np.where(code_L % 3 == 0, np.nan, rng.normal(size=length))
        columns = [np.full(length, subject_id), times[subject_id], codes[code_L], value_L.astype(np.float32)]
        columns = [pa.array(x).cast(field.type) for x, field in zip(columns, DATA_SCHEMA, strict=True)]
        write_parquet(pa.table(columns, schema=DATA_SCHEMA), folder / "raw" / "data" / split / "0.parquet")
    labels = [
        {"subject_id": 1, "prediction_time": int(times[1][COMPARED_EVENTS * part // 3 - 1]), "boolean_value": True}
        for part in (1, 2, 3)
    ]
    write_parquet(pa.Table.from_pylist(labels, LABEL_SCHEMA), folder / "labels.parquet")
    splits = pa.table({"subject_id": [1, 2], "split": ["train", "held_out"]})
    described = pa.table(
        {"code": codes, "description": codes, "parent_codes": pa.nulls(NUM_CODES, pa.list_(pa.string()))}
    )
    write_metadata(folder / "raw", {"dataset_name": "streaming"}, splits, described)
    prepare(PrepareConfig(source="meds", raw=str(folder / "raw"), out=str(folder / "data"), workers=1))
    return folder / "data"


def write_model(folder: Path, data: Path) -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary.read(data / "histories" / "vocabulary.parquet")
    state = RiskModel(MODEL, vocabulary.size, ["readmission"]).state_dict()
    settings = DataConfig(str(data), context=COMPARED_EVENTS, tokens_per_row=COMPARED_EVENTS)
    Bundle("risk", MODEL, settings, vocabulary, state, ["readmission"]).write(folder)


def compare(folder: Path) -> None:
    """One pass against chunks; stops the program where they differ."""
    bundle, histories = read_bundle(folder / "bundle"), Histories.open(folder / "data")
    examples = labelled_examples(histories, pq.read_table(folder / "labels.parquet"), "train")
    one_pass = predict(bundle, histories, examples, CPU)
    whole, *_ = predict_whole(build_model(bundle), bundle, histories, examples, CPU)
    difference = float(np.abs(one_pass.probability_ET - whole.probability_ET).max())
    print(
        f"correctness: {COMPARED_EVENTS:,} events, 3 prediction times: probabilities differ by {difference:.1e} at most"
    )
    assert difference < 1e-5, "chunks and one pass differ by more than rounding"


def resident_mib(what: str) -> float:
    """VmRSS or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure(folder: Path, num_events: int, repeats: int) -> None:
    """All that is timed, as tables."""
    bundle, histories = read_bundle(folder / "bundle"), Histories.open(folder / "data")
    model = StreamingModel(build_model(bundle), bundle.vocabulary, histories.codes)
    (small,) = histories.read(histories.positions("train"))
    model.append(None, model.events(small)[:2])  # compiles the operators
    loaded = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again

    (history,) = histories.read(histories.positions("held_out"))
    events_L = model.events(history)
    states: dict[int, PatientState] = {}
    print("| events read | s | events/s of the last part | peak MiB above the model |\n| --- | --- | --- | --- |")
    state, done = None, 0
    for size in (1000, num_events // 10, num_events):
        started = time.perf_counter()
        state = states[size] = model.append(state, events_L[done:size])
        elapsed = time.perf_counter() - started
        peak = resident_mib("VmHWM") - loaded
        print(f"| {size:,} | {elapsed:.1f} | {(size - done) / elapsed:,.0f} | {peak:.0f} |", flush=True)
        done = size
    tensors = [tensor for block in states[num_events].blocks for tensor in block]
    size_mib = sum(tensor.nbytes for tensor in tensors) / 2**20
    print(f"(process with its model: {loaded:.0f} MiB; a state: {size_mib:.1f} MiB)\n")

    times: dict[tuple[int, int], list[float]] = {(size, k): [] for size in states for k in APPENDED}
    for _ in range(repeats):
        for size, k in times:
            times[size, k].append(milliseconds(lambda: model.append(states[size], events_L[size : size + k])))  # noqa: B023
    print("ms to append, median (min)\n\n| to a history of | " + " | ".join(f"{k} events" for k in APPENDED) + " |")
    print("| --- |" + " --- |" * len(APPENDED))
    for size in states:
        cells = [f"{statistics.median(times[size, k]):.1f} ({min(times[size, k]):.1f})" for k in APPENDED]
        print(f"| {size:,} | {' | '.join(cells)} |")

    with StateFolder(folder / "states", bundle.fingerprint) as kept:
        write = [milliseconds(lambda: kept.save(2, states[num_events], events_L)) for _ in range(3)]
        check = [milliseconds(lambda: kept.load(2, events_L)) for _ in range(3)]
        assert kept.counts == {"known": 3}
    read = milliseconds(lambda: model.events(Histories.open(folder / "data").read(histories.positions("held_out"))[0]))
    print(
        f"\nstates=DIR after {num_events:,} events: reading the history {read:.0f} ms, checking the state against it "
        f"{min(check):.0f} ms, writing the state {min(write):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="100,000 events instead of a million")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the second process
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_events = 100_000 if options.quick else 1_000_000
    if options.measure:
        measure(options.measure, num_events, options.repeats)
        return
    with tempfile.TemporaryDirectory(prefix="hymate-streaming-") as name:
        folder = Path(name)
        write_model(folder / "bundle", write_dataset(folder, num_events + max(APPENDED)))
        print(f"model small (d_model 128, {MODEL.layers}, window {MODEL.window}), float32")
        print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}")
        compare(folder)
        subprocess.run([sys.executable, *sys.argv, "--measure", name], check=True)


if __name__ == "__main__":
    main()
