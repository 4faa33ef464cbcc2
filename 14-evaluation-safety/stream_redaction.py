"""Topic 14 - Stream redaction: secrets and personal data leave a stream of text before anybody sees a part of them.

    redactor = Redactor()
    for piece in pieces:
        show(redactor.feed(piece))         # what may be shown already
    show(redactor.flush())                 # what is left when the text ends

    redact("write to ann@example.org")     # a whole text: "write to [EMAIL]"

A model's answer comes in pieces that are cut anywhere, so a filter that looks at each piece sees no whole secret. This
one shows a character only once no continuation of the text could still make it a part of a secret, and holds at most
`LIMIT` characters for that. What it writes does not depend on where the pieces were cut.

Cards by Luhn's check digit (ISO/IEC 7812-1), bank accounts by their remainder modulo 97 (ISO 13616), e-mail, phone
numbers, shapes of well-known keys, and long tokens whose characters are too even to be words.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from workbench import check_name

LIMIT = 256  # characters of one run; a longer one is no word, and is left out whole
GATHER = 48  # characters from which on no further group of digits is taken in

# Characters that a secret may contain. A run of them ends at a blank, a quote, a comma, a letter of another script...
RUN = re.compile(r"[A-Za-z0-9À-ɏ._%+\-@/=:~#()&?!*$^\\]+")
PLAIN = re.compile(r"[^\W\d_]{1,19}")  # a word: no digit, no sign, too short for a token
GROUP = re.compile(r"[+(]?[\w().\-/]{1,34}")
WORD = re.compile(r"\w")
ACCOUNT_START = re.compile(r"[^\W\d_]{2}\d{2}\w{0,30}\Z")
INVISIBLE = dict.fromkeys(
    [0xAD, 0x34F, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF]
    + [*range(0xFE00, 0xFE10), *range(0xE0000, 0xE0080), *range(0xE0100, 0xE01F0)]
)


def folded(text: str) -> str:
    """The text with digits of every script, full-width letters and odd blanks and dashes as ASCII, equal in length."""
    return text if text.isascii() else "".join(map(fold_character, text))


def fold_character(char: str) -> str:
    digit = unicodedata.digit(char, None)
    if digit is not None:
        return str(digit)
    plain = unicodedata.normalize("NFKC", char)
    if len(plain) == 1 and plain.isascii():
        return plain
    return "-" if unicodedata.category(char) == "Pd" else char


# What is a secret


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it: each second one from the right counts double."""
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 * (value > 9) for value in doubled)) % 10 == 0


def passes_mod97(account: str) -> bool:
    """Whether an IBAN is 1 modulo 97, its first four characters read last and its letters as 10 to 35."""
    turned = account[4:] + account[:4]
    return int("".join(str(int(char, 36)) for char in turned)) % 97 == 1


