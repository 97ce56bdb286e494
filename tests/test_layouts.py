"""The layouts that `attention` reads off models of timm, transformers, torchvision and others."""

import copy
import functools
import gc
import inspect
import pickle
import threading

import numpy as np
import pipelines
import pytest
import torch
import torchvision
import transformers
import vision_language
from attention import Attention
from torch import nn
from zoo import GPT2, SIZE, SMALL, TEXT, VIT, images, timm_model, transformers_model

from visualizer import AttentionMap, analysis, attention, explore, load, plot
from visualizer.intercept.patches import _thumbnails
from visualizer.layout import Layout, Windows

DINOV3 = SIZE | {"image_size": 32, "patch_size": 16, "num_register_tokens": 4}
LLAMA = TEXT | SIZE | {"num_key_value_heads": 2}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
TOKENS = ["[PAD]", "[CLS]", "[SEP]", *(f"Ġw{number}" for number in range(3, 50))]


class Tokenizer:
    """What `attention` asks of a tokenizer."""

    all_special_ids = (0, 1, 2)

    def convert_ids_to_tokens(self, ids):
        return [TOKENS[one] for one in ids]


def recorded(model, *args, tokenizer=None, **kwargs):
    with attention(model, tokenizer=tokenizer) as maps, torch.no_grad():
        model(*args, **kwargs)
    return maps


PICTURES = {
    "vit": (lambda: timm_model("vit_tiny_patch16_224", **SMALL), (64, 64), "CLS, 4 x 4 patches of 16 pixels"),
    "any size": (
        lambda: timm_model("vit_tiny_patch16_224", dynamic_img_size=True, **SMALL),
        (64, 96),
        "CLS, 4 x 6 patches of 16 pixels",
    ),
    "padded": (
        lambda: timm_model("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **SMALL),
        (60, 90),
        "CLS, 4 x 6 patches of 16 pixels",
    ),
    "registers": (
        lambda: timm_model("vit_small_patch14_reg4_dinov2", **SMALL | {"img_size": 56}),
        (56, 56),
        "CLS, 4 registers, 4 x 4 patches of 14 pixels",
    ),
    "registers alone": (
        lambda: timm_model("vit_medium_patch16_reg4_gap_256", **SMALL),
        (64, 64),
        "4 registers, 4 x 4 patches of 16 pixels",
    ),
    "distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", **SMALL),
        (64, 64),
        "CLS, DIST, 4 x 4 patches of 16 pixels",
    ),
    "beit": (lambda: timm_model("beit_base_patch16_224", **SMALL), (64, 64), "CLS, 4 x 4 patches of 16 pixels"),
    "eva": (lambda: timm_model("eva02_tiny_patch14_224", **SMALL | {"img_size": 56}), (56, 56), "CLS, 4 x 4 patches"),
    "ViT": (lambda: transformers_model("ViT", **VIT), (32, 32), "CLS, 2 x 2 patches of 16 pixels"),
    "DeiT": (lambda: transformers_model("DeiT", **VIT), (32, 32), "CLS, DIST, 2 x 2 patches of 16 pixels"),
    "Dinov2": (lambda: transformers_model("Dinov2", **VIT), (32, 64), "CLS, 2 x 4 patches of 16 pixels"),
    "Dinov2WithRegisters": (
        lambda: transformers_model("Dinov2WithRegisters", **VIT),
        (32, 32),
        "CLS, 4 registers, 2 x 2 patches of 16 pixels",
    ),
    "DINOv3": (
        lambda: transformers_model("DINOv3ViT", **DINOV3),
        (48, 80),
        "CLS, 4 registers, 3 x 5 patches of 16 pixels",
    ),
    "CLIP": (lambda: transformers_model("CLIPVision", **VIT), (32, 32), "CLS, 2 x 2 patches of 16 pixels"),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64).eval(),
        (32, 32),
        "CLS, 4 x 4 patches of 8 pixels",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    make, size, expected = PICTURES[name]
    maps = recorded(make(), torch.randn(2, 3, *size))
    assert len(maps) > 0
    for one in maps:
        assert expected in str(one.layout)
        assert one.layout.count == one.shape[3] and one.layout is one.query_layout
    assert size == maps.layout.patches.image_size


def test_a_model_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.cut, self.first = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 1, 8))
            self.attention = Attention()

        def forward(self, x):
            return self.attention(self.cut(x).flatten(2).mT)

    assert "3 x 5 patches of 4 pixels" == str(recorded(Own(), torch.randn(2, 3, 12, 20)).layout)
    assert recorded(Attention(), torch.randn(2, 16, 8)).layout is None, "16 tokens need not be a square"


