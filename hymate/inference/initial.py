"""The pretrained bundle that a training starts from: the setting `init`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from hymate.config import ModelConfig
from hymate.data.codemap import FOLDER, CodeMap
from hymate.data.histories import Histories
from hymate.data.statistics import contradictions
from hymate.data.vocabulary import Vocabulary
from hymate.errors import ConfigError, UserError
from hymate.inference.bundle import Bundle, read_bundle
from hymate.model.batch import FIRST_CODE_ID, UNKNOWN_ID
from hymate.runs import PACKAGE
from hymate.storage.paths import locate

SHIPPED = PACKAGE / "bundles"  # inside the package, so that Ray's workers have them, too
# model settings that a pretrained backbone leaves open: they change no shape of it. Only the window changes what it
# computes, for histories that are longer: so a model that saw them whole is fine-tuned into one that streams
OPEN_SETTINGS = ("dropout", "pooling", "elapsed", "num_queries", "members", "chunk_size", "window")
FEW, MANY = 0.05, 0.5  # fractions of the events: sex and birth, which most datasets code alike, are less than the first


def initial_bundle(init: str) -> Bundle:
    """What `init` names: the place of a run or bundle, or one of SHIPPED. Raises UserError as `read_bundle` does."""
    place = locate(init)
    if isinstance(place, Path) and not place.exists():
        names = sorted(file.parent.name for file in SHIPPED.glob("*/config.yaml"))
        if init not in names:
            raise UserError(
                f"init={init}: there is no such folder: give that of a bundle or of a finished run, or the name of one "
                f"of ours: {', '.join(names)}"
            )
        place = SHIPPED / init
    return read_bundle(place)


def require_same_model(bundle: Bundle, model: ModelConfig) -> None:
    """Raises ConfigError where a model differs from the bundle's in more than OPEN_SETTINGS. Its scan may become aware
    of time: the weights for it begin at 0, which changes nothing.
    """
    for field in dataclasses.fields(ModelConfig):
        own, given = getattr(bundle.model, field.name), getattr(model, field.name)
        is_open = field.name in OPEN_SETTINGS or (field.name == "time_aware_scan" and given)
        if given != own and not is_open:
            raise ConfigError(
                f"model.{field.name}={given} does not fit the bundle of init, which has {own}: give the bundle's "
                "model, or init=null"
            )


def check_codes(bundle: Bundle, init: str, histories: Histories) -> None:
    """Warn where the bundle knows the codes of less than half of the dataset's training events, and where values seem
    to have another unit than those that it learned from.

    Raises UserError where it knows next to none. Both name the code map that would help, if it is one of ours.
    """
    own = Vocabulary.of(histories, min_count=1)
    known = _known(bundle, own.codes, own)
    if known < MANY:
        line = f"init={init} knows the codes of {known:.1%} of this dataset's training events: "
        line += _remedy(bundle, own, known)
        if known < FEW:
            raise UserError(line)
        print(f"warning: {line}", flush=True)
    for found in contradictions([bundle.vocabulary.table, own.table]):
        learned, here = found["medians"]
        print(
            f"warning: {found['code']}: its median is {here:.4g} in this dataset and {learned:.4g} in init={init}: "
            "are the units the same? A code map can mend it",
            flush=True,
        )


def _remedy(bundle: Bundle, own: Vocabulary, known: float) -> str:
    by_map = {path.stem: _known(bundle, _renamed(path.stem, own), own) for path in sorted(FOLDER.glob("*.csv"))}
    best = max(by_map, key=lambda name: by_map[name])
    if by_map[best] > known + FEW:
        return f"prepare it with codes={best}, by which these are {by_map[best]:.0%}"
    return "prepare it with a code map to the bundle's codes (docs/data.md)"


def _known(bundle: Bundle, codes: list[str], own: Vocabulary) -> float:
    """The fraction of a dataset's training events that the bundle knows, by the codes of the dataset's vocabulary."""
    count_C = own.count_V[FIRST_CODE_ID:]
    known_C = bundle.vocabulary.ids_of(codes) != UNKNOWN_ID
    return float(np.sum(count_C, where=known_C) / max(count_C.sum(), 1))


def _renamed(name: str, own: Vocabulary) -> list[str]:
    """The codes of a vocabulary under a code map."""
    lines = CodeMap.read(name).lines
    return [lines[code].canonical if code in lines else code for code in own.codes]
