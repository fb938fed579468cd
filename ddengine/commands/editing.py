"""Commands that edit pictures: edit, prepare, demo."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddengine.commands.engine_choice import EngineChoice, choosing_engine
from ddengine.commands.options import FILE, build_option, prompt_option, size_option, weights_options
from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.terminal import (
    Answer,
    DragType,
    EditCommand,
    SettingType,
    answering,
    engine_options,
    seed_option,
)

if TYPE_CHECKING:
    from ddengine.recipe import Recipe


@click.command(cls=EditCommand)
@click.argument("image", type=FILE)
@click.option(
    "--drag",
    "drags",
    type=DragType(),
    multiple=True,
    help="Move what is at the first point to the second; pixels, x right, y down. Repeatable; one is needed.",
)
@click.option(
    "--from",
    "replayed",
    metavar="FILE.json",
    type=FILE,
    help="Make the edit of such a file instead, to the same pixels; IMAGE has to be the picture it was made for. What "
    "is edited and how is the file's own, so --drag, --mask, --prompt, --config, --set, --seed and the like are "
    "refused beside it; options of model, backend, device and dtype given beside it count in place of the file's.",
)
@click.option("--save-recipe", metavar="FILE.json", type=FILE, help="Write the edit to such a file, for --from.")
@click.option("-o", "--output", type=FILE, required=True, help="Picture to write; its suffix is its format.")
@click.option("--mask", type=FILE, help="Picture of the same size: white may change, black stays.")
@prompt_option
@weights_options
@size_option
@click.option("--identity", is_flag=True, help="First fit a LoRA to IMAGE, so that the model knows what it shows.")
@click.option("--save-identity", type=FILE, help="Write that LoRA to this .safetensors file, for --lora.")
@click.option("--method", type=click.Choice(["directdrag"]), default="directdrag", show_default=True)
@engine_options
@build_option
@click.option(
    "--config",
    "preset",
    metavar="PRESET",
    help="Named configuration; see below. [default: default, or that of a prepared IMAGE]",
)
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@seed_option
@answering
@choosing_engine
def edit(
    image: Path,
    drags: tuple[Drag, ...],
    replayed: Path | None,
    save_recipe: Path | None,
    output: Path,
    mask: Path | None,
    prompt: str,
    identity: bool,
    save_identity: Path | None,
    method: str,
    preset: str | None,
    settings: tuple[tuple[str, str], ...],
    seed: int,
    progress: bool,
    choice: EngineChoice,
) -> Answer:
    """Edit IMAGE, a picture or what `ddengine prepare` made of one, by one or more drags."""
    from ddengine.artifacts import check_picture_path, check_tensors_path
    from ddengine.config import DirectDragConfig
    from ddengine.drags import parse_drags
    from ddengine.image import read_image
    from ddengine.recipe import Recipe, check_recipe_path, mask_png, picture_digest, read_recipe
    from ddengine.request import ANY_SIZE, checked_mask, spaces_for
    from ddengine.source_reader import SUFFIX, read_header

    # All that the user can have got wrong is found before the seconds that torch and the weights take.
    for given in (image, mask, replayed):
        for written, option in ((output, "-o"), (save_recipe, "--save-recipe")):
            if given is not None and written is not None and _same_file(given, written):
                raise InputError(f"{written} is the input itself; name another file with {option}")
    check_picture_path(output)
    recipe = None
    if replayed is not None:
        _refuse_beside_from()
        recipe = read_recipe(replayed)
        drags, prompt, method, seed = recipe.drags, recipe.prompt, recipe.method, recipe.seed
        choice = _choice_beside(choice, recipe)
    elif not drags:
        raise InputError("no drag was given; add --drag X0,Y0:X1,Y1, or --from FILE.json; see ddengine edit --help")
    if save_recipe is not None:
        check_recipe_path(save_recipe)
        if identity:
            raise InputError(
                f"--save-recipe {save_recipe} cannot hold the LoRA that --identity fits; fit it once with "
                f"--save-identity FILE.safetensors and edit with --lora FILE.safetensors"
            )
    if save_identity is not None:
        if not identity:
            raise InputError(f"--save-identity {save_identity} has nothing to save; add --identity")
        check_tensors_path(save_identity)
    made = read_header(image) if image.suffix == SUFFIX else None
    if made is not None and identity:
        raise InputError(
            f"--identity is fitted before a picture is prepared, and {image} is prepared; give the picture"
        )
    picture: Any = None if made else read_image(image)
    size = made.image_size if made else picture.size
    if recipe is not None and picture is not None:
        recipe.check_picture(picture)
    checked = parse_drags(drags, *size)
    area = recipe.area() if recipe is not None else checked_mask(mask, size)
    base = made.config if made and preset is None else DirectDragConfig.preset(preset or "default")
    config = recipe.config if recipe is not None else base.changed_from_strings(dict(settings))
    if picture is not None:
        spaces_for(picture, ANY_SIZE, config)

    from ddengine.source import Source

    started = time.perf_counter()
    engine = choice.load()
    loading = time.perf_counter() - started
    source = Source.load(image, device=engine.model.device) if made else None
    if recipe is not None and source is not None:
        recipe.check_picture(source.image)
    fitted, fitting = None, 0.0
    if identity:
        started = time.perf_counter()
        fitted = engine.fit_identity(picture, prompt=prompt, seed=seed, progress=progress)
        fitting = time.perf_counter() - started
        if save_identity is not None:
            fitted.save(save_identity)
    result = engine.edit(
        picture if source is None else source,
        checked,
        method=method,
        mask=area,
        prompt=prompt,
        config=config,
        identity=fitted,
        seed=seed,
        progress=progress,
    )
    result.save(output)
    if save_recipe is not None:
        shown = picture if source is None else source.image
        Recipe(
            image_size=shown.size,
            image_sha256=picture_digest(shown),
            drags=checked,
            config=config,
            prompt=prompt if source is None else source.prompt,
            seed=seed,
            mask=mask_png(area),
            method=method,
            **choice.named(),
        ).save(save_recipe)
    facts = {
        "output": str(output),
        "recipe": None if save_recipe is None else str(save_recipe),
        "size": list(result.image.size),
        "drags": [
            {
                "handle": drag.handle,
                "target": drag.target,
                "arrived": point,
                "distance": _distance(point, drag.target),
            }
            for drag, point in zip(checked, result.handles, strict=True)
        ],
        "model": choice.model,
        "method": method,
        "backend": result.backend,
        "config": config.to_dict(),
        "seed": seed,
        "timings": {
            **result.timings,
            **({"identity": fitting} if identity else {}),
            "load": result.timings["load"] + loading,
            "total": result.timings["total"] + loading + fitting,
        },
        "passes": result.passes,
        "history": result.history,
        "notes": result.notes,
    }
    return facts, _edit_text(facts)


@click.command()
@click.argument("image", type=FILE)
@click.option("-o", "--output", metavar="FILE.safetensors", type=FILE, required=True)
@prompt_option
@weights_options
@size_option
@engine_options
@build_option
@click.option(
    "--config",
    "preset",
    default="default",
    show_default=True,
    metavar="PRESET",
    help="Named configuration, as of edit.",
)
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@click.option(
    "--kv/--no-kv", default=True, show_default=True, help="Keep keys and values: most of the file, faster edits."
)
@answering
@choosing_engine
def prepare(
    image: Path,
    output: Path,
    prompt: str,
    preset: str,
    settings: tuple[tuple[str, str], ...],
    kv: bool,
    progress: bool,
    choice: EngineChoice,
) -> Answer:
    """Do for IMAGE all that no drag changes; `ddengine edit FILE.safetensors` then pays only for its drags."""
    from ddengine.artifacts import check_tensors_path
    from ddengine.config import DirectDragConfig
    from ddengine.image import read_image
    from ddengine.request import ANY_SIZE, spaces_for

    check_tensors_path(output)
    picture = read_image(image)
    config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))
    spaces_for(picture, ANY_SIZE, config)

    started = time.perf_counter()
    engine = choice.load()
    loading = time.perf_counter() - started
    source = engine.prepare(picture, prompt=prompt, config=config, progress=progress)
    source.save(output, kv=kv)
    written = output.stat().st_size
    facts = {
        "output": str(output),
        "size": list(picture.size),
        "bytes": {**source.nbytes._asdict(), "file": written},
        "model": choice.model,
        "config": config.to_dict(),
        "timings": {**source.timings, "load": loading, "total": time.perf_counter() - started},
        "passes": source.passes,
    }
    width, height = picture.size
    return facts, f"wrote {output} ({width} x {height}, {written / 2**20:.1f} MiB)"


# Parameters of `edit` that a file replayed by --from decides, with their options.
_DECIDED = {"drags": "--drag", "mask": "--mask", "prompt": "--prompt", "method": "--method", "preset": "--config",
            "settings": "--set", "seed": "--seed", "identity": "--identity"}  # fmt: skip


def _given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)


def _refuse_beside_from() -> None:
    if odd := [option for name, option in _DECIDED.items() if _given(name)]:
        raise InputError(
            f"{', '.join(odd)} cannot be given beside --from, whose file says what is edited and how; leave it out, or "
            f"make the edit anew without --from"
        )


def _choice_beside(choice: EngineChoice, recipe: Recipe) -> EngineChoice:
    """Model and place of a replayed edit: what was given beside --from, else the file's own."""
    own: dict[str, Any] = {"working_size": recipe.size}
    own |= {name: getattr(recipe, name) for name in ("model", "readout", "lora", "vae", "backend", "device", "dtype")}
    return replace(choice, **{name: value for name, value in own.items() if not _given(name)})


