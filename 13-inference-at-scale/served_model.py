"""Topic 13 - Served Model: a folder as a server needs it - text to ids, conversations to ids, and how much fits.

    served = load_served_model(folder)                       # the course chat model's, or any folder topic 09 reads
    served.encode("Anna lives")                              # ids; no text becomes a special token
    served.chat([{"role": "user", "content": "Hi"}])         # ids, up to where the assistant speaks

A chat template of Hugging Face's makes one string of a conversation, in which a user who writes `<|im_end|>` ends his
turn and begins the system's. Here the template is filled with place marks, and each content is encoded on its own.
"""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from course_tokenizer import CourseTokenizer, load_course_tokenizer
from llm_generation import encode_prompt, load_tokenizer
from modern_llm_architectures import CausalLM
from tokenizer_basics import check_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = Sequence[dict[str, str]]


class ServingTokenizer(Protocol):
    """What a server needs of a tokenizer; `decode` is what the engine needs."""

    size: int  # ids
    tokenizer: object  # the one within, whose tokens a constraint reads

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to continue, with what begins a text."""

    def dialogue(self, messages: Messages) -> list[int]:
        """The ids of a conversation up to where the assistant speaks. Raises ValueError where there is no template."""

    def spelling(self, token_id: int) -> bytes:
        """The bytes of one token."""


class CourseServing:
    """The course tokenizer, which builds conversations from ids."""

    def __init__(self, tokenizer: CourseTokenizer) -> None:
        self.tokenizer = tokenizer
        self.decode, self.spelling, self.size = tokenizer.decode, tokenizer.token_bytes, len(tokenizer.vocab)

    def prompt(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def dialogue(self, messages: Messages) -> list[int]:
        return self.tokenizer.chat(messages, add_generation_prompt=True).ids


class FolderServing:
    """Any tokenizer.json, read by the `tokenizers` library, with the folder's chat template if it has one."""

    def __init__(self, folder: Path, model: CausalLM) -> None:
        self.model = model
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.size = self.tokenizer.get_vocab_size()
        self.has_template = (folder / "chat_template.jinja").is_file()
        settings = folder / "tokenizer_config.json"
        if settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8"):
            self.has_template = True
        if self.has_template:  # now: the import takes seconds, and a request would hold up all others
            from transformers import AutoTokenizer

            self.template_tokenizer = AutoTokenizer.from_pretrained(folder)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def spelling(self, token_id: int) -> bytes:
        return self.tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def prompt(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = True  # a special token in a text is spelled out
        return encode_prompt(text, self.tokenizer, self.model)

    def dialogue(self, messages: Messages) -> list[int]:
        if not self.has_template:
            raise ValueError("this model has no chat template; use /v1/completions")
        mark = f"\x02{secrets.token_hex(8)}\x03"  # nobody can write it beforehand
        marked = [{"role": message["role"], "content": mark} for message in messages]
        parts = self.render(marked).split(mark)
        if len(parts) != len(messages) + 1:
            raise ValueError("this model's chat template does not keep every message; send other roles")
        contents = [*(message["content"] for message in messages), ""]
        ids: list[int] = []
        for part, content in zip(parts, contents, strict=True):
            self.tokenizer.encode_special_tokens = False
            ids += self.tokenizer.encode(part, add_special_tokens=False).ids
            self.tokenizer.encode_special_tokens = True
            ids += self.tokenizer.encode(content, add_special_tokens=False).ids
        return ids

    def render(self, messages: Messages) -> str:
        """The template as text. Raises ValueError with its own words for a conversation that it refuses."""
        from jinja2 import TemplateError

        try:
            return self.template_tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(f"this model's chat template refuses the messages: {error}") from None


class ServedModel:
    """A model with its tokenizer and the name that clients call it by."""

    def __init__(self, name: str, model: CausalLM, tokenizer: ServingTokenizer) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.longest_token = max(len(tokenizer.spelling(token_id)) for token_id in range(tokenizer.size))  # bytes

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt. Raises ValueError for a text that no tokenizer takes."""
        check_text(text)
        return self.tokenizer.prompt(text)

    def chat(self, messages: Messages) -> list[int]:
        return self.tokenizer.dialogue(messages)

    def fewest_tokens(self, text: str) -> int:
        """What a text has at least: so that a megabyte is refused before it is encoded."""
        return len(text.encode()) // self.longest_token


def load_served_model(folder: Path, name: str = "") -> ServedModel:
    """A folder in the Hugging Face layout. Raises ValueError, with the reason, for one that does not load."""
    if not folder.is_dir():
        raise ValueError(f"model={folder} is no folder; give one with config.json, model.safetensors, tokenizer.json")
    model = CausalLM.from_pretrained(folder)
    try:
        tokenizer: ServingTokenizer = CourseServing(load_course_tokenizer(folder))
    except ValueError:  # not the course's kind
        tokenizer = FolderServing(folder, model)
    return ServedModel(name or folder.resolve().name, model, tokenizer)
