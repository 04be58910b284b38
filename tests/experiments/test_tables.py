"""The committed tables are what the committed results say."""

import json
import math
import statistics

import pytest

from experiments.tables import (
    DOCUMENT,
    ORDER,
    OWN,
    RESULTS,
    ROOT,
    SEEDS,
    TIMES,
    document,
    read_table,
    recipe_values,
    result_path,
    variant_names,
)
from tokenshuffle_core.training.stages import parse_stages


def test_the_document_is_made_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


def test_every_table_is_listed():
    assert {path.stem for path in ROOT.glob("*.toml")} - {"variants"} == set(ORDER)


@pytest.mark.parametrize("name", variant_names())
def test_every_variant_is_a_recipe_and_in_a_table(name):
    for data in ("singles", "compositions"):
        values = {k: v for k, v in recipe_values(name, data).items() if k not in OWN}
        assert parse_stages(values | {"stage": [{"codes": "codes"}]}).stages[0].loop.steps > 0
    assert name in {row.variant for table in ORDER for row in read_table(table).rows}


def test_every_result_counts():
    counted = {
        result_path(name, data, seed)
        for name in variant_names()
        for data in ("singles", "compositions")
        for seed in SEEDS
    }
    for path in set(RESULTS.glob("*.json")) - {TIMES}:
        assert path in counted
        name, data, _ = path.stem.rsplit("-", 2)
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["recipe"] == recipe_values(name, data), path.name


def test_a_cell_is_the_mean_of_the_results():
    paths = [result_path("window-2", "compositions", seed) for seed in SEEDS]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    losses = [result["losses"]["validation_loss"][-1][1] for result in results]
    (line,) = [line for line in document().splitlines() if line.startswith("| window 2 |")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2].startswith(str(len(results)))
    assert math.isclose(float(cells[3].split()[0]), statistics.fmean(losses), abs_tol=6e-4)
