"""The training step of skyjax in plain PyTorch, eager, as one would write it: the peer of benchmarks/step.py.

The encoder is the module of an export (skyjax/convert/pytorch/skyjax_encoder.py). What stands here is the rest:
pixel, object and image level with balanced targets (`objective.kind` "dino"), alignment, spread, AdamW and the moving
average. It shares no code with skyjax/objectives: teacher features are read by `grid_sample`, balancing divides a
matrix by its sums. There are no geo-prototypes, no augmentation of pixels and no micro-batches.

Letters: `b` samples, `v` views, `p` pairs of views, `t` dates, `h w` cells, `n` and `l` cells of a map of student and
teacher, `r` rows, `d` width, `k` classes.
"""

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyjax.convert.pytorch.skyjax_encoder import SkyjaxEncoder

LEVELS = ("pixel", "object", "image")


class Network(nn.Module):
    """An encoder with its heads: `heads` is what skyjax/objectives/heads.py makes, as arrays."""

    def __init__(self, encoder: SkyjaxEncoder, heads: Mapping[str, Any]):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {
                stream: nn.ModuleDict({level: Head(own[level]) for level in own})
                for stream, own in heads.items()
                if stream != "alignment"
            }
        )
        self.alignment = nn.ModuleDict()
        if "alignment" in heads:
            own = dict(heads["alignment"])
            self.temperature = nn.Parameter(torch.tensor(own.pop("temperature")))
            for name, dense in own.items():
                self.alignment[name] = linear(dense)


