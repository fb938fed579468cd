"""A client of the edit service (`ddengine serve`), over httpx. It reads pictures as the library does, without torch.

from ddengine.client import Client

with Client("http://127.0.0.1:8000") as service:
    service.edit("cat.png", [((194, 74), (209, 54))]).save("out.png")
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ddengine.artifacts import save_picture
from ddengine.drags import parse_drags
from ddengine.errors import BackendUnavailable, Cancelled, DDEngineError, InputError
from ddengine.image import read_image

if TYPE_CHECKING:
    import httpx

Points = tuple[tuple[float, float], ...]

LONGEST_WAIT_S = 60.0  # before another try, whatever the service asks for
MARGIN_S = 30.0  # beyond an edit's deadline in which the service's answer must have come
_AGAIN = (429, 503)
_LOST = {"unavailable", "busy", "out_of_memory"}  # codes of an edit that failed for the service's reasons


class ServiceError(DDEngineError):
    """The service refused or failed. code: its word for it; status: the HTTP status, 0 where no answer came."""

    def __init__(self, message: str, code: str, status: int = 0, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.retry_s = code, status, retry_s


class RefusedInput(ServiceError, InputError):
    """The service cannot use the picture, a point or a setting."""


class RemoteCancelled(ServiceError, Cancelled):
    """The edit was cancelled at the service."""


@dataclass(frozen=True)
class RemoteResult:
    """An edited picture and what the service says of it; names mean what they mean in `ddengine.EditResult`."""

    id: str
    image: Image.Image
    handles: Points
    timings: Mapping[str, float]
    passes: Mapping[str, Mapping[str, int]]
    waited_s: float = 0.0
    batch: int = 1

    def save(self, path: str | Path) -> Path:
        """Write the picture atomically in the format of the suffix; InputError if that cannot be done."""
        return save_picture(self.image, path)


@dataclass(frozen=True)
class RemoteProgress:
    """Where a remote edit stands; fields as in `ddengine.Progress`, `preview` a picture where one was asked for."""

    stage: str
    step: int
    total: int
    points: Points | None = None
    preview: Image.Image | None = None


@dataclass
class RemoteSource:
    """A picture that the service keeps prepared. It may let go of it: the client then prepares it again, unasked."""

    image: Image.Image
    id: str
    timings: Mapping[str, float]
    options: Mapping[str, Any] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class RemoteEdit:
    """An edit that runs at the service whether or not anybody waits for it."""

    id: str
    client: Client = field(repr=False)

    def events(self) -> Iterator[RemoteProgress]:
        """Its progress from the beginning to its end; a broken connection is taken up again."""
        return self.client.events(self.id)

    def result(self) -> RemoteResult:
        """Its result, once it has ended; raises what it failed with."""
        return self.client.result(self.id)

    def cancel(self) -> bool:
        """Cancel it; False if it had ended before."""
        return self.client.cancel(self.id)


class Client:
    """A connection to one service; close it, or use it as a context. One thread at a time."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout: float = 150.0,
        retries: int = 4,
        http: httpx.Client | None = None,
    ) -> None:
        """key: the service's API key. timeout: seconds without a word from it, more where an edit's own deadline is
        later. retries: further tries of a request that it was too busy for, or whose connection broke; each waits as
        long as it asks. What was sent whole and not answered in time is not sent again: it would run twice. http: an
        httpx.Client of your own, which stays yours. Raises BackendUnavailable without httpx.
        """
        try:
            import httpx
        except ImportError as error:
            raise BackendUnavailable('the client needs httpx; install it: pip install "ddengine[serve]"') from error
        self._httpx: Any = httpx
        self._errors = httpx.TransportError
        self._retries, self._own, self._timeout = retries, http is None, timeout
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._http = http or httpx.Client(base_url=url, timeout=httpx.Timeout(timeout, connect=10.0))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._own:
            self._http.close()

    def ready(self) -> bool:
        """Whether the service takes edits now."""
        try:
            return bool(self._http.get("/v2/health/ready").status_code == 200)
        except self._errors:
            return False

    def metrics(self) -> str:
        """The service's metrics in Prometheus' text format."""
        return str(self._send("GET", "/metrics").text)

    def edit(
        self,
        image: Any,
        drags: Iterable[Any],
        *,
        config: str | None = None,
        settings: Mapping[str, Any] | None = None,
        prompt: str = "",
        seed: int = 0,
        deadline_s: float | None = None,
    ) -> RemoteResult:
        """Move what lies at each drag's handle to its target, at the service, and wait for it.

        image: a `RemoteSource`, or what `ddengine.edit` takes; drags, config (a preset), prompt and seed as there.
        settings: fields of the configuration to change. deadline_s: seconds it may take, waiting included. Raises
        InputError before anything is sent where the picture or a point is wrong, and ServiceError.
        """
        asked = _asked(config, settings, prompt, deadline_s) | {"seed": seed}
        response = self._edit(image, drags, asked, {"Accept": "image/png"})
        return _result(response)

    def submit(
        self,
        image: Any,
        drags: Iterable[Any],
        *,
        config: str | None = None,
        settings: Mapping[str, Any] | None = None,
        prompt: str = "",
        seed: int = 0,
        deadline_s: float | None = None,
        previews: bool = False,
    ) -> RemoteEdit:
        """As `edit`, but return once the service has taken it. previews: whether its progress carries pictures."""
        asked = _asked(config, settings, prompt, deadline_s) | {"seed": seed, "previews": previews}
        return RemoteEdit(self._edit(image, drags, asked, {"Prefer": "respond-async"}).json()["id"], self)

    def prepare(
        self,
        image: Any,
        *,
        config: str | None = None,
        settings: Mapping[str, Any] | None = None,
        prompt: str = "",
        deadline_s: float | None = None,
    ) -> RemoteSource:
        """Have the service prepare a picture, so that each later edit of it pays only for its drag."""
        options = _asked(config, settings, prompt, deadline_s)
        source = RemoteSource(read_image(image), "", {}, options)
        self._prepare(source)
        return source

    def forget(self, source: RemoteSource) -> None:
        """Have the service let go of a prepared picture; no error if it has already."""
        response = self._send("DELETE", f"/v1/sources/{source.id}", expected=(204, 404, 410))
        response.close()

    def events(self, edit_id: str) -> Iterator[RemoteProgress]:
        """Progress of an edit from the beginning to its end; a broken connection is taken up again."""
        last, tries = "", 0
        while True:
            headers = {**self._headers, "Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
            try:
                with self._http.stream("GET", f"/v1/edits/{edit_id}/events", headers=headers) as response:
                    if response.status_code != 200:
                        response.read()
                        raise _error(response)
                    for number, name, data in _server_sent(response.iter_lines()):
                        last, tries = number or last, 0
                        if name == "progress":
                            yield _progress(data)
                        elif name in ("done", "failed"):
                            return
            except self._errors as error:
                if tries >= self._retries:
                    raise _unreachable(error) from error
            tries += 1
            if tries > self._retries:
                raise ServiceError(f"the events of edit {edit_id} end without its end; ask for it", "unavailable")
            time.sleep(_pause(tries, None))

    def result(self, edit_id: str) -> RemoteResult:
        """The result of an edit, once it has ended; raises what it failed with."""
        while True:
            response = self._send(
                "GET",
                f"/v1/edits/{edit_id}/picture",
                headers={"Accept": "image/png"},
                expected=(200, 409),
                patient=False,
            )
            if response.status_code == 200:
                return _result(response)
            error = _error(response)
            if error.code != "not_finished":
                raise error
            for _ in self.events(edit_id):
                pass

    def cancel(self, edit_id: str) -> bool:
        """Cancel an edit; False if it had ended before."""
        return bool(self._send("DELETE", f"/v1/edits/{edit_id}").json()["state"] == "cancelled")

    def _edit(self, image: Any, drags: Iterable[Any], asked: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        source = image if isinstance(image, RemoteSource) else None
        picture = image.image if isinstance(image, RemoteSource) else read_image(image)
        arrows = parse_drags(drags, *picture.size)
        asked["drags"] = [{"handle": list(drag.handle), "target": list(drag.target)} for drag in arrows]
        headers = {**headers, "Idempotency-Key": secrets.token_urlsafe(18)}
        if source is None:
            return self._send("POST", "/v1/edits", headers, _png(picture), asked)
        for again in (True, False):
            try:
                return self._send("POST", "/v1/edits", headers, None, {**asked, "source": source.id})
            except ServiceError as error:
                # 404: another process of the service, which has never heard of it.
                if not again or error.status not in (404, 410):
                    raise
            self._prepare(source)
            headers["Idempotency-Key"] = secrets.token_urlsafe(18)  # another body now
        raise AssertionError("unreachable")

    def _prepare(self, source: RemoteSource) -> None:
        response = self._send("POST", "/v1/sources", {}, _png(source.image), dict(source.options), part="options")
        found = response.json()
        source.id, source.timings = found["source"], found["timings"]

    def _send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        picture: bytes | None = None,
        body: dict[str, Any] | None = None,
        part: str = "edit",
        expected: tuple[int, ...] = (200, 201, 202),
        patient: bool = True,
    ) -> httpx.Response:
        """One request, tried again where the service says later or the connection breaks; ServiceError."""
        sent: dict[str, Any] = {"headers": {**self._headers, **(headers or {})}}
        if method == "POST":  # answered when the edit has ended
            usual, deadline_s = self._http.timeout, (body or {}).get("deadline_s", 0.0)
            read = None if usual.read is None else max(self._timeout, deadline_s + MARGIN_S)
            sent["timeout"] = self._httpx.Timeout(**{**usual.as_dict(), "read": read})
        if picture is not None:
            text = json.dumps(body).encode()
            sent["files"] = {"picture": ("picture.png", picture, "image/png"), part: (None, text, "application/json")}
        elif body is not None:
            sent["json"] = body
        for tries in range(1, self._retries + 2):
            try:
                response = self._http.request(method, path, **sent)
            except self._errors as error:
                if method == "POST" and isinstance(error, self._httpx.ReadTimeout):
                    raise ServiceError(
                        f"the service gave no answer within {read:g} s; allow a longer timeout, or submit() the edit",
                        "deadline",
                    ) from error
                failure = _unreachable(error)
            else:
                if response.status_code in expected:
                    return response
                failure = _error(response)
                if failure.status not in _AGAIN or not (patient or failure.code not in _LOST):
                    raise failure
            if tries <= self._retries:
                time.sleep(_pause(tries, failure.retry_s))
        raise failure


def _asked(
    config: str | None, settings: Mapping[str, Any] | None, prompt: str, deadline_s: float | None
) -> dict[str, Any]:
    asked = {"config": config, "settings": dict(settings or {}), "prompt": prompt, "deadline_s": deadline_s}
    return {name: value for name, value in asked.items() if value not in (None, "", {})}


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1, icc_profile=picture.info.get("icc_profile"))
    return file.getvalue()


