"""Text to calibrate the shipped model on, and other text to check the calibration by: needle documents and sources.

    python bench/calibration_documents.py --out FOLDER --seed 0
    edgerun calibrate zoo:text --text FOLDER/* --samples 8 -o zoo.calibration
    python bench/calibration_documents.py --out OTHER --seed 1 --tasks niah_multikey_1 niah_single_3 vt
    edgerun calibrate zoo:text --text OTHER/* --samples 8 --check zoo.calibration

A needle document is a RULER haystack with its question and the right answer, of 4,200 bytes; the sources are modules of
this Python's standard library of at least 9,000 bytes, drawn by the seed (even places for even seeds, odd for odd: two
seeds next to each other share none).
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import sysconfig

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from edgerun.evaluation import ruler

LENGTH = 4200  # tokens of a document
LEAST_BYTES = 9000  # of a source: two windows


def sources(seed: int, count: int) -> list[pathlib.Path]:
    """Modules of the standard library."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    long = [path for path in sorted(folder.glob("[a-z]*.py")) if path.stat().st_size >= LEAST_BYTES]
    return random.Random(f"sources/{seed}").sample(long[seed % 2 :: 2], count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1", "niah_multikey_2", "niah_single_2"])
    parser.add_argument("--documents", type=int, default=4, help="of each task; default: %(default)s")
    parser.add_argument("--sources", type=int, default=6, help="default: %(default)s")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for task in given.tasks:
        for index in range(given.documents):
            document = ruler.generate_document(task, LENGTH, given.seed, index)
            question = document.questions[0]
            text = document.text + question.text + question.completion
            (given.out / f"{task}_{given.seed}_{index}.txt").write_text(text, encoding="utf-8")
    for path in sources(given.seed, given.sources):
        (given.out / f"source_{given.seed}_{path.name}").write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
