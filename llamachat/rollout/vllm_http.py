"""HTTP to a vLLM server, with the standard library alone: JSON out, JSON or a stream of JSON events back.

What is sent and read is documented in docs/vllm.md. A connection per request: an answer takes seconds, and a connection
that was kept may have been closed by the server meanwhile. One thing surprises: proxies of the environment are not
used, since a rollout server is on this machine or beside it.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from llamachat.errors import ServerError

CONNECT_S = 10.0
ANSWER_S = 1800.0  # until the next bytes come: a request waits at the server while others are answered
WAITS_S = (0.5, 1.0, 2.0)  # before a request is sent again whose connection was reset
MOST_ERROR_TEXT = 500
RESETS = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, IncompleteRead)


class RefusedError(Exception):
    """The server answered, with another status than 200 and this message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


class Server:
    """A server by its address, http://host:port."""

    def __init__(
        self,
        address: str,
        *,
        connect_s: float = CONNECT_S,
        answer_s: float = ANSWER_S,
        waits_s: Sequence[float] = WAITS_S,
    ) -> None:
        self.address = address.rstrip("/")
        self._url = urlsplit(self.address)
        self._connect_s = connect_s
        self._answer_s = answer_s
        self._waits_s = waits_s

    def get(self, path: str) -> Any:
        """The JSON at this path."""
        return self._json(self._repeated("GET", path, None), path)

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        """The JSON that comes back for this one. Sent again where the connection is reset, so it may be done twice."""
        return self._json(self._repeated("POST", path, content), path)

    def command(self, path: str, content: Mapping[str, Any]) -> None:
        """Sent once, since doing it twice would fail; what comes back is not JSON and says nothing."""
        with self._open("POST", path, content) as response:
            response.read()

    def events(self, path: str, content: Mapping[str, Any]) -> Iterator[Any]:
        """The JSON of each event as it comes (`data: ...` lines, the last of them [DONE])."""
        with self._open("POST", path, content) as response:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip():  # empty lines between events, and comments that keep the connection open
                    continue
                if data == b"[DONE]":
                    return
                yield self._json(data, path)
        raise ServerError(
            f"{self.address}{path}: the answer broke off before it was whole. What came may not be all that was "
            "sampled. Look into the server's log, and run the command again."
        )

    def _repeated(self, method: str, path: str, content: Mapping[str, Any] | None) -> bytes:
        for wait_s in (*self._waits_s, None):
            try:
                with self._open(method, path, content, may_repeat=wait_s is not None) as response:
                    return response.read()
            except RESETS:
                assert wait_s is not None, "the last reset is an error of the server"
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def _open(
        self, method: str, path: str, content: Mapping[str, Any] | None, *, may_repeat: bool = False
    ) -> Iterator[HTTPResponse]:
        """The response to a request; with `may_repeat` a reset comes through as it is."""
        kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=self._connect_s)
        try:
            with self._named_errors(path, may_repeat=may_repeat):
                connection.connect()
                connection.sock.settimeout(self._answer_s)
                body = None if content is None else json.dumps(content).encode()
                connection.request(method, path, body, {"Content-Type": "application/json", "Connection": "close"})
                response = connection.getresponse()
                if response.status != 200:
                    raise RefusedError(response.status, _message(response.read()))
                yield response
        finally:
            connection.close()

    @contextmanager
    def _named_errors(self, path: str, *, may_repeat: bool) -> Iterator[None]:
        where = f"{self.address}{path}"
        try:
            yield
        except RESETS as error:
            if may_repeat:
                raise
            raise ServerError(
                f"{where}: the connection broke before the answer was whole ({_named(error)}), however often it was made "
                "anew. The server has stopped, or something between cuts connections off. Look into its log, start it "
                "again, and run the command again."
            ) from error
        except TimeoutError as error:
            raise ServerError(
                f"{where}: no answer within {self._answer_s:g} s (to connect: {self._connect_s:g} s). An answer comes when "
                "all its tokens are there, so the server hangs, is busy with others' requests or is out of reach. Look "
                "into its log, give it fewer other users, or set a smaller rollout.max_new_tokens."
            ) from error
        except OSError as error:
            raise ServerError(
                f"{where}: no server there ({_named(error)}). rollout.engine vllm takes its answers from a running "
                "`vllm serve`. Start it (docs/vllm.md) and wait until it says that it is ready, or mend rollout.server."
            ) from error
        except HTTPException as error:
            raise ServerError(
                f"{where}: what answers there does not speak HTTP ({_named(error)}). rollout.server is the address of a "
                "`vllm serve`. Mend host, port or http/https."
            ) from error

    def _json(self, content: bytes, path: str) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(
                f"{self.address}{path}: the answer is no JSON ({content[:80]!r}). A vLLM server answers in JSON there. "
                "Set rollout.server to the address of `vllm serve` itself."
            ) from error


def _message(content: bytes) -> str:
    """What an answer with an error says; the shape depends on vLLM's version and on who made it."""
    text = content.decode(errors="replace").strip()
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        inner = found.get("error")
        holder = inner if isinstance(inner, dict) else found
        text = str(holder.get("message") or holder.get("detail") or text)
    return " ".join(text.split())[:MOST_ERROR_TEXT] or "no message"


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
