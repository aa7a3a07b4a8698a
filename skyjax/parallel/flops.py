"""Floating-point operations of a forward pass, counted from the config and the sizes of the images alone.

What counts: 2 for each multiply-add of a matrix product, at the sizes that are computed. These are patch embeddings and
merging, projections, attention's scores and values, feed-forwards, Swin's position-bias MLP (once a call), up-heads,
fusion (whose last layer asks one query a place), geo-prototypes and the heads of the objective, text tower and decoder.
Padding to whole patches and windows is computed, so it counts; so do masked dates, pixels and words.

What does not: norms, softmax, GELU, means and other work an element, resizing of positions and features, balancing,
clustering, comparisons between samples. XLA's own count of a small float32 model is within 7 % (tests/parallel).

Or, by `products`, of any traced program: there the products of balancing, clustering and comparisons are among them.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
from jax.extend.core import Jaxpr, jaxprs_in_params

from skyjax.input.views import GLOBAL_VIEWS
from skyjax.sample import MODALITIES

MLP_RATIO = 4
BIAS_HIDDEN = 512  # of Swin's position-bias MLP
GRID_FROM = ("multispectral", "optical", "sar")  # whose cells are the common grid: the first that is given
LEVELS = ("pixel", "object", "image")


class Images(NamedTuple):
    """The size of one modality's sequence: dates, and rows and columns of pixels."""

    dates: int
    rows: int
    columns: int


