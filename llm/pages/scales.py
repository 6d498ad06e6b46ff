"""Colour scales for the numbers of a token: from a value to a level, from a level to a colour.

Level 0 is what the model expected. It has the colour of the paper, so that a text at rest looks
like a text and surprise stands out, on light paper and on dark. Both sequential scales change
steadily in luminance, so they can be read without telling hues apart. The diverging scale goes from
orange over paper to blue, the pair that colour-blind people confuse least.

The light scale is ColorBrewer's YlGnBu without its darkest step (Brewer 2003,
https://colorbrewer2.org), the dark scale is viridis (van der Walt and Smith 2015), the diverging
scale is ColorBrewer's PuOr with blue for purple. Contrast is that of WCAG 2.2. In a browser,
page.js computes the levels.
"""

import math

RGB = tuple[int, ...]

SEQUENTIAL_LEVELS = 25
DIVERGING_LEVELS = 17  # the middle one, 8, means no change

THEMES = ("light", "dark")

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


def _ramp(anchors: str, levels: int) -> list[RGB]:
    """Colours at equal distances along the line through the anchors, in sRGB."""
    points = [bytes.fromhex(anchor) for anchor in anchors.split()]
    ramp: list[RGB] = []
    for level in range(levels):
        place = level / (levels - 1) * (len(points) - 1)
        index = min(int(place), len(points) - 2)
        ends = zip(points[index], points[index + 1], strict=True)
        ramp.append(tuple(round(a + (b - a) * (place - index)) for a, b in ends))
    return ramp


def probability_level(logprob: float) -> int:
    """0 for certain, the last level for impossible: 1 - sqrt(probability).

    The square root gives one in four the middle of the scale, and tells one in ten from one in a
    hundred; in a linear scale both would look impossible.
    """
    fraction = 1.0 - math.exp(min(logprob, 0.0) / 2.0)
    # floor(x + 1/2), as Math.round in the browser; Python's round goes to the even neighbour.
    return math.floor(fraction * (SEQUENTIAL_LEVELS - 1) + 0.5)


def ink_on(colour: RGB) -> str:
    """Black or white, whichever has more contrast; at least 4.5 : 1 on any colour.

    The contrast of relative luminances a > b is (a + 0.05) / (b + 0.05).
    """
    channels = [channel / 255 for channel in colour]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    black, white = (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)
    return "#000" if black >= white else "#fff"


def css_colours() -> str:
    """The scales as CSS variables: --c3 and --d3 are colours, --ck3 and --dk3 the ink on them."""
    lines = []
    for letter, name, scale in (("c", "sequential", sequential), ("d", "diverging", diverging)):
        pairs = list(zip(scale("light"), scale("dark"), strict=True))
        for level, (light, dark) in enumerate(pairs):
            lines.append(
                f"--{letter}{level}:light-dark(#{bytes(light).hex()},#{bytes(dark).hex()});"
                f"--{letter}k{level}:light-dark({ink_on(light)},{ink_on(dark)});"
            )
        colours = ",".join(f"var(--{letter}{level})" for level in range(len(pairs)))
        lines.append(f"--{name}:linear-gradient(90deg,{colours});")
    return ":root{" + "".join(lines) + "}"
