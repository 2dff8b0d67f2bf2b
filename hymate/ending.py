"""How a command ends early: saved when it is asked to end, and in one line when something is wrong.

The first Ctrl-C, SIGTERM or hang-up of the terminal raises `Stopped` wherever the command stands, or does what
`instead` says. The command then exits with 128 plus the signal's number, as shells report it. A second signal ends it
at once, and so does the first one where the command, waiting inside a library, does not react to it for LONGEST_S.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import socket

from hymate.errors import UserError, first_line

TRACEBACK = "HYMATE_TRACEBACK"  # an environment variable: set, it shows tracebacks on the console
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "a closed terminal"}
LONGEST_S = 30.0
ECHO_S = 1.0  # `timeout` and others send one signal twice


class Stopped(KeyboardInterrupt):
    """The command was asked to end; its text, if any, is the line that the user sees.

    Ray's C++ code passes a KeyboardInterrupt on. It turns SystemExit into SystemExit(1) and drops anything else.
    """


class _Watch:
    """The state of this process's signal handling."""

    sender: socket.socket | None = None  # while signals are watched
    asked: int | None = None  # the first signal
    running = False  # a command, which can be interrupted
    raised = False  # Stopped
    saving = False  # the command ends by itself
    repeated = False  # the next signal is one that we send ourselves
    instead: Callable[[], bool] | None = None
    at_the_latest: Callable[[], None] | None = None


# ------------------------------------------------------------------------------------------------------ signals


def watch() -> None:
    """Handle signals from here on. Commands call it before their imports, which take seconds.

    So this module imports little, and the rest of it late.
    """
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it, and a script's background
            signal.signal(number, _handle)
    import socket

    for descriptor in range(3):  # one that is closed would be the next file's, which then gets what libraries print
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    receiver, _Watch.sender = socket.socketpair()
    _Watch.sender.setblocking(False)
    signal.set_wakeup_fd(_Watch.sender.fileno(), warn_on_full_buffer=False)
    sys.unraisablehook = _raise_again
    threading.Thread(target=_follow, args=(receiver,), daemon=True).start()


def take_back() -> None:
    """Handle signals again after a library has taken them: Ray's C++ code, which leaves SIGTERM to kill at its end."""
    for number in NAMES:
        if _Watch.sender is not None and signal.getsignal(number) is _handle:  # as Python knows it
            signal.signal(number, _handle)


def asked() -> bool:
    """Whether a signal has asked this command to end."""
    return _Watch.asked is not None


@contextlib.contextmanager
def instead(save: Callable[[], bool]) -> Iterator[None]:
    """While the block runs, a signal calls `save` in a thread: whether the block will now end by itself.

    Where it will not, `Stopped` is raised.
    """
    _Watch.instead = save
    try:
        yield
    finally:
        _Watch.instead = None


@contextlib.contextmanager
def at_the_latest(act: Callable[[], None]) -> Iterator[None]:
    """While the block runs, `act` is called if the command has to end at once."""
    _Watch.at_the_latest = act
    try:
        yield
    finally:
        _Watch.at_the_latest = None


@contextlib.contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes that the block starts don't see Ctrl-C, which a terminal sends to all of a command's; it ends them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _handle(number: int, frame: FrameType | None) -> None:
    _Watch.asked = _Watch.asked or number
    if not _Watch.running:
        _leave(number)
    if _Watch.instead is not None:
        save, _Watch.instead = _Watch.instead, None
        _Watch.saving = True
        threading.Thread(target=_save, args=(save,), daemon=True).start()
    elif not (_Watch.saving or _Watch.raised):
        _Watch.raised = True
        raise Stopped


def _save(save: Callable[[], bool]) -> None:
    try:
        _Watch.saving = save()
    except (OSError, ValueError, UserError):
        _Watch.saving = False
    if not _Watch.saving:
        _interrupt()


def _interrupt() -> None:
    """Have `_handle` raise Stopped in the main thread."""
    main = threading.main_thread().ident
    if main is not None and _Watch.asked is not None:
        _Watch.raised, _Watch.repeated = False, True
        signal.pthread_kill(main, _Watch.asked)


