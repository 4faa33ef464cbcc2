"""Topic 15 - Real-World Applications: documents that answer questions, with their places, or say that they cannot.

python 15-real-world-applications/real_world_applications.py ask "why divide by sqrt(d)?"   # this course's own chapters
python 15-real-world-applications/real_world_applications.py ask "who was hired?" --documents FOLDER
python 15-real-world-applications/real_world_applications.py encoder   # train the dense retriever
python 15-real-world-applications/real_world_applications.py figures hallucination  # measure

Robertson and Zaragoza 2009 (BM25), Malkov and Yashunin 2016 (HNSW, arXiv 1603.09320), Lewis et al. 2020
(retrieval-augmented generation, arXiv 2005.11401).
"""

from dataclasses import dataclass
from typing import Any

from rag_experiments import RAG_EXPERIMENTS, RAG_VERBS, AskConfig, RagFiguresConfig, ask
from workbench import RunConfig, announce, check_name, run_experiments, run_verbs

QUESTIONS = ("why divide by sqrt(d)?", "what does a KV cache keep?", "who invented the bicycle?")


def demo(run: RunConfig) -> None:
    """Ask the course's own chapters two questions that they answer, and one that they do not."""
    announce("three questions to the course's own chapters", 15)
    for question in QUESTIONS:
        print(f"> {question}")
        ask(AskConfig(question=tuple(question.split())), run)


@dataclass(frozen=True)
class FiguresConfig(RagFiguresConfig):
    """The experiments, and their sizes."""

    only: tuple[str, ...] = ()  # experiments to run; none means all

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.only:
            check_name("experiment", name, RAG_EXPERIMENTS)


def figures(config: FiguresConfig, run: RunConfig) -> None:
    """Run the experiments; write their figures and results.json."""
    run_experiments(RAG_EXPERIMENTS, config.only, config.folder, config, run)


def main(argv: list[str] | None = None) -> None:
    verbs: dict[str, tuple[Any, ...]] = {
        "demo": (demo, RunConfig),
        **RAG_VERBS,
        "figures": (figures, FiguresConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
