"""Explanations add up, and the page that shows them says so, escapes everything and needs nothing but itself."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from proto_core.explain import (
    Case,
    Comparison,
    Evidence,
    Explanation,
    Picture,
    ReportSection,
    plain_text,
    render_report,
    write_report,
)

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&\u202e\x00"
BLOCKS = {"td", "th", "dt", "dd", "p", "li", "caption"}
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a test asks for."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.tags.append((tag, dict(attrs)))
        if tag in BLOCKS:
            self.text.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def evidence(contributions: Sequence[float], name: str = "cat") -> tuple[Evidence, ...]:
    records = [
        Evidence(p, "head", (name,), 0.5, 2 * value, ((3, 4),), Case(f"case{p}", p, ((1, 2),), (name, "dog")))
        for p, value in enumerate(contributions)
    ]
    return tuple(sorted(records, key=lambda item: -item.contribution))


def explain(contributions: Sequence[float], bias: float = 0.25, **changes: object) -> Explanation:
    logit = bias + math.fsum(contributions)
    values: dict = {
        "sample_id": "query",
        "label": "cat",
        "logit": logit,
        "probability": 1 / (1 + math.exp(-logit)),
        "threshold": 0.4,
        "bias": bias,
        "evidence": evidence(contributions),
    }
    return Explanation(**{**values, **changes})


def draw(section: ReportSection) -> Picture:
    return Picture(Markup('<svg viewBox="0 0 1 1"></svg>'), f"Sample {section.sample_id}", wide=True)


def match(section: ReportSection, explanation: Explanation, item: Evidence) -> list[Comparison]:
    assert item.case is not None
    return [Comparison(Picture(Markup("<i>q</i>"), "query"), Picture(Markup("<i>c</i>"), item.case.sample_id))]


def page(*sections: ReportSection, **changes: object) -> str:
    return render_report(sections, **{"title": "Report", "draw_query": draw, "draw_evidence": match, **changes})


def rows(html: str) -> dict[str, str]:
    """Contribution by term of the first table of sums."""
    table = re.search(r'<table class="sum">.*?</table>', html, re.S)
    assert table is not None
    found = re.findall(r'<tr>\s*<th scope="row">(.*?)</th>.*?<td class="n strong">(.*?)</td>', table[0], re.S)
    return dict(found)


def value(text: str) -> float:
    return float(text.replace("\u2212", "-"))


CONTRIBUTIONS = [1.5, -0.75, 0.5, -0.125, 0.25, -1.0, 0.0625, 2.0]


def test_explanation_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cat' for 'query' does not add up.* give 3.25, the logit is 3.3"):
        explain([1.0, 2.0], logit=3.3)


def test_strongest_are_those_of_the_right_sign_in_order() -> None:
    found = explain(CONTRIBUTIONS)
    assert [item.contribution for item in found.strongest_for(2)] == [2.0, 1.5]
    assert [item.contribution for item in found.strongest_against(10)] == [-1.0, -0.75, -0.125]


def test_sum_table_holds_bias_shown_others_and_logit() -> None:
    html = page(ReportSection("query", (explain(CONTRIBUTIONS),)), top=2)
    terms = rows(html)
    assert list(terms) == [
        "Bias", "Prototype 7", "Prototype 0", "Prototype 5", "Prototype 1", "Other 4 prototypes", "Sum = logit"
    ]  # fmt: skip
    assert terms["Bias"] == "+0.250"
    assert terms["Prototype 5"] == "\u22121.000"
    assert value(terms["Other 4 prototypes"]) == pytest.approx(0.5 - 0.125 + 0.25 + 0.0625, abs=6e-4)
    assert terms["Sum = logit"] == "+2.688"
    *parts, total = (value(text) for text in terms.values())
    assert sum(parts) == pytest.approx(total, abs=0.0005 * len(terms))
    assert "similarity 0.500 × weight +4.000 = +2.000" in Page(html).words


@settings(max_examples=25, deadline=None)
@given(
    contributions=st.lists(st.floats(-20, 20), min_size=1, max_size=30),
    bias=st.floats(-5, 5),
    top=st.integers(1, 6),
)
def test_shown_figures_add_up_to_the_shown_logit(contributions: list[float], bias: float, top: int) -> None:
    probability = {"probability": 0.5}
    terms = rows(page(ReportSection("query", (explain(contributions, bias, **probability),)), top=top))
    *parts, total = (value(text) for text in terms.values())
    assert sum(parts) == pytest.approx(total, abs=0.0005 * (len(terms) + 1))
    assert total == pytest.approx(bias + sum(contributions), abs=0.0006)
    assert "\u22120.000" not in terms.values()


def test_logit_of_the_model_is_told_where_rounding_shows() -> None:
    exact, off = explain([1.0], bias=0.0), explain([1.0], bias=0.0, logit=1.0008, tolerance=1e-3)
    assert "as the model computed it" not in page(ReportSection("q", (exact,)))
    assert "as the model computed it: +1.001" in page(ReportSection("q", (off,)))


def test_no_row_for_others_where_all_are_shown() -> None:
    assert not any(term.startswith("Other") for term in rows(page(ReportSection("q", (explain([1.0, -2.0]),)))))
    assert "Other 1 prototype" in rows(page(ReportSection("q", (explain([1.0, 2.0]),)), top=1))


def test_bars_point_to_the_right_for_and_to_the_left_against() -> None:
    html = page(ReportSection("q", (explain([1.0, -2.0], bias=0.0),)))
    bars = re.findall(r'<rect class="(for|against)" x="([\d.]+)" y="1" width="([\d.]+)"', html)
    assert bars == [("against", "50.00", "0.00"), ("for", "50.00", "25.00"), ("against", "0.00", "50.00")]


def test_each_shown_prototype_has_its_case_beside_the_query() -> None:
    html = page(ReportSection("query", (explain(CONTRIBUTIONS),)), top=2)
    found = Page(html)
    cards = html.split('<details class="evidence"')[1:]
    assert len(cards) == 4
    for prototype, card in zip((7, 0, 5, 1), cards, strict=True):
        assert f'<bdi class="id">case{prototype}</bdi>, labels <bdi class="marked">cat</bdi>, <bdi>dog</bdi>' in card
        assert card.index("<i>q</i>") < card.index("<i>c</i>") < card.index(f"<figcaption>case{prototype}<")
    assert all("open" in attributes for attributes in found.all("details"))
    assert found.words.index("What speaks for cat") < found.words.index("What speaks against cat")


def test_prototype_without_case_and_one_sided_evidence_are_told() -> None:
    alone = Evidence(0, "head", ("cat",), 1.0, 1.0)
    found = Explanation("q", "cat", 1.0, 0.7, 0.5, 0.0, (alone,))
    words = Page(page(ReportSection("q", (found,)), draw_evidence=lambda *_: ())).words
    assert "This prototype was never projected onto a training sample" in words
    assert "No prototype speaks against cat" in words


def test_picture_that_is_missing_is_replaced_by_its_note() -> None:
    html = page(ReportSection("q", (explain([1.0]),)), draw_query=lambda _: Picture(None, "caption", "file is <gone>"))
    assert '<p class="missing">file is &lt;gone&gt;</p>' in html
    assert "<figcaption>caption</figcaption>" in html


def test_unpredicted_labels_are_told_from_predicted_ones() -> None:
    low = {"threshold": 0.99}
    assert "Predicted labels" in page(ReportSection("q", (explain([1.0]),)))
    fallback = Page(page(ReportSection("q", (explain([1.0], **low),)))).words
    assert "No label is predicted: none reaches its threshold. The most probable one is explained instead." in fallback
    assert "Why cat is not predicted" in fallback
    asked = Page(page(ReportSection("q", (explain([1.0], **low),), requested=True))).words
    assert "None of the labels asked for reaches its threshold." in asked
    assert "most probable" not in asked
    both = Page(page(ReportSection("q", (explain([1.0]), explain([1.0], **low)), requested=True))).words
    assert "reaches its threshold" not in both
    assert "Explained labels" in both


def test_label_table_shows_probability_threshold_logit_and_truth() -> None:
    section = ReportSection("q", (explain([1.0], probability=0.7341, threshold=0.4),), targets=("dog",))
    words = Page(page(section)).words
    assert "Label Probability Threshold Logit Predicted In the data cat 0.734 0.400 +1.250 yes no" in words
    assert "Labels in the data dog" in words
    assert "Labels in the data none" in Page(page(ReportSection("q", section.explanations, targets=()))).words
    assert "In the data" not in page(ReportSection("q", section.explanations))


def test_everything_that_comes_from_files_is_escaped() -> None:
    item = Evidence(0, ATTACK, (ATTACK,), 1.0, 1.0, None, Case(ATTACK, 0, None, (ATTACK,)))
    found = Explanation(ATTACK, ATTACK, 1.0, 0.7, 0.5, 0.0, (item,))
    section = ReportSection(ATTACK, (found,), {ATTACK: ATTACK}, targets=(ATTACK,))
    html = page(
        section,
        section,
        title=ATTACK,
        metadata={ATTACK: ATTACK},
        footer=ATTACK,
        noun=ATTACK,
        draw_query=lambda _: Picture(None, ATTACK, ATTACK),
        draw_evidence=lambda *_: [Comparison(Picture(Markup("<svg></svg>"), ATTACK, wide=True), Picture(None, "", ""))],
    )
    found_page = Page(html)
    assert "<script" not in html
    assert found_page.all("img") == []
    assert not any(name.startswith("on") for _, attributes in found_page.tags for name in attributes)
    assert plain_text(ATTACK) in "".join(found_page.text)
    assert "\x00" not in html
    assert "\u202e" not in html


@pytest.mark.bad_input
def test_a_drawing_that_is_plain_text_is_escaped() -> None:
    html = page(ReportSection("q", (explain([1.0]),)), draw_query=lambda _: Picture("<b>raw</b>", ""))  # type: ignore[arg-type]
    assert "&lt;b&gt;raw&lt;/b&gt;" in html


def test_page_is_one_file_without_script_or_outside_reference() -> None:
    html = page(ReportSection("a", (explain(CONTRIBUTIONS),)), ReportSection("b", (explain([1.0]),)))
    found = Page(html)
    assert re.search(r"https?:|url\(|@import|<script|<link|<iframe", html) is None
    references = [a[key] for _, a in found.tags for key in ("href", "src") if key in a]
    assert references == ["#s1", "#s2"]
    assert {a["id"] for a in found.all("article")} == {"s1", "s2"}
    policy = next(a["content"] for a in found.all("meta") if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_page_is_readable_by_machines_and_on_phones_and_paper() -> None:
    html = page(ReportSection("a", (explain(CONTRIBUTIONS),)))
    found = Page(html)
    assert html.startswith("<!doctype html>")
    assert found.all("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" for a in found.all("meta"))
    assert len(found.all("table")) == len(found.all("caption")) == 2
    assert all(a.get("scope") in ("col", "row") for a in found.all("th"))
    assert len(found.all("figure")) == len(found.all("figcaption"))
    assert "@media print" in html
    headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[:3] == [1, 2, 3]
    assert all(b - a <= 1 for a, b in pairwise(headings))
    assert found.all("nav") == []  # a single sample needs no contents


def test_same_input_gives_the_same_page() -> None:
    section = ReportSection("a", (explain(CONTRIBUTIONS),), {"age": "56"})
    assert page(section) == page(section)


def test_report_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    html = page(ReportSection("a\udc80b", (explain([1.0]),)))  # a name that the file system could not decode
    write_report(path, html)
    assert path.read_text(encoding="utf-8") == html
    assert "a\ufffdb" in html
    with pytest.raises(UnicodeEncodeError):
        write_report(path, "\udc80")
    assert path.read_text(encoding="utf-8") == html
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("sections", "top", "message"),
    [
        ((), 3, "sections: found none"),
        ((ReportSection("q", ()),), 3, "'q' has no explanation"),
        ((ReportSection("q", (explain([1.0]),)),), 0, "top: found 0"),
    ],
)
def test_bad_input_is_named(sections: tuple[ReportSection, ...], top: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        page(*sections, top=top)
