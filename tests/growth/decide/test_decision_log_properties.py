"""Property tests of the decision log: any sequence of writes, updates and truncations reads back as in a list."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.reporting import records
from dylora_mlx.training.metrics.recorder import truncate_lines

LINE_ENDS = "\n\r\x0b\x0c\x1c\x85\u2028\u2029"
"""Characters at which some readers end a line; a JSONL file's lines end with a newline only."""
text = st.one_of(st.text(max_size=12), st.text(alphabet=f'a"\\{LINE_ENDS}', max_size=6))
numbers = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
more = st.dictionaries(st.one_of(text, st.sampled_from(["outcome", "score", "reason"])), values, max_size=3)
decisions = st.builds(
    lambda rest, skill, action, expert: {**rest, "skill": skill, "action": action, "expert": expert},
    more, text, st.sampled_from(["create", "reuse", "refine", "evict"]), st.integers(0, 64),
)  # fmt: skip
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), decisions),
        st.tuples(st.just("settle"), st.fixed_dictionaries({}, optional={"outcome": values, "kept": st.booleans()})),
        st.tuples(st.just("truncate"), st.integers(0, 6)),
        st.tuples(st.just("open"), st.none()),
    ),
    max_size=12,
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(steps)
def test_the_log_reads_back_what_was_written(operations):
    with tempfile.TemporaryDirectory() as temporary:
        folder, expected = Path(temporary), []
        log = DecisionLog(folder)
        for action, argument in operations:
            if action == "write":
                log.append(argument)
                expected.append(argument)
            elif action == "settle" and expected:
                log.update_last(argument)
                expected[-1] = {**expected[-1], **argument}
            elif action == "truncate":
                truncate_lines(log.path, argument)
                expected, log = expected[:argument], DecisionLog(folder)
            elif action == "open":
                log = DecisionLog(folder)
            assert log.lines == len(expected)
        if expected:
            assert decision_log.read_decisions(folder) == expected
        else:
            with pytest.raises(UserError):
                decision_log.read_decisions(folder)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(decisions, min_size=1, max_size=4), st.data())
def test_a_truncated_last_line_loses_only_itself(lines, data):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.yaml").write_text("skills: []\n")
        log = DecisionLog(folder)
        for line in lines:
            log.append(line)
        content = log.path.read_bytes()
        begin = content[:-1].rfind(b"\n") + 1
        log.path.write_bytes(content[: data.draw(st.integers(begin, len(content) - 2))])
        loaded = records.read_records(folder)
        assert loaded.decisions == lines[:-1]
        assert loaded.skipped == 0
        if len(lines) > 1:
            assert decision_log.read_decisions(folder) == lines[:-1]
