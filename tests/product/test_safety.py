"""Files from elsewhere: none can run code, be read from outside its folder, or ask for more memory than it is worth."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from small_models import risk_model, small_vocabulary, write_risk_bundle

from hymate.command import load
from hymate.config import RunConfig, TaskConfig
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.data.meds import SplitsConfig
from hymate.data.sources import physionet2012
from hymate.data.sources.meds import MedsSource
from hymate.data.sources.physionet2012 import PhysioNet2012Source
from hymate.data.tasks import read_or_extract_labels
from hymate.data.vocabulary import Vocabulary
from hymate.errors import ConfigError, UserError
from hymate.inference.bundle import build_model, read_bundle
from hymate.inference.states import StateFolder
from hymate.runs import check_same_run
from hymate.training import checkpoint
from hymate.training.pretraining import PretrainConfig

MEMORY_BYTES = 1 << 30  # more than the process has already; the files ask for terabytes
BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
HOSTILE_YAML = {
    "an object": "!!python/object/apply:os.mkdir [HERE]",
    "a tuple": "!!python/tuple [1, 2]",
    "a name": "!!python/name:os.system",
    "a new object": "!!python/object/new:os.mkdir [HERE]",
    "aliases": f"[{BILLION_LAUGHS.count('&')}]\n{BILLION_LAUGHS}",
    "depth": "[" * 10_000,
    "a number of many digits": "9" * 100_000,
}


class Bomb:
    """What unpickling it does can be seen."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A folder that hostile files make; it must not be there in the end."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def pickles(trace: Path) -> dict[str, bytes]:
    torch_file = io.BytesIO()
    torch.save({"weight": Bomb(trace)}, torch_file)
    arrays = io.BytesIO()
    np.savez(arrays, weight=np.array([Bomb(trace)], dtype=object))
    return {"pickle": pickle.dumps(Bomb(trace)), "torch.save": torch_file.getvalue(), "npz": arrays.getvalue()}


@pytest.fixture
def data(small_data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_data, tmp_path / "data")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_risk_bundle(tmp_path / "bundle", small_vocabulary(), extra={"auroc": 0.8})


def agree(bundle: Path) -> None:
    """Make the bundle's checksums those of its files, as whoever means harm would."""
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    tree["sha256"] = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in tree["sha256"]}
    (bundle / "config.yaml").write_text(yaml.safe_dump(tree))


@contextmanager
def refused(match: str) -> Iterator[None]:
    """One clear line, and no memory to speak of."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    try:
        with pytest.raises(UserError, match=match) as caught:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------------ pickles


@pytest.mark.parametrize("name", ["pickle", "torch.save", "npz"])
@pytest.mark.parametrize("file", ["model.safetensors", "vocabulary.parquet", "config.yaml"])
def test_a_pickle_in_a_bundle_is_not_unpickled(bundle: Path, trace: Path, file: str, name: str) -> None:
    (bundle / file).write_bytes(pickles(trace)[name])
    if file != "config.yaml":
        agree(bundle)
    with refused(r"damaged|not a readable bundle configuration|not a vocabulary"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["pickle", "torch.save", "npz"])
@pytest.mark.parametrize("file", ["state.json", "model.safetensors"])
def test_a_pickle_in_a_checkpoint_is_not_unpickled(tmp_path: Path, trace: Path, file: str, name: str) -> None:
    (tmp_path / file).write_bytes(pickles(trace)[name])
    with refused(r"not a checkpoint of this model|damaged"):
        checkpoint.read_state(tmp_path) if file == "state.json" else checkpoint.load_weights(risk_model(), tmp_path)


@pytest.mark.parametrize("name", ["pickle", "torch.save", "npz"])
def test_a_pickle_in_a_checkpoints_optimizer_is_not_unpickled(tmp_path: Path, trace: Path, name: str) -> None:
    state = {
        "step": 1,
        "stale": 0,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "evaluations": [],
        "cursor": {},
        "best": None,
        "world_size": 1,
        "config": {"max_steps": 2},
    }
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "optimizer-00000-of-00001.safetensors").write_bytes(pickles(trace)[name])
    with refused(r"not a checkpoint of this model"):
        checkpoint.load_optimizer(_Engine(), tmp_path)


class _Engine:
    """As much of an engine without ZeRO as reading a checkpoint needs."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.AdamW(self.module.parameters())

    def zero_optimization_stage(self) -> int:
        return 0

    def zero_optimization(self) -> bool:
        return False


