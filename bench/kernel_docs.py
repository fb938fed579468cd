"""The tables of docs/kernels.md out of the results in bench/results; a test holds the page to them.

`python -m ddengine.bench.kernel_docs` in a checkout compiles all kernels by the installed Triton (and by the one in
`$DDENGINE_OTHER_TRITON`), keeps the report and writes the tables anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ddengine.bench.compile_report import compared
from ddengine.bench.kernels import ratios

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
COMPILED, TIMED = (ROOT / "bench" / "results" / f"kernels-{name}.json" for name in ("compile", "cpu"))
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """Every table of the page by its name."""
    compiled, timed = (json.loads(path.read_text(encoding="utf-8")) for path in (COMPILED, TIMED))
    return {"compiled": compared(compiled), "loops": ratios(timed["loop_form"]), "machine": machine(timed)}


def machine(timed: dict[str, Any]) -> str:
    """Where and how the loops were timed, in a sentence."""
    facts, clock = timed["machine"], timed["loop_form"][0]["times"]["loops"]["clock"]
    commit = facts["commit"][:12] + (" and changes" if facts["dirty"] else "")
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    return (
        f"{facts['processor']}, {threads} on {facts['cores']} cores, Python {facts['python']}, torch {facts['torch']}, "
        f"commit {commit}; clock: {clock}."
    )


def page(text: str) -> str:
    """The page with its tables as they should be."""
    found = tables()
    return TABLE.sub(lambda match: match[1] + found[match[2]] + match[3], text)


def compile_anew() -> None:
    """Compile by each Triton in a process of its own, and keep the report."""
    answers = {}
    for folder in filter(None, [os.environ.get("DDENGINE_OTHER_TRITON"), "."]):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if folder != ".":
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, environment.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "ddengine", "bench", "kernels", "--compile", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        answer = json.loads(done.stdout)
        answers[answer["triton"]] = answer["kernels"]
    COMPILED.parent.mkdir(exist_ok=True)
    lines = [
        f" {json.dumps(version)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for version, rows in answers.items()
    ]
    COMPILED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    compile_anew()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {COMPILED} and {PAGE}")
