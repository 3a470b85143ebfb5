"""Token ids to text as they come: complete UTF-8 only, and never past a stop string.

A byte-level token may end inside a character; it is held back until the character is whole. Text that
could be the beginning of a stop string is held back until it is not.
"""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """One sequence's text. `push` gives what may be shown; `is_stopped` says that a stop string was met."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = 0  # decoding starts here: far enough back to get the spaces right
        self._read = 0  # tokens before this are already text
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; the new text that is safe to show."""
        self._ids.append(token_id)
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._ids))
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """Whatever is still held back, at the end of generation; an unfinished character as U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._read)) :]
        self._read = len(self._ids)
        text = self._release(rest) + self._held
        self._held = ""
        return text

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text, self._held = self._held + text, ""
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
