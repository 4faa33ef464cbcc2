"""Topic 06 - The course tokenizer: one byte-level BPE for every later topic, with documents, chats and batches.

    tokenizer = load_course_tokenizer()
    ids = tokenizer.encode("Anna lives in Oslo.")                        # no text becomes a special token
    tokenizer.decode(ids), list(tokenizer.stream(ids))                   # the text, and the text as it comes
    tokenizer.batch(["one", "one two"], pad_side="left")                 # Batch(token_ids, mask), True = may attend
    tokenizer.chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)  # Chat(ids, trained)
    tokenizer.encode_document(document)                                  # DocumentIds(ids, nats)

It is trained by `tokenization_embeddings.py course` and lies in the folder tokenizer/, which transformers loads too.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from byte_level_bpe import DIGITS_RULE, ByteLevelBPE
from python_text import PARTS, python_text
from tiny_world import Document, World, join
from tokenizer_basics import Batch, check_ids, pad_batch, plain_ids, size_of
from workbench import check_name, check_range, write_atomically

FOLDER = Path(__file__).parent / "tokenizer"
PAD, END, IM_START, IM_END, MASK = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
TOOL_CALL, TOOL_RESULT, IM_SEP = "<|tool_call|>", "<|tool_result|>", "<|im_sep|>"
RESERVED = tuple(f"<|reserved_{number}|>" for number in range(5))
COURSE_SPECIAL_TOKENS = (  # ids 0 to 15
    *(PAD, END, IM_START, IM_END, MASK),
    *(FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX),
    *(TOOL_CALL, TOOL_RESULT, IM_SEP),
    *RESERVED,
)
ROLES = ("system", "user", "assistant", "tool")

# The chat of `CourseTokenizer.chat` for transformers' apply_chat_template. It builds a string, so there a user's text
# can spell special tokens; `chat` builds ids. A special token on each side keeps a message's words from merging with
# what stands around it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('unknown role ' + message.role) -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<|tool_call|>' + (call.function | tojson) -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- ('<|tool_result|>' if message.role == 'tool' else '') + message.content + '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant<|im_sep|>' -}}
{%- endif -%}
"""


class Chat(NamedTuple):
    ids: list[int]
    trained: list[bool]  # whether the loss counts this token: what the assistant says, its end included


class DocumentIds(NamedTuple):
    ids: list[int]  # <|endoftext|>, the text, <|endoftext|>
    nats: float | None  # exact surprisal of all that follows the first id; None where it is not known


