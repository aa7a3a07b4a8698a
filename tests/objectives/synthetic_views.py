"""Views whose maps are known by construction: boxes of the unit square, turned and flipped by numpy."""

from typing import Any, NamedTuple

import numpy as np


class Cut(NamedTuple):
    """Box in the sample's unit square, quarter turns counter-clockwise, then a flip of the columns."""

    top: float
    left: float
    height: float
    width: float
    turns: int = 0
    flipped: bool = False

    @property
    def to_view(self) -> np.ndarray:
        """(2, 3) map of (row, column), composed of one map a step."""
        affine = np.array(
            [[1 / self.height, 0, -self.top / self.height], [0, 1 / self.width, -self.left / self.width], [0, 0, 1]]
        )
        turn = np.array([[0, -1, 1], [1, 0, 0], [0, 0, 1]])  # row' = 1 - column, column' = row
        flip = np.array([[1, 0, 0], [0, -1, 1], [0, 0, 1]])
        for step in [turn] * self.turns + [flip] * self.flipped:
            affine = step @ affine
        return affine[:2].astype(np.float32)

    def ground(self, grid: tuple[int, int]) -> np.ndarray:
        """(h, w, 2) places of the token centres, cut from the ground and turned as an array is turned."""
        rows, columns = grid if self.turns % 2 == 0 else grid[::-1]
        y = self.top + self.height * (np.arange(rows) + 0.5) / rows
        x = self.left + self.width * (np.arange(columns) + 0.5) / columns
        places = np.rot90(np.stack(np.meshgrid(y, x, indexing="ij"), -1), self.turns)
        return places[:, ::-1] if self.flipped else places

    def contains(self, points: np.ndarray) -> np.ndarray:
        y, x = points[..., 0], points[..., 1]
        return (y >= self.top) & (y <= self.top + self.height) & (x >= self.left) & (x <= self.left + self.width)


def random_cut(rng: np.random.Generator, area: tuple[float, float] = (0.5, 1.0)) -> Cut:
    side = np.sqrt(rng.uniform(*area, size=2))
    corner = rng.uniform(0, 1 - side)
    return Cut(*corner, *side, turns=int(rng.integers(4)), flipped=bool(rng.integers(2)))


DATES = {"optical": 1, "multispectral": 3, "sar": 2}
WIDTH, FUSED_WIDTH = 8, 6


def make_views(rng: np.random.Generator, b: int, v: int, modalities=tuple(DATES), area=(0.5, 1.0)) -> dict[str, Any]:
    """Views as in skyjax/sample.py without pixels: half of the dates dropped for the student, one date missing."""
    views: dict[str, Any] = {
        "to_view": np.array([[random_cut(rng, area).to_view for _ in range(v)] for _ in range(b)], np.float32)
    }
    for m in modalities:
        t = DATES[m]
        days = np.tile(np.sort(rng.permutation(400)[:t])[None, None], (b, v, 1)) + np.arange(b)[:, None, None]
        valid = np.ones((b, v, t), bool)
        valid[0, :, 1:] = False
        views[m] = {
            "days": days.astype(np.int32),
            "valid": valid,
            "student_valid": valid & (rng.random((b, v, t)) < 0.7),
        }
    return views


def make_output(rng: np.random.Generator, views: dict[str, Any], *, grid: int, student: bool) -> dict[str, Any]:
    """Random features on a (grid, grid) map, some places masked."""
    b, v = views["to_view"].shape[:2]
    spatial, places = {}, {}
    for m in [name for name in views if name != "to_view"]:
        seen = views[m]["student_valid" if student else "valid"]
        spatial[m] = rng.normal(size=(*seen.shape, grid, grid, WIDTH)).astype(np.float32)
        places[m] = (rng.random((*seen.shape, grid, grid)) < 0.8) & seen[..., None, None]
    fused_valid = np.any([p.any(2) for p in places.values()], axis=0)
    fused = rng.normal(size=(b, v, grid, grid, FUSED_WIDTH)).astype(np.float32)
    return {"spatial": spatial, "spatial_valid": places, "fused": fused, "fused_valid": fused_valid}
