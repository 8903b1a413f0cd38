"""See which expert each token of a text goes to, and what each expert would write.

python examples/own_skills.py && python examples/route_and_look.py
"""

from __future__ import annotations

import dylora_mlx

TEXT = '10.0.0.7 - [12/Mar/2026:09:14:02] "GET /json" 200 17ms\ndef parse_line(line, strict=False):\n    """'


def main() -> None:
    run = dylora_mlx.load("runs/own-skills")

    routed = run.route(TEXT)  # in a notebook, `routed` alone shows the text in the experts' colours
    for token, expert, gates in zip(routed.tokens, routed.experts, routed.gates, strict=True):
        print(f"{token!r:16} {expert:12} {gates.max():.2f}")
    print("shares of all tokens:", {name: round(share, 2) for name, share in routed.shares.items()})

    for expert in ["base", *run.experts]:
        generated = run.generate("10.0.0.3 - [12/Mar/2026:09:14:", max_tokens=24, expert=expert)
        print(f"{expert}: {generated.text!r}")


if __name__ == "__main__":
    main()
