"""Topic 15 - Answers from documents: with the place they come from, without obeying them, or not at all.

    answer = answer_from(index, "why divide by sqrt(d)?", readers=[SHARED])       # Answer: sentences and citations
    print(render_text(answer)); page = render_html(answer)                        # no link but to the cited places
    ids = grounded_prompt(tokenizer, system, question, passages)                  # no text becomes a role
    score_people(answer_people(model, tokenizer, way, asked, index), asked)       # right, wrong, abstained: exact

What a document says cannot be trusted, and a model that reads it may obey it. What is guaranteed here therefore does
not depend on the model: text is never a special token, never in the system's turn, never a link, never a tool call.
"""

import html
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

from torch import nn

from chat_model import abstains
from course_model import complete
from course_tokenizer import Chat, CourseTokenizer
from document_index import DocumentIndex, Found
from document_loaders import INVISIBLE, SourceDocument, document_of
from fine_tuning_adaptation import respond
from gpt2 import SamplingConfig
from lexical_search import analyse_english, check_query, term_weight
from tiny_world import ATTRIBUTES, GRAMMAR, World, join, pick, words
from workbench import check_name, check_range

# Prompts: documents are quoted, never spoken


class GroundedPrompt(NamedTuple):
    chat: Chat
    sources: tuple[str, ...]  # link of passage 1, 2, ... in the prompt


def grounded_prompt(
    tokenizer: CourseTokenizer, system: str, question: str, passages: Sequence[Found], max_tokens: int = 2000
) -> GroundedPrompt:
    """A system turn that never changes, and one user turn: numbered passages, each line marked, then the question.

    Built from ids, so the ids of special tokens are those of the two turns whatever the passages hold. The mark at each
    line ("1| ") is datamarking (Hines et al. 2024, arXiv 2403.14720): it tells a model what is quoted, and guarantees
    nothing. Passages that would exceed max_tokens are left out from the last one on.
    """
    check_query(question)
    quoted: list[str] = []
    for number, found in enumerate(passages, start=1):
        lines = "\n".join(f"{number}| {line}" for line in safe_text(found.chunk.text).splitlines())
        text = "\n\n".join([*quoted, lines, question])
        if len(tokenizer.encode(text)) > max_tokens:
            break
        quoted.append(lines)
    content = "\n\n".join([*quoted, question])
    chat = tokenizer.chat(
        [{"role": "system", "content": system}, {"role": "user", "content": content}], add_generation_prompt=True
    )
    return GroundedPrompt(chat, tuple(found.chunk.link for found in passages[: len(quoted)]))


def safe_text(text: str) -> str:
    """A text without characters that no reader sees and without control characters but the end of a line."""
    text = INVISIBLE.sub("", text)
    return "".join(
        char if char == "\n" or unicodedata.category(char) not in ("Cc", "Zl", "Zp") else " " for char in text
    )


def disarmed(text: str) -> str:
    """A text in which no program finds an address to fetch: "//", "www.", "](" and "data:" come apart."""
    text = re.sub(r"//+", lambda match: "/ " * (len(match[0]) - 1) + "/", safe_text(text))
    text = re.sub(r"(?i)\bwww\.", "www ", text).replace("](", "] (")
    return re.sub(r"(?i)\b(javascript|data|vbscript|mailto|file)(\s*):", r"\1\2 :", text)


# Answers


class Citation(NamedTuple):
    link: str  # file and anchor, relative to the root of the documents
    headings: tuple[str, ...]
    owner: str
    passage: str


@dataclass(frozen=True)
class Answer:
    """Sentences taken word for word from passages, each with the number of its citation, or none at all."""

    question: str
    sentences: tuple[tuple[str, int], ...]
    citations: tuple[Citation, ...]
    coverage: float  # of the question's weight by the best passage, 0 to 1

    @property
    def abstained(self) -> bool:
        return not self.sentences


@dataclass(frozen=True)
class AnswerFromConfig:
    """When an answer is given, and of what."""

    k: int = 5  # passages
    n_sentences: int = 3  # sentences of the answer
    least_coverage: float = 0.4  # share of the question's weight that its best passage must cover, else: no answer

    def __post_init__(self) -> None:
        check_range(self, "k", "n_sentences", least=1)
        check_range(self, "least_coverage", least=0, most=1)


