"""load_prompts: every accepted source gives the same kind of data set, every mistake one sentence (F21)."""

import json
import logging
import os
import re
from pathlib import Path

import datasets
import pytest

from es_trl import assets
from es_trl.data import load_prompts


# Not in the repository; where it is absent, the case that reads it is not collected.
PARTI_PROMPTS = [p for p in (Path("/work/shared/data/PartiPrompts.tsv"), Path("PartiPrompts.tsv")) if p.is_file()][:1]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_every_source_gives_the_same_prompts(tmp_path, monkeypatch):
    prompts, numbers = ["a cat", "two dogs", "a frog"], [1, 2, 3]
    table = datasets.Dataset.from_dict({"prompt": prompts, "number": numbers})
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "p.parquet"))
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(str(tmp_path / "splits"))
    rows = "".join(json.dumps({"prompt": p, "number": n}) + "\n" for p, n in zip(prompts, numbers, strict=True))
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [
        prompts,
        tuple(prompts),
        {"prompt": prompts, "number": numbers},
        table,
        datasets.DatasetDict({"train": table}),
        write(tmp_path / "p.txt", "\n".join(prompts)),
        Path(write(tmp_path / "q.TXT", "\r\n".join(prompts) + "\r\n")),
        "~/p.txt",
        write(tmp_path / "p.csv", 'prompt,number\na cat,1\n"two dogs",2\na frog,3\n'),
        write(tmp_path / "p.tsv", "prompt\tnumber\na cat\t1\ntwo dogs\t2\na frog\n"),
        write(tmp_path / "p.jsonl", rows),
        str(tmp_path / "p.parquet"),
        str(tmp_path / "saved"),
        str(tmp_path / "splits"),
    ]
    for source in sources:
        loaded = load_prompts(source)
        assert isinstance(loaded, datasets.Dataset)
        assert list(loaded["prompt"]) == prompts, source
    assert list(load_prompts(str(tmp_path / "p.jsonl"))["number"]) == numbers
    assert list(load_prompts(str(tmp_path / "p.tsv"))["number"]) == ["1", "2", ""]
    assert list(load_prompts(str(tmp_path / "splits"), split="test")["prompt"]) == ["a frog"]


@pytest.mark.parametrize("name", ["tiny-train", "tiny-validation", "tiny-test"])
def test_shipped_prompts(name):
    lines = Path(assets.resolve(name)).read_text(encoding="utf-8").splitlines()
    assert list(load_prompts(name)["prompt"]) == lines
    assert len(lines) >= 32


@pytest.mark.parametrize("path", PARTI_PROMPTS)
def test_parti_prompts_keeps_all_1632(path):
    loaded = load_prompts(str(path))
    assert len(loaded) == 1632
    assert loaded.column_names == ["prompt", "category", "challenge", "note"]
    assert loaded[0]["prompt"] == "bond"
    assert sum('"' in prompt for prompt in loaded["prompt"]) > 0


def test_tsv_quotes_are_ordinary_characters(tmp_path):
    text = 'Prompt\tCategory\n"a cat\tx\nthe word "hi" on a wall\ty\na dog"\tz\n'
    loaded = load_prompts(write(tmp_path / "p.tsv", text))
    assert list(loaded["prompt"]) == ['"a cat', 'the word "hi" on a wall', 'a dog"']
    assert list(loaded["Category"]) == ["x", "y", "z"]


def test_csv_quotes_protect_commas_and_line_ends(tmp_path):
    loaded = load_prompts(write(tmp_path / "p.csv", 'prompt,tag\n"a cat, asleep",x\n"two\nlines",y\n'))
    assert list(loaded["prompt"]) == ["a cat, asleep", "two\nlines"]