def test_the_inputs_of_joint_attention_are_parts():
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv = nn.Linear(8, 24)

        def forward(self, hidden_states, other_states):
            both = torch.cat([hidden_states, other_states], 1)
            out = nn.functional.scaled_dot_product_attention(*self.to_qkv(both)[:, None].chunk(3, -1))[:, 0]
            return out.split([hidden_states.shape[1], other_states.shape[1]], 1)

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.attn = nn.Conv2d(4, 8, 2, 2), Joint()

        def forward(self, latents, text):
            return self.attn(self.proj(latents).flatten(2).mT, text)

    maps = recorded(Transformer(), torch.randn(1, 4, 6, 8), torch.randn(1, 5, 8))
    assert "joint" == maps[0].kind
    assert "3 x 4 patches of 2 pixels, 5 tokens" == str(maps.layout)
    assert recorded(Transformer(), torch.randn(1, 4, 6, 8), torch.randn(1, 12, 8)).layout is None, "either may be it"


@pytest.mark.parametrize(
    ("name", "words", "layouts"),
    [
        ("stable_diffusion_3", 5, {"4 x 6 patches, 5 tokens"}),
        ("stable_diffusion_3", 24, {"4 x 6 patches, 24 tokens"}),
        ("flux", 24, {"24 tokens, 4 x 6 patches"}),
        ("stable_diffusion", 5, {"4 x 6 patches", "2 x 3 patches"}),
    ],
)
def test_makers_of_pictures_have_those_of_their_latents(name, words, layouts):
    """Beside the text, which may have as many tokens."""
    model = pipelines.denoiser_of(name)
    given = {"timestep": torch.tensor([1]), "encoder_hidden_states": torch.randn(1, words, 32)}
    if name == "flux":
        places = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6)).float()
        given |= {"hidden_states": torch.randn(1, 24, 4), "pooled_projections": torch.randn(1, 32)}
        given |= {"img_ids": places, "txt_ids": torch.zeros(words, 3)}
    elif name == "stable_diffusion":
        given |= {"sample": torch.randn(1, 4, 4, 6)}
    else:
        given |= {"hidden_states": torch.randn(1, 4, 4, 6), "pooled_projections": torch.randn(1, 64)}
    maps = recorded(model, **given)
    crossed = [one for one in maps if one.kind == "cross"]
    assert layouts == {str(one.layout) for one in maps if one.kind != "cross"}
    assert all(one.layout is None and one.query_layout.patches is not None for one in crossed)


def test_blocks_of_tokens_are_no_rows_of_patches():
    """Nest's modules are given (batch, blocks, tokens of each, width): that is no grid of patches."""
    model = timm_model("nest_tiny", img_size=64)
    with torch.no_grad(), attention(model) as maps:
        model(images(64))
    assert maps[-1].shape[2] == 16
    assert {one.layout for one in maps} == {None}


def test_a_head_that_pools_the_patches():
    maps = recorded(timm_model("vit_base_patch16_siglip_224", **SMALL), images(64))
    assert ["4 x 4 patches of 16 pixels"] * 3 == [str(one.layout) for one in maps]
    assert maps[-1].query_layout is None
    torch.testing.assert_close(analysis.attention_distance(maps), analysis.attention_distance(maps[:-1]))
    page = explore(maps, image=np.zeros((64, 64, 3)), batch=0)
    assert "2 examples" in repr(page) and "4 x 4 patches of 16 pixels, pooled" in page.html


