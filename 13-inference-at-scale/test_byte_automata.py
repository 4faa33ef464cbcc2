"""Expressions against Python's re, bytes against UTF-8, and limits that hold."""

import random
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from byte_automata import (
    LAST_CHAR,
    Chain,
    Chars,
    Either,
    Node,
    Repeat,
    build_dfa,
    byte_ranges,
    chars,
    expression_dfa,
    expression_of,
    literal,
    other_chars,
    read_expression,
)

ALPHABET = "aab1é🙂\n-] _"
ATOMS = ["a", "b", "1", "é", "🙂", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[ab]", "[^a]", "[a-b1]", r"[\d\]-]"]
ATOMS += [r"[^\wé]", r"\n", r"\x61", r"\u00e9", r"\-", r"\]", "[é-🙂]", "[^-a]", "-", "_"]
QUANTIFIERS = ["*", "+", "?", "{2}", "{1,}", "{,2}", "{0,1}", "{1,3}", "{0}"]


def wider(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    grouped = st.tuples(st.sampled_from(["(", "(?:"]), inner).map(lambda pair: f"{pair[0]}{pair[1]})")
    return st.one_of(
        st.lists(inner, min_size=0, max_size=3).map("".join),
        st.tuples(grouped, st.sampled_from(QUANTIFIERS)).map("".join),
        st.tuples(st.sampled_from(ATOMS), st.sampled_from(QUANTIFIERS)).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
    )


EXPRESSIONS = st.recursive(st.sampled_from(ATOMS), wider, max_leaves=6)


def sample(node: Node, rng: random.Random) -> str:
    """A text that a tree matches."""
    if isinstance(node, Chars):
        return chr(rng.choice(rng.choice(node.ranges)))
    if isinstance(node, Chain):
        return "".join(sample(part, rng) for part in node.parts)
    if isinstance(node, Either):
        return sample(rng.choice(node.branches), rng)
    most = node.least + 2 if node.most is None else min(node.most, node.least + 2)
    times = rng.randint(node.least, most)
    between = "" if node.between is None else sample(node.between, rng)
    return between.join(sample(node.node, rng) for _ in range(times))


@settings(max_examples=250, deadline=None)
@given(EXPRESSIONS, st.integers(0, 2**20))
@example("(a|ab)(c|bcd)?", 1)
@example("(a*)*b|(a|b)+1", 2)
@example("^a|b$", 3)
@example("(a{2,3}){1,2}", 4)
def test_membership_is_that_of_python(pattern: str, seed: int) -> None:
    rng, tree = random.Random(seed), read_expression(pattern)
    dfa, theirs = build_dfa(tree), re.compile(pattern, re.ASCII)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 4))) for _ in range(15)]
    texts += [text for text in (sample(tree, rng) for _ in range(10)) if len(text) <= 12]
    texts += [text[:-1] for text in texts] + [text + "a" for text in texts]
    again = re.compile(expression_of(tree))
    for text in texts:
        expected = theirs.fullmatch(text) is not None
        assert dfa.matches(text) == expected
        assert (again.fullmatch(text) is not None) == expected


def test_every_state_but_the_last_leads_to_a_match() -> None:
    dfa = expression_dfa(r"(a|é)+1{3}[^b]?|x")
    reached = {state for state in range(dfa.dead) if dfa.accepting[state]}
    for _ in range(dfa.dead):
        reached |= {state for state in range(dfa.dead) if reached & set(dfa.table[state].tolist())}
    assert reached == set(range(dfa.dead))
    assert not dfa.accepting[dfa.dead] and (dfa.table[dfa.dead] == dfa.dead).all()


