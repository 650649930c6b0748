"""`llamachat init`: writes a recipe for a base, data files, a card and a time budget, starting from the preset that
fits best.

The preset's values are copied, so the recipe needs no other file. Reads the data files and the base's config.json, but
no weights, and no network if the base is local or known.
"""

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from llamachat.chat_format.llama2 import SPECIAL_TAGS
from llamachat.config.gpus import CARDS, Gpu, parse_gpu
from llamachat.config.loading import from_plain, read_layers
from llamachat.config.section import NO_TEXT, from_home
from llamachat.config.sections import bundled, hub_set, missing, model_fault, split_revision
from llamachat.data.check import CheckReport, check_path
from llamachat.data.files import read_rows
from llamachat.data.problems import printable, report
from llamachat.data.records import Kind
from llamachat.errors import DataError, UsageError
from llamachat.memory.estimates import KNOWN_BASES, Shape, shape_of
from llamachat.models.hub import UNGATED, require_llama, tokenizer_folder
from llamachat.runs.outputs import written_beside
from llamachat.tables import duration, plural
from pipelines.planning.estimates import estimate_step
from pipelines.planning.fit import PRESETS, Fit, fits, settings_to_fit
from pipelines.planning.hardware import installed_bytes
from pipelines.planning.plan import BATCHES, FEW_STEPS
from pipelines.recipe.recipe import Recipe, RecipeSections, StepEntry, resolve
from pipelines.recipe.stages import REWARD_MODELS, STAGES, Product, Stage
from ppo import Config as PpoConfig

SHARE_FOR_STEPS = 0.85  # of the hours; the rest is for what no estimate covers: loading, saving, plots. Ours
LEAST_SHARE, FEW_PROMPTS = 0.02, 8  # of the preset's lengths, and of anything sampled: less is useless
PAIRS_FOR_A_JUDGE, DIALOGS_FOR_GATT = 2000, 50
ROWS_FOR_COLUMNS = 100  # rows that are searched for column names
FEW_CONVERSATIONS = 2000  # with fewer, a larger share is kept from training, so that there is something to measure with
DIALOGS_AND_PAIRS = ("sft", "helpfulness", "safety")
# The options of the command: what each accepts, and the key of `data` for its files.
OPTIONS: dict[str, tuple[Kind, str]] = {
    "--sft": ("dialog", "sft"),
    "--preferences": ("preference", "helpfulness"),
    "--safety": ("preference", "safety"),
    "--prompts": ("prompt", "prompts"),
    "--adversarial": ("prompt", "adversarial"),
}

Values = dict[str, Any]


@dataclass(slots=True)
class Draft:
    """A recipe as plain values, and the choices made."""

    preset: str
    values: Values
    left_out: dict[str, str]  # steps of the preset, with reasons
    config: str  # folder of the base's config.json, or the name of a known base
    batches: dict[str, str] = field(
        default_factory=dict
    )  # by step, batches made smaller for few records, and epochs raised

    def recipe(self) -> Recipe:
        """The recipe as it will be loaded, except that a hub base is read from a folder with its config.json."""
        values = self.values | {"base": self.values["base"] | {"model": self.config}}
        return resolve(from_plain(RecipeSections, values))

    @property
    def gpu(self) -> Gpu | None:
        return parse_gpu(self.values["run"]["gpu"]) if "gpu" in self.values["run"] else None

    def fit(self) -> Fit:
        fit = fits(self.recipe(), self.gpu)
        assert fit is not None, "the shape of the base is known"
        return fit

    def put(self, index: int, key: str, value: Any) -> None:
        """Set a value of one step: in its section, unless other steps share the section or the step overrides it."""
        entry = StepEntry(self.values["steps"][index])
        if entry.stage.models or key in entry.values:
            self.values["steps"][index] = {entry.head: {**entry.values, key: value}}
        else:
            self.values[entry.stage.section] = {**self.values.get(entry.stage.section, {}), key: value}


