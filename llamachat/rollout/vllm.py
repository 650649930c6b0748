"""Rollouts from a vLLM server over HTTP: `vllm serve` in a separate environment, with the policy as an adapter.

vLLM is not a dependency. The protocol, how to serve, and what was tested are in docs/vllm.md. The server is not
trusted to have the right weights: at the start and after every `refresh` its log-probabilities of an answer are checked
against the model's, and those of a fixed text must have changed as the model's did. An adapter name is never reused,
because vLLM's prefix cache is keyed by name and would return keys of the old weights.

A server on the training GPU sleeps except during sampling.
"""

import math
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import torch

from llamachat import distributed
from llamachat.errors import ConfigError, ServerError
from llamachat.models.loading import context_length, save_policy
from llamachat.rollout.engine import Completion, Sampling, check_prompts, evaluating
from llamachat.rollout.weights import without_wrapper

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

CONNECT_S = 10.0
CLOSED = ("Server disconnected", "peer closed")  # httpx messages for a connection closed by the server
ANSWER_S = 1800.0  # read timeout: a request may queue at the server behind others
WAITS_S = (0.5, 1.0, 2.0)  # before retrying a request whose connection was reset
CONNECTIONS = 256  # concurrent requests, which the server batches
PROBE_TOKENS = 16
MOST_DISAGREEMENT = 0.5  # nats per token; different dtypes cause hundredths, different models several nats
SURE = 1e-3  # nats: tolerance for the log-probability of the only possible token
# The fixed text: random token ids, scored with each adapter.
TEXT_ROWS, TEXT_ROW_TOKENS = 16, 128
# The assumed rounding of a log-probability in nats, at least, as a multiple of the model dtype's precision.
ROUNDING = 4.0
# The minimum difference between two hypotheses to distinguish them, in standard deviations of the rounding.
DISTINCT = 8.0
HOW_TO_SERVE = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK "
    "--logprobs-mode processed_logprobs --generation-config vllm"
)
HOW_TO_SLEEP = "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"