def test_every_character_has_its_own_bytes(parity) -> None:
    spans = ((0, 0x300), (0x7F0, 0x900), (0xD700, 0xE010), (0xFFF0, 0x10100), (LAST_CHAR - 99, LAST_CHAR + 1))
    codes = [code for span in spans for code in range(*span)]
    dfa = build_dfa(chars((0, LAST_CHAR)))
    told = [bool(dfa.accepting[dfa.run(chr(code).encode("utf-8", "surrogatepass"))]) for code in codes]
    expected = [not 0xD800 <= code <= 0xDFFF for code in codes]
    parity("byte_ranges, all characters", "UTF-8 without surrogates", "output", told, expected, 0)
    for low, high in ((0x61, 0x61), (0x7E, 0x81), (0x7FE, 0x1003), (0x20AC, 0x1F642), (0xFFFE, 0x10001)):
        inside = build_dfa(chars((low, high)))
        near = [code for code in (low - 1, low, (low + high) // 2, high, high + 1) if not 0xD800 <= code <= 0xDFFF]
        assert [inside.matches(chr(code)) for code in near] == [low <= code <= high for code in near]
        n = sum(int(np.prod([last - first + 1 for first, last in chain])) for chain in byte_ranges(low, high))
        assert n == high - low + 1


def test_classes_of_characters_are_sets() -> None:
    some = chars((5, 9), (1, 3), (4, 4), (20, 30), (25, 26))
    assert some == Chars(((1, 9), (20, 30)))
    assert other_chars(other_chars(some)) == some
    assert other_chars(chars((0, LAST_CHAR))) == Chars(())
    assert other_chars(Chars(())).ranges == ((0, 0xD7FF), (0xE000, LAST_CHAR))


def test_search_reads_anchors_branch_by_branch() -> None:
    texts = ["", "ab", "xab", "abx", "xaby", "a\nb ab", "cd", "xcd", "cdx"]
    for pattern in ("ab", "^ab", "ab$", "^ab$", "^ab|cd$", "(ab|cd)", ""):
        dfa = build_dfa(read_expression(pattern, search=True))
        assert [dfa.matches(text) for text in texts] == [re.search(pattern, text) is not None for text in texts]


def test_separators_stand_between_and_nowhere_else() -> None:
    for least, most in ((0, None), (1, None), (3, None), (0, 0), (0, 1), (0, 2), (2, 2), (2, 4)):
        node = Repeat(literal("a"), least, most, literal(","))
        dfa, theirs = build_dfa(node), re.compile(expression_of(node))
        for n in range(6):
            expected = n >= least and (most is None or n <= most)
            assert dfa.matches(",".join("a" * n)) == expected == bool(theirs.fullmatch(",".join("a" * n)))
        assert not dfa.matches("a,") and not dfa.matches(",a") and not dfa.matches("aa")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(b", r"'\(' without its end at character 1 of the expression 'a\(b'"),
        ("ab)", r"'\)' without its beginning at character 2"),
        ("[ab", r"'\[' without its end at character 0"),
        ("a[]b]", "an empty class .* at character 1"),
        ("[b-a]", "a range of a class goes from a smaller to a larger character"),
        (r"[\d-z]", "a range of a class goes from"),
        (None, "a regular expression is a text, got None"),
        (b"a", "a regular expression is a text, got b'a'"),
        ("*a", r"the quantifier '\*' repeats nothing"),
        ("a|+", r"the quantifier '\+' repeats nothing"),
        ("a*?", "a quantifier of a quantifier"),
        ("a{3,2}", r"\{3,2\} from more to less"),
        ("a{2001}", "more than 2000 repetitions"),
        ("a{2001,}", "more than 2000 repetitions"),
        ("a{x}", r"'\{' begins no \{m\}"),
        ("(?=a)", r"'\(\?=' is not supported, only \( \) and \(\?: \) at character 0"),
        ("(?P<n>a)", r"'\(\?P' is not supported"),
        (r"a\b", r"'\\b' is not supported at character 1"),
        (r"(a)\1", r"'\\1' is not supported at character 3"),
        (r"\xg1", r"'\\x' needs 2 hexadecimal digits"),
        (r"\u12", r"'\\u' needs 4 hexadecimal digits"),
        ("a\\", "a backslash escapes nothing"),
        ("a^b", r"'\^' is understood only at the beginning of a branch at character 1"),
        ("(a$)", r"'\$' is understood only at the end"),
        ("a$b", r"'b' after the end '\$' at character 2"),
        ("(" * 61 + ")" * 61, "more than 60 groups in each other"),
        ("a" * 10_001, "the expression has 10001 characters; at most 10000 are read"),
        (r"[^\x00-\uffff\U]", r"'\\U' is not supported"),
        (r"[^\s\S]", "the expression matches no text at all"),
        (r"a[^\s\S]", "the expression matches no text at all"),
    ],
)
def test_what_is_not_understood_is_named_with_its_place(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expression_dfa(pattern)


@pytest.mark.parametrize("pattern", ["(a|b)*a(a|b){20}", "((a?){100}){100}", "(((a{9}){9}){9}){99}", "(.{0,500}b){9}"])
def test_expressions_that_would_explode_are_refused_soon(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"needs more than \d+ (deterministic )?states"):
        expression_dfa(pattern)


def test_matching_never_goes_back() -> None:
    """What takes a backtracking matcher 2**n steps takes an automaton n."""
    dfa = expression_dfa("(a*)*b")
    assert not dfa.matches("a" * 20_000) and dfa.matches("a" * 20_000 + "b")
    assert len(dfa.table) <= 4
