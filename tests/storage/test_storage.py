"""Storage at URLs: a real S3-compatible server on the loopback interface, and whole runs that live there alone."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, documented, points, run, wait_until
from s3 import BUCKET, Server, environment, serving
from small_cohort import write_meds

from hymate.data.histories import Histories
from hymate.data.meds import write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import UserError
from hymate.inference.bundle import read_bundle
from hymate.storage import paths, remote
from hymate.storage.paths import Location, UrlPath, atomic_path, locate, require_file, require_folder, write_text
from hymate.storage.remote import StorageError
from hymate.training.keeper import Kept

STEPS, EVAL_EVERY = 4, 2
SHORT = ["data.context=64", "data.tokens_per_row=64", "data.min_count=1", "train.warmup_steps=1"]
SHORT += [f"train.max_steps={STEPS}", f"train.eval_every={EVAL_EVERY}"]
PRETRAIN = [*SHORT, "train.rows_per_step=2", "train.eval_rows=2", "train.log_every=1"]
TUNE = [*SHORT, "search.num_trials=1"]
SECRET = "gAheim"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server, environment(server.environment):
        yield server


@pytest.fixture(params=["local", "url"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A new folder, on this machine or at a URL."""
    if request.param == "local":
        return tmp_path
    request.getfixturevalue("server")
    return locate(f"s3://{BUCKET}/{tmp_path.name}")


# -------------------------------------------------------------------------------------------------------- files


