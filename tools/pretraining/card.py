"""The model card of the bundled base: description, training data and evaluation."""

import json
from pathlib import Path

from tools.pretraining.config import Config
from tools.pretraining.corpus import SOURCES
from tools.pretraining.evaluation import SourceBits, mix

TEXT = """# The bundled tiny base

A model of Llama 2's architecture (RMSNorm, SwiGLU, RoPE, grouped-query attention) with {weights:.2f} M parameters and a
SentencePiece BPE tokenizer of {pieces} pieces (byte fallback, digits split, `<unk>` 0, `<s>` 1, `</s>` 2), so that the
whole recipe runs on a laptop. It writes plausible English but knows almost nothing: use it to learn, test and debug.

| | |
|---|---|
| shape | {layers} blocks, width {hidden}, SwiGLU {intermediate}, {heads} query and {kv} key-value heads, context {context} |
| weights | bf16 (trained with fp32 master copies) |
| trained on | {tokens:.1f} M tokens, {steps} steps of {rows} rows of {context} tokens |
| optimizer | Muon for the blocks' matrices (peak {muon:g}), AdamW for embeddings, head and norms (peak {adamw:g}) |
| schedule | warm-up, constant, linear decay to 2% |
| held-out bits per byte, on the training mix | **{mix:.3f}** |

Trained with `llamachat pretrain --texts DIR --run DIR{overrides}`; a killed run resumes from its last checkpoint.

![training loss](curve.png)

## Held-out text

One percent of each source's documents is held out. Bits per byte are comparable between tokenizers; each document is
scored from its first token, with at most {context} tokens of context.

| source | share of the training mix | bits per byte | tokens measured |
|---|---|---|---|
{rows_of_sources}
{unmeasured}
## Data

Documents start with BOS and end with EOS (a passage of a longer work has no EOS). Sets that are also used for tuning
are split by the hash of a conversation's first turn, and `data/` is excluded. Origins and licences:

{licences}

## Limits

English, mostly from before 1920, and casual chat. Facts are unreliable, and the biases of the sources remain. Do not
use it in production.
"""

LICENCES = {
    "standard-ebooks": "20 novels for children and others (Standard Ebooks), CC0 / public domain",
    "eltec-eng": "99 English novels 1840-1920 (ELTeC), public domain, markup CC BY 4.0; down-weighted",
    "openstax": "11 textbooks (OpenStax, Rice University), CC BY 4.0",
    "self-dialogue": "Self-dialogue corpus, BSD-3-Clause",
    "topical-chat": "Topical-Chat (Amazon), CDLA-Sharing-1.0",
    "taskmaster-4": "Taskmaster-4 (Google LLC), CC BY 4.0",
    "schema-guided-dialogue": "Schema-Guided Dialogue (Google LLC), CC BY-SA 4.0",
    "onestopenglish": "OneStopEnglish news for learners, CC BY-SA 4.0",
    "wikipedia-sample": "English Wikipedia sample, CC BY-SA 3.0",
    "pratham-books-en": "Pratham Books stories marked CC BY or public domain",
    "african-storybook-en": "African Storybook stories marked CC BY or public domain",
    "tinystories-sample": "TinyStories excerpt (Eldan and Li), CDLA-Sharing-1.0",
    "fairytaleqa": "FairytaleQA stories and questions, Apache-2.0",
    "gsm8k": "GSM8K training problems (OpenAI), MIT",
    "tinyshakespeare": "Shakespeare, public domain",
}


def model_card(config: Config, run: Path, report: dict[str, SourceBits]) -> str:
    """README.md of the model folder, with all figures from this run."""
    from tools.pretraining.model import new_model

    defaults = Config()
    overrides = [f"{k}={v}" for k, v in config.model_dump().items() if v != getattr(defaults, k)]
    order = [source.name for source in SOURCES if source.name in report]
    steps = config.tokens // (config.rows_per_step * config.context)
    return TEXT.format(
        weights=sum(p.numel() for p in new_model(config).parameters()) / 1e6,
        pieces=config.pieces,
        layers=config.layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.heads,
        kv=config.key_value_heads,
        context=config.context,
        tokens=steps * config.rows_per_step * config.context / 1e6,
        steps=steps,
        rows=config.rows_per_step,
        muon=config.matrix_learning_rate,
        adamw=config.learning_rate,
        mix=mix(report),
        overrides="".join(f" {text}" for text in overrides),
        rows_of_sources="\n".join(
            f"| {name} | {report[name].share:.1%} | {report[name].bits_per_byte:.3f} | {report[name].tokens} |"
            for name in order
        ),
        unmeasured=_unmeasured([source.name for source in SOURCES if source.name not in report]),
        licences="\n".join(f"- {source.name}: {LICENCES[source.name]}" for source in SOURCES),
    )


def _unmeasured(names: list[str]) -> str:
    if not names:
        return ""
    return f"\nNot measured, since none of their few documents is held out: {', '.join(names)}.\n"


def draw_curve(log: Path, png: Path) -> None:
    """Plot the training loss by step, raw and smoothed; of a repeated step, the last line counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = {row["step"]: row["loss"] for row in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
    steps = sorted(losses)
    smooth: list[float] = []
    for step in steps:
        smooth.append(losses[step] if not smooth else 0.97 * smooth[-1] + 0.03 * losses[step])
    figure, axes = pyplot.subplots(figsize=(7, 3.5), dpi=100)
    axes.plot(steps, [losses[step] for step in steps], color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color="tab:blue")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(min(smooth) - 0.3, 6.0))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(png)
    pyplot.close(figure)
