"""Topic 15 - Retrieval experiments: which searcher finds the right section, and what a found passage is worth.

Registered for the `figures` verb of the topic's command line, a minute or two at most on one core each. Retrievers are
compared on question_set.jsonl: half of its questions may be looked at, by the other half the numbers are reported. A
question counts as answered at k if one of its right sections is among the first k sections.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from chat_model import load_chat_model
from course_model import load_course_model
from course_tokenizer import COURSE_SPECIAL_TOKENS, load_course_tokenizer
from dense_search import DenseConfig, FlatIndex, HNSWConfig, HNSWIndex, train_encoder
from document_index import SHARED, DocumentIndex
from document_loaders import (
    SourceDocument,
    course_chapters,
    document_of,
    load_folder,
    python_docstrings,
    python_reference,
)
from hybrid_search import (
    CrossConfig,
    ndcg,
    one_per_section,
    reciprocal_rank,
    reciprocal_rank_fusion,
    success_at,
    train_reranker,
)
from lexical_search import BM25Index, Hit, check_query
from poisoned_documents import PAYLOADS, POISONED
from retrieval_answers import (
    WAYS,
    AnswerFromConfig,
    answer_from,
    answer_people,
    grounded_prompt,
    people_documents,
    person_questions,
    render_html,
    render_text,
    safe_text,
    score_people,
)
from text_chunks import Chunk, ChunkConfig
from tiny_world import ATTRIBUTES, World
from workbench import Column, RunConfig, alone, announce, check_range, save_figure, save_results

QUESTION_SET = Path(__file__).parent / "question_set.jsonl"
COMMAND = "python 15-real-world-applications/real_world_applications.py figures"
N_SECTIONS = 10  # sections of a ranking that are judged


@dataclass(frozen=True)
class RagFiguresConfig:
    """The sizes of the experiments on retrieval."""

    n_seeds: int = 3  # seeds 0, 1, ... of trained encoders and graphs
    dense_steps: int = 120  # optimizer steps of an encoder in the comparison of retrievers
    rerank_steps: int = 60  # optimizer steps of a reranker
    n_people: int = 40  # people of each group in the experiment on hallucination
    n_questions: int = 60  # questions about each group
    n_vectors: int = 1500  # vectors in the graph
    folder: Path = Path(__file__).parent / "figures"  # where the figures and results.json go

    def __post_init__(self) -> None:
        check_range(self, "n_seeds", "n_people", "n_questions", "rerank_steps", least=1)
        check_range(self, "dense_steps", least=2)
        check_range(self, "n_vectors", least=50)

    def save_table(self, name: str, columns: list[Column], rows: list[list], n_seeds: int = 1) -> None:
        save_results(self.folder / "results.json", name, columns, rows, range(n_seeds), f"{COMMAND} {name}")


# The questions


@dataclass(frozen=True)
class CourseQuestion:
    """A question with the sections of one chapter that answer it."""

    question: str
    chapter: str
    sections: tuple[str, ...]  # last headings
    wording: str  # own: in the words of the section; other: in other words
    held_out: bool

    def right(self, chunks: Sequence[Chunk]) -> set[tuple]:
        """(source, headings) of every section that answers it."""
        places = {(chunk.source, chunk.headings) for chunk in chunks if chunk.source == self.chapter and chunk.headings}
        return {place for place in places if place[1][-1] in self.sections}


def course_questions() -> list[CourseQuestion]:
    rows = [json.loads(line) for line in QUESTION_SET.read_text(encoding="utf-8").splitlines()]
    return [CourseQuestion(**{**row, "sections": tuple(row["sections"])}) for row in rows]


@cache
def course_documents() -> tuple[SourceDocument, ...]:
    """What is searched: the chapters, and Python's language reference."""
    return (*course_chapters(), *python_reference())


Search = Callable[[str], list[Hit]]


def judge(search: Search, chunks: Sequence[Chunk], questions: Sequence[CourseQuestion]) -> dict[str, float]:
    """Mean success@5, reciprocal rank and nDCG@10 of sections over questions; each right section has gain 1."""
    numbered, sums = dict(enumerate(chunks)), {"success": 0.0, "mrr": 0.0, "ndcg": 0.0}
    for item in questions:
        sections = [
            (numbered[hit.id].source, numbered[hit.id].headings)
            for hit in one_per_section(search(item.question), numbered)
        ]
        right = item.right(chunks)
        sums["success"] += success_at(sections, right, 5)
        sums["mrr"] += reciprocal_rank(sections[:N_SECTIONS], right)
        sums["ndcg"] += ndcg(sections, dict.fromkeys(right, 1.0), N_SECTIONS)
    return {name: total / len(questions) for name, total in sums.items()}


