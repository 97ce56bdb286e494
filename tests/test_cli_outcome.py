"""What commands say on stderr."""

import warnings

import pytest

from visualizer import cli
from visualizer.errors import VisualizerWarning


def test_characters_that_no_font_has_are_one_line(tmp_path, capsys):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0.5, 0.5, "\U00012000\U00012001 cuneiform \U00012000")
    cli.outcome.save(figure, tmp_path / "x.png")
    said = capsys.readouterr().err
    assert "\U00012000\U00012001: no installed font" in said
    assert 1 == said.count("\n")


def test_our_warnings_are_lines_and_others_stay_warnings(capsys):
    with pytest.warns(DeprecationWarning, match="soon gone") as others, cli.outcome.warnings_as_lines():
        warnings.warn("two\n lines", VisualizerWarning, stacklevel=1)
        warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
    assert "visualizer: two lines (docs/errors.md#warnings)\n" == capsys.readouterr().err
    assert 1 == len(others)


def test_quiet_drops_our_warnings(capsys):
    with cli.outcome.warnings_as_lines(quiet=True):
        warnings.warn("two lines", VisualizerWarning, stacklevel=1)
    assert "" == capsys.readouterr().err
