from training.results.markdown import cell, plain


def test_control_characters_and_markup_are_shown():
    assert plain("a\x1b[2J b\n\nc\u202ed", 100) == "a�[2J b c�d"
    assert plain("long " * 9, 10) == "long long ..."
    assert cell("`x` and ``y``") == "``` `x` and ``y`` ```"
    assert cell("# $1$ ~~no~~ &lt; *a* | @you") == r"`# $1$ ~~no~~ &lt; *a* \| @you`"
