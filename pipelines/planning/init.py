"""`llamachat init`: a recipe for a base, data files and a card, from the preset that fits, ending within the hours.

The preset's values are copied, so that the recipe needs no other file. Reads the files and the base's config.json; no weights, and no network where the base is here or known.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamachat.config.gpus import CARDS, Gpu, parse_gpu
from llamachat.config.loading import from_plain, read_layers
from llamachat.config.sections import ModelPath, bundled
from llamachat.errors import UsageError
from llamachat.memory.estimates import KNOWN_BASES, Shape, shape_of
from llamachat.models.hub import UNGATED, require_llama, tokenizer_folder
from pipelines.planning.estimates import duration, estimate_step
from pipelines.planning.fit import PRESETS, Fit, fits, settings_to_fit
from pipelines.planning.hardware import installed_bytes
from pipelines.planning.init_data import Holdings, read_files
from pipelines.planning.plan import BATCHES, FEW_STEPS
from pipelines.recipe.entries import read_entry
from pipelines.recipe.recipe import Recipe, RecipeSections, load, resolve
from pipelines.recipe.stages import REWARD_MODELS, STAGES, Product, Stage
from ppo import Config as PpoConfig

NOT_FOR_USE = "smoke"  # a preset for tests alone
SHARE_FOR_STEPS = 0.85  # of the hours; the rest is for what no estimate counts: loading, saving, figures. Ours
LEAST_SHARE, FEW_PROMPTS = 0.02, 8  # of the preset's lengths, and of anything sampled: what is less teaches nothing
HOURS_WITHOUT_A_CARD = (
    200  # a longer training on two CPU cores is taken to be meant for a card, unless --hours asks for it
)
PAIRS_FOR_A_JUDGE, DIALOGS_FOR_GATT = 2000, 50
FEW_CONVERSATIONS = 2000  # of which more are kept from training, so that there is something to measure with

DIALOGS_AND_PAIRS = ("sft", "helpfulness", "safety")

Values = dict[str, Any]


@dataclass(slots=True)
class Draft:
    """A recipe as plain values, and what the preset has besides."""

    preset: str
    values: Values
    left_out: dict[str, str]  # steps of the preset, and why
    place: str  # of the base's config.json

    def recipe(self) -> Recipe:
        """As it will be loaded, but for a base of the hub, whose config.json lies in a folder."""
        values = self.values | {"base": self.values["base"] | {"model": self.place}}
        return resolve(from_plain(RecipeSections, values))

    @property
    def gpu(self) -> Gpu | None:
        return parse_gpu(self.values["run"]["gpu"]) if "gpu" in self.values["run"] else None

    def fit(self) -> Fit:
        fit = fits(self.recipe(), self.gpu)
        assert fit is not None, "the shape of the base is known"
        return fit

    def put(self, index: int, key: str, value: Any) -> None:
        """Change a value of one step: in its section, unless other steps share that or the step's entry has its own."""
        entry = read_entry(self.values["steps"][index])
        if entry.stage.models or key in entry.values:
            self.values["steps"][index] = {entry.head: {**entry.values, key: value}}
        else:
            self.values[entry.stage.section] = {**self.values.get(entry.stage.section, {}), key: value}


def init(
    base: str, files: Mapping[str, Sequence[Path]], *, gpu: str | None, hours: float | None, out: Path, run_dir: str
) -> str:
    """Write the recipe for files by option; returns what was chosen and what to do next."""
    place = _place(base)
    shape = shape_of(place)
    if shape is None:
        raise UsageError(
            f"--base: the config.json of '{base}' has no sizes. What fits a card follows from them. Give the folder of a Llama"
            " model with its config.json."
        )
    holdings = read_files(files)
    own = {"base": base, "run": {"dir": run_dir, "gpu": gpu, "max_hours": hours}}
    presets = _nearest_presets(shape, with_card=bool(gpu))
    draft = _that_fits([_draft(name, values, own, holdings, place) for name, values in presets])
    _shorten(draft)
    _lower_batches(draft)
    fit = draft.fit()
    _write(out, draft, fit)
    return _summary(out, draft, fit, holdings)