@pytest.mark.parametrize("name", ["pickle", "torch.save", "npz"])
def test_a_pickle_among_states_is_not_unpickled(tmp_path: Path, trace: Path, name: str) -> None:
    folder = StateFolder(tmp_path / "states", "fingerprint")
    (tmp_path / "states" / "7.safetensors").write_bytes(pickles(trace)[name])
    assert folder.load(7, np.zeros(3)) is None and folder.counts == {"damaged": 1}
    (tmp_path / "states" / "states.json").write_bytes(pickles(trace)[name])
    with refused("another bundle, code map or version"):
        StateFolder(tmp_path / "states", "fingerprint")


@pytest.mark.parametrize("name", ["pickle", "torch.save", "npz"])
@pytest.mark.parametrize("file", ["index.parquet", "vocabulary.parquet", "metadata.json", "train/0.parquet"])
def test_a_pickle_in_prepared_data_is_not_unpickled(data: Path, trace: Path, file: str, name: str) -> None:
    (data / "histories" / file).write_bytes(pickles(trace)[name])
    with refused(r"damaged"):
        histories = Histories.open(data)
        histories.read(histories.positions("train"))
    if file == "vocabulary.parquet":
        with refused("not a vocabulary"):
            Vocabulary.read(data / "histories" / file)


@pytest.mark.parametrize("name", ["pickle", "torch.save", "npz"])
def test_a_pickle_in_raw_data_is_not_unpickled(data: Path, tmp_path: Path, trace: Path, name: str) -> None:
    content = pickles(trace)[name]
    (data / "data" / "train" / "0.parquet").write_bytes(content)
    with refused("not a readable Parquet file"):
        MedsSource(data, SplitsConfig(), 0).write_shard("train/0", tmp_path / "out")
    (data / "labels" / "readmission" / "train" / "0.parquet").write_bytes(content)
    with refused("not a readable Parquet file"):
        read_labels(data / "labels" / "readmission")
    (tmp_path / "challenge").mkdir()
    (tmp_path / "challenge" / "set-a.tar.xz").write_bytes(content)
    (tmp_path / "challenge" / "Outcomes-a.txt").write_text(physionet2012._OUTCOMES_HEADER)
    with refused("not readable"):
        PhysioNet2012Source(tmp_path / "challenge", SplitsConfig(), 0).shards()


# --------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_refused(bundle: Path, tmp_path: Path, trace: Path, name: str) -> None:
    text = HOSTILE_YAML[name].replace("HERE", str(trace))
    own = (bundle / "config.yaml").read_text()
    for place in ("extra:", "format_version: 2\n"):
        assert own.count(place) == 1
        (bundle / "config.yaml").write_text(own.replace(place, f"{place.split(':')[0]}: {text}\n"))
        with refused("not a readable bundle configuration"):
            read_bundle(bundle)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"config": {}, "attempts": {}}', "\x00"])
def test_a_hostile_record_of_a_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with refused("choose another run.name"):
        check_same_run(tmp_path, RunConfig("one", "runs"), {}, set())
    with refused("choose another run.name"):
        load("pretrain", ["--repeat", str(tmp_path)], PretrainConfig)


# --------------------------------------------------------------------------------------------- paths in manifests


@pytest.mark.parametrize("shard", ["../../elsewhere/0", "/{folder}/elsewhere/0", "train/../../../elsewhere/0"])
def test_an_index_leads_nowhere_else(data: Path, shard: str) -> None:
    shutil.copytree(data / "histories" / "train", data.parent / "elsewhere")
    path = data / "histories" / "index.parquet"
    index = pq.read_table(path)
    shards = [shard.format(folder=str(data.parent)[1:]) if s == "train/0" else s for s in index["shard"].to_pylist()]
    pq.write_table(index.set_column(index.column_names.index("shard"), "shard", pa.array(shards)), path)
    with refused("damaged"):
        Histories.open(data)


@pytest.mark.parametrize("name", ["../secret.parquet", "/etc/passwd", "README.md"])
def test_a_bundles_manifest_names_its_own_files(bundle: Path, name: str) -> None:
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    tree["sha256"][name] = "0" * 64
    (bundle / "config.yaml").write_text(yaml.safe_dump(tree))
    with refused("sha256 must name"):
        read_bundle(bundle)


