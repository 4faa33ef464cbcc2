"""Topic 14 - Text model: what an examination asks of a model and its tokenizer, text in and numbers out.

    examined = load_text_model("10-pretraining-llms/model")           # or any Hugging Face folder
    examined.likelihoods([("Sum: 2 + 3 =", " 5.")])                   # [Likelihood(nats, n_tokens, greedy)]
    examined.rolling("One morning ...")                               # TextScore of a text of any length
    examined.complete(["Sum: 2 + 3 ="], until=["."], max_new_tokens=8)

The conventions are those of lm-evaluation-harness, so that numbers agree item by item: a context's last spaces belong
to what follows, context and continuation are tokenised together and then divided, and what is too long loses its
beginning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_tokenizer import COURSE_SPECIAL_TOKENS, CourseTokenizer, load_course_tokenizer
from fine_tuning_adaptation import prompt_ids
from gpt2 import SamplingConfig, left_padded
from huggingface_folders import read_config
from llm_config import FAMILIES
from llm_generation import load_tokenizer
from modern_llm_architectures import CausalLM
from sequence_modeling import device_of
from text_metrics import TextScore, logits_of, token_nats

MOST_LOGITS = 2**26  # of one batch: 256 MiB in float32


class Likelihood(NamedTuple):
    nats: float  # what the continuation costs: -log p
    n_tokens: int
    greedy: bool  # whether always taking the likeliest token writes it


@dataclass
class TextModel:
    """A causal language model with what turns text into its ids and back.

    begin: put bos_id before every text. Right for a model that was trained on documents behind such a token, unless its
    tokenizer writes it already; wrong otherwise, and worth many points either way.
    """

    model: nn.Module
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    bos_id: int
    end_ids: tuple[int, ...]
    max_seq_len: int
    begin: bool = True
    chat: Callable[[str], list[int]] | None = None  # ids of a question as a chat, up to where the assistant speaks
    name: str = "model"
    batch_size: int = 64
    specials: frozenset[int] = field(default_factory=frozenset)  # ids that decode to nothing

    @classmethod
    def of(cls, model: CausalLM, tokenizer: CourseTokenizer, name: str = "model", **options: Any) -> "TextModel":
        """One of the course's models with the course's tokenizer."""
        config = model.config
        ends = (config.eos_id, *config.more_eos_ids, tokenizer.im_end_id)
        options = {"chat": lambda text: prompt_ids(tokenizer, text), "name": name} | options
        sizes = (config.bos_id, tuple(dict.fromkeys(ends)), config.max_seq_len)
        return cls(model.eval(), tokenizer.encode, tokenizer.decode, *sizes, **options)

    def begun(self, text: str) -> list[int]:
        """The ids of a text, with what begins every text."""
        return [self.bos_id] * self.begin + self.encode(text)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it, cut from the ids of both together.

        Tokens may merge over the seam; then those of the two apart are not those of the whole. An empty context is bos.
        Raises ValueError for a continuation without a token of its own.
        """
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        whole = self.begun(context + continuation)
        if not context:
            whole = whole if whole[:1] == [self.bos_id] else [self.bos_id, *whole]
            n_context = 1
        else:
            n_context = len(self.begun(context))
        if len(whole) <= n_context:
            raise ValueError(f"the continuation {continuation!r} adds no token to its context; it cannot be scored")
        return whole[:n_context], whole[n_context:]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """What each continuation costs after its context. Raises ValueError for one longer than the model reads."""
        rows = [self.pair(*pair) for pair in pairs]
        found: list[Likelihood | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
        while order:  # the longest first: what does not fit into memory shows at once
            longest = sum(map(len, rows[order[-1]]))
            n = max(1, min(self.batch_size, MOST_LOGITS // (longest * self.model.config.vocab_size)))
            chosen, order = order[-n:], order[:-n]
            scored = row_likelihoods(self.model, [rows[index] for index in chosen], self.max_seq_len)
            for index, value in zip(chosen, scored, strict=True):
                found[index] = value
        return found

    def rolling(self, text: str, stride: int | None = None) -> TextScore:
        """What a text of any length costs from its first token on; stride None: windows side by side."""
        ids = self.begun(text)
        ids = ids if self.begin else [self.bos_id, *ids]
        nats = token_nats(self.model, ids, self.max_seq_len, stride)
        return TextScore(sum(nats), len(nats), len(text.encode()))

    def complete(
        self, prompts: Sequence[str], until: Sequence[str] = (), max_new_tokens: int = 32, as_chat: bool = False
    ) -> list[str]:
        """What the model writes greedily after each prompt, up to its end, the first stop string or max_new_tokens.

        A prompt that leaves no room for them loses its beginning. Raises ValueError where as_chat is asked of a model
        without a chat template.
        """
        if as_chat and self.chat is None:
            raise ValueError(f"{self.name} has no chat template; ask it a task that is not a chat")
        room = self.max_seq_len - max_new_tokens
        if room < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be below the model's {self.max_seq_len} positions")
        rows = [(self.chat(prompt) if as_chat else self.begun(prompt))[-room:] for prompt in prompts]
        rows = [row or [self.bos_id] for row in rows]
        found, order = [""] * len(rows), sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            made = write_greedily(self, [rows[index] for index in chosen], until, max_new_tokens)
            for index, ids in zip(chosen, made, strict=True):
                found[index] = cut(self.text(ids), until)
        return found

    def text(self, ids: list[int]) -> str:
        """The text of new ids up to the first end."""
        end = next((place for place, token_id in enumerate(ids) if token_id in self.end_ids), len(ids))
        return self.decode([token_id for token_id in ids[:end] if token_id not in self.specials])

    def ended(self, ids: list[int], until: Sequence[str]) -> bool:
        return any(token_id in self.end_ids for token_id in ids) or any(stop in self.text(ids) for stop in until)


@torch.no_grad()
def row_likelihoods(
    model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], max_seq_len: int
) -> list[Likelihood]:
    """Contexts and continuations as ids, in one batch, filled up on the right where nothing looks at it."""
    kept = []
    for context, continuation in rows:
        if len(continuation) > max_seq_len:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, the model reads {max_seq_len}; shorten it"
            )
        kept.append((context + continuation)[-max_seq_len - 1 :])
    width = max(map(len, kept)) - 1
    inputs = torch.zeros(len(kept), width, dtype=torch.long)  # (batch, seq)
    for place, ids in enumerate(kept):
        inputs[place, : len(ids) - 1] = torch.tensor(ids[:-1])
    logits = logits_of(model, inputs.to(device_of(model))).cpu()  # (batch, seq, vocab)
    found = []
    for place, (ids, (_, continuation)) in enumerate(zip(kept, rows, strict=True)):
        n = len(continuation)
        own = logits[place, len(ids) - 1 - n : len(ids) - 1].double()  # (seq, vocab)
        targets = torch.tensor(continuation)
        nats = -own.log_softmax(dim=-1)[torch.arange(n), targets].sum().item()
        found.append(Likelihood(nats, n, bool((own.argmax(dim=-1) == targets).all())))
    return found


@torch.no_grad()
def write_greedily(
    examined: TextModel, rows: list[list[int]], until: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """New ids of each row; stops early when every row has ended or holds a stop string, looked for now and then."""
    token_ids, real = (part.to(device_of(examined.model)) for part in left_padded(rows, examined.bos_id))
    if not isinstance(examined.model, CausalLM):
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": examined.bos_id}
        options |= {"attention_mask": real.long(), "eos_token_id": list(examined.end_ids)}
        return examined.model.generate(token_ids, **options)[:, token_ids.shape[1] :].tolist()
    new: list[Tensor] = []
    for step in examined.model.stream(token_ids, SamplingConfig(max_new_tokens, temperature=0.0), real):
        new.append(step)
        if until and len(new) % 8 == 0:
            made = torch.cat(new, dim=1).tolist()  # (batch, *)
            if all(examined.ended(ids, until) for ids in made):
                break
    return torch.cat(new, dim=1).tolist()  # (batch, *)


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of the stop strings that it holds."""
    for stop in until:
        if stop:
            text = text.partition(stop)[0]
    return text


def load_text_model(folder: Path | str, begin: bool | None = None) -> TextModel:
    """The model and tokenizer of a Hugging Face folder: ours where topic 09 knows the family, else transformers'.

    begin None: put bos before every text if the folder has such a token and its tokenizer does not write it itself.
    Raises ValueError for a folder without weights, config or tokenizer.json. No code from the folder is run.
    """
    folder = Path(folder)
    given, tokenizer = read_config(folder), load_tokenizer(folder)
    if given.get("model_type") in FAMILIES:
        model: nn.Module = CausalLM.from_pretrained(folder)
        config = model.config
        bos_id, ends, longest = config.bos_id, [config.eos_id, *config.more_eos_ids], config.max_seq_len
    else:
        model, bos_id, ends, longest = foreign_model(folder, given)
    ids = [tokenizer.token_to_id(name) for name in COURSE_SPECIAL_TOKENS]
    if isinstance(model, CausalLM) and ids == list(range(len(COURSE_SPECIAL_TOKENS))):
        options = {} if begin is None else {"begin": begin}
        return TextModel.of(model, load_course_tokenizer(folder), folder.name, **options)
    writes_bos = tokenizer.encode("").ids[:1] == [bos_id]
    specials = frozenset(place for place, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return TextModel(
        model,
        lambda text: tokenizer.encode(text).ids,
        lambda ids: tokenizer.decode(ids),
        bos_id,
        tuple(ends),
        longest,
        (given.get("bos_token_id") is not None and not writes_bos) if begin is None else begin,
        foreign_chat(folder),
        folder.name,
        specials=specials,
    )


def foreign_model(folder: Path, given: dict) -> tuple[nn.Module, int, list[int], int]:
    """A model of transformers with its bos, ends and longest sequence."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} does not load: {' '.join(str(error).split())[:200]}") from None
    ends = model.generation_config.eos_token_id or given.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    bos = given.get("bos_token_id")
    first = bos if bos is not None else (ends or [0])[0]
    longest = next((given[key] for key in ("max_position_embeddings", "n_positions") if key in given), 1024)
    return model, first, ends, longest


def foreign_chat(folder: Path) -> Callable[[str], list[int]] | None:
    """What turns a question into ids by the folder's own chat template; None without one."""
    if not (folder / "chat_template.jinja").exists():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def ids(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    return ids
