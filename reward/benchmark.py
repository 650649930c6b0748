"""`llamachat benchmark` for reward models: the probe on questions no recipe trains on, and accuracy on files of pairs.

Writes `benchmark/<digest>/probe.json` and `pairs-<file>-<digest of its path>.json` next to the artifact, like the
benchmarks of policies.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llamachat.chat_format.dialog import Dialog, DialogError, Message
from llamachat.config.sections import bundled
from llamachat.data.files import read_rows
from llamachat.data.loading import read_records
from llamachat.data.records import Preference, first_user_turn
from llamachat.maths.intervals import proportion_interval
from llamachat.models.reward_model import RewardModel, load_reward_model
from llamachat.runs.artifacts import Artifact
from llamachat.runs.atomic import write_json
from llamachat.runs.fingerprints import fingerprint
from llamachat.runs.reader import Benchmark, Measure, benchmark_folder
from reward.presentation import PROBED
from reward.probe import probe

QUESTIONS = "data/benchmarks/truthfulqa.jsonl.gz"


def measure_reward_models(artifacts: Mapping[str, Artifact], pairs: Sequence[str]) -> dict[str, dict[str, Benchmark]]:
    """Probe results and accuracy on each file of preference pairs, keyed by reward model and then by measurement."""
    records = {file: read_records(file, Preference) for file in pairs}
    dialogs = _references()
    results = {}
    for label, artifact in artifacts.items():
        model = load_reward_model(artifact.path, device="auto")
        measured = {
            f"pairs-{Path(file).name.partition('.')[0]}-{fingerprint({'file': file})[:8]}": _accuracy(
                model, file, records[file]
            )
            for file in pairs
        }
        results[label] = {"probe": _probed(model, artifact, dialogs), **measured}
        for name, one in results[label].items():
            write_json(benchmark_folder(artifact) / f"{name}.json", one.model_dump(mode="json"))
    return results


def _references() -> list[Dialog]:
    """TruthfulQA questions with best answers (Lin et al. 2022, arXiv:2109.07958): harmless and in no recipe's data."""
    rows = [row.value for row in read_rows(str(bundled(QUESTIONS)))]
    return [
        Dialog((Message("user", row["prompt"][0]["content"]), Message("assistant", row["benchmark"]["best"])))
        for row in rows
    ]


def _probed(model: RewardModel, artifact: Artifact, dialogs: Sequence[Dialog]) -> Benchmark:
    which = artifact.manifest.details.get("which", "helpfulness")
    result = probe(which, dialogs, [], lambda of: _scores(model, of))
    figures = {
        f"reference above {PROBED[row.name]}": Measure(row.preferred, row.low, row.high, row.count)
        for row in result.rows
    }
    return Benchmark(title="Probe: TruthfulQA's best answers against answers that are never better", figures=figures)


def _accuracy(model: RewardModel, file: str, pairs: Sequence[Preference]) -> Benchmark:
    """Share of pairs whose chosen answer scores higher; a tie counts half."""
    scores = iter(_scores(model, [(*pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]))
    outcomes, prompts = [], []
    for pair, chosen, rejected in zip(pairs, scores, scores, strict=True):
        if chosen is not None and rejected is not None:
            outcomes.append(0.5 if chosen == rejected else float(chosen > rejected))
            prompts.append(first_user_turn(pair))
    notes = [f"{len(pairs) - len(outcomes)} pairs that are too long for it are left out"] * (len(outcomes) < len(pairs))
    if not outcomes:
        return Benchmark(title=f"Pairs of {file}", figures={}, notes=notes)
    share = Measure(sum(outcomes) / len(outcomes), *proportion_interval(outcomes, groups=prompts), len(outcomes))
    return Benchmark(title=f"Pairs of {file}", figures={"chosen above rejected": share}, notes=notes)


def _scores(model: RewardModel, dialogs: Sequence[tuple[Message, ...]]) -> list[float | None]:
    """A score for each dialog; None if it does not fit into the model's context."""
    ids = []
    for dialog in dialogs:
        try:
            ids.append(model.encode(dialog))
        except DialogError:
            ids.append(None)
    scores = iter(model.score_ids([one for one in ids if one is not None]).tolist())
    return [None if one is None else next(scores) for one in ids]
