"""Draw docs/map.png, the architecture of both networks with the shapes of their tensors.

python benchmarks/draw_map.py
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image

INK, GREY = "#2b2f36", "#5d6673"
COLOURS = dict(tensor="#8a929d", style="#3f8560", waves="#a87f1c", G="#3c6ca8", D="#b05f37", norm="#7b539e")
# A row: y of its middle, height, where it starts, which way it runs, and its boxes, with an arrow from each to the next.
# A box: name, gap before it, width, kind, title|text, sections of the notebook that build it.
ROWS = [
    (68, 42, 15, 1, [
        ("z", 0, 84, "tensor", "latent z|(B, 384)", []), ("mapping", 24, 128, "style", "mapping network|8 layers", [4]),
        ("w", 24, 84, "tensor", "style w|(B, 384)", [])]),
    (172, 68, 15, 1, [
        ("position", 0, 90, "waves", "position\nembedding|sin(Av + b)\n(64, 384)", [5]),
        ("sln1", 41, 48, "style", "SLN", [6]), ("attention", 16, 78, "G", "attention|6 heads", [7]),
        ("add1", 16, 18, "G", "+", []), ("sln2", 30, 48, "style", "SLN", [6]), ("mlp", 16, 52, "G", "MLP", [7]),
        ("add2", 16, 18, "G", "+", []), ("sln3", 32, 48, "style", "SLN", [6]),
        ("y", 20, 94, "tensor", "tokens y|(B, 64, 384)", [])]),
    (298, 56, 835, -1, [
        ("fourier", 0, 118, "waves", "Fourier features|of pixel positions\n(16, 384)", [5]),
        ("siren", 17, 102, "G", "SIREN|patch decoder", [8]), ("pixels", 40, 110, "tensor", "pixels|(B, 64, 16, 3)", []),
        ("join", 41, 110, "G", "patches\nto image", [8]), ("fake", 41, 106, "tensor", "image G(z)|(B, 3, 32, 32)", [])]),
    (422, 68, 15, 1, [
        ("real", 0, 106, "tensor", "real image x|(B, 3, 32, 32)", [2]),
        ("augment", 29, 106, "D", "DiffAugment|adds a copy\nof each image", [10]),
        ("overlap", 24, 116, "D", "overlapping\npatches|8 × 8, every 4 px\n(B, 64, 192)", [11]),
        ("embed", 24, 116, "D", "linear|+ class token\n+ position\n(B, 65, 384)", [11, 13, 14])]),
    (430, 84, 590, 1, [("losses", 0, 245, "tensor", "losses|$L_D$: logit up for x, down for G(z)\n$L_G$: logit up for "
                        "G(z)\nconsistency: the same logit\nwith and without DiffAugment", [15])]),
    (544, 68, 60, 1, [
        ("norm1", 0, 80, "D", "LayerNorm", [14]), ("l2", 16, 90, "D", "L2 attention|6 heads", [13, 12]),
        ("add3", 16, 18, "D", "+", []), ("norm2", 30, 80, "D", "LayerNorm", [14]), ("mlp2", 16, 52, "D", "MLP", [13, 7]),
        ("add4", 16, 18, "D", "+", []), ("class", 40, 90, "tensor", "class token|(B, 384)", []),
        ("head", 28, 86, "D", "LayerNorm,\nlinear", [13, 14]), ("logit", 28, 66, "tensor", "logit|(B,)", [])]),
]  # fmt: skip
NOTES = [  # x, y, size, kind, text, section: its badge stands before the text
    (41, 24, 15, "G", "Generator G", 9), (41, 364, 15, "D", "Discriminator D", 14),
    (436, 24, 11.5, None, "section that builds it; shapes for B images, at the paper's size", "n"),
    (376, 61, 11.5, "style", "w enters at every self-modulated LayerNorm (SLN),", None),
    (376, 76, 11.5, "style", "as its scale γ(w) and its shift β(w)", None),
    (715, 165, 11.5, None, "64 tokens, one for", None), (715, 180, 11.5, None, "4 × 4 pixels each", None),
    (660, 239, 11.5, None, "y modulates its weights", None),
    (155, 231, 11.5, "G", "Transformer block, × 4", 7), (70, 603, 11.5, "D", "Transformer block, × 4", 14),
    (250, 364, 11.5, "norm", "improved spectral normalisation on every linear layer of D", 13),
]  # fmt: skip


def draw_map():
    """The generator and the discriminator at the paper's size, with the shapes of their tensors, as a figure."""
    figure = plt.figure(figsize=(8.5, 6.2))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 850), ylim=(620, 0))  # one unit is one pixel at a width of 850
    axis.axis("off")
    boxes = {}  # name: x and y of the middle, half the width, half the height

    def point(name, right, down):  # (-1, 0) is the middle of the left edge, (0, 1) of the lower one
        x, y, half_width, half_height = boxes[name]
        return x + right * half_width, y + down * half_height

    def text(x, y, words, color, size=11.5, **style):
        axis.text(x, y, words, color=color, size=0.72 * size, va="center_baseline", **style)

    def rectangle(x, y, half_width, half_height, corner, fill, edge, **style):
        corner, place = f"round, pad=0, rounding_size={corner}", (x - half_width, y - half_height)
        axis.add_patch(FancyBboxPatch(place, 2 * half_width, 2 * half_height, corner, fc=fill, ec=edge, **style))

    def arrow(*points, color=GREY):
        axis.plot(*zip(*points[:-1], strict=True), color=color, linewidth=1.1)
        head = dict(arrowstyle="-|>, head_width=0.18, head_length=0.36", color=color, shrinkA=0, shrinkB=0)
        axis.annotate("", points[-1], points[-2], arrowprops=head)

    def badge(x, y, section, kind):
        rectangle(x, y, 10, 8, 8, COLOURS["norm" if section == 13 else kind or "tensor"], "white", zorder=4)
        text(x, y, section, "white", 11, weight="bold", ha="center", zorder=5)

    for y, height, x, way, row in ROWS:
        for name, gap, width, kind, label, sections in row:
            if gap:
                arrow((x, y), (x + way * gap, y))
            x += way * (gap + width)
            boxes[name] = x - way * width / 2, y, width / 2, 9 if label == "+" else height / 2
            fill = "white" if kind == "tensor" else (COLOURS[kind], 0.13)
            rectangle(*boxes[name], 9 if kind == "tensor" or label == "+" else 4, fill, COLOURS[kind])
            title, lines = label.split("|")[0], label.replace("|", "\n").split("\n")
            for i, line in enumerate(lines, start=1):
                weight, color = "bold" if line in title else "normal", GREY if line[0] == "(" else INK
                text(boxes[name][0], y + 14 * (i - (len(lines) + 1) / 2), line, color, weight=weight, ha="center")
            for i, section in enumerate(reversed(sections)):
                badge(point(name, 1, 0)[0] - 8 - 21 * i, y - height / 2, section, kind)

    (x, y), (left, middle) = point("w", 0, 1), point("norm1", -1, 0)
    for norm in ("sln1", "sln2", "sln3"):
        x1, y1 = point(norm, 0, -1)
        arrow((x, y), (x, y + 16), (x1, y + 16), (x1, y1), color=COLOURS["style"])
    arrow(point("y", 0, 1), point("siren", 0, -1))
    arrow(point("fake", 0, 1), point("augment", 0, -1))
    x, y = point("embed", 0, 1)
    arrow((x, y), (x, y + 20), (left - 40, y + 20), (left - 40, middle), (left, middle))  # on to the row below
    arrow(point("logit", 0, -1), (point("logit", 0, 0)[0], point("losses", 0, 1)[1]))
    for norm, add in (("sln1", "add1"), ("sln2", "add2"), ("norm1", "add3"), ("norm2", "add4")):  # the residual paths
        (x, y), (x1, y1) = point(norm, -1, 0), point(add, 0, 1)
        arrow((x - 11, y), (x - 11, y + 45), (x1, y + 45), (x1, y1))
    for kind, norm, add in (("G", "sln1", "add2"), ("D", "norm1", "add4")):  # the frames of the blocks
        (x, y), (x1, _) = point(norm, -1, 0), point(add, 1, 0)
        rectangle((x + x1) / 2 - 6, y + 11, (x1 - x) / 2 + 16, 59, 8, "none", COLOURS[kind], linestyle=(0, (4, 3)))
    for x, y, size, kind, words, section in NOTES:
        text(x, y, words, COLOURS.get(kind, GREY), size, weight="bold" if kind in ("G", "D") else "normal")
        if section:
            badge(x - 16, y, section, kind)
    return figure


if __name__ == "__main__":
    plt.switch_backend("agg")
    picture = io.BytesIO()
    draw_map().savefig(picture, format="png", dpi=188)
    few = Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE)  # a third of the bytes
    few.save(Path(__file__).resolve().parent.parent / "docs" / "map.png", optimize=True)
