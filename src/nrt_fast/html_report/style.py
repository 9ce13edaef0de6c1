"""The page's style: light and dark, wide and narrow, on a screen and on paper."""

COLORS = (  # light, dark
    ("#2563eb", "#6ea8fe"), ("#d9610f", "#f5a25d"), ("#0f9d74", "#45d0a3"), ("#8b46d9", "#bd93f9"),
    ("#d12f7a", "#ff86b7"), ("#0891b2", "#56cfe8"), ("#a07708", "#e3c04f"), ("#64748b", "#a3b1c4"),
)  # fmt: skip
DASHES = ("none", "5 3", "1.5 2.5", "8 3 2 3")


def _colors(index: int) -> str:
    return "".join(f"--c{number}:{pair[index]};" for number, pair in enumerate(COLORS))


_LIGHT = (
    "--ink:#1b2330;--soft:#5b6676;--line:#e3e7ee;--ground:#f6f7fa;--card:#fff;--up:13 148 96;--down:214 58 46;"
    "--z:70 100 160;--good:#0d9460;--bad:#d63a2e;--mixed:#c27803;--open:#5b6676;--alarm:#d63a2e14;" + _colors(0)
)
_DARK = (
    "--ink:#e6eaf1;--soft:#9aa6b8;--line:#2a3240;--ground:#10141b;--card:#181e28;--up:40 190 130;--down:240 90 76;"
    "--z:130 165 240;--good:#3ccf91;--bad:#ff7a6e;--mixed:#f0b340;--open:#9aa6b8;--alarm:#ff7a6e22;" + _colors(1)
)
_CLASSES = "".join(
    f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.b{i}{{background:var(--c{i})}}" for i in range(len(COLORS))
) + "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES))

STYLE = (
    f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}
@media print{{:root{{color-scheme:light;{_LIGHT}}}}}
{_CLASSES}"""
    + """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
header,main{max-width:1240px;margin:0 auto;padding:0 20px}
header{display:flex;flex-wrap:wrap;gap:4px 24px;align-items:baseline;padding-top:14px;color:var(--soft);font-size:14px}
header p{margin:0}header b{color:var(--ink)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px}
a{color:inherit;text-decoration-color:var(--line);text-underline-offset:3px}a:hover{color:var(--ink)}
main{padding-bottom:60px}
h1,h2,h3,h4,h5,p,ul,dl,dd,figure,pre{margin:0;padding:0}
h1{font-size:clamp(28px,5vw,42px);line-height:1.12;letter-spacing:-.02em;margin:2px 0 10px}
h2{font-size:22px;letter-spacing:-.01em;margin:44px 0 10px;padding-top:8px}
h3.group{font-size:13px;font-weight:600;color:var(--soft);text-transform:uppercase;letter-spacing:.06em;
margin:24px 0 10px}
.note,.quiet{color:var(--soft);font-size:14px;max-width:80ch}
.verdict{margin-top:14px;padding:22px 26px;background:var(--card);border:1px solid var(--line);border-radius:14px;
border-left:6px solid var(--tone)}
.verdict h1,.verdict h3{color:var(--tone)}.verdict h3{font-size:20px;margin:2px 0 6px}
.verdict>p:not(.what,.quiet){max-width:86ch}
.good{--tone:var(--good)}.bad{--tone:var(--bad)}.mixed{--tone:var(--mixed)}.open{--tone:var(--open)}
.what{color:var(--soft);font-size:14px;overflow-wrap:anywhere}
.quiet{margin-top:10px}
.alarms{list-style:none;display:grid;gap:10px;margin-top:12px}
.alarms li{background:var(--alarm);border:1px solid var(--line);border-left:6px solid var(--bad);border-radius:10px;
padding:12px 18px;font-size:15px}
.alarms b{font-family:ui-monospace,Menlo,Consolas,monospace}.alarms span{color:var(--soft);font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(178px,1fr));gap:12px;margin-top:14px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px}
.tiles dt{font-size:13px;color:var(--soft)}
.tiles b{display:block;font-size:21px;letter-spacing:-.01em;white-space:nowrap}
.tiles small{font-size:14px;font-weight:500;color:var(--soft);letter-spacing:0}
.tiles div{display:flex;flex-direction:column;justify-content:space-between}
.tiles span{font-size:13px;color:var(--soft);white-space:nowrap}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:0 14px;margin-bottom:16px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:14px}
.chart{display:flex;flex-direction:column;background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:14px 14px 8px;break-inside:avoid}
.chart figcaption{flex:1}.chart h3{font-size:16px;line-height:1.3}
.chart p{font-size:13px;line-height:1.4;color:var(--soft);margin:2px 0 6px}
.chart>svg{display:block;width:100%;height:auto;overflow:visible}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin-bottom:6px}
.legend li{display:flex;align-items:center;gap:6px}.legend svg{width:22px;height:8px}
.legend.runs{margin:6px 0 10px;font-size:14px}h1.runs{margin-top:22px}
i[class^=b]{display:inline-block;width:12px;height:12px;border-radius:3px;flex:none;margin-right:6px}
.legend i{margin-right:2px}
svg path{fill:none}.line{stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke-width:.8;opacity:.35;stroke-dasharray:none}
.band{opacity:.16}svg path.band{stroke:none}
"""
    + "".join(f"svg path.band.f{i}{{fill:var(--c{i})}}" for i in range(len(COLORS)))
    + """
