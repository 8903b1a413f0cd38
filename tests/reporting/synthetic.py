"""Synthetic run folders of any size and with any names, written without training."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "a\"b'c & <b>",
    "]]><!-- {{x}} \x00\u2028",
]
_PAGE = "html head meta title style body header nav main section h1 h2 h3 p small strong b i a ul ol li dl dt dd div span pre"
_CHARTS = "table thead tbody tr th td figure figcaption details summary svg path rect circle polyline text"
TAGS = {*_PAGE.split(), *_CHARTS.split()}
"""All tags that a report may use."""
VOID = {"meta"}


def build(folder: Path, names: list[str], steps: int = 20, words: int = 30) -> Path:
    """Write a finished run in which every skill got an expert, with `steps` records for each skill; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    domains, step, metrics, decisions = ["python", *names], 0, [], []
    losses = {name: 4.0 + i / 50 for i, name in enumerate(domains)}
    matrix = [dict(losses)]
    metrics.append({"step": 0, **evaluation(losses)})
    for k, name in enumerate(names, 1):
        known = dict.fromkeys(domains[:k], 0.1)
        decisions.append({
            "step": step, "skill": name, "action": "create", "expert": k, "similarities": known, "score": 0.1,
            "interval": [0.05, 0.2], "threshold": 0.75, "reason": f"novel: {name} is new",
            "outcome": {"loss_base": losses[name], "loss_before": losses[name], "loss": 3.0},
        })  # fmt: skip
        metrics.append({"step": step, "skill": name, "novelty_threshold": 0.75})
        histogram = {"padding_fraction": 0.01, "packed_sequence_length_histogram": [0, 1, 0, 2, 0, 0, 3, 9]}
        if k > 1:  # the first is a record of an earlier version, without its edges
            histogram["packed_sequence_length_edges"] = [0, 8, 16, 32, 64, 96, 128, 192, 256]
        metrics.append({"step": step, "skill": name, **histogram})
        for i in range(steps):
            step += 1
            phase = ("dense", "annealing", "mature")[min(2, 3 * i // steps)]
            norms = {f"grad_norm_expert_{j}": (0.3 if j == k else 0.0) for j in range(1, k + 1)}
            usage = {f"expert_usage_{j}": 1 / (k + 1) for j in range(k + 1)}
            metrics.append({
                "step": step, "skill": name, "phase": phase, "train_loss": 3.0, "routing_entropy": 0.3 + 0.1 * math.sin(step),
                "tokens_per_second": 2000.0 + step % 7, "peak_memory_gb": 0.2, "grad_norm_router": 0.1, **norms, **usage,
            })  # fmt: skip
            if i % 10 == 9:
                metrics.append({"step": step, "skill": name, **evaluation(losses)})
        losses[name] = 3.0
        matrix.append(dict(losses))
        usage = {domain: [round(1 / (k + 1), 4)] * (k + 1) for domain in domains}
        after = {"after_skill": True, "num_experts": k, "usage": usage}
        metrics.append({"step": step, "skill": name, **after, **evaluation(losses)})
    sample = {
        "tokens": ["<b>", " x"] * (words // 2),
        "expert_ids": [0, 1] * (words // 2),
        "gates": [0.5, 0.9] * (words // 2),
    }
    samples = {
        "step": step,
        "experts": ["base", *names],
        "domains": {d: {**sample, "truncated": True} for d in domains},
    }
    test = {d: {"base": 4.0, "mixture": 3.1, "own_expert": 3.0} for d in domains}
    results = {"matrix": matrix, "skills": names, "test": test, "steps": step}
    split = {"documents": 1200, "tokens": 34567, "learned": 8901, "cut": 2}
    counts = {
        d: {
            "form": "plain text",
            "splits": dict.fromkeys(("train", "validation", "test"), split),
            "remarks": [f"{d} is odd"],
        }
        for d in domains
    }
    info = {
        "data": counts,
        "status": "finished",
        "base": "embedded",
        "device": "Device(cpu, 0)",
        "mlx": "0",
        "dtype": "float32",
    }
    (folder / "config.yaml").write_text(
        "data: {max_seq_length: 640}\ngrowth: {base_skill: {name: python}}\n# </pre><script>\n"
    )
    lines(folder / "metrics.jsonl", metrics)
    lines(folder / "decisions.jsonl", decisions)
    for name, value in (("samples", samples), ("results", results), ("run", info)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def evaluation(losses: dict[str, float]) -> dict[str, float]:
    return {f"eval_{name}_loss": value for name, value in losses.items()}


def lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Reader(HTMLParser):
    """A parsed page: tags, attribute names, ids, links and text. `wrong` lists tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.names.add(name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data", "srcset"):
                self.links.append(value or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def sound(page: str) -> Reader:
    """Parse a page, check the properties of every report and return the parsed page."""
    reader = Reader(page)
    assert reader.wrong == []
    assert reader.tags <= TAGS, reader.tags - TAGS
    assert not {name for name in reader.names if name.startswith("on")}
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "").lower() or "http" in reader.text.lower()
    assert "default-src 'none'" in page
    return reader
