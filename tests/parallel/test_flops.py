"""Counted by hand on small parts, exactly the matrix products that JAX traces at paper size, and XLA's own count."""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from skyjax.config import load_config
from skyjax.models import decoder, skysense, text
from skyjax.objectives.heads import init_heads
from skyjax.objectives.objective import objective
from skyjax.parallel import flops
from skyjax.parallel.flops import Images

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "skysense.py"
IMAGE_TEXT = CONFIG.with_name("image_text.py")


def test_a_vit_by_hand():
    part = ml_collections.ConfigDict({"width": 6, "depth": 2, "heads": 3, "patch_size": 2, "bands": ("a", "b", "c")})
    # 5 x 3 pixels are 3 x 2 patches; with the class token 7 tokens.
    embedding = 2 * 6 * (2 * 2 * 3) * 6
    projections = 4 * (2 * 7 * 6 * 6)
    scores_and_values = 2 * (2 * 7 * 7 * 6)
    feed_forward = 2 * (2 * 7 * 6 * 24)
    want = 5 * (embedding + 2 * (projections + scores_and_values + feed_forward))
    assert flops.vit(part, Images(5, 5, 3), 5) == (want, (3, 2))


def test_a_swin_by_hand():
    part = ml_collections.ConfigDict(
        {"width": 4, "depths": (1, 2), "heads": (1, 2), "window": 4, "patch_size": 2, "bands": ("a", "b", "c")}
    )
    # 12 x 10 pixels: stage 0 has 6 x 5 places, padded to 8 x 8 for windows of 16 places.
    embedding = 2 * 30 * (2 * 2 * 3) * 4
    bias = 49 * (2 * 2 * 512 + 2 * 512 * 1)
    first = 4 * (2 * 64 * 4 * 4) + 2 * (2 * 64 * 16 * 4) + 2 * (2 * 30 * 4 * 16)
    # Stage 1 has 3 x 3 places, fewer than a window: one window of 9.
    merging = 2 * 9 * (4 * 4) * 8
    second = 4 * (2 * 9 * 8 * 8) + 2 * (2 * 9 * 9 * 8) + 2 * (2 * 9 * 8 * 32)
    bias_of_two_heads = 49 * (2 * 2 * 512 + 2 * 512 * 2)
    want = 3 * (embedding + first + merging + 2 * second) + bias + 2 * bias_of_two_heads
    assert flops.swin_v2(part, Images(3, 12, 10), 3) == (want, (3, 3))


def test_a_convolutional_stem_by_hand():
    part = ml_collections.ConfigDict({"width": 8, "depth": 0, "patch_size": 8, "bands": ("a", "b"), "stem": "conv"})
    # 16 x 8 pixels: 4 x 2 patches of 4 x 4 pixels, then one stage to 2 x 1 places.
    patches = 2 * 8 * (4 * 4 * 2) * 4
    stage = 2 * 2 * (9 * 4) * 8 + 2 * 2 * (9 * 8) * 8 + 2 * 2 * (4 * 4) * 8
    assert flops.vit(part, Images(1, 16, 8), 3) == (3 * (patches + stage), (2, 1))


def test_fusion_and_prototypes_by_hand():
    part = ml_collections.ConfigDict({"width": 8, "depth": 2, "heads": 2})
    projection = 2 * 4 * 12 * 8
    first = 4 * (2 * 5 * 8 * 8) + 2 * (2 * 5 * 5 * 8) + 2 * (2 * 5 * 8 * 32)
    last = 2 * (2 * 5 * 8 * 8) + 2 * (2 * 8 * 8) + 2 * (2 * 5 * 8) + 2 * (2 * 8 * 32)
    assert flops.fusion(part, spatial_width=12, places=10, dates=4) == 10 * (projection + first + last)
    bank = ml_collections.ConfigDict({"width": 3, "count": 7})
    query, scores, values, out = 2 * 8 * 3, 2 * 3 * 7, 2 * 7 * 3, 2 * (8 + 3) * 8
    assert flops.prototypes(bank, width=8, places=10) == 10 * (query + scores + values + out)


