"""The command line: its verbs, exit codes, interrupts, refusals of bad input, and progress."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

import memvec
from conftest import TRAINED_ON, reader
from memvec import codec, registry
from memvec.cli import app as app_module
from memvec.cli import display, progress
from memvec.cli.common import ModelChoice, loading_options, open_file
from memvec.cli.expected import duration, memory, number_of, sentence
from memvec.cli.options import Storage
from memvec.cli.use import _settings as generation_settings
from memvec.cram_job import CramStatus, Expected
from memvec.cramming.batch import Progress
from memvec.cramming.recipe import Recipe
from memvec.export import names as target_names
from memvec.journal import Journal
from memvec.model.estimate import Estimate
from memvec.resume import settings_of
from memvec.storage import STORAGES
from memvec.vectors import MemVectors

TEXT = "the lazy dog\r\n\té 👍\n\n"
FAST = ["--vectors", 2, "--tokens", 2, "--steps", 600]


@pytest.fixture
def letter(tmp_path, monkeypatch):
    """A text file in a new folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.txt").write_bytes(TEXT.encode())
    return tmp_path / "letter.txt"


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    """A file of vectors of `TEXT`, made by the library with the folder's model."""
    from memvec.loading import load_lm

    lm = load_lm(str(folder))
    mem = codec.cram(lm, [TEXT], vectors=2, tokens=2)
    assert mem.exact
    return mem.save(tmp_path_factory.mktemp("stored") / "letter.mem.safetensors")


def test_a_text_is_crammed_decoded_verified_and_inspected(command, folder, letter):
    ran = command("cram", letter, "-m", folder, *FAST)
    assert ran.code == 0
    assert b"exact" in ran.out
    assert sorted(p.name for p in letter.parent.iterdir()) == [
        "letter.mem.safetensors",
        "letter.txt",
    ]
    short = letter.with_name("letter.mem")
    assert command("decode", short).out == TEXT.encode()
    ran = command("verify", short)
    assert ran.code == 0
    assert b"WRONG" not in ran.out
    ran = command("inspect", short)
    assert ran.code == 0
    assert b"certificate" in ran.out
    assert command("cram", letter, "-m", folder, *FAST).code == 2
    assert command("cram", letter, "-m", folder, *FAST, "--force").code == 0


@pytest.mark.slow
def test_commands_print_json(command, folder, letter):
    ran = command("cram", letter, "-m", folder, *FAST, "-o", "a.mem", "--json", "--keep-text")
    made = json.loads(ran.out)
    assert (ran.code, made["exact"], made["file"]) == (0, True, "a.mem")
    assert made["bytes"]["text"] == len(TEXT.encode())
    checked = json.loads(command("verify", "a.mem", "--json").out)
    assert checked["exact"] is True
    assert checked["each"] == [True] * made["passages"]
    seen = json.loads(command("inspect", "a.mem", "--json").out)
    assert seen["documents"][0]["text"] == TEXT
    assert len(seen["passages"]) == made["passages"]
    report = json.loads(command("doctor", "-m", folder, "--json").out)
    assert report["can_be_crammed"] is True


@pytest.mark.slow
@pytest.mark.parametrize("option", ["checkpointing", "offload=true", "device_map=cpu"])
def test_loading_options_do_not_change_the_vectors(command, folder, letter, stored, option):
    if option.startswith("device_map"):
        pytest.importorskip("accelerate")
    one = ["cram", letter, "-m", folder, *FAST, "-o", "big.mem", "--load", option]
    assert command(*one).code == 0
    plain, big = (memvec.MemVectors.load(path) for path in (stored, "big.mem"))
    assert torch.allclose(plain.vectors, big.vectors, atol=1e-4)
    assert command("decode", "big.mem", "--load", option).out == TEXT.encode()
    assert command("doctor", "-m", folder, "--load", option).code == 0


@pytest.mark.parametrize("option", ["chekpointing", "device_map", "offload=perhaps", "quantize="])
def test_wrong_loading_options_are_refused(command, folder, letter, option):
    ran = command("cram", letter, "-m", folder, "--load", option)
    assert ran.code == 2
    assert "--load" in ran.err


def test_graphs_are_refused_on_a_cpu(command, folder, letter):
    ran = command("cram", letter, "-m", folder, "--load", "graphs")
    assert ran.code == 2
    assert "graphs cannot be used: they are CUDA graphs, and" in ran.err


