"""Alerts through real local servers: HTTP and SMTP."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from datetime import datetime
from email import message_from_string
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from metapeft.errors import UserError
from metapeft.monitoring import channels

ALERT = {
    "key": "regret",
    "severity": "critical",
    "title": "The first choice is further from the best than promised",
    "text": "Of what was tried, the first choice was 7.0 points below the best; 3.0 were promised, over 20 decisions.",
    "do": "fit anew",
    "since": "2026-03-01T10:30:00.000000+00:00",
    "value": 0.07,
    "expected": 0.03,
    "chance": 0.004,
    "kinds": ["reviews (12)", "my-task (like sms_spam) (8)"],
    "retrain": True,
    "benefit": {},
}
AT = "2026-03-02T00:00:00+00:00"


@pytest.fixture
def web() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """(address, what arrived). Paths that begin with /broken fail."""
    arrived: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(500 if self.path.startswith("/broken") else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", arrived
    server.shutdown()
    server.server_close()


class Mailbox(socketserver.StreamRequestHandler):
    """As much SMTP (RFC 5321) as takes a mail."""

    def handle(self) -> None:
        def say(line: str) -> None:
            self.wfile.write(line.encode() + b"\r\n")

        say("220 here")
        lines: list[str] = []
        while line := self.rfile.readline().decode().rstrip("\r\n"):
            word = line.split()[0].upper()
            if word == "DATA":
                say("354 go on")
                while (part := self.rfile.readline().decode().rstrip("\r\n")) != ".":
                    lines.append(part)
                self.server.mails.append("\n".join(lines))  # type: ignore[attr-defined]
                say("250 taken")
            elif word == "QUIT":
                say("221 bye")
                return
            else:
                self.server.commands.append(line)  # type: ignore[attr-defined]
                say("250 ok")


@pytest.fixture
def mail() -> Iterator[Any]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mailbox) as server:
        server.mails, server.commands = [], []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_webhook_gets_text_for_people_and_the_alert_for_machines(web: tuple[str, list[tuple[str, Any]]]) -> None:
    url, arrived = web
    send = channels.configured({channels.URL: f"{url}/hook"})["webhook"]
    assert send(ALERT, AT, False) and send(ALERT, AT, True)
    (_, raised), (_, over) = arrived
    assert raised["status"] == "firing" and raised["alert"] == ALERT
    for part in ("7.0 points", "Since 2026-03-01 10:30 UTC", "0.4%", "reviews (12)", "What to do: fit anew"):
        assert part in raised["text"], "what, since when, how sure, on which tasks, what to do"
    assert over["status"] == "resolved" and "over" in over["text"]


def test_alertmanager_gets_labels_and_an_end(web: tuple[str, list[tuple[str, Any]]]) -> None:
    url, arrived = web
    send = channels.configured({channels.ALERTMANAGER: url})["alertmanager"]
    assert send(ALERT, AT, False) and send(ALERT, AT, True)
    (path, (raised,)), (_, (over,)) = arrived
    assert path == "/api/v2/alerts" and raised["labels"]["watch"] == "regret" and raised["startsAt"] == AT
    assert datetime.fromisoformat(over["endsAt"]) < datetime.fromisoformat(raised["endsAt"])


def test_a_mail_is_a_mail(mail: Any) -> None:
    given = {
        channels.EMAIL: "a@example.org, b@example.org",
        channels.SMTP: f"smtp://metapeft%40example.org@127.0.0.1:{mail.server_address[1]}",
    }
    assert channels.configured(given)["email"](ALERT, AT, False)
    message = message_from_string(mail.mails[0])
    assert message["To"] == "a@example.org, b@example.org" and message["From"] == "metapeft@example.org"
    assert "further from the best" in message["Subject"] and "What to do: fit anew" in message.get_payload()
    assert sum(c.upper().startswith("RCPT") for c in mail.commands) == 2


def test_a_password_is_not_sent_without_encryption(mail: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        channels.EMAIL: "a@example.org",
        channels.SMTP: f"smtp://me@127.0.0.1:{mail.server_address[1]}",
        channels.PASSWORD: "secret",
    }
    assert not channels.configured(given)["email"](ALERT, AT, False)
    assert mail.mails == [] and not any("AUTH" in c for c in mail.commands)
    assert "encryption" in capsys.readouterr().err


def test_what_cannot_be_delivered_is_said_in_a_line(
    web: tuple[str, list[tuple[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = channels.configured({channels.URL: f"{web[0]}/broken"})["webhook"]
    gone = channels.configured({channels.ALERTMANAGER: "http://127.0.0.1:9"})["alertmanager"]
    nobody = channels.configured({channels.EMAIL: "a@b", channels.SMTP: "smtp://127.0.0.1:9"})["email"]
    assert not any(send(ALERT, AT, False) for send in (broken, gone, nobody))
    said = capsys.readouterr().err
    assert all(name in said for name in (channels.URL, channels.ALERTMANAGER, channels.SMTP))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({channels.URL: "ftp://x/y"}, channels.URL),
        ({channels.ALERTMANAGER: "nonsense"}, channels.ALERTMANAGER),
        ({channels.EMAIL: "a@b"}, channels.SMTP),
        ({channels.EMAIL: "a@b", channels.SMTP: "mail.example:25"}, channels.SMTP),
        ({channels.EMAIL: "a@b", channels.SMTP: "smtp://mail:99999999"}, channels.SMTP),
        ({channels.URL: "http://[::1/x"}, channels.URL),
        ({channels.EMAIL: "a@b", channels.SMTP: "smtp://[::1/x"}, channels.SMTP),
        ({channels.EMAIL: "a@b", channels.SMTP: "smtp://a:secret@mail"}, channels.PASSWORD),
        ({channels.EMAIL: "nobody", channels.SMTP: "smtp://mail"}, channels.EMAIL),
        ({channels.EMAIL: "a@", channels.SMTP: "smtp://mail"}, channels.EMAIL),
        ({channels.EMAIL: "a@b\nBcc: c@d", channels.SMTP: "smtp://mail"}, channels.EMAIL),
    ],
)
def test_wrong_addresses_are_one_sentence(given: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match=name) as refused:
        channels.configured(given)
    assert "secret" not in str(refused.value)
