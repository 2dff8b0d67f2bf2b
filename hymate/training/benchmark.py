"""The protocol: contenders trained on the same labels with several seeds, and scored on the same patients.

Gradient boosting and logistic regression (`hymate.baselines`), encoders from scratch, HyMaTE from scratch and
pretrained, and the average of a pretrained model's best checkpoints. Each (contender, share of the training patients,
seed) is one task of Ray's that leaves its predictions in the run's folder; what is there already is not run again.

Shape legend: N labels of the compared split, R runs (seeds) of a contender, B bootstrap samples.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hymate import baselines, metrics, trust
from hymate.bundle import Bundle, read_weights, write_weights
from hymate.command import build, check_same_run, to_tree
from hymate.config import ConfigError, DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TaskConfig, TrainConfig
from hymate.data.features import FeatureConfig, choose, features
from hymate.data.histories import Histories
from hymate.data.loader import Examples, labelled_examples
from hymate.data.meds import read_parquet, write_parquet
from hymate.data.tasks import labels
from hymate.predict import predict
from hymate.record import recorded
from hymate.storage import Location, atomic_path, local_copy, locate, write_text
from hymate.telemetry import Telemetry
from hymate.training import engine, pictures, space, tables
from hymate.training.checkpoint import read_verified_weights
from hymate.training.finetune import Start, Study, TrialConfig, run_trial
from hymate.training.launch import absolute, ray_session
from hymate.training.pretraining import PretrainConfig, pretraining_job, read_vocabulary
from hymate.training.resume import Kept
from hymate.training.search import trial_config

BASELINES: tuple[baselines.Kind, ...] = ("gradient_boosting", "logistic_regression")
REFERENCE = "gradient_boosting"  # what every contender is compared with
AVERAGED = "_averaged"  # the name of a pretrained contender with the mean of its best checkpoints' weights
METRIC = "mean"
TABLE_WIDTH = 150
Split = Literal["tuning", "held_out"]
CHANGEABLE = {"data.path", "run.dir", "split", "seeds", "shares", "only", "max_concurrent"}
COMPARED: tuple[Split, ...] = ("tuning", "held_out")
Array = NDArray[Any]


@dataclass(frozen=True)
class Contender:
    """A model that is fine-tuned. model: what it changes of the configuration's; point: its settings, as of a search's
    space; pretrained: whether it starts from weights that were pretrained with the same seed.
    """

    point: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False


@dataclass(frozen=True)
class BenchmarkConfig:
    """`finetune/benchmark.py`'s configuration; see configs/benchmark.yaml."""

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    pretrain: TrainConfig
    train: TrainConfig
    task: TaskConfig
    split: Split
    only: list[str]
    seeds: int
    shares: list[float]
    shared: list[str]
    averaged: int
    max_concurrent: int
    contenders: dict[str, Contender]
    point: dict[str, Any]
    run: RunConfig

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"shares must be above 0 and at most 1, got {self.shares}")
        for name in ("seeds", "averaged"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for key in ("shared", "only"):
            if unknown := set(getattr(self, key)) - {*BASELINES, *self.contenders}:
                raise ConfigError(f"{key}: {', '.join(sorted(unknown))} is no contender")
        if clash := set(BASELINES) & set(self.contenders):
            raise ConfigError(f"contenders.{sorted(clash)[0]} is a baseline's name: choose another")
        for contender in self.contenders.values():
            space.check({**self.point, **contender.point})
            self.model_of(contender)

    def model_of(self, contender: Contender) -> ModelConfig:
        """The contender's model. Raises ConfigError where a setting is impossible."""
        return build(ModelConfig, {**to_tree(self.model), **contender.model}, "contenders.model.")


@dataclass(frozen=True)
class Run:
    """One contender with one seed on a share of the training patients; `name` is a baseline's or a contender's."""

    name: str
    share: float
    seed: int

    @property
    def file(self) -> str:
        """Of its predictions, without the ending."""
        return f"{self.name}-{self.share:g}-{self.seed}"


# -------------------------------------------------------------------------------------------------------- running


def benchmark(config: BenchmarkConfig) -> Location:
    """Run what is not there yet, then compare all; returns the run's folder."""
    data = dataclasses.replace(config.data, path=absolute("data.path", config.data.path))
    run = dataclasses.replace(config.run, dir=absolute("run.dir", config.run.dir))
    config = dataclasses.replace(config, data=data, run=run)
    histories = Histories.open(config.data.path)
    labels(locate(config.data.path), config.task)  # a user's mistake shows before the first worker starts
    claim = {**to_tree(config), "data_fingerprint": histories.fingerprint}
    check_same_run(config.run.path, claim, CHANGEABLE)
    with recorded(config.run.path, "benchmark", claim):
        waiting = [run for run in _runs(config) if not _results(config, run).is_file()]
        if waiting:
            with ray_session(config.train):
                _run_all(config, waiting)
        found = compare(config)
        write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", config.run.path / "benchmark.json")
        report = _report(config, found)
        write_text(report, config.run.path / "benchmark.md")
        _draw(config, found)
    _show(found)
    print(f"report: {config.run.path / 'benchmark.md'}, picture: {config.run.path / 'benchmark.png'}")
    return config.run.path


def _runs(config: BenchmarkConfig) -> list[Run]:
    """In the order in which they are started: every contender once, then with the next seed; small shares last."""
    everyone = [*BASELINES, *config.contenders]
    return [
        Run(name, share, seed)
        for share in sorted(config.shares, reverse=True)
        for seed in range(config.seeds)
        for name in (everyone if share == 1 else config.shared)
        if not config.only or name in config.only
    ]


def _results(config: BenchmarkConfig, run: Run) -> Location:
    return config.run.path / "runs" / f"{run.file}.json"


def _predictions(config: BenchmarkConfig, run: Run, split: Split) -> Location:
    return config.run.path / "runs" / f"{run.file}-{split}.parquet"


def _run_all(config: BenchmarkConfig, waiting: Sequence[Run]) -> None:
    """Each in a process of its own. The first failure ends the command, after what was running is done."""
    import ray

    resources = {"num_cpus": config.train.cpus_per_worker, "num_gpus": float(config.train.use_gpu)}
    remote, pretraining = (ray.remote(max_calls=1, max_retries=0, **resources)(task) for task in (_run, pretrain))
    pretrained: dict[int, Any] = {}  # by seed
    started, queue = time.monotonic(), list(waiting)
    running: dict[Any, Run] = {}
    most = config.max_concurrent or len(queue)
    while queue or running:
        while queue and len(running) < most:
            run = queue.pop(0)
            ready = None
            if run.name in config.contenders and config.contenders[run.name].pretrained:
                if run.seed not in pretrained:
                    pretrained[run.seed] = pretraining.remote(config, run.seed)
                ready = pretrained[run.seed]
            running[remote.remote(config, run, ready)] = run
        (done,), _ = ray.wait(list(running), num_returns=1)
        run = running.pop(done)
        ray.get(done)
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        left = len(queue) + len(running)
        print(f"{minutes}:{seconds:02d}  {run.name} of seed {run.seed} on {run.share:.0%}; {left} left", flush=True)


def _run(config: BenchmarkConfig, run: Run, pretrained: tuple[dict[str, Tensor], float] | None) -> None:
    torch.set_num_threads(config.train.cpus_per_worker)
    histories, table = Histories.open(config.data.path), labels(locate(config.data.path), config.task).table
    table = _share_of(table, histories, run)
    if run.name in BASELINES:
        _run_baseline(config, run, histories, table)
    else:
        _run_contender(config, run, histories, table, *(pretrained or (None, 0.0)))


def _share_of(table: pa.Table, histories: Histories, run: Run) -> pa.Table:
    """The labels without those of the training patients that the run does not learn from; each seed draws its own."""
    train_id_P = np.sort(histories.index["subject_id"][histories.rows_of("train")])
    order_P = np.random.default_rng(run.seed).permutation(len(train_id_P))
    left_out_P = train_id_P[order_P[max(1, round(run.share * len(order_P))) :]]
    return table.filter(pc.invert(pc.is_in(table["subject_id"], pa.array(left_out_P))))


def _run_baseline(config: BenchmarkConfig, run: Run, histories: Histories, table: pa.Table) -> None:
    started = time.monotonic()
    examples = {split: labelled_examples(histories, table, split) for split in ("train", *COMPARED)}
    spec = choose(histories, examples["train"], FeatureConfig())
    told = {split: features(histories, examples[split], spec) for split in examples}
    kind = next(name for name in BASELINES if name == run.name)
    model = baselines.fit(kind, told["train"], told["tuning"], run.seed)
    seconds = time.monotonic() - started
    probabilities: dict[Split, Array] = {split: model.probability(told[split].value_EX) for split in COMPARED}
    _write(config, run, examples, probabilities, seconds=seconds, parameters=None)


def _run_contender(
    config: BenchmarkConfig,
    run: Run,
    histories: Histories,
    table: pa.Table,
    state: dict[str, Tensor] | None,
    pretraining_seconds: float,
) -> None:
    contender = config.contenders[run.name]
    vocabulary = read_vocabulary(config.data)
    start = Start(config.model_of(contender), config.data, vocabulary, state)
    trial = trial_of(config, contender, start, run)
    started = time.monotonic()
    teacher = []
    if trial.teacher_share:
        train, tuning = (labelled_examples(histories, table, split) for split in ("train", "tuning"))
        teacher = [baselines.cross_fitted(histories, train, tuning, run.seed)]
    study = Study(start, [table], METRIC, [trial], config.run.path, teacher)
    with tempfile.TemporaryDirectory() as folder, engine.single_process(config.train.use_gpu) as worker:
        kept = Kept(Path(folder), config.averaged)
        telemetry = Telemetry(config.run.path / "tb" / run.file, enabled=True)
        run_trial(study, trial, worker=worker, report=_keeping(kept), resume=None, telemetry=telemetry)
        states = _best_weights(kept)
    seconds = time.monotonic() - started
    examples: dict[str, Examples] = {split: labelled_examples(histories, table, split) for split in COMPARED}
    average = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
    for suffix, state in (("", states[0]), (AVERAGED, average)):
        bundle = Bundle("risk", trial.model, trial.data, trial.tasks, vocabulary, state, in_days=trial.in_days)
        probabilities = _calibrated(bundle, histories, examples)
        parameters = sum(weight.numel() for weight in state.values())
        more = {"seconds": seconds, "pretraining_seconds": pretraining_seconds, "parameters": parameters}
        named = dataclasses.replace(run, name=run.name + suffix)
        if not suffix or contender.pretrained:
            _write(config, named, examples, probabilities, **more)


def trial_of(config: BenchmarkConfig, contender: Contender, start: Start, run: Run) -> TrialConfig:
    """As few labels are soon learned, a share of them gets its root's share of the steps."""
    steps = max(config.train.eval_every, round(config.train.max_steps * run.share**0.5))
    warmup = min(config.train.warmup_steps, steps // 4)
    train = dataclasses.replace(config.train, seed=run.seed, max_steps=steps, warmup_steps=warmup)
    return trial_config([config.task], train, start, {**config.point, **contender.point})


def pretrain(config: BenchmarkConfig, seed: int) -> tuple[dict[str, Tensor], float]:
    """Weights that were pretrained with this seed, and how long that took; trained once for all shares."""
    torch.set_num_threads(config.train.cpus_per_worker)
    path = config.run.path / "pretrained" / f"{seed}.safetensors"
    if not path.with_suffix(".json").is_file():  # it comes last
        settings = PretrainConfig(
            config.data, config.model, config.objective, dataclasses.replace(config.pretrain, seed=seed), config.run
        )
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, engine.single_process(config.train.use_gpu) as worker:
            job = pretraining_job(settings, worker)
            kept = Kept(Path(folder), 1, job.mode)
            telemetry = Telemetry(config.run.path / "tb" / f"pretrained-{seed}", enabled=True)
            engine.train(job, settings.train, worker, report=_keeping(kept), telemetry=telemetry, resume=None)
            (state,) = _best_weights(kept)
        with atomic_path(path) as temporary:
            write_weights(state, temporary)
        write_text(json.dumps(time.monotonic() - started) + "\n", path.with_suffix(".json"))
    with local_copy(path) as copy:
        return read_weights(copy), json.loads(path.with_suffix(".json").read_text())


def _keeping(kept: Kept) -> engine.Report:
    def report(metrics: dict[str, float], checkpoint: Path) -> None:
        kept.add(checkpoint, int(metrics["step"]))
        shutil.rmtree(checkpoint)

    return report


def _best_weights(kept: Kept) -> list[dict[str, Tensor]]:
    """Best first."""
    return [read_verified_weights(folder) for folder, _ in kept.best_first()[: kept.num_best]]


def _calibrated(bundle: Bundle, histories: Histories, examples: Mapping[str, Examples]) -> dict[Split, Array]:
    """Probabilities, recalibrated on the tuning split."""
    logits = {split: predict(bundle, histories, examples[split])[0].logit_ET[:, 0] for split in COMPARED}
    recalibration = trust.recalibrate(examples["tuning"].label_E, logits["tuning"])
    return {split: torch.sigmoid(torch.from_numpy(recalibration(logits[split]))).numpy() for split in COMPARED}


def _write(
    config: BenchmarkConfig,
    run: Run,
    examples: Mapping[str, Examples],
    probabilities: Mapping[Split, Array],
    **more: Any,
) -> None:
    """Predictions of both splits, so that a comparison on the held-out one needs no second training; the JSON last: a
    run is there when its JSON is.
    """
    for split in COMPARED:
        columns = {"subject_id": examples[split].subject_id_E, "label": examples[split].label_E}
        write_parquet(pa.table(columns | {"probability": probabilities[split]}), _predictions(config, run, split))
    write_text(json.dumps({**dataclasses.asdict(run), **more}) + "\n", _results(config, run))


# ------------------------------------------------------------------------------------------------------ comparing


def compare(config: BenchmarkConfig) -> dict[str, Any]:
    """What benchmark.json says of all runs that are there."""
    rows = []
    reference: dict[float, Array] = {}
    for share in sorted(config.shares, reverse=True):
        for name in _names(config):
            found = [Run(name, share, seed) for seed in range(config.seeds)]
            found = [run for run in found if _results(config, run).is_file()]
            if not found:
                continue
            told = [json.loads(_results(config, run).read_text()) for run in found]
            predictions = [read_parquet(_predictions(config, run, config.split)) for run in found]
            label_N, subject_N = (predictions[0][column].to_numpy() for column in ("label", "subject_id"))
            probability_RN = np.stack([table["probability"].to_numpy() for table in predictions])
            if name == REFERENCE:
                reference[share] = probability_RN
            rows.append(
                {
                    "name": name,
                    "share": share,
                    **_scored(label_N, probability_RN, subject_N, reference.get(share)),
                    "parameters": told[0]["parameters"],
                    "seconds": float(np.mean([one["seconds"] for one in told])),
                    "pretraining_seconds": float(np.mean([one.get("pretraining_seconds", 0.0) for one in told])),
                }
            )
    return {"split": config.split, "task": config.task.name, "rows": rows}


def _names(config: BenchmarkConfig) -> list[str]:
    averaged = [name + AVERAGED for name, contender in config.contenders.items() if contender.pretrained]
    return [*BASELINES, *config.contenders, *averaged]


def _scored(label_N: Array, probability_RN: Array, subject_N: Array, reference_RN: Array | None) -> dict[str, Any]:
    """Mean and standard deviation over seeds; intervals of the mean, and of its difference to the reference's, over
    resampled patients; the scores of the seeds' mean probability, which is an ensemble.
    """
    areas_KR = np.array([[area(label_N, p_N) for p_N in probability_RN] for area in (metrics.auroc, metrics.auprc)])
    others_RN = probability_RN if reference_RN is None else reference_RN
    paired = metrics.mean_difference(label_N, probability_RN, others_RN, subject_N)
    mean_N = probability_RN.mean(axis=0)
    ensemble = metrics.paired_difference(label_N, mean_N, others_RN.mean(axis=0), subject_N)
    found: dict[str, Any] = {"runs": len(probability_RN), "ece": float(np.mean(_eces(label_N, probability_RN)))}
    for number, name in enumerate(metrics.AREAS):
        area = (metrics.auroc, metrics.auprc)[number]
        found[name] = {
            "mean": float(areas_KR[number].mean()),
            "sd": float(areas_KR[number].std(ddof=1)) if len(probability_RN) > 1 else None,
            "ci": paired[name]["ci"],
            "difference": paired[name]["difference"],
            "ensemble": area(label_N, mean_N),
            "ensemble_difference": ensemble[name],
        }
    return found


def _eces(label_N: Array, probability_RN: Array) -> list[float]:
    return [error for p_N in probability_RN if (error := metrics.ece(label_N, p_N)) is not None]


# ------------------------------------------------------------------------------------------------------ reporting


def _cells(found: Mapping[str, Any], share: float) -> list[list[str]]:
    head = ["model", "runs", "AUROC", "AUPRC", "AUROC less boosting's", "AUPRC less boosting's"]
    head += ["seeds averaged", "calibration error", "parameters", "training, s"]
    cells = [head]
    for row in found["rows"]:
        if row["share"] != share:
            continue
        areas = [row[name] for name in metrics.AREAS]
        spread = ["" if area["sd"] is None else f" ± {area['sd']:.3f}" for area in areas]
        low_high = ["" if area["ci"] is None else " [{:.3f}, {:.3f}]".format(*area["ci"]) for area in areas]
        named = zip(areas, spread, low_high, strict=True)
        seconds = f"{row['seconds']:.0f}"
        if row["pretraining_seconds"]:
            seconds += f" + {row['pretraining_seconds']:.0f}"
        cells.append(
            [
                row["name"].replace("_", " "),
                str(row["runs"]),
                *(f"{area['mean']:.3f}{sd}{interval}" for area, sd, interval in named),
                *("" if row["name"] == REFERENCE else tables.with_interval(area["difference"]) for area in areas),
                ", ".join(tables.number(area["ensemble"]) for area in areas),
                tables.number(row["ece"]),
                "" if row["parameters"] is None else f"{row['parameters']:,}",
                seconds,
            ]
        )
    return cells


def _report(config: BenchmarkConfig, found: Mapping[str, Any]) -> str:
    parts = [f"# {found['task']}, {found['split'].replace('_', '-')} split\n"]
    parts.append(
        "Mean and standard deviation over seeds, with the 95 % interval over resampled patients; differences to "
        "gradient boosting on the same patients, seeds averaged likewise.\n"
    )
    for share in sorted(config.shares, reverse=True):
        parts.append(f"\n## Learned from {share:.0%} of the training patients\n")
        parts.append(tables.markdown(_cells(found, share)) + "\n")
    return "\n".join(parts) + "\n![](benchmark.png)\n"


def _show(found: Mapping[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    for share in sorted({row["share"] for row in found["rows"]}, reverse=True):
        title = f"{found['task']}, {found['split']} split, {share:.0%} of the training patients"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        head, *rows = _cells(found, share)
        for name in head[:6]:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row[:6])
        console.print(table)


def _draw(config: BenchmarkConfig, found: Mapping[str, Any]) -> None:
    """Curves over the shares, and ROC, precision-recall and calibration of the seeds' mean probabilities."""
    curves = {}
    for name in _names(config):
        runs = [Run(name, max(config.shares), seed) for seed in range(config.seeds)]
        files = [_predictions(config, run, config.split) for run in runs if _results(config, run).is_file()]
        predictions = [read_parquet(file) for file in files]
        if predictions:
            probability_N = np.mean([table["probability"].to_numpy() for table in predictions], axis=0)
            curves[name.replace("_", " ")] = (predictions[0]["label"].to_numpy(), probability_N)
    chance = float(np.mean(next(iter(curves.values()))[0]))
    pictures.draw_benchmark(config.run.path / "benchmark.png", found["rows"], curves, chance, REFERENCE)
