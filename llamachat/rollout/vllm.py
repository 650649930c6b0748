"""Rollouts from a vLLM server over HTTP: `vllm serve` in its own environment, with the policy as an adapter on its base.

vLLM is no dependency. What is sent and read, how to serve, and what was tried is in docs/vllm.md. The server is not
trusted to hold the right model: at the start and after every `refresh` its log-probabilities of one answer are compared
with the model's own, and those of a fixed text must have changed as the model's own did. An adapter never gets a name
twice, since vLLM's cache of prompts goes by the name and would serve keys of the old weights.

A server on the card that trains sleeps except while answers are sampled.
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
CLOSED = ("Server disconnected", "peer closed")  # how httpx words a connection that the server closed
ANSWER_S = 1800.0  # until the next bytes come: a request waits at the server while others are answered
WAITS_S = (0.5, 1.0, 2.0)  # before a request is sent again whose connection was reset
CONNECTIONS = 256  # requests at once; the server batches them as it can
PROBE_TOKENS = 16
MOST_DISAGREEMENT = 0.5  # nats a token; number formats differ by hundredths, other models by several
SURE = 1e-3  # nats: the log-probability of the only token there is, but for rounding
# The fixed text: random token ids, scored under each adapter.
TEXT_ROWS, TEXT_ROW_TOKENS = 16, 128
# Rounding of a log-probability in nats is taken to be this many times the precision of the model's numbers, at least.
ROUNDING = 4.0
# How far two hypotheses must differ to be distinguished, in deviations of the rounding.
DISTINCT = 8.0
HOW_TO_SERVE = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK "
    "--logprobs-mode processed_logprobs --generation-config vllm"
)
HOW_TO_SLEEP = "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"


class RefusedError(Exception):
    """The server answered, with another status than 200 and this message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


