r"""Text to calibrate the shipped model on, and other text to check the calibration by: needle documents and sources.

    python bench/calibration_documents.py --out calibration_text --seed 0
    edgerun calibrate zoo:text --text calibration_text/* --samples 8 -o zoo.calibration
    python bench/calibration_documents.py --out A --seed 1 --sources 0
    python bench/calibration_documents.py --out B --seed 1 --documents 0
    python bench/calibration_documents.py --out C --seed 1 --sources 0 --documents 12 --tasks vt
    python bench/calibration_documents.py --out D --seed 1 --sources 0 --documents 6 \
        --tasks niah_multikey_1 niah_single_3
    edgerun calibrate zoo:text --text A/* --samples 4 --check zoo.calibration       # B: --samples 8

These made bench/results/calibration_zoo_text.json and, of A to D, _other_seed, _other_sources, _variable_tracking and
_other_tasks.

A needle document is a RULER haystack with its question and the right answer, of 4,200 bytes, from a split of its own:
training and evaluation draw from others. The sources are those of this Python's standard library that zoo:text was not
trained on (edgerun/evaluation/held_out_text.py) and that have at least 9,000 bytes, drawn by the seed: even places for
even seeds, odd for odd, so two seeds next to each other share none.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from edgerun.evaluation import held_out_text, ruler
from edgerun.evaluation.sample import CALIBRATION_SPLIT

LENGTH = 4200  # tokens of a document
LEAST_BYTES = 9000  # of a source: two windows


def document(task: str, seed: int, index: int) -> str:
    """A haystack, its question and the right answer."""
    made = ruler.generate_document(task, LENGTH, seed, index, split=CALIBRATION_SPLIT)
    question = made.questions[0]
    return made.text + question.text + question.completion


def sources(seed: int, count: int) -> list[pathlib.Path]:
    """Held-out modules of the standard library. Raises ValueError when there are too few of a seed's parity."""
    long = [path for path in held_out_text.held_out_sources() if path.stat().st_size >= LEAST_BYTES]
    mine = long[seed % 2 :: 2]
    if len(mine) < count:
        raise ValueError(
            f"{count} sources are asked for, this Python has {len(mine)} held-out ones of {LEAST_BYTES} bytes for seed "
            f"{seed}: lower --sources"
        )
    return random.Random(f"sources/{seed}").sample(mine, count)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1", "niah_multikey_2", "niah_single_2"])
    parser.add_argument("--documents", type=int, default=4, help="of each task; default: %(default)s")
    parser.add_argument("--sources", type=int, default=6, help="default: %(default)s")
    given = parser.parse_args(argv)
    try:
        modules = sources(given.seed, given.sources)
        texts = {
            f"{task}_{given.seed}_{index}.txt": document(task, given.seed, index)
            for task in given.tasks
            for index in range(given.documents)
        }
    except ValueError as error:
        sys.exit(f"calibration_documents: {error}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (given.out / name).write_text(text, encoding="utf-8")
    for path in modules:
        (given.out / f"source_{given.seed}_{path.parent.name}_{path.name}").write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