def test_loading_options_are_parsed():
    assert loading_options(None) == {}
    given = ["checkpointing=false", "offload", "quantize=4bit", "device_map=auto"]
    expected = {"checkpointing": False, "offload": True, "quantize": "4bit", "device_map": "auto"}
    assert loading_options(given) == expected
    given = ["checkpointing=true", "offload=false", "graphs"]
    assert loading_options(given) == {"checkpointing": True, "offload": False, "graphs": True}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ((None, None, "cpu", None, None), ("org/m", "r1", "bfloat16", "8bit")),
        ((None, "r2", "cpu", None, None), ("org/m", "r2", "bfloat16", "8bit")),
        (("here", None, "cpu", None, None), ("here", None, "bfloat16", "8bit")),
        ((None, None, "cpu", "float32", ["quantize=4bit"]), ("org/m", "r1", "float32", "4bit")),
    ],
)
def test_a_file_is_read_with_the_model_it_names_unless_options_differ(
    monkeypatch, stored, tmp_path, choice, expected
):
    """The file's revision counts only if its model is used; options override the file."""
    mem, asked = MemVectors.load(stored), []
    model = {"name": "org/m", "revision": "r1", "dtype": "bfloat16", "quantize": "8bit"}
    header = mem.header.model_copy(update={"model": mem.header.model | model})
    file = MemVectors(mem.vectors, header).save(tmp_path / "a.mem")

    def load(name, **options):
        asked.append((name, *(options[key] for key in ("revision", "dtype", "quantize"))))
        return reader()

    monkeypatch.setattr("memvec.loading.load_lm", load)
    open_file(str(file), ModelChoice.of(*choice))
    assert asked == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_options_of_storage_and_recipe_are_in_the_file(command, folder, letter, storage):
    ran = command(
        *("cram", letter, "-m", folder, *FAST, "-o", "a.mem", "--storage", storage),
        *("--margin", 0.4, "--seed", 3, "--start", "embeddings", "--start-rule", "bos"),
        *("--set", "temperature=0.5", "--set", "unit=logits", "--set", "look_ahead=2"),
        *("--batch-size", 3),
    )
    assert ran.code == 0
    header = json.loads(command("inspect", "a.mem", "--json").out)
    assert header["storage"] == storage
    assert header["start_rule"] == "bos"
    recipe = header["recipe"]
    assert (recipe["margin"], recipe["seed"], recipe["temperature"]) == (0.4, 3, 0.5)
    assert (recipe["start"], recipe["look_ahead"]) == ("embeddings", 2)
    assert command("decode", "a.mem").out == TEXT.encode()


def test_a_text_from_standard_input_comes_back(command, folder, letter, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert command("cram", "-", "-m", folder, *FAST).code == 0
    assert command("decode", "stdin.mem").out == TEXT.encode()


@pytest.mark.slow
def test_a_text_in_another_encoding_comes_back(command, folder, letter):
    letter.write_bytes("né\n".encode("latin-1"))
    assert "--encoding latin-1" in command("cram", letter, "-m", folder, *FAST).sentence
    assert command("cram", letter, "-m", folder, *FAST, "--encoding", "latin-1").code == 0
    assert command("decode", "letter.mem").out == b"n\xe9\n"


@pytest.mark.slow
def test_brackets_in_a_file_name_are_no_markup(command, folder, letter):
    """rich reads square brackets as markup, but they occur in file names."""
    folder_of_it = letter.with_name("a[")
    folder_of_it.mkdir()
    name = folder_of_it / "b] [red]x.txt"
    name.write_text("the fox")
    assert command("cram", name, "-m", folder, *FAST).code == 0
    for verb in ("inspect", "verify"):
        assert command(verb, name.with_suffix(".mem")).code == 0
    shown = command("inspect", name.with_suffix(".mem")).out
    assert b"a[/b] [red]x" in shown.replace(b"\n", b"")


def test_inspect_shows_what_differs_from_the_default_recipe_and_how_weights_were_loaded(
    command, stored, tmp_path
):
    mem = MemVectors.load(stored)
    recipe = Recipe.of(optimizer="nadam", start="noise", unit="logits").record()
    header = mem.header.model_copy(
        update={"recipe": recipe | {"mine": 1}, "model": mem.header.model | {"quantize": "4bit"}}
    )
    changed = MemVectors(mem.vectors, header).save(tmp_path / "changed.mem")
    shown = b" ".join(command("inspect", changed).out.split()).decode()
    assert ", quantized to 4bit)" in shown
    assert (
        "recipe objective cross-entropy, temperature 0.2 logits, schedule growing, lr 0.1, margin "
        "0.28 logits, optimizer nadam, start noise made with"
    ) in shown


def test_exit_code_3_if_a_passage_is_not_exact(command, folder, letter):
    ran = command("cram", letter, "-m", folder, "--tokens", 6, "--steps", 0)
    assert ran.code == 3
    assert "came back only up to token" in ran.err
    assert letter.with_name("letter.mem.safetensors").exists()
    ran = command("verify", "letter.mem")
    assert ran.code == 3
    assert b"WRONG" in ran.out
    ran = command("decode", "letter.mem")
    assert (ran.code, ran.out) == (3, b"")
    assert "did not come back" in ran.sentence
    assert command("inspect", "letter.mem").code == 0


@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_cram_exits_with_130_and_resumes(command, folder, letter, monkeypatch, by):
    """Schedulers end a job with SIGTERM."""
    put, finished = Journal.put, []

    def interrupt(self, outcome):
        put(self, outcome)
        finished.append(outcome)
        if len(finished) == 2:
            if by == "Ctrl-C":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Journal, "put", interrupt)
    words = ["cram", letter, "-m", folder, *FAST, "--batch-size", 1]
    ran = command(*words)
    assert ran.code == 130
    assert "Traceback" not in ran.err
    assert "2 finished passages are kept" in ran.err
    assert not letter.with_name("letter.mem.safetensors").exists()
    ran = command(*words)
    assert ran.code == 0
    assert "2 passages are finished by an earlier run" in ran.err
    assert command("decode", "letter.mem").out == TEXT.encode()
    assert not list(letter.parent.glob("*.partial*"))


