"""Draws deploy/grafana/*.png: what each panel shows, from a real server's series, in a headless browser.

usage: build/python/bin/python tests/deploy/dashboard_pictures.py     (needs chromium; takes about three minutes)

Not Grafana itself, which Debian does not have: the panels' own expressions, titles, units, thresholds and places.
"""

import contextlib
import html
import json
import math
import pathlib
import subprocess
import sys
import threading
import time

import stack

WIDTH, CELL, GAP = 1360, 29, 8
COLOURS = ["#2f6fb0", "#d97b29", "#3a8f5c", "#b03a5b", "#7a5bb0", "#8c7a3d", "#4aa3a8", "#c25fb4", "#6b6f76", "#a3c14a", "#e0a3a3"]


def shown(value, unit):
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        power = min(3, int(math.log(value, 1024))) if value >= 1 else 0
        return f"{value / 1024**power:.3g} {['B', 'KiB', 'MiB', 'GiB'][power]}"
    return f"{value:.3g}" + ("/s" if unit == "reqps" else "")


def legend(target, metric):
    text = target.get("legendFormat", "")
    for key, value in metric.items():
        text = text.replace("{{%s}}" % key, value)
    return text


def lines(panel, results, width, height, begin, end):
    """Line or stacked area chart as SVG."""
    defaults = panel["fieldConfig"]["defaults"]
    stacked = "stacking" in defaults["custom"]
    series = [(legend(target, one["metric"]), [(t, float(v)) for t, v in one["values"] if v != "NaN"])
              for target, result in results for one in result]
    series = [one for one in series if one[1]]
    floor = {}
    drawn = []
    for name, points in series:
        if stacked:
            base = [(t, floor.get(t, 0)) for t, _ in points]
            points = [(t, v + floor.get(t, 0)) for t, v in points]
            floor.update(points)
            drawn.append((name, points, base))
        else:
            drawn.append((name, points, None))
    top = max([v for _, points, _ in drawn for _, v in points] + [1e-9]) * 1.08
    left, bottom = 62, height - 44
    x = lambda t: left + (t - begin) / (end - begin) * (width - left - 8)
    y = lambda v: bottom - v / top * (bottom - 8)
    out = []
    for i in range(5):
        v = top / 1.08 * i / 4
        out.append(f'<line x1="{left}" x2="{width - 8}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e4e6ea"/>'
                   f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{shown(v, defaults["unit"])}</text>')
    for i, (name, points, base) in enumerate(drawn):
        colour = COLOURS[i % len(COLOURS)] if name not in ("window", "arena") else "#333"
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in points)
        if base:
            back = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in reversed(base))
            out.append(f'<polygon points="{path} {back}" fill="{colour}" fill-opacity=".75"/>')
        else:
            dash = ' stroke-dasharray="7 5"' if name == "window" else ""
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
    at = left
    for i, (name, _, _) in enumerate(drawn):
        if at + 8 * len(name) > width:
            break
        colour = COLOURS[i % len(COLOURS)] if name not in ("window", "arena") else "#333"
        out.append(f'<rect x="{at}" y="{height - 20}" width="10" height="10" fill="{colour}"/>'
                   f'<text x="{at + 14}" y="{height - 11}">{html.escape(name)}</text>')
        at += 24 + 6.6 * len(name)
    return "".join(out)


def colour_of(value, panel):
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return [s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]


def number_order(text):
    return float(text) if text.replace(".", "").isdigit() else text


def matrix(panel, results, width, height):
    options = panel["transformations"][-1]["options"]
    row, column = options["rowField"], options["columnField"]
    cells = {(one["metric"][row], one["metric"][column]): float(one["value"][1]) for one in results[0][1]}
    rows, columns = (sorted({key[i] for key in cells}, key=number_order) for i in (0, 1))
    defaults = panel["fieldConfig"]["defaults"]
    h, w, left = (height - 34) / len(rows), (width - 52) / len(columns), 46
    out = [f'<text x="{left - 8}" y="14" text-anchor="end">{row[:5]}</text>']
    out += [f'<text x="{left + (j + .5) * w:.1f}" y="14" text-anchor="middle">{column + " " if j == 0 else ""}{c}</text>' for j, c in enumerate(columns)]
    for i, r in enumerate(rows):
        out.append(f'<text x="{left - 8}" y="{20 + (i + .5) * h + 4:.1f}" text-anchor="end">{r}</text>')
        for j, c in enumerate(columns):
            if (r, c) not in cells:
                continue
            value = cells[r, c]
            text = f"{value:.{defaults['decimals']}f}" if defaults["unit"] == "none" else shown(round(value, 2), defaults["unit"])
            out.append(f'<rect x="{left + j * w:.1f}" y="{20 + i * h:.1f}" width="{w - 2:.1f}" height="{h - 2:.1f}" fill="{colour_of(value, panel)}"/>'
                       f'<text x="{left + (j + .5) * w:.1f}" y="{20 + (i + .5) * h + 4:.1f}" text-anchor="middle" fill="#fff">{text}</text>')
    return "".join(out)


