"""What it costs to have the maps of words: of models that make pictures, and of one that reads them.

    python benchmarks/words.py                  # a step of each kind of denoiser
    python benchmarks/words.py flux wan         # of these alone
    python benchmarks/words.py generate         # LLaVA: time and memory of a generate

Models are those of diffusers and transformers with random weights. Their layers are fewer and narrower than those
of trained ones, which makes recording dearer beside the plain step. Twelve words are recorded. Each round runs a
plain step and one with `word_maps`, one after the other; the figures are medians over the rounds, of processor time
and of the clock. A step is the fourth of a picture; the first, in which each function is followed, has a column of
its own. Memory is the peak of a fresh process beside that of one with a plain run (Linux).
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import diffusers
import torch

from visualizer import word_maps

ROUNDS, WORDS = 12, [f"word{number}" for number in range(12)]
Step = tuple[torch.nn.Module, Callable[[], Any]]


def _step(model: torch.nn.Module, *args: torch.Tensor, **kwargs: Any) -> Step:
    model.eval()
    return model, lambda: model(*args, **kwargs)


def _unet(**more: Any) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(block_out_channels=(160, 320), layers_per_block=1, sample_size=48, **more)


def stable_diffusion() -> Step:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    unet = _unet(cross_attention_dim=768, attention_head_dim=8, **blocks)
    return _step(unet, torch.randn(2, 4, 48, 48), torch.tensor(5), encoder_hidden_states=torch.randn(2, 77, 768))


def stable_diffusion_xl() -> Step:
    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=1024,
        attention_head_dim=(2, 5),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )
    return _step(unet, torch.randn(2, 4, 48, 48), torch.tensor(5), encoder_hidden_states=torch.randn(2, 77, 1024))


def stable_diffusion_3() -> Step:
    sizes = {"num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 8, "caption_projection_dim": 512}
    text = {"joint_attention_dim": 256, "pooled_projection_dim": 64}
    model = diffusers.SD3Transformer2DModel(sample_size=64, patch_size=2, in_channels=4, **sizes, **text)
    given = {"encoder_hidden_states": torch.randn(2, 333, 256), "pooled_projections": torch.randn(2, 64)}
    return _step(model, torch.randn(2, 4, 48, 48), timestep=torch.tensor([5.0, 5.0]), **given)


def flux() -> Step:
    sizes = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 8}
    text = {"joint_attention_dim": 256, "pooled_projection_dim": 32, "axes_dims_rope": (16, 24, 24)}
    model = diffusers.FluxTransformer2DModel(patch_size=1, in_channels=64, **sizes, **text)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(32.0), torch.arange(32.0))
    return _step(
        model,
        hidden_states=torch.randn(1, 1024, 64),
        encoder_hidden_states=torch.randn(1, 256, 256),
        pooled_projections=torch.randn(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=places,
        txt_ids=torch.zeros(256, 3),
    )


def pixart() -> Step:
    sizes = {"num_layers": 3, "attention_head_dim": 72, "num_attention_heads": 8, "cross_attention_dim": 576}
    model = diffusers.PixArtTransformer2DModel(
        sample_size=64, patch_size=2, out_channels=8, caption_channels=256, use_additional_conditions=False, **sizes
    )
    given = {"encoder_hidden_states": torch.randn(2, 120, 256), "encoder_attention_mask": torch.ones(2, 120)}
    return _step(model, torch.randn(2, 4, 48, 48), timestep=torch.tensor([5, 5]), **given)


def hunyuan_dit() -> Step:
    sizes = {"num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 8, "hidden_size": 512}
    text = {"cross_attention_dim": 256, "cross_attention_dim_t5": 256, "pooled_projection_dim": 64}
    model = diffusers.HunyuanDiT2DModel(sample_size=64, patch_size=2, in_channels=4, **sizes, **text)
    return _step(
        model,
        torch.randn(2, 4, 48, 48),
        timestep=torch.tensor([5.0, 5.0]),
        encoder_hidden_states=torch.randn(2, 77, 256),
        text_embedding_mask=torch.ones(2, 77),
        encoder_hidden_states_t5=torch.randn(2, 256, 256),
        text_embedding_mask_t5=torch.ones(2, 256),
        image_meta_size=torch.ones(2, 6),
        style=torch.zeros(2, dtype=torch.long),
        image_rotary_emb=(torch.ones(576, 64), torch.zeros(576, 64)),
    )


def wan() -> Step:
    sizes = {"num_layers": 3, "num_attention_heads": 6, "attention_head_dim": 96, "ffn_dim": 2304}
    model = diffusers.WanTransformer3DModel(text_dim=256, freq_dim=64, rope_max_seq_len=64, **sizes)
    text = torch.randn(1, 256, 256)
    return _step(model, torch.randn(1, 16, 4, 32, 32), timestep=torch.tensor([5]), encoder_hidden_states=text)


def ltx() -> Step:
    sizes = {"num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 64, "cross_attention_dim": 512}
    model = diffusers.LTXVideoTransformer3DModel(in_channels=16, out_channels=16, caption_channels=256, **sizes)
    return _step(
        model,
        torch.randn(1, 1024, 16),
        encoder_hidden_states=torch.randn(1, 128, 256),
        timestep=torch.tensor([5]),
        encoder_attention_mask=torch.ones(1, 128),
        num_frames=4,
        height=16,
        width=16,
    )


DENOISERS = (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, pixart, hunyuan_dit, wan, ltx)


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Processor time and the clock's, in seconds."""
    begin = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - begin[0], time.perf_counter() - begin[1]


