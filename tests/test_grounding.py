"""Which patches a word looks at, in vision-language models of ten families, against their own eager weights."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import vision_language

from visualizer import plot, word_maps
from visualizer.explorer.coding import WEIGHTS
from visualizer.explorer.words import examples_of_word_maps
from visualizer.grounding.heat_maps import resized

STEPS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def made(family: Any) -> tuple[Any, dict[str, Any], list[list[torch.Tensor]]]:
    torch.manual_seed(0)
    model, prompt, pictures = family()
    for weight in model.parameters():  # at first all look nearly everywhere alike
        weight.data *= 6 if weight.ndim > 1 else 1
    return model.eval(), prompt, pictures


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, Any], list[list[torch.Tensor]]]:
    return made(vision_language.llava)


def generated(model: Any, prompt: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model.generate(**prompt, **STEPS, **more)


def eager_rows(eager: Any, prompt: int, token: int) -> torch.Tensor:
    """The rows of a token, (layers, heads, keys), of those layers whose keys are the prompt's."""
    if hasattr(eager, "encoder_attentions"):
        layers = eager.encoder_attentions if token < prompt else eager.cross_attentions[token - prompt]
        return torch.stack([layer[0, :, token if token < prompt else 0] for layer in layers])
    step, query = (0, token) if token < prompt else (token - prompt + 1, 0)
    return torch.stack([layer[0, :, query] for layer in eager.attentions[step]])


def placed(rows: torch.Tensor, picture: Any, former: list[torch.Tensor]) -> torch.Tensor:
    """The weights (..., keys) on the patches of a picture."""
    if isinstance(picture, vision_language.Formed):
        spread = torch.stack([one[0][:, :, picture.patches] for one in former]).mean((0, 1))
        return torch.tensordot(rows[..., picture.tokens], spread, 1)
    finest = tuple(max(sides) for sides in zip(*(view.shape for view in picture), strict=True))
    flat = rows.flatten(0, -2)
    made = [sum(resized(row[view], finest, True) for view in picture) for row in flat]
    return torch.stack(made).view(*rows.shape[:-1], *finest)


