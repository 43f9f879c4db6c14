"""What people bring as a dataset: folders, paths, separators, text that breaks things, a Hub that fails."""

import builtins
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from conftest import ROOT, exit_code, forked, go, snapshot, stop_after, tiny_config, write_stories

import data
import eval as evaluation
import train
from config import Config, UserError
from data import BPETokenizer, hold_out, open_dataset, prepare

STORIES = [f"This is story number {i}, my dear.\n\nIt ends well." for i in range(40)]


def char_config(folder: Path, dataset: Path | str, **settings) -> Config:
    made = Config()
    made.data.dataset, made.data.data_dir = str(dataset), str(folder / "data")
    made.training.tokenizer_type = "char"
    for name, value in settings.items():
        made.set(name.replace("__", "."), value)
    return made


def split(dataset: Path) -> tuple[list[str], list[str]]:
    """The training and the validation stories of a dataset."""
    training, validation = hold_out(open_dataset(str(dataset), True), None, None)
    return list(training()), list(validation())


# ---------------------------------------------------------------- a run is its content

@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", ["moved", "dotted", "another data_dir", "gone"])
def test_a_run_goes_on_however_its_stories_are_spelt(tmp_path, reference, capsys, monkeypatch, how):
    config = tiny_config(tmp_path)
    stop_after(config, 9)
    stories = tmp_path / "stories.txt"
    if how == "moved":
        config.data.dataset = str(stories.rename(tmp_path / "t.txt"))
    elif how == "dotted":
        monkeypatch.chdir(tmp_path)
        config.data.dataset = "./stories.txt"
    elif how == "another data_dir":
        config.data.data_dir = str(tmp_path / "elsewhere")
    else:
        stories.unlink()
    capsys.readouterr()
    assert go(config).code == 0
    printed = capsys.readouterr().err
    said = {"another data_dir": "data.data_dir was", "gone": "using the streams of"}
    assert said.get(how, "data.dataset was") in printed
    assert (tmp_path / "logs" / "metrics.jsonl").exists()
    ours, theirs = (train.load_checkpoint(f / "checkpoints" / "latest.pt") for f in (tmp_path, reference))
    assert all(ours["model"][k].equal(v) for k, v in theirs["model"].items())
    built = list((tmp_path / "data").glob("*.bin"))
    assert len(built) == 2  # none were made anew


@pytest.mark.usefixtures("one_process")
def test_other_stories_in_another_file_are_an_error(halfway, tmp_path):
    _, config = halfway
    config.data.dataset = str(write_stories(tmp_path / "other.txt", STORIES))
    with pytest.raises(UserError, match="the sha256 of the train stories was .* undo that .* or use --fresh"):
        go(config)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a project in which a run was made with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    config = tiny_config(folder)
    before, told = os.getcwd(), train.tell_story
    os.chdir(folder)
    train.tell_story = lambda *args, **kwargs: ""
    try:
        config.data.dataset, config.data.data_dir = "stories.txt", "data"
        config.training.checkpoint_dir, config.training.log_dir = "checkpoints", "logs"
        stop_after(config, 5)
    finally:
        os.chdir(before)
        train.tell_story = told
    return folder


def streams_of(path: Path) -> list[str]:
    checkpoint = train.load_checkpoint(path)
    streams = evaluation.open_streams(checkpoint, path)
    assert [s.info["sha256"] for s in streams] == [checkpoint["dataset"][s]["sha256"] for s in data.SPLITS]
    return streams


@pytest.mark.parametrize("kept", ["both", "streams", "text"])
def test_a_checkpoint_is_evaluated_from_any_folder(finished, tmp_path, monkeypatch, kept):
    project, elsewhere = tmp_path / "moved" / "project", tmp_path / "elsewhere"
    shutil.copytree(finished, project)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if kept == "text":
        shutil.rmtree(project / "data")
    if kept == "streams":
        (project / "stories.txt").unlink()
    before = snapshot(project)
    checkpoint = next((project / "checkpoints").glob("latest.pt"))
    streams_of(checkpoint)
    assert snapshot(project) == before
    if kept != "text":
        assert not list(elsewhere.iterdir())


