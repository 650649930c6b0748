"""Rollouts: sample answers to prompts, with their log-probabilities."""

from typing import TYPE_CHECKING

from llamachat.errors import ConfigError

if TYPE_CHECKING:
    from llamachat.chat_format import ChatFormat
    from llamachat.config.sections import Rollout
    from llamachat.models.loading import LanguageModel
    from llamachat.rollout.engine import LocalEngine


def open_engine(
    model: "LanguageModel", chat_format: "ChatFormat", rollout: "Rollout", *, rows_per_batch: int | None = None
) -> "LocalEngine":
    """Create an engine in this process that samples from the model; auto is our own if it supports the model.

    At most `rows_per_batch` answers are sampled at once; None leaves the choice to the engine.
    """
    if rollout.engine == "vllm":
        from llamachat.rollout.vllm import VllmEngine

        assert rollout.server is not None, "the section holds a server where its engine is vllm"
        return VllmEngine(model, chat_format.stop_ids, rollout.server, shares_card=rollout.server_gib is not None)
    from llamachat.rollout.decoder import LlamaEngine, unsupported
    from llamachat.rollout.hugging_face import HuggingFaceEngine

    reason = None if rollout.engine == "hugging_face" else unsupported(model)
    if rollout.engine == "llama" and reason is not None:
        raise ConfigError(
            f"rollout.engine: llama, but the model has {reason}. Our decoder supports only plain Llama models and LoRA "
            "adapters, and would give other answers than the model. Set rollout.engine to auto or hugging_face."
        )
    if rollout.engine == "hugging_face" or reason is not None:
        cache_gib = 1.0 if rollout.cache_gib == "auto" else rollout.cache_gib
        return HuggingFaceEngine(
            model,
            chat_format.stop_ids,
            chat_format.tokenizer.pad_id,
            cache_gib=cache_gib,
            rows_per_batch=rows_per_batch,
        )
    return LlamaEngine(model, chat_format.stop_ids, cache_gib=rollout.cache_gib, rows_per_batch=rows_per_batch)
