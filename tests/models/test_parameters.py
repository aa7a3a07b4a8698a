import jax
import jax.numpy as jnp

from skyjax.models.parameters import Row, parts, show, table


def test_table_counts_arrays_and_shapes_alike():
    def make():
        return {
            "sar": {"layers": {"kernel": jnp.zeros((2, 3, 4))}, "bias": jnp.zeros(5)},
            "fusion": {"scale": jnp.zeros(())},
        }

    for params in (make(), jax.eval_shape(make)):
        got = table(params)
        assert got.rows == (
            Row("fusion/scale", (), 1),
            Row("sar/bias", (5,), 5),
            Row("sar/layers/kernel", (2, 3, 4), 24),
        )
        assert got.parts == {"fusion": 1, "sar": 29}
        assert got.total == 30


def test_parts_go_as_deep_as_asked():
    params = {"encoder": {"sar": {"bias": jnp.zeros(5)}}, "heads": {"kernel": jnp.zeros(2)}}
    assert table(params, levels=2).parts == {"encoder/sar": 5, "heads/kernel": 2}


def test_parts_are_those_that_the_paper_counts():
    encoder = {
        "sar": {"kernel": jnp.zeros(3)},
        "optical": {"kernel": jnp.zeros(10)},
        "up_heads": {"sar": {"cells": jnp.zeros(20)}},
        "fusion": {"dates": jnp.zeros((4, 5)), "projection": jnp.zeros(300)},
        "prototypes": {"query": jnp.zeros(1000)},
    }
    heads = {"sar": {"pixel": jnp.zeros(40_000)}, "alignment": {"sar": jnp.zeros(60_000)}}
    lines = parts(encoder, heads, jnp.zeros((4, 500)))
    assert {line.name: line.count for line in lines if not line.members} == {
        "optical": 10,
        "sar": 3,
        "up_heads/sar": 20,
        "fusion": 300,
        "fusion/dates": 20,
        "prototypes": 1000,
        "prototypes/table (state)": 2000,
        "heads/alignment": 60_000,
        "heads/sar": 40_000,
    }
    assert {line.name: line.count for line in lines if line.members} == {
        "fusion with up-heads and dates": 340,
        "geo-prototypes": 3000,
        "encoder with prototypes": 3353,
        "heads": 100_000,
        "total": 103_353,
    }
    text = show(lines, {"GFLOPs": {"fusion": 2_000_000_000, "up_heads/sar": 500_000_000}}).splitlines()
    found = {line.split("  ")[0].removeprefix("= "): line.split() for line in text[1:] if line.startswith("= ")}
    assert found["fusion with up-heads and dates"][-4:] == ["340", "2.5", "398", "M"]
    assert found["encoder with prototypes"][-2:] == ["3,353", "2.5"]
    assert found["total"][1:] == ["total", "103,353", "2.5", "2.06", "B"]


def test_one_encoder_alone_has_no_empty_lines():
    assert [line.name for line in parts({"sar": {"kernel": jnp.zeros(3)}}, {})] == ["sar", "encoder", "total"]