class RefusedError(Exception):
    """The server responded with this status other than 200 and this message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


class Server:
    """A server at the address http://host:port."""

    def __init__(self, address: str, *, answer_s: float = ANSWER_S, waits_s: Sequence[float] = WAITS_S) -> None:
        self.address = address.rstrip("/")
        self._waits_s = waits_s
        # No proxies from the environment: the server is local. One connection per request: kept ones may be closed.
        self._client = httpx.Client(
            base_url=self.address,
            timeout=httpx.Timeout(answer_s, connect=CONNECT_S),
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def json(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:
        """Send a request and return the JSON response. Retried on connection reset, so it may run twice."""
        response = self._response(method, path, content, self._waits_s)
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(
                f"{response.url}: the answer is not JSON ({response.content[:80]!r}). A vLLM server answers in JSON there. "
                "Set rollout.server to the address of `vllm serve` itself."
            ) from error

    def command(self, path: str, content: Mapping[str, Any] | None = None) -> None:
        """Send a request without retries, since running it twice would fail; the response is ignored."""
        self._response("POST", path, content, ())

    def _response(self, method: str, path: str, content: Any, waits_s: Sequence[float]) -> httpx.Response:
        try:
            response = self._client.request(method, path, json=content)
        except httpx.HTTPError as error:
            if waits_s and (isinstance(error, httpx.ReadError | httpx.WriteError) or str(error).startswith(CLOSED)):
                time.sleep(waits_s[0])
                return self._response(method, path, content, waits_s[1:])
            raise ServerError(
                f"{self.address}{path}: no answer ({type(error).__name__}: {error}). rollout.engine vllm takes its answers "
                "from a running `vllm serve` (docs/vllm.md). Check that it runs, is ready and not busy with "
                "other requests, and read its log; or fix rollout.server."
            ) from error
        if response.status_code != 200:
            raise RefusedError(response.status_code, _message(response))
        return response


def _message(response: httpx.Response) -> str:
    """The message of an error response, whose format depends on vLLM's version and on the component that sent it."""
    text = response.text
    with suppress(ValueError, AttributeError):
        content = response.json()
        inner = content.get("error")
        holder = inner if isinstance(inner, dict) else content
        text = str(holder.get("message") or holder.get("detail") or text)
    return " ".join(text.split())[:500] or "no message"


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities of the fixed text with one adapter, from the model and from the server, in nats."""

    own_N: torch.Tensor
    served_N: torch.Tensor


class VllmEngine:
    """Samples from the policy that was sent to the server at construction or at the last `refresh`.

    With `shares_card`, the server sleeps except between `wake_up` and `sleep`.
    """

    def __init__(
        self,
        model: "LanguageModel",
        stop_ids: Sequence[int],
        server: str | Server,
        *,
        shares_card: bool = False,
        connections: int = CONNECTIONS,
    ) -> None:
        self._server = Server(server) if isinstance(server, str) else server
        self._shares_card = shares_card
        self._stop_ids = frozenset(stop_ids)
        self._connections = connections
        config = without_wrapper(model).config
        self._vocabulary = config.vocab_size
        self._probe = config.bos_token_id or 0  # a one-token prompt for checking the server
        self._base, served_context = self._base_model()
        self._context = min(context_length(config), served_context)
        # Removed with the engine or at process exit.
        self._folder = TemporaryDirectory(prefix="llamachat-vllm-")
        Path(self._folder.name).chmod(0o755)  # the server may run as a different user
        self._run = distributed.broadcast_object(secrets.token_hex(4))
        self._refreshes = 0
        self._adapter: str | None = None
        # One position is reserved for the answer, which a request must ask for.
        shape = (TEXT_ROWS, min(TEXT_ROW_TOKENS, self._context - 1))
        self._text = np.random.default_rng(0).integers(self._vocabulary, size=shape).tolist()
        self._scores: _Scores | None = None
        self.wake_up()
        if _is_adapter(model):
            self._load_adapter(model)
        elif any(weight.requires_grad for weight in model.parameters()):
            raise _full_tuning()
        self._check_logprobs_mode()
        self._check_agreement(model)
        if _is_adapter(model) or shares_card:
            self._check_change(model)

    @property
    def context(self) -> int:
        """The maximum number of positions of model and server, prompt and answer together."""
        return self._context

    def refresh(self, model: "LanguageModel") -> None:
        """Send the adapter's current weights to the server; it cannot load any others."""
        if not _is_adapter(model):
            raise _full_tuning()
        self.wake_up()
        self._load_adapter(model)
        self._check_agreement(model)
        self._check_change(model)

    def wake_up(self) -> None:
        """Wake a server that slept during training; it must then score the fixed text as before."""
        if not self._shares_card:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the server cannot use blocks cached by torch
        if not distributed.broadcast_object(self._is_asleep()):
            return
        if distributed.is_first():
            self._control(self._server.command, "/wake_up")
        distributed.wait()
        if self._scores is not None:
            change = float((self._served_scores() - self._scores.served_N).abs().mean())
            if not change <= MOST_DISAGREEMENT:
                raise ServerError(
                    f"{self._server.address}: after sleeping, the server's log-probabilities differ from those "
                    f"before by {change:.2g} nats per token ('{self._adapter or self._base}'). It has lost weights. "
                    "Restart it and run the command again; if that repeats, use another version of vLLM, or a server "
                    "on another card without rollout.server_gib."
                )

    def sleep(self) -> None:
        """Let a server on the training GPU free its memory; its weights move to host memory."""
        if not self._shares_card:
            return
        distributed.wait()  # for processes that are still sampling
        if distributed.is_first():
            self._control(self._server.command, "/sleep?level=1")
        distributed.wait()

    def release(self) -> None:
        """Do nothing: this process keeps no memory."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """As `LocalEngine.generate`, with up to `CONNECTIONS` concurrent requests."""
        numbers = numbers or range(len(prompts))
        check_prompts(prompts, numbers, context=self.context)
        completions: dict[tuple[int, int], Completion] = {}
        pool = ThreadPoolExecutor(self._connections)
        try:
            futures = {
                pool.submit(self._complete, prompt, sampling, _seed(sampling.seed, number, sample), self._stop_ids): (
                    number,
                    sample,
                )
                for number, prompt in zip(numbers, prompts, strict=True)
                for sample in range(samples_per_prompt)
            }
            for future in as_completed(futures):
                completions[futures[future]] = future.result()
                if advance is not None:
                    advance(1)
        finally:  # after an error, do not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
        return [[completions[number, sample] for sample in range(samples_per_prompt)] for number in numbers]

    def stream(self, prompt: Sequence[int], *, sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """As `LocalEngine.stream`, but `on_token` gets the ids only when the answer is complete."""
        ((completion,),) = self.generate([prompt], samples_per_prompt=1, sampling=sampling)
        for token in completion.token_ids:
            on_token(token)
        return completion

    def _request(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, stop_ids: Collection[int]
    ) -> dict[str, Any]:
        """All sampling settings, so that the server ignores the model's generation_config.json."""
        return {
            "model": self._adapter or self._base,
            "prompt": list(prompt),
            "n": 1,
            "max_tokens": min(sampling.max_new_tokens, self.context - len(prompt)),
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k or 0,
            "min_p": 0.0,
            "seed": seed,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # only the ids in the list end an answer, not the server's own EOS
            "include_stop_str_in_output": True,
            "logprobs": 0,  # only of the sampled token
            "return_token_ids": True,
            "stream": False,
        }

    def _complete(
        self, prompt: Sequence[int], sampling: Sampling, seed: int = 0, stop_ids: Collection[int] = ()
    ) -> Completion:
        body = self._request(prompt, sampling, seed, stop_ids)
        choice = self._choice(body)
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list):
            raise self._strange("no token ids (`return_token_ids`), which vLLM gives from 0.10.2 on")
        if not isinstance(logprobs, list) or None in logprobs or len(logprobs) != len(ids):
            raise self._strange(f"not a log-probability for each of {len(ids)} sampled tokens (`logprobs`)")
        outside = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if outside is not None:
            raise self._strange(f"the token id {outside}, but the model has {self._vocabulary}")
        reason, ends_well = choice.get("finish_reason"), bool(ids) and ids[-1] in stop_ids
        is_whole = {"stop": ends_well, "length": not ends_well and len(ids) == body["max_tokens"]}
        if not is_whole.get(reason) or set(stop_ids) & set(ids[:-1]):
            raise self._strange(
                f"an answer of {len(ids)} tokens that ends by '{reason}' with {ids[-3:]}, where a stop "
                f"id of {sorted(stop_ids)[:5]} or {body['max_tokens']} tokens end it"
            )
        return Completion(tuple(ids), tuple(logprobs), is_finished=ends_well)

    def _choice(self, body: Mapping[str, Any]) -> Any:
        """The single choice in the response to a request, with its content unchecked."""
        try:
            answer = self._server.json("POST", "/v1/completions", body)
        except RefusedError as refused:
            raise self._refusal(refused) from refused
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1:
            raise self._strange(f"not one answer where one was asked for: {str(answer)[:200]}")
        choice = choices[0]
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise self._strange("the answer to another prompt: the server cut it or put something before it")
        return choice

    def _base_model(self) -> tuple[str, int]:
        """The name of the model that the server was started with, and its maximum number of positions."""
        try:
            listed = self._server.json("GET", "/v1/models")
        except RefusedError as refused:
            raise self._strange(f"no list of models at /v1/models ({refused})") from refused
        for card in listed.get("data", ()) if isinstance(listed, dict) else ():
            if card.get("parent") is None and isinstance(card.get("max_model_len"), int):
                return card["id"], card["max_model_len"]
        raise self._strange("a list of models without a base and its max_model_len")

    def _load_adapter(self, model: "LanguageModel") -> None:
        """Replace the previous adapter. The first of several processes does it, and all wait for it."""
        self._refreshes += 1
        name = f"llamachat-{self._run}-{self._refreshes}"
        distributed.wait()  # for processes that still use the previous one
        if distributed.is_first():
            self._hand_over(model, name)
        distributed.wait()
        self._adapter = name

    def _hand_over(self, model: "LanguageModel", name: str) -> None:
        folder = Path(self._folder.name) / name
        save_policy(model, folder)
        if self._adapter is not None:
            # Unload first, since by default a server has room for one adapter. It may already have evicted it.
            with suppress(RefusedError):
                self._server.command("/v1/unload_lora_adapter", {"lora_name": self._adapter})
            shutil.rmtree(folder.with_name(self._adapter))
            self._adapter = None
        try:
            self._server.command("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except RefusedError as refused:
            is_closed = refused.status == 404 and refused.message == "Not Found"
            why = "takes no adapters at run time" if is_closed else f"does not load the adapter {folder} ({refused})"
            raise ConfigError(
                f"rollout.server: {self._server.address} {why}. The policy changes while it is trained, and is "
                "passed on as an adapter. The server must be able to read its folder (under TMPDIR) and must have been "
                f"started with LoRA and its rank. Serve with `{HOW_TO_SERVE}`, on this machine or with TMPDIR "
                "on a disk that both see."
            ) from refused

    def _check_logprobs_mode(self) -> None:
        """With one possible token, the sampled log-probability must be 0 nats; otherwise the mode is wrong."""
        least = min(self._complete([self._probe], Sampling(1.0, 1.0, PROBE_TOKENS, 0, top_k=1)).logprobs)
        if least < -SURE:
            raise ConfigError(
                f"rollout.server: {self._server.address} gives log-probabilities before temperature and top-p ({least:.3g} nats "
                "for a single choice), but those after them are needed. Serve with --logprobs-mode processed_logprobs."
            )

    @torch.no_grad()
    def _check_agreement(self, model: "LanguageModel") -> None:
        """The server's log-probabilities of one greedy answer must equal the model's, except for rounding."""
        answer = self._complete([self._probe], Sampling(0.0, 1.0, PROBE_TOKENS, 0))
        device = without_wrapper(model).device
        ids_1T = torch.tensor([[self._probe, *answer.token_ids]], device=device)
        with evaluating(model):
            logits_1TV = model(input_ids=ids_1T[:, :-1], use_cache=False).logits.float()
        own_1T1 = logits_1TV.log_softmax(dim=-1).gather(2, ids_1T[:, 1:, None])
        served_T = torch.tensor(answer.logprobs, device=device)
        distance = float((own_1T1.flatten() - served_T).abs().mean())
        if not distance <= MOST_DISAGREEMENT:
            raise ConfigError(
                f"rollout.server: {self._server.address} gives log-probabilities that differ from the policy's by "
                f"{distance:.2g} nats per token ('{self._base}'). Answers must come from the policy itself. Serve "
                f"'{without_wrapper(model).name_or_path}', with the recipe's rope scaling, in the same number format."
            )

    def _check_change(self, model: "LanguageModel") -> None:
        """Reject an adapter if the server scores the fixed text as with the previous one.

        From one adapter to the next the server's scores must change as the model's do: the change is compared with the
        model's change and with zero. Differences between the two implementations cancel. If the weights hardly changed,
        rounding hides which hypothesis is right, and nothing is rejected.
        """
        before, now = self._scores, _Scores(self._own_scores(model), self._served_scores())
        self._scores = now
        if before is None:
            return
        own_N, served_N = now.own_N - before.own_N, now.served_N - before.served_N
        from_new, from_old = float((served_N - own_N).norm()), float(served_N.norm())
        least = ROUNDING * torch.finfo(without_wrapper(model).dtype).eps
        rounding = max(min(from_new, from_old) / math.sqrt(len(own_N)), least)
        if from_old < from_new and float(own_N.norm()) > DISTINCT * rounding:
            raise ServerError(
                f"{self._server.address}: the server answers with older weights than those of the adapter '{self._adapter}'. "
                f"Scores of a fixed text changed by {float(own_N.abs().mean()):.2g} nats per token with the new "
                f"weights, and by {float(served_N.abs().mean()):.2g} on the server. Answers must come from the current "
                "policy. Restart the server with the version and options of docs/vllm.md, and run the command again."
            )

    @torch.no_grad()
    def _own_scores(self, model: "LanguageModel") -> torch.Tensor:
        """The model's log-probabilities of the fixed text, without each row's first token."""
        device, scores = without_wrapper(model).device, list[torch.Tensor]()
        with evaluating(model):
            for row in self._text:
                ids_1T = torch.tensor([row], device=device)
                logits_1TV = model(input_ids=ids_1T[:, :-1], use_cache=False).logits.float()
                scores.append(logits_1TV.log_softmax(dim=-1).gather(2, ids_1T[:, 1:, None]).flatten().cpu())
        return torch.cat(scores).double()

    def _served_scores(self) -> torch.Tensor:
        """The server's log-probabilities of the fixed text."""
        with ThreadPoolExecutor(self._connections) as pool:
            rows = list(pool.map(self._score, self._text))
        return torch.tensor([score for row in rows for score in row], dtype=torch.float64)

    def _score(self, row: Sequence[int]) -> list[float]:
        """The server's log-probability of each token in a row after the first."""
        choice = self._choice(self._request(row, Sampling(1.0, 1.0, 1, 0), 0, ()) | {"prompt_logprobs": 0})
        listed = choice.get("prompt_logprobs")
        try:
            scores = [listed[place][str(token)]["logprob"] for place, token in enumerate(row) if place]
            return [float(score) for score in scores]
        except (LookupError, TypeError, ValueError) as error:
            raise self._strange(
                f"not a log-probability for each token of a prompt (`prompt_logprobs`: {error!r})"
            ) from error

    def _is_asleep(self) -> bool:
        answer = self._control(self._server.json, "GET", "/is_sleeping")
        if not isinstance(answer, dict) or not isinstance(answer.get("is_sleeping"), bool):
            raise self._strange(f"not whether it sleeps (/is_sleeping: {str(answer)[:80]})")
        return answer["is_sleeping"]

    def _control(self, request: Callable[..., Any], *arguments: str) -> Any:
        """Send a sleep or wake-up request; an unsupported one raises an error that says how to serve."""
        try:
            return request(*arguments)
        except RefusedError as refused:
            raise ConfigError(
                f"rollout.server_gib: {self._server.address}{arguments[-1]} is refused ({refused}). With this key, the "
                "server is on the training card and sleeps while nothing is sampled. Also start it with "
                f"{HOW_TO_SLEEP}, or set server_gib to null for a server on another card."
            ) from refused

    def _refusal(self, refused: RefusedError) -> ServerError:
        return ServerError(
            f"{self._server.address}/v1/completions: the server refuses ({refused}). The request follows vLLM's "
            f"documentation (docs/vllm.md), and the server had the model '{self._adapter or self._base}' when this "
            "command began. Follow the message, read the server's log, and run the command again."
        )

    def _strange(self, what: str) -> ServerError:
        return ServerError(
            f"{self._server.address}: {what}. An answer must be complete, with an id and a log-probability for each "
            "token, as vLLM documents it. Serve with the version and the options of docs/vllm.md, without a proxy."
        )


def _seed(seed: int, number: int, sample: int) -> int:
    """The server's seed, a number in [0, 2^63) that depends only on (seed, prompt, sample)."""
    return int(np.random.SeedSequence((seed, number, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _is_adapter(model: "LanguageModel") -> bool:
    return hasattr(model, "get_base_model")


def _full_tuning() -> ConfigError:
    return ConfigError(
        "rollout.engine: vllm, but all weights of the policy are tuned. A running vLLM server takes new weights only as "
        "LoRA adapters. Set rollout.engine to auto, or tuning.method to lora or qlora."
    )
