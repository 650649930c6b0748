"""A server that speaks as `vllm serve` is documented to (docs/vllm.md) and samples from a tiny Llama, one token a pass.

It shares no code with the client: tokens are drawn by numpy.
"""

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

BASE = "served-base"
EOS = 2


class Refusal(ValueError):  # noqa: N818 - what a server does
    def __init__(self, status: int, content: Any) -> None:
        self.status = status
        self.content = content


def error(status: int, message: str, kind: str = "BadRequestError") -> Refusal:
    """As vLLM words its own errors."""
    return Refusal(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})


class FakeVllm:
    """The server's state; the test changes it to make the server wrong."""

    def __init__(self, model: Any, *, context: int = 128) -> None:
        self.model = model
        self.context = context
        self.is_processed = True  # --logprobs-mode processed_logprobs
        self.takes_adapters = True  # VLLM_ALLOW_RUNTIME_LORA_UPDATING
        self.can_sleep = True  # VLLM_SERVER_DEV_MODE, --enable-sleep-mode
        self.is_asleep = False
        self.serves_adapter_before = False  # under the name of a new one
        self.noise = 0.0  # of a prompt's log-probability, drawn for each request: other kernels round otherwise
        self.adapters: dict[str, Any] = {}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer  # of an answer to a completion
        self.before: Callable[[str, Any], None] = lambda path, body: None  # may raise a Refusal
        self.resets = 0  # connections to close without an answer
        self.pause_s = 0.0
        self._served: Any = None
        self._noise = np.random.default_rng(0)
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def completions(self) -> list[dict[str, Any]]:
        """Requests for answers, the two of an opening first; those that score a fixed text are left out."""
        return [body for path, body in self.seen if path == "/v1/completions" and "prompt_logprobs" not in body]

    def listed(self) -> dict[str, Any]:
        base = {"id": BASE, "object": "model", "parent": None, "max_model_len": self.context}
        adapters = [{**base, "id": name, "parent": BASE, "max_model_len": None} for name in self.adapters]
        return {"object": "list", "data": [base, *adapters]}

    def load(self, body: dict[str, Any]) -> str:
        assert body.keys() == {"lora_name", "lora_path"}
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            raise error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (folder / "adapter_config.json").is_file():
            raise error(404, f"No adapter found for {folder}", "NotFoundError")
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > 16:
            raise error(500, f"LoRA rank {config['r']} is greater than max_lora_rank 16.", "InternalServerError")
        assert config["peft_type"] == "LORA" and config["modules_to_save"] is None and not config["use_dora"]
        assert folder.parent.stat().st_mode & 0o055 == 0o055, "another user can read it"
        previous, self._served = self._served, self._with_adapter(folder)
        self.adapters[name] = previous if self.serves_adapter_before else self._served
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        assert body.keys() == {"lora_name"}
        if body["lora_name"] not in self.adapters:
            raise error(404, f"The lora adapter '{body['lora_name']}' cannot be found.", "NotFoundError")
        del self.adapters[body["lora_name"]]
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _with_adapter(self, folder: Path) -> Any:
        """W + alpha / rank * B A in a copy of the base, by the names in the file."""
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(next(folder.glob("*.safetensors")))
        merged = deepcopy(self.model)
        for name, down in weights.items():
            if name.endswith(".lora_A.weight"):
                up = weights[name.replace("lora_A", "lora_B")]
                place = merged.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
                with torch.no_grad():
                    place += config["lora_alpha"] / config["r"] * up @ down
        return merged

    def prompt_logprobs(self, body: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Of each token of the prompt after the first, whatever the temperature."""
        ids = body["prompt"]
        with self._lock, torch.no_grad():
            logits = self._named(body)(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double().numpy()
            noise = self._noise.normal(scale=self.noise, size=len(ids))
        scores = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return [
            None,
            *(
                {str(token): {"logprob": float(scores[place, token] + noise[place]), "rank": 1, "decoded_token": "?"}}
                for place, token in enumerate(ids[1:])
            ),
        ]

    def _named(self, body: dict[str, Any]) -> Any:
        model = self.model if body["model"] == BASE else self.adapters.get(body["model"])
        if model is None:
            raise error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        return model

    def choices(self, body: dict[str, Any]) -> Iterator[tuple[int, float, str | None]]:
        """Token by token: id, log-probability, and why it is the last one."""
        assert 0 <= body["seed"] < 2**63
        model = self._named(body)
        if len(body["prompt"]) + body["max_tokens"] > self.context:
            raise error(400, f"This model's maximum context length is {self.context} tokens.")
        return self._sampled(model, body)

    def _sampled(self, model: Any, body: dict[str, Any]) -> Iterator[tuple[int, float, str | None]]:
        ids, random = list(body["prompt"]), np.random.default_rng(body["seed"])
        stops = {*body["stop_token_ids"], *(() if body["ignore_eos"] else (EOS,))}
        for step in range(body["max_tokens"]):
            with self._lock, torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
            token, logprob = self._draw(logits, body, random)
            ids.append(token)
            reason = "stop" if token in stops else "length" if step == body["max_tokens"] - 1 else None
            yield token, logprob, reason
            if reason:
                return

    def _draw(self, logits: np.ndarray, body: dict[str, Any], random: np.random.Generator) -> tuple[int, float]:
        raw = logits - np.logaddexp.reduce(logits)
        if body["temperature"] == 0:
            return int(raw.argmax()), float(raw.max())
        scaled = logits / body["temperature"]
        probabilities = np.exp(scaled - np.logaddexp.reduce(scaled))
        order = np.argsort(-probabilities)[: body["top_k"] or len(probabilities)]
        likeliest = probabilities[order] / probabilities[order].sum()
        kept = int(np.searchsorted(likeliest.cumsum(), body["top_p"])) + 1
        order, nucleus = order[:kept], likeliest[:kept] / likeliest[:kept].sum()
        index = int(random.choice(len(order), p=nucleus))
        return int(order[index]), float(math.log(nucleus[index]) if self.is_processed else raw[order[index]])


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVllm

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"] or 0)
        assert not length or self.headers["Content-Type"] == "application/json"
        self._answer(json.loads(self.rfile.read(length)) if length else None)

    def _answer(self, body: Any) -> None:
        fake = self.fake
        if fake.resets:
            fake.resets -= 1
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            return
        time.sleep(fake.pause_s)
        fake.seen.append((self.path, body))
        try:
            fake.before(self.path, body)
            if (self.command, self.path) == ("GET", "/v1/models"):
                self._send(200, fake.listed())
            elif (self.command, self.path) == ("GET", "/is_sleeping") and fake.can_sleep:
                self._send(200, {"is_sleeping": fake.is_asleep})
            elif (self.command, self.path) in (("POST", "/sleep?level=1"), ("POST", "/wake_up")) and fake.can_sleep:
                fake.is_asleep = self.path != "/wake_up"
                self._send(200, "")
            elif fake.is_asleep:
                raise error(500, "the engine sleeps", "InternalServerError")  # a real one dies or never answers
            elif (self.command, self.path) == ("POST", "/v1/completions"):
                self._complete(body)
            elif self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and fake.takes_adapters:
                self._send(200, (fake.load if "/load" in self.path else fake.unload)(body))
            else:
                self._send(404, {"detail": "Not Found"})
        except Refusal as refusal:
            self._send(refusal.status, refusal.content)

    def _complete(self, body: dict[str, Any]) -> None:
        fake = self.fake
        ids, logprobs, reasons = zip(*fake.choices(body), strict=True)
        choice = {
            "index": 0,
            "text": "not read",
            "logprobs": {"token_logprobs": list(logprobs)},
            "finish_reason": reasons[-1],
            "token_ids": list(ids),
            "prompt_token_ids": body["prompt"],
        }
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = fake.prompt_logprobs(body)
        self._send(200, fake.change({"object": "text_completion", "model": body["model"], "choices": [choice]}))

    def _send(self, status: int, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # a client that gives up early is part of some tests
            self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        del format, args
