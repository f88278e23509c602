"""The program of an export, `python FOLDER/decode.py`, decodes it in an environment without memvec.

vLLM and SGLang's server are fakes here. llama.cpp and mlx-lm run if MEMVEC_ENGINES is a folder of
their environments.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from conftest import QUICK, build, passages, reader
from memvec import codec
from memvec.export import export, names
from memvec.export import target as target_of
from memvec.export.transformers import generated
from memvec.passages.passage import Passage, ids_hash
from test_interop import crammed, in_dtype

pytestmark = pytest.mark.slow  # each program imports its engine
HERE = Path(__file__).parent
THERE = Path(os.environ.get("MEMVEC_ENGINES", "/nowhere"))
RULES = ["vectors", "bos", "first-token"]


def exported(target: str, folder: Path, rule: str = "vectors", dtype: torch.dtype = torch.float32):
    lm = in_dtype("llama", dtype)
    mem = crammed(lm, rule, (*passages(2, 3), Passage((5, 1, 7))))  # 1 is the model's EOS
    export(lm, mem, target_of(target), folder)
    return mem


def run(folder: Path, argument: object, python: object):
    """Run the program: its exit code, the ids that it printed, the last line of its errors."""
    where = {**os.environ, "PYTHONPATH": str(HERE / "engines_fake")}
    done = subprocess.run(
        [str(python), str(folder / "decode.py"), str(argument)],
        capture_output=True,
        text=True,
        env=where,
    )
    ids = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return done.returncode, ids, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture
def model(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "encoder.safetensors").write_bytes(b"no weights of the model")
    return tmp_path / "model"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", ["transformers", "peft", "vllm"])
def test_the_program_of_an_export_decodes_it(target, rule, model, tmp_path, python):
    mem = exported(target, tmp_path / "out", rule)
    code, ids, said = run(tmp_path / "out", model, python)
    assert code == 0, said
    assert [ids_hash(row) for row in ids] == [p.sha256 for p in mem.passages]


@pytest.mark.parametrize("target", ["llama.cpp", "mlx"])
def test_the_program_of_an_export_decodes_it_in_the_installed_engine(target, tmp_path, monkeypatch):
    python = THERE / target / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"there is no {python}: set MEMVEC_ENGINES")
    mem = exported(target, tmp_path / "out", "bos")
    build("llama").save_pretrained(tmp_path / "model")
    code, ids, said = run(tmp_path / "out", tmp_path / "model", python)
    assert code == 0, said
    assert [ids_hash(row) for row in ids] == [p.sha256 for p in mem.passages]


def test_the_program_sends_the_bodies_to_a_server(tmp_path, python):
    mem = exported("sglang", tmp_path / "out", "bos", torch.bfloat16)
    lm, asked = in_dtype("llama", torch.bfloat16), []

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body["sampling_params"]["temperature"]))
            inputs = torch.tensor(body["input_embeds"]).bfloat16()
            wanted = body["sampling_params"]["max_new_tokens"]
            ids = generated(lm, inputs, wanted)
            data = json.dumps({"text": "", "output_ids": ids}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        code, ids, said = run(tmp_path / "out", address, python)
    finally:
        server.shutdown()
        server.server_close()
    assert code == 0, said
    assert asked == [("/generate", 0)] * len(mem.passages)
    assert [ids_hash(row) for row in ids] == [p.sha256 for p in mem.passages]


@pytest.mark.parametrize("target", sorted(set(names()) - {"npy"}))
def test_a_damaged_folder_is_refused_before_the_model_is_loaded(target, tmp_path):
    """`passages.py`, which every `decode.py` imports, makes the checks."""
    dtype = torch.bfloat16 if target == "sglang" else torch.float32
    exported(target, tmp_path / "out", dtype=dtype)
    manifest = tmp_path / "out" / "manifest.json"
    asked = manifest.read_text()
    for name in json.loads(asked)["files"]:
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert_refused(tmp_path / "out", f"{name} of this folder is missing, cut short")
        path.write_bytes(whole)
    changed = json.loads(asked)
    changed["passages"] = changed["passages"][:1]
    without = {k: v for k, v in json.loads(asked).items() if k != "passages"}
    for text in (asked[:-9], "[]", "{}", json.dumps(changed), json.dumps(without)):
        manifest.write_text(text)
        assert_refused(tmp_path / "out", "has no whole manifest.json: export it again.")


def test_an_address_without_a_server_and_a_folder_without_a_model_are_refused(
    model, tmp_path, python
):
    exported("sglang", tmp_path / "s", dtype=torch.bfloat16)
    for argument, why in (
        (str(model), "name the server's address"),
        ("http://127.0.0.1:9", "did not answer as a server of SGLang does"),
    ):
        code, _, said = run(tmp_path / "s", argument, python)
        assert (code, why in said, len(said.splitlines())) == (1, True, 1)
    exported("transformers", tmp_path / "t")
    (model / "config.json").write_text("{")
    code, _, said = run(tmp_path / "t", model, python)
    assert (code, said) == (1, f"{model / 'config.json'} is not a model's config.")


def assert_refused(folder: Path, why: str):
    done = subprocess.run(
        [sys.executable, "-c", "import passages"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_model_is_refused_or_fails_the_hashes(model, tmp_path, python):
    """Another width is refused; with other weights the hashes of the passages do not match."""
    exported("transformers", tmp_path / "out")
    build("llama", seed=1).save_pretrained(tmp_path / "other")
    code, _, said = run(tmp_path / "out", tmp_path / "other", python)
    assert (code, said.endswith("did not come back.")) == (3, True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    code, _, said = run(tmp_path / "out", model, python)
    assert (code, said) == (1, f"{model} reads vectors of 48 numbers, and these have 32.")
    code, _, said = run(tmp_path / "out", tmp_path, python)
    assert (code, said) == (1, f"{tmp_path} is no folder of a model: it has no config.json.")


def test_the_export_command_prints_how_to_decode(command, folder, tmp_path):
    codec.cram(reader(), ["the fox"], vectors=2, tokens=2, recipe=QUICK).save(tmp_path / "a.mem")
    words = ["export", tmp_path / "a.mem", "--model", folder]
    for target in ("transformers", "npy"):
        out = tmp_path / f"of {target}"
        ran = command(*words, "--to", target, "-o", out)
        assert ran.code == 0, ran.err
        # A shell reads the printed line as the words that it means.
        program = ["python", f"{out}/decode.py", "MODEL_FOLDER"]
        said = any(
            shlex.split(line)[-3:] == program
            for line in ran.err.splitlines()
            if "Decode it" in line
        )
        assert said == (out / "decode.py").exists() == (target == "transformers")