def covered(question: str, text: str, index: DocumentIndex, readers: Sequence[str]) -> float:
    """The share of the question's weight, by BM25's weights over the readable shelves, whose terms a text has."""
    shelves = [index.shelves[owner].words for owner in dict.fromkeys(readers) if owner in index.shelves]
    n_texts, have, total, found = sum(map(len, shelves)), set(analyse_english(text)), 0.0, 0.0
    for term in sorted(set(analyse_english(question))):
        weight = term_weight(n_texts, sum(len(shelf.postings.get(term, ())) for shelf in shelves))
        total += weight
        found += weight * (term in have)
    return found / total if total else 0.0


def sentences_of(text: str) -> list[str]:
    """The sentences of a passage, headings and listings left out, each as it stands there but on one line."""
    plain = re.sub(r"^ {0,3}```.*?(?:^ {0,3}```[^\n]*$|\Z)", "\n\n", text, flags=re.S | re.M)
    plain = re.sub(r"^ {0,3}(?:#{1,6} |\|).*$", "\n", plain, flags=re.M)
    blocks = re.split(r"\n[ \t]*\n", plain)
    return [" ".join(part.split()) for block in blocks for part in re.split(r"(?<=[.!?])\s+", block) if part.strip()]


def answer_from(
    index: DocumentIndex, question: str, readers: Sequence[str], config: AnswerFromConfig | None = None, **options
) -> Answer:
    """The sentences of the best passages that cover most of the question, with citations; or no sentence.

    `options` go to index.search. It abstains where no passage covers enough of the question: the words of a question
    that no document can answer are rare or absent in all of them.
    """
    config = config or AnswerFromConfig()
    found = index.search(question, readers, k=config.k, **options)
    citations = tuple(Citation(item.chunk.link, item.chunk.headings, item.owner, item.chunk.text) for item in found)
    coverage = max((covered(question, item.chunk.search_text, index, readers) for item in found), default=0.0)
    if coverage < config.least_coverage:
        return Answer(question, (), (), coverage)
    scored = [
        (covered(question, sentence, index, readers) / number**0.5, -number, sentence)
        for number, item in enumerate(found, start=1)
        for sentence in sentences_of(item.chunk.text)
    ]
    best = sorted(scored, reverse=True)[: config.n_sentences]
    return Answer(question, tuple((sentence, -number) for _, number, sentence in best), citations, coverage)


# Rendering: the one link is to the cited place


def local_link(link: str) -> str:
    """A relative reference that stays below the page: "./" and every other character quoted, so no scheme, no host."""
    path, _, anchor = link.partition("#")
    return "./" + quote(path, safe="/").lstrip("/") + (f"#{quote(anchor, safe='')}" if anchor else "")


def render_html(answer: Answer) -> str:
    """An answer as HTML: text is escaped, Markdown stays text, and every href is the local link of a citation."""

    def text(value: str) -> str:
        return html.escape(disarmed(value), quote=True)

    if answer.abstained:
        return f"<article><p>The documents do not answer this: {text(answer.question)}</p></article>"
    said = "".join(f"<p>{text(sentence)} [{number}]</p>" for sentence, number in answer.sentences)
    places = "".join(
        f'<li><a href="{html.escape(local_link(item.link), quote=True)}">{text(item.link)}</a> '
        f"{text(' > '.join(item.headings))}<blockquote>{text(item.passage)}</blockquote></li>"
        for item in answer.citations
    )
    return f"<article>{said}<ol>{places}</ol></article>"


def render_text(answer: Answer, n_chars: int = 300) -> str:
    """An answer for a terminal: sentences with numbers, then each place with the beginning of its passage."""
    if answer.abstained:
        return f"The documents do not answer this ({answer.coverage:.0%} of the question's weight is covered at most)."

    def text(value: str) -> str:  # a viewer of Markdown would take a tag for HTML
        return re.sub(r"<(?=[A-Za-z/!?])", "< ", disarmed(value))

    lines = [f"{text(sentence)} [{number}]" for sentence, number in answer.sentences]
    for number, item in enumerate(answer.citations, start=1):
        lines += ["", f"[{number}] {text(item.link)}  ({text(' > '.join(item.headings))})"]
        lines.append("    " + " ".join(text(item.passage).split())[:n_chars])
    return "\n".join(lines)


