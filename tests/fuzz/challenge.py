"""The files of PhysioNet's challenge of 2012."""

from __future__ import annotations

import datetime
import io
import lzma
import random
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from challenge import STAY

from fuzz.mutations import mutated_bytes, mutated_text
from fuzz.reader import Files, Reader, frame_of, require
from hymate.data.meds import SplitsConfig
from hymate.data.sources import physionet2012
from hymate.data.sources.physionet2012 import PhysioNet2012Source


class Challenge(Reader):
    """The challenge's text, from a folder and from an archive. Invariants: each stay once, with its outcome."""

    name = "challenge"

    def __init__(self, scratch: Path) -> None:
        self.files = {}
        for letter, first in (("a", 731001), ("b", 731101)):
            records = range(first, first + 3)
            for record in records:
                self.files[f"set-{letter}/{record}.txt"] = STAY.format(record=record).encode()
            rows = "".join(f"{record},6,1,{record % 9},-1,{record % 2}\n" for record in records)
            self.files[f"Outcomes-{letter}.txt"] = (physionet2012._OUTCOMES_HEADER + "\n" + rows).encode()
        stays = {name: self.files.pop(name) for name in list(self.files) if name.startswith("set-b/")}
        self.tar = tar_of([(name, data, {}) for name, data in stays.items()])
        self.members = list(stays.items())
        self.files["set-b.tar.xz"] = lzma.compress(self.tar, preset=0)

    def mutate(self, rng: random.Random) -> Files:
        kind = rng.random()
        texts = [name for name in self.files if name.startswith("set-a/")]
        if kind < 0.6:
            name = rng.choice(texts)
            return {name: mutated_text(rng, self.files[name])}
        if kind < 0.75:
            name = rng.choice(["Outcomes-a.txt", "Outcomes-b.txt"])
            return {name: mutated_text(rng, self.files[name])}
        if kind < 0.78:
            name = rng.choice(
                ["set-a/0731001.txt", "set-a/x.txt", "set-a/9999999999999999999.txt", "Outcomes-b.txt.txt"]
            )
            return {name: self.files[rng.choice(texts)]}
        if kind < 0.83:
            return {"set-b.tar.xz": mutated_bytes(rng, self.files["set-b.tar.xz"], [])}
        if kind < 0.92:
            tar = mutated_bytes(rng, self.tar, [])
        else:
            members: list[tuple[str, bytes, dict[str, Any]]] = [(name, data, {}) for name, data in self.members]
            name, data = rng.choice(self.members)
            settings = {"type": rng.choice([b"0", b"1", b"2", b"5", b"6", b"S", b"L", b"x"])}
            settings |= rng.choice([{}, {"linkname": "/etc/passwd"}, {"linkname": self.members[0][0]}, {"mode": 0}])
            name = rng.choice([name, f"../{name}", f"/tmp/{name}", f"set-b/sub/{name[6:]}", "set-b/notes.md"])
            members.insert(rng.randrange(len(members) + 1), (name, mutated_text(rng, data), settings))
            tar = tar_of(members)
        return {"set-b.tar.xz": lzma.compress(tar, preset=0)}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        out = folder.with_name("out")
        shutil.rmtree(out, ignore_errors=True)
        source = PhysioNet2012Source(folder, SplitsConfig(1, 0, 0), 0)
        require(source.fingerprint(), "no fingerprint")
        found: dict[int, list[tuple]] = {}
        for shard in source.shards():
            source.write_shard(shard, out)
            for subject, *row in frame_of(out / "data" / f"{shard}.parquet", program).iter_rows():
                found.setdefault(subject, []).append(tuple(row))
        source.finish(out)
        texts = [(path.stem, path.read_bytes()) for path in (folder / "set-a").glob("*.txt")]
        with tarfile.open(folder / "set-b.tar.xz") as archive:
            members = [member for member in archive.getmembers() if member.isreg() and member.name.endswith(".txt")]
            texts += [(Path(member.name).stem, archive.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
        require(sorted(found) == sorted(int(stem) for stem, _ in texts), "other stays")
        for stem, text in texts:
            require(found[int(stem)] == plain_stay(text), "other events")
        died = frame_of(out / "labels" / "mortality" / f"{source.shards()[0]}.parquet", program)
        labels = dict(zip(died["subject_id"].to_list(), died["boolean_value"].to_list(), strict=True))
        outcomes = b"\n".join(folder.joinpath(f"Outcomes-{letter}.txt").read_bytes() for letter in "ab").decode()
        rows = [
            line.strip().split(",")
            for line in re.split("[\r\n]+", outcomes)
            if line.strip() and not line.startswith("Record")
        ]
        require(labels == {int(row[0]): row[5] == "1" for row in rows}, "other outcomes")


def plain_stay(text: bytes) -> list[tuple]:
    """(time, code, value) of a stay's events, line by line."""
    lines = [line.rstrip("\r") for line in text.decode().split("\n")]
    require(lines[0] == "Time,Parameter,Value", "no header")
    units = {code.split("//")[0]: code for code in list(physionet2012.CODES)[:37]}
    static: list[tuple] = []
    timed: list[tuple] = [(physionet2012.ORIGIN, physionet2012.ADMISSION, None)]
    seen = set()
    for line in lines[1:-1] if not lines[-1] else lines[1:]:
        clock, parameter, value_text = line.split(",")
        require(re.fullmatch("[0-9][0-9]:[0-5][0-9]", clock), "an odd time")
        minutes, value = int(clock[:2]) * 60 + int(clock[3:]), float(np.float32(float(value_text)))
        if minutes == 0 and parameter in physionet2012.DESCRIPTORS and parameter not in seen:
            seen.add(parameter)
            coded = {
                "Gender": {0.0: "GENDER//F", 1.0: "GENDER//M"},
                "ICUType": {k: f"ICUType//{k:.0f}" for k in range(1, 5)},
            }
            if parameter in coded:
                require(value == -1 or value in coded[parameter], "an odd category")
                static += [(None, coded[parameter][value], None)] if value in coded[parameter] else []
            elif parameter != "RecordID" and value != -1:
                static.append((None, parameter, value))
        elif parameter in units and value != -1:
            timed.append((physionet2012.ORIGIN + datetime.timedelta(minutes=minutes), units[parameter], value))
    return static + sorted(timed, key=lambda event: event[0])


def tar_of(members: list[tuple[str, bytes, dict[str, Any]]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data, settings in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in settings.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()
