"""One point each for a single sentence, for at most 12 words, and for naming what the question is about."""

import re


def score(prompts, completions, scores, **columns):
    return [points(messages[-1]["content"], text) for messages, text in zip(prompts, completions, strict=True)]


def points(question, answer):
    words = re.findall(r"[a-z']+", answer.lower())
    topics = {word for word in re.findall(r"[a-z']+", question.lower()) if len(word) > 4}
    return (len(re.findall(r"[.!?](?=\s|$)", answer)) == 1) + (0 < len(words) <= 12) + bool(topics & set(words))
