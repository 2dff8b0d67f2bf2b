"""The sections of a configuration as checked, frozen dataclasses; `hymate.command` makes them of YAML and overrides."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hymate.errors import ConfigError
from hymate.places import UNPRINTABLE, parse_place

QUOTE_IT = "put it in quotes, and in a shell those in others: 'KEY=\"TEXT\"'"
Place = Annotated[str, parse_place]  # a local path or a URL
Init = Annotated[str, parse_place, "or the name of a bundle that ships"]
SHIPPED_NAME = r"[a-z0-9_]+"  # of a code map in configs/codes/ and of a bundle in hymate/bundles/


def parse_codes(text: str) -> None:
    """Raises UserError where a text is neither the name of a code map that ships nor a place."""
    if not re.fullmatch(SHIPPED_NAME, text):
        parse_place(text)


Codes = Annotated[str, parse_codes]


def is_number(value: object) -> bool:
    """Whether a value is a finite number (true and false are none)."""
    # compared rather than converted: an int may be beyond every float
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check(config: object, **rules: tuple[bool, str]) -> None:
    """Raises ConfigError for the first key whose rule does not hold: (whether it holds, what the value must be).

    The message names the key as the section does; `hymate.trees.build` puts the section's own place before it.
    """
    for name, (holds, text) in rules.items():
        if not holds:
            value = getattr(config, name)
            raise ConfigError(f"{name} {text}, got {list(value) if isinstance(value, tuple) else value!r}")


def positive(config: object, *names: str) -> None:
    """Raises ConfigError for the first of these keys whose number is not positive."""
    check(config, **{name: (getattr(config, name) > 0, "must be positive") for name in names})


def not_negative(config: object, *names: str) -> None:
    """Raises ConfigError for the first of these keys whose number is negative."""
    check(config, **{name: (getattr(config, name) >= 0, "must not be negative") for name in names})


# --------------------------------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class DataPath:
    """path: folder or URL of a prepared dataset; the commands for a finished model read any other MEDS dataset, too."""

    path: Place


@dataclass(frozen=True)
class DataConfig:
    """A prepared dataset and how its histories are cut and packed.

    path: folder or URL of a prepared dataset, written by `python -m hymate.data.prepare`.
    context: most events of one history that the model sees: a random window of it in pretraining, the last events up
        to the prediction time in fine-tuning.
    tokens_per_row: most events in one packed row, which is what one worker computes at a time.
    min_count: codes with fewer training events share the unknown id.
    """

    path: Place
    context: int = 8192
    tokens_per_row: int = 16384
    min_count: int = 10

    def __post_init__(self) -> None:
        positive(self, "context", "tokens_per_row", "min_count")
        check(self, tokens_per_row=(self.tokens_per_row >= self.context, f"must be at least context={self.context}"))


@dataclass(frozen=True)
class ModelConfig:
    """Widths and the layer pattern of a HyMaTE encoder. configs/model/paper.yaml is the published one.

    d_model: width of an event's vector.
    embedding: of the events: "modulated" (the code shifts and scales what its value becomes; time as cycles) or "plain"
        (a network of the value and one of the time, the paper's).
    layers: one letter a block: M a Mamba mixer, A self-attention, G a gated recurrent unit (e.g. "MMMA").
    mixer: "mamba2" (Dao & Gu 2024) or "mamba1" (Gu & Dao 2023, the paper's).
    time_aware_scan: how much a Mamba mixer forgets between two events also depends on the hours between them, at rates
        that it learns.
    causal: attention sees only an event's past.
    bidirectional: each M block reads its history in both directions, and attention, too, sees what comes later.
    d_state: numbers of a Mamba state for each channel.
    d_conv: events that a Mamba mixer's short convolution sees.
    expand: inner width of a Mamba mixer over d_model.
    headdim: channels of a head of mamba2; it divides expand * d_model.
    chunk_size: events that mamba2's scan computes at once; it changes speed and memory, not the result.
    num_heads: heads of attention; they divide d_model.
    window: events that attention sees: itself and the window - 1 before it, and as many after it where it sees ahead
        (causal=false or bidirectional=true); 0 is the whole history.
    mlp_ratio: width of each block's gated MLP over d_model; 0 is none (the paper's).
    dropout: fraction of a block's output that is dropped in training.
    pooling: how events become one vector for a patient: "attention" (the paper's: additive attention over the events,
        and a dense network of the static features), "fusion" (attention that forgets at learned rates and sees trends),
        "variables" (over variables, with their counts, extremes and trends), "last" (the last event's state) or
        "mean".
    elapsed: whether the patient vector also says, in fine steps, how long the history has lasted: for labels of every
        hour, where what is usual changes with the hours.
    num_queries: attention queries of the first three poolings; their results are concatenated.
    members: poolings and heads over the one encoder; each learns as if it were alone, and their logits are averaged.
    """

    d_model: int = 64
    embedding: Literal["modulated", "plain"] = "modulated"
    layers: str = "MMMA"
    mixer: Literal["mamba1", "mamba2"] = "mamba2"
    time_aware_scan: bool = False
    causal: bool = True
    bidirectional: bool = False
    d_state: int = 32
    d_conv: int = 4
    expand: int = 2
    headdim: int = 32
    chunk_size: int = 64
    num_heads: int = 4
    window: int = 512
    mlp_ratio: float = 2.0
    dropout: float = 0.1
    pooling: Literal["attention", "fusion", "variables", "last", "mean"] = "fusion"
    elapsed: bool = False
    num_queries: int = 8
    members: int = 1

    def __post_init__(self) -> None:
        positive(self, "d_model", "d_state", "d_conv", "expand", "headdim")
        positive(self, "chunk_size", "num_heads", "num_queries", "members")
        inner, mamba1 = self.expand * self.d_model, self.mixer == "mamba1"
        check(
            self,
            window=(self.window >= 0, "must be 0 (full attention) or more"),
            mlp_ratio=(
                self.mlp_ratio == 0 or self.mlp_ratio * self.d_model >= 1,
                "must be 0 (no MLP) or at least 1 / d_model",
            ),
            dropout=(0 <= self.dropout < 1, "must be in [0, 1)"),
            layers=(
                bool(self.layers) and set(self.layers) <= set("MAG"),
                'takes the letters M (Mamba), A (attention) and G (recurrent), e.g. "MMMA"',
            ),
            headdim=(mamba1 or inner % self.headdim == 0, f"must divide expand * d_model = {inner}"),
            d_state=(
                not mamba1 or self.d_state <= 256,
                "must be at most 256 with mixer=mamba1, whose kernel takes no more",
            ),
            num_heads=(self.d_model % self.num_heads == 0, f"must divide d_model={self.d_model}"),
        )

    @property
    def sees_ahead(self) -> bool:
        """Whether what an event becomes depends on later events."""
        return self.bidirectional or ("A" in self.layers and not self.causal)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and settings of the self-supervised objectives; a weight of 0 leaves a term out.

    code_weight: `masked_event`: of the hidden events' codes (cross-entropy).
    value_weight: `masked_event`: of the hidden events' values (Huber).
    forecast_weight: `forecast`: from the pooled patient vector at random times of each history, whether each variable
        is measured within the horizon (cross-entropy), and its mean normalised value there (Huber). The patient vector
        must see only the past, so this needs a model that does not see ahead (`ModelConfig.sees_ahead`).
    time_to_event_weight: `time_to_event`: from the pooled patient vector at random times of each history, when each
        code of the vocabulary comes next (likelihood of hazards that are constant in bins of time, censored at the end
        of the record), and with which normalised value (Huber). It needs what `forecast_weight` needs.
    mask_fraction: fraction of the events that are hidden.
    span_fraction: fraction of the hidden events that lie in whole spans.
    span_length: mean number of events in a span.
    horizon_hours: how far a forecast looks, in hours.
    forecast_points: times of each history that are forecast from.
    forecast_variables: how many of the most frequent codes are forecast.
    time_to_event_fraction: fraction of the events after which it is predicted when codes come next.
    time_to_event_bins: bins of time; edges and first hazards are learned from about 64 rows of the training split.
    time_to_event_rank: of the product of patient and code that gives the hazards.
    """

    code_weight: float = 1.0
    value_weight: float = 1.0
    forecast_weight: float = 0.0
    time_to_event_weight: float = 0.0
    mask_fraction: float = 0.2
    span_fraction: float = 0.5
    span_length: int = 8
    horizon_hours: float = 24.0
    forecast_points: int = 8
    forecast_variables: int = 64
    time_to_event_fraction: float = 0.02
    time_to_event_bins: int = 8
    time_to_event_rank: int = 32

    def __post_init__(self) -> None:
        positive(self, "horizon_hours", "span_length", "forecast_points", "forecast_variables")
        positive(self, "time_to_event_bins", "time_to_event_rank")
        weights = ("code_weight", "value_weight", "forecast_weight", "time_to_event_weight")
        not_negative(self, *weights)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError(f"{', '.join(weights[:-1])} and {weights[-1]} are all 0: give one of them another value")
        check(
            self,
            mask_fraction=(0 < self.mask_fraction < 1, "must be in (0, 1)"),
            span_fraction=(0 <= self.span_fraction <= 1, "must be in [0, 1]"),
            time_to_event_fraction=(0 < self.time_to_event_fraction <= 1, "must be in (0, 1]"),
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    num_workers: Ray workers, each on its own CPUs or GPU; in fine-tuning, those of each trial.
    zero_stage: DeepSpeed ZeRO stage: 0 shares nothing between workers, 1 the optimiser's state, 2 gradients too, 3
        weights too.
    precision: "fp32", or "bf16" for bf16 arithmetic with float32 parameters.
    rows_per_step: packed rows of one optimiser step over all workers; it stays the same when the number of workers
        changes (each worker accumulates rows_per_step / num_workers rows).
    max_steps: optimiser steps.
    warmup_steps: steps of linear warm-up; a cosine decay to the last step follows.
    learning_rate: the highest, after the warm-up.
    min_lr_fraction: learning rate at max_steps as a fraction of the highest, also where a run goes on with another
        max_steps.
    weight_decay: AdamW's; norms, embeddings, `A_log`, `D`, `dt_bias` and `time_weight` are never decayed.
    beta1: AdamW's.
    beta2: AdamW's.
    clip_norm: largest norm of the gradient; a larger one is scaled down to it.
    activation_checkpointing: blocks are computed again in the backward pass: less memory, more time.
    compile: torch.compile for the embedding and the MLPs; not with ZeRO 3.
    eval_every: steps between evaluations on the tuning split, each followed by a checkpoint.
    eval_rows: packed rows that an evaluation of pretraining reads, about.
    eval_labels: labels that an evaluation of a trial scores, about; of more, a sample stands for all.
    log_every: steps between points on TensorBoard.
    keep: best checkpoints kept, besides the last.
    patience: evaluations without improvement before the run stops early; 0 is never.
    max_failures: how often dead workers are replaced before the run gives up.
    max_skipped: steps in a row that may be skipped because loss or gradient is not finite; one more ends the run.
    cpus_per_worker: CPUs of a worker.
    seed: of weights, order of the data, masks and dropout.
    """

    num_workers: int = 1
    zero_stage: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    rows_per_step: int = 4
    max_steps: int = 1000
    warmup_steps: int = 50
    learning_rate: float = 1e-3
    min_lr_fraction: float = 0.1
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 1.0
    activation_checkpointing: bool = False
    compile: bool = False
    eval_every: int = 100
    eval_rows: int = 64
    eval_labels: int = 20_000
    log_every: int = 10
    keep: int = 2
    patience: int = 0
    max_failures: int = 3
    max_skipped: int = 10
    cpus_per_worker: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "num_workers", "rows_per_step", "max_steps", "learning_rate", "clip_norm")
        positive(self, "eval_every", "eval_rows", "eval_labels", "log_every", "keep", "cpus_per_worker")
        not_negative(self, "weight_decay", "patience", "max_failures", "max_skipped", "seed")
        workers, steps = self.num_workers, self.max_steps
        check(
            self,
            zero_stage=(self.zero_stage in (0, 1, 2, 3), "must be 0, 1, 2 or 3 (DeepSpeed ZeRO)"),
            compile=(
                not self.compile or self.zero_stage < 3,
                "needs zero_stage=0, 1 or 2: stage 3 gathers weights between the operators that it would join",
            ),
            rows_per_step=(self.rows_per_step % workers == 0, f"must be a multiple of num_workers={workers}"),
            warmup_steps=(0 <= self.warmup_steps < steps, f"must be at least 0 and below max_steps={steps}"),
            min_lr_fraction=(0 <= self.min_lr_fraction <= 1, "must be in [0, 1]"),
        )


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives: the folder `<dir>/<name>`. The same name continues the run that is there.

    name: a plain folder name.
    dir: a folder or a URL.
    """

    name: str
    dir: Place = "runs"

    def __post_init__(self) -> None:
        name = self.name
        plain = name and "/" not in name and name[0] not in ".~" and not UNPRINTABLE.search(name)
        fits = plain and ("?" not in name or isinstance(parse_place(self.dir), Path))
        text = "must be a plain folder name (no /, no . or ~ at its beginning, at a URL no ?)"
        check(self, name=(bool(fits), text))


@dataclass(frozen=True)
class UtilityConfig:
    """What an alarm is worth at each hour, and which alarms are tried: for tasks whose labels come every hour or so and
    are positive from some hours before an onset on. The defaults are those of PhysioNet Challenge 2019.

    The worth of an alarm rises from 0 to `alarm` at the optimal hour and falls to 0 at the latest one; that of no alarm
    falls from 0 at the optimal hour to `missed` at the latest one; after it neither counts.

    early_hours: before the onset; earlier, an alarm is a false one.
    optimal_hours: before the onset, where alarms are worth most; the first positive label is so early.
    late_hours: after the onset.
    alarm: the most that an alarm is worth.
    missed: the worth of no alarm at the latest hour.
    false_alarm: the worth of an alarm for a patient without an onset, or too early.
    hold_hours: how long an alarm may stay on after the risk was last above the threshold; the tuning split chooses.
    """

    early_hours: float = 12.0
    optimal_hours: float = 6.0
    late_hours: float = 3.0
    alarm: float = 1.0
    missed: float = -2.0
    false_alarm: float = -0.05
    hold_hours: list[float] = field(default_factory=lambda: [0.0, 3.0, 6.0])

    def __post_init__(self) -> None:
        positive(self, "alarm")
        check(
            self,
            early_hours=(self.early_hours > self.optimal_hours, "must be more than optimal_hours"),
            late_hours=(self.late_hours > -self.optimal_hours, "must be after the optimal hour"),
            missed=(self.missed <= 0, "must not be positive"),
            false_alarm=(self.false_alarm < 0, "must be negative"),
            hold_hours=(min(self.hold_hours, default=-1) >= 0, "must be a list of hours, e.g. [0, 3]"),
        )


@dataclass(frozen=True)
class InTime:
    """What is predicted of a task in time: by each of horizons_days the incidence of the event and, where one is named,
    of the competing one.
    """

    horizons_days: list[float]
    competing: str | None = None

    def __post_init__(self) -> None:
        days = self.horizons_days
        rise = bool(days) and days == sorted(set(days)) and days[0] > 0
        check(self, horizons_days=(rise, "must be days that rise, e.g. [7, 30, 90]"))

    @property
    def num_causes(self) -> int:
        return 1 if self.competing is None else 2


@dataclass(frozen=True)
class TaskConfig:
    """A prediction task: a folder of MEDS labels, or an ACES definition that makes them.

    name: names the head, its predictions and `labels/<name>` of a dataset.
    labels: folder of MEDS label Parquet files; null: `labels/<name>` of the dataset where it exists, else
        extracted with `definition`.
    definition: ACES task (predicates, trigger, windows; one window has a `label`, one an `index_timestamp`) or
        null.
    competing: the predicate of `definition` that stands for death, where death is a competing risk: a patient who died
        up to the prediction time gets no label.
    competing_rule: for a death before the label window ends without the label's event: "negative" (the event did not
        happen) or "exclude" (no label).
    censoring_rule: for a label whose record ends inside its window, without a death there. "exclude": no label, with
        the event or without (the whole window must be seen). "exclude_negatives": with the event it is positive,
        without it there is no label, which raises the fraction of positives. "weights": the same, and the labels that
        remain have inverse-probability-of-censoring weights, which make up for it.
    kinds: predicates of `definition` that distinguish kinds of the label's event, to count them; where false, an event
        of this kind does not count as the label's.
    start: when what the label is about begins: the "trigger", or the last event of a predicate of `definition` up to
        the prediction time; null: the label belongs to its prediction time alone. A patient may be shown as at any
        time from the start on (`early_fraction`), never as before.
    longer_than_days: null, or the task is how long something lasts: the label is whether the label window ends more
        than this after the trigger, and the days themselves are learned and predicted beside it.
    utility: null, or what alarms are worth by the hours before the onset: the report then judges alarms, too.
    kind: "binary": whether the label's event comes in its window. "time_to_event": when it comes, and whether
        `competing` comes first; a label whose record ends before either counts for as long as it was seen, so the
        rules above for competing events and censoring don't apply.
    horizons_days: of a task in time: by when the event is predicted to have come, in days from the prediction; what
        comes after the last is not looked at.
    """

    name: str
    labels: Place | None = None
    definition: dict[str, Any] | None = None
    competing: str | None = None
    competing_rule: Literal["negative", "exclude"] = "negative"
    censoring_rule: Literal["exclude", "exclude_negatives", "weights"] = "exclude"
    kinds: dict[str, bool] = field(default_factory=dict)
    start: str | None = None
    longer_than_days: float | None = None
    utility: UtilityConfig | None = None
    kind: Literal["binary", "time_to_event"] = "binary"
    horizons_days: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        days = self.longer_than_days
        check(
            self,
            name=(bool(self.name) and not {"/", "."} & set(self.name), "must be a folder name without a dot"),
            longer_than_days=(days is None or days > 0, "must be positive or null"),
        )
        if self.in_time:
            unfit = "must be left out with kind=time_to_event"
            check(
                self,
                competing_rule=(self.competing_rule == "negative", unfit),
                censoring_rule=(self.censoring_rule == "exclude", unfit),
                longer_than_days=(days is None, unfit),
                utility=(self.utility is None, unfit),
            )
        else:
            check(self, horizons_days=(not self.horizons_days, "need kind=time_to_event"))
        for name, code in _codes(self.definition or {}):
            if not isinstance(code, str):
                raise ConfigError(f"definition.predicates.{name}.code must be text, got {code!r}: {QUOTE_IT}")

    @property
    def in_time(self) -> InTime | None:
        """What is predicted, where it is when and not only whether."""
        return InTime(self.horizons_days, self.competing) if self.kind == "time_to_event" else None

    def require_whether(self, what: str) -> None:
        """Raises ConfigError where it is in time, which `what` can't do."""
        if self.in_time:
            raise ConfigError(f"task.kind=time_to_event: {what} can't do a task in time: give one of kind=binary")


@dataclass(frozen=True)
class SearchConfig:
    """The fine-tuning search.

    num_trials: how many settings are tried.
    metric: what picks the best checkpoint on the tuning split: "mean" of AUROC, AUPRC and, where a task has days,
        concordance; or one of the first two. Of a task in time it is the AUROC, the mean of those by its horizons. With
        several tasks, the mean over them counts.
    max_concurrent: trials at the same time; 0 is as many as the machine or cluster holds.
    grace_steps: steps before ASHA may stop a trial.
    reduction_factor: ASHA lets one in so many trials go on to the next rung.
    max_failures: how often a trial that died is tried again.
    space: parameter -> a value, {choice: [...]}, {uniform: [low, high]} or {loguniform: [low, high]}; parameters are
        `backbone_lr`, `head_lr`, `dropout`, `frozen`, `context`, `pooling`, `weight_decay`, `early_fraction`,
        `teacher_fraction`. A choice of `pooling` named `ours` is not for a model with the paper's, which keeps it.
    """

    num_trials: int = 8
    metric: Literal["mean", "auroc", "auprc"] = "mean"
    max_concurrent: int = 0
    grace_steps: int = 100
    reduction_factor: int = 3
    max_failures: int = 1
    space: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(self, "num_trials", "grace_steps")
        check(
            self,
            max_concurrent=(self.max_concurrent >= 0, "must be 0 (what the machine holds) or more"),
            reduction_factor=(self.reduction_factor >= 2, "must be at least 2"),
        )


@dataclass(frozen=True)
class ReportConfig:
    """What report.md shows besides the model's scores.

    boosting: whether gradient boosting is fitted for comparison.
    ensemble: whether the bundle's risk is the mean of the network's and that of plain models: boosting and, where the
        table of features is small, logistic regression. The report then compares it with the network, the plain models
        and boosting.
    subgroups: regular expressions of static codes; each code that one matches is a group, besides the sexes.
    age_bands: where a new band of ages at the prediction time begins, in years.
    """

    boosting: bool = True
    ensemble: bool = False
    subgroups: list[str] = field(default_factory=list)
    age_bands: list[int] = field(default_factory=lambda: [18, 45, 65, 80])

    def __post_init__(self) -> None:
        for pattern in self.subgroups:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"subgroups: {pattern!r} is not a regular expression: {error}") from error
        rise = bool(self.age_bands) and self.age_bands == sorted(set(self.age_bands))
        check(
            self,
            age_bands=(rise, "must rise, e.g. [18, 65]"),
            ensemble=(self.boosting or not self.ensemble, "needs report.boosting=true"),
        )


def _codes(definition: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each code or regular expression of an ACES definition, with its predicate's name."""
    predicates = definition.get("predicates")
    for name, predicate in predicates.items() if isinstance(predicates, Mapping) else ():
        code = predicate.get("code", "") if isinstance(predicate, Mapping) else ""
        for value in code.values() if isinstance(code, Mapping) else [code]:
            for text in value if isinstance(value, list) else [value]:
                yield name, text
