"""The dialogs on which a tokenizer is proved, and what Llama 2's own tokenizer makes of each.

Written with escapes, since half of the characters in question cannot be seen. `LLAMA2_DIGESTS` was made with the
`tokenizer.model` of Llama 2: whoever changes a dialog has to make it anew (a test holds the dialogs still).
"""

from llamachat.chat_format.dialog import Message

_TEXTS = (
    "What is the capital of France?",
    "The capital of France is Paris.",
    "  leading and trailing white space \n",
    "two  spaces,   three,    four,     five; a tab\tand\t\ttwo",
    "line one\nline two\n\nline four\r\nwindows\r\n\r\nend",
    "def f(x):\n    if x > 1:\n        return x ** 2\n    return    None",
    "\tfor (int i = 0; i < n; i++) {\n\t\ta[i] += b[i];  // sum\n\t}",
    "- item\n- item 2\n  - nested\n    - deeper\n\n1. one\n2. two",
    '{"key": [1, 2.5, -3e10], "other": null}',
    "https://example.org/a/b?c=d&e=f#g and name@example.org",
    "12345 + 67890 = 80235, 3.14159, 1,000,000, 007, 0x1F, 100%",
    "7",
    "!",
    "...and so on... ---- ==== ____ ****",
    "na\u00efve caf\u00e9 \u2013 \u201cquotes\u201d \u2018single\u2019 \u2026 \u20ac \u00a3 \u00df",
    "e\u0301 as two, \u00e9 as one, a\u0308\u0323 stacked, \u0301 alone",
    "\ufb01 \u00bd \u2126 \u212b \uff21\uff22\uff23 \u3392 \u00b2 change under NFKC",
    "no\u00a0break, em\u2003space, ideographic\u3000space, thin\u2009space, narrow\u202fone",
    "zero\u200bwidth, joiner\u200d, non\u200cjoiner, word\u2060joiner, mark\ufeff, soft\u00adhyphen",
    "\u200bstarts and ends with what strip() leaves\u200b",
    "\u00a0\u3000starts and ends with what strip() takes\u2028\x1f",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002"
    "\u4e2d\u6587\u6587\u672c\uff0c\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645, "
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e, \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\U0001f642 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\U0001f469\u200d\U0001f4bb",
    "\U00020000\U0002a6d6 rare, \U0001d54f\U0001d550 letters, \ue000 private, \ufffd unknown",
    "\u202eright to left\u202c and \u200eleft to right\u200f",
    "\u2581underline\u2581 \u2581\u2581 twice",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa abababababababab xxxxxxxxxxxxxxxxx",
    "spaces" + " " * 17 + "seventeen" + " " * 33 + "thirty-three" + " " * 64 + "sixty-four",
    "lines" + "\n" * 9 + "nine" + "\t" * 7 + "seven" + " \n" * 5 + "mixed",
    "ends with spaces and a newline   \n   \n",
    "control \x01\x02\x7f\x85 characters \x0b\x0c",
    "I'm, you're, it's, we'll, THEY'D; don't; O'Neill's \"quoted\" `code`",
    "supercalifragilisticexpialidocious antidisestablishmentarianism Donaudampfschiff",
    "<tag> </div> [INS T] almost a tag [/ INST] << SYS >> <0x0A> <|im_start|> <pad>",
    "C++ & C# @user #topic $x^2 + y_1$ \\frac{a}{b} ~/path\\to\\file",
    "A longer answer.\n\nIt has paragraphs, with a list:\n\n* first\n* second\n\n```python\nprint('hi')\n```\n\nDone.",
)

_CONTROL_TEXTS = (
    "</s>",
    "<s>",
    "<unk>",
    "a<s>b</s>c<unk>d",
    " </s> <s> spelled </s><s>twice",
    "He wrote </s>\nand then <s> again   </s>   ",
)

_SYSTEMS = (
    "Always answer with Haiku.",
    "",
    " ",
    "\n  Be brief.\n\n",
    "\u65e5\u672c\u8a9e\u3067\u3002",
    "Use    code\n\n",
)


def _dialogs(texts: tuple[str, ...]) -> tuple[tuple[Message, ...], ...]:
    """Every text once as a question and once as an answer, in dialogs of one to four pairs, some with system text."""
    dialogs: list[tuple[Message, ...]] = []
    for index in range(len(texts)):
        messages: list[Message] = []
        if index % 2:
            messages.append(Message("system", _SYSTEMS[index // 2 % len(_SYSTEMS)]))
        for turn in range(1 + index % 4):
            question, answer = texts[(index + turn) % len(texts)], texts[(7 * index + 3 * turn + 1) % len(texts)]
            messages += [Message("user", question), Message("assistant", answer)]
        dialogs.append(tuple(messages if index % 3 else [*messages, Message("user", texts[-1 - index])]))
    return tuple(dialogs)


PLAIN_DIALOGS = _dialogs(_TEXTS)
CONTROL_DIALOGS = _dialogs(_CONTROL_TEXTS)

_LLAMA2_DIGESTS = (
    "6c40d715 d33b8c0d ef4e024c 77ca17c0 f86fe598 4732edf4 d25b05c9 d230d9b0 01eb6888 0b3e2143 25eb6613 "
    "cbc78016 48fd2380 8c5c2c56 12d37144 8f4c97b0 9b22f0c0 650a8e23 bb2d4720 029daa11 448fffdd 691da638 "
    "57c94c3b 5093e4a3 49e941c9 857ca50d d94ab63c 63bb02c8 eeab897b 9a3560e4 6de49d85 7867df30 7b79818c "
    "b717b30b c6e491a6 a1ad953d 22057edd 8e0ed760 6a0b668d 65c1cf4e 4b2080cb 17403dfd 07b772ab 6aeae1fc "
    "89930d65 83cb1d70 "
)
LLAMA2_DIGESTS = tuple(_LLAMA2_DIGESTS.split())
