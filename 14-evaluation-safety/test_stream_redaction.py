"""Proofs of streaming redaction: nothing leaks at any cut, the cuts change nothing, and little else is taken out."""

import random

import pytest

from stream_redaction import LIMIT, Redactor, bits_per_character, folded, is_card, passes_luhn, passes_mod97, redact

SECRETS = {  # each made for this test or for documentation; none is in use
    "ann.b-c+x@mail.example.org": "EMAIL",
    "+44 20 7946 0958": "PHONE",
    "(415) 555-0132": "PHONE",
    "0171 555 0199": "PHONE",
    "4111 1111 1111 1111": "CARD",
    "5500-0000-0000-0004": "CARD",
    "378282246310005": "CARD",
    "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1": "CARD",
    "４１１１ １１１１ １１１１ １１１１": "CARD",
    "4111\u200b1111\u200b1111\u200b1111": "CARD",
    "GB29 NWBK 6016 1331 9268 19": "IBAN",
    "DE89370400440532013000": "IBAN",
    "gb29 nwbk 6016 1331 9268 19": "IBAN",
    "sk-proj-Ab3dE5fG7hI9jK1lM": "KEY",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345": "KEY",
    "AKIAIOSFODNN7EXAMPLE": "KEY",
    "xK9vQ2mPz7LrT4wYb8Nc": "TOKEN",
}
FRAMES = ("my secret is {}, ok", "x:{}", "id 7 {}.", "({})", "key={} and 12 apples", "{}", "{}\n{}")
HARMLESS = (
    "order 555-0100-2231 shipped",
    "version 2.13.0 of 2026-11-27, at 10:45:33.123456",
    "ISBN 978-3-16-148410-0",
    "3 plus 4 is 7 and 12 13 14 15 16 17 18 19 20",
    "see https://docs.example.org/en/latest/api.html#section-2",
    "the id is 123e4567-e89b-12d3-a456-426614174000",
    "isinstance_of_something_long_name2",
    "/usr/lib/python3.11/site-packages/torch/nn/modules",
    "AttentionWithRotaryEmbedding2Test on 192.168.100.200",
    "One day Ben found a green book in the garden.",
)


def in_pieces(text: str, cuts: list[int]) -> str:
    redactor, ends = Redactor(), [0, *cuts, len(text)]
    return "".join(redactor.feed(text[a:b]) for a, b in zip(ends, ends[1:], strict=False)) + redactor.flush()


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_leaks_at_any_cut(secret: str) -> None:
    for frame in FRAMES:
        text = frame.replace("{}", secret)
        whole = redact(text)
        assert whole == frame.replace("{}", f"[{SECRETS[secret]}]"), frame
        for cut in range(len(text) + 1):
            assert in_pieces(text, [cut]) == whole, (frame, cut)
    assert in_pieces(text, list(range(len(text)))) == whole  # character by character


@pytest.mark.parametrize("number", [number for number, kind in SECRETS.items() if kind in ("CARD", "IBAN")])
def test_a_number_with_a_check_digit_is_found_before_any_sign(number: str) -> None:
    """Its last group shares a run with what follows, as in forms and addresses."""
    for sign in ("=12/27", ":123", "&cvv=123", "@x", "?", "#1 2 3", "%"):
        text = f"pay {number}{sign}"
        assert redact(text) == f"pay [{SECRETS[number]}]{sign}"
        for cut in range(len(text)):
            assert in_pieces(text, [cut]) == redact(text), (text, cut)
    assert redact("0 10 20 30 40%") == "0 10 20 30 40%"  # no check digit: the last group is not joined


def test_random_texts_in_random_pieces_show_what_the_whole_shows() -> None:
    rng, parts = random.Random(0), [*SECRETS, *HARMLESS, "a", "7", " ", ", ", "\n", "@", "+", "x" * (LIMIT - 3), "漢字"]
    for _ in range(150):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 9)))
        cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 12)))
        assert in_pieces(text, cuts) == redact(text), (text, cuts)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_at_most_the_limit_is_held_and_a_longer_run_is_left_out_whole() -> None:
    redactor = Redactor()
    shown = "".join(redactor.feed(char) for char in "say " + "a1" * LIMIT + " end ") + redactor.flush()
    assert shown == "say [LONG] end " and redactor.most_held <= LIMIT + 1 and redactor.found["LONG"] == 1
    redactor = Redactor()
    for char in "1 " * 500:
        redactor.feed(char)
    assert redactor.most_held < 100


def test_a_word_is_shown_as_soon_as_it_has_ended() -> None:
    redactor = Redactor()
    assert redactor.feed("write to") == "write "
    assert redactor.feed(" ann") == "to " and redactor.feed("@example.org") == ""
    assert redactor.feed(" now") == "[EMAIL] " and redactor.flush() == "now" and redactor.flush() == ""


def test_check_digits_by_hand() -> None:
    assert passes_luhn("4111111111111111") and not passes_luhn("4111111111111112")
    assert passes_mod97("GB29NWBK60161331926819") and not passes_mod97("GB29NWBK60161331926818")
    assert sum(passes_luhn(f"{number:03d}") for number in range(1000)) == 100  # one last digit of ten
    assert is_card("4111 1111-1111.1111") and not is_card("1111 1111 1111 1117")
    assert bits_per_character("abab") == 1.0 and bits_per_character("abcd") == 2.0
    assert folded("４١–a") == "41-a"


def test_kinds_can_be_chosen_and_unknown_ones_are_refused() -> None:
    assert redact("ann@example.org 4111 1111 1111 1111", ("CARD",)) == "ann@example.org [CARD]"
    with pytest.raises(ValueError, match="unknown kind of secret 'NAME'"):
        Redactor(("NAME",))
