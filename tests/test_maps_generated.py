"""A generation's steps as one map of each module, against one pass over the whole text."""

import csv

import numpy as np
import pytest
import torch
from zoo import GPT2, IDS, PADDING, SIZE, TEXT, transformers_model

from visualizer import AttentionMap, analysis, attention, explore, load, plot
from visualizer.errors import UnknownKeyError
from visualizer.maps import Factors, Keys, generated_maps, is_generation
from visualizer.reading import layers_in
from visualizer.statistics import Entropy

KEYS_AND_VALUES = {"num_key_value_heads": 2}
LLAMA = ("Llama", "ForCausalLM", TEXT | SIZE | KEYS_AND_VALUES)
MISTRAL = ("Mistral", "ForCausalLM", TEXT | SIZE | KEYS_AND_VALUES | {"sliding_window": 6})
NARROW = ("Mistral", "ForCausalLM", TEXT | SIZE | KEYS_AND_VALUES | {"sliding_window": 3})
QWEN = ("Qwen3", "ForCausalLM", TEXT | SIZE | KEYS_AND_VALUES | {"head_dim": 8})
WRITER = ("GPT2", "LMHeadModel", GPT2)
READER = TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
T5 = ("T5", "ForConditionalGeneration", READER)
LEFT_PADDED = PADDING.flip(1)
STATIC = {"cache_implementation": "static"}


def build(kind, how="sdpa"):
    torch.manual_seed(0)
    name, head, options = kind
    return transformers_model(name, head=head, attention=how, **options)


class Tokenizer:
    """Each id is a word."""

    def convert_ids_to_tokens(self, ids):
        return [f"w{one}" for one in ids]


def write(model, mask=None, layers=None, **options):
    """The maps of a generation, and what was written."""
    mask = torch.ones_like(IDS) if mask is None else mask
    given = {"input_ids": IDS, "attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    options = {"pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True} | options
    with attention(model, layers=layers, tokenizer=Tokenizer()) as maps:
        written = model.generate(**given | options)
    return maps, written


def one_pass(model, sequences, mask=None):
    """The maps of one pass over a text, of which the model has not read the last token."""
    mask = torch.ones_like(IDS) if mask is None else mask
    read = sequences[:, :-1]
    if model.config.is_encoder_decoder:
        given = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": read}
    else:
        mask = torch.cat([mask, mask.new_ones(len(mask), read.shape[1] - mask.shape[1])], 1)
        given = {"input_ids": read, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), attention(model) as maps:
        model(**given)
    return maps


def differences(found, expected, mask=None):
    """How far the maps of two recordings are apart, in the rows of real tokens."""
    assert set(found.paths) == set(expected.paths)
    for path in found.paths:
        assert found[path].shape == expected[path].shape
        apart = (found[path].dense() - expected[path].dense()).abs()
        if mask is not None and found[path].kind != "cross":
            apart[:, :, : mask.shape[1]] *= mask[:, None, :, None]
        yield float(apart.max())


