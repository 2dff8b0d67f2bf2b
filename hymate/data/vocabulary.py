"""The codes a model knows and how their values are normalised, from the train split only.

Shape legend: V vocabulary ids (the two special ones, then one a code), Q quantile knots, L events.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hymate.data.histories import FOLDER, Histories
from hymate.data.meds import UNREADABLE, read_parquet, write_parquet
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.errors import UserError
from hymate.model.batch import FIRST_CODE_ID, UNKNOWN_ID
from hymate.storage.paths import Location

Z_LIMIT = 8.0  # recording errors (a pH of 735) would otherwise dominate


class Vocabulary:
    """A model's codes: id UNKNOWN_ID, id MASK_ID, then the codes by (training count descending, code).

    table: vocabulary.parquet's, in this order. codes: the codes; size: V.
    count_V: int64, training events; 0 for the special ids.
    median_V, scale_V: float32; robust centre and spread of the code's values (0 and 1 where it has none).
    quantiles_VQ: float32, values at probabilities linspace(0, 1, Q); NaN where the code has none.
    """

    def __init__(self, table: pa.Table) -> None:
        order = [("count", "descending"), ("code", "ascending")]
        self.table = table.sort_by(order).combine_chunks()
        self.codes: list[str] = self.table["code"].to_pylist()
        self.size = len(self.codes) + FIRST_CODE_ID
        self.count_V = self._column("count", np.int64, 0)
        self.median_V = self._column("median", np.float32, 0)
        self.scale_V = self._column("scale", np.float32, 1)
        self.quantiles_VQ = np.full((self.size, NUM_KNOTS), np.nan, np.float32)
        has_values = self.table["value_count"].to_numpy() > 0
        knots = pc.list_flatten(self.table["quantiles"]).to_numpy()
        self.quantiles_VQ[FIRST_CODE_ID:][has_values] = knots.reshape(-1, NUM_KNOTS)
        self._ids = {code: id for id, code in enumerate(self.codes, start=FIRST_CODE_ID)}

    def _column(self, name: str, dtype: type, special: float) -> np.ndarray:
        return np.concatenate([np.full(FIRST_CODE_ID, special), self.table[name].to_numpy()]).astype(dtype)

    @classmethod
    def read(cls, path: Location, min_count: int = 1) -> Vocabulary:
        """Read vocabulary.parquet, without the codes of fewer than `min_count` training events.

        Raises UserError where the file is missing or not a vocabulary.
        """
        try:
            table = read_parquet(path, VOCABULARY_SCHEMA.names)
            _check(table)
        except (*UNREADABLE, KeyError, ValueError) as error:
            raise UserError(f"{path}: missing or not a vocabulary: prepare the dataset again") from error
        return cls(table.filter(pc.field("count") >= max(min_count, 1)))

    @classmethod
    def of(cls, histories: Histories, min_count: int) -> Vocabulary:
        """What a model of a prepared dataset knows."""
        return cls.read(histories.path / FOLDER / "vocabulary.parquet", min_count)

    def write(self, path: Location) -> None:
        """Write the codes and their statistics, atomically; `read` gives the same vocabulary back."""
        ids = pa.array(np.arange(len(self.codes), dtype=np.int32))
        position = VOCABULARY_SCHEMA.get_field_index("id")
        write_parquet(self.table.set_column(position, VOCABULARY_SCHEMA.field("id"), ids), path)

    def ids_of(self, codes: Sequence[str]) -> np.ndarray:
        """The ids (int32) of codes, UNKNOWN_ID for those the model does not know."""
        return np.array([self._ids.get(code, UNKNOWN_ID) for code in codes], np.int32)

    def normalise(self, id_L: np.ndarray, value_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Robustly normalised values of events and their ranks in their codes' training distributions.

        id_L: int, model ids; value_L: float32, NaN where none.
        Returns z_L = (value - median) / scale, clipped to +-Z_LIMIT, and quantile_L in [-1, 1] (linear between
        the knots, the middle of tied ones); float32, NaN where there is no value or none in training to compare
        it with (in particular for unknown codes).
        """
        knots_LQ = self.quantiles_VQ[id_L]
        value_L = np.where(np.isnan(knots_LQ[:, 0]), np.nan, value_L.astype(np.float64))
        z_L = np.clip((value_L - self.median_V[id_L]) / self.scale_V[id_L], -Z_LIMIT, Z_LIMIT)
        return z_L.astype(np.float32), (2 * _rank(value_L, knots_LQ) - 1).astype(np.float32)


def _check(table: pa.Table) -> None:
    """Raises ValueError where a table is not what `CodeStatistics.vocabulary` makes."""
    if table.schema.types != VOCABULARY_SCHEMA.types:
        raise ValueError("not a vocabulary")
    numbers = {name: table[name].to_numpy() for name in ("count", "value_count", "median", "scale")}
    size_C = pc.list_value_length(table["quantiles"]).to_numpy()
    knots = pc.list_flatten(table["quantiles"])
    sound = (
        not any(column.null_count for column in (*table.columns, knots))
        and len(table["code"].unique()) == table.num_rows
        and all((numbers[name] >= 0).all() for name in ("count", "value_count"))
        and np.isfinite(numbers["median"]).all()
        and (numbers["scale"] > 0).all()
        and np.array_equal(size_C, NUM_KNOTS * (numbers["value_count"] > 0))
    )
    knots_CQ = knots.to_numpy().reshape(-1, NUM_KNOTS) if sound else np.zeros((0, NUM_KNOTS))
    if not sound or not (np.isfinite(knots_CQ).all() and (knots_CQ[:, 1:] >= knots_CQ[:, :-1]).all()):
        raise ValueError("not a vocabulary")


def _rank(value_L: np.ndarray, knots_LQ: np.ndarray) -> np.ndarray:
    """Where in [0, 1] values stand among ascending knots; NaN for NaN."""
    below_L = (knots_LQ < value_L[:, None]).sum(axis=1)
    upto_L = (knots_LQ <= value_L[:, None]).sum(axis=1)
    left_L, right_L = np.maximum(below_L - 1, 0), np.minimum(below_L, NUM_KNOTS - 1)
    rows_L = np.arange(len(value_L))
    low_L, high_L = (knots_LQ[rows_L, side_L].astype(np.float64) for side_L in (left_L, right_L))
    between_L = left_L + (value_L - low_L) / np.where(high_L > low_L, high_L - low_L, 1)
    tied_L = (below_L + upto_L - 1) / 2
    rank_L = np.where(upto_L > below_L, tied_L, np.clip(between_L, 0, NUM_KNOTS - 1)) / (NUM_KNOTS - 1)
    return np.where(np.isnan(value_L), np.nan, rank_L)
