"""Predictions of a bundle that is nowhere yet, in parts: those of one pass, whoever makes them, and once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import SMALL

from hymate.config import DataConfig, TrainConfig
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.device import CPU
from hymate.inference import dataset
from hymate.inference.bundle import Bundle
from hymate.inference.scoring import predict
from hymate.tuning.trial import TrialConfig, risk_model, starting_point


@pytest.mark.slow
def test_many_examples_are_scored_in_parts(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DataConfig(str(small_data), context=32, tokens_per_row=64, min_count=1)
    start = starting_point(settings, SMALL, None)
    trial = TrialConfig(["stay"], ["stay"], settings, SMALL, TrainConfig(), 1e-3, 1e-3)
    state = risk_model(start, trial).state_dict()
    bundle = Bundle("risk", SMALL, settings, start.vocabulary, state, ["stay"], ["stay"])
    histories = Histories.open(small_data)
    examples = labelled_examples(histories, read_labels(small_data / "labels" / "readmission"), "tuning")
    alone = predict(bundle, histories, examples, CPU)
    monkeypatch.setattr(dataset, "PART", 10)
    found = []
    for workers in (1, 2):
        monkeypatch.setattr(dataset, "available_cpus", lambda number=workers: number)
        found.append(dataset.spread_outputs(bundle, histories, examples, "cpu", tmp_path / str(workers)))
    for name in ("logit_ET", "log_days_ET"):
        first, second = (getattr(each, name) for each in found)
        assert np.isfinite(first).all()
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, getattr(alone, name), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(dataset, "available_cpus", lambda: 1)
    monkeypatch.delattr(dataset, "predict_last")  # a killed call's parts are not scored again
    again = dataset.spread_outputs(bundle, histories, examples, "cpu", tmp_path / "2")
    np.testing.assert_array_equal(again.logit_ET, found[1].logit_ET)
