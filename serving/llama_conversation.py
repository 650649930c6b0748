"""What a llama-server says to the questions that an export is held against.

Endpoints as of llama.cpp's tools/server/README.md: `/apply-template` renders the chat template of the GGUF file,
`/tokenize` gives ids, `/completion` answers. Together they are what its `/v1/chat/completions` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamachat.chat_format.dialog import Message, as_dicts
from llamachat.chat_format.proof import proof_prompts
from llamachat.errors import ServerError
from llamachat.rollout.vllm_http import RefusedError, Server
from serving.export import Asked
from serving.llama_cpp import LlamaCppError


@dataclass(frozen=True, slots=True)
class Heard:
    """The greedy answers; how many prompts and texts came to the right ids."""

    answers: list[tuple[tuple[int, ...], tuple[float, ...]]]  # ids, and their log-probabilities (nats) or none
    equal_prompts: int
    proof_texts: int
    equal_proof_texts: int


def converse(server: Server, asked: Asked) -> Heard:
    """Ask the questions that the policy was asked, and put the proof's texts through the server's tokenizer."""
    try:
        answers, equal_prompts = [], 0
        for answer in asked.answers:
            prompt, ids = _prompt(server, answer.messages)
            said = server.post("/completion", _completion(prompt, len(answer.greedy_ids)))
            logprobs = tuple(float(token["logprob"]) for token in said["completion_probabilities"])
            # Of a token that leaves a character unfinished it tells the id alone: then nobody knows whose the rest are.
            is_whole = len(logprobs) == len(said["tokens"])
            answers.append((tuple(said["tokens"]), logprobs if is_whole else ()))
            equal_prompts += ids == answer.prompt_ids and said["tokens_evaluated"] == len(answer.prompt_ids)
        texts = proof_prompts(asked.chat_format)
        equal = sum(_prompt(server, text)[1] == tuple(asked.chat_format.encode_prompt(text)) for text in texts)
    except (RefusedError, ServerError, KeyError, TypeError) as error:
        raise LlamaCppError(
            f"llama-server: it did not answer as its documents say ({type(error).__name__}: {error}). The GGUF file is "
            "held against the policy by asking it. Build a newer llama.cpp."
        ) from error
    return Heard(answers, equal_prompts, len(texts), equal)


def _prompt(server: Server, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
    """The conversation as the file's chat template renders it, and the ids that reach the model."""
    turns = as_dicts(messages)
    prompt = server.post("/apply-template", {"messages": turns})["prompt"]
    ids = server.post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
    return prompt, tuple(ids)


def _completion(prompt: str, length: int) -> Mapping[str, Any]:
    greedy = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "samplers": ["top_k", "temperature"]}
    return {"prompt": prompt, "n_predict": length, "n_probs": 1, "return_tokens": True, "cache_prompt": False, **greedy}