class TestAgainstOnePass:
    @pytest.mark.parametrize("mask", [None, LEFT_PADDED])
    @pytest.mark.parametrize("kind", [LLAMA, MISTRAL, NARROW, QWEN, WRITER], ids=lambda one: one[0])
    @pytest.mark.parametrize("options", [{}, STATIC, {"use_cache": False}], ids=["cache", "static", "none"])
    def test_a_decoder(self, kind, options, mask):
        model = build(kind)
        maps, written = write(model, mask, **options)
        assert max(differences(maps.generated(), one_pass(model, written.sequences, mask), mask)) < 1e-5

    @pytest.mark.parametrize("kind", [LLAMA, NARROW, WRITER, T5], ids=lambda one: one[0])
    @pytest.mark.parametrize("options", [{}, STATIC], ids=["cache", "static"])
    def test_a_decoder_that_computes_its_weights_openly(self, kind, options):
        model = build(kind, "eager")
        maps, written = write(model, **options)
        whole = maps.generated()
        assert whole[0].is_dense
        assert max(differences(whole, one_pass(model, written.sequences))) < 1e-5

    @pytest.mark.parametrize("options", [{}, STATIC, {"use_cache": False}], ids=["cache", "static", "none"])
    def test_an_encoder_and_a_decoder(self, options):
        model = build(T5)
        maps, written = write(model, PADDING, **options)
        whole = maps.generated()
        assert {one.shape: one.kind for one in whole} == {
            (2, 4, 5, 5): "self", (2, 4, 7, 7): "self", (2, 4, 7, 5): "cross"
        }  # fmt: skip
        assert whole.paths == maps.paths
        expected = one_pass(model, written.sequences, PADDING)
        for path in whole.paths:  # rows of padding, which no token looks at, may be anything
            real = PADDING if "encoder" in path else torch.ones(2, 7)
            apart = (whole[path].dense() - expected[path].dense()) * real[:, None, :, None]
            assert apart.abs().max() < 1e-5

    @pytest.mark.parametrize(("how", "options"), [("sdpa", {}), ("sdpa", STATIC), ("eager", {})])
    @pytest.mark.parametrize("kind", [LLAMA, NARROW, T5], ids=lambda one: one[0])
    def test_beams(self, kind, how, options):
        model = build(kind, how)
        maps, written = write(model, num_beams=3, num_return_sequences=2, **options)
        indices = written.beam_indices
        assert (indices[:, 1:] != indices[:, :-1]).any()
        texts = len(indices)
        whole = maps.generated(beam_indices=indices)
        for text, sequence in enumerate(written.sequences):
            prompt = IDS[text // 2][None]
            given = {"decoder_input_ids": sequence[None, :-1]} if kind is T5 else {}
            with torch.no_grad(), attention(model) as expected:
                model(input_ids=prompt if kind is T5 else sequence[None, :-1], **given)
            for path in expected.paths:
                if path.startswith("encoder"):
                    continue
                assert whole[path].shape[0] == texts
                assert (whole[path].dense()[text] - expected[path].dense()[0]).abs().max() < 1e-5

    @pytest.mark.parametrize("how", ["sdpa", "eager"])
    @pytest.mark.parametrize("kind", [LLAMA, NARROW], ids=lambda one: one[0])
    def test_beams_that_are_left_at_the_end(self, kind, how):
        """Without a cache each call has the whole text of each beam."""
        model = build(kind, how)
        cached, _ = write(model, LEFT_PADDED, num_beams=3)
        recomputed, _ = write(model, LEFT_PADDED, num_beams=3, use_cache=False)
        mask = LEFT_PADDED.repeat_interleave(3, 0)
        assert max(differences(cached.generated(), recomputed.generated(), mask)) < 1e-5
        assert max(differences(cached.generated("new"), recomputed.generated("new"))) < 1e-5

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["sdpa", "eager"])
    def test_smollm2(self, smollm2, how):
        model, tokenizer = smollm2
        before = model.config._attn_implementation
        model.set_attn_implementation(how)
        try:
            ids = tokenizer("The cat sat down because it was", return_tensors="pt")
            with attention(model) as maps:
                written = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
            with torch.no_grad(), attention(model) as expected:
                model(written[:, :-1])
        finally:
            model.set_attn_implementation(before)
        assert len(maps) == 12 * len(expected) == 12 * 30
        assert max(differences(maps.generated(), expected)) < 1e-5


@pytest.fixture(scope="module")
def llama():
    return build(LLAMA)


@pytest.fixture(scope="module")
def recorded(llama):
    """Of two texts, five tokens and six steps."""
    return write(llama)[0]


