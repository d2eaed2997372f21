"""The toys of the demo: eight categories of solids with random exemplars, and how to draw them."""

import cv2
import numpy as np

BLACK, WHITE = np.array([38.0, 34, 34]), np.array([238.0, 245, 248])  # BGR, as all colors here

# Surfaces: quadrilaterals (N, 4, 3) in units of a toy's half size, x right, y down, z away from the camera, and the
# texture coordinates (N, 2) of each, from 0 to 1.


def sheet(points):
    """The quadrilaterals between the points (m, n, 3) of a grid, oriented away from the origin."""
    quads = np.stack([points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]], 2).reshape(-1, 4, 3)
    if (np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1]) * quads.mean(1)).sum() < 0:
        quads = quads[:, ::-1]
    rows, columns = points.shape[0] - 1, points.shape[1] - 1
    uv = np.stack(np.meshgrid(np.arange(columns) / columns, np.arange(rows) / rows), -1).reshape(-1, 2)
    return quads, uv + 0.5 / np.array([columns, rows])


def lathe(radii, heights, n=20):
    """The surface of revolution of a profile about the vertical axis."""
    angle = np.linspace(0, 2 * np.pi, n + 1)
    radii, heights = np.asarray(radii, float)[:, None], np.asarray(heights, float)[:, None]
    return sheet(np.stack([radii * np.cos(angle), heights + 0 * angle, radii * np.sin(angle)], -1))


def ball(rows=11, n=20):
    """A sphere of radius 1."""
    angle = np.linspace(0, np.pi, rows)
    return lathe(np.sin(angle), -np.cos(angle), n)


def ring(thickness, start, end, n=12):
    """An arc of a ring of radius 1 in the xy plane, from angle start to end."""
    along, around = np.linspace(start, end, n)[:, None], np.linspace(0, 2 * np.pi, 9)
    radius = 1 + thickness * np.cos(around)
    depth = thickness * np.sin(around) + 0 * along
    return sheet(np.stack([radius * np.cos(along), radius * np.sin(along), depth], -1))


def box(n=4):
    """A cube from -1 to 1; the faces in the order front, back, right, left, bottom, top."""
    a, b = np.meshgrid(np.linspace(-1, 1, n + 1), np.linspace(-1, 1, n + 1))
    faces = []
    for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        for side in (-1, 1):
            points = np.empty((*a.shape, 3))
            points[..., axes[0]], points[..., axes[1]], points[..., axes[2]] = a, b, side
            faces.append(sheet(points))
    return np.concatenate([quads for quads, _ in faces]), np.concatenate([uv for _, uv in faces])


def plate(outline, thickness):
    """A plate with a star-shaped outline (n, 2) in the xy plane, thicker in the middle."""
    outline = np.concatenate([outline, outline[:1]])
    rims = [(0, -1), (0.5, -0.8), (1, -0.4), (1, 0.4), (0.5, 0.8), (0, 1)]
    return sheet(np.stack([np.c_[outline * size, np.full(len(outline), z * thickness)] for size, z in rims]))


# Toys: quadrilaterals and their colors; the random generator determines the exemplar.


