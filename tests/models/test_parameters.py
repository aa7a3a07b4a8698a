import jax
import jax.numpy as jnp

from skyjax.models.parameters import Row, table


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
