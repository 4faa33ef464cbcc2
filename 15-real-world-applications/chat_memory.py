"""Topic 15 - Chat memory: a few named facts that a user asked to keep, which can be seen, changed and erased.

    memory = Memory(); memory.keep("town", "Oslo"); memory.recall("town"); memory.erase("town")
    Memory.of({"town": "Oslo"})                       # from a client, checked like anything else that comes from one
    tools = memory_tools(memory)                      # remember, recall, forget: for chat_tools.call_tool

A fact reaches a model only as the result of a call, in the turn in which it asks for it: it takes no room in the
context otherwise, it is no part of the system's turn, and as a content it is never a role (06's template is built from
ids). What stands in no conversation any more is still here, and what is erased here is nowhere.
"""

import re
from collections.abc import Mapping

from chat_tools import Tool, object_of
from retrieval_answers import safe_text

MAX_FACTS, MAX_NAME, MAX_VALUE = 16, 24, 60  # facts, and characters of a name and of a value
NAME = re.compile(rf"[a-z]{{1,{MAX_NAME}}}")


class Memory:
    """Names and values, in the order in which they were first kept."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}

    @classmethod
    def of(cls, facts: object) -> "Memory":
        """A memory with these facts. Raises ValueError for what `keep` refuses."""
        if not isinstance(facts, Mapping):
            raise ValueError(f"a memory is an object of names and values, got {type(facts).__name__}")
        memory = cls()
        for name, value in facts.items():
            memory.keep(name, value)
        return memory

    def keep(self, name: str, value: str) -> None:
        """Keep a value under a name, in place of an earlier one. Raises ValueError beyond the limits."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"a name is 1 to {MAX_NAME} small letters, got {str(name)[:40]!r}")
        if not isinstance(value, str):
            raise ValueError(f"a value is a text, got {type(value).__name__}")
        value = " ".join(safe_text(value).split())
        if not 1 <= len(value) <= MAX_VALUE:
            raise ValueError(f"a value has 1 to {MAX_VALUE} characters, got {len(value)}")
        if name not in self.facts and len(self.facts) >= MAX_FACTS:
            raise ValueError(f"the memory is full with {MAX_FACTS} facts; forget one first")
        self.facts[name] = value

    def recall(self, name: str) -> str:
        """The value kept under a name. Raises ValueError if there is none."""
        if name not in self.facts:
            raise ValueError(f"nothing is kept as {name[:MAX_NAME]}")
        return self.facts[name]

    def erase(self, name: str) -> None:
        """Forget one fact. Raises ValueError if there is none of this name."""
        self.recall(name)
        del self.facts[name]

    def clear(self) -> None:
        self.facts.clear()


def memory_tools(memory: Memory) -> dict[str, Tool]:
    """The tools by which a model keeps and asks for facts of one conversation."""

    def remember(fact: str) -> str:
        name, _, value = fact.partition(" is ")
        memory.keep(name, value)
        return f"I know your {name} now."

    def recall(name: str) -> str:
        return f"Your {name} is {memory.recall(name)}."

    def forget(name: str) -> str:
        memory.erase(name)
        return f"I forgot your {name}."

    name = {"type": "string", "pattern": f"^{NAME.pattern}$"}
    fact = {
        "type": "string",
        "pattern": rf"^{NAME.pattern} is [A-Za-z0-9.,'/:@+-][A-Za-z0-9 .,'/:@+-]{{0,{MAX_VALUE - 1}}}$",
    }
    tools = (
        Tool("remember", 'Keeps a fact about the user, such as "town is Oslo".', object_of(fact=fact), remember),
        Tool("recall", "Says what was kept under a name.", object_of(name=name), recall),
        Tool("forget", "Forgets what was kept under a name.", object_of(name=name), forget),
    )
    return {tool.name: tool for tool in tools}