GROUPS: dict[str, Callable[[CourseQuestion], bool]] = {
    "tuned": lambda item: not item.held_out,
    "held out": lambda item: item.held_out,
    "held out, own words": lambda item: item.held_out and item.wording == "own",
    "held out, other words": lambda item: item.held_out and item.wording == "other",
}


def judge_groups(search: Search, chunks: Sequence[Chunk]) -> list[float]:
    """success@5 of every group, then MRR and nDCG@10 of the held-out questions."""
    asked = course_questions()
    found = {name: judge(search, chunks, [item for item in asked if chosen(item)]) for name, chosen in GROUPS.items()}
    return [*(scores["success"] for scores in found.values()), found["held out"]["mrr"], found["held out"]["ndcg"]]


# Retrievers


def plain_words(chunks: Sequence[Chunk]) -> BM25Index:
    """BM25 over the passages as they stand."""
    index = BM25Index()
    for number, chunk in enumerate(chunks):
        index.add(number, chunk.text)
    return index


def shelf_words(
    documents: Sequence[SourceDocument], config: ChunkConfig | None = None
) -> tuple[list[Chunk], BM25Index]:
    """The passages and the word index of a DocumentIndex: titles and headings count, endings do not."""
    index = DocumentIndex(config=config)
    index.add(SHARED, documents)
    shelf = index.shelves[SHARED]
    return [*shelf.chunks.values()], shelf.words


