"""Bundles."""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from fuzz.histories import check_vocabulary
from fuzz.mutations import FLOATS, NUMBERS, TEXTS, mutated_bytes, mutated_parquet, mutated_text
from fuzz.reader import Files, Reader, files_of, frame_of, require
from hymate.config import DataConfig, ModelConfig
from hymate.data.features import AGE, Column
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.data.vocabulary import Vocabulary


class Bundles(Reader):
    """A bundle into a model. Invariants: the settings are those of config.yaml; the weights, the vocabulary and the
    trees those of their files; all finite; and the model computes."""

    name = "bundle"

    def __init__(self, scratch: Path) -> None:
        import torch

        from hymate.inference.bundle import Bundle
        from hymate.inference.plain import Linear, PlainConfig, PlainModels, Trees
        from hymate.model.encoder import RiskModel

        torch.set_num_threads(1)
        torch.manual_seed(0)
        quantiles = np.linspace(0, 1, NUM_KNOTS, dtype=np.float32).tolist()
        row = {
            "id": 0,
            "count": 9,
            "subjects": 3,
            "value_count": 5,
            "median": 0.5,
            "scale": 2.0,
            "quantiles": quantiles,
        }
        codes = [{**row, "code": f"LAB//{n}", "id": n, "count": 9 - n} for n in range(4)]
        codes[3] |= {"value_count": 0, "quantiles": []}
        vocabulary = Vocabulary(pa.Table.from_pylist(codes, VOCABULARY_SCHEMA))
        model = ModelConfig(d_model=8, layers="MA", d_state=8, headdim=8, num_heads=2, num_queries=2, dropout=0.0)
        settings = DataConfig("", context=64, tokens_per_row=128, min_count=1)
        state = RiskModel(model, vocabulary.size, ["stay"], ["stay"]).state_dict()
        bundle = Bundle("risk", model, settings, vocabulary, state, ["stay"], ["stay"], extra={"auroc": 0.8})
        leaf = [-1, -1]
        trees = Trees(
            root_T=np.array([0, 3]),
            feature_N=np.array([0, *leaf, 1, *leaf], np.int32),
            threshold_N=np.array([0.5, 0, 0, np.inf, 0, 0]),
            missing_left_N=np.array([True, False, False] * 2),
            left_N=np.array([1, *leaf, 4, *leaf], np.int32),
            right_N=np.array([2, *leaf, 5, *leaf], np.int32),
            value_N=np.array([0, -0.1, 0.2, 0, -0.3, 0.4]),
        )
        columns = Column("LAB//0", "mean", 1), Column(AGE, "years")
        numbers = np.array([[-2.0, 0.0], [3.0, 90.0], [0.3, -0.1], [0.0, 0.2]])
        config = PlainConfig((24.0,), 0.5, 0.3, 0.1, linear_weight=0.2)
        bundle.plain["stay"] = PlainModels(config, columns, trees, Linear(columns, *numbers))
        bundle.write(scratch / "bundle")
        self.files = files_of(scratch / "bundle")

    def mutate(self, rng: random.Random) -> Files:
        files = ["config.yaml", "model.safetensors", "vocabulary.parquet", "boosting.parquet", "linear.parquet"]
        name = rng.choices(files, [40, 25, 15, 10, 10])[0]
        data = self.files[name]
        if name == "config.yaml":
            return {name: mutated_text(rng, data) if rng.random() < 0.5 else mutated_tree(rng, data)}
        if name.endswith(".parquet"):
            data = mutated_parquet(rng, data, list(self.files.values()))
        else:
            data = mutated_weights(rng, data)
        if rng.random() < 0.1:
            return {name: data}
        tree = yaml.load(
            self.files["config.yaml"], yaml.CSafeLoader
        )  # whoever means harm writes a checksum that agrees
        tree["sha256"][name] = hashlib.sha256(data).hexdigest()
        return {name: data, "config.yaml": yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False).encode()}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        import torch
        from rows import random_row

        from hymate import ops
        from hymate.inference.bundle import build_model, read_bundle

        bundle = read_bundle(folder)
        tree = yaml.load((folder / "config.yaml").read_text(), yaml.CSafeLoader)
        for section, config in (("model", bundle.model), ("data", bundle.data)):
            for key, value in tree[section].items():
                require(key == "path" or getattr(config, key) == value, f"{section}.{key} is another")
        require(bundle.tasks == tree["tasks"] and bundle.kind == tree["kind"], "other tasks")
        header_size = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        content = (folder / "model.safetensors").read_bytes()
        header, body = json.loads(content[8 : 8 + header_size]), content[8 + header_size :]
        header.pop("__metadata__", None)
        require(bundle.state.keys() == header.keys(), "other weights")
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            expected = np.frombuffer(body[start:stop], np.float32).reshape(entry["shape"])
            require(np.array_equal(bundle.state[name].numpy(), expected), "other numbers")
        check_vocabulary(bundle.vocabulary, frame_of(folder / "vocabulary.parquet", program))
        for plain in bundle.plain.values():
            values = frame_of(folder / "boosting.parquet", program)["value"]
            require(set(plain.trees.value_N.tolist()) <= set(values), "other leaves")
            if plain.linear:
                slopes = frame_of(folder / "linear.parquet", program)["slope"]
                require(plain.linear.slope_X.tolist() == list(slopes), "other slopes")
            with np.errstate(over="ignore"):
                for model, columns in (
                    (plain.trees, plain.columns),
                    (plain.linear, plain.linear and plain.linear.columns),
                ):
                    if model:
                        logit_E = model.logit(np.full((3, len(columns)), np.nan, np.float32))
                        require(len(logit_E) == 3, "another shape")
        if bundle.kind != "risk":
            return
        model = build_model(bundle)
        if rng.random() < 0.1:
            with torch.no_grad(), ops.forced("reference"):
                said = model(random_row((3, 2), vocab_size=bundle.vocabulary.size))
            require(said["logit_AT"].shape == (2, len(bundle.tasks)), "another shape")


