"""A synthetic cohort in MEDS whose 30-day readmission follows a known law.

Every subject goes through hospital stays one after the other. What happens after a discharge is drawn from what
the record shows up to then, so that the best prediction any model can make is known for each discharge:

1. Follow-up is lost with probability LOST, whatever the outcome would have been: nothing is recorded afterwards
   but perhaps one outpatient visit. Such a discharge is censored and gets no label.
2. Otherwise the subject is readmitted within 30 days with probability p, the law: a positive label.
3. Otherwise the subject dies within the window with probability DEATH_IN_WINDOW (a negative label where a death
   counts as one), or is seen again after day 30 (at a later admission, or a last outpatient visit): negative.

Step 1 does not look at the outcome, so among the discharges that it leaves P(readmitted | record) = p exactly. Of the
readmitted, a fraction q (about 0.05) is lost in the window all the same, after the next stay, by step 1 of that. A
label asks for the whole window (task.censoring_rule=exclude), so these have none, and P(label | record) is
p (1 - q) / (1 - p q). Nothing in the record up to the discharge shows who they are: the order is that of p, and with
it the best AUROC and AUPRC; the Brier score of p is 0.0001 above the best. Where deaths in the window are left out
instead of counted as negative, the order is the same again.

The law is in law.py. With `shuffled_labels` p is the same for every discharge, and nothing in the record
predicts the outcome. With `driver_distance` the law has one driver, which lies hundreds to thousands of events before
the discharge; every stay then has as many events as the next, evenly spread over it.

Death in hospital and length of stay depend on a severity that shows in the lactate and heart rate of the first
24 hours, and on age and the kind of admission.

Shapes: P patients, S stays, A stays drawn at once, M measurements of a stay, E events, C codes. Times are
minutes since 1970.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hymate import __version__
from hymate.data.meds import SPLITS, SplitsConfig, codes_table, write_metadata, write_parquet
from hymate.data.synthetic import law as law
from hymate.data.synthetic.codes import CODES, DISTRACTORS
from hymate.data.synthetic.course import DEATH_IN_WINDOW, LOST, Patients, Stays, SyntheticConfig, simulate
from hymate.data.synthetic.events import US_PER_MINUTE, blocks_of, table_of
from hymate.storage.paths import Location, write_text

ORACLE = "oracle/readmission.parquet"


@dataclass(frozen=True)
class SyntheticSource:
    """The cohort as MEDS, and beside it `oracle/`: the best prediction of readmission that there is.

    oracle/readmission.parquet: one row a labelled discharge: subject_id, prediction_time, probability (the law's);
    with config.driver_distance also driver_distance, how many events a context must hold to see the driver (null
    where there is none).
    oracle/readmission.json: the law and its coefficients, and what the law's probability scores against the
    labels, overall and in each split: the ceiling of any model; with config.driver_distance also the ceiling of a
    model that sees the last so many events (auroc_by_context).
    """

    config: SyntheticConfig
    splits: SplitsConfig = SplitsConfig()  # noqa: RUF009 (it is frozen)
    name: str = "synthetic"

    def fingerprint(self) -> str:
        laws = law.LAW, law.COEFFICIENTS, law.DISTANT_LAW, law.DISTANT_COEFFICIENTS
        return hashlib.sha256(repr((self.config, self.splits, *laws, CODES)).encode()).hexdigest()

    def shards(self) -> list[str]:
        return list(self._shards())

    def _shards(self) -> dict[str, tuple[int, range]]:
        """Shard name -> (its number, its subject ids). Subjects are alike, so each split is a run of ids."""
        size = max(1, self.config.shard_events // self.config.mean_events)
        split_P = self._split_of_subjects()
        shards: dict[str, tuple[int, range]] = {}
        for split in SPLITS:
            id_P = 1 + np.flatnonzero(split_P == split)
            for i in range(0, len(id_P), size):
                ids = range(int(id_P[i]), int(id_P[min(i + size, len(id_P)) - 1]) + 1)
                shards[f"{split}/{i // size}"] = (len(shards), ids)
        return shards

    def _split_of_subjects(self) -> np.ndarray:
        return self.splits.assign((np.arange(self.config.subjects) + 0.5) / self.config.subjects)

    def _course(self, number: int, ids: range) -> tuple[Patients, Stays]:
        # A stream for the course and one for the rest of the events: `finish` draws the courses alone, again.
        return simulate(self._rng(number, 0), len(ids), self.config)

    def _rng(self, number: int, stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(number, stream)))

    def counts(self) -> dict[str, int]:
        return {}

    def write_shard(self, shard: str, out: Location) -> None:
        number, ids = self._shards()[shard]
        patients, stays = self._course(number, ids)
        blocks = blocks_of(self._rng(number, 1), patients, stays, self.config)
        write_parquet(table_of(blocks, stays, ids.start), out / "data" / f"{shard}.parquet")

    def finish(self, out: Location) -> None:
        subject_ids = np.arange(1, self.config.subjects + 1)
        splits = pa.table({"subject_id": subject_ids, "split": self._split_of_subjects().tolist()})
        dataset = {"dataset_name": "synthetic", "etl_name": "hymate", "etl_version": __version__}
        write_metadata(out, dataset, splits, codes_table({code: None for code in CODES}))

        discharges = pa.concat_tables([self._labelled(shard) for shard in self.shards()])
        write_parquet(discharges.drop_columns(["label", "split"]), out / ORACLE)
        write_text(json.dumps(self._ceiling(discharges), indent=1) + "\n", (out / ORACLE).with_suffix(".json"))

    def _labelled(self, shard: str) -> pa.Table:
        number, ids = self._shards()[shard]
        _, stays = self._course(number, ids)
        rows = np.flatnonzero(stays["labelled"])
        columns = {
            "subject_id": pa.array(stays["patient"][rows] + ids.start, pa.int64()),
            "prediction_time": pa.array(stays["discharge"][rows] * US_PER_MINUTE, pa.timestamp("us")),
            "probability": pa.array(stays["probability"][rows], pa.float64()),
            "label": pa.array(stays["label"][rows]),
            "split": pa.array([shard.split("/")[0]] * len(rows), pa.string()),
        }
        if self.config.driver_distance:
            absent = ~stays["heart_failure"][rows]
            columns["driver_distance"] = pa.array(stays["distance"][rows], pa.int64(), mask=absent)
        return pa.table(columns)

    def _ceiling(self, discharges: pa.Table) -> dict[str, Any]:
        from sklearn.metrics import average_precision_score, roc_auc_score  # late: a second that other sources save

        label_N, probability_N = discharges["label"].to_numpy(), discharges["probability"].to_numpy()
        subject_N, split_N = discharges["subject_id"].to_numpy(), discharges["split"].to_numpy()
        farthest = self.config.driver_distance

        def scores(chosen_N: np.ndarray) -> dict[str, Any]:
            label, probability = label_N[chosen_N], probability_N[chosen_N]
            found: dict[str, Any] = {
                "num_labels": len(label),
                "num_subjects": len(np.unique(subject_N[chosen_N])),
                "prevalence": float(label.mean()) if len(label) else None,
                "auroc": _defined(roc_auc_score, label, probability),
                "auprc": _defined(average_precision_score, label, probability),
                "brier": float(((probability - label) ** 2).mean()) if len(label) else None,
            }
            if farthest:
                distance = discharges["driver_distance"].fill_null(farthest + 1).to_numpy()[chosen_N]
                informs = not self.config.shuffled_labels
                doublings = math.ceil(math.log2(farthest / law.NEAREST))  # until the farthest driver is in view
                found["auroc_by_context"] = {
                    c: _defined(roc_auc_score, label, informs & (distance <= c))
                    for c in (law.NEAREST << i for i in range(1, doublings + 1))
                }
            return found

        # split by time these are other subjects, and later labels are left out
        own = SPLITS if self.splits.by == "subject" else ()
        return {
            "task": "readmission",
            "config": asdict(self.config),
            "shuffled_labels": self.config.shuffled_labels,
            "law": law.DISTANT_LAW if farthest else law.LAW,
            "coefficients": law.DISTANT_COEFFICIENTS if farthest else law.COEFFICIENTS,
            "distractors": DISTRACTORS,
            "lost_to_follow_up": LOST,
            "death_in_window_if_not_readmitted": DEATH_IN_WINDOW,
            "ceiling": {"all": scores(np.full(len(label_N), True)), **{s: scores(split_N == s) for s in own}},
        }


def _defined(area: Callable[..., float], label_N: np.ndarray, score_N: np.ndarray) -> float | None:
    """An area under a curve, None where the labels are of one class."""
    return float(area(label_N, score_N)) if 0 < label_N.sum() < len(label_N) else None


def ceiling(root: Location, task: str, split: str) -> dict[str, Any] | None:
    """What the law itself scores on a split of a synthetic cohort: no model can do better; None for other data, and
    where the cohort is split by time.
    """
    oracle = root / "oracle" / f"{task}.json"
    return json.loads(oracle.read_text())["ceiling"].get(split) if oracle.is_file() else None
