"""Chosen rows of a comparison as one picture for a paper: `evaluate.py compare --rows`."""

from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont, ImageOps

from report import SMALL, open_image, save_png

# The first of these that is installed. matplotlib brings the last one, which has no Chinese, Japanese and Korean.
FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Yu Gothic", "WenQuanYi Zen Hei", "DejaVu Sans")


def save_rows(file, names, rows, side=256):
    """Draws rows of the page as one PNG: a column per folder under its name, each prompt above its row."""
    font = ImageFont.truetype(findfont(FontProperties(family=FONTS)), 13)
    grid = Image.new("RGB", (side * len(names), 24 + (side + 24) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for k, name in enumerate(names):
        draw.text((k * side + 4, 4), name, "black", font)
    for number, row in enumerate(rows):
        top = 24 + number * (side + 24)
        draw.text((4, top + 4), row["prompt"], "black", font)
        for k, image in enumerate(row["images"]):
            picture = open_image(image)
            sampling = Image.NEAREST if max(picture.size) <= SMALL else Image.LANCZOS
            grid.paste(ImageOps.contain(picture, (side, side), sampling), (k * side, top + 24))
    save_png(grid, file)
