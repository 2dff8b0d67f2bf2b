"""A bundle's predictions of a whole dataset: part by part, on every CPU, GPU or machine, and continued after a kill.

A part is a range of a prepared dataset's examples, or a shard of a MEDS folder, which is read in pieces of whole
subjects and never copied. Each part leaves a file of predictions; they are joined at the end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from hymate.config import Codes, DataPath, Place, TaskConfig, not_negative
from hymate.data.codemap import CodeMap
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories, Splits, read_metadata
from hymate.data.known import differing
from hymate.data.meds import SplitsConfig, iter_events, write_parquet
from hymate.data.parts import load_arrays, open_histories, read_input, run_parts, save_arrays
from hymate.data.sources.meds import MedsSource, check_shard
from hymate.data.tasks import LabelSet, read_or_extract_labels, read_times
from hymate.device import Wanted, choose, num_gpus, obstacle
from hymate.errors import UserError
from hymate.inference.bundle import Bundle, build_model, read_bundle
from hymate.inference.predictions import day_table, incidence_table, prediction_table
from hymate.inference.scoring import Outputs, predict, predict_last, predict_whole
from hymate.inference.states import StateFolder
from hymate.machine import available_cpus
from hymate.model.encoder import RiskModel
from hymate.storage.paths import Location, files_below, locate, present, readable, remove_tree, write_text
from hymate.work import worth

PART = 20_000  # labels of a part of a prepared dataset, about
WORK = ".work"  # in the folder of the parts: the journal, and what parts are asked and count
GIVEN = ".labels"  # there: what no shard is called


Context = Literal["bundle", "all"]


@dataclass(frozen=True)
class Request:
    """What is predicted; it pickles.

    split: "all" or one of the dataset's splits. context: as in `PredictConfig`. states: with context="all", where each
    subject's state is kept. codes: what the codes of a MEDS folder are replaced by.
    """

    bundle: Location
    data: Location
    task: TaskConfig
    split: str
    context: Context
    device: str
    states: Location | None = None
    codes: CodeMap | None = None

    @property
    def made_of(self) -> str:
        """A digest of the code map; empty without one."""
        return f" {self.codes.digest}" if self.codes else ""


@dataclass(frozen=True)
class RequestConfig:
    """What the commands that predict a dataset have in common.

    bundle: a risk bundle, or the run folder of finetune/tune.py.
    split: "all" or one of the dataset's splits.
    codes: code map of a MEDS folder that is not prepared, as in `python -m hymate.data.prepare`.
    workers: processes; 0 is as many as CPUs or GPUs have enough to do. On a cluster each of its CPUs or GPUs is one.
    device: "auto" takes a GPU if what the model needs for it is installed, else the CPU; or "cpu", "cuda".
    """

    bundle: Place
    data: DataPath
    task: TaskConfig
    out: Place
    split: Literal["all", "train", "tuning", "held_out"] = "all"
    codes: Codes | None = None
    workers: int = 0
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        not_negative(self, "workers")

    def read_bundle(self) -> Bundle:
        """The model that predicts the task. Raises UserError where it does so in another way."""
        bundle = read_bundle(locate(self.bundle), kind="risk").for_task(self.task.name)
        asked = bundle.in_time.get(self.task.name)
        if asked != self.task.in_time:
            learned = "whether, not when (task.kind=binary)"
            if asked is not None:
                days = ",".join(f"{horizon:g}" for horizon in asked.horizons_days)
                competing = f"task.horizons_days=[{days}] and task.competing={asked.competing or 'null'}"
                learned = f"when: give task.kind=time_to_event, {competing}"
            raise UserError(f"{self.bundle}: task {self.task.name} has learned {learned}")
        return bundle

    def request(self, bundle: Bundle, context: Context = "bundle", states: Location | None = None) -> Request:
        """What the command predicts. Raises UserError where there is no such device or code map."""
        device, places = choose(self.device, bundle.model).type, (locate(self.bundle), locate(self.data.path))
        codes = None if self.codes is None else CodeMap.read(self.codes).under(bundle.known)
        if codes and is_prepared(places[1]):
            raise UserError(
                f"codes={self.codes}: {self.data.path} is prepared, and codes are mapped when a dataset is prepared: "
                "leave codes out, or give data.path the MEDS folder that it was prepared from"
            )
        return Request(*places, self.task, self.split, context, device, states, codes)


@dataclass(frozen=True)
class Counts:
    """predictions: how many there are. labels: how many were found. read, unknown: events, and those of them with
    codes that the bundle does not know. left_out: labels, by reason. states: by how they were found.
    """

    predictions: int = 0
    labels: int = 0
    read: int = 0
    unknown: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        pairs: Iterator[tuple[Any, Any]] = zip(vars(self).values(), vars(other).values(), strict=True)
        sums: Iterator[Any] = (dict(Counter(a) + Counter(b)) if isinstance(a, dict) else a + b for a, b in pairs)
        return Counts(*sums)


def is_prepared(data: Location) -> bool:
    """Whether a folder is to be read as a prepared dataset, and not as MEDS."""
    return read_metadata(data) is not None or not (data / "data").is_dir()


def open_for(bundle: Bundle, data: Location) -> Histories:
    """A prepared dataset that the bundle can predict.

    Raises UserError where the bundle knows none of its codes, and where it was prepared under rules of when events
    become known that treat it in another way than the bundle's.
    """
    histories = Histories.open(data)
    if codes := differing(bundle.known, histories.known, histories.codes):
        raise UserError(
            f"{data}: prepared under other rules than the bundle's of when events become known ({len(codes)} codes "
            f"differ, {codes[0]!r} for one): give data.path the MEDS folder that it was prepared from"
        )
    if not bundle.vocabulary.ids_of(histories.codes).any():
        raise _other_codes(data)
    return histories


def asked_of(histories: Histories, task: TaskConfig, split: str) -> Examples:
    """The task's prediction times in a split of a prepared dataset; a folder of labels needs no boolean_value."""
    if task.labels is None:
        labels = read_or_extract_labels(histories.path, task, times_only=True).table
    else:
        labels = read_times(locate(task.labels), "task.labels", task)
    if split == "all":
        histories = histories.with_splits(dict.fromkeys(histories.splits, split))
    return labelled_examples(histories, labels, split)


