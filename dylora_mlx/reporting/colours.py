"""The colours of experts, the same in every chart, table and text."""

from __future__ import annotations

PALETTE = (
    "0,102,204", "204,85,0", "0,136,85", "102,0,51", "0,0,170", "170,119,255", "85,68,0",
    "102,0,255", "153,51,153", "34,51,102", "17,153,204", "153,153,51", "68,51,187", "238,85,187",
    "102,0,136", "136,51,68", "255,0,238", "170,0,102", "0,85,51", "136,85,34",
)  # fmt: skip
"""Red, green and blue of the experts in turn, on a light page. Chosen one after another, each as far as can be from those
before it and from grey, in OKLab and as it is seen without red, green or blue cones (Machado et al. 2009)."""
GREY = "127,127,127"
LIFT = 0.42
"""How far towards white a colour goes on a dark page."""


def name(number: int) -> str:
    """CSS class of an expert by its number in order of creation; 0 is the base."""
    return f"e{(number - 1) % len(PALETTE) + 1}" if number > 0 else "e0"


def variables(dark: bool) -> str:
    """The palette as CSS variables, triples that rgb() and rgba() take."""
    found = [GREY, *PALETTE]
    if dark:
        found = [",".join(str(round(int(v) + (255 - int(v)) * LIFT)) for v in triple.split(",")) for triple in found]
    return "".join(f"--r{i}:{triple};" for i, triple in enumerate(found))


def classes() -> str:
    """A class for each colour; what is drawn with it is another class's matter."""
    return "".join(f".e{i}{{--x:var(--r{i})}}" for i in range(len(PALETTE) + 1))
