"""A word looks at a picture: the attention between the words of a text and the patches of a picture.

    with word_maps(pipeline) as maps:                  # of diffusers: where a word of the prompt goes
        picture = pipeline("a cat on a mat").images[0]
    plot.words(maps, "cat", picture)

    with word_maps(model, processor=processor) as maps:  # of transformers: which patches a word looks at
        model.generate(**inputs)
    plot.words(maps, "cat", image)

Both are rows of some tokens on the patches of some picture: `recording` asks a model for these and adds them up, so
that no map is kept, and `heat_maps` reads the sums. `intercept.places` says where patches lie among tokens, `words`
which tokens are a word.
"""

from .heat_maps import WordMaps, word_maps

__all__ = ["WordMaps", "word_maps"]
