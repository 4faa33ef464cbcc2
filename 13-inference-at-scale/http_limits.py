"""Topic 13 - HTTP Limits: what a client may do to a connection before it is closed - time, size, framing, names.

    uvicorn.Config(app, http=bounded_protocol(HttpLimits()), ...)    # timeouts and framing, below the application
    body = await read_body(request, limits.max_body)                 # 413 before memory is spent
    result = await while_connected(request.receive, work)            # None if the client leaves; the work is cancelled

uvicorn waits without limit for a request that comes byte by byte (slowloris), for a body that never ends, and for a
client that does not read its answer; it reads a request with both Content-Length and Transfer-Encoding, the start of
request smuggling (RFC 9112, section 6.1). An application cannot see these: they happen below it. A client that closes
its own half of a connection counts as one that has left, as uvicorn has it.
"""

import asyncio
import contextlib
import http
import json
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import h11
from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from server_schema import ApiError
from workbench import check_range

T = TypeVar("T")


@dataclass(frozen=True)
class HttpLimits:
    """What one connection may cost."""

    max_body: int = 1_000_000  # bytes of a request's body
    max_head: int = 16_384  # bytes of its first line and headers
    head_timeout: float = 10.0  # seconds in which the headers must have come
    body_timeout: float = 10.0  # seconds in which the body must have come after them
    write_timeout: float = 10.0  # seconds for which a client may leave its answer unread
    send_buffer: int = 65_536  # bytes of an answer that the system holds for a client that does not read
    idle_timeout: int = 30  # seconds for which a connection is kept between two requests
    max_connections: int = 1000  # open at the same time

    def __post_init__(self) -> None:
        check_range(self, "max_body", "max_connections", "idle_timeout", "send_buffer", least=1)
        check_range(self, "max_head", least=1024)
        check_range(self, "head_timeout", "body_timeout", "write_timeout", above=0)


class StrictConnection(h11.Connection):
    """h11's reader of requests, which also refuses heads that are too long and requests with two framings."""

    refusal: tuple[int, str] = (400, "invalid HTTP")

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.refusal = (error.error_status_hint, str(error))
            raise
        if isinstance(event, h11.Request):
            names = [name for name, _ in event.headers]
            if b"content-length" in names and b"transfer-encoding" in names:
                self.refuse(400, "Content-Length and Transfer-Encoding exclude each other")
            # h11 limits what is incomplete; a long head that came in one piece is complete
            n_bytes = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            if n_bytes > self._max_incomplete_event_size:
                self.refuse(
                    431, f"the headers have {n_bytes} bytes, at most {self._max_incomplete_event_size} are read"
                )
        return event

    def refuse(self, status: int, reason: str) -> None:
        self.refusal = (status, reason)
        raise h11.RemoteProtocolError(reason, error_status_hint=status)


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with deadlines: for the head of a request, for its body, and for the client to read."""

    limits = HttpLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER, self.limits.max_head)
        self.phase = "idle"
        self.reading: asyncio.TimerHandle | None = None
        self.writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # The system grows this buffer to megabytes, and what lies in it nobody waits for.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self.follow()

    def connection_lost(self, exc: Exception | None) -> None:
        cancel(self.reading, self.writing)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.follow()  # of a request that was sent behind this one a part may be here already

    def follow(self) -> None:
        """Start the clock of the phase that the request is in now; each phase has one, however many pieces come."""
        state, phase, seconds = self.conn.their_state, "complete", 0.0
        if state is h11.SEND_BODY:
            phase, seconds = "body", self.limits.body_timeout
        elif state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):  # else it is kept for a next one
            phase, seconds = "head", self.limits.head_timeout
        if phase != self.phase:
            self.phase = phase
            cancel(self.reading)
            self.reading = self.loop.call_later(seconds, self.give_up_reading) if seconds else None

    def give_up_reading(self) -> None:
        limit = {"head": self.limits.head_timeout, "body": self.limits.body_timeout}.get(self.phase, 0)
        self.refuse(408, f"the {self.phase} of the request did not come within {limit:g} s")

    def send_400_response(self, msg: str) -> None:
        self.refuse(*self.conn.refusal)

    def refuse(self, status: int, reason: str) -> None:
        """Answer below the application, if nothing of an answer was sent, and close."""
        cycle = self.cycle
        own = cycle is not None and (self.phase == "body" or not cycle.response_complete)  # else of the request before
        if not (own and cycle.response_started or self.transport.is_closing()):
            body = json.dumps(ApiError(status, reason, "invalid_http").content()).encode()
            head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def pause_writing(self) -> None:
        """The transport's buffer is full: from now on the client has its time to read."""
        super().pause_writing()
        self.writing = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        cancel(self.writing)
        super().resume_writing()


def bounded_protocol(limits: HttpLimits) -> type[BoundedProtocol]:
    """The class of connections with these limits, for uvicorn's setting `http`."""
    return type("Bounded", (BoundedProtocol,), {"limits": limits})


def cancel(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()


# For applications


async def read_body(request: Request, max_body: int) -> bytes:
    """The body of a request. Raises ApiError 413 as soon as it is known to be longer, whether it says so or not."""
    too_long = ApiError(413, f"the body has more than {max_body} bytes", "body_too_large")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared[:20]) > max_body:
        raise too_long
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_body:
            raise too_long
    return bytes(body)


async def while_connected(receive: Callable[[], Awaitable[dict]], work: Coroutine[Any, Any, T]) -> T:
    """The result of the work; ClientDisconnect if the client leaves first, and then the work is cancelled.

    receive: the request's, whose body has been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(until_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def until_disconnect(receive: Callable[[], Awaitable[dict]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
