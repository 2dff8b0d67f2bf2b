"""Ray Train around the loop: workers, their restarts, one progress line."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

from hymate import cluster, ending, machine
from hymate.config import ModelConfig, TrainConfig
from hymate.device import CPU, Wanted, obstacle
from hymate.errors import UserError
from hymate.runs import SUPERSEDED, Run
from hymate.storage.paths import Location, UrlPath, naming_a_full_disk
from hymate.training import checkpoint, loop
from hymate.training.keeper import Kept, Sender, newest_whole
from hymate.training.loop import Job, NotTogether, Standing, Unrecoverable, Worker, anyone
from hymate.training.telemetry import STARTING, Telemetry, progress_line


@dataclass(frozen=True)
class Training:
    """What the workers are given.

    model: what their GPUs must be fit for. description: the configuration's text for TensorBoard.
    """

    job: Callable[[Worker], Job]
    train: TrainConfig
    model: ModelConfig
    device: Wanted
    run: Run
    kept: Kept
    description: str


def fit(training: Training) -> Standing:
    """Train to the end, on as many workers as it takes; where the training stands then.

    Raises a worker's UserError where one stopped training, and Stopped when a signal has asked the command to end and
    the training is saved where it stands; exits with status 1 and the failing worker's own error for others.
    """
    run = training.run
    hindrance = functools.partial(_hindrance, training)
    workers = (training.train.cpus_per_worker, training.train.num_workers, training.device)
    with cluster.ray_session(*workers), progress_line(run.folder, hindrance):
        from ray.train.v2.api.exceptions import TrainingFailedError

        try:
            with ending.instead(lambda: cluster.has_workers() and run.ask_to_stop()):
                ended = _trainer(training).fit().return_value
        except TrainingFailedError as error:
            _explain(error)
    if isinstance(ended, str):
        print(f"error: {ended}", file=sys.stderr)
        raise SystemExit(1) from Unrecoverable(ended)
    if not ended.finished(training.train):
        raise ending.Stopped(f"stopped and saved at step {ended.step}: the same command continues")
    return ended


def _trainer(training: Training) -> Any:
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    from hymate.training.meeting import Meeting

    alone = not os.environ.get("RAY_ADDRESS")
    # processes that serve Ray's datasets, and, where Ray ends with this command, what frees its machines afterwards
    unused = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if alone else ()))

    class ThisMachine(FixedScalingPolicy):
        """Asks for no further machines, for which Ray starts another process."""

        def _nothing(self, *_: Any) -> None: ...

        after_controller_start = _maybe_send_resource_request = _nothing

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's own would drop what has not been saved."""

        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            if alone:
                given["scaling_policy"] = ThisMachine(self.scaling_config)
            return super()._initialize_and_run_controller(**given)

    settings, on_gpu = training.train, training.device == "cuda"
    return Trainer(
        train_worker,
        train_loop_config={"training": training},
        torch_config=Meeting(),
        scaling_config=train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=train.RunConfig(
            name=training.kept.folder.name,
            **ray_storage(training.run.folder),
            failure_config=train.FailureConfig(max_failures=settings.max_failures),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _hindrance(training: Training) -> str | None:
    known = cluster.hindrance(training.train, training.device)
    return known if known is not None or cluster.has_workers() else STARTING


def ray_storage(path: Location) -> dict[str, Any]:
    """A place as Ray's RunConfig takes it."""
    if isinstance(path, UrlPath):
        return {"storage_path": path.key, "storage_filesystem": path.filesystem}
    return {"storage_path": str(path)}


def train_worker(given: dict[str, Training]) -> Standing | str:
    """What each worker runs; where the training stands in the end, or in a line what new workers could not help.

    An exception takes its traceback along, which Ray does not send to the driver.
    """
    training = given["training"]
    try:
        with machine.own_temporary_files(), naming_a_full_disk(training.run.folder):
            return _train_worker(training)
    except Unrecoverable as error:
        return str(error)
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def _train_worker(training: Training) -> Standing:
    """The loop, from the newest whole checkpoint on."""
    import ray
    from ray import train
    from ray.train.torch import get_device

    run, kept, on_gpu = training.run, training.kept, training.device == "cuda"
    context = train.get_context()
    ranks = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
    worker = Worker(*ranks, get_device() if on_gpu else CPU)
    if anyone(run.superseded(), worker):
        raise Unrecoverable(f"{run.folder}: {SUPERSEDED}")
    reason = obstacle(training.model) if on_gpu else None
    if anyone(reason is not None, worker):
        raise Unrecoverable(f"device=cuda: {reason or 'another worker cannot use its GPU'}")
    telemetry = Telemetry(run.folder, enabled=worker.rank == 0)
    job = training.job(worker)
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
            run.workers_started(step, worker.world_size, sum(node["Alive"] for node in ray.nodes()))

        def stop() -> bool:
            sender.look()
            return asked_to_stop()

        standing = loop.train(
            job,
            training.train,
            worker,
            report=sender.report,
            telemetry=telemetry,
            resume=resume,
            description=training.description,
            stop=stop,
        )
        sender.wait()
    return standing


def _explain(error: Any) -> NoReturn:
    """Print the error that stopped training, not those it caused on other workers, and exit with status 1."""
    from hymate.training.meeting import first_causes

    failures = getattr(error, "worker_failures", {})
    causes = first_causes(failures.values())
    cause = causes[0] if causes else getattr(error, "controller_failure", error)
    rank = next((rank for rank, failure in failures.items() if failure is cause), None)
    if isinstance(cause, UserError):
        raise cause
    if ending.asked():  # whoever ends a command may end its workers, too
        raise ending.Stopped from error
    if isinstance(cause, NotTogether):
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(1) from cause
    ending.print_error(cause, "training failed: " if rank is None else f"training failed on worker {rank}: ")
    raise SystemExit(1) from cause
