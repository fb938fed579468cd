"""Ids that nobody can guess and that say by themselves whether this service has given them, and to whom."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

_FORM = re.compile(r"[a-z]{3}_[A-Za-z0-9_-]{24}[0-9a-f]{24}")


class Ids:
    """Makes and recognises ids: 144 random bits and a keyed digest of them, their kind and their owner."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)  # so that no other application's ids are known here

    def new(self, kind: str, owner: str = "") -> str:
        """A new id of a kind (three letters) for an owner."""
        head = f"{kind}_{secrets.token_urlsafe(18)}"
        return head + self._tag(head, owner)

    def ours(self, given: str, kind: str, owner: str = "") -> bool:
        """Whether this id was given to that owner: what is not there any more was there once."""
        if not _FORM.fullmatch(given) or not given.startswith(kind):
            return False
        return hmac.compare_digest(given[-24:], self._tag(given[:-24], owner))

    def _tag(self, head: str, owner: str) -> str:
        return hmac.new(self._secret, f"{head}\0{owner}".encode(), hashlib.sha256).hexdigest()[:24]
