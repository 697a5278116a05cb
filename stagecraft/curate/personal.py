"""Personal data that is recognised by its form: e-mail and IP addresses, phone numbers.

Each is replaced by an address or number reserved for documentation, and counted. Names,
postal addresses and numbers in other forms stay.
"""

import ipaddress
import re

EMAIL = "email@example.com"  # RFC 2606
ADDRESS = "192.0.2.1"  # RFC 5737
PHONE = "+1-555-555-0100"  # the range kept for fiction

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.!#$%&'*+/=?^`{|}~-]{0,63}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
)
_ADDRESS = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
# With a country code, with an area code in parentheses, or as 212-555-0123.
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}"
    r"|\d{3}([.-])\d{3}\1\d{4}"
    r")(?![\w-]|\.\d)"
)


def scrub(text, emails=True, addresses=True, phones=True):
    """Replaces personal data in a text.

    Returns:
        (text, {"e-mail": count, "IP address": count, "phone number": count}).

    >>> scrub("Write to ann@firm.org or call (212) 555-0187, not 10.0.0.1.")[0]
    'Write to email@example.com or call +1-555-555-0100, not 10.0.0.1.'
    """
    counts = {}
    if emails and "@" in text:
        text, counts["e-mail"] = _EMAIL.subn(EMAIL, text)
    if addresses:
        text, counts["IP address"] = _replace(_ADDRESS, ADDRESS, _public, text)
    if phones:
        text, counts["phone number"] = _replace(_PHONE, PHONE, _long_enough, text)
    return text, {name: count for name, count in counts.items() if count}


def _replace(pattern, by, is_one, text):
    count = 0

    def change(match):
        nonlocal count
        if not is_one(match[0]):
            return match[0]
        count += 1
        return by

    return pattern.sub(change, text), count


def _public(address):
    """Returns whether an address is public: private ones point at nobody."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _long_enough(number):
    return 8 <= sum(map(str.isdigit, number)) <= 15