STAY = "Time,Parameter,Value\n00:00,RecordID,101\n00:07,HR,73\n"


def challenge(folder: Path, *members: tuple[str, bytes, dict]) -> PhysioNet2012Source:
    """The challenge with one stay in an archive, and other members."""
    folder.mkdir()
    (folder / "Outcomes-a.txt").write_text(physionet2012._OUTCOMES_HEADER + "\n101,6,1,5,-1,0\n")
    with tarfile.open(folder / "set-a.tar.xz", "w:xz") as archive:
        for name, content, settings in (("set-a/101.txt", STAY.encode(), {}), *members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in settings.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return PhysioNet2012Source(folder, SplitsConfig(1, 0, 0), 0)


def test_an_archives_members_are_not_unpacked(tmp_path: Path) -> None:
    members = [
        ("../../outside.md", b"x", {}),
        ("/tmp/hymate-outside.md", b"x", {}),
        ("set-a/102.txt", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("set-a/103.txt", b"", {"type": tarfile.LNKTYPE, "linkname": "set-a/101.txt"}),
        ("set-a/104.txt", b"", {"type": tarfile.FIFOTYPE}),
    ]
    source = challenge(tmp_path / "raw", *members)
    (shard,) = source.shards()
    source.write_shard(shard, tmp_path / "out")
    assert set(pq.read_table(tmp_path / "out" / "data" / f"{shard}.parquet")["subject_id"].to_pylist()) == {101}
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}
    assert not Path("/tmp/hymate-outside.md").exists()


# ----------------------------------------------------------------------------------------------------- sizes


def safetensors(header: object, claimed: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + bytes(64)


def entry(**changes: object) -> dict:
    return {"weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


ABSURD_WEIGHTS = {
    "a header of an exabyte": safetensors({}, 1 << 60),
    "a header of 4 GiB": safetensors({}, 1 << 32),
    "a header of 2^64 bytes": safetensors({}, (1 << 64) - 1),
    "a shape of terabytes": safetensors(entry(shape=[1 << 20, 1 << 20])),
    "a shape that overflows": safetensors(entry(shape=[1 << 62, 1 << 62, 4])),
    "an end beyond the file": safetensors(entry(data_offsets=[0, 1 << 50])),
    "offsets that turn back": safetensors(entry(data_offsets=[64, 0])),
    "a shape of nested lists": safetensors(entry(shape=json.loads("[" * 100 + "]" * 100))),
}


@pytest.mark.parametrize("name", ABSURD_WEIGHTS)
def test_absurd_sizes_of_weights_are_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / "model.safetensors").write_bytes(ABSURD_WEIGHTS[name])
    agree(bundle)
    with refused("damaged"):
        read_bundle(bundle)
    (tmp_path / "model.safetensors").write_bytes(ABSURD_WEIGHTS[name])
    with refused("damaged"):
        checkpoint.load_weights(risk_model(), tmp_path)
    folder = StateFolder(tmp_path / "states", "fingerprint")
    (tmp_path / "states" / "7.safetensors").write_bytes(ABSURD_WEIGHTS[name])
    assert folder.load(7, np.zeros(3)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 1 << 20},
        {"d_model": 1 << 40},
        {"layers": "M" * 200_000},
        {"mlp_ratio": 1e300},
        {"expand": 1 << 30},
        {"num_queries": 1 << 31},
    ],
)
def test_an_absurd_model_is_refused_before_there_is_memory_for_it(bundle: Path, changes: dict) -> None:
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    (bundle / "config.yaml").write_text(yaml.safe_dump({**tree, "model": {**tree["model"], **changes}}))
    with refused("do not fit its own config.yaml|is not usable"):
        build_model(read_bundle(bundle))


def varint(number: int) -> bytes:
    """As a Parquet footer writes a number (Thrift's compact protocol)."""
    zigzag, out = number << 1, bytearray()
    while zigzag > 127:
        out.append(zigzag & 127 | 128)
        zigzag >>= 7
    return bytes([*out, zigzag])