def init(
    base: str,
    files: Mapping[str, Sequence[Path]],
    *,
    columns: Mapping[str, str],
    gpu: str | None,
    hours: float | None,
    out: Path,
    run_dir: str,
) -> str:
    """Write the recipe for files by option; returns a summary with the next commands."""
    file_paths = [(option, str(path)) for option, paths in files.items() for path in paths]
    for option, path in (("--base", base), ("--run-dir", run_dir), *file_paths):
        if NO_TEXT.search(path):
            raise UsageError(f"{option}: {path!a} is not UTF-8 text, so a recipe cannot contain it. Rename it.")
    if fault := model_fault(base):
        raise UsageError(f"--base: {fault}")
    if Path(base).is_dir():
        require_llama(Path(base), base)
        config = base
    else:  # a known base of the hub, whose config.json is not needed
        config = base if split_revision(base)[0] in KNOWN_BASES else str(tokenizer_folder(base))
    shape = shape_of(config)
    if shape is None:
        raise UsageError(
            f"--base: '{base}' has no config.json with the model's sizes. Pass the folder of a whole Llama model."
        )
    data = read_files(files, columns)
    run = {"dir": run_dir, "gpu": gpu, "max_hours": hours}
    presets = _nearest_presets(shape, with_card=bool(gpu))
    draft = _that_fits([_draft(name, values, base, run, data, config) for name, values in presets])
    _shorten(draft)
    _lower_batches(draft)
    return _write(out, draft, data)


# -- the files


@dataclass(slots=True)
class DataFiles:
    """The contents of the files: by key of `data`, the files in order and their number of records."""

    files: dict[str, list[str]] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)  # renamed columns, by file
    rated: int = 0  # pairs that have a rating
    labelled: int = 0  # answers of data.safety that have a label

    def source(self, path: str) -> Values:
        """The source for a file, as a recipe writes it."""
        return {"path": path} | ({"columns": dict(self.columns[path])} if self.columns[path] else {})

    def count(self, *keys: str) -> int:
        return sum(self.records.get(key, 0) for key in keys)


def read_files(files: Mapping[str, Sequence[Path]], columns: Mapping[str, str]) -> DataFiles:
    """Read the files of each option completely; raises UsageError or DataError for the first that cannot be trained on.

    `columns` maps fields to columns, for the files that have such a column.
    """
    data = DataFiles()
    data.columns = {str(path): _columns_in(str(path), columns) for paths in files.values() for path in paths}
    absent = [name for name, column in columns.items() if not any(name in of_file for of_file in data.columns.values())]
    if absent:
        raise UsageError(
            f"--columns: no file has a column {columns[absent[0]]!r} (for '{absent[0]}') in its first rows. Write"
            " FIELD=COLUMN, with the name in the file last."
        )
    earlier: dict[tuple[Path, Kind], str] = {}
    for option, path in ((option, path) for option, paths in files.items() for path in paths):
        kind, key = OPTIONS[option]
        place = (Path(from_home(str(path))).resolve(), kind)
        if place in earlier:
            raise UsageError(
                f"{option}: '{path}' was already passed with {earlier[place]}. Its records would count twice. Name it once;"
                " to give a source more weight, set its `weight` in the recipe."
            )
        earlier[place] = option
        checked = _checked(str(path), option, kind, data.columns[str(path)])
        data.files.setdefault(key, []).append(str(path))
        data.records[key] = data.count(key) + checked.num_records
        for name, times in checked.labels.items():
            data.rated += times * name.startswith("rating ")
            data.labelled += times * (key == "safety" and name.startswith(("chosen_is_safe", "rejected_is_safe")))
    return data


def _columns_in(path: str, columns: Mapping[str, str]) -> dict[str, str]:
    """The renamed columns that the first rows of a file have."""
    if not columns or not Path(from_home(path)).is_file():
        return {}
    rows = islice(read_rows(path), ROWS_FOR_COLUMNS)
    names = {name for row in rows if isinstance(row.value, Mapping) for name in row.value}
    return {name: column for name, column in columns.items() if column in names}


