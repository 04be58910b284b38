"""Checks the picture of the README's first command: python red_apple.py apple.png"""

import sys

from PIL import Image

image = Image.open(sys.argv[1]).convert("RGB")
assert image.size == (128, 128), image.size
pixels = zip(*[iter(image.tobytes())] * 3, strict=True)
red = sum(r > 1.5 * max(g, b) and r > 100 for r, g, b in pixels)
assert red > 0.1 * 128 * 128, f"only {red} red pixels: that is not a red apple"
