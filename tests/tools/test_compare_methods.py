"""tools/benchmarks/compare_methods.py: which results it computes and stores, and its tables of synthetic results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import compare_methods as tool
import pytest
from methods import ours, results, tables
from methods.bench import Bench, Result
from methods.results import Cell

from dylora_mlx.cli.options import parse_train
from dylora_mlx.config import Config, Source
from dylora_mlx.errors import UserError

NAMES = ["a", "b", "c"]
MATRIX = [
    {"a": 4.0, "b": 5.0, "c": 6.0, "known": 2.0},
    {"a": 3.0, "b": 4.8, "c": 6.0, "known": 2.0},
    {"a": 3.2, "b": 4.0, "c": 6.2, "known": 2.1},
    {"a": 3.5, "b": 4.1, "c": 5.0, "known": 2.3},
]


def cell(method="m", seed=0, order=0, shift=0.0, **fields) -> Cell:
    matrix = [{name: value + shift for name, value in row.items()} for row in MATRIX]
    result = Result(matrix, matrix[-1], 100, 9, 1000, 1.5)._replace(**fields)
    return Cell(method, seed, order, NAMES, "known", result)


def config(count: int = 5) -> Config:
    return Config(skills=[Source(name=f"s{i}", source="packaged/sql") for i in range(count)])


def test_measures_of_a_matrix():
    result = cell(own={"a": 3.0, "b": 4.0, "c": 5.0}, routing={"a": 0.5, "b": 0.7, "c": 0.9})
    assert results.final(result) == pytest.approx((3.5 + 4.1 + 5.0) / 3)
    assert results.diagonal(result) == pytest.approx((3.0 + 4.0 + 5.0) / 3)
    assert results.backward(result) == pytest.approx((0.5 + 0.1) / 2)
    assert results.forgetting(result) == pytest.approx((0.5 + 0.1) / 2)
    assert results.forward(result) == pytest.approx((-0.2 + 0.2) / 2)
    assert results.retention(result) == pytest.approx(0.3)
    assert results.regret(result) == pytest.approx(12.6 / 3 - 4.0)
    assert results.routing(result) == pytest.approx(0.7)
    assert math.isnan(results.regret(cell()))


def test_another_method_is_compared_on_the_same_seed():
    cells = [cell("joint", 0), cell("joint", 1, shift=1.0), cell("m", 1, 2, shift=1.25), cell("m", 2)]
    difference = results.against(cells, "joint")
    assert difference(cells[2]) == pytest.approx(0.25)
    assert math.isnan(difference(cells[3]))


def test_an_interval_holds_the_mean_and_narrows():
    few, many = results.mean([1.0, 2.0, 3.0]), results.mean([1.0, 2.0, 3.0] * 20)
    assert few.value == pytest.approx(2.0)
    assert few.low < 2.0 < few.high
    assert many.high - many.low < few.high - few.low
    assert results.mean([math.nan]).num_cells == 0


def test_results_are_stored_and_read_back(tmp_path):
    cells = [cell("ours, top-1", 3, 1, routing={"a": 0.5, "b": 0.5, "c": 0.5}), cell()]
    for written in cells:
        results.write(tmp_path, written)
    assert sorted(results.read(tmp_path)) == sorted(cells)
    assert results.place(tmp_path, "ours, top-1", 3, 1).is_file()


def test_every_method_has_a_separate_file(tmp_path):
    names = list(tool.methods())
    assert len({results.place(tmp_path, name, 0, 0) for name in names}) == len(names)


def test_skills_declared_equal_share_an_expert():
    owners = tool.owners(config(4), ["s0,s2"])
    assert owners == {"s0": 0, "s1": 1, "s2": 0, "s3": 2}
    reversed_config = Config(skills=list(reversed(config(4).skills)))
    assert tool.owners(reversed_config, ["s0,s2"]) == {"s3": 0, "s2": 1, "s1": 2, "s0": 1}


def test_orders_permute_the_same_skills():
    names = [[s.name for s in tool.ordered(config(), order).skills] for order in range(3)]
    assert names[0] == [s.name for s in config().skills]
    assert len({tuple(order) for order in names}) == 3
    assert all(sorted(order) == names[0] for order in names)


def test_stored_results_are_not_computed_again(tmp_path):
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--orders", "2", "--methods", "ours", "joint LoRA"]
    everything = list(dict.fromkeys(tool.todo(tool.parse(arguments), tmp_path)))
    assert len(everything) == 4 + 2, "joint training has no order"
    results.write(tmp_path, cell("ours", 1, 1))
    assert set(everything) - set(tool.todo(tool.parse(arguments), tmp_path)) == {(1, 1, "ours")}
    paired = dict.fromkeys(tool.todo(tool.parse([*arguments, "--paired"]), tmp_path))
    assert set(paired) == {(0, 0, "ours"), (0, 0, "joint LoRA"), (1, 0, "joint LoRA")}


def test_tables_show_the_results(tmp_path, capsys):
    for seed in range(3):
        results.write(tmp_path, cell("joint LoRA", seed, shift=0.01 * seed))
        results.write(tmp_path, cell("ours", seed, 1, shift=0.5 + 0.02 * seed))
    assert tool.main(["--out", str(tmp_path), "--report"]) == 0
    table = (tmp_path / "table.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| ours |"))
    assert "| 3 |" in row
    assert "+0.510 [" in row
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["means"]["ours"]["minus joint"]["value"] == pytest.approx(0.51)
    assert values["means"]["ours"]["router regret"]["value"] is None
    assert len(values["cells"]) == 6
    assert "ours" in capsys.readouterr().out
    matrix = table[table.index("ours: losses after each skill") :]
    assert "| a | **3.520**" in matrix, "the diagonal is shown"


def test_the_page_is_self_contained(tmp_path):
    pytest.importorskip("plotly")
    cells = [cell("ours", seed) for seed in range(2)]
    assert tables.rows(cells)
    from methods import page

    assert page.write(cells, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert 'src="http' not in text
    assert "ours" in text


def test_every_variant_is_a_config(base):
    quick = parse_train(["--config", "quickstart"]).config
    assert quick is not None
    bench = Bench(base, quick, [], None, 0, {})  # type: ignore[arg-type]
    configs = {name: ours.changed(bench, changes) for name, changes in ours.VARIANTS.items()}
    assert len({json.dumps(asdict(c), sort_keys=True) for c in configs.values()}) == len(configs)
    assert configs["ours, no null expert"].domains[-1].name == "python"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--methods", "magic"], "'magic' is none of"),
        (["--report"], "no results"),
        (["--config", "nowhere"], "no such config file"),
        (["--learning-rates", "-1"], "--learning-rates: learning_rate: -1.0"),
        (["--rates-from", "nowhere"], "nowhere: no results of --learning-rates"),
        (["--rates-from", "nowhere", "--learning-rates", "1"], "exclude each other"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    assert tool.main(["--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(tmp_path, base, capsys):
    first = tool.parse(["--out", str(tmp_path)])
    tool.settle_on(first, tmp_path, config(2), base, {})
    tool.settle_on(first, tmp_path, config(2), base, {})
    with pytest.raises(tool.UserError, match="other settings"):
        tool.settle_on(first, tmp_path, config(3), base, {})
    results.write(tmp_path, cell("ours")._replace(learning_rate=0.01))
    tool.settle_on(first, tmp_path, config(2), base, {"ours": 0.01, "joint LoRA": 1e-3})
    with pytest.raises(tool.UserError, match=r"'ours' have the learning rate 0.01, not 0.001"):
        tool.settle_on(first, tmp_path, config(2), base, {"ours": 1e-3})


def test_each_method_takes_its_best_learning_rate(tmp_path, capsys):
    shifts = {("ours", 1e-3): 0.2, ("ours", 2e-3): 0.1, ("joint LoRA", 1e-3): 0.0, ("joint LoRA", 2e-3): 0.3}
    for (method, rate), shift in shifts.items():
        results.write(tmp_path / f"rate-{rate:g}", cell(method, shift=shift))
    assert tool.main(["--out", str(tmp_path), "--report"]) == 0
    assert "| ours | 4.400 | **4.300** |" in capsys.readouterr().out
    assert "| joint LoRA | **4.200** | 4.500 |" in (tmp_path / "rates.md").read_text()
    options = tool.parse(["--out", "x", "--rates-from", str(tmp_path), "--methods", "joint LoRA", "ours"])
    [(folder, stream, rate_of)] = tool.folders(options, config())
    assert (str(folder), stream) == ("x", config())
    assert rate_of == {"joint LoRA": 1e-3, "ours": 2e-3}


def test_every_method_is_computed_at_each_learning_rate():
    options = tool.parse(["--out", "x", "--learning-rates", "1e-3", "5e-4"])
    found = tool.folders(options, config())
    assert [str(folder) for folder, *_ in found] == ["x/rate-0.001", "x/rate-0.0005"]
    assert [stream.training.learning_rate for _, stream, _ in found] == [1e-3, 5e-4]


def test_a_damaged_result_is_named(tmp_path, capsys):
    results.write(tmp_path, cell())
    results.place(tmp_path, "m", 0, 0).write_text("{}")
    assert tool.main(["--out", str(tmp_path), "--report"]) == 2
    assert "no result of this tool" in capsys.readouterr().err


SMALL = """
skills:
  - {name: requests, source: packaged/requests, limit: 40}
  - {name: sql, source: packaged/sql, limit: 40}