def _compared(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> str:
    """The plain run in ms, and the ratios of processor time and of the clock."""
    plain = statistics.median(bare[0] for bare, _ in pairs) * 1e3
    cpu, clock = (statistics.median(own[by] / bare[by] for bare, own in pairs) for by in (0, 1))
    return f"{plain:10.0f}{cpu:10.3f}{clock:10.3f}"


@torch.no_grad()
def steps(names: list[str]) -> None:
    """What a step takes."""
    print(f"{'':22}{'plain, ms':>10}{'cpu, x':>10}{'clock, x':>10}{'first step, cpu, x':>20}")
    for make in DENOISERS:
        if names and make.__name__ not in names:
            continue
        torch.manual_seed(0)
        pairs, firsts = [], []
        for number in range(ROUNDS):
            model, step = make()  # a new one, for later recordings of a model need not follow each function again
            step()
            with word_maps(model, tokens=WORDS) as maps:
                first, *_, own = _timed(step), step(), step(), _timed(step)
            assert maps[WORDS[3]].isfinite().all() and len(maps.layers) > 1
            bare = _timed(step)
            if number:
                pairs.append((bare, own))
                firsts.append(first[0] / bare[0])
        print(f"{make.__name__:22}{_compared(pairs)}{statistics.median(firsts):20.3f}", flush=True)


def llava(width: int, tokens: int) -> Step:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 8}
    size |= {"num_attention_heads": width // 64}
    vision = CLIPVisionConfig(**size, image_size=336, patch_size=14)
    text = LlamaConfig(**size, vocab_size=2000)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=576)
    model = LlavaForConditionalGeneration(config).eval()
    prompt = {
        "input_ids": torch.tensor([[1] + [5] * 576 + [*range(10, 40)]]),
        "pixel_values": torch.randn(1, 3, 336, 336),
    }
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model, lambda: model.generate(**prompt, **options)


@torch.no_grad()
def generate() -> None:
    """What it takes to write tokens, behind a prompt of 607."""
    print(f"{'width, tokens':22}{'plain, ms':>10}{'cpu, x':>10}{'clock, x':>10}{'peak memory, x':>20}")
    for width, tokens in ((256, 32), (768, 32), (256, 192)):
        model, run = llava(width, tokens)

        def recorded(model: torch.nn.Module = model, run: Callable[[], Any] = run) -> None:
            with word_maps(model):
                run()

        recorded()
        pairs = [(_timed(run), _timed(recorded)) for _ in range(5)]
        plain, own = (
            int(
                subprocess.run(
                    [sys.executable, __file__, "peak", str(width), str(tokens), what], check=True, capture_output=True
                ).stdout
            )
            for what in ("plain", "words")
        )
        print(f"{f'{width}, {tokens}':22}{_compared(pairs)}{own / plain:20.3f}", flush=True)


@torch.no_grad()
def peak(width: int, tokens: int, what: str) -> int:
    """The most memory that this process takes, in kB."""
    model, run = llava(width, tokens)
    if what == "plain":
        run()
    else:
        with word_maps(model):
            run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["peak"]:
        print(peak(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
        return
    print(
        f"torch {version('torch')}, diffusers {version('diffusers')}, transformers {version('transformers')}, 1 thread"
    )
    if sys.argv[1:] == ["generate"]:
        generate()
    else:
        steps(sys.argv[1:])


if __name__ == "__main__":
    main()