def test_new_rows_are_those_behind_the_prompt(recorded):
    whole, new = recorded.generated(), recorded.generated(queries="new")
    assert new.paths == whole.paths
    for path in new.paths:
        assert new[path].shape == (2, 4, 6, 11)
        assert torch.equal(new[path].dense(), whole[path].rows(slice(5, None)))
        assert torch.equal(new[path].rows([-1, 0]), whole[path].rows([10, 5]))


def test_it_knows_its_padding_and_its_answer(llama):
    maps, _ = write(llama, LEFT_PADDED)
    whole, new = maps.generated()[0], maps.generated("new")[0]
    assert whole.layout == whole.query_layout == new.layout
    assert new.query_layout == whole.layout.cut(5)
    for text, padding in enumerate(([False] * 5, [True, True, False, False, False])):
        assert padding + [False] * 6 == whole.layout.of(text).are("padding").tolist()
        assert [False] * 5 + [True] * 6 == whole.layout.of(text).generated.tolist()


def test_its_table_says_which_tokens_were_written(recorded, tmp_path):
    recorded.generated().to_csv(tmp_path / "x.csv", layers=0, heads=0)
    lines = (tmp_path / "x.csv").read_text().splitlines()
    for row in csv.DictReader(lines):
        for side in ("query", "key"):
            assert str(int(row[side]) >= 5) == row[f"{side}_generated"]
    assert 1 + 2 * 11 * 11 == len(lines)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LLAMA, {}), (LLAMA, STATIC), (LLAMA, {"use_cache": False}), (LLAMA, {"num_beams": 3}), (NARROW, {}), (T5, {})],
    ids=["cache", "static", "none", "beams", "window", "encoder-decoder"],
)
def test_it_knows_the_words_of_prompt_and_answer(kind, options):
    maps, written = write(build(kind), **options)
    whole = maps.generated(beam_indices=getattr(written, "beam_indices", None))
    decoders = [one for one in whole if not one.path.startswith("encoder")]
    assert len(decoders) in (2, 4)
    for one in decoders:
        for text, ids in enumerate(written.sequences[:, :-1].tolist()):
            queries, keys = one.query_layout.of(text), one.layout.of(text)
            assert [f"w{number}" for number in ids] == [*queries.names]
            prompt = 1 if kind is T5 else 5
            assert [False] * prompt + [True] * (len(ids) - prompt) == queries.generated.tolist()
            assert one.kind == "cross" or keys == queries
            if one.kind == "cross":
                assert [f"w{number}" for number in IDS[text].tolist()] == [*keys.names]


class TestCrossAttentionAlone:
    """Where only that of an encoder-decoder was recorded, nothing grows from step to step."""

    CROSS = "decoder.*.EncDecAttention"

    def test_is_a_generation(self):
        model = build(T5)
        alone, _ = write(model, PADDING, layers=self.CROSS)
        whole, _ = write(model, PADDING)
        assert alone.is_generation and 2 == len(alone.generated())
        for path in alone.paths:
            assert torch.equal(alone.generated()[path].dense(), whole.generated()[path].dense())

    def test_beams_look_at_the_same_keys(self):
        maps, written = write(build(T5), layers=self.CROSS, num_beams=2)
        with pytest.raises(ValueError, match=r"only cross-attention was recorded.*may be beams"):
            maps.generated()
        assert (2, 4, 7, 5) == maps.generated(beam_indices=written.beam_indices)[0].shape

    def test_a_head_that_pools_pictures_writes_nothing(self):
        pool = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
        query, pictures = torch.randn(1, 1, 8), torch.randn(3, 1, 9, 8)
        for each in (pictures, pictures[[0, 0, 0]]):
            with torch.no_grad(), attention(pool) as maps:
                for picture in each:
                    pool(query, picture, picture)
            assert {"cross"} == {one.kind for one in maps}
            assert not maps.is_generation


def test_modules_without_new_rows_are_left_out():
    maps, _ = write(build(T5))
    assert maps.generated("new").paths == tuple(path for path in maps.paths if path.startswith("decoder"))