def bits_per_character(text: str) -> float:
    """Entropy of the characters' frequencies; about 4 for 20 random signs, 3.3 for 20 letters of words."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def only_digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def is_card(text: str) -> bool:
    digits = only_digits(text)
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and passes_luhn(digits)


def is_account(text: str) -> bool:
    account = re.sub(r"[ \-]", "", text).upper()
    return 15 <= len(account) <= 34 and account.isascii() and account.isalnum() and passes_mod97(account)


def is_phone(text: str) -> bool:
    digits = only_digits(text)
    if text.startswith("+"):
        return 8 <= len(digits) <= 15
    if re.fullmatch(r"\(?[2-9]\d\d\)?[ .\-]?\d{3}[ .\-]\d{4}", text):
        return True
    return digits.startswith("0") and 9 <= len(digits) <= 12 and len(re.split(r"[ .\-/()]+", text)) >= 2


def is_random(text: str) -> bool:
    """Whether a token looks drawn: letters and digits, and as even as characters of chance are."""
    if not re.search(r"\d", text) or not re.search(r"[A-Za-z]", text) or re.fullmatch(UUID, text):
        return False
    mixed = re.findall(r"(?<=\d)(?=[A-Za-z])|(?<=[A-Za-z])(?=\d)", text)  # names in code hold one number or two
    return bits_per_character(text) >= 3.0 and len(mixed) >= len(text) / 10


class Detector(NamedTuple):
    pattern: re.Pattern
    accepts: Callable[[str], bool] = lambda text: True
    shortest: int = 0  # characters; whole groups may be taken off the end down to here


UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
LETTER = "A-Za-z0-9À-ɏ"
DETECTORS: dict[str, Detector] = {  # in this order where two find the same place
    "KEY": Detector(
        re.compile(
            r"(?:(?<![A-Za-z0-9])(?:sk|pk|rk)[-_][\w\-]{16,}|gh[oprsu]_\w{20,}|AKIA[0-9A-Z]{16}|AIza[\w\-]{30,}|xox[abeprs]-[\w\-]{10,}"
            r"|eyJ[\w\-]{8,}\.[\w\-]{8,}(?:\.[\w\-]*)?|glpat-[\w\-]{16,}|hf_\w{20,}|npm_\w{20,})",
            re.ASCII,
        )
    ),
    "EMAIL": Detector(re.compile(rf"[{LETTER}._%+\-]{{1,64}}@[{LETTER}\-]{{1,63}}(?:\.[{LETTER}\-]{{1,63}})+")),
    "IBAN": Detector(re.compile(r"(?<!\w)[A-Za-z]{2}\d{2}(?:[ \-]?[A-Za-z0-9]){11,30}(?!\w)"), is_account, 15),
    "CARD": Detector(re.compile(r"(?<!\d)\d(?:[ .\-]?\d){12,18}(?!\d)"), is_card, 13),
    "PHONE": Detector(
        re.compile(r"(?<![\w+])(?:\+\(?|\((?=\d{1,5}\))|(?=[02-9]))\d(?:[ .\-/()]{0,2}\d){7,14}(?!\w)"), is_phone, 8
    ),
    "TOKEN": Detector(re.compile(r"(?<![\w\-])[A-Za-z0-9_\-]{20,}={0,2}|[A-Za-z0-9+/]{32,}={0,2}"), is_random),
}
KINDS = (*DETECTORS, "LONG")


class Found(NamedTuple):
    start: int
    end: int
    kind: str


def first_secret(zone: str, kinds: Collection[str], reach: int) -> Found | None:
    """The secret that begins first in a zone, before `reach`; of several that begin there, the longest."""
    found: list[Found] = []
    for name, detector in DETECTORS.items():
        if name in kinds:
            found += matches(name, detector, zone, reach)
    return min(found, key=lambda one: (one.start, -one.end), default=None)


def matches(name: str, detector: Detector, zone: str, reach: int) -> Iterable[Found]:
    """What a detector finds: at each place its longest match that is accepted, whole groups being taken off its end."""
    for match in detector.pattern.finditer(zone):
        if match.start() >= reach:
            return
        starts = [match.start()]
        if name in ("CARD", "PHONE"):  # a number may stand behind other digits: 7 4111 1111 1111 1111
            starts += [match.start() + place.end() for place in re.finditer(r"[ .\-]+(?=[\d+(])", match[0])]
        for start in (start for start in starts if start < reach):
            ends = [match.end()]
            if detector.shortest:
                ends += [start + place.start() for place in re.finditer(r"[ .\-]+", zone[start : match.end()])][::-1]
                ends = [end for end in ends if end - start >= detector.shortest]
            end = next((end for end in ends if detector.accepts(zone[start:end])), None)
            if end is not None:
                yield Found(start, end, name)
                break


def checked(zone: str, reach: int) -> bool:
    """Whether a number with a check digit begins in the zone before `reach`: what is one by chance is rare."""
    return any(True for name in ("IBAN", "CARD") for _ in matches(name, DETECTORS[name], zone, reach))


# The stream


class Redactor:
    """A text that comes in pieces, with "[KIND]" in place of every secret.

    Args:
        kinds: which of KINDS to look for

    `found` counts what was replaced. Characters that have no width are left out: they are used to hide a secret from
    patterns, and no reader misses them. Nothing that is written depends on the cuts between pieces.
    """

    def __init__(self, kinds: Collection[str] = KINDS) -> None:
        for name in kinds:
            check_name("kind of secret", name, KINDS)
        self.kinds, self.found = frozenset(kinds), Counter()
        self.held = ""  # not shown yet
        self.plain = ""  # the same, folded: what the patterns read
        self.swallowing = False  # inside of a run that was too long
        self.most_held = 0

    def feed(self, piece: str) -> str:
        """Take in a piece of any length; return what may be shown now, "" if nothing."""
        piece = piece.translate(INVISIBLE)
        self.held, self.plain = self.held + piece, self.plain + folded(piece)
        shown = self.advance(final=False)
        self.most_held = max(self.most_held, len(self.held))
        return shown

    def flush(self) -> str:
        """The rest, when the text has ended. The redactor is then as new, but for its counts."""
        shown = self.advance(final=True)
        self.swallowing = False
        return shown

    def advance(self, final: bool) -> str:
        """Decide as much of what is held as nothing that follows can change."""
        shown, place = [], 0
        while place < len(self.plain):
            step = self.decide(place, final)
            if step is None:
                break
            text, place = step
            shown.append(text)
        self.held, self.plain = self.held[place:], self.plain[place:]
        return "".join(shown)

    def decide(self, place: int, final: bool) -> tuple[str, int] | None:
        """What is shown for the text from `place` on, and up to where; None while that is not certain."""
        run = RUN.match(self.plain, place)
        if run is None:
            self.swallowing = False
            return self.held[place], place + 1
        if self.swallowing:
            return "", run.end()
        if run.end() - place > LIMIT:
            self.swallowing = "LONG" in self.kinds
            self.found["LONG"] += self.swallowing
            return ("[LONG]", run.end()) if self.swallowing else (self.held[place : place + LIMIT], place + LIMIT)
        if run.end() == len(self.plain) and not final:
            return None
        if PLAIN.fullmatch(run[0]):
            return self.held[place : run.end()], run.end()
        end = self.zone_end(place, run.end(), final)
        if end is None:
            return None
        secret = first_secret(self.plain[place:end], self.kinds, run.end() - place)
        if secret is None:
            return self.held[place : run.end()], run.end()
        self.found[secret.kind] += 1
        return f"{self.held[place : place + secret.start]}[{secret.kind}]", place + secret.end

    def zone_end(self, place: int, end: int, final: bool) -> int | None:
        """Where the groups of digits end that may belong to the run before `end`; None if that is not known yet."""
        first = self.plain[place:end]
        if not re.search(r"\d", first[-34:]):
            return end
        account = ACCOUNT_START.search(first.rpartition(":")[2].rpartition("=")[2].lstrip("("))
        while end - place < GATHER:
            if end == len(self.plain):
                return end if final else None
            if self.plain[end] != " ":
                return end
            run = RUN.match(self.plain, end + 1)
            if run is None:
                return None if end + 1 == len(self.plain) and not final else end
            if run.end() == len(self.plain) and not final and run.end() - end <= 35:
                return None
            group = run[0].rstrip(".:?!)")
            cut = end + 1 + len(GROUP.match(run[0])[0]) if GROUP.match(run[0]) else end
            if cut < run.end() and checked(self.plain[place:cut], len(first)) and not WORD.match(self.plain, cut):
                return cut  # the last digits of a number stand before another sign: 1111=12/27
            if not GROUP.fullmatch(group) or not (re.search(r"\d", group) or (account and len(group) <= 4)):
                return end
            end = run.end()
        return end


def redact(text: str, kinds: Collection[str] = KINDS) -> str:
    """A whole text without its secrets: what a stream of it would show, however it were cut."""
    redactor = Redactor(kinds)
    return redactor.feed(text) + redactor.flush()
