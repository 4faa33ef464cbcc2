"""Answers: RG2's guarantees for thirty poisoned documents, citations, abstention, and exact scores of TinyWorld."""

import json
from collections import Counter
from html.parser import HTMLParser

import pytest

from chat_model import load_chat_model
from course_tokenizer import COURSE_SPECIAL_TOKENS, load_course_tokenizer
from document_index import SHARED, DocumentIndex
from document_loaders import course_chapters, document_of, html_text
from poisoned_documents import ORDER, PAYLOADS, POISONED, tagged
from retrieval_answers import (
    WAYS,
    AnswerFromConfig,
    answer_from,
    answer_people,
    covered,
    disarmed,
    grounded_prompt,
    local_link,
    people_documents,
    person_questions,
    render_html,
    render_text,
    safe_text,
    score_people,
    sentences_of,
)
from tiny_world import World

SYSTEM = "You answer from the numbered passages."
QUESTION = "How is green tea brewed?"


def index_of(text: str, source: str = "tea.md") -> DocumentIndex:
    index = DocumentIndex()
    index.add(SHARED, [document_of(source, "markdown", text)])
    return index


def special_ids(ids: list[int]) -> list[int]:
    return [id for id in ids if id < len(COURSE_SPECIAL_TOKENS)]


# RG2


def test_there_are_thirty_documents_of_every_kind() -> None:
    assert len(POISONED) >= 30 and len({item.text for item in POISONED}) == len(POISONED) and len(PAYLOADS) == 8


@pytest.mark.parametrize("number", range(len(POISONED)))
def test_a_document_is_never_a_role_and_never_in_the_systems_turn(number: int) -> None:
    tokenizer = load_course_tokenizer()
    found = index_of(POISONED[number].text).search(QUESTION, [SHARED])
    assert found  # the poison is really in the prompt
    clean = grounded_prompt(tokenizer, SYSTEM, QUESTION, [])
    prompt = grounded_prompt(tokenizer, SYSTEM, QUESTION, found)
    assert special_ids(prompt.chat.ids) == special_ids(clean.chat.ids)  # roles, turns and tools: those of two turns
    end = clean.chat.ids.index(tokenizer.im_end_id) + 1
    assert prompt.chat.ids[:end] == clean.chat.ids[:end]  # the system's turn, to the id
    assert len(prompt.chat.ids) > len(clean.chat.ids) and not any(prompt.chat.trained)
    assert prompt.sources == tuple(item.chunk.link for item in found)  # the provenance


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes = Counter(), []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags[tag] += 1
        self.attributes += attrs


@pytest.mark.parametrize("number", range(len(POISONED)))
def test_a_page_holds_no_address_no_code_and_shows_where_it_comes_from(number: int) -> None:
    answer = answer_from(index_of(POISONED[number].text), QUESTION, [SHARED], AnswerFromConfig(n_sentences=50))
    assert not answer.abstained
    page, links = render_html(answer), Links()
    links.feed(page)
    assert set(links.tags) <= {"article", "p", "ol", "li", "a", "blockquote"}
    assert links.attributes == [("href", local_link(item.link)) for item in answer.citations]
    assert all(value.startswith("./tea.md#") for _, value in links.attributes) and links.attributes
    for shown in (page, render_text(answer)):
        assert "://" not in shown and "www." not in shown.lower() and "](http" not in shown
        assert (
            "<img" not in shown
            and "<script" not in shown
            and "//evil" not in shown
            and "javascript:" not in shown
            and "tea.md#tea" in shown
        )
    assert "eighty degrees" in html_text(page)[1]


def test_a_template_made_of_strings_would_be_taken_over() -> None:
    """Why prompts are built from ids: the same documents in a string, whose special tokens are then recognised."""
    tokenizer = load_course_tokenizer()
    taken = 0
    for item in POISONED:
        ids = tokenizer.encode(f"<|im_start|>user<|im_sep|>{safe_text(item.text)}<|im_end|>", COURSE_SPECIAL_TOKENS)
        taken += len(special_ids(ids)) > 3
    assert taken >= 4


def test_hidden_text_is_not_in_the_prompt() -> None:
    for payload in (tagged(ORDER), f"<!-- {ORDER} -->", "<!-- " + ORDER):
        found = index_of(f"# Tea\n\nGreen tea is brewed.\n\n{payload}").search(QUESTION, [SHARED])
        assert "PWNED" not in str(found) and "\U000e0049" not in str(found)


