"""The Llama 2 chat format, with the exact ids of Meta's reference code (facebookresearch/llama, llama/generation.py).

A closed pair of turns is ONE string `[INST] {user} [/INST] {answer} ` with its own BOS and EOS (note the space before
EOS). An open turn is `[INST] {user} [/INST]` with BOS. System text is merged into the first user text BEFORE stripping,
so white space between the two is kept. The tags are plain text, not special tokens.
No other file knows the tags.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamachat.chat_format.dialog import Message, check_messages, check_texts
from llamachat.chat_format.format import TokenizedExample, TrainOn
from llamachat.chat_format.tokenizer import Tokenizer

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>")

# The space before an answer is inside the mark: it is part of the answer's first token, which would otherwise be
# missing from the mask. `train` is our key for an answer that is not trained on.
CHAT_TEMPLATE = r"""
{%- set first = 1 if messages and messages[0]['role'] == 'system' else 0 -%}
{%- if messages | length <= first -%}
    {{- raise_exception('A conversation needs at least one user turn.') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if loop.index0 >= first -%}
        {%- if (loop.index0 - first) % 2 == 0 -%}
            {%- if message['role'] != 'user' -%}
                {{- raise_exception('Roles must be: optional system, then user, assistant, user, assistant, ...') -}}
            {%- endif -%}
            {%- set text = message['content'] -%}
            {%- if first == 1 and loop.index0 == 1 -%}
                {%- set text = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' + text -%}
            {%- endif -%}
            {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' -}}
        {%- else -%}
            {%- if message['role'] != 'assistant' -%}
                {{- raise_exception('Roles must be: optional system, then user, assistant, user, assistant, ...') -}}
            {%- endif -%}
            {%- set answer = ' ' + message['content'].strip() + ' ' + eos_token -%}
            {%- if message['train'] == false -%}
                {{- answer -}}
            {%- else -%}
                {%- generation -%}{{- answer -}}{%- endgeneration -%}
            {%- endif -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
""".strip()

# Without the training marks, which few servers' Jinja supports.
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")

# For Ollama. Its templates cannot strip, so white space around a text is kept. The first pair has no BOS: the server
# adds it. An answer in the history starts with our leading space if Ollama generated it, but not if another client sent
# it.
GO_TEMPLATE = r"""
{{- $first := true }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if $first }}[INST] {{ if $.System }}<<SYS>>
{{ $.System }}
<</SYS>>

{{ end }}
{{- $first = false }}
{{- else }}<s>[INST] {{ end }}
{{- .Content }} [/INST]
{{- else if and (eq .Role "assistant") (not $first) }}
{{- if ne (printf "%.1s" .Content) " " }} {{ end }}
{{- .Content }} </s>
{{- end }}
{{- end -}}
""".strip()


# One pair of turns as written in tutorials, with or without the surrounding tokens.
_WRITTEN_PAIR = re.compile(
    r"\s*(?:<s>\s*)*\[INST\](?P<user>.*?)\[/INST\](?P<answer>.*?)(?:</s>|(?=<s>|\[INST\])|\Z)", re.DOTALL
)
_WRITTEN_SYSTEM = re.compile(r"\s*<<SYS>>\n?(?P<system>.*?)\n?<</SYS>>", re.DOTALL)


def messages_of_text(text: str) -> list[Message]:
    """Parse a text that consists of conversations in this format; an empty list for any other text."""
    messages: list[Message] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        pair = _WRITTEN_PAIR.match(text, position)
        if pair is None:
            return []
        question = pair["user"]
        if system := _WRITTEN_SYSTEM.match(question):
            messages.append(Message("system", system["system"]))
            question = question[system.end() :]
        messages += [Message("user", question.strip()), Message("assistant", pair["answer"].strip())]
        position = pair.end()
    return messages


@dataclass(frozen=True, slots=True)
class _Pair:
    """A user text, with the system text merged in if it is the first, and its answer unless the turn is open."""

    user: str
    answer: Message | None


@dataclass(frozen=True, slots=True)
class Llama2Format:
    """The Llama 2-Chat `ChatFormat`."""

    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return "llama2"

    @property
    def chat_template(self) -> str:
        return CHAT_TEMPLATE

    @property
    def plain_chat_template(self) -> str:
        return PLAIN_CHAT_TEMPLATE

    @property
    def go_template(self) -> str:
        control = self.tokenizer.control
        bos, eos = self.tokenizer.pieces([control.bos, control.eos])
        return GO_TEMPLATE.replace("</s>", eos).replace("<s>", bos)

    @property
    def forbidden(self) -> tuple[str, ...]:
        return SPECIAL_TAGS

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_id,)

    @property
    def closing_ids(self) -> tuple[int, ...]:
        word = self.tokenizer.encode("a")
        return (*self.tokenizer.encode("a ")[len(word) :], self.tokenizer.eos_id)

    def check_text(self, messages: Sequence[Message], *, field: str = "messages") -> None:
        check_texts(messages, SPECIAL_TAGS, field=field)

    def encode_dialog(self, messages: Sequence[Message], *, train_on: TrainOn) -> TokenizedExample:
        pairs = self._checked_pairs(messages)
        answered = [index for index, pair in enumerate(pairs) if pair.answer is not None]
        trained_answers = set(answered) if train_on is TrainOn.EVERY_ANSWER else set(answered[-1:])
        input_ids: list[int] = []
        loss_mask: list[bool] = []
        for index, pair in enumerate(pairs):
            prompt_ids, answer_ids = self._encode_pair(pair)
            input_ids += prompt_ids + answer_ids
            is_trained = index in trained_answers and pair.answer is not None and pair.answer.train is not False
            loss_mask += [False] * len(prompt_ids) + [is_trained] * len(answer_ids)
        return TokenizedExample(tuple(input_ids), tuple(loss_mask))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        check_messages(messages, ends_with="user")
        return list(self.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER).input_ids)

    def decode_answer(self, ids: Sequence[int]) -> str:
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end]).strip()

    def shorten(self, messages: Sequence[Message], *, max_tokens: int) -> tuple[Message, ...] | None:
        """Drop the oldest pairs; the system text moves to the new first user turn."""
        self._checked_pairs(messages)
        system = tuple(messages[:1]) if messages[0].role == "system" else ()
        turns = tuple(messages[len(system) :])
        # A pair's length does not depend on its neighbours, except that the first one contains the system text.
        lengths = [self._length(turns[start : start + 2]) for start in range(0, len(turns), 2)]
        for dropped in range(len(lengths)):
            kept = turns[2 * dropped :]
            first = self._length((*system, *kept[:2])) if system else lengths[dropped]
            if first + sum(lengths[dropped + 1 :]) <= max_tokens:
                return system + kept
        return None

    def _checked_pairs(self, messages: Sequence[Message]) -> list[_Pair]:
        check_messages(messages, ends_with="either")
        self.check_text(messages)
        return _pairs(messages)

    def _length(self, messages: Sequence[Message]) -> int:
        return sum(len(prompt) + len(answer) for prompt, answer in map(self._encode_pair, _pairs(messages)))

    def _encode_pair(self, pair: _Pair) -> tuple[list[int], list[int]]:
        """The ids of the prompt with BOS, and the ids that the answer appends, EOS included."""
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        prompt = f"{B_INST} {pair.user.strip()} {E_INST}"
        prompt_ids = self.tokenizer.encode(prompt)
        if pair.answer is None:
            return [bos, *prompt_ids], []
        pair_ids = self.tokenizer.encode(f"{prompt} {pair.answer.content.strip()} ")
        # With Llama's vocabulary this is the whole prompt, since no piece spans a letter and a space. The proof rejects
        # tokenizers that differ; if one is used anyway, the answer is trained from the first id that differs.
        boundary = min(len(prompt_ids), len(pair_ids))
        if pair_ids[:boundary] != prompt_ids[:boundary]:
            boundary = next(index for index, token in enumerate(prompt_ids) if token != pair_ids[index])
        return [bos, *pair_ids[:boundary]], [*pair_ids[boundary:], eos]


def _pairs(messages: Sequence[Message]) -> list[_Pair]:
    turns = list(messages)
    if turns[0].role == "system":
        system, first, *rest = turns
        turns = [Message("user", B_SYS + system.content + E_SYS + first.content), *rest]
    answers = [*turns[1::2], None]
    return [_Pair(user.content, answer) for user, answer in zip(turns[::2], answers, strict=False)]
