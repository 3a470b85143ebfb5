"""Token ids to text as they come: complete UTF-8 only, and never past a stop string.

A byte-level token may end inside a character; it is held back until the character is whole. Text that
could be the beginning of a stop string is held back until it is not.
"""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"
_WINDOW_TOKENS = 8


class Detokenizer:
    """One sequence's text. `push` gives what may be shown; `is_stopped` says that a stop string was met."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._stop = stop
        # The backend itself where there is one: it is asked for every token of every row.
        self._backend, self._tokenizer = getattr(tokenizer, "backend_tokenizer", None), tokenizer
        self._ids: list[int] = []  # those that may still matter: all, until `_forget` drops the settled ones
        self._given = 0  # characters of their text that were released
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; the new text that is safe to show."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # Only the last character can still change: a byte sequence that is not whole decodes to one U+FFFD.
        settled = text[:-1] if text.endswith(_INCOMPLETE) else text
        new = settled[self._given :]
        self._given = max(self._given, len(settled))
        if len(self._ids) > _WINDOW_TOKENS:
            self._forget(text)
        return self._release(new) if new else ""

    def finish(self) -> str:
        """Whatever is still held back, at the end of generation; an unfinished character as U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self._decode(self._ids)[self._given :]
        self._given += len(rest)
        text = self._release(rest) + self._held
        self._held = ""
        return text

    def _forget(self, text: str) -> None:
        """Drop early tokens where that changes nothing, so that a push never decodes more than a few."""
        for cut in range(len(self._ids) - 1, 0, -1):
            head = self._decode(self._ids[:cut])
            if len(head) <= self._given and head + self._decode(self._ids[cut:]) == text:
                self._ids, self._given = self._ids[cut:], self._given - len(head)
                return

    def _decode(self, ids: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

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


def text_of(tokenizer: Any, token_id: int) -> str:
    """One token as text; bytes that are no whole character as U+FFFD."""
    return str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def bytes_of(tokenizer: Any, token_id: int) -> list[int]:
    """One token's own bytes: of a byte-level vocabulary exactly, of another its text in UTF-8."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None or token in tokenizer.get_added_vocab() or any(c not in _BYTE_OF for c in token):
        return list(text_of(tokenizer, token_id).encode())
    return [_BYTE_OF[c] for c in token]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
