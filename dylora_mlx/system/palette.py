"""Colours of experts, the same in the report, in a notebook and in a terminal."""

from __future__ import annotations

RGB = (
    (0, 102, 204), (204, 85, 0), (0, 136, 85), (102, 0, 51), (0, 0, 170), (170, 119, 255), (85, 68, 0),
    (102, 0, 255), (153, 51, 153), (34, 51, 102), (17, 153, 204), (153, 153, 51), (68, 51, 187), (238, 85, 187),
    (102, 0, 136), (136, 51, 68), (255, 0, 238), (170, 0, 102), (0, 85, 51), (136, 85, 34),
)  # fmt: skip
"""Red, green and blue of experts 1, 2, ..., on a light background. Each was chosen as far as can be from those before it
and from grey, in OKLab and as it is seen without red, green or blue cones (Machado et al. 2009)."""
GREY = (127, 127, 127)
"""The null expert's."""
TERMINAL = (
    "cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green", "bright_yellow",
    "bright_blue", "bright_red",
)  # fmt: skip
"""Rich's names for experts 1, 2, ...: a terminal's theme makes them readable on its background, which we cannot know."""


def rgb(expert_id: int) -> tuple[int, int, int]:
    """An expert's colour; 0 is the null expert. After the last colour the first one comes again."""
    return RGB[(expert_id - 1) % len(RGB)] if expert_id > 0 else GREY


def terminal_color(expert_id: int | None) -> str:
    """The same as a name that Rich understands: "default" for the null expert and for None."""
    return TERMINAL[(expert_id - 1) % len(TERMINAL)] if expert_id else "default"
