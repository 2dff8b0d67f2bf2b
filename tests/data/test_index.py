"""The index: what its arrays say, which processes share, and when they are made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import subject, write_prepared
from s3 import BUCKET, environment, serving
from synthetic_index import write_index

from hymate.data import mapped as module
from hymate.data.histories import Histories, Splits
from hymate.data.index import INDEX_SCHEMA, Index, open_index
from hymate.errors import UserError
from hymate.storage.paths import UrlPath, locate, upload_files


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """An index's rows: splits mixed in shards or not, patients with and without events."""
    shards = draw(
        st.lists(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=3), max_size=4)
    )
    places = [(s, g, r) for s, groups in enumerate(shards) for g, group in enumerate(groups) for r in range(len(group))]
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(places), max_size=len(places), unique=True))
    split = st.sampled_from(["train", "tuning", "held_out", "mine"])
    return [
        {"subject_id": id, "split": draw(split), "shard": f"s/{s}", "row_group": g, "row": r}
        | {"num_events": draw(st.integers(0, 3)) if shards[s][g][r] else 5}
        for id, (s, g, r) in zip(ids, places, strict=True)
    ]


@settings(max_examples=60)
@given(rows=tables(), rows_at_once=st.integers(1, 5))
def test_an_index_says_what_the_file_says(rows: list[dict[str, Any]], rows_at_once: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hymate.data.index.ROWS", rows_at_once)
        patch.setattr(module, "ROWS", rows_at_once)
        patch.setattr(module, "SORTED_AT_ONCE", rows_at_once)
        pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), Path(folder) / "index.parquet")
        index, again = open_index(Path(folder)), open_index(Path(folder))
        in_memory = Index.of_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))
        for name, values in vars(index).items():
            np.testing.assert_array_equal(getattr(again, name), values)
            np.testing.assert_array_equal(getattr(in_memory, name), values)
    expected = sorted(rows, key=lambda row: (row["split"], row["num_events"] == 0))  # else as in the file
    everyone = np.arange(len(rows))
    assert index.subject_id_P.tolist() == [row["subject_id"] for row in expected]
    assert index.num_events_P.tolist() == [row["num_events"] for row in expected]
    assert index.places(everyone) == [(row["shard"], row["row_group"], row["row"]) for row in expected]
    assert index.find(index.subject_id_P).tolist() == everyone.tolist()
    for split in ("train", "tuning", "held_out", "mine", "none"):
        assert index.is_in(everyone, split).tolist() == [row["split"] == split for row in expected]
    for segment in index.segments:
        num_events = index.num_events_P[segment.start : segment.stop]
        assert (num_events > 0).tolist() == [place < segment.empty for place in range(segment.start, segment.stop)]
    for start, shard, row_group, events in zip(
        index.start_G, index.shard_G, index.row_group_G, index.events_G, strict=True
    ):
        (place,) = index.places(np.array([start]))
        assert place[:2] == (index.shards[shard], row_group)
        assert events == sum(row["num_events"] for row in rows if (row["shard"], row["row_group"]) == place[:2])


def test_unknown_subjects_are_nowhere() -> None:
    rows = [
        {"subject_id": id, "split": "train", "shard": "0", "row_group": 0, "row": 0, "num_events": 1} for id in (3, 9)
    ]
    index = Index.of_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))
    assert index.find(np.array([9, 4, 2, 3, 10])).tolist() == [1, -1, -1, 0, -1]
    assert Index.of_table(INDEX_SCHEMA.empty_table()).find(np.array([1])).tolist() == [-1]


@given(ids=st.lists(st.integers(-5, 5), max_size=9), at_once=st.integers(1, 4))
def test_a_subject_is_there_once(ids: list[int], at_once: int) -> None:
    rows = [{"subject_id": id, "split": "train", "shard": "0", "row_group": 0, "row": 0, "num_events": 1} for id in ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SORTED_AT_ONCE", at_once)
        if len(set(ids)) == len(ids):
            index = Index.of_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))
            assert index.subject_id_P[index.by_subject_P].tolist() == sorted(ids)
        else:
            with pytest.raises(pa.ArrowInvalid, match="a subject twice"):
                Index.of_table(pa.Table.from_pylist(rows, INDEX_SCHEMA))