def encoder(model: ml_collections.ConfigDict, images: Mapping[str, Images], *, sites: int = 1) -> dict[str, int]:
    """FLOPs of one call of the encoder, part by part, under the names of the parameters.

    Args:
      model: the config's `model`.
      images: modality -> size of its images; one that the model does not have is passed over.
      sites: how many sites the call is made on.
    """
    given = {m: size for m, size in images.items() if m in model.modalities}
    parts: dict[str, int] = {}
    cells: dict[str, tuple[int, int]] = {}
    for m, size in given.items():
        part, maps = model.modalities[m], sites * size.dates
        if part.kind == "swin_v2":
            parts[m], cells[m] = swin_v2(part, size, maps)
            continue
        parts[m], (rows, columns) = vit(part, size, maps)
        factor = part.up_factor or 1
        if part.up_factor:
            up = multiply(maps * rows * columns, part.width, factor**2 * model.spatial_width)
            parts[f"up_heads/{m}"] = up
        cell = part.patch_size // factor
        cells[m] = -(-size.rows // cell), -(-size.columns // cell)
    places = sites * math.prod(cells[next(m for m in GRID_FROM if m in given)])
    if model.fusion is not None:
        dates = sum(size.dates for size in given.values())
        parts["fusion"] = fusion(model.fusion, model.spatial_width, places, dates)
    if model.get("prototypes"):
        width = model.fusion.width if model.fusion is not None else model.spatial_width
        parts["prototypes"] = prototypes(model.prototypes, width, places)
    return parts


def swin_v2(part: Any, size: Images, maps: int) -> tuple[int, tuple[int, int]]:
    """FLOPs of a Swin-V2 on `maps` images, and the rows and columns of its last stage."""
    rows, columns = -(-size.rows // part.patch_size), -(-size.columns // part.patch_size)
    total = _stem(part, maps * rows * columns)
    for stage, (depth, heads) in enumerate(zip(part.depths, part.heads, strict=True)):
        width = part.width * 2**stage
        if stage:
            rows, columns = -(-rows // 2), -(-columns // 2)
            total += multiply(maps * rows * columns, 4 * (width // 2), width)
        # A grid below the window is one smaller window; a larger one is padded to whole windows.
        window = min(part.window, rows), min(part.window, columns)
        padded = maps * math.prod(-(-side // w) * w for side, w in zip((rows, columns), window, strict=True))
        offsets = (2 * part.window - 1) ** 2
        block = 4 * multiply(padded, width, width) + 2 * multiply(padded, width, math.prod(window))
        block += 2 * multiply(maps * rows * columns, width, MLP_RATIO * width)
        block += multiply(offsets, 2, BIAS_HIDDEN) + multiply(offsets, BIAS_HIDDEN, heads)
        total += depth * block
    return total, (rows, columns)


def vit(part: Any, size: Images, maps: int) -> tuple[int, tuple[int, int]]:
    """FLOPs of a ViT on `maps` images, and the rows and columns of its patches."""
    rows, columns = -(-size.rows // part.patch_size), -(-size.columns // part.patch_size)
    tokens = 1 + rows * columns
    embedding = _stem(part, maps * rows * columns)
    return embedding + part.depth * maps * layer(part.width, tokens), (rows, columns)


def fusion(part: Any, spatial_width: int, places: int, dates: int) -> int:
    """FLOPs of the temporal fusion: (1 + dates) tokens a place, of which the last layer asks for the first alone."""
    tokens = 1 + dates
    layers = (part.depth - 1) * layer(part.width, tokens) + layer(part.width, tokens, queries=1)
    return places * (multiply(dates, spatial_width, part.width) + layers)


def prototypes(part: Any, width: int, places: int) -> int:
    """FLOPs of the attention over one region's prototypes: query, scores, values, projection of both side by side."""
    attention = 2 * multiply(places, part.width, part.count)
    return multiply(places, width, part.width) + attention + multiply(places, width + part.width, width)


def layer(width: int, tokens: int, queries: int | None = None) -> int:
    """FLOPs of a pre-norm layer on one sequence; `queries`: how many tokens are asked for, all if None."""
    asked = tokens if queries is None else queries
    projections = 2 * multiply(tokens, width, width) + 2 * multiply(asked, width, width)
    return projections + 2 * multiply(asked, width, tokens) + 2 * multiply(asked, width, MLP_RATIO * width)


def text(part: Any, tokens: int, *, texts: int = 1) -> int:
    """FLOPs of the text tower (`model.text`) on texts of `tokens` tokens; those behind a causal one are computed."""
    width = part.width
    total = part.depth * layer(width, tokens) + multiply(1, width, part.embed_dim)
    if part.pool == "query":
        total += 2 * multiply(tokens, width, width) + 2 * multiply(1, width, width) + 2 * multiply(1, width, tokens)
        total += 2 * multiply(1, width, MLP_RATIO * width)
    return texts * total


def decoder(model: ml_collections.ConfigDict, tokens: int, places: int, *, texts: int = 1) -> int:
    """FLOPs of the decoder (`model.decoder`) that writes `tokens` tokens on `places` places, all at once, with the
    scores of its whole vocabulary."""
    part, width = model.decoder, model.decoder.width
    fused = model.fusion.width if model.fusion is not None else model.spatial_width
    keys = 1 + places
    cross = 2 * multiply(tokens, width, width) + 2 * multiply(keys, width, width) + 2 * multiply(tokens, width, keys)
    layers = part.depth * (layer(width, tokens) + cross)
    return texts * (multiply(places, fused, width) + layers + multiply(tokens, width, part.vocabulary))


def heads(config: ml_collections.ConfigDict) -> dict[str, int]:
    """FLOPs of one network's heads on a training sample, a stream: every row that a level may have.

    Student and teacher score the same rows, so the count is the same for both.
    """
    objective, model = config.objective, config.model
    streams = [m for m in MODALITIES if m in model.modalities]
    if model.fusion is not None or model.get("prototypes"):
        streams.append("fused")
    fused = model.fusion.width if model.fusion is not None else model.spatial_width
    counts = {}
    for stream in streams:
        maps, cells = _paired_maps(config, stream)
        rows = {
            "pixel": sum(pairs * min(objective.pixel.tokens, n) for pairs, n in zip(maps, cells, strict=True)),
            "object": sum(maps) * objective.object.clusters,
            "image": sum(maps),
        }
        row = multiply(1, fused if stream == "fused" else model.spatial_width, objective.head_hidden)
        row += multiply(1, objective.head_hidden, objective.head_bottleneck)
        if objective.kind == "dino":
            row += multiply(1, objective.head_bottleneck, objective.classes)
        counts[f"heads/{stream}"] = row * sum(rows[level] for level in LEVELS if objective.weights[level])
    return counts


def view_images(config: ml_collections.ConfigDict) -> dict[str, tuple[int, dict[str, Images]]]:
    """Group of views ("global", "local") -> how many a sample has, and the size of each modality's images in one."""
    data, modalities = config.data, [m for m in MODALITIES if m in config.model.modalities]

    def sizes(group: Any, dates: Any) -> dict[str, Images]:
        return {m: Images(dates[m], group.size[m], group.size[m]) for m in modalities}

    groups = {"global": (GLOBAL_VIEWS, sizes(data.global_views, data.dates))}
    if data.local_views.count:
        groups["local"] = (data.local_views.count, sizes(data.local_views, data.local_views.dates))
    return groups


def training(config: ml_collections.ConfigDict) -> dict[str, dict[str, int]]:
    """Forward FLOPs of a training sample: {"student": {part: FLOPs}, "teacher": {part: FLOPs}}, heads among the parts.

    The student sees every view, the teacher the global ones. The student alone reads the captions and writes one on the
    places of one view. What compares images with texts is left out: its cost grows with the batch.
    """
    of_heads = heads(config)
    groups = {name: encoder(config.model, images, sites=views) for name, (views, images) in view_images(config).items()}
    student: dict[str, int] = {}
    for parts in groups.values():
        for part, count in parts.items():
            student[part] = student.get(part, 0) + count
    return {"student": student | of_heads | _words(config), "teacher": groups["global"] | of_heads}


def model_parts(config: ml_collections.ConfigDict) -> dict[str, int]:
    """What training on one sample takes without any recomputation, part by part: 3 x the student's forward pass + 1 x
    the teacher's.

    Going back costs twice what going forward does: one product for the inputs' gradient, one for the weights'.
    """
    passes = training(config)
    return {part: 3 * count + passes["teacher"].get(part, 0) for part, count in passes["student"].items()}


def model_flops(config: ml_collections.ConfigDict) -> int:
    """All of `model_parts`."""
    return sum(model_parts(config).values())


def products(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products that a traced program asks for, counted from the program itself.

    A scan's body counts as often as it runs (XLA's cost analysis counts it once), and what a checkpoint computes again
    counts again. Of a conditional every branch counts.

    Raises:
      ValueError: the program has a loop of unknown length or a convolution.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("while", "conv_general_dilated"):
            raise ValueError(f"{name}: what it takes is not known here")
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            product: Any = equation.outvars[0].aval
            total += 2 * product.size * math.prod(left.shape[i] for i in contracted)
        times = params["length"] if name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(params))
    return total


def multiply(rows: int, inner: int, columns: int) -> int:
    """FLOPs of a (rows, inner) by (inner, columns) matrix product."""
    return 2 * rows * inner * columns


def _stem(part: Any, tokens: int) -> int:
    """The patch embedding, or the patches and residual stages of models/stem.py."""
    channels = len(part.bands)
    if part.get("stem", "patch") == "patch":
        return multiply(tokens, part.patch_size**2 * channels, part.width)
    first = min(4, part.patch_size // 2)
    places, outputs = tokens * (part.patch_size // first) ** 2, part.width * first // part.patch_size
    total = multiply(places, first**2 * channels, outputs)
    while outputs < part.width:
        places, inputs, outputs = places // 4, outputs, 2 * outputs
        # 3 x 3 and the shortcut's 2 x 2 from one width to the next, then 3 x 3.
        total += multiply(places, (9 + 4) * inputs, outputs) + multiply(places, 9 * outputs, outputs)
    return total


def _words(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Forward FLOPs of text tower and decoder on the texts of a sample."""
    model, found = config.model, {}
    if model.get("text"):
        found["text"] = text(model.text, config.data.text.length, texts=config.data.text.captions)
    if model.get("decoder"):
        places = _grid_cells(model, view_images(config)["global"][1])
        found["decoder"] = decoder(model, config.data.text.length - 1, places)
    return found


def _paired_maps(config: ml_collections.ConfigDict, stream: str) -> tuple[list[int], list[int]]:
    """A group of views each: pairs of maps (a student's view and date with the teacher's), and cells of a map."""
    maps, cells = [], []
    for name, (views, images) in view_images(config).items():
        pairs = views * (GLOBAL_VIEWS - 1 if name == "global" else GLOBAL_VIEWS)
        maps.append(pairs * (1 if stream == "fused" else images[stream].dates))
        cells.append(_grid_cells(config.model, images))
    return maps, cells


def _grid_cells(model: ml_collections.ConfigDict, images: Mapping[str, Images]) -> int:
    """Places of the common grid."""
    name = next(m for m in GRID_FROM if m in images)
    part, size = model.modalities[name], images[name]
    cell = part.patch_size * 2 ** (len(part.depths) - 1) if part.kind == "swin_v2" else part.patch_size
    cell //= part.get("up_factor") or 1
    return -(-size.rows // cell) * -(-size.columns // cell)
