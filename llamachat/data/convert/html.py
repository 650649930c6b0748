"""HTML in the texts of logs: whether a text holds some, and the text as a reader of the page saw it.

Taken out only where that is asked for: in a dialog about web pages the tags are the answer.
"""

import re
from html import unescape

# Tags that lay out a text. Others are left alone: what looks like one may be a placeholder or code.
_TAGS = "a|b|blockquote|br|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|small|span|strong|sub|sup|table|tbody|td|th|thead|tr|u|ul"
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,6}|#x[0-9a-f]{1,5});", re.IGNORECASE)
_LINE_ENDS = re.compile(r"<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|pre)\s*>", re.IGNORECASE)
_MANY_LINES = re.compile(r"\n{3,}")


def html_in(text: str) -> str | None:
    """The first piece of HTML in a text."""
    found = _TAG.search(text) or _ENTITY.search(text)
    return found.group() if found else None


def without_html(text: str) -> str:
    """The text without tags, its lines ended where they ended on the page, entities as characters."""
    lines = _LINE_ENDS.sub("\n", text)
    # Entities last: what was escaped is text, and no tag.
    plain = unescape(_TAG.sub("", lines)).replace("\xa0", " ")
    return _MANY_LINES.sub("\n\n", plain).strip()