def _place(base: str) -> str:
    """The folder with the base's small files; the name of a known base of the hub, which need not be asked for them."""
    for _, text in ModelPath().problems(base):
        raise UsageError(f"--base: {text}")
    if Path(base).is_dir():
        require_llama(Path(base), base)
        return base
    return base if base in KNOWN_BASES else str(tokenizer_folder(base))


# -- the preset with the user's data


def _nearest_presets(shape: Shape, *, with_card: bool) -> list[tuple[str, Values]]:
    """The presets for the nearest size as plain values, those first that cost the result least."""
    ranked: list[tuple[float, int, str, Values]] = []
    for path in sorted(PRESETS.glob("*.yaml")):
        layers, problems = read_layers(path, ())
        values = layers.values
        model, method = values["base"]["model"], values["tuning"]["method"]
        size = shape_of(model) or shape_of(str(bundled(model)))
        is_for_several_cards = "x " in str(values["run"].get("gpu", ""))  # not run on GPUs yet
        if problems or size is None or path.stem == NOT_FOR_USE or is_for_several_cards:
            continue
        if with_card or method != "qlora":
            distance = round(abs(math.log(size.weights / shape.weights)), 3)
            ranked.append((distance, ("full", "lora", "qlora").index(method), path.stem, values))
    ranked.sort(key=lambda preset: preset[:3])
    return [(name, values) for distance, _, name, values in ranked if distance == ranked[0][0]]


def _draft(preset: str, values: Values, own: Values, holdings: Holdings, place: str) -> Draft:
    """The preset's values with the user's base, run and files, and the steps that these allow."""
    values = {key: deepcopy(value) for key, value in values.items() if key != "extends"}
    values["run"] = {"seed": values["run"].get("seed", 0)} | {key: value for key, value in own["run"].items() if value}
    config = Path(place) / "config.json"
    context = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
    longest = values["base"]["max_tokens"]
    values["base"] |= {"model": own["base"], "max_tokens": min(longest, context or longest)}
    data = {key: [{"path": path} for path in paths] for key, paths in holdings.files.items()}
    values["data"] = data | {"split": _split(values["data"]["split"], holdings)}
    kept: list[Any] = []
    left_out: dict[str, str] = {}
    for entry in map(read_entry, values["steps"]):
        for product in entry.products(values["data"]) if entry.named else entry.stage.products:
            reason = _reason_to_leave_out(entry.stage, product, holdings, values)
            if reason:
                left_out[entry.step_name(product)] = reason
                continue
            head = f"{entry.stage.command}/{product.makes.which}" if product.makes.which else entry.head
            overrides = {key: value for key, value in entry.values.items() if key != "only"}
            kept.append({head: overrides} if overrides else head)
    values["steps"] = kept
    commands = {read_entry(item).stage.command for item in kept}
    for stage in STAGES.values():
        if stage.command not in commands:
            values.pop(stage.section, None)
    asked = {"rejection_sampling": holdings.count("prompts", "adversarial") or holdings.count(*DIALOGS_AND_PAIRS)}
    asked["context_distillation"] = holdings.count("adversarial")
    for section in asked.keys() & values.keys():
        values[section]["prompts"] = min(values[section]["prompts"], asked[section])
    if "rm" in commands:
        values["scoring"] = {**values.get("scoring", {}), "combine": _combine(holdings)}
        values["reward"] |= {} if holdings.rated else {"margin": "none"}
        values["reward"] |= {} if holdings.count("safety") else {"other_share": 0.0}
    return Draft(preset, values, left_out, place)


def _reason_to_leave_out(stage: Stage, product: Product, holdings: Holdings, values: Values) -> str:
    """Why these data do not allow a step of the preset; empty where they do."""
    default = stage.config.model_fields[stage.scores_if].default if stage.scores_if else True
    scores = REWARD_MODELS[0] in stage.reads and values.get(stage.section, {}).get(stage.scores_if, default)
    if scores and not holdings.count("helpfulness", "safety"):
        return "there are no pairs (--preferences)"
    if product.makes.which in ("helpfulness", "safety") and not holdings.count(product.makes.which):
        return f"there are no pairs on it (--{'safety' if product.makes.which == 'safety' else 'preferences'})"
    if product.share and not values["data"]["split"][product.share]:
        return f"it wants {PAIRS_FOR_A_JUDGE} pairs (--preferences)"
    if stage.command == "distill" and not (holdings.count("safety") and holdings.count("adversarial")):
        return "it wants safety pairs (--safety) and prompts that ask for something unsafe (--adversarial)"
    if stage.command == "gatt" and holdings.count("sft") < DIALOGS_FOR_GATT:
        return f"it wants {DIALOGS_FOR_GATT} dialogs"
    return ""


