"""API keys: which are good enough, and where one is needed."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from ddengine.errors import InputError

MIN_KEY = 16  # characters
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # Host headers, without their ports


def check_keys(keys: Sequence[str]) -> None:
    """InputError for a key that can be guessed or not be sent in a header."""
    for key in keys:
        if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"an API key has {len(key)} characters; it needs at least {MIN_KEY}, printable ASCII without spaces, "
                f"for example from `openssl rand -hex 24`"
            )


def check_bind(host: str, keys: Sequence[str]) -> None:
    """InputError where others than this machine could use the service without a key."""
    if not is_loopback(host) and not keys:
        raise InputError(
            f"--host {host} can be reached from other machines; give an API key (--key-file or DDENGINE_API_KEY), or "
            f"stay on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone; a name other than localhost is never taken to be."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
