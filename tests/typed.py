"""What a type checker knows of the results; `make types` checks it, and nothing here is run."""

from typing import Any, assert_type

import numpy as np
from torch import Tensor, nn

from visualizer import attention, capture, get_local
from visualizer.maps import AttentionMap


def of_maps(model: nn.Module) -> None:
    with attention(model) as maps:
        pass
    assert_type(maps["layers.0"], AttentionMap)
    assert_type(maps[-1], AttentionMap)
    assert_type(maps[-3:], list[AttentionMap])
    assert_type(maps.calls("layers.0"), list[AttentionMap])
    assert_type([one for one in maps], list[AttentionMap])
    assert_type(maps.generated()[0], AttentionMap)
    assert_type(maps[0].dense(), Tensor)
    assert_type(maps[0][0, 3], Tensor)
    assert_type(maps.stack(), Tensor)


def of_what_was_kept(model: nn.Module) -> None:
    maps = attention(model, keep=lambda one: one.rows(0)).start()
    assert_type(maps[0], Tensor)
    assert_type(maps["layers.0"], Tensor)


def of_locals(model: nn.Module) -> None:
    with capture(model, "attn") as found:
        pass
    assert_type(found["layers.0"], list[Any])
    assert_type(found.stack(), np.ndarray[Any, Any])
    assert_type(capture(model, "attn", keep="tensor").stack(), Tensor | np.ndarray[Any, Any])
    assert_type(capture(model, "attn", keep=lambda value: value.mean()).start().stack(), Any)
    assert_type(get_local.cache.stack(), Any)


@get_local("attn")
def attend(x: Tensor) -> Tensor:
    attn = x.softmax(-1)
    return attn @ x


assert_type(attend(Tensor()), Tensor)