# ------------------------------------------------------------------------------------------------ when it is made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_prepared(
        tmp_path / "data", {"train/0": [subject(i, 3) for i in range(7)], "tuning/0": [subject(9, 4)]}
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders in which arrays are made."""
    folders, write = [], module._write

    def noted(folder: Path, *arguments: Any) -> None:
        folders.append(folder.parent)
        write(folder, *arguments)

    monkeypatch.setattr(module, "_write", noted)
    return folders


def test_the_first_to_open_makes_the_arrays_and_all_others_map_them(data: Path, made: list[Path]) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: Histories.open(data), range(8)))
    assert len(made) == 1
    for histories in opened:
        base: Any = histories.index.num_events_P
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and not histories.index.num_events_P.flags.writeable
    shutil.copytree(data, data.parent / "copy")
    Histories.open(data.parent / "copy")
    assert len(made) == 1


def test_another_index_has_other_arrays(data: Path, made: list[Path]) -> None:
    assert len(Histories.open(data).positions("train")) == 7
    path = data / "histories" / "index.parquet"
    table = pq.read_table(path)
    mixed = table.set_column(1, INDEX_SCHEMA.field("split"), pa.array(["train", "tuning"] * 4))
    pq.write_table(mixed, path)
    os.utime(path, ns=(1, 1))
    assert len(Histories.open(data).positions("train")) == 4 and len(made) == 2


def test_the_splits_are_read_once_for_all(tmp_path: Path, made: list[Path]) -> None:
    ids = np.random.default_rng(0).permutation(1000)
    split_N = np.array(["tuning", "train", "held_out"])[ids % 3]
    (tmp_path / "metadata").mkdir()
    table = pa.table({"subject_id": ids, "split": split_N.astype(object)})
    pq.write_table(table, tmp_path / "metadata" / "subject_splits.parquet")
    with ThreadPoolExecutor(4) as pool:
        of_all = list(pool.map(lambda _: Splits(tmp_path, beside=tmp_path / "made").of(ids), range(4)))
    assert len(made) == 1 and all(found.tolist() == split_N.tolist() for found in of_all)
    with pytest.raises(AssertionError, match="without a split"):
        Splits(tmp_path, beside=tmp_path / "made").of(np.array([5, 1000]))


@pytest.mark.parametrize("damage", ["short", "other type", "pickle", "no numbers", "missing"])
def test_damaged_arrays_are_made_again(data: Path, made: list[Path], damage: str) -> None:
    expected = Histories.open(data).read(range(8))
    array = data / "histories" / ".index" / "num_events_P.npy"
    if damage == "short":
        array.write_bytes(array.read_bytes()[:-4])
    elif damage == "other type":
        np.save(array, np.zeros(8, np.float32))
    elif damage == "pickle":
        np.save(array, np.array([None] * 8), allow_pickle=True)
    elif damage == "no numbers":
        np.save(array, np.zeros(7, np.int32))
    else:
        array.unlink()
    got = Histories.open(data).read(range(8))
    assert len(made) == 2
    assert [history.subject_id for history in got] == [history.subject_id for history in expected]


def test_arrays_of_others_lead_nowhere_else(data: Path) -> None:
    Histories.open(data)
    about = data / "histories" / ".index" / "about.json"
    time_ns = about.stat().st_mtime_ns
    about.write_text(about.read_text().replace("train/0", "../data"))
    os.utime(about, ns=(time_ns, time_ns))
    with pytest.raises(UserError, match="damaged"):
        Histories.open(data)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This host's folder of temporary files, for this user."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"hymate-{os.geteuid()}"


@pytest.fixture
def read_only(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data in a folder that cannot be written to, which for root there is none."""
    locked = module.locked

    def refused(file: Path) -> Any:
        if data in file.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return locked(file)

    monkeypatch.setattr(module, "locked", refused)
    return data


def test_of_a_folder_that_cannot_be_written_to_a_host_has_one_copy(
    read_only: Path, host: Path, made: list[Path]
) -> None:
    before = sorted(read_only.rglob("*"))
    for _ in range(2):
        assert Histories.open(read_only).read([7])[0].subject_id == 9
    assert len(made) == 1 and host in made[0].parents and sorted(read_only.rglob("*")) == before
    assert host.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_of_data_at_a_url_a_host_has_one_copy(data: Path, host: Path, made: list[Path]) -> None:
    with serving(data.parent) as server, environment(server.environment):
        url = locate(f"s3://{BUCKET}/data")
        assert isinstance(url, UrlPath)
        upload_files(data, url)
        for _ in range(2):
            assert Histories.open(url).read([7])[0].subject_id == 9
        assert len(made) == 1 and host in made[0].parents
        upload_files(write_prepared(data.parent / "other", {"train/0": [subject(i, 3) for i in range(5)]}), url)
        assert len(Histories.open(url)) == 5 and len(made) == 2
        assert len([path for path in host.rglob("*") if path.name == "about.json"]) == 1


def test_arrays_are_not_put_where_another_user_can_read_them(read_only: Path, host: Path) -> None:
    (host.parent / "theirs").mkdir()
    host.symlink_to(host.parent / "theirs")
    with pytest.raises(UserError, match="belongs to another user: set TMPDIR"):
        Histories.open(read_only)


# ------------------------------------------------------------------------------------------------------- its memory

HOLD = """
import json, sys
import numpy as np
from prepared_rows import CODES
from synthetic_index import own_mib, written_mib
from hymate.data.examples import pretraining_examples
from hymate.data.histories import Histories
from hymate.data.loader import Rows
from hymate.data.vocabulary import Vocabulary
from hymate.training.pretraining import some
Histories.open(sys.argv[2])  # what libraries take at their first use
own, written = own_mib(), written_mib()
histories = Histories.open(sys.argv[1])
examples = pretraining_examples(histories, "train")
unknown = type("V", (), {"ids_of": lambda self, codes: np.zeros(len(codes), np.int64)})()
rows = Rows(histories, unknown, examples, context=512, tokens_per_row=4096, seed=0, crop="random")
places = [next(rows._order(epoch, block)).segments.tolist() for epoch, block in ((0, 0), (0, 17), (3, 60))]
print(json.dumps([own_mib() - own, written_mib() - written, len(examples), places]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_patients(tmp_path: Path) -> None:
    """Five million patients took a worker 700 MiB when it held arrays of them."""
    held = []
    tiny = write_index(tmp_path / "tiny", 1000)
    Histories.open(tiny)
    for number in (200_000, 5_000_000):
        root = write_index(tmp_path / str(number), number)
        Histories.open(root)  # the first process makes the arrays
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        line = [sys.executable, "-c", HOLD, str(root), str(tiny)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        own, written, num_examples, _ = json.loads(done.stdout)
        assert num_examples == pytest.approx(0.8 * 0.99 * number, rel=0.01)
        held.append((own, written))
        shutil.rmtree(root)
    (own, written), (own_of_more, written_of_more) = held
    assert own_of_more < 40 and written_of_more < 16
    assert written_of_more - written < 4
