"""Colour scales for the numbers of a token: from a value to a level, from a level to a colour.

Level 0 is what the model expected and has the colour of the paper, so that a text at rest looks
like a text and surprise stands out, on light paper and on dark. Both sequential scales change
steadily in luminance, so they can be read without telling hues apart; the diverging one goes from
orange over paper to blue, the pair that colour-blind people confuse least. What ink is written on a
colour is computed from their contrast.

The light scale is ColorBrewer's YlGnBu without its darkest step (Brewer 2003,
https://colorbrewer2.org), the dark one is viridis (van der Walt and Smith 2015), the diverging one
is ColorBrewer's PuOr with blue for purple.
Contrast is that of WCAG 2.2. In a browser, page.js computes the levels.
"""

import math

RGB = tuple[int, int, int]

SEQUENTIAL_LEVELS = 25
DIVERGING_LEVELS = 17  # the middle one, 8, means no change
# A change of 3 nats is a factor of 20: beyond it, a difference of degree no longer tells much.
CHANGE_LIMIT_NATS = 3.0

THEMES = ("light", "dark")
PAPER = {"light": "#fdfdfb", "dark": "#14161a"}

_SEQUENTIAL = {
    "light": "fdfdfb f7fbc9 e4f4b6 c7e9b4 7fcdbb 41b6c4 1d91c0 225ea8 253494",
    "dark": "14161a 242043 38326f 3f4b8a 31688e 26828e 21a585 52c569 a2d93a fde725",
}
_DIVERGING = {
    "light": "7f3b08 b35806 e08214 fdb863 fee4c0 fdfdfb d3e5f3 9ecae1 5b9fd0 2a6cb0 0a3d7c",
    "dark": "ffc27a f09a3e b96a1c 7a4614 40290f 14161a 132a44 1c4a7c 2f6fb5 58a0ea a5d0ff",
}


def sequential(theme: str) -> list[RGB]:
    """SEQUENTIAL_LEVELS colours, from the paper's to the most surprising."""
    return _ramp(_SEQUENTIAL[theme], SEQUENTIAL_LEVELS)


def diverging(theme: str) -> list[RGB]:
    """DIVERGING_LEVELS colours: less likely in orange, no change as paper, likelier in blue."""
    return _ramp(_DIVERGING[theme], DIVERGING_LEVELS)


def probability_level(logprob: float | None) -> int | None:
    """0 for certain, the last level for impossible: 1 - sqrt(probability).

    The square root gives one in four the middle of the scale, and tells one in ten from one in a
    hundred; in a linear scale both would look impossible.
    """
    if logprob is None:
        return None
    fraction = 1.0 - math.exp(min(logprob, 0.0) / 2.0)
    # floor(x + 1/2), as Math.round in the browser; Python's round goes to the even neighbour.
    return math.floor(fraction * (SEQUENTIAL_LEVELS - 1) + 0.5)


def ink_on(colour: RGB) -> str:
    """Black or white, whichever reads better; at least 4.5 : 1 on any colour."""
    black, white = contrast(colour, (0, 0, 0)), contrast(colour, (255, 255, 255))
    return "#000" if black >= white else "#fff"


def contrast(one: RGB, other: RGB) -> float:
    """WCAG's contrast ratio, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: RGB) -> float:
    """Relative luminance of an sRGB colour, 0 to 1."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def css_colours() -> str:
    """The scales as CSS variables: --c3 and --d3 are colours, --ck3 and --dk3 the ink on them."""
    lines = []
    for letter, scale in (("c", sequential), ("d", diverging)):
        for level, (light, dark) in enumerate(zip(scale("light"), scale("dark"), strict=True)):
            lines.append(
                f"--{letter}{level}:light-dark({_hex(light)},{_hex(dark)});"
                f"--{letter}k{level}:light-dark({ink_on(light)},{ink_on(dark)});"
            )
    stops = {"sequential": ("c", SEQUENTIAL_LEVELS), "diverging": ("d", DIVERGING_LEVELS)}
    for name, (letter, levels) in stops.items():
        colours = ",".join(f"var(--{letter}{level})" for level in range(levels))
        lines.append(f"--{name}:linear-gradient(90deg,{colours});")
    return ":root{" + "".join(lines) + "}"


def _ramp(anchors: str, levels: int) -> list[RGB]:
    """Colours at equal distances along the line through the anchors, in sRGB."""
    points = [bytes.fromhex(anchor) for anchor in anchors.split()]
    ramp = []
    for level in range(levels):
        place = level / (levels - 1) * (len(points) - 1)
        index = min(int(place), len(points) - 2)
        part = place - index
        low, high = points[index], points[index + 1]
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
        ramp.append((red, green, blue))
    return ramp


def _hex(colour: RGB) -> str:
    return "#" + bytes(colour).hex()
