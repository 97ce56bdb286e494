"""The page in a real browser: its numbers beside the arrays, what pointer and keys do, what hostile text does not."""

import csv
import gzip
import io
import json
import math
import os
import re
import shutil
import socket
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import vision_language
from PIL import Image

from visualizer import AttentionMap, VisualizerWarning, analysis, attention, capture, explore, load, word_maps
from visualizer.explorer import coding, page
from visualizer.layout import Layout, Windows
from visualizer.plot.look import Look

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="there is no Chromium on this machine's path"
)
WORDS = ["[CLS]", "the", "cat", "sat", "on", "it", "[SEP]"]


def hot(key, queries=17, keys=17):
    """Every query attends to one key."""
    maps = np.zeros((1, 1, 1, queries, keys), np.float32)
    maps[..., key] = 1
    return maps


def random_maps(*shape, spread=2.0, seed=0):
    logits = np.random.default_rng(seed).normal(size=shape, scale=spread).astype(np.float32)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Blocks(HTMLParser):
    """The script blocks of a page by their id, and all start tags."""

    def __init__(self, text):
        super().__init__()
        self.blocks, self.tags, self._open = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_data(self, text):
        if self._open:
            self.blocks[self._open] = self.blocks.get(self._open, "") + text

    def handle_endtag(self, tag):
        self._open = None


def described(explorer):
    return json.loads(Blocks(explorer.html).blocks["page"])


def decoded(explorer, number=0):
    """The weights that a page carries, read as its description says: those of the codes, with the exact ones put in."""
    blocks = Blocks(explorer.html).blocks
    about = json.loads(blocks["page"])
    example = about["examples"][number]
    layers, heads, queries, keys = example["shape"]
    rows, top = layers * heads * queries, example["top"]
    raw = gzip.decompress(b64decode(blocks[f"weights{number}"]))
    values = np.frombuffer(raw[: rows * top * 4], np.uint8).reshape(4, -1).T.copy().view("<f4").reshape(rows, top)
    places = np.frombuffer(raw[rows * top * 4 : rows * top * 6], np.uint8).reshape(2, -1).T.copy().view("<u2")
    codes = np.frombuffer(raw[rows * top * 6 :], np.uint8).reshape(rows, keys)
    weights = np.where(codes == about["nothing"], 0, values[:, :1] * np.exp(-about["step"] * codes.astype(float)))
    np.put_along_axis(weights, places.reshape(rows, top).astype(int), values, -1)
    return weights.reshape(layers, heads, queries, keys)


