"""visualizer.statistics during training: by a plain loop, by Lightning, by transformers' Trainer."""

import contextlib
import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import PADDING, SIZE, TEXT, transformers_model

from visualizer import attention
from visualizer.statistics import (
    Confidence,
    Entropy,
    MeanMap,
    Monitor,
    Patterns,
    Received,
    Sink,
    lightning_callback,
    trainer_callback,
)


class Block(nn.Module):
    """Attention as models write it today: fused, with dropout; and checkpointed, if that is asked for."""

    def __init__(self, reentrant=None, dropout=0.5):
        super().__init__()
        self.to_qkv, self.out, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)
        self.reentrant, self.dropout = reentrant, dropout

    def forward(self, x):
        run = self.mix if self.reentrant is None else lambda x: checkpoint(self.mix, x, use_reentrant=self.reentrant)
        x = x + run(x)
        return x + F.dropout(self.mlp(x).relu(), self.dropout, self.training)

    def mix(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


def make_model(**options):
    torch.manual_seed(0)
    return nn.Sequential(Block(**options), Block(**options))


def batch_of(step, size=3, tokens=5):
    return torch.randn(size, tokens, 16, generator=torch.Generator().manual_seed(step))


def train(model, steps, monitor=None, run=None, batches=1):
    """Train, and return what was logged, by steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logged = {}
    for step in range(steps):
        with contextlib.nullcontext({}) if monitor is None else monitor(step) as values:
            for number in range(batches):
                loss = (run or model)(batch_of(10 * step + number).requires_grad_()).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if values:
            logged[step] = values
    return logged


def numbers_of(weights):
    """Entropy, what the first key gets and the largest weights, by numpy, of (batch, heads, queries, keys)."""
    weights = np.asarray(weights, np.float64)
    entropy = -(weights * np.log(weights)).sum(-1)
    return {"entropy": entropy.mean(), "sink": weights[..., 0].mean(), "confidence": weights.max(-1).mean()}


def weights_of(model, batch):
    """The weights of each layer, from its parameters alone, float64: one batch through the blocks in eval mode."""
    found, x = {}, batch
    with torch.no_grad():
        for name, block in model.named_children():
            q, k, _ = block.to_qkv(x).unflatten(-1, (3, 2, 8)).double().permute(2, 0, 3, 1, 4).numpy()
            scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            found[name] = weights / weights.sum(-1, keepdims=True)
            x = block(x)
    return found


def is_plain(model):
    """Whether nothing is installed in a model: no hook, and no function put in place of a class's own."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
        for module in model.modules()
    )


def expected_of(weights):
    return {f"attention/{name}/{path}": value for path in weights for name, value in numbers_of(weights[path]).items()}


def everything():
    return Entropy(), Sink(), Confidence()


def test_the_steps_whose_turn_it_is_have_numbers_and_the_others_none():
    model = make_model()
    logged = train(model, 9, Monitor(model, *everything(), every=4))
    assert [0, 4, 8] == list(logged)
    expected = {f"attention/{name}/{path}" for name in ("entropy", "sink", "confidence") for path in "01"}
    assert expected == set(logged[4])


def test_the_numbers_are_those_of_the_weights_in_this_very_step():
    model, logged, expected = make_model(dropout=0.0), {}, {}
    monitor, optimizer = Monitor(model, *everything(), every=2), torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(5):
        expected[step] = expected_of(weights_of(model, batch_of(step)))
        with monitor(step) as logged[step]:
            model(batch_of(step)).square().mean().backward()
            optimizer.step()
    assert {} == logged[1] == logged[3]
    for step in (0, 2, 4):
        assert pytest.approx(expected[step], abs=1e-6) == logged[step]
    assert abs(logged[4]["attention/entropy/1"] - logged[0]["attention/entropy/1"]) > 1e-3


@pytest.mark.parametrize("make", [make_model, lambda: nn.Sequential(explicit(), explicit())], ids=["fused", "explicit"])
def test_with_dropout_the_weights_are_those_before_it(make):
    model = make().train()
    torch.manual_seed(1)
    with attention(model) as maps:
        model(batch_of(0))
    weights = {path: maps[path].numpy() for path in maps.paths}
    assert all(np.allclose(1, layer.sum(-1), atol=1e-6) for layer in weights.values())
    torch.manual_seed(1)
    with Monitor(model, *everything())(0) as values:
        model(batch_of(0))
    assert pytest.approx(expected_of(weights), abs=1e-6) == values


