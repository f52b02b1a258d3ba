"""Texts to token ids: what a `tokenizer.json` gives, and when its library is needed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from small_models import micro_model
from small_tokenizer import WORDS, write_tokenizer

from dove_fast import CheckpointError
from dove_fast.text import TextTokenizer


@pytest.fixture
def path(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer.json")


def test_ids_are_those_of_the_words_alone(path):
    ids = TextTokenizer(path).encode("a red red cat dog")
    assert ids.dtype == torch.int64
    # Neither [BOS] nor padding, and nothing cut off.
    assert ids.tolist() == [2, 3, 3, 4, 0]


def test_an_empty_text_has_no_ids(path):
    ids = TextTokenizer(path).encode("")
    assert ids.shape == (0,) and ids.dtype == torch.int64


def test_vocab_size(path):
    # Of the ids in between some are free.
    assert TextTokenizer(path).vocab_size == max(WORDS.values()) + 1 > len(WORDS)


def test_the_file_is_kept_byte_for_byte(path, tmp_path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    tokenizer = TextTokenizer(str(path))
    tokenizer.encode("cat")
    assert tokenizer.to_json() == path.read_bytes().decode()
    tokenizer.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_copies_and_pickles_need_no_file(path):
    tokenizer = TextTokenizer(path)
    tokenizer.encode("cat")
    path.unlink()
    for other in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode("red cat").tolist() == [3, 4]
        assert other.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("used", [False, True])
def test_a_model_with_a_tokenizer_is_copied_and_pickled(path, used):
    model = micro_model()
    names, fingerprint = list(model.state_dict()), model.fingerprint()
    model.tokenizer = TextTokenizer(path)
    if used:
        model.tokenizer.encode("cat")
    assert list(model.state_dict()) == names and model.fingerprint() == fingerprint
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.tokenizer.encode("red cat").tolist() == [3, 4]
        assert other.fingerprint() == fingerprint


def test_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="no tokenizer file at"):
        TextTokenizer(path)
    for content, message in ((b'{"model":', "is not valid JSON"), (b"\xff", "is not valid JSON"), (b"[]", "got list")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"tokenizer\.json.*{message}"):
            TextTokenizer(path)
    path.write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no file of the tokenizers library: .*column"):
        TextTokenizer(path).encode("cat")


def test_texts_that_cannot_be_used(tmp_path):
    tokenizer = TextTokenizer(write_tokenizer(tmp_path / "tokenizer.json", unknown=None))
    with pytest.raises(TypeError, match="text must be a str, got int"):
        tokenizer.encode(5)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode 'dog': .*UNK"):
        tokenizer.encode("dog")
    with pytest.raises(ValueError, match=r"cannot encode '\\ud800'"):
        tokenizer.encode("\ud800")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_without_the_library_only_texts_fail(path):
    out = run(
        "import sys\n"
        "sys.modules['tokenizers'] = None\n"
        "from dove_fast.text import TextTokenizer\n"
        f"tokenizer = TextTokenizer({str(path)!r})\n"
        "print(len(tokenizer.encode('')))\n"
        "for use in (lambda: tokenizer.encode('cat'), lambda: tokenizer.vocab_size):\n"
        "    try:\n"
        "        use()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    lines = out.splitlines()
    assert lines[0] == "0" and len(lines) == 3
    assert all("pip install 'dove-fast[text]'" in line for line in lines[1:])
