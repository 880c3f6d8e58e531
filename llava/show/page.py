"""One HTML page without anything outside of it: pictures, answers, and each component lit up under the pointer."""

import base64
import html
import io
import json

from PIL import Image

from llava.show.look import Look

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin-bottom: 0; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; }
.grid { position: relative; line-height: 0; }
.grid img { width: 100%; }
.grid svg { position: absolute; inset: 0; width: 100%; height: 100%; }
rect { fill: transparent; }
rect.off { fill: rgb(0 0 0 / .65); }
.bar { background: #8884; height: .4rem; }
.bar div { background: #2a7; height: 100%; }
#group { min-height: 1.5rem; position: sticky; top: 0; background: Canvas; }
"""

SCRIPT = """
const squares = document.querySelectorAll("rect"), line = document.getElementById("group");
const said = line.textContent, sizes = {}, frames = {};
for (const square of squares) {
  const kept = square.dataset.kept;
  sizes[kept] = (sizes[kept] || 0) + 1;
  (frames[kept] ||= new Set()).add(square.ownerSVGElement);
}
function light(kept) {
  for (const square of squares) square.classList.toggle("off", kept !== null && square.dataset.kept !== kept);
  line.textContent = kept === null ? said : kept === "-1" ? `dropped: ${sizes[kept]} source tokens` :
    `kept token ${kept}: ${sizes[kept]} source tokens in ${frames[kept].size} frames`;
}
for (const square of squares) square.addEventListener("pointerenter", () => light(square.dataset.kept));
for (const grid of document.querySelectorAll(".grid")) grid.addEventListener("pointerleave", () => light(null));
"""


def page(shown: Look, pictures: list[Image.Image]) -> str:
    """The page, with one picture per frame."""
    stats, name = shown.result.stats, html.escape(shown.video.path.name)
    settings = [("method", shown.compression.method)]
    if stats.similarity_threshold is not None:
        settings.append(("similarity threshold", f"{stats.similarity_threshold:.3f}"))
    settings += [
        ("source tokens", f"{stats.source_tokens:,}"),
        ("kept tokens", f"{stats.kept_tokens:,} ({100 * stats.retention_ratio:.1f} %)"),
    ]
    if stats.spatial_tokens is not None:
        settings.insert(-1, ("after the step within frames", f"{stats.spatial_tokens:,}"))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head><body>
<h1>{name}</h1>
{_table(settings)}
{_answers(shown)}
<p id="group">Point at a token: all that became one token with it stays lit. Rings mark representatives.</p>
<div class="frames">
{"".join(_figure(shown, index, picture) for index, picture in enumerate(pictures))}
</div>
<script>{SCRIPT}</script>
</body></html>
"""


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>" for label, value in rows)
    return f"<table>{cells}</table>"


def _answers(shown: Look) -> str:
    if shown.question is None:
        return ""
    rows = "".join(
        f'<tr><td class="number">{100 * ratio:g} %</td><td class="number">{answer.kept_tokens:,}</td>'
        f"<td>{html.escape(answer.text)}</td></tr>"
        for ratio, answer in shown.answers
    )
    return (
        f"<h2>{html.escape(shown.question)}</h2>"
        f"<table><tr><th>retention</th><th>tokens</th><th>answer</th></tr>{rows}</table>"
    )


def _figure(shown: Look, index: int, picture: Image.Image) -> str:
    side, labels = shown.side, shown.labels[index]
    kept, present = shown.kept_per_frame()[index], shown.shown_per_frame()[index]
    squares = "".join(
        f'<rect x="{column}" y="{row}" width="1" height="1" data-kept={json.dumps(str(labels[row, column]))}></rect>'
        for row in range(side)
        for column in range(side)
    )
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    share = 100 * kept / side**2
    return (
        f'<figure><div class="grid"><img alt="frame {index}" src="data:image/png;base64,{data}">'
        f'<svg viewBox="0 0 {side} {side}" preserveAspectRatio="none">{squares}</svg></div>'
        f'<div class="bar"><div style="width:{share:.1f}%"></div></div>'
        f"<figcaption>{shown.video.timestamps[index]:.2f} s: {kept} of {side**2} tokens kept here "
        f"({share:.0f} %), {present} found here</figcaption></figure>\n"
    )
