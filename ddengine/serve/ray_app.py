"""`ddengine serve` on a Ray of its own: started, served, drained, stopped. Clusters use `ray_deploy` instead."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ddengine.errors import BackendUnavailable, ModelError
from ddengine.serve.options import ServeOptions
from ddengine.serve.process import bound

if importlib.util.find_spec("ray") is None:  # said now: importing Ray has to wait until its environment is set
    raise ModuleNotFoundError("Ray is not installed", name="ray")

log = logging.getLogger(__name__)

# Ray reads these when it is imported, its daemons when they start.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name: whether this Ray may ever have other machines. Without them its processes listen on loopback
    # alone, with them on every address of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",  # and answer nobody, there or anywhere, who has not the token made below
    "RAY_COLOR_PREFIX": "0",
}
OBJECTS = 256 << 20  # bytes of shared memory for pictures between processes; Ray takes 30 % of the machine's otherwise
STOP_S = 30.0  # for Ray to stop in, after jobs have been drained


def run(options: ServeOptions, listening: Callable[[str], object] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain; InputError for an address that cannot be had.

    listening: told the URL once edits are taken (port 0 takes a free one).
    """
    sock = bound(options.host, options.port)
    host, port = sock.getsockname()[:2]
    sock.close()
    # Signals after Ray, which takes them over when it starts.
    with _ray(options) as (serve, app), _stopped_by_signals() as stopped:
        from ray.serve.config import HTTPOptions

        from ddengine.serve.ray_deploy import ENGINES, NAME, NOT_READY

        serve.start(http_options=HTTPOptions(host=options.host, port=port), proxy_location="HeadOnly")
        try:
            front = serve.run(app, name=NAME, route_prefix="/")
        except RuntimeError as error:  # after several tries of Serve's
            said = serve.status().applications[NAME].deployments[ENGINES].message
            reason = re.search(rf"{NOT_READY}(.*)", said)
            raise ModelError(f"no worker gets ready: {reason[1] if reason else said or error}") from error
        if listening is not None:
            listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        stopped.wait()
        log.info("stopping; jobs get %g s", options.limits.drain_s)
        try:
            front.drain.remote().result(timeout_s=options.limits.drain_s + STOP_S)
        except Exception as error:
            log.warning("jobs were not drained: %s", error)


@contextmanager
def _ray(options: ServeOptions) -> Iterator[tuple[Any, Any]]:
    """A Ray for this service alone, and the application to run on it."""
    if "ray" not in sys.modules:
        # A token of this service's own, in no file: Ray's would be one for all that the user runs.
        os.environ.update(ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    from ray import serve

    workers = options.limits.concurrency
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, workers),  # a worker is promised one, whatever there is
        object_store_memory=OBJECTS,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=True,
        namespace="ddengine",
    )
    try:
        address = ray.util.get_node_ip_address()
        if not ipaddress.ip_address(address).is_loopback:
            raise BackendUnavailable(
                f"Ray listens on {address}, which others can reach; start the service in a process of its own "
                f"(ddengine serve), or with --no-ray"
            )
        from ddengine.serve.ray_deploy import Deployed, application

        gpus = 0.0 if options.engine.device == "cpu" else share(ray.cluster_resources().get("GPU", 0), workers)
        yield serve, application(options, Deployed(gpus, host=options.host))
    finally:
        serve.shutdown()
        ray.shutdown()


def share(gpus: float, workers: int) -> float:
    """The part of a GPU that each worker gets: one, or where there are too few, equal parts of one."""
    each = -(-workers // int(gpus)) if gpus >= 1 else 0  # workers on the busiest GPU
    return int(10_000 / each) / 10_000 if each else 0.0


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second Ctrl-C stops waiting for jobs."""
    stopped = threading.Event()

    def stop(number: int, _: object) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
