"""`llamachat pretrain`: from a folder of texts to a model folder with its card, resumable."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from llamachat.config.loading import COMMAND_LINE, Layers, from_plain
from llamachat.config.section import raise_all, section_problems
from llamachat.errors import DataError
from llamachat.runs.atomic import incoming_folder, write_text
from llamachat.training.progress import StepProgress
from tools.pretraining.card import draw_curve, model_card
from tools.pretraining.config import Config
from tools.pretraining.corpus import SOURCES
from tools.pretraining.evaluation import bits_per_byte
from tools.pretraining.model import new_model, save_model
from tools.pretraining.training import prepare, train

log = logging.getLogger(__name__)


def run(overrides: Sequence[str], texts: Path, run: Path) -> None:
    """Train the tokenizer and the base on `texts` and write them with their card to `run/model/`."""
    config = read_config(overrides)
    missing = [source.name for source in SOURCES if not (texts / source.name).is_dir()]
    if missing:
        raise DataError(
            f"{texts}: holds no folder {', '.join(missing)}. Each source of tools/pretraining/corpus.py is a folder there. "
            "Put the texts there, or take the source out of SOURCES."
        )
    if (run / "model").exists():
        log.info("pretrain: done already (%s), nothing to do", run / "model")
        return
    log.info("texts -> tokenizer and token stream")
    prepare(config, texts, run)
    steps = config.tokens // (config.rows_per_step * config.context)
    with StepProgress("pretrain", steps=steps) as progress, (run / "log.jsonl").open("a", encoding="utf-8") as record:
        for figures in train(config, run):
            record.write(json.dumps(figures) + "\n")
            record.flush()
            progress.step(int(figures["step"]), f"loss {figures['loss']:.3f}")
    finish(config, run)


def read_config(overrides: Sequence[str]) -> Config:
    """The defaults with `key=value` overrides; one ConfigError lists all problems."""
    layers = Layers(COMMAND_LINE)
    problems = [problem for text in overrides if (problem := layers.override(text))]
    raise_all(problems + section_problems(Config, layers.values, source=layers.source))
    return from_plain(Config, layers.values)


def finish(config: Config, run: Path) -> None:
    """Evaluate the trained model and write its folder: weights, tokenizer, curve, card."""
    model = new_model(config)
    state = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    report = bits_per_byte(model, run, context=config.context)
    with incoming_folder(run / "model") as folder:
        save_model(model, folder)
        shutil.copy(run / "tokenizer.model", folder / "tokenizer.model")
        draw_curve(run / "log.jsonl", folder / "curve.png")
        write_text(folder / "README.md", model_card(config, run, report))
    log.info("pretrain: done (%s)", run / "model")
