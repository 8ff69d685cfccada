"""Text from elsewhere on a terminal: shown as it is, and never obeyed."""

from rich.markup import escape


def plain(text: object) -> str:
    """The text for a rich console, which then reads no markup in it; signs that a terminal would obey become "?"."""
    return escape("".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in str(text)))
