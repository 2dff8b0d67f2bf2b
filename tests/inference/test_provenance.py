"""Whether a bundle's training may have seen the held-out patients of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small_cohort import write_meds

from hymate.data.histories import Histories
from hymate.data.meds import write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.inference.provenance import SENTENCES, initial_weights, provenance, seen, trained_on


@pytest.fixture(scope="module")
def histories(small_data: Path) -> Histories:
    return Histories.open(small_data)


def prepared(folder: Path, exchanged: tuple[str, str] | None = None, seed: int = 0, prefix: str = "") -> Histories:
    """The small cohort with two splits exchanged, other patients of the same ids, or other codes."""
    raw = write_meds(folder / "raw", seed, prefix)
    if exchanged:
        one, other = exchanged
        path = raw / "metadata" / "subject_splits.parquet"
        table = pq.read_table(path)
        split = table["split"]
        turned = pc.if_else(pc.equal(split, one), other, pc.if_else(pc.equal(split, other), one, split))
        write_parquet(table.set_column(1, "split", turned), path)
    prepare(PrepareConfig(source="meds", raw=str(raw), out=str(folder / "data"), workers=1))
    return Histories.open(folder / "data")


def test_the_same_split_is_known_and_another_one_is_not(histories: Histories, tmp_path: Path) -> None:
    bundle = {"provenance": provenance(histories)}
    assert seen(bundle, histories) == "same split"
    assert seen(bundle, prepared(tmp_path / "a", ("train", "held_out"))) == "another split"
    # the same patients were held out
    assert seen(bundle, prepared(tmp_path / "b", ("train", "tuning"))) == "same split"
    # equal ids are not equal patients
    assert seen(bundle, prepared(tmp_path / "c", seed=1)) == "other data"
    # prepared in another way the patients are the same
    other_codes = prepared(tmp_path / "d", prefix="X//")
    assert other_codes.fingerprint != histories.fingerprint and seen(bundle, other_codes) == "same split"


def test_a_bundle_of_several_datasets_knows_each_of_them(histories: Histories, tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", seed=1)
    places = [str(histories.path), str(other.path)]
    prepare(PrepareConfig("meds", str(tmp_path / "both"), places, origins=["a", "b"], workers=1))
    both = provenance(Histories.open(tmp_path / "both"))
    assert both["learned_from_each"] == [provenance(part)["learned_from"] for part in (histories, other)]
    for known in (histories, other, Histories.open(tmp_path / "both")):
        assert seen({"provenance": both}, known) == "same split"
    assert seen({"provenance": both}, prepared(tmp_path / "new", ("train", "held_out"))) == "other data"
    assert seen({"provenance": {**both, "learned_from_each": 7}}, other) == "other data"


def test_bundles_of_before_know_a_fingerprint_only(histories: Histories, tmp_path: Path) -> None:
    for name in ("data_fingerprint", "fingerprint"):
        assert seen({name: histories.fingerprint}, histories) == "same split"
        assert seen({name: histories.fingerprint}, prepared(tmp_path / name, seed=1)) == "not known"
    assert seen({}, histories) == "not known"


def test_what_the_first_weights_had_seen_is_handed_on(histories: Histories) -> None:
    for before in SENTENCES:
        bundle = {"provenance": provenance(histories, before)}
        assert seen(bundle, histories) == initial_weights(bundle) == before
        assert trained_on(bundle, histories) == "same split"


@pytest.mark.parametrize("recorded", [None, [], {}, {"learned_from": [], "patients": {}}])
def test_a_damaged_record_says_nothing(histories: Histories, recorded: Any) -> None:
    assert seen({"provenance": recorded}, histories) in ("not known", "other data")
    own = provenance(histories)
    assert seen({"provenance": {**own, "initial_weights": recorded}}, histories) == "same split"
