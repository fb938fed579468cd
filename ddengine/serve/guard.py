"""What every request passes before its route: host, origin, key, body limits; request ids, headers, access log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddengine.serve.faults import Fault
from ddengine.serve.logs import request_id
from ddengine.serve.service import Service, digest
from ddengine.serve.waiting import within

log = logging.getLogger("ddengine.serve.access")

OPEN = ("/v2/health/live", "/v2/health/ready")  # without key, name or place: for whoever starts and stops the process
ADMITTED = "ddengine.admitted"  # in the scope of a request that has been let in

_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._keys = tuple((key.encode(), digest(key)) for key in service.keys)
        self._admitted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else secrets.token_hex(8)
        token = request_id.set(name)
        began, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [*_HEADERS, (b"x-request-id", name.encode())]
                if status in (408, 413):  # the rest of the body is not waited for
                    extra.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        places = 0
        try:
            try:
                self._check(scope, headers)
                places = self._admit(scope)
                await self.app(scope, self._bounded(receive), answer)
            except Fault as fault:
                await self._refuse(fault, scope, answer)
            except ClientDisconnect:
                await self._refuse(Fault("client_gone", "the client has gone"), scope, answer)
            except asyncio.CancelledError:
                if status or not self.service.jobs.draining:
                    raise
                await self._refuse(Fault("unavailable", "the service is being stopped", 5), scope, answer)
            except Exception:
                log.exception("a request failed")
                if status:
                    raise  # half an answer is out: the server has to hang up
                await self._refuse(Fault("internal", "the service failed; its log says why"), scope, answer)
        finally:
            self._admitted -= places
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.answered(route, status)
            facts = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
                **scope.get("ddengine.facts", {}),
            }
            log.info("request", extra={"facts": facts})
            request_id.reset(token)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        service, is_open = self.service, scope["path"] in OPEN
        if not self._keys:  # what a page of another site may do from its reader's browser; it cannot send a key
            # Under a name of its own for this machine's address. Probes call the open paths by an address.
            if not is_open and service.hosts is not None and _name(headers.get("host", "")) not in service.hosts:
                raise Fault("host_not_allowed", "this server does not answer to that Host")
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != headers.get("host"):
                raise Fault("origin_not_allowed", "requests of other sites' pages are refused")
        elif not is_open:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # All keys are compared, each in constant time.
            found = [owner for mine, owner in self._keys if hmac.compare_digest(mine, key.strip().encode("latin-1"))]
            if scheme.lower() != "bearer" or not found:
                raise Fault("unauthorized", "send an API key: Authorization: Bearer KEY")
            scope["ddengine.owner"] = found[0]
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            raise Fault("bad_request", "Content-Length is not a number")
        if int(length) > service.limits.body_bytes:
            raise too_large(service.limits.body_bytes)

    def _admit(self, scope: Scope) -> int:
        """How many places a checked request takes; Fault unavailable where there are too few."""
        if scope["path"] in OPEN:
            return 0
        most = self.service.limits.connections
        if self._admitted >= most:
            raise Fault("unavailable", f"{most} requests are being answered, which is the limit; try again later", 1)
        scope[ADMITTED] = True
        self._admitted += 1
        return 1

    async def _refuse(self, fault: Fault, scope: Scope, send: Send) -> None:
        """Answer with a fault; outside the application, whose own handlers do this for its routes."""
        self.service.metrics.refused(fault.code)
        body = json.dumps(fault.body(scope["path"])).encode()
        headers = {**fault.headers(), "Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": fault.status, "headers": lines})
        await send({"type": "http.response.body", "body": body})

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` for a body of so many bytes in so much time, whatever Content-Length says."""
        limits, size, ended = self.service.limits, 0, False
        until = time.monotonic() + limits.body_s

        async def bounded() -> Message:
            nonlocal size, ended
            if ended:
                return await receive()
            try:
                message: Message = await within(receive(), max(until - time.monotonic(), 0.001))
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise Fault("body_timeout", f"the body did not arrive within {limits.body_s:g} s") from error
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > limits.body_bytes:
                raise too_large(limits.body_bytes)
            return message

        return bounded


def too_large(limit: int) -> Fault:
    return Fault("too_large", f"the body has more than {limit} bytes; send a smaller picture")


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    if host.startswith("["):
        return "".join(host.partition("]")[:2]).lower()
    return host.partition(":")[0].lower()
