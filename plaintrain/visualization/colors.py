"""Colors of classes and curves, RGB, 0 to 255."""

import colorsys
from collections.abc import Mapping

Color = tuple[int, int, int]
Legend = Mapping[str, Color]
# Distinct also with red-green color blindness; the first eight are legible on white and on black.
PALETTE: tuple[Color, ...] = (
    *((31, 119, 255), (255, 127, 14), (0, 178, 89), (230, 25, 75), (160, 80, 230), (0, 190, 200)),
    *((240, 90, 200), (150, 105, 60), (250, 200, 20), (128, 190, 40), (90, 110, 140), (255, 150, 130)),
)


def get_class_colors(num_classes: int) -> list[Color]:
    """Return one color per class: the `PALETTE` first, then generated hues."""
    colors = list(PALETTE[:num_classes])
    for i in range(num_classes - len(PALETTE)):
        # Steps of the golden ratio keep consecutive hues apart for any number of classes.
        hue = (0.08 + 0.618034 * i) % 1
        r, g, b = colorsys.hls_to_rgb(hue, (0.5, 0.38, 0.65)[i % 3], (0.9, 0.6)[i // 3 % 2])
        colors.append((round(255 * r), round(255 * g), round(255 * b)))
    return colors


def get_hex_color(index: int) -> str:
    """Return a color of the `PALETTE` (cyclic) as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[index % len(PALETTE)])
