"""Topic 13 - HTTP Streams: an HTTP client for load and for balancing - one request, its status, its body as it comes.

    async with call("http://127.0.0.1:8000", "POST", "/v1/completions", body=data) as reply:
        async for event in events(reply.pieces): ...         # the data of server-sent events, [DONE] left out

h11, which reads HTTP below uvicorn too, does the parsing; asyncio does the waiting. A connection serves one request.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11


class NoAnswer(Exception):
    """No connection, or one that ended before the answer did."""


@dataclass
class Reply:
    """An answer whose head has come; `pieces` gives its body as it comes."""

    status: int
    headers: dict[str, str]  # names in lower case
    pieces: AsyncIterator[bytes]

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces])


def check_url(url: str) -> str:
    """The address of a server without a slash at its end. Raises ValueError for what is none."""
    parts = urlsplit(url)
    try:
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        right = right and parts.hostname.encode("idna")  # a name that no network can ask for
    except ValueError:
        right = False
    if "@" in parts.netloc:  # never shown: it may hold a secret
        raise ValueError("the address holds a name or password; give the key in the environment variable")
    if not right or parts.query or parts.fragment:
        raise ValueError(f"url={url!r} is no address of a server; write it like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


@contextlib.asynccontextmanager
async def call(
    url: str,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> AsyncIterator[Reply]:
    """One request; the connection is closed at the end of the block, and so the request is given up if it still runs.

    timeout: seconds between two pieces of the answer. Raises NoAnswer.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    given = {"host": parts.netloc, "connection": "close", "content-length": str(len(body))}
    given |= {name.lower(): value for name, value in (headers or {}).items()}
    writer = None
    try:
        connecting = asyncio.open_connection(parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None)
        reader, writer = await asyncio.wait_for(connecting, timeout)
        conn = h11.Connection(h11.CLIENT)
        target = (parts.path + path).encode()
        fields = [(name, value.encode("latin-1")) for name, value in given.items()]  # as a server reads them
        request = h11.Request(method=method, target=target, headers=fields)
        writer.write(
            conn.send(request) + (conn.send(h11.Data(data=body)) or b"") + (conn.send(h11.EndOfMessage()) or b"")
        )
        await asyncio.wait_for(writer.drain(), timeout)
        event = await next_event(conn, reader, timeout)
        while isinstance(event, h11.InformationalResponse):
            event = await next_event(conn, reader, timeout)
        found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers}
        yield Reply(event.status_code, found, pieces_of(conn, reader, timeout))
    except (OSError, h11.ProtocolError) as error:
        raise NoAnswer(f"{method} {url}{path}: {type(error).__name__} {error}".strip()) from None
    finally:
        if writer is not None:
            writer.close()


async def next_event(conn: h11.Connection, reader: asyncio.StreamReader, timeout: float) -> Any:
    """The next part of an answer; h11.RemoteProtocolError for a connection that ends before the answer does."""
    while (event := conn.next_event()) is h11.NEED_DATA:
        conn.receive_data(await asyncio.wait_for(reader.read(65536), timeout))
    return event


async def pieces_of(conn: h11.Connection, reader: asyncio.StreamReader, timeout: float) -> AsyncIterator[bytes]:
    try:
        while not isinstance(event := await next_event(conn, reader, timeout), h11.EndOfMessage):
            yield bytes(event.data)
    except (OSError, h11.ProtocolError) as error:
        raise NoAnswer(f"the answer broke off: {type(error).__name__} {error}".strip()) from None


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream of server-sent events. Raises NoAnswer for a stream that ends without [DONE]."""
    waiting = b""
    async for piece in pieces:
        *whole, waiting = (waiting + piece).split(b"\n\n")
        for event in whole:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise NoAnswer("the stream ended without [DONE]")
