"""Topic 13 - Text as it grows: from ids to whole characters, and never a character that a stop string may take back.

    stream = TextStream(tokenizer, stop=("\\n\\n", "User:"), context=prompt_ids)
    for new_ids in steps:
        text, finished = stream.push(new_ids)       # text to show now; finished once a stop string is complete
    text = stream.flush()                           # what is left when the ids end otherwise

Stop strings know nothing of tokens: one may begin inside a token and end inside another. A request therefore shows a
character only when no stop string can begin at it any more. How much of a stop string the text ends with is known in
constant time for each character (Knuth, Morris and Pratt 1977, "Fast pattern matching in strings").
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from engine_requests import TextDecoder

CONTEXT = 8  # ids before the answer that a decoder sees, for its blanks depend on what stands before a word


class IdReader(Protocol):
    """From ids to text, id by id."""

    def read(self, token_id: int) -> str:
        """The characters that this id makes certain."""

    def rest(self) -> str:
        """What an unfinished character at the end is read as."""


class ByteReader:
    """Ids whose bytes are known, as those of topic 06's byte-level tokenizers: a decoder of UTF-8 keeps the rest."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, token_id: int) -> str:
        if self.tokenizer.spellings.get(token_id) in self.tokenizer.special_tokens:
            return ""
        return self.utf8.decode(self.tokenizer.token_bytes(token_id))

    def rest(self) -> str:
        return self.utf8.decode(b"", final=True)


class WindowReader:
    """Ids of which only `decode` of whole lists is known: the difference that one more id makes to the last few.

    A word may be decoded with a blank before it or not, depending on what stands before: hence the ids since the last
    two places at which the text was whole are decoded anew. An unfinished character is one U+FFFD at the end.
    """

    def __init__(self, tokenizer: TextDecoder, context: Sequence[int] = ()) -> None:
        self.tokenizer, self.ids, self.n_whole = tokenizer, list(context), len(context)
        self.n_said = len(tokenizer.decode(self.ids))  # characters of self.ids that are known already

    def read(self, token_id: int) -> str:
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids)
        new = text.removesuffix("\ufffd")[self.n_said :]  # what was said cannot be taken back, even if it reads anew
        self.n_said += len(new)
        if self.n_said == len(text):
            self.ids = self.ids[self.n_whole :]
            self.n_whole, self.n_said = len(self.ids), len(self.tokenizer.decode(self.ids))
        return new

    def rest(self) -> str:
        return self.tokenizer.decode(self.ids)[self.n_said :]


class StopPattern:
    """How much of one stop string the text ends with, kept up to date character by character."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        self.shorter = [0] * (len(stop) + 1)  # the longest shorter match after so many characters have matched
        length = 0
        for place in range(1, len(stop)):
            length = self.after(length, stop[place])
            self.shorter[place + 1] = length

    def after(self, length: int, char: str) -> int:
        """How much matches after one more character, if `length` matched before it."""
        while length and self.stop[length] != char:
            length = self.shorter[length]
        return length + 1 if self.stop[length] == char else 0

    def push(self, char: str) -> bool:
        """Whether the stop string is complete with this character."""
        self.matched = self.after(self.matched, char)
        return self.matched == len(self.stop)


class TextStream:
    """The text of one request as it grows.

    Args:
        tokenizer: topic 06's (its special tokens are left out of the text), or whatever decodes lists of ids
        stop: texts that end the answer; not part of it
        context: the ids of the prompt, so that the answer begins with the blank that belongs there

    The answer ends where a stop string is complete first; of two that are complete with the same character, the longer
    one is cut off. Nothing of this depends on how the text is cut into tokens or ids into pushes.
    """

    def __init__(self, tokenizer: TextDecoder, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        if not all(stop):
            raise ValueError(f"a stop string needs at least one character, got {tuple(stop)!r}")
        by_bytes = hasattr(tokenizer, "token_bytes")
        self.reader: IdReader = ByteReader(tokenizer) if by_bytes else WindowReader(tokenizer, context[-CONTEXT:])
        self.patterns = [StopPattern(text) for text in stop]
        self.held = ""  # the end of the text that may be the beginning of a stop string
        self.stopped: str | None = None  # the stop string that ended the text
        self.n_ids = 0  # ids read; the one that completed a stop string is the last

    def push(self, ids: Iterable[int]) -> tuple[str, bool]:
        """Read more ids: the text that can be shown now, and whether a stop string has ended it.

        Ids after the one that completes a stop string are not read.
        """
        shown = []
        for token_id in ids:
            if self.stopped is not None:
                break
            shown.append(self.take(self.reader.read(token_id)))
            self.n_ids += 1
        return "".join(shown), self.stopped is not None

    def flush(self) -> str:
        """What is left when no more ids come: a character that stayed unfinished becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self.take(self.reader.rest())
        held, self.held = self.held, ""
        return text + held

    def take(self, text: str) -> str:
        """Add text to what is held, and return as much from its beginning as no stop string can still reach."""
        if not self.patterns:
            return text
        before, self.held = len(self.held), self.held + text
        for place, char in enumerate(text, start=before + 1):
            complete = [pattern.stop for pattern in self.patterns if pattern.push(char)]
            if complete:
                self.stopped = max(complete, key=len)
                shown, self.held = self.held[: place - len(self.stopped)], ""
                return shown
        certain = len(self.held) - max(pattern.matched for pattern in self.patterns)
        shown, self.held = self.held[:certain], self.held[certain:]
        return shown
