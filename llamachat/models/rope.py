"""How far a model can see, and stretching it: rotary positions scaled beyond the length of pretraining."""

from typing import TYPE_CHECKING, Any

from llamachat.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from llamachat.config.sections import RopeScaling

SCALED_BY_FACTOR = ("linear", "dynamic")


def context_length(config: "LlamaConfig") -> int:
    """Positions that the model can tell apart, prompt and answer together, in tokens."""
    rope = rope_parameters(config)
    factor = float(rope["factor"]) if rope["rope_type"] in SCALED_BY_FACTOR else 1.0
    return int(config.max_position_embeddings * factor)


def rope_parameters(config: "LlamaConfig") -> dict[str, Any]:
    """Type, base wavelength and scaling of the rotary positions, by transformers' names."""
    config.standardize_rope_params()
    return dict(config.rope_parameters or {})


def scale_rope(config: "LlamaConfig", scaling: "RopeScaling | None", *, max_tokens: int) -> None:
    """Set linear interpolation (Chen et al., arXiv:2306.15595) or dynamic NTK, and hold `max_tokens` to the context.

    A config that is scaled already, as that of an artifact made from a scaled base, gets the scaling asked for, not
    the product of the two.
    """
    if scaling is not None:
        theta = rope_parameters(config)["rope_theta"]
        config.rope_parameters = {"rope_type": scaling.type, "factor": scaling.factor, "rope_theta": theta}
    context = context_length(config)
    if max_tokens > context:
        raise ConfigError(
            f"base.max_tokens: {max_tokens} tokens, but the model has {context} positions. A longer dialog would be "
            f"read at positions the model never saw. Set base.max_tokens to {context} or less, or lengthen the context "
            "with base.rope_scaling."
        )
