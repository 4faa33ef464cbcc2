"""Topic 13 - Regular expressions as automata over bytes, in which every state leads to a match.

    dfa = expression_dfa(r"\\d{4}-\\d{2}")      # Dfa(table, accepting)
    dfa.matches("2026-11")                     # as re.fullmatch, in time that grows with the text alone
    expression_of(read_expression("a|b"))      # a tree back to an expression of Python's re

Bytes, because a token may begin or end inside a character. An expression is read into a tree, the tree into an
automaton with empty edges, that into a deterministic one without the states from which nothing can match any more.

Papers: Thompson 1968 (Communications of the ACM 11(6)), expression to automaton; Rabin and Scott 1959 (IBM Journal
3(2)), sets of states as states.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

MAX_PATTERN, MAX_NESTING, MAX_REPEAT = 10_000, 60, 2000  # characters, groups in groups, and the n of {m,n}
MAX_NFA, MAX_DFA, MAX_WORK = 60_000, 12_000, 6_000_000  # states, states, and the sizes of all sets of states together
LAST_CHAR = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)  # code points that are no characters


# Expressions as trees


class Chars(NamedTuple):
    """One character out of ranges of code points, ends included, in order and apart."""

    ranges: tuple[tuple[int, int], ...]


class Chain(NamedTuple):
    parts: tuple["Node", ...]


class Either(NamedTuple):
    branches: tuple["Node", ...]


class Repeat(NamedTuple):
    """A node from least to most times (None: without end), with a separator between if there is one."""

    node: "Node"
    least: int
    most: int | None
    between: "Node | None" = None


Node = Chars | Chain | Either | Repeat


def chars(*ranges: tuple[int, int]) -> Chars:
    """The union of ranges of code points, without the surrogates, which have no bytes."""
    cut = []
    for low, high in ranges:
        cut += [(low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)]
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pair for pair in cut if pair[0] <= pair[1]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return Chars(tuple(merged))


def other_chars(these: Chars) -> Chars:
    """All characters but these."""
    starts = [0, *(high + 1 for _, high in these.ranges)]
    stops = [*(low - 1 for low, _ in these.ranges), LAST_CHAR]
    return chars(*zip(starts, stops, strict=True))


def literal(text: str) -> Chain:
    return Chain(tuple(chars((ord(char), ord(char))) for char in text))


ANY = chars((0, LAST_CHAR))
ANYTHING = Repeat(ANY, 0, None)
DIGITS = chars((ord("0"), ord("9")))
WORD = chars(*((ord(low), ord(high)) for low, high in ("09", "AZ", "az", "__")))
BLANKS = chars((9, 13), (32, 32))
CLASSES = {"d": DIGITS, "w": WORD, "s": BLANKS} | {
    letter.upper(): other_chars(these) for letter, these in (("d", DIGITS), ("w", WORD), ("s", BLANKS))
}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}


class Reader:
    """A parser of regular expressions, by recursive descent.

    Understood: characters, `.` (all but a line break), classes with ranges and negation, `\\d \\w \\s \\D \\W \\S` (of
    ASCII), `\\n \\t \\r \\f \\v \\0 \\xhh \\uhhhh` and a backslash before punctuation, groups `( )` and `(?: )`, `|`,
    and the quantifiers `* + ? {m} {m,} {,n} {m,n}`. `^` and `$` only at the two ends of a branch outside all groups.
    Raises ValueError for anything else, with its place.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern, self.place, self.depth = pattern, 0, 0
        if not isinstance(pattern, str):
            raise ValueError(f"a regular expression is a text, got {pattern!r:.60}")
        if len(pattern) > MAX_PATTERN:
            raise ValueError(f"the expression has {len(pattern)} characters; at most {MAX_PATTERN} are read")

    def fail(self, what: str, place: int | None = None) -> ValueError:
        place = self.place if place is None else place
        return ValueError(f"{what} at character {place} of the expression {self.pattern[:60]!r}")

    def peek(self) -> str:
        return self.pattern[self.place : self.place + 1]

    def take(self, count: int = 1) -> str:
        taken = self.pattern[self.place : self.place + count]
        self.place += count
        return taken

    def read(self, search: bool) -> Node:
        """The whole expression; as a search, what `^` and `$` do not forbid may stand before and behind a branch."""
        branches = []
        while True:
            before, behind = (), ()
            if self.peek() == "^":
                self.take()
            elif search:
                before = (ANYTHING,)
            parts = self.chain()
            if self.peek() == "$":
                self.take()
            elif search:
                behind = (ANYTHING,)
            branches.append(Chain((*before, *parts, *behind)))
            if self.peek() != "|":
                break
            self.take()
        if self.place < len(self.pattern):
            raise self.fail("')' without its beginning" if self.peek() == ")" else f"{self.peek()!r} after the end '$'")
        return Either(tuple(branches))

    def chain(self) -> tuple[Node, ...]:
        parts = []
        while self.peek() not in ("", "|", ")", "$"):
            parts.append(self.repeated(self.atom()))
        return tuple(parts)

    def atom(self) -> Node:
        char = self.take()
        if char == "(":
            return self.group()
        if char == "[":
            return self.char_class()
        if char == ".":
            return other_chars(chars((10, 10)))
        if char == "\\":
            return self.escape()
        if char in "*+?{":
            raise self.fail(f"the quantifier {char!r} repeats nothing (escape it as \\{char})", self.place - 1)
        if char == "^":
            raise self.fail("'^' is understood only at the beginning of a branch", self.place - 1)
        return literal(char).parts[0]

    def group(self) -> Node:
        start, self.depth = self.place - 1, self.depth + 1
        if self.depth > MAX_NESTING:
            raise self.fail(f"more than {MAX_NESTING} groups in each other", start)
        if self.peek() == "?" and self.take(2) != "?:":
            raise self.fail(f"'(?{self.pattern[start + 2 : start + 3]}' is not supported, only ( ) and (?: )", start)
        branches = [Chain(self.chain())]
        while self.peek() == "|":
            self.take()
            branches.append(Chain(self.chain()))
        if self.peek() == "$":
            raise self.fail("'$' is understood only at the end of the whole expression or of a branch of it")
        if self.take() != ")":
            raise self.fail("'(' without its end", start)
        self.depth -= 1
        return Either(tuple(branches))

    def escape(self) -> Chars:
        start, char = self.place - 1, self.take()
        if char in CLASSES:
            return CLASSES[char]
        if char and char in "xu":
            n_digits = 2 if char == "x" else 4
            digits = self.take(n_digits)
            if not re.fullmatch(rf"[0-9a-fA-F]{{{n_digits}}}", digits):
                raise self.fail(f"'\\{char}' needs {n_digits} hexadecimal digits", start)
            return chars((int(digits, 16), int(digits, 16)))
        if not char or char.isalnum() and char not in ESCAPES:
            raise self.fail(f"'\\{char}' is not supported" if char else "a backslash escapes nothing", start)
        code = ord(ESCAPES.get(char, char))
        return chars((code, code))

    def char_class(self) -> Chars:
        start, ranges = self.place - 1, []
        negated = self.peek() == "^" and bool(self.take())
        if self.peek() == "]":
            raise self.fail("an empty class (write \\] for the bracket itself)", start)
        while self.peek() != "]":
            low = self.class_member(start)
            if self.peek() == "-" and self.pattern[self.place + 1 : self.place + 2] not in ("]", ""):
                self.take()
                high = self.class_member(start)
                if len(low.ranges) != 1 or len(high.ranges) != 1 or low.ranges[0][0] > high.ranges[0][1]:
                    raise self.fail("a range of a class goes from a smaller to a larger character")
                if any(first != last for first, last in (*low.ranges, *high.ranges)):
                    raise self.fail("a range of a class goes from one character to another")
                low = chars((low.ranges[0][0], high.ranges[0][1]))
            ranges += low.ranges
        self.take()
        return other_chars(chars(*ranges)) if negated else chars(*ranges)

    def class_member(self, start: int) -> Chars:
        char = self.take()
        if not char:
            raise self.fail("'[' without its end", start)
        return self.escape() if char == "\\" else literal(char).parts[0]

    def repeated(self, node: Node) -> Node:
        bounds = self.quantifier()
        if bounds is None:
            return node
        if self.quantifier() is not None:
            raise self.fail("a quantifier of a quantifier (put the first into a group)", self.place - 1)
        least, most = bounds
        if max(least, most or 0) > MAX_REPEAT:
            raise self.fail(f"more than {MAX_REPEAT} repetitions", self.place - 1)
        if most is not None and least > most:
            raise self.fail(f"{{{least},{most}}} from more to less", self.place - 1)
        return Repeat(node, least, most)

    def quantifier(self) -> tuple[int, int | None] | None:
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self.peek() in simple and self.peek():
            return simple[self.take()]
        if self.peek() != "{":
            return None
        found = re.match(r"\{(\d{1,9})\}|\{(\d{0,9}),(\d{0,9})\}", self.pattern[self.place :])
        if not found or found[0] == "{,}":
            raise self.fail("'{' begins no {m}, {m,}, {,n} or {m,n} (escape it as \\{)")
        self.take(len(found[0]))
        if found[1]:
            return int(found[1]), int(found[1])
        return int(found[2] or 0), int(found[3]) if found[3] else None


