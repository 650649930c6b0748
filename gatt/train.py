"""Ghost Attention (Llama 2, arXiv:2307.09288, section 3.3): dialogs and a policy -> a policy that keeps instructions.

Instructions are drawn at random; the policy answers dialogs with the instruction in every turn; what it said is learnt
with the instruction in the first turn alone and the loss on the last answer; before and after, held-out dialogs with
held-out values tell how far an instruction is kept. Writes the step folder's sampling/, metrics.jsonl, samples.jsonl,
dialogs/, figures/, summary.json and, through the tuning, artifact/. Killed at any moment, the same call goes on. Where
`max_hours` ends the sampling, the dialogs made by then are learnt: no batch is better than another.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging as transformers_logging

from gatt.attention import draw_attention, strongest_attention, to_instruction
from gatt.batches import Dialogs
from gatt.config import Config
from gatt.figures import MOMENTS, consistency_figures, consistency_table, draw_consistency
from gatt.studio import Studio, open_studio
from gatt.synthesize import dialog_line
from llamachat import distributed
from llamachat.answers import making
from llamachat.answers.consistency import Outcome, Trial, as_said
from llamachat.answers.store import Store
from llamachat.chat_format import TrainOn
from llamachat.chat_format.dialog import Message
from llamachat.errors import DataError
from llamachat.models.loading import load_base, load_policy
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.tracking.curves import draw_curves
from llamachat.training.hours import open_hours

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

log = logging.getLogger(__name__)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Make the dialogs; tune on them, the last answer alone; measure; end the step."""
    # Its bars for loading and writing weights would break up ours.
    transformers_logging.disable_progress_bar()
    return making.run_parts(
        inputs,
        make=lambda: make_dialogs(config, inputs),
        over={**config.sft, "train_on": "last_answer"},
        sft_share=config.sft_share,
        compare=lambda tuned: compare(config, inputs, tuned),
    )


def make_dialogs(config: Config, inputs: StepInputs) -> Artifact:
    """Everything up to the published dialogs; what was sampled before is not sampled again."""
    store = Store(inputs.folder.sampling)
    hours = open_hours(inputs.step, "gatt", config.max_hours, inputs.deadline, store.folder)
    studio = open_studio(config, inputs, inputs.policy)
    store.kept("consistency-start", lambda: studio.measure(is_told=True).to_plain())
    with making.record(inputs, "gatt", keeps_record=False) as tracker:
        dialogs = Dialogs(studio, store, hours)
        figures = dialogs.go(tracker)
        left_out = making.counted(dialogs.dropped)
        if not dialogs.made:
            raise DataError(
                f"{inputs.step}: of {config.dialogs} dialogs none is left ({left_out}). Raise gatt.samples_per_turn, take "
                "gatt.families that the policy can keep, or raise rollout.max_new_tokens or base.max_tokens."
            )
        log.info("%d dialogs to learn, %d held out; %s", len(dialogs.made), len(dialogs.held_out), left_out)
        tracker.sync()
        # Before the dialogs, which end this part: a command killed between the two would never come back to write it.
        tracker.summary(figures | {"gatt/dialogs": float(len(dialogs.made))})
    return making.publish_dialogs(
        inputs,
        [dialog_line(one, inputs.step) for one in dialogs.made],
        [dialog_line(one, inputs.step) for one in dialogs.held_out],
        dropped=dialogs.dropped,
        details={"dialogs": len(dialogs.made)} | hours.details,
    )


def compare(config: Config, inputs: StepInputs, tuned: Artifact) -> None:
    """Final figures: consistency before and after, by turn, and the pictures."""
    folder, store = inputs.folder, Store(inputs.folder.sampling)
    studio = open_studio(config, inputs, tuned)
    trials = studio.trials()
    # By chance: what the tuned policy does without being told, which the tuning may have raised.
    for moment, is_told in (("final", True), ("chance", False)):
        store.kept(f"consistency-{moment}", lambda told=is_told: studio.measure(is_told=told).to_plain())
    outcomes = {moment: Outcome.from_plain(store.kept(f"consistency-{moment}", dict)) for moment in MOMENTS}
    if trials:
        log.info("%s", consistency_table(outcomes, trials))
        draw_consistency(outcomes, trials, folder.figures / "consistency.png")
        if distributed.is_first():
            _draw_attention(studio, tuned, trials[0], outcomes["final"], folder.figures / "attention.png")
    draw_curves(folder.metrics, folder.curves)
    with making.record(inputs, "gatt", keeps_record=True) as tracker:
        making.show_figures(tracker, folder)
        tracker.summary(consistency_figures(outcomes, trials))


def _draw_attention(studio: Studio, tuned: Artifact, trial: Trial, outcome: Outcome, path: Path) -> None:
    """The first policy, or the base where there was none, and the tuned one on one dialog, which the tuned one has said."""
    inputs, chat_format = studio.inputs, studio.desk.bank.chat_format
    messages = [Message("system", trial.instruction.text)]
    for turn in sorted(outcome.answers):
        if outcome.kept[turn][0] is None:  # past the context, where nothing was said
            break
        messages += [Message("user", trial.turns[turn - 1]), as_said(chat_format, outcome.answers[turn][0])]
    if len(messages) == 1:
        return
    ids = chat_format.encode_dialog(messages, train_on=TrainOn.LAST_ANSWER).input_ids
    maps, by_answer = [], []
    for name, artifact in (("before", inputs.policy), ("after", tuned)):
        attention_TT = strongest_attention(_eager(inputs, artifact), ids)
        maps.append((name, attention_TT))
        by_answer.append((name, to_instruction(attention_TT, chat_format, messages)))
        making.free_memory()
    draw_attention(maps, by_answer, path)


def _eager(inputs: StepInputs, policy: Artifact | None) -> "LanguageModel":
    """The policy, or the base itself, with the one kernel that tells its attention."""
    if policy is None:
        return load_base(inputs.base.model_copy(update={"attention": "eager"}), device="auto").eval()
    return load_policy(policy.path, dtype=inputs.base.dtype, device="auto", attention="eager").model
