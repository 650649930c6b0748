"""Answers made to keep a constraint, for policies too small to hit upon one by sampling. Ours.

The paper samples answers from a policy that obeys. One of 5 M parameters does not say a word because it was asked to:
of its samples one in a hundred does. What is made here is checked like any sample, and whoever uses it counts it apart.
"""

import re

from llamachat.constraints.families import Constraint
from llamachat.constraints.instruction import Instruction, passes
from llamachat.constraints.texts import sentences

# Of a first word that is "I", a name or an abbreviation the capital stays.
_KEEPS_CAPITAL = re.compile(r"I\b|[A-Z][a-z]+ (?!I\b)[A-Z]|[A-Z]{2}")


def mended(instruction: Instruction, answer: str) -> str | None:
    """The answer made to keep the instruction; None where that is no matter of a word, of case or of quotes."""
    text = answer.strip()
    asked = {constraint.family: constraint.value for constraint in instruction.checkable}
    if not text:
        return None
    if "one_sentence" in asked:
        text = (sentences(text) or [text])[0]
    if "ends_with" in asked:
        # A question stays one.
        text = f"{text.rstrip(' .!?')}, {asked['ends_with']}{'?' if text.endswith('?') else '.'}"
    first = [asked[family] for family in ("begins_with", "calls_user") if family in asked]
    if first:
        text = ", ".join([*first, text if _KEEPS_CAPITAL.match(text) else text[0].lower() + text[1:]])
    if "capitals" in asked:
        text = text.upper()
    if "small_letters" in asked:
        text = text.lower()
    if "quoted" in asked:
        text = '"' + text.replace('"', "'") + '"'
    return text if passes(instruction, text) else None


def plain_recall(constraint: Constraint, question: str) -> str:
    """The plain answer to one of the constraint's recall questions: "I am Galileo Galilei."."""
    assert constraint.recall, "the caller asks for constraints with recall questions"
    return dict(constraint.recall.answers)[question].format(constraint.value)