def test_heads_by_hand():
    config = load_config(CONFIG, ["size=tiny", "objective.pixel.tokens=5", "objective.object.clusters=3"])
    row = 2 * 768 * 512 + 2 * 512 * 128 + 2 * 128 * 4096
    # Two pairs of global views and eight of a local with a global one; 20 and 5 dates; places are plenty.
    maps = 2 * 20 + 8 * 5
    assert flops.heads(config)["heads/multispectral"] == maps * (5 + 3 + 1) * row
    config.objective.weights.object = 0.0
    assert flops.heads(config)["heads/multispectral"] == maps * (5 + 1) * row
    config.objective.kind = "infonce"  # without classes
    assert flops.heads(config)["heads/fused"] == 10 * (5 + 1) * (2 * 192 * 512 + 2 * 512 * 128)


def test_a_text_tower_by_hand():
    part = ml_collections.ConfigDict({"width": 6, "depth": 2, "heads": 2, "embed_dim": 5, "pool": "query"})
    # 7 tokens: projections, scores and values, feed-forward.
    of_layer = 4 * (2 * 7 * 6 * 6) + 2 * (2 * 7 * 6 * 7) + 2 * (2 * 7 * 6 * 24)
    query_and_out, keys_and_values, looking = 2 * (2 * 6 * 6), 2 * (2 * 7 * 6 * 6), 2 * (2 * 6 * 7)
    pool = query_and_out + keys_and_values + looking + 2 * (2 * 6 * 24)
    projection = 2 * 6 * 5
    assert flops.text(part, 7, texts=3) == 3 * (2 * of_layer + pool + projection)
    part.pool = "last"
    assert flops.text(part, 7) == 2 * of_layer + projection


def test_a_decoder_by_hand():
    part = {"width": 6, "depth": 2, "heads": 2, "vocabulary": 11}
    model = ml_collections.ConfigDict({"decoder": part, "fusion": {"width": 4}, "spatial_width": 9})
    # 7 tokens on 5 places, beside which stands a learned one.
    itself = 4 * (2 * 7 * 6 * 6) + 2 * (2 * 7 * 6 * 7) + 2 * (2 * 7 * 6 * 24)
    image = 2 * (2 * 7 * 6 * 6) + 2 * (2 * 6 * 6 * 6) + 2 * (2 * 7 * 6 * 6)
    want = 2 * 5 * 4 * 6 + 2 * (itself + image) + 2 * 7 * 6 * 11
    assert flops.decoder(model, 7, 5, texts=3) == 3 * want
    model.fusion = None
    assert flops.decoder(model, 7, 5) == want + 2 * 5 * (9 - 4) * 6


@pytest.mark.parametrize("pool", ["last", "query"])
def test_words_equal_the_products_that_are_traced(pool):
    part = text.preset("siglip-b", 1000, pool=pool)
    base = {"dtype": "bfloat16", "scan": True, "remat": "none", "spatial_width": 96, "fusion": {"width": 64}}
    writer = {"vocabulary": 1000, "length": 64, "width": 256, "depth": 4, "heads": 8, "tied": True}
    model = ml_collections.ConfigDict(base | {"text": part, "decoder": writer})
    struct, b, n, places = jax.ShapeDtypeStruct, 3, 50, 40
    tokens, valid = struct((b, n), jnp.int32), struct((b, n), bool)

    def read(params, tokens, valid):
        return text.apply(model, params, tokens, valid)

    params = jax.eval_shape(lambda: text.init(model, jax.random.key(0)))
    traced = flops.products(jax.make_jaxpr(read)(params, tokens, valid).jaxpr)
    choice = 2 * b * n * 768 if pool == "last" else 0  # of the last token, which is written as a product
    assert flops.text(model.text, n, texts=b) == traced - choice

    def write(params, tokens, valid, images, there):
        return decoder.logits(model, params, decoder.features(model, params, tokens, valid, images, there))

    params = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    images = struct((b, places, 64), jnp.bfloat16), struct((b, places), bool)
    traced = flops.products(jax.make_jaxpr(write)(params, tokens, valid, *images).jaxpr)
    assert flops.decoder(model, n, places, texts=b) == traced