def _split(preset: Mapping[str, float], holdings: Holdings) -> dict[str, float]:
    """What is kept from training: the preset's shares, more of few conversations, and a judge's where there are pairs enough."""
    split = dict(preset)
    if holdings.count(*DIALOGS_AND_PAIRS) < FEW_CONVERSATIONS:
        split |= {"test": max(split["test"], 0.1), "validation": max(split["validation"], 0.05)}
    return split if holdings.count("helpfulness") >= PAIRS_FOR_A_JUDGE else {**split, "judge": 0.0}


def _combine(holdings: Holdings) -> str:
    if not (holdings.count("safety") and holdings.count("helpfulness")):
        return "single"  # no gate without a safety model
    return "llama2_gate" if holdings.labelled else "weighted"  # without labels the gate's threshold means nothing


# -- onto the card and into the hours


def _that_fits(drafts: Sequence[Draft]) -> Draft:
    """The first that fits the card or the machine as it is, else the first with settings that make it fit."""
    gpu, base = drafts[0].gpu, drafts[0].values["base"]["model"]
    if gpu is None:
        draft, fit = drafts[0], drafts[0].fit()
        problem = f"two CPU cores take about {duration(3600 * (fit.hours or 0))}"
        if fit.peak_bytes > installed_bytes():
            peak, there = (f"{size / 2**30:.1f}" for size in (fit.peak_bytes, installed_bytes()))
            problem = f"'{fit.worst.name}' needs about {peak} GiB, and this machine has {there}"
        elif "max_hours" in draft.values["run"] or (fit.hours or 0) <= HOURS_WITHOUT_A_CARD:
            return draft
        raise UsageError(
            f"--base: '{base}' is too large for this machine without a card: {problem} by estimate. Name the card that"
            f" it will run on with --gpu (the smallest known that holds it: {_least_card(draft)}), give fewer records, or take a"
            f" smaller base, such as {UNGATED}."
        )
    for draft in drafts:
        if draft.fit().fits:
            return draft
    for draft in drafts:
        settings = settings_to_fit(draft.recipe(), gpu)
        if settings is not None:
            for key, value in settings:
                section, _, name = key.partition(".")
                draft.values.setdefault(section, {})[name] = value
            return draft
    raise UsageError(
        f"--gpu: {gpu} does not hold '{base}', with no settings of the preset {drafts[-1].preset}. Take a larger card"
        f" (the smallest known that holds it: {_least_card(drafts[-1])}), or a smaller base,"
        f" such as {UNGATED}."
    )


def _least_card(draft: Draft) -> str:
    """The smallest known card that holds the recipe, with settings that save memory if need be."""
    recipe = draft.recipe()
    names = sorted(CARDS, key=lambda name: CARDS[name][0])
    return next((name for name in names if settings_to_fit(recipe, parse_gpu(name)) is not None), "none")


def _shorten(draft: Draft) -> None:
    """Give the longest steps lengths with which all end within the hours."""
    steps, values, fit = draft.recipe().steps, draft.values, draft.fit()
    hours = draft.values["run"].get("max_hours")
    seconds = [step.estimate.seconds for step in fit.steps]
    level = longest = max(seconds)  # that a step may take
    while hours is not None and (needed := (fit.hours or 0.0) / SHARE_FOR_STEPS) > hours:
        if level <= LEAST_SHARE * longest:
            raise UsageError(
                f"--hours: {hours:g} are too few: with {LEAST_SHARE:.0%} of the preset's lengths the steps take about"
                f" {duration(3600 * (fit.hours or 0.0))} by estimate. Give --hours {math.ceil(1000 * needed) / 1000:g} or more, a"
                " faster card with --gpu, or fewer records."
            )
        level = max(LEAST_SHARE * longest, 0.9 * level)
        draft.values = deepcopy(values)
        for index, step in enumerate(steps):
            for key, value in step.config.model_dump().items() if seconds[index] > level else ():
                share = level / seconds[index]
                if key == "iterations" or (key.endswith(("prompts", "dialogs")) and isinstance(value, int)):
                    draft.put(index, key, max(min(value, FEW_PROMPTS), int(value * share)))
                elif key == "epochs" and step.stage.command in ("sft", "rm"):
                    draft.put(index, key, float(f"{value * share:.2g}"))
        fit = draft.fit()