def explicit():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 16, dropout=0.5, batch_first=True)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_goes_on_to_the_bit_as_it_would_without(reentrant):
    def trained(is_monitored):
        model = make_model(reentrant=reentrant)
        train(model, 4, Monitor(model, *everything(), every=2) if is_monitored else None)
        return [*model.state_dict().values(), torch.rand(3), torch.get_rng_state()]

    bare, monitored = trained(False), trained(True)
    assert all(torch.equal(one, other) for one, other in zip(bare, monitored, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_gradient_checkpointing_computes_again_does_not_count(reentrant):
    model, calls = make_model(reentrant=reentrant, dropout=0.0), []
    count = Counted(calls)
    monitor = Monitor(model, *everything(), count)
    x = batch_of(0).requires_grad_()
    expected = expected_of(weights_of(make_model(dropout=0.0), batch_of(0)))
    with monitor(0) as values:
        model(x).square().mean().backward()
    assert 2 == len(calls)
    assert [[3, 3]] * 2 == monitor.last["counted"].count.tolist()
    assert pytest.approx(expected, abs=1e-6) == {name: value for name, value in values.items() if "counted" not in name}


class Counted(Entropy):
    """Tells how often a layer is looked at."""

    def __init__(self, calls):
        super().__init__(name="counted")
        self.calls = calls

    def __deepcopy__(self, memo):
        return Counted(self.calls)

    def of(self, layer, texts):
        self.calls.append(layer.path)
        return super().of(layer, texts)


def test_a_backward_pass_within_the_models_call_is_not_measured_either():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model(reentrant=False, dropout=0.0)

        def forward(self, x):
            return torch.autograd.grad(self.net(x).square().sum(), x)[0]

    monitor = Monitor(Forces(), Entropy())
    with monitor(0):
        monitor.model(batch_of(0).requires_grad_())
    assert [[3, 3]] * 2 == monitor.last["entropy"].count.tolist()


def test_all_batches_of_an_accumulated_step_count():
    model = make_model(dropout=0.0)
    maps = [weights_of(model, batch_of(number, size)) for number, size in enumerate((3, 2))]
    expected = expected_of({path: np.concatenate([one[path] for one in maps]) for path in "01"})
    monitor = Monitor(model, *everything())
    with monitor(0) as values:
        for number, size in enumerate((3, 2)):
            model(batch_of(number, size)).square().mean().backward()
    assert pytest.approx(expected, abs=1e-6) == values
    assert (5, ("0", "1")) == (monitor.last.samples, monitor.last.paths)


def test_the_last_measured_step_is_known_head_by_head():
    model = make_model(dropout=0.0)
    monitor = Monitor(model, Entropy(), every=2)
    assert monitor.last is None
    with monitor(0):
        model(batch_of(0))
    with monitor(1):
        model(batch_of(1))
    weights = weights_of(model, batch_of(0))["1"]
    expected = -(weights * np.log(weights)).sum(-1).mean(-1)
    found = monitor.last["entropy"]
    np.testing.assert_allclose(expected.mean(0), found.mean[1], atol=1e-6)
    np.testing.assert_allclose(expected.min(0), found.minimum[1], atol=1e-6)
    np.testing.assert_allclose(expected.var(0, ddof=1), found.variance[1], atol=1e-6)


def test_under_autocast_the_numbers_are_those_of_the_half_precision_that_runs():
    model = make_model(dropout=0.0)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch_of(0))

    with attention(model) as maps:
        run()
    assert torch.bfloat16 == maps[0].source.dtype
    with Monitor(model, *everything())(0) as values:
        run().float().square().mean().backward()
    assert pytest.approx(expected_of({path: maps[path].numpy() for path in "01"}), abs=1e-5) == values
    assert pytest.approx(expected_of(weights_of(model, batch_of(0))), abs=0.02) == values


@pytest.mark.parametrize("is_given_compiled", [False, True], ids=["the model", "the compiled model"])
def test_a_compiled_model_has_the_same_numbers_and_is_compiled_once(is_given_compiled):
    torch._dynamo.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    model = make_model(dropout=0.0)
    bare = make_model(dropout=0.0)
    expected = train(bare, 5, Monitor(bare, *everything(), every=2))
    compiled = torch.compile(model, backend=backend)
    monitor = Monitor(compiled if is_given_compiled else model, *everything(), every=2)
    found = train(model, 5, monitor, run=compiled)
    assert [0, 2, 4] == list(found)
    for step in found:
        assert pytest.approx(expected[step], abs=1e-6) == found[step]
    assert 1 == len(compilations)


def test_between_the_steps_nothing_is_installed():
    model = make_model()
    functions = F.scaled_dot_product_attention, torch.softmax, torch.matmul, nn.Module.__call__, Block.forward
    attributes = [dict(vars(module)) for module in model.modules()]
    monitor = Monitor(model, Entropy(), every=3)
    seen = []
    for step in range(7):
        with monitor(step):
            seen.append(is_plain(model))
            assert (step % 3 != 0) == (torch._C._len_torch_function_stack() == 0 and is_plain(model))
            model(batch_of(step))
        assert is_plain(model)
        assert 0 == torch._C._len_torch_function_stack()
    assert [False, True, True, False, True, True, False] == seen
    now = F.scaled_dot_product_attention, torch.softmax, torch.matmul, nn.Module.__call__, Block.forward
    assert functions == now
    assert [one.keys() for one in attributes] == [vars(module).keys() for module in model.modules()]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_step_leaves_nothing_behind(error):
    model = make_model()
    monitor = Monitor(model, Entropy(), every=1)
    with pytest.raises(error, match="out of luck"), monitor(0) as values:
        model(batch_of(0))
        raise error("out of luck")
    assert ({}, None) == (values, monitor.last)
    assert is_plain(model)
    with monitor(1) as values:
        model(batch_of(1))
    assert 2 == len(values)


def test_an_error_in_the_middle_of_the_model_leaves_nothing_behind():
    model = make_model(dropout=0.0)
    monitor = Monitor(model, *everything(), every=1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), monitor(0):
        model(torch.randn(2, 5, 7))
    assert is_plain(model)
    expected = expected_of(weights_of(model, batch_of(1)))
    with monitor(1) as values:
        model(batch_of(1))
    assert pytest.approx(expected, abs=1e-6) == values


def test_a_step_that_is_gone_on_from_or_does_not_run_the_model():
    model, logged = make_model(), []
    monitor = Monitor(model, Entropy(), every=1)
    for step in range(2):
        with monitor(step) as values:
            logged.append(values)
            if step:
                model(batch_of(0))
                continue
    assert [0, 2] == [len(values) for values in logged]


def test_a_layer_whose_weights_are_nan_is_left_out():
    model = make_model(dropout=0.0)
    expected = expected_of(weights_of(model, batch_of(0)))
    nn.init.constant_(model[1].to_qkv.weight, torch.nan)
    with Monitor(model, *everything())(0) as values:
        model(batch_of(0))
    assert pytest.approx({name: value for name, value in expected.items() if name.endswith("/0")}, abs=1e-6) == values


def test_images_and_heads_that_have_no_number_do_not_count():
    model = make_model(dropout=0.0)
    x = batch_of(0)
    expected = expected_of(weights_of(model, x[:2]))
    x[2] = torch.nan
    monitor = Monitor(model, *everything())
    with monitor(0) as values:
        model(x)
    assert pytest.approx(expected, abs=1e-6) == values
    assert [[2, 2]] * 2 == monitor.last["entropy"].count.tolist()


def test_entropy_that_collapses_shows_in_what_is_logged():
    """Noisy training at a far too large rate drives the scores apart, as queries and keys grow."""
    model = make_model(dropout=0.0)
    monitor, entropies = Monitor(model, Entropy(), Confidence(), every=5), []
    optimizer = torch.optim.SGD(model[1].to_qkv.parameters(), lr=2.0)
    x = batch_of(0)
    target = torch.eye(5)[[1, 2, 3, 4, 0]].expand(3, 2, 5, 5)
    for step in range(41):
        with monitor(step) as values:
            model(x)
            q, k, _ = model[1].to_qkv(model[0](x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            loss = -((q @ k.mT / 8**0.5).log_softmax(-1) * target).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if values:
            entropies.append(values["attention/entropy/1"])
    assert 9 == len(entropies)
    assert 0.5 * np.log(5) < entropies[0] < np.log(5)
    assert entropies[-1] < 0.25 * entropies[0]
    assert values["attention/confidence/1"] > 0.8


def test_padding_that_the_model_is_told_of_does_not_count():
    model = make_bert()
    monitor = Monitor(model, *everything())
    ids = torch.randint(5, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    with attention(model) as maps:
        model(input_ids=ids, attention_mask=PADDING)
    expected = dict.fromkeys(("entropy", "sink", "confidence"), 0.0)
    for text in range(2):
        length = int(PADDING[text].sum())
        for name, value in numbers_of(maps[0].numpy()[[text], :, :length, :length]).items():
            expected[name] += value / 2
    with monitor(0) as values:
        model(input_ids=ids, attention_mask=PADDING).logits.sum().backward()
    path = maps.paths[0]
    assert pytest.approx(expected, abs=1e-6) == {name: values[f"attention/{name}/{path}"] for name in expected}
    with monitor(1 * 50) as values, attention(model) as maps:
        model(input_ids=ids)
    expected = numbers_of(maps[0].numpy())
    assert pytest.approx(expected, abs=1e-6) == {name: values[f"attention/{name}/{path}"] for name in expected}


def test_part_of_a_model_may_be_measured_under_another_prefix():
    model = make_model()
    with Monitor(model[1], Entropy(), prefix="deep ")(0) as values:
        model(batch_of(0))
    assert ["deep entropy/"] == list(values)


@pytest.mark.parametrize(
    ("statistics", "options", "message"),
    [
        ((), {}, "pass the statistics to collect"),
        ((Entropy(), Entropy()), {}, r"one name: \['entropy', 'entropy'\]"),
        ((Received(),), {}, "received has many numbers a head"),
        ((Patterns(),), {}, "patterns has many numbers a head"),
        ((MeanMap(),), {}, "mean_map has many numbers a head"),
        ((Entropy(),), {"every": 0}, "every=0: pass how many steps, 1 or more"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [partial(Monitor, nn.Identity()), lightning_callback, partial(trainer_callback, None)],
    ids=["loop", "lightning", "transformers"],
)
def test_what_cannot_be_logged_is_told_at_once(make, statistics, options, message):
    with pytest.raises(ValueError, match=message):
        make(*statistics, **options)


def scalars_in(folder):
    """What event files of TensorBoard say: {tag: {step: value}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


LIGHTNING = ["lightning.pytorch", "pytorch_lightning"]
with_lightning = pytest.mark.filterwarnings(  # its use of torch, and its advice to have more processes load the data
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
)


TAGS = {f"attention/{name}/net.{path}" for name in ("entropy", "sink", "confidence") for path in "01"}


def fit(tmp_path, callback, module=None, name="lightning.pytorch", **options):
    """A real training by Lightning: as many batches as there are numbers, all of them the same one."""
    lightning = importlib.import_module(name)
    loggers = importlib.import_module(f"{name}.loggers")
    options = {"max_steps": 6, "log_every_n_steps": 2, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=loggers.TensorBoardLogger(tmp_path, name="", version="run"),
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = make_module(name) if module is None else module
    loader = torch.utils.data.DataLoader([batch_of(0)[0]] * 36, batch_size=3)
    trainer.fit(module, loader)
    return module


def make_module(name="lightning.pytorch", **own):
    lightning = importlib.import_module(name)

    def training_step(self, batch):
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    kind = type(
        "Module",
        (lightning.LightningModule,),
        {"training_step": training_step, "configure_optimizers": configure_optimizers, **own},
    )
    module = kind()
    module.net = make_model(dropout=0.0)
    return module


@pytest.mark.parametrize("name", LIGHTNING)
@with_lightning
def test_lightning_logs_the_numbers_in_the_steps_of_its_own_logs(tmp_path, name):
    module = fit(tmp_path, lightning_callback(*everything(), every=2), name=name)
    found = scalars_in(tmp_path / "run")
    expected = expected_of({f"net.{path}": one for path, one in weights_of(module.net, batch_of(0)[:1]).items()})
    assert TAGS == {tag for tag in found if tag.startswith("attention/")} == set(expected)
    assert [1, 3, 5] == list(found["loss"])
    for tag, value in expected.items():
        assert pytest.approx(dict.fromkeys((1, 3, 5), value), abs=1e-6) == found[tag]
    assert is_plain(module)


@with_lightning
def test_lightning_steps_of_several_batches_are_measured_in_the_first(tmp_path):
    calls = []
    fit(tmp_path, lightning_callback(Counted(calls), every=2), accumulate_grad_batches=2)
    assert [1, 3, 5] == list(scalars_in(tmp_path / "run")["attention/counted/net.1"])
    assert ["net.0", "net.1"] * 3 == calls


@with_lightning
def test_lightning_steps_of_several_optimizers_are_counted_once(tmp_path):
    def training_step(self, batch):
        for optimizer in self.optimizers():
            loss = self.net(batch).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(block.parameters(), lr=0.1) for block in (*self.net, self.net)]

    module = make_module(training_step=training_step, configure_optimizers=configure_optimizers)
    module.automatic_optimization = False
    callback = lightning_callback(Entropy(), every=2)
    fit(tmp_path, callback, module, max_steps=18)
    found = scalars_in(tmp_path / "run")
    assert [1, 3, 5] == list(found["loss"]) == list(found["attention/entropy/net.0"])
    assert [[9, 9]] * 2 == callback.monitor.last["entropy"].count.tolist()  # three images, three passes


@with_lightning
def test_an_error_in_a_lightning_step_leaves_nothing_behind(tmp_path):
    def training_step(self, batch):
        self.net(batch)
        assert not is_plain(self)
        raise ValueError("out of luck")

    module, callback = make_module(training_step=training_step), lightning_callback(Entropy(), every=1)
    with pytest.raises(ValueError, match="out of luck"):
        fit(tmp_path, callback, module)
    assert is_plain(module)
    assert 0 == torch._C._len_torch_function_stack()
    assert callback.monitor.last is None


@with_lightning
def test_a_lightning_batch_that_is_skipped_leaves_nothing_behind(tmp_path):
    found = []
    module = make_module(
        on_train_batch_start=lambda self, batch, batch_idx: -1 if batch_idx else None,
        on_train_epoch_end=lambda self: found.append(is_plain(self)),
    )
    fit(tmp_path, lightning_callback(Entropy(), every=1), module, max_steps=-1, max_epochs=2)
    assert [True, True] == found
    assert [0, 1] == list(scalars_in(tmp_path / "run")["attention/entropy/net.0"])


@with_lightning
def test_a_lightning_callback_measures_each_module_that_it_is_used_for(tmp_path):
    callback = lightning_callback(Entropy(), every=1)
    for number in range(2):
        module = fit(tmp_path / str(number), callback, max_steps=1)
        assert callback.monitor.model is module
        assert [0] == list(scalars_in(tmp_path / str(number) / "run")["attention/entropy/net.0"])


def test_a_lightning_callback_is_one_of_the_library_that_is_in_use(monkeypatch):
    classes = {name: importlib.import_module(name).Callback for name in LIGHTNING}
    one, other = classes.values()
    assert isinstance(lightning_callback(Entropy()), one)
    assert isinstance(lightning_callback(Entropy()), other)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    callback = lightning_callback(Entropy())
    assert (False, True) == (isinstance(callback, one), isinstance(callback, other))
    for name in LIGHTNING:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install lightning"):
        lightning_callback(Entropy())


BERT = "bert.encoder.layer.{}.attention.self"


def make_bert():
    torch.manual_seed(0)
    size = SIZE | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return transformers_model("Bert", "ForMaskedLM", attention="sdpa", **TEXT, **size)


def make_trainer(tmp_path, model, **options):
    """A Trainer whose batches are all alike: two texts, of which one has padding."""
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": 6, "logging_steps": 2, "learning_rate": 0.0, "report_to": "tensorboard", **options}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    ids = torch.arange(10).view(2, 5) + 5
    texts = [{"input_ids": ids[text], "attention_mask": PADDING[text], "labels": ids[text]} for text in (0, 1)]
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=texts * 10,
        data_collator=lambda items: torch.utils.data.default_collate(texts),
    )


def numbers_of_bert(model):
    """What is expected of its layers with the trainer's batches, by numpy."""
    ids, expected = torch.arange(10).view(2, 5) + 5, {}
    with attention(model.eval()) as maps, torch.no_grad():
        model(input_ids=ids, attention_mask=PADDING)
    for layer, weights in enumerate(maps):
        texts = [numbers_of(weights.numpy()[[0]]), numbers_of(weights.numpy()[[1]][..., :3, :3])]
        for name in texts[0]:
            expected[f"attention/{name}/{BERT.format(layer)}"] = (texts[0][name] + texts[1][name]) / 2
    return expected


def test_transformers_trainer_logs_the_numbers_in_the_steps_of_its_own_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "run"))
    model = make_bert()
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(trainer_callback(trainer, *everything(), every=2))
    trainer.train()
    expected = numbers_of_bert(model)
    found = scalars_in(tmp_path / "run")
    assert [2, 4, 6] == list(found["train/loss"])
    assert {f"train/{name}" for name in expected} == {tag for tag in found if tag.startswith("train/attention")}
    for name, value in expected.items():
        assert pytest.approx(dict.fromkeys((2, 4, 6), value), abs=1e-6) == found[f"train/{name}"]
        logged = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        assert pytest.approx(dict.fromkeys((2, 4, 6), value), abs=1e-6) == logged
    assert is_plain(model)
    assert "training_step" not in vars(trainer)


def test_transformers_steps_of_several_batches_are_measured_in_the_first(tmp_path):
    calls, model = [], make_bert()
    trainer = make_trainer(tmp_path, model, gradient_accumulation_steps=3, report_to="none", max_steps=4)
    trainer.add_callback(trainer_callback(trainer, Counted(calls), every=2))
    trainer.train()
    assert [BERT.format(0), BERT.format(1)] * 2 == calls
    assert [2, 4] == [entry["step"] for entry in trainer.state.log_history if f"attention/counted/{calls[0]}" in entry]


def test_an_error_in_a_transformers_step_leaves_nothing_behind(tmp_path):
    model, seen = make_bert(), []
    trainer = make_trainer(tmp_path, model, report_to="none")

    def compute_loss(model, inputs, **_):
        seen.append(is_plain(model))
        raise ValueError("out of luck")

    trainer.compute_loss = compute_loss
    callback = trainer_callback(trainer, Entropy(), every=1)
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="out of luck"):
        trainer.train()
    assert [False] == seen
    assert is_plain(model)
    assert 0 == torch._C._len_torch_function_stack()
    assert "training_step" not in vars(trainer)
    del trainer.compute_loss
    trainer.train()
    assert [1, 2, 3, 4, 5, 6] == [entry["step"] for entry in trainer.state.log_history if len(entry) == 4]


def test_a_training_step_that_somebody_put_into_a_trainer_stays_there(tmp_path):
    trainer, steps = make_trainer(tmp_path, make_bert(), report_to="none", max_steps=4), []
    usual = trainer.training_step

    def own(*args, **kwargs):
        steps.append(len(trainer.state.log_history))
        return usual(*args, **kwargs)

    trainer.training_step = own
    trainer.add_callback(trainer_callback(trainer, Entropy(), every=2))
    trainer.train()
    assert 4 == len(steps)
    assert own is trainer.training_step


@pytest.mark.slow
def test_a_compiled_training_by_transformers_has_the_same_numbers(tmp_path):
    model = make_bert()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2, "report_to": "none"}
    trainer = make_trainer(tmp_path, model, **options)
    trainer.add_callback(trainer_callback(trainer, *everything(), every=2))
    trainer.train()
    expected = numbers_of_bert(model)
    entry = next(entry for entry in trainer.state.log_history if set(expected) <= set(entry))
    assert pytest.approx(expected, abs=1e-6) == {name: entry[name] for name in expected}
