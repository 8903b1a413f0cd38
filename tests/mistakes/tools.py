"""Mistakes with the scripts of tools/ and tests/stress/."""

from __future__ import annotations

from tests.mistakes.rows import Mistake, write

PROJECTION = [
    ("nosuch.jsonl packaged/sql packaged/flask", "nosuch.jsonl: no such file"),
    ("new=", "write NAME=SOURCE"),
    ("=notes.jsonl", "write NAME=SOURCE"),
    ("packaged/cobol packaged/sql packaged/flask", "packaged/cobol"),
    ("packaged/sql packaged/flask", "three"),
    ("--holdout cobol", "--holdout cobol: no such skill"),
    ("--holdout flask python requests sql stripe", "three"),
    ("--out run", "run: a folder"),
    ("--out notes.jsonl/head.safetensors", "notes.jsonl/head.safetensors: "),
    ("--limit 31", "--limit: 31 is not at least 32"),
    ("--hidden 0", "--hidden: 0 is not at least 1"),
    ("--hidden 99999999999", "--hidden: 99999999999"),
    ("--steps -1", "--steps: -1 is not at least 1"),
    ("--seed -1", "--seed: -1 is not at least 0"),
    ("--whitening inf", "--whitening: inf"),
    ("--base nosuch", "nosuch: no such folder"),
    ("--base run", "run: no config.json"),
]
LAW = [
    ("", "--out"),
    ("--out run", "run: a folder"),
    ("--out nosuch/ranks.json", "nosuch/ranks.json: cannot be written"),
    ("--out notes.jsonl/ranks.json", "cannot be written"),
    ("--out r.json --plot nosuch/r.html", "nosuch/r.html: cannot be written"),
    ("--out r.json --ranks 1 2", "--ranks: at least three"),
    ("--out r.json --ranks 1 2 2 4", "none may come twice"),
    ("--out r.json --ranks 1 2 -4", "--ranks"),
    ("--out r.json --ranks 1 2 1000000000", "--ranks: 1000000000"),
    ("--out r.json --seeds 0 0", "--seeds: none may come twice"),
    ("--out r.json --seeds 99999999999999999999999", "--seeds"),
    ("--out r.json --skill nosuch.jsonl", "nosuch.jsonl: no such file"),
    ("--out r.json --skill ''", "names no source"),
    ("--out r.json --base nosuch", "nosuch: no such folder"),
    ("--out r.json --learning-rate 5", "learning_rate: 5.0"),
    ("--out r.json --learning-rate nan", "nan is not a number above 0"),
    ("--out r.json --limit 0", "0 is not a whole number of at least 1"),
    ("--out r.json --step 3", "unrecognized arguments: --step"),
    ("--out r.json --plot r.json", "r.json: "),
]
METHODS = [
    ("", "--out"),
    ("--out notes.jsonl --report", "notes.jsonl: "),
    ("--out notes.jsonl", "notes.jsonl: "),
    ("--out empty --report", "empty: no results"),
    ("--out nosuch --report", "nosuch: no results"),
    ("--out made --seeds 0", "--seeds must be at least 1"),
    ("--out made --orders -2", "--orders must be at least 1"),
    ("--out made --methods magic", "'magic' is none of"),
    ("--out made --methods", "--methods"),
    ("--out made --config run", "run: no such config file"),
    ("--out made --config wide.yaml", "wide.yaml, line 1: not UTF-8"),
    ("--out made --same requests,cobol", "--same requests,cobol"),
    ("--out made --same requests", "--same requests"),
]
CRASH = [
    ("--kills 0", "--kills must be at least 1"),
    ("--kills -5", "--kills must be at least 1"),
    ("--kills many", "--kills"),
    ("--seed -1", "--seed"),
    ("run", "unrecognized arguments: run"),
]
FUZZ = [
    ("nosuch", "nosuch: no such target"),
    ("--input notes.jsonl", "--input: name the one target"),
    ("decision-log --input nosuch", "nosuch: "),
    ("decision-log --input run", "run: "),
    ("decision-log explain --input notes.jsonl", "--input: name the one target"),
    ("decision-log --runs 0", "--runs"),
    ("decision-log --runs -1", "--runs"),
    ("decision-log --seconds 0", "--seconds"),
    ("decision-log --seconds nan", "--seconds"),
    ("decision-log --engine afl", "--engine"),
    ("decision-log --corpus notes.jsonl", "notes.jsonl: "),
    ("decision-log --seed x", "--seed"),
]
BENCHMARK = [
    ("--size large", "--size"),
    ("--length 8", "--length at least 32"),
    ("--runs 0", "--runs must be at least 1"),
    ("--prompt 1", "--prompt and --tokens must be at least 2"),
    ("--only sleep", "--only"),
    ("--only", "--only"),
    ("--contenders nobody", "--contenders"),
    ("--cache-gb -1", "--cache-gb"),
    ("--cache-gb nan", "--cache-gb"),
    ("--json run", "run: a folder"),
    ("--json nosuch/found.json", "nosuch/found.json: "),
]
DELAY = [
    ("--delays", "--delays"),
    ("--delays -1", "--delays: give numbers from 0 to 10000"),
    ("--delays nan", "--delays: give numbers from 0 to 10000"),
    ("--steps 1", "--steps: 1 is not at least 2"),
    ("--steps many", "--steps"),
    ("--rate 0", "--rate: 0.0 is not between 0 and a million"),
    ("run", "unrecognized arguments: run"),
]
REFERENCE = [
    ("--chek", "unrecognized arguments: --chek"),
    ("docs/reference.md", "unrecognized arguments: docs/reference.md"),
    ("--check=yes", "--check"),
]
ROWS = [
    *(Mistake("tools/benchmarks/train_projection.py", argv, message) for argv, message in PROJECTION),
    *(Mistake("tools/benchmarks/rank_law.py", argv, message) for argv, message in LAW),
    *(Mistake("tools/benchmarks/compare_methods.py", argv, message) for argv, message in METHODS),
    Mistake(
        "tools/benchmarks/compare_methods.py",
        "--out empty --report",
        "cell.json: ",
        write("empty/cells/cell.json", "{}"),
    ),
    *(Mistake("tests/stress/crash_test.py", argv, message) for argv, message in CRASH),
    *(Mistake("tests/stress/fuzz.py", argv, message) for argv, message in FUZZ),
    Mistake("tests/stress/fuzz.py", "decision-log --corpus shut/corpus", "shut", write("shut", "")),
    *(Mistake("tools/benchmarks/benchmark.py", argv, message) for argv, message in BENCHMARK),
    *(Mistake("tests/stress/parallel_delay.py", argv, message) for argv, message in DELAY),
    *(Mistake("tools/dev/write_reference.py", argv, message) for argv, message in REFERENCE),
]