def predict_dataset(request: Request, out: Location, workers: int) -> tuple[list[Location], Counts]:
    """Predict, and write a Parquet file `out`, by subject and time; or one file a part, where `out` is a folder.

    workers: processes, at most; 0 is as many as CPUs or GPUs have enough to do.

    Where the task has days, or is in time, those or its incidences are beside `out`. The same call continues one that
    was killed. Returns the paths.
    Raises UserError where nothing can be predicted, FloatingPointError where the model predicts what is no number.
    """
    _model.cache_clear()  # an earlier call in this process may have found something else in the same place
    bundle = read_bundle(request.bundle, kind="risk").for_task(request.task.name)
    besides = ["days"] * bool(bundle.in_days) + ["incidence"] * bool(bundle.in_time)
    targets = [out] + [out.with_stem(f"{out.stem}-{name}") for name in besides]
    joined = out.name.endswith(".parquet")
    folder = out.parent / f"{out.name}.parts" if joined else out
    folders = [folder / target.stem for target in targets] if joined else targets
    work = folder / WORK
    asked = _ranges(request, bundle) if is_prepared(request.data) else _shards(request)
    made_of = f"{bundle.fingerprint} {request.context} {request.split} {asked.made_of}{request.made_of}"
    if not joined and present(folder) and not present(work) and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files already: choose a new folder for out=, or delete it")
    run_parts(
        "predict",
        functools.partial(predict_part, request=request, folders=folders, work=work, labelled=asked.labelled),
        asked.parts,
        work,
        made_of,
        1 if request.states else min(most(workers, request.device), asked.worth, len(asked.parts)),
        inputs=asked.inputs,
        refusal=None if joined else f"{folder}: holds other predictions: choose another out=",
        here=request.states is not None,
        gpus=request.device == "cuda",
    )
    counts = [Counts(**json.loads((work / f"{part}.json").read_text())) for part in asked.parts]
    found = functools.reduce(Counts.__add__, counts, Counts(left_out=asked.left_out))
    if asked.num_labels and (unknown := asked.num_labels - found.labels):
        found.left_out["unknown_subject"] = unknown
    if not found.predictions or found.unknown == found.read > 0:
        remove_tree(folder if joined else work)
        raise _other_codes(request.data) if found.predictions else _nothing(request, asked, found)
    if joined:
        for target, source in zip(targets, folders, strict=True):
            tables = [pq.read_table(readable(source / f"{part}.parquet")) for part in asked.parts]
            table = pa.concat_tables(tables, promote_options="default")
            write_parquet(table.sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")]), target)
    remove_tree(folder if joined else work)
    return targets, found


def most(workers: int, device: str) -> int:
    """How many processes a user allows; 0 stands for as many as there are CPUs, or GPUs."""
    return workers or (num_gpus() if device == "cuda" else available_cpus())


@dataclass(frozen=True)
class _Asked:
    """What is predicted, in parts. inputs: the examples of each part of a prepared dataset; the labels GIVEN for a MEDS
    folder. labelled: whether all have a label. left_out: labels, by reason. num_labels: how many there are, where
    subjects may be unknown. made_of: a digest. worth: how many processes have enough to do.
    """

    parts: list[str]
    labelled: bool
    made_of: str
    worth: int
    inputs: dict[str, pa.Table] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    num_labels: int = 0


def _ranges(request: Request, bundle: Bundle) -> _Asked:
    """The parts of a prepared dataset: ranges of its examples, none of which cuts a subject in two."""
    histories = open_for(bundle, request.data)
    examples = asked_of(histories, request.task, request.split)
    parts = examples.in_parts(PART)
    labelled = not np.isnan(examples.label_E).any()
    made_of = f"{histories.fingerprint} {examples.digest()}"
    inputs = {part: own.table() for part, own in parts.items()}
    return _Asked(list(parts), labelled, made_of, len(parts), inputs, examples.dropped)


def _shards(request: Request) -> _Asked:
    """The parts of a MEDS folder: its shards."""
    source = MedsSource(request.data, SplitsConfig(), 0)
    shards, labels = source.shards(), _given(request)
    if request.split != "all" and not present(request.data / meds.subject_splits_filepath):
        raise UserError(f"{request.data}: has no {meds.subject_splits_filepath}: predict split=all")
    files = files_below(request.data / meds.data_subdirectory, ".parquet").values()
    processes = worth(sum(file.stat().st_size for file in files))
    if labels is None:
        if request.task.definition is None:
            where = request.data / "labels" / request.task.name
            raise UserError(f"{where}: no labels: give task.labels=FOLDER or a task.definition")
        return _Asked(shards, True, f"{source.fingerprint()} {request.task.definition}", processes)
    labelled = "boolean_value" in labels.column_names and not labels["boolean_value"].null_count
    digest = f"{source.fingerprint()} {LabelSet(labels, {}).digest()}"
    return _Asked(shards, labelled, digest, processes, {GIVEN: labels}, num_labels=labels.num_rows)


def _given(request: Request) -> pa.Table | None:
    """The labels given for a MEDS folder, by subject; None where they are to be extracted."""
    task, own = request.task, request.data / "labels" / request.task.name
    if task.labels is None and not present(own):
        return None
    folder, key = (own, f"task.name={task.name}") if task.labels is None else (locate(task.labels), "task.labels")
    return read_times(folder, key, task).sort_by("subject_id")


# -------------------------------------------------------------------------------------------------------- a part


def predict_part(part: str, request: Request, folders: list[Location], work: Location, labelled: bool) -> None:
    """Write the predictions of one part into each of the folders (the second one's are days, or incidences by each
    horizon), and what it counted.
    """
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the other CPUs have parts of their own
    bundle, model = _model(str(request.bundle), request.task.name, request.device)
    total = Counts()
    tables: list[list[pa.Table]] = [[] for _ in folders]
    owner = f"{bundle.fingerprint}{request.made_of}"
    with StateFolder(request.states, owner) if request.states else contextlib.nullcontext() as states:
        for histories, examples, counts in _pieces(part, request, bundle, work):
            outputs, read, unknown = _predicted(model, bundle, histories, examples, request, states)
            total += counts + Counts(predictions=len(examples), read=read, unknown=unknown)
            known = examples if labelled and not bundle.in_time else examples.without_labels()
            tables[0].append(prediction_table(known, outputs.probability_ET[:, 0]))
            if bundle.in_days:
                tables[1].append(day_table(known, outputs.days_ET[:, 0]))
            for task, asked in bundle.in_time.items():
                tables[1].append(incidence_table(known, outputs.incidences(bundle.in_time, task), asked))
        total += Counts(states=dict(states.counts) if states else {})
    for folder, found in zip(folders, tables, strict=True):
        write_parquet(pa.concat_tables(found, promote_options="default"), folder / f"{part}.parquet")
    write_text(json.dumps(asdict(total)), work / f"{part}.json")


def _predicted(
    model: RiskModel,
    bundle: Bundle,
    histories: Histories,
    examples: Examples,
    request: Request,
    states: StateFolder | None,
) -> tuple[Outputs, int, int]:
    """Predictions, how many events were read for them, and how many of these have unknown codes."""
    device = torch.device(request.device)
    if not len(examples):
        return Outputs.empty(0, 1), 0, 0
    if request.context == "all":
        return predict_whole(model, bundle, histories, examples, device, states)
    return predict_last(model, bundle, histories, examples, device)


def _pieces(
    part: str, request: Request, bundle: Bundle, work: Location
) -> Iterator[tuple[Histories, Examples, Counts]]:
    """What is predicted at a time: all that is asked of a prepared dataset in a part; of a MEDS shard whole subjects,
    some at a time, with what of the labels is theirs.
    """
    if (work / f"{part}.parquet").is_file():
        yield open_histories(request.data), Examples.of_table(read_input(part, work)), Counts()
        return
    path = request.data / meds.data_subdirectory / f"{part}.parquet"
    check_shard(path, path)
    if (work / f"{GIVEN}.parquet").is_file():
        subjects = pq.read_table(readable(path), columns=["subject_id"])["subject_id"].unique()
        labels = read_input(GIVEN, work, filters=pc.field("subject_id").isin(subjects))
    else:
        from hymate.data.extraction import labels_of_shard  # late: whoever gives labels needs no polars

        labels = labels_of_shard(path, request.task, bundle.known, request.codes)
    labels = labels.sort_by("subject_id")
    label_subject_N = labels["subject_id"].to_numpy()
    splits = None if request.split == "all" else Splits(request.data, beside=work / ".splits")
    code_ids: dict[str, int] = {}
    for events in iter_events(path, code_ids, mapped=request.codes.apply if request.codes else None):
        histories = Histories.of_events(events, code_ids, bundle.known)
        subject_id_N = np.unique(events.subject_id_R)
        first_M, stop_M = (np.searchsorted(label_subject_N, subject_id_N, side) for side in ("left", "right"))
        rows = [np.arange(0), *(np.arange(first, stop) for first, stop in zip(first_M, stop_M, strict=True))]
        own = labels.take(np.concatenate(rows))
        counts = Counts(labels=own.num_rows)
        if splits is not None:
            asked_N = subject_id_N[splits.of(subject_id_N) == request.split]
            own = own.filter(pc.is_in(own["subject_id"], pa.array(asked_N)))
        examples = labelled_examples(histories, own, "all", required=False)
        yield histories, examples, counts + Counts(left_out=examples.dropped)


# ---------------------------------------------------------------------------------- of a bundle that is nowhere yet


def spread_outputs(bundle: Bundle, histories: Histories, examples: Examples, device: str, folder: Location) -> Outputs:
    """What `predict` gives for a bundle of one task; many examples in parts, as `predict_dataset` does.

    device: "cuda" is a GPU of this machine or, where it has none that does, of the cluster. folder: what a killed call
    had done is found in it.
    """
    parts, task = examples.in_parts(PART), bundle.tasks[0]
    on_gpu = device == "cuda"
    usable = not on_gpu or obstacle(bundle.model) is None
    if usable and len(parts) == 1:
        return predict(bundle, histories, examples, torch.device(device))
    _model.cache_clear()
    written = folder / f"bundle-{uuid.uuid4().hex}"  # a cluster's processes keep what they have read of another
    bundle.write(written)
    made_of = f"{read_bundle(written).fingerprint} {histories.fingerprint} {examples.digest()}"
    work = folder / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    run_parts(
        f"score {task}",
        functools.partial(_outputs_of_part, written=written, data=histories.path, task=task, device=device, work=work),
        list(parts),
        work,
        made_of,
        min(most(0, device), len(parts)),
        inputs={part: own.table() for part, own in parts.items()},
        gpus=on_gpu,
    )
    remove_tree(written)
    found = [load_arrays(work / f"{part}.npz") for part in parts]
    return Outputs(*(np.concatenate([of_part[spec.name] for of_part in found]) for spec in fields(Outputs)))


def _outputs_of_part(part: str, written: Location, data: Location, task: str, device: str, work: Location) -> None:
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    bundle, model = _model(str(written), task, device)
    examples = Examples.of_table(read_input(part, work))
    outputs, *_ = predict_last(model, bundle, open_histories(data), examples, torch.device(device))
    save_arrays(work / f"{part}.npz", **vars(outputs))


# ----------------------------------------------------------------------------------------------------------- both


@functools.lru_cache(maxsize=1)
def _model(bundle: str, task: str, device: str) -> tuple[Bundle, RiskModel]:
    found = read_bundle(locate(bundle), kind="risk").for_task(task)
    return found, build_model(found).to(device)


def _nothing(request: Request, asked: _Asked, found: Counts) -> UserError:
    why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in found.left_out.items() if count)
    if not asked.num_labels and not found.labels:
        why = "no event matches task.definition: set its predicates to the codes of this dataset"
    return UserError(f"{request.data}: nothing to predict in split {request.split!r} ({why or 'no label'})")


def _other_codes(data: Location) -> UserError:
    remedy = "give a code map (codes=map.csv) with its MEDS folder"
    return UserError(f"{data} has none of the codes that the bundle knows: it is coded differently; {remedy}")
