"""Configuration of the bundled base model; `llamachat pretrain` accepts each value as an override."""

from pydantic import Field

from llamachat.config.section import Section


class Config(Section):
    """Everything that determines the weights, except the texts."""

    seed: int = Field(default=0, description="Seed of the weights, the order of documents and the batches.")
    pieces: int = Field(default=4096, ge=512, description="Pieces of the SentencePiece vocabulary.")
    hidden_size: int = Field(
        default=256, multiple_of=64, description="Width; a multiple of 64, which 4-bit kernels want."
    )
    intermediate_size: int = Field(default=704, multiple_of=64, description="Width of the SwiGLU layer.")
    layers: int = Field(default=4, ge=1, description="Transformer blocks.")
    heads: int = Field(default=4, ge=1, description="Query heads.")
    key_value_heads: int = Field(default=2, ge=1, description="Key and value heads (grouped-query attention).")
    context: int = Field(default=1024, ge=64, description="Positions the model is trained on, in tokens.")
    tokens: int = Field(default=30_400_000, ge=1, description="Tokens to train on.")
    rows_per_step: int = Field(default=16, ge=1, description="Rows of `context` tokens in one optimizer step.")
    rows_per_microbatch: int = Field(
        default=4, ge=1, description="Rows in one forward pass; changes speed, not the result."
    )
    matrix_learning_rate: float = Field(
        default=6e-3, gt=0, description="Peak rate of Muon (update scaled to AdamW's size)."
    )
    learning_rate: float = Field(default=3e-3, gt=0, description="Peak rate of AdamW: embeddings, output head, norms.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decay of matrices. Llama 2 section 2.2: 0.1.")
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps with a rising rate.")
    decay_fraction: float = Field(
        default=0.6, ge=0, le=1, description="Share of the steps, the last ones, with a falling rate."
    )
    save_seconds: float = Field(default=180.0, gt=0, description="Seconds between checkpoints.")
