"""E-mails as texts: what is read of a mail, what is not, and that no mail is refused."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexp.data.mail import LONGEST, read_mail

PARTS = b"""Subject: Two of one
Content-Type: multipart/alternative; boundary="="

Preamble.
--=
Content-Type: text/%s

%s
--=
Content-Type: text/html

<p>As a page</p>
--=--
"""


def mail(body: bytes, *headers: str) -> bytes:
    return "\n".join(["Subject: Hello", *headers, "", ""]).encode() + body


def test_only_subject_and_body_are_read() -> None:
    raw = mail(
        b"First  line\r\n\tof two.\n",
        "From: ann@example.org",
        "X-Spam-Status: Yes, hits=9.9",
        "Received: from a by b",
    )
    assert read_mail(b"From ann  Thu Aug 22 12:36:23 2002\n" + raw) == (
        "Hello\nFirst line of two.",
        "direct",
    )


def test_a_text_without_subject_or_body() -> None:
    assert read_mail(b"To: bob@example.org\n\nOnly a body")[0] == "Only a body"
    assert read_mail(mail(b" \n"))[0] == "Hello"
    assert read_mail(b"") == ("", "direct")


def test_long_mails_are_cut() -> None:
    text, _ = read_mail(mail(b"friend " * 1000))
    assert text.startswith("Hello\nfriend friend")
    assert len(text) == LONGEST - 1  # character 1,000 was a space


@pytest.mark.parametrize(
    ("kind", "first", "text"),
    [
        (b"plain", b"As text", "As text"),
        (b"plain", b"  ", "As a page"),
        (b"plain\nContent-Disposition: attachment", b"As a file", "As a page"),
        (b"calendar", b"BEGIN:VCALENDAR", "As a page"),
    ],
)
def test_the_first_plain_part_else_the_page(kind: bytes, first: bytes, text: str) -> None:
    assert read_mail(PARTS % (kind, first))[0] == f"Two of one\n{text}"


PAGE = b"""<html><head><title>Sale</title><style>p {color: red}</style></head>
<!-- <b>unseen</b> --><body><p class="a">Vi<!-- x -->ew&nbsp;3 &lt; 4<br/>now</p>
<SCRIPT>if (a < b) open()</SCRIPT></body></html>"""


@pytest.mark.parametrize("kind", ["html", "plain"])  # some pages say that they are plain
def test_tags_are_removed(kind: str) -> None:
    text, _ = read_mail(mail(PAGE, f"Content-Type: text/{kind}"))
    assert text == "Hello\nSale View 3 < 4 now"


def test_a_plain_text_keeps_its_angles() -> None:
    assert read_mail(mail(b"<ann@b.c> wrote: a < b"))[0] == "Hello\n<ann@b.c> wrote: a < b"


def test_the_verdict_of_a_filter_is_removed() -> None:
    raw = mail(b"PAM: Start\nSPAM: Content analysis (9.9 hits)\r\nSPAM: \nDear friend,\nno SPAM: x")
    assert read_mail(raw)[0] == "Hello\nDear friend, no SPAM: x"


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("base64", base64.encodebytes("naïve café".encode())),
        ("quoted-printable", b"na=C3=AFve caf=\n=C3=A9"),
        ("8bit", "naïve café".encode()),
    ],
)
def test_encodings_of_a_body(encoding: str, body: bytes) -> None:
    headers = ("Content-Type: text/plain; charset=utf-8", f"Content-Transfer-Encoding: {encoding}")
    assert read_mail(mail(body, *headers))[0] == "Hello\nnaïve café"


@pytest.mark.parametrize(
    ("charset", "body", "text"),
    [
        ("us-ascii", b"caf\xe9 \x80", "café €"),
        ("default_charset", b"caf\xe9", "café"),
        ("hex", b"caf\xe9", "café"),
        ("undefined", b"caf\xe9", "café"),
        ("utf-8", b"caf\xe9!", "caf\ufffd!"),
        ("windows-1252", b"a\x81b", "a\ufffdb"),
        ("big5", "免費".encode("big5"), "免費"),
    ],
)
def test_charsets_that_are_absent_wrong_or_broken(charset: str, body: bytes, text: str) -> None:
    assert read_mail(mail(body, f"Content-Type: text/plain; charset={charset}"))[0] == (
        f"Hello\n{text}"
    )


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        (b"=?iso-8859-1?Q?Caf=E9?= at\n =?utf-8?B?w6k=?=", "Café at é"),
        (b"Caf\xe9", "Café"),
        (b"=?nonsense?Q?Caf=E9?=", "Café"),
        (b"=?utf-8?B?w?=", "=?utf-8?B?w?="),
        (b"Folded\n  over lines", "Folded over lines"),
    ],
)
def test_subjects(subject: bytes, text: str) -> None:
    assert read_mail(b"Subject: " + subject + b"\n\nBody")[0] == f"{text}\nBody"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("List-Id: Irish Linux Users' Group <ilug.linux.ie>", "ilug"),
        ("List-ID: <freebsd-ports.FreeBSD.ORG>", "freebsd-ports"),
        ("List-Id: See http://a.example/\n    <Talk.example.net>", "talk"),
        ("List-Id: without brackets", "direct"),
        ("X-Loop: ilug@linux.ie", "direct"),
    ],
)
def test_the_list_of_a_mail(header: str, name: str) -> None:
    assert read_mail(mail(b"x", header))[1] == name


HEADERS = st.sampled_from(
    [
        b"Content-Type: multipart/mixed; boundary=b\n",
        b"Content-Type: text/html; charset=\x00\n",
        b"Content-Transfer-Encoding: base64\n",
        b"Content-Transfer-Encoding: x-uuencode\n",
        b"Subject: =?utf-8?B?",
        b"Subject: =?idna?Q?a=ff..b?=\n",
        b"\n--b\n",
        b"\n\n",
    ]
)


@given(st.lists(HEADERS | st.binary(max_size=30), max_size=8))
def test_no_bytes_are_refused(pieces: list[bytes]) -> None:
    text, name = read_mail(b"".join(pieces))
    assert len(text) <= LONGEST
    assert name == name.lower()
