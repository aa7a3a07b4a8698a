import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.stats
from numpy.testing import assert_allclose

from skyjax.models import answers

CONFIG = ml_collections.ConfigDict(
    {
        "dtype": "float32",
        "spatial_width": 9,
        "fusion": {"width": 6},
        "text": {"width": 5},
        "answers": {"count": 4, "width": 8},
    }
)


def test_logits_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    params = answers.init(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape), params)
    pooled, question = rng.normal(2, 3, (7, 6)), rng.normal(size=(7, 5))

    def dense(name, x):
        return x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"], np.float64)

    def norm(name, x):
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + answers.EPSILON)
        return unit * np.asarray(params[name]["scale"]) + np.asarray(params[name]["bias"])

    image = np.tanh(dense("image", norm("image_norm", pooled)))
    asked = np.tanh(dense("question", norm("question_norm", question)))
    hidden = dense("hidden", image * asked)
    want = dense("out", hidden * scipy.stats.norm.cdf(hidden))
    got = answers.apply(CONFIG, params, jnp.asarray(pooled, jnp.float32), jnp.asarray(question, jnp.float32))
    assert got.dtype == jnp.float32
    assert_allclose(got, want, atol=1e-5)


def test_an_answer_of_both_is_learned():
    """Whether image and question are of one sign, which neither of them tells alone."""
    rng = np.random.default_rng(0)
    pooled, question = rng.normal(size=(256, 6)).astype(np.float32), rng.normal(size=(256, 5)).astype(np.float32)
    answer = (pooled[:, 0] > 0) == (question[:, 0] > 0)
    params = answers.init(CONFIG, jax.random.key(1))

    @jax.jit
    def step(params):
        def loss(params):
            log_p = jax.nn.log_softmax(answers.apply(CONFIG, params, pooled, question))
            return -jnp.mean(jnp.take_along_axis(log_p, answer[:, None].astype(int), axis=1))

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 1.0 * g, params, gradient)

    for _ in range(300):
        _, params = step(params)
    right = np.asarray(answers.apply(CONFIG, params, pooled, question)).argmax(1) == answer
    assert right.mean() > 0.9
