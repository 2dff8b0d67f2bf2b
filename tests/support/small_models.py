"""The small models of the tests, and bundles of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hymate.config import DataConfig, ModelConfig
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.data.vocabulary import Vocabulary
from hymate.inference.bundle import Bundle
from hymate.model.encoder import RiskModel

SMALL = ModelConfig(d_model=16, layers="MA", d_state=8, headdim=8, num_heads=2, window=8, num_queries=2)
PAPER = replace(
    SMALL, embedding="plain", mixer="mamba1", causal=False, window=0, mlp_ratio=0.0, pooling="attention", num_queries=1
)
_EXACT = replace(SMALL, dropout=0.0)
_SHORT = replace(_EXACT, layers="M")
# a model of every kind, without dropout
KINDS = {
    "mamba2": _EXACT,
    "mamba1": replace(_EXACT, layers="MMA", mixer="mamba1", d_state=4, window=0),
    "bidirectional": replace(_EXACT, bidirectional=True),
    "paper": replace(PAPER, layers="MMA", d_state=4, dropout=0.0),
    "recurrent": replace(_EXACT, layers="GA"),
    "last": replace(_SHORT, pooling="last"),
    "mean": replace(_SHORT, pooling="mean"),
    "variables": replace(_SHORT, pooling="variables", num_queries=3),
    "elapsed": replace(_SHORT, pooling="last", elapsed=True),
    "three of fusion": replace(_SHORT, members=3),
    "three of variables": replace(_SHORT, pooling="variables", members=3),
    "timed": replace(_SHORT, layers="MM", time_aware_scan=True),
    "timed, both ways": replace(_SHORT, mixer="mamba1", bidirectional=True, time_aware_scan=True),
}
T = TypeVar("T", bound=nn.Module)


def timed(model: T) -> T:
    """The same with steps that do depend on the hours: those of a new model's time-aware scans don't yet."""
    for name, parameter in model.named_parameters():
        if name.endswith("time_weight"):
            nn.init.normal_(parameter, std=0.5)
    return model


def small_vocabulary(num_codes: int = 5) -> Vocabulary:
    columns: dict[str, list[Any]] = {
        "code": [f"LAB//{i}" for i in range(num_codes)],
        "id": list(range(num_codes)),
        "count": [100 - i for i in range(num_codes)],
        "subjects": [10] * num_codes,
        "value_count": [50] * num_codes,
        "median": [0.5] * num_codes,
        "scale": [2.0] * num_codes,
        "quantiles": [np.linspace(0, 1, NUM_KNOTS, dtype=np.float32).tolist()] * num_codes,
    }
    return Vocabulary(pa.table(columns, schema=VOCABULARY_SCHEMA))


def vocabulary_of(data: Path) -> Vocabulary:
    """All codes of a prepared dataset."""
    return Vocabulary.read(data / "histories" / "vocabulary.parquet")


def risk_model(
    config: ModelConfig = SMALL, vocab_size: int | None = None, seed: int = 0, tasks: Sequence[str] = ("readmission",)
) -> RiskModel:
    """With new weights; of `small_vocabulary` where no size is given."""
    torch.manual_seed(seed)
    return RiskModel(config, vocab_size or small_vocabulary().size, tasks).eval()


def write_risk_bundle(
    folder: Path,
    vocabulary: Vocabulary,
    model: ModelConfig = SMALL,
    *,
    state: dict[str, torch.Tensor] | None = None,
    context: int = 64,
    seed: int = 0,
    tasks: Sequence[str] = ("readmission",),
    card: str = "",
    **changes: Any,
) -> Path:
    """`folder`, now with a bundle of `risk_model`; `state`: other weights; `changes`: other settings of a bundle."""
    settings: dict[str, Any] = {
        "kind": "risk",
        "data": DataConfig("somewhere", context=context, tokens_per_row=128, min_count=1),
        "tasks": list(tasks),
        **changes,
    }
    if state is None:
        state = risk_model(model, vocabulary.size, seed, tasks).state_dict()
    Bundle(model=model, vocabulary=vocabulary, state=state, **settings).write(folder, card)
    return folder
