"""Explanations as one HTML page: what spoke for each label and against it, with the real cases drawn side by side.

The page is one file with inline style, no script and no reference to anything outside it. Domains only draw: they hand
in functions that turn a sample, or a prototype's match, into pictures. Every text that is not ``Markup`` is escaped;
characters that could break the page or turn its reading order are replaced.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from proto_core.explain.records import Evidence, Explanation
from proto_core.files import atomic_write

__all__ = ["Comparison", "Picture", "ReportSection", "plain_text", "render_page", "render_report", "write_report"]

# control characters, surrogates from undecodable bytes, marks that reverse the reading order, non-characters
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing with its caption, or the reason why there is none.

    Attributes:
        image: markup that the page shows as it is: the drawing function must have escaped what it took from files.
        caption: plain text.
        note: shown when ``image`` is ``None``.
        wide: needs the width of a sheet; scrolls sideways on a narrow screen.
    """

    image: Markup | None
    caption: str
    note: str = ""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same detail of the explained sample and of the case, side by side."""

    query: Picture
    case: Picture


@dataclass(frozen=True, slots=True, eq=False)
class ReportSection:
    """One sample of the report.

    Attributes:
        sample_id: the sample's name.
        explanations: of its predicted labels, or of the most probable one where none is predicted.
        metadata: shown beside the picture.
        targets: its true labels; ``None`` if unknown.
        requested: the labels were named by the user, so that they need not be predicted.
    """

    sample_id: str
    explanations: tuple[Explanation, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    requested: bool = False


Section = TypeVar("Section", bound=ReportSection)
_HOME = "proto_core.explain"
WITHOUT_CASE = "This prototype was never projected onto a training sample: there is no case to show."


@dataclass(frozen=True, slots=True)
class _Match:
    """A shown prototype."""

    item: Evidence
    comparisons: Sequence[Comparison]


@dataclass(frozen=True, slots=True)
class _Label:
    """One explained label with the prototypes that the page shows, and the sum of those that it does not."""

    explanation: Explanation
    supporting: tuple[_Match, ...]
    opposing: tuple[_Match, ...]
    others: int
    rest: float
    scale: float


def render_report(
    sections: Sequence[Section],
    *,
    title: str,
    draw_query: Callable[[Section], Picture],
    draw_evidence: Callable[[Section, Explanation, Evidence], Sequence[Comparison]],
    metadata: Mapping[str, str] | None = None,
    footer: str = "",
    noun: str = "Sample",
    threshold: str = "Threshold",
    measure: str = "similarity",
    without_case: str = WITHOUT_CASE,
    top: int = 3,
) -> str:
    """Write the page.

    For each label: bias, the strongest prototypes for and against it, the sum of all others, and their sum, which is
    the logit.

    Args:
        sections: one per sample; a domain's subclass may carry what its drawing functions need.
        title: of the page.
        draw_query: draws the explained sample.
        draw_evidence: draws one prototype's match in the explained sample beside its case; called once per shown
            prototype, in the order of the page.
        metadata: of the whole report, such as the model's name.
        footer: closing remark.
        noun: what a sample is called, such as ``"ECG"``.
        threshold: what a label's probability has to reach to be predicted, as the page's tables call it.
        measure: what the classifier saw of a prototype, :attr:`Evidence.similarity`, as the page calls it.
        without_case: said of a prototype that has no case; nothing if empty.
        top: how many prototypes are shown for each label, for and against.

    Returns:
        HTML.

    Raises:
        ValueError: no section, a section without explanation, or ``top`` below 1.

    Example:
        >>> from proto_core.explain import Evidence, Explanation, Picture, ReportSection, render_report
        >>> evidence = (Evidence(0, "head", ("cat",), similarity=0.5, weight=2.0),)
        >>> found = Explanation("a.png", "cat", logit=1.2, probability=0.77, threshold=0.5, bias=0.2, evidence=evidence)
        >>> html = render_report(
        ...     [ReportSection("a.png", (found,))],
        ...     title="Cats & dogs",
        ...     draw_query=lambda section: Picture(None, section.sample_id, note="no picture"),
        ...     draw_evidence=lambda section, explanation, item: (),
        ... )
        >>> "<h1>Cats &amp; dogs</h1>" in html, "<script" in html
        (True, False)
    """
    if not sections:
        raise ValueError("sections: found none, needed at least one sample")
    if top < 1:
        raise ValueError(f"top: found {top}, needed 1 or more")
    pages = []
    for section in sections:
        if not section.explanations:
            raise ValueError(f"sections: {section.sample_id!r} has no explanation, needed at least one")
        picture = draw_query(section)
        labels = [_label(section, explanation, draw_evidence, top) for explanation in section.explanations]
        pages.append((section, picture, labels))
    words = {"title": title, "footer": footer, "noun": noun, "threshold": threshold}
    words |= {"measure": measure, "without_case": without_case}
    return render_page(_HOME, "report.html", metadata=metadata or {}, pages=pages, **words)


def render_page(package: str, name: str, **values: object) -> str:
    """A page from a template of any package, under the rules of the report: escaped, printable, nothing undefined.

    Args:
        package: whose folder ``templates`` holds the template; it may include the report's ``report.css``.
        name: of the template.
        **values: what the template shows.

    Returns:
        HTML.

    Example:
        >>> from proto_core.explain import render_page
        >>> "max-width" in render_page("proto_core.explain", "report.css")
        True
    """
    return _environment(package).get_template(name).render(**values)


def write_report(path: str | os.PathLike[str], html: str) -> None:
    """Write the page whole: the file at ``path`` is the old one or the new one, never half of either."""
    with atomic_write(path) as file:
        file.write(html)


def plain_text(text: str) -> str:
    """Text from a file with unprintable characters replaced by U+FFFD; not escaped.

    Example:
        >>> from proto_core.explain import plain_text
        >>> plain_text("sinus" + chr(0) + "rhythm") == "sinus" + chr(0xFFFD) + "rhythm"
        True
    """
    return UNPRINTABLE.sub("\ufffd", text)


def _label(
    section: Section,
    explanation: Explanation,
    draw: Callable[[Section, Explanation, Evidence], Sequence[Comparison]],
    top: int,
) -> _Label:
    supporting, opposing = explanation.strongest_for(top), explanation.strongest_against(top)
    shown = [item.contribution for item in (*supporting, *opposing)]
    others = len(explanation.evidence) - len(shown)
    rest = math.fsum([item.contribution for item in explanation.evidence] + [-value for value in shown])
    return _Label(
        explanation=explanation,
        supporting=tuple(_Match(item, draw(section, explanation, item)) for item in supporting),
        opposing=tuple(_Match(item, draw(section, explanation, item)) for item in opposing),
        others=others,
        rest=rest if others else 0.0,
        scale=max([abs(value) for value in (*shown, rest, explanation.bias)]) or 1.0,
    )


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(place) for place in dict.fromkeys((package, _HOME))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters.update(number=_number, signed=_signed, bar=_bar)
    return environment


def _printable(value: object) -> object:
    """What an expression of the template becomes before it is escaped."""
    return plain_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: float) -> str:
    text = f"{value:.3f}"
    return "0.000" if text == "-0.000" else text.replace("-", "\u2212")


def _signed(value: float) -> str:
    text = _number(value)
    return text if text.startswith("\u2212") or text == "0.000" else f"+{text}"


def _bar(value: float, scale: float) -> Markup:
    """A bar from the middle, to the right for, to the left against; drawn as a picture so that it prints."""
    width = 50 * min(abs(value) / scale, 1.0)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="{}" x="{:.2f}" y="1" width="{:.2f}" height="8"/><path d="M50 0V10"/></svg>'
    ).format("for" if value > 0 else "against", 50.0 if value > 0 else 50 - width, width)
