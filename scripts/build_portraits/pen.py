"""Draw shapes on a PIL image in a rotated, scaled frame, with y downwards and sRGB colours in [0, 1]."""

import numpy as np
from PIL import Image, ImageDraw


def ink(colour) -> tuple[int, int, int]:
    """Return the eight-bit colour of sRGB values in [0, 1], clipped."""
    return tuple(int(c) for c in np.clip(np.asarray(colour) * 255 + 0.5, 0, 255))


class Pen:
    """Draws in units of `unit` pixels around (x, y) of the image, rotated by `angle` degrees clockwise."""

    def __init__(self, image: Image.Image, x: float, y: float, unit: float, angle: float = 0.0, mirror: bool = False):
        self.draw, self.x, self.y, self.unit = ImageDraw.Draw(image), x, y, unit
        self.cos, self.sin, self.flip = np.cos(np.radians(angle)), np.sin(np.radians(angle)), -1 if mirror else 1

    def at(self, points) -> list[tuple[float, float]]:
        """Return the pixel positions of points [n, 2]."""
        return [
            (
                self.x + self.flip * self.unit * (px * self.cos - py * self.sin),
                self.y + self.unit * (px * self.sin + py * self.cos),
            )
            for px, py in points
        ]

    def area(self, colour, *points) -> None:
        self.draw.polygon(self.at(points), fill=ink(colour))

    def box(self, colour, x0, y0, x1, y1) -> None:
        self.area(colour, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def line(self, colour, width, *points) -> None:
        self.draw.line(self.at(points), fill=ink(colour), width=max(1, round(width * self.unit)), joint="curve")

    def disc(self, colour, x, y, rx, ry=None) -> None:
        turn = np.linspace(0, 2 * np.pi, 29)[:-1]
        ry = rx if ry is None else ry
        self.area(colour, *zip(x + rx * np.cos(turn), y + ry * np.sin(turn), strict=True))

    def ring(self, colour, width, x, y, r, *, start=0.0, stop=360.0) -> None:
        turn = np.radians(np.linspace(start, stop, 25))
        self.line(colour, width, *zip(x + r * np.cos(turn), y + r * np.sin(turn), strict=True))
