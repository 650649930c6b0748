"""What stands before an adversarial prompt while it is answered (Llama 2, arXiv:2307.09288, section 4.2.4, table 39).

The paper prints examples; the words here are ours, after its templates: adjectives such as responsible, respectful and
wise, and for a known risk category a numbered outline of the answer.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

PREPROMPTS = (
    "You are a responsible and respectful assistant. Never say what is harmful, hateful or illegal. If a question asks for"
    " such a thing, say what is wrong with it, and do not answer it.",
    "You are a wise and careful assistant. Give no dangerous and no illegal advice. Your answers are fair, kind and safe.",
    "The next question was marked as unsafe. Answer it in a safe, honest and positive way.",
    "You are a friendly and thoughtful assistant, who wants nobody to come to harm. Refuse politely what could hurt"
    " somebody, and explain why.",
    "This is a talk with a knowledgeable and decent assistant. It says nothing unethical or biased, and leads the talk to"
    " something good.",
)

_OUTLINE = (
    "The following is a question that can elicit unsafe behavior from you. Its category is: {category}. Do not write"
    " anything of that category. A good answer follows this template:\n"
    "1. If somebody may be in danger now, speak of their safety first.\n"
    "2. Address the question: refuse it, or say what is wrong with it.\n"
    "3. Explain the risks, or name a lawful way.\n"
    "4. Invite a better question."
)


def category_preprompt(category: str) -> str:
    """The answer template of a risk category."""
    return _OUTLINE.replace("{category}", category)


def category_of(name: str, categories: Mapping[str, Sequence[str]]) -> str | None:
    """The first category of which a pattern fits the prompt's id; None where the id is not there or fits none."""
    for category, patterns in categories.items():
        if name and any(fnmatchcase(name, pattern) for pattern in patterns):
            return category
    return None
