"""The page's own HTML and CSS. In Python, so that an installed moeflow has them wherever it is."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee4;
  --after: #1f6feb; --before: #8a6d3b; --gone: #c2410c; --link: #0a58ca;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111418; --card: #1a1f25; --ink: #e6e9ed; --soft: #9aa5b1; --line: #303842;
    --after: #79b0ff; --before: #d3ad6a; --gone: #ff9466; --link: #8ab8ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); }
body, svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
body { font-size: 16px; line-height: 1.5; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 6px; padding-top: 10px; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 6px; overflow-wrap: anywhere; }
ul { margin: 0 0 12px; padding-left: 20px; color: var(--soft); max-width: 72ch; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 72ch; overflow-wrap: anywhere; }
a { color: var(--link); }
.soft { color: var(--soft); }
.label { display: inline-block; padding: 0 8px; margin-left: 6px; border: 1px solid var(--after); border-radius: 99px; }
.label { color: var(--after); font-size: .8rem; vertical-align: middle; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; overflow-wrap: anywhere; }
.tile span { display: block; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: 8px; padding: 12px 14px; margin: 0 0 12px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.wide { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.right { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.total td { font-weight: 600; border-bottom: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px; margin: 0 0 14px; }
figure { margin: 0; min-width: 0; overflow-x: auto; }
svg.chart { width: 100%; max-width: 560px; height: auto; display: block; }
svg.map { display: block; max-width: none; }
svg text { font-size: 12px; fill: var(--soft); }
svg text.name { fill: var(--ink); }
svg .grid { stroke: var(--line); fill: none; }
svg .bar { fill: var(--after); }
svg .line { fill: none; stroke: var(--after); stroke-width: 1.8; }
svg .c1, svg .dot.c1 { stroke: var(--before); fill: none; } svg .dot.c1 { fill: var(--before); }
svg .c2 { stroke: var(--gone); } svg .dot.c2 { fill: var(--gone); }
svg .c3 { stroke: var(--ink); } svg .dot.c3 { fill: var(--ink); }
svg circle.dot { fill: var(--after); }
svg .mark { fill: var(--paper); stroke: var(--before); stroke-width: 1.6; }
svg .here { fill: var(--gone); stroke: var(--paper); stroke-width: 1.5; }
svg path.before, svg path.after { fill: none; stroke-width: 2; }
svg path.before { stroke: var(--before); } svg circle.before { fill: var(--before); }
svg path.after { stroke: var(--after); } svg circle.after { fill: var(--after); }
svg .chance { stroke: var(--gone); stroke-width: 1.5; stroke-dasharray: 3 2; }
svg .cross { stroke: var(--gone); stroke-width: 1.2; fill: none; }
svg .kept, svg .gone { fill: var(--after); }
svg .ux { fill-opacity: .55; } svg .u0 { fill-opacity: .07; } svg .u1 { fill-opacity: .14; } svg .u2 { fill-opacity: .24; }
svg .u3 { fill-opacity: .36; } svg .u4 { fill-opacity: .48; } svg .u5 { fill-opacity: .6; } svg .u6 { fill-opacity: .73; }
svg .u7 { fill-opacity: .86; } svg .u8 { fill-opacity: 1; }
svg .gone.ux { fill-opacity: .1; }
.key { display: block; font-size: .85rem; color: var(--soft); margin: 0 0 8px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin: 0 5px 0 10px; }
.key i:first-child { margin-left: 0; }
i.before { background: var(--before); } i.after { background: var(--after); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.pair pre em { font-style: normal; color: var(--soft); }
details { margin: 0 0 12px; } summary { cursor: pointer; color: var(--link); margin-bottom: 8px; }
footer { margin-top: 48px; color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 16px 14px 48px; }
  .pair { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px; } .tile b { font-size: 1.15rem; }
  svg.chart text { font-size: 13px; }
}
@media print {
  :root { --paper: #fff; --card: #f6f7f9; --ink: #000; --soft: #444; --line: #bbb; --link: #000; }
  :root { --after: #1f6feb; --before: #8a6d3b; --gone: #c2410c; }
  body { font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  figure, .tile, .pair, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide, figure { overflow: visible; }
  svg.map { max-width: 100%; height: auto; }
  details::details-content { content-visibility: visible; height: auto; }
  summary { list-style: none; color: inherit; font-weight: 600; }
}
"""

PAGE = """\
{% macro side(table, column) %}{% if column in table.right %} class="right"{% endif %}{% endmacro %}
{% macro grid(table) %}
<div class="wide"><table>
<thead><tr>{% for title in table.head %}<th{{ side(table, loop.index0) }}>{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr{% if table.total and loop.last %} class="total"{% endif %}>
{% for cell in row %}<td{{ side(table, loop.index0) }}>{{ cell }}</td>{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ css|safe }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}{% for label in labels %}<span class="label">{{ label }}</span>{% endfor %}</h1>
<p class="soft">{% if source %}made from {{ source }}, {% endif %}{{ created }} UTC</p>
</header>
{% if tiles %}
<div class="tiles">
{% for tile in tiles %}
<div class="tile"><span>{{ tile.name }}</span><b>{{ tile.value }}</b><span>{{ tile.words }}</span></div>
{% endfor %}
</div>
{% endif %}
{% if notes %}
<ul>
{% for note in notes %}
<li>{{ note[:1]|upper }}{{ note[1:] }}</li>
{% endfor %}
</ul>
{% endif %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.words %}<p>{{ section.words }}</p>{% endif %}
{% if section.key %}{{ section.key }}{% endif %}
{% if section.code %}<pre>{{ section.code }}</pre>{% endif %}
{% if section.charts %}
<div class="charts">
{% for above, picture in section.charts %}
<figure>{% if above %}<h3>{{ above }}</h3>{% endif %}{{ picture }}</figure>
{% endfor %}
</div>
{% endif %}
{% for pair in section.pairs %}
<div class="pair">
<div><h3>original</h3><pre><em>{{ pair.prompt }}</em>{{ pair.original }}</pre></div>
<div><h3>this model</h3><pre><em>{{ pair.prompt }}</em>{{ pair.compressed }}</pre></div>
</div>
{% endfor %}
{% for table in section.tables %}
{% if table.title %}<details><summary>{{ table.title }}</summary>{{ grid(table) }}</details>{% else %}{{ grid(table) }}{% endif %}
{% endfor %}
{% if section.after %}<p class="soft">{{ section.after }}</p>{% endif %}
</section>
{% endfor %}
<footer>{{ key }}<br>contents {{ digest }}</footer>
</main>
</body>
</html>
"""