def mutated_tree(rng: random.Random, data: bytes) -> bytes:
    """A YAML file with a value changed."""
    tree = yaml.load(data, yaml.CSafeLoader)
    place, key = tree, rng.choice(list(tree))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place))
    odd = [*NUMBERS, *FLOATS, *TEXTS, None, True, [], {}, [[]], {"a": 1}, b"\xff", datetime.date(2020, 1, 1)]
    value = place[key]
    if rng.random() < 0.15:
        place[rng.choice(TEXTS)] = value
    elif rng.random() < 0.15:
        del place[key]
    elif isinstance(value, int) and rng.random() < 0.5:
        place[key] = value * rng.choice([2, 3, -1, 1000, 10**6, 10**9, 10**30])
    elif isinstance(value, str) and value and rng.random() < 0.5:
        place[key] = value * rng.choice([2, 1000, 20000])
    elif isinstance(value, list) and rng.random() < 0.6:
        place[key] = rng.choice([value * 2, [*value, *TEXTS], [f"t{n}" for n in range(2000)], [1], [None], ["a.b"]])
    else:
        place[key] = rng.choice(odd)
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False).encode()


def mutated_weights(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with its bytes, or an entry of its header, changed."""
    if rng.random() < 0.35:
        return mutated_bytes(rng, data, [])
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        header[rng.choice(["x", "heads.stay.0.weight", "backbone", *TEXTS])] = header.pop(name)
    elif kind == 1 and "dtype" in entry:
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "U8", "F64", "BOOL", "F8_E4M3", "F32", "C64", "X", 5])
    elif kind == 2 and "shape" in entry:
        entry["shape"] = rng.choice(
            [[], [0], [2**31], [2**62, 4], [-1], entry["shape"][::-1], [*entry["shape"], 1], ["a"]]
        )
    elif kind == 3 and "data_offsets" in entry:
        entry["data_offsets"] = [rng.choice([*NUMBERS, offset, offset + 4]) for offset in entry["data_offsets"]]
    elif kind == 4:
        header["__metadata__"] = rng.choice([{}, {"format": "tf"}, {"a": 1}, [], "x", {"a": "b" * 1000}])
    else:
        at = rng.randrange(0, len(body) - 4, 4)
        with np.errstate(over="ignore"):
            number = np.float32(rng.choice(FLOATS)).tobytes()
        body = body[:at] + number + body[at + 4 :]
    text = json.dumps(header).encode()
    size = rng.choice([len(text)] * 8 + [0, 2**40, 2**63, len(text) + 1])
    return size.to_bytes(8, "little") + text + body
