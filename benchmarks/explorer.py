"""The explorer's page beside those of bertviz, circuitsvis and plotly on the same maps: bytes and seconds.

    python benchmarks/explorer.py

12 layers of 12 heads over random texts. "Written" is the processor's time from the arrays to the file. "Drawn" is the
time from opening the file in headless Chromium, without a network, until all heads are there (ours: the page says so;
plotly: 144 heatmaps; circuitsvis: as many pictures as heads); best of the rounds, at most a minute. bertviz loads its
libraries from the web, so without one it draws nothing. What is not installed is left out, and said.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import Error, TimeoutError, sync_playwright

from visualizer import explore

LAYERS, HEADS, ROUNDS, PATIENCE = 12, 12, 3, 60
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def make_maps(tokens):
    logits = 2 * torch.randn(LAYERS, 1, HEADS, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return logits.softmax(-1), [f"word{number}" for number in range(tokens)]


def ours(maps, words):
    return explore(maps, words).html


def bertviz_model_view(maps, words):
    from bertviz import model_view

    return model_view(list(maps), words, html_action="return").data


def bertviz_head_view(maps, words):
    from bertviz import head_view

    return head_view(list(maps), words, html_action="return").data


def circuitsvis_attention_heads(maps, words):
    from circuitsvis.attention import attention_heads

    return attention_heads(maps.flatten(0, 2), words).local_src


def plotly_heatmaps(maps, words):
    from plotly.graph_objects import Heatmap
    from plotly.subplots import make_subplots

    figure = make_subplots(LAYERS, HEADS, horizontal_spacing=0.002, vertical_spacing=0.002)
    for layer in range(LAYERS):
        for head in range(HEADS):
            weights = np.asarray(maps[layer, 0, head])
            figure.add_trace(Heatmap(z=weights, x=words, y=words, showscale=False), layer + 1, head + 1)
    return figure.to_html(include_plotlyjs=True)


WAYS = {
    "visualizer.explore": (ours, "document.querySelector('#app:not([hidden])') !== null"),
    "plotly heatmaps": (
        plotly_heatmaps,
        f"document.querySelectorAll('.heatmaplayer image').length >= {LAYERS * HEADS}",
    ),
    "circuitsvis attention_heads": (
        circuitsvis_attention_heads,
        f"document.querySelectorAll('canvas, img').length >= {LAYERS * HEADS}",
    ),
    "bertviz model_view": (bertviz_model_view, None),
    "bertviz head_view": (bertviz_head_view, None),
}


def seconds_to_draw(browser, file, is_drawn):
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    tab = context.new_page()
    tab.set_default_timeout(1000 * PATIENCE)
    start = time.perf_counter()
    try:
        tab.goto(file.as_uri(), wait_until="commit")
        while time.perf_counter() - start < PATIENCE:
            if tab.evaluate(is_drawn):
                return time.perf_counter() - start
            time.sleep(0.02)
        return None
    except (TimeoutError, Error):
        return None
    finally:
        context.close()


def measure(browser, name, tokens, folder):
    make, is_drawn = WAYS[name]
    maps, words = make_maps(tokens)
    start = time.process_time()  # which other programs on the machine do not lengthen much
    try:
        text = make(maps, words)
    except ImportError as error:
        return f"{name:<28} {tokens:>6}   {error.name} is not installed"
    file = Path(folder) / "page.html"
    file.write_text(text, encoding="utf-8")
    written = time.process_time() - start
    del maps, text
    told = "needs the web"
    if is_drawn:
        drawn = seconds_to_draw(browser, file, is_drawn)
        if drawn is not None:
            drawn = min([drawn, *(seconds_to_draw(browser, file, is_drawn) or drawn for _ in range(ROUNDS - 1))])
        told = f"not in {PATIENCE} s" if drawn is None else f"{drawn:.2f} s"
    return f"{name:<28} {tokens:>6} {file.stat().st_size / 1e6:>8.1f} MB {written:>8.1f} s {told:>12}"


def main():
    sizes = [int(size) for size in sys.argv[1:]] or [32, 197, 512]
    versions = []
    for name in ("bertviz", "circuitsvis", "plotly"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        print(f"Chromium {browser.version}, {', '.join(versions)}; Python {platform.python_version()}")
        print(f"{os.cpu_count()} cores, on average {os.getloadavg()[2]:.1f} programs at work in the last 15 minutes")
        print(f"{'':<28} {'tokens':>6} {'page':>11} {'written':>10} {'drawn':>12}")
        for tokens in sizes:
            for name in WAYS:
                if tokens <= 197 or name == "visualizer.explore":  # the others' are of hundreds of megabytes
                    print(measure(browser, name, tokens, folder), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
