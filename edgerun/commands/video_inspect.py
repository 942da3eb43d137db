"""What `edgerun inspect` says of a video bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgerun.commands.video import leap_text, merge_text, sampler_text
from edgerun.report import Cell, Column, Table

_ELEMENT_BYTES = {"float32": 4, "int64": 8, "bool": 1}


def video_facts(manifest: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """The clip, how it is sampled, and what a run needs."""
    video = manifest["video"]
    latent = " x ".join(str(video["latent"][name]) for name in ("channels", "frames", "height", "width"))
    sizes = program_bytes(manifest)
    largest = max(sizes, key=lambda name: sizes[name])
    facts: list[tuple[str, Cell]] = [
        ("clip", f"{video['frames']} frames of {video['height']} x {video['width']}, {video['fps']:g} a second"),
        ("latent", latent),
        ("prompt", f"at most {manifest['tokens']['max_prompt_tokens']} tokens"),
        ("sampler", sampler_text(video)),
        ("techniques", f"LPL {leap_text(video['leap'])}, {merge_text(video)}"),
        ("largest program", f"{largest}, {sizes[largest] / 2**20:.2f} MiB"),
        (
            "least memory",
            f"{least_memory_bytes(manifest) / 2**20:.1f} MiB for a program, values and planned activations, besides "
            "what the process takes without a model",
        ),
        ("golden case", "yes" if manifest["golden"] else "none: `edgerun validate` has nothing to check"),
    ]
    if parity := manifest.get("parity"):
        worst = max(parity, key=lambda name: float(parity[name]))
        facts.append(("parity", f"relative L2 of every program at most {parity[worst]:.2g} ({worst})"))
    return facts


def video_tables(manifest: Mapping[str, Any]) -> list[Table]:
    """The chains, and their programs one by one."""
    programs = {program["name"]: program for program in manifest["programs"]}
    sizes, parity = program_bytes(manifest), manifest.get("parity", {})
    chains, rows = [], []
    for chain, names in manifest["chains"].items():
        distinct = list(dict.fromkeys(names))
        total, most = sum(sizes[name] for name in distinct), max(sizes[name] for name in distinct)
        chains.append((chain, len(names), total / 2**20, most / 2**20))
        for name in distinct:
            operators = ", ".join(programs[name]["operators"]) or "none"
            planned = programs[name].get("planned_bytes")
            row: tuple[Cell, ...] = (
                chain,
                name,
                sizes[name] / 2**20,
                None if planned is None else planned / 2**20,
                programs[name]["target"],
                operators,
                parity.get(name),
            )
            rows.append(row)
    size = Column("size", "MiB", 2)
    return [
        Table("Chains", (Column("chain"), Column("programs"), size, Column("largest", "MiB", 2)), tuple(chains)),
        Table(
            "Programs",
            (
                Column("chain"),
                Column("program"),
                size,
                Column("planned", "MiB", 2),
                Column("target"),
                Column("own operators"),
                Column("error", "relative L2"),
            ),
            tuple(rows),
        ),
    ]


def program_bytes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Size of every program's file, by its name."""
    return {program["name"]: manifest["files"][program["file"]]["bytes"] for program in manifest["programs"]}


def least_memory_bytes(manifest: Mapping[str, Any]) -> int:
    """What the chain that needs most has in memory at least, with none of its programs loaded ahead.

    Its largest program while it loads, as the file's pages and packed; the values that its programs hand on, at their
    largest; their planned activations; what XNNPACK takes while they execute; and in the decoders the clip itself with
    every picture between the two.
    """
    programs = {program["name"]: program for program in manifest["programs"]}
    sizes = program_bytes(manifest)
    needs = []
    for chain, names in manifest["chains"].items():
        entries = [programs[name] for name in names]
        values: dict[str, int] = {}
        for value in (one for entry in entries for one in (*entry["inputs"], *entry["outputs"])):
            values[value["name"]] = max(values.get(value["name"], 0), _value_bytes(value))
        clip = _clip_bytes(manifest) if chain.endswith("_decoder") else 0
        planned, arena = (
            max(int(entry.get(name, 0)) for entry in entries) for name in ("planned_bytes", "arena_bytes")
        )
        loading = max(sizes[one["name"]] + max(sizes[one["name"]], int(one.get("table_bytes", 0))) for one in entries)
        needs.append(loading + sum(values.values()) + planned + arena + clip)
    return max(needs)


def _clip_bytes(manifest: Mapping[str, Any]) -> int:
    """A clip's pixels, and what the frames' decoder is handed: it stays until the clip is complete."""
    video, programs = manifest["video"], {program["name"]: program for program in manifest["programs"]}
    (pictures,) = (
        value for value in programs[manifest["chains"]["frame_decoder"][0]]["inputs"] if value["name"] == "pictures"
    )
    one = int(math.prod(pictures["shape"][1:])) * _ELEMENT_BYTES[pictures["dtype"]]
    return int(video["frames"]) * (3 * int(video["height"]) * int(video["width"]) + one)


def _value_bytes(value: Mapping[str, Any]) -> int:
    limits = value.get("limits", {})
    shape = [size if isinstance(size, int) else limits[size][1] for size in value["shape"]]
    return math.prod(shape) * _ELEMENT_BYTES[value["dtype"]]
