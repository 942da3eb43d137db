"""List where a bundle can run from here, and what is missing where it cannot.

examples
  edgerun devices
  edgerun devices --device ssh:raspberrypi.local      is this board ready?
"""

from __future__ import annotations

import argparse
import dataclasses

from edgerun.commands.common import CHECK_FAILED, GOOD, Tools, add_output_options, begin_report, describe_facts, emit
from edgerun.report import Column, Table

SUMMARY = "where a bundle can run from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun devices`."""
    parser.add_argument("--device", action="append", metavar="D", help="ask only this device; may be repeated")
    add_output_options(parser, html=False)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun devices`."""
    from edgerun.devices import LOCAL_DEVICES, list_devices

    states = list_devices(tuple(arguments.device or LOCAL_DEVICES))
    rows = [(s.name, s.missing is None, s.missing or describe_facts(s.facts)) for s in states]
    columns = (Column("device"), Column("ready"), Column("what it is, or what it lacks"))
    note = (
        "A board over ssh: --device ssh:HOST[:PORT]; it needs Linux on arm64 or x86-64 and a login without a password."
    )
    report = begin_report("devices", "edgerun devices", tools.command)
    emit(dataclasses.replace(report, tables=(Table("", columns, tuple(rows), note),)), arguments)
    asked_for = arguments.device is not None
    return CHECK_FAILED if asked_for and any(state.missing for state in states) else GOOD