def claim(path: Path, rows: int) -> None:
    """Make a Parquet file's footer declare `rows` rows and values wherever it tells how many there are."""
    content = path.read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - size : -8].replace(varint(pq.read_metadata(path).num_rows), varint(rows))
    path.write_bytes(content[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("rows", [1 << 31, 1 << 40, (1 << 62) - 1])
def test_absurd_sizes_of_tables_are_refused(small_data: Path, tmp_path: Path, rows: int) -> None:
    def damaged(file: str) -> Path:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(small_data, tmp_path / "data")
        claim(tmp_path / "data" / file, rows)
        return tmp_path / "data"

    for name in ("index", "vocabulary", "train/0"):
        with refused("damaged"):
            histories = Histories.open(damaged(f"histories/{name}.parquet"))
            histories.read(histories.positions("train"))
    with refused("not a vocabulary"):
        Vocabulary.read(damaged("histories/vocabulary.parquet") / "histories" / "vocabulary.parquet")
    with refused("not a readable Parquet file"):
        MedsSource(damaged("data/train/0.parquet"), SplitsConfig(), 0).write_shard("train/0", tmp_path / "out")
    with refused("not a readable Parquet file"):
        root = damaged("labels/readmission/train/0.parquet")
        read_or_extract_labels(root, TaskConfig("readmission"))


def test_a_table_of_millions_of_rows_in_a_kilobyte_is_refused(tmp_path: Path) -> None:
    """Its footer tells the truth: all rows are the same."""
    writer = pq.ParquetWriter(tmp_path / "0.parquet", pa.schema([("subject_id", pa.int64())]), compression="zstd")
    group = pa.table({"subject_id": np.zeros(1 << 20, np.int64)})
    with writer:
        for _ in range(12):
            writer.write_table(group)
    with refused("not a readable Parquet file"):
        read_labels(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"size": 1 << 40}, {"size": 1 << 40, "type": tarfile.XHDTYPE}, {"size": 1 << 33, "type": b"L"}]
)
def test_absurd_sizes_in_an_archive_are_refused(tmp_path: Path, settings: dict) -> None:
    """Without a check these would be read whole; compressed zeros cost nothing."""
    header = tarfile.TarInfo("set-a/101.txt")
    for key, value in settings.items():
        setattr(header, key, value)
    source = challenge(tmp_path / "raw")
    with tarfile.open(tmp_path / "raw" / "set-a.tar.xz", "w:xz") as archive:
        archive.fileobj.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))  # type: ignore[union-attr]
    with refused("not readable"):
        source.shards()


# --------------------------------------------------------------------------------------------------- credentials


SECRET = "hunter2/hunter2+hunter2"
WITH_CREDENTIALS: dict[str, Callable[[], list[str]]] = {
    "user and password": lambda: [f"data.path='s3://AKIAEXAMPLE:{SECRET}@bucket/data'"],
    "unquoted": lambda: [f"data.path=s3://someone:{SECRET}@bucket/data"],
    "in the query": lambda: [f"run.dir='s3://bucket/runs?region=eu-1&secret_key={SECRET}'"],
    "an access key": lambda: ["run.dir='s3://bucket/runs?id=AKIAABCDEFGHIJKLMNOP'"],
    "from the environment": lambda: ["train.seed=${oc.env:EXAMPLE_API_KEY}"],
    "a key of its own": lambda: [f"+data.secret={SECRET}"],
    "without a key": lambda: [f"s3://someone:{SECRET}@bucket/data"],
    "in an environment's name": lambda: [f"data.path=/data/{SECRET}"],
}


@pytest.mark.parametrize("name", WITH_CREDENTIALS)
def test_a_credential_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EXAMPLE_API_KEY", SECRET)
    given = WITH_CREDENTIALS[name]()
    key = given[0].partition("=")[0].lstrip("+") if "=" in given[0] else "an argument"
    with pytest.raises(ConfigError, match=rf"^{key} holds a credential, .* give it by the environment") as caught:
        load("pretrain", ["data.path=/data", *given], PretrainConfig)
    assert "hunter2" not in str(caught.value) and "AKIA" not in str(caught.value)


def test_places_without_credentials_are_taken() -> None:
    for path in ("s3://bucket/data", "s3://bucket/a?endpoint_override=http://127.0.0.1:5000&scheme=http", "/a:b/c@d"):
        assert load("pretrain", [f"data.path='{path}'"], PretrainConfig).data.path == path
