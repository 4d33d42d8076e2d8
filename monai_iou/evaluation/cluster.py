"""Running tasks on an existing Dask cluster, which is asked first whether it is one.

An address that accepts connections and is not a scheduler (a web server, a port that never answers) would keep Dask
waiting for minutes or make it ask for exabytes. A scheduler speaks first, and its first words are short: that is
looked at before Dask is.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

# For the greeting and again for the workers: together less than half a minute.
CONNECT_SECONDS = 14
# How often a case may lose its worker before it is given up.
RETRIES = 3
# A scheduler's greeting is a few hundred bytes in a few frames.
LONGEST_GREETING = 1 << 20
START_ONE = "start one with `dask scheduler`."


class SchedulerError(RuntimeError):
    """The cluster cannot be used; the message says what to do."""


@contextlib.contextmanager
def dask_client(address: str) -> Iterator[Any]:
    """Connect to a scheduler that has workers.

    Args:
        address: such as `tcp://host:8786`.

    Yields:
        The `distributed.Client`.

    Raises:
        SchedulerError: Dask is not installed, or the scheduler or its workers do not answer within 30 seconds.
    """
    try:
        from distributed import Client
    except ImportError as error:
        message = (
            "Expected Dask for `--scheduler`, but it is not installed: "
            "run `pip install '.[cluster]'` in a clone of the repository, here and on the workers."
        )
        raise SchedulerError(message) from error
    _greet(address)
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except Exception as error:  # distributed raises anything from OSError to errors of its decoder
        message = f"Expected a Dask scheduler at `{address}`, but got no answer that Dask understands: {START_ONE}"
        raise SchedulerError(message) from error
    with contextlib.closing(client):
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except Exception as error:  # distributed raises its own TimeoutError, whose place has moved between versions
            message = f"Expected workers on the scheduler at `{address}`, but got none: start some with `dask worker`."
            raise SchedulerError(message) from error
        yield client


def _greet(address: str) -> None:
    """Make sure that what answers at the address speaks as a scheduler does."""
    host, port = host_and_port(address)
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            heard = _first_bytes(host, port, deadline)
            break
        except OSError as error:  # nobody there: a scheduler that has just been started may be in a moment
            if time.monotonic() + 0.2 < deadline and not isinstance(error, socket.gaierror):
                time.sleep(0.2)
                continue
            message = f"Expected a Dask scheduler at `{address}`, but got no answer: {START_ONE}"
            raise SchedulerError(message) from error
    if len(heard) < 8:
        message = (
            f"Expected a Dask scheduler at `{address}`, but what accepts connections there does not greet as one: "
            f"check the port, or {START_ONE}"
        )
        raise SchedulerError(message)
    if struct.unpack("<Q", heard)[0] > LONGEST_GREETING:
        message = (
            f"Expected a Dask scheduler at `{address}`, but something else answers there: check the port, or "
            f"{START_ONE}"
        )
        raise SchedulerError(message)


def _first_bytes(host: str, port: int, deadline: float) -> bytes:
    """What is said first at a port, up to 8 bytes; fewer where nothing is said until the deadline."""
    heard = b""
    connection = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
    with connection, contextlib.suppress(TimeoutError, ConnectionError):
        while len(heard) < 8 and (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            block = connection.recv(8 - len(heard))
            if not block:
                break
            heard += block
    return heard


def host_and_port(address: str) -> tuple[str, int]:
    """Return the two parts of a scheduler's address.

    Raises:
        SchedulerError: it is not an address of a host and a port by TCP.

    >>> host_and_port("tcp://node7:8786"), host_and_port("127.0.0.1:80")
    (('node7', 8786), ('127.0.0.1', 80))
    """
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("tcp://")
    if parts.scheme != "tcp" or not host or not port:
        message = (
            f"Expected `--scheduler` to be an address such as tcp://host:8786, but got `{address}`: give one with a "
            "host and a port, of TCP without encryption."
        )
        raise SchedulerError(message)
    return host, port


def run_on_dask(
    client: Any, guarded: Callable[..., Any], function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, Any]]:
    """Yield each task's name and what `guarded(function, *arguments)` gave, or an error where its workers died."""
    from distributed import as_completed

    futures = {
        client.submit(guarded, function, *arguments, pure=False, retries=RETRIES): name
        for name, arguments in tasks.items()
    }
    for future in as_completed(list(futures)):
        if future.status == "finished":
            yield futures[future], future.result()
        else:
            reason = (
                f"Expected the cluster to finish this case, but its workers died ({future.exception()}): give them "
                "more memory, or start fewer on a machine."
            )
            yield futures[future], SchedulerError(reason)
        future.release()
