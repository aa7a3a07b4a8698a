"""Retrievals and captions of a run's report as HTML, with the pictures that the results carry.

In: results of evals/retrieval.py and evals/captions.py. Out: HTML; empty for results of other tasks.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

TOLD = 5  # captions of people beside the one that was written


def sheet(result: Mapping[str, Any]) -> str:
    """What a result with words has to show."""
    pictures = result.get("pictures") or {}
    if result.get("task") == "retrieval":
        shown = _retrievals(result.get("examples") or {}, pictures)
        return _codes(result.get("hashing")) + shown + _attention(result.get("attention") or ())
    if result.get("task") == "captions":
        return _captions(result.get("examples") or (), pictures)
    return ""


def _retrievals(examples: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    parts = []
    for way, every in examples.items():
        for kind in ("best", "worst"):
            chosen = [example for example in every if example["kind"] == kind]
            if not chosen:
                continue
            parts.append(f'<h4>{escape(way.capitalize())}, {kind}</h4><div class="pairs words">')
            show = _by_image if way == "image to text" else _by_text
            parts += [show(example, pictures) for example in chosen]
            parts.append("</div>")
    meaning = (
        '<p class="details">Best and worst by how far the right answer scores above the best wrong one; ✓ is right.'
        " Under the line: the right answer and its rank, where it is not among the first.</p>"
    )
    return "".join(parts) + meaning if parts else ""


def _by_image(example: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    lines = [_line(each["item"], each["right"], each["score"]) for each in example["found"]]
    if not any(each["right"] for each in example["found"]):
        lines.append(_own(f"{example['own']} (rank {example['rank']:,})"))
    image = _picture(pictures.get(str(example["query"])), "")
    return f'<div class="site">{image}<ol class="found">{"".join(lines)}</ol></div>'


def _by_text(example: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    images = [
        _picture(pictures.get(str(each["item"])), f"{'✓ ' if each['right'] else ''}{each['score']:.3f}")
        for each in example["found"]
    ]
    if not any(each["right"] for each in example["found"]):
        images.append(_picture(pictures.get(str(example["own"])), f"right, rank {example['rank']:,}"))
    query = f'<div class="said">{escape(str(example["query"]))}</div>'
    return f'<div class="site">{query}<div class="pair">{"".join(images)}</div></div>'


def _captions(examples: Sequence[Mapping[str, Any]], pictures: Mapping[str, str]) -> str:
    parts = []
    for kind in dict.fromkeys(example["kind"] for example in examples):
        parts.append(f'<h4>{escape(kind.capitalize())} by CIDEr</h4><div class="pairs words">')
        for example in examples:
            if example["kind"] == kind:
                told = "".join(f"<li>{escape(text)}</li>" for text in example["told"][:TOLD])
                more = len(example["told"]) - TOLD
                told += f'<li class="own">and {more} more</li>' if more > 0 else ""
                image = _picture(pictures.get(str(example["image"])), f"CIDEr {100 * example['cider']:.0f}")
                said = f'<div class="said">{escape(example["said"]) or "(nothing)"}</div>'
                parts.append(f'<div class="site">{image}{said}<ul class="found">{told}</ul></div>')
        parts.append("</div>")
    return "".join(parts)


def _attention(attention: Sequence[Mapping[str, Any]]) -> str:
    """Where words look: a text, and over its image the attention of each of some words."""
    if not attention:
        return ""
    parts = [
        '<h4>Where words look</h4><p class="details">Bright: the places that a word of the caption attends to, by the'
        ' local term of training. <b>Bad:</b> all words bright in one place.</p><div class="pairs words">'
    ]
    for each in attention:
        images = "".join(_picture(uri, word) for word, uri in each["words"])
        parts.append(
            f'<div class="site"><div class="said">{escape(each["text"])}</div><div class="pair">{images}</div></div>'
        )
    return "".join([*parts, "</div>"])


def _codes(about: Mapping[str, Any] | None) -> str:
    """Recall, size and speed of binary codes beside exact search."""
    if not about:
        return ""
    rows = [{"rotation": "exact, float32", "loss": 0.0, **about["exact"]}, *about["codes"]]
    lines = "".join(
        f'<tr><th scope="row">{escape(row["rotation"])}</th>'
        + "".join(
            f'<td class="number">{cell}</td>'
            for cell in (
                f"{100 * row['recall']['mean recall']:.1f} %",
                f"{100 * row['loss']:.1f}",
                f"{row['bytes']:,}",
                f"{row['milliseconds']:.4f}",
            )
        )
        + "</tr>"
        for row in rows
    )
    heads = "".join(f'<th class="number">{head}</th>' for head in ("Mean recall", "Lost", "Bytes", "ms a query"))
    return (
        f'<table class="class"><caption>Binary codes of {about["bits"]} bits</caption><thead><tr><th>Search</th>{heads}'
        f"</tr></thead><tbody>{lines}</tbody></table>"
    )


def _line(text: str, right: bool, score: float) -> str:
    mark = "✓ " if right else ""
    return f'<li{" class=right" if right else ""}>{mark}{escape(text)} <span class="quiet">{score:.3f}</span></li>'


def _own(text: str) -> str:
    return f'<li class="own">{escape(text)}</li>'


def _picture(uri: str | None, caption: str) -> str:
    image = f'<img src="{escape(uri)}" alt="{escape(caption)}">' if uri else ""
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
