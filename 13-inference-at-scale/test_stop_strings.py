"""Text that grows: the same as a search in the whole, however it is cut into tokens."""

import itertools
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from course_tokenizer import FOLDER, load_course_tokenizer
from llm_generation import save_word_tokenizer
from sequence_modeling import Vocabulary
from stop_strings import StopPattern, TextStream

COURSE = load_course_tokenizer()
LIBRARY = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
TEXTS = st.text(alphabet=st.sampled_from("aab\nbÄ☃🙂 "), max_size=30)
STOPS = st.lists(st.text(alphabet=st.sampled_from("aab\nÄ☃🙂"), min_size=1, max_size=5), max_size=4)


class Letters:
    """A tokenizer for tests: an id is a piece of text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[token_id] for token_id in ids)


def streamed(tokenizer, ids: list[int], stop=(), sizes=(1,)) -> tuple[list[str], str, TextStream]:
    """The pieces shown, their sum with the flushed rest, and the stream; ids come in groups of the given sizes."""
    stream, pieces, place, turn = TextStream(tokenizer, stop), [], 0, 0
    while place < len(ids):
        size = sizes[turn % len(sizes)]
        text, finished = stream.push(ids[place : place + size])
        pieces.append(text)
        place, turn = place + size, turn + 1
        if finished:
            break
    return pieces, "".join(pieces) + stream.flush(), stream


def cut(text: str, stops) -> str:
    """The text before the stop string that is complete first, by str.find."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


@settings(max_examples=300, deadline=None)
@given(TEXTS, STOPS, st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_any_cut_into_tokens_gives_what_find_gives_on_the_whole(text: str, stops: list[str], lengths) -> None:
    pieces, place = [], 0
    for length in lengths * len(text):
        pieces.append(text[place : place + length])
        place += length
    pieces.append(text[place:])
    shown, whole, stream = streamed(Letters(pieces), list(range(len(pieces))), stops)
    expected = cut(text, stops)
    assert whole == expected
    assert (stream.stopped is not None) == any(stop in text for stop in stops)
    so_far = ""
    for number, piece in enumerate(shown):
        so_far += piece
        known = "".join(pieces[: number + 1])
        assert expected.startswith(so_far)
        if stream.stopped is None:  # no more is held back than a stop string could take
            held = known[len(so_far) :]
            assert not held or any(stop.startswith(held) for stop in stops)


@settings(max_examples=200, deadline=None)
@given(TEXTS, STOPS, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_tokens_of_bytes_and_any_groups_of_them_give_the_same(text: str, stops: list[str], sizes: list[int]) -> None:
    bytewise = [COURSE.byte_ids[byte] for byte in text.encode()]  # every character in as many tokens as it has bytes
    for tokenizer in (COURSE, LIBRARY):
        for ids in (COURSE.encode(text), bytewise):
            pieces, whole, stream = streamed(tokenizer, ids, stops, sizes)
            assert whole == cut(text, stops)
            assert "\ufffd" not in "".join(pieces)
            one_by_one = streamed(tokenizer, ids, stops)[2]
            assert stream.n_ids == one_by_one.n_ids  # the id that ended it is the same


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "rest"),
    [
        (["He", "llo ST", "O", "P and"], ["STOP"], ["He", "llo ", "", ""], ""),  # over three tokens
        (["one END two", "three"], ["END"], ["one "], ""),  # inside one
        (["a", "a", "a", "b", "c"], ["aab"], ["", "", "a", ""], ""),  # its own beginning again and again
        (["STOP"], ["STOP"], [""], ""),  # nothing but the stop string
        (["x", "ab", "c", "e"], ["abcd"], ["x", "", "", "abce"], ""),  # held back, then shown
        (["x", "ab"], ["abcd"], ["x", ""], "ab"),  # the text ends while it is held
        (["ab", "cd"], ["abcd", "bc"], ["", "a"], ""),  # the one that is complete first
        (["zabc"], ["bc", "abc"], ["z"], ""),  # of two with the same end, the longer one
        (["", "", "a"], [], ["", "", "a"], ""),
    ],
)
def test_examples(pieces: list[str], stops: list[str], shown: list[str], rest: str) -> None:
    stream, found = TextStream(Letters(pieces), stops), []
    for token_id in range(len(pieces)):
        text, finished = stream.push([token_id])
        found.append(text)
        if finished:
            break
    assert (found, stream.flush()) == (shown, rest)


def test_after_a_stop_string_nothing_is_read_or_shown() -> None:
    pieces = ["a", "STOP", "tail"]
    stream = TextStream(Letters(pieces), ("STOP",))
    assert stream.push([0, 1, 2, 2]) == ("a", True)
    assert (stream.n_ids, stream.stopped) == (2, "STOP")
    assert stream.push([2]) == ("", True) and stream.flush() == ""
    assert stream.n_ids == 2


