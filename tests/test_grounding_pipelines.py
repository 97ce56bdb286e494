"""Words of a prompt in the pictures that pipelines of diffusers make, against a plain loop over eager attention."""

import math
from typing import Any

import pipelines
import pytest
import torch
from torch.nn import functional as F

from visualizer import attention, word_maps
from visualizer.grounding.heat_maps import resized

pytest.importorskip("diffusers", reason="pipelines are built from diffusers: pip install diffusers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("diffusers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

CLIP = {"cat": [3], "caterpillar": [6, 7, 8]}  # behind the token that starts the text
T5 = {"cat": [2], "caterpillar": [5, 6]}
SIZE = {"height": 32, "width": 48}
VIDEO = {**SIZE, "num_frames": 9, "max_sequence_length": 16}

# Of each pipeline: its arguments, where the tokens of its words lie, and which calls have them: (queries, keys).
CASES: dict[str, tuple[dict[str, Any], Any, dict[tuple[int, int], Any]]] = {
    # Two resolutions, 16 x 24 and 8 x 12, of latents of 16 x 24.
    "stable_diffusion": (SIZE, CLIP, {(384, 77): (0, 0, (16, 24)), (96, 77): (0, 0, (8, 12))}),
    "stable_diffusion_xl": (SIZE, CLIP, {(96, 77): (0, 0, (8, 12))}),
    "stable_diffusion_3": (
        {"height": 16, "width": 24, "max_sequence_length": 32},
        {word: [*CLIP[word], *(77 + place for place in T5[word])] for word in T5},
        {(205, 205): (96, 0, (8, 12))},  # the picture, and the text of two encoders behind it
    ),
    "flux": (
        {"height": 16, "width": 24, "max_sequence_length": 32, "num_inference_steps": 4},
        T5,
        {(56, 56): (0, 32, (4, 6))},
    ),
    "pixart": ({**SIZE, "use_resolution_binning": False, "clean_caption": False}, T5, {(96, 120): (0, 0, (8, 12))}),
    "hunyuan_dit": (
        {"height": 64, "width": 96, "use_resolution_binning": False},
        {word: [*CLIP[word], *(77 + place for place in T5[word])] for word in T5},
        {(24, 333): (0, 0, (4, 6))},
    ),
    # Its layers see no padding, and one of them the mean of the text beside it, with a single query.
    "kandinsky_3": ({"height": 64, "width": 128}, T5, {(32, 9): (0, 0, (4, 8)), (128, 9): (0, 0, (8, 16))}),
    "wan": (VIDEO, T5, {(18, 16): (0, 0, (3, 2, 3))}),
    "ltx": ({**VIDEO, "width": 64}, T5, {(384, 16): (0, 0, (3, 8, 16))}),
}


def run(pipeline: Any, arguments: dict[str, Any], **more: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": pipelines.PROMPT, "num_inference_steps": 2, "output_type": "np", **arguments, **more}
    made = pipeline(**given, generator=torch.Generator().manual_seed(0))
    return made.images if hasattr(made, "images") else made.frames


def by_hand(pipeline: Any, name: str, word: str) -> torch.Tensor:
    """The mean over heads, layers and steps of what the patches give to all pieces of the word."""
    arguments, places, calls = CASES[name]
    pipeline.set_progress_bar_config(disable=True)
    weights, _ = pipelines.weights_by_hand(
        pipeline,
        prompt=pipelines.PROMPT,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **{"num_inference_steps": 2, **arguments},
    )
    finest = max(grid for _, _, grid in calls.values())
    found = []
    for number, one in enumerate(one for one in weights if tuple(one.shape[2:]) in calls):
        text, picture, grid = calls[tuple(one.shape[2:])]
        if name == "wan" and number // 2 % 2:  # a call for the prompt and one for the negative prompt, of two layers
            continue
        columns = one[-1].mean(0)[:, [text + place for place in places[word]]].sum(-1)  # of the prompt's half
        heat = columns[picture : picture + math.prod(grid)].view(grid)
        if grid != finest:
            heat = F.interpolate(heat[None, None], finest, mode="nearest")[0, 0]
        found.append(heat)
    assert len(found) >= 2
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("name", CASES)
def test_a_word_goes_where_a_plain_loop_says(name: str) -> None:
    torch.manual_seed(0)
    pipeline = getattr(pipelines, name)()
    arguments = CASES[name][0]
    plain = run(pipeline, arguments)
    with word_maps(pipeline) as maps:
        made = run(pipeline, arguments)
    assert (plain == made).all()
    assert maps.words == ["a", "red", "cat", "on", "the", "caterpillar"]
    for word in ("cat", "caterpillar"):
        expected = by_hand(pipeline, name, word)
        torch.testing.assert_close(maps[word], expected, atol=1e-5, rtol=0)
        assert float(expected.std()) > 0


@pytest.fixture(scope="module")
def sd3() -> Any:
    torch.manual_seed(1)
    return pipelines.stable_diffusion_3()


def test_guidance_steps_heads_and_encoders_are_told_apart(sd3: Any) -> None:
    arguments = CASES["stable_diffusion_3"][0]
    with word_maps(sd3, heads="all", steps="all") as maps:
        run(sd3, arguments, negative_prompt="the red dog")
    whole = maps["cat"]
    assert maps.of("dog", negative=True).shape == whole.shape == (8, 12)
    with pytest.raises(ValueError, match=r"'dog' is not in the text.* Its words are 'a', 'red', 'cat'"):
        maps["dog"]
    with pytest.raises(ValueError, match=r"'cot' is not in the text; did you mean 'cat'\?"):
        maps["cot"]
    torch.testing.assert_close(sum(maps.of("cat", encoder=one) for one in (0, 1)), whole)
    torch.testing.assert_close(torch.stack([maps.of("cat", step=one) for one in (0, 1)]).mean(0), whole)
    torch.testing.assert_close(torch.stack([maps.of("cat", head=one) for one in range(4)]).mean(0), whole)
    torch.testing.assert_close(torch.stack([maps.of("cat", layer=one) for one in (0, 1)]).mean(0), whole)
    with pytest.raises(IndexError, match="no text with a picture of sample=1"):
        maps.of("cat", sample=1)


def test_the_words_rows_are_another_side_of_a_joint_attention(sd3: Any) -> None:
    arguments = CASES["stable_diffusion_3"][0]
    with word_maps(sd3, queries="words") as maps:
        run(sd3, arguments)
    sd3.set_progress_bar_config(disable=True)
    weights, _ = pipelines.weights_by_hand(
        sd3,
        prompt=pipelines.PROMPT,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **arguments,
    )
    rows = torch.stack([one[1].mean(0) for one in weights])  # (calls, queries, keys)
    expected = rows[:, [96 + 3, 96 + 77 + 2], :96].mean((0, 1)).view(8, 12)
    torch.testing.assert_close(maps["cat"], expected, atol=1e-5, rtol=0)


def test_several_pictures_of_several_prompts() -> None:
    torch.manual_seed(2)
    pipeline = pipelines.stable_diffusion()
    with word_maps(pipeline) as maps:
        run(pipeline, SIZE, prompt=["a red cat", "the dog"], num_images_per_prompt=2)
    assert maps.of("cat", sample=0).shape == maps.of("cat", sample=1).shape == (16, 24)
    assert not torch.equal(maps.of("cat", sample=0), maps.of("cat", sample=1))
    assert maps.of("dog", sample=3).shape == (16, 24)
    with pytest.raises(ValueError, match="'cat' is not in the text"):
        maps.of("cat", sample=2)


def test_lumina_joins_words_and_picture_without_padding() -> None:
    torch.manual_seed(3)
    pipeline = pipelines.lumina()
    with word_maps(pipeline) as maps:
        run(pipeline, SIZE)
    weights, _ = pipelines.weights_by_hand(
        pipeline,
        prompt=pipelines.PROMPT,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **SIZE,
    )
    text = weights[4].shape[2] - 6  # 2 x 3 patches behind the words
    ids = pipeline.tokenizer(
        f"{pipeline.system_prompt} <Prompt Start> {pipelines.PROMPT}", return_tensors="pt"
    ).input_ids[0]
    cat = (ids == pipeline.tokenizer.convert_tokens_to_ids("▁cat")).nonzero().flatten()
    assert len(ids) == text
    prompts = [one for one in weights if one.shape[2] == text + 6]
    expected = torch.stack([one[0].mean(0)[text:, cat].sum(-1) for one in prompts]).mean(0).view(2, 3)
    torch.testing.assert_close(maps["cat"], expected, atol=1e-5, rtol=0)


def test_heads_that_point_of_layers_with_different_numbers_of_heads() -> None:
    torch.manual_seed(5)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    unet = pipelines.unet(cross_attention_dim=32, attention_head_dim=(2, 4), **blocks).eval()
    with torch.no_grad(), word_maps(unet, tokens=["a", "red", "cat"], heads="all") as maps:
        unet(torch.randn(1, 4, 16, 24), torch.tensor(5), encoder_hidden_states=3 * torch.randn(1, 3, 32))
    counts = {path: len(maps.sums[key][0].weights) for key in maps.sums for path in [key.path]}
    assert {*counts.values()} == {2, 4}
    heads = [(path, number) for path in maps.layers for number in range(counts[path])]
    each = [maps.of("cat", layer=path, head=number) for path, number in heads]
    flat = torch.stack([resized(one, (16, 24), False) for one in each]).flatten(1)
    entropy = torch.distributions.Categorical(flat).entropy()
    entropy[flat.sum(1) < flat.sum(1).mean()] = math.inf
    best = entropy.argsort()[:3].tolist()
    assert maps.pointing("cat") == [heads[number] for number in best]
    torch.testing.assert_close(maps.of("cat", head="pointing"), flat[best].mean(0).view(16, 24))
    with pytest.raises(IndexError, match="head=3: a layer has 2 heads; layer= chooses one that has more"):
        maps.of("cat", head=3)


def test_a_unet_alone_has_the_words_that_it_is_told() -> None:
    torch.manual_seed(4)
    unet = pipelines.stable_diffusion().unet
    sample, text = torch.randn(1, 4, 16, 24), torch.randn(1, 3, 32)
    with torch.no_grad(), word_maps(unet, tokens=["a", "red", "cat"]) as maps:
        unet(sample, torch.tensor(5), encoder_hidden_states=text)
    assert maps.words == ["a", "red", "cat"]
    total = sum(maps[word] for word in maps.words)
    torch.testing.assert_close(total, torch.ones(16, 24))
    with torch.no_grad(), word_maps(unet) as maps:
        unet(sample, torch.tensor(5), encoder_hidden_states=text)
    with pytest.raises(ValueError, match="Pass tokens= to word_maps"):
        maps["cat"]
    assert maps.of(2).shape == (16, 24)


def test_a_pipeline_without_words_is_refused() -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    unet = UNet2DModel(sample_size=8, norm_num_groups=2, layers_per_block=1, **blocks)
    with pytest.raises(ValueError, match=r"DDPMPipeline has no words .* attention\(pipeline\.unet\)"):
        word_maps(DDPMPipeline(unet, DDIMScheduler()))
    with pytest.raises(TypeError, match="word_maps takes a whole pipeline"):
        attention(DDPMPipeline(unet, DDIMScheduler()))
    with pytest.raises(TypeError, match=r"neither an nn\.Module nor a pipeline"):
        word_maps("stable diffusion")
