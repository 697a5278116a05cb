"""Fills the templates of pages that load nothing: one look, one escaping of data.

A page runs only the scripts that its policy names by their hashes, and none evaluates
text.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from stagecraft.report import charts
from stagecraft.report.findings import show

_FOLDER = Path(__file__).parent
_ALWAYS = "copy.js"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(template, scripts=(), libraries=(), **values):
    """Fills `report/TEMPLATE`; all values are data and escaped.

    Args:
        template: of a page, which shows `policy` in its head and `scripts` at its end.
        scripts: files of this folder that run when the page has been read, after the
            one that every page has.
        libraries: files of `vendor`; they are in the page as text until a script runs
            them.
        **values: of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stagecraft", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": show,
        "colour": charts.colour,
        "short": _short,
        "json": _json,
        "anchor": _anchors(),
    }
    own = [_text(name) for name in (_ALWAYS, *scripts)]
    texts = [_text(f"vendor/{name}") for name in libraries]
    values |= {"policy": _policy([*own, *texts]), "scripts": _elements(own, texts)}
    return environment.get_template(template).render(values)


def _anchors():
    """A filter from words to an id, which it gives no second time."""
    given = set()

    def anchor(words):
        base = name = re.sub(r"\W+", "-", words).strip("-")
        count = 1
        while name in given:
            count += 1
            name = f"{base}-{count}"
        given.add(name)
        return name

    return anchor


def _text(name):
    return (_FOLDER / name).read_text(encoding="utf-8")


def _policy(texts):
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    hashes = (f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return Markup(f"{_POLICY}; script-src {' '.join(hashes)}")


def _elements(own, libraries):
    """Scripts as elements of the page; what cannot stand in one is an error of ours."""
    assert not any("</script" in text or "<!--" in text for text in [*own, *libraries])
    parts = [
        f'<script type="text/plain" data-library>{text}</script>' for text in libraries
    ]
    if libraries:
        parts.insert(0, f"<!--\n{_text('vendor/LICENSE')}-->")
    return Markup("\n".join([*parts, *(f"<script>{text}</script>" for text in own)]))


def _json(value):
    """A value as JSON that no text in it can end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _short(text):
    return text[:12] + "…" if len(text) > 13 else text