def read_expression(pattern: str, search: bool = False) -> Node:
    """The tree of a regular expression; see Reader. With `search` it may match anywhere in a text."""
    return Reader(pattern).read(search)


def expression_of(node: Node) -> str:
    """A regular expression of Python's `re` that matches what a tree does."""
    if isinstance(node, Chars):
        if not node.ranges:
            return "[^\\x00-\\U0010ffff]"
        spelled = ["".join(f"\\U{code:08x}" for code in pair) for pair in node.ranges]
        spelled = [f"{pair[:10]}-{pair[10:]}" for pair in spelled]
        one = len(node.ranges) == 1 and node.ranges[0][0] == node.ranges[0][1]
        return re.escape(chr(node.ranges[0][0])) if one else f"[{''.join(spelled)}]"
    if isinstance(node, Chain):
        return "".join(expression_of(part) for part in node.parts)
    if isinstance(node, Either):
        return f"(?:{'|'.join(expression_of(branch) for branch in node.branches)})"
    inner = expression_of(node.node)
    if node.between is None:
        return f"(?:{inner}){{{node.least},{'' if node.most is None else node.most}}}"
    most = "" if node.most is None else max(node.most - 1, 0)
    more = f"(?:{expression_of(node.between)}{inner}){{{max(node.least - 1, 0)},{most}}}"
    return f"(?:{inner}{more}){'' if node.least else '?'}" if node.most != 0 else ""


