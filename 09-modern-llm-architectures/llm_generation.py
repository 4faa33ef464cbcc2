"""Topic 09 - Generation: text in, text out, for a folder with weights and the folder's own tokenizer.json.

python 09-modern-llm-architectures/modern_llm_architectures.py generate --checkpoint folder --prompt "One morning"

The tokenizer is read by the `tokenizers` library, which every published folder is written for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sequence_modeling import FIRST_TOKENS, Vocabulary
from workbench import ROOT, shown, write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from modern_llm_architectures import CausalLM

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class PromptConfig:
    """What to continue, and with which model."""

    checkpoint: Path = ROOT / "runs" / "modern_llm_architectures"  # a Hugging Face folder; else what the demo saved
    prompt: str = ""  # text to continue; empty starts a new one


def load_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer.json of a folder. Raises ValueError, with the reason, if there is none that loads."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{shown(folder)} has no {TOKENIZER}; copy the model's own there")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception for whatever it meets
        raise ValueError(f"{shown(path)} does not load: {' '.join(str(error).split())}") from None


def save_word_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json for a vocabulary of whole words, such as TinyWorld's, which puts <bos> before a text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(vocabulary.ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":"), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in FIRST_TOKENS])
    first = ("<bos>", vocabulary.ids["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[first])
    write_atomically(folder / TOKENIZER, tokenizer.to_str(pretty=False).encode())


def encode_prompt(text: str, tokenizer: "Tokenizer", model: "CausalLM") -> list[int]:
    """The ids of a prompt, with what the tokenizer puts before it; the model's bos_id if that is nothing at all.

    Raises ValueError for words that the tokenizer does not know, for ids that the model does not have, and for a prompt
    that leaves no room for an answer.
    """
    config, encoded = model.config, tokenizer.encode(text)
    unknown = [
        text[start:stop]
        for token, (start, stop) in zip(encoded.tokens, encoded.offsets, strict=True)
        if token == getattr(tokenizer.model, "unk_token", None) and text[start:stop] != token
    ]
    if unknown:
        raise ValueError(f"the tokenizer does not know {', '.join(map(repr, unknown[:3]))}; use other words")
    ids = encoded.ids or [config.bos_id]
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {max(ids)} but the model has vocab_size {config.vocab_size}: not a pair"
        )
    if len(ids) >= config.max_seq_len and not config.window_size and config.rope_scaling.kind != "dynamic":
        raise ValueError(f"the prompt has {len(ids)} tokens; this model reads at most {config.max_seq_len} in all")
    return ids


def room_for(model: "CausalLM", n_prompt: int, wanted: int) -> int:
    """How many new tokens fit behind a prompt, `wanted` at most."""
    config = model.config
    if config.window_size or config.rope_scaling.kind == "dynamic":
        return wanted
    return min(wanted, config.max_seq_len - n_prompt)


def text_pieces(steps: Iterable[Tensor], ids: list[int], tokenizer: "Tokenizer") -> Iterator[str]:
    """The text of the first row as it grows, the prompt first; a character that is not complete yet waits.

    steps: ids (batch, 1) as `CausalLM.stream` gives them. All pieces together are the text of all ids.
    """
    ids, said = list(ids), tokenizer.decode(ids)
    yield said
    for step in steps:
        ids.append(int(step[0, 0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd") and text.startswith(said):
            yield text[len(said) :]
            said = text
    text = tokenizer.decode(ids)
    yield text[len(said) :] if text.startswith(said) else ""