@pytest.mark.parametrize("library", ["timm", "timm 2", "transformers", "torchvision"])
def test_windows_lie_where_the_model_cut_them(library):
    """A patch that does not reach a query by the model's own gradient has no place in its window."""
    sizes = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)}
    torch.manual_seed(0)
    if library == "transformers":
        model = transformers_model("Swin", **sizes, image_size=48, patch_size=4, window_size=4)
    elif library == "torchvision":
        model = torchvision.models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=3).eval()
    else:
        name = "swin_tiny_patch4_window7_224" if library == "timm" else "swinv2_tiny_window8_256"
        model = timm_model(name, **sizes, img_size=48, window_size=4)
        for path, parameter in model.named_parameters():
            if path.endswith("norm1.weight"):  # which begins at 0 in the second version, and lets nothing through
                nn.init.ones_(parameter)
    high, wide = (48, 48) if library.startswith("timm") else (40, 56)
    maps = recorded(model, torch.randn(1, 3, high, wide))
    assert 4 == len(maps)
    plot.class_token(maps)  # of windows with padding rows do not sum to 1, and rightly so: no warning
    assert maps[0].stitched().may_lack_weight == bool(high % 16 or wide % 16)
    for number, one in enumerate(maps):
        shape = (high // 4, wide // 4) if number < 2 else (-(-high // 8), -(-wide // 8))
        assert shape == one.layout.patches.shape
        assert (2, 2) if number % 2 and min(shape) > 4 else (0, 0) == one.layout.windows.shift
    shifted = maps[1].layout
    places = shifted.windows.places(*shifted.patches.shape)
    assert len(places) == maps[1].shape[0]
    # Which patches the second block of the first stage mixes, by the gradient of one patch of its output.
    block = model.get_submodule(
        ".".join(maps[1].path.split(".")[: {"transformers": 5, "torchvision": 3}.get(library, 4)])
    )
    rows, columns = shifted.patches.shape
    entered = torch.randn(1, rows, columns, 12, requires_grad=True)
    if library == "transformers":
        out = block(entered.flatten(1, 2), (rows, columns))[0].view(rows, columns, 12)
    else:
        out = block(entered)[0]
    for row, column in ((0, 0), (rows - 1, 1), (5, columns - 2)):
        [reached] = torch.autograd.grad(out[row, column] @ torch.randn(12), entered, retain_graph=True)
        reached = {*np.flatnonzero(reached[0].abs().sum(-1) > 1e-12).tolist()}
        [window] = [place for place in places if row * columns + column in place]
        seen = maps[1].dense()[[*map(tuple, places)].index(tuple(window)), :, [*window].index(row * columns + column)]
        weighed = {
            int(place) for place, weight in zip(window, seen.amax(0), strict=True) if weight > 1e-9 and place >= 0
        }
        assert reached == weighed


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_windows_that_are_spread_over_the_grid(library):
    """What changes where a patch changes is just what is in its window."""
    torch.manual_seed(0)
    if library == "timm":
        sizes = {"embed_dim": (8, 16), "depths": (1, 1), "stem_width": 8, "transformer_dim_head": 4, "img_size": 64}
        cut = {"transformer_window_size": (2, 2), "transformer_grid_size": (2, 2)}
        model = timm_model("maxvit_tiny_rw_224", **sizes, **cut)
    else:
        sizes = {"stem_channels": 8, "block_channels": [8, 16], "block_layers": [1, 1], "head_dim": 4}
        model = torchvision.models.MaxVit((64, 64), partition_size=2, stochastic_depth_prob=0.0, **sizes).eval()
    maps = recorded(model, torch.randn(2, 3, 64, 64))
    assert [False, True] * 2 == [one.layout.windows.is_spread for one in maps]
    assert [(16, 16)] * 2 + [(8, 8)] * 2 == [one.layout.patches.shape for one in maps]
    assert {(64, 64)} == {one.layout.patches.image_size for one in maps} and 2 == len(maps.layout.seen)
    kind = "PartitionAttentionCl" if library == "timm" else "PartitionAttentionLayer"
    block, grid = [one for one in model.modules() if type(one).__name__ == kind][:2]
    for module, one in ((block, maps[0]), (grid, maps[1])):
        channels = 8
        entered = torch.randn(1, 16, 16, channels) if library == "timm" else torch.randn(1, channels, 16, 16)
        entered.requires_grad_()
        out = module(entered)
        place = (0, 5, 3) if library == "timm" else (0, slice(None), 5, 3)
        [reached] = torch.autograd.grad(out[place] @ torch.randn(channels), entered)
        reached = reached[0].abs().sum(-1 if library == "timm" else 0).flatten()
        [window] = [window for window in one.layout.windows.places(16, 16) if 5 * 16 + 3 in window]
        assert {*window.tolist()} == {*np.flatnonzero(reached > 1e-12).tolist()}


@pytest.mark.parametrize("name", ["timm", "SigLIP 2"])
def test_patches_in_a_sequence_have_a_grid_for_each_picture(name):
    """And the padding of the smaller ones."""
    sizes, patches = [(3, 4), (2, 3)], torch.randn(2, 12, 768)
    coordinates, is_patch = torch.zeros(2, 12, 2, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for at, (rows, columns) in enumerate(sizes):
        is_patch[at, : rows * columns] = 1
        coordinates[at, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    if name == "timm":
        model = timm_model("naflexvit_base_patch16_gap", depth=2, embed_dim=32, num_heads=4)
        given = {"patches": patches, "patch_coord": coordinates, "patch_valid": is_patch.bool()}
        maps, prefix = recorded(model, given), "4 registers, "
        assert "4 registers, 3 x 4 patches of 16 pixels" == str(recorded(model, torch.randn(1, 3, 48, 64)).layout)
        shuffled = given | {"patch_coord": coordinates.flip(1)}
        assert recorded(model, shuffled).layout is None
    else:
        model = transformers_model("Siglip2Vision", **SIZE, num_patches=16, patch_size=16)
        given = {"pixel_values": patches, "pixel_attention_mask": is_patch, "spatial_shapes": torch.tensor(sizes)}
        maps, prefix = recorded(model, **given), ""
        assert (1, None) == (maps[-1].shape[2], maps[-1].query_layout), "the head that pools"
    for one in maps:
        expected = "{0}3 x 4 patches of 16 pixels; {0}2 x 3 patches of 16 pixels, 6 padding"
        assert expected.format(prefix) == str(one.layout)
    assert (32, 48) == maps.layout.of(1).patches.image_size


@pytest.mark.parametrize(
    ("name", "frames", "expected"),
    [
        ("VideoMAE", 4, {"2 x 2 x 2 patches of 16 pixels"}),
        ("Vivit", 4, {"CLS, 2 x 2 x 2 patches of 16 pixels"}),
        ("Timesformer", 3, {"3 tokens", "CLS, 2 x 2 patches of 16 pixels"}),
    ],
)
def test_videos(name, frames, expected):
    options = {"tubelet_size": [2, 16, 16]} if name == "Vivit" else {}
    model = transformers_model(name, **VIT, num_frames=frames, **options)
    maps = recorded(model, torch.randn(2, frames, 3, 32, 32))
    assert expected == {str(one.layout) for one in maps}


class TestTexts:
    ids = torch.tensor([[1, 7, 8, 2, 0], [1, 9, 2, 0, 0]])

    def test_words_special_tokens_and_padding(self):
        mask = (self.ids != 0).long()
        maps = recorded(transformers_model("Bert", **TEXT | SIZE), self.ids, mask, tokenizer=Tokenizer())
        first, second = maps[0].layout.samples
        assert ("[CLS]", "␣w7", "␣w8", "[SEP]", "[PAD]") == first.names
        assert [False, False, False, True, True] == second.are("padding").tolist()
        assert [True, False, True, False, False] == second.are("special").tolist()
        assert all(one.layout == one.query_layout == maps[0].layout for one in maps)

    def test_words_are_read_once_somebody_asks(self):
        """By then the model may have changed its ids; copies and pickles have the words too."""

        class Late(Tokenizer):
            is_ready = False

            def convert_ids_to_tokens(self, ids):
                assert Late.is_ready
                return super().convert_ids_to_tokens(ids)

        ids = self.ids[:1].clone()
        maps = recorded(transformers_model("Bert", **TEXT | SIZE), ids, tokenizer=Late())
        words = [TOKENS[one].replace("Ġ", "␣") for one in ids[0].tolist()]
        ids.zero_()
        Late.is_ready = True
        copied = pickle.loads(pickle.dumps(maps[1]))
        assert [*maps[0].layout.names] == [*copied.layout.names] == words
        assert maps[0].layout is maps[1].query_layout

    def test_padding_without_a_tokenizer(self):
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        maps = recorded(transformers_model("Llama", **LLAMA), input_ids=self.ids, attention_mask=mask)
        assert "2 padding, 3 tokens; 5 tokens" == str(maps.layout)

    def test_a_causal_model_that_is_given_ids_alone(self):
        maps = recorded(transformers_model("GPT2", **GPT2), self.ids[:1, :4], tokenizer=Tokenizer())
        assert ("[CLS]", "␣w7", "␣w8", "[SEP]") == maps.layout.names

    @pytest.mark.parametrize("kernel", ["eager", "sdpa"])
    def test_the_steps_of_a_generation_know_the_words_before(self, kernel):
        torch.manual_seed(0)
        model = transformers_model("Llama", "ForCausalLM", attention=kernel, **LLAMA)
        with attention(model, tokenizer=Tokenizer()) as maps, torch.no_grad():
            out = model.generate(self.ids[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        calls = maps.calls(maps.paths[-1])
        assert 4 == len(calls)
        for call in calls:
            words = tuple(TOKENS[one].replace("Ġ", "␣") for one in out[0, : call.shape[3]].tolist())
            assert words == call.layout.names
            assert words[-call.shape[2] :] == call.query_layout.names

    def test_the_texts_of_a_padded_batch_go_on_too(self):
        torch.manual_seed(0)
        model = transformers_model("Llama", "ForCausalLM", attention="sdpa", **LLAMA)
        ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        with attention(model, tokenizer=Tokenizer()) as maps, torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        for call in maps.calls(maps.paths[-1]):
            for text in range(2):
                words = [TOKENS[one].replace("Ġ", "␣") for one in out[text, : call.shape[3]].tolist()]
                words[:2] = ["[PAD]", "[PAD]"] if text == 0 else words[:2]
                assert words == [*call.layout.of(text).names]

    @pytest.mark.parametrize("kernel", ["eager", "sdpa"])
    def test_room_in_a_static_cache_is_padding(self, kernel):
        """And padding before a text is known by its positions, for the model has no mask of tokens then."""
        torch.manual_seed(0)
        model = transformers_model("Llama", "ForCausalLM", attention=kernel, **LLAMA)
        ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
        with attention(model, tokenizer=Tokenizer()) as maps, torch.no_grad():
            out = model.generate(ids, attention_mask=mask, **options)
        for number, call in enumerate(maps.calls(maps.paths[-1])):
            filled = 4 + number
            assert call.shape[3] == call.layout.count == 7
            for text, padding in enumerate((2, 0)):
                real = [padding <= token < filled for token in range(7)]
                assert [not one for one in real] == call.layout.of(text).are("padding").tolist()
                assert [weight > 0 for weight in call.rows([-1])[text, 0, 0].tolist()] == real
                words = [TOKENS[one].replace("Ġ", "␣") for one in out[text, padding:filled].tolist()]
                is_known = kernel == "sdpa" or number == 0  # weights do not tell whether texts changed places
                assert not is_known or words == [*call.layout.of(text).names[padding:filled]]

    def test_beams_change_places_and_their_words_stay_unknown_or_right(self):
        torch.manual_seed(0)
        model = transformers_model("Llama", "ForCausalLM", attention="sdpa", **LLAMA)
        with attention(model, tokenizer=Tokenizer()) as maps, torch.no_grad():
            model.generate(self.ids[:1, :4], max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False)
        prompt = tuple(TOKENS[one].replace("Ġ", "␣") for one in self.ids[0, :4].tolist())
        for call in maps.calls(maps.paths[0])[1:]:
            for sample in range(3) if call.layout is not None else ():
                names = call.layout.of(sample).names
                assert names[:4] == prompt or not call.layout.of(sample).has_words

    def test_encoder_and_decoder_have_words_of_their_own(self):
        model = transformers_model("T5", **T5)
        maps = recorded(
            model, input_ids=self.ids[:1, :4], decoder_input_ids=torch.tensor([[0, 5, 6, 7]]), tokenizer=Tokenizer()
        )
        source, target = ("[CLS]", "␣w7", "␣w8", "[SEP]"), ("[PAD]", "␣w5", "␣w6", "␣w7")
        for one in maps:
            sides = {"encoder": (source, source), "decoder": (target, target)}[one.path.split(".")[0]]
            sides = (target, source) if one.kind == "cross" else sides
            assert sides == (one.query_layout.names, one.layout.names), one

    def test_an_encoder_that_ran_before_the_decoder(self):
        model = transformers_model("T5", "ForConditionalGeneration", **T5)
        with attention(model, tokenizer=Tokenizer()) as maps, torch.no_grad():
            model.generate(self.ids[:1, :4], max_new_tokens=3, min_new_tokens=3, decoder_start_token_id=0)
        crossed = [one for one in maps if one.kind == "cross"]
        assert crossed and {("[CLS]", "␣w7", "␣w8", "[SEP]")} == {one.layout.names for one in crossed}

    def test_pictures_and_texts_in_one_model(self):
        sides = {"text_config": TEXT | SIZE | {"max_position_embeddings": 8}, "vision_config": VIT}
        model = transformers_model("CLIP", **sides)
        maps = recorded(model, input_ids=self.ids[:1], pixel_values=images(32)[:1], tokenizer=Tokenizer())
        by_side = {one.path.split(".")[0]: one.layout for one in maps}
        assert "␣w7" == by_side["text_model"].name(1)
        assert "CLS, 2 x 2 patches of 16 pixels" == str(by_side["vision_model"])

    @pytest.mark.parametrize("family", [vision_language.qwen2_vl, vision_language.qwen2_5_vl, vision_language.qwen3_vl])
    def test_patches_that_come_in_squares_lie_on_their_grid(self, family):
        """In the vision towers of Qwen, in Qwen2.5-VL's sorted by windows: by the model's own positions of them."""
        tower = family()[0].eval().model.visual
        shown = []
        tower.rotary_pos_emb.register_forward_pre_hook(lambda module, given: shown.append(given[-1]))
        grids = torch.tensor([[1, 4, 12], [1, 8, 4]])
        maps = recorded(tower, torch.randn(48 + 32, 3 * 2 * 16), grid_thw=grids)
        assert ["4 x 12 patches of 4 pixels in another order", "8 x 4 patches of 4 pixels in another order"] == [
            str(one.layout) for one in maps[-2:]
        ]
        position = shown[-1]
        if family is vision_language.qwen2_5_vl:  # which sorts what these positions give
            modeling = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
            index, _ = modeling.get_vision_window_index(grids, 2, tower.window_size, 4)
            position = position.view(-1, 4, 2)[index].flatten(0, 1)
            assert {one.layout for one in maps[:-2]} == {None}, "which window a map is of is not known"
        for one, own in zip(maps[-2:], position.split([48, 32]), strict=True):
            rows, columns = one.layout.patches.shape
            assert (own[:, 0] * columns + own[:, 1]).tolist() == [*one.layout.windows.places(rows, columns)[0]]
        wide, dense, token = maps[-2], maps[-2].dense()[0, 1], 13
        row, column = position[token].tolist()
        by_hand = torch.empty(4, 12)
        by_hand[position[:48, 0], position[:48, 1]] = dense[token]
        torch.testing.assert_close(wide.stitched().dense()[0, 1, row * 12 + column].view(4, 12), by_hand)
        axes = plot.query([wide], query=(row, column), layer=0, head=1)
        assert np.allclose(by_hand, np.asarray(axes.images[-1].get_array()).reshape(by_hand.shape), atol=1e-6)
        apart = torch.cdist(position[:48].float(), position[:48].float())
        distances = (wide.dense() * apart).sum(-1).mean(-1)
        torch.testing.assert_close(analysis.attention_distance([wide])[0], distances, rtol=1e-4, atol=1e-5)

    def test_tokens_that_are_no_words_have_none(self):
        """Within a model that is given words: channels of a picture, and the queries of a former."""
        for family, part in ((vision_language.florence2, "channel_attn"), (vision_language.blip2, "qformer")):
            model, prompt, _ = family()
            maps = recorded(model.eval(), **prompt)
            layouts = {str(one.query_layout) for one in maps if part in one.path}
            assert {"None"} == layouts, layouts

    def test_the_tokens_of_a_text_that_stand_for_a_picture(self):
        model = transformers_model(
            "Llava",
            "ForConditionalGeneration",
            text_config={"model_type": "llama", **LLAMA},
            vision_config={"model_type": "clip_vision_model", **VIT},
            image_token_index=40,
        )
        ids = torch.tensor([[1, 5, 40, 40, 40, 40, 6]])
        maps = recorded(model, input_ids=ids, pixel_values=images(32)[:1], tokenizer=Tokenizer())
        assert "[CLS], 1 token, 2 x 2 patches of 16 pixels, 1 token" == str(maps.layout)
        assert (4, "patch (1, 0)") == (maps.layout.token((1, 0)), maps.layout.name(4))

    @pytest.mark.parametrize(
        ("family", "layout"),
        [
            (vision_language.llava, "1 token, 3 x 3 patches of 4 pixels, 3 x 3 patches of 4 pixels, 2 tokens, "),
            (vision_language.qwen2_vl, "2 tokens, 2 x 3 patches, 3 tokens, 2 x 2 patches, 2 tokens, 2 x 2 x 2 "),
            (vision_language.llava_next, "1 token, 3 x 3 patches of 4 pixels, 30 <image>, 2 tokens"),  # tiles behind
        ],
    )
    def test_pictures_lie_where_the_family_puts_them(self, family, layout):
        """In a call, another of the same text, a generation, and one with beams: `generate` may look at the pictures
        itself."""
        model, prompt, _ = family()
        with attention(model.eval()) as maps, torch.no_grad():
            for given in (prompt, {name: tensor.clone() for name, tensor in prompt.items()}):
                model(**given)
                assert str(maps.layout).startswith(layout)
        for beams in (1, 2):
            with attention(model) as maps, torch.no_grad():
                model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=beams)
            written = [one for one in maps if "language_model" in one.path]
            assert all(
                str(one.layout.of(0)).startswith(layout.rpartition(", ")[0])
                for one in written
                if one.layout is not None
            )
            assert beams > 1 or all(one.layout is not None for one in written)


def told_by_hand(model):
    """The ids whose keys each call of a decoder has, as its cache says, and the mask that it was given."""
    known, told = [], []

    def note(module, args, kwargs):
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values") or kwargs.get("cache")
        before = 0 if cache is None else int(cache.get_seq_length())
        rows = [row[:before] for row in known] if before else [[] for _ in ids]
        known[:] = [row + new for row, new in zip(rows, ids.tolist(), strict=True)]
        mask = kwargs.get("attention_mask")
        is_of_tokens = mask is not None and mask.ndim == 2
        told.append(([*known], mask.tolist() if is_of_tokens else None))

    return model.model.register_forward_pre_hook(note, with_kwargs=True), told


class TestSteps:
    """Words and padding of each step are those of that step, whenever they are read."""

    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    padded = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])

    @property
    def options(self):
        return {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    @staticmethod
    def model():
        torch.manual_seed(0)
        return transformers_model("Llama", "ForCausalLM", attention="sdpa", **LLAMA)

    @staticmethod
    def with_a_cache(model):
        """The model, to be called with one cache, whose name depends on transformers' version."""
        names = inspect.signature(model.forward).parameters
        return functools.partial(
            model, **{"cache" if "cache" in names else "past_key_values": transformers.DynamicCache()}
        )

    def one_text(self, model):
        model.generate(self.ids[:1], **self.options)

    def left_padding(self, model):
        model.generate(self.padded, attention_mask=(self.padded != 0).long(), **self.options)

    def two_texts(self, model):
        model.generate(self.ids[:1], **self.options)
        model.generate(self.ids[1:], **self.options)
        model.generate(self.ids[:1], **self.options)

    def in_chunks(self, model):
        step = self.with_a_cache(model)
        for chunk in (self.ids[:, :1], self.ids[:, 1:3], self.ids[:, 3:]):
            step(input_ids=chunk)

    def in_place(self, model):
        step, given = self.with_a_cache(model), torch.zeros(2, 1, dtype=torch.long)
        for column in (0, 1, 1, 2, 2, 2):
            given.copy_(self.ids[:, column : column + 1])
            step(input_ids=given)

    def in_place_with_a_mask(self, model):
        step, given = self.with_a_cache(model), torch.zeros(2, 1, dtype=torch.long)
        mask = torch.ones(2, 6, dtype=torch.long)
        for column in range(4):
            given.copy_(self.ids[:, column : column + 1])
            mask[0, :column] = 0
            step(input_ids=given, attention_mask=mask[:, : column + 1])

    def assisted(self, model):
        model.generate(self.ids[:1], assistant_model=self.model(), **self.options)

    def beams(self, model):
        model.generate(self.ids[:1], num_beams=3, **self.options)

    def without_a_cache(self, model):
        model.generate(self.padded, attention_mask=(self.padded != 0).long(), use_cache=False, **self.options)

    @pytest.mark.parametrize("is_inference", [False, True])
    @pytest.mark.parametrize(
        "run",
        [
            *(one_text, left_padding, two_texts, in_chunks, in_place, in_place_with_a_mask, assisted, beams),
            without_a_cache,
        ],
        ids=lambda run: run.__name__,
    )
    def test_words_and_padding_are_those_of_the_step(self, run, is_inference):
        model = self.model()
        hook, told = told_by_hand(model)
        with attention(model, tokenizer=Tokenizer()) as maps, torch.inference_mode(is_inference), torch.no_grad():
            run(self, model)
        hook.remove()
        made = maps.calls(maps.paths[-1])
        assert len(told) == len(made) > 1
        may_be_unknown = run.__name__ in ("beams", "assisted")
        for (rows, mask), one in zip(told, made, strict=True):
            for text, row in enumerate(rows):
                layout = None if one.layout is None else one.layout.of(text)
                if layout is None or not layout.has_words:
                    assert may_be_unknown
                    continue
                real = [True] * len(row) if mask is None else [bool(token) for token in mask[text]]
                words = [
                    TOKENS[token].replace("Ġ", "␣") if is_token else "[PAD]"
                    for token, is_token in zip(row, real, strict=True)
                ]
                assert one.shape[3] == len(words)
                assert run.__name__ == "beams" or words == [*layout.names]
                assert words[-one.shape[2] :] == [*one.query_layout.of(text).names]

    def test_what_was_read_early_is_what_is_read_late(self):
        early = []

        def read(ids, scores):
            early.append(maps[-1].layout)
            return scores

        model, mask = self.model(), (self.padded != 0).long()
        with attention(model, tokenizer=Tokenizer()) as maps, torch.no_grad():
            model.generate(self.padded, attention_mask=mask, logits_processor=[read], **self.options)
        with attention(model, tokenizer=Tokenizer()) as late, torch.no_grad():
            model.generate(self.padded, attention_mask=mask, **self.options)
        assert 6 == len(early)
        assert early == [one.layout for one in late.calls(late.paths[-1])]

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_steps_share_their_ids(self, cache):
        """To hold all ids for each step would take megabytes here."""
        count = 600
        model = transformers_model("Llama", "ForCausalLM", attention="sdpa", **LLAMA | {"max_position_embeddings": 700})
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "cache_implementation": cache}
        with attention(model, tokenizer=Tokenizer(), layers=0) as maps, torch.no_grad():
            model.generate(self.padded, attention_mask=(self.padded != 0).long(), **options)
        assert count == len(maps)
        found, waiting = {}, [one._layouts for one in maps]
        while waiting:
            for held in gc.get_referents(waiting.pop()):
                if isinstance(held, (list, bytearray)) and id(held) not in found:
                    found[id(held)] = len(held)
                if type(held).__module__.startswith("visualizer.intercept") or isinstance(held, (list, tuple)):
                    if not isinstance(held, threading.local):
                        waiting.append(held)
        assert 0 < sum(found.values()) < 20 * count


class TestPicturesThatWereSeen:
    @pytest.mark.parametrize("size", [(224, 224), (223, 97), (24, 24), (7, 300), (1, 5)])
    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_thumbnails_are_means(self, size, channels):
        pixels = torch.rand(2, channels, *size)
        if size == (1, 5):
            pixels[:, :, 0, 0] += 1
        grey = nn.functional.adaptive_avg_pool2d(pixels.double(), 24).mean(1).flatten(1)
        low, high = grey.amin(1, keepdim=True), grey.amax(1, keepdim=True)
        shades = (grey - low) / (high - low) * 255
        made = torch.tensor(_thumbnails(pixels), dtype=torch.double)
        assert (made - shades).abs().max() < 0.501
        for other in (pixels.mT.contiguous().mT, pixels.clone().requires_grad_()):
            assert _thumbnails(pixels) == _thumbnails(other)

    def test_a_picture_without_shades_has_none(self):
        pixels = torch.rand(2, 3, 48, 48)
        for value in (torch.nan, torch.inf):
            pixels[0, 0, 5, 5] = value
            assert value is torch.inf or () == _thumbnails(pixels)
        assert () == _thumbnails(torch.ones(2, 3, 48, 48)) == _thumbnails(torch.rand(1, 3, 4, 48, 48))

    @pytest.mark.parametrize("is_inference", [False, True])
    def test_another_picture_may_be_written_in_place(self, is_inference):
        model, first, second = timm_model("vit_tiny_patch16_224", **SMALL), *torch.rand(2, 1, 3, 64, 64)
        with attention(model) as maps, torch.inference_mode(is_inference), torch.no_grad():
            pixels = first.clone()
            model(pixels)
            pixels.copy_(second)
            model(pixels)
        for one, picture in zip(maps.calls(maps.paths[0]), (first, second), strict=True):
            assert _thumbnails(picture) == one.layout.seen


@pytest.fixture(scope="module")
def maps():
    model = timm_model("vit_small_patch14_reg4_dinov2", **SMALL | {"img_size": 56})
    return recorded(model, torch.randn(2, 3, 56, 56))


class TestWhatCarriesIt:
    def test_what_is_copied_pickled_and_saved(self, maps, tmp_path):
        maps.save(tmp_path / "maps.safetensors")
        copies = (load(tmp_path / "maps.safetensors"), pickle.loads(pickle.dumps(maps)), copy.deepcopy(maps))
        for other in copies:
            assert maps.layout == other.layout == other[0].query_layout
        for one in (pickle.loads(pickle.dumps(maps[0])), copy.deepcopy(maps[0]), maps[0].to("cpu"), maps[:1][0]):
            assert maps.layout == one.layout

    def test_windows_and_texts_of_a_batch_in_a_file(self, tmp_path):
        made = AttentionMap(torch.eye(4).expand(8, 1, 4, 4), path="a")
        made.layout = Layout(Layout.picture((4, 4)).parts, Windows((2, 2), (1, 1)))
        again = AttentionMap.unpacked(made.packed({}))
        assert made.layout == again.layout and again.query_layout is None

    def test_no_picture_is_in_a_file(self, maps):
        """A file of maps does not hold what the model saw, however small."""
        assert maps.layout.seen and not pickle.loads(pickle.dumps(maps)).layout.seen

    def test_analyses_ask_it(self, maps):
        by_hand = analysis.attention_distance(maps, (4, 4), prefix_tokens=5)
        torch.testing.assert_close(analysis.attention_distance(maps), by_hand)
        assert (2, 2, 4, 16) == analysis.cls_attention(maps).shape


def test_a_model_whose_attributes_are_odd_is_recorded_all_the_same():
    class Odd(Attention):
        window_size = "large"
        config = property(lambda self: 1 / 0)

    assert 1 == len(recorded(Odd(), torch.randn(1, 4, 8)))


def test_a_tokenizer_that_is_none_is_refused():
    with pytest.raises(TypeError, match="tokenizer is a str"):
        attention(Attention(), tokenizer="bert-base-uncased")
