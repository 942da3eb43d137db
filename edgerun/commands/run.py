"""Generate text or a clip with a bundle, on this machine or on a device.

examples
  edgerun run text.edgerun --prompt "def main():"
  edgerun run text.edgerun --prompt-file question.txt --max-new-tokens 32 --json
  edgerun run text.edgerun --prompt "Hello" --device emulated-arm64
  edgerun run text.edgerun --prompt "Hello" --temperature 0.8 --top-p 0.95 --seed 7 --stream
  edgerun run clip.edgerun --prompt "a red circle moves left" -o clip.mp4 --memory-limit 1GB --seed 7
  edgerun run clip.edgerun --prompt "a red circle moves left" -o clip.gif --device ssh:raspberrypi.local
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable

from edgerun.commands import video
from edgerun.commands.common import GOOD, Tools, add_output_options, begin_report, byte_size, emit, positive
from edgerun.commands.measure import Timing, encode_prompt, timing, timing_of_session
from edgerun.errors import EdgerunError
from edgerun.report import Column, Table

SUMMARY = "a bundle writes on from a prompt, or makes its clip"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun run`."""
    defaults = Sampling()
    parser.add_argument("bundle", type=pathlib.Path, metavar="BUNDLE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", type=pathlib.Path, metavar="F", help="a UTF-8 text file; - reads stdin")
    parser.add_argument(
        "--device", default="host", metavar="D", help="host, emulated-arm64 or ssh:HOST[:PORT]; default: %(default)s"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=defaults.max_new_tokens, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0 takes the likeliest token; default: %(default)s",
    )
    parser.add_argument(
        "--top-k", type=int, default=defaults.top_k, metavar="K", help="only the K likeliest tokens; 0: all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="only the likeliest tokens that make up P; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one per performance core")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come (on the host)")
    parser.add_argument(
        "--memory-limit", type=byte_size, metavar="SIZE", help="for all of the process in RAM, as 1GB (video)"
    )
    video.add_run_options(parser)
    add_output_options(parser, html=False)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun run`."""
    if _is_video(arguments.bundle):
        return video.run(arguments, tools, _prompt(arguments), arguments.memory_limit)
    of_video = ("output", "memory_limit", "steps", "solver", "lpl", "tdtm", "guidance", "state")
    if given := [name for name in of_video if getattr(arguments, name) is not None]:
        raise EdgerunError(f"{arguments.bundle} writes text: --{given[0].replace('_', '-')} is for video bundles")
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)})
    if arguments.stream and (arguments.device != "host" or arguments.json):
        raise EdgerunError("--stream prints text on the host: leave out --device and --json, or --stream")
    on_text = _print_now if arguments.stream else None
    text, measured = generate_text(
        arguments.bundle,
        _prompt(arguments),
        sampling,
        device=arguments.device,
        threads=arguments.threads,
        on_text=on_text,
    )
    if not arguments.json:
        print(text if on_text is None else "")
        print(_summary(measured), file=sys.stderr)
        return GOOD
    report = begin_report("run", f"edgerun run: {arguments.bundle}", tools.command)
    return emit(dataclasses.replace(report, facts=(("text", text),), tables=(_table(measured),)), arguments)


def _is_video(path: pathlib.Path) -> bool:
    from edgerun.bundle import kind_of

    return kind_of(path) == "video"


def generate_text(
    bundle_path: pathlib.Path,
    prompt: str,
    sampling: Sampling,
    *,
    device: str = "host",
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> tuple[str, Timing]:
    """Continue `prompt`; the text and what it cost. on_text gets whole characters as they come (host only).

    Raises BundleError, DeviceError, or EdgerunError for a prompt that is empty or does not fit the context.
    """
    from edgerun.bundle import Bundle

    bundle = Bundle.open(bundle_path)
    tokenizer = bundle.tokenizer()
    context = int(bundle.manifest["context"]["max_context"])
    ids = encode_prompt(tokenizer, prompt, context)
    room = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context - len(ids)))
    if on_text is not None:
        from edgerun.sessions.text import TextSession

        written = _WholeCharacters(lambda tokens: str(tokenizer.decode(tokens)), on_text)
        session = TextSession(bundle_path, threads=threads)
        generation = session.generate(ids, on_token=written.add, **dataclasses.asdict(room))
        written.finish()
        return generation.text, timing_of_session(generation.stats)
    from edgerun.devices import RunRequest, open_device

    request = RunRequest(prompt=tuple(ids), threads=threads, **dataclasses.asdict(room))
    result = open_device(device).run(bundle_path, request)
    return str(tokenizer.decode(result.tokens)), timing(result.values)


class _WholeCharacters:
    """Turns tokens into text as they come, holding back a character whose last byte is still to come."""

    def __init__(self, decode: Callable[[list[int]], str], on_text: Callable[[str], None]) -> None:
        self._decode, self._on_text = decode, on_text
        self._tokens: list[int] = []
        self._said = 0

    def add(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._on_text(text[self._said :])
            self._said = len(text)

    def finish(self) -> None:
        """Say what was held back."""
        self._on_text(self._decode(self._tokens)[self._said :])


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        return str(arguments.prompt)
    try:
        if str(arguments.prompt_file) == "-":
            return sys.stdin.read()
        return str(arguments.prompt_file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise EdgerunError(
            f"{arguments.prompt_file} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def _summary(measured: Timing) -> str:
    decode = measured.decode_s_per_token
    parts = [
        f"{measured.prompt_tokens:,} prompt tokens in {measured.prefill_s:.2f} s",
        f"{measured.generated_tokens} tokens" + ("" if decode is None else f" at {decode * 1e3:.1f} ms each"),
    ]
    if measured.density is not None:
        parts.append(f"attended {100 * measured.density:.1f} % of all pairs")
    if measured.peak_rss_bytes is not None:
        parts.append(f"peak RSS {measured.peak_rss_bytes / 2**20:.0f} MiB")
    return "[" + ", ".join(parts) + "]"


def _table(measured: Timing) -> Table:
    columns = (
        Column("prompt", "tokens"),
        Column("generated", "tokens"),
        Column("load", "s", 2),
        Column("prefill", "s", 3),
        Column("decode", "ms/token", 2),
        Column("peak RSS", "MiB", 0),
        Column("density", "%", 1),
    )
    decode, rss, density = measured.decode_s_per_token, measured.peak_rss_bytes, measured.density
    row = (
        measured.prompt_tokens,
        measured.generated_tokens,
        measured.load_s,
        measured.prefill_s,
        None if decode is None else decode * 1e3,
        None if rss is None else rss / 2**20,
        None if density is None else 100 * density,
    )
    return Table("The run", columns, (row,))