# Trees to automata over bytes


def byte_ranges(low: int, high: int) -> list[tuple[tuple[int, int], ...]]:
    """UTF-8 for all code points low..high: chains of byte ranges, each chain all combinations of its ranges."""
    for last in (0x7F, 0x7FF, 0xFFFF):  # the last code points of one, two and three bytes
        if low <= last < high:
            return byte_ranges(low, last) + byte_ranges(last + 1, high)
    if high <= 0x7F:
        return [((low, high),)]
    for n_rest in (1, 2, 3):
        rest = (1 << 6 * n_rest) - 1  # the bits of the last n_rest bytes
        if (low & ~rest) != (high & ~rest):
            if low & rest:
                return byte_ranges(low, low | rest) + byte_ranges((low | rest) + 1, high)
            if (high & rest) != rest:
                return byte_ranges(low, (high & ~rest) - 1) + byte_ranges(high & ~rest, high)
    return [tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))]


class Nfa:
    """States with edges that read a byte of a range, and edges that read nothing (Thompson 1968)."""

    def __init__(self) -> None:
        self.empty: list[list[int]] = []
        self.edges: list[list[tuple[int, int, int]]] = []  # first byte, last byte, next state

    def state(self) -> int:
        if len(self.empty) >= MAX_NFA:
            raise ValueError(f"the expression needs more than {MAX_NFA} states; use smaller numbers of repetitions")
        self.empty.append([])
        self.edges.append([])
        return len(self.empty) - 1

    def add(self, node: Node, start: int) -> int:
        """Add what a node matches behind `start`; returns the state after it."""
        if isinstance(node, Chars):
            return self.add_chars(node, start)
        if isinstance(node, Chain):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Either):
            stop = self.state()
            for branch in node.branches:
                entry = self.state()
                self.empty[start].append(entry)
                self.empty[self.add(branch, entry)].append(stop)
            return stop
        return self.add_repeat(node, start)

    def add_chars(self, node: Chars, start: int) -> int:
        stop = self.state()
        for low, high in node.ranges:
            for chain in byte_ranges(low, high):
                last = start
                for place, (first_byte, last_byte) in enumerate(chain):
                    following = stop if place == len(chain) - 1 else self.state()
                    self.edges[last].append((first_byte, last_byte, following))
                    last = following
        return stop

    def add_repeat(self, node: Repeat, start: int) -> int:
        stop, entry, count = self.state(), start, 0
        while True:
            if count >= node.least:
                self.empty[entry].append(stop)
            if node.most is not None and count >= node.most:
                return stop
            begin = self.state()
            self.empty[self.add(node.between, entry) if node.between and count else entry].append(begin)
            entry_after = self.state()
            self.empty[self.add(node.node, begin)].append(entry_after)
            entry, count = entry_after, count + 1
            if node.most is None and count >= node.least:
                self.empty[entry].append(stop)
                self.empty[self.add(node.between, entry) if node.between else entry].append(begin)
                return stop


