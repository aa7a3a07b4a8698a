"""Where the state of every shipped config lives is what was agreed on, and never a large array on every chip."""

import difflib

import golden_state
import jax
import jax.numpy as jnp
import pytest
import shipped

from skyjax.errors import UserError
from skyjax.parallel.sharding import RULES
from skyjax.train import state as states


@pytest.fixture(scope="module", params=shipped.names())
def case(request):
    """Name and abstract state of each config."""
    return request.param, states.abstract(shipped.load(request.param))


@pytest.fixture(scope="module")
def huge():
    """The abstract state of SkySense at full size."""
    return states.abstract(shipped.load("skysense_huge"))


def difference(name, text):
    """What a table has that the accepted one has not."""
    path = shipped.state_file(name)
    accepted = path.read_text() if path.exists() else ""
    return "".join(
        difflib.unified_diff(
            accepted.splitlines(keepends=True), text.splitlines(keepends=True), f"{path.name}, accepted", "now"
        )
    )


def test_every_array_lives_where_it_was_agreed(case):
    name, state = case
    found = difference(name, shipped.state_table(name, state))
    assert not found, f"the state lives elsewhere; if that is meant, `make goldens` accepts it\n{found}"


def test_no_large_array_is_on_every_chip(case):
    name, state = case
    for topology, mesh in shipped.meshes(name).items():
        assert not golden_state.replicated_and_large(state, mesh), topology


def test_no_table_without_a_config():
    """A config that is gone takes its table with it."""
    assert {path.stem for path in shipped.STATES.glob("*.txt")} == set(shipped.names())


def replicated(pattern):
    """The rules with one more before them: what matches is on every chip."""
    return ((pattern, ()), *RULES)


def test_a_replicated_big_matrix_is_seen_in_the_table_and_by_the_rule_for_large_arrays(huge):
    rules = replicated(r"params/encoder/fusion/layers/feed_forward/up/kernel")
    found = difference("skysense_huge", shipped.state_table("skysense_huge", huge, rules))
    lines = [line for line in found.splitlines() if line.startswith("+") and "fusion/layers/feed_forward/up" in line]
    assert [line.split()[-1] for line in lines if " s " in line] == ["402,653,184"]  # the student's alone
    assert [line.split()[-1] for line in lines if " tmv " in line] == ["25,165,824"]
    (told,) = golden_state.replicated_and_large(huge, shipped.meshes("skysense_huge")["v5e:16x16"], rules)
    assert "encoder/fusion/layers/feed_forward/up/kernel" in told
    assert "384 MiB" in told


def test_a_parameter_without_a_rule_is_named(huge):
    mesh = shipped.meshes("skysense_huge")["v5e:16x16"]
    strange = huge | {"params": {"encoder": {"gate": jnp.ones(3)}}}
    with pytest.raises(UserError, match='no rule matches "params/encoder/gate"'):
        golden_state.leaves(strange, mesh)


def test_bytes_a_chip_are_those_of_the_shards(huge):
    """The table's arithmetic against JAX's own shape of a shard."""
    mesh = jax.sharding.AbstractMesh((2, 16, 2), ("data", "fsdp", "tensor"))
    shardings = golden_state.state_shardings(huge, mesh)
    whole = 0
    for leaf, array, sharding in zip(
        golden_state.leaves(huge, mesh), jax.tree.leaves(huge), jax.tree.leaves(shardings), strict=True
    ):
        shard = jax.ShapeDtypeStruct(sharding.shard_shape(array.shape), array.dtype)
        assert leaf.bytes_on(dict(mesh.shape)) == shard.size * shard.dtype.itemsize
        whole += shard.size * shard.dtype.itemsize
    assert whole < sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(huge)) / 8


def test_folded_paths_unfold_to_the_same():
    paths = [f"{a}/{b}/x" for a in "abc" for b in "de"] + ["a/d/y", "z", "b/d/y"]
    folded = golden_state.fold(paths)
    assert sorted(folded) == ["z", "{a,b,c}/{d,e}/x", "{a,b}/d/y"]