def trained_searches(
    config: RagFiguresConfig, chunks: list[Chunk], words: BM25Index, seed: int
) -> Iterator[tuple[str, Search]]:
    """Each way of searching that needs training, trained with one seed."""
    dense = replace(DenseConfig(), max_steps=config.dense_steps, warmup_steps=min(30, config.dense_steps // 4))
    encoder, _ = train_encoder(chunks, dense, seed)
    vectors = FlatIndex(dense.d_shared)
    for number, vector in enumerate(encoder.embed([chunk.search_text for chunk in chunks])):
        vectors.add(number, vector)

    def by_vectors(question: str) -> list[Hit]:
        return vectors.search(encoder.embed([question])[0], 50)

    def joined(question: str) -> list[Hit]:
        return reciprocal_rank_fusion([words.search(question, 50), by_vectors(question)], 50)

    yield "vectors (trained)", by_vectors
    yield "words and vectors, RRF", joined
    cross = replace(CrossConfig(), max_steps=config.rerank_steps, warmup_steps=min(30, config.rerank_steps // 4))
    cross = replace(cross, d_model=dense.d_model, n_layers=dense.n_layers, n_heads=dense.n_heads)
    reranker, _ = train_reranker(chunks, cross, seed, encoder)
    texts = {number: chunk.search_text for number, chunk in enumerate(chunks)}

    def reranked(question: str) -> list[Hit]:
        return reranker.rerank(question, joined(question)[:20], texts)

    yield "RRF, the first 20 reranked", reranked
    yield (
        "RRF with the reranker as a third",
        lambda question: reciprocal_rank_fusion(
            [words.search(question, 50), by_vectors(question), reranked(question)], 50
        ),
    )


def retrievers(config: RagFiguresConfig, run: RunConfig) -> None:
    """Every searcher on the question set, the trained ones with several seeds."""
    chunks, words = shelf_words(course_documents())
    plain = plain_words(chunks)
    rows: dict[str, list[Any]] = {
        "words (BM25)": judge_groups(lambda question: plain.search(question, 50), chunks),
        "words, headings thrice, no endings": judge_groups(lambda question: words.search(question, 50), chunks),
    }
    for seed in range(config.n_seeds):
        for name, search in trained_searches(config, chunks, words, seed):
            scores = judge_groups(search, chunks)
            for cell, score in zip(rows.setdefault(name, [[] for _ in scores]), scores, strict=True):
                cell.append(score)
    n_right = np.mean([len(item.right(chunks)) for item in course_questions()])
    n_sections = len({(chunk.source, chunk.headings) for chunk in chunks})
    chance = 1 - (1 - n_right / n_sections) ** 5
    rows["five sections at random"] = [*[chance] * len(GROUPS), "", ""]
    columns = [Column("Searcher"), *(Column(name.removeprefix("held out, "), digits=".0%") for name in GROUPS)]
    columns += [Column("MRR", digits=".2f"), Column("nDCG@10", digits=".2f")]
    config.save_table("retrievers", columns, [[name, *cells] for name, cells in rows.items()], config.n_seeds)


def chunk_sizes(config: RagFiguresConfig, run: RunConfig) -> None:
    """Budget and overlap of a passage against what the words find."""
    rows = []
    for most, overlap in ((50, 0), (100, 0), (200, 0), (200, 50), (400, 0), (800, 0)):
        chunks, words = shelf_words(course_documents(), ChunkConfig(most, overlap))
        scores = judge_groups(lambda question, words=words: words.search(question, 50), chunks)
        rows.append(
            [
                f"{most} tokens, {overlap} repeated" if overlap else f"{most} tokens",
                len(chunks),
                *scores[:2],
                *scores[4:],
            ]
        )
    columns = [Column("Passages of at most"), Column("Passages", digits=",d")]
    columns += [Column(f"success@5, {name}", digits=".1%") for name in ("tuned", "held out")]
    columns += [Column("MRR, held out", digits=".3f"), Column("nDCG@10, held out", digits=".3f")]
    config.save_table("chunk-sizes", columns, rows)


# The graph


def clustered_vectors(n: int, width: int, seed: int) -> np.ndarray:
    """Unit vectors around fifty centres, as embeddings of texts lie: (vectors, width)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((50, width))
    vectors = centres[rng.integers(50, size=n)] + 0.7 * rng.standard_normal((n, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def hnsw_recall(config: RagFiguresConfig, run: RunConfig) -> None:
    """Recall@10 of the graph against brute force, and how many vectors it compares, by the width of the search."""
    widths, found = (10, 20, 40, 80, 160), {}
    for seed in range(config.n_seeds):
        every = clustered_vectors(config.n_vectors + 50, 64, seed)
        vectors, queries = every[:-50], every[-50:]
        graph, exact = HNSWIndex(64, HNSWConfig(seed=seed)), FlatIndex(64)
        for number, vector in enumerate(vectors):
            graph.add(number, vector)
            exact.add(number, vector)
        right = [{hit.id for hit in exact.search(query, 10)} for query in queries]
        for width in widths:
            graph.n_compared = 0
            hits = [{hit.id for hit in graph.search(query, 10, width)} for query in queries]
            recall = sum(len(a & b) / 10 for a, b in zip(hits, right, strict=True)) / len(queries)
            for cell, value in zip(found.setdefault(width, ([], [])), (recall, graph.n_compared / 50), strict=True):
                cell.append(value)
    rows = [[f"{width}", recalls, costs] for width, (recalls, costs) in found.items()]
    rows.append(["brute force", 1.0, float(config.n_vectors)])
    columns = [Column("Candidates kept"), Column("Recall@10", digits=".3f"), Column("Vectors compared", digits=",.0f")]
    config.save_table("hnsw-recall", columns, rows, config.n_seeds)
    save_figure(plot_recall(found, config.n_vectors), config.folder / "hnsw.svg")


def plot_recall(found: dict[int, tuple[list[float], list[float]]], n_vectors: int) -> Figure:
    """Mean recall of the graph over the vectors it compared, with the spread of the seeds; brute force at the right."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    costs = [np.mean(compared) for _, compared in found.values()]
    means, spread = ([of(recalls) for recalls, _ in found.values()] for of in (np.mean, np.std))
    axes.errorbar(costs, means, spread, marker="o", capsize=3, label="the graph (candidates kept)")
    for width, cost, mean in zip(found, costs, means, strict=True):
        axes.annotate(f"{width}", (cost, mean), textcoords="offset points", xytext=(8, -13), fontsize=9)
    axes.plot([n_vectors], [1.0], "ks", label="brute force")
    axes.set(xlabel="vectors compared in a search", ylabel="recall@10", xscale="log")
    ticks = [tick for tick in (20, 50, 100, 200, 500, 1000, 2000) if min(costs) * 0.8 <= tick <= n_vectors * 1.4]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right", frameon=False)
    return figure


# What a passage is worth


def hallucination(config: RagFiguresConfig, run: RunConfig) -> None:
    """Right, wrong and no answers about people whom the model knows, only documents know, and nobody knows."""
    world, (base, tokenizer), (chat, _) = World(), load_course_model(), load_chat_model()
    n = config.n_people
    groups = {"trained on": world.known[:n], "in documents": world.unseen[:n]}
    index = DocumentIndex()
    index.add(SHARED, people_documents(world, [person for people in groups.values() for person in people]))
    groups["nowhere"] = world.unseen[n : 2 * n]
    rows = []
    for way in WAYS:
        model = chat if "chat" in way else base
        cells = []
        for name, people in groups.items():
            scores = []
            for seed in range(config.n_seeds):
                asked = person_questions(world, people, config.n_questions, seed)
                said = answer_people(model, tokenizer, way, asked, index)
                scores.append(score_people(said, asked, name != "nowhere"))
            cells += [[score.right for score in scores], [score.wrong for score in scores]]
        del cells[4]  # of people of whom nothing tells no answer is right
        rows.append([f"{way} ({'chat' if model is chat else 'base'} model)", *cells])
    chance = float(np.mean([1 / len(world.words[attribute.word_class]) for attribute in ATTRIBUTES.values()]))
    rows.append(["guessing among the values", *[chance, 1 - chance] * 2, 1.0])
    columns = [Column("Way")]
    columns += [Column(f"{name}: {what}", digits=".0%") for name in groups for what in ("right", "wrong")]
    del columns[5]
    config.save_table("hallucination", columns, rows, config.n_seeds)
    save_figure(plot_people(rows[:-1], [*groups]), config.folder / "hallucination.svg")


SHOWN_WAYS = {  # of the base model: what the figure calls them
    "closed book (base model)": "asked alone",
    "passage read (base model)": "with a passage",
    "passage read or abstain (base model)": "with a passage\nand the rule",
}


def plot_people(rows: list[list[Any]], groups: list[str]) -> Figure:
    """Right, wrong and silent answers of the base model about each group of people, one bar for each way."""
    figure, axes = plt.subplots(1, len(groups), figsize=(8, 2.3), sharey=True, layout="constrained")
    titles = {"trained on": "people it was trained on", "in documents": "people in your documents"}
    shown = {SHOWN_WAYS[row[0]]: row for row in rows if row[0] in SHOWN_WAYS}
    for place, (axis, group) in enumerate(zip(axes, groups, strict=True)):
        cells = [
            row[1 + 2 * place : 3 + 2 * place] for row in shown.values()
        ]  # right and wrong; of nobody, wrong alone
        right, wrong = (
            np.array([np.mean(row[side]) for row in [[0.0, *cell][-2:] for cell in cells]]) for side in (0, 1)
        )
        left = np.zeros(len(shown))
        parts = (("right", right, "tab:green", ""), ("wrong", wrong, "tab:red", "//"), ("silent", None, "0.85", ""))
        for what, values, colour, hatch in parts:
            values = 1 - left if values is None else values
            axis.barh([*shown], values, 0.62, left, color=colour, hatch=hatch, edgecolor="white", label=what)
            left = left + values
        axis.set(title=titles.get(group, "people nothing tells of"), xlim=(0, 1), xticks=[0, 0.5, 1])
        axis.set_xticklabels(["0", "50 %", "100 %"])
        axis.title.set_size(10)
        axis.tick_params(left=False)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


OUTSIDE = (  # questions that neither the chapters nor Python's reference can answer
    "Which vaccine protects against measles?",
    "Who won the football championship in Uruguay?",
    "How long should potatoes be boiled?",
    "What is the capital of Mongolia?",
    "When was the cathedral of Chartres built?",
    "How do volcanoes erupt?",
    "Which bank offers the cheapest mortgage?",
    "How do I prune roses in autumn?",
    "Who composed the opera about the flying Dutchman?",
    "Why do cats purr at night?",
    "What does a dentist earn in Norway?",
    "How deep is Lake Baikal?",
)


def abstention(config: RagFiguresConfig, run: RunConfig) -> None:
    """How the least coverage trades answers to the course's questions against answers to questions from elsewhere."""
    index = DocumentIndex()
    index.add(SHARED, course_documents())
    asked = {name: [item.question for item in course_questions() if chosen(item)] for name, chosen in GROUPS.items()}
    asked["from elsewhere"] = [*OUTSIDE]
    coverage = {
        name: [answer_from(index, text, [SHARED], AnswerFromConfig(least_coverage=0)).coverage for text in texts]
        for name, texts in asked.items()
    }
    rows = [
        [f"{least:.1f}", *(sum(value >= least for value in values) / len(values) for values in coverage.values())]
        for least in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    ]
    columns = [Column("Least coverage"), *(Column(f"answered, {name}", digits=".0%") for name in coverage)]
    config.save_table("abstention", columns, rows)


def poisoned(config: RagFiguresConfig, run: RunConfig) -> None:
    """What thirty poisoned documents reach in a prompt made of strings, in one made of ids, and on the page."""
    tokenizer, system = load_course_tokenizer(), "You answer from the numbered passages."
    question, counts = "How is green tea brewed?", {}
    for item in POISONED:
        index = DocumentIndex()
        index.add(SHARED, [document_of("tea.md", "markdown", item.text)])
        found = index.search(question, [SHARED])
        string = f"<|im_start|>user<|im_sep|>{safe_text(item.text)}\n{question}<|im_end|>"
        ids = tokenizer.encode(string, COURSE_SPECIAL_TOKENS)
        clean = grounded_prompt(tokenizer, system, question, []).chat.ids
        made = grounded_prompt(tokenizer, system, question, found).chat.ids
        answer = answer_from(index, question, [SHARED], AnswerFromConfig(n_sentences=50))
        shown = render_html(answer) + render_text(answer)
        n_special = [sum(id < len(COURSE_SPECIAL_TOKENS) for id in row) for row in (ids, made, clean)]
        reached = (n_special[0] > 3, n_special[1] != n_special[2], "//" in shown or "<img" in shown)
        held = counts.setdefault(item.kind, [0, 0, 0, 0])
        for column, value in enumerate((True, *reached)):
            held[column] += value
    rows = [[kind, *counts[kind]] for kind in PAYLOADS]
    rows.append(["all", *(sum(column) for column in zip(*counts.values(), strict=True))])
    columns = [Column("Kind"), Column("Documents", digits="d"), Column("special ids, prompt of strings", digits="d")]
    columns += [Column("special ids, prompt of ids", digits="d"), Column("addresses or images shown", digits="d")]
    config.save_table("poisoned-documents", columns, rows)


RAG_EXPERIMENTS: dict[str, tuple[Callable, float]] = {
    "retrievers": (retrievers, 135),
    "chunk-sizes": (chunk_sizes, 15),
    "hnsw-recall": (hnsw_recall, 60),
    "hallucination": (hallucination, 15),
    "abstention": (abstention, 15),
    "poisoned-documents": (poisoned, 3),
}


# The verbs


@dataclass(frozen=True)
class AskConfig(AnswerFromConfig):
    """What to ask, and of what."""

    question: tuple[str, ...] = ()  # the question
    documents: Path | None = None  # a folder of documents to search in place of the course
    library: bool = False  # also the docstrings of Python's standard library, which takes some seconds more

    def __post_init__(self) -> None:
        super().__post_init__()
        check_query(" ".join(self.question))


def ask(config: AskConfig, run: RunConfig) -> None:
    """Answer a question from this course and Python's reference, or from a folder, with the places; or say that not."""
    if config.documents:
        documents, refusals = load_folder(config.documents)
        for refusal in refusals:
            print(f"left out {refusal.source}: {refusal.reason}")
        if not documents:
            raise ValueError(f"{config.documents} holds no documents that can be read; give a folder of text files")
    else:
        documents = [*course_documents(), *(python_docstrings() if config.library else ())]
    index = DocumentIndex()
    index.add(SHARED, documents)
    print(render_text(answer_from(index, " ".join(config.question), [SHARED], config)))


@dataclass(frozen=True)
class EncoderConfig(DenseConfig):
    """How the encoder of passages is trained."""


@alone
def encoder(config: EncoderConfig, run: RunConfig) -> None:
    """Train the encoder on the course and Python's reference, and save an index with its vectors in --out."""
    chunks, words = shelf_words(course_documents())
    announce(f"train an encoder on {len(chunks):,} passages, {config.max_steps} steps", 0.2 * config.max_steps)
    model, log = train_encoder(chunks, config, run.seed)
    print(f"loss {log[-1]['loss']:.3f} nats; guessing costs {math.log(config.batch_size):.3f}")
    index = DocumentIndex(model)
    index.add(SHARED, course_documents())
    index.save(run.out / "index")
    for way in ("words", "vectors", "hybrid"):
        scores = [
            judge_index(index, way, [item for item in course_questions() if chosen(item)]) for chosen in GROUPS.values()
        ]
        print(f"{way:8}" + "".join(f" {name} {score:.1%}" for name, score in zip(GROUPS, scores, strict=True)))


def judge_index(index: DocumentIndex, way: str, questions: Sequence[CourseQuestion]) -> float:
    """success@5 of a whole index."""
    found = 0
    for item in questions:
        hits = index.search(item.question, [SHARED], k=5, way=way)
        found += any(
            hit.chunk.source == item.chapter and hit.chunk.headings[-1:] and hit.chunk.headings[-1] in item.sections
            for hit in hits
        )
    return found / len(questions)


RAG_VERBS: dict[str, tuple[Any, ...]] = {  # for the command line of the topic
    "ask": (ask, AskConfig, RunConfig),
    "encoder": (encoder, EncoderConfig, RunConfig),
}