class Dfa(NamedTuple):
    """A deterministic automaton over bytes in which every state but the last can be completed to a match.

    Shapes: table (states, 256), int32: the next state, or the last one, `dead`, from which nothing matches;
    accepting (states), bool.
    """

    table: np.ndarray
    accepting: np.ndarray

    @property
    def dead(self) -> int:
        return len(self.table) - 1

    def run(self, data: bytes, state: int = 0) -> int:
        for byte in data:
            state = self.table[state, byte]
        return int(state)

    def matches(self, text: str) -> bool:
        return bool(self.accepting[self.run(text.encode())])


class Subsets:
    """Sets of NFA states that are reached together, each a state of the deterministic automaton (Rabin and Scott 1959).

    After `build`: rows[state] maps a byte to the next state, accepting[state] tells whether it ends a match.
    """

    def __init__(self, nfa: Nfa, stop: int) -> None:
        self.nfa, self.stop, self.work = nfa, stop, 0
        self.numbers: dict[frozenset[int], int] = {}
        self.queue: list[frozenset[int]] = []
        self.known: dict[tuple[int, ...], int] = {}  # states that a byte leads to -> the set's number

    def number(self, states: tuple[int, ...]) -> int:
        """The number of the set of these states and all that they reach without reading."""
        if states not in self.known:
            found, stack = set(states), list(states)
            while stack:
                fresh = [state for state in self.nfa.empty[stack.pop()] if state not in found]
                found.update(fresh)
                stack.extend(fresh)
            self.work += len(found)
            reading = frozenset(state for state in found if self.nfa.edges[state] or state == self.stop)
            if reading not in self.numbers:
                self.numbers[reading] = len(self.queue)
                self.queue.append(reading)
            self.known[states] = self.numbers[reading]
        return self.known[states]

    def build(self) -> tuple[list[dict[int, int]], list[bool]]:
        self.number((0,))
        rows = []
        while len(rows) < len(self.queue):
            edges = [edge for state in self.queue[len(rows)] for edge in self.nfa.edges[state]]
            self.work += len(edges)
            if len(self.queue) > MAX_DFA or self.work > MAX_WORK:
                raise ValueError(
                    f"the expression needs more than {MAX_DFA} deterministic states, or too much work to find them; "
                    "use smaller numbers of repetitions or fewer alternatives that begin alike"
                )
            targets: dict[int, list[int]] = {}
            for first, last, following in edges:
                for byte in range(first, last + 1):
                    targets.setdefault(byte, []).append(following)
            rows.append({byte: self.number(tuple(following)) for byte, following in targets.items()})
        return rows, [self.stop in states for states in self.queue]


def live_states(backward: Sequence[Iterable[int]], accepting: Sequence[bool]) -> set[int]:
    """The states from which an accepting one is reached, from the states before each state."""
    live = {state for state, accepts in enumerate(accepting) if accepts}
    stack = list(live)
    while stack:
        fresh = [state for state in backward[stack.pop()] if state not in live]
        live.update(fresh)
        stack.extend(fresh)
    return live


def build_dfa(tree: Node) -> Dfa:
    """The automaton of a tree, without states that lead nowhere.

    Raises ValueError for a tree that matches nothing, or that needs more states than the limits of this module.
    """
    nfa = Nfa()
    stop = nfa.add(tree, nfa.state())
    rows, accepting = Subsets(nfa, stop).build()
    backward: list[list[int]] = [[] for _ in rows]
    for state, row in enumerate(rows):
        for following in set(row.values()):
            backward[following].append(state)
    live = live_states(backward, accepting)
    if 0 not in live:
        raise ValueError("the expression matches no text at all")
    order = {state: number for number, state in enumerate(sorted(live))}
    dead = len(order)
    table = np.full((dead + 1, 256), dead, dtype=np.int32)
    for state, number in order.items():
        for byte, following in rows[state].items():
            table[number, byte] = order.get(following, dead)
    return Dfa(table, np.array([*(accepting[state] for state in order), False]))


@lru_cache(maxsize=64)
def expression_dfa(pattern: str) -> Dfa:
    """The automaton of a regular expression; see Reader for what it may contain."""
    return build_dfa(read_expression(pattern))
