"""How each method of a plot looks: told apart by colour-blind readers, and in grey print."""

from collections.abc import Sequence

# Okabe and Ito's colours, which colour-blind readers tell apart, and markers for those who print in grey.
_STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#6c3483", "X"),
    ("#8a7500", "<"),
    ("#7b3f00", ">"),
    ("#00798c", "h"),
)
_FLOOR = ("#6b7280", ".")  # of `random`, which is there to be beaten


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """Line -> colour, marker, whether it is drawn hollow; a method's int8 variant looks like the method, hollow.

    Args:
        names: The lines as `series_name` names them, in the order of the legend.

    Example:
        >>> line_styles(["pomt", "random", "pomt+int8"])["pomt+int8"]
        ('#0072b2', 'o', True)
    """
    bases = list(dict.fromkeys(name.removesuffix("+int8") for name in names))
    others = [base for base in bases if base != "random"]
    chosen = {base: _style(number) for number, base in enumerate(others)} | {"random": _FLOOR}
    return {name: (*chosen[name.removesuffix("+int8")], name.endswith("int8")) for name in names}


def _style(number: int) -> tuple[str, str]:
    """Past the tenth the colours return with other markers."""
    around, place = divmod(number, len(_STYLES))
    return _STYLES[place][0], _STYLES[(place + around) % len(_STYLES)][1]
