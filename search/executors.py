"""Where candidates are evaluated: in this process, or by Ray workers.

An executor takes candidates while it has room, and hands back one evaluation for each, whatever
happens to the worker: a hang, a crash and a kill become results with a reason.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from ..core.errors import AutocompressError, InputError
from ..core.types import Candidate, Evaluation, State

Evaluate = Callable[[Candidate], Evaluation]
LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's outer address
TRIES = 2  # a candidate whose worker died is tried once more: the next one may have more memory


class Executor(Protocol):
    """Runs evaluations; `submit` while `room()`, `wait` for what is done."""

    def room(self) -> bool: ...

    def submit(self, candidate: Candidate) -> None: ...

    def wait(self, seconds: float) -> list[Evaluation]: ...

    def close(self) -> None: ...


class InlineExecutor:
    """One candidate at a time, in this process; for debugging, tests and tiny models.

    Args:
        timeout: seconds after which a candidate fails; None for no limit. Needs the main thread.
    """

    def __init__(self, evaluate: Evaluate, timeout: float | None = None) -> None:
        self._evaluate, self._timeout = evaluate, timeout
        self._waiting: deque[Candidate] = deque()

    def room(self) -> bool:
        return not self._waiting

    def submit(self, candidate: Candidate) -> None:
        self._waiting.append(candidate)

    def wait(self, seconds: float) -> list[Evaluation]:
        """Evaluate what was submitted; returns when it is done, however long that takes."""
        return [self._guarded(self._waiting.popleft())] if self._waiting else []

    def close(self) -> None:
        self._waiting.clear()

    def _guarded(self, candidate: Candidate) -> Evaluation:
        started = time.perf_counter()
        alarm = self._timeout is not None and threading.current_thread() is threading.main_thread()
        if alarm:
            previous = signal.signal(signal.SIGALRM, self._ring)
            outer, _ = signal.setitimer(signal.ITIMER_REAL, self._timeout or 0)
        try:
            return self._evaluate(candidate)
        except Exception as error:  # the evaluation is the user's code as well as ours: record, and go on
            return failed(candidate, error, time.perf_counter() - started)
        finally:
            if alarm:
                signal.signal(signal.SIGALRM, previous)
                signal.setitimer(signal.ITIMER_REAL, outer)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {self._timeout:g} s")


def failed(candidate: Candidate, error: BaseException, seconds: float) -> Evaluation:
    """The result of a candidate whose evaluation raised `error`."""
    from ..evaluators.pipeline import describe_error

    return Evaluation(candidate, State.FAILED, reason=describe_error(error), seconds=seconds)


@dataclass
class _Job:
    candidate: Candidate
    actor: Any
    started: float
    tries: int = 1


@dataclass
class RayExecutor:
    """Ray actors on this machine or a cluster; each holds model and data.

    Attributes:
        evaluate: sent to each actor once, through the object store.
        workers: how many actors.
        timeout: seconds after which a candidate's worker is killed and the candidate fails.
        address: of a running cluster; None starts Ray on this machine, closed to others by a token.
    """

    evaluate: Evaluate
    workers: int
    timeout: float | None = None
    address: str | None = None
    _idle: list[Any] = field(default_factory=list)
    _jobs: dict[Any, _Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers at normal priority: a measurement must not be the first to yield to other work.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if self.address is None:
            # Ray listens on every interface: only this search, which knows the token, may talk to it.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        self._ray = ray
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            if self.address is None:
                settings |= {"num_cpus": self.workers, "include_dashboard": False, "_node_ip_address": LOOPBACK}
            try:
                ray.init(self.address or "local", **settings)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(f"can't start or join Ray: {str(error).splitlines()[0]}") from error
        self._shared = ray.put(self.evaluate)
        cores = len(os.sched_getaffinity(0)) if self.address is None else 1
        self._threads = max(1, cores // self.workers)
        self._worker_class = ray.remote(_Worker)
        self._idle = [self._new_actor() for _ in range(self.workers)]

    def room(self) -> bool:
        return bool(self._idle)

    def submit(self, candidate: Candidate) -> None:
        self._start(candidate, tries=1)

    def wait(self, seconds: float) -> list[Evaluation]:
        """Evaluations that are done within `seconds`; [] where none is."""
        if not self._jobs:
            return []
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=seconds)
        if ready:
            more, _ = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0)
            ready = more or ready
        done = [result for reference in ready if (result := self._collect(reference)) is not None]
        return done + self._overdue()

    def close(self) -> None:
        """Kill the workers; stop Ray where this executor started it."""
        for actor in [*self._idle, *(job.actor for job in self._jobs.values())]:
            self._ray.kill(actor)
        self._idle, self._jobs = [], {}
        if self._started_ray:
            self._ray.shutdown()

    def _new_actor(self) -> Any:
        return self._worker_class.options(num_cpus=1, max_restarts=0).remote(self._shared, self._threads)

    def _start(self, candidate: Candidate, tries: int) -> None:
        actor = self._idle.pop()
        self._jobs[actor.evaluate.remote(candidate)] = _Job(candidate, actor, time.monotonic(), tries)

    def _collect(self, reference: Any) -> Evaluation | None:
        """The result of a finished call; None where its worker died and the candidate is tried again."""
        job = self._jobs.pop(reference)
        seconds = time.monotonic() - job.started
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            self._idle.append(job.actor)
            return failed(job.candidate, error.cause if isinstance(error.cause, Exception) else error, seconds)
        except self._ray.exceptions.RayError as error:
            self._idle.append(self._new_actor())
            if job.tries < TRIES:
                self._start(job.candidate, job.tries + 1)
                return None
            cause = "ran out of memory" if isinstance(error, self._ray.exceptions.OutOfMemoryError) else "died"
            reason = f"its worker {cause} {TRIES} times ({type(error).__name__}: killed, or out of memory?)"
            return failed(job.candidate, AutocompressError(reason), seconds)
        self._idle.append(job.actor)
        return result

    def _overdue(self) -> list[Evaluation]:
        if self.timeout is None:
            return []
        found = []
        for reference, job in list(self._jobs.items()):
            seconds = time.monotonic() - job.started
            if seconds > self.timeout:
                del self._jobs[reference]
                self._ray.kill(job.actor)
                self._idle.append(self._new_actor())
                found.append(failed(job.candidate, TimeoutError(f"took longer than {self.timeout:g} s"), seconds))
        return found


class _Worker:
    """What runs in a Ray actor."""

    def __init__(self, evaluate: Evaluate, threads: int) -> None:
        self._evaluate, self._threads, self._ready = evaluate, threads, False

    def evaluate(self, candidate: Candidate) -> Evaluation:
        if not self._ready and hasattr(self._evaluate, "task"):
            import torch

            torch.set_num_threads(self._threads)
        self._ready = True
        return self._evaluate(candidate)