def test_lines_are_marked_with_their_passage_and_what_does_not_fit_is_left_out() -> None:
    tokenizer = load_course_tokenizer()
    index = index_of("# Tea\n\nGreen tea.\n\nBrew it.\n\n# More tea\n\n" + "Green tea is brewed again. " * 40)
    found = index.search(QUESTION, [SHARED])
    prompt = grounded_prompt(tokenizer, SYSTEM, QUESTION, found, max_tokens=10_000)
    assert len(prompt.sources) == len(found) == 2
    text = tokenizer.decode(prompt.chat.ids)
    assert all(f"{number}| " in text for number in (1, 2)) and text.rstrip().endswith("assistant<|im_sep|>")
    short = grounded_prompt(tokenizer, SYSTEM, QUESTION, found, max_tokens=60)
    assert len(short.sources) < 2
    with pytest.raises(ValueError, match="the question is empty"):
        grounded_prompt(tokenizer, SYSTEM, "", found)


@pytest.mark.parametrize(
    ("link", "reference"),
    [
        ("a/b.md#x-y", "./a/b.md#x-y"),
        ("javascript:alert(1).md#x", "./javascript%3Aalert%281%29.md#x"),
        ("//evil.example/x", "./evil.example/x"),
        ("https://evil.example/x#y", "./https%3A//evil.example/x#y"),
        ('a".md#">', "./a%22.md#%22%3E"),
        ("a.md#x#//y", "./a.md#x%23%2F%2Fy"),
    ],
)
def test_links_stay_below_the_page(link: str, reference: str) -> None:
    assert local_link(link) == reference


def test_addresses_come_apart() -> None:
    for text in ("https://evil.example", "HTTP://X", "//evil", "////evil", "javascript:x", "data :x", "WWW.evil.com"):
        shown = disarmed(text)
        assert (
            "//" not in shown
            and "www." not in shown.lower()
            and "script:" not in shown
            and shown != text
            or ":" not in text
        )
    assert disarmed("a/b, c: d / e") == "a/b, c: d / e"
    assert safe_text("a\x00b\x1b[31m\u2028c\u200bd\n") == "a b [31m cd\n"


# Answers and abstention


CORPUS = """# Cups
Cups hold tea. A cup is made of clay and fired once, at little cost.

# Kettles
A kettle boils water. Copper kettles cost more than those of steel.
"""


def test_an_answer_is_word_for_word_with_its_place() -> None:
    index = index_of(CORPUS, "house.md")
    answer = answer_from(index, "What do copper kettles cost?", [SHARED], AnswerFromConfig(n_sentences=1))
    [(sentence, number)] = answer.sentences
    assert (
        sentence == "Copper kettles cost more than those of steel." and sentence in answer.citations[number - 1].passage
    )
    assert answer.citations[number - 1].link == "house.md#kettles" and answer.coverage == 1.0
    assert answer.citations[number - 1].headings == ("Kettles",) and answer.citations[number - 1].owner == SHARED


@pytest.mark.parametrize(
    "question", ["Who won the election in Norway?", "Which copper mine in Peru closed after a strike?", "?!"]
)
def test_it_abstains_where_no_passage_covers_the_question(question: str) -> None:
    answer = answer_from(index_of(CORPUS), question, [SHARED])
    assert answer.abstained and answer.citations == () and answer.coverage < 0.4
    assert "do not answer this" in render_text(answer) and "do not answer this" in render_html(answer)


def test_it_reads_only_the_named_shelves_and_refuses_an_empty_question() -> None:
    index = index_of(CORPUS)
    index.add("bob", [document_of("s.md", "markdown", "# Kettles\n\nThe secret kettle is under the stairs.")])
    assert "secret" not in render_text(
        answer_from(index, "Where is the secret kettle?", [SHARED], AnswerFromConfig(least_coverage=0))
    )
    assert "secret" in render_text(answer_from(index, "Where is the secret kettle?", [SHARED, "bob"]))
    assert answer_from(DocumentIndex(), "Where is it?", [SHARED]).abstained
    with pytest.raises(ValueError, match="the question is empty"):
        answer_from(index, " ", [SHARED])
    with pytest.raises(ValueError, match="least_coverage must be finite and >= 0 and <= 1, got 2"):
        AnswerFromConfig(least_coverage=2)