class Head(nn.Module):
    """DINO's head with one hidden layer: unit vectors, and their cosines with the classes."""

    def __init__(self, arrays: Mapping[str, Any]):
        super().__init__()
        self.hidden, self.bottleneck = linear(arrays["hidden"]), linear(arrays["bottleneck"])
        self.classes = nn.Parameter(torch.tensor(arrays["classes"]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., k)."""
        with torch.autocast(x.device.type, enabled=False):  # as skyjax, heads and losses are float32
            x = unit(self.bottleneck(F.gelu(self.hidden(x.float()), approximate="tanh")))
            return x @ unit(self.classes).T


class Step:
    """Student, teacher and optimizer; `run` is one step of training.

    Args:
      config: the experiment.
      network: the student; the teacher starts as its copy.
      compiled: run both encoders by `torch.compile`.
    """

    def __init__(self, config: ml_collections.ConfigDict, network: Network, compiled: bool = False):
        self.config = config
        self.student = network.train().to(device())
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.encode = {
            name: torch.compile(net.encoder) if compiled else net.encoder
            for name, net in {"student": self.student, "teacher": self.teacher}.items()
        }
        o = config.optimizer
        plain = [p for name, p in self.student.named_parameters() if not decays(name, p)]
        decayed = [p for name, p in self.student.named_parameters() if decays(name, p)]
        self.parameters = [*decayed, *plain]
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), fused=True)
        self.done = 0

    def run(self, batch: Mapping[str, Any], noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One step.

        Args:
          batch: as the loader yields it, as tensors.
          noise: (b, draws) uniform numbers for the places of the pixel level.

        Returns:
          Loss and terms; "gradient_norm" is among these.
        """
        config, o, step = self.config, self.config.optimizer, self.done
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss, terms = self.loss(batch, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        terms["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, o.clip)
        self.optimizer.step()
        momentum = half_cosine(o.teacher_momentum, o.get("final_teacher_momentum", 1.0), step / config.steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)
        self.done += 1
        return loss.detach(), terms

    def loss(self, batch: Mapping[str, Any], noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on one batch, and its terms."""
        config, modalities = self.config, self.student.encoder.modalities
        half = torch.autocast(device().type, torch.bfloat16, enabled=config.model.dtype == "bfloat16")
        groups = [name for name in ("global", "local") if name in batch]
        with half:
            students = [encode(self.encode["student"], batch[name], modalities, teacher=False) for name in groups]
            with torch.no_grad():
                taught = encode(self.encode["teacher"], batch["global"], modalities, teacher=True)
        share = min(self.done / config.steps, 1)
        temperature = half_cosine(*config.objective.teacher_temperature, share)
        terms, total, pooled = {}, torch.zeros((), device=device()), {}
        streams = [*modalities, *([] if config.model.fusion is None else ["fused"])]
        for stream in streams:
            maps = [
                maps_of(stream, output, batch[name], teacher=False)
                for name, output in zip(groups, students, strict=True)
            ]
            teacher = maps_of(stream, taught, batch["global"], teacher=True)
            pooled[stream] = pool(maps[0])
            for level, rows in levels(maps, teacher, config.objective, noise).items():
                heads = (net.heads[stream][level] for net in (self.student, self.teacher))
                summed = distil(rows, *heads, config.objective, temperature)
                terms[f"{level}/{stream}"] = summed / rows.count.clamp(min=1)
        if self.student.alignment:
            terms |= align({m: pooled[m] for m in modalities}, self.student, config.objective.alignment.bounds)
        if config.objective.weights.spread:
            terms |= {f"spread/{stream}": koleo(*pooled[stream], config.objective.spread.floor) for stream in streams}
        for name, value in terms.items():
            total = total + config.objective.weights[name.split("/")[0]] * value
        return total, {name: value.detach() for name, value in terms.items()}


class Maps(NamedTuple):
    """Features of one stream on all views of a sample; `skyjax/objectives/multigranularity.py` has the same words."""

    features: Tensor  # (b, v, t, h, w, d) float32
    places: Tensor  # (b, v, t, h, w): measured
    days: Tensor  # (b, v, t)
    valid: Tensor  # (b, v, t)
    seen: Tensor  # (b, v, t): by this network
    asked: Tensor  # (b, v, t, h, w): where the student has to answer
    to_view: Tensor  # (b, v, 2, 3)


class Rows(NamedTuple):
    """What a level compares: features of student and teacher (b, r, d), weights (b, r), and what the sum is over."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    count: Tensor


def levels(students: list[Maps], teacher: Maps, config: Any, noise: Tensor) -> dict[str, Rows]:
    """Rows of every level, of global and local views together."""
    found: dict[str, list[Rows]] = {level: [] for level in LEVELS}
    first = 0
    for number, student in enumerate(students):
        mine, other = zip(
            *(
                (i, j)
                for i in range(student.features.shape[1])
                for j in range(teacher.features.shape[1])
                if not (number == 0 and i == j)  # both networks saw the global views
            ),
            strict=True,
        )
        pair = Pair(student, teacher, list(mine), list(other))
        last = first + pair.dated[0].numel() * pair.inside.shape[-1]
        found["pixel"].append(pixel_rows(pair, config.pixel.tokens, noise[:, first:last]))
        found["object"].append(object_rows(pair, config))
        found["image"].append(image_rows(pair))
        first = last
    return {
        level: Rows(*(torch.cat(x, 1) for x in list(zip(*rows, strict=True))[:3]), sum(x.count for x in rows))
        for level, rows in found.items()
        if config.weights[level]
    }


class Pair:
    """Pairs of views (student's, teacher's) with the teacher's map of each of the student's dates.

    Attributes:
      grid: (b p t, h, w, 2) the student's cells in the teacher's view, as `grid_sample` wants them.
      inside: (b, p, n) whether they lie in it.
      covers: (b, p, l) whether the teacher's cells lie in the student's view.
      dated: (b, p, t) whether both views have the date.
      student, places, asked: the student's maps, (b, p, t, h, w, ...).
      teacher, teacher_places: the teacher's of the same day.
    """

    def __init__(self, student: Maps, teacher: Maps, mine: list[int], other: list[int]):
        self.student, self.asked = student.features[:, mine], student.asked[:, mine]
        self.places = student.places[:, mine]
        self.seen = student.seen[:, mine]
        days, valid = student.days[:, mine], student.valid[:, mine]
        other_days, other_valid = teacher.days[:, other], teacher.seen[:, other]
        same = (days[..., None] == other_days[..., None, :]) & valid[..., None] & other_valid[..., None, :]
        same &= occurrence(days, valid)[..., None] == occurrence(other_days, other_valid)[..., None, :]
        self.dated, slot = same.any(-1), same.int().argmax(-1)
        b, p, t = slot.shape
        sample, view = (torch.tensor(x, device=slot.device) for x in ([[[i]] for i in range(b)], [[j] for j in other]))
        self.teacher = teacher.features[sample, view, slot]
        self.teacher_places = teacher.places[sample, view, slot]
        self.teacher_seen = teacher.seen[sample, view, slot]

        h, w = student.features.shape[3:5]
        to_view = student.to_view[:, mine], teacher.to_view[:, other]
        local, self.inside = carry(centres((h, w), to_view[0].device), *to_view)
        grid = (2 * local.flip(-1) - 1).view(b, p, 1, h, w, 2)  # (column, row) from -1 to 1
        self.grid = grid.expand(-1, -1, t, -1, -1, -1).flatten(0, 2)
        self.covers = carry(centres(tuple(teacher.features.shape[3:5]), to_view[0].device), *reversed(to_view))[1]


def pixel_rows(pair: Pair, tokens: int, noise: Tensor) -> Rows:
    """Some of the student's places with the teacher's feature at the same place and day."""
    b, p, t = pair.dated.shape
    measured = sample(pair.teacher_places[..., None].float(), pair.grid).view(b, p, t, -1)
    counts = pair.dated[..., None] & pair.inside[:, :, None] & pair.asked.flatten(3) & (measured >= 0.5 - 1e-5)
    n = counts.shape[-1]
    order, chosen = torch.where(counts, noise.reshape(b, p, t, n), -1.0).topk(min(tokens, n))
    drawn = order >= 0
    student = pair.student.flatten(3, 4)
    student = student.gather(3, chosen[..., None].expand(-1, -1, -1, -1, student.shape[-1]))
    places = chosen.flatten(0, 2)[..., None].expand(-1, -1, 2)
    grid = pair.grid.flatten(1, 2).gather(1, places)[:, None]  # (b p t, 1, tokens, 2)
    teacher = sample_masked(pair.teacher, pair.teacher_places, grid).view(b, p, t, -1, pair.teacher.shape[-1])
    return Rows(student.flatten(1, 3), teacher.flatten(1, 3), drawn.flatten(1).float(), drawn.sum())


def object_rows(pair: Pair, config: Any) -> Rows:
    """Centres of the teacher's clusters in the overlap, in both views."""
    b, p, t = pair.dated.shape
    clustered = pair.teacher_places.flatten(3) & pair.covers[:, :, None] & pair.dated[..., None]
    tokens = pair.teacher.flatten(3, 4)
    assignment = cluster(tokens, clustered, config)  # (b, p, t, l, k)
    h, w = pair.teacher.shape[3:5]
    on_map, mask = assignment.unflatten(3, (h, w)), clustered.unflatten(3, (h, w))
    covered = sample(mask[..., None].float(), pair.grid).view(b, p, t, -1) >= 0.5 - 1e-5
    covered &= pair.inside[:, :, None] & pair.asked.flatten(3)
    carried = sample_masked(on_map, mask, pair.grid).view(b, p, t, -1, assignment.shape[-1]) * covered[..., None]
    student, mass = weighted_means(pair.student.flatten(3, 4), carried)
    teacher, _ = weighted_means(tokens, assignment)
    weight = mass / mass.sum(-1, keepdim=True).clamp(min=1e-6)
    return Rows(student.flatten(1, 3), teacher.flatten(1, 3), weight.flatten(1), covered.any(-1).sum())


def image_rows(pair: Pair) -> Rows:
    """Means over the measured places of each date."""
    student, exists = masked_mean(pair.student.flatten(3, 4), (pair.places & pair.seen[..., None, None]).flatten(3))
    places = (pair.teacher_places & pair.teacher_seen[..., None, None]).flatten(3)
    teacher, other_exists = masked_mean(pair.teacher.flatten(3, 4), places)
    counts = pair.dated & exists & other_exists
    return Rows(student.flatten(1, 2), teacher.flatten(1, 2), counts.flatten(1).float(), counts.sum())


def distil(rows: Rows, student: nn.Module, teacher: nn.Module, config: Any, temperature: float) -> Tensor:
    """Sum of the rows' cross-entropies against the teacher's balanced scores."""
    valid = rows.weight > 1e-6
    with torch.no_grad():
        scores = teacher(torch.where(valid[..., None], rows.teacher, 0))
        targets = balance(scores.flatten(0, 1), valid.flatten(), temperature, config.sinkhorn_iterations)
    logits = student(torch.where(valid[..., None], rows.student, 0)) / config.student_temperature
    loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    return (torch.where(valid, rows.weight, 0).flatten() * loss).sum()


def align(pooled: Mapping[str, tuple[Tensor, Tensor]], network: Network, bounds: Any) -> dict[str, Tensor]:
    """Symmetric InfoNCE between modalities of a site, a view at a time."""
    stored = network.temperature
    temperature = (stored + (stored.clamp(*map(math.log, bounds)) - stored).detach()).exp()
    projected = {
        m: unit(network.alignment[m](torch.where(there[..., None], x, 0))).transpose(0, 1)
        for m, (x, there) in pooled.items()
    }
    terms = {}
    for first, second in itertools.combinations(pooled, 2):
        both = (pooled[first][1] & pooled[second][1]).T  # (v, b)
        scores = projected[first] @ projected[second].transpose(1, 2) / temperature
        own = torch.eye(both.shape[1], dtype=torch.bool, device=both.device)
        scores = scores.masked_fill(~(both[:, :, None] & both[:, None] | own), -math.inf)
        diagonal = scores.diagonal(dim1=1, dim2=2)
        loss = (scores.logsumexp(1) + scores.logsumexp(2)) / 2 - diagonal
        terms[f"alignment/{first}-{second}"] = torch.where(both, loss, 0).sum() / both.sum().clamp(min=1)
    return terms


def koleo(features: Tensor, there: Tensor, floor: float) -> Tensor:
    """-log of the distance to the nearest neighbour, a view at a time."""
    total, count = torch.zeros((), device=features.device), 0
    for x, valid in zip(features.unbind(1), there.unbind(1), strict=True):
        points = unit(torch.where(valid[:, None], x, 0))
        other = valid[None] & ~torch.eye(len(valid), dtype=torch.bool, device=x.device)
        nearest = (points @ points.T).detach().masked_fill(~other, -math.inf).argmax(1)
        loss = -0.5 * ((points - points[nearest]).square().sum(-1) + floor**2).log()
        counted = valid & other.any(1)
        total, count = total + torch.where(counted, loss, 0).sum(), count + counted.sum()
    return total / torch.as_tensor(count).clamp(min=1)


def cluster(tokens: Tensor, valid: Tensor, config: Any) -> Tensor:
    """(..., l, d) and which tokens count -> (..., l, k): soft, balanced k-means with cosines."""
    with torch.no_grad():
        mean, _ = masked_mean(tokens, valid)
        tokens = unit(torch.where(valid[..., None], tokens - mean[..., None, :], 0))
        nearest = (tokens @ tokens.sum(-2)[..., None])[..., 0]
        found = []
        for i in range(config.object.clusters):
            index = nearest.masked_fill(~valid, math.inf).argmin(-1)
            found.append(tokens.gather(-2, index[..., None, None].expand(*index.shape, 1, tokens.shape[-1])))
            cosine = (tokens @ found[-1].transpose(-2, -1))[..., 0]
            nearest = cosine if i == 0 else torch.maximum(nearest, cosine)
        centre = torch.cat(found, -2)
        for _ in range(config.object.iterations):
            scores = tokens @ centre.transpose(-2, -1)
            assignment = balance(scores, valid, config.object.epsilon, config.sinkhorn_iterations)
            centre = unit(assignment.transpose(-2, -1) @ tokens)
        return assignment


def balance(scores: Tensor, valid: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp over the last two axes (n, k): valid rows sum to 1, columns share them alike."""
    q = scores.float() / epsilon
    q = (q - q.amax(-1, keepdim=True)).exp() * valid[..., None]
    column = valid.sum(-1)[..., None, None] / q.shape[-1]
    for _ in range(iterations):
        q = q / q.sum(-1, keepdim=True).clamp(min=1e-30)
        q = q / q.sum(-2, keepdim=True).clamp(min=1e-30) * column
    return q / q.sum(-1, keepdim=True).clamp(min=1e-30)


def encode(encoder: Any, views: Mapping[str, Any], modalities: tuple[str, ...], *, teacher: bool) -> dict[str, Any]:
    """The encoder's output, leading axes (b, v); the views of a sample are folded into the batch."""
    b, v = views["to_view"].shape[:2]
    days, valid = ("days", "valid") if teacher else ("student_days", "student_valid")
    images = {
        m: {
            "values": views[m]["values"].flatten(0, 1),
            "days": views[m][days].flatten(0, 1),
            "valid": views[m][valid].flatten(0, 1),
            "clear": views[m]["clear"].flatten(0, 1),
            "sensor": views[m]["sensor"].repeat_interleave(v),
            "bands": views[m]["bands"].repeat_interleave(v, 0),
        }
        for m in modalities
    }
    output = encoder(images)
    names = ("spatial", "spatial_valid")
    folded = {name: {m: x.unflatten(0, (b, v)) for m, x in output[name].items()} for name in names}
    return folded | {name: output[name].unflatten(0, (b, v)) for name in ("fused", "fused_valid")}


def maps_of(stream: str, output: Mapping[str, Any], views: Mapping[str, Any], *, teacher: bool) -> Maps:
    """One modality's maps; the fused map is a sequence of one date that stands on the same day everywhere."""
    if stream == "fused":
        features, places = output["fused"][:, :, None].float(), output["fused_valid"][:, :, None]
        there = torch.ones(features.shape[:3], dtype=torch.bool, device=features.device)
        return Maps(features, places, there.int(), there, places.any((-2, -1)), places, views["to_view"])
    images, features = views[stream], output["spatial"][stream].float()
    seen = images["valid" if teacher else "student_valid"]
    asked = seen[..., None, None].expand(features.shape[:-1])
    places = output["spatial_valid"][stream]
    return Maps(features, places, images["days"], images["valid"], seen, asked, views["to_view"])


def pool(maps: Maps) -> tuple[Tensor, Tensor]:
    """(b, v, d) mean over all places of all dates that were seen, and whether there is any."""
    places = maps.places & maps.seen[..., None, None]
    return masked_mean(maps.features.flatten(2, 4), places.flatten(2))


def masked_mean(features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n, d) -> (..., d) over the valid ones, and whether there is any."""
    total = valid.sum(-1)
    kept = torch.where(valid[..., None], features, 0)
    return kept.sum(-2) / total.clamp(min=1)[..., None], total > 0


def weighted_means(tokens: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n, d) and (..., n, k) -> (..., k, d), and the weight of each."""
    mass = assignment.sum(-2)
    return assignment.transpose(-2, -1) @ tokens / mass.clamp(min=1e-6)[..., None], mass


def centres(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """(n, 2) rows and columns of a map's cells in the unit square."""
    return torch.cartesian_prod(*((torch.arange(size, device=device) + 0.5) / size for size in grid))


def carry(points: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 2) points of the source views' unit squares in the targets' (b, p, n, 2), and whether they lie inside."""
    shifted = points - source[..., None, :, 2]
    ground = torch.linalg.solve(source[..., :2], shifted.transpose(-2, -1))
    local = (target[..., :2] @ ground).transpose(-2, -1) + target[..., None, :, 2]
    return local, ((local >= -1e-5) & (local <= 1 + 1e-5)).all(-1)


def sample(maps: Tensor, grid: Tensor) -> Tensor:
    """(b, p, t, h, w, d) at (b p t, i, j, 2) -> (b p t, i j, d), bilinear; at the border the nearest cells stand."""
    maps = maps.flatten(0, 2).permute(0, 3, 1, 2)
    found = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.flatten(2).transpose(1, 2)


def sample_masked(maps: Tensor, mask: Tensor, grid: Tensor) -> Tensor:
    """As `sample`, over the valid cells alone."""
    weight = sample(mask[..., None].float(), grid)
    return sample(torch.where(mask[..., None], maps, 0), grid) / weight.clamp(min=1e-6)


def occurrence(days: Tensor, valid: Tensor) -> Tensor:
    """How many earlier slots hold the same valid day."""
    same = (days[..., None] == days[..., None, :]) & valid[..., None, :]
    return same.tril(-1).sum(-1)


def unit(x: Tensor) -> Tensor:
    """Vectors at length one."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-8).rsqrt()


def linear(dense: Mapping[str, Any]) -> nn.Linear:
    """A layer with the weights of {"kernel": (in, out), "bias": (out,)}."""
    kernel = torch.tensor(dense["kernel"])
    layer = nn.Linear(*kernel.shape, bias="bias" in dense)
    layer.weight = nn.Parameter(kernel.T.contiguous())
    if "bias" in dense:
        layer.bias = nn.Parameter(torch.tensor(dense["bias"]))
    return layer


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay reaches it: matrices that are no table or token."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in ("positions", "dates")


def learning_rate(config: ml_collections.ConfigDict, step: int) -> float:
    """Linear warm-up, then half a cosine."""
    o = config.optimizer
    warmup = min(o.warmup_steps, config.steps)
    if step < warmup:
        return o.learning_rate * (step + 1) / warmup
    return half_cosine(o.learning_rate, o.final_learning_rate, (step - warmup) / max(config.steps - 1 - warmup, 1))


def half_cosine(start: float, end: float, share: float) -> float:
    """From `start` at 0 to `end` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1))) / 2


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
