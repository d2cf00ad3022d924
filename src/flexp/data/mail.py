"""Raw e-mails as short texts: the subject and the beginning of the body, no other header."""

from __future__ import annotations

import html
import re
from email import message_from_bytes
from email.errors import HeaderParseError
from email.header import Header, decode_header
from email.message import Message
from typing import cast

LONGEST = 1000  # characters of a text

_WIDE = "windows-1252"  # what mail in single bytes is when its charset is absent or wrong
_HIDDEN = re.compile(r"<(style|script)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)", re.I | re.S)
_TAG = re.compile(r"</?[a-z!?][^<>]*>", re.I)
_MARKED = re.compile(r"</(?:html|body|table|font|p|a)\s*>", re.I)  # in what calls itself plain, too
_REPORT = re.compile(r"^S?PAM: .*$", re.M)  # a filter's verdict in the body; one lost its S
_LIST = re.compile(r"<([^<>.]+)[^<>]*>")


def read_mail(raw: bytes) -> tuple[str, str]:
    """Text and mailing list of a mail; bytes that fit no charset are replaced, never refused."""
    # The older policy: the newer one parses every header, and fails on some that real mail has.
    mail = message_from_bytes(raw)
    parts = [_folded(_header(mail, "Subject")), _folded(_body(mail))]
    return "\n".join(part for part in parts if part)[:LONGEST].rstrip(), _list(mail)


def _list(mail: Message) -> str:
    """The first word of the List-Id: ``ilug`` of ``Irish Linux Users' Group <ilug.linux.ie>``."""
    found = _LIST.search(_header(mail, "List-Id"))
    return found[1].strip().lower() if found else "direct"


def _body(mail: Message) -> str:
    """The first plain part that is not blank, else the first page of HTML without its tags."""
    page = ""
    for part in mail.walk():
        kind, place = part.get_content_type(), part.get_content_disposition()
        if kind not in {"text/plain", "text/html"} or place == "attachment":
            continue
        text = _content(part)
        if kind == "text/html" or _MARKED.search(text):
            text = html.unescape(_TAG.sub(" ", _HIDDEN.sub("", text)))
        if kind == "text/plain" and text.strip():
            return text
        page = page if page.strip() else text
    return page


def _content(part: Message) -> str:
    data = part.get_payload(decode=True)
    if not isinstance(data, bytes):
        return ""
    return _REPORT.sub("", _decoded(data, part.get_content_charset()))


def _header(mail: Message, name: str) -> str:
    # With raw bytes a header is no text; its type here does not say so.
    value = cast("Header | str", mail.get(name, ""))
    try:
        # Unfolded first, else the space between a word and an encoded word is lost.
        pieces = decode_header(_folded(value) if isinstance(value, str) else value)
    except HeaderParseError:
        return str(value)
    return "".join(
        piece if isinstance(piece, str) else _decoded(piece, charset) for piece, charset in pieces
    )


def _decoded(data: bytes, charset: str | None) -> str:
    if charset is None or charset.lower() in {"ascii", "us-ascii"}:
        charset = _WIDE
    try:
        return data.decode(charset, "replace")
    except (LookupError, ValueError):
        return data.decode(_WIDE, "replace")


def _folded(text: str) -> str:
    return " ".join(text.split())