def _lower_batches(draft: Draft) -> None:
    """Give every training optimizer steps enough to learn in."""
    recipe = draft.recipe()
    for index, step in enumerate(recipe.steps):
        estimate = estimate_step(recipe, step)
        steps = estimate.optimizer_steps if estimate else None
        if steps is None or steps >= FEW_STEPS:
            continue
        own = step.config.model_dump()
        if isinstance(step.config, PpoConfig):  # the same responses in more and smaller iterations
            while steps < FEW_STEPS and own["responses_per_minibatch"] > 1 and own["responses_per_iteration"] % 2 == 0:
                steps *= 2
                own["iterations"] *= 2
                own |= {key: own[key] // 2 for key in ("responses_per_iteration", "responses_per_minibatch")}
            own["validation_every"] = max(1, min(own["validation_every"], own["iterations"] // 4))
            changes = {key: value for key, value in own.items() if value != getattr(step.config, key)}
        else:
            trained = {**recipe.sections.sft.model_dump(), **own["sft"]} if step.stage.tunes else own
            key = next(key for key in BATCHES if key in trained)
            examples = max(1, trained[key] * (steps - 1))  # of all epochs, at the least
            smaller = {key: max(1, examples // FEW_STEPS)}
            if examples < FEW_STEPS:
                smaller["epochs"] = math.ceil(10 * trained["epochs"] * FEW_STEPS / examples) / 10
            changes = {"sft": own["sft"] | smaller} if step.stage.tunes else smaller
        for key, value in changes.items():
            draft.put(index, key, value)


# -- what is written


def _write(path: Path, draft: Draft, fit: Fit) -> None:
    """The recipe, loaded from beside its place and then renamed: what is there loads."""
    lines = [
        f"Written by `llamachat init` from configs/{draft.preset}.yaml, which says where each value is from.",
        f"About {fit.peak_bytes / 2**30:.1f} GiB at the peak, {_time(fit)}.",
        *(f"Left out: {name}: {reason}" for name, reason in draft.left_out.items()),
    ]
    text = yaml.safe_dump(draft.values, sort_keys=False, width=110, allow_unicode=True, default_flow_style=None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        side = path.with_name(f".incoming-{os.getpid()}-{path.name}")
        try:
            side.write_text("".join(f"# {line}\n" for line in lines) + text, encoding="utf-8")
            load(side)
            side.replace(path)
        finally:
            side.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out: '{path}' cannot be written ({error.strerror}). The recipe is one file. Name another place."
        ) from error


def _summary(out: Path, draft: Draft, fit: Fit, holdings: Holdings) -> str:
    card = draft.gpu
    rated = {"helpfulness": f", {holdings.rated or 'none'} rated"}
    room = f"; a step should need at most {card.usable_bytes / 2**30:.1f} of {card}" if card else ""
    rows = [
        *(
            (f"data.{key}", f"{holdings.records[key]} records of {', '.join(paths)}{rated.get(key, '')}")
            for key, paths in holdings.files.items()
        ),
        ("preset", f"configs/{draft.preset}.yaml, tuning.method {draft.values['tuning']['method']}"),
        ("steps", ", ".join(step.name for step in fit.steps)),
        *(("left out", f"{name}: {reason}") for name, reason in draft.left_out.items()),
        ("memory", f"about {fit.peak_bytes / 2**30:.1f} GiB at the peak ({fit.worst.name}), estimated{room}"),
        ("time", f"{_time(fit)}: " + ", ".join(f"{step.name} {duration(step.estimate.seconds)}" for step in fit.steps)),
    ]
    lines = [f"{out}: a recipe for {draft.values['base']['model']} on {card or 'two CPU cores'}"]
    lines += [f"  {label:<12} {text}" for label, text in rows]
    return "\n".join(
        [*lines, "Next:", *(f"  llamachat {command} --config {out}" for command in ("doctor", "plan", "all"))]
    )


def _time(fit: Fit) -> str:
    return f"about {duration(3600 * (fit.hours or 0))} by estimate"
