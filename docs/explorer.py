"""Makes the live example of explorer.md, assets/explorer.html, and its picture: python docs/explorer.py [FOLDER].

The picture needs playwright and a Chromium; `pip install playwright`, `apt-get install chromium`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from visualizer import attention, explore
from visualizer.models import dinov2_small, minilm, photo, prepare

TEXT = "The cat sat on the mat because it was tired."
PLACE = "#layer=11&head=4&query=0"
SIZE = {"width": 1400, "height": 860}


def main() -> None:
    """Run both models and save the page and the picture."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "assets").absolute()
    model = dinov2_small()
    images, pixels = prepare(photo("coffee"), size=224)
    with attention(model) as seen, torch.inference_mode():
        model(images)
    model, tokenizer = minilm()
    batch = tokenizer(TEXT, return_tensors="pt")
    with attention(model) as read, torch.inference_mode():
        model(**batch)
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    page = explore(read, tokens=words, title="a sentence, MiniLM") + explore(
        seen[-3:], image=pixels, title="a photograph, the last three layers of a ViT-S/14"
    )
    page.save(folder / "explorer.html")
    whole = explore(seen, image=pixels, title="coffee.png").save(folder / "whole.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport=SIZE, color_scheme="light")
        tab.goto(whole.as_uri() + PLACE)
        tab.wait_for_selector("#app:not([hidden])")
        tab.screenshot(path=folder / "explorer.png")
        browser.close()
    whole.unlink()


if __name__ == "__main__":
    main()