def _checked(path: str, option: str, kind: Kind, columns: Mapping[str, str]) -> CheckReport:
    """The report on a file, if it may be trained on."""
    if not Path(from_home(path)).exists():
        raise UsageError(
            f"{option}: '{path}' is not a local file. `init` reads every record, and downloads nothing. Download and convert"
            f" the set (`llamachat data convert {quote(path)} FILE.jsonl`), or start from a preset of configs/."
            if hub_set(path)
            else f"{option}: {missing(path, what='the data file')}"
        )
    if not Path(from_home(path)).is_file() and not Path(from_home(path)).is_dir():
        raise UsageError(f"{option}: '{path}' is not a file that a recipe can name. Write its content to a file.")
    checked = check_path(path, None, "auto", SPECIAL_TAGS, columns=columns)
    for problem in checked.problems:
        if not problem.line:  # of the whole file: a folder, an empty file, a table
            raise DataError(f"{option}: '{path}' {problem.reason} {problem.fix}")
    # Prompts may also be read from dialogs and preferences; dialogs and preferences only from their own kind.
    if checked.num_records and checked.kind != kind and kind != "prompt":
        other = next(name for name, (option_kind, _) in OPTIONS.items() if option_kind == checked.kind)
        raise UsageError(
            f"{option}: '{path}' holds {plural(checked.num_records, checked.kind or 'record')}, but {kind}s are needed here. Pass it"
            f" with {other}, or pass a file of {kind}s."
        )
    if checked.problems or not checked.num_records:
        raise DataError(
            f"{option}: {path}: {checked.num_bad_lines} of {checked.num_bad_lines + checked.num_records} records are invalid,"
            " and `init` skips none. Fix the file (`llamachat data convert` repairs what it can and counts what it"
            f" drops), and pass the result.\n{report(checked.problems, path)}"
        )
    return checked


# -- the preset with the user's data


def _nearest_presets(shape: Shape, *, with_card: bool) -> list[tuple[str, Values]]:
    """The presets of the nearest size as plain values, starting with those that cost the result least."""
    ranked: list[tuple[float, int, str, Values]] = []
    for path in sorted(PRESETS.glob("*.yaml")):
        layers, problems = read_layers(path, ())
        values = layers.values
        model, method = values["base"]["model"], values["tuning"]["method"]
        size = shape_of(model) or shape_of(str(bundled(model)))
        # Two presets are for tests, and one is for several cards, which has not run on GPUs yet.
        is_meant = not path.stem.endswith("smoke") and "x " not in str(values["run"].get("gpu", ""))
        if is_meant and size is not None and not problems and (with_card or method != "qlora"):
            distance = round(abs(math.log(size.weights / shape.weights)), 3)
            ranked.append((distance, ("full", "lora", "qlora").index(method), path.stem, values))
    ranked.sort(key=lambda preset: preset[:3])
    return [(name, values) for distance, _, name, values in ranked if distance == ranked[0][0]]


def _draft(preset: str, values: Values, base: str, run: Values, data: DataFiles, config: str) -> Draft:
    """The preset's values with the user's base, run and files, and the steps that these data allow."""
    values = {key: deepcopy(value) for key, value in values.items() if key != "extends"}
    values["run"] = {"seed": values["run"].get("seed", 0)} | {key: value for key, value in run.items() if value}
    path = Path(config) / "config.json"
    context = json.loads(path.read_text()).get("max_position_embeddings") if path.is_file() else None
    longest = values["base"]["max_tokens"]
    values["base"] |= {"model": base, "max_tokens": min(longest, context or longest)}
    split = dict(values["data"]["split"])
    if data.count(*DIALOGS_AND_PAIRS) < FEW_CONVERSATIONS:
        split |= {"test": max(split["test"], 0.1), "validation": max(split["validation"], 0.05)}
    if data.count("helpfulness") < PAIRS_FOR_A_JUDGE:
        split["judge"] = 0.0
    values["data"] = {key: [data.source(path) for path in paths] for key, paths in data.files.items()} | {
        "split": split
    }
    entries: list[Any] = []
    left_out: dict[str, str] = {}
    for entry in map(StepEntry, values["steps"]):
        for product in entry.products(values["data"]) if entry.named else entry.stage.products:
            reason = _reason_to_leave_out(entry.stage, product, data, values)
            if reason:
                left_out[entry.step_name(product)] = reason
                continue
            head = f"{entry.stage.command}/{product.makes.which}" if product.makes.which else entry.head
            overrides = {key: value for key, value in entry.values.items() if key != "only"}
            entries.append({head: overrides} if overrides else head)
    values["steps"] = entries
    commands = {StepEntry(item).stage.command for item in entries}
    for stage in STAGES.values():
        if stage.command not in commands:
            values.pop(stage.section, None)
    prompts = data.count("prompts", "adversarial") or data.count(*DIALOGS_AND_PAIRS)
    for section, most in (("rejection_sampling", prompts), ("context_distillation", data.count("adversarial"))):
        if section in values:
            values[section]["prompts"] = min(values[section]["prompts"], most)
    if "rm" in commands:
        two = "llama2_gate" if data.labelled else "weighted"  # without labels the gate's threshold has no meaning
        combine = two if data.count("safety") and data.count("helpfulness") else "single"
        values["scoring"] = {**values.get("scoring", {}), "combine": combine}
        values["reward"] |= {} if data.rated else {"margin": "none"}
        values["reward"] |= {} if data.count("safety") else {"other_share": 0.0}
    return Draft(preset, values, left_out, config)