class CourseTokenizer(ByteLevelBPE):
    """Byte-level BPE with single digits and the special tokens that the later topics need, ids 0 to 15."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special_tokens: tuple[str, ...] = COURSE_SPECIAL_TOKENS,
        rule: str = DIGITS_RULE,
    ):
        super().__init__(vocab, merges, special_tokens, rule)
        first = tuple(self.spellings[token_id] for token_id in range(len(COURSE_SPECIAL_TOKENS)))
        if first != COURSE_SPECIAL_TOKENS or tuple(special_tokens) != COURSE_SPECIAL_TOKENS:
            raise ValueError(f"the first tokens are {first[:3]}..., but the course's special tokens have ids 0 to 15")
        self.pad_id, self.eos_id, self.mask_id = vocab[PAD], vocab[END], vocab[MASK]
        self.bos_id = self.eos_id  # one token stands between documents
        self.im_start_id, self.im_sep_id, self.im_end_id = vocab[IM_START], vocab[IM_SEP], vocab[IM_END]
        self.fim_ids = (vocab[FIM_PREFIX], vocab[FIM_MIDDLE], vocab[FIM_SUFFIX])
        self.tool_call_id, self.tool_result_id = vocab[TOOL_CALL], vocab[TOOL_RESULT]
        self.role_ids = {role: self.encode(role) for role in ROLES}

    def encode_document(self, document: Document | str) -> DocumentIds:
        """A document between two <|endoftext|>, and its exact surprisal if it is TinyWorld's.

        The surprisal of a whole document does not depend on how it is cut: the text has one derivation, and the end
        counts in both. A model spends at least `nats` on average on the ids after the first.
        """
        text, nats = (document, None) if isinstance(document, str) else (document.text, math.fsum(document.surprisal))
        return DocumentIds([self.bos_id, *self.encode(text), self.eos_id], nats)

    def chat(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> Chat:
        """A conversation as ids, built from ids: no content can end its own turn or begin another.

        A message is {"role": ..., "content": ...} with a role of ROLES; an assistant's may have "tool_calls", a list of
        {"function": {"name": ..., "arguments": {...}}}. Raises ValueError for another role or a content that is no str.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for number, message in enumerate(messages):
            if not isinstance(message, dict):
                raise ValueError(f"message {number} should be a dict of role and content, got {message!r}")
            role = check_name(f"role in message {number}", message.get("role"), ROLES)
            content, calls = message.get("content"), message.get("tool_calls") or []
            if not isinstance(content, str) and not (content is None and role == "assistant"):
                raise ValueError(f"the content of message {number} should be a str, got {type(content).__name__}")
            if calls and role != "assistant":
                raise ValueError(f"message {number} has tool_calls, but only an assistant calls tools, not the {role}")
            if not all(isinstance(call, dict) and "function" in call for call in calls):
                raise ValueError(f'a tool call of message {number} should be {{"function": ...}}, got {calls!r}')
            header = [self.im_start_id, *self.role_ids[role], self.im_sep_id]
            body = [self.tool_result_id] * (role == "tool") + self.encode(content or "")
            for call in calls:
                body += [self.tool_call_id, *self.encode(json.dumps(call["function"], ensure_ascii=False))]
            ids += [*header, *body, self.im_end_id]
            trained += [False] * len(header) + [role == "assistant"] * (len(body) + 1)
        if add_generation_prompt:
            prompt = [self.im_start_id, *self.role_ids["assistant"], self.im_sep_id]
            ids, trained = ids + prompt, trained + [False] * len(prompt)
        return Chat(ids, trained)

    def batch(
        self,
        rows: Sequence[str] | Sequence[list[int]],
        max_seq_len: int | None = None,
        pad_side: str = "right",
        cut_side: str = "right",
    ) -> Batch:
        """Texts or rows of ids as one tensor, filled up with <|pad|>; see `pad_batch`. ValueError for strange ids."""
        if isinstance(rows, str):
            raise ValueError("a batch is a list of texts or of rows of ids, got one str; put it into a list")
        ids = [self.encode(row) if isinstance(row, str) else list(plain_ids(row)) for row in rows]
        for row in ids:
            check_ids(row, self.spellings)
        return pad_batch(ids, self.pad_id, max_seq_len, pad_side, cut_side)

    def save_folder(self, folder: Path) -> None:
        """Write what AutoTokenizer.from_pretrained reads: tokenizer.json, its settings, the chat template."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "pad_token": PAD,
            "mask_token": MASK,
            "extra_special_tokens": [token for token in COURSE_SPECIAL_TOKENS if token not in (PAD, END, MASK)],
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
        }
        self.save(folder / "tokenizer.json")
        write_atomically(folder / "tokenizer_config.json", (json.dumps(settings, indent=1) + "\n").encode())
        write_atomically(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())


def load_course_tokenizer(folder: Path = FOLDER) -> CourseTokenizer:
    """The tokenizer of the course, or one that the verb `course` wrote elsewhere."""
    return CourseTokenizer.load(Path(folder) / "tokenizer.json")


# Training


@dataclass(frozen=True)
class CourseConfig:
    vocab_size: int = 2048  # tokens, the 16 special ones and the 256 bytes included
    n_documents: int = 20_000  # TinyWorld documents to train on
    n_instructions: int = 2_000  # TinyWorld instructions, with the names of the roles
    python: bool = True  # also the Python reference, docstrings and functions of this Python installation

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", least=256 + len(COURSE_SPECIAL_TOKENS))
        check_range(self, "n_documents", least=1)
        check_range(self, "n_instructions", least=0)


def course_texts(config: CourseConfig) -> dict[str, list[str]]:
    """What the course tokenizer is trained on: the training side of TinyWorld and of the Python text."""
    world = World()
    instructions = world.instructions(config.n_instructions, 1, "train")
    return {
        "TinyWorld documents": [document.text for document in world.documents(config.n_documents, 1, "train")],
        "TinyWorld instructions": [
            text
            for instruction in instructions
            for text in ("user", join(instruction.prompt), "assistant", join(instruction.answer[:-1]))
        ],
        "Python text": python_text("train", PARTS) if config.python else [],
    }


def train_course_tokenizer(texts: Iterable[str], vocab_size: int) -> CourseTokenizer:
    return CourseTokenizer.train(texts, vocab_size, COURSE_SPECIAL_TOKENS, rule=DIGITS_RULE)


def bytes_per_token(encode: Callable[[str], list[int]], texts: Iterable[str]) -> float:
    texts = list(texts)
    return size_of(texts) / sum(len(encode(text)) for text in texts)


def course_card(tokenizer: CourseTokenizer, texts: dict[str, list[str]], folder: Path, command: str) -> str:
    """What a reader of the folder wants to know: the data, the command, the sizes and the hash."""
    data = (folder / "tokenizer.json").read_bytes()
    unseen = {
        "TinyWorld": [document.text for document in World().documents(500, 2, "validation")],
        "Python reference and docstrings": python_text("validation")[:500],
        "Python functions": python_text("validation", ["functions"])[:200],
    }
    rows = [f"| {name} | {bytes_per_token(tokenizer.encode, found):.2f} |" for name, found in unseen.items()]
    sizes = [f"| {name} | {sum(map(len, found)) / 1e6:.2f} |" for name, found in texts.items() if found]
    special = ", ".join(f"`{token}` {token_id}" for token_id, token in enumerate(COURSE_SPECIAL_TOKENS))
    lines = [
        "# The course tokenizer",
        "",
        f"Byte-level BPE, {len(tokenizer.vocab)} tokens, every digit a token of its own. Made by",
        "",
        f"    {command}",
        "",
        "from the training side of",
        "",
        *("| Data | MB |", "|:--|--:|", *sizes),
        "",
        "On held-out text:",
        "",
        *("| Text | Bytes per token |", "|:--|--:|", *rows),
        "",
        f"Special tokens and their ids: {special}.",
        "",
        "`<|endoftext|>` begins and ends documents.",
        "`<|im_start|>` role `<|im_sep|>` content `<|im_end|>` is a turn of a chat.",
        "",
        "The Python text differs a little between Python versions, so another version makes another file: this one is",
        "the truth, and the course's models were trained with it.",
        "",
        f"tokenizer.json: {len(data)} bytes, sha256 `{sha256(data).hexdigest()}`",
    ]
    return "\n".join(lines) + "\n"
