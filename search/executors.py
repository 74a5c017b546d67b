"""Where candidates are evaluated: in this process, or by Ray workers.

An executor takes candidates while it has room, and hands back one evaluation for each, whatever
happens to the worker: a hang, a crash and a kill become results with a reason. Only a device that is
lost, or a disk that is full, is no result: `wait` raises DeviceLostError, once it has handed out what was
done before.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from ..core.disk import storage_trouble
from ..core.errors import AutocompressError, DeviceLostError
from ..core.types import Candidate, Evaluation, State
from .cluster import Crew, Seat, join_ray
from .config import SearchConfig
from .resources import Resources, parse_resources

Evaluate = Callable[[Candidate], Evaluation]
TRIES = 2  # a candidate whose worker died is tried once more: the next one may have more memory
LOSSES = 5  # spot machines go at any time, which says little about the candidate


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
        except DeviceLostError:
            raise
        except Exception as error:  # the evaluation is the user's code as well as ours: record, and go on
            trouble = storage_trouble(error)
            if trouble is not None:
                raise trouble from error
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
    died: list[str] = field(default_factory=list)  # nodes where its worker died
    lost: list[str] = field(default_factory=list)  # nodes that went away with its worker
    seat: Seat | None = None
    started: float = 0.0


@dataclass
class RayExecutor:
    """Ray actors on this machine or a cluster; each holds model and data.

    Attributes:
        evaluate: sent to each node once, through the object store: its workers read the arrays in place.
        workers: how many actors, at most: on a cluster as many as it gives.
        timeout: seconds after which a candidate's worker is killed and the candidate fails.
        address: of a running cluster; None starts Ray on this machine, closed to others by a token.
        resources: of each worker; None for one core, of which this machine then has as many as there are workers.
        growing: whether the number of workers follows what the cluster gives (see `Crew`).
        receive: what is made of a worker's result here; it may raise what `wait` may.
        patience: seconds without any worker after which the search gives up.

    Raises:
        InputError: Ray can't be started or joined; from `room` and `wait`: no worker starts, or none fits anywhere.
    """

    evaluate: Callable[[Candidate], Any]
    workers: int
    timeout: float | None = None
    address: str | None = None
    resources: Resources | None = None
    growing: bool = False
    receive: Callable[[Any], Evaluation] | None = None
    patience: float = 600.0
    _jobs: dict[Any, _Job] = field(default_factory=dict)
    _again: deque[_Job] = field(default_factory=deque)
    _lost: DeviceLostError | None = None

    def __post_init__(self) -> None:
        cores = len(os.sched_getaffinity(0))
        resources = self.resources or Resources()
        self._started_ray = join_ray(self.address, cores if self.resources else self.workers)
        import ray

        self._ray = ray
        alone = self.address is None and self.resources is None
        threads = max(1, cores // self.workers) if alone else resources.threads
        arguments = (ray.put(self.evaluate), threads)
        self._crew = Crew(ray.remote(_Worker), arguments, resources, self.workers, self.growing, self.patience)

    def room(self) -> bool:
        self._staff()
        return bool(self._crew.idle)

    def submit(self, candidate: Candidate) -> None:
        self._start(_Job(candidate))

    def wait(self, seconds: float) -> list[Evaluation]:
        """Evaluations that are done within `seconds`; [] where none is. Returns early, too, when a worker has come."""
        waiting = [*self._jobs, *self._crew.starting]
        if not waiting:
            time.sleep(seconds)
        else:
            self._ray.wait(waiting, num_returns=1, timeout=seconds)
        ready: list[Any] = []
        if self._jobs:
            ready, _ = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0)
        done = [result for reference in ready if (result := self._collect(reference)) is not None]
        done += self._overdue()
        if self._lost is not None and not done:
            raise self._lost
        if not done:
            self._staff()
        return done

    def close(self) -> None:
        """Kill the workers; leave Ray, or stop it, where this executor joined or started it."""
        for job in self._jobs.values():
            if job.seat is not None:
                self._ray.kill(job.seat.actor)
        self._crew.close()
        self._jobs = {}
        self._again.clear()
        if self._started_ray:
            self._ray.shutdown()

    def _staff(self) -> None:
        """See who has come; those whose workers went are served first."""
        self._crew.staff()
        while self._again and self._crew.idle:
            self._start(self._again.popleft())

    def _start(self, job: _Job) -> None:
        job.seat = self._crew.take(avoid=(job.died + job.lost or [""])[-1])
        job.started = time.monotonic()
        self._jobs[job.seat.actor.evaluate.remote(job.candidate)] = job

    def _collect(self, reference: Any) -> Evaluation | None:
        """The result of a finished call; None where its device was lost, or its worker and it is tried again."""
        job = self._jobs.pop(reference)
        assert job.seat is not None
        seconds = time.monotonic() - job.started
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            self._crew.give_back(job.seat)
            if isinstance(error.cause, DeviceLostError):
                self._lost = error.cause
                return None
            return failed(job.candidate, error.cause if isinstance(error.cause, Exception) else error, seconds)
        except self._ray.exceptions.RayError as error:
            self._crew.dismiss(job.seat)
            return self._try_again(job, error, seconds)
        self._crew.give_back(job.seat)
        return self.receive(result) if self.receive else result

    def _try_again(self, job: _Job, error: Exception, seconds: float) -> Evaluation | None:
        """Queue a candidate whose worker is gone once more; a failure where that happened too often."""
        assert job.seat is not None
        (job.lost if _is_node_lost(error) else job.died).append(job.seat.node)
        if len(job.died) < TRIES and len(job.lost) < LOSSES:
            self._again.append(job)
            return None
        times = len(job.died) + len(job.lost)
        nodes = len({*job.died, *job.lost})
        where = f" on {nodes} nodes" if nodes > 1 else ""
        cause = "ran out of memory" if isinstance(error, self._ray.exceptions.OutOfMemoryError) else "died"
        reason = f"its worker {cause} {times} times{where} ({type(error).__name__}: killed, or out of memory?)"
        return failed(job.candidate, AutocompressError(reason), seconds)

    def _overdue(self) -> list[Evaluation]:
        if self.timeout is None:
            return []
        found = []
        for reference, job in list(self._jobs.items()):
            seconds = time.monotonic() - job.started
            if seconds > self.timeout and job.seat is not None:
                del self._jobs[reference]
                self._crew.dismiss(job.seat)
                found.append(failed(job.candidate, TimeoutError(f"took longer than {self.timeout:g} s"), seconds))
        return found


def make_ray_executor(
    config: SearchConfig, evaluate: Callable[[Candidate], Any], receive: Callable[[Any], Evaluation] | None = None
) -> RayExecutor:
    """The executor that the settings ask for."""
    resources = parse_resources(config.resources) if config.resources else None
    growing = config.workers == "auto" and config.address is not None
    if config.workers != "auto":
        workers = config.workers
    elif growing:
        workers = config.trials
    else:
        workers = max(1, int(len(os.sched_getaffinity(0)) / (resources or Resources()).cpu))
    return RayExecutor(evaluate, workers, config.trial_timeout, config.address, resources, growing, receive)


def _is_node_lost(error: Exception) -> bool:
    """Whether a worker went with its machine, as far as Ray can tell: the first sign is a closed connection."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError

    if isinstance(error, ActorDiedError):
        return error.preempted or "node has died" in str(error) or "node was terminated" in str(error)
    return isinstance(error, (ActorUnavailableError, NodeDiedError))


class _Worker:
    """What runs in a Ray actor."""

    def __init__(self, evaluate: Evaluate, threads: int) -> None:
        self._evaluate, self._threads, self._ready = evaluate, threads, False

    def ready(self) -> str:
        """The name of the node; returns once model and data are here."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def evaluate(self, candidate: Candidate) -> Evaluation:
        if not self._ready and hasattr(self._evaluate, "task"):
            import torch

            torch.set_num_threads(self._threads)
        self._ready = True
        try:
            return self._evaluate(candidate)
        except Exception as error:
            trouble = storage_trouble(error)
            if trouble is None:
                raise
            raise trouble from error