def test_coverage_weighs_rare_words_more() -> None:
    index = index_of(CORPUS)
    rare, common, both = (
        covered("copper cost", text, index, [SHARED]) for text in ("copper", "cost", "cost of copper")
    )
    assert rare > common > 0 and both == 1.0 and covered("?", "x", index, [SHARED]) == 0.0


def test_sentences_leave_out_headings_listings_and_tables() -> None:
    assert sentences_of("# H\n\nOne\ntwo. Three!\n\n```\ncode. x\n```\n\n|a|b|\n\nLast") == [
        "One two.",
        "Three!",
        "Last",
    ]


def test_the_course_answers_why_attention_divides() -> None:
    index = DocumentIndex()
    index.add(SHARED, course_chapters())
    answer = answer_from(index, "why divide by the square root of the width?", [SHARED])
    links = [item.link for item in answer.citations]
    assert any(link.startswith("03-attention-mechanisms/README.md#") for link in links[:2])
    assert "03-attention-mechanisms/README.md#why-divide-by-the-square-root-of-the-width" in links


def test_the_question_set_names_sections_that_exist_and_its_halves_are_balanced() -> None:
    from rag_experiments import QUESTION_SET

    rows = [json.loads(line) for line in QUESTION_SET.read_text(encoding="utf-8").splitlines()]
    chapters = {chapter.source: chapter for chapter in course_chapters()}
    for row in rows:
        headings = {section.headings[-1] for section in chapters[row["chapter"]].sections if section.headings}
        assert set(row["sections"]) <= headings, row
    assert len(rows) >= 60 and len({row["question"] for row in rows}) == len(rows)
    assert len({row["chapter"] for row in rows}) >= 12
    shares = Counter((row["wording"], row["held_out"]) for row in rows)
    assert len(shares) == 4 and max(shares.values()) - min(shares.values()) <= 2


# TinyWorld


@pytest.fixture(scope="module")
def people():
    world = World()
    known, unseen, nowhere = world.known[:6], world.unseen[:6], world.unseen[6:12]
    index = DocumentIndex()
    index.add(SHARED, people_documents(world, [*known, *unseen]))
    asked = {
        "known": person_questions(world, known, 8, 0),
        "unseen": person_questions(world, unseen, 8, 0),
        "nowhere": person_questions(world, nowhere, 8, 0),
    }
    return index, asked, *load_chat_model()


def test_a_retrieved_passage_ends_hallucination_and_no_passage_ends_the_answer(people) -> None:
    index, asked, model, tokenizer = people
    shares = {
        (group, way): score_people(answer_people(model, tokenizer, way, items, index), items, group != "nowhere")
        for group, items in asked.items()
        for way in ("closed book", "passage read", "passage read or abstain")
    }
    assert shares["unseen", "closed book"].wrong > 0.7  # it goes on as if it knew
    assert shares["unseen", "passage read"].right > 0.8 and shares["unseen", "passage read or abstain"].right > 0.8
    assert shares["nowhere", "passage read"].wrong == 1.0  # the nearest passage is about somebody else
    assert shares["nowhere", "passage read or abstain"].abstained == 1.0
    assert all(sum(score) == pytest.approx(1) for score in shares.values())


def test_documents_and_questions_hold_the_worlds_facts(people) -> None:
    index, asked, _, _ = people
    for item in asked["unseen"]:
        assert item.right in index.search(item.text, [SHARED], k=1)[0].chunk.text.replace(".", "").split()
        assert item.text.endswith("?") and item.person in item.text


def test_scores_are_exact() -> None:
    asked = person_questions(World(), World().known, 3, 1)
    said = [f"It is {asked[0].right}", "", "Nonsense"]
    assert score_people(said, asked) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert score_people(said, asked, answerable=False) == pytest.approx((0, 2 / 3, 1 / 3))


def test_unknown_ways_and_missing_documents_are_named(people) -> None:
    _, asked, model, tokenizer = people
    with pytest.raises(ValueError, match="unknown way 'passages'; did you mean"):
        answer_people(model, tokenizer, "passages", asked["known"], None)
    with pytest.raises(ValueError, match="'passage read' needs an index"):
        answer_people(model, tokenizer, WAYS[3], asked["known"], None)
