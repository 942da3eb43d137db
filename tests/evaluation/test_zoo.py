"""The zoo's text model: the folder is whole, and its tokenizer gives exactly the text's UTF-8 bytes."""

import json
import pathlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from edgerun.zoo import zoo_model_names, zoo_model_path

BOS, EOS = 256, 257
TEXT = zoo_model_path("text")
TOKENIZER = Tokenizer.from_file(str(TEXT / "tokenizer.json"))


def test_unknown_name_says_what_there_is() -> None:
    assert "text" in zoo_model_names()
    with pytest.raises(ValueError, match="no zoo model is named 'txt'; there is text, video"):
        zoo_model_path("txt")


def test_a_model_is_a_folder_with_the_file_of_its_kind(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("words/config.json", "clips/video.json", "neither/readme.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    monkeypatch.setattr("edgerun.zoo._FOLDER", tmp_path)
    assert zoo_model_names() == ("clips", "words")
    assert zoo_model_path("clips") == tmp_path / "clips"


def test_folder_is_whole_and_small() -> None:
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names <= {path.name for path in TEXT.iterdir()}
    assert (TEXT / "model.safetensors").stat().st_size <= 25_000_000
    with safe_open(TEXT / "model.safetensors", "np") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


@given(st.text())
@example("\x00\x7f\x80ÿ <bos-> naïve\r\n\t日本語 😀")
def test_tokens_are_the_bytes_after_the_beginning_token(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert ids == [BOS, *text.encode()]
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_and_config_agree() -> None:
    config = json.loads((TEXT / "config.json").read_text())
    assert (TOKENIZER.token_to_id("<bos>"), TOKENIZER.token_to_id("<eos>")) == (BOS, EOS)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (BOS, EOS, EOS)
    assert config["vocab_size"] >= TOKENIZER.get_vocab_size()


def test_auto_tokenizer_gives_the_same_ids() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEXT)
    text = "Needle: 1234567 é\n"
    assert tokenizer(text)["input_ids"] == [BOS, *text.encode()]
    assert tokenizer.decode([BOS, *text.encode(), EOS], skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, EOS)


def test_executorchs_tokenizer_gives_the_same_ids() -> None:
    from pytorch_tokenizers import CppHFTokenizer

    tokenizer = CppHFTokenizer()
    tokenizer.load(str(TEXT / "tokenizer.json"))
    for text in ("plain  text\n", "日本 😀\x00"):
        assert tokenizer.encode(text, 1, 0) == [BOS, *text.encode()]
    assert (tokenizer.bos_tok(), tokenizer.eos_tok()) == (BOS, EOS)


def test_shipped_weights_retrieve_a_needle_among_needles() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from edgerun.evaluation import ruler

    model = AutoModelForCausalLM.from_pretrained(TEXT, dtype=torch.float32)
    scores = []
    for index in range(4):
        sample = ruler.generate("niah_multikey_2", 2048, seed=3, index=index)
        ids = torch.tensor([TOKENIZER.encode(sample.prompt).ids])
        output = model.generate(ids, max_new_tokens=sample.max_new_tokens, do_sample=False)
        scores.append(ruler.score(sample, TOKENIZER.decode(output[0, ids.shape[1] :].tolist())))
    assert sum(scores) >= 3  # the card has the accuracy; a guess finds none of them
