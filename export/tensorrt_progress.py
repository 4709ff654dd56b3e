"""A build with progress that Ctrl-C can stop.

TensorRT reports nested phases from threads of its own and asks after each step whether to go on. An exception must never travel
through its frames, which end the process on it: so the build runs in a second thread, and the first one listens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from retnet_export.runtime.progress import Progress


def make_monitor(module: Any, progress: Progress) -> Any:
    """A progress monitor that adds up TensorRT's nested phases, and can cancel the build.

    Returns:
        An `IProgressMonitor` with a method `cancel`.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """A phase's share of its parent is one of the parent's steps; the outermost phase is the whole."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._cancelled = threading.Event()
            self._lock = threading.Lock()
            self._parents: dict[str, str | None] = {}
            self._steps: dict[str, int] = {}
            self._done: dict[str, int] = {}
            self._share = 0.0

        def cancel(self) -> None:
            self._cancelled.set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._parents[phase_name], self._steps[phase_name], self._done[phase_name] = parent_phase, max(num_steps, 1), 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._done[phase_name] = min(step + 1, self._steps.get(phase_name, 1))
                share = 0.0
                phase: str | None = phase_name
                while phase is not None:
                    share = (self._done.get(phase, 0) + share) / self._steps.get(phase, 1)
                    phase = self._parents.get(phase)
                self._share = max(self._share, min(share, 1.0))  # phases may repeat; a bar only moves forward
                progress(phase_name, self._share)
            return not self._cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._parents.pop(phase_name, None)

    return Monitor()


def run_cancellable(build: Callable[[], Any], monitor: Any) -> Any:
    """Build in a second thread, so that Ctrl-C reaches us: TensorRT then ends the build at its next step."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(build())
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            failure.append(error)

    thread = threading.Thread(target=work, name="tensorrt-build")
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        monitor.cancel()
        if thread.ident is not None:
            thread.join()
        raise
    if failure:
        raise failure[0]
    return outcome[0]
