"""Fills the templates of pages that load nothing: one look, one escaping of data."""

import jinja2

from stagecraft.report import charts
from stagecraft.report.curves import show


def render(template, **values):
    """Fills `report/TEMPLATE`; all values are data and escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stagecraft", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": show, "colour": charts.colour, "short": _short}
    return environment.get_template(template).render(values)


def _short(text):
    return text[:12] + "…" if len(text) > 13 else text
