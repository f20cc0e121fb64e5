"""A run that one can read: one progress line on the terminal, and all that libraries say in a log file."""

import contextlib
import io
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm import tqdm

from crepe_llm.user_cache import user_cache

_KEPT = 20  # log files; older ones are removed


@contextmanager
def quiet(command: str, verbose: bool, own: tuple[str, str] | None = None) -> Iterator["Progress"]:
    """Send what is printed, logged and warned of inside to a log file; this package's warnings are shown, too, once.

    The log file is named in the notes of an error that the block raises once it has told its plan. With `verbose`, all
    is shown as it comes and there is no log file. Of several processes the first alone is shown.

    Args:
        command: whose run it is.
        verbose: whether all is shown.
        own: for work without llm-compressor, what begins the one line that it prints of its plan, and its one bar.
    """
    if verbose:
        yield Progress(None, None)
        return
    path = _new_log(command)
    terminal = sys.stderr
    with path.open("w", encoding="utf-8") as file, ExitStack() as stack:
        log = _Log(file)
        stack.callback(log.end)
        progress = Progress(terminal, path)
        log.show(own, progress)
        stack.callback(progress.close)
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        _show_own_warnings(stack, progress.say, log, toolkit=own is None)
        try:
            yield progress
        except BaseException as error:
            if not progress.told:
                path.unlink()
                raise
            error.add_note(f"the log of this run is {path}")
            raise


class _Bar(tqdm):
    """A bar that those of libraries, which go to the log, take no line from."""

    _instances: ClassVar[Any] = WeakSet()


class Progress:
    """The progress line of a run, with the time that is left; silent without a terminal to write to.

    Attributes:
        log: the log file, or None.
        told: whether the plan has begun; a run that is refused before needs no log.
        unsaid: how messages begin that the run says in another way; they go to the log alone.
    """

    def __init__(self, terminal: Any, log: Path | None) -> None:
        self.log = log
        self.told = False
        self.unsaid: tuple[str, ...] = ()
        self._terminal = terminal
        self._out = sys.stdout
        self._said: set[str] = set()
        self._bar: Any = None
        self._line, self._line_at = "", -math.inf  # the last state of another bar, and when one was last shown
        if os.environ.get("RANK", "0") != "0":  # as torchrun and accelerate number processes
            self._terminal, self._out = None, io.StringIO()

    def start(self, steps: int, what: str) -> None:
        """Show the line, for so many steps."""
        if self._terminal is None:
            return
        interval = 0.1 if self._terminal.isatty() else 60.0  # a line a minute, where lines stay
        form = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} steps, {elapsed} so far, {remaining} left"
        self._bar = _Bar(total=steps, desc=what, file=self._terminal, bar_format=form, mininterval=interval)

    def advance(self, to: int | None = None) -> None:
        """Go one step on, or to a step."""
        if self._bar is not None:
            wanted = self._bar.n + 1 if to is None else to
            self._bar.update(min(wanted, self._bar.total) - self._bar.n)

    def phase(self, what: str) -> None:
        """Say what the run is at."""
        if self._bar is not None:
            self._bar.set_description_str(what, refresh=self._terminal.isatty())

    def line(self, text: str) -> None:
        """Show a state of another bar as the progress line; where lines stay, one a minute and the last."""
        if self._terminal is None:
            return
        self._line = text
        if self._terminal.isatty():
            self._terminal.write(f"\r{text}")
            self._terminal.flush()
        elif time.monotonic() - self._line_at > 60:
            self._terminal.write(f"{text}\n")
            self._line, self._line_at = "", time.monotonic()

    def tell(self, what: str, value: str) -> None:
        """Print a row of the plan or of the result, even while standard output goes to the log."""
        self.told = True
        self._end_line()
        print(f"{what + ':':<12} {value}", file=self._out, flush=True)

    def say(self, message: str) -> None:
        """Show a line above the progress line, the same only once."""
        if self._terminal is not None and message not in self._said and not message.startswith(self.unsaid):
            self._said.add(message)
            _Bar.write(message, file=self._terminal)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._end_line()

    def _end_line(self) -> None:
        if self._line:
            self._terminal.write("\n" if self._terminal.isatty() else f"{self._line}\n")
        self._line = ""


def log_folder() -> Path:
    """Where log files lie: in the user's cache folder, or the system's temporary one where that cannot be written."""
    folder = user_cache() / "logs"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _new_log(command: str) -> Path:
    folder = log_folder()
    older = sorted(folder.glob("crepe-*.log"), key=lambda path: path.name.partition("-2")[2])
    for path in older[: max(0, len(older) - _KEPT + 1)]:
        with contextlib.suppress(OSError):
            path.unlink()
    return folder / f"crepe-{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


class _Log(io.TextIOBase):
    """The stream that stands for standard output and error; of progress bars it keeps the last state.

    Libraries may keep it: when the run has ended, it is standard error again.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._own: tuple[str, str] | None = None
        self._progress: Progress | None = None

    def show(self, own: tuple[str, str] | None, progress: Progress) -> None:
        """Show the plan's line and the bar that begin so."""
        self._own, self._progress = own, progress

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._file is None:
            return sys.stderr.write(text) if sys.stderr is not self else 0
        if self._own is not None and self._progress is not None:
            plan, bar = self._own
            if text.startswith(f"{plan}: "):
                self._progress.tell(plan, text.removeprefix(f"{plan}: "))
            elif text.startswith(f"\r{bar}"):
                self._progress.line(text.strip())
        if text.startswith("\r"):
            text = f"{text.strip()}\n" * ("100%|" in text)
        self._file.write(text)
        return len(text)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def end(self) -> None:
        """Write no more to the file."""
        self._file = None


def _show_own_warnings(stack: ExitStack, say: Any, log: _Log, toolkit: bool) -> None:
    """Show what this package warns of, by logging, warnings or llm-compressor's log; the rest goes to the log alone."""
    if toolkit:
        from compressed_tensors.utils import patch_attr
        from llmcompressor.entrypoints import utils
        from llmcompressor.logger import configure_logger
        from loguru import logger

        configure_logger()  # its console is now the log
        # In several processes `oneshot` would configure it again, and so remove what is added here.
        stack.enter_context(patch_attr(utils, "configure_distributed_logger", lambda: None))
        sink = logger.add(
            lambda message: say(f"warning: {message.record['message']}"),
            level="WARNING",
            filter=lambda record: (record["name"] or "").startswith("crepe_llm"),
        )
        stack.callback(logger.remove, sink)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"warning: {record.getMessage()}")
            log.write(f"{record.levelname} {record.getMessage()}\n")

    handler, ours = Handler(logging.WARNING), logging.getLogger("crepe_llm")
    ours.addHandler(handler)
    stack.callback(ours.removeHandler, handler)

    stack.enter_context(warnings.catch_warnings())

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        log.write(warnings.formatwarning(message, category, filename, lineno, line))
        if str(message).startswith(("crepe-llm", "crepe_llm")):
            say(f"warning: {message}")

    warnings.showwarning = show
