"""Programs that libtpu compiles without a TPU, counted from their text and by hand."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyjax.parallel import hlo, hlo_text, topology

pytest.importorskip("libtpu")
V5E = topology.describe("v5e:2x2")  # sets what libtpu reads when it is loaded

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import mesh_utils  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

LAYERS, WIDTH, HIDDEN, ROWS = 4, 512, 1024, 2048  # ROWS on all four chips together
FORWARD = LAYERS * 2 * (2 * ROWS * WIDTH * HIDDEN)  # FLOPs
WEIGHTS = LAYERS * 2 * WIDTH * HIDDEN * 2  # bytes, in bf16


def line_mesh():
    return Mesh(mesh_utils.create_device_mesh((4,), V5E), ("fsdp",))


def slices_mesh(count):
    devices = topology.describe("v5e:2x2", count)
    return Mesh(mesh_utils.create_hybrid_device_mesh((1, 4), (count, 1), devices), ("data", "fsdp"))


def compile_for(mesh, function, *arguments, **options):
    """`arguments`: (shape, spec) or (shape, spec, dtype), in any tree."""

    def abstract(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    is_leaf = lambda tree: isinstance(tree, tuple) and len(tree) > 1 and isinstance(tree[1], P)  # noqa: E731
    arguments = jax.tree.map(lambda leaf: abstract(*leaf), arguments, is_leaf=is_leaf)
    if options.pop("trains", False):
        options |= {"donate_argnums": 0, "out_shardings": jax.tree.map(lambda leaf: leaf.sharding, arguments[0])}
    return jax.jit(function, **options).lower(*arguments).compile()


def in_shards(mesh, function, spec):
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def mlp_step(unroll):
    """Gradient descent on a residual MLP; inputs take a gradient too, so that each layer has six equal products."""

    def step(state, x):
        def loss(state):
            def layer(x, weights):
                up, down = (w.astype(jnp.bfloat16) for w in weights)
                return x + jax.nn.gelu(x @ up) @ down, None

            weights, shift = state
            out, _ = jax.lax.scan(layer, x + shift.astype(jnp.bfloat16), weights, unroll=unroll)
            return jnp.square(out.astype(jnp.float32)).mean()

        return jax.tree.map(lambda p, g: p - 0.1 * g, state, jax.grad(loss)(state))

    return step


def mlp_program(mesh, spec, batch_spec, unroll):
    weights = ((LAYERS, WIDTH, HIDDEN), spec), ((LAYERS, HIDDEN, WIDTH), spec)
    state = weights, ((WIDTH,), P())
    return compile_for(mesh, mlp_step(unroll), state, ((ROWS, WIDTH), batch_spec, jnp.bfloat16), trains=True)


@pytest.fixture(scope="module")
def data_parallel():
    """The MLP scanned and unrolled, weights on every chip."""
    return [mlp_program(line_mesh(), P(), P("fsdp"), unroll) for unroll in (1, LAYERS)]


@pytest.fixture(scope="module")
def sharded():
    """The MLP scanned and unrolled, weights in four parts."""
    return [mlp_program(line_mesh(), P(None, "fsdp"), P("fsdp"), unroll) for unroll in (1, LAYERS)]


@pytest.mark.parametrize("name", ["data_parallel", "sharded"])
def test_a_scan_computes_what_the_unrolled_loop_does(name, request):
    scanned, unrolled = (hlo.analyse(program.as_text()) for program in request.getfixturevalue(name))
    assert scanned.flops == unrolled.flops == 3 * FORWARD // 4
    assert not scanned.unknown + unrolled.unknown
    assert scanned.hbm_bytes == pytest.approx(unrolled.hbm_bytes, rel=0.25)


def test_xla_counts_the_scan_once(data_parallel):
    scanned, unrolled = data_parallel
    assert scanned.cost_analysis()["flops"] < 0.4 * hlo.analyse(scanned.as_text()).flops
    # Its own work an element is within 2 % here.
    assert unrolled.cost_analysis()["flops"] == pytest.approx(hlo.analyse(unrolled.as_text()).flops, rel=0.02)


def test_gradients_are_reduced_once_a_layer(data_parallel):
    for program in data_parallel:
        (reduced,) = hlo.analyse(program.as_text()).collectives.values()
        # Beside the weights' gradient in bf16, that of the shift.
        assert reduced.ici_bytes == pytest.approx(2 * WEIGHTS * 3 / 4, rel=0.002)


def test_sharded_weights_are_gathered_and_their_gradients_scattered(sharded):
    scanned, unrolled = (hlo.analyse(program.as_text()).collectives for program in sharded)
    assert scanned["reduce-scatter"].ici_bytes == unrolled["reduce-scatter"].ici_bytes == WEIGHTS * 3 // 4
    # The scan gathers a layer's two weights forward and again backward; unrolled, XLA keeps some from the way forward.
    assert scanned["all-gather"] == hlo.Traffic(4 * LAYERS, 2 * WEIGHTS * 3 // 4, 0)
    assert WEIGHTS * 3 // 4 <= unrolled["all-gather"].ici_bytes < scanned["all-gather"].ici_bytes


def test_bytes_agree_with_xla_where_nothing_loops_and_nothing_fits_vmem():
    def run(w, x):
        first = jnp.tanh(x @ w)
        return jnp.sin(first), first.sum(0)

    program = compile_for(line_mesh(), run, ((512, 512), P()), ((4 * 131_072, 512), P("fsdp")))
    # XLA adds what it keeps in VMEM, here the weights.
    assert 0.98 < hlo.analyse(program.as_text()).hbm_bytes / program.cost_analysis()["bytes accessed"] <= 1


def test_a_scan_reads_a_layer_of_the_stack_and_writes_one():
    width, layers = 2048, 6

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, weights)

    program = compile_for(line_mesh(), run, ((layers, width, width), P()), ((4 * 32768, width), P("fsdp")))
    layer, activations = width * width * 4, 32768 * width * 4  # too large for VMEM
    # The compiler copies the carried activations, writes them into the stack and makes the next ones: each time one is
    # read and one written. It makes all weights bf16 beforehand. The whole stacks a turn would be three times as much.
    turn = 6 * activations + layer // 2
    before = 2 * activations + layers * (layer + layer // 2)
    assert hlo.analyse(program.as_text()).hbm_bytes == pytest.approx(layers * turn + before, rel=0.01)


def test_a_ring_in_a_scan_by_hand():
    def ring(x):
        def turn(x, _):
            x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
            return x + jax.lax.psum(x[:8], "fsdp").mean(), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    mesh = line_mesh()
    program = hlo.analyse(compile_for(mesh, in_shards(mesh, ring, P("fsdp")), ((4 * 4096, 4096), P("fsdp"))).as_text())
    assert program.collectives == {
        "all-reduce": hlo.Traffic(5, 5 * 2 * (8 * 4096 * 4) * 3 // 4, 0),
        "collective-permute": hlo.Traffic(5, 5 * 4096 * 4096 * 4, 0),
    }
    first = program.largest_collectives[0]
    assert first.kind == "collective-permute"
    assert first.op_name.endswith("ppermute")
    assert program.largest_buffers[0].shape == "f32[4096,4096]"


def test_a_kernel_counts_by_its_declared_cost_or_is_named():
    def double(source, target):
        target[...] = 2 * source[...]

    def run(x, cost):
        kernel = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32), cost_estimate=cost)
        return jax.lax.scan(lambda x, _: (kernel(x), None), x, None, length=3)[0]

    mesh, shape = line_mesh(), ((4 * 256, 256), P("fsdp"))
    cost = pl.CostEstimate(flops=12_345, transcendentals=7, bytes_accessed=6_789)
    declared = hlo.analyse(compile_for(mesh, in_shards(mesh, lambda x: run(x, cost), P("fsdp")), shape).as_text())
    silent = hlo.analyse(compile_for(mesh, in_shards(mesh, lambda x: run(x, None), P("fsdp")), shape).as_text())
    assert (declared.flops, declared.unknown) == (3 * 12_345, ())
    assert silent.flops == 0
    assert len(silent.unknown) == 1
    assert "tpu_custom_call without a declared cost" in silent.unknown[0]
    assert "pallas_call" in silent.unknown[0]


@pytest.mark.parametrize("slices", [2, 4])
def test_gradients_cross_slices_in_shares(slices):
    mesh = slices_mesh(slices)
    batch = ((ROWS * slices, WIDTH), P(("data", "fsdp")), jnp.bfloat16)
    weights = ((LAYERS, WIDTH, HIDDEN), P(None, "fsdp")), ((LAYERS, HIDDEN, WIDTH), P(None, "fsdp"))
    program = compile_for(mesh, mlp_step(1), (weights, ((WIDTH,), P())), batch, trains=True)
    found = hlo.analyse(program.as_text(), [topology.slice_of(device) for device in mesh.devices.flatten()])
    share = WEIGHTS // 4  # after the reduction inside a slice
    assert found.dcn_bytes == pytest.approx(2 * share * (slices - 1) // slices, rel=0.01)
    assert found.collectives["reduce-scatter"].ici_bytes == WEIGHTS * 3 // 4
    assert found.largest_collectives[0].traffic.dcn_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_a_large_gradient_a_chip_sends_its_share_of_a_slice_and_a_small_one_whole(dtype):
    mesh = Mesh(mesh_utils.create_hybrid_device_mesh((4, 4), (2, 1), topology.describe("v5e:4x4", 2)), ("data", "fsdp"))
    width, hidden, size = 1024, 2048, jnp.dtype(dtype).itemsize

    def step(weights, x):
        def loss(weights):
            matrix, bias = weights
            return jnp.sum(jnp.square(x @ matrix.astype(dtype) + bias).astype(jnp.float32))

        return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))

    weights = ((width, hidden), P("fsdp")), ((hidden,), P())
    program = compile_for(mesh, step, weights, ((2048, width), P(("data", "fsdp")), dtype), trains=True)
    found = hlo.analyse(program.as_text(), [topology.slice_of(device) for device in mesh.devices.flatten()])
    sent = {collective.traffic.dcn_bytes: collective.op_name for collective in found.largest_collectives}
    whole = width * hidden * size
    # Summed over two slices; 4 x 4 chips of a slice have scattered the matrix before: over fsdp, then over data.
    assert set(sent) - {0} == {whole // 16, hidden * 4}
    assert found.collectives["reduce-scatter"].ici_bytes == whole * 3 // 4 + whole // 4 * 3 // 4
    assert "dot_general" in sent[whole // 16]
    assert "reduce_sum" in sent[hidden * 4]


def test_each_kind_between_slices_by_hand():
    mesh = slices_mesh(2)

    def exchange(x):
        return (
            jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
            jax.lax.psum_scatter(2 * x, "data", tiled=True),
            jax.lax.all_gather(3 * x, "data", tiled=True),
            jax.lax.psum(4 * x, ("data", "fsdp")),
        )

    both = P(("data", "fsdp"))
    found = hlo.analyse(compile_for(mesh, in_shards(mesh, exchange, both), ((8 * 64, 1024), both)).as_text(), [0] * 8)
    size = 64 * 1024 * 4
    assert {kind: traffic.dcn_bytes for kind, traffic in found.collectives.items()} == {
        "collective-permute": size,
        "all-to-all": size // 2,
        "reduce-scatter": size // 2,
        "all-gather": size,
        "all-reduce": 2 * (size // 4) // 2,  # of a chip's share
    }
    # The sum over all chips inside a slice: scattered and gathered.
    assert found.ici_bytes == 2 * size * 3 // 4


def test_loops_in_loops_and_branches():
    def run(x):
        def inner(x, _):
            return jnp.tanh(x @ x), None

        def outer(x, i):
            x = jax.lax.scan(inner, x, None, length=3)[0]
            return jax.lax.cond(i % 2 == 0, lambda x: x @ x @ x, lambda x: x + 1, x), None

        return jax.lax.scan(outer, x, jnp.arange(5))[0]

    mesh = line_mesh()
    program = hlo.analyse(compile_for(mesh, in_shards(mesh, run, P("fsdp")), ((4 * 256, 256), P("fsdp"))).as_text())
    product = 2 * 256**3
    assert program.flops == 5 * (3 + 2) * product  # the larger branch each time
    assert not program.unknown


def test_a_loop_of_unknown_length_is_named_and_counted_once():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)

    mesh = line_mesh()
    program = hlo.analyse(compile_for(mesh, in_shards(mesh, run, P("fsdp")), ((4 * 256, 256), P("fsdp"))).as_text())
    assert program.flops == 2 * 256**3
    assert len(program.unknown) == 1
    assert "unknown length, counted once" in program.unknown[0]


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 7, 1), (2, 13, 3), (9, 0, -2)])
def test_counters_of_any_start_and_step(start, stop, step):
    def run(x):
        def turn(state):
            return state[0] + step, jnp.tanh(state[1] @ state[1])

        more = (lambda state: state[0] < stop) if step > 0 else (lambda state: state[0] > stop)
        return jax.lax.while_loop(more, turn, (start, x))[1]

    mesh = line_mesh()
    program = hlo.analyse(compile_for(mesh, in_shards(mesh, run, P("fsdp")), ((4 * 256, 256), P("fsdp"))).as_text())
    assert program.flops == len(range(start, stop, step)) * 2 * 256**3


def test_convolutions_of_images():
    """On the CPU, where the text has the convolution as it was written."""

    def run(x, kernel):
        same = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(same, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
    text = jax.jit(run).lower(*shapes).as_text("hlo")
    inside = sum(0 <= row + k < 8 for row in range(8) for k in (-1, 0, 1)) ** 2
    assert hlo.analyse(text).flops == 2 * 2 * 4 * 4 * (inside + 3 * 3 * 3 * 3)


def test_a_gradient_of_a_strided_convolution_has_no_products_with_its_gaps():
    def run(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    gradient = jax.jit(lambda x, k: jax.grad(lambda x: run(x, k).sum())(x))
    assert (
        hlo.analyse(gradient.lower(*shapes).as_text("hlo")).flops
        == hlo.analyse(jax.jit(run).lower(*shapes).as_text("hlo")).flops
    )


ONE_OF_EACH = """\
HloModule step, num_partitions=8

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %gather = f32[8192]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %sum = f32[1024]{0} all-reduce(%x), replica_groups={{0,1,4,5},{2,3,6,7}}, to_apply=%add
  %part = f32[128]{0} reduce-scatter(%x), replica_groups={}, dimensions={0}, to_apply=%add
  %swap = f32[1024]{0} all-to-all(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %near = f32[1024]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0},{4,4}}
  ROOT %far = f32[1024]{0} collective-permute(%x), source_target_pairs={{0,4},{1,2}}
}
"""


def test_a_text_that_is_cut_off_is_not_counted():
    lines = ONE_OF_EACH.splitlines()
    root = next(i for i, line in enumerate(lines) if "ROOT %far" in line)
    with pytest.raises(ValueError, match="cut off"):
        hlo.analyse("\n".join(lines[:root]))


def test_groups_that_span_slices_by_hand():
    alone, across = hlo.analyse(ONE_OF_EACH), hlo.analyse(ONE_OF_EACH, [0] * 4 + [1] * 4)
    assert alone.collectives == {
        "all-gather": hlo.Traffic(1, 7 * 4096, 0),
        "all-reduce": hlo.Traffic(1, 2 * 3 * 1024, 0),
        "all-to-all": hlo.Traffic(1, 2048, 0),
        "collective-permute": hlo.Traffic(2, 2 * 4096, 0),
        "reduce-scatter": hlo.Traffic(1, 7 * 512, 0),
    }
    assert across.collectives == {
        "all-gather": hlo.Traffic(1, 8 * 4096 * 3 // 4, 8192 // 2),  # 4 chips a slice, a share of 8192
        "all-reduce": hlo.Traffic(1, 2 * 4096 // 2, 2 * 2048 // 2),  # 2 chips a slice, a share of 2048
        "all-to-all": hlo.Traffic(1, 0, 2048),  # its pairs lie in two slices
        "collective-permute": hlo.Traffic(2, 2 * 4096, 4096),
        "reduce-scatter": hlo.Traffic(1, 4096 * 3 // 4, 1024 // 2),
    }
    with pytest.raises(ValueError, match="8 devices, and the slices of 12"):
        hlo.analyse(ONE_OF_EACH, [0] * 12)


@given(st.data())
def test_iota_groups_are_numpys(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    count = int(np.prod(shape))
    rows = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    written = ",".join(map(str, shape)), ",".join(map(str, order))
    text = f"[{rows},{count // rows}]<=[{written[0]}]T({written[1]})"
    want = np.arange(count).reshape(shape).transpose(order).reshape(rows, -1)
    assert hlo_text.replica_groups(text, count) == want.tolist()


@given(st.data())
def test_groups_along_a_meshs_axes_are_numpys(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    along = data.draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, unique=True))
    axes = ",".join(f"'axis_{i}'={size}" for i, size in enumerate(shape))
    inside = ",".join(f"'axis_{i}'" for i in along)
    text = f"mesh[{axes}] {{{inside}}}"
    count, width = int(np.prod(shape)), int(np.prod([shape[i] for i in along]))
    outside = [i for i in range(len(shape)) if i not in along]
    want = np.arange(count).reshape(shape).transpose(outside + along).reshape(-1, width)
    assert hlo_text.replica_groups(text, count) == want.tolist()


def test_groups_along_a_part_of_an_axis():
    # An axis of 8 as (2, 4): the inner 4, and the outer 2.
    assert hlo_text.replica_groups("mesh['a'=8] {'a':(2)4}", 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert hlo_text.replica_groups("mesh['a'=8] {'a':(1)2}", 8) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(ValueError, match="not understood"):
        hlo_text.replica_groups("<all of them>", 8)


def test_shapes():
    read = hlo_text.parse_shape("(bf16[4,256]{1,0:T(8,128)(2,1)S(1)}, (s4[3]{0}, pred[]), /*index=2*/token[])")
    packed, flag, token = read[1][0], read[1][1], read[2]
    assert (read[0].dims, read[0].space, read[0].bytes) == ((4, 256), 1, 2048)
    assert (packed.bytes, packed.space, flag.bytes, token.bytes) == (2, 0, 1, 0)


def test_lines_that_are_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.analyse("HloModule nothing\n")
    with pytest.raises(ValueError, match='"what is this" is not understood'):
        hlo.analyse("HloModule x\n\nENTRY %main () -> f32[] {\n  what is this\n}\n")


def test_a_real_shortage_of_hbm():
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        compile_for(line_mesh(), lambda a: jnp.tanh(a @ a) @ a, ((65536, 65536), P()))
    found = hlo.parse_out_of_memory(str(raised.value))
    assert found.memory == "hbm"
    assert found.needed_bytes >= 2 * 65536**2 * 4
    assert found.limit_bytes == 15.75 * 2**30
    assert hlo.parse_out_of_memory("INVALID_ARGUMENT: something else") is None


def test_a_real_shortage_lists_its_buffers():
    def corner(source, target):
        target[:8, :128] = source[:8, :128]

    def run(x):
        return pl.pallas_call(corner, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    mesh = line_mesh()
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        compile_for(mesh, in_shards(mesh, run, P("fsdp")), ((4 * 8192, 4096), P("fsdp")))
    found = hlo.parse_out_of_memory(str(raised.value))
    assert (found.memory, found.needed_bytes, found.limit_bytes) == ("vmem", 2**28, 2**27)
    assert [buffer.bytes for buffer in found.buffers] == [2**27, 2**27]
    assert all(buffer.op_name.endswith("pallas_call") and buffer.name for buffer in found.buffers)


def test_time_grows_with_the_length(data_parallel):
    """A program of 10 MB reads in seconds, and counts as often as its copies are called."""
    text = data_parallel[1].as_text()
    copies = 40
    body = re.sub(r"^ENTRY ", "", text[text.index("\n\n\n") :], flags=re.M)
    name = hlo_text.parse(text).entry.name
    parts = [re.sub(r"%([\w.\-]+)", rf"%\1.copy{i}", body) for i in range(copies)]
    calls = "".join(f"  %call.{i} = () call(), to_apply=%{name}.copy{i}\n" for i in range(copies))
    whole = f"HloModule many, num_partitions=4\n{''.join(parts)}\nENTRY %all () -> () {{\n{calls}}}\n"
    assert len(whole) > 8e6
    assert hlo.analyse(whole).flops == copies * hlo.analyse(text).flops


def test_a_value_that_many_instructions_share_is_looked_at_once():
    """Each of 60 sums takes the one before twice: without a memory, 2^60 looks for the loop's length."""
    sums = "\n".join(f"  %x.{i + 1} = s32[] add(%x.{i}, %x.{i})" for i in range(60))
    text = f"""HloModule m, entry_computation_layout={{(s32[])->s32[]}}

%body (p: (s32[], s32[])) -> (s32[], s32[]) {{
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x.0 = s32[] get-tuple-element(%p), index=1
{sums}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], s32[]) tuple(%next, %x.60)
}}

%condition (q: (s32[], s32[])) -> pred[] {{
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}}

ENTRY %main (a: s32[]) -> s32[] {{
  %a = s32[] constant(0)
  %start = (s32[], s32[]) tuple(%a, %a)
  %loop = (s32[], s32[]) while(%start), condition=%condition, body=%body
  ROOT %result = s32[] get-tuple-element(%loop), index=1
}}
"""
    module = hlo_text.parse(text)
    assert hlo_text.trip_count(module, module.entry.instructions["loop"], module.entry, {})[0] == 7