def test_each_row_is_the_step_that_was_recorded(recorded):
    whole = recorded.generated()
    for path in recorded.paths:
        for step, one in enumerate(recorded.calls(path)[1:], 5):
            assert torch.equal(whole[path].rows([step])[..., : step + 1], one.dense())
            assert not whole[path].rows([step])[..., step + 1 :].any()


def test_nothing_is_computed_before_it_is_read(recorded, monkeypatch):
    counts = []
    rows = Factors.rows
    monkeypatch.setattr(Factors, "rows", lambda self, queries: counts.append(queries) or rows(self, queries))
    whole = recorded.generated()
    assert counts == []
    whole[0].rows([7])
    assert len(counts) <= 2  # of the prompt none, which says of what type they are, and of the step


def test_it_takes_no_memory_of_its_own(recorded):
    for path in recorded.paths:
        [whole], steps = recorded.generated().calls(path), recorded.calls(path)
        own = {tensor.untyped_storage().data_ptr() for tensor in whole.source.tensors()}
        assert own <= {tensor.untyped_storage().data_ptr() for one in steps for tensor in one.source.tensors()}
        assert whole.nbytes < sum(one.nbytes for one in steps)
    moved = recorded.generated()[0].to("cpu")
    assert len({block.source.keys.owner for block in moved.source.blocks}) == 1


def test_it_can_be_saved(recorded, tmp_path):
    whole = recorded.generated()
    whole.save(tmp_path / "whole.safetensors", about={"tokens": ["a"]})
    recorded.save(tmp_path / "steps.safetensors")
    for found in (load(tmp_path / "whole.safetensors"), load(tmp_path / "steps.safetensors").generated()):
        assert found.paths == whole.paths
        assert all(torch.equal(found[path].dense(), whole[path].dense()) for path in whole.paths)
    assert load(tmp_path / "whole.safetensors").generated().about == {"tokens": ["a"]}


def test_beams_can_be_saved(tmp_path):
    maps, written = write(build(LLAMA), num_beams=2)
    whole = maps.generated(beam_indices=written.beam_indices)
    whole.save(tmp_path / "x.safetensors")
    found = load(tmp_path / "x.safetensors")
    assert all(torch.equal(found[path].dense(), whole[path].dense()) for path in whole.paths)


class TestWhatTakesMaps:
    """The steps as they come are what their whole is."""

    def test_analyses(self, recorded):
        whole = recorded.generated()
        for analyse in (analysis.rollout, analysis.entropy, analysis.received):
            found = analyse(recorded)
            assert torch.equal(found.nan_to_num(), analyse(whole).nan_to_num())
            assert found.shape[-1] == 11
        assert analysis.top_keys(recorded, 10, k=2) == analysis.top_keys(whole, 10, k=2)

    def test_statistics(self, recorded):
        entropy, same = Entropy(), Entropy()
        entropy.update(recorded)
        same.update(recorded.generated())
        assert np.array_equal(entropy.compute().mean, same.compute().mean)
        assert entropy.compute().mean.shape == (2, 4)

    def test_plots(self, recorded):
        ax = plot.tokens(recorded, list("abcdefghijk"), layer=1, head=2)
        expected = recorded.generated()[1].dense()[0, 2]
        future = torch.ones(11, 11, dtype=torch.bool).triu(1)
        assert np.allclose(
            ax.images[0].get_array().filled(np.nan), expected.masked_fill(future, np.nan), atol=1e-6, equal_nan=True
        )

    def test_the_explorer(self, recorded):
        pages = [explore(maps, tokens=list("abcdefghijk"), batch=1) for maps in (recorded, recorded.generated())]
        assert pages[0].html == pages[1].html

    def test_reading(self, recorded):
        assert [layer.shape for layer in layers_in(recorded).layers] == [(2, 4, 11, 11)] * 2

    def test_calls_that_are_no_generation_stay_layers(self, llama):
        with torch.no_grad(), attention(llama) as maps:
            llama(IDS)
            llama(IDS.flip(0))
        assert not maps.is_generation
        assert len(layers_in(maps).layers) == 4