def _result(response: httpx.Response) -> RemoteResult:
    with Image.open(BytesIO(response.content), formats=("PNG",)) as opened:
        image = opened.convert("RGB")
    about = json.loads(response.headers["Edit-Report"])
    return RemoteResult(
        response.headers["Edit-Id"],
        image,
        _points(about["handles"]),
        about["timings"],
        about["passes"],
        about["waited_s"],
        about["batch"],
    )


def _progress(data: str) -> RemoteProgress:
    found = json.loads(data)
    points, preview = found.get("points"), found.get("preview")
    picture = None
    if preview is not None:
        import base64

        with Image.open(BytesIO(base64.b64decode(preview.partition(",")[2])), formats=("JPEG",)) as opened:
            picture = opened.convert("RGB")
    return RemoteProgress(
        found["stage"], found["step"], found["total"], None if points is None else _points(points), picture
    )


def _points(found: Iterable[Iterable[float]]) -> Points:
    return tuple((float(x), float(y)) for x, y in found)


def _server_sent(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(id, event, data) of each server-sent event (HTML standard, section 9.2.6); comments are skipped."""
    found: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            if name:
                found[name] = value.removeprefix(" ")
        elif found:
            yield found.get("id", ""), found.get("event", "message"), found.get("data", "")
            found = {}


def _error(response: httpx.Response) -> ServiceError:
    """What an answer says went wrong, as the exception of its kind."""
    try:
        about = response.json()["error"]
        code, message = str(about["code"]), str(about["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "unavailable" if response.status_code in (502, 503) else "internal", response.text[:200]
    after = response.headers.get("Retry-After", "")
    kind = ServiceError
    if response.status_code in (400, 413, 415, 422):
        kind = RefusedInput
    elif code == "cancelled":
        kind = RemoteCancelled
    return kind(f"{message} ({code})", code, response.status_code, float(after) if after.isdecimal() else None)


def _unreachable(error: Exception) -> ServiceError:
    return ServiceError(
        f"the service cannot be reached: {error or type(error).__name__}; is it running?", "unavailable"
    )


def _pause(tries: int, asked: float | None) -> float:
    """Seconds before another try: what the service asks for, else doubling; never in step with other clients."""
    return min(asked if asked is not None else 0.25 * 2**tries, LONGEST_WAIT_S) * random.uniform(1.0, 1.25)
