"""List where a bundle can run from here, and what is missing where it cannot.

examples
  edgerun devices
  edgerun devices --device ssh:raspberrypi.local      is this board ready?
"""

from __future__ import annotations

import argparse
import dataclasses

from edgerun.commands.common import CHECK_FAILED, GOOD, Tools, add_output_options, begin_report, emit
from edgerun.errors import DeviceError
from edgerun.report import Column, Table

SUMMARY = "where a bundle can run from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun devices`."""
    parser.add_argument("--device", action="append", metavar="D", help="ask only this device; may be repeated")
    add_output_options(parser, html=False)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun devices`."""
    rows = [probe(name) for name in arguments.device or ("host", "emulated-arm64")]
    columns = (Column("device"), Column("ready"), Column("what it is, or what it lacks"))
    note = (
        "A board over ssh: --device ssh:HOST[:PORT]; it needs Linux on arm64 or x86-64 and a login without a password."
    )
    report = begin_report("devices", "edgerun devices", tools.command)
    emit(dataclasses.replace(report, tables=(Table("", columns, tuple(rows), note),)), arguments)
    asked_for = arguments.device is not None
    return CHECK_FAILED if asked_for and not all(ready for _, ready, _ in rows) else GOOD


def probe(name: str) -> tuple[str, bool, str]:
    """(name, whether it can run a bundle now, what it is or what it lacks)."""
    from edgerun.devices import open_device

    try:
        facts = open_device(name).describe()
    except DeviceError as error:
        return name, False, str(error)
    return name, True, ", ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, "", []))
