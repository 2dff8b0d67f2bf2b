"""Ray Train around the loop: workers, their restarts, one progress line."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from contextlib import nullcontext
from typing import Any, NoReturn, TypeVar

import yaml

from hymate import cluster, ending
from hymate.device import CPU, decide, obstacle
from hymate.errors import UserError
from hymate.runs import SUPERSEDED, Run, absolute, check_same_run, claimed, run_folder
from hymate.storage.paths import Location, UrlPath, naming_a_full_disk, require_folder
from hymate.training import checkpoint, loop, pretraining
from hymate.training.keeper import Kept, Sender, newest_whole
from hymate.training.loop import Unrecoverable, Worker, anyone
from hymate.training.pretraining import MODE, SCORE, PretrainConfig
from hymate.training.telemetry import Telemetry, progress_line
from hymate.trees import build, to_tree

CHECKPOINTS = "checkpoints"
T = TypeVar("T")


def pretrain(config: PretrainConfig) -> Location:
    """Run, continue or repeat a pretraining run; returns the path of its bundle.

    Raises UserError before any worker starts where the configuration, data or machine cannot do it, and later where the
    disk or the storage fails; exits with status 1 and the failing worker's own error where training does. Raises
    Stopped when a signal has asked the command to end and the run is saved where it stands.
    """
    config = absolute(config)
    histories = pretraining.check(config)
    cluster_gpus = cluster.check(config.train)
    folder, kept = run_folder(config.run), _kept(config)
    inputs = {"data.path": histories.fingerprint}
    found = _finished(check_same_run(folder, config, inputs, pretraining.CHANGEABLE), config)
    if found is None:
        kept.require_any_left()
        config = decide(config, config.model, workers=config.train.num_workers, cluster_gpus=cluster_gpus)
        require_folder(folder, "run.dir")
        with claimed(folder, "pretrain", config, inputs) as run:
            with cluster.ray_session(config.train, config.device), progress_line(folder):
                ended = _fit(config, run)
            bundle, metrics = pretraining.export_bundle(config, kept.best_first(), histories)
            found = run.found
            found |= {SCORE: metrics[SCORE], "step": metrics["step"], "bundle": str(bundle)}
            found |= {"skipped_steps": ended["skipped"]}
    print(f"best {SCORE} {found[SCORE]:.4f} at step {int(found['step'])}")
    print(f"bundle: {folder / 'bundle'}")
    print(f"curves: tensorboard --logdir {folder.parent}")
    return folder / "bundle"


def _kept(config: PretrainConfig) -> Kept:
    return Kept(run_folder(config.run) / CHECKPOINTS, config.train.keep, MODE)


def _fit(config: PretrainConfig, run: Run) -> dict[str, Any]:
    """Train; where the run stands in the end."""
    from ray.train.v2.api.exceptions import TrainingFailedError

    try:
        with ending.instead(lambda: cluster.has_workers() and run.ask_to_stop()):
            result = _trainer(config, run).fit()
    except TrainingFailedError as error:
        _explain(error)
    ended = result.return_value
    if "unrecoverable" in ended:
        print(f"error: {ended['unrecoverable']}", file=sys.stderr)
        raise SystemExit(1) from Unrecoverable(ended["unrecoverable"])
    if not ended["finished"]:
        raise ending.Stopped(f"stopped and saved at step {ended['step']}: the same command continues")
    return ended


def _trainer(config: PretrainConfig, run: Run) -> Any:
    from ray import train
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's own would drop what has not been saved."""

    return Trainer(
        train_worker,
        train_loop_config={"config": to_tree(config), "run": run},
        scaling_config=train.ScalingConfig(
            num_workers=config.train.num_workers,
            use_gpu=config.device == "cuda",
            resources_per_worker={"CPU": config.train.cpus_per_worker}
            | ({"GPU": 1} if config.device == "cuda" else {}),
        ),
        run_config=train.RunConfig(
            name=CHECKPOINTS,
            **ray_storage(run.folder),
            failure_config=train.FailureConfig(max_failures=config.train.max_failures),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )


def ray_storage(path: Location) -> dict[str, Any]:
    """A place as Ray's RunConfig takes it."""
    if isinstance(path, UrlPath):
        return {"storage_path": path.key, "storage_filesystem": path.filesystem}
    return {"storage_path": str(path)}


def train_worker(given: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs; says where the run stands in the end, or what new workers could not help.

    An exception takes its traceback along, which Ray does not send to the driver.
    """
    config = build(PretrainConfig, given["config"])
    try:
        with naming_a_full_disk(given["run"].folder):
            return _train_worker(config, given["run"])
    except Unrecoverable as error:
        return {"unrecoverable": str(error)}
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def _train_worker(config: PretrainConfig, run: Run) -> dict[str, Any]:
    """The loop, from the newest whole checkpoint on."""
    from ray import train
    from ray.train.torch import get_device

    _quiet()
    context = train.get_context()
    device = get_device() if config.device == "cuda" else CPU
    worker = Worker(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device)
    if anyone(run.superseded(), worker):
        raise Unrecoverable(f"{run.folder}: {SUPERSEDED}")
    reason = obstacle(config.model) if config.device == "cuda" else None
    if anyone(reason is not None, worker):
        raise Unrecoverable(f"device=cuda: {reason or 'another worker cannot use its GPU'}")
    telemetry = Telemetry(run.folder, enabled=worker.rank == 0)
    job = pretraining.pretraining_job(config, worker)

    kept = _kept(config)
    sender = Sender(kept, worker, run.check)
    watched = run.watched() if worker.rank == 0 else nullcontext(lambda: False)
    with newest_whole(kept, worker, telemetry) as (resume, damages), watched as asked_to_stop:
        if resume is None and damages:
            raise Unrecoverable(
                f"no checkpoint in {kept.folder} is whole ({damages[0]}): put a copy back, or delete the run to begin "
                "again"
            )
        if worker.rank == 0:
            step = 0 if resume is None else checkpoint.read_state(resume)["step"]
            run.workers_started(step, worker.world_size, _num_nodes())

        def stop() -> bool:
            sender.look()
            return asked_to_stop()

        standing = loop.train(
            job,
            config.train,
            worker,
            report=sender.report,
            telemetry=telemetry,
            resume=resume,
            description=yaml.safe_dump(to_tree(config), sort_keys=False),
            stop=stop,
        )
        sender.wait()
    return {"step": standing.step, "skipped": standing.skipped, "finished": standing.finished(config.train)}


def _num_nodes() -> int:
    """Machines of the cluster."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _quiet() -> None:
    """Silence what Ray Train says at every report; errors reach the driver as exceptions."""
    import ray.train.v2._internal.execution.context as context

    context.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _explain(error: Any) -> NoReturn:
    """Print the error that stopped training, not those it caused on other workers, and exit with status 1."""
    failures = getattr(error, "worker_failures", {})
    followed = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "Broken pipe")
    causes = {rank: cause for rank, cause in failures.items() if not any(text in str(cause) for text in followed)}
    other = getattr(error, "controller_failure", error)
    rank, cause = next(iter((causes or failures).items()), (None, other))
    if isinstance(cause, UserError):
        raise cause
    if ending.asked():  # whoever ends a command may end its workers, too
        raise ending.Stopped from error
    ending.print_error(cause, "training failed: " if rank is None else f"training failed on worker {rank}: ")
    raise SystemExit(1) from cause


def _finished(record: dict[str, Any] | None, config: PretrainConfig) -> dict[str, Any] | None:
    """What a run found, if it has ended already with this very configuration and its bundle is there."""
    if record is None or record["outcome"].get("state") != "finished":
        return None
    if {**record["config"], "device": config.device} != to_tree(config):
        return None
    return record["outcome"] if (run_folder(config.run) / "bundle").is_dir() else None
