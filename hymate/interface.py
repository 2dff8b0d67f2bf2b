"""A model in Python: from tables of events in memory to predictions, patient vectors and explanations.

    model = hymate.load("runs/tune-readmission")
    risk = model.predict(events, at="2026-01-01T08:00")

It does what the commands `hymate.predict` and `hymate.explain` do, without files: events become known at the same
times, and the same model reads the same histories. Nothing that it is given is changed or kept.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hymate.data.codemap import CodeMap
from hymate.data.examples import Examples, labelled_examples, united
from hymate.data.histories import Histories
from hymate.data.meds import DATA_SCHEMA
from hymate.data.tables import events_of, histories_of, times_of
from hymate.device import Wanted, choose
from hymate.errors import UserError
from hymate.evaluation.attribution import Explainer, event_table
from hymate.inference.bundle import Bundle, build_model, read_bundle
from hymate.inference.predictions import day_table, prediction_table
from hymate.inference.scoring import last_rows, patient_vectors, predict_last, predict_whole
from hymate.inference.states import HeldStates
from hymate.inference.streaming import check_streamable
from hymate.storage.paths import locate

Table = Any  # of pyarrow, polars or pandas


def load(bundle: str | os.PathLike[str], device: Wanted = "auto", codes: str | os.PathLike[str] | None = None) -> Model:
    """The model of a bundle.

    bundle: a risk bundle or the folder of a search, a local path or a URL.
    device: "auto" takes a GPU if what the model needs for it is installed, else the CPU; or "cpu", "cuda".
    codes: code map of the events that it will be given, where their codes or units are not the model's: a CSV file, or
        the name of one of ours.

    Raises UserError where there is no bundle, where it is damaged, and where it holds no risk model, or one of a task
    in time.
    """
    found = read_bundle(locate(os.fspath(bundle)), kind="risk")
    found.require_whether("hymate.load")
    mapped = None if codes is None else CodeMap.read(os.fspath(codes)).under(found.known)
    return Model(found, choose(device, found.model), mapped)


@dataclass(frozen=True)
class Patients:
    """What `Model.append` has read: patient data. It is never changed; more events make a new one.

    events: all events so far, a pyarrow table with MEDS's columns (for `embed` and `explain`).
    """

    events: pa.Table = field(default_factory=DATA_SCHEMA.empty_table, repr=False)
    _states: HeldStates = field(default_factory=HeldStates, repr=False)
    _bundle: str = field(default="", repr=False)


class Model:
    """A risk model, as `hymate.load` gives it.

    tasks: what it predicts.
    in_days: those of the tasks that it also predicts in days.

    `predict`, `embed` and `explain` are asked about

    events: a MEDS table of pyarrow, polars or pandas, of one subject or many. Columns: subject_id (integer), time (a
        timestamp in UTC; null for what holds at all times, such as sex), code (text) and numeric_value (a number or
        null; the column may be missing). Others are not read. Rows may be in any order. The model reads no event that
        is stamped after the prediction time, or that becomes known after it by the rules in the bundle.
    at: the prediction time of all subjects in `events`, as ISO text or a datetime in UTC; or a table with subject_id
        and prediction_time, such as MEDS labels. Where nothing is known of a subject by then, the prediction is left
        out, with a warning.

    Mistakes raise `hymate.errors.UserError`: one line, which quotes neither ids nor values.
    """

    def __init__(self, bundle: Bundle, device: torch.device, codes: CodeMap | None = None) -> None:
        self.tasks: Sequence[str] = tuple(bundle.tasks)
        self.in_days: Sequence[str] = tuple(bundle.in_days)
        self._bundle, self._device, self._codes = bundle, device, codes
        self._model = build_model(bundle).to(device)

    def predict(
        self, events: Table | Patients, at: str | datetime | Table, task: str | None = None, days: bool = False
    ) -> float | pa.Table:
        """The risk, a float from 0 to 1, where `at` is a time and `events` has one subject; else a pyarrow table.

        The table is as the command `hymate.predict` writes it, by subject and time: subject_id, prediction_time,
        boolean_value where `at` has it, predicted_boolean_value and predicted_boolean_probability; or, in days,
        float_value where `at` has it, and predicted_float_value.

        events: a table, of which the last events are read, as many as in the model's fine-tuning (context=bundle); or
            what `append` returned, of which all are (context=all).
        task: needed where the model has several.
        days: how many days instead of the risk, for a task in `in_days`.
        """
        number = self._number(task)
        if days and self.tasks[number] not in self.in_days:
            raise UserError(f"task {self.tasks[number]} has no days: ask for its risk, with days=False")
        patients = events if isinstance(events, Patients) else None
        if patients is not None:
            self._check(patients)
        histories, examples, is_one = self._asked(self._events(events) if patients is None else patients.events, at)
        of_tasks = united([examples] * len(self.tasks))
        if patients is not None:
            states = HeldStates(patients._states)
            outputs, *_ = predict_whole(self._model, self._bundle, histories, of_tasks, self._device, states)
        else:
            outputs, *_ = predict_last(self._model, self._bundle, histories, of_tasks, self._device)
        own = outputs.only(number)
        found_E = (own.days_ET if days else own.probability_ET)[:, 0]
        if is_one:
            return float(found_E[0])
        return day_table(examples, found_E) if days else prediction_table(examples, found_E)

    def embed(self, events: Table, at: str | datetime | Table) -> np.ndarray | pa.Table:
        """The patient vector: what the network knows of a patient at a time, from which its heads predict.

        A NumPy array, float32 (X,), where `at` is a time and `events` has one subject; else a pyarrow table by subject
        and time: subject_id, prediction_time and vector (lists of X).
        """
        histories, examples, is_one = self._asked(self._events(events), at)
        of_tasks = united([examples] * len(self.tasks))
        vector_EX = patient_vectors(self._model, last_rows(self._bundle, histories, of_tasks), self._device)
        if is_one:
            return vector_EX[0]
        vectors = pa.FixedSizeListArray.from_arrays(vector_EX.ravel(), vector_EX.shape[1])
        times = prediction_table(examples, np.zeros(len(examples))).select(["subject_id", "prediction_time"])
        return times.append_column("vector", vectors)

    def explain(self, events: Table, at: str | datetime | Table, task: str | None = None) -> pa.Table:
        """Which events moved the risk: a pyarrow table with a row for each event that the model read.

        subject_id, prediction_time, time (null for static events), code, numeric_value, attention (null where the model
        has none), attribution (integrated gradients; in units of the logit, positive where it raised the risk). The
        attributions of a prediction sum to its logit less that of the same history with nothing known of its events.

        Raises UserError where the risk is the mean of a network and plain models (`report.ensemble`).
        """
        bundle = self._bundle.for_task(self.tasks[self._number(task)])
        histories, examples, _ = self._asked(self._events(events), at)
        explainer = Explainer(bundle, histories, self._device)
        cases = explainer.cases(examples, np.arange(len(examples)))
        pairs = zip(cases, explainer.attributions(cases), strict=True)
        return pa.concat_tables([event_table(histories.codes, case, attribution) for case, attribution in pairs])

    def append(self, patients: Patients | None, events: Table) -> Patients:
        """The patients with more events; `patients` is None at the first.

        The model reads each event once, into a state that stands for the history so far (`hymate.inference.streaming`).
        An event that comes late, with a time before that of others, takes its place among them: the model then reads
        that subject's history again from its start.

        Raises UserError where the model is none that can go on from a state, and where another made `patients`.
        """
        check_streamable(self._bundle.model)
        before = Patients(_bundle=self._bundle.fingerprint) if patients is None else patients
        self._check(before)
        new = self._events(events)
        everything = pa.concat_tables([before.events, new]).combine_chunks()
        touched = everything.filter(pc.is_in(everything["subject_id"], new["subject_id"].unique()))
        last = touched.group_by("subject_id").aggregate([("time", "max")]).drop_null()
        histories = histories_of(touched, self._bundle.known)
        times = last.rename_columns(["subject_id", "prediction_time"])
        examples = united([labelled_examples(histories, times, "all", required=False)] * len(self.tasks))
        states = HeldStates(before._states)
        if len(examples):
            network = replace(self._bundle, plain={})  # only it has a state
            predict_whole(self._model, network, histories, examples, self._device, states)
        return Patients(everything, states, self._bundle.fingerprint)

    def _number(self, task: str | None) -> int:
        """A task's place among those of the model."""
        if task is None and len(self.tasks) == 1:
            return 0
        if task not in self.tasks:
            what = "several tasks: give task=, one of" if task is None else f"no task {task}: it predicts"
            raise UserError(f"the model has {what} {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def _check(self, patients: Patients) -> None:
        if not isinstance(patients, Patients):
            raise UserError("patients: what append returned is needed, or None at the first events")
        if patients._bundle != self._bundle.fingerprint:
            raise UserError("another model has read these patients: append their events to this one, from None on")

    def _events(self, given: Table) -> pa.Table:
        """The events of a table with the model's codes."""
        events = events_of(given)
        return self._codes.apply_to_table(events, "events") if self._codes else events

    def _asked(self, events: pa.Table, at: str | datetime | Table) -> tuple[Histories, Examples, bool]:
        """The histories, the times at which something is known of them, and whether that is one prediction."""
        histories = histories_of(events, self._bundle.known)
        if not self._bundle.vocabulary.ids_of(histories.codes).any():
            raise UserError("events: none has a code that the model knows: coded differently? codes= maps them")
        times = times_of(at, histories.index.subject_id_P)
        examples = labelled_examples(histories, times, "all", required=False)
        if not len(examples):
            raise UserError("at: nothing is known by then: give a time that is not before the first event, in UTC")
        if left_out := len(times) - len(examples):
            warnings.warn(
                f"{left_out} of {len(times)} prediction times are left out: no event of their subject is known by then",
                stacklevel=3,
            )
        return histories, examples, isinstance(at, str | datetime) and len(histories) == 1
