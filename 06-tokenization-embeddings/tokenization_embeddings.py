"""Topic 06 - Tokenization and Embeddings: byte-level BPE, WordPiece and Unigram from scratch, equal to `tokenizers`.

python 06-tokenization-embeddings/tokenization_embeddings.py          # three tokenizers, trained on Python's own texts
python 06-tokenization-embeddings/tokenization_embeddings.py train --vocab-size 4096
python 06-tokenization-embeddings/tokenization_embeddings.py bench    # beside the Rust library, in one run

Papers: Sennrich et al. 2016 (BPE), Wu et al. 2016 (WordPiece), Kudo 2018 (Unigram), Provilkov et al. 2020 (dropout).
Each tokenizer saves and loads the `tokenizer.json` of the Hugging Face library.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from byte_level_bpe import (
    BYTE_CHARS,
    CHAR_BYTES,
    GPT2_PATTERN,
    ByteLevelBPE,
    merge_all,
    merge_in_words,
    train_merges,
    train_merges_naively,
)
from python_text import load_texts
from tokenizer_basics import (
    Span,
    Token,
    WordCutter,
    check_ids,
    check_text,
    check_vocab,
    read_tokenizer_json,
    split_special,
    tokenizer_json,
)
from unigram import (
    Edges,
    Unigram,
    best_cuts,
    digamma,
    edges_of,
    expected_counts,
    forward_scores,
    log_sum,
    metaspace_words,
    prune_pieces,
    reachable,
    seed_pieces,
    train_unigram,
)
from wordpiece import WordPiece, bert_words, is_chinese, is_punctuation
from workbench import (
    RunConfig,
    announce,
    check_range,
    describe_machine,
    run_verbs,
    seed_everything,
    shown,
    speed_ratio,
    time_in_turns,
)

__all__ = [  # the whole topic under one name: from tokenization_embeddings import ByteLevelBPE
    "BYTE_CHARS",
    "CHAR_BYTES",
    "GPT2_PATTERN",
    "ByteLevelBPE",
    "Edges",
    "Span",
    "Token",
    "Unigram",
    "WordCutter",
    "WordPiece",
    "best_cuts",
    "bert_words",
    "check_ids",
    "check_text",
    "check_vocab",
    "digamma",
    "edges_of",
    "expected_counts",
    "forward_scores",
    "is_chinese",
    "is_punctuation",
    "log_sum",
    "merge_all",
    "merge_in_words",
    "metaspace_words",
    "prune_pieces",
    "reachable",
    "read_tokenizer_json",
    "seed_pieces",
    "split_special",
    "tokenizer_json",
    "train_merges",
    "train_merges_naively",
    "train_unigram",
]


# The verbs


KINDS: dict[str, Callable] = {"bpe": ByteLevelBPE, "wordpiece": WordPiece, "unigram": Unigram}


@dataclass(frozen=True)
class TrainConfig:
    data: str = "python-text"  # python-text, tiny-world, a file, or a Hugging Face data set
    kind: str = "bpe"  # bpe, wordpiece or unigram
    vocab_size: int = 1024  # tokens, the special ones included
    n_bytes: int = 300_000  # of the training texts, at most

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", "n_bytes", least=1)
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose from {', '.join(KINDS)}")


@dataclass(frozen=True)
class EncodeConfig:
    texts: tuple[str, ...] = ()  # what to cut into tokens

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError('give at least one text, such as: encode "Tokens are not words."')


@dataclass(frozen=True)
class BenchConfig:
    n_bytes: int = 1_000_000  # of text; repeated if there is less
    vocab_size: int = 4096  # of the trained tokenizers
    n_naive: int = 20  # merges of the naive trainer that are timed; its time for all is the mean times their number
    n_rounds: int = 3  # times each piece of work is timed

    def __post_init__(self) -> None:
        check_range(self, "n_bytes", "n_naive", "n_rounds", least=1)
        check_range(self, "vocab_size", least=257)


def some_texts(data: str, split: str, n_bytes: int) -> list[str]:
    """Texts of a split until they hold `n_bytes`, or all of them."""
    texts, size = [], 0
    for text in load_texts(data, split):
        texts.append(text)
        size += len(text.encode())
        if size >= n_bytes:
            break
    return texts


def demo(config: TrainConfig, run: RunConfig) -> None:
    """Train the three tokenizers on the same texts and show how they cut, and how far they compress unseen text."""
    announce(f"train three tokenizers of {config.vocab_size} tokens on {config.data}", 25)
    seed_everything(run.seed)
    texts = some_texts(config.data, "train", config.n_bytes)
    unseen = some_texts(config.data, "validation", config.n_bytes // 10)
    n_bytes, n_chars = sum(len(text.encode()) for text in unseen), sum(map(len, unseen))
    example = unseen[0][:60]
    print(f"{n_bytes} bytes of unseen text; one byte a token is 1.00, and decoding must give the text back")
    for kind, tokenizer_cls in KINDS.items():
        tokenizer = tokenizer_cls.train(texts, config.vocab_size)
        encoded = [tokenizer.encode(text) for text in unseen]
        same = sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, unseen, strict=True))
        n_tokens = sum(map(len, encoded))
        cut = "|".join(example[slice(*token.span)] for token in tokenizer.tokens(example))
        print(
            f"{kind:10} {n_bytes / n_tokens:5.2f} bytes and {n_chars / n_tokens:5.2f} characters a token; "
            f"{same} of {len(unseen)} texts come back; {cut!r}"
        )


def train(config: TrainConfig, run: RunConfig) -> None:
    """Train one tokenizer and save it as tokenizer.json."""
    announce(f"train a {config.kind} tokenizer of {config.vocab_size} tokens on {config.data}", 10)
    tokenizer = KINDS[config.kind].train(some_texts(config.data, "train", config.n_bytes), config.vocab_size)
    path = run.out / f"{config.kind}.json"
    tokenizer.save(path)
    print(f"wrote {shown(path)}: {len(tokenizer.vocab)} tokens")


def encode(config: EncodeConfig, kind: TrainConfig, run: RunConfig) -> None:
    """Cut texts with the tokenizer that the verb train saved."""
    tokenizer = KINDS[kind.kind].load(run.out / f"{kind.kind}.json")
    for text in config.texts:
        tokens = tokenizer.tokens(text)
        print(" ".join(f"{text[slice(*token.span)]!r}:{token.token_id}" for token in tokens))


def bench(config: BenchConfig, run: RunConfig) -> None:
    """Training and encoding of byte-level BPE beside the Rust library and the naive trainer, in one run, as ratios."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = some_texts("python-text", "train", config.n_bytes)
    size = sum(len(text.encode()) for text in texts)
    texts *= math.ceil(config.n_bytes / size)
    announce(f"time byte-level BPE on {config.n_bytes / 1e6:g} MB", 60 * config.n_bytes / 1e6)

    def rust() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    def ours() -> ByteLevelBPE:
        return ByteLevelBPE.train(texts, config.vocab_size)

    words: Counter = Counter(word for text in texts for word in GPT2_PATTERN.findall(text))
    spelled = {tuple(BYTE_CHARS[byte] for byte in word.encode()): count for word, count in words.items()}
    seconds = time_in_turns({"ours": ours, "rust": rust}, config.n_rounds)
    before = time.perf_counter()
    train_merges_naively(spelled, config.n_naive)
    naive = (time.perf_counter() - before) / config.n_naive * (config.vocab_size - 256)
    print(describe_machine())
    print(f"training {config.vocab_size} tokens: {speed_ratio(seconds['ours'], seconds['rust'])} of tokenizers (Rust)")
    mean = sum(seconds["ours"]) / len(seconds["ours"])
    print(f"  {naive / mean:.0f}x the speed of the naive trainer (its time from {config.n_naive} merges)")
    trained, library = ours(), rust()

    def encode_ours() -> None:
        trained.word_ids.cache_clear()
        for text in texts:
            trained.encode(text)

    seconds = time_in_turns({"ours": encode_ours, "rust": lambda: library.encode_batch(texts)}, config.n_rounds)
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"encoding: {n_bytes / 1e6 / (sum(seconds['ours']) / len(seconds['ours'])):.2f} MB/s")
    print(f"  {speed_ratio(seconds['ours'], seconds['rust'])} of tokenizers (Rust)")


def main(argv: list[str] | None = None) -> None:
    verbs = {
        "demo": (demo, TrainConfig, RunConfig),
        "train": (train, TrainConfig, RunConfig),
        "encode": (encode, EncodeConfig, TrainConfig, RunConfig),
        "bench": (bench, BenchConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
