"""What a run shows: TensorBoard scalars and text, and one progress line on the driver's console.

The training process (rank 0) and the console are different processes, maybe on different machines: rank 0 writes
`progress.json` into the run folder, and the driver renders it. Of a run at a URL, events are gathered in a temporary
folder and sent at each flush, the progress in the background.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hymate.errors import UserError
from hymate.storage.paths import Location, UrlPath, upload_files, write_text

PROGRESS = "progress.json"
STARTING = "starting workers"
WRITE_EVERY_S = 0.5
WRITE_URL_EVERY_S = 5.0
PRINT_EVERY_S = 10.0
ANSWER_S = 8.0  # of the storage
ASK_AFTER_S = 4.0  # without anything new, and again
SILENT_S, USUAL = 8.0, 3.0  # what is not usual: so many seconds more than so many usual steps


class Telemetry:
    """TensorBoard under `<run>/tb` and the progress file; silent where `enabled` is false (other ranks)."""

    def __init__(self, run_path: Location, enabled: bool) -> None:
        self.run_path = run_path
        self.enabled = enabled
        self._writer: Any = None
        self._last_progress = 0.0
        self._stack = ExitStack()
        self._sender: ThreadPoolExecutor | None = None
        self._sent: Future[None] | None = None
        self._notes: list[str] = []

    def start(self, step: int) -> None:
        """Open the event file of a run that stands at `step`; later points of an earlier attempt are dropped."""
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            if isinstance(self.run_path, UrlPath):
                self._events = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hymate-")))
                self._sender = self._stack.enter_context(ThreadPoolExecutor(1))
            else:
                self._events = self.run_path / "tb"
            self._writer = SummaryWriter(str(self._events), purge_step=step + 1, flush_secs=10)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Points `group/name` at `step`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def text(self, name: str, text: str) -> None:
        """A text shown as a code block."""
        if self._writer is not None and text:
            self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()))

    def note(self, line: str) -> None:
        """A line that the driver is to show, once."""
        self._notes.append(line)

    def progress(self, force: bool = False, **values: Any) -> None:
        """Replace the progress file, not at every call unless `force`."""
        values["notes"] = self._notes
        now = time.monotonic()
        if self.enabled and (force or now - self._last_progress >= _interval_s(self.run_path)):
            self._last_progress = now
            if self._sender is None:
                write_json(self.run_path / PROGRESS, values)
            elif force or self._sent is None or self._sent.done():
                # a failure is none of the run's: what it needs of the storage fails by itself
                self._sent = self._sender.submit(write_json, self.run_path / PROGRESS, values)

    def flush(self) -> None:
        """Write what is buffered, so that a checkpoint never knows more steps than the event file."""
        if self._writer is not None:
            self._writer.flush()
            self._send()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            with self._stack:
                self._send()

    def _send(self) -> None:
        if isinstance(self.run_path, UrlPath):
            upload_files(self._events, self.run_path / "tb")


def write_json(path: Location, values: Mapping[str, Any]) -> None:
    """Write a JSON file in one move."""
    if isinstance(path, UrlPath):
        write_text(json.dumps(values, indent=1), path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1))
    os.replace(temporary, path)


def _interval_s(path: Location) -> float:
    return WRITE_URL_EVERY_S if isinstance(path, UrlPath) else WRITE_EVERY_S


@contextmanager
def progress_line(
    run_path: Location, hindrance: Callable[[], str | None] = lambda: None, console: Console | None = None
) -> Iterator[None]:
    """Show the run's progress file while the block runs: one live line, or on a plain stream a line now and then.

    hindrance: says what keeps the workers from going on, None where it doesn't know, nothing where it is said already;
    asked while the file stays as it is.
    """
    console = console or Console()
    (run_path / PROGRESS).unlink(missing_ok=True)
    stop = threading.Event()
    show = _live if console.is_terminal else _printed
    thread = threading.Thread(target=show, args=(_News(run_path, hindrance), console, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _News:
    """What the driver knows of its workers. state: the newest progress; trouble: why there is nothing newer."""

    def __init__(self, run_path: Location, hindrance: Callable[[], str | None]) -> None:
        self.path, self.interval_s = run_path / PROGRESS, _interval_s(run_path)
        self.state: dict[str, Any] = {}
        self.trouble: str | None = None
        self._hindrance = hindrance
        self._reader = ThreadPoolExecutor(1)
        self._reading: Future[dict[str, Any]] | None = None
        self._since = self._asked_at = time.monotonic()

    def read(self) -> None:
        self._reading = self._reading or self._reader.submit(read_progress, self.path)
        try:
            state = self._reading.result(ANSWER_S)
        except TimeoutError:
            self.trouble = f"no answer from {self.path.parent}: the workers may wait for it, too"
            return
        self._reading, now = None, time.monotonic()
        if state and state != self.state:
            self.state, self.trouble, self._since = state, None, now
        elif min(now - self._since, now - self._asked_at) >= ASK_AFTER_S:
            known = self._hindrance()
            self.trouble = self._silence(now - self._since) if known is None else known
            self._asked_at = time.monotonic()

    def _silence(self, seconds: float) -> str | None:
        """Where all hosts answer."""
        if not self.state or seconds < SILENT_S + USUAL * (self.state.get("step_s") or 0):
            return None
        busy = "evaluating and saving" if self.state.get("evaluating") else "a step"
        return f"{busy} takes long: every host answers, so the storage, a worker or the network between them is slow"


def _live(news: _News, console: Console, stop: threading.Event) -> None:
    columns = (SpinnerColumn(), BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(STARTING, total=None)
        printed: set[str] = set()
        while not stop.wait(news.interval_s):
            news.read()
            _print_notes(news.state, printed, console)
            if state := news.state:
                bar.update(task, completed=state["step"], total=state["max_steps"])
            if state or news.trouble:
                bar.update(task, description=news.trouble or describe(state))


def _printed(news: _News, console: Console, stop: threading.Event) -> None:
    console.print(STARTING)
    shown: dict[str, Any] = {}
    shown_trouble: str | None = STARTING
    shown_at = time.monotonic()
    printed: set[str] = set()
    while True:
        ending = stop.wait(news.interval_s)
        news.read()
        state, due = news.state, time.monotonic() - shown_at >= PRINT_EVERY_S
        _print_notes(state, printed, console)
        evaluated = state.get("score") != shown.get("score")
        if state and state != shown and (ending or evaluated or due):
            console.print(describe(state), highlight=False, soft_wrap=True)
            shown, shown_at = state, time.monotonic()
        if news.trouble != shown_trouble:
            if news.trouble:
                console.print(news.trouble, highlight=False, markup=False, soft_wrap=True)
            shown_trouble = news.trouble
        if ending:
            return


def _print_notes(state: Mapping[str, Any], printed: set[str], console: Console) -> None:
    """Print the notes that are new."""
    for note in state.get("notes", []):
        if note not in printed:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
            printed.add(note)


def describe(state: Mapping[str, Any]) -> str:
    """One line a person understands.

    >>> describe({"step": 20, "max_steps": 100, "loss": 1.25, "score": None, "events_per_second": 5321.0, "eta_s": 75})
    'step 20/100  loss 1.250  5,321 events/s  1:15 left'
    >>> describe({"step": 20, "max_steps": 100, "trouble": "worker 3 is 2.1x slower than the median"})
    'step 20/100  worker 3 is 2.1x slower than the median'
    """
    parts = [f"step {state['step']}/{state['max_steps']}"]
    if state.get("loss") is not None:
        parts.append(f"loss {state['loss']:.3f}")
    if state.get("score") is not None:
        parts.append(f"{state.get('score_name', 'score')} {state['score']:.3f}")
    if state.get("skipped"):
        parts.append(f"{state['skipped']} steps skipped")
    if state.get("events_per_second"):
        parts.append(f"{state['events_per_second']:,.0f} events/s")
    if state.get("eta_s") is not None:
        minutes, seconds = divmod(int(state["eta_s"]), 60)
        parts.append(
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
            if minutes >= 60
            else f"{minutes}:{seconds:02d} left"
        )
    if state.get("trouble") is not None:
        parts.append(state["trouble"])
    return "  ".join(parts)


def read_progress(path: Location) -> dict[str, Any]:
    """What a progress file says; nothing where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, UserError):
        return {}
