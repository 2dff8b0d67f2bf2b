"""The portable model: what people share and deploy.

A bundle is a folder:
    model.safetensors   the weights in float32
    config.yaml         format version, kind, model and data settings, when events become known, tasks, checksums
    vocabulary.parquet  codes and their value statistics
    boosting.parquet    only where the risk is the mean of the network's and of plain models: the trees (`plain.py`)
    linear.parquet      logistic regression, where it is one of them
    README.md           the model card (free to edit: it has no checksum)

Nothing in a bundle is ever unpickled, and YAML is read with the safe loader only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hymate.config import DataConfig, InTime, ModelConfig
from hymate.data.known import KnownConfig
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError, first_line
from hymate.hashing import sha256_of
from hymate.storage.paths import Location, UrlPath, local_copy, new_folder
from hymate.trees import build, dump_yaml, parse_yaml, to_tree

if TYPE_CHECKING:
    from hymate.inference.plain import PlainModels
    from hymate.model.encoder import RiskModel

# 4: plain models, which few bundles have; 3 had boosting alone, 2 neither, 1 no rules of when events become known
FORMAT_VERSION, WITHOUT_PLAIN = 4, 2
Kind = Literal["pretrained", "risk"]
WEIGHTS, CONFIG, VOCABULARY, CARD = "model.safetensors", "config.yaml", "vocabulary.parquet", "README.md"
BOOSTING, LINEAR = "boosting.parquet", "linear.parquet"
CHECKED = (WEIGHTS, VOCABULARY)
MAX_CONFIG_BYTES = 1 << 18  # ours have a few thousand


@dataclass
class Bundle:
    """A model with all that its predictions need.

    kind: "pretrained" (state of PretrainModel) or "risk" (state of RiskModel, one head for each of `tasks`).
    data: how histories were cut and packed; its path is not written, for a bundle belongs to no dataset.
    in_days: those of the tasks that also predict how long something lasts.
    in_time: those of the tasks that predict when, in the order of the tasks.
    known: when events become known, in the histories that it was trained on.
    extra: plain values beside the settings (scores, thresholds, provenance).
    fingerprint: a digest of all that its predictions depend on; empty where it was not read from a folder.
    plain: by task, where the risk is the mean of the network's and that of plain models.
    """

    kind: str
    model: ModelConfig
    data: DataConfig
    vocabulary: Vocabulary
    state: dict[str, Tensor]
    tasks: list[str] = field(default_factory=list)
    in_days: list[str] = field(default_factory=list)
    known: KnownConfig = field(default_factory=KnownConfig)
    extra: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    plain: dict[str, PlainModels] = field(default_factory=dict)
    in_time: dict[str, InTime] = field(default_factory=dict)

    def for_task(self, task: str) -> Bundle:
        """The same model with the head of one task alone. Raises UserError where it has none for it."""
        if task not in self.tasks:
            raise UserError(f"the bundle predicts {', '.join(self.tasks)}, not task={task}")
        own = f"heads.{task}."
        state = {k: v for k, v in self.state.items() if k.startswith(own) or not k.startswith("heads.")}
        in_days = [name for name in self.in_days if name == task]
        plain = {name: of_task for name, of_task in self.plain.items() if name == task}
        in_time = {name: asked for name, asked in self.in_time.items() if name == task}
        alone = dataclasses.replace(self, tasks=[task], in_days=in_days, in_time=in_time)
        return dataclasses.replace(alone, state=state, plain=plain)

    def require_whether(self, what: str) -> None:
        """Raises UserError where a task is in time, which `what` can't do."""
        if self.in_time:
            raise UserError(
                f"{what}: task {next(iter(self.in_time))} is in time: use predict (context=bundle) or evaluate"
            )

    def write(self, folder: Location, card: str = "") -> None:
        """Write it whole: a temporary folder takes the place of `folder` when it is complete.

        card: text of the model card below its title.
        """
        with new_folder(folder, marker=CONFIG) as new:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state.items()}
            write_weights(state, new / WEIGHTS, {"format": "pt"})
            self.vocabulary.write(new / VOCABULARY)
            beside: dict[str, Any] = {}
            if self.plain:
                from hymate.inference.plain import write_plain  # late: few bundles have it

                beside["plain"] = write_plain(self.plain, new / BOOSTING, new / LINEAR)
            in_time = {task: to_tree(asked) for task, asked in self.in_time.items()}
            tree = {
                "format_version": FORMAT_VERSION if self.plain else WITHOUT_PLAIN,
                "kind": self.kind,
                "model": to_tree(self.model),
                "data": {key: value for key, value in to_tree(self.data).items() if key != "path"},
                "known": to_tree(self.known),
                "tasks": self.tasks,
                "in_days": self.in_days,
                **beside,
                **({"in_time": in_time} if in_time else {}),
                "extra": self.extra,
                "sha256": {name: sha256_of(new / name) for name in _checked(beside)},
            }
            (new / CONFIG).write_text(dump_yaml(tree))
            (new / CARD).write_text(f"# HyMaTE {self.kind} model\n\n{card.strip()}\n")


