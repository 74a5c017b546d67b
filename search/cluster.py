"""Ray's side of a search: starting or joining it, and the workers that it gives, comes to give, or takes away."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import DeviceLostError, InputError
from .resources import Resources, describe_nodes

LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's outer address
START_TRIES = 3  # workers in a row that fail to start before that counts as an answer
SETTLE = 5.0  # seconds that a cluster gets to say what it has


def join_ray(address: str | None, cores: float) -> bool:
    """Join the cluster at `address`, or start Ray on this machine, closed to others by a token.

    Args:
        cores: how many Ray may give away on this machine.

    Returns:
        Whether it was started or joined here, so that whoever called ends it.

    Raises:
        InputError: there is no such cluster, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers at normal priority: a measurement must not be the first to yield to other work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if address is None:
        # Ray listens on every interface: only this search, which knows the token, may talk to it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Workers that ask for no GPU still see those of this machine: the target may be one.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return False
    check_address(address)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        settings |= {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": LOOPBACK}
    try:
        ray.init(address or "local", **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "; if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if address else ""
        raise InputError(f"can't start or join Ray: {str(error).splitlines()[0]}{hint}") from error
    return True


def check_address(address: str | None) -> None:
    """Whether anything answers at a cluster's address: Ray itself tries for many minutes.

    Raises:
        InputError: nothing does, or it is no address.
    """
    if address is None or address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise InputError(
            f"address: expected HOST:PORT, or auto for a cluster that this machine is part of, not '{address}'"
        )
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"address: nothing answers at {address} ({error}); is `ray start --head` running there?"
        ) from error


@dataclass(frozen=True)
class Seat:
    """A worker that has started.

    Attributes:
        node: Ray's name of the machine it runs on.
    """

    actor: Any
    node: str


@dataclass
class Crew:
    """The workers of one search: as many as Ray gives, up to `most`.

    Attributes:
        worker: Ray's remote class; its `ready` returns the node's name.
        arguments: of its constructor.
        most: upper bound.
        growing: ask for what the nodes hold, and then for as many again as have come, rather than for all at once:
            a cluster that grows on demand follows, up to its own limit.
        patience: seconds without any worker after which the search gives up.
    """

    worker: Any
    arguments: tuple[Any, ...]
    resources: Resources
    most: int
    growing: bool
    patience: float
    idle: list[Seat] = field(default_factory=list)
    alive: int = 0
    _starting: dict[Any, Any] = field(default_factory=dict)  # the call that returns once it runs -> worker
    _failures: int = 0
    _pause: float = 0.0
    _empty_since: float = field(default_factory=time.monotonic)
    _checked: float = 0.0
    _had_any: bool = False
    _first: int = 0

    def __post_init__(self) -> None:
        import ray

        self._ray = ray
        if self.growing:
            self._first = max(1, sum(self.resources.count(node) for node in self._nodes()))
        self.staff()

    @property
    def starting(self) -> list[Any]:
        """What to wait for, to hear of new workers."""
        return list(self._starting)

    def staff(self) -> None:
        """Welcome the workers that have come; ask for more where there may be more.

        Raises:
            InputError: no worker starts, or no node can ever hold one.
            DeviceLostError: the last one went, and none came for as long as `patience`.
        """
        if self._starting:
            ready, _ = self._ray.wait(self.starting, num_returns=len(self._starting), timeout=0)
            for call in ready:
                self._welcome(call)
        now = time.monotonic()
        wanted = min(self.most, max(self._first, 2 * self.alive)) if self.growing else self.most
        if now >= self._pause:
            for _ in range(wanted - self.alive - len(self._starting)):
                actor = self.worker.options(max_restarts=0, **self.resources.options()).remote(*self.arguments)
                self._starting[actor.ready.remote()] = actor
        if not self.alive and now - self._checked > 1:
            self._checked = now
            self._check(now - self._empty_since)

    def take(self, avoid: str = "") -> Seat:
        """An idle worker, where possible not one on the node `avoid`."""
        seat = next((seat for seat in reversed(self.idle) if seat.node != avoid), self.idle[-1])
        self.idle.remove(seat)
        return seat

    def give_back(self, seat: Seat) -> None:
        """The worker is free again."""
        self.idle.append(seat)

    def dismiss(self, seat: Seat) -> None:
        """End a worker that hangs, or that died or may have: a lost connection may hide one that still works."""
        self._ray.kill(seat.actor)
        self.alive -= 1
        if not self.alive:
            self._empty_since = time.monotonic()

    def close(self) -> None:
        """End all workers that are idle or starting."""
        for actor in [*(seat.actor for seat in self.idle), *self._starting.values()]:
            self._ray.kill(actor)
        self.idle, self._starting = [], {}

    def _welcome(self, call: Any) -> None:
        actor = self._starting.pop(call)
        try:
            node = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._failures += 1
            if self._failures >= START_TRIES:
                if not self.alive:
                    raise InputError(f"workers don't start: {_cause(error)}") from error
                self._failures, self._pause = 0, time.monotonic() + 60
            return
        self._failures, self._had_any = 0, True
        self.alive += 1
        self.idle.append(Seat(actor, node))

    def _check(self, waited: float) -> None:
        """Give up where no worker can be expected."""
        if waited < SETTLE:
            return
        nodes = self._nodes()
        asked = f"a worker that needs {self.resources}"
        if not any(self.resources.count(node) for node in nodes):
            told = f"no node can hold {asked}; there are: {describe_nodes(nodes, self.resources)}"
            if not self._had_any and not _is_autoscaling():
                raise InputError(told)
        else:
            told = f"all nodes that can hold {asked} are in use by others"
        if waited > self.patience:
            text = f"no worker for {self.patience:g} s: {told}"
            raise DeviceLostError(text) if self._had_any else InputError(text)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


def _is_autoscaling() -> bool:
    """Whether something can add nodes to the cluster that was joined."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    if status.stats.autoscaler_version not in (None, "", "0"):
        return True
    stored = _internal_kv_get(b"__autoscaling_status")
    report = json.loads(stored)["autoscaler_report"] if stored else {}
    # Where nodes are only watched, each is a type of its own, called after it.
    named = {*(report.get("active_nodes") or ()), *(report.get("pending_launches") or ())}
    return any(not name.startswith("node_") for name in named)


def _cause(error: Exception) -> str:
    """The line of a worker's traceback that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = next((line for line in lines if line.startswith("ModuleNotFoundError")), "")
    if missing:
        return f"{missing} (install the same autocompress on every node)"
    return next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else type(error).__name__)
