"""Normalise raw text: replace typographic characters with ASCII, and correct the spelling of casual chat.

The bundled tokenizer has 4,096 pieces: a curly quote would take three byte tokens and teach nothing.
"""

import re
import unicodedata

_SIGNS = {
    "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u00b4": "'", "\u2032": "'",
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2033": '"', "\u00ab": '"', "\u00bb": '"',
    "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": " - ", "\u2015": " - ", "\u2212": "-",
    "\u2026": "...", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\u200d": "", "\ufeff": "",
    "\ufe0f": "", "\u2022": "-", "\u25cf": "-", "\u00ad": "", "\r\n": "\n", "\r": "\n", "\t": " ",
}  # fmt: skip
_INVISIBLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2060-\u206f\u2800\ufffc\ufffd]")
_SIGN = re.compile("|".join(re.escape(sign) for sign in sorted(_SIGNS, key=len, reverse=True)))

_CONTRACTIONS = {
    "dont": "don't", "doesnt": "doesn't", "didnt": "didn't", "isnt": "isn't", "wasnt": "wasn't", "cant": "can't",
    "couldnt": "couldn't", "wouldnt": "wouldn't", "havent": "haven't", "hasnt": "hasn't", "arent": "aren't",
    "im": "I'm", "ive": "I've", "thats": "that's", "whats": "what's", "youre": "you're", "theyre": "they're",
    "hes": "he's", "shes": "she's", "theres": "there's", "definately": "definitely", "alot": "a lot",
    "favourite": "favorite", "i": "I", "i'm": "I'm", "i've": "I've", "i'd": "I'd", "i'll": "I'll", "thier": "their", "recieve": "receive",
    "wont": "won't", "shouldnt": "shouldn't", "youve": "you've",
}  # fmt: skip
_CONTRACTION = re.compile(r"(?<![\w'-])(" + "|".join(map(re.escape, _CONTRACTIONS)) + r")(?![\w'-])", re.IGNORECASE)

_JUNK = re.compile(
    r"https?:|www\.|\.com\b|\S@\S|[<>{}\[\]|\\^~`_#*=]|\bHITs?\b|\bturker|\bmturk|\b[bn]/?a\b|(.)\1{4,}|[^\x20-\x7e]",
    re.IGNORECASE,
)
_COARSE = re.compile(
    r"fuck|\bshit|bitch|nigg|\brape|\bporn|\bsex(?:y|ual)?\b|\bsuicid|\bwhore|\bslut|\bdick\b|\bcunt|\bass\b|asshole|testicle"
    r"|\bcocaine|\bheroin\b|\bterroris|\bnazi|hitler|\bhoe\b|\bdamn\b|\bboob|\bnaked\b|\bpenis|\bbastard",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """The text in NFC with ASCII quotes, dashes and spaces, without repeated blanks."""
    text = _SIGN.sub(lambda match: _SIGNS[match.group()], unicodedata.normalize("NFC", text))
    text = _INVISIBLE.sub(" ", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def casual(text: str) -> str:
    """A turn of casual chat on one line, with correct capitals, full stop and apostrophes."""
    text = re.sub(r"\s+", " ", plain(text))
    if text.isupper() and len(text) > 8:
        text = text.lower()
    text = _CONTRACTION.sub(lambda match: _like(match.group(), _CONTRACTIONS[match.group().lower()]), text)
    text = re.sub(r"(?<![\w'.-])u(?![\w'.-])", "you", text)
    text = re.sub(r" +([,.!?;:])(?=\s|$)", r"\1", text)
    text = re.sub(r"([!?,])\1+", r"\1", text)
    text = re.sub(r"\.{4,}", "...", text)
    text = re.sub(r"(?<=[a-z][.!?])(?=[A-Z])", " ", text)
    text = re.sub(r"(?<=[a-z]{2}[.!?] )(?<!etc. )[a-z]", lambda match: match.group().upper(), text)
    return ended(capitalised(text))


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def ended(text: str) -> str:
    """The text with a final full stop, unless it ends with other punctuation."""
    text = text.rstrip(" ,;:-")
    return text + "." if text and (text[-1].isalnum() or text[-1] in "%)'") else text


def _like(original: str, corrected: str) -> str:
    return capitalised(corrected) if original[0].isupper() else corrected


def is_clean_chat(text: str) -> bool:
    """Whether a turn is plain English chat: letters, no addresses, no mark-up, no profanity."""
    return bool(re.search(r"[A-Za-z]{2}", text)) and not _JUNK.search(text) and not _COARSE.search(text)


def is_decent(text: str) -> bool:
    """Whether a longer text contains no profanity (mark-up and lists are allowed)."""
    return not _COARSE.search(text) and not re.search(r"https?:|www\.", text)


_YOUNG = re.compile(
    r"child|\bminors?\b|underage|under-age|teen|\bkids?\b|lolita|infant|toddler|\bbab(?:y|ies)\b|daughter|\bson\b|niece"
    r"|nephew|schoolgirl|schoolboy|\b(?:[1-9]|1[0-7])[- ]?(?:year|yr|yo\b)|little (?:girl|boy)|young (?:girl|boy)",
    re.IGNORECASE,
)
_SEXUAL = re.compile(
    r"sex|porn|nude|naked|molest|\brape|p(?:a)?edo|grooming|erotic|incest|virgin|genital", re.IGNORECASE
)


def is_about_abuse_of_children(text: str) -> bool:
    """Whether a text mentions minors and sex; excluded from data/ even from safety research."""
    return "edophil" in text or bool(_YOUNG.search(text) and _SEXUAL.search(text))


_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|etc|No|Prof|Gen|e\.g|i\.e)|\b[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """The sentences of a text without line breaks."""
    merged: list[str] = []
    for part in re.split(r"(?<=[.!?])(?:(?<=\w[.!?])|(?<=[\"')][.!?]))?[\"')]?\s+(?=[\"'(]?[A-Z0-9])", text):
        if merged and _ABBREVIATION.search(merged[-1]):
            merged[-1] += " " + part
        else:
            merged.append(part)
    return [sentence.strip() for sentence in merged if sentence.strip()]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+(?:'[A-Za-z]+)*", text)


# The first words of an answer that declines.
_DECLINES = re.compile(
    r"\bI('m| am)( very| so)? sorry, but|\bI('m| am) (unable|not (able|going|willing|comfortable))|\bI (can't|cannot|can not|won't|will not|wouldn't|would not|don't want to|don't feel comfortable)\b"
    r"|\bI (don't|do not) think (it's|that's|it is|you should|that would be)|\byou (should not|shouldn't|should never)\b"
    r"|(it's|it is|that's|that is|that would be|this is) (not (okay|right|legal|appropriate)|never (okay|right)|illegal|against the law|a crime|unethical|wrong)",
    re.IGNORECASE,
)


def declines(answer: str) -> bool:
    """Whether the answer starts by declining."""
    return bool(_DECLINES.search(answer[:160]))