def read_bundle(path: Location, kind: Kind | None = None) -> Bundle:
    """Read a bundle, or a run folder's `bundle`; `kind` is the one the caller needs.

    Raises UserError (one line) where it is missing, damaged, of a newer format or of another kind.
    """
    folder = find_bundle(path)
    if isinstance(folder, UrlPath):
        try:
            with local_copy(folder) as copy:
                return read_bundle(copy, kind)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    tree = _read_config(folder)
    if kind is not None and tree["kind"] != kind:
        raise UserError(f"{folder} holds a {tree['kind']} model, but a {kind} model is needed here")
    checked = _checked(tree)
    for name in checked:
        _check_file(folder, name, tree["sha256"])
    try:
        model = build(ModelConfig, tree["model"], "model.")
        data = build(DataConfig, {**tree["data"], "path": "."}, "data.")  # no bundle says where
        known = build(KnownConfig, tree["known"], "known.")
        tasks, in_days = ([str.__str__(task) for task in tree[key]] for key in ("tasks", "in_days"))
        if len(set(tasks)) < len(tasks) or not set(in_days) <= set(tasks):
            raise ValueError("tasks are named twice, or in_days names others")
        if not set(tree["plain"]) <= set(tasks):
            raise ValueError("plain names others than tasks")
        in_time = {
            task: build(InTime, tree["in_time"][task], f"in_time.{task}.") for task in tasks if task in tree["in_time"]
        }
        if in_time.keys() != tree["in_time"].keys() or in_time.keys() & {*in_days, *tree["plain"]}:
            raise ValueError("in_time names others than tasks, or some of in_days or plain")
    except (UserError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{folder / CONFIG} is not usable: {first_line(error)}") from error
    state = read_weights(folder / WEIGHTS)
    vocabulary = Vocabulary.read(folder / VOCABULARY)
    plain = _read_plain(folder, tree["plain"])
    sha256 = {name: tree["sha256"][name] for name in checked}
    more = ([to_tree(known)] if known.rules else []) + ([tree["plain"]] if plain else [])
    more += [tree["in_time"]] if in_time else []
    identity = json.dumps([to_tree(model), tasks, sha256, *more], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    settings = tree["kind"], model, data, vocabulary, state, tasks, in_days, known, tree["extra"], fingerprint
    return Bundle(*settings, plain, in_time)


def _checked(tree: dict[str, Any]) -> tuple[str, ...]:
    """The files whose checksums a configuration names."""
    of_tasks = tree.get("plain", {}).values()
    linear = any(of_task.get("linear_weight") for of_task in of_tasks)
    return (*CHECKED, *((BOOSTING,) if of_tasks else ()), *((LINEAR,) if linear else ()))


def _read_plain(folder: Path, tree: dict[str, Any]) -> dict[str, PlainModels]:
    if not tree:
        return {}
    from hymate.inference.plain import PlainConfig, read_plain  # late: few bundles have it

    try:
        configs = {task: build(PlainConfig, of_task, f"plain.{task}.") for task, of_task in tree.items()}
    except UserError as error:
        raise UserError(f"{folder / CONFIG} is not usable: {first_line(error)}") from error
    return read_plain(folder / BOOSTING, folder / LINEAR, configs)


def write_weights(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that the umask allows; the library alone leaves it to its owner only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is none, or holds anything but finite float32."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): copy it again") from error
    for tensor in state.values():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise UserError(f"{path} is damaged (weights that are not finite float32 numbers): copy it again")
    return state


def build_model(bundle: Bundle) -> RiskModel:
    """The risk model of a bundle, with its weights, in evaluation mode."""
    from hymate.model.encoder import TIME_BINS, RiskModel  # late: reading a bundle's settings needs no model code

    if bundle.kind != "risk":
        raise UserError(f"a {bundle.kind} model has no risk heads: fine-tune it first (python finetune/tune.py)")
    # heads in time of older bundles say each bin's hazard by itself
    by_itself = {f"heads.{task}.basis_JJ": torch.eye(TIME_BINS) for task in bundle.in_time}
    state = by_itself | bundle.state
    try:
        num_weights = sum(tensor.numel() for tensor in bundle.state.values())
        if len(bundle.model.layers) + len(bundle.tasks) > len(bundle.state) or bundle.model.num_queries > num_weights:
            raise ValueError("it has more layers, tasks or queries than there are weights")
        settings = bundle.model, bundle.vocabulary.size, bundle.tasks, bundle.in_days, bundle.in_time
        # without memory, of which a configuration could ask for any amount
        with torch.device("meta"), _WithoutValues():
            wanted = {name: tensor.shape for name, tensor in RiskModel(*settings).state_dict().items()}
        differing = sorted(wanted.items() ^ {name: tensor.shape for name, tensor in state.items()}.items())
        if differing:
            raise ValueError(f"{len(differing)} names or shapes differ, {differing[0][0]} for one")
    except (RuntimeError, ValueError, ArithmeticError, KeyError, TypeError) as error:
        detail = first_line(error)
        raise UserError(f"the bundle's weights do not fit its own config.yaml: {detail}") from error
    model = RiskModel(*settings)
    model.load_state_dict(state)
    return model.eval()


class _WithoutValues(TorchFunctionMode):
    """Weights without memory need no first values, for which PyTorch would import its compiler: a second's work."""

    KEEP_SHAPE = ("add", "clamp", "div_", "exp", "expm1", "log", "mul", "neg", "__rdiv__")  # of the numbers themselves

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return None
        return args[0] if func.__name__ in self.KEEP_SHAPE else func(*args, **(kwargs or {}))


def find_bundle(path: Location) -> Location:
    """The bundle's folder: `path` itself, or `path`/bundle of a run folder."""
    folder = path / "bundle" if (path / "bundle").is_dir() else path
    if not folder.is_dir():
        raise UserError(f"{path} does not exist: give the folder of a bundle or of a finished run")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{path} holds no bundle ({CONFIG} is missing): a run writes its bundle when it finishes")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES} bytes")
        tree = parse_yaml(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable bundle configuration ({first_line(error)})") from error
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if type(version) is not int or version < 1:
        raise UserError(f"{folder} is not a bundle: {CONFIG} names no format_version (a run writes one at its end)")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder} has a newer bundle format than {FORMAT_VERSION}, the newest that is read here: update hymate"
        )
    if version == 3:
        tree["plain"] = tree.pop("boosting", {})
    tree = {"in_days": [], "in_time": {}, "extra": {}, "known": {}, "plain": {}, **tree}  # older bundles lack them
    sections = dict.fromkeys(("model", "data", "known", "plain", "extra", "in_time", "sha256"), dict)
    kinds = {"kind": str, "tasks": list, "in_days": list, **sections}
    for key, of in kinds.items():
        if not isinstance(tree.get(key), of):
            raise UserError(f"{path} is damaged: {key} is missing or malformed")
    if not all(isinstance(of_task, dict) for of_task in tree["plain"].values()):
        raise UserError(f"{path} is damaged: plain is not by task")
    if tree["sha256"].keys() != set(checked := _checked(tree)):
        raise UserError(f"{path} is damaged: sha256 must name {' and '.join(checked)} and nothing else")
    if tree["kind"] not in ("pretrained", "risk"):
        raise UserError(f"{path} is of an unknown kind {tree['kind'][:40]!r}: expected pretrained or risk")
    return tree


def _check_file(folder: Path, name: str, sha256: dict[str, Any]) -> None:
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing: copy the whole bundle again")
    if sha256_of(folder / name) != sha256.get(name):
        raise UserError(f"{folder / name} is damaged (its checksum differs from {CONFIG}): copy the bundle again")