@pytest.mark.parametrize("family", vision_language.FAMILIES, ids=lambda family: family.__name__)
def test_a_word_looks_where_the_eager_weights_say(family: Any) -> None:
    model, prompt, pictures = made(family)
    plain = generated(model, prompt)
    with word_maps(model, tokenizer=vision_language.Tokenizer(), heads="all") as maps:
        assert torch.equal(plain, generated(model, prompt))
    assert "generate" not in vars(model)
    model.set_attn_implementation("eager")
    former = []
    for path, module in model.named_modules():
        if any(isinstance(one, vision_language.Formed) and path.endswith(one.module) for one in pictures):
            module.register_forward_hook(lambda module, args, output: former.append(output[1]))
    eager = generated(model, prompt, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(plain, eager.sequences)
    given = prompt["input_ids"].shape[1]
    cat = prompt["input_ids"][0].tolist().index(vision_language.CAT)
    for number, picture in enumerate(pictures):
        for token in (cat, given, given + 2):  # given, and two generated ones
            rows = eager_rows(eager, given, token)
            expected = placed(rows, picture, former)
            layer = (
                0 if token < given or not hasattr(eager, "encoder_attentions") else len(rows)
            )  # behind the encoder's
            torch.testing.assert_close(
                maps.of(token, picture=number, layer=layer, head=1), expected[0, 1], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(maps.of(token, picture=number), expected.mean((0, 1)), atol=1e-5, rtol=0)
        assert float(expected.mean((0, 1)).std()) > 1e-4
        torch.testing.assert_close(maps.of("cat", picture=number, occurrence=0), maps.of(cat, picture=number))
    with pytest.raises(IndexError, match=f"no picture {len(pictures)} in the prompt: it has {len(pictures)}"):
        maps.of("cat", picture=len(pictures))


def test_words_that_are_not_there_are_told_from_those_that_are(llava: Any) -> None:
    model, prompt, _ = llava
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps, torch.no_grad():
        model(**prompt)
    assert maps.words == ["a", "cat", "dog"]
    with pytest.raises(ValueError, match=r"'cut' is not in the text; did you mean 'cat'\? Its words are 'a', 'cat', "):
        maps["cut"]
    with pytest.raises(IndexError, match="stands 1 times"):
        maps.of("cat", occurrence=1)
    with pytest.raises(IndexError, match="layer=2: 2 layers"):
        maps.of("cat", layer=2)
    with pytest.raises(ValueError, match="heads='all'"):
        maps.of("cat", head=0)
    with pytest.raises(ValueError, match="steps='all'"):
        maps.of("cat", step=0)
    with pytest.raises(IndexError, match="no text with a picture of sample=3"):
        maps.of("cat", sample=3)
    with pytest.raises(IndexError, match="no text with a picture of sample=0, negative=True: there are sample=0"):
        maps.of("cat", negative=True)
    cat = maps.of("cat")
    torch.testing.assert_close(maps.of([20]), cat)
    for wrong in ([20, 500], [20, 3], -1):  # 3 is a patch
        with pytest.raises(ValueError, match=r"nothing was kept of token '(500|3|-1)': .*patches are no words"):
            maps.of(wrong)
    for wrong in (["cat"], 2.5, None):
        with pytest.raises(TypeError, match="pass a word or a phrase, the number of a token, or several numbers"):
            maps.of(wrong)
    with pytest.raises(IndexError, match=r"no text with a picture of sample=-1"):
        maps.of("cat", sample=-1)
    for wrong in ({"picture": "1"}, {"picture": None}, {"sample": 0.0}, {"layer": 1.5}, {"occurrence": "first"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*: pass a number, counted from 0"):
            maps.of("cat", **wrong)


def test_a_word_of_several_pieces_in_a_frame_of_a_video() -> None:
    model, prompt, _ = made(vision_language.qwen2_vl)
    prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([[10, 11]])], 1)
    prompt["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], torch.zeros(1, 2, dtype=torch.long)], 1)
    del prompt["attention_mask"]
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps, torch.no_grad():
        model(**prompt)
    count = prompt["input_ids"].shape[1]
    pieces = torch.stack([maps.of(token, picture=2) for token in (count - 2, count - 1)])
    torch.testing.assert_close(maps.of("caterpillar", picture=2), pieces.mean(0))
    for frame, where in ((None, "mean of 2 frames"), (1, "frame 1")):
        ax = plot.words(maps, "caterpillar", picture=2, frame=frame)
        assert ax.get_title() == f"'caterpillar', mean of 2 layers, {where}"
    with pytest.raises(IndexError, match="frame=2: picture 2 has 2 frames"):
        plot.words(maps, "cat", picture=2, frame=2)
    with pytest.raises(IndexError, match="frame=0: picture 0 is no video"):
        plot.words(maps, "cat", frame=0)


def test_tiles_lie_on_the_picture_that_they_are_of() -> None:
    model, prompt, _ = made(vision_language.llava_next)
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps, torch.no_grad():
        model(**prompt)
    assert plot.words(maps, "cat", np.zeros((48, 32, 3))).get_title() == "'cat', mean of 2 layers"
    with pytest.raises(ValueError, match=r"a grid of 6 x 4 patches is turned.* Pass the picture that the model saw"):
        plot.words(maps, "cat", np.zeros((32, 48, 3)))


def test_tokens_of_which_nobody_knows_where_they_lie_have_no_map() -> None:
    """Those of a resampler are as many as patches in a square would be."""
    sizes = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    config = transformers.Idefics2Config(
        vision_config={**vision_language.VISION, "image_size": 16},
        perceiver_config={**sizes, "num_key_value_heads": 2, "hidden_size": 16},
        text_config={"model_type": "mistral", **vision_language.TEXT},
        image_token_id=vision_language.IMAGE,
    )
    pixels = vision_language.pixels(1, 1, 3, 16, 16)
    prompt = vision_language.prompt(1, (vision_language.IMAGE, 4), 7, vision_language.CAT, pixel_values=pixels)
    model = transformers.Idefics2ForConditionalGeneration(config).eval()
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps, torch.no_grad():
        model(**prompt)
    with pytest.raises(ValueError, match="the 4 tokens of picture 0 have no place on it"):
        maps["cat"]


def test_the_last_word_that_is_written_has_no_row(llava: Any) -> None:
    model, prompt, _ = llava
    with word_maps(model) as maps:
        written = generated(model, prompt)
    assert maps.of(written.shape[1] - 2).shape == (3, 3)
    with pytest.raises(ValueError, match="never given the last word"):
        maps.of(written.shape[1] - 1)


def test_a_text_without_pictures_has_nothing_to_look_at(llava: Any) -> None:
    model, _, _ = llava
    with word_maps(model) as maps, torch.no_grad():
        model(input_ids=torch.tensor([[1, 7, 8]]))
    with pytest.raises(IndexError, match="no picture 0 in the prompt: it has 0; give the model the picture too"):
        maps.of(1)
    with pytest.raises(ValueError, match="run it inside the `with`"):  # nothing has run
        word_maps(model).of(1)


def test_heads_that_point(llava: Any) -> None:
    model, prompt, _ = llava
    with word_maps(model, tokenizer=vision_language.Tokenizer(), heads="all") as maps, torch.no_grad():
        model(**prompt)
    heads = [(path, number) for path in maps.layers for number in (0, 1)]
    each = torch.stack([maps.of("dog", layer=path, head=number) for path, number in heads]).flatten(1)
    wide = each.sum(1) >= each.sum(1).mean()
    entropy = torch.distributions.Categorical(each).entropy()
    expected = [heads[number] for number in entropy.argsort().tolist() if wide[number]]
    assert maps.pointing("dog") == expected[:3] and maps.pointing("dog", count=1) == expected[:1]
    mean = torch.stack([each[heads.index(one)] for one in expected[:3]]).mean(0).view(3, 3)
    torch.testing.assert_close(maps.of("dog", head="pointing"), mean)
    title = plot.words(maps, "dog", head="pointing").get_title()
    assert title == "'dog', mean of 2 layers, heads that point"
    with pytest.raises(ValueError, match="head='sharp': pass a number, 'pointing' or None"):
        maps.of("dog", head="sharp")


def test_the_words_of_a_beam_search_are_those_of_the_prompt(llava: Any) -> None:
    model, prompt, _ = llava
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps, torch.no_grad():
        model(**prompt)
        expected = maps["cat"]
        written = generated(model, prompt, num_beams=2)
    torch.testing.assert_close(maps["cat"], expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="call the model itself once with the ids that generate returned"):
        maps.of(prompt["input_ids"].shape[1])
    with pytest.raises(ValueError, match=r"'w70' is not in the text.* what a beam search writes is not recorded"):
        maps["w70"]
    whole = {"input_ids": written, "pixel_values": prompt["pixel_values"]}
    with word_maps(model) as maps, torch.no_grad():  # the way out
        model(**whole)
    assert float(maps.of(prompt["input_ids"].shape[1]).sum()) > 0


def test_words_that_were_taken_back_have_no_rows(llava: Any) -> None:
    """As where another model, or the prompt itself, proposes words, and some are refused."""
    model, prompt, _ = llava
    prompt = {**prompt, "input_ids": torch.cat([prompt["input_ids"], torch.tensor([[7, 9, 7, 9, 7]])], 1)}
    del prompt["attention_mask"]
    with word_maps(model, heads="all") as maps:
        written = generated(model, prompt, prompt_lookup_num_tokens=3)
    with word_maps(model, heads="all") as whole, torch.no_grad():
        model(input_ids=written, pixel_values=prompt["pixel_values"])
    for token in range(prompt["input_ids"].shape[1], written.shape[1] - 1):
        torch.testing.assert_close(maps.of(token, head=1), whole.of(token, head=1), atol=1e-5, rtol=0)
    tokens = [token for one in next(iter(maps.sums.values())) for token in one.tokens]
    assert len(set(tokens)) == len(tokens) and max(tokens) < written.shape[1]


def test_an_encoder_and_a_decoder_without_a_cache() -> None:
    model, prompt, _ = made(vision_language.florence2)
    found = []
    for more in ({}, {"use_cache": False}):
        with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps:
            generated(model, prompt, **more)
        found.append(torch.stack([maps["cat"], maps.of(14), maps.of(15)]))
    [page] = examples_of_word_maps(maps, None, None, "", "keep")  # whose last layer is the mean of those with the word
    row = page.sides[0].labels.index("␣cat")
    whole = WEIGHTS[page.codes[-1, 0, row]] * page.top[-1, 0, row, 0]
    np.testing.assert_allclose(whole.reshape(3, 3), maps["cat"], rtol=0.016)
    torch.testing.assert_close(*found)
    with pytest.raises(
        ValueError, match=r"nothing was kept of 14, .* layers of the encoder have the words of the prompt"
    ):
        maps.of(14, layer=0)


def test_a_query_former_is_seen_whatever_layers_are_asked_for() -> None:
    model, prompt, _ = made(vision_language.blip2)
    embedded = {name: one for name, one in prompt.items() if name != "pixel_values"}
    with pytest.warns(UserWarning, match=r"attend to each other in '\*nine\*'; they do in"), torch.no_grad():
        with word_maps(model, layers=["*layers.1.*", "*nine*"]) as maps:
            model(**prompt)
    assert [path[-18:] for path in maps.layers] == ["layers.1.self_attn"]
    assert maps.of(vision_language.CAT - 2).shape == (4, 4)
    with word_maps(model) as maps, torch.no_grad():  # a caption of its own
        model.generate(pixel_values=prompt["pixel_values"], max_new_tokens=2, min_new_tokens=2)
    assert maps.of(4).shape == (4, 4)
    outputs = model.get_image_features(prompt["pixel_values"])
    with word_maps(model) as maps, torch.no_grad():
        model(**embedded, pixel_values=None, mm_encoder_outputs={"image": outputs})
    with pytest.raises(ValueError, match="query former of Blip2ForConditionalGeneration did not run inside"):
        maps.of(5)


def test_texts_of_a_batch_with_padding_on_the_left(llava: Any) -> None:
    model, prompt, _ = llava
    short = torch.tensor([0] * 10 + [1] + [5] * 9 + [7, 8] + [9] * 9)
    ids = torch.cat([prompt["input_ids"], short[None]])
    mask = torch.cat([prompt["attention_mask"], (short != 0).long()[None]])
    pixels = torch.cat([prompt["pixel_values"], prompt["pixel_values"][:1]])
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps:
        generated(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    alone = {"input_ids": short[None, 10:], "attention_mask": mask[1:, 10:], "pixel_values": pixels[3:]}
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as one:
        generated(model, alone)
    torch.testing.assert_close(maps.of("cat", sample=1), one.of("cat"), atol=1e-5, rtol=0)
    with pytest.raises(IndexError, match="no picture 1 in the prompt: it has 1"):
        maps.of("cat", sample=1, picture=1)


def test_a_prompt_that_does_not_fit_its_pictures_is_told_and_harms_nothing() -> None:
    model, prompt, _ = made(vision_language.qwen2_vl)
    wrong = {**prompt, "image_grid_thw": torch.tensor([[1, 40, 60], [1, 4, 4]])}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.no_grad(), word_maps(model), pytest.raises(Exception) as plain:  # the model itself cannot take it
            model(**wrong)
    assert "grounding" not in str(plain.traceback[-1].path)
    assert any("ValueError: 18 tokens of a picture do not fit image_grid_thw [1, 40, 60]" in str(one) for one in told)


def test_only_what_is_asked_for_is_kept(llava: Any) -> None:
    """Rows of the words on the patches: no keys, no map."""
    model, prompt, _ = llava
    with word_maps(model) as maps:
        written = generated(model, prompt)
    words = written.shape[1] - 27 - 1  # without the patches of three pictures and the last word
    assert maps.nbytes == 2 * 3 * 9 * words * 4
    with word_maps(model, layers="*layers.1*") as maps:
        generated(model, prompt)
    assert [path[-18:] for path in maps.layers] == ["layers.1.self_attn"]


def test_sinks_are_removed_and_the_rest_rescaled() -> None:
    torch.manual_seed(0)
    model, prompt, _ = made(vision_language.paligemma)
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps, torch.no_grad():
        model(**prompt)
    before = maps["cat"]
    torch.testing.assert_close(maps.of("cat", sinks="remove"), before)  # random weights have none
    for several in maps.sums.values():
        several[0].weights[..., 1, 2] = 5.0  # all words look at one patch
    clean, raw = maps.of("cat", sinks="remove"), maps["cat"]
    assert torch.isnan(clean).nonzero().tolist() == [[1, 2]]
    expected = before * (float(raw.sum()) / float(before.sum() - before[1, 2]))
    torch.testing.assert_close(
        clean.nan_to_num(0), expected.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.0))
    )
    title = plot.words(maps, "cat", np.zeros((16, 16, 3)), sinks="remove").get_title()
    assert title == "'cat', mean of 2 layers, sinks removed"
    with pytest.raises(ValueError, match="sinks='hide'"):
        maps.of("cat", sinks="hide")


def test_a_plot_of_a_word(llava: Any) -> None:
    model, prompt, _ = llava
    with word_maps(model, tokenizer=vision_language.Tokenizer()) as maps, torch.no_grad():
        model(**prompt)
    picture = np.zeros((48, 48, 3))
    ax = plot.words(maps, "cat", picture)
    assert ax.get_title() == "'cat', mean of 2 layers"
    assert ax.images[0].get_array().shape == (48, 48, 3)
    figure = plot.words(maps, ["a", "cat", "dog"], picture, layer=1)
    assert [one.get_title() for one in figure.axes[:3]] == ["'a'", "'cat'", "'dog'"]
    assert figure.get_suptitle() == "layer 1"
    with pytest.raises(TypeError, match=r"pass what visualizer\.word_maps recorded"):
        plot.words([np.eye(3)], "cat")
    with pytest.raises(ValueError, match="pass a word, or several"):
        plot.words(maps, [])


def test_another_grid_of_the_same_picture() -> None:
    weights = torch.rand(3, 5)
    assert float((resized(weights, (7, 4), True).sum() - weights.sum()).abs()) < 1e-6
    assert float((resized(weights, (7, 4), False).mean() - weights.mean()).abs()) < 1e-6
    assert torch.equal(resized(weights, (6, 10), False), weights.repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": "some"}, ValueError, "heads='some'"),
        ({"steps": 3}, ValueError, "steps=3"),
        ({"queries": "keys"}, ValueError, "queries='keys'"),
        ({"tokenizer": 5}, TypeError, "tokenizer is a int"),
        ({"layers": [3]}, TypeError, "pass paths or patterns"),
    ],
)
def test_wrong_options(llava: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        word_maps(llava[0], **options)