class TestInput:
    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(lambda m: m, id="array"),
            pytest.param(lambda m: torch.tensor(m), id="tensor"),
            pytest.param(lambda m: tuple(torch.tensor(m)), id="transformers' tuple"),
            pytest.param(lambda m: [AttentionMap(one) for one in m], id="maps"),
            pytest.param(lambda m: {"a": [m[0]], "b": [m[1]]}, id="a cache"),
            pytest.param(lambda m: m.astype(np.float64), id="float64"),
        ],
    )
    def test_all_kinds_of_input_make_the_same_page(self, wrap):
        maps = random_maps(2, 1, 3, 7, 7)
        assert explore(maps, WORDS).html == explore(wrap(maps), WORDS).html

    @pytest.mark.parametrize("shape", [(7, 7), (3, 7, 7), (1, 3, 7, 7)])
    def test_axes_that_are_not_there_count_one(self, shape):
        maps = random_maps(*shape)
        np.testing.assert_allclose(maps.reshape(1, -1, 7, 7), decoded(explore(maps)), rtol=0.02, atol=1e-3)

    def test_what_attention_and_capture_find_and_files(self, tmp_path):
        class Layer(torch.nn.Module):
            def forward(self, x):
                attn = (x @ x.mT).softmax(-1)
                return torch.nn.functional.scaled_dot_product_attention(x, x, x), attn

        x = torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(0))
        model = Layer()
        with attention(model) as maps, capture(model, "attn") as found:
            model(x)
        maps.save(tmp_path / "maps.safetensors")
        fused = (x @ x.mT / 2).softmax(-1).numpy()
        np.testing.assert_allclose(fused, decoded(explore(maps)), rtol=0.02, atol=1e-3)
        np.testing.assert_allclose(fused, decoded(explore(load(tmp_path / "maps.safetensors"))), rtol=0.02, atol=1e-3)
        np.testing.assert_allclose((x @ x.mT).softmax(-1).numpy(), decoded(explore(found)), rtol=0.02, atol=1e-3)

    @pytest.mark.parametrize(
        ("maps", "options", "words"),
        [
            pytest.param(None, {}, ["no attention maps", "eager", "visualizer.attention"], id="None"),
            pytest.param((None, None), {}, ["output_attentions"], id="tuple of None"),
            pytest.param([], {}, ["no attention maps"], id="empty"),
            pytest.param([hot(0, 4, 4)[0], hot(0, 3, 3)[0]], {}, ["layer 1", "(1, 1, 3, 3)", "add them"], id="shapes"),
            pytest.param(np.eye(7), {"tokens": WORDS[:5]}, ["5 words", "7 queries", "padding"], id="words"),
            pytest.param(np.eye(7), {"tokens": WORDS, "image": np.zeros((2, 2))}, ["tokens=", "image="], id="both"),
            pytest.param(np.eye(7)[:3], {"tokens": WORDS[:3]}, ["3 queries over 7 keys", "query_tokens="], id="cross"),
            pytest.param(np.eye(7), {"image": np.zeros((2, 2))}, ["grid"], id="no grid"),
            pytest.param(random_maps(2, 1, 5, 5), {"tokens": WORDS[:5]}, ["list of 2", "batch=0"], id="batch"),
            pytest.param(np.eye(4) * -1, {}, ["layer 0", "-1", "softmax"], id="logits"),
            pytest.param(np.full((4, 4), np.inf), {}, ["infinite"], id="infinite"),
            pytest.param(np.zeros((1, 1, 0, 4)), {}, ["empty"], id="empty map"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_refused_with_the_reason(self, maps, options, words):
        with pytest.raises(ValueError) as error:
            explore(maps, **options)
        for word in words:
            assert word in str(error.value)

    def test_an_image_that_is_not_in_the_batch_is_an_index_error(self):
        with pytest.raises(IndexError, match=r"batch=2: there are 2 images"):
            explore(random_maps(2, 1, 4, 4), batch=2)

    def test_windows_take_no_picture(self):
        window = AttentionMap(torch.eye(4)[None, None], kind="window")
        with pytest.raises(ValueError, match="windows"):
            explore(window, image=np.zeros((4, 4, 3)))

    def test_patches_that_are_merged_have_an_example_for_each_size(self):
        """Of windows the whole picture is shown."""
        stages = [(8, Layout.picture((4, 4), windows=Windows((2, 2)))), (2, Layout.picture((2, 2)))]
        maps = []
        for windows, layout in stages:
            maps.append(AttentionMap(torch.from_numpy(random_maps(windows, 3, 4, 4))))
            maps[-1].layout = maps[-1].query_layout = layout
        explorer = explore(maps, image=np.ones((8, 8, 3)), batch=1, title="cat")
        first, second = described(explorer)["examples"]
        assert ["cat: 4 x 4 patches", "cat: 2 x 2 patches"] == [first["title"], second["title"]]
        assert [[4, 4], [2, 2]] == [one["sides"][0]["grid"] for one in (first, second)]
        assert [[1, 3, 16, 16], [1, 3, 4, 4]] == [one["shape"] for one in (first, second)]
        assert first["multiplies"]

    def test_rows_that_are_no_attention_are_told(self):
        maps = np.eye(4, dtype=np.float32)
        maps[1] = np.nan
        maps[2] *= 3
        with pytest.warns(VisualizerWarning) as told:
            explorer = explore(maps)
        assert ["1 of 4 rows hold NaN", "1 of 4 rows do not sum to 1"] == [
            re.match(r"(\d of 4 rows (hold NaN|do not sum to 1))", str(one.message))[1] for one in told
        ]
        expected = np.diag([1.0, 0, 3, 1])
        np.testing.assert_array_equal(expected, decoded(explorer)[0, 0])

    def test_examples_of_a_batch_and_of_several_pages(self):
        maps = random_maps(2, 3, 1, 7, 7)
        words = [[f"{word}{text}" for word in WORDS] for text in range(3)]
        both = explore(maps, words, batch=[2, 0], title="text") + explore(maps[:, :1], grid=(2, 3), title="picture")
        assert ["text 2", "text 0", "picture"] == [one["title"] for one in described(both)["examples"]]
        assert "cat2" == described(both)["examples"][0]["sides"][0]["labels"][2]
        assert [2, 3] == described(both)["examples"][2]["sides"][1]["grid"]
        np.testing.assert_allclose(maps[:, 2], decoded(both, 0), rtol=0.02, atol=1e-3)
        np.testing.assert_allclose(maps[:, 0], decoded(both, 1), rtol=0.02, atol=1e-3)
        assert "<Explorer: 3 examples, the first of 2 layers x 1 heads, 7 queries x 7 keys>" == repr(both)


class TestSize:
    def test_too_many_weights_are_cut_to_the_largest_and_the_page_says_so(self, monkeypatch):
        maps = random_maps(2, 1, 4, 120, 120)
        whole = len(explore(maps).html)
        monkeypatch.setattr(page, "MAX_BYTES", whole - 30_000)
        explorer = explore(maps)
        assert whole - 30_000 >= len(explorer.html)
        [note] = described(explorer)["examples"][0]["notes"]
        kept, share = re.search(r"the (\d+) largest of 120 weights are here, ([\d.]+) % of", note).groups()
        kept = int(kept)
        order = np.sort(maps[:, 0], -1)[..., ::-1]
        assert abs(100 * order[..., :kept].sum(-1).mean() - float(share)) < 0.5
        weights, is_large = decoded(explorer), maps[:, 0] >= order[..., kept - 1 : kept]
        np.testing.assert_allclose(maps[:, 0][is_large], weights[is_large], rtol=0.016, atol=5e-4)
        assert (weights > 0).sum(-1).max() < kept + 20, "only those that tie with the last come along"

    def test_what_fits_in_no_way_is_refused(self, monkeypatch):
        monkeypatch.setattr(page, "MAX_BYTES", 60_000)
        with pytest.raises(ValueError, match=r"choose some images with batch="):
            _ = explore(random_maps(8, 1, 4, 60, 60)).html

    def test_larger_maps_of_patches_are_pooled_in_blocks(self, monkeypatch):
        maps = random_maps(1, 1, 2, 1 + 20, 1 + 20).astype(np.float64)
        monkeypatch.setattr(coding, "MAX_CODES", 2 * 11 * 11)
        explorer = explore(maps, grid=(4, 5))
        # 4 x 5 patches in blocks of 2 x 2, those at the right edge of 2 x 1; the class token alone
        block = [0] + [1 + row // 2 * 3 + column // 2 for row in range(4) for column in range(5)]
        expected = np.zeros((2, 7, 7))
        for query in range(21):
            for key in range(21):
                expected[:, block[query], block[key]] += maps[0, 0, :, query, key] / block.count(block[query])
        np.testing.assert_allclose(expected[None], decoded(explorer), rtol=0.016)
        [note] = described(explorer)["examples"][0]["notes"]
        assert "2 x 2 neighbouring patches are shown as one" in note
        assert [2, 3] == described(explorer)["examples"][0]["sides"][0]["grid"]

    def test_longer_texts_are_pooled_by_neighbours(self, monkeypatch):
        monkeypatch.setattr(coding, "MAX_CODES", 2 * 4 * 4)
        explorer = explore(random_maps(2, 7, 7), WORDS)
        assert ["[CLS] … the", "cat … sat", "on … it", "[SEP]"] == described(explorer)["examples"][0]["sides"][0][
            "labels"
        ]


HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "\"><svg onload=window.hacked=3>",
    "<!--<script>",
    "right\u202eto left\u2066",
    "nul\0tab\tline\nfeed\u2028",
    "\ud800",
    "",
    "   ",
    "=HYPERLINK(\"http://example.invalid\")",
    "Zo\u0301e 猫 \u05d7\u05ea\u05d5\u05dc",
    "x" * 10_000,
]  # fmt: skip


class TestHostileText:
    def test_no_tag_of_it_is_in_the_page(self):
        count = len(HOSTILE)
        clean = explore(random_maps(count, count), ["x"] * count, title="x")
        hostile = explore(random_maps(count, count), HOSTILE, title=HOSTILE[0])
        both = [[tag for tag, _ in Blocks(one.html).tags] for one in (clean, hostile)]
        assert both[0] == both[1]
        assert both[0] == [tag for tag, _ in Blocks(one_grid(HOSTILE[1]).html).tags]

    def test_labels_are_visible_and_short(self):
        labels = described(explore(random_maps(12, 12), HOSTILE))["examples"][0]["sides"][0]["labels"]
        assert "right‹202E›to left‹2066›" == labels[4]
        assert "nul␀tab⇥line⏎feed‹2028›" == labels[5]
        assert ["‹D800›", "‹empty›", "␣␣␣"] == labels[6:9]
        assert "x" * 200 + "… (10000 characters)" == labels[11]
        assert HOSTILE[10] == labels[10]


def one_grid(name):
    return explore(random_maps(5, 5), grid=(2, 2), prefix_tokens=[name], title=name)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """An open page, by what a user sees and does."""

    def __init__(self, browser, file, fragment="", **options):
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        self.page = self.context.new_page()
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.file = file.as_uri() + fragment
        self.page.goto(self.file)
        self.page.wait_for_selector("#app:not([hidden])")

    def frames(self):
        """Wait until what was asked for is drawn."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def text(self, selector):
        self.frames()
        return self.page.inner_text(selector)

    def top(self):
        """The list of the largest weights: (name, value as it is written)."""
        self.frames()
        return [tuple(item.inner_text().split("\n")) for item in self.page.query_selector_all("#top li:not([hidden])")]

    def word(self, token):
        return self.page.locator(f".words > span[data-token='{token}']").first

    def choose_example(self, number):
        self.page.select_option("#example", str(number))
        self.wait_for_example(number)

    def wait_for_example(self, number):
        for _ in range(300):
            if self.state()["example"] == int(number):
                break
            self.page.wait_for_timeout(100)
        self.frames()

    def keys(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def weights(self, *call):
        return np.array(self.page.evaluate(f"Array.from(explorer.weights({', '.join(map(str, call))}))"))

    def state(self):
        return self.page.evaluate("({...explorer.state})")

    def patch(self, row, column, grid):
        """The place of a patch on the screen."""
        frame = self.page.locator("canvas.patches").first.bounding_box()
        x = frame["x"] + (column + 0.5) / grid[1] * frame["width"]
        return x, frame["y"] + (row + 0.5) / grid[0] * frame["height"]


@pytest.fixture
def open_page(chromium, tmp_path):
    tabs = []

    def opened(explorer, fragment="", **options):
        file = explorer.save(tmp_path / f"page{len(tabs)}.html")
        tabs.append(Tab(chromium, file, fragment, **options))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.context.close()
    for tab in tabs:
        assert [] == tab.errors
        own = ("blob:", "data:", tab.file.partition("#")[0])
        assert [] == [url for url in tab.requests if not url.startswith(own)]


def written(weight):
    """A weight with four digits, as the page writes exact ones."""
    return f"{weight:#.4g}"


@needs_browser
class TestNumbers:
    @pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
    @pytest.mark.slow
    def test_weights_on_the_page_are_those_of_the_arrays(self, open_page, spread):
        maps = random_maps(2, 1, 3, 80, 80, spread=spread)
        tab = open_page(explore(maps))
        shown = np.array(
            [[[tab.weights(layer, head, query) for query in range(80)] for head in range(3)] for layer in range(2)]
        )
        true = maps[:, 0].astype(float)
        error = np.abs(shown - true) / true
        assert np.median(error) < 0.01
        assert error[true > true.max(-1, keepdims=True) / 2000].max() < 0.0152
        np.testing.assert_array_equal(true.argmax(-1), shown.argmax(-1))
        order = np.argsort(-true, -1)[..., :6]
        np.testing.assert_array_equal(np.take_along_axis(true, order, -1), np.take_along_axis(shown, order, -1))
        column = np.array([tab.weights(1, 2, key, 1) for key in range(80)]).T
        np.testing.assert_allclose(shown[1, 2], column, rtol=1e-6)

    def test_top_keys_have_the_exact_values(self, open_page):
        maps = random_maps(2, 1, 3, 7, 7)
        tab = open_page(explore(maps, WORDS), "#layer=1&head=2&query=5")
        row = maps[1, 0, 2, 5]
        assert [(WORDS[key], written(row[key])) for key in np.argsort(-row)[:6]] == tab.top()

    def test_the_mean_of_the_heads(self, open_page):
        maps = random_maps(2, 1, 3, 7, 7)
        tab = open_page(explore(maps, WORDS), "#layer=1&head=mean&query=5")
        mean = maps[1, 0, :, 5].mean(0)
        order = np.argsort(-mean)[:6]
        assert [WORDS[key] for key in order] == [name for name, _ in tab.top()]
        values = [float(value.removeprefix("≈ ")) for _, value in tab.top()]
        np.testing.assert_allclose(mean[order], values, rtol=0.06)  # two digits are written

    def test_who_attends_here_is_the_column(self, open_page):
        maps = random_maps(2, 1, 3, 7, 7)
        tab = open_page(explore(maps, WORDS), "#layer=0&head=1&query=2")
        tab.keys("w")
        column = maps[0, 0, 1, :, 2]
        assert [WORDS[query] for query in np.argsort(-column)[:6]] == [name for name, _ in tab.top()]
        assert "Who attends to “cat”" in tab.text("#readout")
        assert "Top queries" == tab.text("#top-title")

    @pytest.mark.parametrize("side", ["query", "key"])
    def test_the_rollout_is_that_of_the_analysis(self, open_page, side):
        maps = random_maps(4, 1, 3, 7, 7, spread=1)
        tab = open_page(explore(maps, WORDS), f"#layer=2&head=rollout&{side}=4")
        whole = analysis.rollout(maps[:3])[0]
        flow = whole[4] if side == "query" else whole[:, 4]
        order = np.argsort(-flow)[:6]
        assert WORDS[order[0]] == tab.top()[0][0]
        np.testing.assert_allclose(flow[order], [float(value[2:]) for _, value in tab.top()], rtol=0.06)

    def test_hidden_special_tokens_leave_rows_that_sum_to_one(self, open_page):
        maps = random_maps(1, 1, 2, 7, 7, spread=1)
        tab = open_page(explore(maps, WORDS), "#query=2&head=1")
        tab.keys("s")
        row = maps[0, 0, 1, 2].copy()
        row[[0, 6]] = 0
        row /= row.sum()
        assert [WORDS[key] for key in np.argsort(-row)[:5]] == [name for name, _ in tab.top()]
        np.testing.assert_allclose(np.sort(row)[:1:-1], [float(value[2:]) for _, value in tab.top()], rtol=0.06)
        ground = [
            tab.word(key).evaluate("one => getComputedStyle(one).backgroundColor") for key in (0, 6, row.argmax())
        ]
        assert ground[0] == ground[1] != ground[2]

    def test_entropy_of_the_row(self, open_page):
        maps = random_maps(1, 1, 2, 7, 7)
        tab = open_page(explore(maps, WORDS), "#query=3&head=1")
        row = maps[0, 0, 1, 3].astype(float)
        found = float(re.search(r"entropy ([\d.]+) of at most 1.95 nats", tab.text("#readout"))[1])
        assert abs(-(row * np.log(row)).sum() - found) < 0.011

    def test_a_fully_masked_row_has_no_top_keys(self, open_page):
        maps = np.tril(np.ones((5, 5)), -1)
        maps[1:] /= maps[1:].sum(-1, keepdims=True)
        tab = open_page(explore(maps))
        assert 4 == tab.state()["tokens"][0]
        tab.keys("ArrowLeft", "ArrowLeft", "ArrowLeft")
        assert [("0", "1.000")] == tab.top()
        tab.keys("ArrowLeft")
        assert [] == tab.top()
        assert "What token 0 attends to" in tab.text("#readout")


@needs_browser
class TestPointerAndKeys:
    def test_pointing_previews_and_clicking_keeps(self, open_page):
        tab = open_page(explore(random_maps(2, 1, 3, 7, 7), WORDS))
        tab.word(2).hover()
        assert "What “cat” attends to" in tab.text("#readout")
        tab.page.mouse.move(5, 5)
        assert "What “it” attends to" in tab.text("#readout")
        tab.word(2).click()
        tab.page.mouse.move(5, 5)
        assert "What “cat” attends to" in tab.text("#readout")
        assert [2] == tab.state()["tokens"]

    @pytest.mark.slow
    def test_tokens_add_up_to_their_mean(self, open_page):
        maps = random_maps(1, 1, 3, 7, 7)
        tab = open_page(explore(maps, WORDS), "#head=1&query=1")
        tab.word(5).click(modifiers=["Shift"])
        tab.page.mouse.move(5, 5)
        mean = maps[0, 0, 1, [1, 5]].mean(0)
        assert [WORDS[key] for key in np.argsort(-mean)[:6]] == [name for name, _ in tab.top()]
        assert "What “the” + “it” attend to, in the mean" in tab.text("#readout")
        tab.word(1).click(modifiers=["Shift"])
        assert [5] == tab.state()["tokens"]
        tab.keys("a")
        tab.word(3).click()
        assert [5, 3] == tab.state()["tokens"]
        tab.keys("Escape")
        assert [3] == tab.state()["tokens"]

    def test_keys_do_what_the_help_says(self, open_page):
        tab = open_page(explore(random_maps(3, 1, 4, 7, 7), WORDS))
        start = tab.state()
        assert (2, "mean", [5]) == (start["layer"], start["head"], start["tokens"])
        tab.keys("m")
        for keys, name, expected in [
            (["c", "ArrowRight", "ArrowRight"], "tokens", [2]),
            (["ArrowLeft"], "tokens", [1]),
            (["["], "layer", 1),
            (["[", "["], "layer", 0),
            (["]"], "layer", 1),
            (["."], "head", 1),
            (["m"], "head", "mean"),
            (["m"], "head", 1),
            (["r"], "head", "rollout"),
            ([","], "head", "mean"),
            ([","], "head", 3),
            (["w"], "side", 1),
            (["w"], "side", 0),
            (["s"], "hidden", True),
            (["c"], "tokens", [0]),
        ]:
            tab.keys(*keys)
            assert expected == tab.state()[name], keys
        tab.keys("?")
        assert tab.page.locator("#help-text").is_visible()
        tab.keys("]")
        assert 1 == tab.state()["layer"], "the help is open"
        tab.keys("Escape")
        assert not tab.page.locator("#help-text").is_visible()

    def test_up_and_down_go_to_the_line_above_and_below(self, open_page):
        picture = open_page(explore(random_maps(1, 1, 1, 17, 17), grid=(4, 4)), "#query=6")
        picture.keys("ArrowDown")
        assert [10] == picture.state()["tokens"]
        picture.keys("ArrowUp", "ArrowUp", "ArrowUp")
        assert [2] == picture.state()["tokens"], "the first row is the last"
        words = [f"word{number}" for number in range(60)]
        text = open_page(explore(random_maps(60, 60), words), "#query=30")
        text.keys("ArrowDown")
        [below] = text.state()["tokens"]
        here, there = text.word(30).bounding_box(), text.word(below).bounding_box()
        assert here["y"] + here["height"] <= there["y"] <= here["y"] + 2 * here["height"]
        assert abs(here["x"] - there["x"]) < here["width"]

    def test_a_cell_of_the_mosaic_shows_and_chooses_its_head(self, open_page):
        tab = open_page(explore(random_maps(3, 1, 4, 7, 7), WORDS))
        frame = tab.page.locator("#mosaic").bounding_box()
        # Labels take 24 pixels on the left and 20 above; the last of five columns is the mean.
        cell = (frame["width"] - 24 - 8) / 5, (frame["height"] - 22) / 3
        place = frame["x"] + 24 + 2.5 * cell[0], frame["y"] + 20 + 1.5 * cell[1]
        tab.page.mouse.move(*place)
        assert "layer 1, head 2" in tab.text("#readout")
        tab.page.mouse.move(5, 5)
        assert "layer 2, mean of 4 heads" in tab.text("#readout")
        tab.page.mouse.click(*place)
        assert (1, 2) == (tab.state()["layer"], tab.state()["head"])
        tab.page.mouse.click(frame["x"] + 24 + 4.7 * cell[0], place[1])
        assert "mean" == tab.state()["head"]

    @pytest.mark.slow
    def test_whole_maps_of_all_heads(self, open_page):
        maps = np.stack([np.eye(8), np.eye(8)[::-1]])
        tab = open_page(explore(maps))
        frame = tab.page.locator("#mosaic").bounding_box()
        side = 52  # of a cell, two pixels from the next

        def is_bright(head, row, column):
            x = frame["x"] + 24 + head * (side + 2) + (column + 0.5) * side / 8
            return colour_at(tab, x, frame["y"] + 20 + (row + 0.5) * side / 8)[0] > 200

        tab.keys("h")
        assert [True, False, False, True] == [is_bright(head, 2, key) for head in (0, 1) for key in (2, 5)]
        tab.keys("s", "c", "ArrowRight")
        assert [False, True] == [is_bright(1, 6, key) for key in (6, 1)]
        tab.keys("h")
        assert not tab.state()["whole"]

    def test_the_matrix_tells_each_weight(self, open_page):
        maps = random_maps(1, 1, 1, 7, 7)
        tab = open_page(explore(maps, WORDS))
        frame = tab.page.locator("#matrix").bounding_box()
        side = 0.3 * frame["width"] / 7
        tab.page.mouse.move(frame["x"] + frame["width"] - side, frame["y"] + frame["height"] - side)
        caption = tab.text("#matrix-caption")
        assert caption.startswith("“[SEP]” → “[SEP]”: ")
        assert abs(float(caption.split(": ")[1].removeprefix("≈ ")) / maps[0, 0, 0, 6, 6] - 1) < 0.06

    def test_lists_and_search_choose(self, open_page):
        tab = open_page(explore(random_maps(3, 1, 4, 7, 7), WORDS))
        tab.page.select_option("#layer", "1")
        tab.page.select_option("#head", "mean")
        assert (1, "mean") == (tab.state()["layer"], tab.state()["head"])
        tab.keys("m", "/")
        assert 0 == tab.state()["head"], "keys work while a list has the focus"
        tab.page.evaluate("explorer.state.tokens = [0]")
        tab.page.keyboard.type("t")
        assert [1, 2, 3, 5] == tab.page.evaluate(
            "[...document.querySelectorAll('.found')].map(one => +one.dataset.token)"
        )
        tab.keys("Enter", "Enter")
        assert [2] == tab.state()["tokens"]
        name = tab.top()[0][0]
        tab.page.click("#top li:first-child button")
        assert [WORDS.index(name)] == tab.state()["tokens"]

    def test_the_address_holds_the_place(self, open_page):
        tab = open_page(explore(random_maps(3, 1, 4, 7, 7), WORDS))
        tab.keys("[", ".", "w", "s", "h", "ArrowRight")
        before = tab.state()
        tab.page.reload()
        tab.page.wait_for_selector("#app:not([hidden])")
        assert before == tab.state()
        nonsense = open_page(explore(random_maps(3, 1, 4, 7, 7), WORDS), "#layer=99&head=x&query=-1 3 900&example=7")
        assert (2, "mean", [3]) == tuple(nonsense.state()[name] for name in ("layer", "head", "tokens"))

    def test_several_examples(self, open_page):
        text = explore(random_maps(3, 1, 4, 7, 7), WORDS, title="a text")
        tab = open_page(text + explore(random_maps(2, 1, 2, 17, 17, seed=1), grid=(4, 4), title="<b>picture</b>"))
        assert ["a text", "<b>picture</b>"] == tab.page.locator("#example option").all_inner_texts()
        tab.keys("m", "]", ".", ".", ".", "ArrowRight")
        tab.choose_example(1)
        assert "What CLS attends to · layer 1, head 1" in tab.text("#readout")
        maps = random_maps(2, 1, 2, 17, 17, seed=1)
        np.testing.assert_allclose(maps[1, 0, 1, 0], tab.weights(1, 1, 0), rtol=0.016, atol=1e-4)

    def test_of_two_that_are_chosen_in_a_row_the_last_one_shows(self, open_page):
        """The first takes longer: as if it had many weights to unpack."""
        text, photo = explore(random_maps(3, 1, 4, 7, 7), WORDS), np.zeros((40, 40, 3), np.uint8)
        tab = open_page(text + explore(random_maps(2, 1, 2, 17, 17), image=photo) + text)
        tab.page.evaluate(
            """() => {
                const unpack = Response.prototype.arrayBuffer;
                Response.prototype.arrayBuffer = async function () {
                    Response.prototype.arrayBuffer = unpack;
                    await new Promise(done => setTimeout(done, 200));
                    return unpack.call(this);
                };
                const select = document.getElementById("example");
                for (const number of [1, 2]) {
                    select.value = number;
                    select.dispatchEvent(new Event("change"));
                }
            }"""
        )
        tab.wait_for_example(2)
        tab.page.wait_for_timeout(500)
        assert 2 == tab.state()["example"]
        assert 0 == tab.page.locator("canvas.patches").count()

    def test_the_place_is_kept_between_runs_of_one_text(self, open_page):
        one, two = (explore(random_maps(3, 1, 4, 7, 7, seed=seed), WORDS) for seed in (0, 1))
        tab = open_page(one + two, "#layer=1&head=2&query=3")
        tab.choose_example(1)
        assert "What “sat” attends to · layer 1, head 2" in tab.text("#readout")
        np.testing.assert_allclose(
            random_maps(3, 1, 4, 7, 7, seed=1)[1, 0, 2, 3], tab.weights(1, 2, 3), rtol=0.016, atol=1e-4
        )


def sunk(queries, heads=3):
    """Maps of a decoder whose first token gets nine tenths of all attention."""
    weights = np.tril(random_maps(2, 1, heads, queries, queries, spread=1))
    weights[..., 0] = 0
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-9) * 10
    weights[..., 0] = 1 - weights[..., 1:].sum(-1)
    return weights


@pytest.fixture(scope="module")
def qwen():
    """A model that wrote four words about two pictures, as word maps and as its own eager attentions."""
    torch.manual_seed(0)
    model, prompt, _ = vision_language.qwen2_5_vl()
    model.eval().set_attn_implementation("eager")
    with torch.no_grad(), word_maps(model, tokenizer=vision_language.Tokenizer(), heads="all") as looks:
        model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        attentions = model(**prompt, output_attentions=True).attentions
    return looks, attentions, prompt["input_ids"]


class TestWordsAndPictures:
    """What words look at on pictures: of `word_maps`, and of maps whose tokens are words and patches alike."""

    PICTURES = tuple(np.random.default_rng(0).random((24, wide, 3)) for wide in (36, 24))

    def test_each_word_and_picture_of_word_maps(self, qwen):
        looks, _, ids = qwen
        made = explore(looks, image=self.PICTURES)
        [one] = described(made)["examples"]
        words, sheet = (side for side in one["sides"])
        words = words["labels"]
        assert [0, 1, "all"] == one["numbers"] and "on these pictures" == one["part"]
        assert ["<s>", "<vision>", "</vision>", "␣a"] == words[:4]
        given = int((ids != vision_language.IMAGE).sum())
        assert given + 3 == len(words), "given and generated; the last is never given to the model"
        # 2 x 3 patches and 2 x 2, side by side with a column between them.
        assert ([2, 6], [[0, 0, 2, 3], [0, 4, 2, 2]]) == (sheet["grid"], sheet["parts"])
        weights, first = decoded(made), 0
        for number, (_, _, rows, columns) in enumerate(sheet["parts"]):
            cat = [
                [looks.of("cat", picture=number, layer=layer, head=head, occurrence=0).numpy() for head in range(2)]
                for layer in range(2)
            ]
            own = weights[:2, :, words.index("␣cat"), first : first + rows * columns].reshape(2, 2, rows, columns)
            np.testing.assert_allclose(own, cat, rtol=0.016, atol=1e-4)
            first += rows * columns
        assert first == weights.shape[3]
        np.testing.assert_allclose(weights[2], weights[:2].mean(0), rtol=0.03, atol=1e-4)  # each is within 1.5 %

    def test_maps_of_the_prompt_with_ids_or_words(self, qwen):
        looks, attentions, ids = qwen
        pages = [
            explore(attentions, tokens=tokens, image=self.PICTURES, processor=processor, grid=None)
            for tokens, processor in (
                (ids, vision_language.Tokenizer()),
                (vision_language.Tokenizer().convert_ids_to_tokens(ids[0].tolist()), None),
            )
        ]
        assert pages[0].html == pages[1].html
        labels = described(pages[0])["examples"][0]["sides"][0]["labels"]
        weights, expected = decoded(pages[0])[:2], decoded(explore(looks, image=self.PICTURES))[:2]
        assert ["</vision>", "␣cat"] == labels[-2:]
        np.testing.assert_allclose(weights, expected[:, :, : len(labels)], rtol=0.03, atol=1e-4)

    def test_patches_that_the_maps_know(self):
        torch.manual_seed(0)
        model, prompt, _ = vision_language.llava()
        with torch.no_grad(), attention(model.eval(), tokenizer=vision_language.Tokenizer()) as maps:
            model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        squares = [np.ones((12, 12, 3))] * 3
        [about] = described(explore(maps, image=squares))["examples"]
        assert [[0, 0, 3, 3], [0, 4, 3, 3], [4, 0, 3, 3]] == about["sides"][1]["parts"]
        assert ["<s>", "␣a", "␣cat", "␣dog"] == about["sides"][0]["labels"][:4]
        with pytest.raises(ValueError, match=r"image= has 5 pictures, and 3 lie in the text.* word_maps"):
            explore(maps, image=squares + squares[:2])

    def test_sinks_are_removed_from_rows_on_a_picture(self):
        """In the last layer all words look at one patch of nine."""
        torch.manual_seed(0)
        model, prompt, _ = vision_language.llava()
        with torch.no_grad(), word_maps(model.eval()) as looks:
            model(**prompt)
        for key, several in looks.sums.items():
            if "layers.1" in key.path:
                several[0].weights[..., 1, 2] += 9 * several[0].weights.sum((-1, -2))
        page, clean = (explore(looks, image=self.PICTURES[1:] * 3, sinks=sinks) for sinks in ("keep", "remove"))
        [raw, left] = [decoded(one)[:, 0, 1:] for one in (page, clean)]  # without the first word, which sees none
        assert left[1, -1, 5] == 0 < raw[1, -1, 5]
        np.testing.assert_allclose(raw[0], left[0], rtol=0.02)
        np.testing.assert_allclose(raw.sum(-1), left.sum(-1), rtol=0.02)
        assert [False, True] == [described(one)["examples"][0]["clean"] for one in (page, clean)]

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda looks, maps, ids: explore(looks, tokens=["a"]), ["tokens= is known", "word_maps"]),
            (lambda looks, maps, ids: explore(looks, image=[np.ones((24, 24, 3))] * 3), ["has 3 pictures", "2 lie in"]),
            (lambda looks, maps, ids: explore(looks, batch=1), ["there are 1 images or texts"]),
            (lambda looks, maps, ids: explore(looks, batch="1"), ["batch='1'", "the number of one"]),
            (lambda looks, maps, ids: explore(maps, layout=(2, 2)), ["(2, 2)", "Layout.picture"]),
            (lambda looks, maps, ids: explore(looks, sinks="hide"), ["sinks='hide'"]),
            (lambda looks, maps, ids: explore(maps, sinks="hide"), ["sinks='hide'"]),
            (lambda looks, maps, ids: explore(maps, image=np.ones((4, 4, 3)), processor=looks), ["maps have no ids"]),
            (
                lambda looks, maps, ids: explore(maps, tokens=ids, image=np.ones((4, 4, 3))),
                ["no token stands for its patches", "'5'", "processor=", "key_tokens="],
            ),
            (
                lambda looks, maps, ids: explore(
                    maps, tokens=ids, image=[np.ones((40, 40, 3))] * 2, processor=vision_language.Tokenizer()
                ),
                ["cannot tell the patch grid of 6 tokens", "grid=(rows, columns)", "word_maps(model"],
            ),
        ],
    )
    def test_what_does_not_fit_says_what_to_do(self, qwen, call, words):
        with pytest.raises((ValueError, IndexError, TypeError)) as caught:
            call(*qwen)
        for word in words:
            assert word in str(caught.value)

    @needs_browser
    def test_the_page_opens_on_the_last_word_over_all_layers(self, open_page, qwen):
        looks, _, _ = qwen
        made = explore(looks, image=self.PICTURES, title="two pictures")
        words = described(made)["examples"][0]["sides"][0]
        last = max(set(range(len(words["labels"]))) - set(words["special"]))
        tab = open_page(made)
        assert (2, "mean", 0, [last]) == tuple(tab.state()[name] for name in ("layer", "head", "side", "tokens"))
        assert "mean of 2 layers, mean of 2 heads" in tab.text("#readout")
        assert "% of its attention is on these pictures" in tab.text("#readout")
        assert ["0", "1", "all"] == tab.page.locator("#layer option").all_inner_texts()
        assert ["Words", "Pictures"] == tab.page.locator(".side h2").all_inner_texts()
        # A row of 3 patches, a gap, and one of 2: the arrow keys and the pointer know what lies where.
        frame = tab.page.locator(".patches").bounding_box()
        side = frame["width"] / 6
        tab.page.mouse.click(frame["x"] + 2.5 * side, frame["y"] + side / 2)
        assert "Who attends to picture 0, patch (0, 2)" in tab.text("#readout")
        tab.keys("ArrowRight")
        assert "Who attends to picture 1, patch (0, 0)" in tab.text("#readout")
        assert [6] == tab.state()["tokens"]
        tab.page.mouse.click(frame["x"] + 3.5 * side, frame["y"] + side / 2)
        assert [6] == tab.state()["tokens"]


@needs_browser
class TestOpening:
    def test_a_decoder_opens_on_its_last_token(self, open_page):
        tab = open_page(explore(sunk(7), [*WORDS[1:], "."]))
        assert (1, "mean", [6]) == tuple(tab.state()[name] for name in ("layer", "head", "tokens"))

    def test_never_on_a_row_that_is_one_number(self, open_page):
        maps = random_maps(1, 1, 2, 7, 7)
        maps[..., 3:, :] = np.eye(7)[3:]
        assert [2] == open_page(explore(maps, WORDS)).state()["tokens"]

    def test_a_picture_without_a_class_token_opens_on_its_middle(self, open_page):
        tab = open_page(explore(random_maps(25, 25), grid=(5, 5)))
        assert "What patch (2, 2) attends to" in tab.text("#readout")

    def test_layers_keep_their_own_numbers(self, open_page):
        layers = [AttentionMap(random_maps(1, 2, 7, 7, seed=seed), path=f"blocks.{seed}.attn") for seed in range(12)]
        tab = open_page(explore(layers[-3:], WORDS), "#layer=10")
        assert ["9", "10", "11"] == tab.page.locator("#layer option").all_inner_texts()
        assert "layer 10, mean of 2 heads (blocks.10.attn)" in tab.text("#readout")
        tab.keys("]")
        assert "layer=11&" in tab.page.evaluate("location.hash")

    def test_the_scale_leaves_out_a_sink(self, open_page):
        tab = open_page(explore(sunk(60), [f"w{number}" for number in range(60)]))
        labels = [tab.page.get_attribute(f"{place} .legend", "aria-label") for place in (".side", "#heads", "#map")]
        for label in labels:
            top = float(re.search(r"to ([\d.]+) and more", label)[1])
            assert 0.01 < top < 0.1, label


@needs_browser
class TestLines:
    def drawn(self, tab):
        """How much of the lines' canvas is drawn on."""
        tab.frames()
        return tab.page.evaluate(
            """() => {
                const canvas = document.getElementById("lines-canvas");
                const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                return data.reduce((sum, value, i) => sum + (i % 4 === 3 && value > 0), 0);
            }"""
        )

    @pytest.mark.slow
    def test_heads_are_drawn_and_left_out(self, open_page):
        tab = open_page(explore(random_maps(1, 1, 3, 7, 7), WORDS))
        whole = self.drawn(tab)
        tab.page.click("#line-heads button:nth-child(2)")
        assert [0, 2] == tab.state()["lines"]
        assert self.drawn(tab) < whole
        tab.page.dblclick("#line-heads button:nth-child(1)")
        assert [0] == tab.state()["lines"]
        assert ["true", "false", "false"] == [
            tab.page.get_attribute(f"#line-heads button:nth-child({head})", "aria-pressed") for head in (1, 2, 3)
        ]
        tab.page.reload()
        tab.page.wait_for_selector("#app:not([hidden])")
        assert [0] == tab.state()["lines"]
        tab.page.get_by_role("button", name="All", exact=True).click()
        assert whole == self.drawn(tab)

    def test_its_columns_choose_queries_and_keys(self, open_page):
        tab = open_page(explore(random_maps(1, 1, 3, 7, 7), WORDS))
        frame = tab.page.locator("#lines-canvas").bounding_box()
        tab.page.mouse.move(frame["x"] + 20, frame["y"] + 20 + 2.5 * 20)
        assert "What “cat” attends to" in tab.text("#readout")
        tab.page.mouse.click(frame["x"] + frame["width"] - 20, frame["y"] + 20 + 3.5 * 20)
        assert (1, [3]) == (tab.state()["side"], tab.state()["tokens"])

    @pytest.mark.slow
    def test_pictures_and_long_texts_have_none(self, open_page):
        for explorer in (explore(random_maps(17, 17), grid=(4, 4)), explore(random_maps(60, 60))):
            assert not open_page(explorer).page.locator("#lines").is_visible()


@needs_browser
class TestComparing:
    def test_two_examples_stand_side_by_side_with_their_difference(self, open_page):
        one, two = (random_maps(2, 1, 3, 7, 7, seed=seed) for seed in (0, 1))
        third = explore(random_maps(9, 9), title="of another length")
        tab = open_page(
            explore(one, WORDS, title="plain") + explore(two, [*WORDS[:2], "dog", *WORDS[3:]], title="tuned") + third,
            "#head=1&layer=1&query=4",
        )
        assert ["nothing", "tuned"] == tab.page.locator("#with option").all_inner_texts()
        tab.page.select_option("#with", "1")
        tab.page.wait_for_selector("h2.view")
        assert ["plain", "tuned", "Difference: tuned − plain"] == tab.page.locator("h2.view").all_inner_texts()
        difference = two[1, 0, 1, 4] - one[1, 0, 1, 4]
        order = np.argsort(-abs(difference))[:6]
        assert [WORDS[key].replace("cat", "cat / dog") for key in order] == [name for name, _ in tab.top()]
        for (_, value), key in zip(tab.top(), order, strict=True):
            shown = [float(part.replace("≈", "")) for part in value.split("→")]
            np.testing.assert_allclose([one[1, 0, 1, 4, key], two[1, 0, 1, 4, key]], shown, rtol=0.06, atol=5e-3)
        for place in (".sides", ".column > section:nth-child(3)", ".column > section:nth-child(4)"):
            labels = [
                tab.page.locator(f"{place} .legend").nth(view).get_attribute("aria-label").replace(" and more", "")
                for view in range(3)
            ]
            assert labels[0] == labels[1], "one scale"
            assert "difference of weights: -" in labels[2]
        tab.page.reload()
        tab.page.wait_for_selector("h2.view")
        assert 1 == tab.state()["with"]
        tab.page.select_option("#with", "")
        tab.page.wait_for_selector("h2.view", state="detached")
        assert tab.page.locator("#lines").is_visible()

    def test_pictures_too(self, open_page):
        one, two = (explore(random_maps(2, 1, 3, 17, 17, seed=seed), grid=(4, 4)) for seed in (0, 1))
        tab = open_page(one + two, "#with=1")
        assert 3 == tab.page.locator("canvas.patches").count()
        tab.page.mouse.move(*tab.patch(1, 2, (4, 4)))
        assert "What patch (1, 2) attends to" in tab.text("#readout")


def colour_at(tab, x, y):
    tab.frames()
    picture = tab.page.screenshot(clip={"x": round(x), "y": round(y), "width": 1, "height": 1})
    return Image.open(io.BytesIO(picture)).convert("RGB").getpixel((0, 0))


@needs_browser
class TestPicture:
    @pytest.mark.parametrize("grey", [0, 200])
    def test_patches_have_the_colours_of_the_plots(self, grey, open_page):
        tab = open_page(explore(hot(1 + 2 * 4 + 3), image=np.full((40, 40, 3), grey, np.uint8)))
        blended = Look(cmap="YlOrRd").blend(np.array([1.0, 0.0]), np.full((2, 3), grey / 255))
        for place, expected in zip([(2, 3), (2, 2)], 255 * blended, strict=True):
            np.testing.assert_allclose(colour_at(tab, *tab.patch(*place, (4, 4))), expected, atol=3)
        assert [("patch (2, 3)", "1.000")] == tab.top()
        assert "CLS" in tab.text(".prefix")

    def test_pointing_at_a_patch_asks_for_it(self, open_page):
        maps = random_maps(2, 1, 2, 17, 17)
        tab = open_page(explore(maps, image=np.zeros((40, 40, 3), np.uint8)), "#head=0")
        tab.page.mouse.move(*tab.patch(1, 2, (4, 4)))
        assert "What patch (1, 2) attends to" in tab.text("#readout")
        row = maps[1, 0, 0, 1 + 4 + 2]
        names = ["CLS", *(f"patch ({at // 4}, {at % 4})" for at in range(16))]
        assert [(names[key], written(row[key])) for key in np.argsort(-row)[:6]] == tab.top()
        tab.page.mouse.click(*tab.patch(1, 2, (4, 4)))
        assert [7] == tab.state()["tokens"]
        tab.page.click(".prefix button")
        assert [0] == tab.state()["tokens"]

    def test_wide_grids_and_named_prefixes(self, open_page):
        tab = open_page(explore(random_maps(1, 2, 8, 8), grid=(2, 3), prefix_tokens=["CLS", "REG"]), "#query=7")
        assert "What patch (1, 2) attends to" in tab.text("#readout")
        frame = tab.page.locator("canvas.patches").bounding_box()
        assert abs(frame["width"] / frame["height"] - 1.5) < 0.02
        assert ["CLS", "REG"] == [text.split("\n")[0] for text in tab.page.locator(".prefix button").all_inner_texts()]

    def test_words_that_attend_to_a_picture_and_back(self, open_page):
        maps = random_maps(2, 1, 3, 4, 16, spread=1)
        words = ["a", "red", "fox", "."]
        tab = open_page(explore(maps, query_tokens=words, image=np.zeros((40, 40, 3), np.uint8)), "#head=0")
        tab.word(2).hover()
        row = maps[1, 0, 0, 2]
        best = int(row.argmax())
        assert (f"patch ({best // 4}, {best % 4})", written(row[best])) == tab.top()[0]
        tab.page.mouse.move(*tab.patch(3, 1, (4, 4)))
        assert "Who attends to patch (3, 1)" in tab.text("#readout")
        column = maps[1, 0, 0, :, 13]
        assert [words[query] for query in np.argsort(-column)] == [name for name, _ in tab.top()]

    def test_a_picture_that_attends_to_words(self, open_page):
        maps = random_maps(2, 1, 3, 16, 4)
        words = ["a", "red", "fox", "."]
        tab = open_page(explore(maps, key_tokens=words, image=np.zeros((40, 40, 3), np.uint8)), "#head=0")
        tab.page.mouse.move(*tab.patch(3, 1, (4, 4)))
        row = maps[1, 0, 0, 13]
        assert [words[key] for key in np.argsort(-row)] == [name for name, _ in tab.top()]


@needs_browser
class TestFiles:
    def test_csv_names_each_weight_and_says_how_exact_it_is(self, open_page, tmp_path):
        maps = random_maps(2, 1, 3, 12, 12)
        tab = open_page(
            explore([AttentionMap(maps[n], path=f"blocks.{n + 4}.attn") for n in (0, 1)], HOSTILE), "#query=3"
        )
        with tab.page.expect_download() as download:
            tab.page.click("#csv")
        download.value.save_as(tmp_path / "a.csv")
        with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [("4", "0", "3", "0"), ("5", "2", "3", "11")] == [
            tuple(rows[at][name] for name in ("layer", "head", "query_index", "key_index")) for at in (0, -1)
        ]
        assert {HOSTILE[3]} == {row["query"] for row in rows}
        assert HOSTILE[1] == rows[1]["key"]
        assert rows[9]["key"].startswith("'="), "no spreadsheet takes it for a formula"
        true, shown = maps[:, 0, :, 3].ravel(), np.array([float(row["weight"]) for row in rows])
        is_exact = np.array([row["accuracy"] == "exact" for row in rows])
        assert 6 * 6 == is_exact.sum()
        np.testing.assert_array_equal(true[is_exact], shown[is_exact].astype(np.float32))
        np.testing.assert_allclose(true, shown, rtol=0.016, atol=5e-4)
        assert {"within 1.5 %"} == {row["accuracy"] for row in rows if row["accuracy"] != "exact"}

    @pytest.mark.parametrize("kind", ["words", "patches", "cross"])
    @pytest.mark.slow
    def test_png_has_the_panels(self, open_page, tmp_path, kind):
        options = {"words": {"tokens": WORDS}, "patches": {"grid": (2, 3)}, "cross": {"query_tokens": WORDS}}[kind]
        tab = open_page(explore(random_maps(2, 1, 3, 7, 7), **options))
        with tab.page.expect_download() as download:
            tab.page.click("#png")
        download.value.save_as(tmp_path / "a.png")
        picture = Image.open(tmp_path / "a.png").convert("RGB")
        assert picture.width > 1500
        colours = len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0))
        assert colours > 50


@needs_browser
class TestSafety:
    @pytest.mark.slow
    def test_hostile_tokens_and_names_are_text(self, open_page):
        explorer = explore(random_maps(2, 1, 2, 12, 12), HOSTILE, title=HOSTILE[0])
        tab = open_page(explorer + one_grid(HOSTILE[1]))
        for token in range(12):
            tab.word(token).hover()
        assert tab.page.locator(".words > span").first.inner_text() == HOSTILE[0]
        tab.keys("w", "m", "r", "s", "]")
        tab.page.select_option("#example", "1")
        tab.page.wait_for_selector("canvas.patches")
        tab.frames()
        assert tab.page.evaluate("typeof window.hacked") == "undefined"
        assert HOSTILE[1] in tab.text(".prefix")
        alone = open_page(one_grid(HOSTILE[0]))
        assert (HOSTILE[0], HOSTILE[0]) == (alone.text("h1"), alone.page.title())

    def test_the_policy_lets_nothing_out(self, open_page):
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        tab = open_page(explore(np.eye(3)))
        blocked = tab.page.evaluate(
            """async (address) => {
                const made = document.createElement("script");
                made.textContent = "window.hacked = 1";
                document.body.append(made);
                let reached = 0;
                await fetch(address).then(() => reached++, () => 0);
                const image = new Image();
                image.src = address;
                await image.decode().then(() => reached++, () => 0);
                return [typeof window.hacked, reached];
            }""",
            address,
        )
        assert ["undefined", 0] == blocked
        assert all("Content Security Policy" in error for error in tab.errors)
        assert len(tab.errors) >= 3
        listener.setblocking(False)
        with pytest.raises(BlockingIOError), listener:
            listener.accept()
        tab.errors.clear()
        tab.requests.clear()

    def test_in_a_notebooks_frame(self, chromium, tmp_path):
        explorer = explore(random_maps(2, 1, 3, 7, 7), WORDS)
        file = tmp_path / "notebook.html"
        file.write_text(f"<!DOCTYPE html><body>{explorer._repr_html_()}</body>", encoding="utf-8")
        context = chromium.new_context(viewport={"width": 1200, "height": 900})
        tab = context.new_page()
        errors = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(file.as_uri())
        frame = tab.frame_locator("iframe")
        frame.locator("#app:not([hidden])").wait_for()
        frame.locator(".words > span[data-token='2']").click()
        assert "What “cat” attends to" in frame.locator("#readout").inner_text()
        assert "allow-scripts allow-downloads" == tab.locator("iframe").get_attribute("sandbox")
        assert [] == errors
        context.close()

    @pytest.mark.parametrize("where", ["page", "notebook", "notebook without frames"])
    def test_without_scripts_a_picture_shows(self, chromium, tmp_path, where):
        explorer = explore(random_maps(2, 1, 3, 7, 7), WORDS)
        text = explorer.html if where == "page" else f"<!DOCTYPE html><body>{explorer._repr_html_()}</body>"
        if where == "notebook without frames":
            text = re.sub(r"<iframe.*</iframe>", "", text, flags=re.DOTALL)
        text = text.replace("allow-scripts allow-downloads", "")  # a frame of another process has its own switch
        file = tmp_path / "still.html"
        file.write_text(text, encoding="utf-8")
        context = chromium.new_context(java_script_enabled=False, viewport={"width": 1200, "height": 900})
        tab = context.new_page()
        tab.goto(file.as_uri())
        home = tab.frames[-1] if where == "notebook" else tab
        picture = home.locator("img").first
        picture.wait_for(state="attached")
        for _ in range(60):  # where no script runs, nothing says that it is drawn
            tab.wait_for_timeout(500)
            box = picture.bounding_box()
            if box and box["width"] > 100:
                break
        assert box["width"] > 100
        assert "2 layers" in picture.get_attribute("alt")
        context.close()


@needs_browser
class TestLook:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_light_and_dark_by_preference(self, open_page, scheme):
        tab = open_page(explore(random_maps(1, 1, 2, 7, 7), WORDS), color_scheme=scheme)
        assert (min(colour_at(tab, 3, 3)) > 240) == (scheme == "light")

    @pytest.mark.parametrize("width", [390, 768, 1400])
    def test_nothing_is_wider_than_the_screen(self, open_page, width):
        tab = open_page(explore(random_maps(12, 1, 12, 17, 17), grid=(4, 4)) + explore(random_maps(12, 12), HOSTILE))
        for example in "01":
            tab.page.set_viewport_size({"width": width, "height": 844})
            tab.choose_example(example)
            tab.page.wait_for_timeout(100)
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= width

    @pytest.mark.parametrize(("kind", "layers"), [("words", 12), ("words", 30), ("patches", 12)])
    def test_no_column_ends_far_above_the_others(self, open_page, kind, layers):
        options = {"tokens": WORDS * 2} if kind == "words" else {"grid": (14, 14), "prefix_tokens": 1}
        size = 14 if kind == "words" else 197
        tab = open_page(explore(random_maps(layers, 1, 4, size, size), **options))
        tab.page.set_viewport_size({"width": 1024, "height": 860})
        tab.page.wait_for_timeout(100)
        heights = tab.page.evaluate(
            """[...document.querySelectorAll(".column")].map(
                column => Math.max(...[...column.children].map(one => one.getBoundingClientRect().bottom))
            )"""
        )
        assert 2 == len(heights)
        assert max(heights) - min(heights) < 0.25 * max(heights)

    def test_every_control_has_a_name_and_takes_the_keyboard(self, open_page):
        tab = open_page(explore(random_maps(1, 1, 2, 7, 7), WORDS))
        unnamed = tab.page.evaluate(
            """[...document.querySelectorAll("button, select, input, canvas[role]")]
                .filter(one => one.checkVisibility())
                .filter(one => !(one.textContent.trim() || one.labels?.length || one.ariaLabel))
                .map(one => one.outerHTML)"""
        )
        assert [] == unnamed
        reached = []
        for _ in range(8):
            tab.keys("Tab")
            reached.append(tab.page.evaluate("document.activeElement.id"))
        assert ["layer", "head", "view", "add", "hide", "search", "png", "csv"] == reached
        tab.page.focus("#layer")
        tab.page.evaluate("document.activeElement.blur()")
        tab.keys("ArrowRight")
        said = tab.page.evaluate("document.getElementById('said').textContent")
        assert "What “[SEP]” attends to" in said, "screen readers read it"
        assert "Most: " + "".join(tab.top()[0]) in said


@needs_browser
class TestLiveExample:
    """assets/explorer.html, which docs/explorer.md shows."""

    PAGE = Path(__file__).parent.parent / "assets" / "explorer.html"

    def test_it_is_a_page_of_today(self):
        text = self.PAGE.read_text(encoding="utf-8")
        for name in ("explore.js", "explore.css"):
            assert (Path(page.__file__).parent / name).read_text(encoding="utf-8") in text, "make pictures"

    def test_it_shows_a_sentence_and_a_photograph(self, chromium):
        tab = Tab(chromium, self.PAGE, "#layer=3&head=1&query=8")
        assert ("cat", pytest.approx(0.49, abs=0.01)) == (tab.top()[0][0], float(tab.top()[0][1]))
        tab.choose_example(1)
        assert "What CLS attends to" in tab.page.inner_text("#readout")
        tab.context.close()
        assert [] == tab.errors


class Traced:
    """What the browser's threads did meanwhile, by their processor time: other work on the machine is not in it."""

    def __init__(self, browser):
        self.browser = browser

    def __enter__(self):
        self.browser.start_tracing(categories=["toplevel", "blink.user_timing"])
        return self

    def __exit__(self, *_):
        events = json.loads(self.browser.stop_tracing())["traceEvents"]
        self.marks = [event for event in events if event["cat"] == "blink.user_timing"]
        self.tasks = [event for event in events if event["name"].endswith("RunTask") and "tdur" in event]
        named = [event for event in events if event["name"] == "process_name"]
        self.shared = {event["pid"] for event in named if event["args"]["name"] in ("Browser", "GPU Process")}

    def marked(self, name):
        """The marks of that name on the page's main thread, in their order."""
        return sorted((event for event in self.marks if event["name"] == name), key=lambda event: event["ts"])

    def milliseconds(self, start, end, is_counted):
        """The processor time of the tasks that begin between two marks, the task of the second one included."""
        times = [task["tdur"] for task in self.tasks if start["ts"] <= task["ts"] <= end["ts"] and is_counted(task)]
        return sum(times) / 1000


def milliseconds_to_first_picture(chromium, file):
    """Of all threads of the page's process, and of the browser's own and the one that draws."""
    with Traced(chromium) as traced:
        tab = Tab(chromium, file)
    tab.context.close()
    [drawn] = traced.marked("attention drawn")
    start = next(event for event in traced.marked("navigationStart") if event["pid"] == drawn["pid"])
    return traced.milliseconds(start, drawn, lambda task: task["pid"] in {drawn["pid"], *traced.shared})


def milliseconds_to_hover(chromium, tab, tokens):
    """Of the page's main thread, script and layout, for all but one in twenty of the tokens."""
    with Traced(chromium) as traced:
        tab.page.evaluate(HOVER, tokens)
    pairs = zip(traced.marked("hover"), traced.marked("hovered"), strict=True)
    times = sorted((end["tts"] - start["tts"]) / 1000 for start, end in pairs)
    assert tokens == len(times)
    return times[math.floor(0.95 * tokens)]


def best(measure, enough):
    """The least that was measured: rounds go on while other work on the machine may be what takes the time."""
    least = math.inf
    for _ in range(12):
        least = min(least, measure())
        if least <= enough:
            break
    return least


HOVER = """async (tokens) => {
    const spans = [...document.querySelectorAll(".words > span")];
    const frame = () => new Promise(done => requestAnimationFrame(done));
    for (let i = 0; i < tokens; i++) {
        await frame();
        requestAnimationFrame(() => performance.mark("hover"));  // before the page's own, which the event asks for
        spans[(i * 37) % spans.length].dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
        await frame();
        document.body.getBoundingClientRect();  // layout is part of it
        performance.mark("hovered");
    }
}"""


@needs_browser
@pytest.mark.parametrize(("tokens", "megabytes", "seconds"), [(197, 8, 1), (512, 30, 2)])
@pytest.mark.slow
def test_budgets(chromium, tmp_path, tokens, megabytes, seconds):
    """12 layers of 12 heads. The best of some rounds counts: others also take the processor's caches."""
    maps = random_maps(12, 1, 12, tokens, tokens)
    file = explore(maps, [f"word{number}" for number in range(tokens)]).save(tmp_path / "large.html")
    assert file.stat().st_size <= megabytes * 1e6
    first = best(lambda: milliseconds_to_first_picture(chromium, file), 1000 * seconds)
    assert 0 < first <= 1000 * seconds
    tab = Tab(chromium, file)
    hover = best(lambda: milliseconds_to_hover(chromium, tab, 60), 16)
    tab.context.close()
    print(f"{tokens} tokens: {file.stat().st_size / 1e6:.1f} MB, first picture {first:.0f} ms, hover {hover:.1f} ms")
    assert 0 < hover <= 16