def test_an_interrupt_before_the_first_finished_passage_leaves_no_file(
    command, folder, letter, monkeypatch
):
    monkeypatch.setattr(codec, "cram", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command("cram", letter, "-m", folder).code == 130
    assert [p.name for p in letter.parent.iterdir()] == ["letter.txt"]


def test_an_interrupt_while_the_command_line_is_imported_shows_no_traceback(monkeypatch):
    import memvec.cli

    class Interrupting:
        def find_spec(self, name, *_):
            if name == "memvec.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "memvec.cli.app", raising=False)
    monkeypatch.setattr("sys.meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        memvec.cli.main()
    assert end.value.code == 130


def test_an_interrupted_inspect_prints_one_line(command, stored, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("memvec.vectors.MemVectors.load", interrupted)
    ran = command("inspect", stored)
    assert (ran.code, ran.out, ran.err) == (130, b"", "memvec: interrupted.\n")


def test_the_help_of_a_study_needs_no_extra(command, monkeypatch):
    monkeypatch.setattr("memvec.cli.study.NEEDED", ("pandas", "no_such_package"))
    for words, code in ((["run", "--help"], 0), (["ls"], 2)):
        monkeypatch.setattr("sys.argv", ["memvec", "study", *words])
        ran = command("study", *words)
        assert ran.code == code
        assert ("studies need no_such_package: pip install" in ran.err) == bool(code)


def test_verify_measures_use_with_other_weights_if_forced(command, stored, monkeypatch):
    of_use, seen = "memvec.usable.certificate", []
    monkeypatch.setattr(f"{of_use}.check_usable", lambda mem: None)

    def measured(*_, force):
        seen.append(force)
        return SimpleNamespace(model_dump=dict)

    monkeypatch.setattr(f"{of_use}.certify_use", measured)
    for words in ([], ["--force"]):
        assert command("verify", stored, "--use", "--json", *words).code == 0
    assert seen == [False, True]
    ran = command("verify", stored, "--engine", "transformers", "--force")
    assert (ran.code, "leave out --force" in ran.sentence) == (2, True)


def test_verify_use_refuses_exact_only_vectors_before_decoding(command, stored, monkeypatch):
    monkeypatch.setattr("memvec.vectors.MemVectors.decode_passages", None)
    ran = command("verify", stored, "--use")
    assert (ran.code, "cram the text with the preset 'usable'" in ran.sentence) == (2, True)


# ---------------------------------------------------------------------- bad input

BAD = [
    (["cram", "empty.txt"], "is empty"),
    (["cram", "."], "is a directory"),
    (["cram", "none.txt"], "there is no file none.txt"),
    (["cram", "binary.txt"], "is not utf-8"),
    (["cram", "letter.txt", "--max-bytes", 5], "larger than"),
    (["cram", "letter.txt", "--max-bytes", 5, "-m", "nowhere/none"], "larger than 5 bytes"),
    (["plan", "letter.txt", "--max-bytes", 5, "-m", "nowhere/none"], "larger than 5 bytes"),
    (["cram", "letter.txt", "--max-bytes", -3], "--max-bytes must be at least 1"),
    (["cram", "letter.txt", "--encoding", "utf-9"], "unknown encoding"),
    (["cram", "letter.txt", "--encoding", "base64"], "unknown encoding"),
    (["cram", "letter.txt", "--encoding", "undefined"], "unknown encoding"),
    (["cram", "letter.txt", "--set", "steps=100000000000000000000"], "at most 64 bits"),
    (["cram", "letter.txt", "--encoder", "~no-such/e"], "there is no encoder ~no-such/e"),
    (
        ["cram", "letter.txt", "--usable", "--trigger", "~no-such/t.safetensors"],
        "no trigger ~no-such/",
    ),
    (
        ["cram", "letter.txt", "-m", "~nobody-here/x"],
        "no model in ~nobody-here/x",
    ),
    (["cram", "letter.txt", "-m", "pocket", "--revision", "v1"], "only models of the Hub"),
    (["cram", "letter.txt", "-m", "nobody-at-all/nothing"], "could not be reached|neither"),
    (["cram", "letter.txt", "-m", "pocket", "--seed", 1], "seed 1 changes nothing"),
    (["cram", "letter.txt", "-m", "."], "no config.json"),
    (["cram", "letter.txt", "--vectors", 0], "--vectors must be at least 1"),
    (["cram", "letter.txt", "--vectors", 500], "500 vectors leave no room"),
    (["cram", "letter.txt", "--tokens", 0], "--tokens must be at least 1"),
    (["cram", "letter.txt", "--tokens", 500], "500 tokens do not fit the context"),
    (["cram", "letter.txt", "--batch-size", 0], "--batch-size must be at least 1"),
    (["cram", "letter.txt", "-o", "taken.mem"], "exists: use --force"),
    (["cram", "letter.txt", "-o", "no/such/folder/a.mem"], "there is no folder"),
    (["cram", "letter.txt", "-o", ".", "--force"], "is a (directory|folder)"),
    (["cram", "letter.txt", "--preset", "papre"], "did you mean 'paper'"),
    (["cram", "letter.txt", "--set", "lr"], "--set takes name=value"),
    (["cram", "letter.txt", "--set", "lrr=1"], "did you mean 'lr'"),
    (["cram", "letter.txt", "--set", "lr=x"], "recipe's lr must be a number"),
    (["cram", "letter.txt", "-o", "letter.txt", "--force"], "letter.txt is the text itself"),
    (["cram", "letter.txt", "-o", os.devnull, "--force"], "is a device or a pipe"),
    (["cram", "letter.txt", "--set", "steps=3", "--steps", 9], "steps is given by --set and by"),
    (["cram", "letter.txt", "--set", "look-ahead=3", "--set", "look_ahead=9"], "is given twice"),
    (["cram", "letter.txt", "--set", "dimensions=64"], "dimensions does nothing where space is"),
    (["cram", "letter.txt", "--set", "lr_end=0.5"], "lr_end does nothing where decay is '0'"),
    (["trigger", "train", "--text", "letter.txt", "--set", "steps=3"], "leave out --set steps"),
    (["cram", "letter.txt", "--set", "trigger=#1"], "trigger does nothing where start_rule is"),
    (["cram", "letter.txt", "--layer", 3], "layer does nothing where space is 'inputs'"),
    (["cram", "letter.txt", "--set", "query-count=9"], "query_count does nothing where term is"),
    (["cram", "letter.txt", "--set", "weight_decay=1"], "nothing where optimizer is 'full-matrix'"),
    (["plan", "letter.txt", "--preset", "paper", "--set", "look_ahead=2"], "schedule is 'whole'"),
    (["cram", "letter.txt", "--start", "encoder"], "no one-pass encoder"),
    (["cram", "letter.txt", "--start", "nois"], "it is one of auto, encoder, noise"),
    (["cram", "letter.txt", "--device", "gpu"], "unknown device"),
    (["cram", "letter.txt", "--dtype", "float7"], "unknown dtype"),
    (["cram", "n" * 300], "File name too long|there is no file"),
    (["cram", "letter.txt", "-o", "-"], "cannot be written to standard output"),
    (["cram", "letter.txt", "--tokens", 3, "--tokens", 4], "--tokens is given twice"),
    (["cram", "letter.txt", "-m", "pocket", "-m", "no"], "--model is given twice"),
    (["encoder", "train", "--text", "a", "--steps", 3, "--steps", 4], "--steps is given twice"),
    (["lab", "sentences", "train", "--text", "a", "--steps", 3, "--steps", 4], "is given twice"),
    (
        ["cram", "letter.txt", "--set", "coordinates=low-dim", "--set", "dimensions=9999"],
        "low-dim coordinates of .* have 1 to .* dimensions, not 9999",
    ),
    (["plan", "letter.txt", "--preset", "one-step"], "plan is for vectors that decode token by"),
    (["use", "letter.mem", "-p", "a", "-p", "b"], "--prompt is given twice"),
    (["use", "letter.mem", "-p", "a", "--temperature", "inf"], "from 0.001 to 1000, not inf"),
    (["use", "letter.mem", "-p", "caf\udce9"], r"the prompt is not UTF-8 \(byte 3\)"),
    (["use", "letter.mem", "-p", "a", "--seed", 2**64], "--seed must fit 64 bits"),
    (["encoder", "train", "--text", "letter.txt", "-o", ".", "--force"], "is a (directory|folder)"),
    (["encoder", "train", "--text", "letter.txt", "--seed", 2**64], "--seed must fit 64 bits"),
    (["encoder", "measure", "--text", "letter.txt", "--seed", 2**64], "--seed must fit 64 bits"),
    (["trigger", "train", "--text", "letter.txt", "--seed", 2**64], "--seed must fit 64 bits"),
    (["decode", "none.mem"], "there is no file none.mem"),
    (["decode", "."], "is a directory"),
    (["decode", "empty.txt"], "is not a file of"),
    (["decode", "letter.txt"], "is not a file of"),
    (["decode", "cut.mem"], "truncated"),
    (["decode", "flipped.mem"], "digest|damaged|truncated"),
    (["verify", "cut.mem"], "truncated"),
    (["inspect", "cut.mem"], "truncated"),
]


@pytest.mark.parametrize("own", [None, "5"])
def test_waiting_threads_sleep_soon_unless_the_variable_is_set(own, monkeypatch):
    """It is set before torch, and with it OpenMP, can be imported by the command."""
    monkeypatch.setenv("GOMP_SPINCOUNT", own or "")
    if own is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    seen = []
    monkeypatch.setattr("memvec.cli.app.run", lambda: seen.append(os.environ["GOMP_SPINCOUNT"]))
    memvec.cli.main()
    assert seen == [own or "1000"]


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_sentence(command, untyped, folder, letter, stored, words, sentence):
    here = letter.parent
    (here / "empty.txt").touch()
    (here / "binary.txt").write_bytes(b"\xff\x00\xfe")
    (here / "taken.mem").write_bytes(b"mine")
    good = stored.read_bytes()
    (here / "cut.mem").write_bytes(good[: len(good) // 2])
    (here / "flipped.mem").write_bytes(good[:-3] + bytes([good[-3] ^ 4]) + good[-2:])
    before = {p.name: p.read_bytes() for p in here.iterdir()}
    model = [] if "-m" in words or words[0] == "inspect" else ["-m", folder]
    ran = command(*words, *model)
    assert ran.code == 2, ran.err
    assert ran.out == b""
    assert "Traceback" not in ran.err
    assert re.search(sentence, ran.sentence), ran.err
    assert ran.sentence.startswith("memvec: ")
    assert {p.name: p.read_bytes() for p in here.iterdir()} == before


@pytest.mark.slow
def test_a_terminal_without_utf8_shows_escaped_characters(command, letter, monkeypatch, folder):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    (letter.parent / "café.txt").write_text(letter.read_text("utf-8"), "utf-8")
    monkeypatch.setattr("sys.stdout", plain)
    assert command("cram", "café.txt", "-m", folder, "--tokens", 4).code == 0
    plain.flush()
    assert rb"caf\xe9.mem" in plain.buffer.getvalue()


def test_a_closed_standard_input_is_refused(command, folder, letter, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input is closed" in command("cram", "-", "-m", folder).sentence


@pytest.mark.slow
def test_a_text_whose_name_is_not_utf8_comes_back(command, folder, letter):
    name = os.fsdecode(b"letter-\xff.txt")
    Path(name).write_bytes(TEXT.encode())
    assert "name the file to write with -o" in command("cram", name, "-m", folder, *FAST).sentence
    assert command("cram", name, "-m", folder, *FAST, "-o", "a.mem").code == 0
    assert command("decode", "a.mem").out == TEXT.encode()
    assert command("inspect", "a.mem", "--json").code == 0
    Path(os.fsdecode(b"a-\xff.mem")).write_bytes(Path("a.mem").read_bytes())
    assert "is no name in UTF-8" in command("decode", os.fsdecode(b"a-\xff.mem")).sentence


@pytest.mark.slow
@pytest.mark.parametrize("changed", [("--margin", 0.9), ("--storage", "int8"), ("--one-step",)])
def test_a_cram_resumes_only_with_the_same_settings(command, folder, letter, monkeypatch, changed):
    put = Journal.put

    def interrupted(journal, outcome):
        put(journal, outcome)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", interrupted)
        assert command("cram", letter, "-m", folder, *FAST).code == 130
        other = command("cram", letter, "-m", folder, *FAST, *changed)
    assert "Going on" not in other.err
    ran = command("cram", letter, "-m", folder, *FAST)
    assert "Going on: 1 passage is finished" in ran.err
    assert command("decode", "letter.mem").out == TEXT.encode()


def test_the_settings_of_a_run_include_the_content_of_the_questions_file(tmp_path):
    """The questions change the vectors, so an interrupted run must not resume with other ones."""
    questions, lm = tmp_path / "questions.txt", reader()
    recipe = Recipe(term="use", queries=str(questions), start_rule="bos")
    sizes = {"vectors": 2, "layout": "prefix", "storage": "float32"}
    settings = []
    for text in ("Who sat?", "Who ran?", "Who sat?"):
        questions.write_text(text)
        settings.append(settings_of(lm, recipe, **sizes))
    assert settings[0] == settings[2] != settings[1]


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ((False, None, None), False),
        ((True, None, None), True),
        ((False, 0.5, None), True),
        ((False, None, 0.9), True),
    ],
)
def test_a_temperature_or_top_p_turns_sampling_on(given, samples):
    assert generation_settings(5, *given)["do_sample"] is samples


def test_a_file_that_appears_while_cramming_is_not_overwritten(
    command, folder, letter, monkeypatch
):
    honest, target = codec.cram, letter.with_name("letter.mem.safetensors")

    def slow(*arguments, **options):
        mem = honest(*arguments, **options)
        target.write_bytes(b"of somebody else")
        return mem

    with monkeypatch.context() as patch:
        patch.setattr(codec, "cram", slow)
        ran = command("cram", letter, "-m", folder, *FAST)
    assert (ran.code, target.read_bytes()) == (2, b"of somebody else")
    assert "exists: use --force" in ran.sentence
    ran = command("cram", letter, "-m", folder, *FAST, "-o", "other.mem")
    assert command("decode", "other.mem").out == TEXT.encode()
    ran = command("cram", letter, "-m", folder, *FAST, "--force")  # nothing was lost
    assert "Going on: " in ran.err


def test_right_tokens_with_wrong_bytes_exit_with_3(command, stored, tmp_path):
    mem = MemVectors.load(stored)
    (document,) = mem.header.documents
    header = mem.header.model_copy(
        update={"documents": [document.model_copy(update={"sha256": "0" * 64})]}
    )
    file = MemVectors(mem.vectors, header).save(tmp_path / "a.mem")
    for verb in ("verify", "decode"):
        ran = command(verb, file)
        assert (ran.code, ran.out) == (3, b"")
        assert "came back but its bytes did not" in ran.sentence


def test_python_runs_memvec_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "memvec", "--version"], capture_output=True)
    assert (ran.returncode, ran.stdout.decode().split()[-1]) == (0, memvec.__version__)


def test_vectors_of_another_model_are_refused_and_not_decoded_by_force(
    command, folder, letter, stored, tmp_path
):
    other = tmp_path / "other"
    lm = reader(seed=1)
    lm.model.save_pretrained(other)
    lm.tokenizer.save_pretrained(other)
    for verb in ("decode", "verify"):
        ran = command(verb, stored, "-m", other)
        assert (ran.code, ran.out) == (2, b"")
        assert "other weights" in ran.sentence
    ran = command("decode", stored, "-m", other, "--force")
    assert (ran.code, ran.out) == (3, b"")


def test_an_error_of_the_system_is_one_sentence(monkeypatch, capsys):
    def fails():
        raise OSError(*reason)

    monkeypatch.setattr(app_module, "app", fails)
    for reason, name in (
        ((errno.ENOSPC, "No space left on device"), "a file or standard output"),
        ((errno.EIO, "Input/output error", "a.txt"), "a.txt"),
    ):
        with pytest.raises(SystemExit) as ended:
            app_module.run()
        assert ended.value.code == 2
        said = f"memvec: {name} cannot be read or written: {reason[1]}.\n"
        assert capsys.readouterr().err == said


def test_finished_passages_are_kept_if_the_disk_is_full(command, folder, letter, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        ran = command("cram", letter, "-m", folder, *FAST)
    assert ran.code == 2
    assert "No space left on device" in ran.sentence
    ran = command("cram", letter, "-m", folder, *FAST)
    assert ran.code == 0
    assert "finished by an earlier run" in ran.err


def test_an_output_folder_without_write_permission_is_refused(command, folder, letter, monkeypatch):
    monkeypatch.setattr(
        "pathlib.Path.touch", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Not allowed"))
    )
    ran = command("cram", letter, "-m", folder, "-o", letter.with_name("x.mem"))
    assert ran.code == 2
    assert "cannot be written to: Not allowed" in ran.sentence


@pytest.mark.slow
def test_a_second_cram_into_the_same_file_is_refused(command, folder, letter):
    busy = Journal(letter.with_name("letter.mem.safetensors.partial"), {})
    ran = command("cram", letter, "-m", folder, *FAST)
    assert ran.code == 2
    assert "another memvec is writing" in ran.sentence
    busy.close()


def test_doctor_refuses_a_folder_without_a_model(command, tmp_path):
    ran = command("doctor", "-m", tmp_path)
    assert ran.code == 2
    assert b"cannot be crammed here" in ran.out


def test_the_version_is_printed_and_an_unknown_verb_refused(command):
    assert command("--version").out.decode() == f"memvec {memvec.__version__}\n"
    assert command("crma").code == 2


def verbs_of(group: Any, *path: str) -> Iterator[str]:
    """The names of all commands of a group, as they are typed after `memvec`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs_of(command, *path, name)
        else:
            yield " ".join((*path, name))


VERBS = list(verbs_of(typer.main.get_command(app_module.app)))
SHOWN_WITH_ANOTHER = ("study vectors", "trigger train")  # one example is of the verb that follows


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_ends_with_examples(command, verb):
    ran = command(*verb.split(), "--help")
    assert ran.code == 0
    before, examples = ran.out.decode().split("Examples")
    assert examples.count(f"memvec {verb}") >= (1 if verb in SHOWN_WITH_ANOTHER else 2)
    assert examples.count("memvec ") >= 2
    assert "--seats" not in before


def test_help_lists_presets_storages_and_export_targets(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    presets = registry.names("preset")
    for verb, names in (("cram", presets), ("cram", STORAGES), ("export", target_names())):
        words = re.findall(r"[\w.-]+", command(verb, "--help").out.decode())
        assert set(names) <= {word.rstrip(".") for word in words}
    assert set(Storage) == set(STORAGES)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["cram", "plan"])
def test_the_old_name_of_the_batch_size_works_with_a_warning(command, folder, letter, verb):
    warning = "memvec: --seats is now --batch-size; the old name goes away in the next release.\n"
    words = [verb, letter, "-m", folder, *FAST[:4], "--set", "steps=600"]
    ran = command(*words, "--seats", 1)
    assert ran.code == 0, ran.err
    assert ran.err.count(warning) == 1
    assert "1 slot of up to 2 tokens" in ran.err
    ran = command(*words, "--seats", 0)
    assert (ran.code, ran.out) == (2, b"")
    assert ran.err == warning + "memvec: --batch-size must be at least 1, not 0.\n"
    ran = command(*words, "--seats", 1, "--batch-size", 2)
    assert (ran.code, ran.out) == (2, b"")
    assert "leave out --seats" in ran.sentence


HEAVY = """
import sys
sys.argv = ["memvec", "--help"]
import memvec.cli
try:
    memvec.cli.main()
except SystemExit as end:
    assert not end.code
print("HEAVY", [name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""


def test_help_imports_no_torch_transformers_or_numpy():
    ran = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[-1] == "HEAVY []"
    assert "cram" in ran.stdout


BARE = """
import json, sys
absent = set(json.loads(sys.argv[1]))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Without, sys.meta_path)
import memvec.cli
for words in json.loads(sys.argv[2]):
    sys.argv = ["memvec", *words]
    try:
        memvec.cli.main()
    except SystemExit as end:
        print("CODE", words[0], end.code or 0, flush=True)
"""


@pytest.mark.slow
def test_an_install_without_extras_runs_every_verb_but_study(folder, letter):
    """The packages of all extras cannot be imported; `study` names the extra that it needs."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    absent = {re.match(r"[\w-]+", name)[0] for names in extras for name in names} - {"memvec"}
    verbs = (
        ["cram", "letter.txt", "-m", str(folder), *map(str, FAST)],
        ["verify", "letter.mem"],
        ["inspect", "letter.mem"],
        ["export", "letter.mem", "--to", "npy"],
        ["plan", "letter.txt", "-m", str(folder), *map(str, FAST[:4])],
        ["doctor", "-m", str(folder)],
        ["decode", "letter.mem"],
        ["study", "ls"],
    )
    words = [sys.executable, "-c", BARE, json.dumps(sorted(absent)), json.dumps(verbs)]
    ran = subprocess.run(words, capture_output=True)
    said = ran.stderr.decode()
    codes = re.findall(rb"CODE (\w+) (\d)", ran.stdout)
    asked = [(verb[0].encode(), b"2" if verb[0] == "study" else b"0") for verb in verbs]
    assert codes == asked, said
    assert TEXT.encode() + b"CODE decode 0" in ran.stdout
    assert "pip install '.[study]' in the repository." in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_closed_pipe_after_decode_shows_no_traceback(folder, stored):
    """As in `memvec decode x | head -c 0`."""
    decoding = subprocess.Popen(
        [sys.executable, "-m", "memvec.cli", "decode", stored],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    decoding.stdout.close()
    complaints = decoding.stderr.read().decode()
    decoding.stderr.close()
    assert decoding.wait() in (0, 1)
    assert "Traceback" not in complaints
    assert "Exception" not in complaints


def test_every_public_name_can_be_imported():
    assert set(memvec.__all__) <= set(dir(memvec))
    for name in memvec.__all__:
        assert getattr(memvec, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        memvec.nothing  # noqa: B018


# ---------------------------------------------------------------------- progress

TWO = Expected(2, 9, Estimate(5e8, 5e8, 0.0, 0.0, 0.0), 0.0, 1.0)
BUSY = CramStatus(
    "cramming",
    tokens=100,
    done=40,
    vectors=3,
    split=1,
    engine=Progress(2, 5, 7.0, steps=30, tokens=400),
)


def test_the_expected_time_is_ten_steps_of_every_passage():
    """A step of all slots takes 3 s, and the slots are filled four times: 10 x 3 x 4 s."""
    said = sentence(replace(TWO, step=3.0, fills=4.0))
    assert said.startswith(sentence(TWO))
    assert said.endswith(
        "A step takes about 3 s; if passages need 10 steps on average, all of them take 2 min."
    )


@pytest.mark.parametrize(("unit", "name"), [(2.0**30, "GiB"), (2.0**20, "MiB")])
def test_the_printed_parts_of_memory_add_up_to_its_total(unit, name):
    """The rest is the larger one of logits and gradients, plus the state of the slots."""
    total = Estimate(512 * unit, 128 * unit, 32 * unit, 64 * unit, 8 * unit)
    number = "{:.1f}" if name == "GiB" else "{:.0f}"
    parts = (number.format(n) for n in (712.0, 512.0, 128.0, 72.0))
    assert memory(total) == (
        "about {} {n} at the peak: weights {}, activations {}, the rest (logits or gradients, "
        "optimiser) {}".format(*parts, n=name)
    )
    assert memory(Estimate(2.0**30, 0.0, 0.0, 0.0, 0.0)).startswith("about 1.0 GiB at")


def test_durations_are_in_the_unit_that_fits():
    shown = {0.1234: "0.12 s", 9.4: "9.4 s", 9.96: "10 s", 10.0: "10 s", 99.4: "99 s"}
    shown |= {100.0: "2 min", 5999.0: "100 min", 6000.0: "1.7 h", 36_000.0: "10.0 h"}
    assert {seconds: duration(seconds) for seconds in shown} == shown
    assert duration(float("nan")) == "?"
    assert [number_of(n, "slot") for n in range(3)] == ["0 slots", "1 slot", "2 slots"]


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.cram_progress("it") as show:
        show(replace(BUSY, stage="measuring"))
        now[0] = 9.0
        show(replace(BUSY, expected=TWO, done=20))  # 20 tokens are of an earlier run
        assert capsys.readouterr().err == f"{sentence(TWO)}\n"
        now[0] = 19.5
        show(BUSY)
        line = capsys.readouterr().err
        shown = "cramming 2 passages (5 waiting, 1 cut in half), mean horizon 7, 40/100 tokens"
        assert shown in line
        assert "about 32 s left" in line  # 20 tokens took 10.5 s, 60 are left
        show(BUSY)
        assert capsys.readouterr().err == ""
        now[0] = 30.0
        show(CramStatus("measuring", tokens=100, done=0, vectors=0, split=0))
        assert "it: measuring, 0/100 tokens\n" in capsys.readouterr().err


@pytest.mark.parametrize(("workers", "each"), [(0, ""), (3, "3 workers, each with ")])
def test_slots_and_memory_are_said_to_be_those_of_each_worker(workers, each, capsys):
    with progress.cram_progress("it", workers) as show:
        show(replace(BUSY, expected=TWO))
    assert capsys.readouterr().err.startswith(f"{each}2 slots of up to ")


@pytest.mark.parametrize(("split", "some"), [(1, "1 passage."), (7, "7 passages."), (0, "")])
def test_progress_ends_with_the_number_of_halved_passages(capsys, split, some):
    """The printed cost is that of the passages in the file, so it lacks those that were cut."""
    with progress.cram_progress("it") as show:
        show(BUSY)
        show(replace(BUSY, split=split))
    said = capsys.readouterr().err
    if split:
        assert f"not exact: {some} The cost counts the halves only." in said
    else:
        assert "in half because" not in said


def test_progress_of_cutting_and_certifying_is_a_share():
    lines = [progress._cram_line(replace(BUSY, stage=s, share=0.25)) for s in ("cutting", "x")]
    assert lines == ["cutting (25%)", "x"]


def test_progress_of_measuring_a_model_is_a_number_of_passages():
    line = progress._cram_line(replace(BUSY, stage="measuring", split=0))
    assert line == "measuring 2 passages (5 waiting), mean horizon 7"


def test_decoding_shows_its_share_and_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.decoding_progress("it") as show:
        show(0.1)
        assert capsys.readouterr().err == ""
        now[0] = 12.0
        show(0.25)
        assert capsys.readouterr().err == "it: decoding (25%), about 36 s left\n"
        show(0.5)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", ["decode", "verify"])
def test_decode_and_verify_print_progress_on_standard_error(command, stored, monkeypatch, verb):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    shown = command(verb, stored)
    line = f"{stored}: decoding (100%), about 0 s left"
    assert line in " ".join(shown.err.split())
    assert b"decoding" not in shown.out


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "err", console)
    with progress.cram_progress("notes[/b].txt") as show:  # a name that rich could read as markup
        show(BUSY)
    with progress.decoding_progress("notes[/b].txt") as decoded:
        decoded(0.7)
    assert "cramming 2 passages" in screen.getvalue()
    assert "40 %" in screen.getvalue()
    assert "notes[/b].txt: decoding" in screen.getvalue()
    assert "70 %" in screen.getvalue()


def test_inspect_and_certificate_print_names_units_and_rounded_numbers(monkeypatch, capsys, stored):
    """A missing revision is not printed as None, and one step is singular."""
    from rich.console import Console

    mem = MemVectors.load(stored)
    mem.header.model["revision"] = None
    recipe = mem.header.recipe | {"unit": "logits", "temperature": 0.41182645}
    monkeypatch.setattr(display, "out", Console(width=200))
    display.inspect(MemVectors(mem.stored, mem.header.model_copy(update={"recipe": recipe})), "x")
    certificate = {**(mem.header.certificate or {}), "attention": "sdpa", "torch": "2"}
    for cache in ("past_key_values", "none: it has no cache"):
        display.certificate(mem, {**certificate, "cache": cache}, [True] * len(mem.passages))
    shown = " ".join(capsys.readouterr().out.split())
    assert "temperature 0.412 logits, schedule growing" in shown
    assert f"{mem.vectors.shape[1]} vectors each, D " in shown
    assert "None" not in shown
    costs = {"steps": 1, "spent": 1, "seconds": 0.23}
    for passage in mem.header.passages[1:]:
        costs = {name: total - getattr(passage, name) for name, total in costs.items()}
    first = mem.header.passages[0].model_copy(update=costs)
    lone = mem.header.model_copy(update={"passages": [first, *mem.header.passages[1:]]})
    display.inspect(MemVectors(mem.stored, lone), "x")
    assert "1 step, 1 forward-backward token, 0.2 s" in capsys.readouterr().out
    assert "when crammed: margin, logits ┃ when crammed: gain, bits" in shown
    assert "(sdpa attention, with a cache, torch 2)" in shown
    assert "(sdpa attention, without a cache (it has no cache), torch 2)" in shown


def test_a_long_certificate_lists_only_passages_that_fail(capsys, stored):
    mem = MemVectors.load(stored)
    n = 60
    passages = [mem.passages[0]] * n
    many = MemVectors(
        mem.vectors[:1].repeat(n, 1, 1),
        mem.header.model_copy(update={"passages": passages}),
    )
    certificate, _ = memvec.verify(reader(), mem, force=True)
    exact = [i != 50 for i in range(n)]
    display.certificate(many, certificate, exact)
    shown = capsys.readouterr().out
    assert "59 of 60 passages exact" in shown
    assert "59 more passages are not listed" in shown
    assert shown.count("WRONG") == 1


def test_the_tokenizer_of_the_tests_merges_bytes():
    """A text on which it was trained has fewer tokens than bytes."""
    lm = reader()
    assert len(lm.tokenize(TRAINED_ON)) < len(TRAINED_ON.encode())
