"""A fake of vLLM's server: the three paths that memvec's runner asks, with the fake LLM."""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch

from vllm import LLM, SamplingParams

words = dict(zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True))
llm = LLM(
    words["--model"],
    dtype=words["--dtype"],
    max_model_len=int(words["--max-model-len"]),
    enable_prompt_embeds=True,
    enforce_eager=True,
)


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("prompt_embeds"):
            data = base64.b64decode(body["prompt_embeds"], validate=True)
            asked = {"prompt_embeds": torch.load(io.BytesIO(data), weights_only=True)}
        elif self.path == "/v1/chat/completions":
            vectors, text = body["messages"][0]["content"]
            data = base64.b64decode(vectors["data"], validate=True)
            ids = torch.tensor([int(word) for word in text["text"].split()])
            after = llm.model.get_input_embeddings()(ids)
            tensor = torch.load(io.BytesIO(data), weights_only=True)
            asked = {"prompt_embeds": torch.cat([tensor, after.detach()])}
        else:
            asked = {"prompt_token_ids": body["prompt"]}
        if body["max_tokens"] > 40:
            return self.answer({"error": "too many tokens"}, 400)
        params = SamplingParams(temperature=0, max_tokens=body["max_tokens"])
        (output,) = llm.generate(asked, params, use_tqdm=False)
        return self.answer({"choices": [{"token_ids": output.outputs[0].token_ids}]})

    def answer(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


HTTPServer(("127.0.0.1", int(words["--port"])), Answers).serve_forever()
