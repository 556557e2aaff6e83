"""EditrlError is what users read; did_you_mean is how it helps."""

import pytest

from editrl.errors import EditrlError, did_you_mean


def test_an_editrl_error_is_a_value_error():
    assert issubclass(EditrlError, ValueError)


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("clip_instructoin", " Did you mean 'clip_instruction'?"),
        ("pikscore", " Did you mean 'pickscore'?"),
        ("zzz", ""),
    ],
)
def test_the_nearest_option_is_suggested_or_nothing(word, suggestion):
    assert did_you_mean(word, ["clip_instruction", "clip_source_fidelity", "pickscore"]) == suggestion


def test_options_may_be_any_iterable():
    assert did_you_mean("sgima", {"sigma": 1}) == " Did you mean 'sigma'?"
    assert did_you_mean("sigma", iter([])) == ""
