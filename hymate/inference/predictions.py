"""Tables of predictions, as the MEDS prediction schema has them, whichever model made them.

Shape legend: E examples, C causes, H horizons.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from hymate.config import InTime
from hymate.data.examples import Examples

RISK = "predicted_boolean_probability"


def prediction_table(examples: Examples, probability_E: np.ndarray) -> pa.Table:
    """The MEDS prediction table, by subject and time; boolean_value only where every example has a label."""
    values = {} if np.isnan(examples.label_E).any() else {"boolean_value": pa.array(examples.label_E > 0.5, pa.bool_())}
    values["predicted_boolean_value"] = pa.array(probability_E >= 0.5, pa.bool_())
    values[RISK] = pa.array(probability_E, pa.float32())
    return _by_subject_and_time(examples, values)


def day_table(examples: Examples, days_E: np.ndarray) -> pa.Table:
    """Predicted days, by subject and time, in the manner of the MEDS prediction schema, which has none for numbers."""
    known = {} if np.isnan(examples.days_E).all() else {"float_value": pa.array(examples.days_E, from_pandas=True)}
    return _by_subject_and_time(examples, {**known, "predicted_float_value": pa.array(days_E, pa.float32())})


def incidence_table(examples: Examples, incidence_ECH: np.ndarray, asked: InTime) -> pa.Table:
    """The incidences of a task in time, by subject and time: of the event "predicted_incidence_7d" and so on by each
    horizon, of the competing one "predicted_competing_7d".
    """
    columns = {
        f"predicted_{kind}_{horizon:g}d": pa.array(incidence_ECH[:, cause, number], pa.float32())
        for cause, kind in enumerate(("incidence", "competing")[: asked.num_causes])
        for number, horizon in enumerate(asked.horizons_days)
    }
    return _by_subject_and_time(examples, columns)


def _by_subject_and_time(examples: Examples, values: dict[str, pa.Array]) -> pa.Table:
    columns = {
        "subject_id": pa.array(examples.subject_id_E, pa.int64()),
        "prediction_time": pa.array(examples.prediction_time_E, pa.timestamp("us")),
    }
    return pa.table(columns | values).sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")])
