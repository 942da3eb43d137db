"""The command line: `edgerun VERB …`. Verbs stand in edgerun/commands; here is what they share: parsing and errors.

Exit status: 0 good, 1 a check failed, 2 bad usage or input, 130 interrupted, 128 + N ended by signal N. An error is one
or two lines on stderr; `--debug` shows where it came from. The only module that imports edgerun.export, and only for a
verb that asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn, cast

from edgerun import __version__
from edgerun.commands.common import BAD_INPUT, INTERRUPTED, Exporter, Tools, quoted
from edgerun.errors import EdgerunError
from edgerun.library_noise import quiet_libraries

VERBS = ("demo", "calibrate", "export", "run", "validate", "bench", "eval", "inspect", "devices", "doctor")
_EPILOG = """\
begin with
  edgerun doctor                                        is everything there?
  edgerun demo                                          the whole way on a model that ships, in a few minutes
  edgerun demo video                                    captions become clips, plain and with every technique
  edgerun export zoo:text -o text.edgerun               a checkpoint becomes a bundle
  edgerun run text.edgerun --prompt "def main():"       the bundle writes on
  edgerun validate text.edgerun                         does it compute what its model computes?

exit status: 0 good, 1 a check failed, 2 bad usage or input
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with an error in one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit status. argv: without the program's name; None: this process's."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    if not arguments.debug:
        quiet_libraries()
    try:
        with _clean_end_by_signal():
            status: int = arguments.verb.run(arguments, Tools(_load_exporter, quoted(argv)))
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print("edgerun: interrupted; nothing half-written is left", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone, as in `edgerun … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD_INPUT
    except Exception as error:
        if arguments.debug:
            raise
        print(f"edgerun {arguments.verb_name}: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT


@contextlib.contextmanager
def _clean_end_by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as they would, with status 128 + their number, but not before what was begun
    is removed. One that the caller ignores or handles, as nohup does, stays so.
    """

    def end(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for one in taken:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


class _VerbsFormatter(argparse.RawDescriptionHelpFormatter):
    """Room for the longest verb beside its help: argparse does not count that verbs are indented once more."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            self._action_max_length += self._indent_increment


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="edgerun",
        description="A pretrained model in, a bundle for a phone or an edge board out, proven to compute the same.",
        epilog=_EPILOG,
        formatter_class=_VerbsFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgerun {__version__}")
    verbs = parser.add_subparsers(dest="verb_name", metavar="VERB", required=True, parser_class=_Parser)
    for name in VERBS:
        verb: Any = importlib.import_module(f"edgerun.commands.{name}")
        sub = verbs.add_parser(
            name,
            help=verb.SUMMARY,
            description=verb.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show where an error came from")
        sub.set_defaults(verb=verb)
    return parser


def _load_exporter() -> Exporter:
    try:
        return cast(Exporter, importlib.import_module("edgerun.export"))
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "edgerun":
            raise
        raise EdgerunError(f"export needs the package {error.name!r}: pip install 'edgerun[export]'") from error


def _one_line(error: Exception) -> str:
    """What went wrong, for a person. Errors of our own say it themselves; the system's get the path and a next step."""
    if isinstance(error, EdgerunError):
        return str(error)
    if isinstance(error, OSError):
        where = f": {os.fspath(error.filename)!r}" if error.filename is not None else ""
        return f"{error.strerror or error}{where}{_NEXT_STEP.get(error.errno or 0, '')}"
    if isinstance(error, MemoryError):
        return "out of memory: lower --max-context or --prefill-slice, or quantize; `export --dry-run` shows what fits"
    detail = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {detail[:300]}; --debug shows where, please report it"


_NEXT_STEP = {
    errno.ENOSPC: "; make room or write elsewhere, nothing half-written is left",
    errno.EROFS: "; write to a place that is not read-only",
    errno.EACCES: "; choose a place that you may write to and files that you may read",
    errno.ENOENT: "; check the path",
}

if __name__ == "__main__":
    sys.exit(main())
