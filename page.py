"""The page of `evaluate.py compare`: images of several models side by side, sorted by any score."""

import base64
import io
import json
import string
from html import escape

from PIL import Image

from data import read_image

PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8"><title>$title</title><style>
:root { color-scheme: light dark; --faint: light-dark(#666, #999);
  --better: light-dark(#0067a8, #62b6ef); --worse: light-dark(#b84a00, #f09a4a) }
body { margin: 0 auto; padding: 1rem; max-width: max(60rem, $n * 21rem); min-width: calc($n * 12rem);
  font: 14px/1.45 system-ui, sans-serif }
header { position: sticky; top: 0; z-index: 1; background: Canvas }
nav { padding: .8rem 0 .4rem } nav > * { margin-right: 1.2rem }
.grid { display: grid; grid-template-columns: repeat($n, minmax(0, 20rem)); gap: .4rem 1rem;
  padding: .5rem 4px; overflow-wrap: anywhere }
header, section { border-bottom: 1px solid light-dark(#ddd, #383a3e) }
section { padding: .2rem 0 .6rem; content-visibility: auto; contain-intrinsic-size: auto 27rem }
p { grid-column: 1 / -1; margin: 0; max-height: 6.6em; overflow-y: auto }
figure { margin: 0 } img { max-width: 100%; height: auto } .small { image-rendering: pixelated }
table { border-spacing: 0; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: 0 1rem 0 0; text-align: left; font-weight: normal } th, figure, i { color: var(--faint) }
.better { color: var(--better) } .worse { color: var(--worse) }
</style><style id="chosen"></style><table>$summary</table>
<header><nav $hidden><label>Metric <select id="metric">$metrics</select></label>
<label>Difference of <select id="against">$others</select> to $first</label>
<label>Order <select id="order"><option value="index">by prompt
<option value="descending">largest first<option value="ascending">smallest first</select></label>
<span id="count"></span></nav><div class="grid">$names</div></header><main>$rows</main><script>
const rows = [...document.querySelectorAll("section")]
const [chosen, metric, against, order, count] = document.querySelectorAll("[id]")
function show() {
  const scores = rows.map(row => JSON.parse(row.dataset.scores)[metric.value])
  const gaps = scores.map(scores => scores[against.value] - scores[0])
  const sign = { index: 0, ascending: 1, descending: -1 }[order.value]
  const places = [...rows.keys()].sort((a, b) => sign * (gaps[a] - gaps[b]))  // stable
  document.querySelector("main").append(...places.map(k => rows[k]))
  count.textContent = rows.length + " prompts: " + gaps.filter(gap => gap > 0).length + " better, " +
    gaps.filter(gap => gap < 0).length + " worse, " + gaps.filter(gap => gap == 0).length + " equal"
  chosen.textContent = ".m" + metric.selectedIndex + " { color: CanvasText } .best" + metric.selectedIndex +
    " img { outline: 3px solid var(--better) }"
}
document.addEventListener("change", show)
if (metric.value && against.value) show()
</script></html>""")


def page(names, metrics, rows, summary):
    """A self-contained HTML page that compares folders of images made from the same prompts.

    names    N folders; the first is the one that the others are held against
    metrics  names of scores, the higher the better; with none the page shows the images alone
    rows     {"index": number of the prompt, "prompt": str, "images": N pictures or paths,
             "scores": {metric: N finite floats}}
    summary  rows of the table on top: dicts of strings, all with the same keys
    """
    def cells(tag, values):
        return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)

    def figure(row, k):
        image, file, best, table = row["images"][k], io.BytesIO(), "", ""
        image = image.convert("RGB") if isinstance(image, Image.Image) else read_image(str(image))
        small = max(image.size) <= 128  # these are kept exact, and shown enlarged
        image.thumbnail((320, 320))
        image.save(file, kind := "png" if small else "jpeg", quality=85)
        width, height = (side * (256 // max(image.size) if small else 1) for side in image.size)
        for m, metric in enumerate(metrics):
            scores = row["scores"][metric]
            gap, wins = scores[k] - scores[0], scores[k] == max(scores) > min(scores)
            best += f" best{m}" * wins
            table += (f'<tr class="m{m}"><th>{escape(metric)}<td>{scores[k]:.4f}'
                      f'<td class="{"better" if gap > 0 else "worse" * (gap < 0)}">'
                      f'{f"{gap:+.4f}" if k else ""}<td>{"★" * wins}')
        return (f'<figure class="{best}"><img class="{"small" * small}" width="{width}" height="{height}" '
                f'alt="{escape(names[k])}" loading="lazy" decoding="async" src="data:image/{kind};base64,'
                f'{base64.b64encode(file.getvalue()).decode()}"><table>{table}</table></figure>')

    def section(row):
        return (f'<section data-index="{row["index"]}" data-scores="{escape(json.dumps(row["scores"]))}">'
                f'<div class="grid"><p><i>{row["index"]}</i>&ensp;{escape(row["prompt"])}</p>'
                + "".join(figure(row, k) for k in range(len(names))) + "</div></section>\n")

    return PAGE.substitute(
        title=escape(" / ".join(names)), n=len(names), first=escape(names[0]), names=cells("b", names),
        metrics=cells("option", metrics), hidden="" if metrics and names[1:] else "hidden",
        others="".join(f'<option value="{k}">{escape(names[k])}' for k in range(1, len(names))),
        summary="<tr>".join([*(cells("th", row) for row in summary[:1]),
                             *(cells("td", row.values()) for row in summary)]),
        rows="".join(map(section, sorted(rows, key=lambda row: row["index"]))))
