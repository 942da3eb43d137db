"""Peak memory of exporting a 1B model, and of running what comes out. Each runs in a process of its own.

    python bench/workloads/export_memory.py --work FOLDER --quantize 8da4w [--layers 16] [--max-context 4096]

Makes a random checkpoint in Llama 3.2 1B's shape (make_checkpoint.py), exports it, fills the bundle's whole context
through edgerun-runner, and writes one JSON with raw figures, machine, commit and command to bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

from edgerun.bundle import Bundle
from edgerun.devices import RunRequest, open_device

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from make_checkpoint import LlamaShape, make_checkpoint

_RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
_NEW_TOKENS = 8


def export_in_child(checkpoint: pathlib.Path, out: pathlib.Path, options: list[str]) -> dict[str, Any]:
    """Run `edgerun export`; its peak resident memory (bytes, the kernel's VmHWM of that process) and seconds."""
    code = (
        "import sys; from edgerun.cli import main; status = main(sys.argv[1:]); "
        "peak = next(l for l in open('/proc/self/status') if l.startswith('VmHWM')); "
        "print('peak_kib', peak.split()[1]); sys.exit(status)"
    )
    begin = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", code, "export", str(checkpoint), "-o", str(out), "--overwrite", *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak = next(line for line in child.stdout.splitlines() if line.startswith("peak_kib"))
    return {"peak_rss_bytes": int(peak.split()[1]) * 1024, "seconds": time.monotonic() - begin}


def run_bundle(path: pathlib.Path) -> dict[str, Any]:
    """Fill the bundle's context and generate a few tokens: peak memory against the manifest's plan."""
    bundle = Bundle.open(path)
    length = bundle.manifest["context"]["max_context"] - _NEW_TOKENS
    prompt = tuple((7919 * position) % 256 for position in range(length))
    report = open_device("host").run(path, RunRequest(prompt=prompt, max_new_tokens=_NEW_TOKENS, stop_ids=()))
    peak, plan = report.values["peak_rss_bytes"], bundle.manifest["memory_plan"]["peak_rss_bytes"]
    return {
        "prompt_tokens": length,
        "generated": report.values["tokens"],
        "peak_rss_bytes": peak,
        "planned_rss_bytes": plan,
        "measured_over_planned": peak / plan,
        "stats": report.values["stats"],
    }


def measure(work: pathlib.Path, quantize: str, max_context: int, shape: LlamaShape) -> dict[str, Any]:
    """The whole record: checkpoint, export and run."""
    checkpoint = work / f"llama-{shape.layers}-layers"
    weights = make_checkpoint(checkpoint, shape)
    out = work / f"llama-{shape.layers}-layers-{quantize}.edgerun"
    options = ["--quantize", quantize, "--max-context", str(max_context)]
    exported = export_in_child(checkpoint, out, options)
    files = Bundle.open(out).manifest["files"]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": ["bench/workloads/export_memory.py", *sys.argv[1:]],
        "machine": {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()},
        "checkpoint_bytes": weights,
        "quantize": quantize,
        "max_context": max_context,
        "layers": shape.layers,
        "program_bytes": files["programs/text.pte"]["bytes"],
        "export": exported,
        "run": run_bundle(out),
    }


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder outside the repository, 20 GB free")
    parser.add_argument("--quantize", choices=("none", "int8", "8da4w"), default="8da4w")
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--results", type=pathlib.Path, default=_RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    record = measure(arguments.work, arguments.quantize, arguments.max_context, LlamaShape(layers=arguments.layers))
    arguments.results.mkdir(exist_ok=True)
    path = arguments.results / f"export_memory_{arguments.layers}_layers_{arguments.quantize}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["export"]), json.dumps(record["run"]), path)


if __name__ == "__main__":
    main()