def _reason_to_leave_out(stage: Stage, product: Product, data: DataFiles, values: Values) -> str:
    """Why the data do not allow a step of the preset; empty if they do."""
    default = stage.config.model_fields[stage.scores_if].default if stage.scores_if else True
    scores = REWARD_MODELS[0] in stage.reads and values.get(stage.section, {}).get(stage.scores_if, default)
    if scores and not data.count("helpfulness", "safety"):
        return "there are no pairs (--preferences)"
    if product.makes.which in ("helpfulness", "safety") and not data.count(product.makes.which):
        return f"there are no pairs for it (--{'safety' if product.makes.which == 'safety' else 'preferences'})"
    if product.share and not values["data"]["split"][product.share]:
        return f"it needs at least {PAIRS_FOR_A_JUDGE} pairs (--preferences)"
    if stage.command == "distill" and not (data.count("safety") and data.count("adversarial")):
        return "it needs safety pairs (--safety) and prompts that ask for something unsafe (--adversarial)"
    if stage.command == "gatt" and data.count("sft") < DIALOGS_FOR_GATT:
        return f"it needs at least {DIALOGS_FOR_GATT} dialogs"
    return ""


# -- fitting the card and the hours


def _that_fits(drafts: Sequence[Draft]) -> Draft:
    """The first draft that fits the card or the machine's memory as it is, else the first with settings that make it
    fit."""
    gpu, base, fit = drafts[0].gpu, drafts[0].values["base"]["model"], drafts[-1].fit()
    for draft in drafts:
        if draft.fit().fits and (gpu or draft.fit().peak_bytes <= installed_bytes()):
            return draft
    for draft in drafts:
        settings = settings_to_fit(draft.recipe(), gpu) if gpu else None
        if settings is not None:
            for key, value in settings:
                section, _, name = key.partition(".")
                draft.values.setdefault(section, {})[name] = value
            return draft
    recipe, names = drafts[-1].recipe(), sorted(CARDS, key=lambda name: CARDS[name][0])
    least = next((name for name in names if settings_to_fit(recipe, parse_gpu(name)) is not None), "none")
    raise UsageError(
        f"--gpu: {gpu or f'this machine without a card ({installed_bytes() / 2**30:.1f} GiB)'} is too small for '{base}':"
        f" '{fit.worst}' needs an estimated {fit.peak_bytes / 2**30:.1f} GiB. Name a larger card (the"
        f" smallest known one that fits: {least}), or use a smaller base, such as {UNGATED}."
    )


def _shorten(draft: Draft) -> None:
    """Shorten the longest steps so that all steps end within the hours."""
    steps, values, fit = draft.recipe().steps, draft.values, draft.fit()
    hours = draft.values["run"].get("max_hours")
    seconds = [estimate.seconds for estimate in fit.steps.values()]
    level = longest = max(seconds)  # seconds that a step may take
    while hours is not None and (needed := (fit.hours or 0.0) / SHARE_FOR_STEPS) > hours:
        if level <= LEAST_SHARE * longest:
            raise UsageError(
                f"--hours: {hours:g} is too short: with {LEAST_SHARE:.0%} of the preset's lengths the steps take about"
                f" {duration(3600 * (fit.hours or 0))} by estimate. Pass --hours {math.ceil(1000 * needed) / 1000:g} or"
                " more, a faster card with --gpu, or fewer records."
            )
        level = max(LEAST_SHARE * longest, 0.9 * level)
        draft.values = deepcopy(values)
        for index, step in enumerate(steps):
            for key, value in step.config.model_dump().items() if seconds[index] > level else ():
                share = level / seconds[index]
                if key == "iterations" or (key.endswith(("prompts", "dialogs")) and isinstance(value, int)):
                    draft.put(index, key, max(min(value, FEW_PROMPTS), int(value * share)))
                elif key == "epochs" and step.stage.command in ("sft", "rm", "dpo"):
                    draft.put(index, key, float(f"{value * share:.2g}"))
        fit = draft.fit()


