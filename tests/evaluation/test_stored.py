"""Feature tables on disk: the numbers of a table in memory, whatever the parts, and nothing done twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3 import BUCKET, environment, serving

from hymate.data.examples import Examples
from hymate.data.features import FeatureConfig, Rows, choose, features
from hymate.data.histories import Histories
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.synthetic.course import SyntheticConfig
from hymate.evaluation import stored
from hymate.storage.paths import locate

CONFIG = FeatureConfig((6.0, 48.0), max_features=200, min_labels=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Histories, dict[str, Examples]]:
    """Histories with labels at many of their events."""
    out = tmp_path_factory.mktemp("cohort")
    cohort = SyntheticConfig(subjects=60, mean_events=150)
    prepare(PrepareConfig(source="synthetic", out=str(out), synthetic=cohort, workers=1))
    histories = Histories.open(out)
    position_E = np.repeat(np.arange(len(histories)), 7)
    read = histories.read(np.arange(len(histories)))
    stop_E = np.concatenate([np.linspace(1, len(history), 7).astype(int) for history in read])
    time_E = np.array([read[p].time[stop - 1] for p, stop in zip(position_E, stop_E, strict=True)])
    stop_E = np.array(
        [np.searchsorted(read[p].time, time, side="right") for p, time in zip(position_E, time_E, strict=True)]
    )
    label_ET = np.random.default_rng(0).integers(0, 2, (len(position_E), 1)).astype(np.float32)
    nothing_ET = np.full_like(label_ET, np.nan)
    subject_id_E = histories.index.subject_id_P[position_E]
    every = Examples(position_E, stop_E, stop_E, time_E, label_ET, nothing_ET, np.ones_like(label_ET), subject_id_E)
    return histories, {"train": every.only(position_E < 40), "tuning": every.only(position_E >= 40)}


@pytest.mark.parametrize("cells", [1, 16_000_000])
def test_the_numbers_of_one_table(
    dataset: tuple[Histories, dict[str, Examples]], cells: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories, examples = dataset
    monkeypatch.setattr(stored, "PART", 50)
    monkeypatch.setattr(stored, "PART_CELLS", cells)
    spec = choose(histories, examples["train"], CONFIG)
    assert stored.chosen_in_parts(histories, examples["train"], CONFIG, tmp_path, here=True) == spec
    stored.store_tables(histories, examples, spec, tmp_path, here=True)
    with stored.stored_tables(spec, tmp_path) as tables:
        assert len(list((tmp_path / "tables").glob("train-*.npy"))) == (40 if cells == 1 else 1)
        for split, table in tables.items():
            expected = features(histories, examples[split], spec).value_EX[:]
            np.testing.assert_array_equal(table.value_EX[:], expected)
            kept_E = np.arange(len(expected)) % 3 == 0
            np.testing.assert_array_equal(table.only(kept_E).value_EX[1:9], expected[kept_E][1:9])


def test_what_is_done_is_not_done_again(
    dataset: tuple[Histories, dict[str, Examples]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was done for something else."""
    histories, examples = dataset
    monkeypatch.setattr(stored, "PART_CELLS", 1)
    spec, calls = choose(histories, examples["train"], CONFIG), []
    compute = stored._compute

    def killed(part: str, **of: object) -> None:
        calls.append(part)
        if len(calls) == 5:
            raise KeyboardInterrupt
        compute(part, **of)  # type: ignore[arg-type]

    monkeypatch.setattr(stored, "_compute", killed)
    tuning = {"tuning": examples["tuning"]}
    with pytest.raises(KeyboardInterrupt):
        stored.store_tables(histories, tuning, spec, tmp_path, here=True)
    stored.store_tables(histories, tuning, spec, tmp_path, here=True)
    with stored.stored_tables(spec, tmp_path) as tables:
        expected = features(histories, examples["tuning"], spec).value_EX[:]
        np.testing.assert_array_equal(tables["tuning"].value_EX[:], expected)
    assert len(calls) == 20 + 1 and len(set(calls)) == 20
    others = {"tuning": examples["tuning"].without_labels()}
    stored.store_tables(histories, others, spec, tmp_path, here=True)
    assert len(calls) == 2 * 20 + 1


@pytest.mark.slow
def test_parts_at_a_url_of_two_processes(
    dataset: tuple[Histories, dict[str, Examples]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories, examples = dataset
    spec = choose(histories, examples["tuning"], CONFIG)
    expected = features(histories, examples["tuning"], spec).value_EX[:]
    monkeypatch.setattr(stored, "PART_CELLS", 70 * len(spec.columns))
    monkeypatch.setattr(stored, "worth", lambda num_bytes: 2)
    with serving(tmp_path) as server, environment(server.environment):
        there = locate(f"s3://{BUCKET}/features")
        tuning = {"tuning": examples["tuning"]}
        assert stored.chosen_in_parts(histories, examples["tuning"], CONFIG, there, here=True) == spec
        stored.store_tables(histories, tuning, spec, there, here=True)
        with stored.stored_tables(spec, there) as tables:
            np.testing.assert_array_equal(tables["tuning"].value_EX[:], expected)
            assert len(list((there / "tables").glob("*.npy"))) == 2


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 20))
def test_no_part_cuts_a_subject(labels_S: list[int], about: int) -> None:
    position_E = np.repeat(np.arange(len(labels_S)), labels_S)
    some_ET = np.zeros((len(position_E), 1), np.float32)
    examples = Examples(position_E, position_E, position_E, position_E, some_ET, some_ET, some_ET, position_E)
    parts = [*examples.in_parts(about).values()]
    assert np.concatenate([np.zeros(0), *(part.position_E for part in parts)]).tolist() == position_E.tolist()
    seen: set[int] = set()
    for part in parts:
        own = set(np.asarray(part.position_E).tolist())
        assert own and not own & seen
        seen |= own
        assert len(part) < about + 9 + 1


def test_rows_are_found_in_their_parts() -> None:
    whole_EX = np.arange(30, dtype=np.float32).reshape(10, 3)
    rows = Rows.of([whole_EX[:4], whole_EX[4:5], whole_EX[5:]])
    assert rows.shape == (10, 3)
    for at in (slice(3, 7), np.array([9, 0, 4, 4]), np.arange(10) % 2 == 0, slice(None)):
        np.testing.assert_array_equal(rows[at], whole_EX[at])
    kept_E = np.arange(10) > 3
    np.testing.assert_array_equal(rows.only(kept_E)[np.array([1, 0])], whole_EX[kept_E][[1, 0]])