def _raise_again(dropped: Any) -> None:
    """Python drops exceptions in destructors and in callbacks from C; this one must not be."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
    elif asked():
        threading.Timer(0.1, _interrupt).start()


def _follow(receiver: socket.socket) -> None:
    """Runs in a thread, which sees signals also where the main thread does not."""
    first, first_at = 0, 0.0
    with receiver:
        while True:
            receiver.settimeout(LONGEST_S if first and not _Watch.saving else None)
            try:
                numbers = receiver.recv(64)
            except TimeoutError:
                if not _Watch.saving:
                    _leave(first)
                continue
            if not numbers:
                return
            for number in numbers:
                if number not in NAMES:
                    continue
                if first and not _Watch.repeated and time.monotonic() - first_at > ECHO_S:
                    _leave(number)
                if not first:
                    first, first_at = number, time.monotonic()
                _Watch.repeated = False


def _leave(number: int) -> None:
    _Watch.asked = _Watch.asked or number
    _end_at_once(f"stopped by {_name()}", 128 + number)


def give_up(line: str) -> None:
    """End at once with an error, from a thread: where the main one would wait for ever."""
    _end_at_once(f"error: {line}", 1)


def _end_at_once(line: str, status: int) -> None:
    last = threading.Thread(target=_act_at_the_latest, daemon=True)
    last.start()
    last.join(2.0)  # at a URL it may take longer
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(status)


def _act_at_the_latest() -> None:
    if _Watch.at_the_latest is not None:
        with contextlib.suppress(Exception):  # nobody could do anything about it
            _Watch.at_the_latest()


def _name() -> str:
    return NAMES[signal.Signals(_Watch.asked or signal.SIGINT)]


# ------------------------------------------------------------------------------------------------------ endings


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Around the imports of a command: an error ends it as in `command`, a signal at once."""
    try:
        yield
    except Exception as error:
        sys.exit(_status(error))


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Around the whole of a command: whatever ends it is one line on stderr and an exit status.

    2 for a UserError, 128 plus the number of a signal, 1 for anything else, whose traceback is kept in a file.
    """
    before = {number: signal.getsignal(number) for number in NAMES} if _Watch.sender is None else {}
    if before:
        watch()
    _Watch.running, status = True, 0
    with _consoles():
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            status = _status(error)
        except SystemExit:
            if not asked():
                raise
            status = _status(Stopped())
        finally:
            _Watch.running = False
            if before:
                _unwatch(before)
    if status > 128:
        if pools := sys.modules.get("multiprocessing.util"):
            pools._run_finalizers(0)  # semaphores that are left to multiprocessing's tracker make it complain
        os._exit(status)  # at the interpreter's end libraries wait for threads and processes of theirs
    if status:
        sys.exit(status)


def _unwatch(before: dict[signal.Signals, Any]) -> None:
    """For tests, which run commands in their own process."""
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    assert _Watch.sender is not None
    _Watch.sender.close()
    _Watch.sender = None
    sys.unraisablehook = sys.__unraisablehook__


def _status(error: BaseException) -> int:
    """The exit status, after saying why."""
    if asked() or isinstance(error, KeyboardInterrupt):
        own = str(error) if isinstance(error, Stopped) else ""
        if _Watch.saving and isinstance(error, UserError):
            own = f"error: {error}"  # it could not be saved
        print(own or f"stopped by {_name()}: the same command continues it", file=sys.stderr)
        return 128 + (_Watch.asked or signal.SIGINT)
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_error(error)
    return 1


def print_error(error: BaseException, where: str = "") -> None:
    """Print one line for an error that is not a UserError, and keep its traceback in a file."""
    import traceback

    text = "".join(traceback.format_exception(error))
    if os.environ.get(TRACEBACK):
        print(text, file=sys.stderr)
        kept = ""
    else:
        kept = f" (traceback: {_kept(text)})"
    print(f"error: {where}{describe(error)}{kept}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """An error in one line, as a person would say it.

    >>> describe(PermissionError(13, "Permission denied", "/data/x"))
    '/data/x: Permission denied'
    >>> describe(KeyError("x"))
    "KeyError: 'x'"
    """
    error = getattr(error, "cause", None) or error  # Ray wraps what happens in its tasks
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    kind, text = type(error).__name__, first_line(error)
    return kind if text == kind else f"{kind}: {text}"


def _kept(text: str) -> str:
    import tempfile

    try:
        with tempfile.NamedTemporaryFile("w", prefix="hymate-error-", suffix=".txt", delete=False) as file:
            file.write(text)
            return file.name
    except OSError:
        return f"shown with {TRACEBACK}=1"


# ------------------------------------------------------------------------------------------------------ console


class Unread:
    """A text stream that goes on when its reader has gone (`| head -1`, a closed terminal) or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nobody:
                os.dup2(nobody.fileno(), self._stream.fileno())
                self._stream.flush()  # what it still holds


@contextlib.contextmanager
def _consoles() -> Iterator[None]:
    """Nothing that happens to stdout and stderr, closed ones included, changes what the command does."""
    with contextlib.ExitStack() as stack:
        for name, redirected in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
            stream = getattr(sys, name) or stack.enter_context(open(os.devnull, "w"))
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # names that its encoding does not have
            stack.enter_context(redirected(Unread(stream)))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
