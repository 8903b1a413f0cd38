"""Colours of the experts in the HTML report, in notebooks and in terminals."""

from __future__ import annotations

RGB = (
    (0, 102, 204), (204, 85, 0), (0, 136, 85), (102, 0, 51), (0, 0, 170), (170, 119, 255), (85, 68, 0),
    (102, 0, 255), (153, 51, 153), (34, 51, 102), (17, 153, 204), (153, 153, 51), (68, 51, 187), (238, 85, 187),
    (102, 0, 136), (136, 51, 68), (255, 0, 238), (170, 0, 102), (0, 85, 51), (136, 85, 34),
)  # fmt: skip
"""Red, green and blue of experts 1, 2, ..., on a light background.

Each colour was chosen as far as possible from those before it and from grey. Distances are measured in OKLab, for normal
vision and for vision without red, green or blue cones (Machado et al. 2009)."""
GREY = (127, 127, 127)
"""Colour of the null expert."""
TERMINAL = (
    "cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green", "bright_yellow",
    "bright_blue", "bright_red",
)  # fmt: skip
"""Rich's colour names of experts 1, 2, ... They are theme colours, because a terminal's background is not known: its theme
keeps them readable."""


def rgb(expert_id: int) -> tuple[int, int, int]:
    """Return an expert's colour; id 0 is the null expert. The colours repeat after the last one."""
    return RGB[(expert_id - 1) % len(RGB)] if expert_id > 0 else GREY


def terminal_color(expert_id: int | None) -> str:
    """Return an expert's colour name for Rich, "default" for the null expert (0) and for None."""
    return TERMINAL[(expert_id - 1) % len(TERMINAL)] if expert_id else "default"
