"""CSS of the report: system fonts, a light and a dark theme, responsive charts, tables that scroll sideways."""

from __future__ import annotations

from dylora_mlx.system.palette import GREY, RGB

LIFT = 0.42
"""How far the dark theme moves a colour towards white: 0 keeps it, 1 is white."""


def color_class(number: int) -> str:
    """Return the CSS class of an expert's colour. number: its order of creation; 0 is the base."""
    return f"e{(number - 1) % len(RGB) + 1}" if number > 0 else "e0"


def css_variables(dark: bool) -> str:
    """Return the palette as CSS variables: "R,G,B" triples for rgb() and rgba()."""
    colors = [GREY, *RGB]
    if dark:
        colors = [tuple(round(value + (255 - value) * LIFT) for value in color) for color in colors]
    return "".join(f"--r{i}:{','.join(map(str, color))};" for i, color in enumerate(colors))


def css_classes() -> str:
    """Return a CSS class per colour. It only sets --x; other classes (line, fill, ...) use it."""
    return "".join(f".e{i}{{--x:var(--r{i})}}" for i in range(len(RGB) + 1))


def theme_variables(dark: bool) -> str:
    """Return a theme as CSS variables: its colours, and the palette."""
    return (_DARK if dark else _LIGHT) + css_variables(dark)


_LIGHT = "--bg:#fff;--ink:#1c2024;--soft:#5c646d;--edge:#d8dde2;--card:#f6f7f9;--link:#0b57b0;--good:0,102,204;--bad:204,85,0;"
_DARK = "--bg:#181a1e;--ink:#e7e9ec;--soft:#a2a9b2;--edge:#3a3f46;--card:#212429;--link:#8ab8f5;--good:70,140,220;--bad:214,120,50;"
_RULES = """
*{box-sizing:border-box}
html{scroll-padding-top:5rem}
body{margin:0;background:var(--bg);color:var(--ink);overflow-wrap:anywhere;
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1200px;margin:0 auto;padding:0 1rem}
h1{font-size:1.6rem;margin:1.2rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:.2rem 0;overflow-wrap:anywhere}
p{margin:.4rem 0;overflow-wrap:anywhere}
small{color:var(--soft);font-size:.85em;font-weight:400}
section{padding:1.2rem 0;border-top:1px solid var(--edge)}
nav{position:sticky;top:0;z-index:2;display:flex;gap:.2rem 1rem;overflow-x:auto;white-space:nowrap;
 padding:.6rem max(1rem,calc((100% - 1200px)/2 + 1rem));background:var(--bg);border-bottom:1px solid var(--edge)}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.5rem;margin:.5rem 0 1rem}
.facts div{background:var(--card);border-radius:6px;padding:.45rem .65rem;min-width:0}
dt{color:var(--soft);font-size:.82em}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto;max-width:100%;margin:.3rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.caption{color:var(--soft)}
th,td{padding:.28rem .6rem;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap;max-width:20rem;
 overflow:hidden;text-overflow:ellipsis}
th{font-weight:600}th:first-child,.words td,.words th{text-align:left}.words td{white-space:normal;min-width:9rem}
tbody th,thead th:first-child{position:sticky;left:0;background:var(--bg);max-width:14rem;overflow:hidden;text-overflow:ellipsis}
.matrix td{border:1px solid var(--bg)}.matrix td.own{outline:2px solid var(--ink);outline-offset:-2px}
.matrix td b{margin-left:.3em;font-size:.7em}.sum,.best{font-weight:600}
.better{background:rgba(var(--good),var(--g,.4))}.worse{background:rgba(var(--bad),var(--g,.4))}
.keys span{white-space:nowrap;padding:.1rem .4rem;border-radius:3px}
figure{margin:.4rem 0 1rem;min-width:0}figcaption{color:var(--soft)}
.chart{max-width:680px}.pixels{width:100%;height:auto;image-rendering:pixelated;border:1px solid var(--edge)}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--soft)}
svg.bar{height:14px;border-radius:3px;background:var(--card)}svg.histogram{max-width:240px}svg.interval{max-width:520px}
.grid,.axis,.mark{fill:none;stroke:var(--edge)}.axis{stroke:var(--soft)}.mark{stroke:var(--soft);stroke-dasharray:3 4;opacity:.7}
.line{fill:none;stroke:rgb(var(--x));stroke-width:2;stroke-linejoin:round}.fill{fill:rgb(var(--x))}
.span{fill:none;stroke:rgb(var(--x));stroke-width:10;opacity:.4}.threshold{fill:none;stroke:rgb(var(--x));stroke-width:4}
.legend,.starts{display:flex;flex-wrap:wrap;gap:.15rem 1rem;padding:0;margin:.4rem 0;list-style:none}
.legend li{display:flex;align-items:center;gap:.35rem;overflow-wrap:anywhere;min-width:0}
.starts{counter-reset:n}.starts li{counter-increment:n;overflow-wrap:anywhere}.starts li::before{content:counter(n) " ";color:var(--soft)}
.key{width:26px;height:10px;flex:none}
.swatch{display:inline-block;flex:none;width:.8em;height:.8em;border-radius:2px;background:rgb(var(--x));margin-right:.35em}
.row{display:grid;grid-template-columns:minmax(8rem,15rem) minmax(0,1fr);gap:.2rem 1rem;padding:.5rem 0;border-bottom:1px solid var(--edge)}
.label{overflow-wrap:anywhere;min-width:0}
.bars .row{padding:.15rem 0;border:0;align-items:center}.bars .label{font-size:.93em}
.ends{display:flex;justify-content:space-between;color:var(--soft);font-size:.85em}
.histograms{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:0 1.5rem}
.histograms .row{grid-template-columns:1fr;border:0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:0 2rem}
.text,pre{font:13px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
 background:var(--card);border-radius:6px;padding:.6rem .8rem;margin:.3rem 0 1rem}
pre{overflow-x:auto;line-height:1.45}
.text span{background:rgba(var(--x),var(--g));border-radius:2px}
summary{cursor:pointer;padding:.25rem 0;color:var(--link)}
@media (max-width:640px){svg text{font-size:17px}.interval text{font-size:15px}.row{grid-template-columns:1fr}
 tbody th,thead th:first-child{max-width:8rem}.facts{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (min-width:900px){nav{flex-wrap:wrap}}
@media print{nav{display:none}}
"""
STYLE = (
    f":root{{color-scheme:light dark;{theme_variables(False)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{theme_variables(True)}}}}}"
    f"{css_classes()}.en{{--x:160,160,160}}{_RULES}"
)
