"""How commands end: by signals, by errors, and with nobody who reads what they print."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import PATIENCE_S, ROOT, run

from hymate.ending import describe

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SAYS = "print('here', flush=True); time.sleep(60)"


@contextmanager
def command(body: str, *, setup: str = "", stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """A process whose command is `body`."""
    script = f"import os, sys, time\nfrom hymate import ending\nending.watch()\n{setup}\nwith ending.command():\n"
    script += textwrap.indent(textwrap.dedent(body), "    ")
    line = [sys.executable, "-c", script]
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=stdout, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def stopped(body: str, *numbers: int, setup: str = "") -> tuple[int, str]:
    """The exit status and stderr of a command that gets a signal each time it prints a line."""
    with command(body, setup=setup) as process:
        assert process.stdout is not None
        for number in numbers:
            process.stdout.readline()
            process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "a closed terminal")]
)
def test_a_signal_ends_a_command_in_a_line_with_the_status_that_shells_report(number: int, name: str) -> None:
    status, said = stopped(SAYS, number)
    assert status == 128 + number
    assert said.startswith(f"stopped by {name}") and len(said.splitlines()) == 1


def test_a_signal_during_the_imports_is_no_traceback() -> None:
    status, said = stopped("pass", signal.SIGINT, setup=SAYS)
    assert (status, said) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize("module", ["random", "socket", "traceback", "numpy"])
def test_a_signal_in_the_first_tenth_of_a_second_is_no_traceback(module: str) -> None:
    """It comes while a command's first lines import the module, which they do under the handlers or not at all."""
    sends = "os.kill(os.getpid(), signal.SIGINT) if name == 'MODULE' else None"
    script = f"""
    import os, signal, sys
    for name in [name for name in sys.modules if name.partition(".")[0] == {module!r}]:
        del sys.modules[name]
    class Sender:
        def find_spec(name, *_):
            {sends.replace("MODULE", module)}
    sys.meta_path.insert(0, Sender)
    from hymate import ending
    ending.watch()
    import tempfile, traceback, numpy
    """
    line = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    "swallowed",
    [
        # Ray's C++ code, which makes SystemExit(1) of it; a destructor; a library that goes on
        "try:\n    {}\nexcept KeyboardInterrupt:\n    sys.exit(1)",
        "class Late:\n    def __del__(self):\n        {}\nLate(); time.sleep(60)",
        "ending.LONGEST_S = 0.1\nwhile True:\n    try:\n        {}\n    except BaseException: pass",
        # a call into C that does not return: the second lock of a mutex
        "import ctypes\nending.LONGEST_S, mutex = 0.1, ctypes.create_string_buffer(64)\nprint('here', flush=True)\n"
        "for _ in range(2):\n    ctypes.CDLL(None).pthread_mutex_lock(mutex)",
    ],
)
def test_a_signal_is_not_lost_where_libraries_swallow_it(swallowed: str) -> None:
    status, said = stopped(swallowed.format(SAYS), signal.SIGTERM)
    assert status == 143 and len(said.splitlines()) == 1, said


def test_what_is_to_be_done_at_the_latest_is_done_where_a_command_does_not_react(tmp_path: Path) -> None:
    body = f"""
    ending.LONGEST_S = 0.1
    with ending.at_the_latest(lambda: open({str(tmp_path / "done")!r}, "w").close()):
        while True:
            try:
                {SAYS}
            except BaseException:
                pass
    """
    assert stopped(body, signal.SIGTERM)[0] == 143
    assert (tmp_path / "done").exists()


def test_a_command_that_saves_first_ends_by_itself_and_a_second_signal_ends_it_at_once() -> None:
    body = """
    import threading
    asked = threading.Event()
    with ending.instead(lambda: asked.set() or True):
        print("here", flush=True)
        asked.wait()
        {}
    raise ending.Stopped("saved at step 3")
    """
    assert stopped(body.format(""), signal.SIGTERM) == (143, "saved at step 3\n")
    assert stopped(body.format(""), signal.SIGINT) == (130, "saved at step 3\n")
    slow = "time.sleep(1.1); print('saving', flush=True); time.sleep(60)"
    assert stopped(body.format(slow), signal.SIGINT, signal.SIGINT) == (130, "stopped by Ctrl-C\n")


def test_what_keeps_a_command_from_saving_is_what_its_user_sees() -> None:
    body = """
    import threading
    from hymate.errors import UserError
    asked = threading.Event()
    with ending.instead(lambda: asked.set() or True):
        print("here", flush=True)
        asked.wait()
        raise UserError("no space left")
    """
    assert stopped(body, signal.SIGTERM) == (143, "error: no space left\n")


@pytest.mark.parametrize("save", ["lambda: False", "lambda: open('/nowhere/at/all')"])
def test_a_command_that_has_nothing_to_save_ends_by_the_signal(save: str) -> None:
    status, said = stopped(f"with ending.instead({save}):\n    {SAYS}", signal.SIGTERM)
    assert status == 143 and said.startswith("stopped by SIGTERM")


