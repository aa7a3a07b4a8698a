"""A program compiled for TPUs that are not here, in a process of its own: its text and its place in memory.

XLA plans a program (partitions and fuses it, schedules it, places every array) and then writes machine code for each
instruction of the plan. The plan holds all that can be known without a TPU, and is a fifth of the time or less: of
SkySense at full size 2 minutes, where the code takes longer than 15 and 13 GB. So XLA is asked to write the plan down,
and unless the code is wanted too, the process is ended there. It gives its memory back in either case.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import jax

from skyjax.errors import UserError

POLL_SECONDS = 0.5
SETTLED_SECONDS = 3.0  # files of a plan that did not grow for so long are whole
MOST_MEMORY = 0.8  # of the computer's, that the compiler may take
# Planned to the end where memory runs out, so that one can see of what.
OPTIONS = {"xla_tpu_no_crash_on_oom": "true"}
# As XLA names what it writes down; a module for the CPU has "cpu_" before "after".
_TEXT, _BUFFERS, _LAST = (
    ".after_optimizations.txt",
    ".after_optimizations-buffer-assignment.txt",
    ".after_optimizations-memory-usage-report.txt",
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A planned program of one device.

    Attributes:
      text: optimised, scheduled HLO.
      argument_bytes: of HBM, of what is given to it.
      temporary_bytes: of HBM, of all else that it reserves there: activations, results that are not arguments again.
      code_bytes: of its machine code, which lies in HBM too; None where it was not asked for.
      live_bytes: XLA's own `peak_memory_in_bytes`: the arrays that live at the busiest moment, without the gaps that
        are reserved between them, and with those in VMEM; None likewise.
      process_bytes: memory of the process at its highest.
    """

    text: str
    argument_bytes: int
    temporary_bytes: int
    code_bytes: int | None
    live_bytes: int | None
    process_bytes: int


class CompilerError(Exception):
    """XLA did not compile the program; the message is XLA's."""


def compile_ahead(
    lower: Callable[..., Any], arguments: tuple[Any, ...], *, code: bool = False, say: Callable[[str], None]
) -> Compiled:
    """Compiles what `lower(*arguments)` gives (a `jax.stages.Lowered`), in a new process.

    Args:
      lower: a function of a module, so that the other process can find it.
      arguments: of it; pickled.
      code: go on to the machine code.
      say: is told what goes on, once it has gone on.

    Raises:
      UserError: `lower` raised it.
      CompilerError: XLA gave up.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="skyjax_compile_") as name:
        folder = pathlib.Path(name)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_compile, args=(theirs, lower, arguments, code), daemon=True)
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text {os.environ.get('XLA_FLAGS', '')}"
        with _environment({"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}):
            process.start()
        theirs.close()
        try:
            done, planned, highest = None, False, 0
            while done is None:
                highest = max(highest, _highest(process.pid))
                if highest > MOST_MEMORY * _memory():
                    raise CompilerError(
                        f"the compiler took {highest / 2**30:.0f} GiB, {MOST_MEMORY:.0%} of this computer's memory, and"
                        " was stopped; use a computer with more, or another mesh (docs/findings.md has a case)"
                    )
                if ours.poll(POLL_SECONDS):
                    word, value = _receive(ours)
                    if word == "lowered":
                        say(f"traced after {time.monotonic() - start:.0f} s; XLA plans the program")
                        continue
                    if word == "refused":
                        raise UserError(value)
                    if word == "failed":
                        raise CompilerError(value)
                    done = value
                elif not planned and _is_planned(folder):
                    planned = True
                    say(f"planned after {time.monotonic() - start:.0f} s" + ("; XLA writes the code" if code else ""))
                    if not code:
                        done = {"code_bytes": None, "live_bytes": None}
            return _read(folder, process_bytes=max(highest, _highest(process.pid)), **done)
        finally:
            process.kill()
            process.join()


def _compile(connection: Connection, lower: Callable[..., Any], arguments: tuple[Any, ...], code: bool) -> None:
    """What the other process does."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    try:
        lowered = lower(*arguments)
        connection.send(("lowered", None))
        analysis = lowered.compile(compiler_options=OPTIONS).memory_analysis()
    except UserError as error:
        connection.send(("refused", str(error)))
    except jax.errors.JaxRuntimeError as error:
        connection.send(("failed", str(error)))
    else:
        measured = {
            "code_bytes": analysis.generated_code_size_in_bytes,
            "live_bytes": analysis.peak_memory_in_bytes,
        }
        connection.send(("done", measured if code else dict.fromkeys(measured)))


def _leave_with(parent: int) -> None:
    """Ends this process once its parent is gone, however that went: a compiler must not go on for nobody."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        word, value = connection.recv()
    except EOFError:
        return "failed", "the compiler's process was ended from outside; where memory ran out, give it more"
    return word, value


def _is_planned(folder: pathlib.Path) -> bool:
    """Whether the plan is written down, whole."""
    if not list(folder.glob(f"*{_LAST}")):
        return False

    def sizes() -> list[int]:
        return [file.stat().st_size for file in sorted(folder.glob("*.after_optimizations*"))]

    before = sizes()
    time.sleep(SETTLED_SECONDS)
    # A busy computer may take longer over the rest of a file: a program's text ends with the bracket of its entry.
    texts = [file.read_bytes().rstrip().endswith(b"}") for file in folder.glob(f"*{_TEXT}")]
    return sizes() == before and texts == [True]


def _read(folder: pathlib.Path, **measured: Any) -> Compiled:
    (buffers,) = folder.glob(f"*{_BUFFERS}")
    argument_bytes, temporary_bytes = read_allocations(buffers.read_text())
    (text,) = folder.glob(f"*{_TEXT}")
    return Compiled(text.read_text(), argument_bytes, temporary_bytes, **measured)


def read_allocations(text: str) -> tuple[int, int]:
    """Bytes of HBM that a buffer assignment, as XLA writes it down, gives to arguments and to the rest."""
    arguments = rest = 0
    for size, color, kind in re.findall(r"^allocation \d+: size (\d+),( color \d+,)? ?([^\n]*)", text, re.MULTILINE):
        if color.strip(" ,") not in ("", "color 0") or kind.startswith("thread-local"):
            continue  # another memory of the chip, or a number inside a fusion
        if kind.startswith("parameter"):
            arguments += int(size)
        else:
            rest += int(size)
    return arguments, rest


def _highest(process: int | None) -> int:
    """Bytes of memory that a process held at most so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path(f"/proc/{process}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def _memory() -> int:
    """Bytes of memory that this computer has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for a process that is started meanwhile."""
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
