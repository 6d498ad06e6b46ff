"""Personal data and secrets in a text: addresses of e-mail and IP, telephones, cards, keys.

    find(text)             where they are
    redact(text, kinds)    the text with a placeholder for each: <EMAIL>, <IP>

What counts is what a pattern finds and a check confirms, so that few other numbers are taken:

    email   ASCII addresses with a domain of letters
    phone   +COUNTRY NUMBER; numbers of North America with their separators; of China, mobile and
            with an area code
    ip      addresses of the public internet, in both versions; not 1.2.3.4 of a version
    card    12 to 19 digits of a known issuer, whose last digit is the check digit (Luhn, ISO 7812)
    key     private keys (PEM), tokens (JWT) and keys of services that begin as theirs do
"""

import ipaddress
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple


class Found(NamedTuple):
    """What was found: text[start:end] is of a kind."""

    kind: str
    start: int
    end: int


class _Kind(NamedTuple):
    """How a kind is found: by a pattern, whose match a check confirms."""

    pattern: re.Pattern[str]
    check: Callable[[str], bool] = bool


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_card(text: str) -> bool:
    """Luhn's check: every second digit from the right is doubled, and the sum ends with 0."""
    digits = [int(sign) for sign in text if sign.isdigit()][::-1]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return len(digits) >= 12 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_random(key: str) -> bool:
    """A name in the form of a key has no digit, or is the header of a key."""
    return key.startswith("-----") or any(map(str.isdigit, key))


_SERVICES = (
    "(?:AKIA|ASIA)[0-9A-Z]{16}",
    "gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[A-Za-z0-9_-]{20,64}",
    "sk-(?:[a-z]+[0-9]*-){0,2}[A-Za-z0-9_]{20}[A-Za-z0-9_-]{0,200}",
    "[srp]k_(?:live|test)_[A-Za-z0-9]{16,128}|xox[abeprs]-[A-Za-z0-9-]{10,250}",
    "AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}|pypi-AgEI[A-Za-z0-9_-]{50,250}",
    r"eyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,8192}\.[A-Za-z0-9_-]{8,1024}",
)
_PEM = (
    r"-----BEGIN (?P<what>[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:[A-Za-z0-9+/=:,.\s\\-]{0,20000}?-----END (?P=what)-----)?"
)
_SEPARATOR = r"[ .\u00a0-]"
# What a number is not joined to. Letters of other scripts may touch it, as they do in Chinese.
_SIGN = r"\dA-Za-z_"

KINDS = {
    "key": _Kind(
        re.compile(rf"{_PEM}|(?<![A-Za-z0-9_-])(?:{'|'.join(_SERVICES)})(?![A-Za-z0-9_-])"),
        _is_random,
    ),
    "email": _Kind(
        re.compile(
            r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+][A-Za-z0-9._%+-]{0,63}@"
            r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
        )
    ),
    # These begin with a set of signs, which `re` finds quickly, and then ask what stands before it.
    "ip": _Kind(
        re.compile(
            rf"\d(?<![{_SIGN}.+=/-].)(?<![Vv]ersion .)(?<!版本.)(?<!版本 .)(?<!version: .)"
            rf"\d{{0,2}}\.(?:\d{{1,3}}\.){{2}}\d{{1,3}}(?![{_SIGN}-]|\.\d)"
            rf"|[23](?<![{_SIGN}.:].)[0-9A-Fa-f]{{3}}(?::[0-9A-Fa-f]{{0,4}}){{2,7}}(?![{_SIGN}:])"
        ),
        _is_public,
    ),
    "card": _Kind(
        re.compile(
            r"[2-6](?<![\d.-].)(?:(?<=4)|(?<=5)[0-8]|(?<=2)[2-7]|(?<=[36])[0-9])\d*"
            r"(?:(?:\d{2,5}[ -]){2,4}\d{2,7}|\d{10,17})(?![\d-])"
        ),
        _is_card,
    ),
    "phone": _Kind(
        re.compile(
            rf"[+(0-9](?<![{_SIGN}+.-].)(?:"
            rf"(?<=\+)[1-9]\d{{0,2}}{_SEPARATOR}?(?:\(\d{{1,4}}\){_SEPARATOR}?)?"
            rf"\d{{1,5}}(?:{_SEPARATOR}?\d{{2,5}}){{1,4}}(?![{_SIGN}-])"
            r"|(?:(?<=1)[ .-](?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])|(?<=\()[2-9]\d\d\) ?"
            rf"|(?<=[2-9])\d\d[ .-])[2-9]\d\d[ .-]\d{{4}}(?![{_SIGN}-]|\.\d)"
            r"|(?:(?<=1)[3-9]\d[ -]?\d{4}[ -]?\d{4}|(?:(?<=0)\d{2,3}-|(?<=\()0\d{2,3}\) ?)\d{7,8})"
            rf"(?![{_SIGN}-]|\.\d))"
        )
    ),
}


def find(text: str, kinds: Collection[str] = tuple(KINDS)) -> Iterator[Found]:
    """What is in a text, in order. What two kinds could be is of the kind that comes first in
    `KINDS`."""
    found: list[Found] = []
    taken = bytearray(len(text))
    for name, kind in KINDS.items():
        if name not in kinds:
            continue
        for match in kind.pattern.finditer(text):
            start, end = match.span()
            if kind.check(match[0]) and not (taken[start] or taken[end - 1]):
                taken[start:end] = bytes([1]) * (end - start)
                found.append(Found(name, start, end))
    return iter(sorted(found, key=lambda one: one.start))


def redact(text: str, kinds: Collection[str]) -> str:
    """The text with a placeholder for everything of these kinds."""
    parts, start = [], 0
    for kind, begins, ends in find(text, kinds):
        parts += [text[start:begins], f"<{kind.upper()}>"]
        start = ends
    return "".join([*parts, text[start:]])