def causal(keys, first, queries, begin=0, batch=1):
    """A step: queries from `first` on, with the keys of a text from `begin` up to them, (batch or 1, 2, tokens, 8)."""
    end = first + queries
    query = torch.ones(batch, 2, queries, 8)
    source = Factors(query, Keys(keys[:, :, begin:end].clone()), end - begin, causal=first - begin)
    return AttentionMap.from_source(source, path="attn", kind="self")


def text(seed=0, batch=1):
    return torch.randn(batch, 2, 20, 8, generator=torch.Generator().manual_seed(seed))


def put_together(*steps, **options):
    [made] = generated_maps({"attn": steps}, **{"are_new": False} | options)["attn"]
    return made


def test_several_tokens_at_a_time():
    keys = text()
    whole = put_together(causal(keys, 0, 5), causal(keys, 5, 3), causal(keys, 8, 1), causal(keys, 9, 4))
    assert torch.allclose(whole.dense(), causal(keys, 0, 13).dense(), atol=1e-6)


def test_keys_from_before_the_recording_come_first():
    """As of a conversation's second question."""
    keys = text()
    whole = put_together(causal(keys, 6, 3), causal(keys, 9, 1), causal(keys, 10, 1))
    assert whole.shape == (1, 2, 5, 11)
    assert torch.allclose(whole.dense(), causal(keys, 0, 11).rows(slice(6, None)), atol=1e-6)


def test_a_window_that_passes_its_first_keys():
    keys = text()
    steps = [causal(keys, 0, 5)] + [causal(keys, place, 1, begin=place - 3) for place in range(5, 9)]
    whole = put_together(*steps)
    assert whole.shape == (1, 2, 9, 9)
    for place in range(5, 9):
        row = whole.rows([place])[0, :, 0]
        assert not row[:, : place - 3].any()
        assert torch.equal(row[:, place - 3 : place + 1], steps[place - 4].dense()[0, :, 0])


def test_a_text_that_ends_before_the_others_has_rows_of_zeros():
    steps = [AttentionMap(torch.full((2, 1, 1, 1), 1.0)), AttentionMap(torch.full((2, 1, 1, 2), 0.5))]
    found = put_together(*steps, beam_indices=[[0, 1], [1, -1]]).dense()[:, 0]
    assert found.tolist() == [[[1, 0], [0.5, 0.5]], [[1, 0], [0, 0]]]


