"""SIGTERM as a request: finish the step, save, exit with 75.

The handler's work is done by a thread that the C-level handler wakes through a pipe, because Python runs handlers only
between two bytecodes of the main thread, and a compilation or a device wait can hold that one for minutes.
"""

import os
import signal
import socket
import sys
import threading
from typing import Self

EXIT_PREEMPTED = 75


class Preemption:
    """Watches for SIGTERM while entered.

    Before `something_to_save` was called, a request ends the process at once with 75: nothing is lost. After it,
    `requested` becomes true and the loop is to save and return 75; among several processes they first agree on the step
    (hosts.py). A second request ends the process at once with 143.
    Where one is entered inside of another, the inner one watches until it is left.
    Entered from another thread than the main one it watches nothing, since only that one may set handlers.
    """

    def __init__(self) -> None:
        self.requested = False
        self._something_to_save = False

    def something_to_save(self) -> None:
        """Says that the state is now worth saving."""
        self._something_to_save = True

    def __enter__(self) -> Self:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._read, self._write = socket.socketpair()
            self._write.setblocking(False)
            self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            # Any Python handler makes the C-level handler write to the pipe.
            self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
            self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._old_handler)
            signal.set_wakeup_fd(self._old_wakeup)
            self._write.close()  # ends the thread
            self._thread.join()
            self._read.close()

    def _watch(self) -> None:
        while received := self._read.recv(1):
            if received[0] != signal.SIGTERM:
                continue
            if self.requested:
                os._exit(128 + signal.SIGTERM)
            self.requested = True
            if not self._something_to_save:
                print("skyjax: SIGTERM: nothing to save", file=sys.stderr, flush=True)
                os._exit(EXIT_PREEMPTED)
            print("skyjax: SIGTERM: saving after this step", file=sys.stderr, flush=True)
