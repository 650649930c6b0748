"""The commands that are steps of a recipe, and the text of `--help` for each, known without loading a stage."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCommand:
    """A command that runs the steps of the recipe with its name."""

    help: str
    models: tuple[str, ...] = ()  # `--only` chooses some of them


STEP_COMMANDS = {
    "sft": StepCommand("Supervised fine-tuning: the base learns to answer from example dialogs (paper, section 3.1)."),
    "rm": StepCommand(
        "Reward models: trained from the chat policy to predict which of two answers people prefer (3.2.2). Also runs a study.",
        models=("helpfulness", "safety", "judge"),
    ),
    "rs": StepCommand(
        "Rejection sampling: train on the best of K answers to each prompt, and on those of earlier rounds (3.2.3)."
    ),
    "gatt": StepCommand(
        "Ghost Attention: the policy learns to follow an instruction of the first turn to the end of a dialog (3.3)."
    ),
    "distill": StepCommand(
        "Context distillation: sample safer answers under a preprompt, and train on them without it (4.2.4)."
    ),
    "dpo": StepCommand(
        "Direct preference optimisation: the policy learns from the pairs directly, without reward models (a baseline,"
        " not in the paper)."
    ),
    "ppo": StepCommand(
        "Proximal policy optimisation: the policy learns to maximise the reward models' scores (3.2.3)."
    ),
    "eval": StepCommand(
        "Evaluation: compare every finished policy of the run on the same held-out prompts (3.4 and 4.4)."
    ),
    "report": StepCommand("Report on the finished steps of the run, as one HTML page and as Markdown."),
}
