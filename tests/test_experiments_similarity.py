"""The page of violins."""

import json

import numpy as np
import pytest

from avd_jax.experiments import similarity
from avd_jax.generation.predictions import Step


def steps(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Step(1000.0 - i, rng.normal(0.8 - 0.01 * i, 0.05, (6, 4)).astype(np.float32)) for i in range(count)]


def test_a_page_has_a_violin_for_each_step_but_not_more_than_fit(tmp_path):
    found = {"student <1>": steps(4), "teacher": steps(50, seed=1)}
    page = similarity.write(found, tmp_path, about="Of 6 videos.").read_text()
    assert page.count("<polygon") == 4 + similarity.MOST_VIOLINS
    assert "student &lt;1&gt;" in page
    assert "nan" not in page
    record = json.loads((tmp_path / "similarity.json").read_text())
    assert [len(entries) for entries in record.values()] == [4, 50]
    np.testing.assert_allclose(record["teacher"][49]["similarities"], found["teacher"][49].similarities, atol=1e-6)
    assert ">951<" in page, "the last step is shown"


def test_a_violin_is_wide_where_the_values_are():
    values = np.concatenate([np.full(30, 0.2), np.full(10, 0.8)]) + np.linspace(-0.02, 0.02, 40)
    places, shares = similarity.density(values)
    assert places[[0, -1]] == pytest.approx([values.min(), values.max()])
    assert places[shares.argmax()] == pytest.approx(0.2, abs=0.05)
    assert shares.max() == 1
    assert shares[np.abs(places - 0.8).argmin()] == pytest.approx(1 / 3, abs=0.1)
    assert shares[np.abs(places - 0.5).argmin()] < 0.2


def test_values_that_are_all_the_same(tmp_path):
    same = [Step(1000.0, np.ones((2, 3), np.float32))]
    assert "nan" not in similarity.write({"still": same}, tmp_path, about="").read_text()
