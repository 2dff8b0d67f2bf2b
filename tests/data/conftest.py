"""A prepared dataset of random histories, for the tests of examples, rows and their order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prepared_rows import make_rows, subject, write_prepared

from hymate.data.histories import Histories
from hymate.data.loader import Rows
from hymate.data.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 43).tolist()
    lengths[7] = 0
    subjects = [subject(1000 - i, length) for i, length in enumerate(lengths)]
    shards = {"train/0": subjects[:18], "train/1": subjects[18:31], "tuning/0": subjects[31:]}
    return write_prepared(tmp_path_factory.mktemp("prepared"), shards)


@pytest.fixture(scope="session")
def histories(dataset: Path) -> Histories:
    return Histories.open(dataset)


@pytest.fixture(scope="session")
def vocabulary(dataset: Path) -> Vocabulary:
    return Vocabulary.read(dataset / "histories" / "vocabulary.parquet", min_count=10)


@pytest.fixture
def rows(histories: Histories, vocabulary: Vocabulary) -> Rows:
    return make_rows(histories, vocabulary)