.axes path{stroke:var(--line)}.axes .zero{stroke:var(--soft);stroke-width:.8}
.axes text,.at text{font-size:11.5px;fill:var(--soft)}.axes .y,.axes .end,.at text{text-anchor:end}
.axes .x{text-anchor:middle}.axes .end{text-anchor:end;font-size:10.5px}
.alarm{fill:var(--bad);opacity:.1}
.at rect{fill:transparent}.at circle,.at text{visibility:hidden}
.at circle{stroke:var(--card);stroke-width:1.2}
.at tspan{font-weight:600}
.at:hover rect{fill:var(--soft);fill-opacity:.1}.at:hover circle,.at:hover text{visibility:visible}
.scale{display:grid;gap:8px;max-width:86ch;font-size:14px;color:var(--soft);margin-bottom:14px}
.ramp{height:14px;border-radius:7px;border:1px solid var(--line);background:linear-gradient(90deg,rgb(var(--down)/.75),
transparent 50%,rgb(var(--up)/.75)),var(--card)}
.ends{display:flex;justify-content:space-between;gap:10px;font-size:13px}
.item{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 20px;margin:12px 0;
break-inside:avoid}
.item h4{font-size:16px;line-height:1.4;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.versions{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:10px 32px;margin-top:10px}
.versions section{min-width:0}
h5{font-size:14px;display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;
border-bottom:1px solid var(--line);padding-bottom:4px}
.gain{font-weight:600}.gain.up,.own .up{color:var(--good)}.gain.down,.own .down{color:var(--bad)}
.label{font-size:12px;color:var(--soft);margin:8px 0 2px}
.tokens,.own{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.tokens{line-height:1.85}.own{font-size:14px}.own b{font-size:13px;margin-left:6px}
.trace{color:var(--soft)}
.tokens span{position:relative;border-radius:4px;padding:2px 0;background:rgb(var(--tint)/calc(var(--a)*var(--most)));
outline:0;cursor:default}
.tokens .up{--tint:var(--up);--most:.75}.tokens .down{--tint:var(--down);--most:.75}
.tokens .z{--tint:var(--z);--most:.4}
.tokens .hard{border-bottom:2px solid currentColor;border-radius:4px 4px 0 0}
.tokens span:hover,.tokens span:focus{box-shadow:0 0 0 1.5px var(--ink);z-index:1}
.tokens span:hover::after,.tokens span:focus::after{content:attr(data-told);position:absolute;left:0;top:100%;
margin-top:5px;background:var(--ink);color:var(--card);font:12.5px/1.4 system-ui,sans-serif;white-space:normal;
width:max-content;max-width:min(250px,60vw);padding:4px 9px;border-radius:6px;z-index:2;pointer-events:none}
.bar{display:flex;height:26px;border-radius:7px;overflow:hidden;margin-bottom:10px;gap:1px;background:var(--line)}
.bar i[class^=b]{width:auto;height:100%;border-radius:0;margin:0}
.wide{overflow-x:auto;margin:10px 0;background:var(--card);border:1px solid var(--line);border-radius:12px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:7px 14px;border-top:1px solid var(--line);vertical-align:top;unicode-bidi:isolate}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px}tbody th{font-weight:600;white-space:nowrap}
td{overflow-wrap:anywhere;min-width:84px}.figures td{white-space:nowrap}
pre{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px;margin:6px 0 12px;
white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.5 ui-monospace,Menlo,Consolas,monospace;user-select:all}
#configuration p{font-size:15px;margin:8px 0}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft);font-size:15px}summary:hover{color:var(--ink)}
@media(max-width:560px){header,main{padding-left:12px;padding-right:12px}.verdict,.item{padding:14px 16px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tiles div{padding:10px 12px}.tiles b{font-size:17px}
.tiles span{white-space:normal}}
@media print{*{print-color-adjust:exact;-webkit-print-color-adjust:exact}nav{display:none}body{font-size:12px;
background:#fff}h2{break-after:avoid}h3.group{break-after:avoid}.charts{grid-template-columns:repeat(3,1fr)}
details::details-content{content-visibility:visible;display:block}.at{display:none}
.versions{grid-template-columns:1fr 1fr}.wide{overflow:visible}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""
)
