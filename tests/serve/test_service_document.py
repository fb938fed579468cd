"""docs/service.md says what the code says: its limits, codes, paths and metrics are all there, its commands run."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from ddengine.bench.service import running
from ddengine.serve.app import create_app
from ddengine.serve.contract import STATUS, Stats
from ddengine.serve.limits import Limits
from ddengine.serve.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "service.md"
MEANING = {
    "bad_request": "cannot be read: JSON, multipart, a header",
    "unauthorized": "no key, or not one of this service's",
    "origin_not_allowed": "a page of another site, in a browser",
    "not_found": "no such path, edit or source",
    "method_not_allowed": "not with this method",
    "not_acceptable": "`Accept` allows nothing that there is",
    "body_timeout": "the body came too slowly",
    "not_finished": "the picture of an edit that still runs",
    "cancelled": "the outcome of a cancelled edit",
    "gone": "a source or an edit that is not kept any more",
    "too_large": "too many bytes or pixels",
    "unsupported_media": "neither PNG, JPEG nor WebP; or another body",
    "host_not_allowed": "not a name of this server",
    "invalid": "read, but no edit: a point, a setting, the picture",
    "key_reused": "an idempotency key with another body",
    "busy": "the queue is full",
    "client_gone": "in logs and metrics alone: the client hung up",
    "internal": "a fault of ours; the log says which",
    "unavailable": "not ready, stopping, too many requests at once, no picture can be decoded, or the worker was lost",
    "out_of_memory": "the edit did not fit",
    "deadline": "it took longer than it may",
}


def limits_table() -> str:
    rows = [f"| `--{one.name.replace('_', '-')}` | {one.default} | {one.metadata['doc']} |" for one in fields(Limits)]
    return "\n".join(["| option | default | what |", "| --- | --- | --- |", *rows])


def codes_table() -> str:
    rows = [f"| {status} | `{code}` | {MEANING[code]} |" for code, status in STATUS.items()]
    return "\n".join(["| status | code | what |", "| --- | --- | --- |", *rows])


@pytest.fixture(scope="module")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("table", [limits_table, codes_table])
def test_limits_and_codes_are_those_of_the_code(document, table):
    assert table() in document, f"docs/service.md lacks\n{table()}"


def test_every_path_is_there_and_no_other(document):
    told = set(re.findall(r"`(?:GET |POST |DELETE )?(/(?:v1|v2|metrics)[^`?]*)`", document))
    assert told == set(create_app(None).openapi()["paths"])


def test_every_metric_is_there_and_no_other(document):
    text = Metrics().text(Stats(), 0).decode()
    made = set(re.findall(r"^# TYPE (ddengine_\w+) (?:counter|gauge|histogram)$", text, re.M))
    assert set(re.findall(r"`(ddengine_\w+)`", document)) == {one for one in made if not one.endswith("_created")}


def test_the_shipped_configuration_lets_edits_end_by_themselves():
    """Ray's own time limit would cut those that are longer once deadline_s is raised, and answer in its own words."""
    text = (ROOT / "examples" / "serve" / "config.yaml").read_text(encoding="utf-8")
    assert "deadline_s:" in text and not re.search(r"^ *request_timeout_s:", text, re.M)


def test_its_commands_run(document, tmp_path):
    """The curl lines, as they stand but for the address, against a service without Ray."""
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("no curl or no bash")
    (script,) = re.findall(r"```sh\n(.*?)```", document, re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with running() as service:
        script = script.replace("http://127.0.0.1:8000", service.url)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    pictures = {}
    for name in ("out", "again", "async"):
        with Image.open(tmp_path / f"{name}.png") as image:
            pictures[name] = image.tobytes()
    assert len(set(pictures.values())) == 3
    assert "event: progress" in done.stdout and "event: done" in done.stdout
    assert '"state":"done"' in done.stdout and '"ready":true' in done.stdout