def abstract_images(model, images, sites):
    def of(modality, size):
        bands = len(model.modalities[modality].bands)
        struct = jax.ShapeDtypeStruct
        return {
            "values": struct((sites, *size, bands), jnp.float32),
            "days": struct((sites, size.dates), jnp.int32),
            "valid": struct((sites, size.dates), bool),
            "clear": struct((sites, *size), bool),
            "bands": struct((sites, bands), bool),
        }

    return {modality: of(modality, size) for modality, size in images.items()}


def abstract_call(model, images, sites):
    """The encoder as a function of shapes: (function, its abstract arguments)."""
    inputs = {"images": abstract_images(model, images, sites)}
    if model.prototypes:
        bank = model.prototypes
        inputs["lonlat"] = jax.ShapeDtypeStruct((sites, 2), jnp.float32)
        inputs["prototypes"] = jax.ShapeDtypeStruct((bank.regions**2, bank.count, bank.width), jnp.float32)
    params = jax.eval_shape(lambda key: skysense.init(model, key), jax.random.key(0))
    return lambda params, inputs: skysense.apply(model, params, **inputs), (params, inputs)


EVERYTHING = {"optical": Images(1, 512, 512), "multispectral": Images(20, 16, 16), "sar": Images(10, 16, 16)}


@pytest.mark.parametrize(
    ("size", "images", "places"), [("huge", EVERYTHING, 16 * 16), ("tiny", {"optical": Images(1, 500, 330)}, 16 * 11)]
)
def test_equals_the_products_that_are_traced(size, images, places):
    # Positions of the crop's own size: resizing them is a product too, which is not counted.
    overrides = [f"size={size}", *(f"model.modalities.{m}.image_size=16" for m in ("multispectral", "sar"))]
    model = load_config(CONFIG, overrides).model
    function, arguments = abstract_call(model, images, sites=2)
    traced = flops.products(jax.make_jaxpr(function)(*arguments).jaxpr)
    pooled = 2 * 2 * places * model.fusion.width  # a mean that is written as a product
    assert sum(flops.encoder(model, images, sites=2).values()) == traced - pooled


def test_xla_counts_little_more():
    """The rest is work an element; the narrower the model, the more of it."""
    config = load_config(
        CONFIG,
        [
            "size=tiny",
            "model.dtype=float32",
            "model.remat=none",
            "model.scan=false",
            "model.modalities.optical.width=96",
            "model.modalities.optical.depths=(2,2)",
            "model.modalities.optical.heads=(2,4)",
            "model.modalities.optical.window=4",
            "model.modalities.sar.width=192",
            "model.modalities.sar.depth=2",
            "model.spatial_width=192",
            "model.fusion.depth=2",
            "model.prototypes.regions=2",
        ],
    )
    with config.unlocked():
        del config.model.modalities.multispectral
    images = {"optical": Images(1, 64, 64), "sar": Images(3, 8, 12)}
    function, arguments = abstract_call(config.model, images, sites=2)
    compiled = jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})
    counted = compiled.cost_analysis()["flops"]
    assert 1 < counted / sum(flops.encoder(config.model, images, sites=2).values()) < 1.07


