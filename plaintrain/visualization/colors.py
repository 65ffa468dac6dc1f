"""The colours of classes and of curves, RGB, 0 to 255."""

import colorsys

# Told apart at a glance, also by most of those who see red and green alike; the first eight on white and on
# black.
PALETTE = (
    *((31, 119, 255), (255, 127, 14), (0, 178, 89), (230, 25, 75), (160, 80, 230), (0, 190, 200)),
    *((240, 90, 200), (150, 105, 60), (250, 200, 20), (128, 190, 40), (90, 110, 140), (255, 150, 130)),
)


def get_class_colors(num_classes):
    """Return so many colours: the `PALETTE` as far as it goes, then a spread of hues and of lightness."""
    # Steps of the golden ratio: neighbours differ most, however many there are.
    spread = [
        colorsys.hls_to_rgb((0.08 + 0.618034 * i) % 1, (0.5, 0.38, 0.65)[i % 3], (0.9, 0.6)[i // 3 % 2])
        for i in range(num_classes - len(PALETTE))
    ]
    return [*PALETTE[:num_classes], *(tuple(round(255 * part) for part in color) for color in spread)]


def get_hex_color(index):
    """Return a colour of the `PALETTE`, over and over, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[index % len(PALETTE)])