def color(rng, *hues, saturation=(0.6, 1.0), value=(0.65, 1.0)):
    """A BGR color near one of the hues (degrees)."""
    hue = (rng.choice(hues) + rng.normal(0, 8)) % 360
    hsv = np.array([[[hue, rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float) * 255


def paint(uv, first, second, pattern, count):
    """Colors (N, 3) of a surface: first, with second in stripes, rings, checks or dots."""
    u, v = (uv * count).T
    mask = {
        "plain": u < 0,
        "stripes": u % 1 < 0.5,
        "rings": v % 1 < 0.4,
        "checks": (u % 1 < 0.5) ^ (v % 1 < 0.5),
        "window": (np.abs(u % 1 - 0.5) < 0.4) & (np.abs(v % 1 - 0.5) < 0.3),
        "dots": (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09,
    }[pattern]
    return np.where(mask[:, None], second, first)


def part(surface, first, second=None, pattern="plain", count=4, size=1, at=(0, 0, 0), turn=(0, 0, 0)):
    """A surface scaled by size, rotated by turn (yaw, pitch, roll), moved to at, and painted."""
    quads, uv = surface
    quads = (quads * size) @ rotation(*turn).T + at
    return quads, paint(uv, first, first if second is None else second, pattern, count)


def join(*parts):
    """A toy of several parts, centered, with a largest half size of 1: surfaces, their normals, colors."""
    quads, colors = (np.concatenate(column) for column in zip(*parts, strict=True))
    low, high = quads.min((0, 1)), quads.max((0, 1))
    normals = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return (quads - (low + high) / 2) / ((high - low).max() / 2), normals, colors


def rotation(yaw, pitch, roll):
    """The rotation matrix by yaw about y, then pitch about x, then roll about z (radians)."""
    (cy, cx, cz), (sy, sx, sz) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def make_cup(rng):
    tall, flare = rng.uniform(0.75, 1.2), rng.uniform(-0.25, 0.1)
    body = color(rng, 40, 200, 350, 100, saturation=(0.05, 0.5), value=(0.8, 1))
    second = color(rng, 0, 120, 215, 280)
    pattern, count = rng.choice(["plain", "rings", "rings", "dots"]), rng.integers(3, 6)
    wall = lathe(np.linspace(0.75, 0.75 + flare, 9), np.linspace(-tall, tall, 9))
    inner = lathe(np.linspace(0.7, 0.7 + flare, 5), np.linspace(-tall, tall, 5))
    handle = part(ring(0.2, -np.pi / 2, np.pi / 2), body, size=(0.5, 0.55 * tall, 0.6), at=(0.7 + flare / 2, 0, 0))
    return join(
        part(wall, body, second, pattern, count),
        part((inner[0][:, ::-1], inner[1]), body * 0.8),
        part(lathe([0, 0.75 + flare], [tall, tall]), body),
        part((lathe([0, 0.75 + flare], [tall, tall])[0][:, ::-1], inner[1][:20]), body * 0.6),
        handle,
    )


def make_ball(rng):
    first, second = color(rng, 0, 120, 215, 300), color(rng, 0, 50, 180, saturation=(0, 0.9), value=(0.85, 1))
    pattern, count = rng.choice(["stripes", "stripes", "rings", "dots", "checks"]), rng.integers(3, 6)
    return join(part(ball(17, 28), first, second, pattern, count, turn=rng.uniform(-0.6, 0.6, 3)))


def make_car(rng):
    body, long, roof = color(rng, 0, 0, 215, 130, 30), rng.uniform(1.2, 1.7), rng.uniform(0.35, 0.55)
    glass = np.array([120, 90, 70]) * rng.uniform(0.6, 1.2)
    wheel = lathe([0, 0.12, 0.3, 0.3, 0], [-0.14, -0.14, -0.14, 0.14, 0.14], 14)
    wheels = [
        part(wheel, BLACK, WHITE * 0.8, "rings", 2, at=(x * long * 0.62, 0.28, z * 0.62), turn=(0, np.pi / 2, 0))
        for x in (-1, 1)
        for z in (-1, 1)
    ]
    cabin, back = box(6), rng.uniform(-0.35, 0.15)
    cabin[0][..., 0] *= np.where(cabin[0][..., 1] < 0, 0.7, 1)
    return join(
        part(box(6), body, color(rng, 50, 0, value=(0.9, 1)), rng.choice(["plain", "plain", "rings"]), 2,
             size=(long, 0.28, 0.6)),
        part(cabin, body, glass, "window", 1, size=(long * 0.55, roof, 0.52), at=(back, -0.28 - roof, 0)),
        part(ball(5, 8), np.array([190, 245, 255]), size=0.12, at=(long, -0.05, 0.38)),
        part(ball(5, 8), np.array([190, 245, 255]), size=0.12, at=(long, -0.05, -0.38)),
        *wheels,
    )  # fmt: skip


def make_duck(rng):
    body = color(rng, 52, 52, 52, 30, saturation=(0.55, 1), value=(0.85, 1))
    beak, head, fat = color(rng, 15, 25), rng.uniform(0.45, 0.6), rng.uniform(0.65, 0.85)
    tail = part(lathe([0, 0.4], [-0.5, 0.4], 10), body, size=1, at=(-0.95, -0.35, 0), turn=(0, 0, -0.7))
    eyes = [part(ball(6, 8), BLACK, size=0.11, at=(0.75, -0.95, z * head * 0.75)) for z in (-1, 1)]
    wings = [
        part(ball(7, 10), body * 0.88, size=(0.55, 0.3, 0.15), at=(-0.15, 0, z * fat * 0.95), turn=(0, 0, 0.3))
        for z in (-1, 1)
    ]
    return join(
        part(ball(), body, size=(1, 0.62, fat)),
        part(ball(), body, size=head, at=(0.55, -0.85, 0)),
        part(ball(7, 10), beak, size=(0.36, 0.12, 0.25), at=(0.55 + head, -0.8, 0)),
        tail,
        *eyes,
        *wings,
    )


def make_book(rng):
    cover = color(rng, 355, 220, 140, 25, saturation=(0.5, 0.9), value=(0.3, 0.65))
    label = color(rng, 48, 200, saturation=(0.1, 0.7), value=(0.85, 1))
    quads, uv = box(8)
    face = np.repeat(np.arange(6), 64)
    bound = face < 3  # both covers and the spine; the other faces show the pages
    colors = np.where(bound[:, None], cover, paint(uv[:, ::-1], WHITE, WHITE * 0.82, "stripes", 4))
    height = rng.uniform(0.25, 0.45)
    title = (face < 2) & (np.abs(uv[:, 0] - 0.5) < 0.3) & (np.abs(uv[:, 1] - 0.35) < height / 2)
    bands = (face == 2) & (np.abs(np.abs(uv - 0.5).max(1) - 0.35) < 0.1) & (rng.random() < 0.7)
    colors[title | bands] = label
    return join((quads * (rng.uniform(0.65, 0.85), 1, rng.uniform(0.12, 0.25)), colors))


def make_tower(rng):
    hues, height, blocks = rng.permutation([0, 30, 55, 120, 215, 285]), 1.0, []
    for hue in hues[: rng.integers(3, 5)]:
        size = rng.uniform(0.3, 0.42)
        position = (rng.normal(0, 0.07), height - size, rng.normal(0, 0.07))
        block = box(4) if rng.random() < 0.8 else lathe([0, 1, 1, 1, 0], [-1, -1, 0, 1, 1], 16)
        pattern, turn = rng.choice(["plain", "window"]), (rng.uniform(0, 2), 0, 0)
        blocks.append(part(block, color(rng, hue), WHITE, pattern, 1, size, position, turn))
        height -= 2 * size
    return join(*blocks)


def make_star(rng):
    arms, depth = rng.choice([5, 5, 6]), rng.uniform(0.4, 0.55)
    angle = np.arange(2 * arms) * np.pi / arms - np.pi / 2
    outline = np.where(np.arange(2 * arms) % 2, depth, 1)[:, None] * np.c_[np.cos(angle), np.sin(angle)]
    first = color(rng, 48, 48, 330, 185, saturation=(0.35, 0.9), value=(0.85, 1))
    return join(part(plate(outline, rng.uniform(0.2, 0.35)), first, first * 0.75, "stripes", arms))


def make_fish(rng):
    first, second = color(rng, 20, 20, 210, 170), color(rng, 50, 0, 230, saturation=(0, 0.9))
    high, fat = rng.uniform(0.45, 0.7), rng.uniform(0.25, 0.4)
    tail = np.array([[0.35, 0], [-0.1, -0.3], [-0.5, -0.55], [-0.3, 0], [-0.5, 0.55], [-0.1, 0.3]])
    fin = np.array([[0.4, 0.1], [0, -0.3], [-0.4, -0.35], [-0.35, 0.1]])
    eyes = [part(ball(6, 8), BLACK, WHITE, "rings", 1, 0.1, (0.68, -0.12, z * fat * 0.72)) for z in (-1, 1)]
    return join(
        part(ball(15, 14), first, second, rng.choice(["rings", "rings", "checks", "plain"]), rng.integers(3, 6),
             size=(high, 1, fat), turn=(0, 0, np.pi / 2)),
        part(plate(tail, 0.06), second, at=(-1.15, 0, 0)),
        part(plate(fin, 0.06), second, at=(0, -high, 0)),
        *eyes,
    )  # fmt: skip


TOYS = dict(
    ball=make_ball, book=make_book, car=make_car, cup=make_cup,
    duck=make_duck, fish=make_fish, star=make_star, tower=make_tower,
)  # fmt: skip
CATEGORIES = sorted(TOYS)


def draw(image, toy, center, size, turn, lamp, light):
    """Draw a toy, far surfaces first, lit by a light (BGR factors) from the direction lamp."""
    quads, normals, colors = toy
    points = quads @ turn.T
    flat = points[..., :2] * (size * 5 / (5 + points[..., 2:])) + center
    one, other = flat[:, 2] - flat[:, 0], flat[:, 3] - flat[:, 1]
    front = one[:, 0] * other[:, 1] < one[:, 1] * other[:, 0]
    points, flat = points[front], flat[front]
    lit = np.maximum(normals[front] @ (lamp @ turn), 0)[:, None] / np.linalg.norm(lamp)
    shaded = np.clip((colors[front] * (0.45 + 0.55 * lit) + 80 * lit**16) * light, 0, 255)
    order = np.argsort(-points[..., 2].sum(1))
    corners = np.round(flat[order] * 16).astype(np.int32)
    for polygon, fill in zip(corners, shaded[order].tolist(), strict=True):
        cv2.fillConvexPoly(image, polygon, fill, shift=4)