def test_semaphores_of_a_pool_that_is_still_there_add_nothing_to_the_line() -> None:
    pool = "import multiprocessing\nkept = multiprocessing.get_context('spawn').Lock()"
    status, said = stopped(SAYS, signal.SIGINT, setup=pool)
    assert (status, said) == (130, "stopped by Ctrl-C: the same command continues it\n")


def test_signals_that_the_parent_ignores_stay_ignored() -> None:
    line = [sys.executable, "-c", "from hymate import ending; ending.watch(); import signal, os\n"]
    line[-1] += "os.kill(os.getpid(), signal.SIGHUP); print('lives')"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup
    try:
        done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.stdout == "lives\n"


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("from hymate.errors import UserError; raise UserError('do this')", 2, "error: do this"),
        ("open('/nowhere/at/all')", 1, "error: /nowhere/at/all: No such file or directory (traceback: "),
        ("raise MemoryError", 1, "error: not enough memory (traceback: "),
        ("raise KeyError('x')", 1, "error: KeyError: 'x' (traceback: "),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_an_error_is_one_line_and_its_traceback_is_kept(body: str, status: int, line: str, tmp_path: Path) -> None:
    with command(f"os.environ['TMPDIR'] = {str(tmp_path)!r}\n{body}") as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert said.startswith(line) and len(said.splitlines()) == bool(line)
    kept = [path.read_text() for path in tmp_path.iterdir()]
    assert len(kept) == line.endswith("(traceback: ") and all("Traceback" in text for text in kept)


@pytest.mark.parametrize(
    ("before", "status", "line"),
    [
        ("echo 'raise ImportError(\"no\\nmemory\")' >numpy.py", 1, "error: ImportError: no .traceback: "),
        ("export OMP_NUM_THREADS=abc", 2, "error: OMP_NUM_THREADS=abc is not a number: unset it, "),
        ("mkdir gone; cd gone; rmdir ../gone", 2, "error: the current folder has been deleted: change to another one"),
    ],
)
def test_an_error_of_the_imports_is_one_line(before: str, status: int, line: str, tmp_path: Path) -> None:
    script = f"{before}; exec {shlex.quote(sys.executable)} -m hymate.baselines data.path=DIR task=mortality out=OUT"
    done = run(["bash", "-c", script], {**ENVIRONMENT, "TMPDIR": str(tmp_path)}, tmp_path)
    assert done.returncode == status and re.match(line, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_a_traceback_is_shown_to_who_asks() -> None:
    with command("os.environ[ending.TRACEBACK] = '1'\nraise KeyError('x')") as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "Traceback" in said and said.endswith("error: KeyError: 'x'\n")


def test_the_error_of_a_remote_task_is_what_happened_there() -> None:
    wrapper = RuntimeError("ray::task() (pid=1)\nTraceback ...")
    wrapper.cause = ValueError("of the task")  # type: ignore[attr-defined]
    assert describe(wrapper) == "ValueError: of the task"
    assert describe(OSError("neither number nor name")) == "OSError: neither number nor name"
    assert describe(RuntimeError()) == "RuntimeError"


# ------------------------------------------------------------------------------------------------------ console


def test_names_that_the_console_cannot_show_do_no_harm() -> None:
    with command("print('na\\u00efve \\udcff')", setup="sys.stdout.reconfigure(encoding='ascii')") as process:
        assert process.communicate(timeout=PATIENCE_S) == ("na\\xefve \\udcff\n", "")
    assert process.returncode == 0


def test_no_file_takes_the_place_of_a_closed_console(tmp_path: Path) -> None:
    script = "from hymate import ending; ending.watch(); import os\nfile = open('data', 'w')\nos.write(2, b'a warning')"
    line = f"{sys.executable} -c {shlex.quote(script)} <&- >&- 2>&-"
    subprocess.run(line, shell=True, env=ENVIRONMENT, cwd=tmp_path, check=True)
    assert (tmp_path / "data").read_text() == ""


@pytest.mark.parametrize("reader", ["gone", "full", "closed"])
def test_nobody_who_reads_changes_nothing(reader: str, tmp_path: Path) -> None:
    body = f"""
    import rich.console
    for line in range(3):
        print(line, flush=True)
        print(line, file=sys.stderr)
        rich.console.Console().print(line)
        os.write(1, b"from C")
    open({str(tmp_path / "done")!r}, "w").close()
    """
    if reader == "closed":
        body, setup = textwrap.dedent(body).replace('os.write(1, b"from C")', "pass"), "sys.stdout = None"
        with command(body, setup=setup) as process:
            said = process.communicate(timeout=PATIENCE_S)[1]
    else:
        if reader == "gone":
            read, output = os.pipe()
            os.close(read)
        else:
            output = os.open("/dev/full", os.O_WRONLY)
        with command(body, stdout=output) as process:
            os.close(output)
            said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0 and (tmp_path / "done").exists() and said == "0\n1\n2\n", said