def _edit_text(facts: dict[str, Any]) -> str:
    width, height = facts["size"]
    lines = [f"wrote {facts['output']} ({width} x {height}) in {facts['timings']['total']:.1f} s"]
    lines += [
        "  ({:g}, {:g}) arrived at ({:.1f}, {:.1f}), ".format(*drag["handle"], *drag["arrived"])
        + "{:.1f} pixels from ({:g}, {:g})".format(drag["distance"], *drag["target"])
        for drag in facts["drags"]
    ]
    lines += [f"  note: {note}" for note in facts["notes"]]
    return "\n".join(lines)


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return float(((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5)


def _same_file(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


@click.command()
@click.option("-o", "--output", type=FILE, default="demo-out", show_default=True, help="Folder for the pictures.")
@engine_options
@answering
def demo(output: Path, backend: str, device: str, dtype: str, progress: bool) -> Answer:
    """Edit the bundled pictures with the embedded model: before, after, side by side.

    Needs no network, no GPU and no weights but those in the package.
    """
    from ddengine.demo import run

    shown = run(output, progress=progress, backend=backend, device=device, dtype=dtype)
    lines = [f"{item.name}: {item.side_by_side} ({item.seconds:.1f} s)" for item in shown]
    return {"examples": shown}, "\n".join([*lines, f"look at the pictures in {output.resolve()}"])
