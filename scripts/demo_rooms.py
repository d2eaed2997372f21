"""The rooms of the demo: a wall, a floor, furniture and light."""

import cv2
import numpy as np

from scripts.demo_toys import BLACK, WHITE, color

ROOM = (1000, 1600)  # height and width in pixels of the canvas of a room; its image has half of that
FURNITURE = ("window", "picture", "shelf", "sofa", "lamp", "cabinet", "plant")


def make_room(rng):
    """An image of a wall and a floor with furniture, unevenly lit."""
    height, width = ROOM
    horizon = int(height * rng.uniform(0.55, 0.65))
    room = np.empty((height, width, 3), np.uint8)
    hue = rng.uniform(0, 360)
    wall = color(rng, hue, saturation=(0.08, 0.45), value=(0.6, 0.95))
    room[:horizon] = wall
    paper, step = rng.choice(["plain", "stripes", "dots", "panels"]), int(rng.integers(50, 110))
    for x in range(0, width, step):
        if paper == "stripes":
            cv2.rectangle(room, (x, 0), (x + step // 2, horizon), wall * 0.88, -1)
        for y in range(0, horizon, step) if paper == "dots" else ():
            cv2.circle(room, (x, y), step // 6, wall * 0.8, -1)
    if paper == "panels":
        cv2.rectangle(room, (0, horizon - 170), (width, horizon), wall * 0.75, -1)
    floor = color(rng, 25, 25, hue + 150, saturation=(0.2, 0.6), value=(0.35, 0.7))
    room[horizon:] = floor
    if rng.random() < 0.6:  # planks in perspective
        for x in range(-3 * width, 4 * width, 220):
            cv2.line(room, (x // 2 + width // 4, horizon), (x, height), floor * 0.75, 3)
    else:
        for x in range(-3 * width, 4 * width, 320):
            strip = np.array([(x // 2 + 400, horizon), (x // 2 + 480, horizon), (x + 160, height), (x, height)])
            cv2.fillConvexPoly(room, strip, floor * 0.85)
    rug = tuple(int(v) for v in (rng.uniform(200, width - 200), rng.uniform(horizon + 120, height - 60)))
    for k, size in enumerate((1, 0.8, 0.6, 0.3)):
        axes = (int(330 * size), int(110 * size))
        cv2.ellipse(room, rug, axes, 0, 0, 360, color(rng, hue + 180 + 40 * k, saturation=(0.2, 0.7)), -1)
    cv2.rectangle(room, (0, horizon - 14), (width, horizon), wall * 0.6 + 90, -1)
    for x in np.arange(60, width - 200, 300) + rng.integers(0, 100, 5):
        furnish(room, rng, int(x), horizon, rng.choice(FURNITURE))
    lamps = rng.uniform(0.65, 1.2, (3, 4)).astype(np.float32)
    light = cv2.resize(lamps, (width, height), interpolation=cv2.INTER_CUBIC)
    room = cv2.GaussianBlur(room, None, 2.5) * light[..., None]
    return cv2.resize(np.clip(room, 0, 255).astype(np.uint8), (width // 2, height // 2), interpolation=cv2.INTER_AREA)


def furnish(room, rng, x, horizon, thing):
    """Draw a piece of furniture at the wall of a room, its left edge at x."""
    tone = color(rng, rng.uniform(0, 360), saturation=(0.2, 0.8), value=(0.3, 0.9))

    def block(left, top, right, bottom, fill):
        cv2.rectangle(room, (int(x + left), int(horizon - top)), (int(x + right), int(horizon - bottom)), fill, -1)

    if thing == "window":
        block(0, 480, 210, 190, WHITE)
        for left in (12, 112):
            block(left, 466, left + 86, 330, (250, 225, 190))
            block(left, 322, left + 86, 204, (215, 230, 175))
        block(-45, 500, 5, 160, tone)
        block(205, 500, 255, 160, tone)
    elif thing == "picture":
        block(20, 430, 180, 230, tone * 0.5)
        block(34, 416, 166, 244, WHITE)
        for _ in range(4):
            center = (x + int(rng.uniform(60, 140)), horizon - int(rng.uniform(275, 385)))
            cv2.circle(room, center, int(rng.uniform(10, 30)), color(rng, rng.uniform(0, 360)), -1)
    elif thing == "shelf":
        block(0, 420, 230, 0, tone * 0.55)
        for bottom in (20, 120, 220, 320):
            block(12, bottom + 85, 218, bottom, tone * 0.3)
            left = 14
            while left < 195:
                thick = rng.uniform(10, 24)
                block(left, bottom + rng.uniform(50, 80), left + thick, bottom, color(rng, rng.uniform(0, 360)))
                left += thick + rng.choice([1, 1, 20])
    elif thing == "sofa":
        block(0, 190, 290, 60, tone * 0.85)
        block(0, 90, 290, -30, tone)
        block(-25, 130, 25, -45, tone * 0.75)
        block(265, 130, 315, -45, tone * 0.75)
        block(40, 165, 110, 95, color(rng, rng.uniform(0, 360)))
    elif thing == "lamp":
        block(92, 330, 100, 0, BLACK)
        shade = np.array([(50, -330), (142, -330), (115, -430), (77, -430)]) + (x, horizon)
        cv2.fillConvexPoly(room, shade, tone * 0.4 + 150)
    elif thing == "cabinet":
        block(0, 230, 260, -20, tone)
        for left in (12, 134):
            block(left, 215, left + 114, 0, tone * 0.85)
            cv2.circle(room, (x + left + 57, horizon - 120), 7, WHITE, -1)
    else:
        block(70, 80, 150, -10, tone)
        leaf = color(rng, 110, saturation=(0.4, 0.8), value=(0.35, 0.65))
        for angle in rng.uniform(200, 340, 9):
            middle = (x + 110 + 110 * np.cos(np.radians(angle)), horizon - 80 + 110 * np.sin(np.radians(angle)))
            cv2.ellipse(room, np.intp(middle), (80, 18), angle, 0, 360, leaf * rng.uniform(0.7, 1.2), -1)
