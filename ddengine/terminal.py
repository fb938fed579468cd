"""How commands take options and give answers: option types, JSON or text, messages, exit codes.

Exit codes: 0 success, 2 bad input (one line on stderr says what and how to put it right), 130 stopped by the user.
With --json, stdout holds one JSON object and nothing else: the answer, or {"error": {"type", "message"}}.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from ddengine.drags import Drag
from ddengine.errors import Cancelled, DDEngineError, InputError

Answer = tuple[dict[str, Any], str]  # what --json prints, and what people read

BAD_INPUT = 2
STOPPED = 130  # what shells report for Ctrl-C


class Commands(click.Group):
    """The whole command, whose usage errors are answered like all others: one line, and JSON with --json."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse and run a command line, and leave Python with its exit code."""
        words = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(BAD_INPUT)
        except click.UsageError as error:
            see = f"; see {error.ctx.command_path} --help" if error.ctx else ""
            message = error.format_message().removesuffix(".")
            _fail(InputError(f"{message}{see}"), BAD_INPUT, "--json" in words, error)
        except click.Abort as error:
            _fail(Cancelled("stopped"), STOPPED, "--json" in words, error)
        sys.exit(code if isinstance(code, int) else 0)


def answering(function: Callable[..., Answer]) -> Callable[..., None]:
    """Give a command --json, -q and -v, print its answer, and turn errors into messages and exit codes.

    A command with a parameter `progress` is told whether to show a bar: only to someone who watches.
    """
    watched = "progress" in inspect.signature(function).parameters

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress bar and no text but errors.")
    @click.option("-v", "--verbose", count=True, help="Log what happens (-vv: in detail).")
    @functools.wraps(function)
    def command(as_json: bool, quiet: bool, verbose: int, **options: Any) -> None:
        level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
        logging.basicConfig(level=logging.ERROR if quiet else level, format="%(levelname)s %(name)s: %(message)s")
        if watched:
            options["progress"] = not quiet and sys.stderr.isatty()
        try:
            facts, text = function(**options)
        except (KeyboardInterrupt, Cancelled) as error:
            _fail(Cancelled("stopped"), STOPPED, as_json, error)
        except DDEngineError as error:
            _fail(error, BAD_INPUT, as_json, error)
        if as_json:
            click.echo(json.dumps(facts, default=_plain))
        elif not quiet:
            click.echo(text)

    return command


def _fail(error: Exception, code: int, as_json: bool, cause: BaseException) -> NoReturn:
    message = " ".join(str(error).split())  # one line, whatever a library put into it
    click.echo(f"ddengine: {message}", err=True)
    if as_json:
        click.echo(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
    raise SystemExit(code) from cause


def _plain(value: Any) -> Any:
    """Arrays, tensors, paths and records as JSON can hold them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    return str(value)


class DragType(click.ParamType):
    """X0,Y0:X1,Y1 -> Drag; whether its points lie inside is known once the picture is read."""

    name = "X0,Y0:X1,Y1"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Drag:
        if isinstance(value, Drag):
            return value
        try:
            (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in value.split(":"))
        except ValueError:
            self.fail(f"{value!r} is not X0,Y0:X1,Y1, for example 153,445:210,443", param, ctx)
        return Drag((x0, y0), (x1, y1))


class SettingType(click.ParamType):
    """FIELD=VALUE -> (field, value as text); the configuration knows what is allowed."""

    name = "FIELD=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        field, equals, text = value.partition("=")
        if not equals or not field.strip():
            self.fail(f"{value!r} is not FIELD=VALUE, for example r2=16", param, ctx)
        return field.strip(), text.strip()


EDIT_EXAMPLES = (
    "ddengine edit cat.png --drag 153,445:210,443 -o out.png",
    "ddengine edit cat.png --drag 60,90:60,70 --drag 90,90:90,70 --config fast -o out.png",
    "ddengine edit cat.png --drag 60,90:60,70 --set r2=16 --set preserve=off -o out.png --json",
    "ddengine edit cat.png --drag 60,90:60,70 -o out.png --save-recipe edit.json",
    "ddengine edit cat.png --from edit.json -o again.png",
)


class EditCommand(click.Command):
    """`edit`, whose help ends with examples and with every setting of the configuration."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ddengine.config import PRESETS, RULES, DirectDragConfig

        with formatter.section("Examples"):
            for example in EDIT_EXAMPLES:  # not wrapped: to be copied
                formatter.write(f"  {example}\n")
        with formatter.section(f"Presets (--config): {', '.join(PRESETS)}; settings (--set) and their defaults"):
            preset = DirectDragConfig.preset()
            formatter.write_dl(
                [
                    (f"{name}={_shown(getattr(preset, name))}", f"{rule.doc} ({rule.describe()})")
                    for name, rule in RULES.items()
                ]
            )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps ...")
# What both NumPy and torch take.
seed_option = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that run a model: where and how."""
    options = (
        click.option(
            "--backend",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "eager", "compile", "onnxruntime", "tensorrt"]),
            help="What runs the networks; auto takes the best that works here.",
        ),
        device_option,
        click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    )
    for option in reversed(options):
        function = option(function)
    return function