def test_a_checkpoint_without_its_stories_says_what_to_do(finished, tmp_path, monkeypatch):
    shutil.copy(finished / "checkpoints" / "latest.pt", tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'stories.txt' does not exist.*--data"):
        streams_of(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["auto", "tinystories", "sample"])
def test_a_folder_above_a_checkpoint_named_like_a_dataset_is_not_its_stories(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(evaluation, "prepare", lambda config, *_: asked.append(config.data.dataset) or [])
    (tmp_path / name).mkdir()
    checkpoint = {"config": dataclasses.asdict(char_config(tmp_path, name)),
                  "dataset": {split: {"sha256": "0"} for split in data.SPLITS}}
    with contextlib.suppress(ValueError):  # no streams
        evaluation.open_streams(checkpoint, tmp_path / "checkpoints" / "best_model.pt")
    assert asked == [name]


def test_auto_is_not_the_file_that_another_command_had_named(tmp_path, monkeypatch):
    config = char_config(tmp_path, write_stories(tmp_path / "s.txt", STORIES))
    path, named = config.data.dataset, {"train": prepare(config)[1].info}
    others = write_stories(tmp_path / "sample.txt", [f"{story} Yes." for story in STORIES])
    monkeypatch.setattr(data, "SAMPLE", others)
    monkeypatch.setattr(data, "open_hub", mock.Mock(side_effect=data.DatasetUnavailable("no network")))
    config.data.dataset = "auto"
    for earlier, now in ((path, "sample"), ("auto", path)):
        checkpoint = {"config": {"data": {"dataset": earlier}}, "dataset": named,
                      "tokenizer": {"type": "char"}}
        assert prepare(config, checkpoint)[1].info["dataset"] == now


# ---------------------------------------------------------------- streams are kept and shared

def test_streams_of_different_requests_stand_beside_each_other(tmp_path, monkeypatch):
    built = []
    build = data.build_streams
    monkeypatch.setattr(data, "build_streams", lambda *args: built.append(args) or build(*args))
    path = write_stories(tmp_path / "s.txt", STORIES)
    for _ in range(2):
        for limit in (None, 10, 20):
            prepare(char_config(tmp_path, path, data__max_stories=limit))
    assert len(built) == 3
    monkeypatch.chdir(tmp_path)
    for spelling in ("s.txt", "./s.txt", f"{tmp_path}/../{tmp_path.name}/s.txt"):
        _, stream, _ = prepare(char_config(tmp_path, spelling, data__max_stories=10))
        assert stream.info["dataset"] == spelling and stream.info["stories"] == 10
    prepare(char_config(tmp_path, path.rename("t.txt"), data__max_stories=10))
    assert len(built) == 3


def test_whole_streams_are_read_and_nothing_is_written(tmp_path, monkeypatch):
    path = write_stories(tmp_path / "s.txt", STORIES)
    config = char_config(tmp_path, path)
    prepare(config)
    before = snapshot(tmp_path)

    def read_only(path, mode="r", *args, **kwargs):
        assert not set(mode) & set("wa+x"), (path, mode)
        return builtins.open(path, mode, *args, **kwargs)

    def refuse(*args, **kwargs):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(data, "open", read_only, raising=False)
    monkeypatch.setattr(Path, "mkdir", refuse)
    prepare(config)
    assert snapshot(tmp_path) == before


def test_several_processes_prepare_the_same_streams_at_the_same_time(tmp_path, monkeypatch):
    """They write files of their own, whose content is the same, so that no lock is needed."""
    config = char_config(tmp_path, write_stories(tmp_path / "s.txt", STORIES))
    encode_stories, writing = data.encode_stories, tmp_path / "writing"
    writing.mkdir()

    def together(stories, tokenizer, write):
        (writing / str(os.getpid())).touch()
        while len(list(writing.iterdir())) < 3:
            time.sleep(0.01)
        return encode_stories(stories, tokenizer, write)

    monkeypatch.setattr(data, "encode_stories", together)
    processes = [forked(lambda: prepare(config) and 0) for _ in range(3)]
    assert [exit_code(pid, 30) for pid in processes] == [0, 0, 0]
    assert sorted(p.suffix for p in (tmp_path / "data").iterdir()) == [".bin", ".bin", ".json"]
    monkeypatch.setattr(data, "build_streams", None)  # what they wrote serves
    prepare(config)


def test_a_data_dir_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    config = char_config(tmp_path, write_stories(tmp_path / "s.txt", STORIES))
    config.data.data_dir = str(tmp_path / "s.txt" / "data")
    with pytest.raises(UserError, match="cannot write .*data/s-.*: Not a directory"):
        prepare(config)
    assert capsys.readouterr().err == ""


def test_a_long_path_makes_a_short_name(tmp_path):
    path = tmp_path / ("many words " * 15) / ("long" * 50 + ".txt")
    prepare(char_config(tmp_path, write_stories(path, STORIES)))
    assert all(len(p.name) < 100 for p in (tmp_path / "data").iterdir())


@pytest.mark.parametrize("another", ["typo.txt", "other.txt", "changed", "csv"])
def test_streams_of_the_old_stories_do_not_serve_for_others(tmp_path, another):
    """Whatever keeps the others from being prepared."""
    config = tiny_config(tmp_path)
    stop_after(config, 9)
    stories = tmp_path / "stories.txt"
    if another == "changed":
        stories.write_bytes(stories.read_bytes() + b"\xff")
    else:
        config.data.dataset = str(tmp_path / another)
    (tmp_path / "csv").mkdir()
    (tmp_path / "other.txt").write_text("One story.")
    before = snapshot(tmp_path / "checkpoints", tmp_path / "logs")
    with pytest.raises(UserError):
        go(config)
    assert snapshot(tmp_path / "checkpoints", tmp_path / "logs") == before


@pytest.mark.parametrize("text", ["null", "[1]", '"x"', "{", "[" * 10**5, '{"sha256": 1, "request": 2}'])
def test_another_json_among_the_streams_is_passed_over(tmp_path, text):
    config = char_config(tmp_path, write_stories(tmp_path / "s.txt", STORIES))
    prepare(config)
    (tmp_path / "data" / "a.json").write_text(text)
    before = snapshot(tmp_path)
    prepare(config)
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- any dataset

def test_a_folder_of_texts_has_the_splits_that_its_names_say(tmp_path):
    write_stories(tmp_path / "d" / "TinyStories-train.txt", STORIES[:30])
    write_stories(tmp_path / "d" / "TinyStories-valid.TXT", STORIES[30:])
    write_stories(tmp_path / "d" / ".ipynb_checkpoints-train.txt", ["hidden"])
    assert split(tmp_path / "d") == (STORIES[:30], STORIES[30:])


def test_a_folder_of_texts_is_a_story_a_file_or_all_their_stories(tmp_path, capsys):
    for i, story in enumerate(STORIES):
        path = tmp_path / "one" / f"festival {i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{story}\n\n\n\nThe\n---\nend.\n\n\n\n---\n")  # which are the story's own
    training, validation = split(tmp_path / "one")
    assert (len(training), len(validation)) == (38, 2) and training[0].endswith("end.\n\n\n\n---")
    write_stories(tmp_path / "two" / "a.txt", STORIES[:20])
    write_stories(tmp_path / "two" / "b.txt", STORIES[20:])
    assert split(tmp_path / "two") == (STORIES[:38], STORIES[38:])
    first, warning, second = capsys.readouterr().err.splitlines()
    assert ": reading {'train': [" in first and ": reading {'train': [" in second
    assert f"WARNING: {tmp_path}/one/festival 00.txt is read as one story" in warning


@pytest.mark.parametrize("name", ["valid", "val", "eval", "evaluation", "dev", "test", "tests", "validation"])
def test_what_is_held_out_is_recognised_by_its_name_and_named(tmp_path, capsys, name):
    write_stories(tmp_path / "d" / "train" / "a.txt", STORIES[:30])
    write_stories(tmp_path / "d" / name / "b.txt", STORIES[30:])
    assert split(tmp_path / "d") == (STORIES[:30], STORIES[30:])
    assert f"'validation': ['{name}/b.txt']" in capsys.readouterr().err


def test_the_files_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    for i, name in enumerate(("a/1.txt", "a/2.txt", "a-b.txt", "a.txt", "b.txt")):
        write_stories(tmp_path / "d" / name, STORIES[8 * i:8 * i + 8])
    assert split(tmp_path / "d") == (STORIES[:38], STORIES[38:])


def test_hidden_folders_and_loops_of_links_are_not_read(tmp_path):
    write_stories(tmp_path / "d" / "train" / "a.txt", STORIES[:30])
    write_stories(tmp_path / "d" / ".ipynb_checkpoints" / "a-checkpoint.txt", ["hidden"])
    write_stories(tmp_path / "d" / "valid" / "b.txt", STORIES[30:])
    for name in ("loop", "another"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "d")
    assert split(tmp_path / "d") == (STORIES[:30], STORIES[30:])


@pytest.mark.parametrize("column", ["text", "story", "content", "body"])
@pytest.mark.parametrize("form", ["array.json", "lines.JSONL", "lines.json", "objects.jsonl", "rows.Parquet",
                                  "strings.json"])
def test_json_and_parquet_of_one_obvious_column(tmp_path, column, form):
    rows = [{"n": i, column: f" {s} ", "ok": True, "note": None, "tags": []}
            for i, s in enumerate([*STORIES, "", STORIES[0]])]
    rows[5][column] = None
    if column != "body":  # a name that says what it is may stand beside anything
        rows = [{"id": "x", **row, "more": {"a": [1]}} for row in rows]
    folder = tmp_path / "d"
    folder.mkdir()
    if form == "rows.Parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(rows).to_parquet(folder / form)
    else:
        written = {"array.json": " \n\n" + json.dumps(rows, indent=1),
                   "strings.json": json.dumps([row[column] for row in rows]),
                   "objects.jsonl": "\n".join(json.dumps(row, indent=2) for row in rows)}
        lines = "\n\n".join(map(json.dumps, rows))
        (folder / form).write_text("\ufeff" + written.get(form, lines))
    training, validation = split(folder)
    assert training + validation == [*STORIES[1:5], *STORIES[6:], STORIES[0]]
    assert split(folder / form) == (training, validation)


@pytest.mark.parametrize("row", [
    {"id": "id-0", "messages": [{"role": "user", "content": "x"}]}, {"id": "0", "conversations": ["x"]},
    {"title": "Story 0", "paragraphs": ["x"]}, {"url": "http://x/0", "doc": {"text": "x"}},
    {"version": "1", "data": [{"text": "x"}]}, {"data": [{"text": "x"}]}, {"title": "A", "body": "y"}])
@pytest.mark.parametrize("form", ["json", "indented.json", "jsonl", "parquet"])
def test_a_column_is_guessed_only_where_no_other_could_be_meant(tmp_path, row, form):
    path = tmp_path / f"d.{form}"
    if form == "parquet":
        pytest.importorskip("pandas").DataFrame([row, row]).to_parquet(path)
    else:
        path.write_text(json.dumps([row, row] if form == "json" else row, indent=1 if "in" in form else None))
    wanted = f"d.{form} has the columns {', '.join(row)}; give the one with the stories the name text"
    with pytest.raises(UserError, match=wanted if len(row) > 1 else "holds .* where a text is wanted"):
        prepare(char_config(tmp_path, path))


def test_a_column_that_is_empty_where_another_has_the_text_is_said_once(tmp_path, capsys):
    rows = [{"n": i, "text": story if i % 3 == 0 else [None, ""][i % 2], "body": story}
            for i, story in enumerate(STORIES)]
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data.say_once.cache_clear()
    assert sum(map(len, split(path))) == 14
    assert capsys.readouterr().err == ("WARNING: rows with nothing in column text are left out, though some "
                                       "have something in column body\n")
    data.say_once.cache_clear()
    path.write_text("\n".join(json.dumps({"n": row["n"], "text": row["text"] or " "}) for row in rows))
    assert sum(map(len, split(path))) == 14 and capsys.readouterr().err == ""


@pytest.mark.parametrize(("broken", "number"), [
    ('{"text": "x"', 21), ('{"text": "x', 21), ('{"text": x}', 21), ('{"text": "x"}}', 21), ('x', 21)])
@pytest.mark.parametrize("blank", ["", "\n \n"])
def test_an_error_in_a_json_file_names_the_line(tmp_path, broken, number, blank):
    lines = [json.dumps({"text": story}) for story in STORIES]
    lines[20] = broken
    (tmp_path / "s.jsonl").write_text(blank + "\n".join(lines))
    number += blank.count("\n")
    with pytest.raises(UserError, match=rf"cannot read .*s.jsonl: .*: line {number}$"):
        prepare(char_config(tmp_path, tmp_path / "s.jsonl"))


def test_an_error_in_an_array_names_the_line(tmp_path):
    text = json.dumps([{"text": story} for story in STORIES], indent=1).splitlines()
    text[4] += "x"
    (tmp_path / "s.json").write_text("\n" + "\n".join(text))
    with pytest.raises(UserError, match=r"cannot read .*s.json: .*: line 6$"):
        prepare(char_config(tmp_path, tmp_path / "s.json"))


def test_a_folder_is_of_the_kind_that_most_of_it_is(tmp_path):
    folder = tmp_path / "d"
    for i, story in enumerate(STORIES):
        write_stories(folder / f"{i:02}.txt", [story])
    (folder / "meta.json").write_text(json.dumps([{"text": "no story"}]))
    assert split(folder) == (STORIES[:38], STORIES[38:])
    (folder / "meta.json").write_text(json.dumps([{"text": "no story"}] * 1000))
    with pytest.raises(UserError, match="most files in .*d are .txt, but most of their bytes are in .json; "):
        split(folder)
    (folder / "meta.json").rename(folder / "meta.jsonl.bak")
    (folder / "d.parquet").touch()
    assert split(folder) == (STORIES[:38], STORIES[38:])


@pytest.mark.parametrize("kind", [None, "folder", "empty file", "stories"])
def test_what_is_named_like_a_dataset_a_tokenizer_or_a_preset_is_not_in_the_way(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    asked = []

    def hub(name, limited):
        asked.append(name)
        return {"train": {name: lambda: iter(STORIES)}}

    monkeypatch.setattr(data, "open_hub", hub)
    for name in ("auto", "tinystories", "sample", "gpt2", "char", "bpe", "quick", "roneneldan/TinyStories"):
        if kind == "stories":
            write_stories(tmp_path / name, ["One.", "Two."])
        elif kind == "empty file":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        elif kind == "folder":
            (tmp_path / name).mkdir(parents=True)
    for i, name in enumerate(("auto", "tinystories")):
        _, stream, _ = prepare(char_config(tmp_path / f"new {i}", name))
        assert stream.info["dataset"] == "tinystories" and stream.info["stories"] == 38
    assert asked == ["roneneldan/TinyStories"] * 2
    assert data.locate("sample") == {"train": [data.SAMPLE]}


@pytest.mark.parametrize(("files", "message"), [
    ({"a.jsonl": '{"a": "x", "b": "y"}'},
     "a.jsonl has the columns a, b; give the one with the stories the name text, in every row$"),
    ({"a.jsonl": '{"title": "A", "body": null}\n{"title": "B", "body": "y"}'},
     "a.jsonl has the columns title, body; "),
    ({"a.jsonl": '{"id": "0"}\n{"id": "1", "tale": "y"}'}, "a.jsonl has the columns id, tale; "),
    ({"a.jsonl": '{"n": 1}'}, "no story for the train split"),
    ({"a.jsonl": '{"text": "x"}', "b.jsonl": '{"body": "y"}'}, "b.jsonl has the columns body; "),
    ({"a.jsonl": '{"text": 7}'}, "a.jsonl holds 7 where a text is wanted$"),
    ({"a.jsonl": "1\n2"}, "a.jsonl holds 1 where a text is wanted"),
    ({"a.jsonl": '{"story": ["x", "y"]}'}, "a.jsonl holds .* where a text is wanted$"),
    ({"a.json": '[{"text": {"en": "x"}}]'}, "a.json holds {'en': 'x'} where a text is wanted$"),
    ({"a.json": '{"text": '}, "cannot read .*a.json: Expecting value: line 1$"),
    ({"a.json": '{"data": [{"text": "x"}]}'}, "a.json holds .* where a text is wanted"),
    ({"a.parquet": "no parquet"}, "cannot read .*a.parquet: "),
    ({"a.jsonl": b'{"text": "\xff"}'}, "cannot read .*a.jsonl: .*; convert it to UTF-8"),
    ({"a.csv": "text\nx"}, "d' does not exist or cannot be read: .* no file or folder of files .txt, .json"),
])
def test_what_cannot_be_stories_is_one_sentence_with_the_file(tmp_path, files, message):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        prepare(char_config(tmp_path, folder))
    assert "\n" not in str(error.value)


def test_a_dangling_link_is_one_sentence(tmp_path):
    (tmp_path / "s.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="s.txt' does not exist or cannot be read: .*or link to one"):
        prepare(char_config(tmp_path, tmp_path / "s.txt"))


# ---------------------------------------------------------------- separators

@pytest.mark.parametrize(("separator", "between"), [
    ("<|endoftext|>", "\n<|endoftext|>\n"), ("<|endoftext|>", "\r\n<|endoftext|> \r\n\r\n"),
    ("<|endoftext|>", "<|endoftext|>\n"), ("</s>", " </s>\n"), ("</s>", "\n\n</s>\n\n"),
    ("[SEP]", "\n[SEP]\n"), ("---", "\n---\n"), ("* * *", "\n* * *\n"), ("(.*)", "\n(.*)\n"),
    ("Schluß", "\nSchluß\n"), (r"\n\n\n", "\n\n\n"), ("\n\n\n", "\r\n\r\n \r\n\r\n\r\n"),
    (r"\n--\n", "\n--\n"), (r"==\n==", "\n==\r\n==\n")])
def test_stories_end_where_a_line_ends_with_the_separator(tmp_path, capsys, separator, between):
    path = tmp_path / "s.txt"
    path.write_bytes(between.join([*STORIES, ""]).encode())
    config = char_config(tmp_path, path, data__separator=separator)
    tokenizer, *streams = prepare(config)
    assert sum(stream.info["stories"] for stream in streams) == 40
    assert tokenizer.decode(streams[1].tokens) == "".join(f"{story}<|endoftext|>" for story in STORIES[38:])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("separator", [r"\n", r"\n\n"])
def test_an_empty_line_or_a_newline_can_separate_stories(tmp_path, separator):
    path = tmp_path / "s.txt"
    path.write_text("\n\n\n".join(f"Story {i}." for i in range(40)))
    _, stream, _ = prepare(char_config(tmp_path, path, data__separator=separator))
    assert stream.info["stories"] == 38


@pytest.mark.parametrize(("between", "mark"), [
    (" </s>\n", "</s>"), ("</s>\n<s>", "</s>"), ("</s>", "</s>"), ("\n<|end|>\n", "<|end|>"),
    ("<|startoftext|><|endofstory|>\n", "<|endofstory|>"), ("\n<EOS>\n", "<EOS>"), ("\n[SEP]\n", "[SEP]"),
    ("\n---\n", "---"), ("\r\n---\r\n", "---"), ("\n* * *\n", "* * *"), ("\n=====\n", "====="),
    ("\n\n\n", "\n\n\n"), ("\n\n \n\n\n", "\n\n\n"), ("\n\n", None), (" ", None)])
@pytest.mark.parametrize("files", ["s.txt", "d/a.txt d/b.txt", "d/train.txt d/valid.txt"])
def test_what_looks_like_a_separator_is_named_once_and_read_as_text(tmp_path, capsys, between, mark, files):
    texts = [f"{story}{between}Not {story}" for story in ("One. \n\nTwo.", "Three.")]
    paths = [tmp_path / name for name in files.split()]
    for path, text in zip(paths, texts):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    dataset = paths[0] if len(paths) == 1 else tmp_path / "d"
    for _ in range(2):
        stories = [story for part in split(dataset) for story in part]
    assert len(stories) == 2  # in one file, its two parts
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert warnings == ([f"WARNING: {paths[0]} is read as one story, since no line ends with data.separator="
                         f"'<|endoftext|>'; if {mark!r} separates its stories, use data.separator={mark!r} "
                         "(it counts only at the end of a line)"] if mark else [])
    if mark and len(paths) == 1 and between != "</s>" and "<|s" not in between:  # the advice helps
        stories = hold_out(open_dataset(str(dataset), True, mark), None, None)
        assert len([*stories[0](), *stories[1]()]) == 2 and "one long text" not in capsys.readouterr().err


def test_marks_in_stories_that_are_separated_are_text(tmp_path, capsys):
    path = tmp_path / "s.txt"
    path.write_text("\n<|endoftext|>\n".join([*STORIES, "He wrote </s> and\n---\n\n\nslept."]))
    assert split(path)[1][-1] == "He wrote </s> and\n---\n\n\nslept." and capsys.readouterr().err == ""


@pytest.mark.parametrize("lines", [0, 1, 20, 40])
def test_separators_may_stand_alone_or_at_the_end_of_a_story(tmp_path, lines):
    path = tmp_path / "s.txt"
    marks = ["\n<|endoftext|>\n"] * lines + ["<|endoftext|>\n"] * (40 - lines)
    path.write_text("".join(story + mark for story, mark in zip(STORIES, marks)))
    assert [story for part in split(path) for story in part] == STORIES


@pytest.mark.parametrize("name", ["s.jsonl", "s.txt"])
def test_a_separator_within_a_line_or_a_row_is_text_and_named(tmp_path, capsys, name):
    data.say_once.cache_clear()
    rows = [f"{story} <|endoftext|> {story}" for story in STORIES]
    text = "\n<|endoftext|>\n".join(rows) if name == "s.txt" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    assert [story for part in split(tmp_path / name) for story in part] == rows
    assert capsys.readouterr().err == "WARNING: '<|endoftext|>' within a line or a row is read as text\n"


def test_a_mark_late_in_a_text_is_named(tmp_path, capsys):
    (tmp_path / "s.txt").write_text("A line.\n" * 2**17 + "</s>\n")
    split(tmp_path / "s.txt")
    assert "use data.separator='</s>'" in capsys.readouterr().err


def test_streams_of_different_separators_stand_beside_each_other(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("\n---\n".join(STORIES) + "\n<|endoftext|>\nMore.")
    for separator, stories in (("---", 38), ("<|endoftext|>", 1), ("---", 38)):
        _, stream, _ = prepare(char_config(tmp_path, path, data__separator=separator))
        assert stream.info["stories"] == stories
    assert len(list((tmp_path / "data").glob("*.json"))) == 2


@pytest.mark.usefixtures("one_process")
def test_another_separator_is_another_run(halfway):
    _, config = halfway
    config.data.separator = "."
    with pytest.raises(UserError, match="the sha256 of the train stories was .* undo that .* or use --fresh"):
        go(config)


def test_a_byte_order_mark_is_no_part_of_a_story(tmp_path):
    (tmp_path / "s.txt").write_text("\ufeff" + "\n<|endoftext|>\n\ufeff".join(STORIES))
    training, validation = split(tmp_path / "s.txt")
    assert training + validation == STORIES


@pytest.mark.parametrize(
    ("mark", "newlines"), [("", "\n\n"), ("</s>", "\n\n"), ("\n---\n", "\n\n"), ("", " ")])
def test_a_book_is_one_long_text(tmp_path, capsys, mark, newlines):
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}. " * 10 for i in range(200)]
    path.write_text(newlines.join(paragraphs[:100]) + mark + newlines.join(paragraphs[100:]))
    (training,), (validation,) = split(path)
    assert training.startswith("Paragraph 0.") and validation.rstrip().endswith("Paragraph 199.")
    assert (training + validation).replace(" ", "") == path.read_text().replace(" ", "").strip()
    assert 0.02 < len(validation) / len(training) < 0.08
    printed = capsys.readouterr().err
    assert "one long text" in printed and printed.count("WARNING") == bool(mark) and mark.strip() in printed
    _, stream, held_out = prepare(char_config(tmp_path, path))
    assert stream.info["stories"] == held_out.info["stories"] == 1
    whole = evaluation.read_stream(str(path), data.CharTokenizer.train([path.read_text()]))
    assert whole.info["stories"] == 1 and whole.info["bytes"] == len(path.read_text().strip().encode())


# ---------------------------------------------------------------- pathological text

@pytest.mark.parametrize("text", [
    " " * 10**6 + "x", "\n" * 10**6 + "x", "a" + " \t" * 500_000 + "b", "a" * 10**6,
                                  "".join(random.Random(0).choices("abcdefgh", k=10**6)), "-" * 10**6])
def test_pathological_text_takes_bounded_time_and_is_lossless(text):
    started = time.monotonic()
    tokenizer = BPETokenizer.train([text, "some text"], 400)
    for tokens in (tokenizer.encode(text), tokenizer.encode_array(text)):
        assert tokenizer.decode(tokens) == text
    assert time.monotonic() - started < 30


def test_blanks_are_cut_only_where_they_are_many(stories):
    tokenizer = BPETokenizer.train(stories[:50], 400)
    for text in [*stories[:50], " a  b \n\n c" * 20, " " * 9999 + "x"]:
        expected = tokenizer._encoding.encode_ordinary(text)
        assert tokenizer.encode(text) == expected == tokenizer.encode_array(text).tolist()


# ---------------------------------------------------------------- the Hub, as it fails

REPOSITORY, REVISION = "roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `datasets` needs for one repository; how it fails: fault, after N requests."""
    protocol_version, fault, count, files = "HTTP/1.1", "", 0, {}

    def log_message(self, *args):
        pass

    def send(self, code: int, body: bytes, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entries(self) -> list[dict]:
        return [{"type": "file", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": len(content),
                 "path": name, "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content),
                                       "pointerSize": 134}}
                for name, content in self.files.items()]

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        is_json = "json" in self.headers["Content-Type"]
        asked = json.loads(body)["paths"] if is_json else parse_qs(body)["paths"]
        folder = {"type": "directory", "oid": "0" * 40, "size": 0}
        known = {entry["path"]: entry for entry in self.entries()}
        known |= {p: folder | {"path": p} for p in ("", "data")}
        self.send(200, json.dumps([known[p.strip("/")] for p in asked if p.strip("/") in known]).encode())

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if Hub.fault == "all503":
            return self.send(503, b"busy")
        if re.fullmatch(rf"/api/datasets/{REPOSITORY}(/revision/[^/]+)?", path):
            names = [{"rfilename": name} for name in self.files]
            about = {"_id": "1", "id": REPOSITORY, "author": "roneneldan", "sha": REVISION, "private": False,
                     "gated": False, "disabled": False, "tags": [], "downloads": 1, "likes": 1,
                     "siblings": names}
            return self.send(200, json.dumps(about).encode())
        if re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/.*", path):
            whole = "recursive=true" in self.path.lower() or path.rstrip("/").endswith("/data")
            folder = {"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}
            return self.send(200, json.dumps(self.entries() if whole else [folder]).encode())
        content = self.files.get(path.split(f"/resolve/{REVISION}/")[-1])
        if content is None:
            return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)
        first, last = 0, len(content) - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
        if self.command == "GET":
            Hub.count += 1
            if Hub.fault == "once" and Hub.count % 3 == 2:
                return self.send(503, b"busy")
            if Hub.count > 2 and Hub.fault == "429":
                return self.send(429, b"rate limited", Retry_After="1")
            if Hub.count > 2 and Hub.fault == "reset":
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if Hub.count > 2 and Hub.fault == "hang":
                time.sleep(60)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(206 if wanted else 200, content[first:last + 1], ETag=etag, X_Repo_Commit=REVISION,
                  Accept_Ranges="bytes", Content_Range=f"bytes {first}-{last}/{len(content)}",
                  X_Linked_Size=str(len(content)), X_Linked_Etag=etag)


@pytest.fixture(scope="module")
def hub():
    """The address of a Hub with TinyStories."""
    pandas = pytest.importorskip("pandas")
    noise = random.Random(0)
    for name, n in (("train", 3000), ("validation", 50)):
        rows = [f"{name} {i} {noise.randbytes(1000).hex()}" for i in range(n)]  # too much for one request
        buffer = io.BytesIO()
        pandas.DataFrame({"text": rows}).to_parquet(buffer, row_group_size=500)
        Hub.files[f"data/{name}-00000-of-00001.parquet"] = buffer.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads, server.handle_error = True, lambda *args: None  # a client that has gone
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def with_hub(hub: str, folder: Path, work, fault: str = "") -> int:
    """Calls work() in `folder`, in a process of its own that waits for nothing; returns its exit code."""
    Hub.fault, Hub.count = fault, 0

    def afresh():
        os.environ.update(HF_ENDPOINT=hub, HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="")
        os.chdir(folder)
        for name in [name for name in sys.modules if name.split(".")[0] in ("huggingface_hub", "datasets")]:
            del sys.modules[name]  # which read the endpoint when they are imported
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.2 if fault == "hang" else 5
        time.sleep = lambda seconds: None
        return work()

    return exit_code(forked(afresh))


def describe_data(dataset: str):
    """Returns a function that does as `python data.py`."""
    def work():
        sys.argv = ["data.py", "training.tokenizer_type=char", f"data.dataset={dataset}"]
        data.main()

    return work


@pytest.fixture
def small_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", write_stories(tmp_path / "sample_stories.txt", STORIES))


@pytest.mark.parametrize("fault", ["", "once"])
def test_the_default_path_works_against_the_hub(hub, tmp_path, capfd, fault):
    assert with_hub(hub, tmp_path, describe_data("auto"), fault) == 0
    out, err = capfd.readouterr()
    assert "tinystories, train: 3,000 stories" in out and "tinystories, validation: 50 stories" in out
    assert "WARNING" not in err and len([line for line in err.splitlines() if "\r" not in line]) <= 1
    assert not list((tmp_path / "data").glob("*.tmp"))


@pytest.mark.parametrize("fault", ["429", "reset", "hang", "all503"])
def test_a_hub_that_breaks_ends_in_bounded_time_and_in_one_line(hub, tmp_path, capfd, fault):
    started = time.monotonic()
    assert with_hub(hub, tmp_path, describe_data("tinystories"), fault) == 2
    assert time.monotonic() - started < 20
    *before, error = re.sub("[^\n]*\r", "", capfd.readouterr().err).splitlines()
    assert [line for line in before if line.strip()] == [
        f"reading roneneldan/TinyStories from {hub}, for at most about two minutes without an answer"]
    assert re.match("error: cannot (read|load) the dataset '.*TinyStories'(, split validation)?: .", error)
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_auto_falls_back_when_the_hub_breaks_in_the_middle(hub, tmp_path):
    """In a new process: a thread that still reads would abort it at its end."""
    Hub.fault, Hub.count = "reset", 0
    write_stories(tmp_path / "sample_stories.txt", STORIES)
    impatient = ("import time; time.sleep = lambda seconds: None; import config, data; "
                 "data.SAMPLE = data.Path('sample_stories.txt'); config.run_main(data.main)")
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "",
                                "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", impatient, "training.tokenizer_type=char"], cwd=tmp_path,
                           capture_output=True, timeout=60, encoding="utf-8", env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "sample, train: 38 stories" in ended.stdout
    assert "WARNING: not TinyStories: cannot read" in ended.stderr and "Fatal" not in ended.stderr
    assert len(list((tmp_path / "data").glob("*.bin"))) == 2 and not list((tmp_path / "data").glob("*.tmp"))


NO_HUB = "http://127.0.0.1:9"


@pytest.mark.usefixtures("small_sample")
def test_auto_without_network_falls_back_loudly_and_a_named_dataset_does_not(tmp_path, capfd):
    assert with_hub(NO_HUB, tmp_path, describe_data("auto")) == 0
    out, err = capfd.readouterr()
    assert "sample, train: 38 stories" in out and "WARNING: not TinyStories" in err
    assert with_hub(NO_HUB, tmp_path, describe_data("tinystories")) == 2
    assert capfd.readouterr().err.startswith("error: cannot load the dataset 'roneneldan/TinyStories'")


def test_an_earlier_download_serves_without_network(tmp_path, capfd):
    """The folder is laid out as `datasets` does after downloading roneneldan/TinyStories."""
    def download():
        import datasets

        for split, n in (("train", 50), ("validation", 1)):
            rows = [f"A {split} story, number {i}." for i in range(n)]
            datasets.Dataset.from_dict({"text": rows}).to_json(f"{split}.jsonl")
        files = {split: f"{split}.jsonl" for split in data.SPLITS}
        loaded = datasets.load_dataset("json", data_files=files)
        target = tmp_path / "hf" / "datasets" / "roneneldan___tiny_stories" / "default" / "0.0.0" / "0123"
        shutil.copytree(Path(loaded["train"].cache_files[0]["filename"]).parent, target)
        for file in target.glob("json-*"):
            file.rename(file.with_name(file.name.replace("json-", "tiny_stories-")))

    assert with_hub(NO_HUB, tmp_path, download) == 0
    assert with_hub(NO_HUB, tmp_path, describe_data("auto")) == 0
    out, err = capfd.readouterr()
    assert "tinystories, train: 50 stories" in out and "not TinyStories" not in err


def test_a_folder_named_like_a_hub_dataset_does_not_stand_for_tinystories(hub, tmp_path, capfd):
    (tmp_path / "roneneldan" / "TinyStories").mkdir(parents=True)
    assert with_hub(hub, tmp_path, describe_data("tinystories")) == 0
    assert "tinystories, train: 3,000 stories" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_streams_are_written_leaves_no_half_file(tmp_path, monkeypatch, capfd, number):
    def stall(stories, tokenizer, write):
        write(b"half")
        time.sleep(30)

    monkeypatch.setattr(data, "encode_stories", stall)
    pid = forked(lambda: prepare(char_config(tmp_path, write_stories(tmp_path / "s.txt", STORIES))))
    deadline = time.monotonic() + 10
    while not list((tmp_path / "data").glob("*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid, number)
    assert exit_code(pid, 10) == 128 + number
    assert not list((tmp_path / "data").glob("*.tmp"))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["e.txt", "e.json", "e.jsonl"])
def test_an_empty_file_is_one_sentence_and_in_a_folder_no_story(tmp_path, name):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).touch()
    config = tiny_config(tmp_path)
    config.data.dataset = str(tmp_path / "d" / name)
    with pytest.raises(UserError, match="has no story for the|Expecting value|Invalid|is empty"):
        prepare(config)
    for i, story in enumerate(STORIES):
        (tmp_path / "d" / f"s{i}.txt").write_text(story)
    assert sum(map(len, split(tmp_path / "d"))) == len(STORIES)


def test_rows_that_are_arrays_are_no_stories(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps([f"id-{i}", story]) + "\n" for i, story in enumerate(STORIES)))
    with pytest.raises(UserError, match="where a text is wanted"):
        split(path)