def bars(panel, results, width, height):
    cells = {(one["metric"]["bucket"], one["metric"]["kind"]): float(one["value"][1]) for one in results[0][1]}
    buckets, kinds = (sorted({key[i] for key in cells}) for i in (0, 1))
    top, left, bottom = max(cells.values()) * 1.08, 62, height - 44
    w = (width - left - 8) / len(buckets)
    out = []
    for i in range(5):
        y = bottom - i / 4 / 1.08 * (bottom - 8)
        out.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e6ea"/>'
                   f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{shown(top / 1.08 * i / 4, "percentunit")}</text>')
    for b, bucket in enumerate(buckets):
        out.append(f'<text x="{left + (b + .5) * w:.1f}" y="{bottom + 14}" text-anchor="middle">{bucket}</text>')
        for k, kind in enumerate(kinds):
            h = cells.get((bucket, kind), 0) / top * (bottom - 8)
            out.append(f'<rect x="{left + b * w + 2 + k * (w - 4) / len(kinds):.1f}" y="{bottom - h:.1f}" width="{(w - 4) / len(kinds):.1f}" height="{h:.1f}" fill="{COLOURS[k]}"/>')
    for k, kind in enumerate(kinds):
        out.append(f'<rect x="{left + 70 * k}" y="{height - 20}" width="10" height="10" fill="{COLOURS[k]}"/><text x="{left + 70 * k + 14}" y="{height - 11}">{kind}</text>')
    return "".join(out)


def draw(panel, prometheus):
    results = [(t, prometheus.evaluate(t["expr"], t.get("instant", False))) for t in panel["targets"]]
    at = panel["gridPos"]
    width, height = at["w"] * WIDTH / 24 - GAP, at["h"] * CELL - GAP
    inner = height - 30
    if panel["type"] == "stat":
        values = stack.finite(results[0][1][0])
        body = f'<text x="12" y="{inner * .62}" style="font-size:34px;fill:#2f6fb0">{shown(values[-1], panel["fieldConfig"]["defaults"]["unit"])}</text>'
    elif panel["type"] == "table":
        body = matrix(panel, results, width - 16, inner)
    elif panel["type"] == "barchart":
        body = bars(panel, results, width - 8, inner)
    else:
        body = lines(panel, results, width - 8, inner, prometheus.started + 10, time.time())
    style = f'left:{at["x"] * WIDTH / 24}px;top:{40 + at["y"] * CELL}px;width:{width}px;height:{height}px'
    return f'<section style="{style}"><h2>{html.escape(panel["title"])}</h2><svg width="{width - 2}" height="{inner}">{body}</svg></section>'


STYLE = """body{margin:0 8px;font:12px 'DejaVu Sans',sans-serif;background:#f4f5f7;color:#23262b;width:%dpx}h1{font-size:17px;margin:10px 0}
section{position:absolute;background:#fff;border:1px solid #dcdfe4;margin-left:8px;box-sizing:border-box}
h2{font-size:12.5px;margin:7px 10px 4px}svg text{font-size:11px;fill:#23262b}""" % WIDTH


def picture(dashboard, prometheus, path, folder):
    page = pathlib.Path(folder, "page.html")
    body = "".join(draw(panel, prometheus) for panel in dashboard["panels"]).replace('fill="#fff">', 'style="fill:#fff">')
    height = 52 + CELL * max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
    page.write_text(f'<meta charset="utf-8"><style>{STYLE}</style><h1>{dashboard["title"]}</h1>{body}')
    subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/chromium",
                    f"--window-size={WIDTH + 16},{height}", f"--screenshot={path}", page.as_uri()], check=True, capture_output=True, timeout=120)


def ask(server, *arguments):
    with contextlib.suppress(AssertionError):  # refused, because the queue is full: one of the panels shows it
        server.client(*arguments)


def traffic(server, until):
    """Alternately quiet and busy, so that queues, batches and prompts of several lengths are seen."""
    long = pathlib.Path(stack.ROOT / "models/haystack/essay.txt").read_text()
    turn = 0
    while time.time() < until:
        clients = [threading.Thread(target=ask, args=(
            server, "complete", "--prompt", long[1000 * i:1000 * i + 300 * (1 + (turn + i) % 6)], "--max-tokens", str(60 + 20 * i),
            "--temperature", "0.7", "--ignore-eos")) for i in range(1 + 3 * (turn % 4))]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        turn += 1


def main():
    with stack.scratch() as folder, stack.serve(folder, "--attention-sample-every", "4", "--max-running", "6", "--max-queued-requests", "7",
                        "--max-context", "4k", "--cache-bytes", "16M") as server, \
            stack.prometheus(folder, [server.http]) as prometheus:
        needle = threading.Thread(target=server.client, args=(
            "needle", "--lengths", "256,512,1k,2k", "--depths", "5", "--seed", "1", "--no-save"))
        needle.start()
        traffic(server, time.time() + 130)
        needle.join()
        time.sleep(17)  # one more scrape of the slow job
        for path in sorted((stack.ROOT / "deploy/grafana/dashboards").glob("*.json")):
            out = path.parents[1] / f"{path.stem}.png"
            picture(json.loads(path.read_text()), prometheus, out, folder)
            print(f"{out}: {out.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
