"""How an alert reaches people. What is configured is used, by environment variables:

    METAPEFT_ALERT_URL          webhook: POST {"text", "alert", "status"} (a chat's incoming webhook reads `text`)
    METAPEFT_ALERT_EMAIL        addresses, separated by commas, through METAPEFT_SMTP
    METAPEFT_SMTP               smtp://USER@HOST:PORT or smtps://…; the password in METAPEFT_SMTP_PASSWORD
    METAPEFT_ALERTMANAGER_URL   Alertmanager: POST /api/v2/alerts

The log always hears of it. A channel that fails says so in a line, and never fails the run.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import smtplib
import socket
import ssl
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from metapeft.errors import UserError
from metapeft.monitoring.alerts import surely
from metapeft.progress import say
from metapeft.settings import shown

URL, EMAIL, SMTP, PASSWORD, ALERTMANAGER = (
    "METAPEFT_ALERT_URL",
    "METAPEFT_ALERT_EMAIL",
    "METAPEFT_SMTP",
    "METAPEFT_SMTP_PASSWORD",
    "METAPEFT_ALERTMANAGER_URL",
)
SECONDS = 10.0
LASTS = timedelta(hours=50)  # an alert that is not posted again is over for Alertmanager: two daily runs may fail

Channel = Callable[[dict[str, Any], str, bool], bool]


def configured(environment: Mapping[str, str] | None = None) -> dict[str, Channel]:
    """Name -> channel. Raises UserError for an address that is none."""
    given = os.environ if environment is None else environment
    found: dict[str, Channel] = {"log": log}
    if url := given.get(URL):
        found["webhook"] = Webhook(_address(url, URL))
    if to := given.get(EMAIL):
        if not given.get(SMTP):
            raise UserError(f"{EMAIL} is set and {SMTP} is not; say where mail goes, such as smtp://mail.example:587")
        found["email"] = _email(to, given[SMTP], given.get(PASSWORD, ""))
    if url := given.get(ALERTMANAGER):
        found["alertmanager"] = Alertmanager(_address(url, ALERTMANAGER))
    return found


def text(alert: Mapping[str, Any], over: bool) -> str:
    """For people: everything in a few lines."""
    if over:
        return f"metapeft: over: {alert['title']}"
    parts = [f"metapeft: {alert['title']}", alert["text"]]
    if alert["since"]:
        parts.append(f"Since {alert['since'][:16].replace('T', ' ')} UTC.")
    if alert["chance"] is not None:
        parts.append(f"How sure: {surely(alert['chance'])}.")
    if alert["kinds"]:
        parts.append(f"On: {', '.join(alert['kinds'])}.")
    return "\n".join([*parts, f"What to do: {alert['do']}"])


def log(alert: dict[str, Any], at: str, over: bool) -> bool:
    """One line on stderr."""
    say(" ".join(text(alert, over).split()))
    return True


@dataclass(frozen=True)
class Webhook:
    url: str

    def __call__(self, alert: dict[str, Any], at: str, over: bool) -> bool:
        body = {"text": text(alert, over), "status": "resolved" if over else "firing", "alert": alert}
        return _posted(self.url, body, "webhook", URL)


@dataclass(frozen=True)
class Alertmanager:
    """Posted again at every run, as Alertmanager expects; it says each alert once by itself."""

    url: str
    repeats = True

    def __call__(self, alert: dict[str, Any], at: str, over: bool) -> bool:
        now = datetime.now(UTC)
        body = [
            {
                "labels": {"alertname": "MetapeftMonitor", "watch": alert["key"], "severity": alert["severity"]},
                "annotations": {"summary": alert["title"], "description": text(alert, over)},
                "startsAt": at,
                "endsAt": (now if over else now + LASTS).isoformat(timespec="seconds"),
            }
        ]
        return _posted(f"{self.url.rstrip('/')}/api/v2/alerts", body, "Alertmanager", ALERTMANAGER)


@dataclass(frozen=True)
class Email:
    to: tuple[str, ...]
    host: str
    port: int
    secure: bool  # TLS from the first byte; otherwise STARTTLS where the server offers it
    user: str
    password: str

    def __call__(self, alert: dict[str, Any], at: str, over: bool) -> bool:
        message = EmailMessage()
        said = text(alert, over)
        try:
            message["Subject"] = said.splitlines()[0]
            message["From"] = self.user if "@" in self.user else f"metapeft@{socket.getfqdn()}"
            message["To"] = ", ".join(self.to)
            message.set_content(f"{said}\n")
            with self._connected() as server:
                server.send_message(message)
            return True
        except (OSError, ValueError, smtplib.SMTPException) as error:
            say(f"monitor: the alert could not be mailed through {self.host} ({error}); see {SMTP}")
            return False

    def _connected(self) -> smtplib.SMTP:
        context = ssl.create_default_context()
        server: smtplib.SMTP
        if self.secure:
            server = smtplib.SMTP_SSL(self.host, self.port, timeout=SECONDS, context=context)
        else:
            server = smtplib.SMTP(self.host, self.port, timeout=SECONDS)
            server.ehlo()
            if server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
            elif self.password:
                raise smtplib.SMTPException("it offers no encryption, and a password is not sent without")
        if self.user and self.password:
            server.login(self.user, self.password)
        return server


def _email(to: str, server: str, password: str) -> Email:
    parts, port = _parts(server)
    if parts is None or parts.scheme not in ("smtp", "smtps") or not parts.hostname:
        raise UserError(f"{SMTP}={shown(server)!r} is no mail server; write smtp://USER@HOST:PORT or smtps://…")
    if parts.password:
        raise UserError(f"{SMTP} holds a password; give it in {PASSWORD}")
    addresses = tuple(address.strip() for address in to.split(",") if address.strip())
    if not addresses or not all(re.fullmatch(r"[^@\s]+@[^@\s]+", address) for address in addresses):
        raise UserError(f"{EMAIL}={to!r}: write addresses separated by commas")
    secure = parts.scheme == "smtps"
    user = unquote(parts.username or "")
    return Email(addresses, parts.hostname, port or (465 if secure else 587), secure, user, password)


def _address(url: str, name: str) -> str:
    parts, _ = _parts(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{name}={url!r} is no http or https address; correct it or unset it")
    return url


def _parts(url: str) -> tuple[SplitResult | None, int | None]:
    """With its port; None: it is no address."""
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        return None, None


def _posted(url: str, body: Any, what: str, name: str) -> bool:
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS):
            return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        say(f"monitor: the {what} did not take the alert ({error}); see {name}")
        return False
