import json
import smtplib
import tracemalloc
import zlib

import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.byte_tokenizer import PAD, decode, encode
from xattn.data.text import ByteWindows, PythonSources, TextFiles

DOCUMENTS = [b"abcdefghij", b"", b"klm", b"nopqrstu"]


def texts(source, seed=None):
    return [decode(source.example(index, seed)["tokens"]) for index in range(source.num_examples)]


def test_windows_cover_each_document_once_and_never_two():
    source = ByteWindows("train", DOCUMENTS, 4)
    assert texts(source) == ["abcd", "efgh", "ij", "klm", "nopq", "rstu"]
    np.testing.assert_array_equal(source.example(2, None)["tokens"], encode("ij", 4))
    assert source.example(2, None)["tokens"][-1] == PAD


def test_training_moves_windows_inside_of_their_document():
    source = ByteWindows("train", DOCUMENTS, 4)
    seen = {index: set() for index in range(6)}
    for seed in range(60):
        for index, text in enumerate(texts(source, seed)):
            seen[index].add(text)
    assert seen[0] == {"abcd", "bcde", "cdef", "defg"}
    assert seen[1] == {"efgh", "fghi", "ghij"}
    assert seen[2] == {"ghij"} and seen[3] == {"klm"} and seen[4] == {"nopq", "opqr", "pqrs", "qrst"}
    assert texts(source, 7) == texts(source, 7)


@pytest.fixture(scope="module")
def library():
    return {split: PythonSources(split, 512) for split in ("train", "val", "test")}


def test_the_standard_library_is_divided_by_package(library):
    packages = {split: {name.partition(".")[0] for name in source.modules} for split, source in library.items()}
    assert not packages["train"] & packages["val"] and not (packages["train"] | packages["val"]) & packages["test"]
    # Frozen: these may move from one split to another with no version of xattn.
    assert {"json", "argparse", "email"} <= packages["train"]
    assert {"importlib", "smtplib"} <= packages["val"]
    for split, names in packages.items():
        for name in names:
            part = zlib.crc32(name.encode()) % 20
            assert split == {1: "val", 3: "test"}.get(part, "train")
    assert "json.decoder" in library["train"].modules and "json" in library["train"].modules
    assert not any("test" in name.split(".") for name in library["train"].modules)
    for split in ("val", "test"):
        assert 0.01 < library[split].num_examples / library["train"].num_examples < 0.15


def test_the_windows_hold_the_files(library):
    text = "".join(texts(library["val"]))
    with open(smtplib.__file__, encoding="utf-8") as file:
        assert file.read() in text


def write_text(root):
    for split, text in (("train", "one two"), ("val", "three"), ("test", "four")):
        (root / split / "deep").mkdir(parents=True)
        (root / split / "deep" / "a.txt").write_text(text)
        lines = [json.dumps({"text": f"{split} {number}", "url": "x"}) for number in range(2)]
        (root / split / "b.jsonl").write_text("\n".join(lines) + "\n")
        (root / split / "notes.md").write_text("not read")


def test_folders_are_the_splits(tmp_path):
    write_text(tmp_path)
    assert texts(TextFiles("val", tmp_path, 16)) == ["val 0", "val 1", "three"]
    assert texts(TextFiles("train", str(tmp_path), 4)) == ["trai", "n 0", "trai", "n 1", "one ", "two"]


def test_without_folders_the_documents_are_divided_by_their_hash(tmp_path):
    documents = [f"document {number}" for number in range(200)]
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    splits = {split: texts(TextFiles(split, tmp_path, 32)) for split in ("train", "val", "test")}
    assert sorted(sum(splits.values(), [])) == sorted(documents)
    assert splits["val"] == [text for text in documents if zlib.crc32(text.encode()) % 20 == 1]
    assert splits["test"] == [text for text in documents if zlib.crc32(text.encode()) % 20 == 3]


def test_lines_end_at_newlines_only_and_blank_ones_are_skipped(tmp_path):
    documents = ["one\u2028two", "three\u0085four\u2029", "교차", "five\x0csix"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in documents[:3]]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_bytes(b"\n" + b"\r\n \t\n".join(lines) + b"\n\n")
    (tmp_path / "train" / "b.txt").write_bytes(documents[3].encode())
    assert texts(TextFiles("train", tmp_path, 32)) == documents
    (tmp_path / "train" / "c.jsonl").write_bytes(b"\n\n" + lines[0] + b"\nno json\n")
    with pytest.raises(UsageError, match="line 4 of '.*c.jsonl' is not a JSON object"):
        TextFiles("train", tmp_path)


@pytest.mark.parametrize(
    "name, data, sentence",
    [
        ("a.txt", "caf\xe9".encode("latin-1"), "'.*a.txt' is not text in UTF-8.*: convert or remove it"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "line 1 of '.*a.jsonl' is not a JSON object in UTF-8 with a string 'text'"),
    ],
)
def test_text_in_other_encodings_is_named(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=sentence):
        TextFiles("train", tmp_path)


@pytest.mark.parametrize("divided", [False, True])
def test_the_corpus_is_held_in_memory_once(tmp_path, divided):
    """Both while it is read and afterwards; where documents are divided, those of other splits are not kept."""
    folder = tmp_path / "train" if divided else tmp_path
    folder.mkdir(exist_ok=True)
    size, documents = 100_000, 60
    rows = [json.dumps({"text": chr(97 + number % 26) * size}) for number in range(documents)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    for split in ("train",) if divided else ("train", "val"):
        tracemalloc.start()
        source = TextFiles(split, tmp_path, 1000)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        corpus = 1000 * source.num_examples
        assert corpus <= held < 1.2 * corpus and peak < 1.2 * corpus + 10 * size


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"folder of the data set is not given: add --config.data.root=DIR"):
        TextFiles("train")
    with pytest.raises(UsageError, match="There is no folder '.*/none'"):
        TextFiles("train", tmp_path / "none")
    with pytest.raises(UsageError, match="text_files has no split 'dev': choose one of train, val, test"):
        TextFiles("dev", tmp_path)
    with pytest.raises(UsageError, match="has no text for the split 'train' in 0 .txt and .jsonl files: put some into"):
        TextFiles("train", tmp_path)
    with pytest.raises(UsageError, match="python_sources needs a length of at least 1, but got 0"):
        PythonSources("val", 0)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("")
    with pytest.raises(UsageError, match="has no text for the split 'train' in 1 .txt"):
        TextFiles("train", tmp_path)
    for line in ("no json", '{"content": "x"}', '["text"]', '{"text": 3}'):
        (tmp_path / "train" / "b.jsonl").write_text('{"text": "fine"}\n' + line)
        with pytest.raises(UsageError, match=r"line 2 of '.*b.jsonl' is not a JSON object in UTF-8 with a string"):
            TextFiles("train", tmp_path)