def test_the_pattern_knows_what_find_knows() -> None:
    text = "abababcababcaabcabababc"
    for stop in ("ababc", "abababc", "aa", "cab"):
        pattern = StopPattern(stop)
        ends = []
        for place, char in enumerate(text):
            if pattern.push(char):
                ends.append(place + 1)
                pattern = StopPattern(stop)
                break
        assert ends == [text.find(stop) + len(stop)]


def test_a_character_over_four_tokens_is_shown_once_and_whole() -> None:
    ids = [COURSE.byte_ids[byte] for byte in "🙂".encode()]
    for tokenizer in (COURSE, LIBRARY):
        assert streamed(tokenizer, ids)[0] == ["", "", "", "🙂"]
        pieces, whole, _ = streamed(tokenizer, ids[:3])
        assert pieces == ["", "", ""] and whole == "\ufffd"  # the flush says what is left


def test_broken_bytes_hold_nothing_up() -> None:
    ids = [COURSE.byte_ids[byte] for byte in b"a\xff\xffb\xe2\x98c"]
    for tokenizer in (COURSE, LIBRARY):
        assert streamed(tokenizer, ids)[1] == "a\ufffd\ufffdb\ufffdc" == COURSE.decode(ids)
    library = streamed(LIBRARY, [COURSE.byte_ids[0xFF]] * 6)[0]
    assert "".join(library) == "\ufffd" * 5  # all but the last, which could still become something


def test_special_tokens_have_no_text() -> None:
    ids = [COURSE.im_start_id, *COURSE.encode("Hi"), COURSE.eos_id]
    for tokenizer in (COURSE, LIBRARY):
        assert streamed(tokenizer, ids, ("<|im",))[1] == "Hi"


def test_words_keep_the_blank_between_prompt_and_answer(tmp_path) -> None:
    vocabulary = Vocabulary(["anna", "lives", "in", "oslo", ".", ":"])
    save_word_tokenizer(tmp_path, vocabulary)
    words = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = words.encode("anna lives in oslo . anna : oslo .").ids
    for n_prompt in range(1, len(ids)):
        stream = TextStream(words, (), ids[:n_prompt])
        parts = [stream.push([token_id])[0] for token_id in ids[n_prompt:]]
        assert words.decode(ids[:n_prompt]) + "".join(parts) + stream.flush() == words.decode(ids)
    stream = TextStream(words, ("oslo.",), ids[:2])
    assert stream.push(ids[2:]) == (" lives in ", True)


def test_a_long_answer_costs_no_more_for_each_id_than_a_short_one() -> None:
    class Counting:
        longest = 0

        def decode(self, ids: list[int]) -> str:
            self.longest = max(self.longest, len(ids))
            return "x" * len(ids)

    tokenizer = Counting()
    stream = TextStream(tokenizer, ("no such text",), list(range(100)))
    for token_id in range(500):
        stream.push([token_id])
    assert tokenizer.longest <= 10


def test_a_decoder_that_reads_anew_what_was_said_stops_nothing() -> None:
    class Tidy(Letters):
        def decode(self, ids: list[int]) -> str:
            return super().decode(ids).replace(" .", ".")

    assert streamed(Tidy(["a", " ", ".", " b", " c"]), [0, 1, 2, 3, 4])[1] == "a  b c"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a stop string needs at least one character, got \('a', ''\)"):
        TextStream(COURSE, ("a", ""))


def test_what_of_a_stop_string_stands_at_the_end_is_known_after_every_character() -> None:
    rng = random.Random(0)
    for length in range(1, 8):
        for stop in map("".join, itertools.product("ab", repeat=length)):
            pattern, text = StopPattern(stop), ""
            for char in rng.choices("ab", k=60):
                text += char
                complete = pattern.push(char)
                assert pattern.matched == max(n for n in range(length + 1) if text.endswith(stop[:n]))
                assert complete == text.endswith(stop)
                if complete:
                    break


def test_half_a_character_behind_a_stop_string_is_not_shown() -> None:
    bytes_of = {0: b"an end\xc3", 1: b"an en\xc3"}
    tokenizer = SimpleNamespace(spellings=bytes_of, special_tokens=(), token_bytes=bytes_of.__getitem__)
    for token_id, shown, rest in ((0, ("an ", True), ""), (1, ("an ", False), "en\ufffd")):
        stream = TextStream(tokenizer, stop=("end",))
        assert stream.push([token_id]) == shown and stream.flush() == rest


def test_the_blank_before_an_answer_depends_on_how_a_long_prompt_ends() -> None:
    class Joining:
        """Words with blanks between them, none after a dash, which is 0."""

        def decode(self, ids: list[int]) -> str:
            return "".join(
                ("-" if word == 0 else f" {word}" if last else f"{word}")
                for last, word in zip([0, *ids[:-1]], ids, strict=True)
            )

    for context, shown in (([3] * 20 + [0], "7"), ([0] * 20 + [3], " 7")):
        assert TextStream(Joining(), context=context).push([7]) == (shown, False)