def test_a_training_sample_is_all_views_of_the_student_and_the_global_ones_of_the_teacher():
    config = load_config(CONFIG, ["size=base"])
    passes = flops.training(config)
    groups = flops.view_images(config)
    assert groups["global"] == (2, {"optical": (1, 512, 512), "multispectral": (20, 16, 16), "sar": (10, 16, 16)})
    assert groups["local"] == (4, {"optical": (1, 256, 256), "multispectral": (5, 8, 8), "sar": (3, 8, 8)})
    views = [flops.encoder(config.model, images, sites=count) for count, images in groups.values()]
    assert passes["student"]["fusion"] == views[0]["fusion"] + views[1]["fusion"]
    assert passes["teacher"]["fusion"] == views[0]["fusion"]
    assert passes["teacher"]["heads/sar"] == passes["student"]["heads/sar"] == flops.heads(config)["heads/sar"]
    total = 3 * sum(passes["student"].values()) + sum(passes["teacher"].values())
    assert flops.model_flops(config) == total


def test_a_training_sample_has_its_texts_read_and_one_written_by_the_student():
    config = load_config(IMAGE_TEXT, ["size=base", "modalities=optical"])
    passes = flops.training(config)
    assert passes["student"]["text"] == flops.text(config.model.text, 64, texts=2)
    assert passes["student"]["decoder"] == flops.decoder(config.model, 63, 14 * 14)
    assert not {"text", "decoder"} & passes["teacher"].keys()
    config.model.decoder = config.model.text = None
    assert not {"text", "decoder"} & flops.training(config)["student"].keys()


def test_products_of_loops_and_of_what_is_computed_again():
    matrix = jnp.zeros((3, 3))

    def loss(x):
        layer = jax.checkpoint(lambda x: jnp.sin(x @ matrix))
        return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=7)[0].sum()

    once = 2 * 5 * 3 * 3
    x = jnp.zeros((5, 3))
    assert flops.products(jax.make_jaxpr(loss)(x).jaxpr) == 7 * once
    assert flops.products(jax.make_jaxpr(jax.grad(loss))(x).jaxpr) == 7 * 3 * once  # forward, forward again, back
    with pytest.raises(ValueError, match="while"):
        flops.products(jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, jnp.sin, x))(x).jaxpr)


def test_products_of_the_losses_are_what_xla_counts():
    """Every loop of one round and one block of rows, since XLA counts a loop's body once."""
    config = load_config(
        CONFIG,
        [
            "size=tiny",
            "objective.classes=512",
            "objective.head_hidden=256",
            "objective.head_bottleneck=128",
            "objective.sinkhorn_iterations=1",
            "objective.object.iterations=1",
            "objective.object.clusters=2",
        ],
    )
    with config.unlocked():
        for modality in ("optical", "multispectral"):
            del config.model.modalities[modality]
    b, v, t, width, fused = 2, 2, 3, config.model.spatial_width, config.model.fusion.width
    struct = jax.ShapeDtypeStruct
    output = {
        "spatial": {"sar": struct((b, v, t, 8, 8, width), jnp.float32)},
        "spatial_valid": {"sar": struct((b, v, t, 8, 8), bool)},
        "fused": struct((b, v, 8, 8, fused), jnp.float32),
        "fused_valid": struct((b, v, 8, 8), bool),
    }
    dates = {name: struct((b, v, t), bool) for name in ("valid", "student_valid")}
    views = {"to_view": struct((b, v, 2, 3), jnp.float32), "sar": {"days": struct((b, v, t), jnp.int32), **dates}}
    heads = jax.eval_shape(lambda key: init_heads(config.objective, config.model, key), jax.random.key(0))

    def loss(features, heads, teacher_heads, output, teacher, views):
        student = output | {"spatial": {"sar": features[0]}, "fused": features[1]}
        return objective(
            config.objective,
            {"global": student},
            {"global": teacher},
            {"global": views},
            heads,
            teacher_heads,
            index=jnp.arange(b),
            seed=0,
            teacher_temperature=0.05,
        )[0]

    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(
        (output["spatial"]["sar"], output["fused"]), heads, heads, output, output, views
    )
    counted = traced.lower().compile({"xla_backend_optimization_level": 0}).cost_analysis()["flops"]
    # XLA makes one of the teacher's scores for balancing and for the targets, and adds work an element.
    assert 0.95 < counted / flops.products(traced.jaxpr.jaxpr) < 1.05