def _lower_batches(draft: Draft) -> None:
    """Give every training enough optimizer steps to learn: by smaller batches, then by more epochs."""
    recipe = draft.recipe()
    for index, step in enumerate(recipe.steps):
        estimate = estimate_step(recipe, step)
        steps = estimate.optimizer_steps if estimate else None
        if steps is None or steps >= FEW_STEPS:
            continue
        if isinstance(step.config, PpoConfig):
            minibatch = step.config.responses_per_minibatch
            while steps < FEW_STEPS and minibatch % 2 == 0:
                steps, minibatch = 2 * steps, minibatch // 2
            draft.put(index, "responses_per_minibatch", minibatch)
            draft.batches[step.name] = f"responses_per_minibatch {minibatch}"
            continue
        own = step.config.model_dump()
        trained = {**recipe.sections.sft.model_dump(), **own["sft"]} if step.stage.tunes else own
        key = next(key for key in BATCHES if key in trained)
        examples = max(1, trained[key] * (steps - 1))  # in all epochs, at least
        smaller = {key: max(1, examples // FEW_STEPS)}
        if examples < FEW_STEPS:
            smaller["epochs"] = math.ceil(10 * trained["epochs"] * FEW_STEPS / examples) / 10
        draft.batches[step.name] = ", ".join(f"{name} {value}" for name, value in smaller.items())
        for name, value in ({"sft": own["sft"] | smaller} if step.stage.tunes else smaller).items():
            draft.put(index, name, value)


# -- the output


def _write(out: Path, draft: Draft, data: DataFiles) -> str:
    """Write the recipe with a summary of the choices at its top, and return the summary with the next commands."""
    card, fit, preset = draft.gpu, draft.fit(), f"configs/{draft.preset}.yaml"
    rated = {"helpfulness": f", {data.rated or 'none'} rated"}
    files = data.files.items()
    room = f"; a step should need at most {card.usable_bytes / 2**30:.1f} of {card}" if card else ""
    steps = ", ".join(f"{name} {duration(estimate.seconds)}" for name, estimate in fit.steps.items())
    batches = "; ".join(f"{name} {values}" for name, values in draft.batches.items())
    few = (
        f"smaller than the preset's, since so few records would give fewer than {FEW_STEPS} optimizer steps ({batches})"
    )
    rows = [
        *(
            (f"data.{k}", f"{plural(data.records[k], 'record')} from {', '.join(paths)}{rated.get(k, '')}")
            for k, paths in files
        ),
        ("preset", f"{preset}, tuning.method {draft.values['tuning']['method']}"),
        ("steps", ", ".join(fit.steps)),
        *([("batches", few)] if batches else []),
        *(("left out", f"{name}: {reason}") for name, reason in draft.left_out.items()),
        ("memory", f"about {fit.peak_bytes / 2**30:.1f} GiB at the peak ({fit.worst}), estimated{room}"),
        ("time", f"about {duration(3600 * (fit.hours or 0))} by estimate: {steps}"),
    ]
    lines = [f"  {label:<12} {printable(text)}" for label, text in rows]  # a comment ends with its line
    head = [f"# Written by `llamachat init` from {preset}, which explains each value."]
    head += [f"# {line}" for line in lines]
    text = yaml.safe_dump(draft.values, sort_keys=False, width=110, allow_unicode=True, default_flow_style=None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: '{out}' cannot be written ({error.strerror}). Choose another path.") from error
    with written_beside(out) as stream:
        stream.write("\n".join([*head, text]).encode())
    chosen = f"{out}: a recipe for {draft.values['base']['model']} on {card or 'two CPU cores'}"
    commands = [f"  llamachat {command} --config {quote(str(out))}" for command in ("doctor", "plan", "all")]
    return "\n".join([chosen, *lines, "Next:", *commands])