def test_files_and_folders_are_alike_everywhere(place: Location) -> None:
    odd = "#1 %20 (é)='[*]&;"
    write_text("odd", place / odd / odd)
    assert (place / odd / odd).read_text() == "odd" and list(paths.files_below(place / odd, "")) == [odd]
    write_text("one ö", place / "a" / "one.txt")
    write_text("two", place / "a" / "b" / "two.txt")
    write_text("hidden", place / "a" / ".two.txt")
    assert (place / "a" / "one.txt").read_text() == "one ö" and (place / "a" / "one.txt").stat().st_size == 6
    assert list(paths.files_below(place / "a", ".txt")) == ["b/two.txt", "one.txt"]
    assert sorted(path.name for path in (place / "a").iterdir()) == [".two.txt", "b", "one.txt"]
    assert [path.name for path in (place / "a").glob("o*")] == ["one.txt"]
    assert (place / "a").is_dir() and not (place / "a").is_file() and not (place / "c").exists()
    with paths.local_copy(place / "a") as copy:
        assert (copy / "b" / "two.txt").read_text() == "two"
    with (place / "a" / "one.txt").open("rb") as file:
        assert file.seek(-2, os.SEEK_END) == 4 and file.read() == "ö".encode()
    (place / "a" / "one.txt").unlink()
    (place / "a" / "one.txt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (place / "a" / "one.txt").read_text()
    paths.remove_tree(place / "a")
    paths.remove_tree(place / "a")
    assert not (place / "a").exists()


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    write_text("new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_text() == "new"


def test_links_are_followed_and_end(tmp_path: Path) -> None:
    write_text("one", tmp_path / "disk" / "deep" / "one.txt")
    write_text("two", tmp_path / "data" / "two.txt")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "file.txt").symlink_to("two.txt")
    (tmp_path / "disk" / "deep" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to("linked")
    (tmp_path / "data" / ".gone").symlink_to("nothing")
    assert list(paths.files_below(tmp_path / "data", ".txt")) == [
        "again/deep/one.txt",
        "file.txt",
        "linked/deep/one.txt",
        "two.txt",
    ]
    (tmp_path / "itself").symlink_to("itself")
    assert not paths.files_below(tmp_path / "itself", ".txt")
    (tmp_path / "data" / "gone").symlink_to("nothing")
    with pytest.raises(UserError, match="gone: a symbolic link that leads nowhere: mend it or remove it"):
        paths.files_below(tmp_path / "data", ".txt")


def test_tables_are_read_as_they_were_written(place: Location) -> None:
    table = pa.table({"number": np.arange(100_000), "text": ["x", "y"] * 50_000})
    write_parquet(table, place / "table.parquet")
    assert pq.read_table(paths.readable(place / "table.parquet")).equals(table)
    with pytest.raises(FileNotFoundError):
        pq.read_table(paths.readable(place / "other.parquet"))


def test_what_fails_while_it_is_written_leaves_what_was_there(place: Location) -> None:
    write_text("old", place / "file")
    with pytest.raises(ValueError, match="no"), atomic_path(place / "file") as temporary:
        temporary.write_text("half")
        raise ValueError("no")
    for content in ("old", "new"):
        with paths.new_folder(place / "folder", marker="marker") as new:
            (new / content).write_text(content)
            (new / "marker").write_text(content)
    with pytest.raises(ValueError, match="no"), paths.new_folder(place / "folder", marker="marker") as new:
        (new / "half").write_text("half")
        raise ValueError("no")
    assert (place / "file").read_text() == "old" and (place / "folder" / "marker").read_text() == "new"
    assert list(paths.files_below(place, "")) == ["file", "folder/marker", "folder/new"]


def test_several_datasets_are_mapped_at_a_place_as_here(place: Location, tmp_path: Path) -> None:
    """What `prepare` writes twice, it writes twice at a URL, too."""
    raw = [str(write_meds(tmp_path / name, seed)) for seed, name in enumerate("AB")]
    (tmp_path / "map.csv").write_text("code,canonical_code,factor\nLAB//glucose,glucose,18\n")
    how = {"codes": [str(tmp_path / "map.csv"), None], "origins": ["a", "b"], "workers": 1}
    counts = []
    for out in (tmp_path / "here", place / "there"):
        prepare(PrepareConfig("meds", str(out), raw, **how))  # type: ignore[arg-type]
        metadata = json.loads((out / "histories/metadata.json").read_text())
        histories = Histories.open(out)
        counts.append((metadata["splits"], histories.codes, sorted(histories.index.subject_id_P.tolist())))
        assert (out / "metadata/code_map-0.csv").is_file() and not (out / "histories/.work").exists()
    assert counts[0] == counts[1] and "glucose" in counts[0][1]


def test_names_that_lead_out_of_a_folder_are_refused(server: Server) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket=BUCKET, Key="hostile/../../escaped", Body=b"x")
    with (
        pytest.raises(StorageError, match="lead out of a folder"),
        paths.local_copy(locate(f"s3://{BUCKET}/hostile")),
    ):
        pass


def test_a_trial_keeps_its_checkpoints(place: Location, tmp_path: Path) -> None:
    kept = Kept(place / "trial", 1)
    for step, score in enumerate([0.3, 0.9, 0.5], start=1):
        folder = tmp_path / f"of-{step}"
        folder.mkdir()
        state = {"step": step, "score": score, "evaluations": [{"mean": score, "step": step}]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "sha256-00000-of-00001.txt").write_text("these come last")
        kept.report({"step": step}, folder)
    there = {path.name for path in kept.folder.iterdir()}
    assert there == {"saved", *kept.names()} and [name[:14] for name in kept.names()] == [
        "step-000000003",
        "step-000000002",
    ]
    assert [metrics["mean"] for _, metrics in kept.best_first()] == [0.9, 0.5]
    with paths.local_copy(kept.folder / kept.names()[0]) as copy:
        assert json.loads((copy / "state.json").read_text())["score"] == 0.5


def test_a_place_goes_to_other_processes(place: Location) -> None:
    again = pickle.loads(pickle.dumps(place))
    assert again == place == locate(str(place))
    if isinstance(place, UrlPath):
        assert pickle.loads(pickle.dumps(place.filesystem)) == place.filesystem


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    assert locate((tmp_path / "with space").as_uri()) == tmp_path / "with space"


@pytest.mark.parametrize(
    "url", [f"s3://me:{SECRET}@bucket/data", f"abfs://c@account.dfs.core.windows.net/data?sas_token={SECRET}"]
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match=r"holds a credential, .* give it by the environment") as caught:
        locate(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere://bucket/data", "nowhere://bucket: not a storage that can be used: give a local path, or a URL of"),
        ("http://host:80/data", "http://host:80: not a storage that can be used"),
        ("https:/host/data", "https:: not a storage that can be used"),
        ("s3a://bucket/data", "s3a://bucket: not a storage"),
        ("mock://x/data", "mock://x: not a storage"),
        ("s3:/bucket/x", r"s3:/bucket/x: write s3://BUCKET/FOLDER, or \./s3:/bucket/x for a local path"),
        ("s3:///x", "s3:///x: write s3://BUCKET/FOLDER"),
        ("s3:x", "s3:x: write s3://BUCKET/FOLDER"),
        ("s3://", "s3://: write s3://BUCKET/FOLDER"),
        ("S3://bucket/x", "S3://bucket/x: write s3://BUCKET/FOLDER"),
        (" s3://bucket/x", "write s3://BUCKET/FOLDER"),
        ("s3://my bucket/x", "write s3://BUCKET/FOLDER"),
        ("s3://bucket#1/x", "write s3://BUCKET/FOLDER"),
        ("gs:x", "gs:x: write gs://BUCKET/FOLDER"),
        ("abfs:///x", r"write abfs://CONTAINER@ACCOUNT\.dfs\.core\.windows\.net/FOLDER"),
        ("file:relative", "file:relative: write file:///FOLDER"),
        ("file:/x", "file:/x: write file:///FOLDER"),
        ("file://relative/x", "file://relative/x: write file:///FOLDER"),
        ("file://", "file://: write file:///FOLDER"),
        ("s3://bucket/a/../b", r"a URL can't go up: write it without \.\."),
        ("file:///a/../b", r"a URL can't go up: write it without \.\."),
        ("s3://bucket/exp?2", r"s3://bucket/exp\?2: a \? in a URL begins the storage's options"),
        ("s3://bucket/exp?region=eu#1", r"the options after the \? cannot hold a #: leave it"),
        ("file:///exp?2", r"a \? in a URL begins the storage's options"),
        ("file:///exp?region=eu", r"a \? in a URL begins the storage's options"),
        ("s3://bucket/a?regoin=eu", "s3://bucket: not a storage that can be used: .*regoin"),
        ("~nobody-of-this-name/x", r"there is no such home folder; .* written \./~nobody-of-this-name/x"),
        ("a/" + 128 * "é", "longer than the 255 bytes"),
        ("", "it is empty: give a folder, a file or a URL"),
        ("a\x00b", r"'a\\x00b' holds a control character"),
        ("s3://bucket/a\nb", "holds a control character"),
        ("file:///a%0Ab", "holds a control character"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_what_names_no_place_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        locate(text)
    assert "\n" not in str(caught.value)


def test_names_are_kept_as_they_are(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("exp#1", "a b", " a ", "100%", "%20", "é", "a;b&c=d", "[1]*", "a:b", "(x)", "'\"", "~", "\\", "{$x}"):
        url = locate(f"s3://bucket/x/{name}/data")
        assert isinstance(url, UrlPath) and url.relative == PurePosixPath("x", name, "data")
        assert locate(str(url)) == url == locate(f"s3://bucket/x/{name}/data/")
        assert locate(f"{tmp_path}/{name}") == tmp_path / name
    for name in ("a?b", "C:\\data", "C:/data", "host:5000/data", "./s3:/x", "./~x", "12:30", "a~", "/a/s3://b"):
        assert locate(name) == Path(name)
    assert locate("~/data") == tmp_path / "data" and locate("~") == tmp_path
    assert locate("file:///a%23b#1%3F%20") == Path("/a#b#1? ") and locate("file://localhost/a") == Path("/a")
    options = locate("s3://bucket/a#1?endpoint_override=http://127.0.0.1:1/x&scheme=http")
    assert isinstance(options, UrlPath) and options.options == "endpoint_override=http://127.0.0.1:1/x&scheme=http"
    assert str(options.parent / "b") == "s3://bucket/b?endpoint_override=http://127.0.0.1:1/x&scheme=http"


# ------------------------------------------------------------------------------------------------------ outages


def test_a_missing_bucket_is_named_at_once(server: Server) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket: .*NO_SUCH_BUCKET.*check the address"):
        write_text("text", locate("s3://no-such-bucket/file"))


def test_whether_an_output_can_be_written_is_found_out_at_urls_too(server: Server) -> None:
    folder = locate(f"s3://{BUCKET}/outputs")
    require_folder(folder / "run", "run.dir")
    require_file(folder / "predictions.parquet", "out")
    assert not list(folder.files())
    for require in (require_folder, require_file):
        with pytest.raises(UserError, match=r"^out=s3://no-such-bucket/p cannot be written to \(.*NO_SUCH_BUCKET"):
            require(locate("s3://no-such-bucket/p"), "out")


@pytest.mark.slow
def test_writing_outlasts_an_outage(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    path = locate(f"s3://{BUCKET}/outage/file")
    write_text("before", path)
    writer = threading.Thread(target=write_text, args=("after", path))
    with server.silent(), caplog.at_level(logging.WARNING):
        writer.start()
        wait_until(lambda: caplog.records, "the outage is noticed")
    writer.join()
    assert path.read_text() == "after"
    assert "s3://bucket: can't be reached, trying for" in caplog.text


@pytest.mark.slow
def test_an_outage_that_does_not_end_is_named_and_harms_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.PATIENCE, "1")
    path = locate(f"s3://{BUCKET}/long-outage/table.parquet")
    table = pa.table({"number": np.arange(10)})
    write_parquet(table, path)
    file = paths.readable(path)
    with server.silent():
        with pytest.raises(StorageError, match=r"s3://bucket: can't be reached for \d+ s .* give the same command"):
            write_parquet(table.slice(5), path)
        with pytest.raises(StorageError) as caught:  # through pyarrow's own reader
            pq.read_table(file)
    assert "\n" not in str(caught.value)
    assert pq.read_table(paths.readable(path)).equals(table)


# --------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def raw(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort as MEDS, on this machine and at s3://bucket/meds."""
    folder = write_meds(tmp_path_factory.mktemp("cohort") / "raw")
    there = locate(f"s3://{BUCKET}/meds")
    assert isinstance(there, UrlPath)
    paths.upload_files(folder, there)
    return folder


@pytest.fixture(scope="module")
def data(raw: Path) -> str:
    """The small cohort, prepared from URL to URL."""
    out = f"s3://{BUCKET}/data"
    prepare(PrepareConfig(source="meds", raw=f"s3://{BUCKET}/meds", out=out, workers=2))
    return out


@pytest.mark.slow
def test_a_dataset_at_a_url_is_the_local_one(data: str, raw: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(source="meds", raw=str(raw), out=str(tmp_path / "data"), workers=1))
    here, there = Histories.open(tmp_path / "data"), Histories.open(data)
    assert here.fingerprint == there.fingerprint and here.codes == there.codes
    everyone = np.arange(len(here))
    for one, other in zip(here.read(everyone), there.read(everyone), strict=True):
        assert one.subject_id == other.subject_id
        for name in ("time", "code", "value"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_preparing_at_a_url_leaves_nothing_else_and_is_done_once(data: str, capsys: pytest.CaptureFixture) -> None:
    written = {path: path.stat() for path in paths.files_below(locate(data), "").values()}
    assert all(".work" not in str(path) for path in written)
    prepare(PrepareConfig(source="meds", raw=f"s3://{BUCKET}/meds", out=data, workers=1))
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat() for path in paths.files_below(locate(data), "").values()} == written


def test_preparing_at_a_url_spares_what_is_there(data: str, raw: Path) -> None:
    with pytest.raises(UserError, match="prepared from other data"):
        prepare(PrepareConfig(source="synthetic", out=data, workers=1))
    with pytest.raises(UserError, match="not empty"):
        prepare(PrepareConfig(source="meds", raw=str(raw), out=f"s3://{BUCKET}/meds", workers=1))


# --------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def settings(server: Server, environment: dict[str, str]) -> dict[str, str]:
    """Settings of the commands here."""
    quick = {"HYMATE_OPS": "reference", remote.PATIENCE: "120"}
    return {**environment, **server.environment, "PYTHONPATH": str(ROOT), **quick}


@pytest.mark.slow
def test_the_documented_commands_keep_all_at_a_url(data: str, settings: dict[str, str], tmp_path: Path) -> None:
    """That a run there continues when it is killed is in tests/faults."""
    prepare, pretrain, tune, predict, tensorboard = (
        shlex.split(command.line.replace("BUCKET", BUCKET).replace("model=small", "model=debug"))
        for command in documented("docs/storage.md")
    )
    runs = locate(f"s3://{BUCKET}/runs")

    def done(command: list[str], *more: str) -> str:
        program = Path(sys.executable).with_name(command[0])
        arguments = [str(ROOT / word) if word.endswith(".py") else word for word in command[1:]]
        ended = run([str(program), *arguments, *more], settings, tmp_path)
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"
        return ended.stdout + ended.stderr

    assert "nothing to do" in done(prepare)
    folder = runs / "pretrain"
    assert f"bundle: {folder}/bundle" in done(pretrain, *PRETRAIN)
    assert read_bundle(folder, kind="pretrained").model.d_model == 32
    assert max(int(name.split("-")[1]) for name in Kept(folder / "checkpoints", 1).names()) == STEPS
    with paths.local_copy(folder) as copy:
        losses, stalls = (points(copy, name) for name in ("train/loss", "checkpoint/stall_fraction"))
    assert [point.step for point in losses] == [*range(1, STEPS + 1)]
    assert [point.step for point in stalls] == [*range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)]
    record = json.loads((folder / "run.json").read_text())
    assert record["outcome"]["state"] == "finished" and len(record["attempts"]) == 1

    done(tune, *TUNE)
    tuned = runs / "tune-readmission"
    assert json.loads((tuned / "results.json").read_text())["auroc"]["value"] is not None
    assert (tuned / "readmission.png").read_bytes().startswith(b"\x89PNG")
    assert "## Scores" in (tuned / "report.md").read_text()

    done(predict, "split=held_out")
    written = (locate(f"s3://{BUCKET}/predictions.parquet"), tuned / "predictions.parquet")
    one, other = (pq.read_table(paths.readable(path)) for path in written)
    assert one.equals(other)
    assert "train/loss" in done(tensorboard, "--inspect")
    assert not list(tmp_path.iterdir()), "something was written on this machine"
