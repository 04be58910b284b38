"""The committed tables are what the committed results say."""

import json
import math
import statistics

import pytest

from experiments.tables import (
    DOCUMENT,
    ORDER,
    RESULTS,
    ROOT,
    document,
    read_table,
    read_variants,
)
from tokenshuffle_core.training.stages import parse_stages


def test_the_document_is_made_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


def test_every_table_is_listed():
    assert {path.stem for path in ROOT.glob("*.toml")} - {"variants"} == set(ORDER)


@pytest.mark.parametrize("name", read_variants())
def test_every_variant_is_a_recipe_and_in_a_table(name):
    variant = read_variants()[name]
    values = {key: value for key, value in variant.items() if key not in ("rank", "after")}
    assert parse_stages(values | {"stage": [{"codes": "codes"}]}).stages[0].loop.steps > 0
    assert name in {row.variant for table in ORDER for row in read_table(table).rows}


def test_no_result_is_of_another_recipe():
    variants = read_variants()
    for path in RESULTS.glob("*-seed-*.json"):
        name, _, seed = path.stem.rpartition("-seed-")
        result = json.loads(path.read_text(encoding="utf-8"))
        assert (result["recipe"], result["seed"]) == (variants[name], int(seed)), path.name


def test_a_cell_is_the_mean_of_the_results():
    paths = sorted(RESULTS.glob("window-2-seed-*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    losses = [result["losses"]["trained_loss"][-1][1] for result in results]
    (line,) = [line for line in document().splitlines() if line.startswith("| window 2 |")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == str(len(results))
    assert math.isclose(float(cells[3].split()[0]), statistics.fmean(losses), abs_tol=6e-4)
