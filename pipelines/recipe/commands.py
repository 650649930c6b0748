"""The commands that are steps of a recipe, and what `--help` says of each: known without loading a stage."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCommand:
    """A command that runs a recipe's steps of its name."""

    help: str
    models: tuple[str, ...] = ()  # of which `--only` chooses some


STEP_COMMANDS = {
    "sft": StepCommand("Supervised fine-tuning: a base learns to answer from dialogs (paper, section 3.1)."),
    "rm": StepCommand(
        "Reward models: the chat policy learns which of two answers people prefer (3.2.2). Also runs a study.",
        models=("helpfulness", "safety", "judge"),
    ),
    "rs": StepCommand(
        "Rejection sampling: train on the best of K answers to each prompt, with those of earlier rounds (3.2.3)."
    ),
    "gatt": StepCommand(
        "Ghost Attention: the policy learns to keep an instruction of the first turn to the end (3.3)."
    ),
    "distill": StepCommand(
        "Context distillation: train on safer answers, sampled under a preprompt, without the preprompt (4.2.4)."
    ),
    "dpo": StepCommand(
        "Direct preference optimisation: the policy learns from the pairs themselves, without reward models (not in the"
        " paper; a baseline)."
    ),
    "ppo": StepCommand(
        "Proximal policy optimisation: the policy learns to answer as the reward models like it (3.2.3)."
    ),
    "eval": StepCommand("Evaluation: every finished policy of the run on the same held-out prompts (3.4 and 4.4)."),
    "report": StepCommand("Report on the finished steps of the run: one HTML page, and the same as Markdown."),
}