class Server:
    """A server by its address, http://host:port."""

    def __init__(self, address: str, *, answer_s: float = ANSWER_S, waits_s: Sequence[float] = WAITS_S) -> None:
        self.address = address.rstrip("/")
        self._waits_s = waits_s
        # No proxies of the environment: a rollout server is near. A connection per request: a kept one may be closed.
        self._client = httpx.Client(
            base_url=self.address,
            timeout=httpx.Timeout(answer_s, connect=CONNECT_S),
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def json(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:
        """The JSON that comes back. Sent again where the connection is reset, so the server may do it twice."""
        response = self._response(method, path, content, self._waits_s)
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(
                f"{response.url}: the answer is no JSON ({response.content[:80]!r}). A vLLM server answers in JSON there. "
                "Set rollout.server to the address of `vllm serve` itself."
            ) from error

    def command(self, path: str, content: Mapping[str, Any] | None = None) -> None:
        """Send once, since doing it twice would fail; what comes back is not JSON and says nothing."""
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
                "from a running `vllm serve` (docs/vllm.md). Look whether it runs, is ready and not busy with others, and "
                "into its log; or fix rollout.server."
            ) from error
        if response.status_code != 200:
            raise RefusedError(response.status_code, _message(response))
        return response


def _message(response: httpx.Response) -> str:
    """What an answer with an error says; the shape depends on vLLM's version and on who made it."""
    text = response.text
    with suppress(ValueError, AttributeError):
        content = response.json()
        inner = content.get("error")
        holder = inner if isinstance(inner, dict) else content
        text = str(holder.get("message") or holder.get("detail") or text)
    return " ".join(text.split())[:500] or "no message"


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities of the fixed text under one adapter, by the model and by the server, in nats."""

    own_N: torch.Tensor
    served_N: torch.Tensor


class VllmEngine:
    """Samples from the policy as a server holds it: as of construction or of the last `refresh`.

    With `shares_card` the server sleeps between calls of `wake_up` and `sleep`.
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
        self._probe = config.bos_token_id or 0  # a prompt of one token, for the checks of the server
        self._base, served_context = self._base_model()
        self._context = min(context_length(config), served_context)
        # Removed with the engine, or at the end of the process.
        self._folder = TemporaryDirectory(prefix="llamachat-vllm-")
        Path(self._folder.name).chmod(0o755)  # the server may run as another user
        self._run = distributed.broadcast_object(secrets.token_hex(4))
        self._refreshes = 0
        self._adapter: str | None = None
        # One token of the positions is for the answer, which a request must ask for.
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
        """Tokens of a prompt and its answer together that model and server have positions for."""
        return self._context

    def refresh(self, model: "LanguageModel") -> None:
        """Hand the adapter's present weights to the server; other weights it cannot take."""
        if not _is_adapter(model):
            raise _full_tuning()
        self.wake_up()
        self._load_adapter(model)
        self._check_agreement(model)
        self._check_change(model)

    def wake_up(self) -> None:
        """Wake a server that sleeps while its card trains; it must then score the fixed text as before."""
        if not self._shares_card:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the server cannot take blocks that torch keeps for later
        if not distributed.broadcast_object(self._is_asleep()):
            return
        if distributed.is_first():
            self._control(self._server.command, "/wake_up")
        distributed.wait()
        if self._scores is not None:
            change = float((self._served_scores() - self._scores.served_N).abs().mean())
            if not change <= MOST_DISAGREEMENT:
                raise ServerError(
                    f"{self._server.address}: since it slept the server gives other probabilities than before, by {change:.2g} "
                    f"nats a token ('{self._adapter or self._base}'). It has lost weights. Restart it and run the command "
                    "again; if that repeats, use another version of vLLM, or a server on another card without "
                    "rollout.server_gib."
                )

    def sleep(self) -> None:
        """Let a server on the card that trains free its memory; its weights wait in the machine's."""
        if not self._shares_card:
            return
        distributed.wait()  # for those that still ask
        if distributed.is_first():
            self._control(self._server.command, "/sleep?level=1")
        distributed.wait()

    def release(self) -> None:
        """Nothing is kept in this process."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """As `LocalEngine.generate`, by as many requests at once as there are connections."""
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
        finally:  # after an error do not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
        return [[completions[number, sample] for sample in range(samples_per_prompt)] for number in numbers]

    def stream(self, prompt: Sequence[int], *, sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """As `LocalEngine.stream`; `on_token` gets each id, when all are there."""
        ((completion,),) = self.generate([prompt], samples_per_prompt=1, sampling=sampling)
        for token in completion.token_ids:
            on_token(token)
        return completion

    def _request(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, stop_ids: Collection[int]
    ) -> dict[str, Any]:
        """All that decides the answer, so that the server takes nothing from the model's generation_config.json."""
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
            "ignore_eos": True,  # the server's own end; what ends an answer is in the list, and nothing else
            "include_stop_str_in_output": True,
            "logprobs": 0,  # of the sampled token alone
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
        """What comes back for one request, without a look at the answer in it."""
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
        """The name of the model that the server was started with, and its positions."""
        try:
            listed = self._server.json("GET", "/v1/models")
        except RefusedError as refused:
            raise self._strange(f"no list of models at /v1/models ({refused})") from refused
        for card in listed.get("data", ()) if isinstance(listed, dict) else ():
            if card.get("parent") is None and isinstance(card.get("max_model_len"), int):
                return card["id"], card["max_model_len"]
        raise self._strange("a list of models without a base and its max_model_len")

    def _load_adapter(self, model: "LanguageModel") -> None:
        """Let the adapter replace the one before; of several processes the first one does, and all wait for it."""
        self._refreshes += 1
        name = f"llamachat-{self._run}-{self._refreshes}"
        distributed.wait()  # for those that still ask for the one before
        if distributed.is_first():
            self._hand_over(model, name)
        distributed.wait()
        self._adapter = name

    def _hand_over(self, model: "LanguageModel", name: str) -> None:
        folder = Path(self._folder.name) / name
        save_policy(model, folder)
        if self._adapter is not None:
            # First, since a server has room for one by default. If it has dropped it already, so much the better.
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
                f"rollout.server: {self._server.address} {why}. The policy changes while it is trained, and is handed over as "
                "an adapter, which the server must be able to read (TMPDIR decides where it lies) and have been started "
                f"for, with its rank. Serve with `{HOW_TO_SERVE}`, on this machine or with TMPDIR on a disk that both see."
            ) from refused

    def _check_logprobs_mode(self) -> None:
        """With one token to choose from, the distribution drawn from has nothing else: 0 nats, or they are of another."""
        least = min(self._complete([self._probe], Sampling(1.0, 1.0, PROBE_TOKENS, 0, top_k=1)).logprobs)
        if least < -SURE:
            raise ConfigError(
                f"rollout.server: {self._server.address} gives log-probabilities before temperature and top-p ({least:.3g} nats "
                "for the only choice). Ours are those after them. Serve with --logprobs-mode processed_logprobs."
            )

    @torch.no_grad()
    def _check_agreement(self, model: "LanguageModel") -> None:
        """The server's log-probabilities of one greedy answer are the model's own, but for rounding."""
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
                f"rollout.server: {self._server.address} gives other probabilities than the policy, by {distance:.2g} nats "
                f"a token ('{self._base}'). Answers must come from the policy itself. Serve "
                f"'{without_wrapper(model).name_or_path}', with the recipe's rope scaling, in the same number format."
            )

    def _check_change(self, model: "LanguageModel") -> None:
        """Refuse an adapter under which the fixed text is scored as under the one before.

        From one adapter to the next the server's scores must change as the model's own do: their change is compared with
        the model's and with none at all. Differences between the two programs are in both scores and cancel. Where the
        weights hardly changed, rounding hides which of the two it is, and nothing is refused.
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
                f"Scores of a fixed text changed by {float(own_N.abs().mean()):.2g} nats a token with the new weights, and by "
                f"{float(served_N.abs().mean()):.2g} on the server. Answers must come from the present policy. Restart the "
                "server, with the version and the options of docs/vllm.md, and run the command again."
            )

    @torch.no_grad()
    def _own_scores(self, model: "LanguageModel") -> torch.Tensor:
        """The model's log-probabilities of the fixed text, each token after the first of its row."""
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
        """The server's log-probability of each token of a row after the first."""
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
        """What a request about sleeping gives, or how to serve so that it is understood."""
        try:
            return request(*arguments)
        except RefusedError as refused:
            raise ConfigError(
                f"rollout.server_gib: {self._server.address}{arguments[-1]} is refused ({refused}). With it the server is on the "
                "card that trains, and sleeps while there is nothing to sample. Serve also with "
                f"{HOW_TO_SLEEP}, or set server_gib to null for a server on another card."
            ) from refused

    def _refusal(self, refused: RefusedError) -> ServerError:
        return ServerError(
            f"{self._server.address}/v1/completions: the server refuses ({refused}). The request is as vLLM documents it "
            f"(docs/vllm.md), and it had the model '{self._adapter or self._base}' when this command began. Follow the "
            "message, look into the server's log, and run the command again."
        )

    def _strange(self, what: str) -> ServerError:
        return ServerError(
            f"{self._server.address}: {what}. An answer is taken only whole, with an id and a log-probability for each "
            "token, as vLLM documents it. Serve with the version and the options of docs/vllm.md, with nothing between."
        )


def _seed(seed: int, number: int, sample: int) -> int:
    """A number in [0, 2^63) that depends on (seed, prompt, sample) alone: the server draws by it."""
    return int(np.random.SeedSequence((seed, number, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _is_adapter(model: "LanguageModel") -> bool:
    return hasattr(model, "get_base_model")


def _full_tuning() -> ConfigError:
    return ConfigError(
        "rollout.engine: vllm, but all weights of the policy are tuned. A running vLLM server takes new weights only as "
        "LoRA adapters. Set rollout.engine to auto, or tuning.method to lora or qlora."
    )
