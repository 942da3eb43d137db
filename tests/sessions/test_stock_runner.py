"""The program of a bundle in ExecuTorch's own text runner, unmodified: the contract that other apps rely on."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from edgerun.sessions.text import TextSession

END = 257  # <eos>, not part of the text
PROMPT = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 3  # beyond budget and slice
NEW_TOKENS = 19  # the 20th is <bos>, which has no piece
# In a process of its own: ExecuTorch's Python runner and its log belong to the whole process.
SCRIPT = """
import sys
from edgerun._library import load_op_library
if sys.argv[1] == "with":
    load_op_library()
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
runner = TextLLMRunner(sys.argv[2] + "/programs/text.pte", sys.argv[6])
pieces = []
config = GenerationConfig(echo=False, max_new_tokens=int(sys.argv[3]), temperature=0.0, num_bos=1)
runner.generate(sys.argv[4], config, pieces.append)
open(sys.argv[5], "w", encoding="utf-8").write("".join(pieces))
"""


def run_stock(mode: str, bundle: pathlib.Path, tmp_path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(named_tokens(json.loads((bundle / "tokenizer/tokenizer.json").read_text()))))
    command = [sys.executable, "-c", SCRIPT, mode, bundle, str(NEW_TOKENS), PROMPT, tmp_path / "text", tokenizer]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)


def piece(token: int) -> str:
    """What stands for a token in the text: the prompt's characters for themselves, anything else by its number."""
    return chr(token) if chr(token) in PROMPT else f"{{{token}}}"


def named_tokens(tokenizer: dict) -> dict:
    """The byte tokenizer with a name for each byte that is no text on its own: a random model writes mostly those."""
    vocabulary = {name: token for name, token in tokenizer["model"]["vocab"].items() if token < 256}
    renamed = {name if chr(token) in PROMPT else piece(token): token for name, token in vocabulary.items()}
    specials = {name: token for name, token in tokenizer["model"]["vocab"].items() if token >= 256}
    unused = {piece(token): token for token in range(258, 264)}
    tokenizer["model"]["vocab"] = {**renamed, **specials, **unused}
    return tokenizer


def test_same_tokens(bundle: pathlib.Path, session: TextSession, tmp_path: pathlib.Path) -> None:
    done = run_stock("with", bundle, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = session.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert 256 not in ours.tokens
    assert ours.stats.attended_pairs < ours.stats.causal_pairs
    expected = "".join(piece(token) for token in ours.tokens if token != END)
    assert (tmp_path / "text").read_text(encoding="utf-8") == expected


def test_without_the_op_library_it_says_0x14(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run_stock("without", bundle, tmp_path)
    assert done.returncode != 0
    assert "edgerun::dhsa_attention" in done.stdout + done.stderr