def test_text_is_cleaned_and_counted_once(tmp_path, caplog):
    text = "\ufeffa cat\r\n\r\n  a dog \r\na cat\r\n   \r\na frog"
    with caplog.at_level(logging.INFO, logger="es_trl"):
        loaded = load_prompts(write(tmp_path / "p.txt", text))
    assert list(loaded["prompt"]) == ["a cat", "a dog", "a frog"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "3 prompts" in caplog.text and "2 blank left out; 1 duplicates left out" in caplog.text


def test_duplicates_stay_where_something_else_tells_them_apart(tmp_path):
    path = write(tmp_path / "p.csv", "prompt,tag\na cat,x\na cat,y\n")
    assert list(load_prompts(path)["tag"]) == ["x", "y"]
    assert len(load_prompts(["a cat", "a cat"])) == 2
    assert len(load_prompts(write(tmp_path / "q.csv", "prompt\na cat\na cat\n"))) == 1


def test_blank_rows_are_left_out_with_their_columns(tmp_path):
    loaded = load_prompts(datasets.Dataset.from_dict({"prompt": ["a", " ", "b"], "n": [1, 2, 3]}))
    assert list(loaded["n"]) == [1, 3]
    assert list(load_prompts(write(tmp_path / "p.csv", "prompt,n\na,1\n,2\n\nb,3\n"))["n"]) == ["1", "3"]


def test_prompts_that_were_loaded_are_taken_as_they_are_without_another_word(caplog):
    loaded = load_prompts(["a cat", "a dog"])
    with caplog.at_level(logging.INFO, logger="es_trl"):
        assert load_prompts(loaded) is loaded
        assert not caplog.records
        assert load_prompts(loaded, max_prompts=1)["prompt"][:] == ["a cat"]
        changed = loaded.map(lambda row: {"prompt": " "}, with_indices=False)
        with pytest.raises(ValueError, match="no prompts in the Dataset"):
            load_prompts(changed)


def test_unusual_characters_survive(tmp_path, caplog):
    prompts = ["a \U0001f431 cat", "\u05d7\u05ea\u05d5\u05dc \u05d0\u05d3\u05d5\u05dd", "line\u2028separator\x0cfeed"]
    prompts += ["../../etc/x", "x" * 10_000]
    assert list(load_prompts(write(tmp_path / "p.txt", "\n".join(prompts)))["prompt"]) == prompts
    assert "1 longer than 1000 characters" in caplog.text
    assert list(load_prompts(prompts)["prompt"]) == prompts


def test_column_and_max_prompts(tmp_path):
    path = write(tmp_path / "p.csv", "Caption,id\na cat,1\n,2\na dog,3\na frog,4\n")
    loaded = load_prompts(path, column="caption", max_prompts=2)
    assert loaded.to_dict() == {"prompt": ["a cat", "a dog"], "id": ["1", "3"]}
    assert len(load_prompts(["a", "b"], max_prompts=5)) == 2
    assert len(load_prompts(write(tmp_path / "p.txt", "a\nb\n"), column="caption")) == 2
    with pytest.raises(ValueError, match="column 'prompt' besides 'caption'"):
        load_prompts({"prompt": ["a"], "caption": ["b"]}, column="caption")
    with pytest.raises(ValueError, match=re.escape("no column 'caption' in the dict, only 'CAPTION', 'Caption'")):
        load_prompts({"CAPTION": ["a"], "Caption": ["b"]}, column="caption")


def test_iterable_data_set_needs_a_number():
    stream = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]}).to_iterable_dataset()
    assert list(load_prompts(stream, max_prompts=2)["prompt"]) == ["a", "b"]
    with pytest.raises(ValueError, match="need max_prompts"):
        load_prompts(stream)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "has no prompts in it"),
        ("p.txt", b"\n \r\n", "has no prompts in it"),
        ("p.csv", b"prompt,n\n", "has no prompts in it"),
        ("p.csv", b"prompt,n\n,1\n", "no prompts in"),
        ("p.jsonl", b"\n", "has no prompts in it"),
        ("p.txt", b"a cat\na \x00 dog\n", "null byte in line 2"),
        ("p.txt", b"a cat\na caf\xe9\n", "not UTF-8 in line 2: save it as UTF-8"),
        ("p.txt", "a cat".encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("p.csv", b"text,n\na cat,1\n", "no column 'prompt' in .*, only 'text', 'n': name the column"),
        ("p.csv", b"promt,n\na cat,1\n", "did you mean 'promt'"),
        ("p.csv", b"prompt\na cat, asleep\n", "2 fields in line 2, but 1 columns: quote fields with commas"),
        ("p.csv", b'prompt\n"a cat\n', "malformed in line"),
        ("p.csv", b"prompt,n,n\na,1,2\n", "names a column twice"),
        ("p.tsv", b"prompt\ta\nx\ty\tz\n", "3 fields in line 2, but 2 columns"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "JSON object .* in line 2"),
        ("p.jsonl", b'"a cat"\n', "JSON object .* in line 1"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 is int"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1 is int .3., not a string"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 is NoneType"),
        ("p.jsonl", b'{"prompt": [{"role": "user", "content": "a"}]}\n', "line 1 is conversational.*'content' alone"),
        ("p.parquet", b"nothing", "not a readable parquet file"),
        ("p.json", b"[]", "unknown ending: use one of .txt, .csv"),
    ],
)
def test_a_bad_file_is_an_error_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no prompts in the list"),
        (["", "  "], "no prompts in the list"),
        (["a", 3], "row 1 is int .3., not a string"),
        (["a", None], "row 1 is NoneType"),
        (["a", "b\x00"], "null byte in the prompt of the list, row 1"),
        ([[{"role": "user", "content": "a cat"}]], "row 0 is conversational"),
        ([{"prompt": "a"}], "row 0 is dict"),
        ({"prompt": ["a", "b"], "n": [1]}, "cannot be stored"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_dict({"prompt": ["a"]})}), "no split 'train'.* test"),
        (3, "cannot be loaded from int"),
        (b"a cat", "cannot be loaded from bytes"),
        ("nowhere.txt", "no prompt file 'nowhere.txt': check the path, relative paths start at"),
        ("/nowhere/prompts", "no prompt file"),
        ("./prompts", "no prompt file"),
        ("tiny-trian", "did you mean 'tiny-train'"),
        ("a red cat", r"A single prompt is given as a list, \['a red cat'\]"),
        (os.path.dirname(__file__), "neither one of Dataset.save_to_disk nor a copy"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_source_is_an_error(source, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


CUT = "a cut \ud83d"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a", CUT], "the prompt of the list, row 1 holds half of a surrogate pair"),
        ({"prompt": ["a", CUT]}, "the prompt of the dict, row 1 holds half of"),
        ({"prompt": ["a", "b"], "x": ["c", CUT]}, "the dict, row 1, column 'x', holds half of"),
        ({"prompt": ["a", "b"], "x": [[["c"]], [[CUT]]]}, "the dict, row 1, column 'x', holds half of"),
        ({"prompt": ["a", "b"], "x": [{"k": "c"}, {"k": CUT}]}, "the dict, row 1, column 'x', holds half of"),
        ({"prompt": ["a"], CUT: ["b"]}, "the column name .* of the dict holds half of"),
        ({"prompt": ["a"], "seed": [2**64]}, "the dict, row 0, column 'seed', holds an integer of more than 63 bits"),
        ({"prompt": ["a", "b"], "seed": [-1, 2**63]}, "row 1, column 'seed', holds an integer of more than 63 bits"),
        ({"prompt": ["a"], "x": [{"seeds": [2**63]}]}, "row 0, column 'x', holds an integer of more than 63 bits"),
        ({"prompt": ["a", float("nan"), "b"]}, "the prompt of the dict, row 1 is float .nan., not a string"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_what_cannot_be_stored_is_named_with_its_place(source, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


def test_what_a_jsonl_file_cannot_hold_is_named_with_file_and_line(tmp_path):
    lines = [f'{{"prompt": "p{i}", "seed": {i}, "x": "y"}}' for i in range(1, 5001)]
    broken = {
        '{"prompt": NaN}': "is float .nan., not a string",
        '{"prompt": null}': "is NoneType",
        '{"prompt": "cut \\ud83d"}': "holds half of a surrogate pair",
        '{"prompt": "p", "x": "\\udc00"}': "column 'x', holds half of a surrogate pair",
        '{"prompt": "p", "seed": 36893488147419103232}': "column 'seed', holds an integer of more than 63 bits",
    }
    for line, message in broken.items():
        path = write(tmp_path / "p.jsonl", "\n".join([*lines[:2998], "", line, *lines[3000:]]) + "\n")
        with pytest.raises(ValueError, match=f"prompt file .*p.jsonl', line 3000,? {message}"):
            load_prompts(path)


def test_seeds_of_64_bits_without_a_sign_are_read(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a", "seed": 18446744073709551615}\n{"prompt": "b"}\n')
    assert load_prompts(path)["seed"][:] == [2**64 - 1, None]


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_max_prompts_must_be_positive(number):
    with pytest.raises(ValueError, match="max_prompts must be a positive integer"):
        load_prompts(["a"], max_prompts=number)


def test_a_copy_of_a_hub_data_set_has_configurations_and_splits(tmp_path):
    """What `hf download --repo-type dataset` leaves: a README that names configurations, and their files."""
    folder = tmp_path / "prompts"
    (folder / "data").mkdir(parents=True)
    write(
        folder / "README.md",
        """---
configs:
- config_name: plain
  data_files: [{split: train, path: data/plain.csv}, {split: test, path: data/test.csv}]
- config_name: hard
  data_files: [{split: train, path: data/hard.csv}]
---
""",
    )
    write(folder / "data" / "plain.csv", "prompt,tag\na cat,x\n")
    write(folder / "data" / "test.csv", "prompt,tag\na frog,y\n")
    write(folder / "data" / "hard.csv", "prompt\nnine cats left of a dog\n")
    assert load_prompts(str(folder), name="plain")[0] == {"prompt": "a cat", "tag": "x"}
    assert load_prompts(str(folder), "test", name="plain")["prompt"][:] == ["a frog"]
    assert load_prompts(str(folder), name="hard")["prompt"][:] == ["nine cats left of a dog"]
    with pytest.raises(ValueError, match="plain.*hard|hard.*plain"):
        load_prompts(str(folder))
    with pytest.raises(ValueError, match="configuration 'easy'"):
        load_prompts(str(folder), name="easy")
    with pytest.raises(ValueError, match="split 'validation'"):
        load_prompts(str(folder), "validation", name="hard")


@pytest.mark.parametrize("source", [["a cat"], {"prompt": ["a cat"]}, "tiny-train"])
def test_what_only_the_hub_has_is_refused_elsewhere(source):
    with pytest.raises(ValueError, match="revision='main' is for data sets on the Hub"):
        load_prompts(source, revision="main")
    with pytest.raises(ValueError, match="name='hard' is for data sets on the Hub"):
        load_prompts(source, name="hard")


def test_hub_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="'someone/some-prompts' cannot be loaded from the Hub.*give a local file"):
        load_prompts("someone/some-prompts")
