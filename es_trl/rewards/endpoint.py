"""An HTTP endpoint that a reward may ask: where it may point, and one JSON question with limits on everything."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import json
import logging
import math
import os
import re
import weakref
from typing import Any
from urllib.parse import parse_qsl, urlsplit


logger = logging.getLogger(__name__)

RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
MAX_PAUSE_SECONDS = 30.0
SECRET_NAME = re.compile("key|token|secret|passw|signature", re.IGNORECASE)


class EndpointError(RuntimeError):
    """A question that was not answered as agreed; the message holds no secret."""


class Endpoint:
    """
    One URL that takes JSON and answers with JSON.

    Redirects are never followed, nor are proxies of the environment used. Requests of one loop share a client.

    Args:
        url (`str`):
            `https://...`, or `http://` to this machine (`localhost`, `127.0.0.1`) or, with `allow_http`, to another.
            No user name, password or key in it.
        token_env (`str`, *optional*):
            Name of the environment variable whose value is sent as a bearer token, if it is set. The value is read at
            each request and kept nowhere. It travels over https or within this machine only.
        timeout (`float`, *optional*, defaults to `60`):
            Seconds for one attempt, from resolving the name to the last byte.
        retries (`int`, *optional*, defaults to `3`):
            Further attempts of one request after a lost connection, a timeout, or one of the statuses 408, 425, 429,
            500, 502, 503, 504; with pauses of 0.5, 1, 2, ... seconds or what `Retry-After` says, at most 30.
        retry_budget (`int`, *optional*, defaults to `100`):
            Further attempts over the life of this object; when they are used up, the next failure is final.
        max_reply_bytes (`int`, *optional*, defaults to `1000000`):
            Longer replies are refused while they arrive.
        concurrency (`int`, *optional*, defaults to `4`):
            Requests in flight at once.
        allow_http (`bool`, *optional*, defaults to `False`):
            Also speak http to another machine, for a server of your own network: whoever is on the way can read it.

    Raises:
        `ValueError`: a URL or number that cannot work.
    """

    def __init__(
        self,
        url: str,
        token_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        retry_budget: int = 100,
        max_reply_bytes: int = 1_000_000,
        concurrency: int = 4,
        allow_http: bool = False,
    ):
        if importlib.util.find_spec("httpx2") is None:
            raise ImportError("a reward or judge behind a URL needs httpx2: pip install 'es-trl[remote]'")
        parts = _check_url(url, allow_http)
        counts = {"retries": (retries, 0), "retry_budget": (retry_budget, 0)}
        counts |= {"max_reply_bytes": (max_reply_bytes, 1), "concurrency": (concurrency, 1)}
        for name, (value, least) in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} of the endpoint must be an integer of at least {least}, not {value!r}")
        if not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout of the endpoint must be a positive number of seconds, not {timeout!r}")
        self.url, self.token_env, self.timeout = url, token_env, timeout
        self.retries, self.retry_budget, self.max_reply_bytes = retries, retry_budget, max_reply_bytes
        self.concurrency = concurrency
        self.host, self.is_loopback = parts.hostname, _is_loopback_name(parts.hostname)
        self._scheme, self._port = parts.scheme, parts.port or (443 if parts.scheme == "https" else 80)
        self._per_loop: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Endpoint({self._scheme}://{self.host}:{self._port})"

    async def ask(self, question: dict[str, Any]) -> Any:
        """
        Post `question`, return the decoded reply.

        Raises:
            `EndpointError`: no usable reply after all attempts. Numbers that are not finite are not JSON.
        """
        body = json.dumps(question, allow_nan=False).encode()
        client, slots = self._client()
        async with slots:
            for attempt in range(self.retries + 1):
                try:
                    return _decode(await self._post(client, body), self)
                except _Retry as failure:
                    if attempt == self.retries or self.retry_budget <= 0:
                        spent = " and the retry budget is used up" if attempt < self.retries else ""
                        raise EndpointError(
                            self.hide(f"{self}: {failure} (attempt {attempt + 1}{spent})")
                        ) from failure.__cause__
                    self.retry_budget -= 1
                    pause = min(failure.pause or 0.5 * 2**attempt, MAX_PAUSE_SECONDS)
                    logger.warning("%s: %s; trying again in %.1f s", self, self.hide(str(failure)), pause)
                    await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _post(self, client, body: bytes) -> bytes:
        import httpx2

        try:
            async with asyncio.timeout(self.timeout):
                headers = {"Content-Type": "application/json", "Accept": "application/json"}
                headers |= {"Accept-Encoding": "identity"} | self._authorization()
                request = client.build_request("POST", self.url, content=body, headers=headers)
                reply = await client.send(request, stream=True)
                try:
                    return await self._read(reply)
                finally:
                    await reply.aclose()
        except TimeoutError as error:
            raise _Retry(f"no complete answer within {self.timeout:g} s") from error
        except (httpx2.TransportError, httpx2.StreamError) as error:
            raise _Retry(f"{type(error).__name__}: {error}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise EndpointError(self.hide(f"{self}: {type(error).__name__}: {error}")) from None

    async def _read(self, reply) -> bytes:
        if 300 <= reply.status_code < 400:
            raise EndpointError(
                f"{self}: answered with a redirect ({reply.status_code}), which is not followed: give the final URL"
            )
        if reply.headers.get("content-encoding", "identity") != "identity":
            raise EndpointError(f"{self}: the reply is compressed, which was not asked for")
        received = bytearray()
        async for part in reply.aiter_raw():
            received += part
            if len(received) > self.max_reply_bytes:
                raise EndpointError(f"{self}: the reply is longer than max_reply_bytes={self.max_reply_bytes}")
        if reply.status_code in RETRIED_STATUS:
            raise _Retry(
                f"status {reply.status_code}: {_start_of(received)}", _seconds(reply.headers.get("retry-after"))
            )
        if reply.status_code != 200:
            raise EndpointError(self.hide(f"{self}: status {reply.status_code}: {_start_of(received)}"))
        return bytes(received)

    def _authorization(self) -> dict[str, str]:
        token = self._token()
        if not token:
            return {}
        if self._scheme != "https" and not self.is_loopback:
            raise EndpointError(f"{self}: the token of {self.token_env} is not sent over http: use https")
        if not token.isascii() or not token.isprintable():
            raise EndpointError(
                f"{self}: the value of {self.token_env} is no token: it holds a line break or the like"
            )
        return {"Authorization": f"Bearer {token}"}

    def _token(self) -> str:
        return os.environ.get(self.token_env, "").strip() if self.token_env else ""

    def hide(self, text: str) -> str:
        """A server may repeat what it was sent."""
        token = self._token()
        return text.replace(token, "<token>") if token else text

    def _client(self):
        import httpx2

        loop = asyncio.get_running_loop()
        if loop not in self._per_loop:
            client = httpx2.AsyncClient(timeout=None, follow_redirects=False, trust_env=False)
            self._per_loop[loop] = (client, asyncio.Semaphore(self.concurrency))
        return self._per_loop[loop]


class _Retry(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


def _check_url(url: str, allow_http: bool):
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the URL of the endpoint cannot be read: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(
            "the URL of the endpoint must start with https:// (or http:// within this machine) and name a host"
        )
    if parts.username or parts.password:
        raise ValueError(f"the URL of {host!r} holds a user name or password: give a token in an environment variable")
    secret = next((name for name, _ in parse_qsl(parts.query) if SECRET_NAME.search(name)), None)
    if secret:  # a URL stands in configs, logs and cards
        raise ValueError(f"the URL of {host!r} holds a secret ({secret}=...): give it in an environment variable")
    if parts.scheme == "http" and not _is_loopback_name(host) and not allow_http:
        raise ValueError(
            f"http://{host} is not this machine: use https, or allow_http=True for a server of your own network"
        )
    return parts


def _is_loopback_name(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _decode(body: bytes, endpoint: Endpoint) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EndpointError(endpoint.hide(f"{endpoint}: the reply is not JSON ({error}): {_start_of(body)}")) from None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _start_of(body: bytes | bytearray) -> str:
    text = bytes(body[:300]).decode(errors="replace")
    return repr("".join(c if c.isprintable() else " " for c in text)[:120])


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