# TinyWorld: right, wrong and abstained are facts


@dataclass(frozen=True)
class PersonQuestion:
    """A question about one property of one person, and its one right answer."""

    person: str
    name: str  # key of ATTRIBUTES
    right: str

    @property
    def text(self) -> str:
        start, end = ATTRIBUTES[self.name].question
        return join(f"{start.capitalize()} {self.person} {end}".split())


def people_documents(world: World, people: Sequence[str]) -> list[SourceDocument]:
    """Two short documents for each person, of two facts each, in the words of the world's news."""
    names, found = tuple(ATTRIBUTES), []
    for person in people:
        subject = world.pronoun(person).capitalize()
        for number, part in enumerate((names[:2], names[2:]), start=1):
            facts = " ".join(f"{subject} {ATTRIBUTES[name].verb} {world.facts[person][name]} ." for name in part)
            text = join(f"{person} came today . {facts}".split())
            found.append(document_of(f"{person.replace(' ', '-').lower()}-{number}.txt", "text", text, title=person))
    return found


def person_questions(world: World, people: Sequence[str], n: int, seed: int) -> list[PersonQuestion]:
    rng = random.Random(seed)
    asked = [(pick(rng, people), pick(rng, tuple(ATTRIBUTES))) for _ in range(n)]
    return [PersonQuestion(person, name, world.facts[person][name]) for person, name in asked]


WAYS = ("closed book", "closed book, chat", "passage in the chat", "passage read", "passage read or abstain")


def answer_people(
    model: nn.Module, tokenizer: CourseTokenizer, way: str, asked: Sequence[PersonQuestion], index: DocumentIndex | None
) -> list[str]:
    """What a model says to each question, "" where it abstains; `way` is one of WAYS.

    "closed book" goes on after a quiz question, as in pretraining; "chat" asks in a conversation. "passage in the chat"
    puts the best passage before the question. "passage read" lets the model go on after the passage, a question mark
    and "Answer:", the form of the world's news; "or abstain" does so only if the passage names the person.
    """
    check_name("way", way, WAYS)
    if way.startswith("passage") and index is None:
        raise ValueError(f"the way {way!r} needs an index of documents")
    passages = [""] * len(asked)
    if way.startswith("passage"):
        found = [index.search(item.text, [*index.shelves], k=1, way="words") for item in asked]
        passages = [hits[0].chunk.text if hits else "" for hits in found]
    if way in ("closed book, chat", "passage in the chat"):
        said = respond(
            model, tokenizer, [f"{text} {item.text}".strip() for text, item in zip(passages, asked, strict=True)]
        )
        return ["" if abstains(text) else text for text in said]
    prompts = []
    for text, item in zip(passages, asked, strict=True):
        start, end = ATTRIBUTES[item.name].question
        question = join(f"{start} {item.person} {end} Answer :".split())
        opening = f"{GRAMMAR['news'][0]} {text} Question :" if text else GRAMMAR["quiz"][0]
        prompts.append(f"{join(opening.split())} {question}")
    made = complete(model.eval(), tokenizer, prompts, SamplingConfig(8, temperature=0.0))
    said = [text.partition(".")[0].strip() for text in made]
    if way == "passage read or abstain":
        return [answer if item.person in text else "" for answer, item, text in zip(said, asked, passages, strict=True)]
    return said


class Score(NamedTuple):
    """Shares of the questions, which add up to 1."""

    right: float
    wrong: float  # hallucinated: answered, and not with the fact
    abstained: float


def score_people(said: Sequence[str], asked: Sequence[PersonQuestion], answerable: bool = True) -> Score:
    """right: the answer holds the fact; without answerable questions every answer is wrong, even a lucky one."""
    right = sum(answerable and item.right in words(text) for text, item in zip(said, asked, strict=True))
    silent = sum(not text for text in said)
    return Score(right / len(asked), (len(asked) - right - silent) / len(asked), silent / len(asked))
