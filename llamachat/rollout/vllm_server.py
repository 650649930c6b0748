"""Rollouts from a vLLM server over HTTP: `vllm serve` in its own environment, with the policy as an adapter on its base.

vLLM is no dependency. What is sent and read, how to serve, and what was tried is in docs/vllm.md. The server is not
trusted to hold the right model: at the start and after every `refresh` its log-probabilities of one answer are compared
with the model's own. One thing surprises: an adapter never gets a name twice, since vLLM's cache of prompts goes by the
name and would serve keys of the old weights.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llamachat import distributed
from llamachat.chat_format.tokenizer import BOS_ID
from llamachat.errors import ConfigError, DataError, ServerError
from llamachat.models.loading import context_length, save_policy
from llamachat.rollout.decoder import evaluating
from llamachat.rollout.engine import Completion, Sampling
from llamachat.rollout.vllm_http import RefusedError, Server
from llamachat.rollout.weights import without_wrapper

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

COMPLETIONS = "/v1/completions"
CONNECTIONS = 256  # requests under way at once; the server batches them as it can
PROBE_TOKENS = 16
MOST_DISAGREEMENT = 0.5  # nats a token; number formats differ by hundredths, other models by several
SURE = 1e-3  # nats: the log-probability of the only token there is, but for rounding
HOW_TO_SERVE = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK "
    "--logprobs-mode processed_logprobs --generation-config vllm"
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """An answer that is asked for."""

    prompt: tuple[int, ...]
    stop_ids: frozenset[int]
    body: Mapping[str, Any]

    @property
    def max_tokens(self) -> int:
        return self.body["max_tokens"]


class VllmEngine:
    """Samples from the policy as a server holds it: as of construction or of the last `refresh`."""

    def __init__(
        self,
        model: "LanguageModel",
        stop_ids: Sequence[int],
        server: str | Server,
        *,
        connections: int = CONNECTIONS,
    ) -> None:
        self._server = Server(server) if isinstance(server, str) else server
        self._stop_ids = frozenset(stop_ids)
        self._connections = connections
        config = without_wrapper(model).config
        self._vocabulary = config.vocab_size
        self._base, served_context = self._base_model()
        self._context = min(context_length(config), served_context)
        # Away with the engine, or at the end of the process.
        self._folder = TemporaryDirectory(prefix="llamachat-vllm-")
        Path(self._folder.name).chmod(0o755)  # the server may run as another user
        self._run = distributed.broadcast_object(secrets.token_hex(4))
        self._refreshes = 0
        self._adapter: str | None = None
        if _is_adapter(model):
            self._load_adapter(model)
        elif any(weight.requires_grad for weight in model.parameters()):
            raise _full_tuning()
        self._check_logprobs_mode()
        self._check_agreement(model)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together that model and server have positions for."""
        return self._context

    def refresh(self, model: "LanguageModel") -> None:
        """Hand the adapter's present weights to the server; other weights it cannot take."""
        if not _is_adapter(model):
            raise _full_tuning()
        self._load_adapter(model)
        self._check_agreement(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """`samples_per_prompt` completions of each prompt; `advance` is told how many more are there.

        An answer ends early where the positions end: prompt and answer fit into them together.
        """
        numbers = numbers or range(len(prompts))
        self._check(prompts, numbers)
        found: dict[tuple[int, int], Completion] = {}
        pool = ThreadPoolExecutor(self._connections)
        try:
            futures = {
                pool.submit(self._complete, self._asked(prompt, sampling, number, sample)): (number, sample)
                for number, prompt in zip(numbers, prompts, strict=True)
                for sample in range(samples_per_prompt)
            }
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                if advance is not None:
                    advance(1)
        finally:  # after an error nobody waits for the others
            pool.shutdown(wait=False, cancel_futures=True)
        return [[found[number, sample] for sample in range(samples_per_prompt)] for number in numbers]

    def stream(self, prompt: Sequence[int], *, sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """The completion that `generate` gives to this one prompt; `on_token` sees each id as it comes."""
        self._check([prompt], [0])
        asked = self._asked(prompt, sampling, 0, 0)
        whole: dict[str, Any] = {"token_ids": [], "logprobs": {"token_logprobs": []}, "finish_reason": None}
        try:
            for event in self._server.events(COMPLETIONS, {**asked.body, "stream": True}):
                if "error" in event:
                    raise self._strange(f"an error in the middle of the answer: {event['error']}")
                for choice in event.get("choices", ()):
                    part = self._part(choice, asked)
                    for token in part["token_ids"]:
                        on_token(token)
                    whole["token_ids"] += part["token_ids"]
                    whole["logprobs"]["token_logprobs"] += part["logprobs"]["token_logprobs"]
                    whole["finish_reason"] = choice.get("finish_reason")
        except RefusedError as refused:
            raise self._refusal(refused) from refused
        return self._completion(whole, asked)

    def _check(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> None:
        for number, prompt in zip(numbers, prompts, strict=True):
            assert prompt, "a prompt has at least its BOS"
            if len(prompt) >= self.context:
                raise DataError(
                    f"prompt {number + 1}: {len(prompt)} tokens, but prompt and answer must fit into "
                    f"the {self.context} positions of model and server. Shorten the prompt, serve with a greater "
                    "--max-model-len where the model has more, or take a model with a longer context."
                )

    def _asked(self, prompt: Sequence[int], sampling: Sampling, index: int, sample: int) -> _Asked:
        return self._request(
            prompt,
            self._stop_ids,
            max_tokens=min(sampling.max_new_tokens, self.context - len(prompt)),
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
            top_k=sampling.top_k or 0,
            seed=_row_seed(sampling.seed, index, sample),
        )

    def _request(self, prompt: Sequence[int], stop_ids: frozenset[int], **choosing: Any) -> _Asked:
        """What the server would else take from the model's generation_config.json is all said."""
        defaults = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
        penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        body = {
            "model": self._adapter or self._base,
            "prompt": list(prompt),
            "n": 1,
            **defaults,
            **penalties,
            **choosing,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # the server's own end; what ends an answer is in the list, and nothing else
            "include_stop_str_in_output": True,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "stream": False,
        }
        return _Asked(tuple(prompt), stop_ids, body)

    def _complete(self, asked: _Asked) -> Completion:
        try:
            answer = self._server.post(COMPLETIONS, asked.body)
        except RefusedError as refused:
            raise self._refusal(refused) from refused
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1:
            raise self._strange(f"not one answer where one was asked for: {str(answer)[:200]}")
        return self._completion(self._part(choices[0], asked), asked)

    def _part(self, choice: Mapping[str, Any], asked: _Asked) -> dict[str, Any]:
        """An answer or the next piece of one: ids with as many log-probabilities."""
        if choice.get("prompt_token_ids") not in (None, list(asked.prompt)):
            raise self._strange("the answer to another prompt: the server cut it or put something before it")
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list):
            raise self._strange("no token ids (`return_token_ids`), which vLLM gives from 0.10.2 on")
        if not isinstance(logprobs, list) or None in logprobs:
            raise self._strange("no log-probabilities of the sampled tokens (`logprobs`)")
        if len(ids) != len(logprobs):
            raise self._strange(f"{len(ids)} token ids with {len(logprobs)} log-probabilities")
        return {
            "token_ids": ids,
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": choice.get("finish_reason"),
        }

    def _completion(self, answer: Mapping[str, Any], asked: _Asked) -> Completion:
        ids, logprobs = answer["token_ids"], answer["logprobs"]["token_logprobs"]
        outside = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if outside is not None:
            raise self._strange(f"the token id {outside}, but the model has {self._vocabulary}")
        ends_well = bool(ids) and ids[-1] in asked.stop_ids
        is_whole = {"stop": ends_well, "length": not ends_well and len(ids) == asked.max_tokens}
        if not is_whole.get(answer["finish_reason"]) or asked.stop_ids & set(ids[:-1]):
            raise self._strange(
                f"an answer of {len(ids)} tokens that ends by '{answer['finish_reason']}' with {ids[-3:]}, where a stop "
                f"id of {sorted(asked.stop_ids)[:5]} or {asked.max_tokens} tokens end it"
            )
        return Completion(tuple(ids), tuple(logprobs), is_finished=ends_well)

    def _base_model(self) -> tuple[str, int]:
        """The name of the model that the server was started with, and its positions."""
        try:
            listed = self._server.get("/v1/models")
        except RefusedError as refused:
            raise self._strange(f"no list of models at /v1/models ({refused})") from refused
        cards = listed.get("data", ()) if isinstance(listed, dict) else ()
        for card in cards:
            if card.get("parent") is None and isinstance(card.get("max_model_len"), int):
                return card["id"], card["max_model_len"]
        raise self._strange("a list of models without a base and its max_model_len")

    def _load_adapter(self, model: "LanguageModel") -> None:
        """Let the adapter take the place of the one before; of several processes the first one does, and all ask for it."""
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
            raise self._refused_adapter(refused, folder) from refused

    def _check_logprobs_mode(self) -> None:
        """With one token to choose from, the distribution drawn from has nothing else: 0 nats, or they are of another."""
        one_choice = self._request([BOS_ID], frozenset(), max_tokens=self._probe_tokens, temperature=1.0, top_k=1)
        least = min(self._complete(one_choice).logprobs)
        if least < -SURE:
            raise ConfigError(
                f"rollout.server: {self._server.address} gives log-probabilities before temperature and top-p ({least:.3g} "
                "nats for a token that was the only choice). Ours are those of the distribution drawn from. Serve with "
                "--logprobs-mode processed_logprobs."
            )

    @torch.no_grad()
    def _check_agreement(self, model: "LanguageModel") -> None:
        """The server's log-probabilities of one greedy answer are the model's own, but for rounding."""
        answer = self._complete(self._request([BOS_ID], frozenset(), max_tokens=self._probe_tokens, temperature=0.0))
        device = without_wrapper(model).device
        ids_1T = torch.tensor([[BOS_ID, *answer.token_ids]], device=device)
        with evaluating(model):
            logits_1TV = model(input_ids=ids_1T[:, :-1], use_cache=False).logits.float()
        own_1T1 = logits_1TV.log_softmax(dim=-1).gather(2, ids_1T[:, 1:, None])
        served_T = torch.tensor(answer.logprobs, device=device)
        distance = float((own_1T1.flatten() - served_T).abs().mean())
        if not distance <= MOST_DISAGREEMENT:
            raise ConfigError(
                f"rollout.server: {self._server.address} gives other probabilities than the policy, by {distance:.2g} nats "
                f"a token ('{self._base}'). Answers must come from the policy that is trained or measured. Serve "
                f"'{without_wrapper(model).name_or_path}' itself, with the rope scaling of the recipe, in the same "
                "number format."
            )

    @property
    def _probe_tokens(self) -> int:
        return min(PROBE_TOKENS, self.context - 1)

    def _refusal(self, refused: RefusedError) -> ServerError:
        if refused.status == 404:
            return ServerError(
                f"{self._server.address}: the model '{self._adapter or self._base}' is not there ({refused.message}). It "
                "was when this command began: the server was started anew, or somebody unloaded it. Run the command again."
            )
        return ServerError(
            f"{self._server.address}{COMPLETIONS}: the server refuses ({refused}). What is asked for is as vLLM "
            "documents it (docs/vllm.md). Follow the message, look into the server's log, or set rollout.engine to auto."
        )

    def _refused_adapter(self, refused: RefusedError, folder: Path) -> ConfigError:
        if refused.status == 404 and refused.message == "Not Found":
            return ConfigError(
                f"rollout.server: {self._server.address} takes no adapters at run time. The policy changes while it is "
                f"trained, and is handed over as an adapter. Serve with `{HOW_TO_SERVE}`."
            )
        return ConfigError(
            f"rollout.server: {self._server.address} does not load the adapter {folder} ({refused}). It must be able to "
            "read that folder (TMPDIR decides where it lies) and have been started for adapters of its rank. Serve with "
            f"`{HOW_TO_SERVE}`, on this machine or with TMPDIR on a disk that both see."
        )

    def _strange(self, found: str) -> ServerError:
        return ServerError(
            f"{self._server.address}: {found}. An answer is taken only whole, with an id and a log-probability for each "
            "token, as vLLM documents it. Serve with the version and the options of docs/vllm.md, with nothing between."
        )


def _is_adapter(model: "LanguageModel") -> bool:
    return hasattr(model, "get_base_model")


def _full_tuning() -> ConfigError:
    return ConfigError(
        "rollout.engine: vllm, but all weights of the policy are tuned. A running vLLM server takes new weights only as "
        "LoRA adapters, and would go on answering with the old ones. Set rollout.engine to auto, or tuning.method to "
        "lora or qlora."
    )


def _row_seed(seed: int, prompt: int, sample: int) -> int:
    """A number in [0, 2^63) that belongs to (seed, prompt, sample) alone: the server draws by it."""
    return int(np.random.SeedSequence((seed, prompt, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))
