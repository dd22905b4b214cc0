"""The command that copies a version out of the store, as it is or as an engine takes it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moeflow.cli.common import Engine, Json, Ref, Url, asking, command, print_json, reading, working
from moeflow.report import about as abouts
from moeflow.report import card, profile, summary
from moeflow.run import original, pulling
from moeflow.run.words import count, size


@command()
def pull(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty folder")],
    dense: Annotated[bool, typer.Option("--dense", help="multiply low-rank matrices out, for engines without a kernel")] = False,
    engine: Engine = "",
    converter: Annotated[
        Path | None, typer.Option("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py: also write model.gguf")
    ] = None,
    masked: Annotated[
        bool, typer.Option("--profile", help="the original instead, and files that say which experts stay, for engines that mask")
    ] = False,
    store: Url = "",
    json: Json = False,
) -> None:
    """Copy a version's files into a folder that transformers, or an --engine, loads, with a model card and its recipe."""
    with asking():
        if masked and (dense or engine or converter):
            raise ValueError("--profile writes the original, so that --dense, --engine and --converter have no meaning with it")
        if converter and engine != "llama.cpp":
            raise ValueError("--converter is llama.cpp's: add --engine llama.cpp")
        if converter and not converter.is_file():
            raise FileNotFoundError(f"--converter {converter}: there is no such file; it lies in llama.cpp's own folder")
        opened = reading(store)
        about = abouts.of(opened, ref)
        key = about.key
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise FileExistsError(f"{folder} is not empty; name a folder that does not exist yet")
        manifest = opened.manifest(key)
        wanted = pulling.Wanted.of(opened, key, engine, dense=dense) if engine else pulling.Wanted(dense=dense)
        profiles = profile.of(about) if masked else {}
        if converter:
            pulling.check_tokenizer(opened, key, converter)
        source = original.pinned(about.model, about.sources[about.model]) if masked else None
    if source is not None:
        with working():
            brought = original.bring(source, folder)
            for name, text in profiles.items():
                (folder / name).write_text(text)
        if json:
            print_json({"key": key, "folder": str(folder.absolute()), "bytes": brought, "profiles": [*profiles]})
        else:
            print(f"{folder}: the original, {size(brought)}, and {' and '.join(profiles)}, which say which experts stay")
        return
    with working():
        made = pulling.pull(opened, key, folder, wanted)
        described = card.describe(about, folder, dense=bool(made.get("dense", {}).get("matrices")))
        if converter:
            made |= {"gguf": pulling.converted(folder, converter)}
    if json:
        pulled = {"key": key, "folder": str(folder.absolute()), "files": len(manifest.files), "bytes": manifest.bytes}
        print_json(pulled | {"described": described} | made)
        return
    product = made.get("dense") or {}
    weights, grown = summary.listed(about)["weights"], product.get("after", 0) - product.get("before", 0)
    held = f", of which {size(weights + grown)} are weights" if weights else ""
    print(f"{folder}: {count(len(manifest.files), 'file')}, {size(manifest.bytes + grown)}{held}, from {key}")
    if described:
        print(f"{' and '.join(described)} say what it is, and make it again")
    for line in _said(made, wanted, folder):
        print(line)


def _said(made: dict[str, Any], wanted: pulling.Wanted, folder: Path) -> list[str]:
    """What was done to the pulled files, and how an engine takes them."""
    lines, product = [], made.get("dense")
    if product and product["matrices"]:
        unpacked = f", {count(product['unpacked'], 'packed one')} unpacked for that" if product["unpacked"] else ""
        lines.append(
            f"{product['matrices']:,} low-rank matrices multiplied out{unpacked}: all weights take "
            f"{size(product['after'])} where they took {size(product['before'])}, and run no faster than what was never cut"
        )
    elif product and not wanted.engine:
        lines.append("no matrix is low-rank: there was nothing to multiply out")
    if wanted.engine:
        lines.append(f"{wanted.engine.name} keeps {size(made['engine']['resident'])} of weights in memory: {wanted.start(folder)}")
    if made.get("gguf"):
        loss = "; experts are unpacked in it, and llama-quantize packs them in forms of its own"
        lines.append(f"{made['gguf']['file']}: {size(made['gguf']['bytes'])}" + loss * wanted.packed)
    return lines