growth: {base_skill: {name: python, source: packaged/python, limit: 40}, dense_steps: 1, anneal_steps: 1}
data: {max_seq_length: 512}
training: {max_steps: 2, memory_tokens: 256, router_fit_steps: 20}
"""


@pytest.mark.slow
def test_a_comparison_from_end_to_end(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    names = ["base alone", "sequential LoRA", "Arrow, same experts", "oracle, experts alone", "ours", "joint LoRA"]
    arguments = [
        "--config",
        str(tmp_path / "small.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "1",
        "--orders",
        "1",
    ]
    assert tool.main([*arguments, "--methods", *names]) == 0
    cells = {cell.method: cell for cell in results.read(tmp_path / "out")}
    assert list(cells) != []
    assert set(cells) == set(names)
    base = cells["base alone"].result
    assert all(cell.result.matrix[0] == pytest.approx(base.matrix[0], abs=1e-4) for cell in cells.values())
    assert results.final(cells["ours"]) < results.final(cells["base alone"])
    assert {cell.learning_rate for cell in cells.values()} == {0.01}
    assert results.forgetting(cells["oracle, experts alone"]) == 0
    assert cells["ours"].result.steps == cells["sequential LoRA"].result.steps == 4
    assert cells["ours"].result.tokens == pytest.approx(cells["sequential LoRA"].result.tokens, rel=0.05)
    capsys.readouterr()
    assert tool.main([*arguments, "--methods", *names]) == 0, "nothing is left to do"
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("1/")]


def test_arrow_is_left_out_where_its_gates_have_no_common_input():
    assert "Arrow, same experts" not in tool.choose_methods(None, ["q_proj", "up_proj"])
    assert tool.choose_methods(None, ["q_proj", "v_proj"]) == list(tool.methods())
    assert tool.choose_methods(["ours"], ["up_proj"]) == ["ours"]
    with pytest.raises(UserError, match="Arrow needs experts on one input"):
        tool.choose_methods(["ours", "Arrow, same experts"], ["q_proj", "up_proj"])