class TestWhatIsNoGeneration:
    def test_two_texts(self, llama):
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with attention(llama) as maps:
            llama.generate(IDS, **settings)
            llama.generate(IDS.flip(1), **settings)
        assert not maps.is_generation
        with pytest.raises(ValueError, match=r"call 3 has no keys of those before it.*clear\(\)"):
            maps.generated()

    @pytest.mark.parametrize("how", ["sdpa", "eager"])
    @pytest.mark.parametrize("kind", [LLAMA, NARROW], ids=lambda one: one[0])
    def test_tokens_that_were_taken_back(self, kind, how):
        """As where the model guesses several tokens of its own prompt at a time, and keeps those that are right."""
        ids = torch.tensor([[1, 2, 3, 1, 2]])
        maps, _ = write(build(kind, how), torch.ones_like(ids), input_ids=ids, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="tokens were taken back"):
            maps.generated()

    def test_passes_that_have_nothing_to_do_with_each_other(self, llama):
        with torch.no_grad(), attention(llama) as maps:
            llama(IDS)
            llama(IDS.flip(0))
        with pytest.raises(ValueError, match="are not the steps of one generation"):
            maps.generated()

    @pytest.mark.parametrize(
        ("steps", "complaint"),
        [
            (lambda: [causal(text(), 0, 5), causal(text(1), 5, 1)], "goes on from another text"),
            (lambda: [causal(text(), 0, 5), causal(text(), 5, 3), causal(text(), 7, 1)], "tokens were taken back"),
            (lambda: [causal(text(), 0, 5), causal(text(), 5, 1), causal(text(), 9, 1)], "not of the 7 tokens up to"),
            (lambda: [causal(text(), 0, 5), causal(text(1), 0, 6)], "text of call 0 is not the beginning"),
            (lambda: [causal(text(), 0, 5), causal(text(batch=2), 5, 1, batch=2)], "numbers of texts or heads"),
        ],
    )
    def test_steps_that_do_not_follow(self, steps, complaint):
        with pytest.raises(ValueError, match=complaint):
            put_together(*steps())

    def test_an_encoder_of_another_text(self):
        steps = [causal(text(seed), 4, 1) for seed in range(2)]
        for step in steps:
            step.kind = "cross"
        with pytest.raises(ValueError, match="call 1 looks at other keys"):
            put_together(*steps)

    def test_weights_do_not_tell_a_window_from_tokens_that_were_taken_back(self):
        steps = [AttentionMap(causal(text(), *place).dense()) for place in ((0, 5), (5, 4), (7, 2))]
        with pytest.raises(ValueError, match="Weights alone do not tell"):
            put_together(*steps)

    def test_weights_do_not_tell_beams_from_other_texts(self):
        steps = [AttentionMap(causal(text(batch=2), *place, batch=2).dense()) for place in ((0, 5), (5, 1))]
        with pytest.raises(ValueError, match=r"whether these are beams.*pass beam_indices="):
            put_together(*steps)
        whole = put_together(*steps, beam_indices=[[0, 0], [1, 1]])
        assert torch.allclose(whole.dense(), causal(text(batch=2), 0, 6, batch=2).dense(), atol=1e-6)

    @pytest.mark.parametrize(
        ("indices", "complaint"),
        [
            ([[0, 0], [0, 1]], "step 1 goes on from other beams"),
            ([[0, 2], [1, 1]], "beams up to 2 are not those"),
            ([[0, 0, 0]], "of 3 steps"),
            ([0, 1], r"has the shape \(texts, steps\)"),
        ],
    )
    def test_beams_that_are_not_these(self, indices, complaint):
        steps = [causal(text(batch=2), *place, batch=2) for place in ((0, 5), (5, 1))]
        with pytest.raises(ValueError, match=complaint):
            put_together(*steps, beam_indices=indices)

    def test_what_keep_kept(self, llama):
        with attention(llama, keep=lambda one: one.rows(-1)) as maps:
            llama.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert not maps.is_generation
        with pytest.raises(TypeError, match="keep= kept a Tensor of each call"):
            maps.generated()

    def test_other_words_for_the_queries(self, recorded):
        with pytest.raises(ValueError, match='\'some\': pass "all", or "new"'):
            recorded.generated("some")


def test_the_error_about_several_calls_names_it(recorded):
    with pytest.raises(UnknownKeyError, match=r"maps.generated\(\)\['model.layers.0.self_attn'\] has them as one map"):
        recorded["model.layers.0.self_attn"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(5, 5), (1, 6), (1, 7)], True),
        ([(1, 1), (1, 2)], True),
        ([(5, 5), (1, 5), (1, 5)], True),  # a window of five
        ([(5, 5)], False),
        ([(5, 5), (5, 5)], False),  # two passes
        ([(5, 5), (6, 6)], False),  # two texts: the weights of their first queries differ
        ([(49, 196), (49, 196)], False),  # pooled queries, twice
        ([(5, 5), (1, 6), (5, 5), (1, 6)], False),  # two generations
    ],
)
def test_which_shapes_are_a_generation(sizes, expected):
    def weights(size, seed):
        return torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(seed)).softmax(-1)

    steps = [AttentionMap(weights(size, seed)) for seed, size in enumerate(sizes)]
    assert is_generation({"attn": steps}) is expected
